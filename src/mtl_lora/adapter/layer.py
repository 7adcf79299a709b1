"""``AdapterLayer``, the base class of every method (a layer around a frozen linear layer), and the registry of methods.

A method is one class in one file of this package. The class declares everything about the method (name, title, paper,
hyperparameters, shapes of its weights), and the rest of the library reads it from there.

Shape legend: B batch, L tokens, k in_features, d out_features, r rank, T tasks, n up-projections,
R width of the layer's rank space (r, or n r), N the product of all sizes of x but the last, M any number of rows.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import pkgutil
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

from mtl_lora import adapter
from mtl_lora.adapter.config import SHARED_METHOD, AdapterConfig, Hyperparameters
from mtl_lora.adapter.dropout import dropout
from mtl_lora.config import closest
from mtl_lora.errors import UserError


@dataclasses.dataclass(frozen=True)
class Factors:
    """The low-rank update that an adapter layer applies for one task: delta W = scale * B @ A.

    A: (R, k). B: (d, R). Unpacks as ``A, B, scale``. magnitude: (d,), DoRA's m, or None; with a magnitude, the layer's
    weight is m / ||W + delta W|| * (W + delta W), row by row.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    def __iter__(self) -> Iterator:
        yield from (self.A, self.B, self.scale)

    def delta(self) -> torch.Tensor:
        """Return delta W = scale * B @ A, (d, k)."""
        return self.scale * (self.B @ self.A)

    def adapted(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the layer's weight (d, k) for the frozen weight (d, k)."""
        weight = weight + self.delta()
        if self.magnitude is None:
            return weight
        return weight * (self.magnitude / positive(row_squares(weight, weight.dtype).sqrt()))[:, None]


class Streams(NamedTuple):
    """Activations of one input: ``shared`` (..., k), common to all tasks, and ``tasks`` (T, ..., k), one per task.

    ``tasks`` is None before the first layer that makes task-specific outputs.
    """

    shared: torch.Tensor
    tasks: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Streams":
        """Apply ``function`` to the shared and to the task activations, the latter flattened into one batch."""
        if self.tasks is None:
            return Streams(function(self.shared))
        tasks = function(self.tasks.flatten(0, 1)).unflatten(0, (len(self.tasks), -1))
        return Streams(function(self.shared), tasks)

    def plus(self, other: "Streams") -> "Streams":
        """Return the sum of two streams; a side without task activations adds its shared one to each of the other's."""
        if self.tasks is None and other.tasks is None:
            return Streams(self.shared + other.shared)
        ours, theirs = ((each.shared if each.tasks is None else each.tasks) for each in (self, other))
        return Streams(self.shared + other.shared, ours + theirs)


class JoinedLinear(nn.Module):
    """Linear layers that read the same input, joined into one by concatenating their outputs: a fused q, k, v.

    Each part still computes its own product, so the output is bit for bit that of the parts; an adapter sees a single
    layer (d, k).
    """

    def __init__(self, parts: dict[str, nn.Linear]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.in_features = next(iter(parts.values())).in_features
        self.out_features = sum(part.out_features for part in parts.values())

    @property
    def weight(self) -> torch.Tensor:
        """A copy of the parts' weights as one matrix, (d, k)."""
        return torch.cat([part.weight for part in self.children()])

    @property
    def bias(self) -> torch.Tensor | None:
        """A copy of the parts' biases as one vector, (d,); None if a part has no bias."""
        found = [part.bias for part in self.children()]
        return None if None in found else torch.cat(found)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.children()], dim=-1)


def is_linear(module: nn.Module) -> bool:
    """Whether a module can carry an adapter: nn.Linear and its subclasses (quantised layers), Conv1D, JoinedLinear."""
    # The router of a mixture of experts returns a tuple; a grouped layer has one matrix per part of its input.
    is_other = "Router" in type(module).__name__ or hasattr(module, "n_groups")
    return (isinstance(module, nn.Linear | JoinedLinear) and not is_other) or is_conv1d(module)


def _is_observed(module: nn.Module) -> bool:
    """Whether something may keep a module's output (a hook, a ``forward`` of its own), or make a view of it for the
    backward pass."""
    own = module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")  # accelerate's keeps nothing
    everywhere = torch_module._global_forward_hooks or torch_module._global_backward_hooks
    return bool(own or replaced or everywhere or torch_module._global_backward_pre_hooks)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's Conv1D: a linear layer whose weight is stored transposed, (k, d)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_quantised(weight: torch.Tensor) -> bool:
    """Whether a weight is quantised: 4-bit or 8-bit codes, packed into a wider dtype (bitsandbytes), or torchao's."""
    codes = weight.dtype.itemsize < 2 or not weight.is_floating_point()
    return codes or hasattr(weight, "quant_state") or is_torchao(weight)


def is_torchao(weight: torch.Tensor) -> bool:
    """Whether a weight is a tensor of torchao, whose ``dtype`` is its compute dtype."""
    return type(weight).__module__.startswith("torchao.")


def is_partitioned(weight: torch.Tensor) -> bool:
    """Whether ZeRO-3 has partitioned a weight across processes."""
    return hasattr(weight, "ds_id")


def is_sharded(weight: torch.Tensor) -> bool:
    """Whether this process holds only a part of a weight (ZeRO-3, FSDP) except during the forward of its layer."""
    return is_partitioned(weight) or hasattr(weight, "device_mesh") or hasattr(weight, "_fsdp_flattened")


def require_in_memory(name: str, tensor: torch.Tensor) -> None:
    """Raise ``UserError`` for a tensor that accelerate has offloaded and loads only while its module runs."""
    if tensor.is_meta:
        raise UserError(
            f"{name} is not in memory, because accelerate has offloaded it; do this before offloading, or load with a "
            "device_map that keeps it in memory"
        )


def gathered(*weights: torch.Tensor) -> contextlib.AbstractContextManager:
    """Return a context manager inside which those of the weights that ZeRO-3 has partitioned are gathered."""
    partitioned = [weight for weight in weights if is_partitioned(weight)]
    if not partitioned:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)


class AdapterLayer(nn.Module):
    """y = base(x) + scale * up @ mix(down @ dropout(x)): a frozen linear layer with a trained low-rank path beside it.

    x: (..., k). y: (..., d). A method declares the attributes below, ``shapes`` and ``reset_parameters``. It overrides
    ``down`` (R, k), ``mix`` and ``up`` (d, R) where they are not lora_A, the identity and lora_B, and ``factors`` if
    tasks differ. The wrapped layer is kept as it is, weight and bias untouched. Adapter parameters are float32 (float64
    on a float64 base) and are cast to the dtype of the activations when they are used.
    """

    method: str  # name in configurations and flags; a class that sets it is registered
    aliases: tuple[str, ...] = ()  # earlier names
    title: str  # name in tables
    paper: str = ""  # arXiv id
    adapts = True  # whether target modules get adapter layers; if not, only modules_to_save is trained
    needs_task_ids = False  # whether a forward needs the task of each row
    has_factors = True  # whether the layer equals a low-rank pair for each task, as merging and exporting require
    why_no_factors = "its gate depends on the input"  # the reason, if has_factors is False
    makes_streams = False  # whether it can compute one output per task from the same input, see ``streams``
    only_streams = False  # whether it can do nothing else, so that only models that pass streams can use it
    mixture_parts = ""  # what ``mixture`` mixes, in the plural
    task_parameters: tuple[str, ...] = ()  # what differs between tasks; the analysis compares it with its start
    no_decay: tuple[str, ...] = ()  # parameters without weight decay, because zero is not their neutral value
    Hyperparameters: type[Hyperparameters] = Hyperparameters  # the method's own settings
    prepares = False  # whether the class has a ``prepare`` of its own
    is_head = False  # set by ``inject`` on the model's output head, which may see only some of the positions

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        cls.prepares = "prepare" in cls.__dict__
        if not cls.prepares:  # the parent's ``prepare`` may not fit what this class computes
            cls.prepare = AdapterLayer.prepare
        if not issubclass(cls.Hyperparameters, Hyperparameters):
            raise TypeError(f"{cls.__name__}.Hyperparameters must be a subclass of adapter.config.Hyperparameters")
        if "method" in cls.__dict__:
            known = _registered.setdefault(cls.method, cls)
            modules = {known.__module__, cls.__module__}  # a file that is run is __main__ too
            if known.__qualname__ != cls.__qualname__ or len(modules - {"__main__"}) > 1:
                raise TypeError(f"two classes declare the method {cls.method!r}: {known!r} and {cls!r}")
            _registered[cls.method] = cls

    def __init__(self, base: nn.Linear, config: AdapterConfig):
        super().__init__()
        self.base_layer = base
        # From the base layer's attributes, because a weight that ZeRO-3 has partitioned has no shape to read.
        sizes = (base.nx, base.nf) if is_conv1d(base) else (base.in_features, base.out_features)
        self.in_features, self.out_features = sizes
        # A quantised layer, or one whose weight ZeRO-3 has partitioned, returns the output of a custom autograd
        # function, which must not be modified in place.
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

    # ---- what a method overrides ----

    @staticmethod
    def shapes(config: AdapterConfig, k: int, d: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each adapter parameter by name, for a linear layer (d, k)."""
        raise NotImplementedError

    @classmethod
    def check_config(cls, config: AdapterConfig) -> None:
        """Raise ``UserError`` if the method's own settings contradict the rest of the configuration."""

    def reset_parameters(self) -> None:
        """Initialise the parameters from torch's global generator, such that the layer computes what its base does."""
        raise NotImplementedError

    def down(self) -> torch.Tensor:
        """Return the matrix from the input to rank space, (R, k); a gate that reads the input appends its own rows."""
        return self.lora_A

    def up(self) -> torch.Tensor:
        """Return the matrix from rank space to the output, (d, R)."""
        return self.lora_B

    def mix(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Apply the task's or the gate's part in rank space to z, the output of ``down``; returns (N, R).

        x: the layer's input (..., k), for its shape only.
        """
        return z

    @classmethod
    def prepare(cls, layers: list["AdapterLayer"], task_ids: torch.Tensor) -> list[torch.Tensor]:
        """Compute, for all layers at once, one tensor per layer that depends on the task ids (G,) but not on the input.

        layers: layers with equal ``prepared_alike``. Returns an empty list if each layer must compute its own. A GPU's
        step is limited by the launches of its many small kernels, and all layers together need as many as one. A
        gradient must reach the layers that were called, and no others.
        """
        return []

    def prepared_alike(self) -> tuple:
        """Return a key that is equal for layers that can be prepared together."""
        weight, hyperparameters = self.base_layer.weight, tuple(vars(self.hyperparameters).values())
        return type(self), getattr(self, self.parameter_names[0]).device, weight.dtype, hyperparameters

    def keep_constants(self) -> None:
        """Compute and keep what depends on the weights alone, for a model whose weights no longer change."""

    def mixture(self, task_ids: torch.Tensor) -> torch.Tensor | None:
        """Return the mixture weights of the layer's parts for each task id, (M,) to (M, n); None without a mixture."""

    def task_transforms(self, task_ids: torch.Tensor) -> torch.Tensor | None:
        """Return the r x r transform of each task id, (M,) to (M, r, r), initially the identity; None without one."""

    def factors(self, task: str | int | None = None) -> Factors:
        """Return the low-rank update of this layer for ``task``, a name or an id; None if all tasks share one.

        Raises ``UserError`` for an unknown task and for a method without factors.
        """
        self.require_factors()
        if self.needs_task_ids:
            raise NotImplementedError
        if task is not None:
            task_index(self.tasks, task)
        return Factors(self.down(), self.up(), self.scale)

    @classmethod
    def require_factors(cls) -> None:
        """Raise ``UserError`` for a method whose layers cannot be written as a low-rank pair."""
        if not cls.has_factors:
            raise UserError(
                f"{cls.title} has no factors, since {cls.why_no_factors}, so it cannot be merged into the "
                "base model or exported for PEFT; use the checkpoint itself"
            )

    def streams(self, x: Streams) -> Streams:
        """Map streams (..., k) to streams (..., d); only a layer with ``makes_streams`` has outputs for each task.

        Raises ``UserError`` if task inputs would be lost.
        """
        if x.tasks is not None:
            raise UserError(
                f"a layer of {self.title} would drop the task-specific activations; make every layer in between "
                "task-specific"
            )
        return Streams(self.forward(x.shared))

    def forward(self, x: torch.Tensor | Streams) -> torch.Tensor | Streams:
        """Map x (..., k) to (..., d), or streams to streams."""
        if isinstance(x, Streams):
            return self.streams(x)
        if self.only_streams:
            raise UserError(f"a layer of {self.title} has one output per task, but this model reads only one output")
        output, dropped = self.base_and_dropped(x)
        z = F.linear(dropped, self.down().to(dropped.dtype))
        output = self.combine(output, dropped, self.mix(z, x).to(output.dtype))
        return output.view(*x.shape[:-1], self.out_features)

    def base_and_dropped(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the base layer's output (N, d) and dropout(x) (N, k) for x (..., k)."""
        # Flattened before the base runs, not after: adding in place to a view of the base's output would make autograd
        # copy it.
        rows = x.reshape(-1, self.in_features)
        # Hooks of the base layer see the shapes that they would see without the adapter.
        base = self.base_layer
        output = (
            base(x).reshape(-1, self.out_features) if base._forward_hooks or base._forward_pre_hooks else base(rows)
        )
        return output, dropout(rows, self.dropout) if self.training and self.dropout else rows

    def as_streams(self, shared: torch.Tensor, tasks: torch.Tensor, x: Streams) -> Streams:
        """Return the outputs (N, d) and (T, N, d) as streams with the leading sizes of the input."""
        sizes = (*x.shared.shape[:-1], self.out_features)
        return Streams(shared.view(sizes), tasks.view(len(self.tasks), *sizes))

    def combine(self, output: torch.Tensor, dropped: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, (N, d).

        output: the base layer's, (N, d). dropped: dropout(x), (N, k). mixed: the result of ``mix``, (N, R).
        """
        up = self.up().to(output.dtype).T
        if self.in_place and not _is_observed(self.base_layer):
            return output.addmm_(mixed, up, alpha=self.scale)
        return torch.addmm(output, mixed, up, alpha=self.scale)

    @torch.no_grad()
    def merged_weight(self, task: str | int | None = None) -> torch.Tensor:
        """Return the weight (d, k) of a linear layer that equals this layer for ``task``.

        Raises ``UserError`` for a quantised base.
        """
        if is_quantised(self.base_layer.weight):
            raise UserError("an adapter cannot be merged into a quantised base; load the base in bf16 or float32")
        factors = self.factors(task)
        return factors.adapted(self.base_weight().to(factors.A.dtype)).to(self.base_layer.weight.dtype)

    def base_weight(self) -> torch.Tensor:
        """The frozen weight as (d, k)."""
        return self.base_layer.weight.T if is_conv1d(self.base_layer) else self.base_layer.weight

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations that the base expects: its weight's, or the compute dtype of a quantised layer."""
        weight = self.base_layer.weight
        if is_quantised(weight) and not is_torchao(weight):
            return getattr(self.base_layer, "compute_dtype", None) or torch.float32
        return weight.dtype

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return the adapter parameters by name, as a checkpoint holds them."""
        return {name: self.get_parameter(name) for name in self.parameter_names}

    # For code that reads the weight or bias of a linear layer.
    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight, as the base layer stores it."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias (d,), or None."""
        return self.base_layer.bias

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout}, tasks={len(self.tasks)}"


def task_index(tasks: list[str], task: str | int | None) -> int:
    """Return the id of a task given by name or id; raises ``UserError`` listing the tasks for an unknown one."""
    if task in tasks:
        return tasks.index(task)
    if type(task) is int and 0 <= task < len(tasks):
        return task
    listed = ", ".join(f"{name} {index}" for index, name in enumerate(tasks)) or "none"
    raise UserError(f"there is no task {task!r}; the adapter's tasks are {listed}")


def kaiming(parameter: torch.Tensor) -> None:
    """Initialise with kaiming_uniform, a = sqrt 5, as torch initialises the weight of an ``nn.Linear``."""
    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))


def row_squares(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the squared norm of each row, (d, k) to (d,), in ``dtype`` or, if that is wider, the matrix's own."""
    dtype = torch.promote_types(matrix.dtype, dtype)
    if not matrix.is_contiguous():  # the transposed weight of a Conv1D, over which vector_norm is ten times slower
        return matrix.to(dtype).square().sum(dim=1)
    return torch.linalg.vector_norm(matrix, dim=1, dtype=dtype).square()


def positive(norms: torch.Tensor) -> torch.Tensor:
    """Return norms that are safe to divide by: a row of zeros has norm zero, and 0 / 0 is not a number."""
    return norms.clamp(min=torch.finfo(norms.dtype).tiny)


# ---- the registry ----

_registered: dict[str, type[AdapterLayer]] = {}


@functools.cache
def _import_methods() -> None:
    """Import the methods of this package, and those that installed packages announce (docs/own_method.md)."""
    for module in pkgutil.iter_modules(adapter.__path__):
        importlib.import_module(f"{adapter.__name__}.{module.name}")
    for announced in importlib.metadata.entry_points(group="mtl_lora.methods"):
        try:
            announced.load()
        except Exception as error:  # of another package's code, which only its own method needs
            where = f"the method {announced.name} of the package {announced.dist.name} cannot be imported"
            print(f"note: {where} ({error}); mend {announced.value}, or uninstall it", file=sys.stderr)


def methods() -> dict[str, type[AdapterLayer]]:
    """Return every method's class by name: those of this package and any other subclass that declares ``method``."""
    _import_methods()
    return dict(sorted(_registered.items()))


def layer_class(method: str) -> type[AdapterLayer]:
    """Return the layer class of a method by name or alias; raises ``UserError`` naming the known ones."""
    known = methods()
    by_name = {alias: layer for layer in known.values() for alias in layer.aliases} | known
    if not isinstance(method, str) or method not in by_name:
        found = closest(method if isinstance(method, str) else "", [*by_name])
        raise UserError(f"method {method!r} is unknown{found}; if another package has it, install or import that")
    return by_name[method]


def parameter_shapes(config: AdapterConfig, k: int, d: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all adapter parameters that a linear layer (d, k) may get under a configuration."""
    shapes = layer_class(config.method).shapes(config, k, d)
    if config.task_modules:
        shapes = layer_class(SHARED_METHOD).shapes(config, k, d) | shapes
    return shapes


def layer_sizes(config: AdapterConfig, state: dict[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Return (k, d) of each adapted layer by name, read off the shapes of weights named ``<layer>.<parameter>``.

    The method's ``shapes`` says which dimensions are k and d. Tensors that are not parameters of the method are left
    out, and so is a layer whose parameters do not show both sizes.
    """
    k, d = 1_000_003, 1_000_033  # primes, so that no product of other sizes equals one of them
    shapes = parameter_shapes(config, k, d)
    found: dict[str, dict[int, int]] = {}
    for key, tensor in state.items():
        name, _, parameter = key.rpartition(".")
        for declared, actual in zip(shapes.get(parameter, ()), tensor.shape, strict=False):
            if declared in (k, d):
                found.setdefault(name, {})[declared] = actual
    return {name: (sizes[k], sizes[d]) for name, sizes in found.items() if len(sizes) == 2}
