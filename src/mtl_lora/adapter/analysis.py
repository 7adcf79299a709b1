"""What a trained adapter does differently for each task: mixture weights, and how alike two tasks' updates are.

``python -m mtl_lora.adapter.analysis CHECKPOINT`` writes ``adapter_analysis.json``; training does so when it ends.
Read are the checkpoint's two files, never the base model.
"""

import argparse
import json
import math
import re
from collections import defaultdict
from pathlib import Path

import torch

from mtl_lora import files
from mtl_lora.adapter.checkpoint import read_config
from mtl_lora.adapter.inject import adapter_layers
from mtl_lora.adapter.layer import AdapterLayer, Factors
from mtl_lora.adapter.mtl_lora import MtlLoraLayer
from mtl_lora.adapter.without_base import adapter_without_base
from mtl_lora.errors import OneSentenceParser, user_errors_to_exit_code

FILE_NAME = "adapter_analysis.json"
SCHEMA = 1
MOST_TASKS = 64  # with more, the T x T matrices are left out
_DIGITS = 6
_UNDEFINED = (
    "a similarity is null where the cosine is undefined in every layer: one of the two matrices is zero there, as an "
    "update is while B = 0, and Lambda_t - I while Lambda_t is the identity; other layers' means leave such layers out"
)

Matrix = list[list[float | None]]


@torch.no_grad()
def analyse(checkpoint: str | Path) -> dict:
    """The content of ``adapter_analysis.json``; all sums are taken in float64.

    mixture: by layer, (T, n) weights softmax(w_t / tau) of MTL-LoRA, (T, N) gates of MoELoRA, else null. Similarities
    are (T, T) cosines under the Frobenius inner product, means over layers: of Lambda_t, of Lambda_t - I, and of the
    updates scale * B_t A_t; null where the method is the same for every task. Raises ``UserError`` for a damaged
    checkpoint.
    """
    config = read_config(checkpoint)
    tasks = config.adapter_config.tasks
    adapter = adapter_without_base(checkpoint, config, dtype=torch.float64)
    layers = in_depth_order(adapter_layers(adapter), config.adapter_config.target_modules)
    per_task = {name: layer for name, layer in layers.items() if layer.needs_task_ids}
    compared = per_task if len(tasks) <= MOST_TASKS else {}
    lambdas = {name: layer for name, layer in compared.items() if isinstance(layer, MtlLoraLayer)}
    updates = {name: cosines(update_products(layer)) for name, layer in compared.items()}
    by_module = defaultdict(list)
    for name, similarity in updates.items():
        by_module[name.rpartition(".")[2]].append(similarity)
    notes = [_UNDEFINED] if compared else []
    if per_task and not compared:
        notes.append(f"similarities are left out: they are for up to {MOST_TASKS} tasks, and there are {len(tasks)}")
    return {
        "schema": SCHEMA,
        "kind": "adapter_analysis",
        "method": config.adapter_config.method,
        "tasks": tasks,
        "adapter_sha256": config.weights_sha256,
        "layers": list(layers),
        "mixture": {name: mixture(layer) for name, layer in per_task.items()} or None,
        "lambda_similarity": mean([cosines(lambda_products(layer, False)) for layer in lambdas.values()]),
        "lambda_minus_identity_similarity": mean([cosines(lambda_products(layer, True)) for layer in lambdas.values()]),
        "update_similarity": mean(list(updates.values())),
        "update_similarity_by_module": {module: mean(found) for module, found in by_module.items()} or None,
        "notes": notes,
    }


def in_depth_order(layers: dict[str, AdapterLayer], targets: list[str] | str) -> dict[str, AdapterLayer]:
    """Layers from input to output, 2 before 10, and within a block as ``target_modules`` lists them: a checkpoint's
    weights are sorted by name."""
    listed = {target: index for index, target in enumerate(targets)} if isinstance(targets, list) else {}

    def place(name: str) -> tuple:
        block, _, module = name.rpartition(".")
        numbers = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", block)]
        return numbers, listed.get(module, len(listed)), module

    return {name: layers[name] for name in sorted(layers, key=place)}


def mixture(layer: AdapterLayer) -> Matrix:
    """The weights with which each task mixes the layer's up-projections or experts, (T, n)."""
    return layer.mixture(torch.arange(len(layer.tasks))).tolist()


def lambda_products(layer: MtlLoraLayer, minus_identity: bool) -> torch.Tensor:
    """Inner products of the tasks' Lambda_t, or of Lambda_t - I, (T, T)."""
    transforms = layer.lora_lambda
    if minus_identity:
        # A diagonal Lambda is stored as its diagonal, and so is its identity.
        transforms = transforms - (torch.ones(layer.rank) if layer.diagonal else torch.eye(layer.rank))
    flat = transforms.flatten(1)
    return flat @ flat.T


def update_products(layer: AdapterLayer) -> torch.Tensor:
    """Inner products <B_s A_s, B_t A_t> = trace((B_s^T B_t) (A_t A_s^T)) of the tasks' updates, (T, T).

    In rank space: no (d, k) product is formed. The scale is left out, for it is the same for all tasks of a layer.
    """
    factors: list[Factors] = [layer.factors(task) for task in layer.tasks]
    A, B = torch.stack([pair.A for pair in factors]), torch.stack([pair.B for pair in factors])
    T, R = len(factors), B.shape[2]
    down = A.flatten(0, 1)
    up = B.transpose(1, 2).flatten(0, 1)
    return ((up @ up.T) * (down @ down.T)).view(T, R, T, R).sum(dim=(1, 3))


def cosines(products: torch.Tensor) -> torch.Tensor:
    """Inner products (T, T) to cosines; NaN where one of the two is zero."""
    norms = products.diagonal().sqrt()
    return (products / (norms[:, None] * norms)).clamp(-1, 1)


def mean(similarities: list[torch.Tensor]) -> Matrix | None:
    """The mean over layers, entry by entry, of those that are defined; None where none is, or without layers."""
    if not similarities:
        return None
    rows = torch.stack(similarities).nanmean(dim=0).tolist()
    return [[None if value != value else value for value in row] for row in rows]


def write_analysis(checkpoint: str | Path, output: str | Path | None = None) -> Path:
    """Analyse a checkpoint and write the file, by default into its folder; returns its path."""
    path = Path(output or Path(checkpoint) / FILE_NAME)
    # An entry a line: indenting would give every number of every layer a line of its own.
    entries = [f"  {json.dumps(key)}: {json.dumps(_rounded(value))}" for key, value in analyse(checkpoint).items()]
    files.write_text(path, "{\n" + ",\n".join(entries) + "\n}\n")
    return path


def _rounded(value):
    """Six decimals, and null for what is no number (the weights of a run that went to NaN): JSON has none."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    if isinstance(value, float):
        return round(value, _DIGITS) if math.isfinite(value) else None
    return value


def main(arguments: list[str] | None = None) -> None:
    """Analyse one checkpoint and name the file; a user's mistake ends in one sentence and exit code 2."""
    about = f"Write {FILE_NAME}: mixture weights and similarity of tasks, from a checkpoint without its base model."
    parser = OneSentenceParser(prog="python -m mtl_lora.adapter.analysis", description=about, allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="adapter folder of a training run")
    parser.add_argument("--output", metavar="FILE", help=f"default: {FILE_NAME} in the checkpoint")
    with user_errors_to_exit_code():
        parsed: argparse.Namespace = parser.parse_args(arguments)
        print(write_analysis(parsed.checkpoint, parsed.output))


if __name__ == "__main__":
    main()
