"""A system: visual tokens of images in front of or behind a text, for questions, statements and captions."""
