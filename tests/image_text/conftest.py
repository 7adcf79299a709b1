"""The system of these tests, and a checkpoint of each kind of model."""

from pathlib import Path

import pytest
from shared import start


@pytest.fixture(scope="session")
def system() -> str:
    """The system that these tests train."""
    return "image_text"


@pytest.fixture(scope="session")
def trained(short, bart, causal, made_once) -> dict[str, str]:
    """By kind of model, a checkpoint of a few steps."""

    def make(folder: Path) -> None:
        for kind, base in {"bart": bart, "causal": causal}.items():
            steps = {"base_model": base, "max_steps": 30, "learning_rate": 1e-2}
            start("image_text", short("image_text", folder / kind, **steps))

    folder = made_once("tiny_trained_on_pictures", make)
    return {kind: str(folder / kind) for kind in ("bart", "causal")}
