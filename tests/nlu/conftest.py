"""The system of these tests, and a checkpoint of it."""

from pathlib import Path

import pytest
from shared import start


@pytest.fixture(scope="session")
def system() -> str:
    """The system that these tests train."""
    return "nlu"


@pytest.fixture(scope="session")
def trained(short, made_once) -> str:
    """A checkpoint of a few steps."""

    def make(folder: Path) -> None:
        start("nlu", short("nlu", folder / "run", max_steps=40, learning_rate=1e-2))

    return str(made_once("tiny_trained_encoder", make) / "run")
