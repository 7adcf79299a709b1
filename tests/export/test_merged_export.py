"""A merged folder is a plain transformers model that computes what the routed model computes for one task."""

import json
import shutil

import pytest
import torch
from export_cases import TARGETS, TOLERANCE, difference, load_base, logits, routed, save_adapter
from reference.tiny import FACTORED, TASKS, adapter_config, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import mtl_lora
from mtl_lora import Provenance
from mtl_lora.artifacts import CHECKPOINT_CONFIG
from mtl_lora.export import merge
from mtl_lora.export.merge import export_merged


@pytest.mark.parametrize("label", FACTORED)
@pytest.mark.parametrize("kind", TARGETS)
def test_merged_model_computes_what_the_routed_model_computes(bases, checkpoints, tmp_path, kind, label):
    base, own = load_base(bases[kind]), routed(bases[kind], checkpoints(kind, label))
    for task in (TASKS[0], TASKS[3]) if "mtl" in label or "moe" in label else TASKS[:1]:
        folder = export_merged(checkpoints(kind, label), tmp_path / task, task)
        names = {path.name for path in folder.iterdir()}
        assert names == {"config.json", "generation_config.json", "model.safetensors"}
        model = load_base(folder)
        assert type(model) is type(base)
        assert model.state_dict().keys() == base.state_dict().keys()
        assert difference(logits(model), logits(own, task)) < TOLERANCE
        assert difference(logits(model), logits(base)) > 0.1


@pytest.mark.parametrize("targets", [["lm_head"], ["c_attn", "lm_head"]], ids=str)
def test_changed_head_is_no_longer_tied_to_the_embedding(bases, tmp_path, targets):
    checkpoint = save_adapter(bases["gpt2"], tmp_path / "checkpoint", "mtl_lora", target_modules=targets)
    folder = export_merged(checkpoint, tmp_path / "merged", "birds")
    assert difference(logits(load_base(folder)), logits(routed(bases["gpt2"], checkpoint), "birds")) < TOLERANCE


def test_tokenizer_of_the_base_stands_beside_the_model(tiny_base, tmp_path):
    folder = export_merged(save_adapter(tiny_base, tmp_path / "checkpoint", "lora"), tmp_path / "merged")
    own, base = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tiny_base)
    assert own("A question, with an answer.") == base("A question, with an answer.")
    assert (own.eos_token, own.pad_token) == (base.eos_token, base.pad_token)


def test_base_without_a_tokenizer_is_noted(checkpoints, tmp_path, capsys):
    export_merged(checkpoints("llama", "lora"), tmp_path / "merged", "maps")
    assert "note: no tokenizer was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stored, dtype, expected",
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.float64, "auto", torch.float64),
        (torch.float32, "bf16", torch.bfloat16),
        (torch.float32, "fp16", torch.float16),
        (torch.bfloat16, "fp32", torch.float32),
    ],
    ids=str,
)
def test_dtype_is_the_base_models_unless_named(command, bases, tmp_path, stored, dtype, expected):
    base = tmp_path / "base"
    load_base(bases["llama"]).to(stored).save_pretrained(base)
    checkpoint = save_adapter(str(base), tmp_path / "checkpoint", "lora")
    command("merge", checkpoint=checkpoint, output=tmp_path / "merged", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert difference(logits(model.float()), logits(routed(base, checkpoint), "maps")) < 0.1


def test_base_that_does_not_state_its_dtype_keeps_that_of_its_files(bases, tmp_path, edit_json):
    base = tmp_path / "base"
    load_base(bases["llama"]).half().save_pretrained(base)
    edit_json(base / "config.json", dtype=None)
    checkpoint = save_adapter(str(base), tmp_path / "checkpoint", "lora")
    model = AutoModelForCausalLM.from_pretrained(export_merged(checkpoint, tmp_path / "merged"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_weight_that_its_dtype_cannot_hold_names_the_layer(refused, bases, tmp_path):
    checkpoint = save_adapter(bases["llama"], tmp_path / "checkpoint", "lora", alpha=1e7)
    sentence = refused("merge", checkpoint=checkpoint, dtype="fp16")
    assert "the merged weight of model.layers.0.self_attn.q_proj is not finite in torch.float16" in sentence
    model = load_base(bases["llama"])
    mtl_lora.inject(model, adapter_config("lora", target_modules=["q_proj"], modules_to_save=["model.norm"]))
    model.model.norm.weight.data.mul_(1e6)
    mtl_lora.save(model, tmp_path / "whole", Provenance(bases["llama"]))
    sentence = refused("merge", checkpoint=tmp_path / "whole", dtype="fp16")
    assert "the merged weight of model.norm is not finite in torch.float16" in sentence


def test_what_was_trained_in_4_bits_is_merged_into_what_these_stand_for(bases, tmp_path, monkeypatch):
    model, plain, packed = (load_base(bases["llama"]) for _ in range(3))
    torch.nn.init.constant_(plain.model.norm.weight, 0.75)
    packed.dequantize = lambda: plain
    provenance = Provenance(bases["llama"], train_settings={"load_in_4bit": True})
    mtl_lora.save(mtl_lora.inject(model, adapter_config("lora")), tmp_path / "run", provenance)
    asked = []
    monkeypatch.setattr(merge, "load_base", lambda *words: asked.append(words[-1]) or packed)
    monkeypatch.setattr(merge, "require_package", lambda *words: None)
    found = AutoModelForCausalLM.from_pretrained(export_merged(tmp_path / "run", tmp_path / "merged"))
    assert asked == [True] and (found.model.norm.weight == 0.75).all()


def test_task_is_optional_where_all_are_the_same(command, refused, checkpoints, tmp_path):
    for name, flags in (("one", {"task": "maps"}), ("any", {})):
        printed = command("merge", checkpoint=checkpoints("llama", "dora"), output=tmp_path / name, **flags)
        assert printed == [str(tmp_path / name)]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "any")]
    assert weights[0] == weights[1]
    sentence = refused("merge", checkpoint=checkpoints("llama", "mtl_lora"))
    assert "pass --task, one of tides, maps, birds, rivers" in sentence


def test_merged_folder_can_be_trained_again(checkpoints, tmp_path):
    folder = export_merged(checkpoints("llama", "mtl_lora"), tmp_path / "merged", "maps")
    again = save_adapter(str(folder), tmp_path / "again", "mtl_lora")
    assert json.loads((again / CHECKPOINT_CONFIG).read_text())["provenance"]["base_model"] == str(folder)
    assert mtl_lora.adapter_layers(mtl_lora.load(load_base(folder), again))


# ---- refusals ----


def test_quantised_base_is_refused(refused, bases, tmp_path, edit_json):
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    checkpoint = save_adapter(str(base), tmp_path / "checkpoint", "mtl_lora")
    edit_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    sentence = refused("merge", checkpoint=checkpoint, task="maps")
    assert "is quantised, so the adapter cannot be merged into its weights" in sentence


def test_what_transformers_does_not_write_is_one_sentence(refused, checkpoints, monkeypatch):
    def refuse(*arguments, **options):
        raise ValueError("GenerationConfig is invalid:\n- temperature 0.9\nFix these issues.")

    monkeypatch.setattr(GenerationConfig, "save_pretrained", refuse)
    sentence = refused("merge", checkpoint=checkpoints("llama", "lora"))
    assert "is invalid: - temperature 0.9" in sentence and "generation_config.json" in sentence


def test_another_base_is_refused_and_a_moved_one_is_not(command, refused, bases, checkpoints, tmp_path):
    tiny_llama(torch.float32, seed=5).save_pretrained(tmp_path / "other")
    shutil.copytree(bases["llama"], tmp_path / "moved")
    flags = {"checkpoint": checkpoints("llama", "mtl_lora"), "task": "maps"}
    assert "was trained on another base model than" in refused("merge", **flags, base_model=tmp_path / "other")
    command("merge", **flags, base_model=tmp_path / "moved", output=tmp_path / "merged")


def test_base_that_is_read_is_never_replaced(refused, bases, tmp_path):
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    checkpoint = save_adapter(str(base), tmp_path / "checkpoint", "mtl_lora")
    assert "holds an input" in refused("merge", "--overwrite", checkpoint=checkpoint, output=base, task="maps")
