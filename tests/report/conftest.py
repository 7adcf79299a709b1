"""Results files and tables made from records."""

import json

import pytest

from mtl_lora.report.results import read_results
from mtl_lora.report.table import build_table


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
        return build_table([read_results(write(record, f"run{i}")) for i, record in enumerate(records)], **flags)

    return build
