"""Training of a language model with visual tokens and an adapter, on batches of all tasks or of one task each."""

import functools
import itertools

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from mtl_lora import route
from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.base_model import at_least_float32, choose_attention
from mtl_lora.errors import UserError
from mtl_lora.image_text import model
from mtl_lora.image_text.config import ROUND_ROBIN, TrainConfig
from mtl_lora.image_text.data import IGNORED, Collator, Encoder, mean_answer_tokens, training_rows
from mtl_lora.image_text.features import FeatureStore
from mtl_lora.training.projection import logits_at
from mtl_lora.training.rows import row_columns
from mtl_lora.training.run import Run
from mtl_lora.training.sampler import RoundRobinSampler, StepSampler
from mtl_lora.training.trainer import Batch


class ImageTextRun(Run):
    """The training of a language model that also sees images."""

    shortened_at, limit = "the ends of their texts and answers", "the limits of its task or the cutoff"

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self.store = FeatureStore(config.features)
        size = self.store.dim, self.store.grid
        self.images = model.VisualConfig(*size, config.pool, config.images, self.store.source)

    def structure(self) -> PreTrainedModel:
        return model.with_images(super().structure(), self.images)

    def place_adapter(self, adapter: AdapterConfig, structure: PreTrainedModel) -> tuple[AdapterConfig, list[str]]:
        return model.in_language_model(adapter, structure), []

    def rows(self, digest: str) -> datasets.Dataset:
        config = self.config
        self.encoder = Encoder(self.base.tokenizer(), self.base.config(), config.cutoff_len, self.tasks)
        return training_rows(config.data_path, self.encoder, config.cache_dir, config.task, digest)

    def check_rows(self, rows: datasets.Dataset) -> None:
        counts = row_columns(rows)["image_count"]
        if (most := int(counts.max())) > self.config.images:
            where = f"{self.config.data_path}, example {rows[int(counts.argmax())]['example']}"
            raise UserError(f"{where} has {most} images, more than --images {self.config.images}; raise it")
        self.store.check(itertools.chain.from_iterable(rows["images"]))
        longest = int(self._lengths(rows).max())
        self.base.check_positions(longest, "the longest example with its visual tokens; lower --cutoff_len, or --pool")

    def _lengths(self, rows: datasets.Dataset) -> np.ndarray:
        """Return the number of tokens of each example with its images, (N,)."""
        columns = row_columns(rows)
        return columns["length"] + columns["image_count"] * self.images.tokens

    def plan(self, structure: PreTrainedModel) -> tuple[np.ndarray, bool]:
        if not self.config.token_budget:
            return self._lengths(self.train), False
        # Texts and pictures of a batch are padded separately, so plan with the largest number of pictures of any row.
        columns = row_columns(self.train)
        lengths = columns["length"] + columns["image_count"].max() * self.images.tokens
        if (most := int(lengths.max())) > self.config.token_budget:
            raise UserError(f"--token_budget must be at least {most}, the longest text with the most images")
        return lengths, False

    def sampler(self, lengths: np.ndarray, task_ids: np.ndarray, group_tasks: bool) -> StepSampler:
        config, arguments = self.config, self.arguments
        if config.task_batches != ROUND_ROBIN:
            return super().sampler(lengths, task_ids, group_tasks)
        split = config.gradient_accumulation_steps, arguments.world_size, arguments.process_index
        return RoundRobinSampler(task_ids, config.batch_sizes(self.tasks), config.seed, *split)

    def load_base(self) -> PreTrainedModel:
        loaded = model.with_images(super().load_base(), self.images)
        choose_attention(loaded, self.arguments.device, int(self._lengths(self.train).max()))
        return loaded

    def ends(self):
        collator = Collator(self.encoder, self.store, self.images.tokens, self.config.seed, self.mean_tokens)
        return collator, answer_losses

    @functools.cached_property
    def mean_tokens(self) -> dict[int, float]:
        """``mean_answer_tokens`` of the training rows, cached because it reads all answers."""
        return mean_answer_tokens(self.train, self.tasks)

    def facts(self) -> dict[str, object]:
        by_name = {self.tasks[task_id].name: mean for task_id, mean in self.mean_tokens.items()}
        return {"features": self.store.fingerprint, "mean_answer_tokens": by_name}

    def deciding_facts(self, configuration: dict) -> dict[str, object]:
        return super().deciding_facts(configuration) | {"the features": configuration.get("features")}

    def provenance(self) -> dict[str, object]:
        return {"cutoff_len": self.config.cutoff_len, "model_settings": self.images.to_json()}


RUN = ImageTextRun


def answer_losses(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the losses, weights and task ids (N,) of the N answer tokens of a batch.

    A loss is the token's cross-entropy times the soft score of its answer. batch: of ``Collator``, with answers;
    without features the model reads texts only.
    """
    labels, mask = batch["labels"], batch["attention_mask"]
    supervised = (labels.flatten() != IGNORED).nonzero()[:, 0]
    row, place = supervised // labels.shape[1], supervised % labels.shape[1]
    names = ["input_ids", "attention_mask", "features"]
    if "decoder_input_ids" in batch:
        names, shape, positions = [*names, "decoder_input_ids"], labels.shape, supervised
    else:  # text token j, which follows all visual tokens, is predicted one position before it
        shape, visual = mask.shape, mask.shape[1] - labels.shape[1]
        positions = row * shape[1] + visual + place - 1
    task_ids = batch["task_ids"]
    own = task_ids.index_select(0, row)
    inputs = {name: batch[name] for name in names if name in batch}
    with route.use(task_ids):
        logits = at_least_float32(logits_at(model, inputs, shape, positions, own))
    targets = labels.flatten().index_select(0, supervised)
    losses = F.cross_entropy(logits, targets, reduction="none") * batch["scores"].index_select(0, row)
    return losses, batch["weights"].index_select(0, row), own
