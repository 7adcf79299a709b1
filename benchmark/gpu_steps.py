"""The steps of gpu_report.py, one function each: it takes an order and a writer, and writes a table and its numbers."""

import dataclasses
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import evaluate as answers
import torch
from gpu_step import Sizes, compare_sides, linear_weights, matrix_peak, random_batch, random_llama, several, side_table
from measure import PROJECT, clock, markdown_table, ratio_table, rounds
from measure import compared as ratios_of
from pipelines import pipeline

from mtl_lora import artifacts, files
from mtl_lora.errors import UserError

SIDES = ["frozen", "lora", "mtl_lora", "lora_compiled", "mtl_lora_compiled", "mtl_lora_512_tasks", "peft", "original"]
METHODS = ("mtl_lora", "lora")
RATE = "2e-3"  # the learning rate of both methods
LENGTHS = (105, 256)  # the mean of the commonsense examples, and the paper's cutoff
Writer = Callable[[str, dict], None]


@dataclasses.dataclass
class Order:
    """Settings of a step: where to write, the data folder, the base model, when to end, whether sizes are tiny."""

    out: Path
    data: Path
    base_model: str
    until: float  # seconds since the epoch
    dry: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def sizes(self) -> Sizes:
        return Sizes(layers=2, width=64, heads=4, vocabulary=128, dtype="fp32") if self.dry else Sizes()

    @property
    def batch_size(self) -> int:
        return 2 if self.dry else 64

    @property
    def lengths(self) -> tuple[int, ...]:
        return (12, 16) if self.dry else LENGTHS


# ---- 1: the step of a large model ----


def step(order: Order, write: Writer) -> None:
    """Measure tokens a second, share of the card's peak and memory of every side, and the peaks of the card itself."""
    sizes, device = order.sizes, order.device
    peak = matrix_peak(256 if order.dry else 8192, sizes.torch_dtype, device)
    record = {"matrix_flops": peak, "bytes_a_second": memory_bandwidth(2**20 if order.dry else 2**32, device)}
    base, texts = random_llama(sizes, device), []
    for length in order.lengths:
        batch = random_batch(8, length, sizes.vocabulary, device)
        count = {"steps": 1, "rounds": 1} if order.dry else {"steps": 3, "rounds": 4}
        measured = compare_sides(base, SIDES, batch, **count)
        table, sides = side_table(measured, length, linear_weights(base), peak)
        texts.append(f"8 rows of {length} tokens:\n\n{table}")
        record[f"length_{length}"] = {"sides": sides, **count}
        head = (
            f"Matrix peak {peak / 1e12:.4g} TFLOP/s ({sizes.dtype}), memory {record['bytes_a_second'] / 1e12:.3g} "
            f"TB/s. {linear_weights(base):,} random weights in frozen linear layers; forward and backward."
        )
        write("\n\n".join([head, *texts]), record)


def memory_bandwidth(size: int, device: torch.device) -> float:
    """Return bytes a second, read and written, of a copy within the device's memory: the best of 10."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(10):
        start = clock()
        target.copy_(source)
        best = max(best, 2 * size / (clock() - start))
    return best


# ---- 2: where its time goes ----

_KINDS = {  # a kernel's kind is the first whose parts its name contains
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "gemv", "splitk", "sm90_", "mm"),
    "dropout": ("dropout",),
    "indexing": ("index", "gather", "scatter", "embedding", "sort", "scan", "histogram"),
    "casts and copies": ("copy", "memcpy", "memset", "cat", "fill"),
    "reductions": ("reduce", "softmax", "norm"),
    "elementwise": ("elementwise", "unrolled", "foreach"),
}


def profile(order: Order, write: Writer) -> None:
    """Measure milliseconds of kernels by kind in a step of the frozen model, LoRA and MTL-LoRA; compile a block."""
    sizes, device, record, lines = order.sizes, order.device, {}, []
    base = random_llama(sizes, device)
    text = ""
    for length in order.lengths:
        batch = random_batch(8, length, sizes.vocabulary, device)
        for name in ("frozen", "lora", "mtl_lora"):
            found = profiled(pipeline(name, base), batch)
            record[f"{name}_{length}"] = found
            wall, kinds = found["wall_ms"], found["kinds"]
            busy = sum(kinds.values())
            lines.append(
                [f"{name}, {length} tokens", f"{wall:.1f}", f"{busy:.1f}", f"{max(0, 1 - busy / wall):.0%}"]
                + [f"{kinds.get(kind, 0):.1f}" for kind in [*_KINDS, "other"]]
                + [f"{found['kernels']:.0f}"]
            )
        header = ["ms of a step", "wall", "kernels", "idle", *_KINDS, "other", "number of kernels"]
        text = markdown_table(header, lines)
        write(text, record)
    largest = record[f"mtl_lora_{order.lengths[0]}"]["largest"]
    text += "\n\nLargest kernels of MTL-LoRA, ms of a step and calls:\n\n"
    text += markdown_table(["kernel", "ms", "calls"], [[n[:90], f"{ms:.2f}", f"{c:.0f}"] for n, ms, c in largest[:15]])
    write(text, record)
    del base
    text, record["compiled"] = text + "\n\n", compiled_block(order)
    text += f"One block, compiled or not, 8 rows of {order.lengths[-1]} tokens:\n\n" + ratio_table(record["compiled"])
    write(text, record)


def profiled(side, batch: dict) -> dict:
    """Return wall time and kernels of one step, by kind and by name, in ms."""
    (batch,) = side.batches({"sorted": [batch]})
    for _ in range(3):
        side.step(batch)
    start = clock()
    for _ in range(5):
        side.step(batch)
    wall = (clock() - start) / 5
    on_gpu, steps = torch.cuda.is_available(), 2
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(steps):
            side.step(batch)
        clock()
    by_name: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profiler.key_averages():
        time_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if time_us and (not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA):
            by_name[event.key][0] += time_us / 1000 / steps
            by_name[event.key][1] += event.count / steps
    kinds: dict[str, float] = defaultdict(float)
    for name, (ms, _) in by_name.items():
        kinds[kind_of(name)] += ms
    largest = sorted(([name, ms, calls] for name, (ms, calls) in by_name.items()), key=lambda one: -one[1])
    kernels = sum(calls for _, calls in by_name.values())
    return {"wall_ms": wall * 1000, "kinds": dict(kinds), "kernels": kernels, "largest": largest[:60]}


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel from its name."""
    low = kernel.lower()
    return next((kind for kind, parts in _KINDS.items() if any(part in low for part in parts)), "other")


def compiled_block(order: Order) -> dict:
    """Return the speed ratios of a model of one block: compiled or eager, frozen or with MTL-LoRA."""
    sizes = dataclasses.replace(order.sizes, layers=1)
    base = random_llama(sizes, order.device)
    batch, sides = random_batch(8, order.lengths[-1], sizes.vocabulary, order.device), {}
    for name in ("frozen", "mtl_lora"):
        for how in ("eager", "compiled"):
            side = pipeline(name, base)
            if how == "compiled":
                side.model.model.layers[0].compile(backend="eager" if order.dry else "inductor")
            sides[f"{name}, {how}"] = partial(several, side, batch, 1 if order.dry else 10)
            sides[f"{name}, {how}"]()
    return ratios_of(rounds(sides, 1 if order.dry else 5))


# ---- 3: training and its scores ----


def train(order: Order, write: Writer) -> None:
    """Train both methods on all examples for as many steps as the time allows, and score the eight test sets."""
    steps, record = 2, {}
    if not order.dry:
        probe, started = 40, time.time()
        run(train_command("mtl_lora", order, "--max_steps", probe, folder="probe"))
        log = log_lines(order.out / "probe")
        rate = next(line["train_steps_per_second"] for line in log if "train_steps_per_second" in line)
        record["start_up_s"] = time.time() - started - probe / rate
        # The first steps of a process are slow, so the rate is a low estimate; scoring takes about 45 s per method.
        seconds = (order.until - time.time()) / 2 - record["start_up_s"] - 45
        steps = max(50, int(seconds * rate))
    record |= {"steps": steps, "examples_a_step": order.batch_size}
    text = f"{order.base_model}, {steps} steps of {order.batch_size} examples, learning rate {RATE}, the same for both."
    for method in METHODS:
        started = time.time()
        run(train_command(method, order, "--max_steps", steps))
        trained = time.time()
        command = ["evaluate", "--checkpoint", order.out / method, "--data_dir", test_folder(order.data)]
        command += ["--output_dir", order.out / f"score_{method}", "--mode", "score", "--overwrite"]
        run(module(*command, *(["--limit", "2"] if order.dry else [])))
        log = log_lines(order.out / method)
        last = [line for line in log if "loss" in line][-1:]
        record[method] = {
            "train_s": trained - started,
            "score_s": time.time() - trained,
            "log": log,
            "last_loss": last[0]["loss"] if last else None,
        }
        text += f"\n{method}: trained in {trained - started:.0f} s, scored in {time.time() - trained:.0f} s."
        write(text, record)
    scores = [order.out / f"score_{method}" for method in METHODS]
    text += "\n\n" + run(module("report", "table", *reversed(scores), "--difference"))
    text += "\n\n" + run(module("report", "compare", *reversed(scores)))
    write(text, record)


def train_command(method: str, order: Order, *more, folder: str | None = None) -> list[str]:
    """Return the command that trains a method into ``folder`` (default: its name); all other settings are the same."""
    settings = {
        "base_model": order.base_model,
        "data_path": training_file(order.data),
        "cache_dir": order.out / "cache",
        "output_dir": order.out / (folder or method),
        "adapter_name": method,
        "batch_size": order.batch_size,
        "learning_rate": RATE,
        "warmup_ratio": 0.05,
        "save_step": 0,
        "logging_steps": 1 if order.dry else 20,
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", value)]
    return module("train", *flags, "--overwrite_output_dir", *more)


def module(*arguments) -> list[str]:
    """Return an ``mtl-lora`` command for this interpreter."""
    return [sys.executable, "-m", "mtl_lora", *map(str, arguments)]


def run(command: list[str]) -> str:
    """Run a command and return what it printed; raises ``UserError`` with its last line if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    print("$", " ".join(command), done.stdout[-2000:], done.stderr[-4000:], sep="\n", flush=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise UserError(f"`{' '.join(command[1:5])} ...` failed: {last}")
    return done.stdout.strip()


def log_lines(folder: Path) -> list[dict]:
    """Return the lines of a training's log."""
    return [json.loads(line) for line in files.read_lines(folder / artifacts.TRAIN_LOG)]


def training_file(data: Path) -> Path:
    """Return the file of training examples in a data folder; raises ``UserError`` if there is none."""
    for name in ("commonsense_170k_taskid.json", "train.json"):
        if (data / name).is_file():
            return data / name
    raise UserError(f"{data} holds no commonsense_170k_taskid.json; make it with data/commonsense/prepare.py")


def test_folder(data: Path) -> Path:
    """Return the folder of the test sets in a data folder."""
    return data / "test" if (data / "test").is_dir() else data / "data/commonsense/test"


# ---- 4: answers ----


def evaluate(order: Order, write: Writer) -> None:
    """Measure questions a second by batch size, for both protocols, against one question at a time without a cache."""
    evaluator, asked = answers.prepared(order.out / "mtl_lora", test_folder(order.data), "auto")
    many, few = answers.sample(asked, 1 if order.dry else 256), answers.sample(asked, 1)
    sides = {"one at a time, no cache": partial(answers.baseline, evaluator, few)}
    for size in ("auto", 2) if order.dry else ("auto", 32, 128, 512):
        for protocol in ("generate", "score"):
            sides[f"{protocol}, batch {size}"] = partial(answers_in, evaluator, many, protocol, size)
    first, rates, lines = next(iter(sides)), {}, []
    for name, side in sides.items():
        if name != first:
            side()  # one-time set-up for these shapes is not measured
        start = clock()
        rates[name] = side() / (clock() - start)
        lines.append([name, f"{rates[name]:.1f}", f"{rates[name] / rates[first]:.1f}"])
        text = markdown_table(["evaluation", "questions/s", "ratio"], lines)
        text += f"\n\n{len(many)} questions of {len(evaluator.tasks)} tasks, once; the first line {len(few)}."
        write(text, {"questions/s": rates})


def answers_in(evaluator, questions: list, protocol: str, size: int | str) -> int:
    """Answer the questions in batches of ``size``."""
    evaluator.config.batch_size = size
    return answers.ours(evaluator, questions, protocol)
