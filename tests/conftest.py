"""What many tests share: a tiny base model on disk, a few real records, and runs in this process."""

import json
from pathlib import Path

import pytest
from shared import quickstart_records

EOS = "<end>"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> str:
    """The folder of a random two-layer LLaMA with a small byte-level tokenizer: a base model that loads in no time."""
    import gc

    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_base")
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
    # Every training collects garbage; without the objects of the libraries that takes a tenth of the time.
    gc.collect()
    gc.freeze()
    return str(folder)


@pytest.fixture(scope="session")
def records_file(tmp_path_factory) -> str:
    """96 training records of all eight tasks."""
    path = tmp_path_factory.mktemp("records") / "train.json"
    path.write_text(json.dumps(quickstart_records()[:96]))
    return str(path)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> str:
    """Tokenised data of all runs of the session."""
    return str(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def train(tiny_base, records_file, cache_dir, tmp_path):
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
def trained(tiny_base, records_file, cache_dir, tmp_path_factory) -> str:
    """A checkpoint of a few steps on the tiny base."""
    from mtl_lora.language.config import TrainConfig
    from mtl_lora.language.train import run

    folder = str(tmp_path_factory.mktemp("trained") / "run")
    run(
        TrainConfig(
            base_model=tiny_base,
            data_path=records_file,
            cache_dir=cache_dir,
            output_dir=folder,
            dtype="fp32",
            max_steps=6,
            save_step=0,
            learning_rate=3e-2,
        )
    )
    return folder


@pytest.fixture
def edit_json():
    """Change keys of a JSON file; None takes a key out."""

    def edit(path: Path, **changes) -> None:
        value = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not None}))

    return edit
