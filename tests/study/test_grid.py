"""A grid file with a mistake is refused by a sentence that names the file, the place and the way out."""

import json

import pytest
from study_cases import ALONE, GRID, SEARCH, grid, write_grid

from mtl_lora.errors import UserError
from mtl_lora.study.read_grid import read_grid

BASE, LORA, MTL_LORA = GRID["experiments"]


def experiments(**changes) -> dict:
    """The grid with an experiment of this kind besides its own."""
    return grid({"name": "Other", "train": {}, **changes})


BAD = [
    # (grid, what the sentence says)
    (grid(seed=[1]), "grid.json has the unknown key 'seed' (did you mean 'seeds'?)"),
    (grid(seeds=...), "grid.json lacks the key 'seeds'"),
    (grid(seeds=[]), "seeds must be at least one whole number, not []"),
    (grid(seeds=[1, 1]), "seeds must be different whole numbers from 0, not [1, 1]"),
    (grid(seeds=["1"]), "seeds must be a list of whole numbers, not ['1']"),
    (grid(name="a/b"), "name must be letters, digits, '_', '-' or '.', not 'a/b'"),
    (grid(train_records=-1), "train_records must be at least 0, not -1"),
    (grid(launcher=" "), "launcher must be a command"),
    (grid(experiments=[]), "experiments must be at least one experiment"),
    (grid(experiments=["LoRA"]), "experiments must be a list of objects"),
    (grid(train={"lora_rr": 4}), "grid.json, train has the unknown flag 'lora_rr' (did you mean 'lora_r'?)"),
    (grid(train={"lora_r": "4"}), "grid.json, train: lora_r must be a whole number, not '4'"),
    (grid(train={"seed": 4}), "grid.json, train: seed is set by the study itself; leave it out"),
    (grid(train={"tasks_file": "none.json"}), "the tasks file none.json can not be read"),
    (grid(evaluate={"limit": 4}), "use the grid's test_records, a fixed sample"),
    (grid(evaluate={"base_model": "x"}), "evaluate: base_model is said once, in the grid's train"),
    (grid(evaluate={"mode": "both"}), "mode is both, and a table has one; choose generate or score"),
    (grid(evaluate={"mode": "guess"}), "grid.json, evaluate: mode must be one of generate, score, both"),
    (grid(evaluate={"overwrite": True}), "evaluate: overwrite is set by the study itself"),
    (grid(baseline="Lora"), "has no experiment 'Lora'; known are Base, LoRA, MTL-LoRA"),
    (experiments(kind="x"), "experiment 'Other' has the unknown key 'kind'"),
    (grid({"name": "Other"}), "experiment 'Other' lacks the key 'train'"),
    (grid({"train": {}}), "experiment 3 lacks the key 'name'"),
    (experiments(name="LoRA"), "two experiments with the name 'LoRA'; names must differ"),
    (experiments(name="lora"), "two experiments with the slug 'lora'; names must differ"),
    (experiments(name="!"), "name must be a name with a letter or digit, not '!'"),
    (experiments(train={"data_path": "x"}), "data_path must be the same for all experiments"),
    (experiments(train={"rank": 4}), "experiment 'Other', train has the unknown flag 'rank'"),
    (experiments(evaluate={"mode": "generate"}), "mode must be the same for all experiments"),
    (experiments(only_tasks=["cola"]), "experiment 'Other': there is no task 'cola'; the tasks are boolq 0"),
    (experiments(only_tasks=["boolq", "boolq"]), "only_tasks must be different names"),
    (experiments(train=None, only_tasks=["boolq"]), "only_tasks needs a training, and train is null"),
    (experiments(train=None, alone=True), "alone needs a training, and train is null"),
    (experiments(alone=True, evaluate={"tasks": ["boolq"]}), "alone asks each training its own task"),
    (experiments(evaluate={"tasks": ["piqa"]}) | {"evaluate": {"tasks": ["boolq"]}}, "piqa is asked, and the grid's"),
    (grid(ALONE, {**ALONE, "name": "Again"}), "the group 'main' has an experiment with alone already"),
    (experiments(baseline="LoRa"), "has no experiment 'LoRa'"),
    (experiments(search="LoRA"), "search names 'LoRA', and the grid has no search"),
    (experiments(search="MTL-LoRA") | {"search": SEARCH}, "search names 'MTL-LoRA', for which nothing is searched"),
    (
        experiments(search="LoRA", train={"learning_rate": 1}) | {"search": SEARCH},
        "search names 'LoRA', and train sets learning_rate itself",
    ),
    (grid(search={**SEARCH, "value": [1]}), "grid.json, search has the unknown key 'value'"),
    (grid(search={**SEARCH, "values": [0.1]}), "search: values must be at least two different numbers"),
    (grid(search={**SEARCH, "flag": "rate"}), "grid.json, search has the unknown flag 'rate'"),
    (grid(search={**SEARCH, "flag": "seed"}), "search: seed is set by the study itself"),
    (grid(search={**SEARCH, "train": {"cutoff_len": 9}}), "cutoff_len must be the same for all experiments"),
    (grid(search={**SEARCH, "data_dir": GRID["evaluate"]["data_dir"]}), "the test sets themselves; choose by a dev"),
]


@pytest.mark.parametrize(("value", "message"), BAD, ids=[message[-40:] for _, message in BAD])
def test_bad_grid_is_refused_by_a_sentence(tmp_path, value, message):
    with pytest.raises(UserError) as error:
        read_grid(write_grid(tmp_path, value))
    assert message in str(error.value)
    assert str(tmp_path / "grid.json") in str(error.value) or "the tasks file none.json" in message


@pytest.mark.parametrize("text", ["{", "[]", json.dumps("grid")])
def test_file_that_is_no_grid_is_refused(tmp_path, text):
    (tmp_path / "grid.json").write_text(text)
    with pytest.raises(UserError, match=r"the grid .*grid\.json"):
        read_grid(tmp_path / "grid.json")


def test_experiments_take_the_grids_seeds_and_baseline_unless_they_have_their_own(tmp_path):
    own = {"name": "Own", "train": {}, "seeds": [7], "baseline": "Base"}
    study = read_grid(write_grid(tmp_path, grid(own)))
    base, lora, _, own = study.experiments
    assert [study.seeds(experiment) for experiment in study.experiments] == [[None], [0, 1], [0, 1], [7]]
    assert [study.baseline(experiment) for experiment in study.experiments] == [lora, None, lora, base]


def test_search_leaves_alone_what_has_no_training_says_the_flag_itself_or_opts_out(tmp_path):
    more = [{"name": "Out", "train": {}, "search": False}, {"name": "As", "train": {}, "search": "LoRA"}]
    study = read_grid(write_grid(tmp_path, grid(*more, search=SEARCH)))
    homes = {experiment.name: study.searched_as(experiment) for experiment in study.experiments}
    lora = study.experiment("LoRA")
    assert homes == {"Base": None, "LoRA": lora, "MTL-LoRA": None, "Out": None, "As": lora}
