"""A random BART and a random LLaMA of two layers with their tokenizers, features, and a task set with its examples."""

import json
import random
from pathlib import Path

import pytest
from image_text_cases import TASKS, examples, make_bart, make_causal, write_features


@pytest.fixture(scope="session")
def bart(made_once) -> str:
    """The folder of the tiny encoder-decoder."""
    return str(made_once("tiny_bart", make_bart))


@pytest.fixture(scope="session")
def causal(made_once) -> str:
    """The folder of the tiny causal language model."""
    return str(made_once("tiny_causal", make_causal))


@pytest.fixture(scope="session")
def pictures(made_once) -> Path:
    """A prepared set: ``train.json``, ``tasks.json``, ``features.h5`` and ``test/<task>/test.json``."""

    def make(folder: Path) -> None:
        (folder / "tasks.json").write_text(json.dumps(TASKS))
        mixed = [example for task in TASKS for example in examples(task["name"], 16)]
        random.Random(0).shuffle(mixed)
        (folder / "train.json").write_text(json.dumps(mixed))
        write_features(folder / "features.h5")
        for task in TASKS:
            path = folder / "test" / task["name"] / "test.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(examples(task["name"], 9, seed=1, closed=True)))

    return made_once("tiny_pictures", make)


@pytest.fixture
def settings(bart, causal, pictures, cache_dir, tmp_path):
    """``settings("name", flag=value, ...)``: the flags of a short training in ``name``; kind: of which model."""

    def flags(name: str, kind: str = "bart", **changes) -> dict:
        return {
            "base_model": {"bart": bart, "causal": causal}[kind],
            "data_path": str(pictures / "train.json"),
            "tasks_file": str(pictures / "tasks.json"),
            "features": [str(pictures / "features.h5")],
            "pool": 2,
            "cache_dir": cache_dir,
            "output_dir": str(tmp_path / name),
            "dtype": "fp32",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "lora_target_modules": ["q_proj", "v_proj"],
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
    from mtl_lora.image_text.config import TrainConfig
    from mtl_lora.image_text.train import run

    def start(name: str, **changes) -> Path:
        config = TrainConfig(**settings(name, **changes))
        run(config)
        return Path(config.output_dir)

    return start


@pytest.fixture(scope="session")
def trained(bart, causal, pictures, made_once) -> dict[str, str]:
    """By kind of model, a checkpoint of a few steps."""

    def make(folder: Path) -> None:
        from mtl_lora.image_text.config import TrainConfig
        from mtl_lora.image_text.train import run

        files = {"data_path": str(pictures / "train.json"), "tasks_file": str(pictures / "tasks.json")}
        files |= {"features": [str(pictures / "features.h5")], "cache_dir": str(folder / "cache")}
        steps = {"dtype": "fp32", "batch_size": 8, "max_steps": 30, "save_step": 0, "learning_rate": 1e-2, "lora_r": 4}
        steps |= {"lora_target_modules": ["q_proj", "v_proj"], "pool": 2}
        for kind, base in {"bart": bart, "causal": causal}.items():
            run(TrainConfig(base_model=base, output_dir=str(folder / kind), **files, **steps))

    folder = made_once("tiny_trained_on_pictures", make)
    return {kind: str(folder / kind) for kind in ("bart", "causal")}
