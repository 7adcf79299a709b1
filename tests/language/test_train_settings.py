"""Settings of a training that cannot work are refused in one sentence before the base model is loaded."""

import importlib.util
import json
from pathlib import Path

import pytest

from mtl_lora.base_model import BaseModel
from mtl_lora.errors import UserError
from mtl_lora.language.config import TrainConfig


@pytest.fixture
def refused(tiny_base, records_file, cache_dir, tmp_path, monkeypatch):
    """Run training with settings that must be refused before the model is loaded; returns the sentence."""
    from mtl_lora.language.train import run

    def load_no_model(*arguments, **options):
        raise AssertionError("the model must not be loaded with such settings")

    monkeypatch.setattr(BaseModel, "load", load_no_model)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)

    def start(**settings) -> str:
        paths = {"base_model": tiny_base, "data_path": records_file, "cache_dir": cache_dir, "output_dir": "out"}
        with pytest.raises(UserError) as caught:
            run(TrainConfig(**{**paths, **settings}))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return start


# Settings whose sentence names what they are instead of the flag.


@pytest.mark.parametrize(
    "package, settings", [("wandb", {"wandb_project": "p"}), ("tensorboard", {"tensorboard": True})]
)
def test_flag_whose_package_is_missing_says_how_to_install_it(refused, monkeypatch, package, settings):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    (flag_name,) = settings
    sentence = refused(**settings)
    assert f"--{flag_name}" in sentence and f"pip install {package}" in sentence


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero2.json", "config/zero3.json"])
def test_packaged_deepspeed_configuration_is_found_by_name(tmp_path, monkeypatch, name):
    from mtl_lora.training.distributed import deepspeed_file

    monkeypatch.chdir(tmp_path)
    stage = json.loads(Path(deepspeed_file(name)).read_text())["zero_optimization"]["stage"]
    assert f"zero{stage}" in name
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "zero3.json").write_text("{}")
    assert deepspeed_file("config/zero3.json") == "config/zero3.json", "a file of the caller goes first"


@pytest.mark.parametrize(
    "left", ["run.json", "train_log.jsonl", "mtl_lora_config.json", "checkpoint-3/trainer_state.json"]
)
def test_output_folder_that_holds_a_run_is_left_as_it_is(refused, tmp_path, left):
    path = tmp_path / "out" / left
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"step": 3}))
    sentence = refused()
    assert "out" in sentence and "--resume_from_checkpoint True" in sentence
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == [path]
    assert path.read_text() == json.dumps({"step": 3})
