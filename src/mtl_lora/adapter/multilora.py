"""MultiLoRA (arXiv 2311.11501, equation 4): n parallel LoRAs, each with a learned scale per output feature."""

import dataclasses

import torch
from torch import nn

from mtl_lora.adapter.config import AdapterConfig, Hyperparameters
from mtl_lora.adapter.layer import AdapterLayer, kaiming
from mtl_lora.config import flag


class MultiLoraLayer(AdapterLayer):
    """y = W x + b + (alpha / r) sum_i c_i * (B_i A_i dropout(x)), i = 1..n, the same for every task.

    lora_A: (n r, k), the A_i stacked. lora_B: (d, n r), the matrix [B_1 ... B_n]. Every A_i and B_i starts like the
    weight of a torch Linear. lora_scaling: (n, d), c_i, starts at zero. Each c_i is folded into its B_i, so the layer
    is one low-rank pair of rank n r.
    """

    method, title, paper = "multilora", "MultiLoRA", "2311.11501"

    @dataclasses.dataclass
    class Hyperparameters(Hyperparameters):
        num_B: int = flag(3, "number n of parallel modules", min=1)

    @staticmethod
    def shapes(config: AdapterConfig, k: int, d: int) -> dict[str, tuple[int, ...]]:
        n, r = config.num_B, config.rank
        return {"lora_A": (n * r, k), "lora_B": (d, n * r), "lora_scaling": (n, d)}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        kaiming(self.lora_A)
        # Block by block, because the bound of the distribution depends on the block's number of columns.
        for block in self.lora_B.split(self.rank, dim=1):
            kaiming(block)
        nn.init.zeros_(self.lora_scaling)

    def up(self) -> torch.Tensor:
        """Return [c_1 * B_1 ... c_n * B_n], (d, n r)."""
        blocks = self.lora_B.view(self.out_features, -1, self.rank)
        return (blocks * self.lora_scaling.T[:, :, None]).flatten(1)
