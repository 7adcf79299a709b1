"""Images for a language model: grid features become visual tokens, which are concatenated with the embedded text.

In an encoder that normalises its embeddings (BART) the visual tokens are inserted after that norm and before the
dropout, as in VL-BART (arXiv 2102.02779), so they bypass the norm and the positions. In other models they are input
embeddings. They follow the text in an encoder-decoder and precede it in a causal language model. A relative position
bias (T5) applies between text tokens only, as in VL-T5. ``model(...)`` and ``model.generate(...)`` take ``features``
besides ``input_ids``, and an ``attention_mask`` of the joined length, in the same order as the tokens.

An adapter fully trains the visual embedding. Without the adapter (``disabled``, ``unload``) the visual embedding has
its initial weights; ``merge`` keeps the trained ones. Neither transformers nor PEFT has such a model, so it cannot be
exported.

Shape legend: B rows, I images per row, G cells of an image's grid, D numbers per cell, N visual tokens per image,
L text tokens, d the width of the language model.
"""

import contextlib
import dataclasses
import functools
import inspect
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from mtl_lora.adapter import hooks
from mtl_lora.adapter.checkpoint import Provenance
from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.layer import gathered
from mtl_lora.adapter.saved import unwrap
from mtl_lora.adapter.targets import find_targets
from mtl_lora.base_model import BaseModel, accepts_argument, positions_of
from mtl_lora.config import Config
from mtl_lora.errors import UserError

NAME = "visual_embedding"  # the module's name in the model
_SPREAD = 0.02  # standard deviation of initial weights, if the model's configuration has none


@dataclasses.dataclass(frozen=True)
class VisualConfig(Config):
    """The image input of a model.

    dim: D, the numbers per cell. grid: cells per side of an image's grid. pool: cells per side after adaptive max
    pooling; None: no pooling. The original pools 7 to 6. images: maximum images per row. source: the vision model and
    size that made the features, see ``FeatureStore.source``, because another model's may have the same shape.
    """

    dim: int = dataclasses.field(metadata={"min": 1})
    grid: int = dataclasses.field(metadata={"min": 1})
    pool: int | None = None
    images: int = dataclasses.field(default=2, metadata={"min": 1})
    source: str | None = dataclasses.field(default=None, compare=False, metadata={"before": None})

    def validate(self) -> None:
        fits = self.pool is None or 1 <= self.pool <= self.grid
        self.require("pool", f"1 to {self.grid}, the grid's cells per side", fits)

    @property
    def tokens(self) -> int:
        """N, the number of visual tokens per image."""
        return (self.pool or self.grid) ** 2


class VisualEmbedding(nn.Module):
    """Turns grid features into visual tokens (arXiv 2102.02779), the sum of four terms for each cell of each image.

    The terms are LN(W f + b) of the cell's features f; LN(V p + c) of its box p, which is zero for grid cells and so
    gives the same vector for all; a vector for the position of the image in its row; and a vector for the position of
    the cell in its image. Only the last term depends on the cell's position. It is a buffer, because the original uses
    embedding rows of added words for it, which are random and frozen.
    """

    object_order: torch.Tensor

    def __init__(self, config: VisualConfig, width: int):
        super().__init__()
        self.config = config
        self.feature, self.feature_norm = nn.Linear(config.dim, width), nn.LayerNorm(width)
        self.box, self.box_norm = nn.Linear(5, width), nn.LayerNorm(width)  # x1, x2, y1, y2, area
        self.image_order = nn.Embedding(config.images, width)
        self.register_buffer("object_order", torch.empty(config.tokens, width))
        self.closes_gaps = False  # whether ``joined`` moves padding from between images and text, see ``reads_gaps``

    @torch.no_grad()
    def reset_parameters(self, spread: float, scale: float, order: float) -> None:
        """Initialise all weights with torch's global seed: N(0, spread^2), biases zero, the norms' weights ``scale``,
        the buffer N(0, order^2)."""
        for module in (self.feature, self.box, self.image_order):
            nn.init.normal_(module.weight, std=spread)
        for module in (self.feature, self.box, self.feature_norm, self.box_norm):
            nn.init.zeros_(module.bias)
        for module in (self.feature_norm, self.box_norm):
            nn.init.constant_(module.weight, scale)
        nn.init.normal_(self.object_order, std=order)

    def base_provenance(self) -> dict:
        """Return what a checkpoint must record about a model with this module, besides the model's name."""
        return {"system": "image_text", "model_settings": self.config.to_json()}

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the visual tokens (B, I N, d), image by image, of features (B, I, G, D).

        Raises ``UserError`` for another G or D, and for more than the configured number of images.
        """
        config, shape = self.config, tuple(features.shape)
        if len(shape) != 4 or shape[1] > config.images or shape[2:] != (config.grid**2, config.dim):
            raise UserError(
                f"features must have the shape (batch, images, cells, numbers), here (B, at most {config.images}, "
                f"{config.grid**2}, {config.dim}), not {shape}"
            )
        features = features.to(self.object_order.dtype)
        if config.pool:
            grid = features.flatten(0, 1).mT.unflatten(2, (config.grid, config.grid))
            features = F.adaptive_max_pool2d(grid, config.pool).flatten(2).mT.unflatten(0, shape[:2])
        content = self.feature_norm(self.feature(features))
        box = self.box_norm(self.box(features.new_zeros(5)))
        order = self.image_order(torch.arange(shape[1], device=features.device))[:, None]
        return (content + box + order + self.object_order).flatten(1, 2)


# ---- in a model ----


# Encoder-decoders whose encoder adds learned positions before an embedding norm, or relative positions as a bias.
_JOINED = ("bart", "mbart", "plbart", "t5", "mt5", "umt5", "switch_transformers")
# Causal models whose answers would depend on the other rows of the batch.
_READS_PADDING = ("git", "recurrent_gemma", "rwkv", "trocr", "xlstm")
# Causal models that choose experts or cut patches by the ids of their tokens.
_NEEDS_IDS = ("blt", "deepseek_v4")


def with_images(model: PreTrainedModel, config: VisualConfig) -> PreTrainedModel:
    """Add a visual embedding to a language model in place, and return the model.

    Torch's global seed decides the initial weights. On the meta device the module has shapes only. If visual tokens are
    input embeddings, their initial scale is that of the text embeddings. Raises ``UserError`` for an encoder-decoder of
    an unsupported family, and for a causal model that reads padding or needs the ids of its tokens.
    """
    if text_first(model) and model.config.model_type not in _JOINED:
        known = ", ".join(_JOINED)
        raise UserError(
            f"images cannot be joined to a {model.config.model_type}, whose positions or norms may treat visual tokens "
            f"as text; pass a causal language model, or an encoder-decoder of the kinds {known}"
        )
    kind, arguments = model.config.model_type, inspect.signature(model.prepare_inputs_for_generation).parameters
    layer_embeddings = getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None)
    needs_ids = kind in _NEEDS_IDS or "inputs_embeds" not in arguments or layer_embeddings
    if kind in _READS_PADDING or (not text_first(model) and needs_ids):
        raise UserError(
            f"a {model.config.model_type} cannot be shown images, because it reads padding or needs the ids of its "
            "tokens; pass another causal language model"
        )
    words = model.get_input_embeddings()
    with torch.device(model.device):
        visual = VisualEmbedding(config, words.embedding_dim).to(model.dtype)
    # The norm that an encoder (BART's) applies to its embedded text but not to visual tokens.
    norm = getattr(model.get_encoder(), "layernorm_embedding", None) if text_first(model) else None
    if model.device.type != "meta":
        known = (getattr(model.config, name, None) for name in ("init_std", "initializer_range"))
        spread = scale = next(filter(None, known), _SPREAD)
        if norm is None:
            with gathered(words.weight):
                scale = words.weight.float().std().item() * float(getattr(words, "embed_scale", 1.0))
        visual.reset_parameters(spread, 1.0 if norm is not None else scale, scale)
    visual.closes_gaps = reads_gaps(model)
    setattr(model, NAME, visual)
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    model.register_forward_hook(_after_forward, always_call=True)
    if norm is not None:
        norm.register_forward_hook(_behind_norm)
    for part in model.get_encoder().modules() if text_first(model) else ():
        if isinstance(bias := getattr(part, "relative_attention_bias", None), nn.Module):
            bias.register_forward_hook(_within_text)
    model.generate = functools.partial(_generate, model)
    return model


def text_first(model: PreTrainedModel) -> bool:
    """Return whether visual tokens follow the text."""
    return model.config.is_encoder_decoder


def joined(
    model: PreTrainedModel, input_ids: torch.Tensor | None, features: torch.Tensor, mask: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return a dict of inputs_embeds (B, I N + L, d) and attention_mask (B, I N + L) of text and images, and the visual
    tokens (B, I N, d) among them.

    Raises ``UserError`` for a mask of another shape, and if features and input_ids have different numbers of rows.
    """
    if input_ids is None:
        raise UserError("features need a text: call the model with input_ids=... and features=...")
    visual = getattr(model, NAME)(features)
    text = model.get_input_embeddings()(input_ids)
    if len(text) != len(visual):
        raise UserError(f"input_ids has {len(text)} rows, and features {len(visual)}; the numbers must be equal")
    whole = torch.cat([text, visual] if text_first(model) else [visual, text], dim=1)
    if mask is None:
        mask = torch.ones(whole.shape[:2], dtype=torch.long, device=whole.device)
    if mask.shape != whole.shape[:2]:
        raise UserError(
            f"attention_mask must have the shape {tuple(whole.shape[:2])}, for {text.shape[1]} tokens and "
            f"{visual.shape[1]} visual tokens, not {tuple(mask.shape)}"
        )
    if getattr(model, NAME).closes_gaps:
        order = _without_gaps(mask)
        whole, mask = whole.gather(1, order[..., None].expand_as(whole)), mask.gather(1, order)
    return {"inputs_embeds": whole, "attention_mask": mask}, visual


def reads_gaps(model: PreTrainedModel) -> bool:
    """Return whether padding between images and text would change a model's outputs.

    A recurrent layer forgets on its way through a gap, the more the longer it is; positions that are not passed and the
    window of a local attention count it. So answers would depend on the other rows of a batch. Encoder-decoders have no
    gaps to close.
    """
    config = model.config.get_text_config()
    kinds = {kind for name in ("layer_types", "attention_layers") for kind in getattr(config, name, None) or ()}
    counts = kinds - {"full_attention", "global"} or getattr(config, "sliding_window", None)
    has_states = any(isinstance(module, nn.Conv1d) for module in model.modules())
    return not text_first(model) and bool(counts or has_states or not accepts_argument(type(model), "position_ids"))


def _without_gaps(mask: torch.Tensor) -> torch.Tensor:
    """Return the order (B, L) of the places of a mask (B, L) that moves padding between tokens to the front of its
    row."""
    kept = mask.bool()
    is_behind = kept.flip(1).cumsum(1).flip(1) == 0
    return torch.where(is_behind, 2, kept.int()).argsort(dim=1, stable=True)


# The visual tokens of the forward that runs in this thread, for the hooks inside its encoder.
_running = threading.local()


@contextlib.contextmanager
def _shown(visual: torch.Tensor | None) -> Iterator[None]:
    before, _running.visual = getattr(_running, "visual", None), visual
    try:
        yield
    finally:
        _running.visual = before


# Recomputed blocks (gradient checkpointing) need the visual tokens too, to know where the text ends.
hooks.recomputed.append(lambda: functools.partial(_shown, getattr(_running, "visual", None)))


@torch._disable_dynamo
def _before_forward(model: PreTrainedModel, arguments: tuple, options: dict) -> tuple[tuple, dict]:
    """Replace features and input_ids of a forward by input embeddings; a forward without features is unchanged."""
    features = options.pop("features", None)
    if features is None:
        return arguments, options
    if arguments:
        raise UserError("with features all inputs must be passed by name: model(input_ids=..., features=...)")
    inputs, _running.visual = joined(model, options.pop("input_ids", None), features, options.get("attention_mask"))
    if not text_first(model) and accepts_argument(type(model), "position_ids"):
        # Positions count unmasked tokens only, so that a row's positions do not depend on the rest of its batch.
        options.setdefault("position_ids", positions_of(inputs["attention_mask"]))
    return arguments, options | inputs


@torch._disable_dynamo
def _after_forward(model: PreTrainedModel, arguments: tuple, output: object) -> None:
    """Forget the visual tokens at the end of a forward, even if it raised."""
    _running.visual = None


@torch._disable_dynamo
def _behind_norm(norm: nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
    """Return the text as the norm returns it, followed by the visual tokens unchanged."""
    visual = getattr(_running, "visual", None)
    return output if visual is None else torch.cat([output[:, : -visual.shape[1]], visual], dim=1)


@torch._disable_dynamo
def _within_text(bias: nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
    """Return an encoder's bias (queries, keys, heads) with zeros from and to visual tokens, as their distance to the
    text would depend on its padding."""
    visual = getattr(_running, "visual", None)
    count = 0 if visual is None else visual.shape[1]
    return F.pad(output[: len(output) - count, : output.shape[1] - count], (0, 0, 0, count, 0, count))


@torch.no_grad()
def _generate(model: PreTrainedModel, input_ids=None, features=None, attention_mask=None, **options):
    """Replaces a model's ``generate``: with features, a causal language model returns the new tokens only, an
    encoder-decoder its start token and the new tokens."""
    plain = type(model).generate
    if features is None:
        options |= {} if attention_mask is None else {"attention_mask": attention_mask}
        return plain(model, input_ids, **options)
    inputs, visual = joined(model, input_ids, features, attention_mask)
    with _shown(visual):
        return plain(model, **inputs, **options)


# ---- as a base model ----


def base_of(base: BaseModel, provenance: Provenance, **options) -> PreTrainedModel:
    """Return the model with a visual embedding to which a checkpoint's adapter is added; options: of ``base.load``."""
    return with_images(base.load(**options), visual_config(provenance))


def visual_config(provenance: Provenance) -> VisualConfig:
    """Return the image input of a checkpoint's model; raises ``UserError`` if the checkpoint does not record it."""
    return VisualConfig.from_json(provenance.model_settings, "the checkpoint's 'model_settings'", complete=True)


def check_base(model: nn.Module, provenance: Provenance, folder: object) -> None:
    """Raise ``UserError`` for a model without a checkpoint's visual embedding, before its adapter is added."""
    expected, found = visual_config(provenance), getattr(unwrap(model), NAME, None)
    if getattr(found, "config", None) != expected:
        raise UserError(
            f"{folder} has a visual embedding for images of {expected.grid} x {expected.grid} cells of {expected.dim} "
            f"numbers, pooled to {expected.tokens}, and this {type(unwrap(model)).__name__} has no such module; load "
            "both with mtl_lora.load(folder)"
        )


def in_language_model(adapter: AdapterConfig, model: PreTrainedModel) -> AdapterConfig:
    """Return the adapter for layers of the language model, with the visual embedding among ``modules_to_save``.

    Raises ``UserError`` as ``find_targets`` does.
    """
    saved = list(dict.fromkeys([NAME, *adapter.modules_to_save]))
    adapter = dataclasses.replace(adapter, modules_to_save=saved)
    find_targets(model, adapter)
    return adapter
