"""Training: the Trainer, its checkpoints and the command behind finetune.py."""
