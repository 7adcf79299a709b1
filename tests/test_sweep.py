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
def test_attention_convolution_and_recurrence_equal_the_slow_reference(tmp_path):
    assert swept(tmp_path, "language", "qwen3", "lfm2", "rwkv", "electra") == [
        "equal (2): qwen3, lfm2",
        "equal, questions one by one (1): rwkv",
        "refused (1): electra",
    ]


@pytest.mark.slow(15)
def test_an_encoder_and_a_decoder_with_heads_equal_one_text_alone_and_reading_padding_is_noticed(tmp_path):
    assert swept(tmp_path, "nlu", "bert", "llama", "fnet") == [
        "differs in losses.padded, losses.padded_gradients, answers (1): fnet",
        "equal (2): bert, llama",
    ]


@pytest.mark.slow(15)
def test_an_encoder_decoder_and_a_window_with_images_equal_one_question_alone(tmp_path):
    assert swept(tmp_path, "image_text", "bart", "mistral", "rwkv") == ["equal (2): bart, mistral", "refused (1): rwkv"]
