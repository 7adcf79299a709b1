"""One process, two processes, ZeRO-2 and ZeRO-3 train alike, and resume; two processes evaluate as one does.

All this happens in two launches of two processes, so one test holds all comparisons: torchrun evaluates and trains,
accelerate, whose own precision is to be ignored, resumes. LoRA and MultiLoRA take the code paths of MTL-LoRA.
"""

import json
from pathlib import Path

import pytest
import torch
from launches import ACCELERATE, TORCHRUN, assert_trained_alike, curve, facts, launch, weights
from shared import PROJECT, QUICKSTART

from mtl_lora import cli
from mtl_lora.language.config import TrainConfig
from mtl_lora.results import Results
from mtl_lora.training.run import train as run

METHODS = ("dora", "moelora", "mtl_lora")
STEPS, MIDDLE = 4, 2  # an epoch is 3 steps, the last of them smaller
# Name of a run beside the methods' own -> its other flags; it is compared with the method that it trains, or with one
# process's run of the same name.
MORE = {
    "accumulated": {"batch_size": 2, "gradient_accumulation_steps": 2},
    "bf16": {"dtype": "bf16"},
    "by_tokens": {"token_budget": 1500},
    "whole_rows": {"token_budget": 1500, "reuse_prefix": "never"},  # as by_tokens, without shared prompt prefixes
    "checkpointing": {"adapter_name": "dora", "use_gradient_checkpointing": True},
    "few_held_out": {"val_set_size": 1},  # fewer rows than processes
    # Parameters below the threshold of this file are not partitioned, and all of the tiny model's are below it.
    "small_kept_whole": {"deepspeed": str(PROJECT / "config" / "zero3.json")},
}
# Without DeepSpeed first, for a run with it leaves its switch in the environment; and nothing before the first run
# with ZeRO-3 may make DeepSpeed's process group for it.
RUNS = [("ddp", name) for name in ("few_held_out", "mtl_lora", "accumulated")]
RUNS += [("zero3", name) for name in (*METHODS, "by_tokens", "checkpointing", "small_kept_whole")]
RUNS += [("zero2", "mtl_lora")]
IN_BF16 = [("zero3", "bf16"), ("zero2", "bf16")]
RESUMED = [("ddp", "mtl_lora"), *(("zero3", method) for method in METHODS), ("zero2", "mtl_lora")]
# The runs of one process.
ALONE = (*METHODS, "bf16", "by_tokens", "few_held_out", "whole_rows")


def method_of(name: str) -> str:
    """The method that a run trains."""
    return name if name in METHODS else MORE[name].get("adapter_name", "mtl_lora")


@pytest.fixture
def settings_of(tmp_path, tiny_base, records_file, cache_dir):
    """``settings_of(launch, name)``: the flags of a run, whose folder is ``<launch>/<name>``."""
    shortest = sorted(json.loads(Path(records_file).read_text()), key=lambda record: len(record["instruction"]))
    (tmp_path / "train.json").write_text(json.dumps(shortest[:40]))
    zero3 = json.loads((PROJECT / "config" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(zero3))
    deepspeed = {"zero2": str(PROJECT / "config" / "zero2.json"), "zero3": str(tmp_path / "zero3.json")}

    def settings(launch: str, name: str) -> dict:
        return {
            "base_model": tiny_base,
            "data_path": str(tmp_path / "train.json"),
            "cache_dir": cache_dir,
            "output_dir": str(tmp_path / launch / name),
            "adapter_name": method_of(name),
            "dtype": "fp32",
            "lora_dropout": 0.0,
            "batch_size": 8 if launch == "alone" else 4,
            "max_steps": STEPS,
            "save_step": MIDDLE,
            "val_set_size": 17,  # an odd number: one process has a row, and a batch, more than the other
            "logging_steps": 1,
            # Where a gradient is all but zero, Adam makes a step of this size of its rounding; from 1e-2 on that is
            # more than the tolerance of the weights.
            "learning_rate": 3e-3,
            "deepspeed": deepspeed.get(launch),
            **MORE.get(name, {}),
            # The token budget of two processes is that of two micro-batches of one.
            **({"gradient_accumulation_steps": 2} if launch == "alone" and name in ("by_tokens", "whole_rows") else {}),
        }

    return settings


def assert_resumed_exactly(whole: Path, again: Path) -> None:
    assert curve(whole)[MIDDLE:] == curve(again)
    for key, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[key]), key


def assert_bf16_base_and_float32_adapter(one: Path, other: Path) -> None:
    base, *adapter = facts(other)["dtypes"]
    assert base == "torch.bfloat16" and set(adapter) == {"torch.float32"}
    for key, tensor in weights(other).items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, tensor.bfloat16().float()), f"{key} holds nothing that bf16 could not"
    assert curve(other) == pytest.approx(curve(one), rel=5e-3)


def predictions(folder: Path) -> list[str]:
    return [line for path in sorted((folder / "predictions").glob("*.jsonl")) for line in path.read_text().splitlines()]


@pytest.mark.slow(100)
def test_launches_are_as_one_process(subtests, settings_of, tmp_path, tiny_base, trained, one_thread):
    for name in ALONE:
        run(TrainConfig(**settings_of("alone", name)))
    questions = [
        "--checkpoint",
        trained,
        "--data_dir",
        str(QUICKSTART / "test"),
        "--limit=4",
        "--dtype=fp32",
        "--mode=score",
    ]
    answers = {name: str(tmp_path / "answers" / name) for name in ("alone", "two")}
    cli.main(["evaluate", *questions, "--output_dir", answers["alone"]])
    asked = (*questions, "--output_dir", answers["two"])
    done = launch(TORCHRUN, [settings_of(*run) for run in [*RUNS, *IN_BF16]], tmp_path / "two", asked)
    assert done.returncode == 0, done.stderr[-3000:]
    # Some of them again from their middle, in new processes and to folders of their own; at the end a broken run.
    again = [
        settings_of(mode, name)
        | {
            "output_dir": str(tmp_path / "resumed" / mode / name),
            "resume_from_checkpoint": str(tmp_path / mode / name / f"checkpoint-{MIDDLE}"),
        }
        for mode, name in RESUMED
    ]
    broken = {"output_dir": str(tmp_path / "broken"), "max_steps": 1000, "save_step": 1000, "broken": True}
    broke = launch(ACCELERATE, [*again, settings_of("zero3", "mtl_lora") | broken], tmp_path / "second")

    with subtests.test("evaluated alike"):
        # The very scores: the batches are the same, whoever answers them.
        alone, two = (Path(folder) for folder in answers.values())
        assert predictions(two) == predictions(alone) and len(predictions(two)) == 32
        assert Results.load(two).tasks == Results.load(alone).tasks
        assert done.stdout.count("| majority class") == 1, "one process alone prints the table"
    with subtests.test("shared prompt prefixes train as whole rows"):
        # By tokens, for then the plan of the batches does not look at prefixes.
        assert_trained_alike(tmp_path / "alone" / "whole_rows", tmp_path / "alone" / "by_tokens")
        shared = [json.loads((tmp_path / "alone" / name / "run.json").read_text())["shared_prefixes"] for name in ALONE]
        assert shared == [name != "whole_rows" for name in ALONE]
    for mode, name in RUNS:
        with subtests.test("trained alike", launch=mode, run=name):
            one, other = tmp_path / "alone" / (name if name in ALONE else method_of(name)), tmp_path / mode / name
            assert_trained_alike(one, other)
            assert facts(other)["partitioned"] == (mode == "zero3" and name != "small_kept_whole")
    for mode, name in RESUMED:
        with subtests.test("resumed exactly", launch=mode, run=name):
            assert_resumed_exactly(tmp_path / mode / name, tmp_path / "resumed" / mode / name)
    for mode, name in IN_BF16:
        with subtests.test("bf16 base, float32 adapter", launch=mode):
            assert_bf16_base_and_float32_adapter(tmp_path / "alone" / name, tmp_path / mode / name)
    for mode in ("zero2", "zero3"):
        with subtests.test("a checkpoint holds no base", launch=mode):
            saved = tmp_path / mode / "mtl_lora" / f"checkpoint-{MIDDLE}"
            assert (saved / "mtl_lora.safetensors").is_file()
            base_size = (Path(tiny_base) / "model.safetensors").stat().st_size
            assert all(path.stat().st_size < base_size for path in saved.rglob("*"))
    with subtests.test("an error in one process ends all, which wait for it in a collective"):
        assert broke.returncode != 0
        assert "this process breaks" in broke.stderr
        assert (tmp_path / "broken" / "run.json").is_file()
        assert not (tmp_path / "broken" / "mtl_lora.safetensors").exists()
