"""A system: a language model that is shown images: questions and statements about them, and captions."""
