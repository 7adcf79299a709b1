"""Training of encoders with an adapter in the encoder and a head per task, on batches that mix all tasks."""

import datasets
from transformers import PreTrainedModel

from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.nlu import model
from mtl_lora.nlu.data import Collator, Encoder, training_rows
from mtl_lora.training.run import Run


class EncoderRun(Run):
    """The training of an encoder."""

    has_heads, shortened_at = True, "their ends"

    def structure(self) -> PreTrainedModel:
        # An evaluation uses this cutoff too, so the model must have that many positions even if training rows are
        # shorter. Checked here, before ZeRO-3 partitions the structure that the check inspects.
        self.base.check_positions(self.config.cutoff_len, f"--cutoff_len {self.config.cutoff_len}; lower it")
        return model.structure(self.base, self.tasks)

    def place_adapter(self, adapter: AdapterConfig, structure: PreTrainedModel) -> tuple[AdapterConfig, list[str]]:
        return model.in_encoder(adapter, structure), []

    def rows(self, digest: str) -> datasets.Dataset:
        config, self.tokenizer = self.config, self.base.tokenizer()
        encoder = Encoder(self.tokenizer, config.cutoff_len)
        return training_rows(config.data_path, encoder, self.tasks, config.cache_dir, config.task, digest)

    def load_base(self) -> PreTrainedModel:
        return model.load(self.base, self.tasks, self.config.dtype, self.config.load_in_4bit)

    def ends(self):
        return Collator(self.tokenizer.pad_token_id, self.recorded_lengths()), model.TaskLosses(self.tasks)

    def provenance(self) -> dict[str, object]:
        rows = self.train.select_columns(["task_id", "pair"]).to_pandas().groupby("task_id")["pair"]
        pairs = {self.tasks[int(id)].name: bool(both.all()) for id, both in rows if both.nunique() == 1}
        return {"cutoff_len": self.config.cutoff_len, "pairs": pairs}


RUN = EncoderRun
