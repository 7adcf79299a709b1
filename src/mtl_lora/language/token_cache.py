"""Encoded training examples on disk: tokenised once, keyed by everything they depend on, then memory-mapped."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from mtl_lora.language.encode import Encoder, template
from mtl_lora.language.examples import Example, load_examples
from mtl_lora.language.tasks import TaskSet
from mtl_lora.training.rows import cached_rows, tokenizer_hash

# Incremented when the encoding of examples changes, so that caches of older versions are not read.
_VERSION = 2
COLUMNS = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "prompt_length": datasets.Value("int32"),
        "length": datasets.Value("int32"),
        "task_id": datasets.Value("int32"),
        "removed": datasets.Value("int32"),
    }
)


def training_rows(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    template_name: str,
    cutoff_len: int,
    tasks: TaskSet,
    cache_dir: str | Path,
    task: str | None = None,
    digest: str | None = None,
) -> datasets.Dataset:
    """The encoded examples of a data file, one per row, from the cache if it has them.

    Columns: input_ids (prompt, answer, EOS), prompt_length, length, task_id, removed (prompt tokens cut). task: as for
    ``load_examples``. digest: the file's sha256, if it is known.
    Raises ``UserError`` as ``load_examples`` and ``Encoder.encode`` do, and for an unwritable cache folder.
    """
    # The room kept for an answer depends on the options and the answer prefix; the question is part of the prompt of a
    # ``text`` example; the pattern decides whether an output passes its check.
    shaping = [
        [task.name, task.options, task.answer_prefix, *filter(None, [task.question])]
        + ([["pattern", task.pattern]] if task.pattern else [])
        for task in tasks
    ]
    facts = [_VERSION, cutoff_len, shaping, tokenizer_hash(tokenizer), repr(template(template_name))]
    encoder = Encoder(tokenizer, template_name, cutoff_len, tasks)

    def encode(examples: Sequence[Example]) -> dict[str, list]:
        rows = encoder.encode(examples)
        ids = [np.array(row.prompt_ids + row.answer_ids, dtype=np.int32) for row in rows]
        return {
            "input_ids": ids,
            "prompt_length": [len(row.prompt_ids) for row in rows],
            "length": [len(each) for each in ids],
            "task_id": [row.task_id for row in rows],
            "removed": [row.removed for row in rows],
        }

    facts += [task] if task else []
    return cached_rows(path, facts, COLUMNS, cache_dir, lambda: load_examples(path, tasks, task), encode, digest)
