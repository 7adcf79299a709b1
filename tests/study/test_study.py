"""A whole study on a tiny model: from its command to the table, killed in the middle or not, started again or not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from shared import PROJECT
from study_cases import dev_set, is_locked, wait_for, write_grid

from mtl_lora import cli
from mtl_lora.errors import UserError
from mtl_lora.language.config import EvalConfig, TrainConfig
from mtl_lora.study.__main__ import main
from mtl_lora.study.commands import Commands
from mtl_lora.version import checkout_commit

STEPS = 12


@pytest.fixture(scope="module")
def grid_file(tmp_path_factory, tiny_base, cache_dir) -> Path:
    """Two methods with two seeds, a searched learning rate for one of them."""
    folder = tmp_path_factory.mktemp("grid")
    value = {
        "name": "tiny",
        "about": "A tiny study.",
        "seeds": [0, 1],
        "baseline": "LoRA",
        "train_records": 8,
        "test_records": 4,
        "train": {
            "base_model": tiny_base,
            "data_path": "data/quickstart/train.json",
            "cache_dir": cache_dir,
            "dtype": "fp32",
            "lora_r": 2,
            "batch_size": 8,
            "max_steps": STEPS,
            "save_step": 4,
            "logging_steps": 1,
        },
        "evaluate": {"data_dir": "data/quickstart/test", "mode": "score", "dtype": "fp32", "tasks": ["boolq", "piqa"]},
        "search": {"values": [0.01, 0.03], "data_dir": dev_set(folder), "records": 4, "train": {"max_steps": 2}},
        "experiments": [
            {"name": "LoRA", "train": {"adapter_name": "lora", "learning_rate": 0.02}},
            {"name": "MTL-LoRA", "train": {"adapter_name": "mtl_lora"}},
        ],
    }
    return write_grid(folder, value)


def in_this_process(commands, command, output) -> int:
    """What ``Commands.start`` does, without the seconds that a new process takes to import torch."""
    from mtl_lora.language.evaluate import run as evaluate
    from mtl_lora.language.train import run as train

    words = command[2:]
    if command[1] == "finetune.py":
        train(cli.parse(TrainConfig, words, ""))
    else:
        evaluate(cli.parse(EvalConfig, words, ""))
    return 0


@pytest.fixture(scope="module")
def study(grid_file):
    """Run the study here: ``study(folder, flag, ...)``."""

    def start(folder: Path, *flags: str) -> None:
        main(["--grid", str(grid_file), "--output_dir", str(folder), *flags])

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(PROJECT)
        patch.setattr(Commands, "start", in_this_process)
        yield start


@pytest.fixture(scope="module")
def undisturbed(study, tmp_path_factory) -> Path:
    """The folder of the study that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "study"
    study(folder)
    return folder


def figures(folder: Path) -> dict:
    """What a study found, without its times and places."""
    value = json.loads((folder / "study.json").read_text())
    for experiment in value["experiments"]:
        for run in experiment["runs"]:
            for key in ("seconds", "starts", "commands"):
                del run[key]
    for experiment in value["search"]["experiments"]:
        for candidate in experiment["candidates"]:
            del candidate["commands"]
    return value


def test_table_is_of_every_experiment_seed_and_choice(undisturbed):
    value = figures(undisturbed)
    assert [[run["seed"] for run in experiment["runs"]] for experiment in value["experiments"]] == [[0, 1], [0, 1]]
    assert all(run["steps"] == STEPS for experiment in value["experiments"] for run in experiment["runs"])
    lora, mtl_lora = value["experiments"]
    (search,) = value["search"]["experiments"]
    assert (lora["learning_rate"], mtl_lora["learning_rate"]) == (0.02, search["chosen"])
    assert len(search["candidates"]) == 2
    adapters = {run["adapter_sha256"] for experiment in value["experiments"] for run in experiment["runs"]}
    assert len(adapters) == 4
    assert "| MTL-LoRA - LoRA " in (undisturbed / "table.md").read_text()


def test_killed_study_goes_on_to_the_same_table(undisturbed, study, grid_file, tmp_path, capsys):
    folder = tmp_path / "study"
    words = [sys.executable, "-m", "mtl_lora.study", "--grid", str(grid_file), "--output_dir", str(folder)]
    source = os.pathsep.join([str(PROJECT / "src"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [*words, "--only", "LoRA"], cwd=PROJECT, env={**os.environ, "PYTHONPATH": source}, start_new_session=True
    )
    run = folder / "runs" / "lora" / "seed0"
    wait_for(lambda: list(run.glob("checkpoint-*/trainer_state.json")) or process.poll() is not None)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not is_locked(folder))  # the training is gone too
    assert not (run / "mtl_lora.safetensors").exists() and not (folder / "table.md").exists()
    study(folder)
    assert json.loads((run / "job.json").read_text())["train"]["starts"] == 2
    assert (folder / "table.md").read_text() == (undisturbed / "table.md").read_text()
    assert figures(folder) == figures(undisturbed)
    # Everything is finished now: nothing is trained or asked again.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    capsys.readouterr()
    study(folder)
    assert capsys.readouterr().out.splitlines() == [f"tiny: 6 runs, 6 of them finished, in {folder}"]
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_changed_recipe_is_refused_before_anything_starts_and_made_anew_when_told(
    undisturbed, study, grid_file, tmp_path, capsys
):
    value = json.loads(grid_file.read_text())
    value["experiments"][0]["train"]["lora_alpha"] = 4
    changed = write_grid(tmp_path, value)
    with pytest.raises(SystemExit) as stop:
        main(["--grid", str(changed), "--output_dir", str(undisturbed)])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "runs/lora/seed0 was made by another recipe (train.lora_alpha not given -> 4)" in told
    assert "--overwrite True" in told


def test_more_questions_are_asked_of_the_adapters_there_are(undisturbed, study, grid_file, tmp_path, capsys):
    folder = tmp_path / "study"
    shutil.copytree(undisturbed, folder)
    changed = write_grid(tmp_path, json.loads(grid_file.read_text()) | {"test_records": 6})
    weights = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    main(["--grid", str(changed), "--output_dir", str(folder), "--overwrite", "True"])
    assert weights == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert f"tiny: 6 runs, 2 of them finished, in {folder}" in capsys.readouterr().out
    before = {run["folder"]: run for experiment in figures(undisturbed)["experiments"] for run in experiment["runs"]}
    for experiment in figures(folder)["experiments"]:
        for run in experiment["runs"]:
            assert [score["n"] for score in run["tasks"].values()] == [6, 6]
            assert run["adapter_sha256"] == before[run["folder"]]["adapter_sha256"]
            assert run["train_commit"] == before[run["folder"]]["train_commit"] == checkout_commit()
            predictions = folder / run["folder"] / "predictions" / "boolq.jsonl"
            assert len(predictions.read_text().splitlines()) == 6


def test_check_starts_nothing_and_names_what_would_run(study, tmp_path, capsys):
    study(tmp_path / "study", "--check", "True")
    said = capsys.readouterr().out
    assert "MTL-LoRA; runs: 2, trained weights, M (%): 0.00" in said and "every recipe is fine; 6 runs" in said
    assert "search of learning_rate for MTL-LoRA: 0.01, 0.03; runs: 2" in said
    assert not (tmp_path / "study").exists()


def test_study_outside_the_projects_folder_is_one_sentence(study, tmp_path, monkeypatch):
    from mtl_lora.study.run import run
    from mtl_lora.study.settings import StudyConfig

    grid = tmp_path / "grid.json"
    grid.write_text(json.dumps({**json.loads((PROJECT / "script/grids/quickstart.json").read_text())}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"in the project's folder, where finetune\.py lies"):
        run(StudyConfig(grid=str(grid)))


@pytest.mark.parametrize(
    ("launcher", "flags", "sentence"),
    [
        ("torchrun --nproc_per_node 2", {"parallel": 2}, "--parallel is for runs of one process"),
        ("python", {"parallel": 0}, "parallel must be at least 1, not 0"),
    ],
)
def test_runs_side_by_side_are_of_one_process_each(grid_file, tmp_path, monkeypatch, launcher, flags, sentence):
    from mtl_lora.study.run import run
    from mtl_lora.study.settings import StudyConfig

    monkeypatch.chdir(PROJECT)
    grid = write_grid(tmp_path, {**json.loads(grid_file.read_text()), "launcher": launcher})
    with pytest.raises(UserError, match=sentence):
        run(StudyConfig(grid=str(grid), output_dir=str(tmp_path / "study"), **flags))
    assert not (tmp_path / "study").exists()
