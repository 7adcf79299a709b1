"""A folder with small valid inputs of every command, and commands run on it in this process."""

import contextlib
import dataclasses
import io
import json
import os
import shlex
import shutil
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from shared import PROJECT

FIXTURES = PROJECT / "tests" / "fixtures" / "v1"
TASKS = [{"name": "mood", "id": 0, "options": ["happy", "sad"]}, {"name": "free", "id": 1, "answer_prefix": ""}]
MOOD = {"instruction": "How is it?", "input": "", "output": "the correct answer is sad", "answer": "sad"}
MOOD |= {"task": "mood"}
FREE = {"instruction": "Say hi", "input": "to all", "output": "hi all", "answer": "hi all", "task": "free"}
TALK = {"messages": [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "hi"}], "task": "free"}
GRID = {
    "name": "small",
    "about": "A small study.",
    "seeds": [0, 1],
    "train": {"base_model": "base", "tasks_file": "tasks.json", "data_path": "train.json", "lora_r": 4},
    "evaluate": {"data_dir": "tests", "mode": "score", "tasks": ["mood"]},
    "experiments": [{"name": "Base", "train": None}, {"name": "LoRA", "train": {"adapter_name": "lora"}}],
}
# Flags that every command line here has, unless it gives another value; ``~name`` takes one out.
DEFAULTS = {
    "train": "--base_model=base --tasks_file=tasks.json --data_path=train.json --cache_dir=cache --output_dir=out "
    "--dtype=fp32 --batch_size=1 --check=True",
    "evaluate": "--checkpoint=ck --data_dir=questions --output_dir=out --dtype=fp32 --check=True",
    "predict": "--checkpoint=ck --input=in.jsonl --output=out.jsonl --task=boolq --dtype=fp32 --check=True",
    "export peft": "--checkpoint=ck --output=out",
    "export merge": "--checkpoint=ck --task=boolq --output=out",
    "export import-peft": "--peft=peft --tasks_file=own.json --output=out",
    "export import-original": "--file=original.pt --base_model=base --tasks_file=tasks.json --output=out",
    "study": "--grid=grid.json --output_dir=out --check=True",
}


def make(folder: Path) -> None:
    """Write the folder; "base" and whatever names it are relative, so commands run inside it."""
    import torch

    places = {"base": "base", "checkpoints/mtl_lora": "ck", "checkpoints/dora": "dora", "peft/lora/blank": "peft"}
    places |= {"evaluations/mtl_lora/score": "ev", "evaluations/base/score": "ev0", "study": "study"}
    places |= {"commonsense/questions": "questions"}
    for source, target in places.items():
        shutil.copytree(FIXTURES / source, folder / target)
    shutil.copy(FIXTURES / "own" / "tasks.json", folder / "own.json")
    write(folder / "tasks.json", TASKS)
    write(folder / "train.json", [MOOD, FREE, MOOD])
    write(folder / "tests" / "mood" / "test.json", [MOOD])
    write(folder / "tests" / "free" / "test.json", [FREE])
    write(folder / "in.jsonl", {"instruction": "Is it?"})
    write(folder / "grid.json", GRID)
    shapes = {"lora_A": (1, 2, 32), "lora_lambdas": (2, 2, 2), "lora_B": (3, 32, 2), "lora_B_w": (2, 3)}
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.{key}": torch.zeros(shape) for key, shape in shapes.items()}
    torch.save(tensors, folder / "original.pt")


def write(path: Path, value: object) -> None:
    """JSON, or bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())


@dataclasses.dataclass
class Ended:
    """How a command ended: exit code (None: with a traceback, which ``err`` then holds), stdout and stderr."""

    code: int | None
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """What follows ``error:``."""
        return self.err.rpartition("error: ")[2].strip()


def complete(line: str) -> list[str]:
    """The arguments of a command line with the default flags that it does not give."""
    words = shlex.split(line)
    command = next((name for name in DEFAULTS if line.startswith(name)), "")
    own, dropped = words[len(command.split()) :], {word[1:] for word in words if word.startswith("~")}
    given = {word[2:].partition("=")[0] for word in own if word.startswith("--")} | dropped
    defaults = [flag for flag in DEFAULTS.get(command, "").split() if flag[2:].partition("=")[0] not in given]
    return [*command.split(), *defaults, *(word for word in own if not word.startswith("~"))]


def run(line: str | list[str] | Callable[[], object], environment: Mapping[str, str] = {}) -> Ended:
    """Run ``mtl-lora`` in this process with a line, completed, or with a list of arguments as they are; or a function
    as a command is run."""
    from mtl_lora import cli
    from mtl_lora.errors import user_errors_to_exit_code

    arguments, before = complete(line) if isinstance(line, str) else line, dict(os.environ)
    out, err = io.StringIO(), io.StringIO()
    os.environ.update(environment)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if callable(arguments):
                with user_errors_to_exit_code():
                    arguments()
            else:
                cli.main(arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except Exception:
        code = None
        err.write(traceback.format_exc())
    finally:
        os.environ.clear()
        os.environ.update(before)
    return Ended(code, out.getvalue(), err.getvalue())


def ended(line: str, folder: Path, monkeypatch, defaults: Mapping[str, str]) -> Ended:
    """A command in the folder, with the flags of ``defaults`` (by command) that it does not give; ``--name=`` alone
    leaves one out."""
    monkeypatch.chdir(folder)
    command, *own = line.split()
    given = {word.partition("=")[0] for word in own}
    own = [word for word in own if not word.endswith("=")]
    return run([command, *[flag for flag in defaults[command].split() if flag.partition("=")[0] not in given], *own])


def assert_refused(done: Ended, facts: list[str], folder: Path) -> None:
    """One sentence with these facts, and nothing in the folder's ``out``."""
    assert done.code == 2, done.err
    assert "\n" not in done.sentence and all(fact in done.sentence for fact in facts), done.sentence
    assert not (folder / "out").exists() or not any((folder / "out").iterdir())
