"""Vision transformers with streams: a shared trunk of four stages with a separate output per task at each stage's end.

Models of transformers are changed in place: they keep their modules and weights, and get forwards in which the last
block of a stage may split into streams. Swin has four stages; a plain ViT (DINOv2) is cut into four of equal depth.

Shape legend: B batch, T tasks, N tokens, C channels, H and W of the image, h and w of a map.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.swin import modeling_swin as swin

from mtl_lora.adapter.layer import AdapterLayer, JoinedLinear, Streams
from mtl_lora.errors import UserError

STAGES = 4
# The linear layers of a block that can have an adapter, the ones that may differ by task, and that of patch merging.
TARGETS, TASK_TARGETS = ["qkv", "o_proj", "fc1", "fc2"], ["attention.o_proj", "mlp.fc1", "mlp.fc2"]
MERGING = "reduction"
# Modules trained fully besides the adapters: the patch embedding, the norms, and Swin's tables of relative positions.
TRAINED = {
    "swin": [
        "embeddings.patch_embeddings",
        "embeddings.norm",
        "layernorm_before",
        "layernorm_after",
        "downsample.norm",
        "relative_position_bias_table",
    ],
    "dinov2": ["embeddings.patch_embeddings", "norm1", "norm2"],
}
_VIT_SIZES = (4.0, 2.0, 1.0, 0.5)  # sizes of a plain ViT's four maps, in multiples of its patch grid


def with_streams(model: PreTrainedModel) -> PreTrainedModel:
    """Give a Swin or a DINOv2 the forward ``images (B, 3, H, W) -> four Streams of maps (B, C, h, w)``, in place.

    The last norm and the mask token are unused and removed. Raises ``UserError`` for any other model.
    """
    if type(model) is swin.SwinModel and len(model.encoder.layers) == STAGES:
        for stage in model.encoder.layers:
            for block in stage.blocks:
                block.__class__, block.attention.__class__ = SwinBlock, SwinAttention
                block.full_shift = block.shift_size
                _join(block.attention)
        model.__class__, model.pooler, model.patch = Swin, None, 1  # images of any size are padded
        width, stages = model.config.embed_dim, enumerate(model.encoder.layers)
        model.channels = [width * 2 ** min(stage + 1, STAGES - 1) for stage in range(STAGES)]
        model.last_blocks = [f"encoder.layers.{index}.blocks.{len(stage.blocks) - 1}" for index, stage in stages]
    elif type(model) is dinov2.Dinov2Model and not model.config.use_swiglu_ffn:
        depth, rest = divmod(len(model.encoder.layer), STAGES)
        if rest:
            raise UserError(
                f"a ViT must have a multiple of {STAGES} blocks to be cut into {STAGES} equal stages, not "
                f"{len(model.encoder.layer)}; pass another --base_model"
            )
        if not hasattr(model.encoder.layer[0].attention, "q_proj"):
            raise UserError(
                f"transformers {transformers.__version__} names the layers of a DINOv2 differently; install "
                "transformers>=5.18, or pass a --base_model that is a Swin"
            )
        for block in model.encoder.layer:
            block.__class__, block.attention.__class__ = VitBlock, VitAttention
            _join(block.attention)
        model.__class__, model.embeddings.mask_token = Vit, None
        model.patch = model.embeddings.patch_embeddings.patch_size[0]
        model.channels = [model.config.hidden_size] * STAGES
        model.last_blocks = [f"encoder.layer.{depth * (stage + 1) - 1}" for stage in range(STAGES)]
    else:
        raise UserError(
            f"the base model must be a Swin with {STAGES} stages or a DINOv2 (small, base or large), not a "
            f"{type(model).__name__} of {model.config.model_type}; pass another --base_model"
        )
    model.layernorm = nn.Identity()
    return model


def _join(attention: nn.Module) -> None:
    """Join an attention's query, key and value into one layer, for one adapter that all three share."""
    names = ("q_proj", "k_proj", "v_proj")
    attention.qkv = JoinedLinear({name: getattr(attention, name) for name in names})
    for name in names:
        delattr(attention, name)


def through(layer: nn.Module, x: Streams) -> Streams:
    """Apply a linear layer, or the adapter on it, to streams."""
    if isinstance(layer, AdapterLayer):
        return layer(x)
    if x.tasks is not None:
        raise UserError("a linear layer without an adapter would drop the streams of the tasks; adapt every layer")
    return Streams(layer(x.shared))


def _attend(attention: nn.Module, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the attention output (M, N, C) of tokens (M, N, C), before the output projection."""
    heads = [part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1)]
    kind, eager = attention.config._attn_implementation, swin.eager_attention_forward
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager)
    dropout = attention.attention_dropout if attention.training else 0.0
    found, _ = interface(attention, *heads, mask, dropout=dropout, scaling=attention.scaling)
    return found.reshape(x.shape)


def _fed_forward(mlp: nn.Module, x: Streams, norm: nn.Module, last: Callable) -> Streams:
    """Return x + last(feed-forward(norm(x)))."""
    return x.plus(through(mlp.fc2, through(mlp.fc1, x.map(norm)).map(mlp.activation_fn)).map(last))


class _Stages:
    """Attributes of both backbones. patch: an image's sides must be multiples of it. channels: C of each of the four
    maps. last_blocks: the name of each stage's last block."""

    patch: int
    channels: list[int]
    last_blocks: list[str]

    def set_drop_path(self, rate: float) -> None:
        """Set stochastic depth (arXiv 1603.09382), which grows from 0 in the first block to ``rate`` in the last."""
        blocks = [module for module in self.modules() if isinstance(module, SwinBlock | VitBlock)]
        for index, block in enumerate(blocks):
            block.drop_path = swin.SwinDropPath(rate * index / max(len(blocks) - 1, 1))


# ---- Swin (arXiv 2103.14030) ----


class SwinAttention(swin.SwinAttention):
    """Attention in windows, with relative positions and the mask of shifted windows (W, N, N)."""

    def forward(self, windows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        bias = self.relative_position_bias()
        if mask is not None:
            bias = bias + mask.repeat(len(windows) // len(mask), 1, 1)[:, None]
        return _attend(self, windows, bias)


class SwinBlock(swin.SwinLayer):
    """Attention in windows, then feed-forward layers, both with stochastic depth as in the original.

    The map is padded to a multiple of the window size; windows are not shifted if a side is no longer than a window.
    """

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> Streams:
        (height, width), size = grid, self.window_size
        self.shift_size = self.full_shift if min(grid) > size else 0
        tokens = self.layernorm_before(x).unflatten(1, grid)
        tokens, _ = self.maybe_pad(tokens, height, width)
        padded = tokens.shape[1:3]
        windows = swin.window_partition(self.cyclic_shift(tokens), size).flatten(1, 2)
        mask = self.get_attn_mask(*padded, dtype=x.dtype, device=x.device)

        def back(windows: torch.Tensor) -> torch.Tensor:
            windows = swin.window_reverse(windows.unflatten(1, (size, size)), size, *padded)
            tokens = self.cyclic_shift(windows, reverse=True)[:, :height, :width].flatten(1, 2)
            return self.drop_path(self.dropout(tokens))

        attended = through(self.attention.o_proj, Streams(self.attention(windows, mask))).map(back)
        streams = Streams(x).plus(attended)
        return _fed_forward(self.mlp, streams, self.layernorm_after, lambda each: self.drop_path(self.dropout(each)))


class Swin(_Stages, swin.SwinModel):
    """Four stages, each except the last followed by patch merging, which also applies to the streams of the tasks."""

    def forward(self, pixel_values: torch.Tensor) -> list[Streams]:
        (x, grid), found = self.embeddings(pixel_values, interpolate_pos_encoding=True), []
        for stage in self.encoder.layers:
            for block in stage.blocks:
                streams = block(x, grid)
                x = streams.shared
            if stage.downsample is not None:
                merge, before = stage.downsample, grid
                streams = streams.map(lambda each: merge(each, before))  # noqa: B023 - called immediately
                x, grid = streams.shared, tuple(-(-side // 2) for side in grid)
            found.append(streams.map(lambda each: _as_map(each, grid)))  # noqa: B023 - called immediately
        return found


# ---- DINOv2 (arXiv 2304.07193) ----


class VitAttention(dinov2.Dinov2Attention):
    """Attention over all tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _attend(self, x, None)


class VitBlock(dinov2.Dinov2Layer):
    """Attention, then feed-forward layers, each with its layer scale."""

    def forward(self, x: torch.Tensor) -> Streams:
        attended = through(self.attention.o_proj, Streams(self.attention(self.norm1(x))))
        streams = Streams(x).plus(attended.map(lambda each: self.drop_path(self.layer_scale1(each))))
        return _fed_forward(self.mlp, streams, self.norm2, lambda each: self.drop_path(self.layer_scale2(each)))


class Vit(_Stages, dinov2.Dinov2Model):
    """Four stages of equal depth, whose maps are resized to 4, 2, 1 and 1/2 times the patch grid."""

    def forward(self, pixel_values: torch.Tensor) -> list[Streams]:
        grid = tuple(side // self.patch for side in pixel_values.shape[-2:])
        x, found, depth = self.embeddings(pixel_values), [], len(self.encoder.layer) // STAGES
        for index, block in enumerate(self.encoder.layer):
            streams = block(x)
            x = streams.shared
            if (index + 1) % depth == 0:
                size = [max(1, int(side * _VIT_SIZES[len(found)])) for side in grid]
                found.append(streams.map(lambda each: resized(_as_map(each[:, 1:], grid), size)))  # noqa: B023
        return found


def _as_map(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Reshape (B, N, C) to (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def resized(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return maps (B, C, h, w) resized bilinearly to ``size``."""
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
