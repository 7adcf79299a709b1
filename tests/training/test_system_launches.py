"""Two processes train what one does, in the systems whose examples are not texts with answers alone: under DDP, ZeRO-2
and ZeRO-3, with mixed batches and those of one task, also where a task is absent from a process's micro-batch."""

import json

import pytest
from launches import TORCHRUN, assert_trained_alike, facts, launch
from shared import PROJECT, start

ROBIN = {"task_batches": "round_robin"}
# What one process trains, in batches of four: the system, the base model and other flags.
ALONE = {
    "encoder": ("nlu", "encoder", {"val_set_size": 9}),
    "bart": ("image_text", "bart", {}),
    "causal": ("image_text", "causal", {"dtype": "fp64"}),
    "robin": ("image_text", "bart", ROBIN | {"task_batch_sizes": ["vqa=6"]}),
}
# An encoder's step has 4 rows of three tasks: two micro-batches of 2, one in each process, of which each lacks a task;
# or four of a row each.
ACCUMULATED = {"batch_size": 1, "gradient_accumulation_steps": 2}
TWO = [  # those with DeepSpeed last, for a launch with it stays one
    ("encoder", "ddp", {}),
    ("encoder", "ddp", ACCUMULATED),
    ("causal", "ddp", {}),
    ("robin", "ddp", {"task_batch_sizes": ["vqa=3"]}),
    ("encoder", "zero3", {}),
    ("encoder", "zero3", ACCUMULATED),
    ("bart", "zero3", {}),
    ("encoder", "zero2", {}),
]


@pytest.mark.slow(40)
def test_two_processes_train_as_one(subtests, short, still, request, tmp_path, one_thread):
    zero3 = json.loads((PROJECT / "config" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(zero3))
    deepspeed = {"zero2": str(PROJECT / "config" / "zero2.json"), "zero3": str(tmp_path / "zero3.json")}
    bases = {base: still(request.getfixturevalue(base)) for base in ("encoder", "bart", "causal")}

    def settings(name: str, folder: str, **more) -> dict:
        system, base, flags = ALONE[name]
        common = {"base_model": bases[base], "max_steps": 6, "save_step": 3, "val_set_size": 6}
        return short(system, tmp_path / folder, **{**common, **flags, **more})

    for name, (system, _, _) in ALONE.items():
        start(system, settings(name, name, batch_size=4))
    runs, compared = [], []
    for number, (name, mode, more) in enumerate(TWO):
        more = {"batch_size": 2, "deepspeed": deepspeed.get(mode), **more}
        runs.append(settings(name, f"two_{number}", **more) | {"system": ALONE[name][0]})
        compared.append((name, mode, tmp_path / f"two_{number}"))
    done = launch(TORCHRUN, runs, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    for name, mode, folder in compared:
        with subtests.test(name, mode=mode):
            assert_trained_alike(tmp_path / name, folder)
            assert facts(folder)["partitioned"] == (mode == "zero3")
