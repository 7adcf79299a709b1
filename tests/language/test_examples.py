"""Examples from a file: every kind of mistake is one sentence that names the file, the example and the field."""

import csv
import io
import itertools
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from shared import QUICKSTART

from mtl_lora.data_files import data_file
from mtl_lora.errors import UserError
from mtl_lora.language.examples import Example, load_examples
from mtl_lora.language.tasks import COMMONSENSE, Task, TaskSet
from mtl_lora.samples import sampled

GOOD = {
    "instruction": "Please choose the correct answer to the question: what do bees make?\n\n"
    "Answer1: honey Answer2: silk Answer3: salt\n\nAnswer format: answer1/answer2/answer3",
    "input": "",
    "output": "the correct answer is answer1",
    "answer": "answer1",
    "task_id": 2,
}


def without(*fields: str, **changed) -> dict:
    """The good record without some fields and with others changed."""
    return {**{name: value for name, value in GOOD.items() if name not in fields}, **changed}


@pytest.fixture
def load(tmp_path):
    """Write content to a data file and load it."""

    def write_and_load(content, name="data.json", tasks=COMMONSENSE, **options):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            path.write_text(json.dumps(content), encoding="utf-8")
        return load_examples(path, tasks, **options)

    return write_and_load


def lines(*records) -> bytes:
    """Records as JSON lines; a bytes value stands for itself."""
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records)


def test_answer_may_leave_out_the_white_space_of_its_option(load):
    tasks = TaskSet((Task("own", 0, (" yes", " no"), answer_prefix="the correct answer is"),))
    record = {"instruction": "q", "output": "the correct answer is yes", "answer": "yes"}
    assert load([record], tasks=tasks)[0].answer == load([record], tasks=tasks, closed=True)[0].answer == " yes"


def test_record_that_contradicts_its_file_is_refused(load):
    with pytest.raises(UserError, match="example 0 names different tasks: social_i_qa and boolq"):
        load([GOOD], task="boolq")


def test_unknown_task_of_a_file_lists_the_tasks(load):
    with pytest.raises(UserError, match="there is no task 'siqa'; the tasks are boolq 0"):
        load([without("task_id")], task="siqa")


# ---- answers ----


@pytest.mark.parametrize("answer", ["answer4", "honey", "", "Answer1", "answer1 "])
def test_answer_outside_the_records_options_is_refused(load, answer):
    record = without(answer=answer)
    for closed in (True, False) if answer else (True,):
        with pytest.raises(UserError, match=rf"example 0: the answer {answer!r} is not .* options answer1/answer2/"):
            load([record], closed=closed)
    if not answer:  # training takes it from the output
        assert load([record])[0].answer == ""


def test_output_may_reason_before_it_answers(load):
    output = "Bees make honey. So the correct answer is answer1"
    assert load([without(output=output)])[0].output == output


def test_free_text_task_takes_any_answer(load):
    free = TaskSet((Task("free", 0),))
    (example,) = load([without(answer="a jar of honey", task_id=0)], tasks=free, closed=True)
    assert example.answer == "a jar of honey"


@pytest.mark.parametrize(
    ("answer", "changes", "read"),
    [
        ("red\nblue", {}, "'red' (its first line"),
        ("\nred", {"metric": "accuracy"}, "'red' (its first line"),
        (" red", {"metric": "accuracy"}, "'red' (its first line"),
        ("1,000", {"pattern": r"-?\d+"}, "'1' (by the task's pattern"),
        ("red\nblue", {"metric": "f1"}, None),
        (" red.", {}, None),
        ("the correct answer is red", {}, "'red' (its first line"),  # the words before it are the task's
        ("42", {"pattern": r"(?<=#### )\d+"}, None),  # which stands behind what is not in the answer
        ("42.0", {"pattern": r"-?[\d.]+"}, None),
    ],
)
def test_an_answer_of_free_text_that_no_evaluation_could_read_is_refused(load, answer, changes, read):
    record, free = without(answer=answer, task_id=0), TaskSet((Task("free", 0, **changes),))
    if read is None:
        assert load([record], tasks=free, closed=True)[0].answer == answer
    else:
        with pytest.raises(UserError, match=f"example 0: .* an evaluation would extract only {re.escape(read)}"):
            load([record], tasks=free, closed=True)


# ---- what is read ----


def test_records_are_read_as_they_stand_in_order(load):
    first, second = load([GOOD, without(task_id=6, input="some text", instruction=" É\u2028☃ ", kind="easy", source=3)])
    assert first == Example(GOOD["instruction"], "", GOOD["output"], "answer1", 2, 0)
    assert (second.instruction, second.input, second.task_id, second.index) == (" É\u2028☃ ", "some text", 6, 1)
    assert first.extra == {} and second.extra == {"kind": "easy", "source": 3}
    assert second.text() == {"instruction": " É\u2028☃ ", "input": "some text", "context": ()}


def test_an_answer_without_an_output_is_written_behind_the_answer_prefix(load):
    (one,) = load([{"instruction": "Is it?", "answer": "true", "task": "boolq"}])
    assert (one.output, one.answer) == ("the correct answer is true", "true")
    free = TaskSet((Task("free", 0, answer_prefix="A: "),))
    (one,) = load([{"instruction": "Which?", "answer": "red", "task": "free"}], tasks=free)
    assert one.output == "A: red"
    with pytest.raises(UserError, match="the answer 'maybe' is not one of its options"):
        load([{"instruction": "Is it?", "answer": "maybe", "task": "boolq"}])


@pytest.mark.parametrize("name", ["instruction", "input"])
def test_a_json_file_may_hold_one_line_of_one_example(load, name):
    record = {"task": "boolq", "output": GOOD["output"].replace("answer1", "true")} | {name: "Is it?"}
    (one,) = load(json.dumps(record).encode())
    assert getattr(one, name) == "Is it?"


def test_json_lines_hold_the_same_records_as_a_list(load):
    records = [GOOD, without(instruction="a\u2028b", output="line\nthe correct answer is answer1"), without(task_id=6)]
    raw = b"\n".join(json.dumps(record, ensure_ascii=False).encode() for record in records)
    assert load(raw, "data.jsonl") == load(records)
    assert load(raw.replace(b"\n{", b"\r\n{"), "windows.jsonl") == load(records)


def test_fields_that_are_not_needed_may_be_left_out_or_null(load):
    assert load([without("input")]) == load([without(input=None)]) == load([GOOD])
    # answers are compared, and outputs trained on
    assert load([without("answer")])[0].answer == load([without(answer=None)])[0].answer == ""
    assert load([without("output")], closed=True)[0].output == ""
    with pytest.raises(UserError, match="example 0 has no field 'answer'"):
        load([without("answer")], closed=True)
    with pytest.raises(UserError, match="example 0 has no field 'output'"):
        load([without("output", "answer")])
    (example,) = load([without(instruction="", input="Is it?")])
    assert example.text() == {"instruction": "", "input": "Is it?", "context": ()}


def test_one_task_alone_needs_no_task_id(load):
    (example,) = load([without("task_id")], tasks=TaskSet((Task("free", 0),)))
    assert example.task_id == 0


PAIR = [GOOD, without(task_id=6)]
ONE_A_LINE = lines(*PAIR)


def parquet(records: list[dict], **column) -> bytes:
    written = io.BytesIO()
    table = pyarrow.Table.from_pylist(records)
    for name, kind in column.items():
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))
    pyarrow.parquet.write_table(table, written)
    return written.getvalue()


def csv_of(records: list[dict], **dialect) -> bytes:
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, records[0], **dialect)
    writer.writeheader()
    writer.writerows(records)
    return written.getvalue().encode()


READ = {
    "wrapped": ("data.json", json.dumps({"version": 1, "data": PAIR}).encode()),
    "a list in a .jsonl file": ("data.jsonl", json.dumps(PAIR).encode()),
    "ids as text": ("data.json", json.dumps([{**one, "task_id": str(one["task_id"])} for one in PAIR]).encode()),
    "ids as floats": ("data.json", json.dumps([GOOD, without(task_id=6.0)]).encode()),
    "CSV": ("data.csv", csv_of(PAIR)),
    "CSV of a spreadsheet": ("DATA.CSV", b"\xef\xbb\xbf" + csv_of(PAIR, quoting=csv.QUOTE_ALL)),
    "tabs": ("data.tsv", csv_of(PAIR, delimiter="\t", lineterminator="\n\n")),
    "parquet": ("data.parquet", parquet(PAIR)),
    "parquet with floats, bytes and nulls": (
        "data.Parquet",
        parquet([{**one, "input": None} for one in PAIR], task_id="float64", output="binary"),
    ),
    "BOM": ("data.json", b"\xef\xbb\xbf" + json.dumps(PAIR).encode()),
    "BOM before lines": ("data.jsonl", b"\xef\xbb\xbf" + ONE_A_LINE),
    "blank lines": ("data.jsonl", b"\n" + ONE_A_LINE.replace(b"}\n", b"}\n\n \r\n")),
    "upper case": ("DATA.JSONL", ONE_A_LINE),
    "lines in a .json file": ("data.json", ONE_A_LINE),
}


@pytest.mark.parametrize("name, content", READ.values(), ids=READ)
def test_what_other_tools_write_is_read(load, name, content):
    assert load(content, name) == load(PAIR)


def test_rows_of_tabs_that_a_quotation_mark_merges_are_refused(load):
    head = b"instruction\toutput\ttask\n"
    with pytest.raises(UserError, match=r"data\.tsv, lines up to 4 are either 2 rows"):
        load(head + b'a\tThe answer is true\tboolq\n"A fine\tb\tboolq\nbad"\tb\tboolq\n', "data.tsv")
    (one,) = load(head + b'\n"def f():\n\treturn"\tthe correct answer is true\tboolq\n', "data.tsv")
    assert one.instruction == "def f():\n\treturn"


def test_a_test_set_has_any_format_but_only_one(tmp_path):
    assert data_file(tmp_path / "nowhere", "test") == tmp_path / "nowhere" / "test.json"
    (tmp_path / "test.md").write_text("")
    assert data_file(tmp_path, "test") == tmp_path / "test.json"
    (tmp_path / "test.CSV").write_bytes(csv_of(PAIR))
    assert load_examples(data_file(tmp_path, "test"), COMMONSENSE)[1].task_id == 6
    (tmp_path / "test.jsonl").write_bytes(ONE_A_LINE)
    with pytest.raises(UserError, match=r"test\.CSV and test\.jsonl"):
        data_file(tmp_path, "test")
    (tmp_path / "test.json").write_text("[]")
    assert data_file(tmp_path, "test") == tmp_path / "test.json", "the name that it always had goes first"


@pytest.mark.parametrize(
    "record, options",
    [
        (without("task_id", task="ARC-Easy"), {}),
        (without("task_id", task="ARC-Easy"), {"task": "ARC-Easy"}),
        (without(task="ARC-Easy", task_id=6), {}),
        (without(task_id=6), {"task": "ARC-Easy"}),
        (without("task_id"), {"task": "ARC-Easy"}),
    ],
    ids=["name", "name twice", "name and id", "id in a file of the task", "file of the task"],
)
def test_task_is_known_by_name_by_id_or_by_its_file(load, record, options):
    (example,) = load([record], **options)
    assert example.task_id == COMMONSENSE["ARC-Easy"].id
    assert example.extra == {}


def test_sample_is_these_examples_for_ever_and_a_larger_one_adds_in_the_files_order():
    examples = load_examples(QUICKSTART / "test" / "piqa" / "test.json", COMMONSENSE, "piqa")
    assert [example.index for example in sampled(examples, 5, "piqa")] == [8, 24, 37, 48, 58]
    assert sampled(examples, 5, "piqa") != sampled(examples, 5, "boolq")
    indices = [[example.index for example in sampled(examples, most, "piqa")] for most in range(1, 70)]
    for smaller, larger in itertools.pairwise(indices):
        assert set(smaller) <= set(larger) and larger == sorted(larger)
    assert indices[-1] == list(range(60)) == [example.index for example in sampled(examples, 0, "piqa")]
