"""MTL-LoRA (arXiv 2410.09437, equations 5 to 7): a task's own r x r transform and its own mixture of up-projections."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from mtl_lora.adapter import routing
from mtl_lora.adapter.config import AdapterConfig, Hyperparameters
from mtl_lora.adapter.layer import AdapterLayer, Factors, kaiming
from mtl_lora.config import flag

LAMBDA_SHAPES = ("full", "diagonal")


class MtlLoraLayer(AdapterLayer):
    """y = W x + b + (alpha / r) sum_i softmax(w_t / tau)_i B_i Lambda_t A dropout(x), i = 1..n, t the row's task.

    lora_A: (r, k), shared. lora_lambda: (T, r, r), Lambda_t, starts at the identity; with ``lambda_shape="diagonal"``
    (T, r), its diagonal. lora_w: (T, n), mixture logits; drawn at random, for with equal weights every B_i would get
    the same gradient and stay equal to its twins. lora_B: (d, n r), the matrix [B_1 ... B_n], starts at zero.

    Everything that differs between tasks fits in rank space: with P_t = [w_t1 Lambda_t; ...; w_tn Lambda_t] of shape
    (n r, r), y += scale [B_1 ... B_n] (P_t (A x)). So the batch needs one product with A, one small product per row
    picked by task id, and one with the shared B; no copy of A or B per row, no loop over tasks, no synchronisation.
    """

    method, title, paper = "mtl_lora", "MTL-LoRA", "2410.09437"
    aliases = ("mlora",)
    no_decay = ("lora_lambda",)  # starts at the identity
    needs_task_ids = True
    mixture_parts = "up-projections"

    @dataclasses.dataclass
    class Hyperparameters(Hyperparameters):
        num_B: int = flag(3, "number n of up-projections")
        temperature: float = flag(0.1, "temperature tau of the mixture softmax(w_t / tau)")
        lambda_shape: str = flag("full", "Lambda_t: full (r x r) or diagonal", before="full")

        def validate(self) -> None:
            self.require("num_B", "at least 1", self.num_B >= 1)
            self.require("temperature", "greater than 0", self.temperature > 0)
            self.require("lambda_shape", f"one of {', '.join(LAMBDA_SHAPES)}", self.lambda_shape in LAMBDA_SHAPES)

    @staticmethod
    def shapes(config: AdapterConfig, k: int, d: int) -> dict[str, tuple[int, ...]]:
        T, n, r = len(config.tasks), config.num_B, config.rank
        return {
            "lora_A": (r, k),
            "lora_lambda": (T, r) if config.lambda_shape == "diagonal" else (T, r, r),
            "lora_w": (T, n),
            "lora_B": (d, n * r),
        }

    @property
    def diagonal(self) -> bool:
        """Whether Lambda_t is stored as its diagonal."""
        return self.hyperparameters.lambda_shape == "diagonal"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        kaiming(self.lora_A)
        kaiming(self.lora_w)
        self.lora_lambda.copy_(torch.ones(self.rank) if self.diagonal else torch.eye(self.rank))
        nn.init.zeros_(self.lora_B)

    def mixture(self, task_ids: torch.Tensor) -> torch.Tensor:
        """softmax(w_t / tau) for each id: (M,) to (M, n)."""
        return F.softmax(self.lora_w[task_ids] / self.hyperparameters.temperature, dim=-1)

    def task_transforms(self, task_ids: torch.Tensor) -> torch.Tensor:
        """Lambda_t for each id: (M,) to (M, r, r)."""
        transforms = self.lora_lambda[task_ids]
        return torch.diag_embed(transforms) if self.diagonal else transforms

    def combined_transform(self, task_ids: torch.Tensor) -> torch.Tensor:
        """P_t for each id: (M,) to (M, n r, r). Gathered before it is built, so the cost does not grow with T."""
        return _combined(self.mixture(task_ids), self.task_transforms(task_ids))

    @classmethod
    def prepare(cls, layers: list["MtlLoraLayer"], task_ids: torch.Tensor) -> list[torch.Tensor]:
        """P_t transposed for each id, (G, r, n r), of every layer."""
        weights = torch.stack([layer.lora_w for layer in layers])[:, task_ids]
        transforms = torch.stack([layer.lora_lambda for layer in layers])[:, task_ids]
        transforms = torch.diag_embed(transforms) if layers[0].diagonal else transforms
        weights = F.softmax(weights / layers[0].hyperparameters.temperature, dim=-1)
        return list(_combined(weights, transforms).to(layers[0].compute_dtype).transpose(-1, -2).unbind())

    def mix(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        transform = routing.prepared_for(x, self)
        if transform is None:
            task_ids = routing.task_ids_for(x, self).reshape(-1)
            transform = self.combined_transform(task_ids).transpose(1, 2)
        rows_per_id = z.view(len(transform), -1, self.rank)
        return torch.bmm(rows_per_id, transform.to(z.dtype)).view(len(z), -1)

    def factors(self, task: str | int | None = None) -> Factors:
        """A and B = [B_1 ... B_n] P_t for one task; raises ``UserError`` for a task that is not there."""
        index = torch.tensor([self.task_index(task)], device=self.lora_w.device)
        return Factors(self.lora_A, self.lora_B @ self.combined_transform(index)[0], self.scale)


def _combined(weights: torch.Tensor, transforms: torch.Tensor) -> torch.Tensor:
    """[w_1 Lambda; ...; w_n Lambda] of weights (..., n) and Lambda (..., r, r): (..., n r, r)."""
    return (weights[..., None, None] * transforms[..., None, :, :]).flatten(-3, -2)
