"""What many tests share: a tiny base model on disk, a few real examples, and runs in this process.

The workers of a parallel run share the folders that take time to make.
"""

import gc
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import image_text_cases
import nlu_cases
import pytest
from filelock import FileLock
from hypothesis import settings
from shared import quickstart_records, save_llama, start, trained_bpe

EOS = "<end>"
settings.load_profile("ci")  # the same examples in every run; --hypothesis-profile default draws others
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
    from transformers import PreTrainedTokenizerFast

    tokenizer = trained_bpe(
        (record["instruction"] + record["output"] for record in quickstart_records()[:300]), 500, [EOS]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(folder)
    save_llama(folder, tokenizer.get_vocab_size(), width=32, positions=512, spread=0.2)


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


# ---- short trainings of tiny models ----


@pytest.fixture(scope="session")
def encoder(made_once) -> str:
    """The folder of a BERT of two layers with a WordPiece tokenizer."""
    return str(made_once("tiny_encoder", nlu_cases.make_encoder))


@pytest.fixture(scope="session")
def glue(made_once) -> Path:
    """A prepared set of three small tasks for it."""
    return made_once("tiny_glue", nlu_cases.make_set)


@pytest.fixture(scope="session")
def bart(made_once) -> str:
    """The folder of a BART of two layers a side with its tokenizer."""
    return str(made_once("tiny_bart", image_text_cases.make_bart))


@pytest.fixture(scope="session")
def causal(made_once) -> str:
    """The folder of a LLaMA of two layers with its tokenizer."""
    return str(made_once("tiny_causal", image_text_cases.make_causal))


@pytest.fixture(scope="session")
def pictures(made_once) -> Path:
    """A prepared set of three tasks on pictures, with their ``features.h5``."""
    return made_once("tiny_pictures", image_text_cases.make_set)


@pytest.fixture
def still(tmp_path):
    """``still(folder)``: the model in it without dropout, for runs that are compared with others than themselves."""

    def copy(folder: str) -> str:
        path = Path(shutil.copytree(folder, tmp_path / f"still_{Path(folder).name}")) / "config.json"
        changed = {key: 0.0 if "dropout" in key else entry for key, entry in json.loads(path.read_text()).items()}
        path.write_text(json.dumps(changed))
        return str(path.parent)

    return copy


@pytest.fixture(scope="session")
def language_flags(tiny_base, records_file) -> dict:
    """The base model, the data, and what else the short trainings of this system have."""
    adapter = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05}
    return {"base_model": tiny_base, "data_path": records_file, "learning_rate": 1e-2, **adapter}


@pytest.fixture(scope="session")
def nlu_flags(encoder, glue) -> dict:
    """As above."""
    return {"base_model": encoder, **set_in(glue), "cutoff_len": 32}


@pytest.fixture(scope="session")
def image_text_flags(bart, pictures) -> dict:
    """As above."""
    files = {**set_in(pictures), "features": [str(pictures / "features.h5")]}
    return {"base_model": bart, **files, "pool": 2, "lora_target_modules": ["q_proj", "v_proj"]}


def set_in(folder: Path) -> dict[str, str]:
    """The flags of a prepared set."""
    return {"data_path": str(folder / "train.json"), "tasks_file": str(folder / "tasks.json")}


@pytest.fixture(scope="session")
def short(request, cache_dir):
    """``short(system, folder, flag=value, ...)``: the flags of a short training into a folder."""
    common = {"dtype": "fp32", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "batch_size": 8, "max_steps": 4}
    common |= {"save_step": 0, "logging_steps": 1, "learning_rate": 3e-3, "warmup_ratio": 0.0, "cache_dir": cache_dir}

    def flags(system: str, folder: Path, **changes) -> dict:
        own = request.getfixturevalue(f"{system}_flags")
        return {**common, **own, "output_dir": str(folder), **changes}

    return flags


@pytest.fixture(scope="session")
def system() -> str:
    """The system that the tests of a folder train."""
    return "language"


@pytest.fixture
def settings(short, system, tmp_path):
    """``settings("name", flag=value, ...)``: the flags of a short training in ``name``."""
    return lambda name, **changes: short(system, tmp_path / name, **changes)


@pytest.fixture
def train(no_old_objects, settings, system):
    """Train in this process: ``train("name", flag=value, ...)`` returns the output folder."""
    return lambda name, **changes: start(system, settings(name, **changes))


@pytest.fixture(scope="session")
def trained(tiny_base, records_file, cache_dir, made_once, tmp_path_factory) -> str:
    """A checkpoint of a few steps on the tiny base, this worker's own."""
    files = {"base_model": tiny_base, "data_path": records_file, "cache_dir": cache_dir}
    steps = {"dtype": "fp32", "max_steps": 6, "save_step": 0, "learning_rate": 3e-2}

    def make(folder: Path) -> None:
        start("language", {**files, **steps, "output_dir": str(folder / "run")})

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, help="run at most so many cases of every parametrised test")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list) -> Iterator[None]:
    """The longest tests first, so that no worker is left with a long one when the others are done.

    A test that trains a model is a slow one. ``--cases`` draws the same cases in every worker and every run.
    """
    for item in items:
        if "train" in item.fixturenames and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.slow(1))

    def seconds(item) -> float:
        marker = item.get_closest_marker("slow")
        return 0 if marker is None else (*marker.args, 3)[0]

    items.sort(key=seconds, reverse=True)
    yield
    if most := config.getoption("cases"):
        tests = {}
        for item in items:
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
        kept = {
            item for test, cases in tests.items() for item in random.Random(test).sample(cases, min(most, len(cases)))
        }
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
