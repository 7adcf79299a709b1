"""Tiny base models on disk, checkpoints on them, and the command line in this process."""

from pathlib import Path

import pytest
from export_cases import TARGETS, save_adapter, save_base

from mtl_lora.export.__main__ import main


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test asks the network; a name that is not cached is answered at once."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, str]:
    """The folder of a tiny base model for each architecture."""
    folder = tmp_path_factory.mktemp("bases")
    return {kind: save_base(kind, folder / kind) for kind in TARGETS}


@pytest.fixture(scope="session")
def checkpoints(bases, tmp_path_factory):
    """A checkpoint of a method on an architecture: ``checkpoints("llama", "dora")`` returns its folder, to read."""
    made: dict[tuple[str, str], Path] = {}

    def get(kind: str, label: str) -> Path:
        if (kind, label) not in made:
            made[kind, label] = save_adapter(bases[kind], tmp_path_factory.mktemp(f"{kind}_{label}") / "adapter", label)
        return made[kind, label]

    return get


@pytest.fixture
def checkpoint(bases, tmp_path) -> Path:
    """A checkpoint of MTL-LoRA on the tiny LLaMA that a test may spoil."""
    return save_adapter(bases["llama"], tmp_path / "checkpoint", "mtl_lora")


@pytest.fixture
def command(capsys):
    """Run a command line in this process: ``command("peft", checkpoint=..., output=...)`` returns the lines printed."""

    def run(*words: str, **flags) -> list[str]:
        main([*words, *(part for name, value in flags.items() for part in (f"--{name}", str(value)))])
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def refused(capsys):
    """Run a command line that must fail with one sentence and exit code 2, write nothing, and return the sentence."""

    def run(*words: str, output: Path, **flags) -> str:
        before = listing(output.parent)
        arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--output", str(output), *arguments])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stopped.value.code == 2
        assert len(lines) == 1
        assert listing(output.parent) == before, "something half-written stays behind"
        return lines[0].removeprefix("error: ")

    return run


def listing(folder: Path) -> dict[str, int]:
    """Every path below a folder with its time of change."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()} | {
        str(path): 0 for path in sorted(folder.rglob("*")) if path.is_dir()
    }
