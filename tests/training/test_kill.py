"""A training run that is killed goes on from its last whole checkpoint and ends as if it had never stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared import PROJECT

from mtl_lora.artifacts import checkpoints

STEPS = 40


def command(folder: Path, tiny_base: str, records_file: str, cache_dir: str, *more: str) -> list[str]:
    flags = {
        "base_model": tiny_base,
        "data_path": records_file,
        "cache_dir": cache_dir,
        "output_dir": folder,
        "dtype": "fp32",
        "lora_dropout": 0.1,
        "batch_size": 8,
        "max_steps": STEPS,
        "save_step": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
    }
    return [sys.executable, "finetune.py", *(f"--{name}={value}" for name, value in flags.items()), *more]


def run(arguments: list[str]) -> None:
    done = subprocess.run(arguments, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_base, records_file, cache_dir) -> dict[str, torch.Tensor]:
    """The weights of the run that was never killed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(command(folder, tiny_base, records_file, cache_dir))
    return load_file(folder / "mtl_lora.safetensors")


def first_checkpoint(folder: Path) -> bool:
    return bool(checkpoints(folder))


def while_saving(folder: Path) -> bool:
    """The second checkpoint is being written: its folder lies in the staging folder, not in its place."""
    return bool(checkpoints(folder)) and (folder / ".saving").exists()


def late(folder: Path) -> bool:
    return any(path.name == "checkpoint-28" for path in checkpoints(folder))


@pytest.mark.parametrize("moment", [first_checkpoint, while_saving, late], ids=lambda moment: moment.__name__)
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(
    tmp_path, tiny_base, records_file, cache_dir, undisturbed, moment
):
    folder = tmp_path / "run"
    arguments = command(folder, tiny_base, records_file, cache_dir)
    process = subprocess.Popen(arguments, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not moment(folder):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before the moment came"
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "mtl_lora.safetensors").exists()
    assert checkpoints(folder)
    run([*arguments, "--resume_from_checkpoint=True"])
    found = load_file(folder / "mtl_lora.safetensors")
    assert found.keys() == undisturbed.keys()
    for name, tensor in undisturbed.items():
        assert torch.equal(tensor, found[name]), name
    steps = [line for line in (folder / "train_log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(steps) == STEPS


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--learning_rate=0.5", "learning_rate 0.01 -> 0.5"),
        ("--lora_r=4", "lora_r 8 -> 4"),
        ("--data_path={other}", "the data file"),
    ],
)
def test_going_on_with_other_settings_or_data_is_refused_by_name(
    tmp_path, tiny_base, records_file, cache_dir, train, flag, message
):
    from mtl_lora.errors import UserError

    train("run", save_step=2)
    other = tmp_path / "other.json"
    other.write_text(Path(records_file).read_text().replace("a", "e", 1))
    name, _, value = flag.format(other=other)[2:].partition("=")
    value = {"learning_rate": float, "lora_r": int}.get(name, str)(value)
    with pytest.raises(UserError, match=f"began with other settings.*{message}"):
        train("run", save_step=2, resume_from_checkpoint="True", **{name: value})
