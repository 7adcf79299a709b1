"""Export checkpoints to other programs (a PEFT LoRA per task, merged models) and import theirs; see docs/export.md."""
