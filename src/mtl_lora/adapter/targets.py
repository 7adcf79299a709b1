"""Find layers in a model: those that a configuration targets, the adapter layers, the output head."""

import re
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Sequence

from torch import nn

from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.layer import AdapterLayer, is_linear, layer_class, require_in_memory
from mtl_lora.adapter.saved import find_slots, named_modules
from mtl_lora.errors import UserError, first_of


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return the adapter layers of a model by module name, in the model's order; each once, by its first name."""
    return _first_names(named_layers(model))


def named_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Yield the adapter layers of a model under each of their names."""
    return ((name, module) for name, module in named_modules(model) if isinstance(module, AdapterLayer))


def find_targets(
    model: nn.Module, config: AdapterConfig, within: Container[nn.Module] | None = None
) -> dict[str, nn.Module]:
    """Return the linear layers that a configuration's ``target_modules`` selects, by name, in the model's order.

    within: the modules to search; None for all.
    Raises ``UserError`` for a name, ending or expression that matches no linear layer (listing those of the model); for
    a layer whose owner would bypass an adapter, that task ids cannot reach, or that ``modules_to_save`` trains whole;
    and for the method ``none``, which has no targets, without ``modules_to_save``.
    """
    linears = [(name, module) for name, module in named_modules(model) if is_linear(module)]
    linears = [(name, module) for name, module in linears if within is None or module in within]
    slots = find_slots(model, config.modules_to_save)
    if not layer_class(config.method).adapts:
        if not slots:
            raise UserError(
                "modules_to_save must name at least one module for the method none, which trains nothing else; '*' "
                "selects every weight"
            )
        return {}
    saved = {module for slot in slots for module, key in slot.places if key == "weight"}
    needs_task_ids = layer_class(config.method).needs_task_ids
    without_task = of_relative_positions(model) if needs_task_ids else set()
    unusable = {} if config.recorded else unusable_layers(model)  # earlier versions put adapters on some of these
    if config.target_modules == "all-linear":
        left_out = {*saved, output_head(model), *without_task, *unusable}
        left_out |= {module for name, module in linears if needs_task_ids and is_expert(name)}
        targets = _first_names((name, module) for name, module in linears if module not in left_out)
        if not targets and any(module in saved for _, module in linears):
            raise UserError("'all-linear' finds no linear layer that modules_to_save leaves; name fewer modules there")
        if not targets:
            raise UserError("'all-linear' finds no linear layer to adapt in this model")
    else:
        targets = _matching(linears, config.target_modules, model)
    for name, module in targets.items():
        if module in saved:
            raise UserError(f"{name} is both in target_modules and in modules_to_save; name it in one of them")
        if hasattr(module, "_hf_hook"):  # of accelerate; the adapter of an offloaded layer would have no values either
            require_in_memory(f"the target {name}", module.weight)
        if module in unusable:
            raise UserError(f"the layer {name} cannot carry an adapter: {unusable[module]}; name other target modules")
        if module in without_task:
            raise UserError(
                f"the layer {name} projects relative positions too, which belong to no row, so their task is unknown; "
                "leave it out, or pass all-linear, which leaves it out"
            )
        if needs_task_ids and is_expert(name):
            raise UserError(
                f"the layer {name} cannot carry an adapter of the method {config.method}: an expert sees tokens of "
                "many rows in another order, so their task is unknown; leave experts out of target_modules"
            )
    return targets


def _matching(
    linears: list[tuple[str, nn.Module]], target_modules: list[str] | str, model: nn.Module
) -> dict[str, nn.Module]:
    counted = Counter(name.rpartition(".")[2] for name, _ in linears)
    there = ", ".join(f"{ending} ({count})" for ending, count in counted.items()) or "none"
    whole = isinstance(target_modules, str)
    found: set[nn.Module] = set()
    for target in [target_modules] if whole else target_modules:
        pattern = re.compile(rf"(.*\.)?{re.escape(target)}")
        is_name = re.fullmatch(r"[\w.]+", target) or any(pattern.fullmatch(name) for name, _ in linears)
        if whole or not is_name:
            try:
                pattern = re.compile(target)
            except (re.error, OverflowError, RecursionError) as error:
                raise UserError(f"the target expression {target!r} is not a regular expression: {error}") from None
        matching = {module for name, module in linears if pattern.fullmatch(name)}
        if not matching:
            if fused := [name for name in fused_experts(model) if pattern.fullmatch(name)]:
                raise UserError(
                    f"{target!r} names no linear layer but the fused weights of experts ({fused[0]}), which cannot "
                    f"carry an adapter; this model has {there}"
                )
            about = " is named" if is_name and not whole else "'s whole name matches the expression"
            example = f", for example {linears[0][0]}" if linears else ""
            raise UserError(f"no linear layer{about} {target!r}; this model has {there}{example}")
        found |= matching
    return _first_names((name, module) for name, module in linears if module in found)


def targets_for(names: Iterable[str], base: nn.Module | None) -> list[str] | str:
    """Return ``target_modules`` that select exactly the modules ``names``, here and in PEFT.

    Name endings if they match no other module of ``base``, else whole names, else a regular expression of whole names.
    """
    names = list(names)
    if base is None:
        return names
    everything = [name for name, _ in base.named_modules()]
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    for targets in (endings, names):
        ends = tuple(f".{target}" for target in targets)
        if {name for name in everything if name in targets or name.endswith(ends)} == set(names):
            return targets
    return "|".join(re.escape(name) for name in names)


def fused_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights (E, d, k) that stack E experts in one parameter, which cannot carry an adapter, by name."""
    stacked = {name: weight for name, weight in model.named_parameters() if weight.dim() == 3 and len(weight) > 1}
    owners = {name: type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in stacked}
    return {name: weight for name, weight in stacked.items() if "expert" in f"{name} {owners[name]}".lower()}


def _first_names(named: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Return the modules by name, each once, under the first of its names."""
    by_module: dict[nn.Module, str] = {}
    for name, module in named:
        by_module.setdefault(module, name)
    return {name: module for module, name in by_module.items()}


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the layer that projects to the vocabulary, adapted or not; None for a model without one."""
    try:
        return getattr(model, "get_output_embeddings", lambda: None)()
    except NotImplementedError:  # raised by a transformers model without an output head
        return None


def unusable_layers(model: nn.Module) -> dict[nn.Module, str]:
    """Return the linear layers whose adapters would have no effect or never be trained, with the reason.

    torch's own attention reads the weights of its layers instead of calling them, its encoder layer does so in
    evaluation, and fused Mamba kernels on GPUs. The indexers of sparse attention run without gradients.
    """
    found = {}
    for owner in model.modules():
        kind, of_torch = type(owner).__name__, isinstance(owner, nn.MultiheadAttention | nn.TransformerEncoderLayer)
        fused = ("x_proj", "dt_proj", "out_proj") if re.search("Mamba|Bamba|FalconH1", kind) else ()
        if kind.endswith("Indexer"):
            below, why = owner.named_modules(), f"{kind} runs without gradients"
        else:
            below = owner.named_modules() if of_torch else [(key, getattr(owner, key, None)) for key in fused]
            why = f"{kind} may use its weight without calling the layer"
        found |= {module: why for _, module in below if module is not None and is_linear(module)}
    return found


def of_relative_positions(model: nn.Module) -> set[nn.Module]:
    """Return the layers that project DeBERTa's relative positions (arXiv 2006.03654), alone or together with tokens."""
    found = set()
    for owner in model.modules():
        if getattr(owner, "relative_attention", False):
            shared = ("query_proj", "key_proj") if getattr(owner, "share_att_key", False) else ()
            named = owner.named_children()
            found |= {module for name, module in named if name in shared or name.startswith("pos_")}
    return found


def layers_in_words(names: Sequence[str], layers: Collection[str]) -> str:
    """Return some adapter layers, at least one, of all ``layers`` in words."""
    return f"the adapter layer {first_of(names)} of {len(layers)}"


def is_expert(name: str) -> bool:
    """Whether a layer of this name belongs to one expert of a mixture."""
    return re.search(r"\bexperts\.\w*\d+\.", name) is not None


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Replace modules of a model, under every name that they have. replacements: from old to new module."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
