"""MoELoRA (arXiv 2310.18339, equations 6 to 9): low-rank experts, mixed by a gate that depends on the task."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from mtl_lora.adapter import routing
from mtl_lora.adapter.config import AdapterConfig, Hyperparameters
from mtl_lora.adapter.layer import AdapterLayer, Factors, kaiming, task_index
from mtl_lora.config import flag


class MoeLoraLayer(AdapterLayer):
    """y = W x + b + (alpha / r) sum_i g_ti B_i A_i dropout(x), i = 1..N, g_t = softmax(G e_t), t the row's task.

    N experts of rank r / N share the rank r; here N is the number of experts and E the width of a task embedding.
    lora_A: (r, k), the A_i stacked, drawn from N(0, 0.01^2). lora_B: (d, r), the matrix [B_1 ... B_N], starts at zero.
    lora_task_embedding: (T, E), e_t, drawn from N(0, 1). lora_gate: (N, E), G, without bias, starts like the weight of
    a torch Linear: if embeddings and gate both started at zero, neither would get a gradient. Every layer has its own
    gate and embeddings, as in the repository of MTL-LoRA; in the paper, all layers share them.
    """

    method, title, paper = "moelora", "MoELoRA", "2310.18339"
    needs_task_ids = True
    mixture_parts = "experts"
    task_parameters = ("lora_task_embedding", "lora_gate")

    @dataclasses.dataclass
    class Hyperparameters(Hyperparameters):
        num_experts: int = flag(8, "number N of experts, which share the rank", min=1)
        task_embedding_dim: int = flag(64, "width of the task embedding e_t", min=1)

    @classmethod
    def check_config(cls, config: AdapterConfig) -> None:
        rule = f"a multiple of the {config.num_experts} experts (num_experts) for moelora"
        config.require("rank", rule, config.rank % config.num_experts == 0)

    @staticmethod
    def shapes(config: AdapterConfig, k: int, d: int) -> dict[str, tuple[int, ...]]:
        E = config.task_embedding_dim
        return {
            "lora_A": (config.rank, k),
            "lora_B": (d, config.rank),
            "lora_task_embedding": (len(config.tasks), E),
            "lora_gate": (config.num_experts, E),
        }

    def reset_parameters(self) -> None:
        nn.init.normal_(self.lora_A, std=0.01)
        nn.init.zeros_(self.lora_B)
        nn.init.normal_(self.lora_task_embedding)
        kaiming(self.lora_gate)

    def mixture(self, task_ids: torch.Tensor) -> torch.Tensor:
        """Return g_t for each task id, (M,) to (M, N)."""
        return F.softmax(F.linear(self.lora_task_embedding[task_ids], self.lora_gate), dim=-1)

    def gate(self, task_ids: torch.Tensor) -> torch.Tensor:
        """Return g_t for each task id, each weight repeated for the r / N columns of its expert, (M,) to (M, r)."""
        return self.mixture(task_ids).repeat_interleave(self.rank // self.hyperparameters.num_experts, dim=-1)

    def mix(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        blocks = routing.blocks_for(x, self)
        # In the gate's own dtype: its gradient is a difference of sums over the tokens, which bf16 would round away.
        gate = self.gate(blocks.ids)
        return blocks.map(torch.mul, z.to(gate.dtype), gate[:, None])

    def factors(self, task: str | int | None = None) -> Factors:
        """Return A and B with the gate of one task folded into B; raises ``UserError`` for an unknown task."""
        index = torch.tensor([task_index(self.tasks, task)], device=self.lora_A.device)
        return Factors(self.lora_A, self.lora_B * self.gate(index), self.scale)
