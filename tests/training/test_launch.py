"""Launches of several CPU processes, as a user starts them, and the recipes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared import PROJECT, free_port

from mtl_lora.errors import UserError
from mtl_lora.language.config import TrainConfig
from mtl_lora.language.train import run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def start(command: list[str], timeout: float = 600, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in the project's folder with this interpreter first on the path and no environment of its own."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    threads = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "VENV": "", "PATH": path, "PORT": free_port()}
    return subprocess.run(
        command,
        cwd=PROJECT,
        env={**os.environ, **threads, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def settings(tiny_base, records_file, cache_dir, tmp_path) -> dict:
    """What a short training of the tiny model is told."""
    return {
        "base_model": tiny_base,
        "data_path": records_file,
        "cache_dir": cache_dir,
        "output_dir": str(tmp_path / "run"),
        "dtype": "fp32",
        "batch_size": 4,
        "max_steps": 4,
        "save_step": 0,
        "logging_steps": 1,
    }


def flags(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def test_accelerate_launch_trains_as_one_process_does(settings, tmp_path):
    """In --dtype, here float32, whatever precision accelerate's own configuration asks for."""
    settings |= {"lora_dropout": 0.0}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launcher += [f"--main_process_port={free_port()}", "--mixed_precision=bf16"]
    done = start([*launcher, "finetune.py", *flags(settings)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 rows per device x 2 devices" in done.stderr
    run(TrainConfig(**{**settings, "output_dir": str(tmp_path / "alone"), "batch_size": 8}))
    found, expected = (load_file(tmp_path / name / "mtl_lora.safetensors") for name in ("run", "alone"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


def test_a_recipe_under_the_deepspeed_launcher(settings, tmp_path):
    run = {
        "LAUNCHER": "deepspeed",
        "DEEPSPEED": "config/zero3.json",
        "BASE_MODEL": settings["base_model"],
        "DATA_PATH": settings["data_path"],
        "CACHE_PATH": settings["cache_dir"],
        "OUTPUT_PATH": settings["output_dir"],
        "BATCH_SIZE": "4",
        "MAX_STEPS": "4",
    }
    done = start(["bash", "script/llama2_7B_dora_qkvo.sh", "8", "16"], **run)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 rows per device x 2 devices" in done.stderr
    assert (tmp_path / "run" / "mtl_lora.safetensors").is_file()


@pytest.mark.parametrize(
    "switch, more, sentence",
    [
        ("ACCELERATE_USE_FSDP", {}, "FSDP is not supported; to spread the base over GPUs use --deepspeed"),
        ("ACCELERATE_USE_DEEPSPEED", {}, "with accelerate launch, leave out its --use_deepspeed"),
        ("", {"deepspeed": "config/zero3.json", "dtype": "fp64"}, "--dtype fp64 does not go with ZeRO-3"),
        ("", {"deepspeed": "config/zero2.json"}, "--deepspeed needs a launcher, also for one process"),
        ("", {"deepspeed": "config/zero3.json", "batch_size": "auto"}, "--batch_size auto does not go with ZeRO-3"),
    ],
    ids=["fsdp", "accelerate", "fp64", "no launcher", "auto"],
)
def test_a_launch_that_is_not_done_is_refused_in_one_sentence(monkeypatch, settings, tmp_path, switch, more, sentence):
    monkeypatch.chdir(PROJECT)
    if switch:
        monkeypatch.setenv(switch, "true")
    with pytest.raises(UserError, match=sentence):
        run(TrainConfig(**{**settings, **more}))
    assert not (tmp_path / "run").exists()


DIFFERING = {"bf16": {"enabled": True}, "gradient_clipping": 0.3, "train_batch_size": 999}


@pytest.mark.parametrize("check", [False, True])
def test_values_of_the_deepspeed_file_that_contradict_the_flags_are_refused(settings, tmp_path, check):
    value = json.loads((PROJECT / "config" / "zero2.json").read_text()) | DIFFERING
    (tmp_path / "own.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match="the DeepSpeed configuration and the flags differ") as caught:
        run(TrainConfig(**{**settings, "deepspeed": str(tmp_path / "own.json"), "check": check}))
    assert "bf16.enabled=True" in str(caught.value) and "gradient_clipping=0.3" in str(caught.value)
    # One process says nothing of the batch of a launch.
    assert ("train_batch_size=999" in str(caught.value)) == (not check)
    assert not (tmp_path / "run").exists()


def test_an_error_in_one_process_ends_all(settings, tmp_path):
    """The others wait in a collective for the one that is gone; without an end this runs into the timeout."""
    job = tmp_path / "job.json"
    job.write_text(
        json.dumps({"runs": [{**settings, "max_steps": 1000, "deepspeed": "config/zero3.json"}], "break_after": 60})
    )
    launcher = [*TORCHRUN, "--nproc_per_node=2", f"--master_port={free_port()}"]
    done = start([*launcher, str(Path(__file__).with_name("launched.py")), str(job)], timeout=120)
    assert done.returncode != 0
    assert "this process breaks" in done.stderr
    assert not (tmp_path / "run" / "mtl_lora.safetensors").exists()


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
