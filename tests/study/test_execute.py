"""Commands of a study: their logs, what a failure says, what ends with the study, and one study a folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from study_cases import grid, is_locked, planner, wait_for

from mtl_lora.errors import UserError
from mtl_lora.study import commands as commands_module
from mtl_lora.study.commands import locked, shares_of_the_machine
from mtl_lora.study.execute import JobFailed, check_launcher, execute, execute_all, last_line
from mtl_lora.study.progress import Progress, clock, roughly
from mtl_lora.study.state import read_state


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A working folder in which finetune.py is a script of the test's own: ``scripts(text)``."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> None:
        (tmp_path / "finetune.py").write_text(text)

    return write


@pytest.fixture
def job(tmp_path):
    made = planner(tmp_path, grid())
    return made.run(made.study.experiment("LoRA"), 0).jobs[0]


def test_failed_training_is_one_line_with_the_logs_place_and_last_line(job, tmp_path, scripts):
    scripts("import sys; print('step 1'); sys.exit('error: the disk is full')")
    with locked(tmp_path / "study") as commands, pytest.raises(JobFailed) as failure:
        execute(job, commands)
    log = job.folder / "train.out"
    assert str(failure.value) == (
        f"LoRA seed 0: the training ended with exit code 1; {log} ends with: error: the disk is full"
    )
    assert log.read_text().startswith(f"$ {job.commands[0]}\n")
    state = read_state(job)
    assert state.train == {"done": False, "seconds": 0.0, "starts": 1} and state.evaluate["starts"] == 0


def test_next_start_of_a_failed_training_adds_to_its_log_and_begins_anew(job, tmp_path, scripts):
    scripts("import sys; sys.exit(' '.join(sys.argv[-2:]))")
    with locked(tmp_path / "study") as commands:
        for ending in (f"--seed {job.train['seed']}", "--overwrite_output_dir True"):
            with pytest.raises(JobFailed, match=f"ends with: {ending}$"):
                execute(job, commands)
    assert (job.folder / "train.out").read_text().count("$ python finetune.py") == 2
    assert read_state(job).train["starts"] == 2


def test_last_line_is_the_error_among_what_a_launcher_says_after_it(tmp_path):
    log = tmp_path / "log"
    log.write_text("10%\r20%\rerror: too few rows\nTraceback\n  File\nChildFailedError\n\n")
    assert last_line(log) == "error: too few rows"
    log.write_text("10%\r20%\n\n")
    assert last_line(log) == "20%"


def test_launcher_that_is_not_there_is_named():
    check_launcher("python")
    check_launcher("torchrun --nproc_per_node 2")
    with pytest.raises(UserError, match="the launcher 'no-such-launcher -n 2' can not be started"):
        check_launcher("no-such-launcher -n 2")


def test_a_folder_has_one_study_at_a_time(tmp_path):
    with locked(tmp_path / "study"):
        with (
            pytest.raises(UserError, match=r"still runs in .*study; wait for it, end it, or pass another"),
            locked(tmp_path / "study"),
        ):
            pass
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "study"):
        pass


WAITS = "import sys, time; print('here', flush=True); time.sleep(60)"
STUDY = """
import sys
from pathlib import Path
from mtl_lora.study.__main__ import _stop
from mtl_lora.study.commands import locked
import signal
signal.signal(signal.SIGTERM, _stop)
with locked(Path(sys.argv[1])) as commands, open(sys.argv[1] + ".out", "ab") as output:
    commands.start(["python", "-c", sys.argv[2]], output)
"""


@pytest.fixture
def waiting_study(tmp_path):
    """A process that waits for a command, and the folder it has locked."""
    folder = tmp_path / "study"
    process = subprocess.Popen([sys.executable, "-c", STUDY, str(folder), WAITS], start_new_session=True)
    wait_for(lambda: Path(f"{folder}.out").is_file() and "here" in Path(f"{folder}.out").read_text())
    yield process, folder
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def test_ending_a_study_ends_its_command(waiting_study):
    process, folder = waiting_study
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert not is_locked(folder)


def test_command_of_a_killed_study_keeps_the_folder(waiting_study):
    process, folder = waiting_study
    process.kill()
    process.wait()
    assert is_locked(folder)
    os.killpg(process.pid, signal.SIGKILL)
    wait_for(lambda: not is_locked(folder))


def test_exit_code_and_output_of_a_command_are_kept(tmp_path):
    with locked(tmp_path) as commands, (tmp_path / "log").open("ab") as output:
        words = ["python", "-c", "import sys; print(1); print(2, file=sys.stderr); sys.exit(3)"]
        assert commands.start(words, output) == 3
    assert sorted((tmp_path / "log").read_text().split()) == ["1", "2"]


# ---- side by side ----

# Finishes only if the training of the other seed runs at the same time.
MEETS = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
(folder / "here").write_text(os.environ["OMP_NUM_THREADS"])
while len(list(folder.parent.glob("*/here"))) < 2:
    time.sleep(0.01)
"""
# One seed fails as soon as the other, which never ends by itself, has started.
ONE_FAILS = (
    MEETS
    + """
if folder.name == "seed0":
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)
while not (folder.parent / "seed0" / "pid").is_file():
    time.sleep(0.01)
sys.exit("error: the disk is full")
"""
)


@pytest.fixture
def two_jobs(tmp_path, scripts, monkeypatch):
    """Two seeds of an experiment, whose evaluations do nothing."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (tmp_path / "commonsense_evaluate.py").write_text("")
    made = planner(tmp_path, grid())
    return [made.run(made.study.experiment("LoRA"), seed).jobs[0] for seed in (0, 1)]


def test_two_at_once_run_at_the_same_time(two_jobs, tmp_path, scripts):
    scripts(MEETS)
    with locked(tmp_path / "study", 2) as commands:
        done = {job.folder: state for job, state in execute_all(two_jobs, commands)}
    assert done.keys() == {job.folder for job in two_jobs}
    assert all(state.train["done"] and state.evaluate["done"] for state in done.values())
    assert (two_jobs[0].folder / "here").read_text() == "3", "the user's own number of threads"


def test_first_failure_ends_the_commands_beside_it(two_jobs, tmp_path, scripts):
    scripts(ONE_FAILS)
    with locked(tmp_path / "study", 2) as commands, pytest.raises(JobFailed, match=r"seed 1: .* the disk is full"):
        list(execute_all(two_jobs, commands))
    assert not is_locked(tmp_path / "study"), "a command that still ran would hold the lock"
    with pytest.raises(ProcessLookupError):
        os.kill(int((two_jobs[0].folder / "pid").read_text()), 0)
    assert not read_state(two_jobs[0]).train["done"]


def test_every_command_gets_its_share_of_the_machine(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(commands_module, "_cpus", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    assert shares_of_the_machine(1) == [{}]
    assert shares_of_the_machine(3) == [
        {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": gpu} for gpu in ("2", "5", "7")
    ]
    with pytest.raises(UserError, match="--parallel 4 needs as many GPUs, and there are 3"):
        shares_of_the_machine(4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert shares_of_the_machine(16) == [{"OMP_NUM_THREADS": "1"}] * 16


def test_gpus_are_counted_by_nvidia_smi_where_nothing_else_is_said(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commands_module.visible_gpus() == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: a)'\necho '  MIG 1g'\necho 'GPU 1: H100 (UUID: b)'\n")
    program.chmod(0o755)
    assert commands_module.visible_gpus() == ["0", "1"]


# ---- progress ----


def test_progress_line_counts_and_estimates_by_the_same_kind():
    both = ("train", "evaluate")
    progress = Progress(
        {
            "0.1": ("search LoRA", both),
            "0.2": ("search LoRA", both),
            "Base": ("run Base", both[1:]),
            "LoRA 0": ("run LoRA", both),
            "LoRA 1": ("run LoRA", both),
            "DoRA": ("run DoRA", both),
            "DoRA, trained": ("run DoRA", both[1:]),
        }
    )
    progress.finish("0.1", {"train": 40, "evaluate": 20})
    progress.finish("0.2", {"train": 80, "evaluate": 40})
    line = progress.line("LoRA 0.1 (search)", {"train": 90.0, "evaluate": 30.2}, 0.7124)
    # Nothing of the runs is known yet: three trainings and five evaluations at the mean of the search, 330 seconds.
    assert line == "[2/7] LoRA 0.1 (search): train 1:30 evaluate 0:30, average 71.2; about 6 min left"
    progress.finish("Base", {"evaluate": 30})
    progress.finish("LoRA 0", {"train": 300, "evaluate": 12})
    # LoRA as before; DoRA's training like LoRA's, its two evaluations at the mean of the runs, 21.
    assert progress.left() == pytest.approx(312 + 300 + 2 * 21)
    progress.finish("LoRA 1", {"train": 5})
    progress.finish("DoRA", {"train": 400, "evaluate": 100})
    assert progress.left() == 100
    progress.finish("DoRA, trained", {"train": 400, "evaluate": 100})
    assert (
        progress.line("DoRA", {"train": 4000, "evaluate": 2}, 0)
        == "[7/7] DoRA: train 1:06:40 evaluate 0:02, average 0.0"
    )


def test_time_left_is_shared_by_runs_side_by_side():
    progress = Progress({str(seed): ("run LoRA", ["train"]) for seed in range(5)}, at_once=2)
    progress.finish("0", {"train": 100})
    assert progress.left() == 200


@pytest.mark.parametrize(
    ("seconds", "text"), [(40, "40 s"), (89, "89 s"), (90, "2 min"), (3120, "52 min"), (12600, "3.5 h")]
)
def test_times_are_rounded_for_people(seconds, text):
    assert roughly(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (312, "5:12"), (59.6, "1:00"), (3912, "1:05:12")])
def test_clock_times(seconds, text):
    assert clock(seconds) == text
