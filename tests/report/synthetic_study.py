"""A made-up study in the format that the figures and the page read. Every number is drawn, none was measured."""

import json
from pathlib import Path

import numpy as np

TASKS = {"cr": "CR", "mr": "MR", "sst5": "SST-5", "subj": "Subj", "trec": "TREC", "agnews": "AG News"}
METHODS = {"LoRA": "lora", "DoRA": "dora", "MultiLoRA": "multilora", "MoELoRA": "moelora", "MTL-LoRA": "mtl_lora"}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
SEEDS = (0, 1, 2)
STEPS = range(10, 401, 10)


def write_study(
    folder: Path, seeds=SEEDS, blocks: int = 30, transfer: bool = True, tasks: dict = TASKS, methods: dict = METHODS
) -> Path:
    """Write ``study.json`` with its runs' logs and analyses, and return the folder."""
    random = np.random.default_rng(7)
    experiments = [_experiment(folder, random, "SmolLM2-135M <base> & no adapter", None, (None,), blocks, tasks)]
    experiments += [_experiment(folder, random, name, method, seeds, blocks, tasks) for name, method in methods.items()]
    for experiment in experiments[2:]:
        experiment["against"] = {"baseline": "LoRA", **_differences(random, tasks)}
    rows = [(f"rank {rank}", name) for rank in (8, 4, 2) for name in ("LoRA", "MTL-LoRA")]
    study = {
        "schema": 1,
        "kind": "study",
        "name": "synthetic",
        "about": "Made-up numbers: a test of pictures and pages, measured on nothing.",
        "notes": ["Synthetic numbers.", "A note with <b>markup</b> & an ampersand, which must be shown as it is."],
        "base_model": "smollm2-135m",
        "task_set": {"tasks": [{"name": name, "id": i, "title": t} for i, (name, t) in enumerate(tasks.items())]},
        "grid": {"name": "synthetic", "seeds": list(seeds), "train": {"batch_size": 16, "max_steps": 400}},
        "grid_sha256": "a" * 64,
        "search": {
            "flag": "learning_rate",
            "experiments": [
                {
                    "name": name,
                    "chosen": 0.002,
                    "candidates": [{"value": 0.001, "dev": 0.5}, {"value": 0.002, "dev": 0.6}],
                }
                for name in methods
            ],
        },
        "commit": "0" * 40,
        "versions": {"mtl_lora": "0.0.0", "torch": "0.0"},
        "device": "none",
        "experiments": experiments,
        "transfer": [
            {"group": group, "method": METHODS[name], "experiment": name, **_differences(random, tasks)}
            for group, name in rows
        ]
        if transfer
        else None,
    }
    (folder / "study.json").write_text(json.dumps(study, indent=1))
    return folder


def _experiment(folder: Path, random, name: str, method: str | None, seeds, blocks: int, tasks: dict) -> dict:
    level = 0.55 if method is None else 0.70 + 0.02 * list(METHODS.values()).index(method)
    runs = [_run(folder, random, method, seed, level, blocks, tasks) for seed in seeds]
    return {
        "name": name,
        "method": method,
        "trainable": None if method is None else {"adapter": 1_843_200 + 1000 * len(name), "total": 136_358_208},
        "rank": None if method is None else 8,
        "learning_rate": None if method is None else 0.002,
        "group": "main",
        "trained_on": None if method is None else list(tasks),
        "runs": runs,
        "summary": {
            "tasks": {task: _summary([run["tasks"][task]["accuracy"] for run in runs]) for task in tasks},
            "average": _summary([run["average"] for run in runs]),
        },
        "against": None,
    }


def _run(folder: Path, random, method: str | None, seed: int | None, level: float, blocks: int, tasks: dict) -> dict:
    drawn = [level + 0.05 * i - 0.1 + random.normal(0, 0.015) for i in range(len(tasks))]
    accuracies = dict(zip(tasks, np.clip(drawn, 0, 1).tolist(), strict=True))
    place = f"runs/{method or 'base'}/seed{seed}"
    run = {
        "seed": seed,
        "folder": place,
        "results": f"{place}/results.json",
        "analysis": None,
        "log": None,
        "commands": [f"python finetune.py --adapter_name {method} --seed {seed}", "python commonsense_evaluate.py"],
        "commit": "0" * 40,
        "seconds": {"train": 312.5, "evaluate": 41.0},
        "train_commit": "1" * 40 if method else None,
        "train_data_sha256": "b" * 64 if method else None,
        "test_data_sha256": {task: f"{i:064x}" for i, task in enumerate(tasks)},
        "adapter_sha256": "c" * 64 if method else None,
        "steps": max(STEPS) if method else None,
        "tasks": {
            task: {"accuracy": value, "stderr": 0.02, "n": 400, "majority": 0.3 + 0.04 * (i % 4)}
            for i, (task, value) in enumerate(accuracies.items())
        },
        "average": float(np.mean(list(accuracies.values()))),
    }
    if method:
        (folder / place).mkdir(parents=True, exist_ok=True)
        run["log"] = f"{place}/train_log.jsonl"
        (folder / run["log"]).write_text(log_text(random, level, tasks))
        run["analysis"] = f"{place}/adapter_analysis.json"
        (folder / run["analysis"]).write_text(json.dumps(analysis(random, method, tasks, blocks)))
    return run


def log_text(random, level: float, tasks: dict = TASKS) -> str:
    """Losses that fall from about 3, with noise, in lines as a training writes them."""
    lines = []
    for step in STEPS:
        losses = {
            f"loss/{task}": 0.2 + (1 - level) + 2.5 * np.exp(-step / (40 + 15 * i)) + abs(random.normal(0, 0.08))
            for i, task in enumerate(tasks)
        }
        entry = {"step": step, "loss": float(np.mean(list(losses.values()))), "grad_norm": 1.0, "epoch": step / 300}
        lines.append(json.dumps(entry | {key: float(value) for key, value in losses.items()}))
    return "".join(f"{line}\n" for line in [*lines, json.dumps({"step": max(STEPS), "train_runtime": 1.0})])


def analysis(random, method: str, tasks: dict = TASKS, blocks: int = 30) -> dict:
    """What ``mtl_lora.adapter.analysis`` writes, of no adapter."""
    layers = [f"model.layers.{block}.self_attn.{module}" for block in range(blocks) for module in MODULES]
    own = method in ("moelora", "mtl_lora")
    parts = 8 if method == "moelora" else 3
    mixture = {layer: _softmax(random.normal(0, 1, (len(tasks), parts))).tolist() for layer in layers}
    lambdas = method == "mtl_lora"
    return {
        "schema": 1,
        "kind": "adapter_analysis",
        "method": method,
        "tasks": list(tasks),
        "adapter_sha256": "c" * 64,
        "layers": layers,
        "mixture": mixture if own else None,
        "lambda_similarity": _similarity(random, tasks, 0.95) if lambdas else None,
        "lambda_minus_identity_similarity": _similarity(random, tasks, 0.1) if lambdas else None,
        "update_similarity": _similarity(random, tasks, 0.6) if own else None,
        "update_similarity_by_module": {m: _similarity(random, tasks, 0.5) for m in MODULES} if own else None,
        "notes": [],
    }


def _similarity(random, tasks: dict, level: float) -> list:
    noise = random.normal(0, 0.15 * (1 - abs(level)) + 0.05, (len(tasks), len(tasks)))
    matrix = np.clip(level + (noise + noise.T) / 2, -1, 1)
    np.fill_diagonal(matrix, 1.0)
    return matrix.tolist()


def _softmax(logits):
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def _summary(values: list[float]) -> dict:
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "sd": None, "low": None, "high": None}
    sd = float(np.std(values, ddof=1))
    half = 4.303 * sd / len(values) ** 0.5  # the t quantile of three seeds
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def _differences(random, tasks: dict) -> dict:
    def one() -> dict:
        difference = float(random.normal(0.01, 0.03))
        return {"difference": difference, "low": difference - 0.02, "high": difference + 0.025}

    return {"tasks": {task: one() for task in tasks}, "average": one()}
