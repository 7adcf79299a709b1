"""The four tokenizers, trained once a session."""

import pytest
from tokenizer_kinds import KINDS
from transformers import PreTrainedTokenizerBase

from mtl_lora.base_model import with_pad_token


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, PreTrainedTokenizerBase]:
    """Tokenizers by kind, each with a pad token by the pad rule."""
    return {kind: with_pad_token(make(tmp_path_factory.mktemp(kind))) for kind, make in KINDS.items()}


@pytest.fixture(scope="session", params=list(KINDS))
def kind(request) -> str:
    """The name of a kind of tokenizer; a test that asks for it runs for each."""
    return request.param


@pytest.fixture(scope="session")
def tokenizer(tokenizers, kind) -> PreTrainedTokenizerBase:
    """The tokenizer of that kind."""
    return tokenizers[kind]
