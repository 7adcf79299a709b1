"""Modules that are trained and saved whole beside the adapter: heads, norms, biases (``modules_to_save``).

Each weight becomes a float32 copy in its own place, where whatever reads it finds it; the frozen original is kept for
``disabled`` and ``unload``. On a base in bf16 or fp16 the copy is cast to the original's dtype as it is used, so at the
start the model's output is still the base's.
"""

import dataclasses
import fnmatch
import inspect
import threading
from collections.abc import Iterator

import torch
from torch import nn

from mtl_lora.adapter.layer import gathered, is_partitioned, is_quantised, is_sharded, require_in_memory
from mtl_lora.adapter.routing import Override
from mtl_lora.config import closest
from mtl_lora.errors import UserError

# Wrappers that stand between a module and its name, and the attribute under which they hold it.
_WRAPPERS = {
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
    found = (_WRAPPERS.get(cls.__name__) for cls in type(module).__mro__)
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
    """A weight or buffer that is saved: its name, every (module, key) where it stands, and the frozen original.

    like: a weight of the base with the original's dtype, which shows what the model was cast to since.
    """

    name: str
    places: list[tuple[nn.Module, str]]
    original: torch.Tensor
    like: nn.Parameter | None = None

    @property
    def is_weight(self) -> bool:
        """Whether it is trained; a buffer is only kept."""
        return isinstance(self.original, nn.Parameter)

    def get(self) -> torch.Tensor:
        """The tensor that the model uses."""
        module, key = self.places[0]
        return (module._parameters if self.is_weight else module._buffers)[key]

    def put(self, tensor: torch.Tensor) -> None:
        """Have the model use ``tensor``."""
        for module, key in self.places:
            (module._parameters if self.is_weight else module._buffers)[key] = tensor

    def put_original(self) -> torch.Tensor:
        """Have the model use the frozen original; returns what it used before."""
        trained = self.get()
        if self.like is not None:
            dtype = self.like.dtype
        else:
            own = {self.original.dtype, _kept_dtype(self.original.dtype)} if self.is_weight else {self.original.dtype}
            dtype = self.original.dtype if trained.dtype in own else trained.dtype
        if (self.original.device, self.original.dtype) != (trained.device, dtype):  # the model was moved or cast since
            self.original.data = self.original.data.to(trained.device, dtype)
        self.put(self.original)
        return trained


def _kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the trained copy of a weight."""
    return dtype if dtype == torch.float64 else torch.float32


def require_slots(slots: list[Slot]) -> None:
    """Raise ``UserError`` where what a slot uses was offloaded or resized since: its original could not be put in its
    place."""
    for slot in slots:
        own = slot.get()
        if not slot.original.is_meta:
            require_in_memory(slot.name, own)
        if own.shape != slot.original.shape and not (is_sharded(own) or is_sharded(slot.original)):
            sizes = f"{list(slot.original.shape)}, and has {list(own.shape)} now"
            raise UserError(f"{slot.name} had the shape {sizes}; resize a module that is saved whole before inject")


def whole_modules(model: nn.Module, entries: list[str]) -> dict[str, nn.Module]:
    """The modules that entries of ``modules_to_save`` name (whole names, endings, or patterns as of a shell); the model
    itself, whose name is empty, by ``*`` alone."""
    named = {"": model, **dict(named_modules(model))}
    return {name: module for name, module in named.items() if any(_matches(name, entry) for entry in entries)}


def _is_pattern(entry: str) -> bool:
    return any(sign in entry for sign in "*?[")


def _matches(name: str, entry: str) -> bool:
    return fnmatch.fnmatchcase(name, entry) if _is_pattern(entry) else f".{name}".endswith(f".{entry}")


def find_slots(model: nn.Module, entries: list[str]) -> list[Slot]:
    """The weights that ``modules_to_save`` means, with the buffers of whole modules; the model is not changed.

    An entry names modules, or weights where no module has that name. Raises ``UserError`` for one that names neither,
    and for a weight that is quantised or offloaded.
    """
    modules = {"": model, **dict(named_modules(model))}
    slots: dict[int, Slot] = {}  # by identity: a weight that is tied has several places
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
        roots = tuple(f"{name}." if name else "" for name in whole_modules(model, [entry]))
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
    """Put a trainable float32 copy (float64 of float64) into each slot."""
    places, like = [], {}
    saved = {id(slot.original) for slot in slots}
    for weight in model.parameters():
        if weight.is_floating_point() and not weight.requires_grad and id(weight) not in saved:
            like.setdefault(weight.dtype, weight)
    for slot in slots:
        dtype = slot.original.dtype
        if slot.is_weight:
            slot.like = like.get(dtype)
            kept = _kept_dtype(dtype)
            with gathered(slot.original):
                slot.put(nn.Parameter(slot.original.detach().to(kept, copy=True)))
            if kept != dtype:
                places += [(module, key, dtype) for module, key in slot.places]
        else:
            slot.put(slot.original.clone())
    # At the owner, for a recomputation may begin there, and at the whole module, which may read its parts' weights.
    for module in {module for module, _, _ in places} | set(whole_modules(model, entries).values()):
        below = set(module.modules())
        own = [place for place in places if place[0] in below]
        if own:
            CastForward(module, own, like)


# Held while cast weights stand in their places: another thread would find them, and then the float32 ones in between.
_casting = threading.RLock()


class CastForward(Override):
    """A forward with its float32 weights, (module, key, dtype), cast to the dtype that they have in the base.

    like: of each such dtype a weight of the base, whose dtype counts: a model may be cast after ``inject``.
    """

    name = "forward"

    like: dict[torch.dtype, nn.Parameter] = {}  # noqa: RUF012 - of a model pickled by an earlier version

    def __init__(self, module: nn.Module, places: list[tuple[nn.Module, str, torch.dtype]], like: dict):
        super().__init__(module)
        self.places, self.like = places, like

    @property
    def __signature__(self) -> inspect.Signature:
        """The forward's own, for ``generate`` asks it what it takes."""
        return inspect.signature(self.original)

    def __call__(self, *arguments, **options):
        if torch.compiler.is_compiling():  # which knows no locks
            return self._cast_and_call(*arguments, **options)
        with _casting:
            return self._cast_and_call(*arguments, **options)

    def _cast_and_call(self, *arguments, **options):
        masters = [(*place, place[0]._parameters[place[1]]) for place in self.places]
        # What is no parameter was cast already, by the forward of a module around this one. ZeRO-3 has the values of a
        # module's own weights alone, in its own forward.
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
