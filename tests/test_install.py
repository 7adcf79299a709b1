"""What a user does first: the quick start in the checkout, and the installed wheel far from any checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from shared import PROJECT

from mtl_lora.results import Results

pytestmark = pytest.mark.slow(20)


def done(*command, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a command that must succeed; returns what it printed."""
    command = [str(argument) for argument in command]
    found = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment})
    assert found.returncode == 0, f"{' '.join(command)}\n{found.stdout}\n{found.stderr}"
    return found


@pytest.mark.slow(60)
def test_quick_start_trains_the_real_base_model_and_prints_a_table(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    small = {"OUTPUT": str(tmp_path), "MAX_STEPS": "1", "BATCH_SIZE": "1", "TASKS": "boolq,piqa", "LIMIT": "1"}
    found = done("bash", "script/quickstart.sh", cwd=PROJECT, VENV="", PATH=path, **small)
    lines = [line for line in found.stdout.splitlines() if line.startswith("|")]
    for row in ("SmolLM2-135M", "LoRA", "MTL-LoRA"):
        assert [sum(line.startswith(f"| {row} ({mode})") for line in lines) for mode in ("generate", "score")] == [2, 2]
    assert found.stdout.endswith((tmp_path / "table.md").read_text())
    summary = json.loads((tmp_path / "checkpoint" / "train_log.jsonl").read_text().splitlines()[-1])
    assert 0 < summary["train_loss"] < 10
    trainable = [Results.load(tmp_path / run / "score").trainable.adapter for run in ("lora", "mtl_lora")]
    assert trainable[0] == pytest.approx(trainable[1], rel=0.01)
    assert sorted(path.stem for path in (tmp_path / "mtl_lora" / "score" / "predictions").iterdir()) == [
        "boolq",
        "piqa",
    ]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A virtual environment with the wheel, in a folder with a space in its name, inside another git repository."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("a user") / "my project"
    for name in ("src", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
        copy(PROJECT / name, source / name)
    build = "import setuptools.build_meta as build; print(build.build_wheel('wheels'))"
    done(sys.executable, "-c", build, cwd=source, PYTHONPATH="")
    (wheel,) = (source / "wheels").glob("*.whl")
    done(sys.executable, "-m", "venv", "--without-pip", folder / ".venv", cwd=source)
    (site,) = (folder / ".venv").glob("lib/python*/site-packages")
    # The packages that are here, without the project's own editable install, which another .pth file makes.
    (site / "present.pth").write_text(sysconfig.get_paths()["purelib"])
    pip = [sys.executable, "-m", "pip", "--python", folder / ".venv" / "bin" / "python"]
    done(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=source, PYTHONPATH="")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", folder]
    done("git", "init", "-q", folder, cwd=source)
    done(*git, "commit", "-q", "--allow-empty", "-m", "theirs", cwd=source)
    return folder


# What a user types one after another, in one process, for each would import the same packages.
COMMANDS = """
import json, sys
import mtl_lora
from mtl_lora import cli
for command in json.loads(sys.argv[1]):
    cli.main(command)
print(mtl_lora.__file__)
"""


def test_installed_wheel_trains_evaluates_exports_and_draws_a_table(installed, tiny_base):
    folder = installed / ".venv" / "bin"
    assert done(folder / "mtl-lora", "--version", cwd=installed, PYTHONPATH="").stdout.startswith("mtl-lora ")
    options = ["happy", "sad"]
    tasks = [{"name": name, "id": index, "options": options} for index, name in enumerate(("mood", "weather"))]
    (installed / "tasks.json").write_text(json.dumps({"tasks": tasks}))
    rows = [
        {
            "instruction": f"Is this happy or sad: {n}?",
            "output": f"the correct answer is {options[n % 2]}",
            "answer": options[n % 2],
            "task": task["name"],
        }
        for n in range(8)
        for task in tasks
    ]
    (installed / "train.json").write_text(json.dumps(rows))
    for task in tasks:
        (installed / "test" / task["name"]).mkdir(parents=True)
        own = [row for row in rows if row["task"] == task["name"]]
        (installed / "test" / task["name"] / "test.json").write_text(json.dumps(own))

    flags = {"tasks_file": "tasks.json", "data_path": "train.json", "output_dir": "run", "base_model": tiny_base}
    flags |= {"max_steps": 3, "batch_size": 4, "save_step": 0, "dtype": "fp32"}
    commands = [
        ["train", "--system", "language", *(f"--{name}={value}" for name, value in flags.items())],
        ["evaluate", "--checkpoint", "run", "--data_dir", "test", "--mode", "score", "--dtype", "fp32"],
        ["export", "peft", "--checkpoint", "run", "--tasks", "mood", "--output", "peft", "--base_model", tiny_base],
        ["report", "table", "run/evaluation"],
    ]
    found = done(folder / "python", "-c", COMMANDS, json.dumps(commands), cwd=installed, PYTHONPATH="")
    *lines, package = found.stdout.splitlines()
    assert Path(package).is_relative_to(installed / ".venv")
    assert any(line.startswith("|") and "mood" in line for line in lines) and (installed / "peft").is_dir()
    results = json.loads((installed / "run" / "evaluation" / "results.json").read_text())
    assert results["commit"] is None, "the commit of another project must not be given as ours"


def test_installed_wheel_has_the_files_that_are_no_modules(installed):
    (package,) = (installed / ".venv").glob("lib/python*/site-packages/mtl_lora")
    data = {path.relative_to(PROJECT / "src" / "mtl_lora") for path in (PROJECT / "src" / "mtl_lora").rglob("*.*")}
    data = {path for path in data if path.suffix not in (".py", ".pyc")}
    assert {path for path in data if not (package / path).is_file()} == set()
    names = [path.name for path in data]
    assert {"zero2.json", "zero3.json", "commonsense.json", "textclass.json", "textclass_tasks.json"} <= set(names)
