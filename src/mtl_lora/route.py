"""Task routing for code that cannot pass ``task_ids=`` to a model: ``with mtl_lora.route.use(task_ids):``."""

from mtl_lora.adapter.routing import checkpoint_context, current, use

__all__ = ["checkpoint_context", "current", "use"]
