"""Measure MTL-LoRA on a GPU in at most eight minutes: speed of a step, where its time goes, training, answers.

    python benchmark/gpu_report.py OUT [--from N] [--to N] [--minutes M] [--data DIR] [--dry True]

``bash script/gpu_report.sh`` takes the same arguments. The steps run in this order, each in its own process, and write
as they go:
  1  step      a training step of LLaMA-2-7B's shape (gpu_step.py), at two lengths; the card's peaks
  2  profile   MTL-LoRA's step by kind of kernel; one block compiled
  3  train     smollm2-135m on all training examples in --data, with MTL-LoRA and LoRA, evaluated on the test sets
  4  evaluate  questions a second of both protocols (evaluate.py)
A run that is cut short keeps its results, and --from N starts at step N. OUT then holds step-N.md, step-N.json and
step-N.log, report.md (the tables) and results.tar.gz (everything except weights, below 16 MB).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import gpu_steps
import torch
from measure import PROJECT, count, facts, parser

from mtl_lora.errors import UserError, user_errors_to_exit_code

# Seconds that the steps take with an H200 and a slow processor; step 3 takes what the others leave.
SECONDS = {1: 200, 2: 80, 3: 230, 4: 90}
NAMES = {1: "step", 2: "profile", 3: "train", 4: "evaluate"}  # the functions of gpu_steps
_LARGEST = 16e6  # bytes of results.tar.gz


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("out", metavar="OUT", help="folder for the results")
    flags.add_argument("--from", dest="first", type=count, default=1, metavar="N", help="first step")
    flags.add_flag("to", "last step", type=count, default=4)
    flags.add_flag("minutes", "time limit of all steps together", type=count, default=8)
    flags.add_flag("data", "folder with commonsense_170k_taskid.json and test/<task>/test.json", default=None)
    flags.add_flag("base_model", "base model of steps 3 and 4", default="smollm2-135m")
    flags.add_flag(
        "dry",
        "True: every step in tiny sizes, also on a CPU, without a time limit",
        choices=["True", "False"],
        default="False",
    )
    flags.add_flag("only", argparse.SUPPRESS, type=count, default=None)  # the process of one step
    flags.add_flag("until", argparse.SUPPRESS, type=float, default=None)  # when it must have ended
    arguments = flags.parse_args()
    arguments.dry = arguments.dry == "True"
    if not 1 <= arguments.first <= arguments.to <= 4:
        raise UserError(f"--from and --to must be steps from 1 to 4, in order, not {arguments.first} to {arguments.to}")
    out = Path(arguments.out).resolve()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; pass a folder")
    out.mkdir(parents=True, exist_ok=True)
    if arguments.only:
        run_step(arguments.only, out, arguments)
        return
    if not torch.cuda.is_available() and not arguments.dry:
        raise UserError("the report needs a GPU and torch finds none; --dry True tries the steps on a CPU")
    run_all(out, arguments)


def run_all(out: Path, arguments: argparse.Namespace) -> None:
    """Run every step in its own process, and collect the results in report.md and results.tar.gz."""
    end = time.time() + (86_400 if arguments.dry else 60 * arguments.minutes)
    steps = range(arguments.first, arguments.to + 1)
    order = gpu_steps.Order(out, data_folder(arguments), arguments.base_model, end, arguments.dry)
    tokenising = None
    if 3 in steps:  # takes a minute of the CPU while the first steps use the GPU
        with (out / "tokenise.log").open("w") as log:
            command = gpu_steps.train_command("lora", order, "--check", "True")
            tokenising = subprocess.Popen(command, stdout=log, stderr=log, cwd=PROJECT)
    failed = []
    for number in steps:
        if number == 3:
            tokenising.wait()
        until = end - sum(SECONDS[step] for step in steps if step > number)
        print(f"step {number}, {NAMES[number]}: until {time.strftime('%H:%M:%S', time.localtime(until))}", flush=True)
        started = time.time()
        for suffix in ("md", "json"):  # results of an earlier run must not be taken for this one's
            (out / f"step-{number}.{suffix}").unlink(missing_ok=True)
        command = [sys.executable, __file__, str(out), "--only", str(number), "--until", str(until)]
        command += ["--data", str(order.data), "--base_model", arguments.base_model, "--dry", str(arguments.dry)]
        with (out / f"step-{number}.log").open("w") as log:
            code = run_with_limit(command, log, max(until - time.time(), 10) + 15)
        print(f"step {number}: {time.time() - started:.0f} s" + (f", exit code {code}" if code else ""), flush=True)
        failed += [number] * bool(code)
        write_report(out)
    print((out / "report.md").read_text())
    if failed:
        named = ", ".join(f"{number} ({out / f'step-{number}.log'})" for number in failed)
        raise UserError(f"step {named} did not finish; start again from it with --from {failed[0]}")


def run_with_limit(command: list[str], log, seconds: float) -> int:
    """Run a process and return its exit code; 124 if it was stopped, with its children, after ``seconds``."""
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=PROJECT, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        if process.poll() is None:  # the time is up, or this process was interrupted
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_step(number: int, out: Path, arguments: argparse.Namespace) -> None:
    """Run one step in this process and write its table and its numbers."""

    def write(text: str, record: dict) -> None:
        (out / f"step-{number}.md").write_text(text + "\n")
        (out / f"step-{number}.json").write_text(json.dumps({**facts(), **record}, indent=1) + "\n")

    order = gpu_steps.Order(out, data_folder(arguments), arguments.base_model, arguments.until, arguments.dry)
    getattr(gpu_steps, NAMES[number])(order, write)


def data_folder(arguments: argparse.Namespace) -> Path:
    """Return the folder of the training file and the test sets: --data, or else where prepare.py puts them."""
    if arguments.data:
        return Path(arguments.data).resolve()
    return PROJECT / "data/quickstart" if arguments.dry else PROJECT


def write_report(out: Path) -> None:
    """Write report.md from the steps' tables, and results.tar.gz."""
    parts = ["# GPU report"]
    for number, name in NAMES.items():
        parts.append(f"## {number}. {name}")
        path = out / f"step-{number}.md"
        parts.append(path.read_text().strip() if path.is_file() else "Not measured.")
    (out / "report.md").write_text("\n\n".join(parts) + "\n")
    with tarfile.open(out / "results.tar.gz", "w:gz") as archive:
        taken = 0
        for path in sorted(out.rglob("*"), key=lambda path: (path.suffix != ".md", path.suffix != ".json", path)):
            kept = path.suffix in (".md", ".json", ".jsonl", ".log", ".csv") and "cache" not in path.parts
            if path.is_file() and kept and taken + path.stat().st_size < _LARGEST:
                taken += path.stat().st_size
                archive.add(path, path.relative_to(out))


if __name__ == "__main__":
    with user_errors_to_exit_code():
        main()
