"""Launches of two CPU processes that train, and what is compared of two trainings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared import PROJECT, free_port

TORCHRUN = ["torch.distributed.run", "--nproc_per_node=2", "--master_port"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--mixed_precision=bf16"]
ACCELERATE.append("--main_process_port")


def launch(launcher: list[str], runs: list[dict], folder: Path, evaluate: tuple = ()) -> subprocess.CompletedProcess:
    """Evaluate and train in two CPU processes; nothing is on the path, so there is no compiler either."""
    for name in ("nothing", "extensions"):
        (folder / name).mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"runs": runs, "evaluate": evaluate, "port": free_port()}))
    environment = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PATH": str(folder / "nothing"),
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }
    command = [sys.executable, "-m", *launcher, free_port()]
    done = subprocess.run(
        [*command, str(PROJECT / "tests" / "training" / "launched.py"), str(folder / "job.json")],
        cwd=PROJECT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert not list((folder / "extensions").iterdir()), "something was compiled"
    return done


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "mtl_lora.safetensors")


def curve(folder: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def facts(folder: Path) -> dict:
    return json.loads((folder / "facts.json").read_text())


def assert_trained_alike(one: Path, other: Path) -> None:
    for key in ("loss", "grad_norm", "eval_loss", "train_loss"):
        assert curve(one, key), key
        assert curve(other, key) == pytest.approx(curve(one, key), rel=1e-5), key
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        # AdamW divides a gradient by its own size, so that the rounding of a tiny one counts: 1.8e-5 with AVX2 alone.
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=5e-5, msg=lambda text, key=key: f"{key}: {text}")
