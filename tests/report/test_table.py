"""The results table: what its rows and notes say, in every format, and what holds for any table."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_cases import (
    BASE,
    COMMONSENSE,
    COMMONSENSE_RESULTS,
    TUNED,
    TUNED_SCHEMA_1,
    TWO_TASKS,
    assert_mistakes,
    changed,
    grid,
    run_command,
    unescaped_pipes,
)

from mtl_lora import artifacts
from mtl_lora.language.tasks import COMMONSENSE as COMMONSENSE_SET
from mtl_lora.metrics import value_text
from mtl_lora.report.load import Study
from mtl_lora.report.table import PUBLISHED_FILE, details, published_rows, study_tables
from mtl_lora.results import Results, Trainable, trainable_text
from mtl_lora.text_table import Report, TextTable, code_span, markdown_text

EXPECTED = """\
| Method         | Trainable parameters, M (%) |       First |     second |     Average |
| -------------- | --------------------------: | ----------: | ---------: | ----------: |
| majority class |                           – |        60.0 |       30.0 |        45.0 |
| base           |                           – |  50.0 ± 3.0 | 25.0 ± 4.0 |  37.5 ± 2.5 |
| mtl_lora       |              16.85 (0.25 %) |  75.0 ± 3.0 | 20.0 ± 3.0 |  47.5 ± 2.1 |
| difference     |                           – | +25.0 ± 4.2 | -5.0 ± 5.0 | +10.0 ± 3.3 |

- Questions: first 300, second 100.
"""
GROUPS = {"easy": {"value": 0.8, "stderr": 0.03, "n": 10}, "hard": {"value": 0.2, "stderr": 0.04, "n": 5}}


@pytest.mark.parametrize("tuned", [TUNED, TUNED_SCHEMA_1], ids=["schema 2", "schema 1"])
def test_markdown_table_is_the_expected_text_for_old_and_new_results(write, capsys, tuned):
    code, out, err = run_command(
        capsys, "table", write(BASE, "base"), write(tuned, "x") / "results.json", "--difference"
    )
    assert (code, out.startswith(EXPECTED), err) == (0, True, "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (trainable_text(Trainable(16_845_824, 6_755_261_248)), "16.85 (0.25 %)"),
        (trainable_text(Trainable(460_800, 134_515_008)), "0.46 (0.34 %)"),
        (trainable_text(Trainable(1234, 135_000_000), 6), "6 x 0.0012 (0.00091 %)"),
        (trainable_text(Trainable(0, 10)), "0.00 (0.00 %)"),
        (value_text(0.683), "68.3"),
        (value_text(1), "100.0"),
        (value_text(0.012, signed=True), "+1.2"),
        (value_text(-0.031, signed=True), "-3.1"),
        (value_text(-4e-4, signed=True), "-0.0"),  # on the other side of no difference than
        (value_text(1e-4, signed=True), "+0.0"),
        (value_text(0.0, signed=True), "0.0"),
        (value_text(-1e-17, signed=True), "0.0"),
        (value_text(-1e-4), "0.0"),
        (value_text(-4e-4, None, "rmse", signed=True), "-0.000"),
        (value_text(0.0, 0.0, "rmse", signed=True), "0.000 ± 0.000"),
        (value_text(2.5, 0.25, "rmse"), "2.500 ± 0.250"),
        (value_text(-2.5, None, "rmse", signed=True), "-2.500"),
        (value_text(0.034567, 0.0012, "edge_loss"), "0.03457 ± 0.00120"),
    ],
)
def test_numbers_have_the_digits_and_signs_that_people_read(text, expected):
    assert text == expected


def test_a_metric_that_is_not_a_fraction_is_shown_as_it_is_under_its_name(table_of):
    rmse = {"metric": "rmse", "value": 2.5, "stderr": 0.25, "n": 100}
    text = table_of(changed(BASE, tasks__second=rmse)).markdown()
    assert grid(text)["base"] == ["–", "50.0 ± 3.0", "2.500 ± 0.250"]
    assert "second (rmse)" in text.splitlines()[0]


def test_a_missing_task_is_a_dash_and_takes_the_average_with_it(table_of):
    rows = grid(table_of(changed(BASE, tasks__second=...), TUNED, difference=True).markdown())
    values = {"base": "50.0 ± 3.0", "majority class": "60.0", "difference": "+25.0 ± 4.2"}
    assert {name: rows[name] for name in values} == {name: ["–", value, "–", "–"] for name, value in values.items()}


def test_a_task_that_the_adapter_never_saw_has_no_plain_score(table_of):
    report = table_of(changed(BASE, tasks__second__untrained=True))
    assert grid(report.markdown())["base"][2] == "25.0 ± 4.0 (untrained)"
    assert "base had no training examples of second." in report.notes
    without = {"tasks__second__untrained": True}
    for pair in ((BASE, changed(TUNED, **without)), (changed(BASE, **without), TUNED)):
        cells = grid(table_of(*pair, difference=True).markdown())["difference"]
        assert cells[1:3] == ["+25.0 ± 4.2", "-5.0 ± 5.0 (untrained)"]


def test_rows_of_other_loss_weights_are_noted(table_of):
    tasks = [TWO_TASKS["tasks"][0] | {"weight": 2.5}, TWO_TASKS["tasks"][1]]
    weighted = changed(TUNED, name="weighted", task_set={"tasks": tasks})
    (note,) = [note for note in table_of(BASE, TUNED, weighted).notes if "weights" in note]
    assert note == "The loss of first had different weights in training: 1 in mtl_lora; 2.5 in weighted."
    assert not any("weights" in note for note in table_of(changed(BASE, task_set={"tasks": tasks}), TUNED).notes)


def test_rows_of_one_name_and_protocol_have_their_folders_in_notes_too(write, capsys):
    paths = [write(TUNED, "seed0"), write(changed(TUNED, tasks__first__untrained=True), "seed1")]
    code, out, _ = run_command(capsys, "table", *paths)
    assert code == 0 and {f"mtl_lora ({path})" for path in paths} <= grid(out).keys()
    assert f"mtl_lora ({paths[1]}) had no training examples of first." in out


def test_a_note_names_the_tasks_that_are_not_above_the_majority_class_and_tells_of_the_base_model(table_of):
    # Of first 60 and of second 30: 66.1 is within two standard errors of 3.
    notes = table_of(changed(TUNED, tasks__first__value=0.661), TUNED).notes
    (note,) = (note for note in notes if "majority" in note)
    assert note.startswith("Not two standard errors above the majority class in second: mtl_lora (")
    notes = table_of(changed(TUNED, tasks__first__value=0.65)).notes
    assert "Not two standard errors above the majority class in first, second: mtl_lora." in notes
    # As a constant answer under Matthews: no resample of the questions gives another value.
    notes = table_of(changed(TUNED, tasks__first__value=0.6, tasks__first__stderr=None)).notes
    assert "Not two standard errors above the majority class in first, second: mtl_lora." in notes
    assert sum("from 4 bits" in note or "4-bit GGUF" in note for note in notes) == 1


def test_averages_are_over_the_tasks_that_were_asked_and_rows_of_one_name_have_their_protocols(table_of):
    one = changed(BASE, tasks__first=...)
    table = table_of(one, changed(one, mode="generate"))
    rows = grid(table.markdown())
    assert rows["Method"][1:] == ["second", "Average"] and "first accuracy" not in table.records[0]
    assert rows["base (score)"] == rows["base (generate)"] == ["–", "25.0 ± 4.0", "25.0 ± 4.0"]
    assert any(note.startswith("Not evaluated") and note.endswith(": first.") for note in table.notes)


@pytest.mark.slow(1)
def test_every_command_finds_the_results_of_a_checkpoints_folder(write, tmp_path, capsys):
    for mode in ("generate", "score"):
        (tmp_path / "evaluation").mkdir(exist_ok=True)
        write(changed(TUNED, mode=mode, name=f"mtl_lora ({mode})"), f"evaluation/{mode}")
    for folder in (tmp_path, tmp_path / "evaluation"):
        assert {"mtl_lora (generate)", "mtl_lora (score)"} < set(grid(run_command(capsys, "table", folder)[1]))
        details = run_command(capsys, "details", folder)[1]
        titles = [line for line in details.splitlines() if line.startswith("mtl")]
        assert titles == ["mtl_lora (generate)", "mtl_lora (score)"]
        code, page, _ = run_command(capsys, "page", folder)
        assert code == 0 and "mtl_lora (score)" in Path(page.strip()).read_text()


def test_unparsed_answers_have_a_column_where_there_are_any(table_of):
    said = changed(BASE, tasks__first__unparsed=0.5, tasks__second__unparsed=1)
    table = table_of(said, changed(BASE, name="silent"))
    rows = grid(table.markdown())
    assert rows["Method"][-2:] == ["Average", "Unparsed"]
    assert (rows["base"][-1], rows["silent"][-1], rows["majority class"][-1]) == ("75.0", "–", "–")
    assert (table.records[1]["unparsed"], table.records[2]["unparsed"]) == (0.75, None)
    assert table_of(changed(BASE, tasks__first__unparsed=0.5)).records[1]["unparsed"] is None  # of one task alone
    assert table_of(said, changed(said, tasks__second=...)).records[2]["unparsed"] is None
    assert "Unparsed" not in table_of(changed(BASE, tasks__first__unparsed=0, tasks__second__unparsed=0)).markdown()


def test_a_table_of_hundreds_of_tasks_has_them_as_rows(table_of):
    names = [f"task{index}" for index in range(300)]
    scores = {"metric": "accuracy", "value": 0.5, "stderr": 0.1, "n": 10}
    wide = {**BASE, "tasks": dict.fromkeys(names, scores)}
    wide["task_set"] = {"tasks": [{"name": name, "id": index} for index, name in enumerate(names)]}
    text = table_of(wide, {**wide, "name": "tuned"}).markdown()
    rows = grid(text)
    assert max(map(len, text.splitlines()[:300])) < 100 and len(rows) == 300 + 4
    assert (rows["Method"], rows["task299"]) == (["base", "tuned"], ["50.0 ± 10.0"] * 2)


def test_the_majority_class_has_an_average_where_every_task_has_one(table_of):
    row = table_of(changed(BASE, tasks__first__majority=...)).records[0]
    assert (row["kind"], row["first accuracy"], row["second accuracy"], row["average"]) == ("majority", None, 0.3, None)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"tasks__second__n": 99}, ["same questions", "second"]),
        ({"data__first": "cccc"}, ["same questions", "first"]),
        ({"data": {"first": "c", "second": "d"}}, ["same questions", "first, second"]),
        ({"mode": "generate"}, ["mode", "base score", "mtl_lora generate"]),
        ({"mode": ...}, ["mode", "base score", "mtl_lora unknown"]),
        ({"base_model": "llama"}, ["base model", "smollm2-135m", "llama"]),
        ({"base_model": "elsewhere/smollm2", "settings": {"base_fingerprint": "a" * 64}}, []),  # the same files
        ({"settings": {"dtype": "fp64"}}, ["dtype", "base fp32, mtl_lora fp64"]),
        ({"settings": {"num_beams": 4}}, []),  # the other does not say
        ({"settings": {"load_in_4bit": True}}, ["load_in_4bit: base False, mtl_lora True"]),  # which is said if it is
        ({"settings": {"tasks_sha256": "b" * 64}}, [f"base {'a' * 12}, mtl_lora {'b' * 12}"]),
        ({"settings": {"base_fingerprint": "b" * 64}}, [f"base {'a' * 12}, mtl_lora {'b' * 12}"]),
        ({"settings": {"adapter_sha256": "b" * 64}}, []),
        ({"settings": {"template": "alpaca"}}, []),
        ({"tasks__first__majority": 0.7}, ["majority class", "base"]),
        ({"data": ...}, []),
        ({"data__second": ...}, []),
        ({"tasks__second": ...}, ["mtl_lora", "second"]),
    ],
)
def test_notes_say_what_keeps_rows_from_being_compared(table_of, changes, facts):
    hashes = {f"{name}_sha256": "a" * 64 for name in ("tasks", "adapter")}
    base = changed(BASE, settings={"dtype": "fp32", "template": "alpaca", "base_fingerprint": "a" * 64, **hashes})
    usual = set(table_of(base, TUNED).notes)
    new = [line for line in table_of(base, changed(TUNED, **changes)).notes if line not in usual]
    new = [line for line in new if not line.startswith("Questions:") and "standard errors above" not in line]
    assert len(new) == bool(facts) and all(fact in new[0] for fact in facts), new


def test_averages_by_group_follow_in_a_second_table_and_one_of_some_tasks_alone_is_named(table_of):
    grouped = changed(BASE, tasks__first__groups=GROUPS, tasks__second__groups=GROUPS)
    text = table_of(grouped, TUNED).markdown()
    rows = grid(text[text.index("| Average by group") :])
    assert (rows["Average by group"], rows["mtl_lora"]) == (["easy", "hard"], ["–", "–"])
    assert rows["base"] == ["80.0 ± 2.1", "20.0 ± 2.8"]
    notes = table_of(changed(BASE, tasks__first__groups=GROUPS)).notes
    assert any("easy" in note and "first alone" in note for note in notes)
    for other, count in ((TUNED, 0), (changed(grouped, tasks__second__groups={}), 2)):
        notes = table_of(grouped, other).notes
        assert sum("not of the same questions" in note for note in notes) == count  # easy and hard


def test_the_difference_is_of_the_groups_that_both_rows_have(table_of):
    fewer = {"easy": {"value": 0.9, "stderr": 0.04, "n": 10}}
    sides = (changed(BASE, tasks__first__groups=each, tasks__second__groups=each) for each in (GROUPS, fewer))
    text = table_of(*sides, difference=True).markdown()
    assert grid(text[text.index("| Average by group") :])["difference"] == ["+10.0 ± 3.5", "–"]


def test_latex_is_booktabs_with_every_text_escaped(table_of):
    text = table_of(changed(BASE, name="[50%] a_b & c < d"), TUNED, difference=True).latex()
    assert r"{[}50\%] a\_b \& c \textless{} d & – & 50.0 ± 3.0 & 25.0 ± 4.0 & 37.5 ± 2.5 \\" in text
    assert r"mtl\_lora & 16.85 (0.25 \%) &" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\bottomrule") == 2
    first = TextTable("", ["a", "b"], [["[x] small", "1"]]).latex()
    assert "\\midrule\n{[}x] small & 1" in first
    lines = TextTable("a\n\\input{b}", ["a\n\\c", "d"], [["1", "2"]])
    lines = Report([lines], [], [], titled=True).latex().splitlines()
    assert "% a \\input{b}" in lines and "a \\textbackslash c & d \\\\" in lines


def test_html_shows_whatever_a_name_holds_as_text(table_of):
    text = table_of(changed(BASE, name="<b>bold</b> & more")).html()
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; more" in text and "<b>" not in text and "<td>50.0 ± 3.0</td>" in text


# ---- published figures ----


def test_published_rows_have_eight_scores_their_average_and_a_source():
    published = json.loads(PUBLISHED_FILE.read_text(encoding="utf-8"))
    assert published["tasks"] == list(COMMONSENSE_SET.columns) == COMMONSENSE
    for row in published["rows"]:
        assert len(row["scores"]) == 8
        # One source prints 70.9 where its scores give 71.0, so a rounding step is all that can be asked for.
        assert row["average"] == pytest.approx(sum(row["scores"]) / 8, abs=0.1 + 1e-9)
        assert re.fullmatch(r"[\w.-]+/[\w.-]+ (\S+/)?README\.md", row["source"])


def test_published_rows_stand_beside_ours_with_their_sources(table_of):
    table = table_of(COMMONSENSE_RESULTS, published=True)
    scores = ["69.8", "79.9", "79.5", "83.6", "82.6", "79.8", "64.7", "81.0", "77.6"]
    assert grid(table.markdown())["LLaMA2-7B LoRA r 32 (published)"] == ["–", *scores]
    for source in {row.source for row in published_rows()}:
        assert source in table.notes[-1]
    labels = [row.name for row in published_rows()]
    assert len(set(labels)) == len(labels)
    assert "LLaMA-7B LoRA (published, AGI-Edgerunners/LLM-Adapters)" in labels
    # They never enter the difference.
    row = table_of(COMMONSENSE_RESULTS, COMMONSENSE_RESULTS, published=True, difference=True).records[-1]
    assert (row["kind"], row["average"]) == ("difference", 0)


# ---- the command ----


@pytest.mark.parametrize(
    ("name", "flags", "opening"),
    [
        ("table.md", [], "| Method"),
        ("table.csv", [], "name,kind,"),
        ("table.tex", [], "% needs"),
        ("table.html", [], "<table"),
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
    runs = write(BASE, "a"), write(changed(TUNED, mode="generate"), "b")
    code, out, err = run_command(capsys, "table", *runs, "--format", "csv")
    assert code == 0 and "base score, mtl_lora generate" in err
    assert {len(line) for line in csv.reader(io.StringIO(out))} == {17}


def test_every_mistake_ends_in_one_sentence_and_exit_code_2(write, tmp_path, capsys):
    base, commonsense = write(BASE, "base"), write(COMMONSENSE_RESULTS, "commonsense")
    boolq = COMMONSENSE_RESULTS["tasks"]["boolq"] | {"metric": "matthews"}
    other_metric = write(changed(COMMONSENSE_RESULTS, tasks={"boolq": boolq}), "other")
    without_boolq = write(changed(COMMONSENSE_RESULTS, tasks__boolq=...), "without_boolq")
    broken, listed, missing = write("{", "broken"), write("[]", "listed"), tmp_path / "missing"
    mistakes = [
        ([], "results"),
        ([base, "--format", "docx"], "docx"),
        ([base, "--frmat", "csv"], "--frmat"),
        ([missing], str(missing)),
        ([tmp_path], str(tmp_path / "results.json")),
        ([broken], str(broken / "results.json")),
        ([listed], "object"),
        ([base, commonsense], str(commonsense / "results.json")),
        ([base, "--published"], "--published"),
        ([other_metric, "--published"], "accuracies"),
        ([without_boolq, other_metric, "--published"], f"{other_metric / 'results.json'} has"),
        ([base, "--difference"], "--difference"),
        ([base, "--output", base / "results.json" / "table.md"], str(base / "results.json" / "table.md")),
        ([base, "--output", base], "is a folder"),
        ([base, "--output", base / "results.json"], "would be lost"),
    ]
    assert_mistakes(capsys, "table", mistakes)
    assert run_command(capsys, "tabel")[0] == 2
    assert json.loads((base / "results.json").read_text()) == BASE


def test_details_show_other_measures_and_the_answers_given(write, capsys):
    measured = {
        "unparsed": 0.125,
        "predicted": {"no": 3, "": 1, "yes": 3},
        "strict": {**GROUPS["easy"], "unparsed": 0.25},
    }
    folder = write(changed(BASE, tasks__first=BASE["tasks"]["first"] | measured, tasks__second__f1=0.5))
    code, out, _ = run_command(capsys, "details", folder)
    rows = grid(out)
    assert code == 0 and "base (score)" in out
    header = ["Questions", "Accuracy", "Majority class", "Unparsed", "Strict", "Strict - accuracy", "Strict unparsed"]
    assert rows["Task"] == [*header, "F1", "Answers given"]
    assert rows["First"] == ["300", "50.0 ± 3.0", "60.0", "12.5", "80.0", "+30.0", "25.0", "–", "no 3, yes 3, – 1"]
    assert rows["second"][-2:] == ["50.0", ""] and rows["second"][4] == "–"
    many = changed(BASE, tasks__first__predicted={f"a{index}": 1 for index in range(7)})
    results = Results.load(write(many))
    assert details(results).rows[0][-1] == "a0 1, a1 1, a2 1, a3 1, a4 1, a5 1, ..."


# ---- studies ----


def test_a_studys_tables_hold_its_numbers(study_folder):
    results, against, transfer, search = study_tables(Study.load(study_folder))
    rows = {row[0]: row[1:] for row in results.rows}
    assert results.header[:4] == ["Method", "Trainable parameters, M (%)", "Rank", "Learning rate"]
    assert results.header[4:] == ["CR", "SST-5", "AG <News> & more", "Average", "95 % interval"]
    assert rows["majority class"] == ["–", "–", "–", "30.0", "34.0", "38.0", "34.0", "–"]
    assert rows["LoRA"][:3] == ["1.85 (1.35 %)", "8", "0.002"]
    assert all(re.fullmatch(r"\d\d\.\d ± \d+\.\d", cell) for cell in rows["MTL-LoRA"][3:7])
    assert re.fullmatch(r"\d\d\.\d to \d\d\.\d", rows["MTL-LoRA"][7])
    # Where others have seeds, a single run has no spread.
    assert re.fullmatch(r"\d\d\.\d", rows["SmolLM2-135M <base> & no adapter"][3])
    assert [row[0] for row in against.rows] == ["MTL-LoRA - LoRA"]
    assert re.fullmatch(r"[+-]\d\.\d \([+-]\d\.\d to [+-]\d\.\d\)", against.rows[0][1])
    assert [row[:2] for row in transfer.rows][:2] == [
        ["rank 8: LoRA", "LoRA alone"],
        ["rank 8: MTL-LoRA", "LoRA alone"],
    ]
    assert (search.header, search.rows[0]) == (
        ["Development average", "0.001", "0.002"],
        ["LoRA", "50.0", "60.0 (chosen)"],
    )


def test_a_studys_tables_come_in_every_format(study_folder, capsys, tmp_path):
    study = Study.load(study_folder)
    code, shown, _ = run_command(capsys, "table", study_folder)
    assert code == 0 and [line for line in shown.splitlines() if line.startswith("## ")] == [
        f"## {table.title}" for table in study_tables(study)
    ]
    assert all(table.markdown() in shown for table in study_tables(study))
    assert all(f"- {markdown_text(note)}" in shown for note in study.notes)
    assert run_command(capsys, "table", study_folder / artifacts.STUDY, "--output", tmp_path / "s.csv")[0] == 0
    rows = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    means = {(row["experiment"], row["task"]): float(row["mean"]) for row in rows}
    for each in study.experiments:
        assert means[each.name, "average"] == each.estimate(None).mean
        assert means[each.name, "cr"] == each.estimate("cr").mean
    intervals = {(row["experiment"], row["task"]): row["interval"] for row in rows}
    assert intervals["MTL-LoRA", "average"] == "95 % t interval over seeds"
    assert intervals["SmolLM2-135M <base> & no adapter", "cr"] == "± one standard error over questions"
    text = run_command(capsys, "table", study_folder, "--format", "latex")[1]
    assert "% Results\n\\begin{tabular}{lrrr" in text and "% Notes\n\\begin{tabular}{@{}p{\\linewidth}@{}}" in text
    for more in (["--difference"], ["--published"], [study_folder]):
        assert_mistakes(capsys, "table", [([study_folder, *more], "pass its folder alone")])
    own_table = study_folder / artifacts.STUDY_TABLE
    assert_mistakes(capsys, "table", [([study_folder, "--output", own_table], "would be lost")])


# ---- what holds for any table ----

NAMES = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
FRACTIONS, ERRORS = st.floats(0, 1), st.floats(0, 1, exclude_min=True)
reuse_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)


@st.composite
def records(draw):
    scores = [
        {"metric": "accuracy", "value": draw(FRACTIONS), "stderr": draw(ERRORS), "n": draw(st.integers(1, 10**6))}
        for _ in "ab"
    ]
    task_set = changed(TWO_TASKS)
    task_set["tasks"][0]["title"] = draw(NAMES)
    tasks = {"first": scores[0], "second": scores[1]}
    return {"schema": 2, "name": draw(NAMES), "tasks": tasks, "task_set": task_set}


@reuse_folder
@given(record=records())
@pytest.mark.slow
def test_csv_carries_every_digit_and_markdown_rows_have_as_many_cells(table_of, record):
    table = table_of(record, record, difference=True)
    lines = list(csv.DictReader(io.StringIO(table.csv(), newline="")))
    assert [line["kind"] for line in lines] == ["result", "result", "difference"]
    for task, score in record["tasks"].items():
        read = (float(lines[0][f"{task} accuracy"]), float(lines[0][f"{task} stderr"]), int(lines[0][f"{task} n"]))
        assert read == (score["value"], score["stderr"], score["n"])
        assert float(lines[2][f"{task} accuracy"]) == 0
    assert float(lines[0]["average"]) == table.records[0]["average"]
    name = " ".join(record["name"].split())
    # What begins like a formula is quoted; rows of one name have their folders behind it.
    assert lines[0]["name"].startswith((name, f"'{name}"))
    lines = table.markdown().split("\n")
    assert [unescaped_pipes(line) for line in lines[:5]] == [6] * 5 and lines[5] == ""


@pytest.mark.parametrize("name", ["a|b", "a\\|b", "two\nlines", "`code|`", "*|*"])
def test_a_name_cannot_break_a_markdown_table(table_of, name):
    lines = table_of(changed(BASE, name=name)).markdown().splitlines()
    assert {unescaped_pipes(line) for line in lines[:4]} == {6}


def test_a_name_is_no_formula_and_no_command_to_a_terminal():
    names = ['=HYPERLINK("a")', "-2+3+cmd|'/C calc'!A0", "+1+A1", "\t=1", "@a", " =1", "＝1"]
    records = [{"name": name, "delta": "-0.5", "value": -0.5} for name in names]
    rows = csv.DictReader(io.StringIO(Report([], records, []).csv()))
    assert [*rows] == [{"name": "'" + name, "delta": "-0.5", "value": "-0.5"} for name in names]
    assert Report([], [{"=1+1": 2}], []).csv().splitlines() == ["'=1+1", "2"]
    assert TextTable("", ["name"], [["a\x1b[2Jb\x07"]]).markdown().splitlines()[-1] == r"| a \[2Jb |"


@pytest.mark.parametrize("text, shown", [("a  b\nc", "`a  b c`"), ("`x", "`` `x ``"), ("a`` `b", "```a`` `b```")])
def test_code_in_markdown_holds_any_text(text, shown):
    assert code_span(text) == shown
