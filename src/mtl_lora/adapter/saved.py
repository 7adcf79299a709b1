"""Modules that are trained and saved whole beside the adapter: heads, norms, biases (``modules_to_save``).

Each weight becomes a float32 copy in its own place, where whatever reads it finds it; the frozen original is kept for
``disabled`` and ``unload``. On a base in bf16 or fp16 the copy is cast to the original's dtype as it is used, so at the
start the model's output is still the base's.
"""

import dataclasses
import fnmatch
from collections.abc import Iterator

import torch
from torch import nn

from mtl_lora.adapter.layer import is_quantised, whole
from mtl_lora.config import closest
from mtl_lora.errors import UserError

# Wrappers that stand between a module and its name, and the attribute under which they hold it.
WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DDP's or DeepSpeed's wrapper."""
    while attribute := _wrapper_attribute(model):
        model = getattr(model, attribute)
    return model


def _wrapper_attribute(module: nn.Module) -> str | None:
    found = (WRAPPERS.get(cls.__name__) for cls in type(module).__mro__)
    return next((attribute for attribute in found if attribute in module._modules), None)


def named_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module below ``model`` under each name it has, without the names of wrappers in between."""
    attribute = _wrapper_attribute(model)
    for name, child in model._modules.items():
        if child is not None:
            path = prefix if name == attribute else f"{prefix}.{name}" if prefix else name
            if name != attribute:
                yield path, child
            yield from named_modules(child, path)


@dataclasses.dataclass(eq=False)
class Slot:
    """A weight or buffer that is saved: its name, every (module, key) where it stands, and the frozen original."""

    name: str
    places: list[tuple[nn.Module, str]]
    original: torch.Tensor

    def _tables(self) -> list[tuple[dict, str]]:
        kind = "_parameters" if isinstance(self.original, nn.Parameter) else "_buffers"
        return [(getattr(module, kind), key) for module, key in self.places]

    def get(self) -> torch.Tensor:
        """The tensor that the model uses."""
        table, key = self._tables()[0]
        return table[key]

    def put(self, tensor: torch.Tensor) -> None:
        """Have the model use ``tensor``."""
        for table, key in self._tables():
            table[key] = tensor

    def put_original(self) -> torch.Tensor:
        """Have the model use the frozen original; returns what it used before."""
        trained = self.get()
        if self.original.device != trained.device:  # the model was moved since
            self.original.data = self.original.data.to(trained.device)
        self.put(self.original)
        return trained


def whole_modules(model: nn.Module, entries: list[str]) -> dict[str, nn.Module]:
    """The modules that entries of ``modules_to_save`` name (whole names, endings, or patterns as of a shell)."""
    return {name: module for name, module in named_modules(model) if any(_matches(name, entry) for entry in entries)}


def _is_pattern(entry: str) -> bool:
    return any(sign in entry for sign in "*?[")


def _matches(name: str, entry: str) -> bool:
    return fnmatch.fnmatchcase(name, entry) if _is_pattern(entry) else f".{name}".endswith(f".{entry}")


def find_slots(model: nn.Module, entries: list[str]) -> list[Slot]:
    """The weights that ``modules_to_save`` means, with the buffers of whole modules; the model is not changed.

    An entry names modules, or weights where no module has that name. Raises ``UserError`` for one that names neither,
    and for a quantised weight.
    """
    modules = {"": model, **dict(named_modules(model))}
    weights: dict[str, list[tuple[nn.Module, str]]] = {}  # by identity: a weight that is tied has several places
    tensors: dict[str, torch.Tensor] = {}
    for path, module in modules.items():
        persistent = {
            key: value for key, value in module._buffers.items() if key not in module._non_persistent_buffers_set
        }
        for key, value in [*module._parameters.items(), *persistent.items()]:
            if value is not None:
                tensors[f"{path}.{key}" if path else key] = value
                places = weights.setdefault(id(value), [])
                if (module, key) not in places:
                    places.append((module, key))
    chosen: dict[int, Slot] = {}
    for entry in entries:
        roots = tuple(f"{name}." for name in whole_modules(model, [entry]))
        named = [name for name in tensors if name.startswith(roots)] if roots else []
        if not roots or _is_pattern(entry):
            named += [n for n, value in tensors.items() if isinstance(value, nn.Parameter) and _matches(n, entry)]
        if not named:
            known = sorted({name.rpartition(".")[2] for name in modules if name})
            raise UserError(f"modules_to_save: no module with weights is named {entry!r}{closest(entry, known)}")
        for name in named:
            value = tensors[name]
            if isinstance(value, nn.Parameter) and is_quantised(value):
                raise UserError(f"modules_to_save: {name} is quantised and cannot be trained; load the base in bf16")
            chosen.setdefault(id(value), Slot(name, weights[id(value)], value))
    return [chosen[key] for key in weights if key in chosen]


@torch.no_grad()
def train_slots(model: nn.Module, slots: list[Slot], entries: list[str]) -> None:
    """Put a trainable float32 copy (float64 of float64) into each slot."""
    for slot in slots:
        if not isinstance(slot.original, nn.Parameter):
            slot.put(slot.original.clone())
            continue
        dtype = torch.float64 if slot.original.dtype == torch.float64 else torch.float32
        with whole(slot.original):
            slot.put(nn.Parameter(slot.original.detach().to(dtype, copy=True)))
    low = [slot for slot in slots if slot.original.is_floating_point() and slot.get().dtype != slot.original.dtype]
    places = [(module, key, slot.original.dtype) for slot in low for module, key in slot.places]
    # At the owner, for a recomputation may begin there, and at the whole module, which may read its parts' weights.
    for module in {module for module, _, _ in places} | set(whole_modules(model, entries).values()):
        below = set(module.modules())
        own = [place for place in places if place[0] in below]
        if own:
            module.forward = CastForward(module, own)


def release_slots(slots: list[Slot], model: nn.Module, keep: bool, trainable: set[int]) -> None:
    """Put the originals back, or (keep) the trained values as plain weights in the originals' dtype."""
    for slot in slots:
        trained = slot.put_original()
        if keep and isinstance(slot.original, nn.Parameter):
            value = trained.detach().to(slot.original.dtype)
            slot.put(nn.Parameter(value, requires_grad=id(slot.original) in trainable))
        elif keep:
            slot.put(trained)
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, CastForward):
            del module.forward
            if forward.before is not None:
                module.forward = forward.before


class CastForward:
    """Stands in place of a module's forward: runs it with its float32 weights cast to the dtype they have in the base.

    places: (module, key, dtype) of each such weight.
    """

    def __init__(self, module: nn.Module, places: list[tuple[nn.Module, str, torch.dtype]]):
        self.module, self.places, self.before = module, places, vars(module).get("forward")

    def __call__(self, *arguments, **options):
        # What is no parameter was cast already, by the forward of a module around this one.
        masters = [(*place, place[0]._parameters[place[1]]) for place in self.places]
        masters = [place for place in masters if isinstance(place[-1], nn.Parameter)]
        try:
            for module, key, dtype, master in masters:
                module._parameters[key] = master.to(dtype)
            if self.before is not None:
                return self.before(*arguments, **options)
            return type(self.module).forward(self.module, *arguments, **options)
        finally:
            for module, key, _, master in masters:
                module._parameters[key] = master
