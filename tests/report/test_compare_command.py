"""The command ``compare``: what it prints in each format, and how mistakes end."""

import csv
import io
import json

import pytest
from paired_runs import outcomes, predictions_of, write_run
from report_records import run_command

from mtl_lora.report.render_compare import p_text

# All of one task changes and nothing of the other, so that no interval depends on the random numbers.
RIGHT_A = {"first": outcomes("000000"), "second": outcomes("10")}
RIGHT_B = {"first": outcomes("111111"), "second": outcomes("10")}
F1_A = {"first": [0.0] * 6, "second": [0.5, 1]}
F1_B = {"first": [0.75] * 6, "second": [0.5, 1]}

EXPECTED = """\
| Task    | Questions |    A |     B |  B - A |    95 % interval | Only A right | Only B right |      p |
| ------- | --------: | ---: | ----: | -----: | ---------------: | -----------: | -----------: | -----: |
| First   |         6 |  0.0 | 100.0 | +100.0 | +100.0 to +100.0 |            0 |            6 | 0.0312 |
| second  |         2 | 50.0 |  50.0 |   +0.0 |     +0.0 to +0.0 |            0 |            0 | 1.0000 |
| Average |         8 | 25.0 |  75.0 |  +50.0 |   +50.0 to +50.0 |            0 |            6 | 0.0312 |

- A: a ({a}). B: b ({b}). B - A in percentage points.
- Interval: 95 % percentile interval of a paired bootstrap, 10,000 resamples of the questions within each task, seed 0.
- p: exact two-sided McNemar test of the questions that only A answers right against those that only B does; not \
corrected for the number of tasks.
- Average: every task weighs the same in the scores, every question in p, which pools the questions of all tasks.
"""


@pytest.fixture
def runs(tmp_path):
    """The folders of two runs that can be compared."""
    return [
        write_run(tmp_path / name, predictions_of(right, f1))
        for name, right, f1 in (("a", RIGHT_A, None), ("b", RIGHT_B, None))
    ]


def test_command_prints_the_expected_table(runs, capsys):
    expected = EXPECTED.replace("{a}", str(runs[0])).replace("{b}", str(runs[1]))
    assert run_command(capsys, "compare", runs[0], runs[1] / "results.json") == (0, expected, "")


def test_f1_stands_in_columns_of_its_own(tmp_path, capsys):
    a = write_run(tmp_path / "a", predictions_of(RIGHT_A, F1_A))
    b = write_run(tmp_path / "b", predictions_of(RIGHT_B, F1_B))
    code, out, _ = run_command(capsys, "compare", a, b)
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in out.splitlines()[:5]]
    assert code == 0 and header[9:] == ["F1 A", "F1 B", "F1 B - A", "F1 95 % interval"]
    assert lines[0][9:] == ["0.0", "75.0", "+75.0", "+75.0 to +75.0"]
    assert lines[2][9:] == ["37.5", "75.0", "+37.5", "+37.5 to +37.5"]


def test_a_small_p_and_a_title_with_markup_stay_what_they_are_in_markdown(tmp_path, capsys):
    task_set = {"tasks": [{"name": "first", "id": 0, "title": "a|b"}]}
    a, b = (
        write_run(tmp_path / name, predictions_of({"first": [flag] * 20}), task_set=task_set)
        for name, flag in (("a", False), ("b", True))
    )
    code, out, _ = run_command(capsys, "compare", a, b)
    line = out.splitlines()[2]
    assert code == 0 and line.startswith(r"| a\|b ") and line.endswith("| <0.0001 |")


def test_csv_has_fractions_and_keeps_its_notes_off_the_output(runs, capsys):
    code, out, err = run_command(capsys, "compare", *runs, "--format", "csv")
    first, second, average = csv.DictReader(io.StringIO(out))
    assert code == 0 and err.count("\n") == 4 and "paired bootstrap" in err
    assert (first["task"], second["task"], average["task"]) == ("first", "second", "")
    assert (first["p"], first["only_b"], first["f1 a"]) == ("0.03125", "6", "")
    assert [float(average[f"accuracy {key}"]) for key in ("a", "b", "difference", "low", "high")] == [
        0.25,
        0.75,
        0.5,
        0.5,
        0.5,
    ]


def test_json_says_who_what_and_how(tmp_path, capsys):
    a = write_run(tmp_path / "a", predictions_of(RIGHT_A, F1_A))
    b = write_run(tmp_path / "b", predictions_of(RIGHT_B, F1_B), settings__dtype="torch.float32")
    code, out, err = run_command(capsys, "compare", a, b, "--format", "json", "--seed", "5", "--resamples", "100")
    value = json.loads(out)
    assert (code, err, value["seed"], value["resamples"], value["confidence"]) == (0, "", 5, 100, 0.95)
    assert (value["a"]["name"], value["b"]["results"]) == ("a", str(b / "results.json"))
    assert value["b"]["settings"]["dtype"] == "torch.float32" and "The dtypes differ" in value["notes"][-1]
    everything = {"a": 0.0, "b": 1.0, "difference": 1.0, "low": 1.0, "high": 1.0}
    f1 = {"a": 0.0, "b": 0.75, "difference": 0.75, "low": 0.75, "high": 0.75}
    assert value["tasks"]["first"] == {
        "n": 6,
        "accuracy": everything,
        "only_a": 0,
        "only_b": 6,
        "p": 0.03125,
        "f1": f1,
    }
    assert list(value["tasks"]) == ["first", "second"] and value["average"]["n"] == 8


@pytest.mark.parametrize(
    ("name", "opening"), [("x.md", "| Task"), ("x.csv", "task,n,"), ("x.json", "{\n"), ("x.tex", "| Task")]
)
def test_format_follows_the_suffix(runs, tmp_path, capsys, name, opening):
    code, out, _ = run_command(capsys, "compare", *runs, "--output", tmp_path / name)
    assert (code, out) == (0, "")
    assert (tmp_path / name).read_text(encoding="utf-8").startswith(opening)


@pytest.mark.parametrize(("p", "text"), [(1, "1.0000"), (0.00012, "0.0001"), (0.0001, "0.0001"), (9e-5, "<0.0001")])
def test_p_has_four_decimals(p, text):
    assert p_text(p) == text


def test_every_mistake_ends_in_one_sentence_and_exit_code_2(runs, tmp_path, capsys):
    a, b = runs
    other = write_run(tmp_path / "other", predictions_of(RIGHT_B), settings__mode="score")
    bare = write_run(tmp_path / "bare", predictions_of(RIGHT_B))
    (bare / "predictions" / "first.jsonl").unlink()
    mistakes = [
        ([a], "B"),
        ([a, tmp_path / "none"], "there is no results file"),
        ([a, other], "are not comparable: they differ in mode ('generate' and 'score')"),
        ([a, bare], "can not be read (No such file or directory); pass a whole evaluation output folder"),
        ([a, b, "--seed", "-1"], "--seed is -1; it must be a whole number from 0"),
        ([a, b, "--seed", "x"], "--seed"),
        ([a, b, "--resamples", "99"], "--resamples is 99; it must be a whole number from 100 to 1000000"),
        ([a, b, "--resamples", "1000001"], "--resamples is 1000001"),
        ([a, b, "--format", "latex"], "--format"),
        ([a, b, "--output", tmp_path], "is a folder"),
        ([a, b, "--output", b / "results.json"], "would be lost"),
        ([a, b, "--output", a / "predictions" / "first.jsonl"], "would be lost"),
    ]
    for arguments, complaint in mistakes:
        code, out, err = run_command(capsys, "compare", *arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("error: ") and err.count("\n") == 1 and complaint in err, err
