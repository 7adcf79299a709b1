"""Data sets that the project knows how to build: ``mtl-lora prepare SET`` (the table stands in ``mtl_lora.cli``)."""
