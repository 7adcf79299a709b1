"""Export a checkpoint as one PEFT LoRA folder per task: the factors of every layer under PEFT's names."""

import copy
import dataclasses
import functools
import math
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

import mtl_lora
from mtl_lora import artifacts, files
from mtl_lora.adapter.checkpoint import CheckpointConfig, adapter_without_base, read_config, read_weights, split_state
from mtl_lora.adapter.layer import AdapterLayer, Factors, is_conv1d, layer_class, task_index
from mtl_lora.adapter.saved import find_slots, whole_modules
from mtl_lora.adapter.targets import adapter_layers, fused_experts, targets_for
from mtl_lora.base_model import BaseModel
from mtl_lora.errors import UserError
from mtl_lora.export.model_card import error_text, model_card, read_scores, task_type
from mtl_lora.nlu import model as encoder
from mtl_lora.nlu.tasks import TaskSet
from mtl_lora.systems import SYSTEMS, check

CARD_NAME = "README.md"
FILES = (artifacts.PEFT_CONFIG, artifacts.PEFT_WEIGHTS, CARD_NAME)
FOR_ALL = "all"  # the folder of an adapter that was trained without tasks
_PLAIN_LORA = {"peft_type": "LORA", "inference_mode": True, "lora_dropout": 0.0}
_PLAIN_LORA |= {"bias": "none", "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}


def export_peft(
    checkpoint: str | Path,
    output: str | Path,
    tasks: list[str] | None = None,
    base_model: BaseModel | None = None,
    results: str | Path | None = None,
    form: str = "exact",
    rank: int | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write a PEFT LoRA to ``<output>/<task>/`` for each of ``tasks`` (None or empty: all), and return the folders.

    Needs the checkpoint and the base model's configuration, but not its weights. base_model: None for the recorded one.
    form: ``exact``, or ``lora`` for the plain LoRA of ``rank`` that is closest to the adapter's update; for DoRA that
    needs the base model's weights. A method that is the same for every task also gets a folder per task, so that the
    task's prompt and result lie beside the weights. An encoder's folder holds the task's head too; that of a regression
    outputs numbers in the task's range. Prints to stderr the command that serves all folders in vLLM, or why vLLM
    cannot. Raises ``UserError`` for a method without factors, modules saved whole that PEFT cannot hold, an unknown
    task, a damaged checkpoint, a base model other than the one trained on, and an ``output`` in use.
    """
    config = read_config(checkpoint)
    method = layer_class(config.adapter_config.method)
    method.require_factors()
    if not method.adapts:
        raise UserError(f"{checkpoint} has no adapter to export to PEFT; use the merge command")
    names = choose_tasks(config.adapter_config.tasks, tasks)
    base_model = base_for(checkpoint, config, base_model)
    base_model.check_fingerprint(config.provenance_config.base_fingerprint, base_model.local_fingerprint(), checkpoint)
    scores = read_scores(checkpoint, config, results)
    head_tasks = tasks_of_heads(config)
    # Heads are saved whole, so the structure of an encoder must be known.
    base = encoder.structure(base_model, head_tasks) if head_tasks else structure_if_known(base_model)
    saved_names, saved = saved_modules(checkpoint, config, base)
    if form == "lora" and saved and not head_tasks:
        raise UserError(f"{checkpoint} has modules saved whole, which a plain LoRA cannot hold; use the merge command")
    heads = encoder.task_heads(base) if head_tasks else {}
    layers = _layers(checkpoint, config, base_model, base, form)
    plain = base_model.structure() if head_tasks else base  # the model that a user loads: an encoder has its own head
    pad_token_id = None
    if head_tasks and getattr(plain.config.get_text_config(), "pad_token_id", None) != base.config.pad_token_id:
        pad_token_id = base.config.pad_token_id
    # With a classifier's type PEFT also reads a head from the folder, so it is named only if one is saved.
    kind = "SEQ_CLS" if head_tasks else task_type(config.provenance_config.base_class)
    shared = {
        "base_model_name_or_path": base_model.lasting_name,
        "modules_to_save": saved_names,
        "task_type": kind if saved_names or kind not in ("SEQ_CLS", "TOKEN_CLS") else None,
        "target_modules": targets_for(layers, plain),
    }
    messages = config.provenance_config.untrained_note(names)
    with files.atomic_directory(output, FILES, overwrite, [checkpoint], nested=True) as folder, ExitStack() as end:
        end.callback(closest_lora.cache_clear)  # it holds the layers
        for name in names:
            task = None if name == FOR_ALL and not config.adapter_config.tasks else name
            modules = of_task(saved, heads, name) if head_tasks else saved
            found, error = _write_task(folder / name, layers, task, modules, shared, rank)
            card = model_card(name, config, base_model.name, found["r"], scores.get(name), error, pad_token_id)
            files.write_text(folder / name / CARD_NAME, card)
            messages.append(f"{Path(output) / name}: rank {found['r']}{error_text(error)}")
    folders = [Path(output) / name for name in names]
    if shared["task_type"] == "CAUSAL_LM":
        messages.append(serving(base_model, folders, found["r"], found["use_dora"], saved_names))
    print(*messages, sep="\n", file=sys.stderr)
    return folders


def _layers(
    checkpoint: str | Path, config: CheckpointConfig, base_model: BaseModel, base: nn.Module | None, form: str
) -> dict[str, AdapterLayer]:
    """Return the layers to export, with the base model's weights only where their factors need these.

    base: the base model's structure, if known. Raises ``UserError`` for layers that PEFT would take for others.
    """
    has_experts = base is not None and fused_experts(base)  # before the adapter, which may have stacks of its own
    adapter = adapter_without_base(checkpoint, config, base)
    if form == "lora" and config.adapter_config.method == "dora":
        is_double = any(layer.parameter_dtype == torch.float64 for layer in adapter_layers(adapter).values())
        adapter = mtl_lora.load(load_base(base_model, config, "fp64" if is_double else "fp32"), checkpoint)
    layers = adapter_layers(adapter)
    if has_experts and (lost := sorted({name.rpartition(".")[2] for name in layers} & _OF_EXPERTS)):
        about = f"PEFT would take {', '.join(lost)} for the base model's fused experts"
        raise UserError(f"{about} and drop this part of the adapter; use the merge command")
    return layers


# Names that PEFT moves to the experts' weights if a base model stacks these in one parameter.
_OF_EXPERTS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate"}
_LARGE = 1024  # above this side length singular values are found by random projections; computing all takes hours
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank in vLLM 0.11 and later


def serving(base_model: BaseModel, folders: list[Path], rank: int, dora: bool, saved: list[str] | None) -> str:
    """Return the command that serves the folders in vLLM, or a sentence on why vLLM refuses them and what to do."""
    reasons = ["DoRA"] * dora + [f"modules beside the LoRA ({', '.join(saved or [])})"] * bool(saved)
    reasons += [f"a rank above {VLLM_RANKS[-1]}"] * (rank > VLLM_RANKS[-1])
    if reasons:
        way_out = "use the merge command" if saved else "export with --as lora --rank R, or use the merge command"
        return f"vLLM does not support {' and '.join(reasons)}: to serve this adapter there, {way_out}"
    most = next(each for each in VLLM_RANKS if each >= rank)
    words = ["vllm", "serve", base_model.path, "--enable-lora", "--max-lora-rank", str(most), "--lora-modules"]
    return "to serve all folders in vLLM:\n" + shlex.join([*words, *(f"{folder.name}={folder}" for folder in folders)])


def recorded_base(checkpoint: str | Path) -> BaseModel:
    """Return the base model that a checkpoint records; raises ``UserError`` if it records none."""
    return base_for(checkpoint, read_config(checkpoint))


def base_for(checkpoint: str | Path, config: CheckpointConfig, given: BaseModel | None = None) -> BaseModel:
    """Return the ``given`` base model, else the recorded one, with the kind that fits the checkpoint.

    The kind follows from the base model's recorded class if that is a classifier or an encoder-decoder, else from the
    system that trained the checkpoint. Raises ``UserError`` for a system that adds modules of its own to the base
    model, which other programs do not know.
    """
    provenance = config.provenance_config
    check(provenance.system)
    if provenance.model_settings is not None:
        raise UserError(
            f"{checkpoint} is of the system {provenance.system}, whose model has modules unknown to transformers and "
            "PEFT, so it cannot be exported; use the checkpoint itself, or mtl_lora.merge(model, task) in Python"
        )
    if given is None and provenance.base_model is None:
        raise UserError(f"{checkpoint} does not record its base model; pass --base_model")
    kinds = {"SEQ_CLS": "encoder", "SEQ_2_SEQ_LM": "text_generator"}
    kind = kinds.get(task_type(provenance.base_class), SYSTEMS[provenance.system])
    return dataclasses.replace(given or BaseModel(provenance.base_model), kind=kind)


def tasks_of_heads(config: CheckpointConfig) -> TaskSet | None:
    """Return the tasks of a checkpoint with a head per task; None for a language model, whose output they share."""
    provenance = config.provenance_config
    if provenance.system != "nlu":
        return None
    return TaskSet.from_json(provenance.task_set, "the checkpoint's task set")


def load_base(base_model: BaseModel, config: CheckpointConfig, dtype: str, in_4bit: bool = False) -> PreTrainedModel:
    """Load the model that a checkpoint's adapter is put on, with its weights; arguments as for ``BaseModel.load``."""
    tasks = tasks_of_heads(config)
    return encoder.load(base_model, tasks, dtype, in_4bit) if tasks else base_model.load(dtype, in_4bit)


def choose_tasks(known: list[str], chosen: list[str] | None) -> list[str]:
    """Return the names of the folders to write; raises ``UserError`` for an unknown task or an unusable folder name."""
    names = list(dict.fromkeys(chosen or known or [FOR_ALL]))
    for name in names:
        task_index(known or [FOR_ALL], name)
        if name in ("", ".", "..") or "\0" in name or Path(name).name != name:
            raise UserError(f"the task {name!r} cannot name a folder; rename it in the checkpoint's tasks")
    return names


def structure_if_known(base_model: BaseModel) -> nn.Module | None:
    """Build the base model on the meta device; None, with a note on stderr, if its configuration cannot be loaded."""
    try:
        return base_model.structure()
    except UserError as error:
        print(f"note: layer names are not compared with the base model's, since {error}", file=sys.stderr)
        return None


def saved_modules(
    checkpoint: str | Path, config: CheckpointConfig, base: nn.Module | None
) -> tuple[list[str] | None, dict[str, torch.Tensor]]:
    """Return PEFT's ``modules_to_save`` (None: no modules) and the weights of these modules by name.

    Raises ``UserError`` for modules that PEFT would save differently: a weight that is tied or not part of a whole
    module, and a module whose name also ends another module's name; and for a weight that is missing or of another
    shape.
    """
    entries = config.adapter_config.modules_to_save
    if not entries:
        return None, {}
    if base is None:
        raise UserError(f"{checkpoint} has modules_to_save, which need the base model's structure; pass --base_model")
    names = list(whole_modules(base, entries))
    names = [name for name in names if not name.startswith(tuple(f"{outer}." for outer in names))]
    inside = tuple(f"{name}." for name in names)
    slots = find_slots(base, entries)
    refused = [slot.name for slot in slots if len(slot.places) > 1 or not slot.name.startswith(inside)]
    refused += [name for name, _ in base.named_modules() if name.endswith(tuple(names)) and name not in names]
    if refused:
        way_out = "PEFT saves only whole modules that share no weights; use the merge command"
        raise UserError(f"{refused[0]} of modules_to_save {entries} cannot be exported, since {way_out}")
    saved = split_state(config.adapter_config, read_weights(checkpoint, config))[1]
    expected = {slot.name: list(slot.original.shape) for slot in slots}
    found = {name: list(tensor.shape) for name, tensor in saved.items()}
    for name in [*expected, *found]:
        own, of_base = found.get(name, "missing"), expected.get(name, "missing")
        if own != of_base:
            raise UserError(
                f"{checkpoint} does not fit the base model: the shape of {name} is {own} in the checkpoint and "
                f"{of_base} in the base model"
            )
    return names, saved


def of_task(saved: dict[str, torch.Tensor], heads: dict[str, encoder.TaskHeads], task: str) -> dict[str, torch.Tensor]:
    """Return the weights of the modules saved whole, with one task's head under the names of a plain model's head."""
    chosen = next(iter(heads.values())).task_set[task]
    own = {name: copy.deepcopy(module[chosen.id]) for name, module in heads.items()}
    for name, head in own.items():
        start = f"{name}.{chosen.id}."
        head.load_state_dict(
            {key.removeprefix(start): saved[key] for key in saved if key.startswith(start)}, assign=True
        )
    encoder.unscale(list(own.values()), chosen)
    shared = {key: tensor for key, tensor in saved.items() if key.partition(".")[0] not in heads}
    return shared | {f"{name}.{key}": tensor for name, head in own.items() for key, tensor in head.state_dict().items()}


def _write_task(
    folder: Path,
    layers: dict[str, AdapterLayer],
    task: str | None,
    saved: dict[str, torch.Tensor],
    shared: dict,
    rank: int | None,
) -> tuple[dict, float | None]:
    """Write one task's weights and configuration; return the task's part of the configuration and the relative error.

    saved: weights of the modules saved whole. shared: the part of the configuration that all tasks share. rank: of the
    closest plain LoRA, or None to write factors equal to the adapter; the error is then None.
    """
    tensors, settings = {f"{artifacts.PEFT_PREFIX}{name}": tensor for name, tensor in saved.items()}, {}
    error = None
    with torch.no_grad():
        if rank is None:
            written = {name: layer.factors(task) for name, layer in layers.items()}
        else:
            closest = {
                name: closest_lora(layer, task if layer.needs_task_ids else None, rank)
                for name, layer in layers.items()
            }
            lost, whole = (sum(each[place] for each in closest.values()) for place in (1, 2))
            error = math.sqrt(lost / whole) if whole else 0.0
            largest = max(len(pair.A) for pair, _, _ in closest.values())
            written = {name: _padded(pair, largest) for name, (pair, _, _) in closest.items()}
    for name, factors in written.items():
        alpha, B = alpha_and_up(factors)
        tensors[f"{artifacts.PEFT_PREFIX}{name}.lora_A.weight"] = factors.A.contiguous()
        tensors[f"{artifacts.PEFT_PREFIX}{name}.lora_B.weight"] = B.contiguous()
        if factors.magnitude is not None:
            tensors[f"{artifacts.PEFT_PREFIX}{name}.lora_magnitude_vector"] = factors.magnitude.contiguous()
        own = {"r": factors.A.shape[0], "lora_alpha": alpha, "use_dora": factors.magnitude is not None}
        if settings not in ({}, own):
            found = f"{name} has {own} and {next(iter(layers))} has {settings}"
            raise UserError(f"PEFT stores one rank and scale for all layers, but {found}; pass --as lora --rank R")
        settings = own
    folder.mkdir()
    metadata = {"format": "pt"} | ({} if error is None else {"relative_error": f"{error:.6g}"})
    save_file(tensors, folder / artifacts.PEFT_WEIGHTS, metadata=metadata)
    # In a model that has both kinds of layers, PEFT corrects fan_in_fan_out for each layer.
    settings["fan_in_fan_out"] = any(is_conv1d(layer.base_layer) for layer in layers.values())
    files.write_json(folder / artifacts.PEFT_CONFIG, {**_PLAIN_LORA, **shared, **settings})
    return settings, error


def _padded(pair: Factors, rank: int) -> Factors:
    """Pad a pair with zeros to ``rank``, since PEFT has one rank for all layers."""
    more = rank - len(pair.A)
    return Factors(F.pad(pair.A, (0, 0, 0, more)), F.pad(pair.B, (0, more)), pair.scale)


@functools.lru_cache(maxsize=512)  # so that a method that is the same for every task is truncated only once
def closest_lora(layer: AdapterLayer, task: str | None, rank: int) -> tuple[Factors, float, float]:
    """Return the plain pair of at most ``rank`` closest to the layer's update, and two squared Frobenius norms.

    By singular values (Eckart and Young, Psychometrika 1, 1936). The norms are of the part of the update that the pair
    lacks, and of the whole update.
    """
    factors = layer.factors(task)
    if factors.magnitude is None:  # in rank space, exactly
        (up, R_up), (down, R_down) = (torch.linalg.qr(each.double()) for each in (factors.B, factors.A.T))
        U, S, V = torch.linalg.svd(factors.scale * R_up @ R_down.T, full_matrices=False)
        U, V, whole = up @ U, down @ V.T, S.square().sum()
    else:
        weight = layer.base_weight().double()
        update = factors.adapted(weight) - weight
        if min(update.shape) > _LARGE:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                U, S, V = torch.svd_lowrank(update, min(rank + 32, *update.shape), niter=6)
        else:
            U, S, V = torch.linalg.svd(update, full_matrices=False)
            V = V.T
        whole = update.square().sum()
    rank = rank if factors.magnitude is not None else min(rank, len(factors.A))
    down, up = V[:, :rank], (U * S)[:, :rank]
    pair = Factors(down.T.to(factors.A.dtype), up.to(factors.A.dtype), 1.0)
    return pair, max((whole - S[:rank].square().sum()).item(), 0.0), whole.item()


def alpha_and_up(factors: Factors) -> tuple[int, torch.Tensor]:
    """Return (lora_alpha, B) such that lora_alpha / R * B equals the factors' scale * B.

    PEFT declares lora_alpha an integer: a scale that no integer gives (alpha 0.5, or rsLoRA) is multiplied into B, and
    lora_alpha is R. DoRA's norm is that of W + scale B A, so it does not depend on where the scale is applied.
    """
    rank = factors.A.shape[0]
    alpha = round(factors.scale * rank)
    if alpha > 0 and alpha / rank == factors.scale:
        return alpha, factors.B
    return rank, factors.B * factors.scale
