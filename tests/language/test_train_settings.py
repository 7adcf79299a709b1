"""Settings of a training that cannot work are refused in one sentence before the base model is loaded."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import transformers
from shared import QUICKSTART

import mtl_lora
from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.base_model import BaseModel, structure_of
from mtl_lora.errors import UserError
from mtl_lora.language.config import EvalConfig, TrainConfig
from mtl_lora.language.evaluate import run as evaluate
from mtl_lora.language.tasks import COMMONSENSE
from mtl_lora.language.train import in_language_model


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


BAD_SETTINGS = {
    # name of the case: (settings, facts that the sentence holds beside the setting's name and value)
    "rank": ({"lora_r": 0}, ["at least 1"]),
    "rank a fraction": ({"lora_r": 1.5}, ["a whole number"]),
    "alpha": ({"lora_alpha": 0.0}, ["greater than 0"]),
    "dropout": ({"lora_dropout": 1.0}, ["below 1"]),
    "dropout negative": ({"lora_dropout": -0.1}, ["at least 0"]),
    "temperature": ({"temperature": 0.0}, ["greater than 0"]),
    "num_B": ({"num_B": 0}, ["at least 1"]),
    "method": ({"adapter_name": "lorra"}, ["lora"]),
    "no targets": ({"lora_target_modules": []}, []),
    "unknown target": ({"lora_target_modules": ["query"]}, ["query", "q_proj (2)", "k_proj (2)"]),
    "lambda_num": ({"lambda_num": 3}, ["8"]),
    "batch": ({"batch_size": 0}, ["at least 1"]),
    "batch a word": ({"batch_size": "all"}, ["a whole number"]),
    "budget": ({"token_budget": -1}, ["at least 0"]),
    "budget below a row": ({"token_budget": 30}, ["at least"]),
    "budget and pool": ({"token_budget": 2048, "length_pool": 1}, ["--length_pool"]),
    "sampling temperature": ({"sampling_temperature": 0.5}, ["at least 1"]),
    "accumulation": ({"gradient_accumulation_steps": 0}, ["at least 1"]),
    "learning rate": ({"learning_rate": 0.0}, ["greater than 0"]),
    "learning rate NaN": ({"learning_rate": float("nan")}, ["a number"]),
    "warm-up": ({"warmup_ratio": 1.0}, ["below 1"]),
    "epochs": ({"num_epochs": 0.0}, ["greater than 0"]),
    "steps": ({"max_steps": 0}, ["-1"]),
    "seed": ({"seed": -1}, ["at least 0"]),
    "cutoff": ({"cutoff_len": 0}, ["at least 1"]),
    "cutoff below the template": ({"cutoff_len": 20}, []),
    "template": ({"template": "alpacca"}, ["did you mean 'alpaca'?"]),
    "dtype": ({"dtype": "fp8"}, ["bf16"]),
    "dtype without a scaled loss": ({"dtype": "fp16"}, ["bf16"]),
    "held-out examples": ({"val_set_size": 96}, ["below"]),
    "tasks file": ({"tasks_file": "nowhere.json"}, []),
    "data file": ({"data_path": "nowhere.json"}, []),
    "data a folder": ({"data_path": "."}, []),
    "base model": ({"base_model": "./nowhere"}, ["smollm2-135m"]),
    "base model a file": ({"base_model": "file"}, ["smollm2-135m"]),
    "DeepSpeed": ({"deepspeed": "nowhere.json"}, []),
    "DeepSpeed by an unknown name": ({"deepspeed": "zero4"}, []),
    "DeepSpeed elsewhere": ({"deepspeed": "there/zero2.json"}, []),
    "DeepSpeed no JSON": ({"deepspeed": "file"}, ["JSON"]),
    "resume from nowhere": ({"resume_from_checkpoint": "nowhere"}, ["checkpoint-N"]),
    "resume nothing": ({"resume_from_checkpoint": "True"}, ["out"]),
    "resume and overwrite": (
        {"resume_from_checkpoint": "True", "overwrite_output_dir": True},
        ["--resume_from_checkpoint", "--overwrite_output_dir"],
    ),
    "cache below a file": ({"cache_dir": "file/rows"}, []),
    "output below a file": ({"output_dir": "file/out"}, []),
    "output a file": ({"output_dir": "file"}, []),
}
# Settings whose sentence names what they are instead of the flag.
SPOKEN = {
    "tasks_file": "tasks file",
    "data_path": "data file",
    "base_model": "model",
    "deepspeed": "DeepSpeed",
    "template": "template",
    "cache_dir": "cache folder",
    "output_dir": "file",
    "resume_from_checkpoint": "",
}


@pytest.mark.parametrize("settings, facts", BAD_SETTINGS.values(), ids=list(BAD_SETTINGS))
def test_setting_that_cannot_work_is_refused_before_the_model_loads(refused, tmp_path, settings, facts):
    (tmp_path / "file").write_text("not JSON")
    sentence = refused(**settings)
    (name, value), *_ = settings.items()
    assert SPOKEN.get(name, name) in sentence
    assert len(settings) > 1 or value in ([], "True") or str(value).strip("[]'") in sentence
    assert [fact for fact in facts if fact not in sentence] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"], "nothing may be left behind"


def test_more_tokens_than_the_base_has_positions_are_refused_at_the_check(refused, tiny_base, tmp_path, edit_json):
    base = shutil.copytree(tiny_base, tmp_path / "short")
    edit_json(base / "config.json", max_position_embeddings=64)
    assert "64 positions" in refused(base_model=str(base), check=True)
    with pytest.raises(UserError, match=r"64 positions.*--max_new_tokens"):
        evaluate(EvalConfig(base_model=str(base), data_dir=str(QUICKSTART / "test"), check=True))


@pytest.mark.parametrize(
    "package, settings", [("wandb", {"wandb_project": "p"}), ("tensorboard", {"tensorboard": True})]
)
def test_flag_whose_package_is_missing_says_how_to_install_it(refused, monkeypatch, package, settings):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    (flag_name,) = settings
    sentence = refused(**settings)
    assert f"--{flag_name}" in sentence and f"pip install {package}" in sentence


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(("targets", "count"), [("all-linear", 14), (["q_proj", "v_proj"], 4), (r".*\.q_proj", 2)])
def test_towers_that_text_does_not_reach_get_no_adapter(targets, count):
    vision = VISION | {"image_size": 32, "patch_size": 16}
    model = structure_of(transformers.Gemma3Config(text_config=SIZES, vision_config=vision, mm_tokens_per_image=4))
    adapter, (note,) = in_language_model(AdapterConfig(target_modules=targets, tasks=["a"]), model)
    weights = {name: weight.numel() for name, weight in model.named_parameters()}
    towers = sum(size for name, size in weights.items() if not name.startswith("model.language_model."))
    assert "model.vision_tower" in note and f"{100 * towers / sum(weights.values()):.1f} %" in note
    layers = mtl_lora.adapter_layers(mtl_lora.inject(model, adapter))
    assert len(layers) == count and all(name.startswith("model.language_model.") for name in layers)


def test_fused_experts_are_named_with_their_proportion_of_the_weights():
    model = structure_of(transformers.Qwen3MoeConfig(**SIZES, **EXPERTS))
    adapter, (note,) = in_language_model(AdapterConfig(target_modules="all-linear", tasks=["a"]), model)
    experts = 2 * 4 * (2 * 16 * 32 + 32 * 16)  # layers x experts x (gate and up, down)
    total = sum(weight.numel() for weight in model.parameters())
    assert adapter.target_modules == "all-linear"
    assert "mlp.experts.gate_up_proj" in note and f"{100 * experts / total:.1f} %" in note
    with pytest.raises(UserError, match=r"'down_proj'.*fused.*model\.layers\.0\.mlp\.experts\.down_proj"):
        in_language_model(AdapterConfig(target_modules=["q_proj", "down_proj"], tasks=["a"]), model)


def test_names_and_expressions_together_are_one_expression():
    targets = TrainConfig(lora_target_modules=["o_proj", r".*\.0\..*\.(q|v)_proj"]).adapter_config(COMMONSENSE)
    layers = mtl_lora.adapter_layers(mtl_lora.inject(structure_of(transformers.LlamaConfig(**SIZES)), targets))
    assert [name.removeprefix("model.layers.") for name in layers] == [
        *(f"0.self_attn.{name}" for name in ("q_proj", "v_proj", "o_proj")),
        "1.self_attn.o_proj",
    ]


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero2.json", "config/zero3.json"])
def test_packaged_deepspeed_configuration_is_found_by_name(tmp_path, monkeypatch, name):
    from mtl_lora.training.distributed import deepspeed_file

    monkeypatch.chdir(tmp_path)
    stage = json.loads(Path(deepspeed_file(name)).read_text())["zero_optimization"]["stage"]
    assert f"zero{stage}" in name
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "zero3.json").write_text("{}")
    assert deepspeed_file("config/zero3.json") == "config/zero3.json", "a file of the caller goes first"


@pytest.mark.parametrize("left", ["mtl_lora.safetensors", "checkpoint-3/trainer_state.json"])
def test_output_folder_that_holds_a_run_is_left_as_it_is(refused, tmp_path, left):
    path = tmp_path / "out" / left
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"step": 3}))
    sentence = refused()
    assert "out" in sentence and "--overwrite_output_dir" in sentence
    assert ("--resume_from_checkpoint True" in sentence) == left.startswith("checkpoint")
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == [path]
    assert path.read_text() == json.dumps({"step": 3})


@pytest.mark.parametrize("left", ["run.json", "train_log.jsonl"])
def test_a_run_that_ended_before_it_saved_anything_leaves_its_folder_free(train, tmp_path, left):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / left).write_text(json.dumps({"step": 3}))
    folder = train("out", max_steps=1)
    assert json.loads((folder / "run.json").read_text())["settings"]["max_steps"] == 1
    assert all(json.loads(line)["step"] == 1 for line in (folder / "train_log.jsonl").read_text().splitlines())
