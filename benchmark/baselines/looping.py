"""MTL-LoRA as a loop over the tasks of a batch, as a frozen baseline: each task's rows go through its own LoRA."""

import torch
import torch.nn.functional as F
from torch import nn

from mtl_lora.adapter.mtl_lora import MtlLoraLayer


class LoopingLayer(nn.Module):
    """Computes what ``MtlLoraLayer`` computes, with that layer's weights; set task_ids (B,) before each forward."""

    task_ids: torch.Tensor

    def __init__(self, layer: MtlLoraLayer):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output (B, L, d) of x (B, L, k)."""
        layer, ids = self.layer, LoopingLayer.task_ids
        A, up = layer.lora_A.to(x.dtype), layer.lora_B.view(layer.out_features, layer.hyperparameters.num_B, layer.rank)
        dropped, output = F.dropout(x, layer.dropout, layer.training), layer.base_layer(x)
        for task in ids.unique().tolist():
            rows = (ids == task).nonzero().squeeze(1)
            weights = F.softmax(layer.lora_w[task] / layer.hyperparameters.temperature, dim=-1)
            B = torch.einsum("n,dnr->dr", weights, up).to(x.dtype)
            z = F.linear(F.linear(dropped[rows], A), layer.lora_lambda[task].to(x.dtype))
            # Added in place: the backward passes the output's gradient on without a copy per task.
            output.index_add_(0, rows, F.linear(z, B), alpha=layer.scale)
        return output
