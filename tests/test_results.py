"""results.json: both schemas give the same results, what is written is read back, and what is wrong is named."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_lora.errors import UserError
from mtl_lora.metrics import METRICS
from mtl_lora.results import Reader, Results, TaskNames, TaskResult, average_of, measure

TASK_SET = {"tasks": [{"name": "qa", "id": 1, "title": "QA"}, {"name": "nli", "id": 0}], "columns": ["qa", "nli"]}
KINDS_1 = {"easy": {"accuracy": 0.75, "stderr": 0.2, "n": 4, "correct": 3}}
KINDS_2 = {"easy": {"value": 0.75, "stderr": 0.2, "n": 4, "correct": 3}}
REST = {"correct": 5, "unparsed": 0.1, "majority": 0.5, "predicted": {"value": 3, "stderr": 2, "n": 5}, "f1": 0.6}
OTHER = {"stderr": 0.1, "n": 10, "correct": 4, "unparsed": 0.2}
SCHEMA_1 = {
    "schema": 1,
    "name": "mtl_lora",
    "method": "mtl_lora",
    "base_model": "base",
    "mode": "generate",
    "trainable": {"adapter": 5, "total": 100},
    "tasks": {
        "nli": {
            "accuracy": 0.5, "stderr": 0.16, "n": 10, **REST,
            "strict": {"accuracy": 0.4, **OTHER}, "normalised": {"accuracy": 0.3, **OTHER}, "groups": KINDS_1,
        },
        "qa": {"accuracy": 1, "stderr": 0.0, "n": 3, "majority": 1.0, "predicted": {}},
    },
    "average": {"accuracy": 0.75, "stderr": 0.08, "tasks": 2},
    "task_set": TASK_SET,
    "settings": {"mode": "generate", "limit": 0},
    "data": {"nli": "a" * 64, "qa": None},
    "adapter": {"weights_sha256": "b" * 64},
    "versions": {"torch": "2.13.0"},
    "command": "commonsense_evaluate.py --checkpoint x",
    "device": "a machine",
    "commit": None,
}  # fmt: skip
# Not 0, as earlier versions wrote it for 3 of 3: two right and two wrong ones are added.
OF_3 = math.sqrt(5 / 7 * 2 / 7 / 7)
SCHEMA_2 = {
    **SCHEMA_1,
    "settings": {"protocol": 1, "extraction": 1, "mode": "generate", "limit": 0},
    "schema": 2,
    "system": "language",
    "test_sets": None,
    "method_title": "MTL-LoRA",
    "comparability": {
        "needed": ["mode", "base_fingerprint", "template", "cutoff_len"],
        "noted": ["base_fingerprint", "tasks_sha256", "dtype"],
        "free": ["adapter_sha256", "batch_size", "limit"],
    },
    "tasks": {
        "nli": {
            "metric": "accuracy", "value": 0.5, "stderr": 0.16, "n": 10, **REST,
            "strict": {"value": 0.4, **OTHER}, "acc_norm": {"value": 0.3, **OTHER}, "groups": KINDS_2,
        },
        "qa": {"metric": "accuracy", "value": 1, "stderr": OF_3, "n": 3, "majority": 1.0, "predicted": {}},
    },
    "average": {
        "value": 0.75, "stderr": math.sqrt(0.16**2 + OF_3**2) / 2, "tasks": 2,
        "groups": {"easy": {"value": 0.75, "stderr": 0.2, "tasks": 1}},
    },
}  # fmt: skip


def with_place(record: dict, place: str, value: object) -> dict:
    """A copy with the value at ``tasks.nli.n``; ``...`` removes the key."""
    record = json.loads(json.dumps(record))
    *path, key = place.split(".")
    holder = record
    for step in path:
        holder = holder[step]
    holder.pop(key, None) if value is ... else holder.update({key: value})
    return record


def test_both_schemas_are_the_same_results_and_schema_2_is_written():
    old, new = Results.from_json(SCHEMA_1), Results.from_json(SCHEMA_2)
    assert old == new
    assert old.to_json() == SCHEMA_2
    nli = old.tasks["nli"]
    assert (nli.value, nli.others["strict"].value, nli.others["acc_norm"].value) == (0.5, 0.4, 0.3)
    # What was predicted is no measure, whatever the answers are called.
    assert nli.measured["predicted"] == {"value": 3, "stderr": 2, "n": 5} and nli.groups["easy"].n == 4


def test_what_is_saved_is_loaded_from_the_file_or_its_folder(tmp_path):
    results = Results.from_json(SCHEMA_1)
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path) == Results.load(tmp_path / "results.json") == results
    assert Results.load(tmp_path).path == tmp_path / "results.json"
    with pytest.raises(UserError, match=str(tmp_path / "none")):
        Results.load(tmp_path / "none")


def test_results_that_name_no_adapter_stay_beside_a_checkpoint(tmp_path):
    (tmp_path / "mtl_lora_config.json").write_text('{"weights_sha256": "new"}')
    (tmp_path / "evaluation").mkdir()
    for adapter, found in ((..., 1), ("new", 1), ("old", 0)):
        results = Results.from_json(with_place(SCHEMA_2, "settings.adapter_sha256", adapter))
        results.save(tmp_path / "evaluation" / "results.json")
        assert len(Results.load_all(tmp_path, needed=False)) == found


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=9))
@settings(deadline=None)
def test_average_is_the_plain_mean_with_the_error_of_independent_means(pairs):
    average = average_of([TaskResult("accuracy", value, stderr, 10) for value, stderr in pairs])
    assert average.value == pytest.approx(sum(value for value, _ in pairs) / len(pairs))
    assert average.stderr == pytest.approx(math.hypot(*(stderr for _, stderr in pairs)) / len(pairs))
    assert average.tasks == len(pairs)


def test_average_of_eight_equal_standard_errors_shrinks_by_the_root_of_eight():
    assert average_of([TaskResult("accuracy", 0.5, 0.008, 10)] * 8).stderr == pytest.approx(0.008 / math.sqrt(8))


def test_an_average_has_no_error_where_a_task_has_none_and_no_value_where_units_differ():
    assert average_of([TaskResult("rmse", 2.5, None, 10), TaskResult("rmse", 1.5, 0.1, 10)]).stderr is None
    mixed = with_place(
        with_place(SCHEMA_2, "tasks.qa", {"metric": "rmse", "value": 2.5, "stderr": None, "n": 3}), "average", ...
    )
    assert Results.from_json(mixed).average is None
    correlation = with_place(mixed, "tasks.qa.metric", "f1")
    correlation["tasks"]["qa"]["value"] = 0.25
    assert Results.from_json(correlation).average.value == 0.375


def lines_of(answers, parsed, **more) -> list[dict]:
    return [{"answer": a, "parsed": p, **more} for a, p in zip(answers, parsed, strict=True)]


def test_a_task_of_two_metrics_has_their_mean_as_its_value_and_both_beside_it():
    lines = lines_of(["no", "yes", "yes", "no"], ["no", "yes", "no", "no"], kind="a") + lines_of(["yes"], ["yes"])
    result, measured = measure("accuracy_and_f1", lines, ("no", "yes"), loss=0.5), {"loss": 0.5}
    measured["predicted"] = {"no": 3, "yes": 2}
    assert {name: other.value for name, other in result.others.items()} == {"accuracy": 0.8, "binary_f1": 0.8}
    assert (result.value, result.n, result.measured) == (pytest.approx(0.8), 5, measured)
    # Always "yes": 3 of 5, and an F1 of 2 * 3 / (5 + 3).
    assert result.majority == pytest.approx((0.6 + 0.75) / 2)
    (group,) = result.groups.values()
    assert (group.n, group.value, group.stderr > 0) == (4, pytest.approx((0.75 + 2 / 3) / 2), True)
    assert TaskResult.read_json(Reader("x", 2), result.to_json(), "task") == result


def test_groups_are_named_by_whatever_the_field_holds():
    kinds = ["x", 1, ["y"], {"z": 0}, 0, None, ""]
    lines = [line for kind in kinds for line in lines_of(["no"], ["no"], **({} if kind is None else {"kind": kind}))]
    groups = measure("accuracy", lines, ("no", "yes")).groups
    assert {name: group.n for name, group in groups.items()} == {"x": 1, "1": 1, "['y']": 1, "{'z': 0}": 1, "0": 1}


@pytest.mark.parametrize("value", [3.0, 10 + 5e-10])  # 10 is the most that there is, but for rounding
def test_a_score_without_error_beyond_one_is_read(value):
    record = with_place(with_place(SCHEMA_2, "average", ...), "tasks.qa", {"metric": "cider", "stderr": 0, "n": 3})
    record["tasks"]["qa"]["value"] = value
    found = Results.from_json(record).tasks["qa"]
    assert (found.value, found.stderr) == (value, 0)


def test_an_object_that_is_no_whole_result_is_kept_as_it_is():
    nli = Results.from_json(with_place(SCHEMA_2, "tasks.nli.official", {"value": 0.25})).tasks["nli"]
    assert nli.measured["official"] == {"value": 0.25} and "official" not in nli.others


def test_numbers_have_correlations_and_no_majority_class():
    result = measure("pearson_and_spearman", lines_of([0.0, 1.5, 5, 2], [-3.5, -1.0, 0.25, -2]))
    assert [*result.others] == ["pearson", "spearman"] and result.majority is None
    assert result.others["spearman"].value == pytest.approx(0.8)
    assert result.value == pytest.approx((result.others["pearson"].value + 0.8) / 2)


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.lowest == -1])
def test_a_correlation_may_be_negative_and_is_averaged_with_fractions(name):
    record = with_place(with_place(SCHEMA_2, "average", ...), "tasks.qa", {"metric": name, "stderr": 0, "n": 3})
    record["tasks"]["qa"]["value"] = -0.25
    assert Results.from_json(record).average.value == 0.125 and Results.from_json(record).tasks["qa"].stderr == 0
    record["tasks"]["qa"]["value"] = -1.01
    with pytest.raises(UserError, match=r"tasks\.qa\.value is -1\.01"):
        Results.from_json(record)


def test_an_average_is_over_the_tasks_that_were_asked():
    results = Results.from_json(with_place(with_place(SCHEMA_2, "tasks.qa", ...), "average", ...))
    assert (results.scored, results.average.value) == (["nli"], 0.5)
    assert results.average.value == 0.5


def test_a_task_set_knows_order_titles_and_what_decides_an_answer():
    about_a = {"title": "A", "metric": "accuracy", "weight": 2.0}
    tasks = [{"name": "a", "id": 1, **about_a, "options": ["x", "y"], "pattern": ""}, {"name": "b", "id": 0}]
    names = TaskNames.from_json({"tasks": tasks, "columns": ["a", "b"]})
    assert (names.names, names.columns) == (["b", "a"], ["a", "b"])
    assert (names.title("a"), names.title("b"), names.title("unknown")) == ("A", "b", "unknown")
    assert (names.definition("a"), names.definition("b")) == ({"options": ["x", "y"]}, {})


@pytest.mark.parametrize("schema", [1, 2])
@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("name", ...),
        ("name", " "),
        ("tasks", ...),
        ("tasks", {}),
        ("task_set", ...),
        ("task_set.tasks", [{"id": 0}]),
        ("task_set.tasks", [{"name": "../nli", "id": 0}]),
        ("task_set.tasks", [{"name": "nli", "id": 0}, {"name": "nli", "id": 1}]),
        ("task_set.columns", 5),
        ("task_set.columns", ["nli"]),
        ("task_set.columns", ["nli", "qa", "nli"]),
        ("tasks.nli", None),
        ("tasks.nli.VALUE", ...),
        ("tasks.nli.VALUE", 68.3),
        ("tasks.nli.VALUE", math.nan),
        ("tasks.nli.VALUE", "0.5"),
        ("tasks.nli.stderr", ...),
        ("tasks.nli.n", True),
        ("tasks.nli.n", 0),
        ("tasks.nli.n", 10.5),
        ("tasks.nli.correct", 4.5),
        ("tasks.nli.unparsed", 1.5),
        ("tasks.nli.f1", "0.5"),
        ("tasks.nli.predicted", {"yes": "3"}),
        ("tasks.nli.groups.easy.stderr", ...),
        ("tasks.nli.strict.VALUE", 2),
        ("tasks.third", {"metric": "accuracy", "accuracy": 1, "value": 1, "stderr": 0, "n": 1}),
        ("trainable.total", ...),
        ("average.VALUE", 0.9),
        ("data", ["a"]),
        ("schema", 3),
        ("schema", True),
    ],
)
def test_what_is_wrong_is_named_by_file_and_key(schema, place, value):
    place = place.replace("VALUE", "accuracy" if schema == 1 else "value")
    with pytest.raises(UserError) as caught:
        Results.from_json(with_place(SCHEMA_1 if schema == 1 else SCHEMA_2, place, value), "x/results.json")
    message = str(caught.value)
    assert message.startswith("x/results.json: ") and "\n" not in message
    assert place.removesuffix(".total") in message or (
        place == "task_set.tasks" and "task_set.tasks[0].name" in message
    )


@pytest.mark.parametrize("text", ["{", "", "[1", '"\\ud800"', "[]"])
def test_a_file_that_is_not_a_json_object_is_named(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=str(tmp_path / "results.json")):
        Results.load(tmp_path)
