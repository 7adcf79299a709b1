"""Methods of a model's modules that an adapter replaces, and their restoration."""

import inspect
from collections.abc import Callable

from torch import nn


class Override:
    """A callable set on a module in place of its method ``name``.

    An object, not a closure, so that an injected model can be pickled and copied.
    """

    name: str

    def __init__(self, module: nn.Module):
        self.module, self.before = module, vars(module).get(self.name)
        setattr(module, self.name, self)

    @property
    def original(self) -> Callable:
        """The method that the module has without this override."""
        return self.before or inspect.getattr_static(type(self.module), self.name).__get__(self.module)


def remove_overrides(model: nn.Module) -> None:
    """Restore the original methods of all modules of a model."""
    for module in model.modules():
        for override in [value for value in vars(module).values() if isinstance(value, Override)]:
            delattr(module, override.name)
            if override.before is not None:
                setattr(module, override.name, override.before)
