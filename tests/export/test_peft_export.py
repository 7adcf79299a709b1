"""An exported folder is a plain PEFT LoRA that computes what the routed model computes; its card says what it is."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from export_cases import FOUR, TARGETS, TOLERANCE, difference, load_base, logits, peft_difference, routed, save_adapter
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from reference.architectures import OTHERS, Architecture
from reference.tiny import FACTORED, TASKS, adapted_llama, adapter_config, randomise
from safetensors import safe_open
from safetensors.torch import load_file
from shared import PROJECT
from torch import nn
from transformers import AutoModelForCausalLM

import mtl_lora
from mtl_lora import Provenance, UserError
from mtl_lora.adapter.checkpoint import read_config
from mtl_lora.artifacts import CHECKPOINT_CONFIG, CHECKPOINT_WEIGHTS, PEFT_WEIGHTS
from mtl_lora.base_model import BaseModel
from mtl_lora.embedded import MODELS
from mtl_lora.export.model_card import model_card, read_scores
from mtl_lora.export.peft import export_peft, saved_modules
from mtl_lora.language.tasks import Task, TaskSet
from mtl_lora.results import Results, TaskNames, TaskResult

RANKS = {"lora": 3, "dora": 3, "multilora": 9, "moelora": 6, "mtl_lora": 3, "mtl_lora_diagonal": 3}


def settings(folder: Path) -> dict:
    """The configuration of an exported task."""
    return json.loads((folder / "adapter_config.json").read_text())


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


# ---- what it computes ----


@pytest.mark.parametrize("label", FACTORED)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.slow
def test_peft_computes_what_the_routed_model_computes_for_every_task(bases, checkpoints, tmp_path, kind, label):
    folders = export_peft(checkpoints(kind, label), tmp_path / "peft")
    assert [folder.name for folder in folders] == TASKS
    model, own = load_base(bases[kind]), routed(bases[kind], checkpoints(kind, label))
    # The comparison could fail: the adapter changes a lot, and another task's weights compute something else.
    before, expected = logits(model), {task: logits(own, task) for task in TASKS}
    differs = difference(expected[TASKS[1]], expected[TASKS[0]]) > 100 * TOLERANCE
    assert differs == (label in ("moelora", "mtl_lora", "mtl_lora_diagonal"))
    for task, folder in zip(TASKS, folders, strict=True):
        if task == TASKS[0]:
            model = PeftModel.from_pretrained(model, folder, adapter_name=task).eval()
        else:
            model.load_adapter(folder, adapter_name=task)
            model.set_adapter(task)
        assert difference(logits(model), expected[task]) < TOLERANCE
        assert difference(before, expected[task]) > 0.1
    config = settings(folders[0])
    assert (config["r"], config["use_dora"]) == (RANKS[label], label == "dora")
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert (config["inference_mode"], config["lora_dropout"]) == (True, 0.0)
    assert config["fan_in_fan_out"] == (kind == "gpt2")
    assert sorted(config["target_modules"]) == sorted(TARGETS[kind]), "short names, which match nothing else"
    assert config["base_model_name_or_path"] == bases[kind]


@pytest.mark.parametrize(
    ("name", "kind", "whole"),
    [("T5", "SEQ_2_SEQ_LM", []), ("Bert", None, []), ("Bert", "SEQ_CLS", ["classifier"])],
    ids=str,
)
def test_an_adapter_that_was_put_on_another_model_in_python_is_of_the_kind_of_that_model(
    tmp_path, capsys, name, kind, whole
):
    (found,) = (each for each in OTHERS if each.name == name)
    model = found.build(torch.float32)
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    config = adapter_config(target_modules=list(found.attention), modules_to_save=whole)
    randomise(mtl_lora.inject(model, config))
    mtl_lora.save(model, tmp_path / "adapter")
    inputs, task = found.inputs(2), TASKS[1]
    expected = model(**inputs, task_ids=[task] * 2).logits
    (folder,) = export_peft(tmp_path / "adapter", tmp_path / "peft", [task])
    assert settings(folder)["task_type"] == kind and "vllm" not in capsys.readouterr().err
    loaded = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), folder).eval()
    assert difference(loaded(**inputs).logits, expected) < TOLERANCE


@pytest.mark.parametrize("scale", [{"alpha": 0.5}, {"alpha": 7.3}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("label", ["lora", "dora", "multilora", "mtl_lora"])
def test_scale_that_no_whole_alpha_gives_is_kept(bases, tmp_path, label, scale):
    checkpoint = save_adapter(bases["llama"], tmp_path / "checkpoint", label, **scale)
    (folder,) = export_peft(checkpoint, tmp_path / "peft", [TASKS[2]])
    assert type(settings(folder)["lora_alpha"]) is int
    assert peft_difference(bases["llama"], checkpoint, folder, TASKS[2]) < TOLERANCE


@pytest.mark.parametrize(
    "kind, targets",
    [
        ("llama", ["layers.1.self_attn.q_proj"]),
        ("llama", r"model\.layers\.0\..*_proj"),
        ("llama", "all-linear"),
        ("llama", ["lm_head"]),
        ("gpt2", ["attn.c_proj"]),  # an ending that the MLP has too
        ("gpt2", ["c_attn", "lm_head"]),  # Conv1D and nn.Linear, and a head tied to the embedding
    ],
    ids=str,
)
def test_peft_adapts_exactly_the_same_modules(bases, tmp_path, kind, targets):
    checkpoint = save_adapter(bases[kind], tmp_path / "checkpoint", "mtl_lora", target_modules=targets)
    (folder,) = export_peft(checkpoint, tmp_path / "peft", [TASKS[1]])
    model, own = PeftModel.from_pretrained(load_base(bases[kind]), folder).eval(), routed(bases[kind], checkpoint)
    adapted = [name for name, module in model.base_model.model.named_modules() if isinstance(module, LoraLayer)]
    assert adapted == list(mtl_lora.adapter_layers(own))
    assert settings(folder)["fan_in_fan_out"] == (kind == "gpt2") and settings(folder)["lora_dropout"] == 0
    assert difference(logits(model), logits(own, TASKS[1])) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_are_the_factors_bit_for_bit_in_their_dtype(bases, tmp_path, dtype):
    model = adapted_llama("mtl_lora", dtype)
    mtl_lora.save(model, tmp_path / "checkpoint", Provenance(bases["llama"]))
    (folder,) = export_peft(tmp_path / "checkpoint", tmp_path / "peft", ["birds"])
    tensors, expected = load_file(folder / "adapter_model.safetensors"), {}
    for name, layer in mtl_lora.adapter_layers(model).items():
        A, B, _ = layer.factors("birds")
        expected |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}


def test_modules_saved_whole_are_modules_to_save_of_peft(bases, tmp_path):
    entries = ["lm_head", "norm", "post_attention_layernorm"]
    checkpoint = save_adapter(bases["llama"], tmp_path / "checkpoint", "mtl_lora", modules_to_save=entries)
    for folder in export_peft(checkpoint, tmp_path / "peft", TASKS[:2]):
        assert peft_difference(bases["llama"], checkpoint, folder, folder.name) < TOLERANCE
        layers = [f"model.layers.{index}.post_attention_layernorm" for index in (0, 1)]
        assert settings(folder)["modules_to_save"] == [*layers, "model.norm", "lm_head"]


def test_a_module_inside_of_another_that_is_saved_whole_is_saved_with_it(bases, tmp_path):
    entries = ["model.layers.1.self_attn", "model.layers.1.self_attn.o_proj"]
    checkpoint = save_adapter(
        bases["llama"], tmp_path / "checkpoint", "mtl_lora", modules_to_save=entries, target_modules=["up_proj"]
    )
    (folder,) = export_peft(checkpoint, tmp_path / "peft", ["maps"])
    assert settings(folder)["modules_to_save"] == entries[:1]
    assert peft_difference(bases["llama"], checkpoint, folder, "maps") < TOLERANCE


@pytest.mark.parametrize(
    "kind, entry, found",
    [
        ("gpt2", "lm_head", "lm_head.weight"),  # tied to the embedding
        ("gpt2", "*.ln_1.bias", "transformer.h.0.ln_1.bias"),  # a weight and no module
        ("llama", "model.norm.weight", "model.norm.weight"),
    ],
)
def test_modules_that_peft_cannot_save_can_be_merged(refused, command, bases, tmp_path, kind, entry, found):
    checkpoint = save_adapter(bases[kind], tmp_path / "checkpoint", "mtl_lora", modules_to_save=[entry])
    sentence = refused("peft", checkpoint=checkpoint)
    assert found in sentence and "use the merge command" in sentence
    command("merge", checkpoint=checkpoint, task="maps", output=tmp_path / "merged")
    expected = logits(routed(bases[kind], checkpoint), "maps")
    assert difference(logits(load_base(tmp_path / "merged")), expected) < TOLERANCE


def test_a_module_whose_name_ends_anothers_is_not_exported():
    # PEFT takes every module whose name ends so, here the post_norm too.
    base = nn.ModuleDict({"body": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "post_norm": nn.LayerNorm(4)})
    adapter = adapter_config("lora", target_modules=["body"], modules_to_save=["norm"])
    with pytest.raises(UserError, match=r"^post_norm of modules_to_save"):
        saved_modules("checkpoint", SimpleNamespace(adapter_config=adapter), base)


@pytest.mark.parametrize("kind, label", [("llama", "moelora"), ("gpt2", "dora"), ("gpt2", "mtl_lora")])
def test_weights_of_the_base_are_not_needed_nor_is_its_configuration(bases, tmp_path, capsys, kind, label):
    base = shutil.copytree(bases[kind], tmp_path / "base")
    checkpoint = save_adapter(str(base), tmp_path / "checkpoint", label)
    (base / "model.safetensors").unlink()
    (without_weights,) = export_peft(checkpoint, tmp_path / "peft1", ["maps"])
    shutil.rmtree(base)
    (without_base,) = export_peft(checkpoint, tmp_path / "peft2", ["maps"])
    assert "note: layer names are not compared with the base model's" in capsys.readouterr().err
    assert sorted(settings(without_weights)["target_modules"]) == sorted(TARGETS[kind])
    names = mtl_lora.adapter_layers(routed(bases[kind], checkpoint))
    assert sorted(settings(without_base)["target_modules"]) == sorted(names)
    for folder in (without_weights, without_base):
        assert peft_difference(bases[kind], checkpoint, folder, "maps") < TOLERANCE


def test_adapter_without_tasks_is_one_folder(bases, tmp_path):
    checkpoint = save_adapter(bases["llama"], tmp_path / "checkpoint", "dora", tasks=[])
    assert export_peft(checkpoint, tmp_path / "peft") == [tmp_path / "peft" / "all"]
    plain = PeftModel.from_pretrained(load_base(bases["llama"]), tmp_path / "peft" / "all").eval()
    assert difference(logits(plain), logits(routed(bases["llama"], checkpoint))) < TOLERANCE


# ---- as a plain LoRA, and in vLLM ----


@pytest.mark.parametrize(("label", "rank"), [("mtl_lora", 9), ("multilora", 9), ("dora", 16)])
def test_a_plain_lora_of_the_whole_rank_is_exact(bases, checkpoints, tmp_path, label, rank):
    checkpoint = checkpoints("llama", label)
    (folder,) = export_peft(checkpoint, tmp_path / "peft", ["maps"], form="lora", rank=rank)
    assert settings(folder)["use_dora"] is False and settings(folder)["modules_to_save"] is None
    assert settings(folder)["r"] == {"mtl_lora": 3}.get(label, rank), "no more than there is"
    assert peft_difference(bases["llama"], checkpoint, folder, "maps") < TOLERANCE
    with safe_open(folder / "adapter_model.safetensors", "pt") as opened:
        assert float(opened.metadata()["relative_error"]) < 1e-6


@pytest.mark.parametrize(("label", "large"), [("mtl_lora", 1024), ("dora", 1024), ("dora", 0)])
def test_a_smaller_plain_lora_is_the_closest_and_says_what_it_lacks(
    bases, checkpoints, tmp_path, capsys, monkeypatch, label, large
):
    monkeypatch.setattr("mtl_lora.export.peft._LARGE", large)
    checkpoint = checkpoints("llama", label)
    (folder,) = export_peft(checkpoint, tmp_path / "peft", ["maps"], form="lora", rank=2)
    lost = whole = 0.0
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, layer in mtl_lora.adapter_layers(routed(bases["llama"], checkpoint)).items():
        update = layer.merged_weight("maps").detach().double() - layer.base_layer.weight.double()
        U, S, V = torch.linalg.svd(update)
        closest = (U[:, :2] * S[:2]) @ V[:2]
        A, B = (tensors[f"base_model.model.{name}.lora_{one}.weight"].double() for one in "AB")
        torch.testing.assert_close(B @ A * settings(folder)["lora_alpha"] / 2, closest, rtol=0, atol=1e-5)
        lost, whole = lost + S[2:].square().sum().item(), whole + S.square().sum().item()
    error = f"relative error of the update {(lost / whole) ** 0.5:.3g}"
    assert error in card(folder) and f"{folder}: rank 2, {error}" in capsys.readouterr().err
    torch.randn(3)  # a large update is projected at random, but by the same draws in every export
    (again,) = export_peft(checkpoint, tmp_path / "again", ["maps"], form="lora", rank=2)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(again / PEFT_WEIGHTS).items())


def test_a_plain_lora_of_an_adapter_that_changes_nothing_lacks_nothing(bases, tmp_path):
    model = mtl_lora.inject(load_base(bases["llama"]), adapter_config("mtl_lora", target_modules=["q_proj"]))
    mtl_lora.save(model, tmp_path / "fresh", Provenance(bases["llama"]))
    (folder,) = export_peft(tmp_path / "fresh", tmp_path / "peft", ["maps", "maps"], form="lora", rank=2)
    assert "relative error of the update 0 " in card(folder)


@pytest.mark.parametrize(("targets", "exported"), [(["q_proj"], True), (["q_proj", "gate_proj"], False)])
def test_what_peft_would_move_to_fused_experts_is_refused(tmp_path, targets, exported):
    experts = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
    architecture = Architecture("Qwen3Moe", (), 0, {"num_key_value_heads": 2, "head_dim": 4, **experts})
    architecture.build(torch.float32).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    mtl_lora.save(mtl_lora.inject(model, adapter_config(target_modules=targets)), tmp_path / "adapter")
    if exported:
        assert export_peft(tmp_path / "adapter", tmp_path / "peft", [TASKS[0]])
    else:
        with pytest.raises(UserError, match=r"gate_proj for the base model's fused experts.*merge"):
            export_peft(tmp_path / "adapter", tmp_path / "peft", [TASKS[0]])


@pytest.mark.slow(1)
def test_the_line_that_serves_all_folders_in_vllm_or_the_reason_that_none_does(bases, checkpoints, tmp_path, capsys):
    def said(checkpoint, name, tasks=None, **flags) -> str:
        export_peft(checkpoint, tmp_path / name, tasks, **flags)
        return capsys.readouterr().err.splitlines()[-1]

    line = said(checkpoints("llama", "mtl_lora"), "two", ["maps", "birds"]).split()
    modules = [f"{task}={tmp_path / 'two' / task}" for task in ("maps", "birds")]
    assert line == [
        "vllm",
        "serve",
        bases["llama"],
        "--enable-lora",
        "--max-lora-rank",
        "8",
        "--lora-modules",
        *modules,
    ]
    assert "DoRA" in said(checkpoints("llama", "dora"), "dora", ["maps"])
    for rank, largest in ((8, 8), (9, 16)):
        line = said(checkpoints("llama", "dora"), f"as {rank}", ["maps"], form="lora", rank=rank)
        assert f"--max-lora-rank {largest} " in line
    whole = save_adapter(bases["llama"], tmp_path / "saved", "lora", modules_to_save=["model.norm"])
    assert "model.norm" in said(whole, "norm", ["maps"]) and "merge" in said(whole, "again", ["maps"])
    wide = save_adapter(bases["llama"], tmp_path / "wide", "lora", rank=513, target_modules=["q_proj"])
    assert "above 512" in said(wide, "above", ["maps"])


def test_a_plain_lora_needs_its_rank_and_no_modules_beside_it(refused, bases, checkpoint, tmp_path):
    assert "--as lora and --rank R" in refused("peft", "--as", "lora", checkpoint=checkpoint)
    assert "--as lora and --rank R" in refused("peft", checkpoint=checkpoint, rank=4)
    whole = save_adapter(bases["llama"], tmp_path / "saved", "lora", modules_to_save=["model.norm"])
    assert "modules saved whole" in refused("peft", "--as", "lora", checkpoint=whole, rank=4)


# ---- the card ----


def write_results(folder: Path, checkpoint: Path, sha256: str | None = None) -> None:
    """An evaluation of the checkpoint's weights, or of those with another hash."""
    Results(
        name="run",
        mode="score",
        tasks={"maps": TaskResult("accuracy", 0.625, 0.0625, 60)},
        task_set=TaskNames.from_json(FOUR.to_json()),
        adapter={"weights_sha256": sha256 or read_config(checkpoint).weights_sha256},
    ).save(folder / "results.json")


def test_card_has_result_recipe_prompt_and_use(bases, checkpoint, tmp_path, monkeypatch):
    write_results(checkpoint / "evaluation", checkpoint)
    maps, birds = export_peft(checkpoint, tmp_path / "peft", ["maps", "birds"])
    assert "Result on maps: Accuracy 62.5 % ± 6.2 (n = 60, protocol `score`)." in card(maps)
    assert "Result on birds: not measured." in card(birds)
    rows = ["method | mtl_lora", "rank | 3", "alpha | 6", "temperature | 0.5", "tasks | tides, maps, birds, rivers"]
    assert all(f"| {row} |" in card(maps) for row in rows)
    assert "num_experts" not in card(maps), "another method's hyperparameter"
    assert "arxiv.org/abs/2410.09437" in card(maps)
    assert repr("### Instruction:\n{instruction}\n\n### Response:\n")[1:-1] in card(maps)
    assert bases["llama"] not in card(maps) and str(tmp_path) not in card(maps), "a path of this machine"
    assert "base_model:" not in card(maps), "which the hub takes for a name of its own"
    named = model_card("maps", read_config(checkpoint), "meta-llama/Llama-2-7b-hf", 3, None)
    assert 'base_model: "meta-llama/Llama-2-7b-hf"' in named and "base = 'meta-llama/Llama-2-7b-hf'" in named
    monkeypatch.chdir(tmp_path)
    Path("own/base").mkdir(parents=True)
    found = model_card("maps", read_config(checkpoint), "own/base", 3, None)
    assert "base_model:" not in found and "own/base" not in found, "a folder that looks like a name of the hub"
    assert 'base_model: "gpt2"' in model_card("maps", read_config(checkpoint), "gpt2", 3, None)
    embedded = model_card("maps", read_config(checkpoint), "minilm-l6", 3, None)
    assert "base_model:" not in embedded
    config = dataclasses.replace(read_config(checkpoint), library_version="<b>")
    config.provenance["train_settings"] = {"start_from": "/home/me/run", "batch_size": 7}
    hostile = model_card("<img src=x>", config, "gpt2", 3, None)
    assert "| \\<b> |" in hostile
    assert "| started from | another checkpoint |" in hostile and "| batch_size | 7 |" in hostile
    assert "/home/me" not in hostile and "started from" not in card(maps)
    assert "# \\<img src=x>:" in hostile and "Result on \\<img src=x>:" in hostile
    assert MODELS["minilm-l6"].note in embedded and "BaseModel('minilm-l6').path" in embedded


def test_a_card_says_how_answers_are_written_and_which_class_loads_the_base(checkpoint):
    tasks = TaskSet((Task("mood", 0, options=("happy", "sad"), question="How is it?"), Task("free", 1)))

    def written(task: str, base_class: str) -> str:
        config = read_config(checkpoint)
        config.provenance.update(task_set=tasks.to_json(), base_class=base_class)
        return model_card(task, config, "own/base", 3, None)

    mood, free = written("mood", "LlamaForCausalLM"), written("free", "T5ForConditionalGeneration")
    assert "An answer is one of `'happy'`, `'sad'`. It follows `'the correct answer is '`." in mood
    assert repr("How is it?\n\n{text}") in mood and "pipeline_tag: text-generation" in mood
    assert "An answer is" not in free and "pipeline_tag" not in free and "AutoModelFor" not in free
    assert "import T5ForConditionalGeneration, AutoTokenizer" in free


def test_card_of_a_training_of_version_0_1_has_its_settings_and_its_result(monkeypatch, tmp_path):
    monkeypatch.chdir(PROJECT / "tests" / "fixtures" / "v1")
    results = "evaluations/mtl_lora/score"
    (folder,) = export_peft("checkpoints/mtl_lora", tmp_path / "peft", ["hellaswag"], results=results)
    measured = json.loads(Path(results, "results.json").read_text())["tasks"]["hellaswag"]
    trained = json.loads(Path("checkpoints/mtl_lora/run.json").read_text())["settings"]
    assert f"Accuracy {100 * measured['accuracy']:.1f} %" in card(folder)
    assert f"| learning_rate | {trained['learning_rate']} |" in card(folder)
    assert trained["data_path"] not in card(folder) and "lora_r" not in card(folder)


def test_results_count_if_they_are_of_the_same_weights(checkpoint, tmp_path, refused):
    write_results(checkpoint / "evaluation", checkpoint, "0" * 64)
    assert "Result on maps: not measured." in card(export_peft(checkpoint, tmp_path / "own", ["maps"])[0])
    results = checkpoint / "evaluation" / "results.json"
    assert "does not belong to this checkpoint's weights" in refused("peft", checkpoint=checkpoint, results=results)
    write_results(tmp_path / "named", checkpoint)
    for index, path in enumerate((tmp_path / "named", tmp_path / "named" / "results.json")):
        assert "62.5 %" in card(export_peft(checkpoint, tmp_path / str(index), ["maps"], results=path)[0])


@pytest.mark.parametrize(
    ("metric", "shown"),
    [("f1", "F1 62.5 % ± 6.2"), ("matthews", "Matthews 62.5 ± 6.2"), ("mean_angle", "Mean angle 0.6 ± 0.1")],
)
def test_a_score_is_in_the_unit_of_its_metric(checkpoint, tmp_path, metric, shown):
    config = read_config(checkpoint)
    Results(
        name="run",
        tasks={"maps": TaskResult(metric, 0.625, 0.0625, 60)},
        task_set=TaskNames.from_json(FOUR.to_json()),
        adapter={"weights_sha256": config.weights_sha256},
    ).save(tmp_path / "results.json")
    assert read_scores(checkpoint, config, tmp_path / "results.json") == {"maps": f"{shown} (n = 60)"}


# ---- the command ----


def test_command_writes_one_folder_per_task_and_prints_them(command, checkpoints, tmp_path):
    printed = command("peft", checkpoint=checkpoints("llama", "lora"), output=tmp_path / "new" / "peft")
    assert printed == [str(tmp_path / "new" / "peft" / task) for task in TASKS]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["peft"]
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert all({path.name for path in Path(folder).iterdir()} == files for folder in printed)


@pytest.mark.parametrize("overwrite", [["--overwrite"], ["--overwrite", "True"]], ids=str)
def test_earlier_export_is_replaced_if_asked(command, refused, bases, checkpoints, tmp_path, overwrite):
    base = shutil.copytree(bases["llama"], tmp_path / "moved")
    flags = {"checkpoint": checkpoints("llama", "mtl_lora"), "output": tmp_path / "peft", "base_model": base}
    command("peft", tasks="maps", **flags)
    assert "pass --overwrite to replace it" in refused("peft", tasks="rivers, tides", **flags)
    printed = command("peft", *overwrite, tasks="rivers, tides", **flags)
    assert printed == [str(tmp_path / "peft" / task) for task in ("rivers", "tides")]
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == ["rivers", "tides"]
    assert settings(tmp_path / "peft" / "tides")["base_model_name_or_path"] == str(base)


def test_module_runs_from_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "mtl_lora.export", "pfet"], capture_output=True, text=True, timeout=120
    )
    error = "error: unknown command 'pfet' (did you mean 'peft'?); see mtl-lora export --help\n"
    assert (done.returncode, done.stderr) == (2, error)


def test_help_lists_the_commands_and_their_flags(command, capsys):
    overview = "\n".join(command("--help"))
    assert all(name in overview for name in ("peft", "merge", "import-peft", "import-original"))
    for name, flags in {
        "peft": "checkpoint tasks results",
        "merge": "checkpoint task dtype",
        "import-peft": "peft tasks_file method num_B temperature seed template",
        "import-original": "file tasks_file alpha temperature",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            command(name, "--help")
        shown = capsys.readouterr().out
        assert stopped.value.code == 0
        assert all(f"--{flag}  (" in shown for flag in f"{flags} base_model output overwrite trust_remote_code".split())


# ---- refusals ----


def bytes_of_the_weights(change):
    def damage(checkpoint):
        (checkpoint / CHECKPOINT_WEIGHTS).write_bytes(change((checkpoint / CHECKPOINT_WEIGHTS).read_bytes()))

    return damage


def configuration(part: str, **changes):
    def damage(checkpoint):
        value = json.loads((checkpoint / CHECKPOINT_CONFIG).read_text())
        value[part] |= changes
        (checkpoint / CHECKPOINT_CONFIG).write_text(json.dumps(value))

    return damage


def broken_results(checkpoint):
    (checkpoint / "evaluation").mkdir()
    (checkpoint / "evaluation" / "results.json").write_text('{"name": "run", "tasks": {"maps": 0.5}}')


DAMAGED = {
    "bit at the start": (bytes_of_the_weights(lambda b: bytes([b[0] ^ 4]) + b[1:]), "safetensors is damaged"),
    "bit of the header": (bytes_of_the_weights(lambda b: b[:50] + bytes([b[50] ^ 4]) + b[51:]), "is damaged"),
    "bit at the end": (bytes_of_the_weights(lambda b: b[:-1] + bytes([b[-1] ^ 1])), "safetensors is damaged"),
    "cut off": (bytes_of_the_weights(lambda b: b[:-4]), "safetensors is damaged"),
    "no base": (configuration("provenance", base_model=None), "does not record its base model; pass --base_model"),
    "another base": (configuration("provenance", base_fingerprint="0" * 64), "was trained on another base model"),
    "no checkpoint": (lambda checkpoint: (checkpoint / CHECKPOINT_CONFIG).unlink(), CHECKPOINT_CONFIG),
}
ONLY_PEFT = {
    "task": (configuration("adapter", tasks=["a/../b", *TASKS[1:]]), "the task 'a/../b' cannot name a folder"),
    "empty name": (configuration("adapter", tasks=["", *TASKS[1:]]), "the task '' cannot name a folder"),
    "results": (broken_results, "results.json: tasks.maps"),
}


@pytest.mark.parametrize(
    "name, words, case",
    [("peft", {}, case) for case in DAMAGED | ONLY_PEFT] + [("merge", {"task": "maps"}, case) for case in DAMAGED],
)
def test_damaged_checkpoint_is_one_sentence(refused, checkpoint, name, words, case):
    damage, message = (DAMAGED | ONLY_PEFT)[case]
    damage(checkpoint)
    assert message in refused(name, checkpoint=checkpoint, **words)


def test_checkpoint_that_does_not_fit_the_base_names_what_is_wrong(refused, bases, checkpoint, tmp_path, edit_json):
    base = shutil.copytree(bases["llama"], tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    edit_json(base / "config.json", intermediate_size=32)
    sentence = refused("peft", checkpoint=checkpoint, base_model=base)
    assert "mlp.down_proj.lora_A has shape [3, 24], not [3, 32]" in sentence
    configuration("provenance", base_fingerprint=None)(checkpoint)
    sentence = refused("peft", checkpoint=checkpoint, base_model=bases["gpt2"])
    assert "no linear layer is named 'q_proj'; this model has c_attn (2)" in sentence


@pytest.mark.parametrize("name, words", [("peft", {"tasks": "maps,oceans"}), ("merge", {"task": "oceans"})])
def test_unknown_task_lists_the_tasks(refused, checkpoints, name, words):
    sentence = refused(name, checkpoint=checkpoints("llama", "mtl_lora"), **words)
    assert sentence == "there is no task 'oceans'; the adapter's tasks are tides 0, maps 1, birds 2, rivers 3"


@pytest.mark.parametrize("name, words", [("peft", {}), ("merge", {"task": "maps"})])
def test_method_without_factors_is_refused(refused, checkpoints, name, words):
    sentence = refused(name, checkpoint=checkpoints("llama", "hydralora"), **words)
    assert "HydraLoRA has no factors, since its gate depends on the input" in sentence


@pytest.mark.parametrize("label", ["dora", "multilora"])
def test_layers_for_which_peft_has_no_place_in_one_file_are_refused(refused, bases, tmp_path, label):
    targets = {"target_modules": ["q_proj", "v_proj"], "task_modules": ["q_proj"]}
    checkpoint = save_adapter(bases["llama"], tmp_path / "checkpoint", label, **targets)
    sentence = refused("peft", checkpoint=checkpoint)
    assert "v_proj" in sentence and "q_proj" in sentence and "--as lora --rank R" in sentence
    (folder, *_) = export_peft(checkpoint, tmp_path / "peft", form="lora", rank=16)
    model = PeftModel.from_pretrained(load_base(bases["llama"]), folder).eval()
    assert difference(logits(model), logits(routed(bases["llama"], checkpoint), TASKS[0])) < TOLERANCE


def test_wrong_flags_are_one_sentence(refused):
    assert "--checkpoint is required" in refused("peft")
    assert "--taks (did you mean 'tasks'?)" in refused("peft", checkpoint="x", taks="maps")
    assert "dtype must be one of" in refused("merge", checkpoint="x", dtype="int8")


# ---- in lm-evaluation-harness ----


def test_lm_evaluation_harness_loads_an_exported_folder(tiny_base, tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed; pip install lm-eval==0.4.13 to run this")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    checkpoint = save_adapter(tiny_base, tmp_path / "checkpoint", "mtl_lora")
    (folder,) = export_peft(checkpoint, tmp_path / "peft", [TASKS[1]])
    pairs = [("A lamp gives", " light"), ("Soup is best", " hot")]

    def scores(**options) -> list[float]:
        model = HFLM(pretrained=tiny_base, device="cpu", dtype="float32", batch_size=2, **options)
        requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
        return [score for score, _ in model.loglikelihood(requests)]

    model, tokenizer, expected = routed(tiny_base, checkpoint), BaseModel(tiny_base).tokenizer(), []
    for context, answer in pairs:
        ids, tail = tokenizer(context)["input_ids"], tokenizer(answer)["input_ids"]
        with torch.no_grad():
            steps = model(input_ids=torch.tensor([ids + tail]), task_ids=[TASKS[1]]).logits[0].log_softmax(dim=-1)
        expected.append(sum(steps[len(ids) + i - 1, token].item() for i, token in enumerate(tail)))
    assert scores(peft=str(folder)) == pytest.approx(expected, rel=1e-4)
    assert scores() != pytest.approx(expected, rel=1e-2)


def test_a_plain_lora_of_a_conv1d_is_that_of_its_transposed_weight(bases, tmp_path):
    """Of a square one, whose shape does not tell."""
    checkpoint = save_adapter(bases["gpt2"], tmp_path / "checkpoint", "dora", target_modules=["attn.c_proj"])
    (folder,) = export_peft(checkpoint, tmp_path / "peft", ["maps"], form="lora", rank=16)
    assert peft_difference(bases["gpt2"], checkpoint, folder, "maps") < TOLERANCE


def test_a_plain_lora_of_a_dora_in_float64_is_worked_out_in_it(bases, tmp_path):
    mtl_lora.save(adapted_llama("dora", torch.float64), tmp_path / "checkpoint", Provenance(bases["llama"]))
    (folder,) = export_peft(tmp_path / "checkpoint", tmp_path / "peft", ["maps"], form="lora", rank=2)
    tensors = load_file(folder / "adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float64}
