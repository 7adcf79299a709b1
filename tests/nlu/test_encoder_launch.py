"""Two processes train an encoder as one does: DDP, ZeRO-2 and ZeRO-3, also where a task is absent from one of them."""

import json

import pytest
from launches import TORCHRUN, assert_trained_alike, facts, launch
from shared import PROJECT

from mtl_lora.nlu.config import TrainConfig
from mtl_lora.nlu.train import run

# A step has 4 rows of three tasks: two micro-batches of 2, one in each process, of which each lacks a task; or four of
# a row each.
ACCUMULATED = {"batch_size": 1, "gradient_accumulation_steps": 2}
RUNS = [("ddp", {}), ("ddp_accumulated", ACCUMULATED), ("zero3", {}), ("zero3_accumulated", ACCUMULATED), ("zero2", {})]


@pytest.mark.slow(25)
def test_two_processes_train_as_one(subtests, settings, still, tmp_path, one_thread):
    zero3 = json.loads((PROJECT / "config" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(zero3))
    deepspeed = {"zero2": str(PROJECT / "config" / "zero2.json"), "zero3": str(tmp_path / "zero3.json")}
    common = {"base_model": still, "batch_size": 2, "max_steps": 6, "save_step": 3, "val_set_size": 9}
    run(TrainConfig(**settings("alone", **common | {"batch_size": 4})))
    runs = [
        settings(name, **common | more | {"deepspeed": deepspeed.get(name.partition("_")[0])}) | {"system": "nlu"}
        for name, more in RUNS
    ]
    done = launch(TORCHRUN, runs, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    for name, _ in RUNS:
        with subtests.test(name):
            assert_trained_alike(tmp_path / "alone", tmp_path / name)
            assert facts(tmp_path / name)["partitioned"] == name.startswith("zero3")
