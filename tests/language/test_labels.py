"""Texts with labels, which train an encoder too, are read as what one would write as instructions and answers."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from mtl_lora import UserError, artifacts, cli
from mtl_lora.language.encode import Encoder
from mtl_lora.language.examples import load_examples, parse_example
from mtl_lora.language.prepare import textclass
from mtl_lora.language.tasks import TaskSet
from mtl_lora.nlu.examples import parse_example as parse_for_encoders
from mtl_lora.nlu.tasks import TaskSet as EncoderTaskSet

FILE = {
    "tasks": [
        {"name": "mood", "id": 0, "labels": ["bad", "so so", "good"], "question": "How is the mood?", "pattern": ""},
        {"name": "same", "id": 1, "labels": ["no", "yes"], "answer_prefix": "it is "},
    ]
}
TASKS = TaskSet.from_json(FILE)
RECORDS = [
    {"text": "the sun is out", "label": "good", "task": "mood", "kind": "sky"},
    {"text": "rain again", "label": 0, "task": "mood"},
    {"text": "a plum", "text_b": "a fruit", "label": "no", "task": "same"},
    {"text": "a pair", "text_b": "two", "label": "1", "task_id": 1, "instruction": None},
]
BY_HAND = [
    ("How is the mood?\n\nthe sun is out", "the correct answer is good", "good", 0),
    ("How is the mood?\n\nrain again", "the correct answer is bad", "bad", 0),
    ("Which label fits these two texts: no or yes?\n\na plum\na fruit", "it is no", "no", 1),
    ("Which label fits these two texts: no or yes?\n\na pair\ntwo", "it is yes", "yes", 1),
]
BY_HAND = [dict(zip(("instruction", "output", "answer", "task_id"), row, strict=True)) for row in BY_HAND]


def read(records: list[dict], **options) -> list:
    return [parse_example(record, index, "file", TASKS, **options) for index, record in enumerate(records)]


def test_a_record_is_the_one_written_by_hand_token_by_token(tokenizer):
    found, expected = read(RECORDS), read(BY_HAND)
    assert found == expected and read([example.record() for example in found]) == expected
    assert [example.extra for example in found] == [{"kind": "sky"}, {}, {}, {}]
    encoder = Encoder(tokenizer, "alpaca", 128, TASKS)
    assert encoder.encode(found) == encoder.encode(expected)
    unlabelled = [{key: value for key, value in record.items() if key != "label"} for record in RECORDS]
    assert [each.instruction for each in read(unlabelled, answered=False)] == [each.instruction for each in expected]
    # An earlier file may hold further fields of these names.
    assert read([{**BY_HAND[0], "text": "raw", "label": 7}])[0].extra == {"text": "raw", "label": 7}


def test_a_null_is_an_absent_field_in_both_systems():
    for nothing in ({"task": "mood", "task_id": None}, {"task": None, "task_id": 0}):
        record = {"text": "rain again", "label": "bad", **nothing}
        encoded = parse_for_encoders(record, 0, "file", EncoderTaskSet.from_json(FILE))
        assert read([record])[0].task_id == encoded.task_id == 0


def test_one_tasks_file_serves_both_systems():
    assert EncoderTaskSet.from_json(FILE)["mood"].labels == TASKS["mood"].options == ("bad", "so so", "good")
    assert TaskSet.from_json(TASKS.to_json()) == TASKS
    without = TaskSet.from_json([{"name": "a", "id": 0, "options": ["x", "y"]}])
    assert "question" not in without.to_json()["tasks"][0]
    asked = TaskSet.from_json([{"name": "a", "id": 0, "options": ["x", "y"], "question": "Which?"}])
    assert asked.answers_sha256 != without.answers_sha256
    for more, facts in (({"regression": [0, 5]}, "--system nlu"), ({"labels": ["u", "v"]}, "'labels' and 'options'")):
        with pytest.raises(UserError, match=f"task 0 .*{facts}"):
            TaskSet.from_json([{"name": "a", "id": 0, "options": ["x", "y"], **more}])


def test_tables_hold_the_same_records(tmp_path):
    keys = list(dict.fromkeys(key for record in RECORDS for key in record))
    texts = [{key: str(value) for key, value in record.items() if value is not None} for record in RECORDS]
    with open(tmp_path / "data.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(texts)
    rows = [{key: record.get(key) for key in keys} for record in texts]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    (tmp_path / "data.json").write_text(json.dumps(RECORDS[0]))
    for name in ("data.csv", "data.parquet"):
        assert load_examples(tmp_path / name, TASKS) == read(BY_HAND)
    assert load_examples(tmp_path / "data.json", TASKS) == read(BY_HAND[:1])


def test_gaps_of_a_table_are_no_fields(tmp_path):
    """As pandas writes them: every record with all columns, whole numbers of a column with gaps as floats."""
    empty = dict.fromkeys(["text", "text_b", "label", "task", "task_id", "instruction", "messages", "output", "answer"])
    rows = [empty | record | ({"label": 0.0} if record["label"] == 0 else {}) for record in RECORDS]
    assert read(rows) == read(RECORDS)


@pytest.mark.parametrize(
    ("record", "facts"),
    [
        ({"text": "x", "label": 0.5, "task": "mood"}, ["0.5", "bad, so so, good"]),
        ({"text": "x", "label": "fine", "task": "mood"}, ["'fine'", "bad, so so, good"]),
        ({"text": "x", "label": 3, "task": "mood"}, ["3", "bad, so so, good"]),
        ({"text": "x", "task": "mood"}, ["'label'"]),
        ({"text": "x", "label": "good", "task": "mood", "instruction": "y"}, ["'text'", "'instruction'"]),
        ({"text": " ", "label": "good", "task": "mood"}, ["'text' is empty"]),
        ({"text": "x", "text_b": 5, "label": "no", "task": "same"}, ["'text_b'", "5"]),
        ({"text": "x", "textB": "y", "label": "no", "task": "same"}, ["'textB'", "'text_b'"]),
        ({"text": "x", "label": "good"}, ["'task_id'"]),
    ],
)
def test_what_is_wrong_with_a_record_is_named(record, facts):
    for closed in (False, True):
        with pytest.raises(UserError) as caught:
            read([record], closed=closed)
        assert all(fact in str(caught.value) for fact in ["file, example 0", *facts])


def test_a_number_among_labels_that_are_numbers_is_that_label():
    tasks = TaskSet.from_json([{"name": "stars", "id": 0, "options": ["1", "2", "3"]}])
    found = [parse_example({"text": "x", "label": label}, 0, "file", tasks).answer for label in (1, "1", 3)]
    assert found == ["1", "1", "3"]
    for label in (0, "0", 4):
        with pytest.raises(UserError, match="not one of stars's labels: 1, 2, 3"):
            parse_example({"text": "x", "label": label}, 0, "file", tasks)


def test_free_text_has_no_labels():
    tasks = TaskSet.from_json([{"name": "sum", "id": 0}])
    with pytest.raises(UserError, match="sum has no labels"):
        parse_example({"text": "x", "label": "y", "task": "sum"}, 0, "file", tasks)
    record = {"text": "x", "instruction": "y", "task": "sum"}
    assert parse_example(record, 0, "file", tasks, answered=False).extra == {"text": "x"}


def test_the_text_classification_set_could_be_written_so():
    tasks = [
        task.to_json() | {"question": textclass.QUESTIONS[task.name]} for task in TaskSet.load(textclass.TASKS_FILE)
    ]
    tasks = TaskSet.from_json(tasks)
    for task in tasks:
        record = {"text": "a text .", "label": task.options[-1], "task": task.name}
        expected = textclass.example(task, record["text"], record["label"])
        assert parse_example(record, 0, "", tasks) == parse_example(expected, 0, "", tasks)


def test_such_a_file_is_trained_evaluated_and_predicted(train, tmp_path, capsys):
    (tmp_path / "tasks.json").write_text(json.dumps(FILE))
    for folder in ("mood", "same"):
        (tmp_path / "test" / folder).mkdir(parents=True)
        own = [record for record in RECORDS if record["text"].startswith("a p") == (folder == "same")]
        own = [{key: value for key, value in record.items() if not key.startswith("task")} for record in own]
        (tmp_path / "test" / folder / "test.json").write_text(json.dumps(own))
    weights = {}
    for name, records in (("texts", RECORDS), ("hand", BY_HAND)):
        (tmp_path / f"{name}.json").write_text(json.dumps(records * 4))
        places = {"tasks_file": str(tmp_path / "tasks.json"), "data_path": str(tmp_path / f"{name}.json")}
        folder = train(name, **places, template="plain")
        weights[name] = (folder / artifacts.CHECKPOINT_WEIGHTS).read_bytes()
    assert weights["texts"] == weights["hand"]

    def answered(checkpoint, data) -> list[dict]:
        output = tmp_path / f"{checkpoint}.jsonl"
        data = [{key: value for key, value in record.items() if key in keys} for record in data]
        (tmp_path / "new.json").write_text(json.dumps(data))
        paths = {"checkpoint": tmp_path / checkpoint, "input": tmp_path / "new.json", "output": output}
        cli.main(["predict", *(f"--{name}={path}" for name, path in paths.items())])
        return [json.loads(line) for line in output.read_text().splitlines()]

    keys = ("text", "text_b", "instruction", "task", "task_id")
    found = answered("texts", RECORDS)
    assert found == answered("hand", BY_HAND) and list(found[0]["scores"]) == ["bad", "so so", "good"]
    cli.main(["evaluate", f"--checkpoint={tmp_path / 'texts'}", f"--data_dir={tmp_path / 'test'}", "--mode=score"])
    results = json.loads((tmp_path / "texts" / artifacts.EVALUATION / artifacts.RESULTS).read_text())
    assert {name: task["n"] for name, task in results["tasks"].items()} == {"mood": 2, "same": 2}
    assert TaskSet.load(tmp_path / "tasks.json") == TASKS
