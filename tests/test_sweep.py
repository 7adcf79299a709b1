"""A few architectures of the sweep over transformers' models, of each system."""

import subprocess
import sys

import pytest
from shared import PROJECT


def swept(tmp_path, system: str, *kinds: str) -> list[str]:
    """The table of the sweep of these types."""
    command = [sys.executable, PROJECT / "tests" / "sweep.py", "--system", system, "--log", tmp_path / "sweep.jsonl"]
    done = subprocess.run([*command, "--only", *kinds], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.slow(15)
def test_convolution_and_recurrence_equal_the_slow_reference(tmp_path):
    assert swept(tmp_path, "language", "lfm2", "rwkv", "electra") == [
        "equal (1): lfm2",
        "equal, questions one by one (1): rwkv",
        "refused (1): electra",
    ]


@pytest.mark.slow(10)
def test_a_decoder_with_heads_equals_one_text_alone_and_reading_padding_is_noticed(tmp_path):
    assert swept(tmp_path, "nlu", "llama", "fnet") == [
        "differs in losses.padded, losses.padded_gradients (1): fnet",
        "equal (1): llama",
    ]


@pytest.mark.slow(10)
def test_an_encoder_decoder_and_a_window_with_images_equal_one_question_alone(tmp_path):
    assert swept(tmp_path, "image_text", "bart", "mistral") == ["equal (2): bart, mistral"]
