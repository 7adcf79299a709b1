"""A merged folder is a plain transformers model that computes what the routed model computes for one task."""

import json
import shutil

import pytest
import torch
from export_cases import TARGETS, TOLERANCE, load_base, logits, merged_difference, relative_difference, save_adapter
from reference.tiny import FACTORED, TASKS, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import mtl_lora
from mtl_lora.adapter.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from mtl_lora.export.merged import export_merged


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("label", FACTORED)
@pytest.mark.parametrize("kind", TARGETS)
def test_merged_model_computes_what_the_routed_model_computes(bases, checkpoints, tmp_path, kind, label, task):
    folder = export_merged(checkpoints(kind, label), tmp_path / "merged", task, dtype="fp32")
    assert merged_difference(bases[kind], checkpoints(kind, label), folder, task) < TOLERANCE
    assert relative_difference(logits(load_base(folder)), logits(load_base(bases[kind]))) > 0.1


@pytest.mark.parametrize("kind", TARGETS)
def test_merged_folder_is_plain_and_safetensors_alone(bases, checkpoints, tmp_path, kind):
    folder = export_merged(checkpoints(kind, "mtl_lora"), tmp_path / "merged", "maps")
    assert {path.name for path in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    model, base = load_base(folder), load_base(bases[kind])
    assert type(model) is type(base)
    assert model.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("targets", [["lm_head"], ["c_attn", "lm_head"]], ids=str)
def test_changed_head_is_no_longer_tied_to_the_embedding(bases, tmp_path, targets):
    checkpoint = save_adapter(bases["gpt2"], tmp_path / "checkpoint", "mtl_lora", target_modules=targets)
    folder = export_merged(checkpoint, tmp_path / "merged", "birds")
    assert merged_difference(bases["gpt2"], checkpoint, folder, "birds") < TOLERANCE


def test_tokenizer_of_the_base_stands_beside_the_model(trained, tiny_base, tmp_path):
    folder = export_merged(trained, tmp_path / "merged", "piqa")
    own, base = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tiny_base)
    assert own("A question, with an answer.") == base("A question, with an answer.")
    assert (own.eos_token, own.pad_token) == (base.eos_token, base.pad_token)


def test_base_without_a_tokenizer_is_noted(checkpoints, tmp_path, capsys):
    export_merged(checkpoints("llama", "lora"), tmp_path / "merged", "maps")
    assert "note: no tokenizer was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stored, asked, expected",
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float32),
        (torch.float32, "bf16", torch.bfloat16),
        (torch.bfloat16, "fp32", torch.float32),
    ],
    ids=str,
)
def test_dtype_is_the_base_models_unless_said_otherwise(bases, tmp_path, stored, asked, expected):
    base = tmp_path / "base"
    load_base(bases["llama"]).to(stored).save_pretrained(base)
    checkpoint = save_adapter(str(base), tmp_path / "checkpoint", "lora")
    model = AutoModelForCausalLM.from_pretrained(export_merged(checkpoint, tmp_path / "merged", "maps", dtype=asked))
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_task_can_be_left_out_where_all_are_the_same(command, bases, checkpoints, tmp_path):
    for name, flags in (("one", {"task": "maps"}), ("any", {})):
        printed = command("merge", checkpoint=checkpoints("llama", "dora"), output=tmp_path / name, **flags)
        assert printed == [str(tmp_path / name)]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "any")]
    assert weights[0] == weights[1]


# ---- refusals ----


def test_task_must_be_said_where_tasks_differ(refused, checkpoint, tmp_path):
    sentence = refused("merge", checkpoint=checkpoint, output=tmp_path / "merged")
    assert sentence == "mtl_lora needs a task; pass --task, one of tides, maps, birds, rivers"


def test_unknown_task_names_the_tasks_there_are(refused, checkpoint, tmp_path):
    sentence = refused("merge", checkpoint=checkpoint, output=tmp_path / "merged", task="oceans")
    assert sentence == "there is no task 'oceans'; the adapter's tasks are tides, maps, birds, rivers"


def test_quantised_base_is_refused(refused, bases, tmp_path, edit_json):
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    checkpoint = save_adapter(str(base), tmp_path / "checkpoint", "mtl_lora")
    edit_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    sentence = refused("merge", checkpoint=checkpoint, output=tmp_path / "merged", task="maps")
    assert "is quantised and cannot take the adapter into its weights" in sentence


def test_another_base_is_refused(refused, checkpoint, tmp_path):
    other = tmp_path / "other"
    tiny_llama(torch.float32, seed=5).save_pretrained(other)
    sentence = refused("merge", checkpoint=checkpoint, output=tmp_path / "merged", task="maps", base_model=other)
    assert "was trained on another base model than" in sentence


@pytest.mark.parametrize("position", [0, 50, -1])
def test_damaged_checkpoint_is_refused(refused, checkpoint, tmp_path, position):
    content = bytearray((checkpoint / WEIGHTS_NAME).read_bytes())
    content[position] ^= 4
    (checkpoint / WEIGHTS_NAME).write_bytes(content)
    sentence = refused("merge", checkpoint=checkpoint, output=tmp_path / "merged", task="maps")
    assert "mtl_lora.safetensors is damaged" in sentence


def test_checkpoint_that_does_not_say_its_base_is_refused(refused, checkpoint, tmp_path, edit_json):
    edit_json(checkpoint / CONFIG_NAME, origin={})
    sentence = refused("merge", checkpoint=checkpoint, output=tmp_path / "merged", task="maps")
    assert "does not say its base model; pass --base_model" in sentence


def test_base_that_is_read_is_never_replaced(refused, bases, tmp_path):
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    checkpoint = save_adapter(str(base), tmp_path / "checkpoint", "mtl_lora")
    sentence = refused("merge", "--overwrite", checkpoint=checkpoint, output=base, task="maps")
    assert "holds what is read" in sentence


def test_merged_folder_can_be_trained_on_again(checkpoints, tmp_path):
    folder = export_merged(checkpoints("llama", "mtl_lora"), tmp_path / "merged", "maps")
    again = save_adapter(str(folder), tmp_path / "again", "mtl_lora")
    assert json.loads((again / CONFIG_NAME).read_text())["origin"]["base_model"] == str(folder)
    assert mtl_lora.adapter_layers(mtl_lora.load(load_base(folder), again))
