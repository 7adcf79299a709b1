"""Launches of several CPU processes, as a user starts them, and the recipes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from shared import PROJECT, free_port

from mtl_lora.errors import UserError
from mtl_lora.language.config import TrainConfig
from mtl_lora.training.distributed import deepspeed_sha256
from mtl_lora.training.run import train as run
from mtl_lora.training.trainer import training_arguments


def start(
    command: list[str], timeout: float = 600, cwd: Path = PROJECT, **environment: str
) -> subprocess.CompletedProcess:
    """Run a command, in ``cwd``, with this interpreter first on the path and no environment of its own."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    threads = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "VENV": "", "PATH": path, "PORT": free_port()}
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **threads, **environment}, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture
def settings(tiny_base, records_file, cache_dir, tmp_path) -> dict:
    """The flags of a short training of the tiny model."""
    return {
        "base_model": tiny_base,
        "data_path": records_file,
        "cache_dir": cache_dir,
        "output_dir": str(tmp_path / "run"),
        "dtype": "fp32",
        "batch_size": 4,
        "max_steps": 2,
        "save_step": 0,
        "logging_steps": 1,
    }


@pytest.fixture
def recipe(settings) -> dict[str, str]:
    """The environment with which a recipe trains the tiny model."""
    names = {
        "BASE_MODEL": "base_model",
        "DATA_PATH": "data_path",
        "CACHE_PATH": "cache_dir",
        "OUTPUT_PATH": "output_dir",
        "BATCH_SIZE": "batch_size",
        "MAX_STEPS": "max_steps",
        "DTYPE": "dtype",
    }
    return {name: str(settings[flag]) for name, flag in names.items()}


@pytest.mark.slow(50)
def test_a_recipe_trains_under_the_deepspeed_launcher_and_its_evaluation_scores_that_checkpoint(recipe, tmp_path):
    recipe |= {"DATA_DIR": str(PROJECT / "data/quickstart/test"), "MODE": "score"}
    flags = {"LAUNCHER": "deepspeed", "DEEPSPEED": str(PROJECT / "config" / "zero3.json")}
    done = start(["bash", "script/llama2_7B_mlora_qkvo.sh", "8", "16", "--save_step", "2"], **recipe, **flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["world_size"] == 2
    # Called from another folder, whose paths are then meant.
    command = [str(PROJECT / "script/llama2_7B_mlora_qkvo_eval.sh"), "run/checkpoint-2", "scores", "--limit", "3"]
    done = start(["bash", *command], **recipe, LAUNCHER="python", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert results["adapter"]["adapter"]["rank"] == 8
    assert {task["n"] for task in results["tasks"].values()} == {3}
    assert "BoolQ" in done.stdout


@pytest.mark.parametrize(
    "switch, more, facts",
    [
        ("ACCELERATE_USE_FSDP", {}, ("FSDP", "--deepspeed")),
        ("ACCELERATE_USE_DEEPSPEED", {}, ("--use_deepspeed", "--deepspeed")),
        ("", {"deepspeed": "config/zero3.json", "dtype": "fp64"}, ("ZeRO-3", "--dtype fp64")),
        ("", {"deepspeed": "config/zero2.json"}, ("--deepspeed", "launcher", "torchrun")),
    ],
    ids=["fsdp", "accelerate", "fp64", "no launcher"],
)
def test_a_launch_that_is_not_supported_is_refused(monkeypatch, settings, tmp_path, switch, more, facts):
    monkeypatch.chdir(PROJECT)
    if switch:
        monkeypatch.setenv(switch, "true")
    with pytest.raises(UserError) as caught:
        run(TrainConfig(**{**settings, **more}))
    assert all(fact in str(caught.value) for fact in facts)
    assert not (tmp_path / "run").exists()


DIFFERING = {"bf16": {"enabled": True}, "gradient_clipping": 0.3, "train_batch_size": 999}


@pytest.mark.parametrize("check", [False, True])
def test_values_of_the_deepspeed_file_that_contradict_the_flags_are_refused(settings, tmp_path, check):
    value = json.loads((PROJECT / "config" / "zero2.json").read_text()) | DIFFERING
    (tmp_path / "own.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match="the DeepSpeed configuration and the flags differ") as caught:
        run(TrainConfig(**{**settings, "deepspeed": str(tmp_path / "own.json"), "check": check}))
    assert "bf16.enabled=True" in str(caught.value) and "gradient_clipping=0.3" in str(caught.value)
    # One process does not know the batch of a launch.
    assert ("train_batch_size=999" in str(caught.value)) == (not check)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "flag"),
    [("optimizer", "learning_rate"), ("scheduler", "lr_sch"), ("torch_autocast", "dtype"), ("amp", "dtype")],
)
def test_sections_of_the_deepspeed_file_that_would_replace_flags_are_refused(settings, tmp_path, section, flag):
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, section: {"type": "auto"}}))
    with pytest.raises(UserError, match=f"own.json has .* would replace flags, '{section}' .--{flag}"):
        run(TrainConfig(**{**settings, "deepspeed": str(tmp_path / "own.json"), "check": True}))


def test_a_deepspeed_configuration_is_known_by_its_content(tmp_path):
    own, content = tmp_path / "own.json", (PROJECT / "config" / "zero2.json").read_text()
    own.write_text(content)
    known = {deepspeed_sha256(name) for name in ("zero2", "config/zero2.json", str(own))}
    own.write_text(json.dumps(dict(reversed(json.loads(content).items()))))
    known.add(deepspeed_sha256(str(own)))
    assert len(known) == 1 and deepspeed_sha256(None) is None
    own.write_text(json.dumps(json.loads(content) | {"steps_per_print": 7}))
    assert deepspeed_sha256(str(own)) not in {*known, deepspeed_sha256("zero3")}


def test_what_a_deepspeed_file_leaves_out_is_what_the_flags_say(settings, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": 8}))
    flags = {"deepspeed": str(tmp_path / "own.json"), "gradient_accumulation_steps": 2, "max_grad_norm": 0.25}
    arguments = training_arguments(TrainConfig(**{**settings, **flags, "batch_size": 4}))
    expected = {"gradient_clipping": 0.25, "gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 4}
    assert expected.items() <= arguments.hf_deepspeed_config.config.items()


def test_a_recipe_without_its_arguments_says_how_it_is_called():
    done = start(["bash", "script/llama2_7B_mlora_qkvo.sh"])
    assert done.returncode == 2
    assert "usage: bash script/llama2_7B_mlora_qkvo.sh R ALPHA" in done.stderr


@pytest.mark.slow
def test_a_recipe_stops_at_a_mistake_before_the_launcher():
    done = start(["bash", "script/llama2_7B_lora_qkvo.sh", "0", "16"], DATA_PATH="data/quickstart/train.json")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "error: --lora_r must be at least 1, not 0"
