"""Training runs on a tiny real model: what they write, that they repeat, resume, and refuse what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_lora.adapter import analysis, checkpoint
from mtl_lora.artifacts import checkpoints
from mtl_lora.errors import UserError


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / checkpoint.WEIGHTS_NAME)


def log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in log_lines(folder) if "loss" in line]


def stopped_after_its_first_checkpoint(folder: Path) -> None:
    """Take away what a run wrote after its first checkpoint, as if it had been stopped there."""
    for late in checkpoints(folder)[1:]:
        for path in sorted(late.iterdir()):
            path.unlink()
        late.rmdir()
    for name in (checkpoint.CONFIG_NAME, checkpoint.WEIGHTS_NAME):
        (folder / name).unlink()


def assert_equal(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("method", ["lora", "mtl_lora"])
def test_a_run_learns_and_writes_adapter_and_log(train, method):
    folder = train("run", adapter_name=method, max_steps=12)
    found = weights(folder)
    assert found and all(tensor.dtype == torch.float32 for tensor in found.values())
    curve = losses(folder)
    assert curve[-1] < curve[0] - 0.5
    assert any(key.startswith("loss/") for key in log_lines(folder)[0])
    origin = checkpoint.read_config(folder).origin_config
    assert (origin.prompt_template, origin.cutoff_len) == ("alpaca", 256)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(train):
    first, again, other = (weights(train(name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert_equal(first, again)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_finished_run_holds_the_analysis_of_its_weights(train):
    folder = train("run")
    found = json.loads((folder / analysis.FILE_NAME).read_text())
    assert found["adapter_sha256"] == checkpoint.read_config(folder).weights_sha256
    assert len(found["mixture"]) == len(found["layers"]) == 8
    # Four steps have moved every task's B, not yet far.
    assert all(value is not None for row in found["update_similarity"] for value in row)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(train, accumulation):
    flags = {"batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation, "max_steps": 15}
    whole = train("whole", **flags)
    # 96 records are 12 steps, so the second half crosses into another epoch.
    cut = train("cut", **flags, save_step=5)
    stopped_after_its_first_checkpoint(cut)
    train("cut", **flags, save_step=5, resume_from_checkpoint="True")
    assert_equal(weights(whole), weights(cut))
    assert losses(whole) == losses(cut)


@pytest.mark.parametrize(
    "options",
    [
        {"token_budget": 700, "gradient_accumulation_steps": 2},
        {"token_budget": 1400, "sampling_temperature": 3.0},
    ],
    ids=["tokens", "tokens and temperature"],
)
def test_a_run_with_batches_by_tokens_resumes_exactly(train, records_file, tmp_path, options, capsys):
    records = json.loads(Path(records_file).read_text())[:32]
    (tmp_path / "few.json").write_text(json.dumps(records))
    flags = {**options, "data_path": str(tmp_path / "few.json"), "max_steps": 9}
    whole = train("whole", **flags)
    assert "; 4 steps an epoch" in capsys.readouterr().err, "the checkpoint shall lie within the second, the end later"
    cut = train("cut", **flags, save_step=6)
    stopped_after_its_first_checkpoint(cut)
    train("cut", **flags, save_step=6, resume_from_checkpoint="True")
    assert_equal(weights(whole), weights(cut))
    assert losses(whole) == losses(cut)


def test_a_run_that_began_before_a_flag_existed_goes_on_with_the_flags_default(train):
    folder = train("run", save_step=2)
    told = json.loads((folder / "run.json").read_text())
    del told["settings"]["sampling_temperature"]
    (folder / "run.json").write_text(json.dumps(told))
    train("run", save_step=2, resume_from_checkpoint="True")
    (folder / "run.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"sampling_temperature 1.0 -> 2.0"):
        train("run", save_step=2, resume_from_checkpoint="True", sampling_temperature=2.0)


def test_a_checkpoint_is_small_and_is_itself_an_adapter(train):
    folder = train("run", save_step=2)
    (first, last) = checkpoints(folder)
    assert {path.name for path in first.iterdir()} == {
        "mtl_lora.safetensors",
        "mtl_lora_config.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }
    size = sum(tensor.numel() * 4 for tensor in weights(first).values())
    assert sum(path.stat().st_size for path in first.iterdir()) < 4 * size + 60_000
    assert_equal(weights(last), weights(folder))
    assert not (folder / ".saving").exists()


def test_old_checkpoints_are_removed(train):
    folder = train("run", save_step=1, max_steps=4, save_total_limit=2)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-3", "checkpoint-4"]


def test_accumulation_does_not_change_the_result(train):
    # At 1e-2 a step that Adam makes of rounding, where a gradient is all but zero, is more than the tolerance.
    flags = {"lora_dropout": 0.0, "learning_rate": 3e-3}
    whole = train("whole", batch_size=8, **flags)
    parts = train("parts", batch_size=2, gradient_accumulation_steps=4, **flags)
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-5)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(parts)[name], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_does_not_change_the_result(train):
    plain = train("plain")
    saving = train("saving", use_gradient_checkpointing=True)
    assert losses(plain) == pytest.approx(losses(saving), rel=1e-6)


def test_the_validation_loss_does_not_depend_on_the_batch_size(train):
    found = []
    for size in (8, 3):
        folder = train(f"run{size}", val_set_size=10, save_step=2, max_steps=2, batch_size=8, learning_rate=1e-9)
        lines = [line for line in log_lines(folder) if "eval_loss" in line]
        assert any(key.startswith("eval_loss/") for key in lines[0])
        found.append(lines[0]["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_training_on_inputs_puts_loss_on_the_prompt(train):
    answers, everything = train("answers", max_steps=1), train("everything", max_steps=1, train_on_inputs=True)
    assert losses(answers) != losses(everything)


def test_a_folder_that_holds_a_run_is_refused_unless_told(train):
    folder = train("run", max_steps=1)
    with pytest.raises(UserError, match="already holds a run"):
        train("run", max_steps=1)
    before = weights(folder)
    train("run", max_steps=1, seed=5, overwrite_output_dir=True)
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(folder).items())
    with pytest.raises(UserError, match="contradict"):
        train("run", overwrite_output_dir=True, resume_from_checkpoint="True")


def test_resuming_without_a_checkpoint_is_refused(train, tmp_path):
    with pytest.raises(UserError, match="no whole checkpoint"):
        train("new", resume_from_checkpoint="True")
    with pytest.raises(UserError, match="no resume state"):
        train("new", resume_from_checkpoint=str(tmp_path))


def test_resuming_another_run_leaves_the_folder_of_this_one(train):
    one, other = (train(name, max_steps=2, save_step=2) for name in ("one", "other"))
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"other holds a run, and .*one/checkpoint-2 is of another"):
        train("other", max_steps=4, save_step=2, resume_from_checkpoint=str(one / "checkpoint-2"))
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("check", [False, True])
def test_run_goes_on_with_the_settings_and_the_base_it_began_with(train, tiny_base, tmp_path, check):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    train("run", base_model=str(base), max_steps=2, save_step=1)
    again = {"base_model": str(base), "save_step": 1, "resume_from_checkpoint": "True", "check": check}
    with pytest.raises(UserError, match=r"other settings .*learning_rate 0.01 -> 0.02"):
        train("run", max_steps=2, learning_rate=0.02, **again)
    state = load_file(base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"other settings .*the base model's files"):
        train("run", max_steps=2, **again)


def test_checking_stops_before_anything_is_written(train, tmp_path):
    train("run", check=True)
    assert not (tmp_path / "run").exists()


def test_a_target_module_that_does_not_exist_is_refused_with_those_that_do(train):
    with pytest.raises(UserError, match=r"lora_target_modules.*'query'.*q_proj"):
        train("run", lora_target_modules=["query"])


def test_an_output_folder_that_can_not_be_written_is_refused(train, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train("file/run")


def test_own_tasks_are_trained_by_name(train, tmp_path):
    tasks = {"tasks": [{"name": "sky", "id": 0, "options": ["day", "night"]}, {"name": "free", "id": 1}]}
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    records = [
        {"instruction": "The sun is up.", "output": "the correct answer is day", "answer": "day", "task": "sky"},
        {"instruction": "Name a star.", "output": "Vega", "answer": "Vega", "task": "free"},
    ]
    (tmp_path / "own.json").write_text(json.dumps(records * 8))
    folder = train("own", tasks_file=str(tmp_path / "tasks.json"), data_path=str(tmp_path / "own.json"), max_steps=2)
    assert checkpoint.read_config(folder).adapter_config.tasks == ["sky", "free"]


@pytest.mark.parametrize("flags", [{"tensorboard": True}, {"wandb_project": "test"}])
def test_loggers_write_where_they_are_told(train, tmp_path, monkeypatch, flags):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    folder = train("run", max_steps=2, **flags)
    pattern = "tensorboard/**/events*" if "tensorboard" in flags else "../wandb/offline-run*/*.wandb"
    assert list(folder.glob(pattern))
