"""What ``results.json`` holds: figures, and everything needed to trace and repeat them."""

import platform
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import torch
import transformers

from mtl_lora.adapter import checkpoint
from mtl_lora.adapter.layer import layer_class
from mtl_lora.base_model import BaseModel
from mtl_lora.language.metrics import average, summarise_task
from mtl_lora.version import __version__, checkout_commit

if TYPE_CHECKING:
    from mtl_lora.language.evaluator import Evaluation


def collect(evaluation: "Evaluation", protocol: str, found: dict[tuple[str, int], dict]) -> dict:
    """The content of ``results.json``, schema 1."""
    config, adapter, peft = evaluation.config, evaluation.adapter, evaluation.peft
    by_task: dict[str, list[dict]] = {}
    for question in evaluation.questions:
        by_task.setdefault(question.task.name, []).append(found[question.key])
    tasks = {name: summarise_task(records) for name, records in by_task.items()}
    method = adapter.adapter_config.method if adapter else "peft_lora" if peft else None
    return {
        "schema": 1,
        "name": config.name or method or evaluation.base_model,
        "method": method,
        "method_title": layer_class(method).title if adapter else None,
        "base_model": evaluation.base_model,
        "mode": protocol,
        "trainable": _trainable(evaluation),
        "tasks": tasks,
        "average": average(tasks.values()),
        "task_set": evaluation.tasks.to_json(),
        "settings": evaluation.settings(protocol) | {"limit": config.limit, "batch_size": config.batch_size},
        "data": {name: evaluation.data_hashes[name] for name in tasks},
        "adapter": adapter.to_json() if adapter else peft.settings if peft else None,
        "versions": {
            "mtl_lora": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": _device_name(),
        "commit": checkout_commit(),
    }


def agreement(
    asked: Iterable[tuple[str, int]], first: dict[tuple[str, int], dict], second: dict[tuple[str, int], dict]
) -> dict:
    """How often two protocols give a question that was asked the same answer: a share by task and over all."""
    by_task: dict[str, list[bool]] = {}
    for key in asked:
        by_task.setdefault(key[0], []).append(first[key]["parsed"] == second[key]["parsed"])
    same = [value for values in by_task.values() for value in values]
    return {
        "tasks": {task: sum(values) / len(values) for task, values in by_task.items()},
        "all": sum(same) / len(same),
        "n": len(same),
    }


def _trainable(evaluation: "Evaluation") -> dict | None:
    """Weights of adapter and whole model, counted from files; None for a base model alone."""
    if evaluation.adapter_sha256 is None:
        return None
    sizes = [_weights_in(path) for path in BaseModel(evaluation.base_model).weight_files()]
    own = evaluation.peft.weights if evaluation.peft else Path(evaluation.config.checkpoint) / checkpoint.WEIGHTS_NAME
    adapter = _weights_in(own)
    return {"adapter": adapter, "total": sum(sizes) + adapter}


def _weights_in(path: Path) -> int:
    with safetensors.safe_open(path, framework="pt") as opened:
        slices = [opened.get_slice(name) for name in opened.keys()]  # noqa: SIM118 - not a mapping
        return sum(torch.Size(part.get_shape()).numel() for part in slices)


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
