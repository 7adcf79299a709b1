"""LoRA (arXiv 2106.09685, equation 3): one low-rank pair, shared by all tasks."""

from torch import nn

from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.layer import AdapterLayer, kaiming


class LoraLayer(AdapterLayer):
    """y = W x + b + (alpha / r) B A dropout(x).

    lora_A: (r, k), A, starts like the weight of a torch Linear. lora_B: (d, r), B, starts at zero.
    """

    method, title, paper = "lora", "LoRA", "2106.09685"

    @staticmethod
    def shapes(config: AdapterConfig, k: int, d: int) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (config.rank, k), "lora_B": (d, config.rank)}

    def reset_parameters(self) -> None:
        kaiming(self.lora_A)
        nn.init.zeros_(self.lora_B)
