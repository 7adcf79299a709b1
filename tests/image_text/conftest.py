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
