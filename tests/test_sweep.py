"""A few architectures of the sweep over transformers' causal language models."""

import subprocess
import sys

import pytest
from shared import PROJECT


@pytest.mark.slow(15)
def test_attention_convolution_and_recurrence_equal_the_slow_reference(tmp_path):
    kinds = ["qwen3", "lfm2", "rwkv", "electra"]
    command = [sys.executable, PROJECT / "tests" / "sweep.py", "--log", tmp_path / "sweep.jsonl", "--only", *kinds]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "equal (2): qwen3, lfm2",
        "equal, questions one by one (1): rwkv",
        "refused (1): electra",
    ]
