"""``python -m mtl_lora COMMAND``: the same as ``mtl-lora COMMAND``."""

from mtl_lora.cli import main

if __name__ == "__main__":
    main()
