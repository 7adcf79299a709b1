"""The grids of this project: each is read, every recipe is one the scripts take, and equal budgets are equal."""

import json

import pytest
from reference.sizes import smollm2_135m, trained_and_all
from shared import PROJECT

from mtl_lora.language.config import EvalConfig, TrainConfig
from mtl_lora.study.read_grid import read_grid

GRIDS = sorted((PROJECT / "script" / "grids").glob("*.json"))


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    """Grids name files from the project's folder."""
    monkeypatch.chdir(PROJECT)


def adapters(study) -> dict:
    """The adapter of every trained experiment by name."""
    configs = {
        experiment.name: TrainConfig(**{**study.grid.train, **experiment.train})
        for experiment in study.experiments
        if experiment.train is not None
    }
    return {name: config.adapter_config(config.task_set()) for name, config in configs.items()}


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_grid_is_read_and_every_recipe_is_valid(path):
    study = read_grid(path)
    assert study.grid.name == path.stem and adapters(study)
    for experiment in study.experiments:
        EvalConfig(**{"base_model": "any", **study.grid.evaluate, **experiment.evaluate})


@pytest.mark.parametrize("name", ["quickstart", "textclass", "commonsense", "llama2_7B"])
def test_main_tables_have_the_base_model_and_every_method(name):
    study = read_grid(PROJECT / "script" / "grids" / f"{name}.json")
    assert study.experiments[0].train is None
    assert sorted(adapter.method for adapter in adapters(study).values()) == [
        "dora",
        "lora",
        "moelora",
        "mtl_lora",
        "multilora",
    ]


@pytest.mark.parametrize("name", ["textclass", "commonsense"])
def test_budgets_are_equal_within_two_percent(name):
    study = read_grid(PROJECT / "script" / "grids" / f"{name}.json")
    counts = {}
    for experiment, adapter in adapters(study).items():
        settings = {key: value for key, value in adapter.to_json().items() if key != "tasks"}
        counts[experiment], _ = trained_and_all(smollm2_135m(), len(study.tasks), **settings)
    middle = (min(counts.values()) + max(counts.values())) / 2
    assert all(abs(count / middle - 1) < 0.02 for count in counts.values()), counts
    # What the grid's notes say.
    assert f"{middle / 1e6:.2f} M weights within 2 %" in " ".join(study.grid.notes)


def test_transfer_compares_the_same_ranks_and_schedules():
    study = read_grid(PROJECT / "script" / "grids" / "transfer.json")
    groups = {}
    for name, adapter in adapters(study).items():
        groups.setdefault(study.experiment(name).group, []).append((adapter.method, adapter.rank, adapter.scale))
    assert list(groups) == ["rank 8", "rank 4", "rank 2"]
    for group, found in groups.items():
        assert [method for method, _, _ in found] == ["lora", "lora", "mtl_lora"]
        assert {rank for _, rank, _ in found} == {int(group.split()[1])} and {scale for _, _, scale in found} == {2}
    assert sum(experiment.alone for experiment in study.experiments) == 3
    assert "max_steps" not in json.dumps(study.grid.to_json())


def test_the_papers_setting_is_that_of_the_recipes():
    flags = (PROJECT / "script" / "recipe.sh").read_text()
    study = read_grid(PROJECT / "script" / "grids" / "llama2_7B.json")
    config = TrainConfig(**study.grid.train)
    for text in (
        f"BASE_MODEL:-{config.base_model}",
        f"--lora_dropout {config.lora_dropout}",
        f"--lora_target_modules {','.join(config.lora_target_modules)}",
        f"BATCH_SIZE:-{config.batch_size}",
        f"EPOCHS:-{config.num_epochs:g}",
        f"LEARNING_RATE:-{config.learning_rate:.0e}".replace("e-04", "e-4"),
        f"--warmup_ratio {config.warmup_ratio} --max_grad_norm {config.max_grad_norm}",
        f"CUTOFF_LEN:-{config.cutoff_len}",
        config.deepspeed,
    ):
        assert text in flags, text
