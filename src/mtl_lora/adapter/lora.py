"""LoRA (arXiv 2106.09685, equation 3): one low-rank pair that all tasks share."""

import torch
from torch import nn

from mtl_lora.adapter.layer import AdapterLayer, Factors, kaiming
from mtl_lora.config import AdapterConfig


class LoraLayer(AdapterLayer):
    """y = W x + b + (alpha / r) B A dropout(x), with A (r, k) and B (d, r); B starts at zero."""

    parameter_names = ("lora_A", "lora_B")

    def create(self, config: AdapterConfig) -> None:
        self.lora_A = self.new_parameter(self.rank, self.in_features)
        self.lora_B = self.new_parameter(self.out_features, self.rank)

    def reset_parameters(self) -> None:
        kaiming(self.lora_A)
        nn.init.zeros_(self.lora_B)

    def down(self) -> torch.Tensor:
        return self.lora_A

    def up(self) -> torch.Tensor:
        return self.lora_B

    def factors(self, task: str | int | None = None) -> Factors:
        """The layer's own pair; the same for every task. Raises ``UserError`` for a task that is not there."""
        self.check_task(task)
        return Factors(self.lora_A, self.lora_B, self.scale)
