"""Kills, pairs of commands at once and full disks, at random moments of the real commands on a tiny model.

    python tests/stress.py --kills 300 --pairs 100 --disk 50 --seed 0

Every command is a process of its own: a fork of this one, which has imported the libraries once, so that a command
takes a second and not ten. What is promised (docs/reliability.md) is checked of each:

- a **kill** (SIGKILL, SIGINT or SIGTERM between start and end) leaves the former state or the new one, and the same
  command, with the flag that it asks for if it does, then ends with the bytes of one that was never disturbed;
- of a **pair** at once both end as if one had run after the other, or one is refused in a sentence and changed nothing;
- a full **disk** is one sentence and exit code 2, with the state and the way on of a kill.

A trial is drawn from the seed, its kind and its number alone, so ``--only kill-17`` repeats one. With ``--log FILE``
each trial is a JSON line there, and those that it has already are not tried again.
"""

import argparse
import contextlib
import faulthandler
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
os.environ |= {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # a fork would lose its thread
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
    os.environ.pop(name, None)

STOPPING = (signal.SIGINT, signal.SIGTERM)
LONGEST = 100  # seconds after which a command counts as hanging
STACKS = tempfile.NamedTemporaryFile("a", suffix=".stacks")  # noqa: SIM115 - all forks write to it
SIGNALS = {signal.SIGKILL: (-9,), signal.SIGINT: (130,), signal.SIGTERM: (143, -15)}
# What two runs of one command may differ in: times, and flags that say how it was started.
FREE = {"command", "resume_from_checkpoint", "overwrite_output_dir", "seconds", "starts"}
FREE |= {"commit", "commits", "log_history"}
WAY_OUT = {"--resume_from_checkpoint True": "--resume_from_checkpoint=True"}
WAY_OUT |= {"--overwrite_output_dir True": "--overwrite_output_dir=True"}


# ---- a command as a process ----


class Forked:
    """A child of this process that runs a command; of subprocess.Popen what a study uses."""

    def __init__(self, arguments: list[str], folder: Path, log: int, environment: dict, size_limit: int | None = None):
        assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose the threads"
        self.began, self.returncode = time.monotonic(), None
        # A signal before the child has its handlers would unwind this program there, and remove its working folder.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        self.pid = os.fork()
        if not self.pid:
            code = 130  # of a KeyboardInterrupt after the command
            try:
                code = self._run(arguments, folder, log, environment, size_limit)
            finally:
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    @staticmethod
    def _run(arguments: list[str], folder: Path, log: int, environment: dict, size_limit: int | None) -> int:
        code = 1
        try:
            os.setsid()
            os.chdir(folder)
            os.environ.update(environment)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.argv = ["mtl-lora", *arguments]
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
            if size_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size_limit, size_limit))
            cli.main(arguments)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except KeyboardInterrupt:  # before the command began or after it ended, where Python itself would report it
            code = 130
        except BaseException:
            traceback.print_exc()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        return code

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, until: float = float("inf")) -> int | None:
        """The exit code, or None at the time ``until``; raises ``Fault`` for a command that hangs."""
        while self.poll() is None and time.monotonic() < until:
            if time.monotonic() > self.began + LONGEST:
                self.abort()
                raise Fault(f"a command does not end:\n{Path(STACKS.name).read_text()}")
            time.sleep(0.002)
        return self.returncode

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def abort(self) -> None:
        """End a command, and what it has started; each writes where it was to ``STACKS``."""
        pids = [self.pid]
        for pid in pids:
            with contextlib.suppress(OSError):
                pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        for pid in pids[::-1]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGUSR1)
        os.waitpid(self.pid, 0)
        self.returncode = -signal.SIGUSR1


def start_forked(command: list[str], *, stdout, env: dict | None = None, pass_fds: tuple = (), **_) -> Forked:
    """In place of the study's ``subprocess.Popen``: a fork that holds the study's claims, as its commands do."""
    words = command[command.index("mtl_lora") + 1 :]
    claims = [os.dup(number) for number in pass_fds]  # the originals are closed in a fork
    try:
        return Forked(words, Path.cwd(), stdout.fileno(), env or {})
    finally:
        for number in claims:
            os.close(number)


PREFIX = "stress."  # of the working folder


class Fault(Exception):
    """The promise was broken."""


def start(command: list[str], folder: Path, **options) -> tuple[Forked, Path]:
    """A command in a trial's folder, and the file of what it prints."""
    work = next(path for path in (folder, *folder.parents) if path.name.startswith(PREFIX))
    log = work / "printed.out"  # not on a disk that is full
    with log.open("wb") as opened:
        return Forked(command, folder, opened.fileno(), {}, **options), log


def run(command: list[str], folder: Path, **options) -> tuple[int, str]:
    """(exit code, what was printed) of an undisturbed command."""
    process, log = start(command, folder, **options)
    return process.wait(), log.read_text(errors="replace")


# ---- the commands, and the state that they leave ----


def write_inputs(work: Path) -> None:
    """Write what the commands read: a base model, examples, questions, texts."""
    from conftest import make_tiny_base
    from shared import QUICKSTART

    make_tiny_base(work / "base")
    examples = json.loads((QUICKSTART / "train.json").read_text())
    (work / "train.json").write_text(json.dumps(examples[:48]))
    for folder, first in (("test", 0), ("test2", 6)):
        for task in ("boolq", "piqa"):
            questions = json.loads((QUICKSTART / "test" / task / "test.json").read_text())[first : first + 12]
            (work / folder / task).mkdir(parents=True)
            (work / folder / task / "test.json").write_text(json.dumps(questions))
    for name, part in (("input", examples[:20]), ("input2", examples[20:30])):
        (work / f"{name}.json").write_text(json.dumps(part))
    for number in (1, 2):
        chance = random.Random(number)
        for task in TaskSet.load(str(TASKS_FILE)):
            for part, count in (("train", 60), ("dev", 10), ("test", 10)):
                rows = [{"text": f"{part} {chance.random()}", "label": chance.choice(task.options)}]
                rows += [{"text": f"{part} {chance.random()}", "label": task.options[0]} for _ in range(count)]
                path = work / f"prepared{number}" / task.name / f"{part}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(rows))


def commands(work: Path) -> dict[str, list[str]]:
    """The arguments of the commands by name; their outputs lie in the folder of a trial."""
    flags = {"base_model": str(work / "base"), "data_path": str(work / "train.json"), "dtype": "fp32", "max_steps": 9}
    flags |= {"save_step": 2, "batch_size": 4, "logging_steps": 1, "save_total_limit": 3, "learning_rate": 0.01}
    grid = {
        "name": "small",
        "about": "A small study.",
        "seeds": [0],
        "train": {**flags, "max_steps": 3},
        "evaluate": {"data_dir": str(work / "test"), "mode": "score", "dtype": "fp32", "tasks": ["boolq", "piqa"]},
        "experiments": [{"name": "Base", "train": None}, {"name": "LoRA", "train": {"adapter_name": "lora"}}],
    }
    (work / "grid.json").write_text(json.dumps(grid))
    words = [f"--{name}={value}" for name, value in {**flags, "cache_dir": "cache"}.items()]
    train = ["train", *words, "--lora_dropout=0.1", "--val_set_size=4"]
    evaluate = ["evaluate", "--data_dir", str(work / "test"), "--tasks=boolq,piqa", "--dtype=fp32", "--batch_size=3"]
    evaluate += ["--max_new_tokens=6"]
    own, other = f"--checkpoint={work / 'ck'}", f"--checkpoint={work / 'ck2'}"
    predict = ["predict", own, "--dtype=fp32", "--mode=score", "--batch_size=3"]
    prepared = ["prepare", "textclass", "--output_dir=out", "--prepared"]
    table = ["report", "table", "--output=out/table.md"]
    return {
        "train": [*train, "--output_dir=out"],
        "train, seed 7": [*train, "--output_dir=out", "--seed=7"],
        "train over": [*train, "--output_dir=out", "--seed=7", "--overwrite_output_dir=True"],
        "resume": [*train, "--output_dir=out", "--resume_from_checkpoint=True"],
        "train elsewhere": [*train, "--output_dir=out2"],
        "score": [*evaluate, own, "--mode=score", "--output_dir=out"],
        "score, limit": [*evaluate, own, "--mode=score", "--output_dir=out", "--limit=3"],
        "generate": [*evaluate, own, "--mode=generate", "--output_dir=out"],
        "both over": [*evaluate, other, "--mode=both", "--output_dir=out", "--overwrite"],
        "score over": [*evaluate, other, "--mode=score", "--output_dir=out", "--overwrite"],
        "score what is trained": [*evaluate, "--checkpoint=out", "--mode=score"],
        "predict": [*predict, f"--input={work / 'input.json'}", "--output=out/answers.jsonl"],
        "predict over": [*predict, f"--input={work / 'input2.json'}", "--output=out/answers.jsonl", "--overwrite"],
        "export peft": ["export", "peft", own, "--output=out"],
        "export peft over": ["export", "peft", other, "--output=out", "--overwrite"],
        "export merged": ["export", "merge", own, "--task=boolq", "--output=out"],
        "export merged over": ["export", "merge", other, "--task=boolq", "--output=out", "--overwrite"],
        "export what is trained": ["export", "peft", "--checkpoint=out", "--output=exported", "--tasks=boolq"],
        "prepare": [*prepared, str(work / "prepared1")],
        "prepare other": [*prepared, str(work / "prepared2")],
        "study": ["study", "--grid", str(work / "grid.json"), "--output_dir=out"],
        "study report": ["study", "--grid", str(work / "grid.json"), "--output_dir=out", "--report"],
        "table": [*table, str(work / "scored")],
        "table 2": [*table, str(work / "scored2")],
        "figures": ["report", "figures", str(work / "ck"), "--output=out/figures", "--format=png"],
    }


# What a kill is tried on: (what made the state before, the command).
KILLED = [
    *((None, "train"), (None, "train"), ("train", "train over"), (None, "score"), (None, "generate")),
    *(("score", "both over"), ("score", "score over"), (None, "predict"), ("predict", "predict over")),
    *((None, "export peft"), ("export peft", "export peft over"), (None, "export merged")),
    *(("export merged", "export merged over"), (None, "prepare"), ("prepare", "prepare other"), (None, "study")),
    (None, "figures"),
]
# What two at once are drawn from, by what was there before.
TOGETHER = {
    None: [
        *("train", "train, seed 7", "train elsewhere", "score", "score, limit", "generate", "predict", "predict over"),
        *("export peft", "export merged", "prepare", "prepare other", "study", "table", "table 2", "figures"),
    ],
    "train": ["train over", "resume", "score what is trained", "export what is trained", "predict", "figures", "table"],
    "score": ["score", "score over", "both over", "score, limit", "train", "export peft over", "table", "table 2"],
    "export peft": ["export peft over", "export merged over", "train", "score", "predict"],
    "prepare": ["prepare", "prepare other", "train", "predict over"],
    "study": ["study", "study report", "score", "export peft over"],
}


def without_free(value):
    """A JSON value without what two runs may differ in."""
    if isinstance(value, dict):
        return {key: without_free(entry) for key, entry in value.items() if key not in FREE}
    return [without_free(entry) for entry in value] if isinstance(value, list) else value


def snapshot(folder: Path) -> dict[str, object]:
    """Every file below a folder by its path, but for hidden ones, caches and logs of processes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts) or name.parts[0] == "cache":
            continue
        content = path.read_bytes().replace(str(folder).encode(), b"@")
        if path.suffix == ".out":
            continue
        if path.suffix == ".json":
            content = json.dumps(without_free(json.loads(content)), sort_keys=True)
        elif name.name == "train_log.jsonl":
            lines = [line for line in content.split(b"\n") if line and b"train_runtime" not in line]
            content = b"\n".join(lines)
        found[name.as_posix()] = content
    return found


def difference(found: dict, expected: dict) -> list[str]:
    """The files in which two snapshots differ."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def leftovers(folder: Path) -> list[str]:
    """Locks and half-written files that a command which ended well should have removed."""
    hidden = [path for path in folder.rglob(".*") if path.suffix in (".lock", ".partial", ".old", ".saving", ".room")]
    return [path.relative_to(folder).as_posix() for path in hidden]


def check_state(folder: Path, before: dict, after: dict) -> None:
    """Raise ``Fault`` unless a stopped command left nothing half-written that could be taken for whole."""
    found = snapshot(folder)
    for checkpoint in artifacts.checkpoints(folder / "out"):
        names = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "mtl_lora.safetensors"]
        if missing := [name for name in names if not (checkpoint / name).is_file()]:
            raise Fault(f"{checkpoint.name} counts as complete without {missing}")
        read_weights(checkpoint, read_config(checkpoint))
    if (folder / "out" / artifacts.CHECKPOINT_CONFIG).is_file():
        read_weights(folder / "out", read_config(folder / "out"))
    # Of what names the whole: absent, or with everything that belongs to it.
    wholes = {"out/results.json", "out/score/results.json", "out/generate/results.json", "out/answers.jsonl"}
    wholes |= {"out/train.json", "out/config.json", "out/mtl_lora_config.json", "out/study.json"}
    for name in wholes & found.keys():
        if found[name] not in (before.get(name), after.get(name)) and name != "out/study.json":
            raise Fault(f"{name} is neither the former nor the new one")
    parts = {"out/results.json": "out/predictions/", "out/train.json": "out/", "out/config.json": "out/"}
    for name, part in parts.items():
        for state in (before, after):
            known = name in found and found[name] == state.get(name) and before.get(name) != after.get(name)
            if (
                wrong := [key for key in state if key.startswith(part) and found.get(key) != state[key]]
                if known
                else []
            ):
                raise Fault(f"{name} stands beside other or missing {wrong[:3]}")
    for adapter in (folder / "out").glob("*/adapter_model.safetensors"):
        part = adapter.parent.relative_to(folder).as_posix()
        own = {key: value for key, value in found.items() if key.startswith(part)}
        if not any(own.items() <= state.items() and len(own) == 3 for state in (before, after)):
            raise Fault(f"{part} is neither the former nor the new one")
    for settings in [path.parent for path in (folder / "out").rglob("predictions")]:
        if any((settings / "predictions").iterdir()) and not (settings / artifacts.EVAL_SETTINGS).is_file():
            raise Fault(f"{settings} holds answers without their settings")


def check_words(code: int, text: str) -> None:
    """Raise ``Fault`` for a traceback, or an exit code 2 without one sentence."""
    if "Traceback" in text:
        raise Fault(f"a traceback:\n{text[-3000:]}")
    if code == 2 and sum(line.startswith("error: ") for line in text.splitlines()) != 1:
        raise Fault(f"exit code 2 without one sentence:\n{text[-2000:]}")
    if code not in (0, 2, 130, 143, -9, -15):
        raise Fault(f"exit code {code}:\n{text[-2000:]}")


class Stress:
    """Trials in a working folder."""

    def __init__(self, work: Path, seed: int):
        self.work, self.seed, self.counts = work, seed, Counter()
        # In a process of its own, for it starts threads, which a fork would lose with whatever they hold.
        writer = os.fork()
        if not writer:
            write_inputs(work)
            os._exit(0)
        assert os.waitpid(writer, 0)[1] == 0
        self.commands = commands(work)
        self.states: dict[tuple[str, ...], tuple[tuple[int, ...], dict, dict[str, float]]] = {}
        self.seconds: dict[tuple[str | None, str], float] = {}
        for name, flags in (("ck", []), ("ck2", ["--seed=7"])):
            self.must([*self.commands["train"], *flags], work, name)
        evaluate = [word for word in self.commands["score"] if not word.startswith("--output_dir")]
        for name, checkpoint in (("scored", "ck"), ("scored2", "ck2")):
            own = [word.replace(str(work / "ck"), str(work / checkpoint)) for word in evaluate]
            self.must([*own, f"--output_dir={work / name}"], work, None)

    def must(self, command: list[str], folder: Path, name: str | None) -> None:
        """Run what the trials need; ``name``: where its output folder goes."""
        code, text = run(command, folder)
        assert code == 0, text[-3000:]
        if name:
            (folder / "out").rename(folder / name)

    def folder(self, before: str | None) -> Path:
        """A new folder of one trial, in which a command has made the state before."""
        folder = self.work / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        if before is None:
            folder.mkdir()
            return folder
        saved = self.work / "before" / before
        if not saved.is_dir():
            saved.parent.mkdir(exist_ok=True)
            folder.mkdir()
            self.must(self.commands[before], folder, None)
            folder.rename(saved)
        shutil.copytree(saved, folder, symlinks=True)
        return folder

    def one_after_another(self, *names: str | None) -> tuple[tuple[int, ...], dict]:
        """(exit codes, state) after undisturbed commands; the first name made the state before."""
        if names not in self.states:
            folder, codes = self.folder(names[0]), []
            for name in names[1:]:
                began = time.monotonic()
                code, text = run(self.commands[name], folder)
                self.seconds.setdefault((names[0], name), time.monotonic() - began)
                check_words(code, text)
                codes.append(code)
            self.states[names] = tuple(codes), snapshot(folder)
        return self.states[names]

    def go_on(self, name: str, folder: Path, expected: dict, chance: random.Random | None = None) -> None:
        """Start a stopped command again, with the flag that it asks for, until it ends; compare the result."""
        command, deadline = list(self.commands[name]), time.monotonic() + 120
        while True:
            if chance and chance.random() < 0.3:
                self.kill(command, folder, chance, chance.random() * self.seconds[self.key])
                continue
            code, text = run(command, folder)
            check_words(code, text)
            if code == 0:
                break
            asked = [flag for words, flag in WAY_OUT.items() if words in text]
            if time.monotonic() > deadline:
                raise Fault(f"does not go on:\n{text[-1000:]}")
            if "is in use by another command" in text:  # one that a killed study has started
                time.sleep(0.1)
            elif asked and asked[0] not in command:
                command = [word for word in command if not word.startswith("--overwrite_output_dir")] + asked[:1]
            elif "--overwrite to replace it" in text:  # the kill came after the end
                break
            else:
                raise Fault(f"does not go on:\n{text[-1000:]}")
        if wrong := difference(snapshot(folder), expected):
            raise Fault(f"the result differs from an undisturbed one in {wrong}")
        if left := leftovers(folder):
            raise Fault(f"left behind: {left}")

    def kill(self, command: list[str], folder: Path, chance: random.Random, after: float) -> bool:
        """Start a command and send it a signal; returns whether it still ran."""
        number, whole_group = chance.choice(list(SIGNALS)), chance.random() < 0.5
        process, log = start(command, folder)
        alive = process.wait(until=process.began + after) is None
        if alive:
            # A terminal sends its signal to the whole group.
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if whole_group else os.kill)(process.pid, number)
        code, text = process.wait(), log.read_text(errors="replace")
        check_words(code, text)
        # A command that is started again may just have been refused, see ``go_on``.
        if alive and code not in (*SIGNALS[number], 0, 2):
            raise Fault(f"exit code {code} after {number.name}:\n{text[-1000:]}")
        self.counts[f"{number.name if alive else 'signals after the end'}"] += 1
        return alive

    # ---- trials ----

    def try_kill(self, chance: random.Random) -> str:
        before, name = self.key = chance.choice(KILLED)
        codes, expected = self.one_after_another(before, name)
        assert codes == (0,), (before, name)
        folder = self.folder(before)
        former = snapshot(folder)
        self.kill(self.commands[name], folder, chance, chance.random() * self.seconds[self.key])
        if name != "study":  # whose commands may still run
            check_state(folder, former, expected)
        self.go_on(name, folder, expected, chance)
        return f"{name} after {before}" if before else name

    def try_pair(self, chance: random.Random) -> str:
        before = chance.choice([None, None, *TOGETHER])
        pair = [chance.choice(TOGETHER[before]) for _ in range(2)]
        alone = [self.one_after_another(before, name) for name in pair]
        orders = [self.one_after_another(before, *pair), self.one_after_another(before, *pair[::-1])]
        orders[1] = orders[1][0][::-1], orders[1][1]
        folder = self.folder(before)
        logs = [folder.parent / f"{index}.out" for index in range(2)]
        offset = chance.random() * self.seconds[before, pair[0]]
        processes = []
        for name, log in zip(pair, logs, strict=True):
            with log.open("wb") as opened:
                processes.append(Forked(self.commands[name], folder, opened.fileno(), {}))
            if len(processes) == 1:
                time.sleep(offset * chance.choice([0, 1]))
        codes, texts = tuple(process.wait() for process in processes), [log.read_text() for log in logs]
        for code, text in zip(codes, texts, strict=True):
            check_words(code, text)
        found = snapshot(folder)
        allowed = [state for order, state in orders if order == codes]
        for index, (order, state) in enumerate(alone):
            allowed += [state] if codes[1 - index] == 2 and codes[index] == order[0] else []
        if codes == (2, 2):
            allowed = [self.one_after_another(before)[1]] if any(order == (2,) for order, _ in alone) else []
        what = f"{pair[0]} and {pair[1]}" + (f" after {before}" if before else "")
        if not any(not difference(found, state) for state in allowed):
            wrong = [difference(found, state) for state in allowed]
            printed = "\n---\n".join(texts)[-3000:]
            raise Fault(f"{what}: exit codes {codes}, as no order of them leaves it: {wrong}\n{printed}")
        if left := leftovers(folder):
            raise Fault(f"left behind: {left}")
        self.counts["both ended" if codes == (0, 0) else "one refused" if 0 in codes else "both refused"] += 1
        return what

    def try_disk(self, chance: random.Random) -> str:
        before, name = self.key = chance.choice([entry for entry in KILLED if entry[1] != "study"])
        _, expected = self.one_after_another(before, name)
        source = self.folder(before)
        former = snapshot(source)
        used = sum(path.stat().st_size + 4096 for path in source.rglob("*") if path.is_file()) + 65536
        size = used + chance.randrange(1 << chance.randrange(12, 22))
        fill = chance.random() < 0.5
        folder, limit = source.with_name("disk"), None
        folder.mkdir(exist_ok=True)
        mounted = mount(folder, size + (fill << 22))
        shutil.rmtree(folder / "w", ignore_errors=True)
        shutil.copytree(source, folder / "w")
        folder = folder / "w"
        if not mounted:  # no file may grow beyond a limit then
            limit = 8192 + chance.randrange(1 << chance.randrange(9, 17))  # what is printed has room
        try:
            process, log = start(self.commands[name], folder, size_limit=limit)
            if fill and mounted:  # by somebody else, while the command runs
                process.wait(until=process.began + chance.random() * self.seconds[self.key])
                fill_up(folder.parent / "filler")
            code, text = process.wait(), log.read_text(errors="replace")
            (folder.parent / "filler").unlink(missing_ok=True)
            if mounted:
                subprocess.run(["mount", "-o", "remount,size=64m", str(folder.parent)], check=True)
            check_words(code, text)
            if code not in (0, 2):
                raise Fault(f"exit code {code}")
            self.counts["full disks" if code else "disks with room"] += 1
            check_state(folder, former, expected)
            if code:
                self.go_on(name, folder, expected)
        finally:
            if mounted:
                subprocess.run(["umount", str(folder.parent)], check=True)
        return f"{name} after {before}" if before else name

    def trial(self, kind: str, number: int) -> dict:
        """Draw and do one trial; returns what is logged."""
        chance, began = random.Random(f"{self.seed} {kind} {number}"), time.monotonic()
        line = {"trial": f"{kind}-{number}", "seed": self.seed}
        counts = Counter(self.counts)
        try:
            line["what"] = getattr(self, f"try_{kind}")(chance)
        except (Fault, UserError) as fault:
            line |= {"what": str(getattr(self, "key", "")), "fault": str(fault)}
        line["counts"] = {key: value - counts[key] for key, value in self.counts.items() if value != counts[key]}
        return line | {"seconds": round(time.monotonic() - began, 2)}


def mount(folder: Path, size: int) -> bool:
    """Put a file system of ``size`` bytes on a folder; False where this may not be done."""
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        return subprocess.run(options, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def fill_up(path: Path) -> None:
    """Take all the room that is left."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))


def main() -> int:
    """Do the trials and print the figures; the exit code is the number of faults, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in ("kills", "pairs", "disk"):
        parser.add_argument(f"--{kind}", type=int, default=0, help="number of trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="trials such as kill-17, pair-3 or disk-0")
    parser.add_argument("--log", type=Path, help="JSON lines of the trials; those that it holds are not tried again")
    flags = parser.parse_args()
    counts = {"kill": flags.kills, "pair": flags.pairs, "disk": flags.disk}
    trials = [(number / count, kind, number) for kind, count in counts.items() for number in range(count)]
    trials = [(kind, number) for _, kind, number in sorted(trials)]
    if flags.only:
        trials = [(kind, int(n)) for kind, _, n in (name.partition("-") for name in flags.only)]
    lines = []
    if flags.log and flags.log.exists():
        lines = [json.loads(line) for line in flags.log.read_text().splitlines()]
        lines = [line for line in lines if line["seed"] == flags.seed]
    done, began = {line["trial"] for line in lines}, time.monotonic()
    gc.collect()
    gc.freeze()
    runner.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": start_forked})
    faulthandler.register(signal.SIGUSR1, file=STACKS, chain=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as work:
        stress = Stress(Path(work).resolve(), flags.seed)
        for kind, number in trials:
            if f"{kind}-{number}" in done:
                continue
            line = stress.trial(kind, number)
            lines.append(line)
            if flags.log:
                with flags.log.open("a") as log:
                    log.write(json.dumps(line) + "\n")
            if "fault" in line:
                print(f"FAULT {line['trial']} (seed {flags.seed}) {line['what']}: {line['fault']}", flush=True)
    for kind in ("kill", "pair", "disk"):
        own = [line for line in lines if line["trial"].startswith(kind)]
        counts = sum((Counter(line["counts"]) for line in own), Counter())
        faults = sum("fault" in line for line in own)
        words = ", ".join(f"{value} {key}" for key, value in sorted(counts.items()))
        if own:
            print(f"{kind}: {len(own)} trials, seed {flags.seed}, {faults} faults; {words}")
    print(f"{time.monotonic() - began:.0f} s")
    return int(any("fault" in line for line in lines))


if __name__ == "__main__":
    import threading

    import tqdm

    tqdm.tqdm.monitor_interval = 0  # no thread that watches the bars
    # tqdm's own lock is shared by all forks: after a kill of its holder every later command would wait for ever.
    tqdm.tqdm.set_lock(threading.RLock())

    # Everything that a command imports when it is called.
    import matplotlib.pyplot  # noqa: F401

    import mtl_lora.export.importers
    import mtl_lora.export.merge
    import mtl_lora.language.evaluate
    import mtl_lora.language.train
    import mtl_lora.report.__main__  # noqa: F401
    from mtl_lora import artifacts, cli
    from mtl_lora.adapter.checkpoint import read_config, read_weights
    from mtl_lora.errors import UserError
    from mtl_lora.language.prepare.textclass import TASKS_FILE
    from mtl_lora.language.tasks import TaskSet
    from mtl_lora.study import runner

    sys.exit(main())
