"""How well the real training scales: samples a second by processes and threads, at the same global batch.

    python benchmark/scaling.py --data_path commonsense_170k_taskid.json

Every launch is a training with the code that finetune.py uses (`mtl_lora.language.train`: Trainer, DDP over gloo or
NCCL, gradients, clipping, AdamW) in fresh processes; launches take turns. The optimiser steps after the first are
timed. The efficiency is the speed-up over the first launch, divided by the ratio of cores used (on GPUs: cards).
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import compared, count, keep, markdown_table, parser, shown, shown_ratio, spread

from mtl_lora.base_model import BaseModel
from mtl_lora.errors import UserError, user_errors_to_exit_code
from mtl_lora.language.batches import training_rows
from mtl_lora.language.encode import Encoder
from mtl_lora.training.rows import row_columns
from mtl_lora.training.sampler import plan_epoch


def main() -> None:
    flags = parser(__doc__)
    flags.add_flag("launches", "processes x threads of each launch; the first is the reference", default="1x1,1x2,2x1")
    flags.add_flag("data_path", "training examples", default="data/quickstart/train.json")
    flags.add_flag("base_model", "name or folder of a causal language model", default="smollm2-135m")
    flags.add_flag("adapter_name", "method, as of finetune.py", default="mtl_lora")
    flags.add_flag("batch_size", "rows per optimiser step, over all processes", type=count, default=8)
    flags.add_flag("dtype", "of the base model", default="auto")
    flags.add_flag("deepspeed", "configuration, such as config/zero2.json; empty: DDP", default="")
    flags.add_flag("cache_dir", "folder for tokenised data", default=".cache/rows")
    flags.add_flag("steps", "timed optimiser steps of a launch, after one that is not timed", type=count, default=12)
    flags.add_flag("rounds", "times that each launch runs", type=count, default=3)
    flags.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.worker:
        work(Path(arguments.worker))
        return
    launches = {name: parse_launch(name, arguments.batch_size) for name in arguments.launches.split(",")}
    found: dict[str, list[dict]] = {name: [] for name in launches}
    for number in range(arguments.rounds):
        order = list(launches.items())
        for name, sizes in order if number % 2 == 0 else reversed(order):
            found[name].append(launch(*sizes, arguments))
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    report(launches, found, arguments)


def parse_launch(text: str, batch_size: int) -> tuple[int, int]:
    """Parse ``2x1`` into (2 processes, 1 thread each); raises ``UserError`` if the batch cannot be divided equally."""
    processes, _, threads = text.partition("x")
    if not (processes.isdecimal() and threads.isdecimal() and int(processes) and int(threads)):
        raise UserError(f"--launches must list processes x threads, such as 1x1,2x1, not {text!r}")
    if batch_size % int(processes):
        raise UserError(f"--batch_size {batch_size} cannot be divided by {processes} processes")
    return int(processes), int(threads)


def launch(processes: int, threads: int, arguments: argparse.Namespace) -> dict:
    """Train in fresh processes and return what the first of them measured."""
    names = ("data_path", "base_model", "adapter_name", "dtype", "cache_dir")
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        settings = {
            **{name: getattr(arguments, name) for name in names},
            "batch_size": arguments.batch_size // processes,
            "max_steps": arguments.steps + 1,
            "deepspeed": arguments.deepspeed or None,
            "output_dir": str(Path(folder) / "run"),
            "save_step": 0,
            "logging_steps": arguments.steps + 1,
        }
        job.write_text(json.dumps(settings))
        launcher = [sys.executable]
        if processes > 1 or arguments.deepspeed:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [*launcher, __file__, f"--worker={job}"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise UserError(f"a launch of {processes} processes failed: {done.stderr.strip()[-2000:]}")
        return json.loads(job.with_suffix(".found").read_text())


def work(job: Path) -> None:
    """Train as one process of a launch; the first process writes its measurements beside the job file."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from mtl_lora.language.config import TrainConfig
    from mtl_lora.training.distributed import destroy_process_group, prepare_process
    from mtl_lora.training.run import train as run

    times: list[float] = []

    def after_step(*_) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    register_optimizer_step_post_hook(after_step)
    config = TrainConfig(**json.loads(job.read_text()))
    prepare_process(config)
    run(config)
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    destroy_process_group()
    if rank:
        return
    if len(times) != config.max_steps:
        raise RuntimeError(f"{len(times)} optimiser steps were seen where {config.max_steps} were asked for")
    tokenizer, tasks = BaseModel(config.base_model).tokenizer(), config.task_set()
    encoder = Encoder(tokenizer, config.template, config.cutoff_len, tasks)
    facts = row_columns(training_rows(config.data_path, encoder, config.cache_dir))
    settings = facts["length"], facts["task_id"], config.batch_size * processes, config.seed
    plans = (plan_epoch(*settings, epoch) for epoch in itertools.count())
    steps = (rows for plan in plans for rows in plan if len(rows) >= processes)  # training leaves out smaller ones
    timed = [row for rows in itertools.islice(steps, 1, config.max_steps) for row in rows]
    seconds = times[-1] - times[0]
    found = {"samples/s": len(timed) / seconds, "tokens/s": float(facts["length"][timed].sum()) / seconds}
    job.with_suffix(".found").write_text(json.dumps({**found, "peak_bytes": peak_bytes()}))


def peak_bytes() -> int:
    """Return the peak memory of this process: on a GPU that of the card, otherwise resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def report(launches: dict[str, tuple[int, int]], found: dict[str, list[dict]], arguments: argparse.Namespace) -> None:
    """Print and keep the table: rates, and speed-up and efficiency relative to the first launch."""
    ratios = compared({name: [one["samples/s"] for one in runs] for name, runs in found.items()})
    units = {name: sizes[0] * (1 if torch.cuda.is_available() else sizes[1]) for name, sizes in launches.items()}
    first, lines, results = next(iter(launches)), [], {}
    for name, runs in found.items():
        one = {measure: spread([run[measure] for run in runs]) for measure in runs[0]}
        times = units[name] / units[first]
        results[name] = {**one, "ratios": ratios[name], "efficiency": ratios[name][first]["median"] / times}
        speed, limits, _ = shown_ratio(ratios[name][first])
        lines.append(
            [
                "{} x {}".format(*launches[name]),
                shown(one["samples/s"]),
                shown(one["tokens/s"], 0),
                f"{speed} ({limits})",
                f"{results[name]['efficiency']:.3f}",
                f"{one['peak_bytes']['median'] / 1e6:,.0f}",
            ]
        )
    header = ["processes x threads", "samples/s", "tokens/s", "speed-up (95 %)", "efficiency", "peak of a process, MB"]
    text = markdown_table(header, lines)
    text += (
        f"\n\n{arguments.adapter_name}, {arguments.base_model}, {arguments.steps} optimiser steps of "
        f"{arguments.batch_size} rows in all, {arguments.deepspeed or 'DDP'}; median (smallest to largest) of "
        f"{arguments.rounds} launches each."
    )
    keep(__file__, text, {"launches": results}, arguments)


if __name__ == "__main__":
    with user_errors_to_exit_code():
        main()
