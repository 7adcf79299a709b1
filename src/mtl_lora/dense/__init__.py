"""A system: one vision transformer for several dense maps of an image, with a decoder per task."""
