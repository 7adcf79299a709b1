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

# The public names of each module. Modules are imported on first use, so that code without tensors (parsing a command
# line, reading a results file) does not wait for torch. Origin is the earlier name of Provenance.
_NAMES = {
    "adapter.checkpoint": ("Origin", "Provenance", "load", "save"),
    "adapter.config": ("AdapterConfig",),
    "adapter.inject": ("disabled", "inject", "merge", "print_trainable_parameters", "trainable_parameters", "unload"),
    "adapter.routing": ("TaskCollator",),
    "adapter.targets": ("adapter_layers",),
    "errors": ("UserError",),
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
    if name == "route":
        return importlib.import_module("mtl_lora.route")
    for module, names in _NAMES.items():
        if name in names:
            return getattr(importlib.import_module(f"mtl_lora.{module}"), name)
    raise AttributeError(f"module 'mtl_lora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
