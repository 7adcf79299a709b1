"""MTL-LoRA (arXiv 2410.09437) and related methods: low-rank adaptation of one model to many tasks."""

import importlib
from typing import TYPE_CHECKING

from mtl_lora.version import __version__

if TYPE_CHECKING:
    from mtl_lora.adapter import routing as route
    from mtl_lora.adapter.checkpoint import Provenance, load, save
    from mtl_lora.adapter.config import AdapterConfig
    from mtl_lora.adapter.inject import (
        disabled,
        inject,
        merge,
        print_trainable_parameters,
        trainable_parameters,
        unload,
    )
    from mtl_lora.adapter.routing import TaskCollator
    from mtl_lora.adapter.targets import adapter_layers
    from mtl_lora.errors import UserError

# The module of each public name. Modules are imported on first use, so that code without tensors (parsing a command
# line, reading a results file) does not wait for torch.
_MODULES = {
    "AdapterConfig": "mtl_lora.adapter.config",
    "Origin": "mtl_lora.adapter.checkpoint",  # the earlier name of Provenance
    "Provenance": "mtl_lora.adapter.checkpoint",
    "TaskCollator": "mtl_lora.adapter.routing",
    "UserError": "mtl_lora.errors",
    "adapter_layers": "mtl_lora.adapter.targets",
    "disabled": "mtl_lora.adapter.inject",
    "inject": "mtl_lora.adapter.inject",
    "load": "mtl_lora.adapter.checkpoint",
    "merge": "mtl_lora.adapter.inject",
    "print_trainable_parameters": "mtl_lora.adapter.inject",
    "route": "mtl_lora.route",
    "save": "mtl_lora.adapter.checkpoint",
    "trainable_parameters": "mtl_lora.adapter.inject",
    "unload": "mtl_lora.adapter.inject",
}

__all__ = [
    "AdapterConfig",
    "Provenance",
    "TaskCollator",
    "UserError",
    "__version__",
    "adapter_layers",
    "disabled",
    "inject",
    "load",
    "merge",
    "print_trainable_parameters",
    "route",
    "save",
    "trainable_parameters",
    "unload",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'mtl_lora' has no attribute {name!r}")
    module = importlib.import_module(_MODULES[name])
    return module if name == "route" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
