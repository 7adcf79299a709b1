"""study.json and table.md of finished runs: summaries, comparisons, transfer, search, and what can be shared."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from study_cases import ALONE, SEARCH, dev_set, finish, grid, plan_of, run_of, write_results

from mtl_lora.errors import UserError
from mtl_lora.estimates import bootstrap_means, percentile_interval
from mtl_lora.report.compare import compare
from mtl_lora.report.load import Study
from mtl_lora.results import Results, TaskResult
from mtl_lora.study.summary import RESAMPLES, SEED, StudyWriter, collect, compared, delta_m_over, render, without_paths

TWO = {"evaluate": {**grid()["evaluate"], "tasks": ["boolq", "piqa"]}}
RIGHT = {
    # by experiment and seed
    ("Base", None): {"boolq": "0010", "piqa": "1000"},
    ("LoRA", 0): {"boolq": "1100", "piqa": "1000"},
    ("LoRA", 1): {"boolq": "1110", "piqa": "1100"},
    ("MTL-LoRA", 0): {"boolq": "1111", "piqa": "1100"},
    ("MTL-LoRA", 1): {"boolq": "1110", "piqa": "1110"},
}
RIGHT_ALONE = {("Alone", 0): {"boolq": "1000", "piqa": "1110"}, ("Alone", 1): {"boolq": "1000", "piqa": "1111"}}


def finished(plan, right) -> list:
    """The runs of a plan with their folders filled, those of several jobs a task each."""
    runs = []
    for (name, seed), by_task in right.items():
        run = run_of(plan, name, seed)
        for job in run.jobs:
            finish(job, {job.folder.name: by_task[job.folder.name]} if run.experiment.alone else by_task)
        runs.append(run)
    return runs


def study_of(folder: Path, right=RIGHT, *more: dict, **changes) -> tuple[Study, str]:
    """What is written for finished runs: study.json as it is read again, and table.md."""
    plan = plan_of(folder, grid(*more, **{**TWO, **changes}))
    StudyWriter(plan).write(finished(plan, right))
    return Study.load(folder / "study"), (folder / "study" / "table.md").read_text()


def by_name(study: Study) -> dict:
    return {experiment.name: experiment for experiment in study.experiments}


def test_every_run_has_its_results_and_where_they_come_from(tmp_path):
    run = by_name(study_of(tmp_path)[0])["MTL-LoRA"].runs[1]
    assert (run.seed, run.average, run.steps, run.commit) == (1, 0.75, 3, "abc")
    assert (run.tasks["piqa"].value, run.tasks["piqa"].n, run.tasks["piqa"].majority) == (0.75, 4, 0.5)
    assert run.seconds == {"train": 10.0, "evaluate": 10.0} and run.starts == {"train": 1, "evaluate": 1}
    assert all((tmp_path / "study" / path).is_file() for path in (run.results, run.log))
    assert run.analysis is None and run.folder == "runs/mtl_lora/seed1"
    assert run.adapter_sha256 == "weights in seed1" and len(run.train_data_sha256) == 64
    assert [command.split()[3] for command in run.commands] == ["train", "evaluate"]


def test_summaries_are_over_seeds_and_differences_from_the_baseline(tmp_path):
    found = by_name(study_of(tmp_path)[0])
    base, lora, mtl_lora = found.values()
    # Averages 37.5 and 62.5: sd 17.68, half an interval 12.706 * 17.68 / sqrt 2.
    average = lora.summary.average
    assert (average.mean, average.sd) == (0.5, pytest.approx(0.1768, abs=1e-4))
    assert (average.low, average.high) == (pytest.approx(-1.0883, abs=1e-4), pytest.approx(2.0883, abs=1e-4))
    assert (base.summary.average.mean, base.summary.average.sd, base.summary.average.low) == (0.25, None, None)
    assert (base.method, base.rank, base.trained_on, base.trainable) == (None, None, None, None)
    assert (lora.method, lora.rank, lora.group, mtl_lora.learning_rate) == ("lora", 4, "main", 0.01)
    assert lora.against is None and mtl_lora.against.baseline == "LoRA"
    assert (mtl_lora.against.tasks["boolq"].difference, mtl_lora.against.average.difference) == (0.25, 0.25)
    assert base.against.average.difference == -0.25
    # Over seeds: 0.375 and 0.125; the base model, which has none, stands against each.
    seeds = mtl_lora.against.over_seeds
    assert (seeds.average.mean, seeds.average.sd) == (0.25, pytest.approx(0.125 * 2**0.5))
    assert seeds.average.high == pytest.approx(0.25 + 12.7062 * 0.125, abs=1e-4)
    assert {task: each.mean for task, each in seeds.tasks.items()} == {"boolq": 0.25, "piqa": 0.25}
    assert base.against.over_seeds.average.mean == -0.25


def test_results_that_cannot_be_compared_are_a_note_and_not_the_end_of_a_study(tmp_path, edit_json):
    plan = plan_of(tmp_path, grid(**TWO))
    runs = finished(plan, RIGHT)
    path = runs[0].jobs[0].folder / "results.json"
    edit_json(path, settings=json.loads(path.read_text())["settings"] | {"template": "plain"})
    StudyWriter(plan).write(runs)
    found = by_name(Study.load(tmp_path / "study"))
    assert found["Base"].against is None and found["MTL-LoRA"].against.average.difference == 0.25
    assert "Not compared: Base - LoRA (" in (tmp_path / "study" / "table.md").read_text()


def test_runs_that_measure_a_task_by_other_metrics_are_in_no_study(tmp_path, edit_json):
    plan = plan_of(tmp_path, grid(**TWO))
    runs = finished(plan, RIGHT)
    path = runs[-1].jobs[0].folder / "results.json"
    tasks = json.loads(path.read_text())["tasks"]
    edit_json(path, tasks=tasks | {"piqa": tasks["piqa"] | {"metric": "exact_match"}}, average=None)
    with pytest.raises(UserError, match=r"measures piqa by accuracy .* by exact_match"):
        StudyWriter(plan).write(runs)
    assert not (tmp_path / "study" / "study.json").exists()


def test_a_difference_that_can_be_made_again_is_no_longer_said_to_be_missing(tmp_path, edit_json):
    plan = plan_of(tmp_path, grid(**TWO))
    runs, writer, found = finished(plan, RIGHT), StudyWriter(plan), []
    path = runs[0].jobs[0].folder / "results.json"
    before = json.loads(path.read_text())["settings"]
    for settings in (before | {"template": "plain"}, before):
        edit_json(path, settings=settings)
        writer._compared.cache_clear()  # as if by another writer; finished runs do not change under one
        writer.write(runs)
        found.append("Not compared" in (tmp_path / "study" / "table.md").read_text())
    assert found == [True, False]


def test_experiments_without_a_finished_run_are_left_out_and_named(tmp_path):
    study, text = study_of(tmp_path, {key: RIGHT[key] for key in (("Base", None), ("LoRA", 0))})
    assert list(by_name(study)) == ["Base", "LoRA"] and "LoRA 1 of 2, MTL-LoRA 0 of 2" in text


@pytest.mark.slow(1)
def test_tasks_trained_alone_are_one_run_and_give_the_transfer(tmp_path):
    study, text = study_of(tmp_path, RIGHT | RIGHT_ALONE, ALONE)
    alone = by_name(study)["Alone"]
    assert (alone.adapters, alone.alone, alone.trained_on) == (2, True, ["boolq", "piqa"])
    run = alone.runs[0]
    assert (run.average, run.steps, run.log, run.adapter_sha256) == (0.5, 6, None, None)
    assert run.parts["piqa"].log == "runs/alone/seed0/piqa/train_log.jsonl"
    assert run.seconds["train"] == 20.0 and len(run.commands) == 4
    assert run.results is None and (tmp_path / "study" / run.parts["piqa"].results).is_file()
    rows = {row.experiment: row for row in study.transfer}
    # LoRA together 0.625 and 0.375 minus alone 0.25 and 0.875.
    assert (rows["LoRA"].tasks["boolq"].difference, rows["LoRA"].tasks["piqa"].difference) == (0.375, -0.5)
    assert (rows["MTL-LoRA"].method, rows["MTL-LoRA"].group, rows["LoRA"].alone) == ("MTL_LORA", "main", "Alone")
    assert rows["LoRA"].label == "LoRA" and dataclasses.replace(rows["LoRA"], group="rank 2").label == "rank 2: LoRA"
    assert "Transfer" in text


def test_transfer_is_within_a_group_and_never_from_another(tmp_path):
    other = {"name": "Elsewhere", "train": {"adapter_name": "lora"}, "group": "rank 8"}
    right = {("LoRA", 0): RIGHT["LoRA", 0], ("Elsewhere", 0): RIGHT["LoRA", 1], ("Alone", 0): RIGHT_ALONE["Alone", 0]}
    study, _ = study_of(tmp_path, right, ALONE, other)
    assert [(row.experiment, row.alone) for row in study.transfer] == [("LoRA", "Alone")]


def test_a_run_that_lacks_a_task_of_the_grid_has_no_average(tmp_path):
    study, _ = study_of(tmp_path, {("Alone", 0): {"boolq": "1100"}}, {**ALONE, "only_tasks": ["boolq"]})
    alone = by_name(study)["Alone"]
    assert (alone.runs[0].tasks["boolq"].value, alone.runs[0].average, alone.summary.average) == (0.5, None, None)


@pytest.mark.slow(1)
def test_scores_of_tasks_without_training_are_marked_and_their_examples_not_listed(tmp_path):
    part = {"name": "Part", "train": {"adapter_name": "lora"}, "only_tasks": ["boolq"]}
    own = {**TWO, "experiments": [part], "baseline": "Part"}
    study, text = study_of(tmp_path, {("Part", 0): {"boolq": "1100", "piqa": "1000"}}, **own)
    assert by_name(study)["Part"].trained_on == ["boolq"]
    (row,) = (line for line in text.splitlines() if line.startswith("| Part "))
    cells = [cell.strip() for cell in row.split("|")]
    assert [cell.endswith("(untrained)") for cell in cells if "±" in cell][:2] == [False, True]
    both = {"name": "Both", "train": {"adapter_name": "lora"}}
    right = {(name, seed): {"boolq": "1100", "piqa": "1000"} for name in ("Both", "Part") for seed in (0, 1)}
    (tmp_path / "both").mkdir()
    text_of_both = study_of(tmp_path / "both", right, **{**own, "experiments": [both, part], "baseline": "Both"})[1]
    (row,) = (line for line in text_of_both.splitlines() if line.startswith("| Part - Both "))
    assert [cell.endswith("(untrained)") for cell in map(str.strip, row.split("|")[2:4])] == [False, True]
    assert study.untrained_notes == ["Part had no training examples of piqa."]
    assert "Training examples: boolq 12 of 240." in text and "questions: boolq 4 of 60, piqa 4 of 60." in text


def test_commits_and_devices_are_those_of_every_part(tmp_path, edit_json):
    plan = plan_of(tmp_path, grid(ALONE, **TWO))
    runs = finished(plan, RIGHT_ALONE)
    edit_json(runs[0].jobs[1].folder / "results.json", commit="def", device="a GPU")
    StudyWriter(plan).write(runs)
    study = Study.load(tmp_path / "study")
    assert (study.commits, study.devices) == (["abc", "def"], ["a CPU", "a GPU"])
    assert by_name(study)["Alone"].runs[0].commit == "abc; def"
    assert all(any(fact in note for note in study.notes) for fact in ("abc, def", "a CPU, a GPU"))


def test_table_has_a_row_a_method_with_its_spread_over_seeds(tmp_path):
    _, text = study_of(tmp_path)
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    header, _, majority, base, lora, *_ = rows
    assert header[2:] == ["Rank", "Learning rate", "BoolQ", "PIQA", "Average", "95 % interval"]
    assert majority[4:] == ["50.0", "50.0", "50.0", "–"] and base == ["Base", *"–––", "25.0", "25.0", "25.0", "–"]
    assert lora[:4] == ["LoRA", "0.0010 (2.00 %)", "4", "0.0003"]
    assert lora[4:] == ["62.5 ± 17.7", "37.5 ± 17.7", "50.0 ± 17.7", "-108.8 to 208.8"]
    difference = next(line for line in rows if line[0] == "MTL-LoRA - LoRA")
    assert difference[1].startswith("+25.0 (") and len(difference) == 5
    # Seed by seed +37.5 and +12.5 on average: 12.706 * 12.5 to each side, not what other questions could move.
    assert difference[3:] == ["+25.0 (+6.2 to +43.8)", "+25.0 (-133.8 to +183.8)"]
    assert ["Average (over questions)", "Average (over seeds)"] in [line[3:] for line in rows]
    assert "Average (over seeds): " in text
    assert "questions: boolq 4 of 60, piqa 4 of 60." in text and "examples: boolq 12 of 240" in text


def test_table_of_one_seed_has_standard_errors_and_says_so(tmp_path):
    _, text = study_of(tmp_path, {key: right for key, right in RIGHT.items() if key[1] != 1}, seeds=[0])
    assert "95 % interval |" not in text and "over seeds" not in text and "one seed; ± is one standard error" in text
    assert "50.0 ± 25.0" in next(line for line in text.splitlines() if line.startswith("| LoRA "))


@pytest.mark.parametrize(
    ("right", "best"), [(("1000", "1110"), 0.001), (("1100", "0011"), 0.001), (("1110", "1000"), 0.01)]
)
def test_best_value_of_a_search_wins_and_of_equals_the_smaller(tmp_path, right, best):
    plan = plan_of(tmp_path, grid(**TWO, search={**SEARCH, "data_dir": dev_set(tmp_path)}))
    (trials, _), writer = plan.trials("LoRA"), StudyWriter(plan)
    for trial, answers in zip(trials, right, strict=True):
        finish(trial.jobs[0], {"boolq": answers, "piqa": "1100"})
    writer.add_search("LoRA", *plan.trials("LoRA"))
    writer.write(finished(plan, RIGHT))
    search = Study.load(tmp_path / "study").search
    (outcome,) = search.experiments
    assert writer.chosen == {"LoRA": best} and (outcome.chosen, search.flag) == (best, "learning_rate")
    scores = [(answers.count("1") / 4 + 0.5) / 2 for answers in right]
    assert [(each.value, each.dev) for each in outcome.candidates] == [*zip((0.001, 0.01), scores[::-1], strict=True)]
    assert search.questions == {"boolq": 2, "piqa": 2} and len(outcome.candidates[0].commands) == 2


@pytest.mark.parametrize(
    ("right", "edge", "tied"),
    [
        (("1111", "1000", "1000"), True, False),
        (("1000", "1111", "1000"), False, False),
        (("1000", "1000", "1111"), True, False),
        (("1000", "1111", "1111"), False, True),
        (("0000", "0000", "0000"), True, True),
    ],
)
def test_a_search_whose_best_is_at_an_edge_or_not_alone_is_a_note(tmp_path, right, edge, tied):
    search = {**SEARCH, "values": [0.001, 0.002, 0.004], "data_dir": dev_set(tmp_path)}
    plan = plan_of(tmp_path, grid(**TWO, search=search))
    for trial, answers in zip(plan.trials("LoRA")[0], right, strict=True):
        finish(trial.jobs[0], {"boolq": answers, "piqa": "1100"})
    writer = StudyWriter(plan)
    writer.add_search("LoRA", *plan.trials("LoRA"))
    writer.write(finished(plan, {("LoRA", 0): RIGHT["LoRA", 0]}))
    notes = Study.load(tmp_path / "study").notes
    for beginning, holds in (("The search chose the smallest", edge), ("The search found several values", tied)):
        assert [note.endswith("for: LoRA.") for note in notes if note.startswith(beginning)] == [True] * holds


# ---- one experiment against another, over seeds ----

ANSWERS = {
    # by run: correct or not, task by task
    "a0": {"boolq": "1100", "piqa": "10"},
    "a1": {"boolq": "1000", "piqa": "11"},
    "b0": {"boolq": "1011", "piqa": "11"},
    "b1": {"boolq": "1111", "piqa": "01"},
}


@pytest.fixture
def runs(tmp_path):
    """Results files of two runs of A and two of B on six questions."""
    return {name: write_results(tmp_path / name, right).path for name, right in ANSWERS.items()}


def against(*pairs: tuple[Path, Path], scored: tuple[str, ...] = ("boolq", "piqa")) -> dict | None:
    return compared(tuple(((a,), (b,)) for a, b in pairs), scored)


def test_intervals_are_of_questions_within_each_task_averaged_over_the_seeds(runs):
    found = against(*((runs[f"a{seed}"], runs[f"b{seed}"]) for seed in (0, 1)))
    expected = {"boolq": [0.0, 0.0, 1.0, 1.0], "piqa": [-0.5, 0.5]}
    means = {task: bootstrap_means(values, [SEED, *task.encode()], RESAMPLES) for task, values in expected.items()}
    for task, mean in (("boolq", 0.5), ("piqa", 0.0)):
        assert dataclasses.astuple(found["tasks"][task]) == (mean, *percentile_interval(means[task]))
    interval = percentile_interval((means["boolq"] + means["piqa"]) / 2)
    assert dataclasses.astuple(found["average"]) == (0.25, *interval)


def test_one_pair_of_runs_has_the_interval_of_report_compare(runs):
    found = against((runs["a0"], runs["b0"]))
    compared = compare(Results.load(runs["a0"]), Results.load(runs["b0"]), seed=SEED, resamples=RESAMPLES).value
    for entry, other in [
        *((found["tasks"][name], compared["tasks"][name]) for name in ("boolq", "piqa")),
        (found["average"], compared["average"]),
    ]:
        expected = [other["value"][key] for key in ("difference", "low", "high")]
        assert dataclasses.astuple(entry) == pytest.approx(expected)


def test_only_tasks_of_both_are_compared_and_only_on_the_same_questions(tmp_path, runs):
    one = write_results(tmp_path / "one", {"boolq": "1111"}).path
    found = against((runs["a0"], one))
    assert list(found["tasks"]) == ["boolq"] and found["average"] is None
    other = write_results(tmp_path / "two", {"piqa": "11"}).path
    assert against((one, other)) is None is against()
    with pytest.raises(UserError, match="question 4 of boolq"):
        against((runs["a0"], write_results(tmp_path / "other", {"boolq": "11001", "piqa": "10"}).path))


def test_a_task_that_some_seeds_lack_is_not_compared_over_the_others(tmp_path, runs):
    one = write_results(tmp_path / "one", {"boolq": "1111"}).path
    found = against((runs["a0"], runs["b0"]), (runs["a1"], one))
    assert list(found["tasks"]) == ["boolq"] and found["average"] is None


# ---- collecting ----


@pytest.mark.slow
def test_shared_folder_has_every_number_and_no_weights_predictions_data_or_paths(tmp_path, edit_json):
    own, table = study_of(tmp_path, RIGHT | RIGHT_ALONE, ALONE)
    folder, shared = tmp_path / "study", tmp_path / "shared"
    collect(folder, shared)
    assert {path.name for path in shared.iterdir()} == {
        *("study.json", "table.md", "accuracy.png", "transfer.png", "training_loss.png")
    }
    assert str(tmp_path) not in "".join(path.read_text() for path in shared.iterdir() if path.suffix != ".png")
    study = Study.load(shared)
    assert [each.summary for each in study.experiments] == [each.summary for each in own.experiments]
    assert study.transfer == own.transfer and (shared / "table.md").read_text() == table
    assert all((job.results, job.log, job.analysis) == (None, None, None) for run in study.runs for job in run.jobs)
    command = by_name(study)["LoRA"].runs[0].commands[0]
    assert all(f" output/study/small/{place}" in command for place in ("runs/lora/seed0", "data/train.json"))
    with pytest.raises(UserError, match="own folder"):
        collect(folder, folder)
    experiments = json.loads((shared / "study.json").read_text())["experiments"]
    edit_json(shared / "study.json", experiments=[*experiments, {**experiments[0], "name": "More"}])
    with pytest.raises(UserError, match="holds 8 runs"):  # a part never replaces the whole
        collect(folder, shared)
    edit_json(shared / "study.json", name="other", experiments=experiments)
    with pytest.raises(UserError, match="holds 7 runs of 'other'"):
        collect(folder, shared)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--data_path /data/train.json", "--data_path ./train.json"),
        ("--output_dir=/data/out/x", "--output_dir=OUT/x"),
        ("'/data'", "'.'"),
        ("output/study/x/data/train.json", "output/study/x/data/train.json"),
        ("/database/x /data-2 /data.old", "/database/x /data-2 /data.old"),
        ("See /data.", "See .."),
        ("meta-llama/Llama-2-7b-hf /x", "meta-llama/Llama-2-7b-hf /x"),
    ],
)
def test_paths_are_replaced_at_their_boundaries_alone(text, shown):
    assert without_paths(text, {"/data": ".", "/data/out": "OUT", "/": "."}) == shown


COMMITTED = sorted((Path(__file__).parents[2] / "docs" / "studies").glob("*/study.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_study_is_its_table(path):
    study = Study.load(path)
    assert render(study) == path.with_name("table.md").read_text()
    for run in study.runs:
        mean = sum(task.value for task in run.tasks.values()) / len(run.tasks)
        whole = study.has_average and {*study.scored} <= {*run.tasks}
        assert run.average == (pytest.approx(mean) if whole else None)
    assert len([*path.parent.iterdir()]) <= 5  # table.md, study.json and three figures


def test_committed_studies_are_small():
    sizes = [file.stat().st_size for path in COMMITTED for file in path.parent.rglob("*") if file.is_file()]
    assert sum(sizes) < 3_000_000


def test_delta_m_is_the_mean_gain_relative_to_each_task_over_the_seeds():
    def run(miou: float, rmse: float):
        tasks = {"semseg": TaskResult("miou", miou, None, 4), "depth": TaskResult("depth_rmse", rmse, None, 4)}
        return SimpleNamespace(tasks=tasks)

    pairs = [(run(0.5, 2.0), run(0.6, 1.0)), (run(0.5, 2.0), run(0.4, 2.2))]  # +20 and +50 %, -20 and -10 %
    gain = delta_m_over(pairs, ["semseg", "depth"])
    assert (gain.mean, gain.sd) == pytest.approx((10, 50 / 2**0.5))
    assert gain.high - gain.mean == pytest.approx(12.7062 * 25, rel=1e-5)  # Student's t with one degree of freedom
    assert delta_m_over(pairs, ["semseg"]) is None  # whose values have a mean
    assert delta_m_over([(run(0.0, 2.0), run(0.6, 1.0))], ["semseg", "depth"]) is None  # nothing is relative to 0
    assert delta_m_over([(SimpleNamespace(tasks={}), pairs[0][1])], ["semseg", "depth"]) is None


def test_an_evaluation_made_by_hand_in_a_jobs_folder_changes_nothing(tmp_path):
    run = run_of(plan_of(tmp_path, grid(**TWO)), "LoRA")
    finish(run.jobs[0], {"boolq": "1100", "piqa": "1110"})
    write_results(run.jobs[0].folder / "evaluation", {"boolq": "0000"})
    assert run.mean == pytest.approx(0.625)


def test_an_evaluation_made_by_hand_takes_no_difference_away(tmp_path):
    plan = plan_of(tmp_path, grid(**TWO))
    runs = finished(plan, RIGHT)
    write_results(run_of(plan, "LoRA").jobs[0].folder / "evaluation", {"boolq": "0000"})
    StudyWriter(plan).write(runs)
    assert by_name(Study.load(tmp_path / "study"))["MTL-LoRA"].against.average.difference == 0.25


@pytest.mark.slow(1)
def test_a_difference_without_a_common_seed_is_named_and_seeds_are_counted_where_they_differ(tmp_path):
    right = {key: RIGHT[key] for key in (("LoRA", 0), ("MTL-LoRA", 1))}
    study, text = study_of(tmp_path, right)
    assert by_name(study)["MTL-LoRA"].against is None
    assert "Not compared: MTL-LoRA - LoRA (no seed or no task in common)." in text and "Seeds (a" not in text
    (tmp_path / "more").mkdir()
    _, text = study_of(tmp_path / "more", {key: RIGHT[key] for key in RIGHT if key != ("MTL-LoRA", 1)})
    assert (
        "Seeds (a difference is over those that both have): LoRA 2, MTL-LoRA 1." in text and "Not compared" not in text
    )


def test_every_way_of_answering_is_said(tmp_path, edit_json):
    plan = plan_of(tmp_path, grid(**TWO))
    runs = finished(plan, RIGHT)
    edit_json(runs[0].jobs[0].folder / "results.json", mode="cosine")
    StudyWriter(plan).write(runs)
    assert "Mode: cosine or score." in (tmp_path / "study" / "table.md").read_text()
