"""Places and small helpers that many tests use."""

import hashlib
import json
import random
import socket
from collections.abc import Iterable
from pathlib import Path

PROJECT = Path(__file__).parent.parent
QUICKSTART = PROJECT / "data" / "quickstart"


def free_port() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def quickstart_records() -> list[dict]:
    """The embedded training records."""
    return json.loads((QUICKSTART / "train.json").read_text())


def write_set(folder: Path, tasks: list[dict], train: list[dict], test: dict[str, list]) -> None:
    """A prepared set: ``train.json``, whose examples are shuffled, ``tasks.json`` and ``test/<task>/test.json``."""
    random.Random(0).shuffle(train)
    test = {f"test/{name}/test.json": examples for name, examples in test.items()}
    for name, value in {"tasks.json": tasks, "train.json": train, **test}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value))


def start(system: str, settings: dict) -> Path:
    """Train in this process; returns the output folder."""
    from mtl_lora import systems
    from mtl_lora.training.run import train

    config = systems.part(system, "config").TrainConfig(**settings)
    train(config)
    return Path(config.output_dir)


def trained_bpe(texts: Iterable[str], vocab_size: int, special_tokens: list[str]):
    """A byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learned = {"special_tokens": special_tokens, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **learned))
    return tokenizer


def save_llama(folder: Path, vocab_size: int, width: int, positions: int, spread: float) -> None:
    """A random LLaMA of two layers whose token 0 is EOS; spread: of its weights, so large that its logits differ."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def git_blob(content: bytes) -> str:
    """The id that git gives these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
