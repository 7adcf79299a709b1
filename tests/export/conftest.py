"""Tiny base models on disk, checkpoints on them, and the command line in this process."""

from pathlib import Path

import pytest
from export_cases import TARGETS, save_adapter, save_base

from mtl_lora.cli import main


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test reaches the network; a name that is not cached is refused at once."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, str]:
    """The folder of a tiny base model for each architecture."""
    folder = tmp_path_factory.mktemp("bases")
    return {kind: save_base(kind, folder / kind) for kind in TARGETS}


@pytest.fixture(scope="session")
def checkpoints(bases, tmp_path_factory):
    """A checkpoint of a method on an architecture, read only: ``checkpoints("llama", "dora")`` returns its folder."""
    made: dict[tuple[str, str], Path] = {}

    def get(kind: str, label: str) -> Path:
        if (kind, label) not in made:
            made[kind, label] = save_adapter(bases[kind], tmp_path_factory.mktemp(f"{kind}_{label}") / "adapter", label)
        return made[kind, label]

    return get


@pytest.fixture
def checkpoint(bases, tmp_path) -> Path:
    """A checkpoint of MTL-LoRA on the tiny LLaMA that a test may damage."""
    return save_adapter(bases["llama"], tmp_path / "checkpoint", "mtl_lora")


def arguments(words: tuple, flags: dict) -> list[str]:
    """``mtl-lora export`` with words and flags."""
    return ["export", *words, *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]


@pytest.fixture
def command(capsys):
    """Run an export in this process: ``command("peft", checkpoint=..., output=...)`` returns the lines it prints."""

    def run(*words: str, **flags) -> list[str]:
        capsys.readouterr()  # what the test or a library that it loads wrote before, such as DeepSpeed's warning
        main(arguments(words, flags))
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def refused(capsys, tmp_path):
    """Run an export that must fail with one sentence and exit code 2, write nothing, and return the sentence."""

    def run(*words: str, **flags) -> str:
        flags = {"output": tmp_path / "refused", **flags}
        before = listing(flags["output"].parent)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(arguments(words, flags))
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stopped.value.code == 2
        assert listing(flags["output"].parent) == before, "something half-written stays behind"
        return line.removeprefix("error: ")

    return run


def listing(folder: Path) -> dict[str, int]:
    """Every path below a folder; files with their time of change."""
    return {str(path): path.stat().st_mtime_ns if path.is_file() else 0 for path in folder.rglob("*")}
