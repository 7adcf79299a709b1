"""Two processes train what one does, in the systems whose examples are not texts with answers alone: under DDP, ZeRO-2
and ZeRO-3, with mixed batches and those of one task, also where a task is absent from a process's micro-batch."""

import json
from pathlib import Path

import pytest
import torch
from dense_cases import make_folder, make_swin
from launches import TORCHRUN, assert_trained_alike, curve, facts, launch, weights
from shared import PROJECT, start

from mtl_lora.dense import evaluate
from mtl_lora.dense.config import EvalConfig

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
# Of weights in float32 that are cast in a forward: of heads within a module that is saved whole too.
IN_16_BITS = [("encoder", "zero3", {"dtype": "bf16"})]
MODES, NAMES = ("matrix", "addition"), ("things", "front", "far", "normal")  # of dense tasks


@pytest.mark.slow(50)
def test_two_processes_train_as_one(subtests, short, still, request, made_once, tmp_path, one_thread):
    zero3 = json.loads((PROJECT / "config" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(zero3))
    deepspeed = {"zero2": str(PROJECT / "config" / "zero2.json"), "zero3": str(tmp_path / "zero3.json")}
    bases = {base: still(request.getfixturevalue(base)) for base in ("encoder", "bart", "causal")}

    def settings(name: str, folder: str, **more) -> dict:
        system, base, flags = ALONE[name]
        common = {"base_model": bases[base], "max_steps": 6, "save_step": 3, "val_set_size": 6}
        common |= {"logging_steps": 4}  # the mean over a run is of steps that no line shows too
        return short(system, tmp_path / folder, **{**common, **flags, **more})

    for name, (system, _, _) in ALONE.items():
        start(system, settings(name, name, batch_size=4))
    runs, compared = [], []
    for number, (name, mode, more) in enumerate(TWO + IN_16_BITS):
        more = {"batch_size": 2, "deepspeed": deepspeed.get(mode), **more}
        runs.append(settings(name, f"two_{number}", **more) | {"system": ALONE[name][0]})
        compared.append((name, mode, tmp_path / f"two_{number}"))
    data = images_of_which_two_have_normals(tmp_path / "data")
    dense = {mode: dense_settings(mode, data, made_once("tiny_swin", make_swin)) for mode in MODES}
    for mode, flags in dense.items():
        start("dense", flags | {"gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "one" / mode)})
    before = [flags | {"system": "dense", "output_dir": str(tmp_path / mode)} for mode, flags in dense.items()]
    done = launch(TORCHRUN, [*before, *runs], tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "batch norm" in done.stderr
    for mode in MODES:
        with subtests.test(mode):
            assert_accumulated_alike(tmp_path / "one" / mode, tmp_path / mode)
    flags = {"data_dir": str(data), "output_dir": str(tmp_path / "results"), "dtype": "fp64"}
    results = evaluate.run(EvalConfig(checkpoint=str(tmp_path / "matrix"), **flags))
    assert [results["maps"].tasks[name].n for name in NAMES] == [1] * 4
    for name, mode, folder in compared[: len(TWO)]:
        with subtests.test(name, mode=mode):
            assert_trained_alike(tmp_path / name, folder)
            assert facts(folder)["partitioned"] == (mode == "zero3")
    for name, mode, folder in compared[len(TWO) :]:
        with subtests.test(f"{name} in 16 bits", mode=mode):
            assert curve(folder)[0] == pytest.approx(curve(tmp_path / name)[0], rel=0.02)


# ---- dense tasks: batch norm and the balance of saliency are of a batch of one process, so two processes train as one
# that takes their batches one after the other


def images_of_which_two_have_normals(folder: Path) -> Path:
    """Of twelve to train on, so that a process, or both, have none of them in most steps."""
    data = make_folder(folder, 13, 16)
    for index in range(1, 11):
        (data / "normal" / f"{index}.npy").unlink()
    return data


def dense_settings(mode: str, data: Path, base: Path) -> dict:
    adapter = {"shared_mode": mode, "lora_r": 4, "lora_dropout": 0.0}
    images = {"data_path": str(data), "missing_labels": True, "augmentation": "pascal", "image_size": 16}
    steps = {"batch_size": 2, "max_steps": 4, "save_step": 2, "logging_steps": 1, "warmup_ratio": 0.0}
    return {"base_model": str(base), "dtype": "fp64", "learning_rate": 3e-3, **adapter, **images, **steps}


def assert_accumulated_alike(one: Path, two: Path) -> None:
    for key in ("loss", "grad_norm", *(f"loss/{task}" for task in NAMES)):
        assert curve(one, key), key
        assert curve(two, key) == pytest.approx(curve(one, key), rel=1e-6), key
    assert len(curve(one, "loss/normal")) < len(curve(one, "loss")) == 4  # the mean of a loss is of the step
    expected, found = weights(one), weights(two)
    counted = {key for key in expected if ".norm.running_" in key or ".num_batches_" in key}
    assert expected.keys() == found.keys() and len(counted) == 3 * len(NAMES)
    for key in expected.keys() - counted:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=1e-8, msg=key)
    # Averages of the first process's batches alone, of which there are half as many.
    batches = "decoders.0.norm.num_batches_tracked"
    assert (found[batches], expected[batches]) == (4, 8)
