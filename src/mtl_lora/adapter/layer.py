"""The contract of every method: one layer wrapped around a frozen linear layer, and the registry of methods.

A method is one class in one file of this package. The class declares what there is to know of the method (name, title,
paper, hyperparameters, shapes of its weights), and everything else in the library reads it from there.

Shape legend: B batch, L tokens, k in_features, d out_features, r rank, T tasks, n up-projections,
R the width of the layer's rank space (r, or n r), N = all leading sizes of x multiplied.
"""

import contextlib
import dataclasses
import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mtl_lora import adapter
from mtl_lora.adapter.config import SHARED_METHOD, AdapterConfig, Hyperparameters
from mtl_lora.adapter.dropout import dropout
from mtl_lora.config import closest
from mtl_lora.errors import UserError


@dataclasses.dataclass(frozen=True)
class Factors:
    """The low-rank pair that equals a layer for one task: delta W = scale * B @ A.

    A: (R, k). B: (d, R). Unpacks as ``A, B, scale``. magnitude: (d,), DoRA's m, or None; with it the layer's weight is
    m / ||W + delta W|| * (W + delta W), row by row.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    def __iter__(self) -> Iterator:
        yield from (self.A, self.B, self.scale)

    def delta(self) -> torch.Tensor:
        """scale * B @ A, of shape (d, k)."""
        return self.scale * (self.B @ self.A)


class Streams(NamedTuple):
    """Of one input a value for all tasks and one for each: ``shared`` (..., k); ``tasks`` (T, ..., k), or None before
    the first layer that makes them.
    """

    shared: torch.Tensor
    tasks: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Streams":
        """The same function of each; to it the tasks' are one long batch."""
        if self.tasks is None:
            return Streams(function(self.shared))
        tasks = function(self.tasks.flatten(0, 1)).unflatten(0, (len(self.tasks), -1))
        return Streams(function(self.shared), tasks)

    def plus(self, other: "Streams") -> "Streams":
        """The sum: where one of the two has no values of tasks, its shared one is added to the other's."""
        if self.tasks is None and other.tasks is None:
            return Streams(self.shared + other.shared)
        ours, theirs = ((each.shared if each.tasks is None else each.tasks) for each in (self, other))
        return Streams(self.shared + other.shared, ours + theirs)


class JoinedLinear(nn.Module):
    """Linear layers of the same input as one, whose outputs stand one after the other: a fused q, k, v.

    Each keeps its own product, so the output is theirs bit for bit; an adapter takes the whole for one layer (d, k).
    """

    def __init__(self, parts: dict[str, nn.Linear]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.in_features = next(iter(parts.values())).in_features
        self.out_features = sum(part.out_features for part in parts.values())

    @property
    def weight(self) -> torch.Tensor:
        """(d, k), a copy."""
        return torch.cat([part.weight for part in self.children()])

    @property
    def bias(self) -> torch.Tensor | None:
        """(d,), a copy; None where the parts have none."""
        found = [part.bias for part in self.children()]
        return None if None in found else torch.cat(found)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.children()], dim=-1)


def is_linear(module: nn.Module) -> bool:
    """Whether a module can carry an adapter: nn.Linear and what derives from it (quantised layers), and the like."""
    # Routers of experts return a tuple; grouped layers have a matrix for each part of their input.
    is_other = "Router" in type(module).__name__ or hasattr(module, "n_groups")
    return (isinstance(module, nn.Linear | JoinedLinear) and not is_other) or is_conv1d(module)


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody's hook may keep a module's output, or makes a view of it for the backward pass."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's Conv1D: a linear layer whose weight is stored (k, d)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_quantised(weight: torch.Tensor) -> bool:
    """Whether a weight's numbers are codes: of 4 or 8 bits, packed into a wider dtype (bitsandbytes), or torchao's."""
    codes = weight.dtype.itemsize < 2 or not weight.is_floating_point()
    return codes or hasattr(weight, "quant_state") or is_torchao(weight)


def is_torchao(weight: torch.Tensor) -> bool:
    """Whether a weight is one of torchao's tensors, whose dtype is what they compute in."""
    return type(weight).__module__.startswith("torchao.")


def is_partitioned(weight: torch.Tensor) -> bool:
    """Whether ZeRO-3 has partitioned a weight over the processes."""
    return hasattr(weight, "ds_id")


def is_sharded(weight: torch.Tensor) -> bool:
    """Whether ZeRO-3 or FSDP keeps only a part of a weight in this process, but for its layer's own forward."""
    return is_partitioned(weight) or hasattr(weight, "device_mesh") or hasattr(weight, "_fsdp_flattened")


def require_in_memory(name: str, tensor: torch.Tensor) -> None:
    """Raise ``UserError`` for a tensor without values here, whose module accelerate gives them as it runs."""
    if tensor.is_meta:
        raise UserError(
            f"{name} is not in memory, for accelerate has offloaded it; do this before, or load with a device_map that "
            "holds it"
        )


def gathered(weight: torch.Tensor) -> contextlib.AbstractContextManager:
    """A block in which a weight that ZeRO-3 has partitioned is gathered."""
    if not is_partitioned(weight):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight])


class AdapterLayer(nn.Module):
    """y = base(x) + scale * up @ mix(down @ dropout(x)): a frozen linear layer and a trained low-rank path beside it.

    A method declares the attributes below, ``shapes`` and ``reset_parameters``. It says what ``down`` (R, k), ``mix``
    and ``up`` (d, R) are where they are not lora_A, the identity and lora_B, and, where tasks differ, ``factors``.
    The wrapped layer is kept as it is, weight and bias untouched. Trained weights are float32 (float64 for a float64
    base) and are cast to the activations' dtype as they are used.
    """

    method: str  # the name in configurations and flags; a class that sets it is registered
    aliases: tuple[str, ...] = ()  # earlier names
    title: str  # the name in tables
    paper: str = ""  # arXiv id
    adapts = True  # whether layers of it are put on the target modules; without, modules_to_save is all it trains
    needs_task_ids = False  # whether a forward needs the task of each row
    has_factors = True  # whether the layer equals a low-rank pair for each task, which merging and exporting need
    why_no_factors = "its gate depends on the input"  # where it does not
    makes_streams = False  # whether it can have an output for each task of the same input, see ``streams``
    only_streams = False  # whether it has nothing but that, so that other models than those of streams cannot use it
    mixture_parts = ""  # what ``mixture`` mixes, in the plural
    task_parameters: tuple[str, ...] = ()  # those that make tasks differ; what they learn is compared with their start
    no_decay: tuple[str, ...] = ()  # parameters that weight decay spares, for they would not rest at zero
    Hyperparameters: type[Hyperparameters] = Hyperparameters  # the method's own values
    is_head = False  # set by ``inject`` on a model's output head, which may see some positions alone

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "prepare" not in cls.__dict__:  # what the parent prepares is not what this class may compute otherwise
            cls.prepare = AdapterLayer.prepare
        if "method" in cls.__dict__:
            known = _registered.setdefault(cls.method, cls)
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(f"two classes declare the method {cls.method!r}: {known!r} and {cls!r}")
            _registered[cls.method] = cls

    def __init__(self, base: nn.Linear, config: AdapterConfig):
        super().__init__()
        self.base_layer = base
        # As the base declares them: under ZeRO-3 a weight has no shape to read.
        sizes = (base.nx, base.nf) if is_conv1d(base) else (base.in_features, base.out_features)
        self.in_features, self.out_features = sizes
        # The output of a quantised layer, or of one whose weight is partitioned (ZeRO-3), belongs to a function of
        # its own, which does not let it be changed.
        self.in_place = not is_quantised(base.weight) and not is_partitioned(base.weight)
        self.rank, self.scale, self.tasks = config.rank, config.scale, list(config.tasks)
        self.dropout, self.hyperparameters = config.dropout, config.hyperparameters
        self.parameter_dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        shapes = self.shapes(config, *sizes)
        self.parameter_names = tuple(shapes)
        for name, shape in shapes.items():
            empty = torch.empty(shape, device=base.weight.device, dtype=self.parameter_dtype)
            setattr(self, name, nn.Parameter(empty))
        self.reset_parameters()

    # What a method says.

    @staticmethod
    def shapes(config: AdapterConfig, k: int, d: int) -> dict[str, tuple[int, ...]]:
        """The shape of each trained parameter by its name, on a linear layer (d, k)."""
        raise NotImplementedError

    @classmethod
    def check_config(cls, config: AdapterConfig) -> None:
        """Raise ``UserError`` where the method's own values and the rest of a configuration do not go together."""

    def reset_parameters(self) -> None:
        """Draw the starting values from torch's global generator; the layer then equals its base."""
        raise NotImplementedError

    def down(self) -> torch.Tensor:
        """(R, k), from the input to rank space; a gate that reads the input adds rows of its own."""
        return self.lora_A

    def up(self) -> torch.Tensor:
        """(d, R), from rank space to the output."""
        return self.lora_B

    def mix(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What a task or a gate does in rank space: ``down``'s output to (N, R); ``x`` (..., k) for its shape alone."""
        return z

    @classmethod
    def prepare(cls, layers: list["AdapterLayer"], task_ids: torch.Tensor) -> list[torch.Tensor]:
        """What layers of equal ``prepared_alike`` need of the task ids (G,), for all at once; empty for none.

        A GPU's step is as slow as its many small kernels are to queue, and all layers together take as many as one.
        A gradient must reach the layers that were called, and no other.
        """
        return []

    def prepared_alike(self) -> tuple:
        """What layers that are prepared together have in common."""
        weight, hyperparameters = self.base_layer.weight, tuple(vars(self.hyperparameters).values())
        return type(self), getattr(self, self.parameter_names[0]).device, weight.dtype, hyperparameters

    def keep_constants(self) -> None:
        """Compute once what depends on weights alone, for a model whose weights change no more."""

    def mixture(self, task_ids: torch.Tensor) -> torch.Tensor | None:
        """The weights with which each task mixes the layer's parts, (M,) to (M, n); or None."""

    def task_transforms(self, task_ids: torch.Tensor) -> torch.Tensor | None:
        """What each task does to the rank space, (M,) to (M, r, r), at first the identity; or None."""

    def factors(self, task: str | int | None = None) -> Factors:
        """The pair (A, B) and scale that equal this layer for ``task`` (a name or an id; None if all tasks share them).

        Raises ``UserError`` for a task that is not there, and for a method without factors.
        """
        self.require_factors()
        if self.needs_task_ids:
            raise NotImplementedError
        if task is not None:
            self.task_index(task)
        return Factors(self.down(), self.up(), self.scale)

    @classmethod
    def require_factors(cls) -> None:
        """Raise ``UserError`` for a method whose layers equal no low-rank pair."""
        if not cls.has_factors:
            raise UserError(
                f"{cls.title} has no factors, since {cls.why_no_factors}, so it cannot be merged into the "
                "base model or exported for PEFT; use the checkpoint itself"
            )

    def streams(self, x: Streams) -> Streams:
        """The shared input, and the tasks' where there are, to the shared output and, where the layer makes them, the
        tasks'. Raises ``UserError`` where the tasks' would be lost."""
        if x.tasks is not None:
            raise UserError(f"a layer of {self.title} would lose what is the tasks' own; adapt every layer in between")
        return Streams(self.forward(x.shared))

    def forward(self, x: torch.Tensor | Streams) -> torch.Tensor | Streams:
        """x (..., k) to (..., d), or streams to streams."""
        if isinstance(x, Streams):
            return self.streams(x)
        output, dropped = self.base_and_dropped(x)
        z = F.linear(dropped, self.down().to(dropped.dtype))
        output = self.combine(output, dropped, self.mix(z, x).to(output.dtype))
        return output.view(*x.shape[:-1], self.out_features)

    def base_and_dropped(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (..., k) to the base's output (N, d) and dropout(x) (N, k)."""
        # Rows are flattened before the base runs, not after: an in-place sum into a view of the base's output would
        # make autograd copy it.
        rows = x.reshape(-1, self.in_features)
        return self.base_layer(rows), dropout(rows, self.dropout) if self.training and self.dropout else rows

    def as_streams(self, shared: torch.Tensor, tasks: torch.Tensor, x: Streams) -> Streams:
        """Outputs (N, d) and (T, N, d) in the shape of the input."""
        sizes = (*x.shared.shape[:-1], self.out_features)
        return Streams(shared.view(sizes), tasks.view(len(self.tasks), *sizes))

    def combine(self, output: torch.Tensor, dropped: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """Base output (N, d) and rank space (N, R) to the layer's output (N, d); ``dropped`` is dropout(x), (N, k)."""
        up = self.up().to(output.dtype).T
        if self.in_place and not _has_hooks(self.base_layer):
            return output.addmm_(mixed, up, alpha=self.scale)
        return torch.addmm(output, mixed, up, alpha=self.scale)

    @torch.no_grad()
    def merged_weight(self, task: str | int | None = None) -> torch.Tensor:
        """The plain weight (d, k) that equals this layer for ``task``; raises ``UserError`` for a quantised base."""
        if is_quantised(self.base_layer.weight):
            raise UserError("a quantised base cannot take the adapter into its weights; load it in bf16 or float32")
        factors = self.factors(task)
        merged = self._base_weight().to(factors.A.dtype) + factors.delta()
        if factors.magnitude is not None:
            merged *= (factors.magnitude / positive(merged.square().sum(dim=1).sqrt()))[:, None]
        return merged.to(self.base_layer.weight.dtype)

    def _base_weight(self) -> torch.Tensor:
        """The frozen weight as (d, k)."""
        return self.base_layer.weight.T if is_conv1d(self.base_layer) else self.base_layer.weight

    @torch.no_grad()
    def base_product(self, rows: torch.Tensor) -> torch.Tensor:
        """rows W^T, (M, k) to (M, d), for any base: a weight that cannot be read acts through its forward."""
        if self.in_place:
            return F.linear(rows, self._base_weight())
        if not is_quantised(self.base_layer.weight):
            product = self.base_layer(rows)
            return product if self.bias is None else product - self.bias.to(product.dtype)
        # The bias is put aside, for (W x + b) - b loses what is small beside b. The mode is training, for in the other
        # bitsandbytes lays weights on a CPU out anew, in a form without gradients.
        bias, training = self.base_layer.bias, self.base_layer.training
        self.base_layer.bias, self.base_layer.training = None, True
        try:
            return self.base_layer(rows)
        finally:
            self.base_layer.bias, self.base_layer.training = bias, training

    @torch.no_grad()
    def base_row_squares(self) -> torch.Tensor:
        """The squared norm of each output row of the frozen weight, (d,); under ZeRO-3 all processes must call this."""
        weight = self.base_layer.weight
        if not is_quantised(weight):
            with gathered(weight):
                return self._base_weight().to(self.parameter_dtype).square().sum(dim=1)
        # The columns of a quantised weight come out of the base's forward, as the images of unit vectors.
        total = torch.zeros(self.out_features, dtype=self.parameter_dtype, device=weight.device)
        unit = torch.eye(self.in_features, dtype=self.compute_dtype, device=weight.device)
        for rows in unit.split(1024):
            total += self.base_product(rows).to(total.dtype).square().sum(dim=0)
        return total

    def task_index(self, task: str | int | None) -> int:
        """The id of a task given by name or id; raises ``UserError`` that lists the tasks there are."""
        return task_index(self.tasks, task)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations that the base takes: its weight's, or what a quantised layer computes in."""
        weight = self.base_layer.weight
        if is_quantised(weight) and not is_torchao(weight):
            return getattr(self.base_layer, "compute_dtype", None) or torch.float32
        return weight.dtype

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name: what a checkpoint holds of this layer."""
        return {name: self.get_parameter(name) for name in self.parameter_names}

    # Code that asks a linear layer for its weight or bias gets the frozen base's.
    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight as the base stores it."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias (d,), or None."""
        return self.base_layer.bias

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout}, tasks={len(self.tasks)}"


def task_index(tasks: list[str], task: str | int | None) -> int:
    """The id of a task given by name or id; raises ``UserError`` that lists the tasks there are."""
    if task in tasks:
        return tasks.index(task)
    if type(task) is int and 0 <= task < len(tasks):
        return task
    listed = ", ".join(f"{name} {index}" for index, name in enumerate(tasks)) or "none"
    raise UserError(f"there is no task {task!r}; the adapter's tasks are {listed}")


def kaiming(parameter: torch.Tensor) -> None:
    """kaiming_uniform with a = sqrt 5, the start that torch gives an ``nn.Linear`` weight."""
    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))


def positive(norms: torch.Tensor) -> torch.Tensor:
    """Norms to divide by: a row of zeros has a norm of zero, and 0 / 0 is no number."""
    return norms.clamp(min=torch.finfo(norms.dtype).tiny)


# ---- the registry ----

_registered: dict[str, type[AdapterLayer]] = {}


@functools.cache
def _import_built_in() -> None:
    for module in pkgutil.iter_modules(adapter.__path__):
        importlib.import_module(f"{adapter.__name__}.{module.name}")


def methods() -> dict[str, type[AdapterLayer]]:
    """Every method by its name: those of the modules of this package, and whatever other class registered itself."""
    _import_built_in()
    return dict(sorted(_registered.items()))


def layer_class(method: str) -> type[AdapterLayer]:
    """The layer of a method by its name or an alias; raises ``UserError`` that lists the methods."""
    known = methods()
    by_name = {alias: layer for layer in known.values() for alias in layer.aliases} | known
    if not isinstance(method, str) or method not in by_name:
        raise UserError(f"method {method!r} is unknown{closest(method if isinstance(method, str) else '', [*by_name])}")
    return by_name[method]


def parameter_shapes(config: AdapterConfig, k: int, d: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters that layers (d, k) of a configuration may have, whichever layers they are."""
    shapes = layer_class(config.method).shapes(config, k, d)
    if config.task_modules:
        shapes = layer_class(SHARED_METHOD).shapes(config, k, d) | shapes
    return shapes


def layer_sizes(config: AdapterConfig, state: dict[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """(k, d) of each adapted layer by its name, from adapter weights by ``<layer>.<parameter>``.

    The sizes stand where the method's ``shapes`` puts them. Tensors that are no parameter of the method are left out,
    and so is a layer whose parameters do not show both sizes.
    """
    k, d = 1_000_003, 1_000_033  # primes that no product of the other sizes reaches
    shapes = parameter_shapes(config, k, d)
    found: dict[str, dict[int, int]] = {}
    for key, tensor in state.items():
        name, _, parameter = key.rpartition(".")
        for declared, actual in zip(shapes.get(parameter, ()), tensor.shape, strict=False):
            if declared in (k, d):
                found.setdefault(name, {})[declared] = actual
    return {name: (sizes[k], sizes[d]) for name, sizes in found.items() if len(sizes) == 2}
