"""Training and evaluation on a base model saved in 4 or 8 bits."""

import importlib.util
import json
import shutil

import pytest
import torch
from shared import QUICKSTART
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from mtl_lora.errors import UserError
from mtl_lora.language.config import EvalConfig
from mtl_lora.language.evaluate import run

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["mtl_lora", "dora"])
def test_a_quantised_base_is_trained_on_and_evaluated(train, tiny_base, tmp_path, bits, method):
    quantised = {4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}, 8: {"load_in_8bit": True}}[bits]
    whole, base = shutil.copytree(tiny_base, tmp_path / "whole"), shutil.copytree(tiny_base, tmp_path / "base")
    # bitsandbytes packs rows on a CPU by 32 and columns by 64, more than a layer of the tiny base has.
    config = AutoConfig.from_pretrained(
        tiny_base, hidden_size=64, head_dim=16, intermediate_size=64, num_key_value_heads=4
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(whole)
    settings = BitsAndBytesConfig(**quantised)
    AutoModelForCausalLM.from_pretrained(whole, quantization_config=settings).save_pretrained(base)
    folder = train("run", base_model=str(base), adapter_name=method, max_steps=12)
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    results = run(
        EvalConfig(checkpoint=str(folder), data_dir=str(QUICKSTART / "test"), limit=2, mode="score", dtype="fp32")
    )
    assert all(task["n"] == 2 for task in results["tasks"].values())


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
def test_a_quantised_base_without_bitsandbytes_is_refused_in_one_sentence(train, tiny_base, tmp_path, edit_json):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    edit_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(UserError, match="bitsandbytes") as caught:
        train("run", base_model=str(base))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
