"""Shared by all benchmarks: interleaved rounds, median and spread, ratios, flags, and where results are kept."""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from mtl_lora.errors import EXIT_CODE
from mtl_lora.text_table import TextTable
from mtl_lora.version import checkout_commit

PROJECT = Path(__file__).resolve().parent.parent
_RESAMPLES = 10_000


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows the script's docstring as written, and every flag with its default."""


class Parser(argparse.ArgumentParser):
    """The command line of a benchmark: a wrong flag gives one sentence and exit code 2, without the usage text."""

    def error(self, message: str):
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(EXIT_CODE)

    def add_flag(self, name: str, text: str, **options) -> None:
        """Add ``--name`` with the help ``text``; its words may be joined with ``_`` or ``-``."""
        self.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), help=text, **options)


def parser(about: str) -> Parser:
    """Return a command line with ``--results``; ``about`` is the script's docstring."""
    made = Parser(description=about, formatter_class=_Help)
    made.add_flag(
        "results",
        "folder for the table and the JSON line, relative to the project; none: only print them",
        default="benchmark/results",
    )
    return made


def count(text: str) -> int:
    """Parse a whole number from 1; the type of a flag."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"it must be a whole number from 1, not {text!r}")
    return int(text)


def counts(text: str) -> list[int]:
    """Parse ``2,8`` into [2, 8]; the type of a flag."""
    return [count(part) for part in text.split(",")]


def fractions(text: str) -> list[float]:
    """Parse ``0,0.05`` into [0.0, 0.05]; the type of a flag."""
    return [float(part) for part in text.split(",")]


def turns(sides: dict[str, Sequence[Callable[[], float]]], times: int) -> dict[str, list[float]]:
    """Return the rates (work per second) of each side in ``times`` rounds, after one warm-up round.

    A side is a list of pieces of work; all sides have the same number of pieces. A piece returns the amount of work it
    did, in units that all sides share. In a round the sides take turns piece by piece, so a machine whose speed drifts
    slows all sides alike.
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    gc.freeze()  # the collector then skips the models and data that exist before the pieces run
    try:
        for number in range(times + 1):
            done, seconds = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0.0)
            for index, pieces in enumerate(zip(*sides.values(), strict=True)):
                order = list(zip(sides, pieces, strict=True))
                for name, work in order if (number + index) % 2 else reversed(order):
                    gc.collect()
                    start = clock()
                    done[name] += work()
                    seconds[name] += clock() - start
            if number:
                for name in sides:
                    rates[name].append(done[name] / seconds[name])
    finally:
        gc.unfreeze()
    return rates


def rounds(sides: dict[str, Callable[[], float]], times: int) -> dict[str, list[float]]:
    """Return ``turns`` of sides that have one piece of work each."""
    return turns({name: [side] for name, side in sides.items()}, times)


def clock() -> float:
    """Return the time in seconds, after the GPU, if there is one, has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def spread(values: list[float]) -> dict:
    """Return the median, smallest and largest of a list of rates."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def interval(values: list[float]) -> list[float]:
    """Return the 95 % interval of the median: percentile bootstrap over the rounds, with a fixed seed.

    With few rounds it is too narrow, because it never goes beyond the smallest and largest round.
    """
    drawn = np.random.default_rng(0).choice(values, (_RESAMPLES, len(values)))
    return np.quantile(np.median(drawn, axis=1), [0.025, 0.975]).tolist()


def ratio(ours: list[float], theirs: list[float]) -> dict:
    """Return ours / theirs, round by round, so that both were measured under the same load."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {**spread(ratios), "interval": interval(ratios)}


def compared(rates: dict[str, list[float]]) -> dict[str, dict[str, dict]]:
    """Return the ratio of each side to each side: ``compared(rates)[ours][theirs]``."""
    return {ours: {theirs: ratio(rates[ours], rates[theirs]) for theirs in rates} for ours in rates}


def ratio_table(ratios: dict[str, dict[str, dict]]) -> str:
    """Return a table with a line for each pair of sides, the later over the earlier: median, interval, smallest to
    largest round."""
    names = list(ratios)
    lines = [
        [f"{ours} / {theirs}", *shown_ratio(ratios[ours][theirs])]
        for index, ours in enumerate(names)
        for theirs in names[:index]
    ]
    return markdown_table(["ratio", "median", "95 % interval", "rounds"], lines)


def shown_ratio(value: dict) -> list[str]:
    """Format a ratio: median, interval, smallest to largest."""
    low, high = value["interval"]
    return [f"{value['median']:.3f}", f"{low:.3f} to {high:.3f}", f"{value['low']:.3f} to {value['high']:.3f}"]


def shown(value: dict, digits: int = 2) -> str:
    """Format ``median (low to high)``."""
    return f"{value['median']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"


def facts() -> dict:
    """Return the command, versions and device that produced a result."""
    return {
        "command": shlex.join(["python", *(os.path.relpath(sys.argv[0]), *sys.argv[1:])]),
        "commit": checkout_commit("benchmark/results"),  # a change in earlier results does not affect measurements
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("transformers", "peft")},
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
    }


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    """Return a Markdown table, with the first column aligned left and the others right."""
    return TextTable("", header, lines).markdown()


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Return the processor's name (from /proc/cpuinfo on Linux) and the number of cores of this process."""
    cores = cpu_cores()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {cores} core{'s' if cores != 1 else ''}"


def keep(script: str, text: str, record: dict, arguments: argparse.Namespace) -> None:
    """Print a table and a JSON line, and append them to the script's files in the folder ``--results``."""
    name, given = Path(script).stem, vars(arguments)
    settings = {flag: value for flag, value in given.items() if flag not in ("results", "worker", "alone")}
    record = {"benchmark": name, **facts(), "settings": settings, **record}
    print(f"\n{text}\n")
    print(json.dumps(record))
    if arguments.results.lower() == "none":
        return
    results = PROJECT / arguments.results
    results.mkdir(parents=True, exist_ok=True)
    made_by = f"`{record['command']}`, commit {record['commit']}, {record['device']}, torch {record['torch']}"
    with (results / f"{name}.md").open("a") as file:
        file.write(f"{made_by}\n\n{text}\n\n")
    with (results / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
