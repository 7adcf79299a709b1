"""Launches of several processes, as a user starts them: DeepSpeed ZeRO-2 on two CPU processes, and the recipes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared import PROJECT, free_port

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def start(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Run a command in the project's folder with this interpreter first on the path and no environment of its own."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    threads = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "VENV": "", "PATH": path, "PORT": free_port()}
    return subprocess.run(
        command, cwd=PROJECT, env={**os.environ, **threads, **environment}, capture_output=True, text=True, timeout=600
    )


def finetune(output: Path, tiny_base: str, records_file: str, cache_dir: str, processes: int, **flags) -> dict:
    settings = {
        "base_model": tiny_base,
        "data_path": records_file,
        "cache_dir": cache_dir,
        "output_dir": output,
        "dtype": "fp32",
        "lora_dropout": 0.0,
        "batch_size": 8 // processes,
        "max_steps": 14,
        "save_step": 0,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        **flags,
    }
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    launcher = [*TORCHRUN, f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    done = start([*(launcher if processes > 1 else [sys.executable]), "finetune.py", *arguments])
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(output / "mtl_lora.safetensors")


def curve(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("method", ["mtl_lora", "lora"])
def test_two_processes_under_zero2_train_as_one_does(tmp_path, tiny_base, records_file, cache_dir, method):
    fixed = (tiny_base, records_file, cache_dir)
    one = finetune(tmp_path / "one", *fixed, 1, adapter_name=method)
    two = finetune(tmp_path / "two", *fixed, 2, adapter_name=method, deepspeed="config/zero2.json", save_step=7)
    assert curve(tmp_path / "one") == pytest.approx(curve(tmp_path / "two"), rel=1e-5)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5, msg=name)
    saved = tmp_path / "two" / "checkpoint-7"
    base_size = (Path(tiny_base) / "model.safetensors").stat().st_size
    assert (saved / "mtl_lora.safetensors").is_file()
    assert all(path.stat().st_size < base_size for path in saved.rglob("*"))
    for late in (tmp_path / "two").glob("checkpoint-14/*"):
        if late.is_file():
            late.unlink()
    resumed = finetune(
        tmp_path / "two",
        *fixed,
        2,
        adapter_name=method,
        deepspeed="config/zero2.json",
        save_step=7,
        resume_from_checkpoint=str(saved),
    )
    for name, tensor in two.items():
        assert torch.equal(tensor, resumed[name]), name


def test_adapter_weights_stay_float32_under_zero2_with_a_bf16_base(tmp_path, tiny_base, records_file, cache_dir):
    found = finetune(
        tmp_path / "run", tiny_base, records_file, cache_dir, 2, dtype="bf16", deepspeed="config/zero2.json"
    )
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, tensor.bfloat16().float()), f"{name} holds nothing that bf16 could not"


def test_a_mistake_under_a_launcher_ends_all_processes_with_one_sentence(tmp_path, tiny_base, cache_dir):
    launcher = [*TORCHRUN, "--nproc_per_node=2", f"--master_port={free_port()}"]
    flags = [f"--base_model={tiny_base}", f"--data_path={tmp_path / 'none.json'}", f"--output_dir={tmp_path / 'run'}"]
    done = start([*launcher, "finetune.py", *flags, f"--cache_dir={cache_dir}"])
    assert done.returncode != 0
    assert done.stderr.count("error: the data file") == 1


def test_the_recipe_trains_and_its_evaluation_scores_that_checkpoint(tmp_path):
    """The main job on the real base model: two CPU processes, DeepSpeed ZeRO-2, then the evaluation script."""
    run = {
        "BASE_MODEL": "smollm2-135m",
        "DATA_PATH": "data/quickstart/train.json",
        "DATA_DIR": "data/quickstart/test",
        "OUTPUT_PATH": str(tmp_path / "run"),
        "CACHE_PATH": str(tmp_path / "cache"),
        "MAX_STEPS": "4",
        "BATCH_SIZE": "2",
        "MODE": "score",
    }
    done = start(["bash", "script/llama2_7B_mlora_qkvo.sh", "8", "16", "--save_step", "2"], **run)
    assert done.returncode == 0, done.stderr[-3000:]
    scored = str(tmp_path / "scores")
    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    done = start(["bash", "script/llama2_7B_mlora_qkvo_eval.sh", checkpoint, scored, "--limit", "3"], **run)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((Path(scored) / "results.json").read_text())
    assert results["adapter"]["adapter"]["rank"] == 8
    assert {task["n"] for task in results["tasks"].values()} == {3}
    assert "BoolQ" in done.stdout


def test_a_recipe_without_its_arguments_says_how_it_is_called():
    done = start(["bash", "script/llama2_7B_mlora_qkvo.sh"])
    assert done.returncode == 2
    assert "usage: bash script/llama2_7B_mlora_qkvo.sh R ALPHA" in done.stderr


def test_a_recipe_stops_at_a_mistake_before_the_launcher():
    done = start(["bash", "script/llama2_7B_lora_qkvo.sh", "0", "16"], DATA_PATH="data/quickstart/train.json")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "error: --lora_r must be at least 1, not 0"
