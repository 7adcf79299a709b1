"""Results files and tables made from records, and a small made-up study."""

import json

import numpy as np
import pytest
from synthetic_study import write_study

from mtl_lora.report.table import build_table
from mtl_lora.results import Results


@pytest.fixture
def write(tmp_path):
    """Write a results file into a folder of its own and return the folder."""

    def write_one(record, folder="run"):
        (tmp_path / folder).mkdir(exist_ok=True)
        text = record if isinstance(record, str) else json.dumps(record)
        (tmp_path / folder / "results.json").write_text(text, encoding="utf-8")
        return tmp_path / folder

    return write_one


@pytest.fixture
def table_of(write):
    """Build a table from records instead of files."""

    def build(*records, **flags):
        return build_table([Results.load(write(record, f"run{i}")) for i, record in enumerate(records)], **flags)

    return build


@pytest.fixture
def random() -> np.random.Generator:
    """A seeded source of made-up numbers."""
    return np.random.default_rng(3)


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory):
    """A small made-up study, to read: three tasks, two methods, two seeds."""
    tasks = {"cr": "CR", "sst5": "SST-5", "agnews": "AG <News> & more"}
    return write_study(tmp_path_factory.mktemp("study"), tasks, {"lora": "LoRA", "mtl_lora": "MTL-LoRA"})
