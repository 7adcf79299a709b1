"""What is skipped, resumed, begun anew or refused when a study is started again."""

import copy
import dataclasses
import json
import threading

import pytest
from study_cases import ALONE, finish, grid, planner

from mtl_lora.errors import UserError
from mtl_lora.study.execute import going_on
from mtl_lora.study.state import State, changes, finished, read_state

RIGHT = {"boolq": "10"}


@pytest.fixture
def job(tmp_path):
    """The job of LoRA with seed 0."""
    made = planner(tmp_path, grid())
    return made.run(made.study.experiment("LoRA"), 0).jobs[0]


@pytest.fixture
def job_and_other_job(tmp_path, job):
    """A job, and that of the same experiment with another rank."""
    changed = grid()
    changed["train"]["lora_r"] = 8
    made = planner(tmp_path, changed)
    return job, made.run(made.study.experiment("LoRA"), 0).jobs[0]


@pytest.fixture
def alone_and_joint(tmp_path):
    """The first job of an experiment that trains each task alone, and the one job of the same without ``alone``."""
    changed = copy.deepcopy(ALONE)
    jobs = []
    for alone in (True, False):
        changed["alone"] = alone
        made = planner(tmp_path, grid(changed))
        jobs.append(made.run(made.study.experiment("Alone"), 0).jobs[0])
    return jobs


def test_nothing_is_known_of_a_job_that_was_not_started(job):
    assert read_state(job) is None and not finished(job)


def test_finished_job_is_skipped_even_without_its_weights(job):
    finish(job, RIGHT)
    (job.folder / "mtl_lora.safetensors").unlink()
    assert finished(job)
    (job.folder / "results.json").unlink()
    assert not finished(job)


@pytest.mark.parametrize(
    ("before_and_now", "sentence"),
    [
        ("job_and_other_job", r"made by another recipe \(train.lora_r 4 -> 8\); pass --overwrite True"),
        ("alone_and_joint", r"holds runs of another recipe \(boolq\); pass --overwrite True"),
    ],
)
def test_other_recipe_is_refused_by_what_changed_and_made_anew_when_told(request, before_and_now, sentence):
    before, now = request.getfixturevalue(before_and_now)
    finish(before, RIGHT)
    with pytest.raises(UserError, match=sentence):
        read_state(now)
    assert read_state(now, overwrite=True) is None
    assert finished(before)


def evaluated_otherwise(folder, **changes):
    """The job of LoRA with seed 0 in a grid whose evaluation is another."""
    changed = grid(**changes)
    changed["evaluate"]["mode"] = "generate"
    made = planner(folder, changed)
    return made.run(made.study.experiment("LoRA"), 0).jobs[0]


def test_training_is_kept_where_the_evaluation_alone_is_another(job, tmp_path):
    finish(job, RIGHT)
    other = evaluated_otherwise(tmp_path)
    with pytest.raises(UserError, match="True to evaluate it anew and keep its training, or another --output_dir"):
        read_state(other)
    state = read_state(other, overwrite=True)
    assert state.train == {"done": True, "seconds": 10.0, "starts": 1}
    assert state.evaluate == {"done": False, "seconds": 0.0, "starts": 0}
    assert (state.recipe, state.commands) == (other.recipe, other.commands)
    assert not finished(other, overwrite=True) and finished(job)


def test_training_by_another_recipe_or_not_at_its_end_is_not_kept(job, tmp_path):
    finish(job, RIGHT)
    assert read_state(evaluated_otherwise(tmp_path, seeds=[0], train_records=1), overwrite=True) is None
    other = evaluated_otherwise(tmp_path)
    state = read_state(job)
    state.train["done"] = False
    state.write(job)
    assert read_state(other, overwrite=True) is None


def test_state_that_another_thread_is_writing_is_no_strange_file(job):
    job.folder.mkdir(parents=True)
    (job.folder / ".job.json.abc.partial").write_text("{")
    assert read_state(job) is None


def test_state_that_is_written_while_others_look_is_never_a_strange_file(job):
    jobs = [dataclasses.replace(job, folder=job.folder.with_name(f"seed{seed}")) for seed in range(60)]
    seen, written = [], threading.Event()

    def look() -> None:
        while not written.is_set():
            seen.extend(error for error in map(refused, jobs) if error)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    for one in jobs:
        State.fresh(one).write(one)
    written.set()
    for reader in readers:
        reader.join()
    assert seen == [] and all(map(read_state, jobs))


def refused(job) -> str | None:
    try:
        read_state(job)
    except UserError as error:
        return str(error)


def test_folder_of_something_else_is_never_taken(job):
    job.folder.mkdir(parents=True)
    (job.folder / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds files that no study made; pass another --output_dir"):
            read_state(job, overwrite)


def test_tasks_are_not_trained_alone_inside_a_joint_training(alone_and_joint):
    alone, joint = alone_and_joint
    finish(joint, RIGHT)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="seed0 holds a run of another recipe"):
            read_state(alone, overwrite)


@pytest.mark.parametrize(
    ("starts", "checkpoint", "flags"),
    [
        (0, False, {}),
        (1, False, {"overwrite_output_dir": True}),  # killed before its first checkpoint
        (1, True, {"resume_from_checkpoint": True}),
        (3, True, {"resume_from_checkpoint": True}),
    ],
)
def test_training_goes_on_from_its_last_checkpoint(job, starts, checkpoint, flags):
    state = State.fresh(job)
    state.train["starts"] = starts
    if checkpoint:
        (job.folder / "checkpoint-2").mkdir(parents=True)
        (job.folder / "checkpoint-2" / "trainer_state.json").write_text("{}")
    assert going_on(job, state) == flags


def test_half_written_checkpoint_is_not_gone_on_from(job):
    (job.folder / "checkpoint-2").mkdir(parents=True)
    state = State.fresh(job)
    state.train["starts"] = 1
    assert going_on(job, state) == {"overwrite_output_dir": True}


def test_state_is_the_same_after_a_trip_through_its_file(job):
    state = State.fresh(job)
    state.write(job)
    assert read_state(job) == state
    assert json.loads((job.folder / "job.json").read_text())["commands"] == job.commands


def test_changes_name_long_values_without_quoting_them():
    before = {"a": 1, "tasks": "x" * 90, "gone": True, "same": 0}
    now = {"a": 2, "tasks": "y" * 90, "new": None, "same": 0}
    assert changes(before, now) == ["a 1 -> 2", "gone True -> not given", "new not given -> None", "tasks"]
