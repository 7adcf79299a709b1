"""Tasks as data: the eight commonsense tasks, task sets of one's own, and what is wrong with a bad one."""

import json
import re

import pytest

from mtl_lora.errors import UserError
from mtl_lora.language.tasks import COMMONSENSE, Task, TaskSet

# ---- the eight tasks ----

EIGHT = [
    # id, name, column heading, options
    (0, "boolq", "BoolQ", "true false"),
    (1, "piqa", "PIQA", "solution1 solution2"),
    (2, "social_i_qa", "SIQA", "answer1 answer2 answer3"),
    (3, "hellaswag", "HellaSwag", "ending1 ending2 ending3 ending4"),
    (4, "winogrande", "WinoGrande", "option1 option2"),
    (5, "ARC-Challenge", "ARC-c", "answer1 answer2 answer3 answer4 answer5"),
    (6, "ARC-Easy", "ARC-e", "answer1 answer2 answer3 answer4 answer5"),
    (7, "openbookqa", "OBQA", "answer1 answer2 answer3 answer4"),
]


@pytest.mark.parametrize("task_id, name, title, options", EIGHT, ids=[row[1] for row in EIGHT])
def test_commonsense_task_has_its_id_title_and_options(task_id, name, title, options):
    task = COMMONSENSE[name]
    assert COMMONSENSE[task_id] is task
    assert (task.id, task.name, task.title, task.options) == (task_id, name, title, tuple(options.split()))
    assert task.answer_prefix == "the correct answer is "


def test_commonsense_columns_stand_in_the_order_of_the_papers_table():
    assert len(COMMONSENSE) == 8
    headings = [COMMONSENSE[name].title for name in COMMONSENSE.columns]
    assert headings == ["BoolQ", "PIQA", "SIQA", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA"]
    assert COMMONSENSE.names == [row[1] for row in EIGHT] == [task.name for task in COMMONSENSE]


@pytest.mark.parametrize(
    "name, pattern",
    [
        ("boolq", "true|false"),
        ("piqa", "solution1|solution2"),
        ("social_i_qa", "answer1|answer2|answer3|answer4|answer5"),
        ("hellaswag", "ending1|ending2|ending3|ending4"),
        ("winogrande", "option1|option2"),
        ("ARC-Challenge", "answer1|answer2|answer3|answer4|answer5"),
        ("ARC-Easy", "answer1|answer2|answer3|answer4|answer5"),
        ("openbookqa", "answer1|answer2|answer3|answer4|answer5"),
    ],
)
def test_answer_patterns_are_those_of_llm_adapters(name, pattern):
    assert COMMONSENSE[name].answer_pattern == pattern


@pytest.mark.parametrize("key", ["siqa", 8, -1, True, None, "0"])
def test_unknown_task_is_an_error_that_lists_the_tasks(key):
    with pytest.raises(UserError, match=re.escape(f"there is no task {key!r}; the tasks are boolq 0, piqa 1,")):
        COMMONSENSE[key]


# ---- options of a record ----


@pytest.mark.parametrize("count", [3, 4, 5])
@pytest.mark.parametrize("name", ["ARC-Challenge", "ARC-Easy"])
def test_record_says_how_many_of_its_tasks_options_it_has(name, count):
    listed = [f"answer{number}" for number in range(1, count + 1)]
    instruction = f"Please choose. Answer1: a Answer2: b\n\nAnswer format: {'/'.join(listed)}"
    assert COMMONSENSE[name].options_of(instruction) == tuple(listed)
    assert COMMONSENSE[name].options_of(instruction + "\n") == tuple(listed)


@pytest.mark.parametrize(
    "instruction",
    [
        "Please choose.",
        "Please choose. Answer format: ",
        "Please choose. Answer format: a/b",
        "Please choose. Answer format: answer1/answer9",
        "Please choose. Answer format: answer1",
        "Please choose. Answer format: answer1/answer2 or so",
        "Please choose. Answer format: answer1/answer1",
    ],
)
def test_record_that_lists_nothing_known_has_all_options_of_its_task(instruction):
    task = COMMONSENSE["social_i_qa"]
    assert task.options_of(instruction) == task.options


def test_last_answer_format_of_an_instruction_counts():
    instruction = "What does 'Answer format: answer1/answer2' mean?\n\nAnswer format: answer1/answer2/answer3"
    assert COMMONSENSE["ARC-Easy"].options_of(instruction) == ("answer1", "answer2", "answer3")


def test_free_text_task_has_no_options_and_no_pattern():
    task = Task("free", 0)
    assert task.options == task.options_of("Say it. Answer format: a/b") == ()
    assert task.answer_pattern == "" and task.title == "free"


def test_a_blank_title_is_the_name_and_a_weight_of_any_size_is_a_number_that_results_take():
    task = Task("free", 0, title="  ", weight=2**64)
    assert task.title == "free" and type(task.weight) is float and task.weight == 2**64


def test_metric_is_that_of_the_kind_of_answer_unless_the_task_names_one():
    assert [task.metric_name for task in OWN] == ["accuracy", "accuracy", "f1"]
    assert Task("free", 0).metric_name == "exact_match"


def test_task_set_of_the_default_metrics_is_written_as_before_there_were_others():
    keys = {key for task in COMMONSENSE.to_json()["tasks"] for key in task}
    assert keys == {"name", "id", "options", "pattern", "answer_prefix", "title"}
    assert COMMONSENSE.answers_sha256.startswith("3a6421ca8894b546")


# ---- patterns ----


def test_option_that_begins_another_does_not_hide_it():
    task = Task("ten", 0, tuple(f"solution{number}" for number in range(1, 11)))
    for option in task.options:
        assert re.search(task.answer_pattern, f"the correct answer is {option}").group() == option


def test_options_are_matched_letter_by_letter():
    task = Task("signs", 0, ("a.b", "c+", "(d"))
    assert re.search(task.answer_pattern, "axb c (d").group() == "(d"


def test_pattern_of_ones_own_replaces_that_of_the_options():
    assert Task("own", 0, ("yes", "no"), pattern=r"\byes\b|\bno\b").answer_pattern == r"\byes\b|\bno\b"


# ---- JSON ----

OWN = TaskSet(
    (
        Task("topic", 1, ("sport", "trade", "science"), title="Topic"),
        Task("mood", 0, ("good", "bad"), pattern="good|bad|poor", answer_prefix="it sounds ", weight=2.5),
        Task("free-text_2.0", 2, metric="f1"),
    ),
    columns=("topic", "free-text_2.0", "mood"),
)


@pytest.mark.parametrize("tasks", [COMMONSENSE, OWN], ids=["commonsense", "own"])
def test_task_set_survives_a_trip_through_a_file(tasks, tmp_path):
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(tasks.to_json()), encoding="utf-8")
    read = TaskSet.load(path)
    assert read == tasks
    assert read.to_json() == json.loads(path.read_text()) == tasks.to_json()


def test_tasks_file_may_be_a_bare_list_in_any_order(tmp_path):
    path = tmp_path / "tasks.json"
    path.write_text('[{"name": "b", "id": 1}, {"name": "a", "id": 0, "options": ["x", "y"]}]')
    read = TaskSet.load(path)
    assert read.names == ["a", "b"] and read.columns == ("a", "b")
    assert read["a"].options == ("x", "y")


def test_task_set_read_from_elsewhere_names_its_source():
    with pytest.raises(UserError, match=r"^the checkpoint x: task names must differ"):
        TaskSet.from_json([{"name": "a", "id": 0}, {"name": "a", "id": 1}], source="the checkpoint x")
