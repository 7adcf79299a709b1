"""Grids: a mistake is refused by a sentence that names the file, the place and the way out; those of the package."""

import json
import shutil

import pytest
from reference.sizes import smollm2_135m, trained_and_all
from shared import PROJECT
from study_cases import ALONE, GRID, SEARCH, grid, with_flags, write_grid

from mtl_lora.adapter.layer import methods
from mtl_lora.errors import UserError
from mtl_lora.study.config import GRIDS, StudyConfig, read_grid


def experiments(**changes) -> dict:
    """The grid with an experiment of this kind besides its own."""
    return grid({"name": "Other", "train": {}, **changes})


OTHER = "experiment 'Other'"
BAD = [
    # (grid, what the sentence names)
    (grid(seeds=...), ["lacks", "'seeds'"]),
    (grid(seeds=[]), ["seeds", "at least one", "[]"]),
    (grid(seeds=[1, 1]), ["seeds", "[1, 1]"]),
    (grid(name="a/b"), ["name", "'a/b'"]),
    (grid(launcher=" "), ["launcher", "torchrun"]),
    (grid(experiments=[]), ["experiments", "at least one"]),
    (with_flags(lora_rr=4), ["train", "'lora_rr'", "'lora_r'"]),
    (with_flags(lora_r="4"), ["train", "lora_r", "'4'"]),
    (with_flags(trust_remote_code=True), ["train", "pass --trust_remote_code True"]),
    (with_flags("evaluate", trust_remote_code=True), ["evaluate", "pass --trust_remote_code True"]),
    (with_flags(seed=4), ["train", "seed", "set by the study"]),
    (with_flags(tasks_file="none.json"), ["none.json"]),
    (with_flags("evaluate", limit=4), ["evaluate: limit", "test_records"]),
    (with_flags("evaluate", base_model="x"), ["evaluate", "base_model", "train"]),
    (with_flags("evaluate", mode="both"), ["evaluate", "both", "generate or score"]),
    (with_flags("evaluate", overwrite=True), ["evaluate", "overwrite", "set by the study"]),
    (grid(baseline="Lora"), ["'Lora'", "did you mean 'LoRA'"]),
    (grid(baseline="Other"), ["'Other'", "Base, LoRA, MTL-LoRA"]),
    (with_flags(rank=4, lora_r=4), ["train", "'rank'", "'lora_r'", "same flag"]),
    (experiments(evaluate={"tasks": None}), [OTHER, "tasks", "a list"]),
    (experiments(evaluate={"tasks": "boolq"}), [OTHER, "tasks", "a list"]),
    (experiments(kind="x"), [OTHER, "'kind'"]),
    (grid({"train": {}}), ["experiment 3", "lacks", "'name'"]),
    (experiments(name="lora"), ["folder 'lora'"]),
    (experiments(name="!"), ["name", "'!'"]),
    (experiments(name="None"), ["name", "'None'", "not none"]),
    (experiments(train={"data_path": "x"}), [OTHER, "data_path", "equal for all"]),
    (experiments(train={"depth": 4}), [OTHER, "train has the unknown key 'depth'"]),
    (experiments(evaluate={"mode": "generate"}), [OTHER, "mode", "equal for all"]),
    (experiments(only_tasks=["cola"]), [OTHER, "'cola'", "boolq 0"]),
    (experiments(train=None, only_tasks=["boolq"]), [OTHER, "only_tasks", "train is null"]),
    (experiments(train=None, alone=True), [OTHER, "alone", "train is null"]),
    (experiments(alone=True, evaluate={"tasks": ["boolq"]}), [OTHER, "alone", "tasks"]),
    (experiments(evaluate={"tasks": ["piqa"]}) | {"evaluate": {"tasks": ["boolq"]}}, [OTHER, "piqa", "['boolq']"]),
    (grid(ALONE, {**ALONE, "name": "Again"}), ["alone", "'main'"]),
    (experiments(baseline="LoRa"), [OTHER, "'LoRa'"]),
    (experiments(search="LoRA"), [OTHER, "'LoRA'", "nothing is searched"]),
    (experiments(search="MTL-LoRA") | {"search": SEARCH}, [OTHER, "'MTL-LoRA'", "nothing is searched"]),
    (experiments(search="LoRA", train={"learning_rate": 1}) | {"search": SEARCH}, [OTHER, "searched flag itself"]),
    (
        grid(
            {"name": "Other", "train": {}, "search": "Own"},
            {"name": "Own", "train": {"rank": 2}},  # another name of the searched flag
            search={**SEARCH, "flag": "lora_r", "values": [2, 4]},
        ),
        [OTHER, "'Own'", "nothing is searched"],
    ),
    (grid(search={**SEARCH, "values": [0.1]}), ["search", "values", "at least two"]),
    (grid(search={**SEARCH, "records": -1}), ["search", "records", "-1"]),
    (grid(search={**SEARCH, "widen": -1}), ["search", "widen", "-1"]),
    (grid(search={**SEARCH, "flag": "rate"}), ["search", "unknown key 'rate'"]),
    (grid(search={**SEARCH, "flag": "seed"}), ["search", "seed", "set by the study"]),
    (grid(search={**SEARCH, "train": {"cutoff_len": 9}}), ["search", "cutoff_len", "equal for all"]),
    (grid(search={**SEARCH, "data_dir": GRID["evaluate"]["data_dir"]}), ["search", "test sets", "development"]),
    (grid(search={**SEARCH, "data_dir": f"{GRID['evaluate']['data_dir']}/../test/"}), ["search", "development set"]),
]


@pytest.mark.parametrize(("value", "facts"), BAD, ids=[" ".join(facts)[:50] for _, facts in BAD])
def test_bad_grid_is_refused_by_a_sentence(tmp_path, value, facts):
    with pytest.raises(UserError) as error:
        read_grid(str(write_grid(tmp_path, value)))
    assert all(fact in str(error.value) for fact in [*facts, "grid.json"]), str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", '"grid"'])
def test_file_that_is_not_a_grid_is_refused(tmp_path, text):
    (tmp_path / "grid.json").write_text(text)
    with pytest.raises(UserError, match=r"grid\.json"):
        read_grid(str(tmp_path / "grid.json"))


def test_experiments_take_the_grids_seeds_and_baseline_unless_they_have_their_own(tmp_path):
    read = read_grid(str(write_grid(tmp_path, grid({"name": "Own", "train": {}, "seeds": [7], "baseline": "Base"}))))
    assert [each.run_seeds for each in read.experiments] == [[None], [0, 1], [0, 1], [7]]
    assert [each.baseline for each in read.experiments] == ["LoRA", "", "LoRA", "Base"]


def test_search_leaves_alone_what_has_no_training_sets_the_flag_itself_or_opts_out(tmp_path):
    more = [{"name": "Out", "train": {}, "search": False}, {"name": "As", "train": {}, "search": "LoRA"}]
    read = read_grid(str(write_grid(tmp_path, grid(*more, search=SEARCH))))
    searched = {each.name: each.search for each in read.experiments}
    assert searched == {"Base": False, "LoRA": "LoRA", "MTL-LoRA": False, "Out": False, "As": "LoRA"}


def test_code_that_comes_with_a_base_runs_where_the_user_asks_for_it_alone(tmp_path):
    path = str(write_grid(tmp_path, grid()))
    for trusted in (False, True):
        read = read_grid(path, trusted)
        for flags in (read.train, read.evaluate):
            assert flags.get("trust_remote_code", False) is trusted


def test_wrong_flags_of_a_study_are_refused():
    for flags, facts in (({"parallel": 0}, "parallel .*0"), ({"check": True, "report": True}, "--check .*--report")):
        with pytest.raises(UserError, match=facts):
            StudyConfig(grid="any", **flags)


# ---- the grids of the package ----


def adapters(read) -> dict:
    """The adapter of every trained experiment by name."""
    trained = [each for each in read.experiments if each.train is not None]
    flags = read.flags_of("train")
    configs = {each.name: flags(**{**read.train, **each.train}) for each in trained}
    return {name: config.adapter_config(config.task_set()) for name, config in configs.items()}


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    """Grids name files from the project's folder."""
    monkeypatch.chdir(PROJECT)


@pytest.mark.parametrize("name", GRIDS)
def test_grid_of_the_package_is_found_by_name_and_has_the_flags_of_the_commands(name, monkeypatch, tmp_path):
    if name.startswith("dense_"):  # whose tasks are those of a folder that a command makes
        folder = tmp_path / json.loads(GRIDS[name].read_text())["train"]["data_path"]
        folder.mkdir(parents=True)
        shutil.copy(
            PROJECT / "src" / "mtl_lora" / "dense" / f"{name.removeprefix('dense_')}_tasks.json", folder / "tasks.json"
        )
        monkeypatch.chdir(tmp_path)
    read = read_grid(name)
    assert read.name == name and adapters(read)
    for experiment in read.experiments:
        who = "base_model" if experiment.train is None else "checkpoint"
        read.flags_of("evaluate")(**{who: "any", **read.evaluate, **experiment.evaluate})


def test_unknown_name_of_a_grid_lists_those_of_the_package():
    for name in ("quikstart", "script/grids/quickstart.json"):
        with pytest.raises(UserError, match=f"{name}.*commonsense, .*glue, .*llama2_7B, .*transfer"):
            read_grid(name)


@pytest.mark.parametrize("name", ["commonsense", "glue", "llama2_7B", "quickstart"])
def test_grid_that_compares_methods_has_a_row_of_each(name):
    others = {"mtlora"} | ({"none"} if name != "glue" else set())
    assert {adapter.method for adapter in adapters(read_grid(name)).values()} == {*methods()} - others


@pytest.mark.parametrize("name", ["textclass", "commonsense", "image_text"])
def test_budgets_are_equal_within_two_percent(name):
    read, counts = read_grid(name), {}
    one_layer = smollm2_135m()
    layers, one_layer.num_hidden_layers = one_layer.num_hidden_layers, 1
    for experiment, adapter in adapters(read).items():
        settings = {key: value for key, value in adapter.to_json().items() if key != "tasks"}
        counts[experiment] = layers * trained_and_all(one_layer, len(read.tasks), **settings)[0]
    middle = (min(counts.values()) + max(counts.values())) / 2
    assert all(abs(count / middle - 1) < 0.02 for count in counts.values()), counts
    assert f"{middle / 1e6:.2f} M parameters within 2 %" in " ".join(read.notes)


def test_transfer_compares_equal_ranks_and_schedules():
    read, groups = read_grid("transfer"), {}
    for name, adapter in adapters(read).items():
        groups.setdefault(read.experiment(name).group, []).append((adapter.method, adapter.rank, adapter.scale))
    assert groups == {"rank 2": [("lora", 2, 2), ("lora", 2, 2), ("mtl_lora", 2, 2)]}
    assert [each.alone for each in read.experiments] == [True, False, False]
    assert "max_steps" not in json.dumps(read.content)
