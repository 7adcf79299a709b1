"""Training on maps: one forward per image gives the maps of all tasks, each with its own loss."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from mtl_lora import files
from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.dense import model
from mtl_lora.dense.data import DenseDataset
from mtl_lora.dense.losses import known_values, task_losses
from mtl_lora.errors import note
from mtl_lora.training.run import Run

_PER_PROCESS = (
    "batch norm without a GPU, and the balance of saliency's loss, use the images of one process only: two processes "
    "are not equivalent to one with twice the batch"
)


class Collator:
    """Collates items of a data set into a batch: ``pixel_values`` (B, 3, S, S), each task's stacked labels under its
    name, and ``loss_weight`` (T,). ``set_epoch`` is that of the data set."""

    def __init__(self, data: DenseDataset):
        self.data, self.set_epoch = data, data.set_epoch

    def __call__(self, items: Sequence[dict]) -> dict[str, torch.Tensor]:
        tasks = self.data.tasks
        batch = {name: torch.stack([item["labels"][name] for item in items]) for name in tasks.names}
        images = torch.stack([item["image"] for item in items])
        return batch | {"pixel_values": images, "loss_weight": known_values(batch, tasks)}


class DenseRun(Run):
    """The training of a backbone with decoders. Its rows are the images of a ``DenseDataset``."""

    has_heads = mean_by_task = True

    def structure(self) -> model.DenseModel:
        return model.structure(self.base, self.tasks, self.config.image_size)

    def place_adapter(self, adapter: AdapterConfig, structure: model.DenseModel) -> tuple[AdapterConfig, list[str]]:
        config = self.config
        return model.placed(adapter, structure, config.downsampler, config.train_extras), []

    def data_sha256(self) -> str:
        config = self.config
        settings = (config.image_size, config.augmentation, config.seed, config.missing_labels)
        self.data = DenseDataset(config.data_path, "train", self.tasks, *settings)
        return files.sha256_of("".join(self.data.sha256(task) for task in self.tasks).encode())

    def rows(self, digest: str) -> DenseDataset:
        return self.data

    def columns(self, rows: DenseDataset) -> dict[str, np.ndarray]:
        """Return the same length and task for all images, which have one size and all tasks, to plan batches."""
        return {"length": np.ones(len(rows), np.int64), "task_id": np.zeros(len(rows), np.int64)}

    def check_rows(self, rows: DenseDataset) -> None:
        if self.arguments.world_size > 1:
            note(_PER_PROCESS)

    def task_counts(self, rows: DenseDataset) -> np.ndarray:
        return np.array([sum(rows.is_there(task, id) for id in rows.ids) for task in self.tasks])

    def load_base(self) -> model.DenseModel:
        found = model.load(self.base, self.tasks, self.config.dtype)
        if self.config.drop_path is not None:
            found.backbone.set_drop_path(self.config.drop_path)
        if self.arguments.world_size > 1 and self.arguments.device.type == "cuda":
            found.decoders = nn.SyncBatchNorm.convert_sync_batchnorm(found.decoders)
        return found

    def ends(self):
        return Collator(self.data), functools.partial(task_losses, self.tasks)


RUN = DenseRun
