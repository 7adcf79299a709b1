"""MTL-LoRA (arXiv 2410.09437, equations 5 to 7): a task's own r x r transform and its own mixture of up-projections."""

import torch
import torch.nn.functional as F
from torch import nn

from mtl_lora.adapter import routing
from mtl_lora.adapter.layer import AdapterLayer, Factors, kaiming
from mtl_lora.config import AdapterConfig


class MtlLoraLayer(AdapterLayer):
    """y = W x + b + (alpha / r) sum_i softmax(w_t / tau)_i B_i Lambda_t A dropout(x), i = 1..n, t the row's task.

    lora_A: (r, k), shared. lora_lambda: (T, r, r), Lambda_t, starts at the identity; with ``lambda_shape="diagonal"``
    (T, r), its diagonal. lora_w: (T, n), mixture logits;
    drawn at random, for with equal weights every B_i would get the same gradient and stay equal to its twins.
    lora_B: (d, n r), the matrix [B_1 ... B_n], starts at zero.

    Everything that differs between tasks fits in rank space: with P_t = [w_t1 Lambda_t; ...; w_tn Lambda_t] of shape
    (n r, r), y += scale [B_1 ... B_n] (P_t (A x)). So the batch needs one product with A, one small product per row
    picked by task id, and one with the shared B; no copy of A or B per row, no loop over tasks, no synchronisation.
    """

    parameter_names = ("lora_A", "lora_lambda", "lora_w", "lora_B")
    no_decay = ("lora_lambda",)  # starts at the identity
    needs_task_ids = True

    def create(self, config: AdapterConfig) -> None:
        self.num_B, self.temperature = config.num_B, config.temperature
        self.diagonal = config.lambda_shape == "diagonal"
        tasks = len(self.tasks)
        self.lora_A = self.new_parameter(self.rank, self.in_features)
        self.lora_lambda = self.new_parameter(tasks, self.rank, *(() if self.diagonal else (self.rank,)))
        self.lora_w = self.new_parameter(tasks, self.num_B)
        self.lora_B = self.new_parameter(self.out_features, self.num_B * self.rank)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        kaiming(self.lora_A)
        kaiming(self.lora_w)
        self.lora_lambda.copy_(torch.ones(self.rank) if self.diagonal else torch.eye(self.rank))
        nn.init.zeros_(self.lora_B)

    def down(self) -> torch.Tensor:
        return self.lora_A

    def up(self) -> torch.Tensor:
        return self.lora_B

    def mixture(self, task_ids: torch.Tensor) -> torch.Tensor:
        """softmax(w_t / tau) for each id: (M,) to (M, n)."""
        return F.softmax(self.lora_w[task_ids] / self.temperature, dim=-1)

    def task_transform(self, task_ids: torch.Tensor) -> torch.Tensor:
        """P_t for each id: (M,) to (M, n r, r). Gathered before it is built, so the cost does not grow with T."""
        weights = self.mixture(task_ids)
        transform = self.lora_lambda[task_ids]
        if self.diagonal:
            transform = torch.diag_embed(transform)
        return (weights[:, :, None, None] * transform[:, None]).flatten(1, 2)

    def mix(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        task_ids = routing.task_ids_for(x, self.tasks).reshape(-1)
        transform = self.task_transform(task_ids).to(z.dtype)
        rows_per_id = z.view(len(task_ids), -1, self.rank)
        return torch.bmm(rows_per_id, transform.transpose(1, 2)).view(len(z), -1)

    def factors(self, task: str | int | None = None) -> Factors:
        """A and B = [B_1 ... B_n] P_t for one task; raises ``UserError`` for a task that is not there."""
        index = torch.tensor([self.task_index(task)], device=self.lora_w.device)
        return Factors(self.lora_A, self.lora_B @ self.task_transform(index)[0], self.scale)
