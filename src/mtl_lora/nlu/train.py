"""Training of encoders: mixed batches of all tasks, an adapter in the encoder, a head per task."""

import functools

import datasets
from transformers import PreTrainedModel

from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.errors import UserError
from mtl_lora.nlu import model
from mtl_lora.nlu.data import Collator, training_rows
from mtl_lora.nlu.tasks import TaskSet
from mtl_lora.training.run import Run, train

_STEP = 16  # tokens between the lengths of batches that are recorded as CUDA graphs


class EncoderRun(Run):
    """The training of an encoder."""

    task_set = TaskSet
    shortened_at = "their ends"

    def structure(self) -> PreTrainedModel:
        structure = model.structure(self.base, self.tasks)
        if self.config.cuda_graphs and getattr(structure.config, "layerdrop", 0):
            raise UserError(f"{self.config.base_model} leaves out layers at random (layerdrop): pass no --cuda_graphs")
        return structure

    def place_adapter(self, adapter: AdapterConfig, structure: PreTrainedModel) -> tuple[AdapterConfig, list[str]]:
        return model.in_encoder(adapter, structure), []

    def rows(self, digest: str) -> datasets.Dataset:
        config = self.config
        # Of what is asked later: an evaluation cuts no shorter than the training did.
        self.base.check_positions(config.cutoff_len, f"--cutoff_len {config.cutoff_len}; lower it")
        self.tokenizer = self.base.tokenizer()
        settings = self.tokenizer, config.cutoff_len, self.tasks, config.cache_dir, config.task
        return training_rows(config.data_path, *settings, digest)

    def load_base(self) -> PreTrainedModel:
        return model.load(self.base, self.tasks, self.config.dtype, self.config.load_in_4bit)

    @property
    def cuda_graphs(self) -> bool:
        return self.config.cuda_graphs and self.arguments.device.type == "cuda" and self.arguments.world_size == 1

    def ends(self):
        if self.config.cuda_graphs and not self.cuda_graphs:
            self.log("--cuda_graphs has no effect here, for it needs a GPU and one process")
        cutoff = self.config.cutoff_len
        lengths = [*range(_STEP, cutoff, _STEP), cutoff] if self.cuda_graphs else []
        return Collator(self.tokenizer.pad_token_id, lengths), model.TaskLosses(self.tasks)

    def provenance(self) -> dict[str, object]:
        rows = self.train.select_columns(["task_id", "pair"]).to_pandas().groupby("task_id")["pair"]
        pairs = {self.tasks[int(id)].name: bool(both.all()) for id, both in rows if both.nunique() == 1}
        return {"cutoff_len": self.config.cutoff_len, "pairs": pairs}


RUN = EncoderRun
run = functools.partial(train, RUN)  # as a configuration says
