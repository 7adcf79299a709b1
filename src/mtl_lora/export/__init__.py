"""Checkpoints for other programs and from them: PEFT LoRA per task, merged models, imports; see docs/export.md."""
