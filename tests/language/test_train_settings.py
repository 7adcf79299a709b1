"""Settings of a training that cannot work are refused in one sentence before the base model is loaded."""

import contextlib
import importlib.util
import json
import shutil

import pytest
import transformers
from reference.sizes import structure_of
from shared import QUICKSTART

import mtl_lora
from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.base_model import BaseModel
from mtl_lora.errors import UserError
from mtl_lora.evaluation import load_questions
from mtl_lora.language.config import EvalConfig, TrainConfig
from mtl_lora.language.evaluate import Evaluator
from mtl_lora.language.evaluate import run as evaluate
from mtl_lora.language.examples import load_examples
from mtl_lora.language.tasks import COMMONSENSE
from mtl_lora.language.train import in_language_model


@pytest.fixture
def refused(tiny_base, records_file, cache_dir, tmp_path, monkeypatch):
    """Run training with settings that must be refused before the model is loaded; returns the sentence."""
    from mtl_lora.training.run import train as run

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


@pytest.mark.slow(1)
def test_more_tokens_than_the_base_has_positions_are_refused_at_the_check(refused, tiny_base, tmp_path, edit_json):
    base = shutil.copytree(tiny_base, tmp_path / "short")
    edit_json(base / "config.json", max_position_embeddings=64)
    assert "64 positions" in refused(base_model=str(base), check=True)
    asked = {"base_model": str(base), "data_dir": str(QUICKSTART / "test"), "tasks": ["boolq"], "template": "plain"}
    with pytest.raises(UserError, match=r"64 positions.*--max_new_tokens"):
        evaluate(EvalConfig(**asked, mode="generate", check=True))
    longest = max(
        len(question.prompt_ids) + len(made.encoder.option_ids(question.task, option))
        for made in [Evaluator(EvalConfig(**asked))]
        for question in load_questions(made, load_examples).questions
        for option in question.options
    )
    for positions, fits in ((longest, True), (longest - 1, False)):
        asked["base_model"] = str(shutil.copytree(base, tmp_path / str(positions)))
        edit_json(tmp_path / str(positions) / "config.json", max_position_embeddings=positions)
        wrong = pytest.raises(UserError, match=f"{positions} positions, fewer than the {longest} .* and an option")
        with contextlib.nullcontext() if fits else wrong:
            evaluate(EvalConfig(**asked, mode="score", check=True))


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


def test_layers_that_all_linear_leaves_out_are_named():
    fields = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "attn_layer_indices": [1]}
    model = structure_of(transformers.BambaConfig(**SIZES, **fields))
    _, (note,) = in_language_model(AdapterConfig(target_modules="all-linear", tasks=["a"]), model)
    assert note == "all-linear leaves out out_proj, which cannot carry an adapter here"


def test_names_and_expressions_together_are_one_expression():
    targets = TrainConfig(lora_target_modules=["o_proj", r".*\.0\..*\.(q|v)_proj"]).adapter_config(COMMONSENSE)
    layers = mtl_lora.adapter_layers(mtl_lora.inject(structure_of(transformers.LlamaConfig(**SIZES)), targets))
    assert [name.removeprefix("model.layers.") for name in layers] == [
        *(f"0.self_attn.{name}" for name in ("q_proj", "v_proj", "o_proj")),
        "1.self_attn.o_proj",
    ]


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero2.json", "config/zero3.json"])
def test_packaged_deepspeed_configuration_is_found_by_name(tmp_path, monkeypatch, name):
    from mtl_lora.training.distributed import zero_stage

    monkeypatch.chdir(tmp_path)
    assert f"zero{zero_stage(name)}" in name
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "zero3.json").write_text("{}")
    assert zero_stage("config/zero3.json") == 0, "a file of the caller goes first"


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


def test_a_run_that_ended_before_it_saved_anything_leaves_its_folder_free(train, tmp_path):
    (tmp_path / "out").mkdir()
    for name, left in (("run.json", {"settings": {}}), ("train_log.jsonl", {"step": 3})):
        (tmp_path / "out" / name).write_text(json.dumps(left))
    folder = train("out", max_steps=1)
    assert json.loads((folder / "run.json").read_text())["settings"]["max_steps"] == 1
    assert all(json.loads(line)["step"] == 1 for line in (folder / "train_log.jsonl").read_text().splitlines())
