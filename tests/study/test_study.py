"""A whole study on a tiny model through the real commands: killed, resumed, started again, changed."""

import json
import shutil
from pathlib import Path

import pytest
from shared import PROJECT
from study_cases import dev_set, write_grid

from mtl_lora import cli
from mtl_lora.report.load import Study
from mtl_lora.study import runner
from mtl_lora.training.trainer import MultiTaskTrainer
from mtl_lora.version import checkout_commit

STEPS = 8


@pytest.fixture(scope="module")
def grid_file(tmp_path_factory, tiny_base, cache_dir) -> Path:
    """LoRA with two seeds, MTL-LoRA with one and a searched learning rate."""
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
            "data_path": str(PROJECT / "data/quickstart/train.json"),
            "cache_dir": cache_dir,
            "dtype": "fp32",
            "lora_r": 2,
            "batch_size": 4,
            "max_steps": STEPS,
            "save_step": 2,
            "logging_steps": 1,
        },
        "evaluate": {
            "data_dir": str(PROJECT / "data/quickstart/test"),
            "mode": "score",
            "dtype": "fp32",
            "tasks": ["boolq", "piqa"],
        },
        "search": {
            "values": [0.03, 0.1],
            "data_dir": dev_set(folder),
            "records": 4,
            "widen": 1,
            "train": {"max_steps": 2},
        },
        "experiments": [
            {"name": "LoRA", "train": {"adapter_name": "lora", "learning_rate": 0.02}},
            {"name": "MTL-LoRA", "train": {"adapter_name": "mtl_lora"}, "seeds": [1]},
        ],
    }
    return write_grid(folder, value)


def in_this_process(command, output, slot):
    """What ``runner.until_done`` does, without the seconds that a new process takes to import torch."""
    assert command[:3] == ["python", "-m", "mtl_lora"]
    yield
    cli.main(command[3:])
    return 0


@pytest.fixture(scope="module")
def study(grid_file):
    """Run the study here: ``study(folder, flag, ...)``."""

    def start(folder: Path, *flags: str, grid: Path = grid_file) -> None:
        cli.main(["study", "--grid", str(grid), "--output_dir", str(folder), *flags])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "until_done", in_this_process)
        yield start


@pytest.fixture(scope="module")
def undisturbed(study, tmp_path_factory) -> Path:
    """The folder of the study that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "study"
    study(folder)
    return folder


def numbers(folder: Path) -> dict:
    """What a study found, without its times and places."""
    value = Study.load(folder).to_json()
    for experiment in value["experiments"]:
        for run in experiment["runs"]:
            for key in ("seconds", "starts", "commands"):
                del run[key]
    return value


def weights(folder: Path) -> dict[Path, int]:
    """When each adapter of a study was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


@pytest.mark.slow
def test_table_is_of_every_experiment_seed_and_choice(undisturbed):
    found = Study.load(undisturbed)
    assert [[run.seed for run in experiment.runs] for experiment in found.experiments] == [[0, 1], [1]]
    assert all(run.steps == STEPS and run.train_commit == checkout_commit() for run in found.runs)
    lora, mtl_lora = found.experiments
    (search,) = found.search.experiments
    assert (lora.learning_rate, mtl_lora.learning_rate) == (0.02, search.chosen)
    assert len(search.candidates) == 3 and len({run.adapter_sha256 for run in found.runs}) == 3
    assert "| MTL-LoRA - LoRA " in (undisturbed / "table.md").read_text()


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.slow
def test_killed_study_resumes_to_the_same_numbers(undisturbed, study, monkeypatch, tmp_path, capsys):
    """Ended after a training's second checkpoint; what a kill leaves of a training and of a study's processes, the
    tests of those two kill for."""
    folder, save, saved = tmp_path / "study", MultiTaskTrainer._save_checkpoint, []

    def killed_after_the_second(self, *arguments):
        save(self, *arguments)
        saved.append(self)
        if len(saved) == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MultiTaskTrainer, "_save_checkpoint", killed_after_the_second)
        study(folder, "--only", "LoRA")
    run = folder / "runs" / "lora" / "seed0"
    assert not (run / "mtl_lora.safetensors").exists() and not (folder / "table.md").exists()
    study(folder, "--only", "LoRA")
    assert json.loads((run / "job.json").read_text())["starts"] == {"train": 2, "evaluate": 1}
    assert numbers(folder)["experiments"][0] == numbers(undisturbed)["experiments"][0]
    # Everything is finished now: nothing is trained or asked again.
    before = weights(folder)
    capsys.readouterr()
    study(folder, "--only", "LoRA")
    (line,) = capsys.readouterr().out.splitlines()
    assert "2 jobs, 2 of them finished" in line and before == weights(folder)


@pytest.mark.slow
def test_changed_configuration_is_refused_before_anything_starts(undisturbed, study, grid_file, tmp_path, capsys):
    value = json.loads(grid_file.read_text())
    value["experiments"][0]["train"]["lora_alpha"] = 4
    with pytest.raises(SystemExit) as stop:
        study(undisturbed, grid=write_grid(tmp_path, value))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert all(fact in error for fact in ("runs/lora/seed0", "train.lora_alpha 16.0 -> 4", "--overwrite"))


@pytest.mark.slow
def test_more_questions_are_asked_of_the_adapters_there_are(undisturbed, study, grid_file, tmp_path, capsys):
    folder = tmp_path / "study"
    shutil.copytree(undisturbed, folder)
    changed = write_grid(tmp_path, json.loads(grid_file.read_text()) | {"test_records": 6})
    before = weights(folder)
    study(folder, "--overwrite", grid=changed)
    assert weights(folder) == before
    assert "6 jobs, 3 of them finished" in capsys.readouterr().out
    adapters = {run.folder: run.adapter_sha256 for run in Study.load(undisturbed).runs}
    for run in Study.load(folder).runs:
        assert [result.n for result in run.tasks.values()] == [6, 6]
        assert run.adapter_sha256 == adapters[run.folder] and run.train_commit == checkout_commit()
        assert len((folder / run.folder / "predictions" / "boolq.jsonl").read_text().splitlines()) == 6


def test_check_starts_nothing_and_names_what_would_run(study, tmp_path, capsys):
    study(tmp_path / "study", "--check")
    text = capsys.readouterr().out
    assert "MTL-LoRA; jobs: 1, trainable parameters, M (%): 0.00" in text and "5 jobs in" in text
    assert "search of learning_rate for MTL-LoRA: 0.03, 0.1; jobs: 2" in text
    assert "python -m mtl_lora train --base_model" in text and not (tmp_path / "study").exists()


@pytest.mark.slow
def test_report_starts_nothing_and_writes_the_same_again(undisturbed, study, tmp_path, capsys):
    folder = tmp_path / "study"
    shutil.copytree(undisturbed, folder)
    (folder / "table.md").unlink()
    study(folder, "--report")
    assert (folder / "table.md").read_text() == (undisturbed / "table.md").read_text()
    with pytest.raises(SystemExit):
        study(tmp_path / "empty", "--report")
    assert "no run in" in capsys.readouterr().err
