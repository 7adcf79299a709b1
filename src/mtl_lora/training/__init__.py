"""Training of any system with transformers' Trainer and task ids: sampling, checkpoints, resume, launches."""
