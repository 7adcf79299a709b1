"""DoRA (arXiv 2402.09353, equation 5): LoRA adapts the direction of a weight, and its magnitude is trained as well."""

import contextlib
import dataclasses

import torch
import torch.nn.functional as F

from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.layer import Factors, gathered, is_quantised, is_sharded, positive, require_in_memory, row_squares
from mtl_lora.adapter.lora import LoraLayer


class DoraLayer(LoraLayer):
    """y = W x + b + (c - 1) * W x~ + c * (alpha / r) B A x~, with c = m / ||W + (alpha / r) B A|| per output row.

    x~ = dropout(x). lora_A: (r, k), A, and lora_B: (d, r), B, as in LoRA. lora_magnitude: (d,), m, starts at the norms
    of W's rows, so that c is exactly 1. The norm is treated as a constant in the backward pass (section 4.3 of the
    paper).

    If W is partitioned (ZeRO-3) or quantised, a forward does not read it: W x~ and W A^T come from the base layer's own
    forward. A row of W that is zero stays zero.
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
        squares = self.base_row_squares()
        self.lora_magnitude.copy_(squares.sqrt())
        if not self.in_place:  # a forward cannot read W
            self.register_buffer("base_squares", squares, persistent=False)
            self.register_load_state_dict_post_hook(_renew_squares)

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """Return ||W + s B A|| per output row, (d,).

        Row by row, ||w + s b A||^2 = ||w||^2 + 2 s b . (A w) + s^2 b (A A^T) b^T, so W + s B A is never formed.
        """
        A, B, s = self.lora_A, self.lora_B, self.scale
        if self.in_place and not A.is_meta:
            require_in_memory("a weight whose norm DoRA needs", self.base_layer.weight)
        device = A.device.type
        # c differs little from 1, and bf16 products in an autocast region would round the difference away.
        exact = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
        with exact:
            projected = self.base_product(A.to(self.compute_dtype)).to(A.dtype)  # A W^T, (r, d)
            cross = (B * projected.T).sum(dim=1)
            own = ((B @ (A @ A.T)) * B).sum(dim=1)
        # W is read in every forward where it can be, because it may have been trained, pruned or cast in the meantime.
        squares = row_squares(self.base_weight(), self.parameter_dtype) if self.in_place else self.base_squares
        return (squares + 2 * s * cross + s * s * own).clamp(min=0).sqrt()

    @torch.no_grad()
    def base_product(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows W^T, (M, k) to (M, d); if the weight cannot be read, from the forward of the base layer."""
        if self.in_place:
            return F.linear(rows, self.base_weight())
        if not is_quantised(self.base_layer.weight):
            product = self.base_layer(rows)
            return product if self.bias is None else product - self.bias.to(product.dtype)
        # Without the bias, because (W x + b) - b loses what is small beside b. In training mode, because in evaluation
        # bitsandbytes repacks weights on a CPU into a layout without gradients.
        bias, training = self.base_layer.bias, self.base_layer.training
        self.base_layer.bias, self.base_layer.training = None, True
        try:
            return self.base_layer(rows)
        finally:
            self.base_layer.bias, self.base_layer.training = bias, training

    @torch.no_grad()
    def base_row_squares(self) -> torch.Tensor:
        """Return the squared norm of each row of the frozen weight, (d,); under ZeRO-3 all processes must call this."""
        weight = self.base_layer.weight
        if not is_quantised(weight):
            with gathered(weight):
                return row_squares(self.base_weight(), self.parameter_dtype)
        # The base layer maps the unit vectors to the columns of its quantised weight.
        total = torch.zeros(self.out_features, dtype=self.parameter_dtype, device=weight.device)
        unit = torch.eye(self.in_features, dtype=self.compute_dtype, device=weight.device)
        for rows in unit.split(1024):
            total += self.base_product(rows).to(total.dtype).square().sum(dim=0)
        return total

    def keep_constants(self) -> None:
        self.kept_norm = self.norm()

    def combine(self, output: torch.Tensor, dropped: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        c = self.lora_magnitude / positive(self.norm() if self.kept_norm is None else self.kept_norm)
        # Without dropout, W x~ is the base's output without its bias, which c does not scale.
        plain = self.base_layer(dropped) if self.training and self.dropout else output
        plain = plain if self.bias is None else plain - self.bias.to(plain.dtype)
        change = F.linear(mixed, self.up().to(output.dtype)) * self.scale
        return output + (c - 1).to(output.dtype) * plain + c.to(output.dtype) * change

    def factors(self, task: str | int | None = None) -> Factors:
        """Return the low-rank pair and the magnitude m, the same for every task."""
        return dataclasses.replace(super().factors(task), magnitude=self.lora_magnitude)


def _renew_squares(layer: DoraLayer, _) -> None:
    """Recompute the kept row norms of W after a state dict, which may hold another base weight, was loaded."""
    if not is_sharded(layer.base_layer.weight):
        layer.base_squares = layer.base_row_squares()
