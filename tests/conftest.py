"""What many tests share: a tiny base model on disk, a few real examples, and runs in this process.

The workers of a parallel run share the folders that take time to make.
"""

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from shared import quickstart_records

EOS = "<end>"
gc.disable()  # the imports and tests that are collected stay to the end, so nothing looks for garbage among them


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A folder of the whole test run: ``made_once(name, make)`` calls ``make(folder)`` in the first worker alone."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        path = root / name
        with FileLock(root / f"{name}.lock"):
            if not (path / ".made").exists():
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
                make(path)
                (path / ".made").touch()
        return path

    return folder


@pytest.fixture(scope="session")
def tiny_base(made_once) -> str:
    """The folder of a random two-layer LLaMA with a small byte-level tokenizer: a base model that loads at once."""
    import transformers  # noqa: F401

    # Every training collects garbage; without the objects of the libraries that takes a tenth of the time.
    gc.collect()
    gc.freeze()
    return str(made_once("tiny_base", make_tiny_base))


def make_tiny_base(folder: Path) -> None:
    """Write model and tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = [record["instruction"] + record["output"] for record in quickstart_records()[:300]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def records_file(made_once) -> str:
    """96 training examples of all eight tasks."""
    content = json.dumps(quickstart_records()[:96])
    return str(made_once("records", lambda folder: (folder / "train.json").write_text(content)) / "train.json")


@pytest.fixture(scope="session")
def cache_dir(made_once) -> str:
    """Tokenised data of all runs."""
    return str(made_once("rows", lambda folder: None))


@pytest.fixture(scope="module")
def no_old_objects(tiny_base) -> None:
    """Every training collects garbage, which takes longer the more objects the tests before have left."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_thread():
    """As in launched processes: sums are rounded otherwise with another number of threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def train(no_old_objects, tiny_base, records_file, cache_dir, tmp_path):
    """Train in this process: ``train("name", flag=value, ...)`` returns the output folder."""
    from mtl_lora.language.config import TrainConfig
    from mtl_lora.language.train import run

    def start(name: str, **flags) -> Path:
        settings = {
            "base_model": tiny_base,
            "data_path": records_file,
            "cache_dir": cache_dir,
            "output_dir": str(tmp_path / name),
            "dtype": "fp32",
            "batch_size": 8,
            "max_steps": 4,
            "save_step": 0,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "warmup_ratio": 0.0,
            **flags,
        }
        run(TrainConfig(**settings))
        return Path(settings["output_dir"])

    return start


@pytest.fixture(scope="session")
def trained(tiny_base, records_file, cache_dir, made_once, tmp_path_factory) -> str:
    """A checkpoint of a few steps on the tiny base, this worker's own."""

    def make(folder: Path) -> None:
        from mtl_lora.language.config import TrainConfig
        from mtl_lora.language.train import run

        run(
            TrainConfig(
                base_model=tiny_base,
                data_path=records_file,
                cache_dir=cache_dir,
                output_dir=str(folder / "run"),
                dtype="fp32",
                max_steps=6,
                save_step=0,
                learning_rate=3e-2,
            )
        )

    folder = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(made_once("trained", make) / "run", folder)
    return str(folder)


@pytest.fixture
def edit_json():
    """Change keys of a JSON file; None takes a key out."""

    def edit(path: Path, **changes) -> None:
        value = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not None}))

    return edit


def pytest_collection_finish() -> None:
    """From here on garbage is collected again, without looking at what is there already."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list) -> None:
    """The longest tests first, so that no worker is left with a long one when the others are done."""

    def seconds(item) -> float:
        marker = item.get_closest_marker("slow")
        return 0 if marker is None else (*marker.args, 3)[0]

    items.sort(key=seconds, reverse=True)
