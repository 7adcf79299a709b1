"""The command line of reports: where the table goes, and how mistakes end."""

import csv
import io
import json

import pytest
from report_records import BASE, COMMONSENSE_RESULTS, EXPECTED, TUNED, changed, run_command


def test_command_prints_the_table(write, capsys):
    code, out, err = run_command(
        capsys, "table", write(BASE, "base"), write(TUNED, "tuned") / "results.json", "--difference"
    )
    assert (code, out, err) == (0, EXPECTED, "")


@pytest.mark.parametrize(
    ("name", "flags", "opening"),
    [
        ("table.md", [], "| Method"),
        ("table.csv", [], "name,kind,"),
        ("table.tex", [], "% needs"),
        ("table.txt", [], "| Method"),
        ("table.csv", ["--format", "latex"], "% needs"),
    ],
)
def test_format_follows_the_suffix_unless_it_is_given(write, tmp_path, capsys, name, flags, opening):
    code, out, _ = run_command(capsys, "table", write(BASE), "--output", tmp_path / name, *flags)
    assert (code, out) == (0, "")
    assert (tmp_path / name).read_text(encoding="utf-8").startswith(opening)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", name]


def test_csv_keeps_its_notes_off_the_output(write, capsys):
    code, out, err = run_command(
        capsys, "table", write(BASE, "a"), write(changed(TUNED, mode="generate"), "b"), "--format", "csv"
    )
    assert code == 0 and "Rows differ in mode: base score, mtl_lora generate." in err
    assert {len(line) for line in csv.reader(io.StringIO(out))} == {16}


def test_every_mistake_ends_in_one_sentence_and_exit_code_2(write, tmp_path, capsys):
    base, commonsense = write(BASE, "base"), write(COMMONSENSE_RESULTS, "commonsense")
    broken, listed, missing = write("{", "broken"), write("[]", "listed"), tmp_path / "missing"
    mistakes = [
        ([], "COMMAND"),
        (["table"], "RESULTS"),
        (["table", base, "--format", "html"], "--format"),
        (["table", base, "--frmat", "csv"], "--frmat"),
        (["table", missing], f"there is no results file {missing}"),
        (["table", tmp_path], f"there is no results file {tmp_path / 'results.json'}"),
        (["table", broken], "is not JSON"),
        (["table", listed], "must be an object"),
        (["table", base, commonsense], "one table needs results of one task set"),
        (["table", base, "--published"], "--published has figures for the commonsense tasks alone"),
        (["table", base, "--difference"], "--difference is the last results file minus the first and needs two"),
        (["table", base, "--output", base / "results.json" / "table.md"], "can not be written"),
        (["table", base, "--output", base], "is a folder"),
        (["table", base, "--output", base / "results.json"], "would be lost"),
    ]
    for arguments, complaint in mistakes:
        code, out, err = run_command(capsys, *arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("error: ") and err.count("\n") == 1 and complaint in err, err
    assert json.loads((base / "results.json").read_text()) == BASE
