"""The results table: what its rows and notes say, and what holds for any table."""

import csv
import io
import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_records import BASE, COMMONSENSE_RESULTS, EXPECTED, TUNED, TWO_TASKS, changed, grid, unescaped_pipes

from mtl_lora.report.render import RENDERERS, percent, trainable_text
from mtl_lora.report.results import Trainable


def test_markdown_table_is_the_expected_text(table_of):
    assert RENDERERS["markdown"](table_of(BASE, TUNED, difference=True)) == EXPECTED


def test_commonsense_columns_are_in_the_order_of_the_papers(table_of):
    header = RENDERERS["markdown"](table_of(COMMONSENSE_RESULTS)).splitlines()[0]
    names = "BoolQ | PIQA | SIQA | HellaSwag | WinoGrande | ARC-e | ARC-c | OBQA | Average"
    assert re.sub(r" +", " ", header) == f"| Method | Trained weights, M (%) | {names} |"


def test_average_of_eight_equal_standard_errors_shrinks_by_the_root_of_eight(table_of):
    average = table_of(COMMONSENSE_RESULTS).rows[0].average
    assert average.accuracy == pytest.approx(0.683)
    assert average.stderr == pytest.approx(0.008 / math.sqrt(8))


def test_the_average_that_the_file_gives_is_shown(table_of):
    given_average = {"accuracy": 0.3751, "stderr": 0.1, "tasks": 2}
    text = RENDERERS["markdown"](table_of(changed(BASE, average=given_average)))
    assert grid(text)["base"][-1] == "37.5 ± 10.0"


@pytest.mark.parametrize(
    ("adapter", "total", "text"),
    [
        (16_845_824, 6_755_261_248, "16.85 (0.25 %)"),
        (460_800, 134_515_008, "0.46 (0.34 %)"),
        (1234, 135_000_000, "0.0012 (0.00091 %)"),
        (0, 10, "0.00 (0.00 %)"),
    ],
)
def test_trained_weights_keep_two_digits(adapter, total, text):
    assert trainable_text(Trainable(adapter, total)) == text


@pytest.mark.parametrize(
    ("fraction", "signed", "text"),
    [(0.683, False, "68.3"), (1, False, "100.0"), (0.012, True, "+1.2"), (-0.031, True, "-3.1"), (-1e-9, True, "+0.0")],
)
def test_percent_has_one_decimal_and_no_negative_zero(fraction, signed, text):
    assert percent(fraction, signed) == text


def test_a_missing_task_is_a_dash_and_takes_the_average_with_it(table_of):
    table = table_of(changed(BASE, tasks__second=...), TUNED, difference=True)
    rows = grid(RENDERERS["markdown"](table))
    assert rows["base"] == ["–", "50.0 ± 3.0", "–", "–"]
    assert rows["always the most frequent answer"] == ["–", "60.0", "–", "–"]
    assert rows["difference"] == ["–", "+25.0 ± 4.2", "–", "–"]
    assert "No average for base, which has no score for second." in table.notes


def test_the_most_frequent_answer_needs_every_task(table_of):
    kinds = [row.kind for row in table_of(changed(BASE, tasks__first__majority=...)).rows]
    assert kinds == ["result"]


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"tasks__second__n": 99}, "Rows are not on the same questions: second."),
        ({"data__first": "cccc"}, "Rows are not on the same questions: first."),
        ({"data": {"first": "c", "second": "d"}}, "Rows are not on the same questions: first, second."),
        ({"mode": "generate"}, "Rows differ in mode: base score, mtl_lora generate."),
        ({"mode": ...}, "Rows differ in mode: base score, mtl_lora unknown."),
        ({"base_model": "llama"}, "Rows differ in base model: base smollm2-135m, mtl_lora llama."),
        ({"settings": {"num_beams": 4}}, None),
        ({"tasks__first__majority": 0.7}, '"always the most frequent answer" is on the questions of base.'),
        ({"data": ...}, None),
        ({"data__second": ...}, None),
        ({"tasks__second": ...}, "No average for mtl_lora, which has no score for second."),
    ],
)
def test_notes_say_what_keeps_rows_from_being_compared(table_of, changes, note):
    usual = set(table_of(BASE, TUNED).notes)
    new = [line for line in table_of(BASE, changed(TUNED, **changes)).notes if line not in usual]
    assert [line for line in new if not line.startswith("Questions:")] == ([note] if note else [])


@pytest.mark.parametrize(
    ("key", "one", "other", "note"),
    [
        (
            "dtype",
            "torch.float32",
            "torch.bfloat16",
            "Rows differ in dtype: base torch.float32, mtl_lora torch.bfloat16.",
        ),
        ("num_beams", 1, 4, "Rows differ in num_beams: base 1, mtl_lora 4."),
        (
            "tasks_sha256",
            "a" * 64,
            "b" * 64,
            "the tasks' options and patterns: base aaaaaaaaaaaa, mtl_lora bbbbbbbbbbbb.",
        ),
        ("adapter_sha256", "a" * 64, "b" * 64, None),
        ("template", "alpaca", "alpaca", None),
    ],
)
def test_rows_of_other_protocols_are_named(table_of, key, one, other, note):
    table = table_of(changed(BASE, settings={key: one}), changed(TUNED, settings={key: other}))
    found = [line for line in table.notes if line.startswith("Rows differ")]
    assert len(found) == (note is not None) and all(line.endswith(note) for line in found)


GROUPS = {"easy": {"accuracy": 0.8, "stderr": 0.03, "n": 10}, "hard": {"accuracy": 0.2, "stderr": 0.04, "n": 5}}


def test_averages_by_group_follow_in_a_second_table(table_of):
    grouped = changed(BASE, tasks__first__groups=GROUPS, tasks__second__groups=GROUPS)
    text = RENDERERS["markdown"](table_of(grouped, TUNED))
    assert (
        """
| Average by group |       easy |       hard |
| ---------------- | ---------: | ---------: |
| base             | 80.0 ± 2.1 | 20.0 ± 2.8 |
| mtl_lora         |          – |          – |
"""
        in text
    )


def test_a_group_of_some_tasks_alone_is_named(table_of):
    notes = table_of(changed(BASE, tasks__first__groups=GROUPS)).notes
    assert "Group easy is the average over first alone." in notes


def test_the_files_own_group_average_comes_first(table_of):
    average = {"accuracy": 0.375, "groups": {"easy": {"accuracy": 0.7}, "other": {"accuracy": 0.5, "stderr": 0.1}}}
    table = table_of(changed(BASE, average=average, tasks__first__groups=GROUPS))
    cells = table.rows[-1].groups
    assert (cells["easy"].accuracy, cells["easy"].stderr) == (0.7, 0.03)
    assert (cells["other"].accuracy, cells["other"].stderr) == (0.5, 0.1)


def test_latex_escapes_texts_and_sets_scores_in_math(table_of):
    text = RENDERERS["latex"](table_of(changed(BASE, name="[50%] a_b & c"), TUNED, difference=True))
    assert r"{[}50\%] a\_b \& c & -- & $50.0 \pm 3.0$ & $25.0 \pm 4.0$ & $37.5 \pm 2.5$ \\" in text
    assert r"difference & -- & $+25.0 \pm 4.2$ & $-5.0 \pm 5.0$ & $+10.0 \pm 3.3$ \\" in text
    assert r"mtl\_lora & 16.85 (0.25 \%) &" in text
    assert text.count(r"\midrule") == 3
    assert "±" not in text and "–" not in text


# What holds for any table

NAMES = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
FRACTIONS = st.floats(0, 1)


@st.composite
def records(draw):
    scores = [{"accuracy": draw(FRACTIONS), "stderr": draw(FRACTIONS), "n": draw(st.integers(1, 10**6))} for _ in "ab"]
    task_set = changed(TWO_TASKS)
    task_set["tasks"][0]["title"] = draw(NAMES)
    return {"name": draw(NAMES), "tasks": {"first": scores[0], "second": scores[1]}, "task_set": task_set}


reuse_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)


@reuse_folder
@given(record=records())
def test_csv_carries_every_digit(table_of, record):
    table = table_of(record, record, difference=True)
    lines = list(csv.DictReader(io.StringIO(RENDERERS["csv"](table), newline="")))
    assert [line["kind"] for line in lines] == ["result", "result", "difference"]
    for task, score in record["tasks"].items():
        read = (float(lines[0][f"{task} accuracy"]), float(lines[0][f"{task} stderr"]), int(lines[0][f"{task} n"]))
        assert read == (score["accuracy"], score["stderr"], score["n"])
        assert float(lines[2][f"{task} accuracy"]) == 0
    assert float(lines[0]["average"]) == table.rows[0].average.accuracy
    assert lines[0]["name"] == " ".join(record["name"].split())


@reuse_folder
@given(record=records())
def test_markdown_rows_all_have_the_same_number_of_cells(table_of, record):
    lines = RENDERERS["markdown"](table_of(record)).split("\n")
    assert [unescaped_pipes(line) for line in lines[:3]] == [6, 6, 6]
    assert lines[3] == ""


@pytest.mark.parametrize("name", ["a|b", "a\\|b", "two\nlines", "`code|`", "*|*"])
def test_a_name_can_not_break_a_markdown_table(table_of, name):
    lines = RENDERERS["markdown"](table_of(changed(BASE, name=name))).splitlines()
    assert {unescaped_pipes(line) for line in lines[:4]} == {6}
