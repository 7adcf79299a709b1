"""Encoded training examples on disk: tokenised once, keyed by everything that shapes them, then memory-mapped."""

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
from transformers import PreTrainedTokenizerBase

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.language.encode import Encoder, template
from mtl_lora.language.examples import load_examples
from mtl_lora.language.tasks import TaskSet

# Raised when the way examples are encoded changes, so that caches of an older version are not read.
_VERSION = 2
_CHUNK = 4096
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream of Arrow; one that was cut between its batches would read as whole
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
    """The encoded examples of a data file, one a row, from the cache if they are there.

    Columns: input_ids (prompt, answer, EOS), prompt_length, length, task_id, removed (prompt tokens cut). task: as for
    ``load_examples``. digest: the file's sha256, if it is known.
    Raises ``UserError`` as ``load_examples`` and ``Encoder.encode`` do, and for
    an unwritable cache folder.
    """
    # The room that is kept for an answer depends on the options and what is written before them.
    shaping = [(task.name, task.options, task.answer_prefix) for task in tasks]
    digest = digest or files.sha256(path)
    facts = [_VERSION, digest, Path(path).suffix.lower(), cutoff_len, shaping]
    facts += [tokenizer_hash(tokenizer), repr(template(template_name)), *([task] if task else [])]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    file = Path(cache_dir) / f"rows-{key}.arrow"
    rows = _read(file)
    if rows is None:
        if file.exists():
            print(f"the cache {file} is damaged and made anew", file=sys.stderr)
        with files.unchanged(path, digest):
            examples, encoder = load_examples(path, tasks, task), Encoder(tokenizer, template_name, cutoff_len, tasks)

        def encode(batch: dict[str, list[int]]) -> dict[str, list]:
            try:
                rows = encoder.encode([examples[index] for index in batch["index"]])
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
            ids = [np.array(row.prompt_ids + row.answer_ids, dtype=np.int32) for row in rows]
            return {
                "input_ids": ids,
                "prompt_length": [len(row.prompt_ids) for row in rows],
                "length": [len(each) for each in ids],
                "task_id": [row.task_id for row in rows],
                "removed": [row.removed for row in rows],
            }

        options = {"batched": True, "batch_size": _CHUNK, "desc": "tokenising", "features": COLUMNS}
        options |= {"remove_columns": "index", "new_fingerprint": key}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # A second training on the same data waits for the rows of the first.
            with files.claimed(file, wait=True):
                temporary = {"prefix": f".{file.name}.", "suffix": ".partial", "dir": file.parent}
                with tempfile.TemporaryDirectory(**temporary) as folder:
                    made = Path(folder) / file.name
                    if _read(file) is None:
                        indices = datasets.Dataset.from_dict({"index": range(len(examples))})
                        indices.map(encode, cache_file_name=str(made), **options)
                        made.replace(file)
        except OSError as error:
            raise UserError(
                f"the cache folder {cache_dir} cannot be written ({error.strerror}); pass another"
            ) from None
        rows = _read(file)
        if rows is None:
            raise UserError(f"the cache {file} cannot be read back; pass another --cache_dir")
    return rows


def _read(file: Path) -> datasets.Dataset | None:
    """The rows of a cache file; None for one that is not there or is cut off."""
    try:
        with file.open("rb") as opened:
            opened.seek(-len(_END), os.SEEK_END)
            if opened.read() == _END:
                return datasets.Dataset.from_file(str(file))
    except (OSError, pyarrow.ArrowException):
        pass
    return None


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
