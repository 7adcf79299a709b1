"""Steps of language models that are recorded as CUDA graphs: batches of few shapes, and the same losses."""

import random

import pytest
from recorded_steps import METHODS, assert_replays_train_alike, assert_stays_on_device, gpu
from reference.layers import assert_near
from reference.tiny import TASKS, VOCABULARY, adapted_llama, adapter_gradients

import mtl_lora
from mtl_lora.base_model import BaseModel
from mtl_lora.errors import UserError
from mtl_lora.language.batches import Collator, token_losses
from mtl_lora.language.config import TrainConfig
from mtl_lora.language.train import in_language_model

LENGTHS = [16, 24, 40]


def make_rows(seed: int, longest: int, count: int = 8) -> list[dict]:
    """Rows of random tokens and lengths; the answers are of one to four tokens."""
    draw = random.Random(seed)
    lengths = [draw.randint(6, longest) for _ in range(count)]
    return [
        {
            "input_ids": [draw.randint(1, VOCABULARY - 1) for _ in range(length)],
            "prompt_length": length - draw.randint(1, 4),
            "task_id": draw.randrange(len(TASKS)),
        }
        for length in lengths
    ]


@pytest.mark.parametrize("train_on_inputs", [False, True], ids=["answers", "all tokens"])
def test_filled_batches_have_the_loss_and_the_gradients_of_those_as_they_are(train_on_inputs):
    model, rows, found = adapted_llama(), make_rows(1, 21), []
    # An eager softmax is taken in float32, where some CPUs round the end of a row otherwise than its middle.
    model.set_attn_implementation("sdpa")
    for lengths in ([], LENGTHS):
        batch = Collator(0, train_on_inputs, lengths=lengths)(rows)
        assert batch["input_ids"].shape[1] == (24 if lengths else max(len(row["input_ids"]) for row in rows))
        model.zero_grad()
        losses, counted, task_ids = token_losses(model, batch)
        assert losses.shape == counted.shape == task_ids.shape and counted.sum() == batch["loss_weight"]
        loss = (losses * counted).sum() / batch["loss_weight"]
        loss.backward()
        found.append((loss.detach(), adapter_gradients(model)))
    (loss, gradients), (filled, others) = found
    assert_near(filled, loss, 1e-12, "the loss")
    assert gradients.keys() == others.keys() and any(each.abs().max() > 0 for each in gradients.values())
    for name, gradient in gradients.items():
        assert_near(others[name], gradient, 1e-12, name)


def test_batches_have_few_shapes():
    shapes = set()
    for seed in range(300):
        batch = Collator(0, lengths=LENGTHS)(make_rows(seed, 10 + seed % 31))
        shapes.add(tuple(value.shape for value in batch.values()))
    assert len(shapes) <= 9, "three lengths, and few numbers of answers' tokens with each"


@pytest.mark.parametrize("method", METHODS)
def test_a_step_neither_waits_for_the_device_nor_copies_to_it(method, settings, monkeypatch):
    saved = ["lm_head"] if method == "none" else []
    config = TrainConfig(**settings("run", adapter_name=method, lora_r=8, lora_dropout=0.1, modules_to_save=saved))
    structure = BaseModel(config.base_model).structure()
    adapter, _ = in_language_model(config.adapter_config(config.task_set()), structure)
    model = mtl_lora.inject(structure, adapter).train()
    batch = Collator(0, lengths=LENGTHS)(make_rows(1, 21))
    batch = {name: value.to("meta") for name, value in batch.items()}
    assert_stays_on_device(model, token_losses, batch, monkeypatch)


@gpu
@pytest.mark.parametrize("method", METHODS)
def test_replayed_steps_train_the_same_weights(method, train, monkeypatch):
    saved = ["lm_head"] if method == "none" else []
    flags = {"adapter_name": method, "lora_dropout": 0.1, "modules_to_save": saved}
    assert_replays_train_alike(train, monkeypatch, replays=4, **flags)


def test_shared_prefixes_cannot_be_recorded(settings):
    with pytest.raises(UserError, match="cuda_graphs must be off with --reuse_prefix always"):
        TrainConfig(**settings("run", cuda_graphs=True, reuse_prefix="always"))
