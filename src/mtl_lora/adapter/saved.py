"""Modules that are trained and saved whole with the adapter (``modules_to_save``): heads, norms, biases.

Each weight is replaced in its module by a trainable float32 copy; the frozen original is kept for ``disabled`` and
``unload``. On a base in bf16 or fp16 a forward casts the copy to the original's dtype, so the model's output is at
first still that of the base.
"""

import contextlib
import dataclasses
import fnmatch
import inspect
import threading
from collections.abc import Iterator

import torch
from torch import nn

from mtl_lora.adapter.layer import gathered, is_partitioned, is_quantised, is_sharded, require_in_memory
from mtl_lora.adapter.override import Override
from mtl_lora.config import closest
from mtl_lora.errors import UserError

# Wrapper classes, and the attribute that holds the wrapped module; wrappers do not count in module names.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
    "AveragedModel": "module",
}


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile, DDP, FSDP or DeepSpeed."""
    while attribute := _wrapper_attribute(model):
        model = getattr(model, attribute)
    return model


def _wrapper_attribute(module: nn.Module) -> str | None:
    found = (_WRAPPERS.get(cls.__name__) for cls in type(module).__mro__)
    return next((attribute for attribute in found if attribute in module._modules), None)


def named_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every module below ``model`` under each of its names; the names of wrappers are left out."""
    attribute = _wrapper_attribute(model)
    for name, child in model._modules.items():
        if child is not None:
            path = prefix if name == attribute else f"{prefix}.{name}" if prefix else name
            if name != attribute:
                yield path, child
            yield from named_modules(child, path)


@dataclasses.dataclass(eq=False)
class Slot:
    """A weight or buffer that is saved whole.

    name: its name in checkpoints. places: every (module, key) that holds it. original: the frozen tensor of the base.
    like: another weight of the base with the original's dtype, from which a later cast of the model can be seen.
    """

    name: str
    places: list[tuple[nn.Module, str]]
    original: torch.Tensor
    like: nn.Parameter | None = None

    @property
    def is_weight(self) -> bool:
        """Whether it is a weight, which is trained, and not a buffer, which is only saved."""
        return isinstance(self.original, nn.Parameter)

    def get(self) -> torch.Tensor:
        """Return the tensor that the model uses."""
        module, key = self.places[0]
        return (module._parameters if self.is_weight else module._buffers)[key]

    def put(self, tensor: torch.Tensor) -> None:
        """Make the model use ``tensor``."""
        for module, key in self.places:
            (module._parameters if self.is_weight else module._buffers)[key] = tensor

    def put_original(self) -> torch.Tensor:
        """Make the model use the frozen original; returns the tensor that it used before."""
        trained = self.get()
        kept = self.is_weight and trained.dtype == _copy_dtype(self.original.dtype)
        dtype = self.like.dtype if self.like is not None else self.original.dtype if kept else trained.dtype
        if (self.original.device, self.original.dtype) != (trained.device, dtype):  # the model was moved or cast
            self.original.data = self.original.data.to(trained.device, dtype)
        self.put(self.original)
        return trained


def _copy_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the trained copy of a weight."""
    return dtype if dtype == torch.float64 else torch.float32


def require_slots(slots: list[Slot]) -> None:
    """Raise ``UserError`` if a tensor of ``slots`` was offloaded or resized, so that its original no longer fits."""
    for slot in slots:
        own = slot.get()
        if not slot.original.is_meta:
            require_in_memory(slot.name, own)
        if own.shape != slot.original.shape and not (is_sharded(own) or is_sharded(slot.original)):
            sizes = f"{list(slot.original.shape)} when the adapter was put on, and now has {list(own.shape)}"
            raise UserError(f"{slot.name} had the shape {sizes}; resize a module that is saved whole before inject")


def whole_modules(model: nn.Module, entries: list[str]) -> dict[str, nn.Module]:
    """Return the modules that entries of ``modules_to_save`` select, by name.

    An entry is a whole name, a name ending or a shell-style pattern. The model itself has the empty name, so only ``*``
    selects it.
    """
    named = {"": model, **dict(named_modules(model))}
    return {name: module for name, module in named.items() if any(_matches(name, entry) for entry in entries)}


def _is_pattern(entry: str) -> bool:
    return any(sign in entry for sign in "*?[")


def _matches(name: str, entry: str) -> bool:
    return fnmatch.fnmatchcase(name, entry) if _is_pattern(entry) else f".{name}".endswith(f".{entry}")


def find_slots(model: nn.Module, entries: list[str]) -> list[Slot]:
    """Return the weights, and the buffers of whole modules, that ``modules_to_save`` selects; the model is unchanged.

    An entry names modules, or weights if no module has that name; a pattern may select both. Raises ``UserError`` for
    an entry that names neither, and for a weight that is quantised or offloaded.
    """
    modules = {"": model, **dict(named_modules(model))}
    slots: dict[int, Slot] = {}  # by identity, because a tied weight has several places
    by_name: dict[str, Slot] = {}
    for path, module in modules.items():
        for key, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None and key not in module._non_persistent_buffers_set:
                name = f"{path}.{key}" if path else key
                by_name[name] = slot = slots.setdefault(id(value), Slot(name, [], value))
                if (module, key) not in slot.places:
                    slot.places.append((module, key))
    chosen: dict[int, str] = {}
    for entry in entries:
        roots = tuple(f"{name}." if name else "" for name in modules if _matches(name, entry))
        named = [name for name in by_name if name.startswith(roots)] if roots else []
        if not roots or _is_pattern(entry):
            named += [name for name, slot in by_name.items() if slot.is_weight and _matches(name, entry)]
        if not named:
            known = sorted({name.rpartition(".")[2] for name in modules if name})
            raise UserError(f"modules_to_save: no module with weights is named {entry!r}{closest(entry, known)}")
        for name in named:
            slot = by_name[name]
            if slot.is_weight and is_quantised(slot.original):
                raise UserError(f"modules_to_save: {name} is quantised and cannot be trained; load the base in bf16")
            if any(hasattr(module, "_hf_hook") for module, _ in slot.places):
                require_in_memory(f"modules_to_save: {name}", slot.original)
            chosen.setdefault(id(slot.original), name)
    return [dataclasses.replace(slot, name=chosen[key]) for key, slot in slots.items() if key in chosen]


@torch.no_grad()
def train_slots(model: nn.Module, slots: list[Slot], entries: list[str]) -> None:
    """Put a trainable copy into each slot: float32, or float64 if the original is float64; a buffer is just copied."""
    places, like = [], {}
    saved = {id(slot.original) for slot in slots}
    for weight in model.parameters():
        if weight.is_floating_point() and not weight.requires_grad and id(weight) not in saved:
            like.setdefault(weight.dtype, weight)
    for slot in slots:
        dtype = slot.original.dtype
        if slot.is_weight:
            slot.like = like.get(dtype)
            kept = _copy_dtype(dtype)
            with gathered(slot.original):
                slot.put(nn.Parameter(slot.original.detach().to(kept, copy=True)))
            if kept != dtype:
                places += [(module, key, dtype) for module, key in slot.places]
        else:
            slot.put(slot.original.clone())
    # Casts happen in the module that owns the weight, because a recomputation may begin there, and in the whole module,
    # which may read the weights of its parts.
    for module in {module for module, _, _ in places} | set(whole_modules(model, entries).values()):
        below = set(module.modules())
        own = [place for place in places if place[0] in below]
        if own:
            CastForward(module, own, like)


# Held while a forward has cast weights in its modules: another thread would see them change during its own forward.
_casting = threading.RLock()


class CastForward(Override):
    """A forward during which float32 weights are cast to the dtype that they have in the base.

    places: (module, key, dtype) of these weights. like: for each of these dtypes, a weight of the base that had it at
    ``inject``; its present dtype is used, because a model may be cast later.
    """

    name = "forward"

    def __init__(self, module: nn.Module, places: list[tuple[nn.Module, str, torch.dtype]], like: dict):
        super().__init__(module)
        self.places, self.like = places, like

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the original forward, which ``generate`` inspects."""
        return inspect.signature(self.original)

    def __call__(self, *arguments, **options):
        with contextlib.nullcontext() if torch.compiler.is_compiling() else _casting:  # compiled code cannot use locks
            masters = [(*place, place[0]._parameters[place[1]]) for place in self.places]
            # A tensor that is not a parameter was already cast by the forward of an enclosing module. In a forward,
            # ZeRO-3 gathers only the module's own weights.
            masters = [place for place in masters if isinstance(place[-1], nn.Parameter)]
            masters = [place for place in masters if place[0] is self.module or not is_partitioned(place[-1])]
            try:
                for module, key, dtype, master in masters:
                    module._parameters[key] = master.to(self.like[dtype].dtype if dtype in self.like else dtype)
                if self.before is not None:
                    return self.before(*arguments, **options)
                return type(self.module).forward(self.module, *arguments, **options)
            finally:
                for module, key, _, master in masters:
                    module._parameters[key] = master
