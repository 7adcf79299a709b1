"""From a grid to command lines: what the scripts are told, and which changes make another recipe."""

import shlex
from pathlib import Path

import pytest
from study_cases import ALONE, SEARCH, dev_set, grid, planner

from mtl_lora import cli
from mtl_lora.errors import UserError
from mtl_lora.language.config import EvalConfig, TrainConfig
from mtl_lora.study.jobs import command


def told(line: str, config):
    """The configuration that a command line means to its script."""
    return cli.parse(config, shlex.split(line)[2:], "")


def test_commands_say_common_and_own_flags_seed_and_folder(tmp_path):
    made = planner(tmp_path, grid())
    run = made.run(made.study.experiment("MTL-LoRA"), 1)
    (job,) = run.jobs
    train, evaluate = told(job.commands[0], TrainConfig), told(job.commands[1], EvalConfig)
    assert (train.lora_r, train.learning_rate, train.seed, train.adapter_name) == (4, 0.01, 1, "mtl_lora")
    assert train.data_path == str(tmp_path / "study" / "data" / "train.json")
    assert Path(train.output_dir) == run.folder == tmp_path / "study" / "runs" / "mtl_lora" / "seed1"
    assert evaluate.checkpoint == evaluate.output_dir == train.output_dir
    assert (evaluate.mode, evaluate.name, evaluate.base_model) == ("score", "MTL-LoRA", None)
    assert evaluate.data_dir == str(tmp_path / "study" / "data" / "test")


def test_base_model_alone_is_asked_in_the_words_of_the_trainings(tmp_path):
    value = grid()
    value["train"] |= {"template": "original", "cutoff_len": 99}
    made = planner(tmp_path, value)
    (job,) = made.run(made.study.experiment("Base"), None).jobs
    (line,) = job.commands
    evaluate = told(line, EvalConfig)
    assert (evaluate.base_model, evaluate.template, evaluate.cutoff_len) == ("base", "original", 99)
    assert job.folder == tmp_path / "study" / "runs" / "base"


def test_alone_trains_every_task_on_its_own_records_and_asks_it_alone(tmp_path):
    made = planner(tmp_path, grid({**ALONE, "only_tasks": ["piqa", "boolq"]}))
    run = made.run(made.study.experiment("Alone"), 0)
    assert [job.folder.relative_to(run.folder).name for job in run.jobs] == ["piqa", "boolq"]
    for job in run.jobs:
        task = job.folder.name
        assert told(job.commands[1], EvalConfig).tasks == [task]
        assert told(job.commands[0], TrainConfig).data_path.endswith(f"train_{task}.json")
        assert job.data["train"].counts == {task: 12}


def test_search_trains_shortly_and_asks_the_development_set(tmp_path):
    made = planner(tmp_path, grid(search={**SEARCH, "data_dir": dev_set(tmp_path)}))
    runs = made.candidates(made.study.experiment("LoRA"))
    configs = [told(run.jobs[0].commands[0], TrainConfig) for run in runs]
    assert [(config.learning_rate, config.max_steps) for config in configs] == [(0.01, 2), (0.001, 2)]
    asked = told(runs[0].jobs[0].commands[1], EvalConfig)
    assert asked.data_dir == str(tmp_path / "study" / "data" / "dev")
    chosen = made.run(made.study.experiment("LoRA"), 0, 0.001)
    config = told(chosen.jobs[0].commands[0], TrainConfig)
    assert (config.learning_rate, config.max_steps) == (0.001, 3)


def test_searched_rank_stays_a_whole_number(tmp_path):
    search = {"flag": "lora_r", "values": [2, 4.0], "data_dir": dev_set(tmp_path)}
    made = planner(tmp_path, grid(search=search))
    runs = made.candidates(made.study.experiment("MTL-LoRA"))
    assert [told(run.jobs[0].commands[0], TrainConfig).lora_r for run in runs] == [2, 4]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_target_modules", ["q_proj", "v_proj"]),
        ("lora_target_modules", [r".*\.[qv]_proj"]),
        ("lora_target_modules", ["a,b", "c"]),
        ("deepspeed", None),
        ("train_on_inputs", True),
        ("max_steps", -1),
        ("learning_rate", 1e-5),
    ],
)
def test_a_flag_survives_the_command_line(name, value):
    words = command("python", "finetune.py", {name: value})
    assert getattr(cli.parse(TrainConfig, words[2:], ""), name) == value


def test_launcher_stands_before_the_script(tmp_path):
    made = planner(tmp_path, grid(launcher="torchrun --nproc_per_node 8"))
    (job,) = made.run(made.study.experiment("LoRA"), 0).jobs
    assert all(line.startswith("torchrun --nproc_per_node 8 ") for line in job.commands)


def test_wrong_value_of_an_experiment_is_named(tmp_path):
    made = planner(tmp_path, grid({"name": "Other", "train": {"lora_dropout": 2}}))
    with pytest.raises(UserError, match=r"grid\.json, experiment 'Other', train: --lora_dropout must be at least 0"):
        made.run(made.study.experiment("Other"), 0)


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("lora_r", 8, False),
        ("learning_rate", 0.5, False),
        ("save_step", 1, True),
        ("logging_steps", 1, True),
        ("cache_dir", "elsewhere", True),
    ],
)
def test_recipe_is_another_only_if_a_result_could_be(tmp_path, key, value, same):
    recipes = []
    for flags in ({}, {key: value}):
        changed = grid()
        changed["train"] |= flags
        made = planner(tmp_path, changed)
        recipes.append(made.run(made.study.experiment("LoRA"), 0).jobs[0].recipe)
    assert (recipes[0] == recipes[1]) == same


def test_recipe_knows_data_by_content_and_not_by_place(tmp_path):
    first = planner(tmp_path, grid(train_records=12))
    (tmp_path / "moved").mkdir()
    moved = planner(tmp_path / "moved", grid(train_records=12))
    fewer = planner(tmp_path, grid(train_records=11))
    recipes = [made.run(made.study.experiment("LoRA"), 0).jobs[0].recipe for made in (first, moved, fewer)]
    assert recipes[0] == recipes[1] != recipes[2]
