"""MultiLoRA (arXiv 2311.11501, equation 4): n parallel LoRAs, each scaled per output feature from zero."""

import torch
from torch import nn

from mtl_lora.adapter.layer import AdapterLayer, Factors, kaiming
from mtl_lora.config import AdapterConfig


class MultiLoraLayer(AdapterLayer):
    """y = W x + b + (alpha / r) sum_i c_i * (B_i A_i dropout(x)), i = 1..n, the same for every task.

    lora_A: (n r, k), the A_i stacked. lora_B: (d, n r), the matrix [B_1 ... B_n]; A_i and B_i are drawn.
    lora_scaling: (n, d), c_i, starts at zero. c_i is folded into B_i, so the layer is one low-rank pair of rank n r.
    """

    parameter_names = ("lora_A", "lora_B", "lora_scaling")

    def create(self, config: AdapterConfig) -> None:
        self.num_B = config.num_B
        self.lora_A = self.new_parameter(self.num_B * self.rank, self.in_features)
        self.lora_B = self.new_parameter(self.out_features, self.num_B * self.rank)
        self.lora_scaling = self.new_parameter(self.num_B, self.out_features)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        kaiming(self.lora_A)
        # Block by block: the bound of a draw depends on the block's own number of columns.
        for block in self.lora_B.split(self.rank, dim=1):
            kaiming(block)
        nn.init.zeros_(self.lora_scaling)

    def down(self) -> torch.Tensor:
        return self.lora_A

    def up(self) -> torch.Tensor:
        """[c_1 * B_1 ... c_n * B_n], (d, n r)."""
        blocks = self.lora_B.view(self.out_features, self.num_B, self.rank)
        return (blocks * self.lora_scaling.T[:, :, None]).flatten(1)

    def factors(self, task: str | int | None = None) -> Factors:
        """The stacked pair of rank n r; the same for every task. Raises ``UserError`` for a task that is not there."""
        self.check_task(task)
        return Factors(self.lora_A, self.up(), self.scale)
