"""MTL-LoRA (arXiv 2410.09437) and its rivals: low-rank adaptation of one language model to many tasks."""

import importlib

from mtl_lora.version import __version__

# Where each public name lives. Loaded on first use, so that reading a command line or a results file, which need
# no tensor, do not wait for torch.
_HOMES = {
    "AdapterConfig": "mtl_lora.adapter.config",
    "Origin": "mtl_lora.adapter.checkpoint",
    "UserError": "mtl_lora.errors",
    "adapter_layers": "mtl_lora.adapter.inject",
    "inject": "mtl_lora.adapter.inject",
    "load": "mtl_lora.adapter.checkpoint",
    "merge": "mtl_lora.adapter.inject",
    "route": "mtl_lora.adapter.routing",
    "save": "mtl_lora.adapter.checkpoint",
    "trainable_parameters": "mtl_lora.adapter.inject",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'mtl_lora' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    return home if name == "route" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted(__all__)
