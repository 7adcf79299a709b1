"""Trainable parameters are counted on the meta device, as training then reports them."""

import pytest

from mtl_lora.base_model import BaseModel
from mtl_lora.errors import UserError
from mtl_lora.language.config import TrainConfig


def test_counts_are_those_that_training_reports(tiny_base, train, capsys, tmp_path):
    config = TrainConfig(base_model=tiny_base, lora_r=3)
    trained, total = BaseModel(tiny_base).count(config.adapter_config(config.task_set()))
    train("run", lora_r=3, max_steps=1)
    assert f"training {trained:,} of {total:,} weights" in capsys.readouterr().err


def test_a_missing_base_model_and_an_unknown_target_are_named(tiny_base, tmp_path):
    config = TrainConfig(base_model=tiny_base, lora_target_modules=["elbow_proj"])
    adapter = config.adapter_config(config.task_set())
    with pytest.raises(UserError, match="elbow_proj"):
        BaseModel(tiny_base).count(adapter)
    with pytest.raises(UserError, match="nowhere"):
        BaseModel(str(tmp_path / "nowhere")).count(adapter)
