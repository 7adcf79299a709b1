"""What every benchmark shares: interleaved rounds, median and spread, ratios, and where results are kept."""

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mtl_lora.evaluate.results import checkout_commit

RESULTS = Path(__file__).parent / "results"


def rounds(sides: dict[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """Rates (work per second) of each side over ``count`` rounds, the sides taking turns; one round before is not kept.

    A side does its work and returns how much it did, in units that all sides share.
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(count + 1):
        order = list(sides.items())
        for name, side in order if number % 2 else reversed(order):
            start = time.perf_counter()
            work = side()
            if number:
                rates[name].append(work / (time.perf_counter() - start))
    return rates


def spread(values: list[float]) -> dict:
    """Median, smallest and largest of a list of rates."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(ours: list[float], theirs: list[float]) -> dict:
    """ours / theirs, round by round: what was measured under the same load is divided."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def facts() -> dict:
    """Where and by what a result was made."""
    return {
        "command": shlex.join(["python", *(os.path.relpath(sys.argv[0]), *sys.argv[1:])]),
        "commit": checkout_commit("benchmark/results"),  # earlier results change nothing that is measured
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
    }


def cpu_name() -> str:
    """The processor's name, as Linux gives it, and how many cores are ours."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {cores} cores"


def shown(value: dict, digits: int = 2) -> str:
    """``median (low to high)``."""
    return f"{value['median']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"


def keep(name: str, text: str, record: dict) -> None:
    """Print a table and append it, with a JSON line, to the files of this benchmark in ``results/``."""
    record = {"benchmark": name, **facts(), **record}
    print(f"\n{text}\n")
    print(json.dumps(record))
    RESULTS.mkdir(exist_ok=True)
    made_by = f"`{record['command']}`, commit {record['commit']}, {record['device']}, torch {record['torch']}"
    with (RESULTS / f"{name}.md").open("a") as file:
        file.write(f"{made_by}\n\n{text}\n\n")
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
