"""transformers' Trainer with task ids, for any system: sampler, checkpoints, resume, distributed launches."""
