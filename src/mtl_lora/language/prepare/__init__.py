"""The data sets that the project prepares for ``language``; the table of all sets is in ``mtl_lora.cli``."""
