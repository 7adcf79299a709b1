"""One process, two processes, ZeRO-2 and ZeRO-3 train alike, with every method, and go on after a stop.

All trainings in two processes happen in three launches: two from the start, one that resumes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared import PROJECT, free_port

from mtl_lora.adapter.layer import methods

METHODS = tuple(methods())
STEPS, MIDDLE = 14, 7  # an epoch is 10 steps, the last of them smaller
LAUNCHES = ("ddp", "zero2", "zero3")
# Name of a run beside the methods' own -> what it is told besides; it is compared with the method it trains, or with
# one process's run of the same name.
MORE = {
    "accumulated": {"batch_size": 2, "gradient_accumulation_steps": 2},
    "bf16": {"dtype": "bf16"},
    "by_tokens": {"token_budget": 1500, "sampling_temperature": 2.0},
    "checkpointing": {"adapter_name": "dora", "use_gradient_checkpointing": True},
    "few_held_out": {"val_set_size": 1},  # fewer rows than processes
    # Weights below the threshold of this file stay whole, and all of the tiny model's are below it.
    "with_small_weights_whole": {"deepspeed": str(PROJECT / "config" / "zero3.json")},
}
RUNS = [("ddp", "few_held_out")]
RUNS += [(launch, name) for launch in LAUNCHES for name in (*METHODS, "accumulated", "by_tokens")]
RUNS += [("zero3", "checkpointing"), ("zero3", "with_small_weights_whole")]
# The runs of one process.
ALONE = (*METHODS, "bf16", "by_tokens", "few_held_out")
IN_BF16 = [("zero2", "bf16"), ("zero3", "bf16")]
# Without DeepSpeed first, for a run with it leaves its switch in the environment; and nothing before the first run
# with ZeRO-3 may make DeepSpeed's process group for it.
RESUMED = [("ddp", "mtl_lora"), *(("zero3", method) for method in METHODS), ("zero2", "mtl_lora")]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folder of all runs, each in ``<launch>/<name>``."""
    return tmp_path_factory.mktemp("equality")


@pytest.fixture(scope="module")
def settings_of(place, tiny_base, records_file, cache_dir):
    """``settings_of(launch, name)``: what a run is told."""
    zero3 = json.loads((PROJECT / "config" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (place / "zero3.json").write_text(json.dumps(zero3))
    deepspeed = {"zero2": str(PROJECT / "config" / "zero2.json"), "zero3": str(place / "zero3.json")}

    def settings(launch: str, name: str) -> dict:
        return {
            "base_model": tiny_base,
            "data_path": records_file,
            "cache_dir": cache_dir,
            "output_dir": str(place / launch / name),
            "adapter_name": trained(name),
            "dtype": "fp32",
            "lora_dropout": 0.0,
            "batch_size": 8 if launch == "alone" else 4,
            "max_steps": STEPS,
            "save_step": MIDDLE,
            "val_set_size": 17,  # an odd number: one process has a row, and a batch, more than the other
            "logging_steps": 1,
            # Where a gradient is all but zero, Adam makes a step of this size of its rounding; from 1e-2 on that is
            # more than the 1e-5 below.
            "learning_rate": 3e-3,
            "deepspeed": deepspeed.get(launch),
            **MORE.get(name, {}),
            # The token budget of two processes is that of two micro-batches of one.
            **({"gradient_accumulation_steps": 2} if (launch, name) == ("alone", "by_tokens") else {}),
        }

    return settings


def trained(name: str) -> str:
    """The method that a run trains."""
    return name if name in METHODS else MORE[name].get("adapter_name", "mtl_lora")


def launch(runs: list[dict], folder: Path) -> None:
    """Train in two CPU processes; nothing is on the path, so there is no compiler either."""
    (folder / "job.json").write_text(json.dumps({"runs": runs}))
    for name in ("nothing", "extensions"):
        (folder / name).mkdir()
    environment = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PATH": str(folder / "nothing"),
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    done = subprocess.run(
        [*torchrun, str(Path(__file__).with_name("launched.py")), str(folder / "job.json")],
        cwd=PROJECT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list((folder / "extensions").iterdir()), "something was compiled"


@pytest.fixture(scope="module")
def alone(settings_of):
    """Every method trained in one process, this one."""
    from mtl_lora.language.config import TrainConfig
    from mtl_lora.language.train import run

    for name in ALONE:
        run(TrainConfig(**settings_of("alone", name)))


@pytest.fixture(scope="module")
def two(settings_of, tmp_path_factory):
    """All runs in two processes."""
    for together in (("ddp", "zero3"), ("zero2",)):
        runs = [settings_of(mode, name) for mode, name in [*RUNS, *IN_BF16] if mode in together]
        launch(runs, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def resumed(two, settings_of, place, tmp_path_factory):
    """Some of them again from their middle, in new processes and to folders of their own."""
    runs = []
    for name, method in RESUMED:
        half, output = place / name / method / f"checkpoint-{MIDDLE}", place / f"{name}-resumed" / method
        runs.append({**settings_of(name, method), "output_dir": str(output), "resume_from_checkpoint": str(half)})
    launch(runs, tmp_path_factory.mktemp("resumed"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "mtl_lora.safetensors")


def curve(folder: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def facts(folder: Path) -> dict:
    return json.loads((folder / "facts.json").read_text())


@pytest.mark.parametrize("launch, name", RUNS)
def test_two_processes_train_as_one_does(alone, two, place, launch, name):
    one, other = place / "alone" / (name if name in ALONE else trained(name)), place / launch / name
    for key, length in (("loss", STEPS), ("grad_norm", STEPS), ("eval_loss", 2)):
        assert len(curve(one, key)) == length
        assert curve(other, key) == pytest.approx(curve(one, key), rel=1e-5), key
    assert facts(other)["in_pieces"] == (launch == "zero3" and name != "with_small_weights_whole")
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("launch, method", RESUMED)
def test_a_resumed_launch_ends_with_the_weights_of_one_that_never_stopped(resumed, place, launch, method):
    whole, again = place / launch / method, place / f"{launch}-resumed" / method
    assert curve(whole)[MIDDLE:] == curve(again)
    for key, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[key]), key


@pytest.mark.parametrize("launch", [launch for launch, _ in IN_BF16])
def test_a_bf16_base_stays_bf16_and_its_adapter_float32(alone, two, place, launch):
    folder = place / launch / "bf16"
    base, *adapter = facts(folder)["dtypes"]
    assert base == "torch.bfloat16" and set(adapter) == {"torch.float32"}
    for key, tensor in weights(folder).items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, tensor.bfloat16().float()), f"{key} holds nothing that bf16 could not"
    assert curve(folder) == pytest.approx(curve(place / "alone" / "bf16"), rel=5e-3)


@pytest.mark.parametrize("launch", ["zero2", "zero3"])
def test_a_checkpoint_holds_no_base(two, place, tiny_base, launch):
    base_size = (Path(tiny_base) / "model.safetensors").stat().st_size
    saved = place / launch / "mtl_lora" / f"checkpoint-{MIDDLE}"
    assert (saved / "mtl_lora.safetensors").is_file()
    assert all(path.stat().st_size < base_size for path in saved.rglob("*"))
