"""HydraLoRA (arXiv 2404.19245, equations 4 and 5): one shared A and several B, mixed for each token by a gate."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from mtl_lora.adapter.config import AdapterConfig, Hyperparameters
from mtl_lora.adapter.layer import AdapterLayer, kaiming
from mtl_lora.config import flag


class HydraLoraLayer(AdapterLayer):
    """y = W x + b + (alpha / r) sum_i softmax(G x~)_i B_i A x~, i = 1..n, with x~ = dropout(x); no task ids.

    lora_A: (r, k), A, shared by all B_i. lora_gate: (n, k), G, without bias. Both start like the weight of a torch
    Linear, so that the gate tells the B_i apart from the first step on. lora_B: (d, n r), the matrix [B_1 ... B_n],
    starts at zero.

    One product gives A x~ and G x~; the gate acts in rank space, and one product with [B_1 ... B_n] follows. The paper
    has no dropout; its authors' code drops the input of A, with a mask for each B_i, but not that of the gate.
    """

    method, title, paper = "hydralora", "HydraLoRA", "2404.19245"
    has_factors = False

    @dataclasses.dataclass
    class Hyperparameters(Hyperparameters):
        num_B: int = flag(3, "number n of up-projections", min=1)

    @staticmethod
    def shapes(config: AdapterConfig, k: int, d: int) -> dict[str, tuple[int, ...]]:
        n, r = config.num_B, config.rank
        return {"lora_A": (r, k), "lora_gate": (n, k), "lora_B": (d, n * r)}

    def reset_parameters(self) -> None:
        kaiming(self.lora_A)
        kaiming(self.lora_gate)
        nn.init.zeros_(self.lora_B)

    def down(self) -> torch.Tensor:
        """Return A stacked on G, (r + n, k)."""
        return torch.cat([self.lora_A, self.lora_gate])

    def mix(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Map A x~ and G x~, concatenated in z (N, r + n), to (N, n r)."""
        # In the parameters' dtype: the gate's gradient is a difference of close numbers, which bf16 would round away.
        projected, logits = z.to(self.lora_gate.dtype).split([self.rank, z.shape[1] - self.rank], dim=1)
        return (F.softmax(logits, dim=1)[:, :, None] * projected[:, None]).flatten(1)
