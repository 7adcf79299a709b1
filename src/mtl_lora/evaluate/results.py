"""What ``results.json`` holds: figures, and everything needed to trace and repeat them."""

import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import torch
import transformers

from mtl_lora.adapter import checkpoint
from mtl_lora.evaluate.answers import average, summarise_task
from mtl_lora.model import resolve, weight_files
from mtl_lora.version import __version__

if TYPE_CHECKING:
    from mtl_lora.evaluate.run import Evaluation

RESULTS_NAME = "results.json"


def collect(evaluation: "Evaluation", found: dict[tuple[str, int], dict]) -> dict:
    """The content of ``results.json``, schema 1."""
    config, adapter = evaluation.config, evaluation.adapter
    by_task: dict[str, list[dict]] = {}
    for question in evaluation.questions:
        by_task.setdefault(question.task.name, []).append(found[question.key])
    tasks = {name: summarise_task(records) for name, records in by_task.items()}
    method = adapter.adapter_config.method if adapter else None
    return {
        "schema": 1,
        "name": config.name or method or evaluation.base_model,
        "method": method,
        "base_model": evaluation.base_model,
        "mode": config.mode,
        "trainable": _trainable(evaluation),
        "tasks": tasks,
        "average": average(tasks.values()),
        "task_set": evaluation.tasks.to_json(),
        "settings": evaluation.settings() | {"limit": config.limit, "batch_size": config.batch_size},
        "data": {name: evaluation.data_hashes[name] for name in tasks},
        "adapter": adapter.to_json() if adapter else None,
        "versions": {
            "mtl_lora": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": _device_name(),
        "commit": _commit(),
    }


def _trainable(evaluation: "Evaluation") -> dict | None:
    """Weights of adapter and whole model, counted from files; None for a base model alone."""
    if not evaluation.adapter:
        return None
    sizes = [_weights_in(path) for path in weight_files(resolve(evaluation.base_model))]
    adapter = _weights_in(Path(evaluation.config.checkpoint) / checkpoint.WEIGHTS_NAME)
    return {"adapter": adapter, "total": sum(sizes) + adapter}


def _weights_in(path: Path) -> int:
    with safetensors.safe_open(path, framework="pt") as opened:
        slices = [opened.get_slice(name) for name in opened.keys()]  # noqa: SIM118 - not a mapping
        return sum(torch.Size(part.get_shape()).numel() for part in slices)


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _commit() -> str | None:
    """The project's commit, when it runs from a git checkout; ``+changes`` if files differ from it."""
    here = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*here, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed.stdout.strip() else "")
