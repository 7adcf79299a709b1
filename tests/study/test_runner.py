"""Jobs of a study: what is skipped, resumed, repeated or refused; their commands, logs and failures."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest
from study_cases import ALONE, SEARCH, dev_set, finish, grid, is_locked, job_of, plan_of, run_of, wait_for, with_flags

from mtl_lora.errors import UserError
from mtl_lora.files import claimed
from mtl_lora.report.load import Study
from mtl_lora.study import runner
from mtl_lora.study.config import StudyConfig
from mtl_lora.study.plan import State
from mtl_lora.study.runner import JobFailed, check_folder, environments, execute_all

RIGHT = {"boolq": "10"}


@pytest.fixture
def job(tmp_path):
    """The job of LoRA with seed 0."""
    return job_of(tmp_path, grid())


def once(*jobs):
    """These jobs, and none after the first is done, as ``execute_all`` asks for them."""
    lots = iter([jobs])
    return lambda: next(lots, ())


def refusal(job, overwrite: bool = False) -> str:
    """The sentence by which a job's folder is refused; empty if it is not."""
    try:
        check_folder(job, overwrite)
    except UserError as error:
        return str(error)
    return ""


# ---- what is known of a job ----


def test_state_is_the_same_after_a_trip_through_its_file(job):
    assert job.state is None and not job.is_finished and not refusal(job)
    state = State(job.configuration, {"train": 2}, {"train": 1.5})
    state.save(job.folder)
    assert job.state == state


@pytest.mark.parametrize(
    ("value", "fact"),
    [
        ("{", "not JSON"),
        ("[]", "an object"),
        ("{}", "configuration"),
        ('{"configuration": {}, "starts": {"train": "1"}}', "starts.train"),
    ],
)
def test_broken_state_is_one_sentence(job, value, fact):
    job.folder.mkdir(parents=True)
    (job.folder / "job.json").write_text(value)
    assert str(job.folder / "job.json") in refusal(job) and fact in refusal(job)


def test_finished_job_is_skipped_even_without_its_weights(job):
    finish(job, RIGHT)
    (job.folder / "mtl_lora.safetensors").unlink()
    assert job.is_finished
    (job.folder / "results.json").unlink()
    assert not job.is_finished


def test_other_configuration_is_refused_by_what_differs_unless_told_to_overwrite(job, tmp_path):
    finish(job, RIGHT)
    now = job_of(tmp_path, with_flags(lora_r=8) | {"train_records": 11})
    facts = (str(job.folder), "the train data (sha256)", "train.lora_r 4 -> 8", "--overwrite", "repeat")
    assert all(fact in refusal(now) for fact in facts)
    assert job.data["train"].sha256["train"] not in refusal(now), "what is too long is only named"
    assert not refusal(now, overwrite=True) and now.state is None and job.is_finished


@pytest.mark.slow(1)
def test_training_is_kept_where_the_evaluation_alone_differs(job, tmp_path):
    finish(job, RIGHT)
    other = job_of(tmp_path, with_flags("evaluate", mode="generate"))
    assert "keep its training" in refusal(other) and not refusal(other, overwrite=True)
    expected = State(other.configuration, {"train": 1}, {"train": 10.0})
    assert other.state == expected and not other.is_finished and job.is_finished
    weights = (job.folder / "mtl_lora.safetensors").rename(tmp_path / "weights")
    assert other.state is None and "repeat it" in refusal(other), "a study that was copied without weights"
    weights.rename(job.folder / "mtl_lora.safetensors")
    dataclasses.replace(job.state, seconds={}).save(job.folder)
    assert other.state is None, "a training that did not end is not kept"


def test_training_is_not_kept_where_it_differs_beside_the_evaluation(job, tmp_path):
    finish(job, RIGHT)
    value = with_flags("evaluate", mode="generate")
    value["train"]["lora_r"] = 8
    other = job_of(tmp_path, value)
    assert other.state is None and "repeat it" in refusal(other)


@pytest.mark.parametrize("held", ["thesis.tex", "chapter/thesis.tex", "boolq/job.json"])
def test_folder_with_anything_but_the_job_is_refused_and_never_deleted(job, held):
    path = job.folder / held
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    for overwrite in (False, True):
        assert held.split("/")[0] in refusal(job, overwrite) and "--output_dir" in refusal(job, overwrite)


@pytest.mark.slow(1)
def test_tasks_are_not_trained_alone_inside_a_joint_training(tmp_path):
    alone, joint = (job_of(tmp_path, grid({**ALONE, "alone": alone}), "Alone") for alone in (True, False))
    finish(joint, RIGHT)
    for overwrite in (False, True):
        assert str(joint.folder) in refusal(alone, overwrite)


# ---- commands ----


@pytest.fixture
def script(tmp_path, monkeypatch):
    """``python -m mtl_lora`` is a script of the test's own, ``script(text)``, whatever lies in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mtl_lora.py").write_text("raise SystemExit('error: a module of the current folder was run')")
    (tmp_path / "modules").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    return (tmp_path / "modules" / "mtl_lora.py").write_text


def test_failed_training_is_one_line_with_the_logs_place_and_its_error(job, script):
    # Launchers talk on after the error.
    script("import sys; print('1%', end='\\r'); print('error: the disk is full\\nTraceback\\n\\nEnd\\n'); sys.exit(1)")
    with pytest.raises(JobFailed) as failure:
        list(execute_all(once(job), [{}]))
    log = job.folder / "train.out"
    facts = ("LoRA seed 0", "train", "exit code 1", str(log), "ends with: error: the disk is full")
    assert all(fact in str(failure.value) for fact in facts) and "\n" not in str(failure.value)
    assert log.read_text().startswith(f"$ {job.commands[0]}\n")
    assert (job.state.starts, job.state.seconds) == ({"train": 1}, {})
    script("import os; os.kill(os.getpid(), 9)")  # whose end is not the earlier one's
    with pytest.raises(JobFailed, match=r"exit code -9; .* ends with: \$ "):
        list(execute_all(once(job), [{}]))


@pytest.mark.parametrize(
    ("names", "flags"),
    [
        ([], "--overwrite_output_dir True"),  # killed before its first checkpoint
        (["trainer_state.json", "mtl_lora.safetensors"], "--resume_from_checkpoint True"),
        (["trainer_state.json"], "--overwrite_output_dir True"),  # copied without weights
        (["mtl_lora.safetensors"], "--overwrite_output_dir True"),  # half removed
    ],
)
def test_next_start_resumes_from_the_last_complete_checkpoint(job, script, names, flags):
    script("import sys; sys.exit(' '.join(sys.argv[-2:]))")
    for ending in (f"--output_dir {job.folder}", flags):
        with pytest.raises(JobFailed, match=f"ends with: {ending}$"):
            list(execute_all(once(job), [{}]))
        for name in names:
            (job.folder / "checkpoint-2").mkdir(exist_ok=True)
            (job.folder / "checkpoint-2" / name).write_text("{}")
    assert (job.folder / "train.out").read_text().count("$ python -m mtl_lora train") == 2
    assert job.state.starts == {"train": 2}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_half_done_evaluation_begins_anew_where_it_is_to_be_overwritten(job, script, overwrite):
    finish(job, RIGHT)
    State(job.configuration, {"train": 1, "evaluate": 1}, {"train": 1.0}).save(job.folder)  # killed in its evaluation
    (job.folder / "results.json").unlink()
    script("import sys; sys.exit('error: wrong')")
    with pytest.raises(JobFailed, match=r"evaluate .*wrong"):
        list(execute_all(once(job), [{}], overwrite))
    assert job.state.starts == {"train": 1, "evaluate": 2} and (job.folder / "mtl_lora.safetensors").is_file()
    assert (job.folder / "predictions").exists() != overwrite


def test_a_kill_while_a_folder_is_emptied_leaves_no_job_that_counts_as_finished(job, tmp_path, monkeypatch):
    finish(job, RIGHT)
    now = job_of(tmp_path, with_flags(lora_r=8))

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.shutil, "rmtree", killed)
    monkeypatch.setattr(type(job.folder), "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        next(runner.execute(now, {}))
    assert (job.folder / "results.json").is_file() and not job.is_finished and not now.is_finished
    assert job.state.seconds == {}


def test_answers_of_weights_that_are_gone_go_before_they_are_trained_again(job, script):
    finish(job, RIGHT)
    State(job.configuration, {"train": 1, "evaluate": 1}, {"train": 1.0}).save(job.folder)  # killed in its evaluation
    (job.folder / "results.json").unlink()
    (job.folder / "mtl_lora.safetensors").unlink()
    script("import sys; sys.exit('error: wrong' if sys.argv[1] == 'evaluate' else None)")
    with pytest.raises(JobFailed, match=r"evaluate .*wrong"):
        list(execute_all(once(job), [{}]))
    assert job.state.starts == {"train": 2, "evaluate": 2} and not (job.folder / "predictions").exists()


@pytest.mark.slow(1)
def test_launcher_is_preceded_by_a_check_in_one_process(job, tmp_path, script):
    script("import sys; sys.exit('error: wrong' if '--check' in sys.argv else None)")
    with pytest.raises(JobFailed, match="error: wrong"):
        list(execute_all(once(job_of(tmp_path, grid(launcher="torchrun --nproc_per_node 2"))), [{}]))
    assert "torchrun" not in (job.folder / "train.out").read_text()


@pytest.mark.parametrize(
    ("launcher", "parallel", "facts"),
    [("no-such-launcher -n 2", 1, ["no-such-launcher -n 2"]), ("torchrun", 2, ["--parallel", "torchrun"])],
)
def test_launcher_that_cannot_be_used_is_refused(tmp_path, launcher, parallel, facts):
    path = str(plan_of(tmp_path, grid(launcher=launcher)).grid.path)
    with pytest.raises(UserError) as error:
        runner.run(StudyConfig(grid=path, output_dir=str(tmp_path / "study"), parallel=parallel))
    assert all(fact in str(error.value) for fact in facts) and not (tmp_path / "study").exists()


# ---- processes ----

STUDY = """
import os, sys
from mtl_lora import cli, files
from mtl_lora.study import runner
class Job:
    label, folder, is_finished = "job", "job", False
def execute(job, slot, overwrite):
    with open(sys.argv[1] + ".out", "ab") as output:
        command = ["python", "-c", "import time; print('here', flush=True); time.sleep(60)"]
        yield from runner.until_done(command, output, slot)
def run(config):
    with files.claimed(config.output_dir) as lock:
        list(runner.execute_all(lambda: [Job], [{"pass_fds": lock}]))
runner.execute, runner.run = execute, run
cli.main(["study", "--grid", "any", "--output_dir", sys.argv[1]])
"""


@pytest.fixture
def waiting_study(tmp_path):
    """A process that waits for a command, and the folder it has locked."""
    folder, output = tmp_path / "study", tmp_path / "study.out"
    process = subprocess.Popen([sys.executable, "-c", STUDY, str(folder)], start_new_session=True)
    wait_for(lambda: output.is_file() and "here" in output.read_text())
    yield process, folder
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


@pytest.mark.slow(1)
def test_ending_a_study_ends_its_command(waiting_study):
    process, folder = waiting_study
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert not is_locked(folder)


@pytest.mark.slow(1)
def test_command_of_a_killed_study_keeps_the_folder(waiting_study):
    process, folder = waiting_study
    process.kill()
    process.wait()
    with pytest.raises(UserError, match=r"study is in use"), claimed(folder):
        pass
    assert not is_locked(folder.with_name("other"))
    os.killpg(process.pid, signal.SIGKILL)
    wait_for(lambda: not is_locked(folder))


# Finishes only if the training of the other seed runs at the same time.
MEETS = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
if sys.argv[1] == "train":
    (folder / "here").write_text(os.environ["SLOT"])
    while len(list(folder.parent.glob("*/here"))) < 2:
        time.sleep(0.01)
"""
# One seed fails as soon as the other, which never ends by itself, has started.
ONE_FAILS = """
if folder.name == "seed0":
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)
while not (folder.parent / "seed0" / "pid").is_file():
    time.sleep(0.01)
sys.exit("error: the disk is full")
"""


def two_slots() -> list[dict]:
    return [{"env": {**os.environ, "SLOT": str(slot)}} for slot in (0, 1)]


@pytest.fixture
def two_jobs(tmp_path):
    """Two seeds of an experiment."""
    plan = plan_of(tmp_path, grid())
    return [run_of(plan, "LoRA", seed).jobs[0] for seed in (0, 1)]


@pytest.mark.slow(1)
def test_two_at_once_run_at_the_same_time(two_jobs, tmp_path, script):
    script(MEETS)
    done = {job.folder: state for job, state in execute_all(once(*two_jobs), two_slots())}
    assert done.keys() == {job.folder for job in two_jobs}
    assert all(state.seconds.keys() == {"train", "evaluate"} for state in done.values())
    assert [(job.folder / "here").read_text() for job in two_jobs] == ["0", "1"]


@pytest.mark.slow(1)
def test_job_that_waited_for_another_starts_beside_those_that_run(tmp_path, script):
    plan = plan_of(tmp_path, grid(seeds=[0, 1, 2]))
    first, beside, waited = (run_of(plan, "LoRA", seed).jobs[0] for seed in (0, 1, 2))
    # Seed 1, which is started with seed 0, ends after seed 2 has started, and that waits for seed 0.
    script(MEETS.replace("while len", "while folder.name == 'seed1' and len").replace("< 2", "< 3"))
    lots = iter([[first, beside], [beside, waited]])
    done = [job.folder for job, _ in execute_all(lambda: next(lots, ()), two_slots())]
    assert done[0] == first.folder and {*done[1:]} == {beside.folder, waited.folder}
    assert waited.state.starts["train"] == beside.state.starts["train"] == 1


@pytest.mark.slow(1)
def test_first_failure_ends_the_commands_beside_it(two_jobs, tmp_path, script):
    script(MEETS + ONE_FAILS)
    with pytest.raises(JobFailed, match=r"seed 1: .* the disk is full"):
        list(execute_all(once(*two_jobs), two_slots()))
    with pytest.raises(ProcessLookupError):
        os.kill(int((two_jobs[0].folder / "pid").read_text()), 0)
    assert "train" not in two_jobs[0].state.seconds


def test_after_a_failure_no_other_job_is_started(two_jobs, tmp_path, script):
    script("import sys; sys.exit('error: the disk is full')")
    with pytest.raises(JobFailed, match=r"LoRA seed 0: .* the disk is full"):
        list(execute_all(once(*two_jobs), [{}]))
    assert not two_jobs[1].folder.exists()


@pytest.fixture
def done(monkeypatch):
    """What a job does, in place of its commands: it is written as finished, unless its label is in ``done.fails``."""

    def execute(job, slot, overwrite):
        yield
        if job.label in execute.fails:
            raise JobFailed(f"{job.label}: train ended with exit code 1")
        finish(job, RIGHT)
        return job.state

    execute.fails = set()
    monkeypatch.setattr(runner, "execute", execute)
    return execute


def started(plan, **options):
    """A runner of all experiments of a plan."""
    return runner.Runner(plan, list(plan.grid.experiments), **{"overwrite": False, **options})


@pytest.mark.slow
def test_a_study_that_fails_has_written_all_that_is_finished(tmp_path, done):
    plan = plan_of(tmp_path, grid(seeds=[0, 1, 2]))
    done.fails = {"MTL-LoRA seed 2"}
    with pytest.raises(JobFailed, match="MTL-LoRA seed 2"):
        started(plan).run([{}])
    study = Study.load(plan.folder)
    assert {each.name: len(each.runs) for each in study.experiments} == {"Base": 1, "LoRA": 3, "MTL-LoRA": 2}


@pytest.mark.slow
def test_a_study_records_the_grid_that_it_was_started_with(tmp_path, done):
    plan = plan_of(tmp_path, grid())
    content = plan.grid.path.read_bytes()
    plan.grid.path.write_text("{")  # half-saved by an editor meanwhile
    started(plan).run([{}])
    study = Study.load(plan.folder)
    assert (study.grid, study.grid_sha256) == (json.loads(content), hashlib.sha256(content).hexdigest())


@pytest.mark.slow
def test_search_keeps_no_other_experiment_waiting_and_every_job_is_counted(tmp_path, done, capsys):
    search = SEARCH | {"data_dir": dev_set(tmp_path), "values": [0.01, 0.001]}
    value = grid(search=search)
    started(plan_of(tmp_path, value)).run([{}, {}])
    lines = capsys.readouterr().out.splitlines()
    # Base once, LoRA and MTL-LoRA with two seeds, and two trials of LoRA; MTL-LoRA sets the searched flag itself.
    assert lines[0].startswith("small: 7 jobs, 0 of them finished")
    assert [line.split("]")[0] for line in lines[1:]] == [f"[{number}/7" for number in range(1, 8)]
    assert "left" not in lines[-1]
    search["values"] = [0.01, 0.001, 0.0001]  # of equal ones the smallest is chosen, so LoRA is trained anew
    with pytest.raises(UserError, match=r"learning_rate 0.001 -> 0.0001"):
        started(plan_of(tmp_path, value)).run([{}, {}])
    again = started(plan_of(tmp_path, value), overwrite=True)
    capsys.readouterr()
    again.run([{}, {}])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("small: 8 jobs, 6 of them finished") and lines[-1].startswith("[8/8]")


def test_every_command_gets_its_part_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    assert environments(1) == [{}]
    assert environments(3) == [{"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": gpu} for gpu in ("2", "5", "7")]
    shared = [environment["CUDA_VISIBLE_DEVICES"] for environment in environments(8)]
    assert shared == ["2", "5", "7", "2", "5", "7", "2", "5"], "GPUs are shared by more jobs than there are"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environments(16) == [{"OMP_NUM_THREADS": "1"}] * 16
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environments(2) == [{"OMP_NUM_THREADS": "3"}] * 2, "the user's own number of threads"
    monkeypatch.delenv("OMP_NUM_THREADS")
    # Where nothing is said, nvidia-smi is asked.
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environments(2) == [{"OMP_NUM_THREADS": "4"}] * 2
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: a)'\necho '  MIG 1g'\necho 'GPU 1: H100 (UUID: b)'\n")
    program.chmod(0o755)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments(2)] == ["0", "1"]
