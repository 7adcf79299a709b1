"""Encoded training examples as rows of a dataset: cached on disk, split for validation, counted by task.

The rows of every system have at least the columns ``length`` (tokens, by which batches are planned), ``task_id`` and
``removed`` (tokens that the cutoff removed).
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import torch
from transformers import PreTrainedTokenizerBase

from mtl_lora import files
from mtl_lora.errors import UserError, within
from mtl_lora.training.sampler import examples_per_task

_CHUNK = 4096
# The end of an Arrow stream; a file that was cut off between two record batches lacks it, and would read as complete.
_END = b"\xff\xff\xff\xff\0\0\0\0"


def cached_rows(
    path: str | Path,
    facts: Sequence,
    features: datasets.Features,
    cache_dir: str | Path,
    load: Callable[[], Sequence],
    encode: Callable[[list], dict[str, list]],
    digest: str | None = None,
) -> datasets.Dataset:
    """Return the encoded examples of a data file, one a row, tokenised once and then memory-mapped from the cache.

    facts: everything besides the file's bytes and suffix that determines the rows, as JSON values. load: returns the
    examples of the file. encode: turns examples into columns. digest: the file's sha256, if known. Raises ``UserError``
    for errors of ``load`` and ``encode``, naming the file, and if the cache folder cannot be written.
    """
    digest = digest or files.sha256(path)
    identity = json.dumps([facts[0], digest, Path(path).suffix.lower(), *facts[1:]])
    key = files.sha256_of(identity.encode())[:32]
    file = Path(cache_dir) / f"rows-{key}.arrow"
    rows = _read(file)
    if rows is None:
        if file.exists():
            print(f"the cache {file} is damaged and will be rebuilt", file=sys.stderr)
        with files.unchanged(path, digest):
            examples = load()

        def encode_batch(batch: dict[str, list[int]]) -> dict[str, list]:
            with within(f"{path}"):
                return encode([examples[index] for index in batch["index"]])

        options = {"batched": True, "batch_size": _CHUNK, "desc": "tokenising", "features": features}
        options |= {"remove_columns": "index", "new_fingerprint": key}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # A second training run on the same data waits for the rows of the first.
            with files.claimed(file, wait=True):
                temporary = {"prefix": f".{file.name}.", "suffix": ".partial", "dir": file.parent}
                with tempfile.TemporaryDirectory(**temporary) as folder:
                    made = Path(folder) / file.name
                    if _read(file) is None:
                        indices = datasets.Dataset.from_dict({"index": range(len(examples))})
                        indices.map(encode_batch, cache_file_name=str(made), **options)
                        made.replace(file)
        except OSError as error:
            raise UserError(
                f"the cache folder {cache_dir} cannot be written ({error.strerror}); pass another --cache_dir"
            ) from None
        rows = _read(file)
        if rows is None:
            raise UserError(f"the cache {file} cannot be read back; pass another --cache_dir")
    return rows


def _read(file: Path) -> datasets.Dataset | None:
    """Return the rows of a cache file, or None if it does not exist or is cut off."""
    try:
        with file.open("rb") as opened:
            opened.seek(-len(_END), os.SEEK_END)
            if opened.read() == _END:
                return datasets.Dataset.from_file(str(file))
    except (OSError, pyarrow.ArrowException):
        pass
    return None


def row_columns(rows: datasets.Dataset) -> dict[str, np.ndarray]:
    """Return the numeric columns of encoded examples as arrays (N,)."""
    numbers = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Value)]
    return rows.with_format("numpy", columns=numbers)[:]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything a tokenizer saves: vocabulary, merges, special tokens, settings."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def rows_sha256(rows: datasets.Dataset) -> str:
    """Return a hash of all values of encoded examples, independent of the chunks in which a file holds them."""
    digest = hashlib.sha256()
    for name in sorted(rows.column_names):
        column = rows.data.column(name)
        while pyarrow.types.is_list(column.type):
            _add(digest, pyarrow.compute.list_value_length(column))
            column = pyarrow.compute.list_flatten(column)
        _add(digest, column)
    return digest.hexdigest()


def _add(digest, column: pyarrow.ChunkedArray) -> None:
    for chunk in column.chunks:
        if pyarrow.types.is_string(chunk.type):
            digest.update("".join(f"{text}\0" for text in chunk.to_pylist()).encode())
        else:
            digest.update(chunk.to_numpy(zero_copy_only=False).tobytes())


def padded(rows: Iterable[Sequence[int]], value: int, length: int = 0, left: bool = False) -> torch.Tensor:
    """Return rows of numbers as a tensor (B, L), padded with ``value``; L: ``length``, or the longest row's."""
    rows = list(map(list, rows))
    length = length or max(map(len, rows))
    gaps = [[value] * (length - len(row)) for row in rows]
    return torch.tensor([gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)])


def split(
    rows: datasets.Dataset, held_out: int, seed: int, by_task: bool = True
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Return (training examples, held-out examples or None); the seed draws ``held_out`` of them for validation.

    by_task: in proportion to the tasks' examples, and at least one of every task that has two or more, if ``held_out``
    allows; False: whatever is drawn, as in earlier versions. Every task keeps at least one training example. Raises
    ``UserError`` if too many are to be held out for that.
    """
    if not held_out:
        return rows, None
    if held_out >= len(rows):
        raise UserError(f"val_set_size must be below the number of examples, {len(rows)}, not {held_out}")
    order = np.random.default_rng(seed).permutation(len(rows))
    ids = row_columns(rows)["task_id"][order]
    # In the drawn order, the part of its task's examples before each; the last one of a task stays in training.
    before = np.zeros(len(rows))
    for task in np.unique(ids):
        (own,) = np.nonzero(ids == task)
        before[own] = np.arange(len(own)) / len(own) if by_task else 0
        before[own[-1]] = 1
    most = int((before < 1).sum())
    if most < held_out:
        raise UserError(
            f"val_set_size must be at most {most}, so that each task keeps a training example, not {held_out}"
        )
    chosen = np.zeros(len(rows), dtype=bool)
    chosen[order[np.argsort(before, kind="stable")[:held_out]]] = True
    return rows.select(np.flatnonzero(~chosen)), rows.select(np.flatnonzero(chosen))


def shortened_note(rows: datasets.Dataset, limit: str, cutoff_len: int, where: str) -> str:
    """Return a line that says how many examples the ``limit`` (in words) shortened, and ``where`` they lost tokens."""
    removed, limit = row_columns(rows)["removed"], f"{limit} of {cutoff_len} tokens"
    count = int((removed > 0).sum())
    if not count:
        return f"no example is longer than {limit}"
    return (
        f"{count:,} of {len(rows):,} examples are longer than {limit}: "
        f"{int(removed.sum()):,} tokens were removed from {where}"
    )


def counts_note(names: Sequence[str], counts: np.ndarray, held_out: np.ndarray | None, temperature: float) -> str:
    """Return lines with the number of training and held-out examples of each task (T,), and with the passes over a
    task's examples in an epoch, unless each is one."""

    def listed(counts: np.ndarray) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in zip(names, counts, strict=True))

    lines = [f"training examples: {listed(counts)}"]
    if held_out is not None:
        lines.append(f"held out: {listed(held_out)}")
    passes = examples_per_task(counts, temperature) / np.maximum(counts, 1)
    if temperature > 1:
        each = ", ".join(f"{name} {times:.1f}" for name, times in zip(names, passes, strict=True))
        lines.append(f"passes over a task's examples in an epoch, by --sampling_temperature: {each}")
    return "\n".join(lines)
