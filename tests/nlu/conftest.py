"""A random BERT of two layers with a WordPiece tokenizer, three small tasks, and runs in this process."""

import json
import random
import shutil
from pathlib import Path

import pytest
from nlu_cases import LABELLED, examples, make_encoder


@pytest.fixture(scope="session")
def encoder(made_once) -> str:
    """The folder of the tiny encoder."""
    return str(made_once("tiny_encoder", make_encoder))


@pytest.fixture
def still(encoder, tmp_path, edit_json) -> str:
    """The same without dropout, for runs that are compared with others than themselves."""
    folder = tmp_path / "still"
    shutil.copytree(encoder, folder)
    edit_json(folder / "config.json", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return str(folder)


@pytest.fixture(scope="session")
def glue(made_once) -> Path:
    """A prepared set: ``train.json``, ``tasks.json`` and ``test/<task>/test.json``."""

    def make(folder: Path) -> None:
        (folder / "tasks.json").write_text(json.dumps(LABELLED))
        mixed = [example for task in LABELLED for example in examples(task, 20)]
        random.Random(0).shuffle(mixed)
        (folder / "train.json").write_text(json.dumps(mixed))
        for task in LABELLED:
            path = folder / "test" / task["name"] / "test.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(examples(task, 12, seed=1)))

    return made_once("tiny_glue", make)


@pytest.fixture
def settings(encoder, glue, cache_dir, tmp_path):
    """``settings("name", flag=value, ...)``: the flags of a short training, whose output folder is ``name``."""

    def flags(name: str, **changes) -> dict:
        return {
            "base_model": encoder,
            "data_path": str(glue / "train.json"),
            "tasks_file": str(glue / "tasks.json"),
            "cache_dir": cache_dir,
            "output_dir": str(tmp_path / name),
            "dtype": "fp32",
            "cutoff_len": 32,
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "batch_size": 8,
            "max_steps": 4,
            "save_step": 0,
            "logging_steps": 1,
            "learning_rate": 3e-3,
            "warmup_ratio": 0.0,
            **changes,
        }

    return flags


@pytest.fixture
def train(no_old_objects, settings):
    """Train in this process: ``train("name", flag=value, ...)`` returns the output folder."""
    from mtl_lora.nlu.config import TrainConfig
    from mtl_lora.nlu.train import run

    def start(name: str, **changes) -> Path:
        config = TrainConfig(**settings(name, **changes))
        run(config)
        return Path(config.output_dir)

    return start


@pytest.fixture(scope="module")
def trained(encoder, glue, cache_dir, tmp_path_factory) -> str:
    """A checkpoint of a few steps."""
    from mtl_lora.nlu.config import TrainConfig
    from mtl_lora.nlu.train import run

    folder = str(tmp_path_factory.mktemp("nlu") / "run")
    files = {"data_path": str(glue / "train.json"), "tasks_file": str(glue / "tasks.json"), "cache_dir": cache_dir}
    steps = {"dtype": "fp32", "batch_size": 8, "max_steps": 40, "save_step": 0, "learning_rate": 1e-2, "lora_r": 4}
    steps |= {"cutoff_len": 32}
    run(TrainConfig(base_model=encoder, output_dir=folder, **files, **steps))
    return folder
