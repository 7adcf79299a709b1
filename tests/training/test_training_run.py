"""Training runs on a tiny real model: what they write, that they repeat, resume, and refuse what is wrong."""

import json
import math
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import mtl_lora
from mtl_lora import artifacts, files
from mtl_lora.adapter import checkpoint
from mtl_lora.adapter.checkpoint import read_config, read_weights
from mtl_lora.artifacts import checkpoints
from mtl_lora.base_model import BaseModel
from mtl_lora.errors import UserError
from mtl_lora.export.peft import export_peft
from mtl_lora.language.config import EvalConfig, TrainConfig
from mtl_lora.language.evaluate import run
from mtl_lora.language.tasks import COMMONSENSE
from mtl_lora.training.distributed import prepare_process
from mtl_lora.training.resume import check_same_run, check_state, checkpoint_to_resume, data_plan
from mtl_lora.training.sampler import CANDIDATES, OLD_CANDIDATES
from mtl_lora.training.trainer import MultiTaskTrainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / artifacts.CHECKPOINT_WEIGHTS)


def log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / artifacts.TRAIN_LOG).read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in log_lines(folder) if "loss" in line]


def stopped_after_its_first_checkpoint(folder: Path, copy: Path) -> None:
    """A copy of a run without what it wrote after its first checkpoint, as if it had been stopped there."""
    shutil.copytree(folder, copy)
    for late in checkpoints(copy)[1:]:
        shutil.rmtree(late)
    for name in (artifacts.CHECKPOINT_CONFIG, artifacts.CHECKPOINT_WEIGHTS, artifacts.ADAPTER_ANALYSIS):
        (copy / name).unlink()


def assert_equal(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# ---- what a run writes ----


def test_a_run_keeps_the_start_of_what_tasks_have_of_their_own(train, tiny_base):
    folder = train("run", max_steps=2, save_step=1)
    torch.manual_seed(42)
    model = mtl_lora.inject(BaseModel(tiny_base).load("fp32"), checkpoint.read_config(folder).adapter_config)
    drawn = {key: value for key, value in checkpoint.adapter_state(model).items() if key.endswith(("lambda", "lora_w"))}
    assert_equal(load_file(folder / artifacts.ADAPTER_START), drawn)
    analysis = json.loads((folder / artifacts.ADAPTER_ANALYSIS).read_text())
    assert analysis["mixture"] != analysis["mixture_at_start"] and analysis["update_similarity_at_start"]
    before = (folder / artifacts.ADAPTER_START).read_bytes()
    train("run", max_steps=2, save_step=1, resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert (folder / artifacts.ADAPTER_START).read_bytes() == before


def test_a_run_that_is_overwritten_leaves_no_start_to_one_that_has_none(train):
    folder = train("run", max_steps=1)
    assert (folder / artifacts.ADAPTER_START).is_file()
    train("run", max_steps=1, adapter_name="lora", overwrite_output_dir=True)
    assert not (folder / artifacts.ADAPTER_START).exists()


@pytest.mark.parametrize("method", ["lora", "mtl_lora"])
@pytest.mark.slow
def test_a_run_learns_and_leaves_adapter_log_and_analysis(train, tiny_base, capsys, method):
    folder = train("run", adapter_name=method, max_steps=8)
    found = weights(folder)
    assert found and all(tensor.dtype == torch.float32 for tensor in found.values())
    curve = losses(folder)
    assert curve[-1] < curve[0] - 0.5
    assert any(key.startswith("loss/") for key in log_lines(folder)[0])
    config = checkpoint.read_config(folder)
    assert (config.provenance_config.prompt_template, config.provenance_config.cutoff_len) == ("alpaca", 256)
    data = config.provenance_config.train_settings["data_path"]
    assert config.provenance_config.data_sha256 == files.sha256(data)
    analysis = json.loads((folder / artifacts.ADAPTER_ANALYSIS).read_text())
    assert analysis["adapter_sha256"] == config.weights_sha256
    assert len(analysis["layers"]) == 8
    # What is printed is what is counted on the meta device.
    trainable, total = TrainConfig(**config.provenance_config.train_settings).count()
    assert f"trainable parameters: {trainable:,} of {total:,} (" in capsys.readouterr().err


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


@pytest.mark.parametrize("logging_steps", [1, 10])
@pytest.mark.slow
def test_a_training_that_diverges_ends_in_one_sentence_and_saves_nothing(train, tmp_path, logging_steps):
    with pytest.raises(UserError, match=r"loss is nan at step [234] of 4"):
        train("run", learning_rate=1e30, logging_steps=logging_steps)
    assert not (tmp_path / "run" / artifacts.CHECKPOINT_WEIGHTS).exists()
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))
    with pytest.raises(UserError, match="not finite"):
        train("saved", learning_rate=1e30, save_step=1, logging_steps=10)


def test_old_checkpoints_are_removed(train):
    folder = train("run", save_step=1, max_steps=4, save_total_limit=2)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-3", "checkpoint-4"]


def test_own_tasks_are_trained_by_name(train, tmp_path):
    tasks = {"tasks": [{"name": "sky", "id": 0, "options": ["day", "night"]}, {"name": "free", "id": 1}]}
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    examples = [
        {"instruction": "The sun is up.", "output": "the correct answer is day", "answer": "day", "task": "sky"},
        {"instruction": "Name a star.", "output": "Vega", "task": "free"},
    ]
    (tmp_path / "own.json").write_text(json.dumps(examples * 8))
    folder = train("own", tasks_file=str(tmp_path / "tasks.json"), data_path=str(tmp_path / "own.json"), max_steps=1)
    assert checkpoint.read_config(folder).adapter_config.tasks == ["sky", "free"]


@pytest.mark.parametrize(("warmup", "steps", "said"), [(0.01, 1, True), (0.0, 1, False), (0.01, 2, False)])
def test_a_run_that_only_warms_up_says_so(train, capsys, warmup, steps, said):
    train("short", max_steps=steps, warmup_ratio=warmup)
    assert ("learning rate 0, which trains nothing" in capsys.readouterr().err) == said


@pytest.fixture
def few(tmp_path) -> dict[str, str]:
    """Flags for twelve examples of a task, two of another and none of a third."""
    names = ["mood", "sport", "rain"]
    tasks = [{"name": name, "id": index, "options": ["yes", "no"]} for index, name in enumerate(names)]
    tasks[1]["weight"] = 2
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    example = {"output": "the correct answer is yes", "answer": "yes"}
    examples = [example | {"instruction": f"Is it {i}?", "task": names[i >= 12]} for i in range(14)]
    (tmp_path / "few.json").write_text(json.dumps(examples))
    (tmp_path / "test" / "rain").mkdir(parents=True)
    (tmp_path / "test" / "rain" / "test.json").write_text(json.dumps([example | {"instruction": "Is it?"}] * 2))
    return {"tasks_file": str(tmp_path / "tasks.json"), "data_path": str(tmp_path / "few.json")}


def test_every_task_keeps_a_training_example_and_one_without_any_is_marked(train, few, tmp_path, capsys):
    options = {"save_step": 1, "max_steps": 1, "sampling_temperature": 5.0, "batch_size": 2}
    folder = train("few", **few, **options, val_set_size=7, seed=3)
    printed = capsys.readouterr().err
    assert "training examples: mood 6, sport 1, rain 0" in printed and "held out: mood 6, sport 1, rain 0" in printed
    assert "loss weights: sport 2\n" in printed
    passes = printed.split("passes over a task's examples")[1].splitlines()[0]
    assert re.search(r"mood 0\.\d, sport \d\.\d, rain 0\.0$", passes)
    results = run(EvalConfig(checkpoint=str(folder), data_dir=str(tmp_path / "test"), tasks=["rain"], mode="score"))
    assert results["score"].tasks["rain"].measured["untrained"] is True
    assert "no training examples of rain" in capsys.readouterr().err
    export_peft(folder, tmp_path / "peft")
    assert "no training examples of rain" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"val_set_size .* at most 12"):
        train("few too", **few, save_step=1, val_set_size=13)


@pytest.mark.parametrize(
    "flags", [{"tensorboard": True}, pytest.param({"wandb_project": "test"}, marks=pytest.mark.slow)]
)
def test_loggers_write_to_the_output_folder_or_the_project(train, tmp_path, monkeypatch, flags):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.setenv(name, "")  # so that what the process is prepared with is undone
    prepare_process(TrainConfig(output_dir=str(tmp_path / "run"), **flags))
    folder = train("run", max_steps=2, **flags)
    pattern = "tensorboard/**/events*" if "tensorboard" in flags else "../wandb/offline-run*/*.wandb"
    assert list(folder.glob(pattern))


# ---- the same result ----


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(train):
    first, again = weights(train("a", seed=1, max_steps=2)), weights(train("b", seed=1, max_steps=2, save_step=1))
    other = weights(train("c", seed=2, max_steps=2))
    assert_equal(first, again)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(
            {"batch_size": 4, "gradient_accumulation_steps": 2, "weight_decay": 0.1, "sampling_temperature": 3.0},
            marks=pytest.mark.slow,
        ),
        pytest.param({"token_budget": 700, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
    ],
    ids=["plain", "accumulation and temperature", "tokens"],
)
@pytest.mark.slow
def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(train, records_file, tmp_path, options):
    (tmp_path / "few.json").write_text(json.dumps(json.loads(Path(records_file).read_text())[:32]))
    # 4 steps an epoch: the checkpoint lies within the second, the end in the third.
    flags = {**options, "data_path": str(tmp_path / "few.json"), "save_step": 6, "max_steps": 9}
    whole = train("whole", **flags)
    assert json.loads((checkpoints(whole)[0] / "trainer_state.json").read_text())["epoch"] == 1.5
    stopped_after_its_first_checkpoint(whole, tmp_path / "cut")
    cut = train("cut", **flags, resume_from_checkpoint="True")
    assert_equal(weights(whole), weights(cut))
    assert losses(whole) == losses(cut)


@pytest.mark.slow
def test_accumulation_does_not_change_the_result(train):
    # At 1e-2 a step that Adam makes of rounding, where a gradient is all but zero, is more than the tolerance.
    flags = {"lora_dropout": 0.0, "learning_rate": 3e-3, "max_steps": 3}
    whole = train("whole", batch_size=8, **flags)
    parts = train("parts", batch_size=2, gradient_accumulation_steps=4, **flags)
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-5)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(parts)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_gradient_checkpointing_does_not_change_the_result(train):
    plain = train("plain", max_steps=3)
    saving = train("saving", max_steps=3, use_gradient_checkpointing=True)
    assert losses(plain) == pytest.approx(losses(saving), rel=1e-6)


@pytest.mark.slow
def test_the_validation_loss_does_not_depend_on_the_batch_size(train):
    found = []
    for size in (8, 3):
        folder = train(f"run{size}", val_set_size=10, save_step=1, max_steps=1, batch_size=size, learning_rate=1e-9)
        lines = [line for line in log_lines(folder) if "eval_loss" in line]
        assert any(key.startswith("eval_loss/") for key in lines[0])
        found.append(lines[0]["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_resumed_run_saves_and_logs_as_its_own_flags_say(train):
    folder = train("run", max_steps=4, save_step=2, logging_steps=2, val_set_size=2)
    shutil.rmtree(folder / "checkpoint-4")
    more = {"save_step": 1, "logging_steps": 1, "save_total_limit": 0, "resume_from_checkpoint": "True"}
    train("run", max_steps=4, val_set_size=2, **more)
    assert [path.name for path in sorted(folder.glob("checkpoint-*"))] == [f"checkpoint-{step}" for step in (2, 3, 4)]
    for key in ("loss", "eval_loss"):
        assert [line["step"] for line in log_lines(folder) if key in line] == [2, 3, 4]


@pytest.mark.slow
def test_the_checkpoint_of_the_lowest_validation_loss_is_kept_and_named(train, capsys):
    # A rate that soon makes every loss larger than the start's.
    flags = {"max_steps": 5, "save_step": 1, "save_total_limit": 1, "val_set_size": 8, "learning_rate": 30.0}
    folder = train("run", **flags, lr_scheduler_type="constant_with_warmup", warmup_ratio=0.0, max_grad_norm=0.0)
    lines = [line for line in log_lines(folder) if "eval_loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    best = min(lines, key=lambda line: line["eval_loss"])["step"]
    assert best < 5 and [path.name for path in checkpoints(folder)] == [f"checkpoint-{best}", "checkpoint-5"]
    assert f"the validation loss was lowest in {folder}/checkpoint-{best}" in capsys.readouterr().err
    read_weights(folder / f"checkpoint-{best}", read_config(folder / f"checkpoint-{best}"))
    # Of a run whose best checkpoint is gone, the lowest of those that are there.
    shutil.rmtree(folder / f"checkpoint-{best}")
    shutil.copytree(folder / "checkpoint-5", folder / "checkpoint-4")
    state = json.loads((folder / "checkpoint-5" / artifacts.RESUME_STATE).read_text())
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=folder), state=SimpleNamespace(**state))
    rest = min(lines[3:], key=lambda line: line["eval_loss"])["step"]
    assert MultiTaskTrainer.best_checkpoint.fget(trainer) == folder / f"checkpoint-{rest}"
    trainer.state.log_history = [{"step": step, "eval_loss": 1.0} for step in (4, 5)]
    assert MultiTaskTrainer.best_checkpoint.fget(trainer) == folder / "checkpoint-4", "of equal ones the first"


@pytest.mark.slow
def test_the_last_checkpoint_has_a_validation_loss_too(train, capsys):
    folder = train("run", max_steps=3, save_step=2, val_set_size=8)
    assert [line["step"] for line in log_lines(folder) if "eval_loss" in line] == [2, 3]
    assert "lowest" not in capsys.readouterr().err


def test_a_run_that_is_resumed_keeps_the_held_out_examples_and_the_order_that_it_began_with(train, edit_json, capsys):
    folder = train("run", max_steps=2, save_step=1, val_set_size=9)
    first, drawn = checkpoints(folder)[0], capsys.readouterr().err
    assert (data_plan(None), data_plan(first)) == ((None, True), (CANDIDATES, True))
    # As an earlier version wrote it.
    edit_json(folder / artifacts.RUN_CONFIG, step_choices=None, held_out_by_task=None)
    assert data_plan(first) == (OLD_CANDIDATES, False)
    train("run", max_steps=2, save_step=1, val_set_size=9, resume_from_checkpoint=str(first))
    written = json.loads((folder / artifacts.RUN_CONFIG).read_text())
    assert (written["step_choices"], written["held_out_by_task"]) == (OLD_CANDIDATES, False)
    counts = [re.search("held out: .*", text)[0] for text in (drawn, capsys.readouterr().err)]
    assert counts[0] != counts[1]


def test_a_run_that_resumes_from_an_earlier_checkpoint_gives_up_the_later_ones(train):
    folder = train("run", max_steps=4, save_step=1, save_total_limit=0)
    whole = weights(folder)
    earlier = str(folder / "checkpoint-2")
    train("run", max_steps=4, save_step=4, save_total_limit=0, resume_from_checkpoint=earlier)
    assert [path.name for path in checkpoints(folder)] == [f"checkpoint-{step}" for step in (1, 2, 4)]
    assert_equal(whole, weights(folder))


def test_a_task_that_no_step_takes_an_example_of_is_untrained(train, few, capsys):
    folder = train("few", **few, max_steps=1, batch_size=1, save_step=0)
    untrained = read_config(folder).provenance_config.untrained_tasks
    assert len(untrained) == 2 and "rain" in untrained, "a step of one example is of one task"
    assert f"no training examples of {', '.join(untrained)} in these steps" in capsys.readouterr().err


@pytest.mark.slow
def test_training_on_inputs_puts_loss_on_the_prompt(train):
    answers, everything = train("answers", max_steps=1), train("everything", max_steps=1, train_on_inputs=True)
    assert losses(answers) != losses(everything)


# ---- what is refused ----


@pytest.mark.slow
def test_what_a_run_resumes_with_is_compared_by_what_decides_its_weights(train, tiny_base, records_file, tmp_path):
    base, data = shutil.copytree(tiny_base, tmp_path / "base"), shutil.copy(records_file, tmp_path / "train.json")
    tasks = COMMONSENSE.to_json()
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    places = {"base_model": str(base), "data_path": str(data), "tasks_file": str(tmp_path / "tasks.json")}
    folder = train("run", **places, save_step=2, max_steps=2, weight_decay=0.1)
    before = json.loads((folder / "run.json").read_text())

    def resume(**flags) -> None:
        (folder / "run.json").write_text(json.dumps(before))
        common = {"save_step": 2, "max_steps": 2, "weight_decay": 0.1, "resume_from_checkpoint": "True"}
        train("run", **{**places, **common, **flags})

    def refused(fact: str, **flags) -> None:
        for check in (True, False):
            with pytest.raises(UserError, match=f"cannot be resumed.*{fact}"):
                resume(check=check, **flags)

    # Another title, another place, and a flag that a later version added change nothing.
    tasks["tasks"][0]["title"] = "Another title"
    tasks["columns"].reverse()
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    del before["settings"]["sampling_temperature"]
    resume(save_step=1, logging_steps=3, data_path=str(shutil.copy(data, tmp_path / "copy.json")))
    resume(reuse_prefix="never")  # which auto came to, beside dropout
    refused("shared prompt prefixes", reuse_prefix="always")
    refused(r"sampling_temperature 1\.0 -> 2\.0", sampling_temperature=2.0)
    refused(r"learning_rate 0\.01 -> 0\.5; lora_r 8 -> 4", learning_rate=0.5, lora_r=4)
    no_decay = before.pop("no_decay")  # as in a run of a version that decayed everything
    refused("the parameters without weight decay")
    before["no_decay"] = no_decay
    (tmp_path / "tasks.json").write_text(
        json.dumps(tasks | {"tasks": [tasks["tasks"][0] | {"weight": 2}, *tasks["tasks"][1:]]})
    )
    refused("the tasks' loss weights")
    tasks["tasks"][0]["options"].append("maybe")
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    refused("the tasks")
    tokenizer = (base / "tokenizer.json").read_text()
    (base / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer) | {"normalizer": {"type": "Lowercase"}}))
    refused("the examples' tokens", tasks_file=None)
    (base / "tokenizer.json").write_text(tokenizer)
    Path(data).write_text(Path(records_file).read_text().replace("a", "e", 1))
    refused("the data file", tasks_file=None)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"transformers_version": "5.0"}))
    refused("the data file", tasks_file=None)
    (base / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.5}))
    refused("the base model's configuration", tasks_file=None)
    (base / "config.json").write_text(json.dumps(settings))
    state = load_file(base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, base / "model.safetensors", {"format": "pt"})
    refused("the base model's files")


def test_a_resume_state_that_is_not_whole_is_refused_and_later_checkpoints_stay(train, tmp_path):
    folder = train("run", max_steps=3, save_step=1, save_total_limit=0)
    first, whole = folder / "checkpoint-1", shutil.copytree(folder / "checkpoint-1", tmp_path / "whole")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "mtl_lora.safetensors"):
        for damage in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-100])):
            damage(first / name)
            for check in (True, False):
                with pytest.raises(UserError, match=name):
                    train("run", max_steps=3, save_step=1, resume_from_checkpoint=str(first), check=check)
            assert [path.name for path in checkpoints(folder)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
            shutil.copy(whole / name, first / name)
    train("run", max_steps=3, save_step=1, resume_from_checkpoint=str(first))


@pytest.mark.parametrize(
    ("name", "text"),
    [("run.json", "{}"), ("run.json", '{"lr": 1}'), ("train_log.jsonl", "{}"), ("tensorboard/events", "{}")],
)
def test_what_another_program_wrote_is_not_deleted(train, tmp_path, name, text):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(UserError, match=f"holds {name.split('/')[0]}, which no training wrote"):
        train("run", max_steps=1)
    elsewhere = str(train("elsewhere", max_steps=2, save_step=1) / "checkpoint-1")
    with pytest.raises(UserError, match=f"holds {name.split('/')[0]}, which no training wrote"):
        train("run", max_steps=2, save_step=1, resume_from_checkpoint=elsewhere)
    assert path.read_text() == text


def test_a_flipped_bit_in_the_resume_state_is_refused(train):
    checkpoint = train("run", max_steps=2, save_step=1) / "checkpoint-1"
    path = checkpoint / "optimizer.pt"
    with zipfile.ZipFile(path) as opened:
        largest = max(opened.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 300] ^= 1  # a number of a moment; torch.load would read it without a word
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"missing or damaged resume state \(optimizer\.pt\)"):
        train("run", max_steps=2, save_step=1, resume_from_checkpoint=str(checkpoint), check=True)


def test_a_run_without_memory_for_its_activations_resumes_with_gradient_checkpointing(train):
    folder = train("run", max_steps=3, save_step=1)
    before, middle = weights(folder), str(folder / "checkpoint-1")
    train("run", max_steps=3, save_step=1, use_gradient_checkpointing=True, resume_from_checkpoint=middle)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(folder).items())


def test_a_folder_that_holds_a_run_is_refused_unless_it_is_to_be_overwritten(train):
    folder = train("run", max_steps=1)
    with pytest.raises(UserError, match="already holds a run"):
        train("run", max_steps=1)
    before = weights(folder)
    train("run", max_steps=1, seed=5, overwrite_output_dir=True)
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(folder).items())
    with pytest.raises(UserError, match="contradict"):
        train("run", overwrite_output_dir=True, resume_from_checkpoint="True")


def test_resuming_without_a_checkpoint_is_refused(train, tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint"):
        train("new", resume_from_checkpoint="True")
    with pytest.raises(UserError, match="no resume state"):
        train("new", resume_from_checkpoint=str(tmp_path))


def test_checkpoint_of_another_run_is_not_resumed_whatever_lies_beside_it(train):
    folder = train("run", max_steps=1, save_step=1, seed=1)
    run = json.loads((folder / "run.json").read_text())
    run["settings"]["seed"] = 2  # as if a second run had written its own over it
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match="seed 1 -> 2"):
        train("run", max_steps=1, save_step=1, seed=2, resume_from_checkpoint="True")
    (folder / "run.json").write_text(json.dumps(run | {"base_fingerprint": "other", "tasks": None}))
    train("run", max_steps=1, save_step=1, seed=1, resume_from_checkpoint="True", check=True)


def test_run_that_is_resumed_at_its_end_takes_no_further_step(train):
    flags = {"max_steps": 2, "save_step": 2, "lr_scheduler_type": "constant_with_warmup"}
    folder = train("run", **flags)
    before, lines = weights(folder), log_lines(folder)
    train("run", **flags, resume_from_checkpoint="True")
    assert_equal(before, weights(folder))
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"] and log_lines(folder) == lines


def test_folder_without_anything_saved_is_free(train):
    folder = train("run", max_steps=1)
    for name in (artifacts.CHECKPOINT_CONFIG, artifacts.CHECKPOINT_WEIGHTS, artifacts.ADAPTER_ANALYSIS):
        (folder / name).unlink()  # as a kill before the first checkpoint leaves it
    (folder / ".saving" / "checkpoint-1").mkdir(parents=True)
    train("run", max_steps=1, seed=3)
    assert losses(folder) and len(losses(folder)) == 1 and not (folder / ".saving").exists()


def test_second_training_of_a_folder_is_refused_and_changes_nothing(train, tmp_path):
    with files.claimed(tmp_path / "run"), pytest.raises(UserError, match=r"run is in use"):
        train("run", max_steps=1)
    assert not (tmp_path / "run").exists()


def test_disk_without_room_for_the_adapter_is_refused_before_the_first_step(train, tmp_path, monkeypatch):
    def full(folder, size):
        raise UserError(f"{folder} lacks room for {size}")

    monkeypatch.setattr(files, "reserved", full)
    with pytest.raises(UserError, match="lacks room"):
        train("run", max_steps=1)
    assert not (tmp_path / "run" / artifacts.TRAIN_LOG).exists()


def test_no_room_is_asked_for_a_checkpoint_after_the_last_step(train, monkeypatch):
    asked = []
    monkeypatch.setattr(files, "reserved", lambda folder, size: asked.append(size))
    train("run", max_steps=2, save_step=1)
    assert asked[0] == asked[1] > asked[2] > 2**20  # at the start, after the first checkpoint, after the last


def test_resuming_another_run_leaves_the_folder_of_this_one(train, tmp_path):
    one = train("one", max_steps=1, save_step=1)
    other = shutil.copytree(one, tmp_path / "other")
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"other holds a run that .*one/checkpoint-1 does not belong to"):
        train("other", max_steps=2, save_step=1, resume_from_checkpoint=str(one / "checkpoint-1"))
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before


def test_checking_stops_before_anything_is_written(train, tmp_path):
    train("run", check=True)
    assert not (tmp_path / "run").exists()


def test_a_target_module_that_does_not_exist_is_refused_with_those_that_do(train):
    with pytest.raises(UserError, match=r"lora_target_modules.*'query'.*q_proj"):
        train("run", lora_target_modules=["query"])


@pytest.mark.parametrize("targets", [["q_prj", ".*v_proj"], ["q_proj", ".*v_prj"], ["all-linear", "q_proj"]], ids=str)
def test_each_of_several_targets_must_find_a_layer(train, targets):
    with pytest.raises(UserError, match=r"q_prj|\.\*v_prj|all-linear alone"):
        train("run", lora_target_modules=targets)


def test_names_and_expressions_may_stand_together(train, tmp_path):
    folder = train("run", lora_target_modules=["q_proj", r".*\.(up|down)_proj"], max_steps=1)
    names = {name.split(".")[-2] for name in load_file(folder / "mtl_lora.safetensors")}
    assert names == {"q_proj", "up_proj", "down_proj"}


def test_an_output_folder_that_cannot_be_written_is_refused(train, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train("file/run")


def test_counting_names_a_missing_base_model_and_an_unknown_target(tiny_base, tmp_path):
    with pytest.raises(UserError, match="elbow_proj"):
        TrainConfig(base_model=tiny_base, lora_target_modules=["elbow_proj"]).count()
    with pytest.raises(UserError, match="nowhere"):
        TrainConfig(base_model=str(tmp_path / "nowhere")).count()


@pytest.mark.parametrize(
    "flags, facts",
    [
        ({"batch_size": "auto"}, ("batch_size", "'auto'", "--token_budget")),
        ({"token_budget": 2048, "sampling_temperature": 2.0}, ("--token_budget", "--sampling_temperature")),
        ({"token_budget": 2048, "length_pool": 1}, ("--token_budget", "--length_pool")),
    ],
    ids=["auto", "budget and temperature", "budget and pool"],
)
def test_flags_that_cannot_be_combined_are_refused(flags, facts):
    with pytest.raises(UserError) as caught:
        TrainConfig(**flags)
    assert all(fact in str(caught.value) for fact in facts)


def test_the_mean_loss_of_a_resumed_run_is_of_its_own_steps(train):
    flags = {"max_steps": 4, "save_step": 3, "logging_steps": 1}
    folder = train("run", **flags)
    again = train("again", **flags, resume_from_checkpoint=str(folder / "checkpoint-3"))
    for run_folder, steps in ((folder, 4), (again, 1)):
        (mean,) = [line["train_loss"] for line in log_lines(run_folder) if "train_loss" in line]
        assert mean == pytest.approx(sum(losses(run_folder)) / steps, rel=1e-3) and len(losses(run_folder)) == steps


def test_a_part_of_an_epoch_trains_the_tasks_that_its_steps_take(train, few):
    folder = train("half", **few, num_epochs=0.5, max_steps=-1, batch_size=1)
    met = {key for line in log_lines(folder) for key in line if key.startswith("loss/")}
    assert len(losses(folder)) == 7 and "loss/mood" in met
    untrained = read_config(folder).provenance_config.untrained_tasks
    assert untrained == [name for name in ("mood", "sport", "rain") if f"loss/{name}" not in met]


def test_a_run_whose_base_model_was_moved_is_resumed(train, tiny_base, tmp_path):
    moved = shutil.copytree(tiny_base, tmp_path / "elsewhere")
    folder = train("run", max_steps=1, save_step=1)
    flags = {"max_steps": 2, "base_model": str(moved), "resume_from_checkpoint": "True"}
    with pytest.raises(UserError, match=r"\(max_steps 1 -> 2\)"):
        train("run", **flags, save_step=1)
    flags["max_steps"] = 1
    assert train("run", **flags, save_step=1) == folder
    other = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(other | {"rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match="the base model's configuration"):
        train("run", **flags, save_step=1)


@pytest.mark.parametrize(
    ("key", "value", "fact"),
    [("world_size", 2, "the number of devices"), ("dtype", "torch.float16", "the dtype that --dtype auto selects")],
)
def test_a_run_on_another_machine_that_would_go_on_otherwise_is_not_resumed(train, edit_json, key, value, fact):
    folder = train("run", max_steps=1, save_step=1)
    edit_json(folder / "run.json", **{key: value})
    flags = {"max_steps": 1, "save_step": 1, "resume_from_checkpoint": "True"}
    with pytest.raises(UserError, match=f"cannot be resumed.*{fact}"):
        train("run", **flags)
    if key == "dtype":  # of an earlier version, which did not record it
        edit_json(folder / "run.json", dtype=None)
        train("run", **flags, check=True)


def test_a_check_in_one_process_does_not_compare_the_number_of_devices(train, edit_json):
    folder = train("run", max_steps=1, save_step=1)
    edit_json(folder / "run.json", world_size=2)
    for rank in (0, 1):
        shutil.copy(folder / "checkpoint-1" / "rng_state.pth", folder / "checkpoint-1" / f"rng_state_{rank}.pth")
    flags = {"max_steps": 1, "save_step": 1, "resume_from_checkpoint": "True", "check": True}
    train("run", **flags)
    (folder / "checkpoint-1" / "rng_state_1.pth").unlink()  # without it the second process would draw other masks
    with pytest.raises(UserError, match=r"missing or damaged resume state \(rng_state_1\.pth\)"):
        train("run", **flags)


@pytest.mark.parametrize(("stage", "models", "optimisers"), [(0, 1, 0), (2, 1, 2), (3, 2, 2)])
def test_every_file_of_a_deepspeed_state_must_be_there(train, edit_json, tmp_path, stage, models, optimisers):
    folder = train("run", max_steps=1, save_step=1)
    edit_json(folder / "run.json", world_size=2)
    saved, settings = folder / "checkpoint-1", tmp_path / "settings.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    names = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(models)]
    names += [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(optimisers)]
    (saved / "global_step1").mkdir()
    (saved / "latest").write_text("global_step1\n")
    for path in [*(saved / f"rng_state_{rank}.pth" for rank in (0, 1)), *(saved / "global_step1" / n for n in names)]:
        shutil.copy(saved / "scheduler.pt", path)
    (saved / "optimizer.pt").unlink()
    check_state(saved, str(settings))
    for name in names:
        whole = (saved / "global_step1" / name).rename(tmp_path / name)
        with pytest.raises(UserError, match=r"missing or damaged resume state \(global_step1/.*states\.pt\)"):
            check_state(saved, str(settings))
        whole.rename(saved / "global_step1" / name)


def test_a_file_or_folder_counts_as_the_same_only_where_its_content_is_known(train, edit_json):
    """The DeepSpeed configuration and the base model, which may be at other paths."""
    folder = train("run", max_steps=1, save_step=1)
    run = json.loads((folder / "run.json").read_text())

    def resume(flag: str, key: str, digest: str | None) -> None:
        settings = {**run["settings"], flag: "elsewhere"}
        check_same_run(folder / "checkpoint-1", {**run, "settings": settings, key: digest}, TrainConfig, lambda _: {})

    resume("base_model", "base_fingerprint", run["base_fingerprint"])
    edit_json(folder / "run.json", deepspeed_sha256="1")
    resume("deepspeed", "deepspeed_sha256", "1")
    for flag, key in (("base_model", "base_fingerprint"), ("deepspeed", "deepspeed_sha256")):
        for digest in (None, "2"):
            with pytest.raises(UserError, match=f"cannot be resumed.*{flag} .* -> 'elsewhere'"):
                resume(flag, key, digest)


def test_a_run_goes_on_from_its_last_checkpoint_and_one_that_is_overwritten_keeps_none(train):
    folder = train("run", max_steps=3, save_step=1, save_total_limit=0)
    config = TrainConfig(output_dir=str(folder), resume_from_checkpoint="True")
    assert checkpoint_to_resume(config) == folder / "checkpoint-3"
    (folder / artifacts.TENSORBOARD).mkdir()
    train("run", max_steps=1, save_step=0, overwrite_output_dir=True)
    assert not checkpoints(folder) and not (folder / artifacts.TENSORBOARD).exists()


# ---- trained further ----


@pytest.mark.slow
def test_a_training_goes_on_from_another_adapter_with_a_new_task(train, tmp_path, capsys):
    def tasks_file(*names: str) -> str:
        path = tmp_path / f"{len(names)}.json"
        path.write_text(json.dumps({"tasks": [{"name": name, "id": index} for index, name in enumerate(names)]}))
        return str(path)

    def data_file(*names: str) -> str:
        path = tmp_path / f"{len(names)}_data.json"
        rows = [{"instruction": f"{name} {i}", "output": name, "task": name} for name in names for i in range(8)]
        path.write_text(json.dumps(rows))
        return str(path)

    first = train("first", tasks_file=tasks_file("moods", "tides"), data_path=data_file("moods", "tides"), max_steps=6)
    flags = {"tasks_file": tasks_file("birds", "tides", "moods"), "data_path": data_file("birds", "tides", "moods")}
    flags |= {"start_from": str(first), "learning_rate": 1e-9, "save_step": 1, "max_steps": 2}
    capsys.readouterr()
    second = train("second", **flags)
    assert f"started from {first}; new tasks: birds" in capsys.readouterr().err
    before, after = weights(first), weights(second)
    for name, tensor in before.items():
        found = after[name][[2, 1]] if name.endswith(("lora_w", "lora_lambda")) else after[name]
        assert torch.allclose(found, tensor, atol=1e-7) and len(after[name]) == len(tensor) + (found is not after[name])
    assert losses(second)[0] < losses(first)[0]
    alone = train("third", **flags | {"max_steps": 2})
    plain = train("plain", **flags | {"start_from": None}) / "checkpoint-1"
    shutil.rmtree(alone / "checkpoint-2")
    assert_equal(weights(train("third", **flags, resume_from_checkpoint="True")), after)
    with pytest.raises(UserError, match="the weights in --start_from"):
        train("third", **flags | {"start_from": None}, resume_from_checkpoint=str(alone / "checkpoint-1"))
    with pytest.raises(UserError, match="start_from None -> "):
        train("first", **{**flags, "output_dir": str(tmp_path / "plain")}, resume_from_checkpoint=str(plain))
    capsys.readouterr()
    kept = train("kept", **flags | {"data_path": data_file("birds"), "save_step": 0})
    assert "no training examples of tides, moods: what only these tasks use stays" in capsys.readouterr().err
    assert checkpoint.read_config(kept).provenance_config.untrained_tasks == []
    for other, words in (
        ({"adapter_name": "lora"}, "method mtl_lora, not lora"),
        ({"output_dir": str(first), "overwrite_output_dir": True}, "is in --output_dir"),
        ({"start_from": str(tmp_path)}, "not an MTL-LoRA checkpoint"),
    ):
        with pytest.raises(UserError, match=words):
            train("fourth", **flags | other)
    assert not (tmp_path / "fourth").exists()
