"""Tasks as data: the eight commonsense tasks, task sets of one's own, and what is wrong with a bad one."""

import json
import re

import pytest

from mtl_lora.errors import UserError
from mtl_lora.language.tasks import COMMONSENSE, Task, TaskSet, load_tasks_file

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
        Task("mood", 0, ("good", "bad"), pattern="good|bad|poor", answer_prefix="it sounds "),
        Task("free-text_2.0", 2, metric="f1"),
    ),
    columns=("topic", "free-text_2.0", "mood"),
)


@pytest.mark.parametrize("tasks", [COMMONSENSE, OWN], ids=["commonsense", "own"])
def test_task_set_survives_a_trip_through_a_file(tasks, tmp_path):
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(tasks.to_json()), encoding="utf-8")
    read = load_tasks_file(path)
    assert read == tasks
    assert read.to_json() == json.loads(path.read_text()) == tasks.to_json()


def test_tasks_file_may_be_a_bare_list_in_any_order(tmp_path):
    path = tmp_path / "tasks.json"
    path.write_text('[{"name": "b", "id": 1}, {"name": "a", "id": 0, "options": ["x", "y"]}]')
    read = load_tasks_file(path)
    assert read.names == ["a", "b"] and read.columns == ("a", "b")
    assert read["a"].options == ("x", "y")


A, B = {"name": "a", "id": 0}, {"name": "b", "id": 1}
BAD = {
    # name of the case: (content of the file, message)
    "not JSON": ("[", "is not JSON"),
    "nested without end": ("[" * 100_000, "is not JSON: maximum recursion"),
    "number": (5, "must be a JSON list of tasks, or an object with 'tasks' and 'columns' alone"),
    "null": (None, "must be a JSON list of tasks"),
    "object without tasks": ({"columns": []}, "must be a JSON list of tasks"),
    "tasks an object": ({"tasks": {"a": 0}}, "must be a JSON list of tasks"),
    "unknown key": ({"tasks": [A], "order": []}, "must be a JSON list of tasks"),
    "no task": ([], "needs at least one task"),
    "entry no object": (["a"], "task 0 needs 'name' and 'id' of .*, not 'a'"),
    "no name": ([A, {"id": 1}], "task 1 needs 'name' and 'id' of"),
    "no id": ([A, {"name": "b"}], "task 1 needs 'name' and 'id' of"),
    "unknown field": ([{**A, "labels": []}], "task 0 needs 'name' and 'id' of .*'answer_prefix'"),
    "name a number": ([{**A, "name": 5}], "task name 5 must be letters"),
    "name empty": ([{**A, "name": ""}], "task name '' must be letters"),
    "name with a slash": ([{**A, "name": "a/b"}], "task name 'a/b' must be letters"),
    "name with a line end": ([{**A, "name": "a\n"}], r"task name 'a\\n' must be letters"),
    "id a string": ([{**A, "id": "0"}], "task 'a' has id '0'; ids are whole numbers from 0"),
    "id a bool": ([{**A, "id": False}], "task 'a' has id False"),
    "id a float": ([{**A, "id": 0.0}], r"task 'a' has id 0\.0"),
    "id negative": ([{**A, "id": -1}], "task 'a' has id -1"),
    "same id twice": ([A, {**B, "id": 0}], r"task ids must be 0 to 1, each once, not \[0, 0\]"),
    "gap in the ids": ([A, {**B, "id": 2}], r"task ids must be 0 to 1, each once, not \[0, 2\]"),
    "ids from 1": ([{**A, "id": 1}, {**B, "id": 2}], r"task ids must be 0 to 1, each once, not \[1, 2\]"),
    "same name twice": ([A, {**B, "name": "a"}], r"task names must differ, not \['a', 'a'\]"),
    "options a string": ([{**A, "options": "yes"}], "task 'a' has options 'yes'; options are a list of non-empty"),
    "options an empty string": ([{**A, "options": ""}], "task 'a' has options ''"),
    "options a number": ([{**A, "options": 5}], "task 'a' has options 5"),
    "options zero": ([{**A, "options": 0}], "task 'a' has options 0"),
    "options an object": ([{**A, "options": {"yes": 1, "no": 0}}], "task 'a' has options {'yes': 1, 'no': 0}"),
    "option a number": ([{**A, "options": ["yes", 1]}], r"task 'a' has options \['yes', 1\]"),
    "option empty": ([{**A, "options": ["yes", ""]}], r"task 'a' has options \['yes', ''\]"),
    "one option": ([{**A, "options": ["yes"]}], "task 'a' needs at least two different options"),
    "same option twice": ([{**A, "options": ["yes", "yes"]}], "task 'a' needs at least two different options"),
    "bad pattern": ([{**A, "pattern": "(yes"}], "task 'a' has a pattern .*missing"),
    "pattern a list": ([{**A, "pattern": ["yes"]}], r"task 'a' has pattern \['yes'\]; it must be a string"),
    "prefix null": ([{**A, "answer_prefix": None}], "task 'a' has answer_prefix None; it must be a string"),
    "metric unknown": ([{**A, "metric": "rouge"}], "task 'a' has the metric 'rouge'.* accuracy, exact_match, f1"),
    "title a number": ([{**A, "title": 1}], "task 'a' has title 1; it must be a string"),
    "columns a number": ({"tasks": [A], "columns": 5}, "the columns must be a list of task names, not 5"),
    "columns zero": ({"tasks": [A], "columns": 0}, "the columns must be a list of task names, not 0"),
    "columns a string": ({"tasks": [A, B], "columns": "ab"}, "the columns must be a list of task names, not 'ab'"),
    "columns mixed": ({"tasks": [A, B], "columns": ["a", 1]}, r"the columns must be a list of task names, not \['a'"),
    "column unknown": ({"tasks": [A, B], "columns": ["a", "c"]}, r"the columns \['a', 'c'\] must name each task once"),
    "column missing": ({"tasks": [A, B], "columns": ["b"]}, r"the columns \['b'\] must name each task once"),
    "column twice": ({"tasks": [A], "columns": ["a", "a"]}, r"the columns \['a', 'a'\] must name each task once"),
}


@pytest.mark.parametrize("content, message", BAD.values(), ids=list(BAD))
def test_bad_tasks_file_is_one_sentence_that_names_it(tmp_path, content, message):
    path = tmp_path / "tasks.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=f"^the tasks file {re.escape(str(path))}.*{message}") as caught:
        load_tasks_file(path)
    assert "\n" not in str(caught.value)


def test_missing_tasks_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"the tasks file .*nowhere\.json cannot be read \(No such file"):
        load_tasks_file(tmp_path / "nowhere.json")


def test_task_set_read_from_elsewhere_names_its_source():
    with pytest.raises(UserError, match=r"^the checkpoint x: task names must differ"):
        TaskSet.from_json([A, {**B, "name": "a"}], source="the checkpoint x")
