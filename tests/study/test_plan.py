"""From a grid to jobs: samples that stay the same, command lines, and what makes another configuration."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from dense_cases import make_swin
from image_text_cases import make_set, write_features
from PIL import Image
from shared import QUICKSTART, quickstart_records
from study_cases import ALONE, SEARCH, dev_set, finish, grid, job_of, plan_of, run_of, with_flags, write_grid

from mtl_lora import cli, files
from mtl_lora.errors import UserError
from mtl_lora.language.config import EvalConfig, TrainConfig
from mtl_lora.language.examples import DATA, load_examples
from mtl_lora.language.tasks import COMMONSENSE, TaskSet
from mtl_lora.results import Trainable, trainable_text
from mtl_lora.samples import sampled
from mtl_lora.study.config import SearchConfig, read_grid
from mtl_lora.study.plan import Plan, jobs_of

NAMES = COMMONSENSE.names


@pytest.mark.slow(1)
def test_samples_have_equally_many_examples_of_every_task_and_name_their_files(tmp_path):
    plan = plan_of(tmp_path, grid(train_records=7, test_records=4))
    together, one_task = plan.training(), plan.training(("winogrande",))
    records, own = (json.loads(*part.content.values()) for part in (together, one_task))
    assert together.records == dict.fromkeys(NAMES, 7) and together.of == dict.fromkeys(NAMES, 240)
    assert [record["task_id"] for record in records] == [task for task in range(8) for _ in range(7)]
    assert all(record in quickstart_records() for record in records)
    assert together.sha256 == {"train": files.sha256_of(together.content[together.path])}
    assert together.source_sha256 == {"train": files.sha256(QUICKSTART / "train.json")}
    assert own == [record for record in records if record["task_id"] == 4] and one_task.path != together.path
    files.write_all(plan.test.content)
    for task in NAMES:
        path = plan.test.path / task / "test.json"
        assert len(load_examples(path, COMMONSENSE, task, closed=True)) == 4 == plan.test.records[task]
        assert plan.test.sha256[task] == files.sha256(path)


def test_a_sample_is_drawn_from_the_whole_file_and_a_larger_one_adds_to_it():
    few, more = (sampled(range(1000), count, "boolq") for count in (20, 21))
    assert len(few) == 20 and few == sorted(few) and {*few} < {*more} and min(few) < 250 and max(few) > 750
    assert sampled(range(1000), 20, "piqa") != few == sampled(range(1000), 20, "boolq")
    assert sampled("abc", 0, "boolq") == sampled("abc", 5, "boolq") == ["a", "b", "c"]


def test_whole_sets_are_read_where_they_lie(tmp_path):
    plan = plan_of(tmp_path, grid(train_records=0, test_records=0))
    assert (plan.training().path, plan.test.path) == (QUICKSTART / "train.json", QUICKSTART / "test")
    assert not plan.training().content and not plan.test.content
    assert plan.test.sha256["boolq"] == files.sha256(QUICKSTART / "test" / "boolq" / "test.json")


def test_test_sets_may_be_of_any_format_that_is_read(tmp_path):
    folder = shutil.copytree(QUICKSTART / "test", tmp_path / "test")
    records = json.loads((folder / "boolq" / "test.json").read_text())
    (folder / "boolq" / "test.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (folder / "boolq" / "test.json").unlink()
    plan = plan_of(tmp_path, with_flags("evaluate", data_dir=str(folder)) | {"test_records": 0})
    assert plan.test.sha256["boolq"] == files.sha256(folder / "boolq" / "test.jsonl")


def test_samples_of_other_tasks_have_other_files(tmp_path):
    data = DATA(TaskSet.from_json([{"name": name, "id": id} for id, name in enumerate(("a_b", "a", "b"))]))
    records = [{"instruction": "q", "output": "x", "task": name} for name in ("a_b", "a", "b")]
    (tmp_path / "train.json").write_text(json.dumps(records))
    samples = [data.training(tmp_path / "train.json", tmp_path, 0, only) for only in (("a_b",), ("a", "b"))]
    assert len({sample.path for sample in samples}) == 2


def test_a_file_that_changes_while_a_study_runs_is_noticed_before_the_next_command(tmp_path):
    data = DATA(TaskSet.from_json([{"name": "a", "id": 0}]))
    text = json.dumps([{"instruction": "q", "output": "x", "task": "a"}])
    (tmp_path / "train.json").write_text(text)
    sample = data.training(tmp_path / "train.json", tmp_path, 0)
    sample.write()
    (tmp_path / "train.json").write_text(text + " ")
    with pytest.raises(UserError, match=r"train\.json was changed while the study ran"):
        sample.write()


def test_samples_of_many_tasks_have_names_that_a_disk_takes(tmp_path):
    names = [letter * 37 for letter in "abcdefgh"]
    (tmp_path / "train.json").write_text(
        json.dumps([{"instruction": "q", "output": "x", "task": name} for name in names])
    )
    data = DATA(TaskSet.from_json([{"name": name, "id": index} for index, name in enumerate(names)]))
    sample = data.training(tmp_path / "train.json", tmp_path, 0, tuple(names))
    sample.write()
    assert sample.path.is_file()


def test_missing_data_name_the_command_that_makes_them(tmp_path):
    with pytest.raises(UserError, match=r"none\.json .*`python prepare.py`"):
        plan_of(tmp_path, with_flags(data_path="none.json") | {"prepare": "python prepare.py"})
    with pytest.raises(UserError, match=r"boolq/test\.json"):
        plan_of(tmp_path, with_flags("evaluate", data_dir=str(tmp_path)))


def test_development_set_that_is_a_copy_of_the_test_sets_is_refused(tmp_path):
    search = {**SEARCH, "data_dir": dev_set(tmp_path)}
    copied = Path("piqa", "test.json")
    (tmp_path / "dev" / copied).write_bytes((QUICKSTART / "test" / copied).read_bytes())
    with pytest.raises(UserError, match=r"search: .*dev holds the same questions of piqa"):
        plan_of(tmp_path, grid(search=search))


# ---- commands ----


def parsed(line: str, config):
    """The configuration that a command line means to its command."""
    words = shlex.split(line)
    assert words[:4] == ["python", "-m", "mtl_lora", "train" if config is TrainConfig else "evaluate"]
    return cli.parse(config, words[4:], "")


def test_commands_have_common_and_own_flags_seed_and_folder(tmp_path):
    run = run_of(plan_of(tmp_path, grid()), "MTL-LoRA", 1)
    train, evaluate = (parsed(*each) for each in zip(run.jobs[0].commands, (TrainConfig, EvalConfig), strict=True))
    assert (train.lora_r, train.learning_rate, train.seed, train.adapter_name) == (4, 0.01, 1, "mtl_lora")
    assert train.data_path == str(tmp_path / "study" / "data" / "train.json")
    assert Path(train.output_dir) == run.folder == tmp_path / "study" / "runs" / "mtl_lora" / "seed1"
    assert evaluate.checkpoint == evaluate.output_dir == train.output_dir
    assert (evaluate.mode, evaluate.name, evaluate.base_model) == ("score", "MTL-LoRA", None)
    assert evaluate.data_dir == str(tmp_path / "study" / "data" / "test")


def test_base_model_alone_is_asked_with_the_prompt_of_the_trainings(tmp_path):
    (job,) = run_of(plan_of(tmp_path, with_flags(template="original", cutoff_len=99)), "Base", None).jobs
    evaluate = parsed(*job.commands, EvalConfig)
    assert (evaluate.base_model, evaluate.template, evaluate.cutoff_len) == ("base", "original", 99)
    assert job.folder == tmp_path / "study" / "runs" / "base"


def test_alone_trains_every_task_on_its_own_examples_and_scores_it_alone(tmp_path):
    run = run_of(plan_of(tmp_path, grid({**ALONE, "only_tasks": ["piqa", "boolq"]})), "Alone")
    assert [job.folder.relative_to(run.folder).name for job in run.jobs] == ["piqa", "boolq"]
    for job in run.jobs:
        assert parsed(job.commands[1], EvalConfig).tasks == [job.folder.name]
        assert parsed(job.commands[0], TrainConfig).data_path.endswith(f"train_{job.folder.name}.json")
        assert job.data["train"].records == {job.folder.name: 12}


@pytest.mark.parametrize(("flag", "values"), [("learning_rate", [0.01, 0.001]), ("num_experts", [2, 4])])
def test_search_trains_shortly_and_scores_on_the_development_set(tmp_path, flag, values):
    search = {**SEARCH, "flag": flag, "values": values, "seed": 7, "data_dir": dev_set(tmp_path)}
    plan = plan_of(tmp_path, grid(search=search))
    trials, best = plan.trials("LoRA")
    assert best is None
    configs = [parsed(trial.jobs[0].commands[0], TrainConfig) for trial in trials]
    found = [(getattr(config, flag), config.max_steps, config.seed) for config in configs]
    assert found == [(value, 2, 7) for value in values]
    assert parsed(trials[0].jobs[0].commands[1], EvalConfig).data_dir == str(tmp_path / "study" / "data" / "dev")
    config = parsed(run_of(plan, "LoRA", 0, trials[1].value).jobs[0].commands[0], TrainConfig)
    assert (getattr(config, flag), config.max_steps) == (values[1], 3)


@pytest.mark.parametrize(
    ("values", "best", "beyond"),
    [
        ([0.001, 0.002, 0.004], 0.004, 0.008),
        ([0.001, 0.002, 0.004], 0.001, 0.0005),
        ([0.004, 0.001, 0.002], 0.002, None),
        ([2, 4], 4, 8),
        ([0.0, 0.1], 0.1, None),
        ([0.0, 0.1], 0.0, None),
    ],
)
def test_a_search_goes_beyond_the_edge_at_which_its_best_lies(values, best, beyond):
    found = SearchConfig(values, "dev").beyond(values, best)
    assert found == beyond and type(found) is type(beyond)


def test_of_equal_averages_the_search_takes_the_smaller_value_and_goes_no_further(tmp_path):
    search = {**SEARCH, "values": [0.01, 0.02], "widen": 2, "data_dir": dev_set(tmp_path)}
    plan = plan_of(tmp_path, grid(search=search))
    # As floats, 0.3 + 0.0 is less than 0.1 + 0.2.
    right = [{"boolq": "1110000000", "piqa": "0000000000"}, {"boolq": "1000000000", "piqa": "1100000000"}]
    for trial, by_task in zip(plan.trials("LoRA")[0], right, strict=True):
        finish(trial.jobs[0], by_task)
    assert plan.trials("LoRA")[1] == 0.01


@pytest.mark.slow
def test_a_search_that_ends_at_an_edge_is_widened_as_often_as_the_grid_says(tmp_path):
    search = {**SEARCH, "values": [0.01, 0.02], "widen": 2, "data_dir": dev_set(tmp_path)}
    plan = plan_of(tmp_path, grid(search=search))
    scores = {0.01: "1000", 0.02: "1100", 0.04: "1110", 0.08: "1111"}
    seen = []
    while (found := plan.trials("LoRA"))[1] is None:
        waiting = [trial for trial in found[0] if not trial.jobs[0].is_finished]
        seen.append([trial.value for trial in waiting])
        for trial in waiting:
            finish(trial.jobs[0], {"boolq": scores[trial.value]})
    assert (seen, found[1]) == ([[0.01, 0.02], [0.04], [0.08]], 0.08)
    ratio = {**search, "flag": "warmup_ratio", "values": [0.25, 0.5]}
    plan = Plan(read_grid(str(write_grid(tmp_path, grid(search=ratio)))), tmp_path / "ratio")
    for trial, right in zip(plan.trials("LoRA")[0], ("1000", "1100"), strict=True):
        finish(trial.jobs[0], {"boolq": right})
    assert plan.trials("LoRA")[1] == 0.5, "1 would be no warm-up ratio"
    inside = {**search, "widen": 0}
    assert plan_of(tmp_path, grid(search=inside)).trials("LoRA")[1] == 0.02


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_target_modules", ["q_proj", "v_proj"]),
        ("lora_target_modules", [r".*\.[qv]_proj"]),
        ("lora_target_modules", ["a,b", "c"]),
        ("deepspeed", None),
        ("train_on_inputs", True),
        ("learning_rate", 1e-5),
    ],
)
def test_a_flag_survives_the_command_line(tmp_path, name, value):
    assert getattr(parsed(job_of(tmp_path, with_flags(**{name: value})).commands[0], TrainConfig), name) == value


@pytest.mark.parametrize(
    ("launcher", "option"), [("torchrun --nproc_per_node 8", "-m"), ("deepspeed", "--no_local_rank --module")]
)
def test_launcher_stands_before_the_module(tmp_path, launcher, option):
    for step, line in zip(("train", "evaluate"), job_of(tmp_path, grid(launcher=launcher)).commands, strict=True):
        assert line.startswith(f"{launcher} {option} mtl_lora {step} --")


def test_wrong_value_of_an_experiment_is_named(tmp_path):
    with pytest.raises(UserError, match=r"grid\.json, experiment 'Other', train: --lora_dropout .* 2"):
        job_of(tmp_path, grid({"name": "Other", "train": {"lora_dropout": 2}}), "Other")


# ---- what makes another configuration ----


@pytest.mark.parametrize(
    ("step", "flags", "changed"),
    [
        ("train", {"lora_r": 8}, {"train.lora_r": (4, 8)}),
        ("train", {"learning_rate": 0.5}, {"train.learning_rate": (3e-4, 0.5)}),
        ("evaluate", {"mode": "generate"}, {"evaluate.mode": ("score", "generate")}),
        ("train", {"save_step": 1, "logging_steps": 1, "cache_dir": "elsewhere"}, {}),
        ("evaluate", {"batch_size": 1}, {}),
        ("train", {"weight_decay": 0.0}, {}),  # the default, written out
    ],
)
@pytest.mark.slow
def test_configuration_differs_only_where_a_result_could(tmp_path, step, flags, changed):
    before, now = job_of(tmp_path, grid()), job_of(tmp_path, with_flags(step, **flags))
    assert now.changes(json.loads(json.dumps(before.configuration))) == changed


def test_another_launcher_is_another_configuration(tmp_path):
    before, now = job_of(tmp_path, grid()), job_of(tmp_path, grid(launcher="torchrun --nproc_per_node 2"))
    assert now.changes(before.configuration) == {"launcher": ("python", "torchrun --nproc_per_node 2")}


def test_flag_that_a_later_version_added_did_what_its_default_does(tmp_path):
    job, key = job_of(tmp_path, grid()), "train.use_rslora"
    earlier = {name: value for name, value in job.configuration.items() if name != key}
    assert key in job.configuration and job.changes(earlier) == {}
    assert job_of(tmp_path, with_flags(use_rslora=True)).changes(earlier) == {key: (False, True)}


@pytest.mark.slow(1)
def test_data_count_by_content_and_not_by_place(tmp_path):
    (tmp_path / "moved").mkdir()
    first, moved = job_of(tmp_path, grid()), job_of(tmp_path / "moved", grid())
    assert first.configuration == moved.configuration
    fewer = job_of(tmp_path, grid(train_records=11, test_records=5))
    assert [*fewer.changes(first.configuration)] == ["the test data (sha256)", "the train data (sha256)"]


@pytest.mark.slow(1)
def test_titles_and_columns_of_tasks_do_not_count_but_their_options_do(tmp_path):
    tasks, configurations, path = COMMONSENSE.to_json(), [], tmp_path / "tasks.json"
    for change in ({}, {"title": "Yes or no"}, {"options": ["true", "false", "maybe"]}):
        tasks["tasks"][0] |= change
        path.write_text(json.dumps({**tasks, "columns": sorted(tasks["columns"], reverse=bool(change))}))
        configurations.append(job_of(tmp_path, with_flags(tasks_file=str(path))).configuration)
    assert configurations[0] == configurations[1] != configurations[2]


def test_another_metric_of_a_task_is_another_configuration(tmp_path):
    tasks, jobs, path = COMMONSENSE.to_json(), [], tmp_path / "tasks.json"
    for metric in ("accuracy", "matthews"):
        tasks["tasks"][0]["metric"] = metric
        path.write_text(json.dumps(tasks))
        jobs.append(job_of(tmp_path, with_flags(tasks_file=str(path))))
    before, now = jobs
    key, earlier = "the tasks' metrics", json.loads(json.dumps(before.configuration))
    assert [*now.changes(earlier)] == [key] and before.changes(earlier) == {}
    del earlier[key]  # as an earlier version wrote it
    assert now.changes(earlier) == {}


def test_other_weights_under_the_base_models_name_are_another_configuration(tmp_path, tiny_base):
    read = read_grid(str(write_grid(tmp_path, with_flags(base_model=tiny_base))))
    job, key = run_of(Plan(read, tmp_path, with_fingerprint=True), "LoRA").jobs[0], "the base model (fingerprint)"
    assert job.changes({**job.configuration, key: "other"}) == {key: ("other", job.configuration[key])}
    assert job.changes({**job.configuration, key: None}) == {}, "a job whose base model was not there is no other one"


# ---- folders of images ----


def write_depth(folder, id: str, metres: float) -> None:
    np.save(folder / "depth" / f"{id}.npy", np.full((4, 6), metres, np.float32))


def images_with_two_maps(folder, train: int = 3, test: int = 2) -> None:
    """A folder with segmentation and depth."""
    tasks = [{"name": "semseg", "id": 0, "kind": "semantic", "classes": 2}, {"name": "depth", "id": 1, "kind": "depth"}]
    for name in ("images", "semseg", "depth"):
        (folder / name).mkdir(parents=True)
    (folder / "tasks.json").write_text(json.dumps({"tasks": tasks}))
    ids = [str(index) for index in range(train + test)]
    (folder / "train.txt").write_text("\n".join(ids[:train]))
    (folder / "test.txt").write_text("\n".join(ids[train:]))
    for id in ids:
        for name in ("images", "semseg"):
            Image.fromarray(np.ones((4, 6), np.uint8)).save(folder / name / f"{id}.png")
        write_depth(folder, id, 2.5)


def dense_plan(folder, **changes):
    value = {
        "name": "dense",
        "about": "A small study.",
        "system": "dense",
        "seeds": [0],
        "train": {"base_model": "base", "data_path": str(folder / "data"), "tasks": ["semseg", "depth"]},
        "evaluate": {"data_dir": str(folder / "data")},
        "experiments": [{"name": "MTLoRA", "train": {}}, {"name": "Alone", "train": {}, "alone": True}],
    }
    return plan_of(folder, value | changes)


def test_images_are_read_where_they_lie_and_a_task_alone_is_named(tmp_path):
    images_with_two_maps(tmp_path / "data")
    plan = dense_plan(tmp_path)
    assert plan.training().records == {"semseg": 3, "depth": 3} and plan.test.records == {"semseg": 2, "depth": 2}
    together, alone = (jobs_of(plan.runs(plan.grid.experiment(name))) for name in ("MTLoRA", "Alone"))
    assert together[0].flags["train"]["tasks"] == ["semseg", "depth"] and "tasks" not in together[0].flags["evaluate"]
    named = [[job.flags[step]["tasks"] for step in ("train", "evaluate")] for job in alone]
    assert named == [[["semseg"]] * 2, [["depth"]] * 2]
    assert {job.flags["train"]["data_path"] for job in [*together, *alone]} == {str(tmp_path / "data")}
    write_depth(tmp_path / "data", "1", 3.5)
    later = jobs_of(dense_plan(tmp_path).runs(plan.grid.experiment("Alone")))
    changes = [list(job.changes(old.configuration)) for job, old in zip(later, alone, strict=True)]
    assert changes == [[], ["the train data (sha256)"]]


@pytest.mark.slow
def test_check_gives_the_mean_size_of_models_that_differ(tmp_path):
    images_with_two_maps(tmp_path / "data")
    make_swin(tmp_path / "swin")
    train = {"base_model": str(tmp_path / "swin"), "data_path": str(tmp_path / "data"), "image_size": 64}
    plan = dense_plan(tmp_path, train={**train, "tasks": ["semseg", "depth"]})
    (run,) = plan.runs(plan.grid.experiment("Alone"))
    counts = [Trainable(*plan.grid.flags_of("train")(**job.flags["train"]).count()) for job in run.jobs]
    assert counts[0].adapter > counts[1].adapter  # a map of two classes and one of a single channel
    of_both = trainable_text(Trainable.mean(counts), 2)
    lines = list(plan.describe([plan.grid.experiment("Alone")], {}))
    assert lines[1].startswith(f"Alone; jobs: 2, trainable parameters, M (%): {of_both}\n")


def test_another_loss_weight_is_another_configuration(tmp_path):
    images_with_two_maps(tmp_path / "data")
    job = run_of(dense_plan(tmp_path), "MTLoRA").jobs[0]
    path = tmp_path / "data" / "tasks.json"
    tasks = json.loads(path.read_text())["tasks"]
    path.write_text(json.dumps({"tasks": [{**tasks[0], "weight": 3}, tasks[1]]}))
    later = run_of(dense_plan(tmp_path), "MTLoRA").jobs[0]
    assert [*later.changes(json.loads(json.dumps(job.configuration)))] == ["the tasks' loss weights"]


def test_images_are_not_sampled_and_a_missing_list_of_them_is_named(tmp_path):
    images_with_two_maps(tmp_path / "data")
    with pytest.raises(UserError, match="train_records"):
        dense_plan(tmp_path, train_records=2)
    with pytest.raises(UserError, match=r"search.*depth_rmse, miou.*learning_rate"):
        dense_plan(tmp_path, search={"values": [1e-3, 1e-4], "data_dir": "dev"})
    errors = {"data_dir": str(tmp_path / "data"), "tasks": ["depth"]}  # of which the highest mean is the worst
    with pytest.raises(UserError, match=r"search: .*\(depth_rmse\) .*learning_rate"):
        dense_plan(tmp_path, evaluate=errors, search={"values": [1e-3, 1e-4], "data_dir": "dev"})
    (tmp_path / "data" / "test.txt").unlink()
    with pytest.raises(UserError, match=r"data/test\.txt"):
        dense_plan(tmp_path)


def test_images_of_one_table_are_of_one_split_and_one_size(tmp_path):
    images_with_two_maps(tmp_path / "data")
    larger = [{"name": "Small", "train": {}}, {"name": "Large", "train": {"image_size": 224}}]
    ways = {
        "train: image_size": {"experiments": larger},
        "evaluate: image_size": {"experiments": [{"name": "Large", "train": {}, "evaluate": {"image_size": 224}}]},
        "evaluate: split": {"evaluate": {"data_dir": str(tmp_path / "data"), "split": "train"}},
    }
    for words, changes in ways.items():
        with pytest.raises(UserError, match=words):
            dense_plan(tmp_path, **changes)
    plan = dense_plan(tmp_path, experiments=larger, evaluate={"data_dir": str(tmp_path / "data"), "image_size": 112})
    flags = [jobs_of(plan.runs(each))[0].flags for each in plan.grid.experiments]
    assert [(each["train"].get("image_size"), each["evaluate"]["image_size"]) for each in flags] == [
        (None, 112),
        (224, 112),
    ]


# ---- features of images ----


def test_features_count_by_content_and_not_by_place(tmp_path):
    make_set(tmp_path / "data")

    def jobs(name: str, evaluate: dict | None = None) -> list:
        train = {"base_model": "base", "data_path": str(tmp_path / "data" / "train.json")}
        train |= {"tasks_file": str(tmp_path / "data" / "tasks.json"), "features": [str(tmp_path / "data" / name)]}
        value = {"name": "small", "about": "A small study.", "system": "image_text", "seeds": [0], "train": train}
        value["evaluate"] = evaluate or {"data_dir": str(tmp_path / "data" / "test")}
        value["experiments"] = [{"name": "A", "train": {}}]
        return run_of(plan_of(tmp_path, value), "A").jobs

    (before,), key = jobs("features.h5"), "train: the features (fingerprint)"
    earlier = json.loads(json.dumps(before.configuration))
    shutil.copy(tmp_path / "data" / "features.h5", tmp_path / "data" / "copy.h5")
    assert jobs("copy.h5")[0].changes(earlier) == {}
    write_features(tmp_path / "data" / "other.h5", dim=5)
    assert [*jobs("other.h5")[0].changes(earlier)] == [key]
    assert jobs("gone.h5")[0].changes(earlier) == {}, "a report needs no features"
    own = {"data_dir": str(tmp_path / "data" / "test"), "features": [str(tmp_path / "data" / "other.h5")]}
    assert [*jobs("features.h5", own)[0].changes(earlier)] == ["evaluate: the features (fingerprint)"]
