"""The contract of every method: one layer wrapped around a frozen linear layer.

Shape legend: B batch, L tokens, k in_features, d out_features, r rank, T tasks, n up-projections,
R the width of the layer's rank space (r, or n r), N = all leading sizes of x multiplied.
"""

import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from mtl_lora.config import AdapterConfig
from mtl_lora.errors import UserError


@dataclasses.dataclass(frozen=True)
class Factors:
    """The low-rank pair that equals a layer for one task: delta W = scale * B @ A.

    A: (R, k). B: (d, R). Unpacks as ``A, B, scale``.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float

    def __iter__(self) -> Iterator:
        return iter((self.A, self.B, self.scale))

    def delta(self) -> torch.Tensor:
        """scale * B @ A, of shape (d, k)."""
        return self.scale * (self.B @ self.A)


class AdapterLayer(nn.Module):
    """y = base(x) + scale * up @ mix(down @ dropout(x)): a frozen linear layer and a trained low-rank path beside it.

    A method says what ``down`` (R, k), ``mix`` and ``up`` (d, R) are; the wrapped layer is kept as it is, weight and
    bias untouched. Trained weights are float32 (float64 for a float64 base) and are cast to the activations' dtype
    as they are used.
    """

    parameter_names: tuple[str, ...] = ()
    needs_task_ids = False

    def __init__(self, base: nn.Linear, config: AdapterConfig):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.scale, self.tasks = config.rank, config.scale, list(config.tasks)
        self.dropout = config.dropout
        self.create(config)
        self.reset_parameters()

    def create(self, config: AdapterConfig) -> None:
        """Make the parameters named in ``parameter_names`` with ``new_parameter``."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw the starting values from torch's global generator; the layer then equals its base."""
        raise NotImplementedError

    def down(self) -> torch.Tensor:
        """(R, k), from the input to rank space."""
        raise NotImplementedError

    def up(self) -> torch.Tensor:
        """(d, R), from rank space to the output."""
        raise NotImplementedError

    def mix(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What a task does in rank space: (N, R) to (N, R); ``x`` (..., k) is there for its shape alone."""
        return z

    def factors(self, task: str | int | None = None) -> Factors:
        """The pair (A, B) and scale that equal this layer for ``task`` (a name, an id, or None without tasks)."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., k) to (..., d)."""
        # Rows are flattened before the base runs, not after: an in-place sum into a view of the base's output would
        # make autograd copy it.
        rows = x.reshape(-1, self.in_features)
        output = self.base(rows)
        dropped = F.dropout(rows, self.dropout, training=True) if self.training and self.dropout else rows
        z = F.linear(dropped, self.down().to(rows.dtype))
        mixed = self.mix(z, x).to(output.dtype)
        output.addmm_(mixed, self.up().to(output.dtype).T, alpha=self.scale)
        return output.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def merged_weight(self, task: str | int | None = None) -> torch.Tensor:
        """The plain weight (d, k) that equals this layer for ``task``, summed in the adapter's dtype."""
        factors = self.factors(task)
        weight = self.base.weight
        return (weight.to(factors.A.dtype) + factors.delta()).to(weight.dtype)

    def task_index(self, task: str | int | None) -> int:
        """The id of a task given by name or id; raises ``UserError`` that lists the tasks there are."""
        if task in self.tasks:
            return self.tasks.index(task)
        if type(task) is int and 0 <= task < len(self.tasks):
            return task
        listed = ", ".join(f"{name} {index}" for index, name in enumerate(self.tasks)) or "none"
        raise UserError(f"there is no task {task!r}; the adapter's tasks are {listed}")

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """An unset trained parameter on the base's device, float32 unless the base is float64."""
        weight = self.base.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return nn.Parameter(torch.empty(*shape, device=weight.device, dtype=dtype))

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name: what a checkpoint holds of this layer."""
        return {name: self.get_parameter(name) for name in self.parameter_names}

    # Code that asks a linear layer for its weight or bias gets the frozen base's.
    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight (d, k)."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias (d,), or None."""
        return self.base.bias

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout}, tasks={len(self.tasks)}"


def kaiming(parameter: torch.Tensor) -> None:
    """kaiming_uniform with a = sqrt 5, the start that torch gives an ``nn.Linear`` weight."""
    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
