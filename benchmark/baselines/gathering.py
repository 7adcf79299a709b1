"""The direct form of MTL-LoRA, as a frozen baseline: every row gets copies of A, Lambda and its own mixed B."""

import torch
import torch.nn.functional as F
from torch import nn

from mtl_lora.adapter.mtl_lora import MtlLoraLayer


class GatheringLayer(nn.Module):
    """Computes what ``MtlLoraLayer`` computes, with that layer's weights; set task_ids (B,) before each forward."""

    task_ids: torch.Tensor

    def __init__(self, layer: MtlLoraLayer):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output (B, L, d) of x (B, L, k)."""
        layer, ids = self.layer, GatheringLayer.task_ids
        A = layer.lora_A.to(x.dtype).expand(len(ids), -1, -1).contiguous()
        lambdas = layer.lora_lambda.to(x.dtype)[ids]
        weights = F.softmax(layer.lora_w[ids] / layer.hyperparameters.temperature, dim=-1).to(x.dtype)
        up = layer.lora_B.to(x.dtype).view(layer.out_features, layer.hyperparameters.num_B, layer.rank)
        B = torch.einsum("bn,dnr->bdr", weights, up)
        z = torch.bmm(F.dropout(x, layer.dropout, layer.training), A.transpose(1, 2))
        z = torch.bmm(z, lambdas.transpose(1, 2))
        return layer.base_layer(x) + torch.bmm(z, B.transpose(1, 2)) * layer.scale
