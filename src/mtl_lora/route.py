"""The low door of task routing: ``with mtl_lora.route.use(task_ids):`` where ``task_ids=`` cannot be passed."""

from mtl_lora.adapter.routing import checkpoint_context, current, use

__all__ = ["checkpoint_context", "current", "use"]
