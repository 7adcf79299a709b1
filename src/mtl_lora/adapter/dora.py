"""DoRA (arXiv 2402.09353, equation 5): LoRA for a weight's direction, and its magnitude trained beside it."""

import contextlib
import dataclasses

import torch
import torch.nn.functional as F

from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.layer import Factors, is_sharded, positive, require_in_memory
from mtl_lora.adapter.lora import LoraLayer


class DoraLayer(LoraLayer):
    """y = W x + b + (c - 1) * W x~ + c * (alpha / r) B A x~, with c = m / ||W + (alpha / r) B A|| per output row.

    x~ = dropout(x). lora_A and lora_B as in LoRA. lora_magnitude: (d,), m, starts as the rows' norms of W, so that c is
    exactly 1. The norm is a constant in the backward pass (section 4.3 of the paper).

    Where weights are partitioned (ZeRO-3) or quantised, W is not read in a forward: W x~ and W A^T come from the base
    layer's own forward. A row of W that is zero stays zero.
    """

    method, title, paper = "dora", "DoRA", "2402.09353"
    no_decay = ("lora_magnitude",)  # starts at the norms of W
    kept_norm: torch.Tensor | None = None

    @staticmethod
    def shapes(config: AdapterConfig, k: int, d: int) -> dict[str, tuple[int, ...]]:
        return {**LoraLayer.shapes(config, k, d), "lora_magnitude": (d,)}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.register_buffer("base_squares", self.base_row_squares(), persistent=False)
        self.lora_magnitude.copy_(self.base_squares.sqrt())
        self.register_load_state_dict_post_hook(_renew_squares)

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """||W + s B A|| per output row, (d,); ||w + s b A||^2 = ||w||^2 + 2 s b . (A w) + s^2 b (A A^T) b^T."""
        A, B, s = self.lora_A, self.lora_B, self.scale
        if self.in_place and not A.is_meta:
            require_in_memory("a weight whose norm DoRA needs", self.base_layer.weight)
        device = A.device.type
        # c is 1 but for small changes, which the bf16 products of an autocast region would round away.
        exact = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
        with exact:
            projected = self.base_product(A.to(self.compute_dtype)).to(A.dtype)  # A W^T, (r, d)
            cross = (B * projected.T).sum(dim=1)
            own = ((B @ (A @ A.T)) * B).sum(dim=1)
        return (self.base_squares + 2 * s * cross + s * s * own).clamp(min=0).sqrt()

    def keep_constants(self) -> None:
        self.kept_norm = self.norm()

    def combine(self, output: torch.Tensor, dropped: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        c = self.lora_magnitude / positive(self.norm() if self.kept_norm is None else self.kept_norm)
        # Without dropout W x~ is the base's output, computed already; its bias is not scaled.
        plain = self.base_layer(dropped) if self.training and self.dropout else output
        plain = plain if self.bias is None else plain - self.bias.to(plain.dtype)
        change = F.linear(mixed, self.up().to(output.dtype)) * self.scale
        return output + (c - 1).to(output.dtype) * plain + c.to(output.dtype) * change

    def factors(self, task: str | int | None = None) -> Factors:
        """The pair and the magnitude m, the same for every task."""
        return dataclasses.replace(super().factors(task), magnitude=self.lora_magnitude)


def _renew_squares(layer: DoraLayer, _) -> None:
    """After a state dict was loaded, which may hold another base's weight."""
    if not is_sharded(layer.base_layer.weight):
        layer.base_squares = layer.base_row_squares()
