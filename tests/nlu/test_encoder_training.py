"""Trainings of the tiny encoder: as a plain loop, resumed, and with a task that has no examples."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launches import curve, weights
from nlu_cases import LABELLED
from transformers import AutoTokenizer, BertModel, set_seed

import mtl_lora
from mtl_lora import AdapterConfig, adapter_layers
from mtl_lora.base_model import BaseModel
from mtl_lora.errors import UserError
from mtl_lora.nlu import model as encoders
from mtl_lora.nlu.config import TrainConfig
from mtl_lora.nlu.data import Encoder, training_rows
from mtl_lora.nlu.examples import Example
from mtl_lora.nlu.tasks import TaskSet
from mtl_lora.nlu.train import EncoderRun
from mtl_lora.training.rows import row_columns
from mtl_lora.training.sampler import LengthGroupedBatchSampler

STEPS = 50


def plain_losses(config: TrainConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of every step and the weights after the last, of a loop that knows neither system nor Trainer.

    It takes the same batches; the records are read as they stand, a linear layer a task lies behind BERT's pooler,
    every row is a forward of its own, its pair encoded by the tokenizer itself.
    """
    tasks, base = config.read_tasks(), config.base_model
    set_seed(config.seed)
    drawn = encoders.load(BaseModel(base, kind="encoder"), tasks, "fp64")  # for the start, by the same seed
    mtl_lora.inject(drawn, encoders.in_encoder(config.adapter_config(tasks), drawn))
    bert = BertModel.from_pretrained(base, dtype=torch.float64).train()
    own = {"modules_to_save": [], "target_modules": [name.removeprefix("bert.") for name in adapter_layers(drawn)]}
    mtl_lora.inject(bert, AdapterConfig.from_json(drawn.mtl_lora_config.to_json() | own))
    start = {name.removeprefix("bert."): weight for name, weight in drawn.state_dict().items()}
    heads = torch.nn.ModuleList(torch.nn.Linear(16, task.outputs) for task in tasks).double()
    heads.load_state_dict(
        {name.removeprefix("classifier."): start.pop(name) for name in list(start) if "classifier" in name}
    )
    bert.load_state_dict(start)

    with open(config.data_path) as opened:
        records = json.load(opened)
    tokenizer, names = AutoTokenizer.from_pretrained(base), tasks.names
    rows = row_columns(training_rows(config.data_path, Encoder(tokenizer, config.cutoff_len), tasks, config.cache_dir))
    sampler = LengthGroupedBatchSampler(rows["length"], rows["task_id"], config.batch_size, config.seed)
    trained = [weight for weight in [*bert.parameters(), *heads.parameters()] if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    found = []
    while len(found) < STEPS:
        sampler.set_epoch(len(found) // len(sampler))
        for indices in list(sampler)[: STEPS - len(found)]:
            total = 0.0
            for record in (records[index] for index in indices):
                task = LABELLED[names.index(record["task"])]
                inputs = tokenizer(record["text"], record.get("text_b"), return_tensors="pt")
                answer = heads[task["id"]](bert(**inputs, task_ids=[task["name"]]).pooler_output)[0]
                if "labels" in task:
                    loss = F.cross_entropy(answer, torch.tensor(task["labels"].index(record["label"])))
                else:
                    low, high = task["regression"]
                    loss = (answer[0] - (record["label"] - low) / (high - low)) ** 2
                total += task.get("weight", 1) * loss
            loss = total / len(indices)
            loss.backward()
            for weight in trained:  # of a task that is absent: AdamW then still moves its head by the momentum
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            optimiser.step()
            optimiser.zero_grad()
            found.append(loss.item())
    weights = {name: weight for name, weight in bert.named_parameters() if weight.requires_grad}
    return found, {f"bert.{name}": weight for name, weight in weights.items()} | {
        f"classifier.{name}": weight for name, weight in heads.named_parameters()
    }


@pytest.mark.slow
def test_fifty_losses_equal_those_of_a_plain_loop(train, settings, still, encoder):
    constant = {
        "base_model": still(encoder),
        "lr_scheduler_type": "constant_with_warmup",
        "max_steps": STEPS,
        "dtype": "fp64",
    }
    folder = train("run", **constant)
    expected, trained = plain_losses(TrainConfig(**settings("run", **constant)))
    found = curve(folder)
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=0, abs=1e-6)
    assert np.mean(expected[-7:]) < np.mean(expected[:7]) - 0.1, "where nothing is learnt, nothing is compared"
    saved = weights(folder)
    assert len(saved) == len(trained)
    for name, weight in trained.items():
        torch.testing.assert_close(
            saved[name], weight.detach(), rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
def test_a_run_with_dropout_resumes_bit_for_bit(train):
    flags = {"lora_dropout": 0.1, "max_steps": 6, "save_step": 2, "val_set_size": 9}
    folder = train("run", **flags)
    middle = folder / "checkpoint-2"
    again = train("again", **flags, resume_from_checkpoint=str(middle))
    assert curve(again) == curve(folder)[2:]
    whole, resumed = weights(folder), weights(again)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    # A checkpoint in the middle is one like the last, with every task's head and what it is trained on.
    model = mtl_lora.load(middle)
    assert {f"classifier.{task}.weight" for task in range(3)} <= weights(middle).keys()
    assert [head.out_features for head in model.classifier] == [2, 1, 3]


def test_a_task_without_examples_keeps_its_head_and_the_checkpoint_says_so(train, settings, glue, tmp_path, capsys):
    rest = [record for record in json.loads((glue / "train.json").read_text()) if record["task"] != "place"]
    (tmp_path / "two.json").write_text(json.dumps(rest))
    folder = train("run", data_path=str(tmp_path / "two.json"), weight_decay=0.0)
    assert "no training examples of place" in capsys.readouterr().err
    assert json.loads((folder / "mtl_lora_config.json").read_text())["provenance"]["untrained_tasks"] == ["place"]
    provenance = json.loads((folder / "mtl_lora_config.json").read_text())["provenance"]
    assert provenance["pairs"] == {"tone": False, "closeness": True}
    saved, config = weights(folder), TrainConfig(**settings("run"))
    assert config.count() == mtl_lora.trainable_parameters(mtl_lora.load(folder, dtype="fp32"))
    set_seed(config.seed)
    drawn = encoders.load(BaseModel(config.base_model, kind="encoder"), config.read_tasks(), "fp32")
    own, other = drawn.classifier[2].weight, drawn.classifier[0].weight
    assert torch.equal(saved["classifier.2.weight"], own) and not torch.equal(saved["classifier.0.weight"], other)


def test_a_task_of_texts_and_pairs_of_texts_is_neither():
    tasks = TaskSet.from_json(LABELLED)
    rows = datasets.Dataset.from_dict({"task_id": [0, 0, 1, 1, 2, 2], "pair": [False, True, True, True, False, False]})
    run = SimpleNamespace(train=rows, tasks=tasks, config=SimpleNamespace(cutoff_len=32))
    assert EncoderRun.provenance(run) == {"cutoff_len": 32, "pairs": {"closeness": True, "place": False}}


def test_rows_of_other_settings_are_not_taken_from_the_cache(encoder, glue, tmp_path):
    def rows(cutoff_len: int = 32, **changes):
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        tasks = TaskSet.from_json([LABELLED[0] | changes, *LABELLED[1:]])
        return training_rows(glue / "train.json", Encoder(tokenizer, cutoff_len), tasks, tmp_path)

    first, swapped = rows(), rows(labels=["glad", "sad"])
    of_tone = np.array(first["task_id"]) == 0
    one, other = (np.array(each["target"])[of_tone] for each in (first, swapped))
    assert (one + other == 1).all() and {*one} == {0, 1}
    assert max(rows(cutoff_len=8)["length"]) == 8 < max(first["length"])
    assert len([*tmp_path.glob("*.arrow")]) == 3 and rows()[:] == first[:] and len([*tmp_path.glob("*.arrow")]) == 3


def test_rows_of_another_tokenizer_or_task_are_not_taken_from_the_cache(encoder, tmp_path):
    path, tasks, found = tmp_path / "train.json", TaskSet.from_json(LABELLED), []
    path.write_text(json.dumps([{"text": "zebra", "label": 1}]))
    for task, more in (("tone", []), ("place", []), ("tone", ["zebra"])):
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        tokenizer.add_tokens(more)
        (row,) = training_rows(path, Encoder(tokenizer, 32), tasks, tmp_path, task)
        found.append((row["task_id"], row["input_ids"]))
    assert [task_id for task_id, _ in found] == [0, 2, 0] and found[0][1] == found[1][1] != found[2][1]


def test_numbers_of_another_range_are_not_taken_from_the_cache(encoder, glue, tmp_path):
    tokenizer, found = AutoTokenizer.from_pretrained(encoder), []
    for high in (5, 9):
        tasks = TaskSet.from_json([LABELLED[0], LABELLED[1] | {"regression": [1, high]}, LABELLED[2]])
        rows = training_rows(glue / "train.json", Encoder(tokenizer, 32), tasks, tmp_path)
        found.append(np.array(rows["target"])[np.array(rows["task_id"]) == 1])
    assert found[0].any() and np.allclose(found[0], 2 * found[1])


def test_tokens_that_a_text_loses_are_counted_and_the_longer_of_two_loses_them(encoder):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    texts = [("bab " * 9, None), ("bab", "bek " * 9), ("bek " * 9, "bab"), ("bab", None)]
    rows = Encoder(tokenizer, 8).encode([Example(*pair, None, 0, index) for index, pair in enumerate(texts)])
    assert [(len(row["input_ids"]), row["removed"]) for row in rows] == [(8, 3), (8, 5), (8, 5), (3, 0)]
    (bab,) = tokenizer("bab", add_special_tokens=False)["input_ids"]
    assert [row["input_ids"].count(bab) for row in rows] == [6, 1, 1, 1]


@pytest.mark.slow
def test_heads_are_trained_further_for_the_same_tasks_alone(train, tmp_path):
    first = train("first")
    before = weights(first)
    after = weights(train("second", start_from=str(first), learning_rate=1e-9, max_steps=1))
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[name], tensor, atol=1e-6) for name, tensor in before.items())
    other = [LABELLED[0] | {"labels": ["glad", "sad"]}, *LABELLED[1:]]
    (tmp_path / "other.json").write_text(json.dumps({"tasks": other}))
    with pytest.raises(UserError, match="has heads for the tasks tone, closeness, place; train exactly these"):
        train("third", start_from=str(first), tasks_file=str(tmp_path / "other.json"))
