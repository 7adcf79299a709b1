"""Training examples as cached rows and padded batches, and the token losses of a batch, for language models."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import nn

from mtl_lora import route
from mtl_lora.adapter import routing
from mtl_lora.adapter.saved import unwrap
from mtl_lora.base_model import at_least_float32
from mtl_lora.language.encode import Encoder
from mtl_lora.language.examples import Example, load_examples
from mtl_lora.language.prefix import Packer, forward_arguments, let_attention_share
from mtl_lora.training.cuda_graphs import padded_length
from mtl_lora.training.projection import logits_at
from mtl_lora.training.rows import cached_rows, padded, tokenizer_hash

IGNORED = -100  # the label that torch's cross entropy skips
_SIZES = 16  # the most sizes that ``supervised`` may have if batches must have few shapes
_PROBED = 512  # the most positions whose logits are compared; those of a whole long row may not fit on a GPU
# Incremented when the encoding of examples changes, so that caches of older versions are not read.
_VERSION = 2
COLUMNS = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int32")),  # prompt, answer, EOS
        "prompt_length": datasets.Value("int32"),
        "length": datasets.Value("int32"),
        "task_id": datasets.Value("int32"),
        "removed": datasets.Value("int32"),  # prompt tokens cut
    }
)


def training_rows(
    path: str | Path, encoder: Encoder, cache_dir: str | Path, task: str | None = None, digest: str | None = None
) -> datasets.Dataset:
    """The encoded examples of a data file, one per row (``COLUMNS``), from the cache if it has them.

    task: as for ``load_examples``. digest: the file's sha256, if it is known. Raises ``UserError`` as ``load_examples``
    and ``Encoder.encode`` do, and for an unwritable cache folder.
    """
    # Options and prefix decide the room kept for an answer; a question is part of the prompt of a ``text`` example; a
    # pattern decides whether an output passes its check.
    shaping = [[each.name, each.options, each.answer_prefix, each.question, each.pattern] for each in encoder.tasks]
    template = repr(getattr(encoder.template, "source", encoder.template))
    facts = [_VERSION, encoder.cutoff_len, shaping, tokenizer_hash(encoder.tokenizer), template, task]

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

    return cached_rows(
        path, facts, COLUMNS, cache_dir, lambda: load_examples(path, encoder.tasks, task), encode, digest
    )


@dataclasses.dataclass
class Collator:
    """Pads training examples on the right: input_ids, labels (B, L), task_ids (B,), supervised (N,), loss_weight ().

    There is no attention_mask: in a causal model no real token sees the padding on its right, and without a mask
    attention takes its fastest, causal path.

    Labels are ``IGNORED`` at padding and, unless ``train_on_inputs``, at the prompt. supervised: the result of
    ``supervised_positions``, computed here because doing it on a GPU would make training wait for N. loss_weight: N,
    float32. packed: the rows as packed by ``packer``, if there is one.

    lengths: the lengths to which batches are padded, in ascending order, the last one enough for every example; empty:
    each batch is padded to its longest row. With lengths, supervised is also filled up to one of a few sizes, and the
    batch has weights (N,), which are 0 for the added positions.
    """

    pad_token_id: int
    train_on_inputs: bool = False
    packer: Packer | None = None
    lengths: Sequence[int] = ()

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        ids, starts = [list(row["input_ids"]) for row in rows], [int(row["prompt_length"]) for row in rows]
        starts = [0] * len(rows) if self.train_on_inputs else starts
        length = padded_length(max(map(len, ids)), self.lengths)
        input_ids = padded(ids, self.pad_token_id, length)
        hidden = ([IGNORED] * start + row[start:] for row, start in zip(ids, starts, strict=True))
        labels = padded(hidden, IGNORED, length)
        task_ids, supervised = torch.tensor([int(row["task_id"]) for row in rows]), supervised_positions(labels)
        batch = {"input_ids": input_ids, "labels": labels, "task_ids": task_ids, "supervised": supervised}
        batch["loss_weight"] = torch.tensor(float(len(supervised)))
        if self.lengths:
            lacking = -len(supervised) % -(-input_ids.numel() // _SIZES)
            batch["supervised"] = torch.cat([supervised, supervised[:1].expand(lacking)])
            batch["weights"] = F.pad(torch.ones(len(supervised)), (0, lacking))
        packed = self.packer(rows, length, supervised) if self.packer else None
        return {**batch, "packed": packed} if packed else batch


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int, prefix: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask (B, L) of prompts, padded on the left for generation.

    prefix: the number of tokens of a shared prompt prefix, which stay at the left edge, with the padding after them.
    """
    gaps = [max(map(len, rows)) - len(row) for row in rows]
    ids = [[*row[:prefix], *[pad_token_id] * gap, *row[prefix:]] for row, gap in zip(rows, gaps, strict=True)]
    mask = [[1] * prefix + [0] * gap + [1] * (len(row) - prefix) for row, gap in zip(rows, gaps, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    """The positions (N,) in the flattened (B, L) at which a label is predicted.

    The token at j + 1 is predicted at j, so no position predicts the first token of a row, and the last position of a
    row predicts nothing.
    """
    return (F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten() != IGNORED).nonzero().flatten()


def token_losses(
    model: nn.Module, batch: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The cross entropy (N,), the weight (N,) and the task id (N,) of every supervised token.

    batch: input_ids, labels (B, L), task_ids (B,), and optionally attention_mask (B, L), supervised (N,), weights (N,),
    1 by default, and packed, the same rows with shared prompt prefixes. With a batch of the collator nothing here waits
    for a GPU, except transformers' own forward, once.
    """
    labels, task_ids = batch["labels"], batch["task_ids"]
    supervised = batch["supervised"] if "supervised" in batch else supervised_positions(labels)
    token_task_ids = task_ids.index_select(0, supervised // labels.shape[1])
    if "packed" in batch:
        inputs, blocks = forward_arguments(batch["packed"])
        positions, routed = batch["packed"]["supervised"], routing.use_blocks(blocks)
    else:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        positions, routed = supervised, route.use(task_ids)
    with routed:
        logits = logits_at(model, inputs, inputs["input_ids"].shape, positions, token_task_ids)
    targets = labels.flatten().index_select(0, supervised + 1)
    losses = F.cross_entropy(at_least_float32(logits), targets, reduction="none")
    return losses, batch["weights"] if "weights" in batch else torch.ones_like(losses), token_task_ids


def sharing_probe(rows: Sequence[Mapping], packer: Packer) -> dict:
    """A batch for ``CheckedLosses``, made of rows that share a prefix, with losses at positions along whole rows.

    Losses of answers alone would not be enough: a layer that mixes neighbouring tokens may hardly change them.
    """
    batch = Collator(packer.pad_token_id, True, packer)(rows)
    some = slice(None, None, -(-len(batch["supervised"]) // _PROBED))
    packed = {**batch["packed"], "supervised": batch["packed"]["supervised"][some]}
    return {**batch, "supervised": batch["supervised"][some], "packed": packed}


class CheckedLosses:
    """``token_losses`` for training with shared prompt prefixes, after a check that sharing does not change the losses.

    The first call computes the losses of the batch ``probe`` with and without sharing. If they differ, all batches run
    without sharing, and a line on stderr says so.

    probe: the result of ``sharing_probe``, the same in all processes and in a resumed run, so that all decide alike.
    dropout: whether there may be any; the model is then compared in evaluation mode.
    """

    def __init__(self, probe: Mapping, dropout: bool):
        self.probe, self.dropout, self.shares = probe, dropout, None

    def __call__(self, model: nn.Module, batch: Mapping) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.shares is None:
            self._compare(model, send_to_device(self.probe, batch["labels"].device))
        return token_losses(model, batch if self.shares else _plain(batch))

    @torch.no_grad()
    def _compare(self, model: nn.Module, probe: Mapping) -> None:
        """Set ``shares``; if the model cannot share prefixes, its attention implementation is restored."""
        training, device, fault = model.training, probe["labels"].device, None
        model.train(training and not self.dropout)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            expected = token_losses(model, _plain(probe))[0]
            attention = let_attention_share(unwrap(model))
            try:
                if not _alike(token_losses(model, probe)[0], expected, unwrap(model).dtype):
                    fault = "its losses would change"
            except Exception as error:  # any error of a forward that does not support the layout
                fault = str(error).partition("\n")[0]
        model.train(training)
        failed = torch.tensor(fault is not None, dtype=torch.int64, device=device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(failed, torch.distributed.ReduceOp.MAX)
        self.shares = not failed.item()
        if not self.shares:
            unwrap(model).set_attn_implementation(attention)
        if fault:
            name = type(unwrap(model)).__name__
            print(f"prompt prefixes are not shared: {name} cannot share them ({fault})", file=sys.stderr)


def _plain(batch: Mapping) -> dict:
    """The batch without shared prompt prefixes."""
    return {name: value for name, value in batch.items() if name != "packed"}


def _alike(losses: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the errors, relative to 1 + loss, are within a tolerance, and in root mean square within a fifth of it.

    In 16 bits the tolerance is four times the rounding error of a model with 135 million parameters.
    """
    tolerance = {torch.float64: 1e-5, torch.float32: 1e-3}.get(dtype, 0.25)
    off = (losses - expected).abs() / (1 + expected)
    return bool(off.max() <= tolerance and off.square().mean().sqrt() <= tolerance / 5)  # False if any is NaN
