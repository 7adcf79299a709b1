"""Samples a second of whole training pipelines on the same records: forward, backward and, if asked for, optimiser.

    python benchmark/train_step.py --data_path commonsense_170k_taskid.json

Sides, all with the same base model, dtype, threads and records:
  original   random batches padded to their longest row, logits for every token, gradient checkpointing, the gathering
             form of MTL-LoRA (baselines/gathering.py)
  peft       PEFT's LoRA r 8, random padded batches, logits for every token, no checkpointing
  lora, mtl_lora   ours: rows of similar length, logits for answers only
  frozen     the limit: no adapter; forward, and backward to the embeddings, on our batches and logits
"""

import argparse
import gc
from pathlib import Path

import numpy as np
import torch
from baselines import gathering
from measure import keep, ratio, rounds, shown, spread
from peft import LoraConfig, get_peft_model

import mtl_lora
from mtl_lora import route
from mtl_lora.adapter import routing
from mtl_lora.data.collate import Collator
from mtl_lora.data.encode import Encoder
from mtl_lora.data.examples import load_examples
from mtl_lora.data.sampler import LengthBatchSampler
from mtl_lora.model import load_model, load_tokenizer
from mtl_lora.report.render import markdown_table
from mtl_lora.tasks import COMMONSENSE
from mtl_lora.train.loss import token_losses

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
DROPOUT = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", default="data/quickstart/train.json")
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument("--records", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--sides", default="original,peft,lora,mtl_lora,frozen")
    parser.add_argument("--optimiser", action="store_true", help="AdamW on the trained weights after every batch")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.base_model)
    rows = encoded_rows(arguments, tokenizer)
    collator = Collator(tokenizer.pad_token_id)
    mixed = np.random.default_rng(0).permutation(len(rows)).reshape(-1, arguments.batch_size).tolist()
    lengths = [len(row["input_ids"]) for row in rows]
    sorted_ = list(LengthBatchSampler(lengths, [row["task_id"] for row in rows], arguments.batch_size, seed=0))
    batches = {
        name: [collator([rows[index] for index in batch]) for batch in plan]
        for name, plan in (("random", mixed), ("sorted", sorted_))
    }
    names = arguments.sides.split(",")
    sides = {name: side(name, arguments, batches) for name in names}
    rates = rounds(sides, arguments.rounds)
    results = {name: {"samples/s": spread(values)} for name, values in rates.items()}
    tokens = {name: sum(batch["input_ids"].numel() for batch in made) for name, made in batches.items()}
    header = ["pipeline", "samples/s", *(f"/ {name}" for name in names)]
    lines = []
    for name in names:
        ratios = {other: ratio(rates[name], rates[other]) for other in names}
        results[name]["ratios"] = ratios
        lines.append([name, shown(results[name]["samples/s"]), *(shown(value) for value in ratios.values())])
    text = markdown_table(header, lines)
    text += (
        f"\n\n{len(rows)} records, {sum(lengths):,} tokens ({tokens['random']:,} in random batches of "
        f"{arguments.batch_size}, {tokens['sorted']:,} sorted), {arguments.base_model}, "
        f"{'with' if arguments.optimiser else 'without'} optimiser; median (smallest to largest) of {arguments.rounds} "
        "rounds."
    )
    keep(Path(__file__).stem, text, {"settings": vars(arguments), "tokens": tokens, "sides": results})


def encoded_rows(arguments: argparse.Namespace, tokenizer) -> list[dict]:
    """As many records of every task as of any other, as training rows."""
    examples = load_examples(arguments.data_path, COMMONSENSE)
    by_task = [[one for one in examples if one.task_id == task.id] for task in COMMONSENSE]
    generator = np.random.default_rng(0)
    chosen = [
        rows[index]
        for rows in by_task
        for index in generator.choice(len(rows), arguments.records // len(by_task), replace=False)
    ]
    encoded = Encoder(tokenizer, "alpaca", 256, COMMONSENSE).encode(chosen)
    return [
        {"input_ids": one.prompt_ids + one.answer_ids, "prompt_length": len(one.prompt_ids), "task_id": one.task_id}
        for one in encoded
    ]


def side(name: str, arguments: argparse.Namespace, batches: dict):
    """A function that takes all records through one pipeline and returns their number."""
    torch.manual_seed(0)
    model = load_model(arguments.base_model, arguments.dtype)
    plan, whole = ("random", True) if name in ("original", "peft") else ("sorted", False)
    if name == "peft":
        settings = LoraConfig(r=8, lora_alpha=16, lora_dropout=DROPOUT, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = get_peft_model(model, settings)
    elif name == "frozen":
        model.requires_grad_(False)
        model.enable_input_require_grads()
    else:
        method = "lora" if name == "lora" else "mtl_lora"
        adapter = mtl_lora.AdapterConfig(
            method=method, dropout=DROPOUT, tasks=COMMONSENSE.names, target_modules=TARGETS
        )
        mtl_lora.inject(model, adapter)
        if name == "original":
            gathering.replace(model)
            routing.enable_gradient_checkpointing(model)
    if not whole:
        model.set_attn_implementation("eager")  # as training on a CPU does
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4) if arguments.optimiser and trained else None

    def run() -> int:
        for batch in batches[plan]:
            loss = whole_loss(model, batch) if whole else token_losses(model, batch)[0].mean()
            loss.backward()
            if optimiser:
                optimiser.step()
            model.zero_grad(set_to_none=True)
        gc.collect()
        return sum(len(batch["task_ids"]) for batch in batches[plan])

    return run


def whole_loss(model, batch: dict) -> torch.Tensor:
    """The loss as a model computes it from labels: logits for every token."""
    gathering.GatheringLayer.task_ids = batch["task_ids"]
    with route.use(batch["task_ids"]):
        return model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
            use_cache=False,
        ).loss


if __name__ == "__main__":
    main()
