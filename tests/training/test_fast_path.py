"""The fast path trains what the plain one does: 50 losses of the Trainer beside those of a loop anyone would write.

The fast one shares the prompt prefixes of its tasks; the loop takes the same batches, which are planned by the rest."""

import json

import pytest
import torch
from safetensors.torch import load_file
from shared import PROJECT
from transformers import set_seed

import mtl_lora
from mtl_lora.base_model import BaseModel
from mtl_lora.language.batches import Collator, training_rows
from mtl_lora.language.config import TrainConfig
from mtl_lora.language.encode import Encoder
from mtl_lora.language.prefix import task_prefixes
from mtl_lora.language.tasks import COMMONSENSE
from mtl_lora.training.rows import row_columns
from mtl_lora.training.sampler import LengthGroupedBatchSampler

STEPS = 50
FLAGS = {"batch_size": 4, "lora_dropout": 0.0, "learning_rate": 1e-3, "lr_scheduler_type": "constant_with_warmup"}


@pytest.fixture
def gathering(monkeypatch):
    """The layer as it is written down first: for every row its own copies of A, Lambda and the mixed B."""
    monkeypatch.syspath_prepend(str(PROJECT / "benchmark"))
    from baselines import gathering

    return gathering


def plain_losses(config: TrainConfig, rows, tokenizer, gathering) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of every step, and the weights after the last: labels, all logits, torch's AdamW."""
    set_seed(config.seed)
    model = BaseModel(config.base_model).load(config.dtype)
    mtl_lora.inject(model, config.adapter_config(COMMONSENSE))
    layers = mtl_lora.adapter_layers(model)
    for name, layer in layers.items():
        model.set_submodule(name, gathering.GatheringLayer(layer))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    columns, collator = row_columns(rows), Collator(tokenizer.pad_token_id)
    prefixes = task_prefixes(rows)
    rests = columns["length"] - [len(prefixes[task_id]) for task_id in columns["task_id"].tolist()]
    sampler = LengthGroupedBatchSampler(rests, columns["task_id"], config.batch_size, config.seed)
    losses = []
    while len(losses) < STEPS:
        sampler.set_epoch(len(losses) // len(sampler))
        for indices in list(sampler)[: STEPS - len(losses)]:
            batch = collator([rows[index] for index in indices])
            gathering.GatheringLayer.task_ids = batch.pop("task_ids")
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    weights = {
        f"{name}.{key}": weight.detach()
        for name, layer in layers.items()
        for key, weight in layer.adapter_parameters().items()
    }
    return losses, weights


@pytest.mark.slow
def test_fifty_losses_equal_those_of_the_plain_loop(train, gathering, tiny_base, records_file, cache_dir):
    folder = train("fast", **FLAGS, max_steps=STEPS)
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    found = [line["loss"] for line in lines if "loss" in line]

    config = TrainConfig(base_model=tiny_base, dtype="fp32", **FLAGS)
    tokenizer = BaseModel(tiny_base).tokenizer()
    rows = training_rows(records_file, Encoder(tokenizer, config.template, config.cutoff_len, COMMONSENSE), cache_dir)
    expected, weights = plain_losses(config, rows, tokenizer, gathering)
    assert len(found) == len(expected) == STEPS
    assert found == pytest.approx(expected, rel=0, abs=1e-5)
    assert expected[-1] < expected[0] - 0.5, "where nothing is learnt, nothing is compared"
    for name, weight in load_file(folder / "mtl_lora.safetensors").items():
        torch.testing.assert_close(
            weights[name], weight, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
