"""``python -m mtl_lora.export COMMAND``: the same as ``mtl-lora export COMMAND``."""

from mtl_lora.export.cli import main

if __name__ == "__main__":
    main()
