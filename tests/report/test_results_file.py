"""Reading results files: whatever is wrong is named with its file and key."""

import math

import pytest
from report_records import BASE, changed

from mtl_lora.errors import UserError
from mtl_lora.report.results import read_results

BROKEN = [
    ({"name": ...}, "the key name is missing"),
    ({"name": " "}, "name is ' '; it must be a non-empty string"),
    ({"tasks": ...}, "the key tasks is missing"),
    ({"tasks": {}}, "tasks is empty"),
    ({"task_set": ...}, "the key task_set is missing"),
    ({"task_set": {"tasks": [{"id": 0}]}}, "task_set: task 0 needs 'name' and 'id'"),
    ({"task_set__columns": 5}, "task_set"),
    ({"tasks__first": None}, "tasks.first is None; it must be an object"),
    ({"tasks__first__accuracy": ...}, "the key tasks.first.accuracy is missing"),
    ({"tasks__first__accuracy": 68.3}, "tasks.first.accuracy is 68.3; it must be a fraction from 0 to 1"),
    ({"tasks__first__accuracy": math.nan}, "tasks.first.accuracy is nan"),
    ({"tasks__first__stderr": ...}, "the key tasks.first.stderr is missing"),
    ({"tasks__first__n": True}, "tasks.first.n is True; it must be a whole number from 1"),
    ({"tasks__first__groups": {"easy": {"accuracy": 1}}}, "the key tasks.first.groups.easy.stderr is missing"),
    ({"tasks__third": {"accuracy": 1, "stderr": 0, "n": 1}}, "tasks.third is none of the tasks of its task_set"),
    ({"trainable": {"adapter": 5}}, "the key trainable.total is missing"),
    ({"average": {"accuracy": 0.9}}, "average.accuracy is 0.9 where the mean of its 2 tasks is 0.3750"),
    ({"schema": 2}, "schema is 2; it must be 1"),
    ({"data": ["a"]}, "data is ['a']; it must be an object"),
]


@pytest.mark.parametrize(("changes", "complaint"), BROKEN, ids=[complaint for _, complaint in BROKEN])
def test_a_broken_results_file_is_named_with_its_key(write, changes, complaint):
    folder = write(changed(BASE, **changes))
    with pytest.raises(UserError) as caught:
        read_results(folder)
    assert str(caught.value).startswith(str(folder / "results.json"))
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[1", "is not JSON"),
        ('"\\ud800"', "not Unicode"),
        ("[]", "an object"),
    ],
)
def test_a_file_that_is_no_json_object_is_named(write, text, complaint):
    folder = write(text)
    with pytest.raises(UserError) as caught:
        read_results(folder)
    assert complaint in str(caught.value) and str(folder / "results.json") in str(caught.value)
