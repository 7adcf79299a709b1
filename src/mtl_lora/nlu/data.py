"""Turn examples into rows and batches; the encoder's own tokenizer joins the two texts of a pair."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from mtl_lora.nlu.examples import Example, load_examples
from mtl_lora.nlu.tasks import TaskSet
from mtl_lora.training.cuda_graphs import padded_length
from mtl_lora.training.rows import cached_rows, padded, tokenizer_hash

# Increase it when the encoding of examples changes, so that caches of an older version are not read.
_VERSION = 2
COLUMNS = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "token_type_ids": datasets.Sequence(datasets.Value("int8")),  # empty if the model takes none
        "target": datasets.Value("float64"),
        "length": datasets.Value("int32"),
        "task_id": datasets.Value("int32"),
        "removed": datasets.Value("int32"),
        "pair": datasets.Value("bool"),
    }
)


class Encoder:
    """Encodes texts and pairs as token ids with the model's special tokens; the longer text of a pair is cut first."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cutoff_len: int):
        self.tokenizer, self.cutoff_len = tokenizer, cutoff_len
        self.has_types = "token_type_ids" in tokenizer.model_input_names

    def encode(self, examples: Sequence[Example]) -> list[dict]:
        """Return each example's ``input_ids``, ``token_type_ids`` if the model takes them, and ``removed``, the number
        of tokens cut."""
        rows: list[dict] = [{}] * len(examples)
        single = [index for index, example in enumerate(examples) if example.text_b is None]
        pairs = [index for index, example in enumerate(examples) if example.text_b is not None]
        for indices in filter(None, (single, pairs)):
            texts = [[examples[index].text for index in indices]]
            if indices is pairs:
                texts.append([examples[index].text_b for index in indices])
            options = {"return_attention_mask": False, "return_token_type_ids": self.has_types, "verbose": False}
            whole = self.tokenizer(*texts, **options)
            cut = whole
            if any(len(ids) > self.cutoff_len for ids in whole["input_ids"]):
                cut = self.tokenizer(*texts, truncation="longest_first", max_length=self.cutoff_len, **options)
            for place, index in enumerate(indices):
                removed = len(whole["input_ids"][place]) - len(cut["input_ids"][place])
                rows[index] = {key: cut[key][place] for key in cut} | {"removed": removed}
        return rows


def target_of(example: Example, tasks: TaskSet) -> float:
    """Return the training target of a head: the class index, or for a regression the label scaled to 0 to 1."""
    task = tasks[example.task_id]
    return task.scaled(example.label) if task.is_regression else float(task.labels.index(example.label))


def training_rows(
    path: str | Path,
    encoder: Encoder,
    tasks: TaskSet,
    cache_dir: str | Path,
    task: str | None = None,
    digest: str | None = None,
) -> datasets.Dataset:
    """Return the encoded examples of a data file, one per row (``COLUMNS``), from the cache if they are in it.

    task: as in ``load_examples``. digest: the file's sha256, if known. Raises ``UserError`` as ``load_examples`` does,
    and if the cache folder cannot be written.
    """
    shaping = [(task.name, task.labels, task.regression) for task in tasks]
    facts = ["nlu", _VERSION, encoder.cutoff_len, shaping, tokenizer_hash(encoder.tokenizer), task]

    def encode(examples: Sequence[Example]) -> dict[str, list]:
        rows = encoder.encode(examples)
        return {
            "input_ids": [row["input_ids"] for row in rows],
            "token_type_ids": [row.get("token_type_ids", []) for row in rows],
            "target": [target_of(example, tasks) for example in examples],
            "length": [len(row["input_ids"]) for row in rows],
            "task_id": [example.task_id for example in examples],
            "removed": [row["removed"] for row in rows],
            "pair": [example.text_b is not None for example in examples],
        }

    return cached_rows(path, facts, COLUMNS, cache_dir, lambda: load_examples(path, tasks, task), encode, digest)


class Collator:
    """Collates rows into a batch, padded on the right: input_ids, attention_mask and, if the rows have them,
    token_type_ids, each (B, L); task_ids (B,); loss_weight () = B; and for training rows targets (B,) in float64.

    lengths: in ascending order; a batch is padded to the first of them that its longest row fits into, or to that row's
    own length if none is long enough.
    """

    def __init__(self, pad_token_id: int, lengths: Sequence[int] = ()):
        self.pad_token_id, self.lengths = pad_token_id, lengths

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        ids, types = [row["input_ids"] for row in rows], [row.get("token_type_ids") or [] for row in rows]
        length = padded_length(max(map(len, ids)), self.lengths)
        batch = {"input_ids": padded(ids, self.pad_token_id, length)}
        batch["attention_mask"] = padded([[1] * len(each) for each in ids], 0, length)
        if any(types):
            batch["token_type_ids"] = padded(types, 0, length)
        batch["task_ids"] = torch.tensor([int(row["task_id"]) for row in rows])
        batch["loss_weight"] = torch.tensor(float(len(rows)))
        if "target" in rows[0]:
            batch["targets"] = torch.tensor([row["target"] for row in rows], dtype=torch.float64)
        return batch
