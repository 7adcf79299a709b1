"""The examples of the training benchmarks, in random batches, as others train, and in ours, sorted by length."""

import datasets
import numpy as np
import torch
from accelerate.utils import send_to_device
from measure import Parser, count
from transformers import PreTrainedTokenizerBase

from mtl_lora.errors import UserError
from mtl_lora.language.batches import Collator
from mtl_lora.language.encode import Encoder
from mtl_lora.language.examples import load_examples
from mtl_lora.language.prefix import Packer, task_prefixes
from mtl_lora.language.tasks import COMMONSENSE
from mtl_lora.training.sampler import LengthGroupedBatchSampler


def add_data(parser: Parser, records: int) -> None:
    """Add the flags that choose the model and its training examples."""
    parser.add_flag("data_path", "training examples of the eight tasks", default="data/quickstart/train.json")
    parser.add_flag("base_model", "name or folder of a causal language model", default="smollm2-135m")
    parser.add_flag("records", "number of examples, drawn equally from all tasks", type=count, default=records)
    parser.add_flag("of", "examples to plan batches for, of which --records are taken; none: --records", type=count)
    parser.add_flag("batch_size", "rows of a training step", type=count, default=8)
    parser.add_flag("dtype", "of the base model: bf16, fp32; auto: bf16 where the hardware has it", default="auto")


def encoded_rows(data_path: str, records: int, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """Return ``records`` encoded training rows, equally many of each task, drawn with a fixed seed.

    Raises ``UserError`` if a task has too few examples, or if ``records`` cannot be divided equally.
    """
    each, rest = divmod(records, len(COMMONSENSE))
    if rest or not each:
        raise UserError(f"--records must be a multiple of the {len(COMMONSENSE)} tasks, not {records}")
    generator, chosen = np.random.default_rng(0), []
    examples = load_examples(data_path, COMMONSENSE)
    for task in COMMONSENSE:
        rows = [one for one in examples if one.task_id == task.id]
        if len(rows) < each:
            raise UserError(f"{data_path} has {len(rows)} records of {task.name}, {each} are needed; lower --records")
        chosen += [rows[index] for index in generator.choice(len(rows), each, replace=False)]
    return [
        {"input_ids": one.prompt_ids + one.answer_ids, "prompt_length": len(one.prompt_ids), "task_id": one.task_id}
        for one in Encoder(tokenizer, "alpaca", 256, COMMONSENSE).encode(chosen)
    ]


def make_batches(
    rows: list[dict], batch_size: int, pad_token_id: int, device: torch.device, records: int | None = None
) -> dict[str, list[dict]]:
    """Return the same rows in three plans: ``random``, ``sorted`` by length (ours), and ``shared`` prompt prefixes.

    records: take only this many rows, in the first batches of a plan of all rows, because few rows alone cannot be
    sorted into batches of equal lengths; ``sorted`` then has the batches of ``shared``. Raises ``UserError`` if a batch
    would not be full.
    """
    records = records or len(rows)
    for flag, number in (("records", records), ("of", len(rows))):
        if number % batch_size:
            raise UserError(f"--{flag} must be a multiple of --batch_size {batch_size}, not {number}")
    lengths, ids = [len(row["input_ids"]) for row in rows], [row["task_id"] for row in rows]
    prefixes = task_prefixes(datasets.Dataset.from_list(rows))
    rests = [length - len(prefixes.get(task_id, ())) for length, task_id in zip(lengths, ids, strict=True)]
    shared = list(LengthGroupedBatchSampler(rests, ids, batch_size, seed=0))[: records // batch_size]
    taken = np.sort(np.concatenate(shared))
    plans = {
        "random": np.random.default_rng(0).permutation(taken).reshape(-1, batch_size).tolist(),
        "sorted": shared,
        "shared": shared,
    }
    if records == len(rows):
        plans["sorted"] = list(LengthGroupedBatchSampler(lengths, ids, batch_size, seed=0))
    packer = Packer(prefixes, by_task=True, pad_token_id=pad_token_id)
    collate = {name: Collator(pad_token_id, packer=packer if name == "shared" else None) for name in plans}
    made = {name: [collate[name]([rows[index] for index in batch]) for batch in plan] for name, plan in plans.items()}
    for name, plan in plans.items():
        for batch, indices in zip(made[name], plan, strict=True):
            batch["lengths"] = torch.tensor([lengths[index] for index in indices])
    for batch in made["random"]:
        positions = torch.arange(batch["input_ids"].shape[1])
        batch["attention_mask"] = (positions < batch["lengths"][:, None]).long()  # others pass a padding mask
    return {name: [send_to_device(batch, device) for batch in batches] for name, batches in made.items()}


def spread_tasks(batches: list[dict], tasks: int) -> list[dict]:
    """Return the same rows with task ids spread evenly over 0 to ``tasks`` - 1, assigned with a fixed seed."""
    sizes = [len(batch["task_ids"]) for batch in batches]
    ids = np.random.default_rng(0).permutation(np.arange(sum(sizes)) * tasks // sum(sizes))
    parts = torch.from_numpy(ids).split(sizes)
    return [
        {**batch, "task_ids": part.to(batch["task_ids"].device)} for batch, part in zip(batches, parts, strict=True)
    ]


def tokens_that_run(plans: dict[str, list[dict]]) -> dict[str, int]:
    """Return, by plan, the tokens with padding that go through the model; and ``least``, the tokens that must run in
    the batches of ``shared``: no padding, and every prefix once per batch."""
    run = {name: sum(batch.get("packed", batch)["input_ids"].numel() for batch in made) for name, made in plans.items()}
    least = 0
    for batch in plans["shared"]:
        least += int(batch["lengths"].sum())
        if packed := batch.get("packed"):
            least += int(packed["prefix_lengths"].sum() - packed["prefix_lengths"][packed["groups"]].sum())
    return {**run, "least": least}
