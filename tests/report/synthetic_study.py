"""A made-up study on disk with its runs' logs and analyses. Every number is drawn, none was measured."""

import json
from pathlib import Path

import numpy as np

from mtl_lora import files
from mtl_lora.estimates import Difference, Estimate
from mtl_lora.report.load import (
    Candidate,
    Differences,
    Experiment,
    Run,
    Search,
    SearchOutcome,
    Study,
    Summary,
    Transfer,
)
from mtl_lora.results import TaskNames, TaskResult, Trainable

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
STEPS = range(10, 401, 10)


def write_study(folder: Path, tasks: dict, methods: dict, seeds=(0, 1), blocks: int = 2) -> Path:
    """Write ``study.json`` with its runs' logs and analyses, and return the folder. tasks, methods: name -> title.

    Of more than three tasks, the first three alone have scores and losses, for the sake of the tests' time.
    """
    random, scored = np.random.default_rng(7), dict(list(tasks.items())[:3])
    every = {None: "SmolLM2-135M <base> & no adapter", **methods}
    experiments = []
    for level, (method, name) in enumerate(every.items()):
        runs = [_run(folder, random, method, seed, level, blocks, tasks) for seed in (seeds if method else (None,))]
        values = {task: [run.tasks[task].value for run in runs] for task in scored}
        summary = Summary({task: Estimate.over_seeds(values[task]) for task in scored})
        average = Estimate.over_seeds([run.average for run in runs])
        experiments.append(
            Experiment(
                name=name,
                method=method,
                trainable=Trainable(1_843_200 + 1000 * len(name), 136_358_208) if method else None,
                adapters=int(method is not None),
                rank=8 if method else None,
                learning_rate=0.002 if method else None,
                runs=runs,
                summary=Summary(summary.tasks, average),
                against=Differences(baseline="LoRA", **_differences(random, scored)) if level > 1 else None,
            )
        )
    rows = [(f"rank {rank}", name) for rank in (8, 4, 2) for name in ("LoRA", "MTL-LoRA")]
    candidates = [Candidate(0.001, 0.5), Candidate(0.002, 0.6)]
    study = Study(
        name="synthetic",
        about="Made-up numbers, measured on nothing.",
        notes=["A note with <b>markup</b> & an ampersand, which must be shown as it is."],
        base_model="smollm2-135m",
        task_set=TaskNames.from_json(
            {"tasks": [{"name": n, "id": i, "title": t} for i, (n, t) in enumerate(tasks.items())]}
        ),
        grid={"name": "synthetic", "seeds": list(seeds), "train": {"batch_size": 16, "max_steps": 400}},
        grid_sha256="a" * 64,
        commits=["0" * 40],
        versions={"torch": "9.9"},
        experiments=experiments,
        transfer=[
            Transfer(group=group, method=name, experiment=name, alone="LoRA alone", **_differences(random, scored))
            for group, name in rows
        ],
        search=Search(
            flag="learning_rate", experiments=[SearchOutcome(n, candidates, 0.002) for n in methods.values()]
        ),
    )
    files.write_json(folder / "study.json", study.to_json())
    return folder


def _run(folder: Path, random, method: str | None, seed: int | None, level: int, blocks: int, tasks: dict) -> Run:
    scored, start = dict(list(tasks.items())[:3]), 0.55 + 0.1 * level
    values = [float(np.clip(start + 0.05 * index + random.normal(0, 0.015), 0, 1)) for index in range(len(scored))]
    results = {
        task: TaskResult("accuracy", value, 0.02, 400, 0.3 + 0.04 * index)
        for index, (task, value) in enumerate(zip(scored, values, strict=True))
    }
    place = f"runs/{method}/seed{seed}"
    if method:
        (folder / place).mkdir(parents=True)
        (folder / place / "train_log.jsonl").write_text(log_text(random, scored))
        (folder / place / "adapter_analysis.json").write_text(json.dumps(analysis(random, method, tasks, blocks)))
    return Run(
        seed=seed,
        folder=place,
        log=f"{place}/train_log.jsonl" if method else None,
        analysis=f"{place}/adapter_analysis.json" if method else None,
        commands=[f"mtl-lora train --adapter_name {method} --seed {seed}", "mtl-lora evaluate"],
        train_commit="1" * 40 if method else None,
        train_data_sha256="b" * 64 if method else None,
        tasks=results,
        average=sum(values) / len(values),
    )


def log_text(random, tasks: dict) -> str:
    """Losses that fall from about 3, with noise, in lines as a training writes them."""
    lines = []
    for step in STEPS:
        losses = {f"loss/{task}": 0.4 + 2.5 * np.exp(-step / 60) + abs(random.normal(0, 0.08)) for task in tasks}
        entry = {"step": step, "loss": float(np.mean(list(losses.values()))), "grad_norm": 1.0, "epoch": step / 300}
        lines.append(json.dumps(entry | {key: float(value) for key, value in losses.items()}))
    return "".join(f"{line}\n" for line in [*lines, json.dumps({"step": max(STEPS), "train_runtime": 1.0})])


def analysis(random, method: str, tasks: dict, blocks: int = 2) -> dict:
    """What ``mtl_lora.adapter.analysis`` writes, of no adapter."""
    layers = [f"model.layers.{block}.self_attn.{module}" for block in range(blocks) for module in MODULES]
    own, lambdas = method in ("moelora", "mtl_lora"), method == "mtl_lora"

    def similarity(level: float) -> list:
        noise = random.normal(0, 0.1, (len(tasks), len(tasks)))
        matrix = np.clip(level + (noise + noise.T) / 2, -1, 1)
        np.fill_diagonal(matrix, 1.0)
        return matrix.tolist()

    mixture = {layer: random.dirichlet([1, 1, 1], len(tasks)).tolist() for layer in layers} if own else None
    return {
        "schema": 1,
        "kind": "adapter_analysis",
        "method": method,
        "tasks": list(tasks),
        "layers": layers,
        "mixture": mixture,
        "mixture_at_start": {layer: rows[::-1] for layer, rows in mixture.items()} if own else None,
        "lambda_similarity": similarity(0.95) if lambdas else None,
        "lambda_minus_identity_similarity": similarity(0.1) if lambdas else None,
        "update_similarity": similarity(0.6) if own else None,
        "update_similarity_at_start": np.eye(len(tasks)).tolist() if own else None,
        "update_similarity_by_module": {module: similarity(0.5) for module in MODULES} if own else None,
    }


def _differences(random, tasks: dict) -> dict:
    centers = random.normal(0.01, 0.03, len(tasks) + 1).tolist()
    *found, average = (Difference(center, center - 0.02, center + 0.025) for center in centers)
    return {"tasks": dict(zip(tasks, found, strict=True)), "average": average}
