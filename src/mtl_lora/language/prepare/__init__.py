"""Preparation of the language data sets; the table of all data sets is in ``mtl_lora.cli``."""
