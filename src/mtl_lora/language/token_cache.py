"""Encoded training examples on disk: tokenised once, keyed by everything that shapes them, then memory-mapped."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.language.encode import Encoder, template
from mtl_lora.language.examples import load_examples
from mtl_lora.language.tasks import TaskSet

# Raised when the way examples are encoded changes, so that caches of an older version are not read.
_VERSION = 1
_CHUNK = 4096
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
    progress: bool = True,
) -> datasets.Dataset:
    """The encoded examples of a data file, one a row, from the cache if they are there.

    Columns: input_ids (prompt, answer, EOS), prompt_length, length, task_id, removed (prompt tokens cut).
    progress: show a bar while tokenising. Raises ``UserError`` as ``load_examples`` and ``Encoder.encode`` do, and for
    an unwritable cache folder.
    """
    if not Path(path).is_file():
        raise UserError(f"the data file {path} does not exist; see data/commonsense/README.md for how to make it")
    # The room that is kept for an answer depends on the options and what is written before them.
    shaping = [(task.name, task.options, task.answer_prefix) for task in tasks]
    facts = [_VERSION, files.sha256(path), Path(path).suffix.lower(), cutoff_len, shaping]
    facts += [tokenizer_hash(tokenizer), repr(template(template_name))]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    folder = Path(cache_dir) / f"rows-{key}"
    if folder.is_dir():
        return datasets.load_from_disk(str(folder))
    rows = _encode_file(path, Encoder(tokenizer, template_name, cutoff_len, tasks), tasks, progress)
    try:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".rows-", dir=cache_dir) as temporary:
            part = Path(temporary) / "rows"
            with _quiet():
                rows.save_to_disk(str(part))
            try:
                os.rename(part, folder)
            except OSError:
                if not folder.is_dir():  # it is there if another run has encoded the same file meanwhile
                    raise
    except OSError as error:
        raise UserError(f"the cache folder {cache_dir} cannot be written ({error.strerror}); pass another") from None
    return datasets.load_from_disk(str(folder))


def _encode_file(path: str | Path, encoder: Encoder, tasks: TaskSet, progress: bool) -> datasets.Dataset:
    examples = load_examples(path, tasks)
    columns = {name: [] for name in COLUMNS}
    with tqdm(total=len(examples), desc="tokenising", unit=" examples", disable=not progress) as bar:
        for start in range(0, len(examples), _CHUNK):
            chunk = examples[start : start + _CHUNK]
            try:
                encoded = encoder.encode(chunk)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
            for row in encoded:
                ids = row.prompt_ids + row.answer_ids
                columns["input_ids"].append(np.array(ids, dtype=np.int32))
                columns["prompt_length"].append(len(row.prompt_ids))
                columns["length"].append(len(ids))
                columns["task_id"].append(row.task_id)
                columns["removed"].append(row.removed)
            bar.update(len(chunk))
    return datasets.Dataset.from_dict(columns, features=COLUMNS)


def row_columns(rows: datasets.Dataset) -> dict[str, np.ndarray]:
    """The number columns of encoded examples as arrays (N,)."""
    return rows.with_format("numpy", columns=[name for name in COLUMNS if name != "input_ids"])[:]


def shortened_note(rows: datasets.Dataset, cutoff_len: int) -> str:
    """One line on how many examples the cutoff shortened."""
    removed = row_columns(rows)["removed"]
    count = int((removed > 0).sum())
    if not count:
        return f"no example is longer than the cutoff of {cutoff_len} tokens"
    return (
        f"{count:,} of {len(rows):,} examples are longer than the cutoff of {cutoff_len} tokens: "
        f"{int(removed.sum()):,} tokens were taken from the middle of their instructions"
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything a tokenizer saves: vocabulary, merges, special tokens, settings."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A block without the progress bars of ``datasets``."""
    enabled = datasets.utils.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bars()
