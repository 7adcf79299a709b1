"""Images for a language model: grid features become visual tokens, which join the embedded text of each row.

Where they join: in an encoder that normalises its embeddings (BART) behind that norm and before the dropout, as in
VL-BART (arXiv 2102.02779), so that they bypass norm and positions; elsewhere as input embeddings, behind the text in an
encoder-decoder, before it in a causal language model. A bias of relative positions (T5) is between tokens of text
alone, as in VL-T5. ``model(...)`` and ``model.generate(...)`` take ``features`` beside ``input_ids``, and an
``attention_mask`` of the joined length, in that order.

An adapter trains the visual embedding whole. Without the adapter (``disabled``, ``unload``) it is as it was drawn, and
``merge`` leaves it as it was trained. Neither transformers nor PEFT knows such a model, so none is exported.

Shape legend: B rows, I images of a row, G cells of an image's grid, D numbers of a cell, N visual tokens of an image,
L tokens of text, d the width of the language model.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from mtl_lora.adapter import routing
from mtl_lora.adapter.checkpoint import Provenance
from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.inject import find_targets
from mtl_lora.adapter.layer import gathered
from mtl_lora.adapter.saved import unwrap
from mtl_lora.base_model import BaseModel, accepts_argument, positions_of
from mtl_lora.config import Config
from mtl_lora.errors import UserError

NAME = "visual_embedding"  # of the module in the model
_SPREAD = 0.02  # of drawn weights, where a model's configuration does not say


@dataclasses.dataclass(frozen=True)
class VisualConfig(Config):
    """The images that a model takes: D numbers (dim) for each of grid x grid cells, most of them a row has (images).

    pool: cells along a side after adaptive max pooling; None: the grid as it is. The original pools 7 to 6.
    source: what made the features, see ``FeatureStore.source``; those of another may have the same shape.
    """

    dim: int
    grid: int
    pool: int | None = None
    images: int = 2
    source: str | None = dataclasses.field(default=None, compare=False, metadata={"before": None})

    def validate(self) -> None:
        for name in ("dim", "grid", "images"):
            self.require(name, "at least 1", getattr(self, name) >= 1)
        self.require(
            "pool", f"1 to {self.grid}, the side of the grid", self.pool is None or 1 <= self.pool <= self.grid
        )

    @property
    def tokens(self) -> int:
        """Visual tokens of an image, N."""
        return (self.pool or self.grid) ** 2


class VisualEmbedding(nn.Module):
    """Grid features to visual tokens (arXiv 2102.02779): the sum of four terms for each cell of each image.

    LN(W f + b) of its features; LN(V p + c) of its box, which is zero for the cells of a grid, so one vector for all;
    a vector for the place of the image in its row; and one for the place of the cell in its image, the only term that
    tells cells apart: there the original uses rows of added words, random and frozen, hence a buffer.
    """

    object_order: torch.Tensor

    def __init__(self, config: VisualConfig, width: int):
        super().__init__()
        self.config = config
        self.feature, self.feature_norm = nn.Linear(config.dim, width), nn.LayerNorm(width)
        self.box, self.box_norm = nn.Linear(5, width), nn.LayerNorm(width)  # x1, x2, y1, y2, area
        self.image_order = nn.Embedding(config.images, width)
        self.register_buffer("object_order", torch.empty(config.tokens, width))

    @torch.no_grad()
    def reset_parameters(self, spread: float, scale: float, order: float) -> None:
        """Draw all weights by torch's seed: N(0, spread^2), the norms' weights ``scale``, the buffer N(0, order^2)."""
        for module in (self.feature, self.box, self.image_order):
            nn.init.normal_(module.weight, std=spread)
        for module in (self.feature, self.box, self.feature_norm, self.box_norm):
            nn.init.zeros_(module.bias)
        for module in (self.feature_norm, self.box_norm):
            nn.init.constant_(module.weight, scale)
        nn.init.normal_(self.object_order, std=order)

    def base_provenance(self) -> dict:
        """What a checkpoint must say of the model that this is in, beside its name."""
        return {"system": "image_text", "model_settings": self.config.to_json()}

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """features (B, I, G, D) to (B, I N, d), image by image; raises ``UserError`` for another grid, D or more I."""
        config, shape = self.config, tuple(features.shape)
        if len(shape) != 4 or shape[1] > config.images or shape[2:] != (config.grid**2, config.dim):
            raise UserError(
                f"features must be of shape (batch, images, cells, numbers), here (B, at most {config.images}, "
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


# Encoder-decoders whose encoder adds learned positions before a norm of its own, or relative ones as a bias.
_JOINED = ("bart", "mbart", "plbart", "t5", "mt5", "umt5", "switch_transformers")


def with_images(model: PreTrainedModel, config: VisualConfig) -> PreTrainedModel:
    """Give a language model the visual embedding, drawn by torch's seed, in place, and return the model.

    On the meta device it has shapes alone. Where visual tokens are input embeddings they begin as large as those.
    Raises ``UserError`` for an encoder-decoder of a family of which it is not known how visual tokens are joined to it.
    """
    if text_first(model) and model.config.model_type not in _JOINED:
        known = ", ".join(_JOINED)
        raise UserError(
            f"it is not known how images are joined to a {model.config.model_type}, whose positions or norms may take "
            f"them for text; pass a causal language model, or an encoder-decoder of the kinds {known}"
        )
    words = model.get_input_embeddings()
    with torch.device(model.device):
        visual = VisualEmbedding(config, words.embedding_dim).to(model.dtype)
    norm = _embedding_norm(model)
    if model.device.type != "meta":
        known = (getattr(model.config, name, None) for name in ("init_std", "initializer_range"))
        spread = scale = next(filter(None, known), _SPREAD)
        if norm is None:
            with gathered(words.weight):
                scale = words.weight.float().std().item() * float(getattr(words, "embed_scale", 1.0))
        visual.reset_parameters(spread, 1.0 if norm is not None else scale, scale)
    setattr(model, NAME, visual)
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    model.register_forward_hook(_after_forward, always_call=True)
    if norm is not None:
        norm.register_forward_hook(_behind_norm)
    for part in model.get_encoder().modules() if text_first(model) else ():
        if isinstance(bias := getattr(part, "relative_attention_bias", None), nn.Module):
            bias.register_forward_hook(_within_text)
    model.generate = Generate(model)
    return model


def _embedding_norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm through which an encoder sends its embedded text, visual tokens not; None for a model without one."""
    return getattr(model.get_encoder(), "layernorm_embedding", None) if text_first(model) else None


def text_first(model: PreTrainedModel) -> bool:
    """Whether visual tokens come behind the text."""
    return model.config.is_encoder_decoder


def joined(
    model: PreTrainedModel, input_ids: torch.Tensor | None, features: torch.Tensor, mask: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(inputs_embeds (B, I N + L, d) and attention_mask of text and images, the visual tokens among them).

    Raises ``UserError`` for a mask (B, I N + L) of another shape, and for features of more or fewer rows.
    """
    if input_ids is None:
        raise UserError("features need the text beside them: call the model with input_ids=... and features=...")
    visual = getattr(model, NAME)(features)
    text = model.get_input_embeddings()(input_ids)
    if len(text) != len(visual):
        raise UserError(f"input_ids has {len(text)} rows, and features {len(visual)}; they must have as many")
    whole = torch.cat([text, visual] if text_first(model) else [visual, text], dim=1)
    if mask is None:
        mask = torch.ones(whole.shape[:2], dtype=torch.long, device=whole.device)
    if mask.shape != whole.shape[:2]:
        raise UserError(
            f"attention_mask must be of shape {tuple(whole.shape[:2])}, of {text.shape[1]} tokens and "
            f"{visual.shape[1]} visual tokens, not {tuple(mask.shape)}"
        )
    return {"inputs_embeds": whole, "attention_mask": mask}, visual


# The visual tokens of the forward that runs in this thread, for what stands in its encoder.
_running = threading.local()


@contextlib.contextmanager
def _shown(visual: torch.Tensor | None) -> Iterator[None]:
    before, _running.visual = getattr(_running, "visual", None), visual
    try:
        yield
    finally:
        _running.visual = before


# A block that is recomputed knows no end of the text without them.
routing.recomputed.append(lambda: functools.partial(_shown, getattr(_running, "visual", None)))


@torch._disable_dynamo
def _before_forward(model: PreTrainedModel, arguments: tuple, options: dict) -> tuple[tuple, dict]:
    """Put features into the input embeddings of a forward; one without features is the language model's own."""
    features = options.pop("features", None)
    if features is None:
        return arguments, options
    if arguments:
        raise UserError("beside features all inputs are passed by name: model(input_ids=..., features=...)")
    inputs, _running.visual = joined(model, options.pop("input_ids", None), features, options.get("attention_mask"))
    if not text_first(model) and accepts_argument(type(model), "position_ids"):
        # Counted over what the mask leaves, so that a row's positions do not depend on the others of its batch.
        options.setdefault("position_ids", positions_of(inputs["attention_mask"]))
    return arguments, options | inputs


@torch._disable_dynamo
def _after_forward(model: PreTrainedModel, arguments: tuple, output: object) -> None:
    """The end of a forward, also of one that raised."""
    _running.visual = None


@torch._disable_dynamo
def _behind_norm(norm: nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
    """The text as the norm gives it, and behind it the visual tokens as they are."""
    visual = getattr(_running, "visual", None)
    return output if visual is None else torch.cat([output[:, : -visual.shape[1]], visual], dim=1)


@torch._disable_dynamo
def _within_text(bias: nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
    """An encoder's bias (queries, keys, heads), zero from and to visual tokens: how far the text is from them would
    depend on its padding."""
    visual = getattr(_running, "visual", None)
    count = 0 if visual is None else visual.shape[1]
    return F.pad(output[: len(output) - count, : output.shape[1] - count], (0, 0, 0, count, 0, count))


class Generate:
    """Stands on a model in place of ``generate``, which then takes features. A causal language model gives the new
    tokens alone, an encoder-decoder its start token and these. No closure: the model pickles and is copied."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    @torch.no_grad()
    def __call__(self, input_ids=None, features=None, attention_mask=None, **options):
        plain = functools.partial(type(self.model).generate, self.model)
        if features is None:
            options |= {} if attention_mask is None else {"attention_mask": attention_mask}
            return plain(input_ids, **options)
        inputs, visual = joined(self.model, input_ids, features, attention_mask)
        with _shown(visual):
            return plain(**inputs, **options)


# ---- as a base model ----


def load(base: BaseModel, config: VisualConfig, dtype: str = "auto", load_in_4bit: bool = False, **options):
    """The language model with its weights and a fresh visual embedding."""
    return with_images(base.load(dtype, load_in_4bit, **options), config)


def base_of(base: BaseModel, provenance: Provenance, **options) -> PreTrainedModel:
    """The model with a visual embedding on which a checkpoint's adapter is put; options: of ``load``."""
    return load(base, visual_config(provenance), **options)


def visual_config(provenance: Provenance) -> VisualConfig:
    """The images that a checkpoint's model takes; raises ``UserError`` for a checkpoint that does not say so."""
    return VisualConfig.from_json(provenance.model_settings, "the checkpoint's 'model_settings'", complete=True)


def structure(base: BaseModel, config: VisualConfig) -> PreTrainedModel:
    """The same on the meta device: every module and shape, no memory."""
    return with_images(base.structure(), config)


def check_base(model: nn.Module, provenance: Provenance, folder: object) -> None:
    """Raise ``UserError`` for a model without a checkpoint's visual embedding, before its adapter is put on."""
    expected, found = visual_config(provenance), getattr(unwrap(model), NAME, None)
    if getattr(found, "config", None) != expected:
        raise UserError(
            f"{folder} has a visual embedding for images of {expected.grid} x {expected.grid} cells of {expected.dim} "
            f"numbers, pooled to {expected.tokens}, which this {type(unwrap(model)).__name__} has no place for; load "
            "both with mtl_lora.load(folder)"
        )


def in_language_model(adapter: AdapterConfig, model: PreTrainedModel) -> AdapterConfig:
    """The adapter on layers of the language model, with the visual embedding among ``modules_to_save``.

    Raises ``UserError`` as ``find_targets`` does.
    """
    saved = list(dict.fromkeys([NAME, *adapter.modules_to_save]))
    adapter = dataclasses.replace(adapter, modules_to_save=saved)
    find_targets(model, adapter)
    return adapter
