"""Training and evaluation on a base model saved in 4 or 8 bits."""

import importlib.util
import json
import shutil

import pytest
import torch
from reference.layers import assert_near
from shared import QUICKSTART
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import mtl_lora
from mtl_lora.adapter.checkpoint import read_config
from mtl_lora.artifacts import EVAL_SETTINGS
from mtl_lora.base_model import BaseModel
from mtl_lora.errors import UserError
from mtl_lora.export.merge import export_merged
from mtl_lora.language.config import EvalConfig
from mtl_lora.language.evaluate import run

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture
def whole(tiny_base, tmp_path) -> str:
    """A base whose layers bitsandbytes can pack on a CPU: rows by 32 and columns by 64, more than the tiny base has."""
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64, "num_key_value_heads": 4}
    folder = shutil.copytree(tiny_base, tmp_path / "whole")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_base, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["mtl_lora", "dora"])
def test_a_quantised_base_is_trained_on_and_evaluated(train, whole, tmp_path, bits, method):
    quantised = {4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}, 8: {"load_in_8bit": True}}[bits]
    base = shutil.copytree(whole, tmp_path / "base")
    settings = BitsAndBytesConfig(**quantised)
    AutoModelForCausalLM.from_pretrained(whole, quantization_config=settings).save_pretrained(base)
    folder = train("run", base_model=str(base), adapter_name=method, max_steps=12)
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    results = run(
        EvalConfig(checkpoint=str(folder), data_dir=str(QUICKSTART / "test"), limit=2, mode="score", dtype="fp32")
    )
    assert all(task.n == 2 for task in results["score"].tasks.values())


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
def test_a_base_is_loaded_in_4_bits_by_a_flag_for_training_evaluation_and_merging(train, whole, tmp_path, capsys):
    folder = train("run", base_model=whole, load_in_4bit=True)
    trainable, total = mtl_lora.trainable_parameters(
        mtl_lora.inject(BaseModel(whole).structure(), read_config(folder).adapter_config)
    )
    assert f"trainable parameters: {trainable:,} of {total:,} (" in capsys.readouterr().err
    evaluation = {"checkpoint": str(folder), "data_dir": str(QUICKSTART / "test"), "limit": 1, "dtype": "fp32"}
    for flags, expected in (({}, True), ({"load_in_4bit": False}, None)):
        run(EvalConfig(**evaluation, **flags, mode="score", output_dir=str(tmp_path / "evaluation"), overwrite=True))
        assert json.loads((tmp_path / "evaluation" / EVAL_SETTINGS).read_text()).get("load_in_4bit") is expected
    model = mtl_lora.load(folder, dtype="fp32").eval()
    assert type(model.model.layers[0].self_attn.q_proj.base_layer).__name__ == "Linear4bit"
    merged = AutoModelForCausalLM.from_pretrained(export_merged(folder, tmp_path / "merged", "piqa"))
    input_ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        assert_near(merged(input_ids).logits, model(input_ids, task_ids=["piqa"]).logits, 1e-4, "logits")


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_flag_for_4_bits_without_bitsandbytes_is_refused(train, trained, command):
    with pytest.raises(UserError, match=r"--load_in_4bit .* bitsandbytes"):
        if command == "train":
            train("run", load_in_4bit=True)
        run(EvalConfig(checkpoint=trained, load_in_4bit=True))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_a_base_that_others_quantised_is_named_and_refused_at_the_check(train, tiny_base, tmp_path, edit_json, method):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    edit_json(base / "config.json", quantization_config={"quant_method": method, "bits": 4, "group_size": 128})
    with pytest.raises(UserError, match=rf"quantised \({method}\).*quantised from$"):
        train("run", base_model=str(base), check=True)


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
@pytest.mark.parametrize("named", [{"quant_method": "bitsandbytes"}, {}], ids=["today", "early versions"])
def test_a_quantised_base_without_bitsandbytes_is_refused_in_one_sentence(train, tiny_base, tmp_path, edit_json, named):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    edit_json(base / "config.json", quantization_config={**named, "load_in_4bit": True})
    with pytest.raises(UserError, match="bitsandbytes") as caught:
        train("run", base_model=str(base))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
