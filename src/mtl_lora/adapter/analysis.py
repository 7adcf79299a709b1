"""Analysis of how a trained adapter differs between tasks: mixture weights, and the similarity of the tasks' updates.

``python -m mtl_lora.adapter.analysis CHECKPOINT`` writes ``adapter_analysis.json``; training does so when it ends.
Only files of the checkpoint are read, never the base model.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path

import torch

from mtl_lora import artifacts, cli, files
from mtl_lora.adapter.checkpoint import adapter_without_base, load_start, read_config
from mtl_lora.adapter.layer import AdapterLayer, layer_class
from mtl_lora.adapter.targets import adapter_layers
from mtl_lora.analysis import Analysis
from mtl_lora.config import REQUIRED, Config, flag
from mtl_lora.errors import UserError, user_errors_to_exit_code

MOST_TASKS = 64  # with more, the T x T matrices are left out
_UNDEFINED = (
    "a similarity is null where the cosine is undefined in every layer: one of the two matrices is zero there, as an "
    "update is while B = 0, and Lambda_t - I while Lambda_t is the identity; other layers' means leave such layers out"
)


@torch.no_grad()
def analyse(checkpoint: str | Path) -> dict:
    """Return the content of ``adapter_analysis.json``, see ``Analysis``; everything is computed in float64.

    Raises ``UserError`` for a damaged checkpoint.
    """
    config = read_config(checkpoint)
    method, tasks = layer_class(config.adapter_config.method), config.adapter_config.tasks
    adapter = adapter_without_base(checkpoint, config, dtype=torch.float64)
    layers = in_depth_order(adapter_layers(adapter), config.adapter_config.target_modules)
    ids = torch.arange(len(tasks))
    comparable = method.needs_task_ids and method.has_factors
    compared = {name: layer for name, layer in layers.items() if layer.needs_task_ids and comparable}
    compared = compared if len(tasks) <= MOST_TASKS else {}

    def mixtures() -> dict | None:
        found = {name: layer.mixture(ids) for name, layer in layers.items()} if method.needs_task_ids else {}
        return {name: each.tolist() for name, each in found.items() if each is not None} or None

    def updates() -> dict[str, torch.Tensor]:
        return {name: _cosines(_update_products(layer)) for name, layer in compared.items()}

    transforms = [found for layer in compared.values() if (found := layer.task_transforms(ids)) is not None]
    changes = [found - torch.eye(found.shape[-1]) for found in transforms]
    mixture, trained = mixtures(), updates()
    by_module: dict[str, list[torch.Tensor]] = {}
    for name, similarity in trained.items():
        by_module.setdefault(name.rpartition(".")[2], []).append(similarity)
    notes = [_UNDEFINED] if compared else []
    if comparable and not compared and len(tasks) > MOST_TASKS:
        notes.append(f"similarities are left out: they are for up to {MOST_TASKS} tasks, and there are {len(tasks)}")
    if not method.adapts:
        notes.append("there is nothing to compare: no layer carries an adapter")
    elif not layers:
        notes.append(f"nothing is compared, since the weights of {method.title} do not show the sizes of their layers")
    if not method.has_factors:
        notes.append(f"no task has an update of its own: {method.title} has no factors, since {method.why_no_factors}")
    kept = method.needs_task_ids and load_start(layers, checkpoint)
    if method.task_parameters and not kept:
        notes.append("the start was not kept, so how much of this is the seed's draw, and not learned, is unknown")
    return Analysis(
        method=method.method,
        method_title=method.title,
        mixture_parts=method.mixture_parts or None,
        tasks=tasks,
        adapter_sha256=config.weights_sha256,
        layers=list(layers),
        mixture=mixture,
        mixture_at_start=mixtures() if kept else None,
        lambda_similarity=_mean([_cosines(torch.einsum("sij,tij->st", each, each)) for each in transforms]),
        lambda_minus_identity_similarity=_mean([_cosines(torch.einsum("sij,tij->st", each, each)) for each in changes]),
        update_similarity=_mean(list(trained.values())),
        update_similarity_at_start=_mean(list(updates().values())) if kept else None,
        update_similarity_by_module={module: _mean(found) for module, found in by_module.items()} or None,
        notes=notes,
    ).to_json()


def in_depth_order(layers: dict[str, AdapterLayer], targets: list[str] | str) -> dict[str, AdapterLayer]:
    """Return the layers from input to output, block 2 before block 10, and within a block as ``target_modules`` does.

    Needed because a checkpoint lists its weights sorted by name.
    """
    listed = {target: index for index, target in enumerate(targets)} if isinstance(targets, list) else {}

    def place(name: str) -> tuple:
        block, _, module = name.rpartition(".")
        numbers = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", block)]
        return numbers, listed.get(module, len(listed)), module

    return {name: layers[name] for name in sorted(layers, key=place)}


def _update_products(layer: AdapterLayer) -> torch.Tensor:
    """Return the inner products <B_s A_s, B_t A_t> = trace((B_s^T B_t) (A_t A_s^T)) of the tasks' updates, (T, T).

    Computed in rank space: no (d, k) product is formed. The scale is left out because all tasks of a layer share it.
    """
    factors = [layer.factors(task) for task in layer.tasks]
    down = torch.cat([pair.A for pair in factors])
    up = torch.cat([pair.B.T for pair in factors])
    T = len(factors)
    return ((up @ up.T) * (down @ down.T)).view(T, len(up) // T, T, -1).sum(dim=(1, 3))


def _cosines(inner: torch.Tensor) -> torch.Tensor:
    """Return the cosines, (T, T), from inner products (T, T); NaN where one of the two matrices is zero."""
    norms = inner.diagonal().sqrt()
    return (inner / (norms[:, None] * norms)).clamp(-1, 1)


def _mean(similarities: list[torch.Tensor]) -> list[list[float | None]] | None:
    """Return the mean of each entry over the layers where it is defined, None if there is none; None without layers."""
    if not similarities:
        return None
    rows = torch.stack(similarities).nanmean(dim=0).tolist()
    return [[None if value != value else value for value in row] for row in rows]


def write_analysis(checkpoint: str | Path, output: str | Path | None = None) -> Path:
    """Analyse a checkpoint and write ``adapter_analysis.json``, by default into its folder; returns the file's path."""
    path = Path(output or Path(checkpoint) / artifacts.ADAPTER_ANALYSIS)
    # Six decimals, and null for NaN and infinity (the weights of a run that diverged), which JSON does not have.
    text = json.dumps(analyse(checkpoint))
    found = json.loads(text, parse_float=lambda digits: round(float(digits), 6), parse_constant=lambda _: None)
    # One entry per line: with indentation, every number of every layer would be on its own line.
    entries = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
    files.write_text(path, "{\n" + ",\n".join(entries) + "\n}\n")
    return path


@dataclasses.dataclass
class AnalysisConfig(Config):
    """The arguments of ``python -m mtl_lora.adapter.analysis``."""

    checkpoint: list[str] = flag(REQUIRED, "adapter folder of a training run", positional=True)
    output: str | None = flag(None, f"file to write; none: {artifacts.ADAPTER_ANALYSIS} in the checkpoint's folder")

    def validate(self) -> None:
        if self.output and len(self.checkpoint) > 1:
            raise UserError("--output names one file, but several checkpoints are passed; leave it out")


def main(arguments: list[str] | None = None) -> None:
    """Analyse checkpoints and print the paths of the files; a ``UserError`` ends with one sentence and exit code 2."""
    about = f"Write {artifacts.ADAPTER_ANALYSIS}: mixture weights and similarity of tasks, without the base model."
    with user_errors_to_exit_code():
        config = cli.parse(AnalysisConfig, sys.argv[1:] if arguments is None else arguments, about)
        for checkpoint in config.checkpoint:
            print(write_analysis(checkpoint, config.output))


if __name__ == "__main__":
    main()
