"""Evaluations of the tiny model in this process."""

import pytest
from shared import QUICKSTART

from mtl_lora.language.config import EvalConfig
from mtl_lora.language.evaluate import run


@pytest.fixture
def evaluate(trained, tmp_path):
    """Score in this process: ``evaluate("name", flag=value, ...)`` returns the results."""

    def start(name: str, **flags) -> dict:
        settings = {"checkpoint": trained, "data_dir": str(QUICKSTART / "test"), "limit": 4, "dtype": "fp32"}
        settings |= {"max_new_tokens": 8, "output_dir": str(tmp_path / name), **flags}
        return run(EvalConfig(**settings))

    return start
