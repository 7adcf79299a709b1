"""The training recipes: every setting that they list reaches the training."""

import json
import os
import subprocess
import sys

import pytest
from shared import PROJECT

from mtl_lora import systems

RECIPES = sorted(
    path.name
    for path in (PROJECT / "script").glob("*.sh")
    if "usage_if" in path.read_text() and not path.stem.endswith(("_eval", "recipe"))
)
# What script/recipe.sh lists, and the flag that it sets; methods that have one of the last three.
SETTINGS = {
    "BASE_MODEL": ("base_model", "own"),
    "DATA_PATH": ("data_path", "own.json"),
    "OUTPUT_PATH": ("output_dir", "out"),
    "CACHE_PATH": ("cache_dir", "rows"),
    "BATCH_SIZE": ("batch_size", "60"),
    "ACCUMULATION": ("gradient_accumulation_steps", "2"),
    "MAX_STEPS": ("max_steps", "7"),
    "EPOCHS": ("num_epochs", "5.5"),
    "LEARNING_RATE": ("learning_rate", "0.0123"),
    "WARMUP": ("warmup_ratio", "0.123"),
    "DROPOUT": ("lora_dropout", "0.234"),
    "TARGETS": ("lora_target_modules", "one,two"),
    "MAX_GRAD_NORM": ("max_grad_norm", "0.345"),
    "SEED": ("seed", "1234"),
    "DTYPE": ("dtype", "bf16"),
    "CUTOFF_LEN": ("cutoff_len", "77"),
    "DEEPSPEED": ("deepspeed", "own_zero.json"),
    "NUM_B": ("num_B", "5"),
    "TEMPERATURE": ("temperature", "0.5"),
    "NUM_EXPERTS": ("num_experts", "3"),
}
OF_METHODS = {"num_B": ["mtl_lora", "multilora", "hydralora"], "temperature": ["mtl_lora"], "num_experts": ["moelora"]}


def flags_of(recipe: str, tmp_path, **settings: str) -> dict[str, str]:
    """The flags with which a recipe starts its training, by name; the training itself is left out."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec "{sys.executable}" "$@"\nprintf "%s\\n" "$@" > words\n')
    program.chmod(0o755)
    environment = {"VENV": "", "PATH": f"{tmp_path}:{os.environ['PATH']}", "LAUNCHER": "python", **settings}
    arguments = ["8"] if recipe.startswith("swin") else ["8", "16"]
    command = ["bash", PROJECT / "script" / recipe, *arguments]
    subprocess.run(command, env={**os.environ, **environment}, cwd=tmp_path, check=True)
    script, *words = (tmp_path / "words").read_text().splitlines()
    assert script == f"{PROJECT}/finetune.py"
    pairs = [*zip(words[::2], words[1::2], strict=True)]
    flags = {name.removeprefix("--"): value for name, value in pairs}
    assert len(flags) == len(pairs)
    return flags


@pytest.mark.parametrize(
    ("recipe", "more"),
    [*((recipe, {}) for recipe in RECIPES), ("glue_mlora.sh", {"METHOD": "moelora"})],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()),
)
def test_every_setting_of_a_recipe_reaches_its_training(recipe, more, tmp_path):
    found = flags_of(recipe, tmp_path, **{name: value for name, (_, value) in SETTINGS.items()}, **more)
    system, method = found.pop("system", "language"), found["adapter_name"]
    known = systems.part(system, "config").TrainConfig.flags()
    assert {*found} <= {name for flag in known for name in (flag.name, *flag.metadata.get("aliases", ()))}
    expected = {flag: value for flag, value in SETTINGS.values() if method in OF_METHODS.get(flag, [method])}
    if system == "dense":  # without texts, and without DeepSpeed
        del expected["cutoff_len"]
        expected["deepspeed"] = "none"
    if system == "image_text":  # a step has BATCH_SIZE examples of VQA, in ACCUMULATION parts
        expected["batch_size"] = "30"
    assert {flag: found.get(flag) for flag in expected} == expected


def test_the_recipe_of_swin_has_the_originals_settings(tmp_path):
    expected = {"lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "drop_path": 0.2, "max_grad_norm": 5}
    expected |= {"image_size": 448, "batch_size": 32, "learning_rate": 5e-4 * 32 / 512, "num_epochs": 300}
    found = flags_of("swin_tiny_mtlora.sh", tmp_path)
    assert {name: float(found[name]) for name in expected} == expected
    assert (found["adapter_name"], found["base_model"]) == ("mtlora", "microsoft/swin-tiny-patch4-window7-224")


def test_the_recipe_of_glue_takes_the_rate_that_the_study_chose(tmp_path):
    study = json.loads((PROJECT / "docs" / "studies" / "glue" / "study.json").read_text())
    chosen = {each["name"]: each["chosen"] for each in study["search"]["experiments"]}
    names = {each["name"]: each["train"]["adapter_name"] for each in study["grid"]["experiments"] if each["train"]}
    expected = {names[name]: rate for name, rate in chosen.items() if names[name] != "none"}
    expected["moelora"] /= 2  # where it chose a rate at which one seed of five learned nothing
    rates = {name: float(flags_of("glue_mlora.sh", tmp_path, METHOD=name)["learning_rate"]) for name in expected}
    assert rates == expected and len(rates) == 6
