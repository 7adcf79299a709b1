"""Putting adapter layers on a model, finding them again, and taking them off: for a while, for good, or by merging."""

import contextlib
import copy
import dataclasses
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Iterator

import torch
from torch import nn

from mtl_lora.adapter import routing
from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.layer import (
    AdapterLayer,
    is_conv1d,
    is_linear,
    is_quantised,
    is_sharded,
    layer_class,
    require_in_memory,
    task_index,
)
from mtl_lora.adapter.saved import Slot, find_slots, named_modules, require_slots, train_slots, unwrap
from mtl_lora.errors import UserError


@dataclasses.dataclass(eq=False)
class Injection:
    """What ``inject`` did to a model beside its layers: what must be undone, and what its hooks need."""

    trainable: list[nn.Parameter]  # weights that required a gradient before
    slots: list[Slot]  # modules_to_save
    checkpointed: list[nn.Module]  # modules that transformers may checkpoint
    has_head: bool  # whether the output head carries an adapter
    layers: list[AdapterLayer]  # those that may be prepared together: of a class that does so, and not the output head
    allow_unused: bool  # whether a layer may be left out by a forward that trains
    unchecked: bool = True  # whether no forward that trains has been looked at yet
    called: set[nn.Module] = dataclasses.field(default_factory=set)  # the layers called while it is looked at
    watchers: list = dataclasses.field(default_factory=list)  # hooks of the layers meanwhile
    handles: list = dataclasses.field(default_factory=list)  # hooks of the model
    off: bool = False  # inside ``disabled``
    ties: tuple | None = None  # the model's own ``_tied_weights_keys``, where their names were changed


def inject(model: nn.Module, config: AdapterConfig, allow_unused: bool = False) -> nn.Module:
    """Wrap the targeted linear layers in place, freeze all other weights, and return the model.

    The model's forward and ``generate`` then take ``task_ids`` (names, ids or a tensor, (B,) or (B, L)), and its
    gradient checkpointing, however it is turned on, keeps them. A linear layer that stands under several names becomes
    one adapter layer under all of them. The first forward that trains raises for an adapter layer that it never calls,
    unless ``allow_unused``: then layers may be left out by some batches, or by all.

    Raises ``UserError`` for a target that names no linear layer (naming those there are), for a layer that ids cannot
    reach, and for a model that already carries an adapter. A failed call leaves the model as it was.
    """
    root, config = unwrap(model), copy.deepcopy(config)  # the caller may go on with its own
    if adapter_layers(root) or any(injection_of(module) for module in root.modules()):
        raise UserError("the model already carries an adapter; load a fresh base model, or merge it first")
    slots = find_slots(root, config.modules_to_save)
    targets = find_targets(root, config)
    for entry in config.task_modules:
        if not any(config.is_at(name, [entry]) for name in targets):
            raise UserError(f"task_modules: none of the {len(targets)} adapted layers is named {entry!r}")
    own = {module: config.at(name) for name, module in targets.items()}
    layers = {module: layer_class(each.method)(module, each) for module, each in own.items()}
    if drawn := _drawn_anew(root, slots):
        warnings.warn(
            f"{', '.join(drawn)}: not as in the base model's files (a new head, or added tokens), and neither trained "
            "nor saved, so whoever loads the adapter has others; name the module in modules_to_save",
            stacklevel=2,
        )
    head = output_head(root)
    if head in layers:
        layers[head].is_head = True
    root.mtl_lora_config = config
    root.mtl_lora_injection = injection = Injection(
        trainable=[parameter for parameter in root.parameters() if parameter.requires_grad],
        slots=slots,
        checkpointed=[module for module in root.modules() if hasattr(module, "gradient_checkpointing")],
        has_head=head in layers,
        layers=[each for each in layers.values() if _prepares(type(each)) and not each.is_head],
        allow_unused=allow_unused,
    )
    root.requires_grad_(False)
    for layer in layers.values():
        layer.train(root.training)
    replace_modules(root, layers)
    train_slots(root, slots, config.modules_to_save)
    _rename_ties(root, injection)
    for override in (routing.Generate, routing.ExpandInputs, *[routing.SavePretrained] * bool(layers)):
        if callable(getattr(root, override.name, None)):
            override(root)
    injection.handles = [
        root.register_forward_pre_hook(_before_forward, with_kwargs=True),
        root.register_forward_hook(_after_forward, always_call=True),
    ]
    return model


def _drawn_anew(root: nn.Module, slots: list[Slot]) -> list[str]:
    """The names of weights that transformers has drawn, having found none in the files of a model or having resized
    them, but for those of ``slots``."""
    saved, named = {slot.original for slot in slots}, dict(root.named_parameters())
    # It marks the others; a model that was not loaded has no marks, and what is quantised or sharded has other weights.
    unmarked = {name: weight for name, weight in named.items() if not getattr(weight, "_is_hf_initialized", False)}
    if len(unmarked) == len(named):
        return []
    own = {name: weight for name, weight in unmarked.items() if weight not in saved}
    return [name for name, weight in own.items() if not (is_quantised(weight) or is_sharded(weight))]


def _rename_ties(root: nn.Module, injection: Injection) -> None:
    """Tell transformers, which ties and saves weights by their names, those that wrapped layers have now."""
    ties = getattr(root, "_tied_weights_keys", None)
    if not isinstance(ties, dict):
        return
    names = [name for name, _ in _named_layers(root)]
    wrapped = {f"{name}.{key}": f"{name}.base_layer.{key}" for name in names for key in ("weight", "bias")}
    renamed = {wrapped.get(name, name): wrapped.get(source, source) for name, source in ties.items()}
    if renamed != ties:
        injection.ties = ("_tied_weights_keys" in vars(root), ties)
        root._tied_weights_keys = renamed


def _restore_ties(root: nn.Module, injection: Injection) -> None:
    if ties := getattr(injection, "ties", None):  # a model pickled by an earlier version has none
        own, root._tied_weights_keys = ties
        injection.ties = None
        if not own:
            del root._tied_weights_keys


def _prepares(layer: type[AdapterLayer]) -> bool:
    return layer.prepare.__func__ is not AdapterLayer.prepare.__func__


def injection_of(model: nn.Module) -> Injection | None:
    """What ``inject`` left on a model, also of a method without layers; None for a model that carries no adapter."""
    return vars(unwrap(model)).get("mtl_lora_injection")


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter layers of a model by module name, in the model's order; one that has several names by its first."""
    return _first_names(_named_layers(model))


def _named_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    return ((name, module) for name, module in named_modules(model) if isinstance(module, AdapterLayer))


def find_targets(
    model: nn.Module, config: AdapterConfig, within: Container[nn.Module] | None = None
) -> dict[str, nn.Module]:
    """The linear layers that a configuration's ``target_modules`` means, by name, in the model's order.

    within: the modules among which they are looked for; None for all.
    Raises ``UserError`` for a name, ending or expression that no linear layer has, naming those there are; and for a
    layer whose owner would bypass an adapter, that ids cannot reach, or that ``modules_to_save`` trains whole; for the
    method ``none``, which has no targets, without ``modules_to_save``.
    """
    linears = [(name, module) for name, module in named_modules(model) if is_linear(module)]
    linears = [(name, module) for name, module in linears if within is None or module in within]
    slots = find_slots(model, config.modules_to_save)
    if not layer_class(config.method).adapts:
        if not slots:
            raise UserError(
                "modules_to_save must name at least one module for the method none, which trains nothing else; '*' is "
                "every weight"
            )
        return {}
    saved = {module for slot in slots for module, key in slot.places if key == "weight"}
    without_task = of_relative_positions(model) if layer_class(config.method).needs_task_ids else set()
    if config.target_modules == "all-linear":
        left_out = {*saved, output_head(model), *without_task}
        targets = _first_names((name, module) for name, module in linears if module not in left_out)
        if not targets:
            raise UserError("'all-linear' finds no linear layer to adapt in this model")
    else:
        targets = _matching(linears, config.target_modules, model)
    for name, module in targets.items():
        if module in saved:
            raise UserError(f"{name} is both in target_modules and in modules_to_save; name it in one of them")
        if hasattr(module, "_hf_hook"):  # an adapter there would have no values either
            require_in_memory(f"the target {name}", module.weight)
        for owner in model.modules():
            if _bypasses(owner, name) and any(part is module for part in owner.modules()):
                raise UserError(
                    f"the layer {name} cannot carry an adapter: {type(owner).__name__} may use its weight without "
                    "calling the layer; name other target modules"
                )
        if module in without_task:
            raise UserError(
                f"the layer {name} projects relative positions too, which are of no row, so their task is unknown; "
                "leave it out, or pass all-linear, which does"
            )
        if layer_class(config.method).needs_task_ids and _is_expert(name):
            raise UserError(
                f"the layer {name} cannot carry an adapter of the method {config.method}: an expert sees tokens of "
                "many rows in an order of its own, so their task is unknown; leave experts out of target_modules"
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
                    f"{target!r} names no linear layer but the fused weights of experts ({fused[0]}), which no adapter "
                    f"reaches; this model has {there}"
                )
            about = " is named" if is_name and not whole else "'s whole name matches the expression"
            example = f", for example {linears[0][0]}" if linears else ""
            raise UserError(f"no linear layer{about} {target!r}; this model has {there}{example}")
        found |= matching
    return _first_names((name, module) for name, module in linears if module in found)


def targets_for(names: Iterable[str], base: nn.Module | None) -> list[str] | str:
    """``target_modules`` that mean exactly the modules ``names``, here and in PEFT.

    Name endings if they match no other module of ``base``, else whole names, else an expression of whole names.
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
    """The weights of experts that are stacked in one parameter (E, d, k), which is no linear layer for an adapter."""
    own = {name: weight for name, weight in model.named_parameters() if weight.dim() == 3 and len(weight) > 1}
    return {
        n: w
        for n, w in own.items()
        if not isinstance(model.get_submodule(n.rpartition(".")[0]), nn.modules.conv._ConvNd)
    }


def _first_names(named: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """By name, each module once, by the first of its names."""
    by_module: dict[nn.Module, str] = {}
    for name, module in named:
        by_module.setdefault(module, name)
    return {name: module for module, name in by_module.items()}


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that projects to the vocabulary, adapted or not; None for a model without one."""
    try:
        return getattr(model, "get_output_embeddings", lambda: None)()
    except NotImplementedError:  # a model of transformers without one
        return None


def _bypasses(owner: nn.Module, name: str) -> bool:
    """Whether a module may read the weight of the layer ``name`` in it instead of calling it, past any adapter.

    torch's own attention does so always and its encoder layer in evaluation; fused kernels of Mamba do so on GPUs.
    """
    fused = "Mamba" in type(owner).__name__ and name.rpartition(".")[2] in ("x_proj", "dt_proj", "out_proj")
    return fused or isinstance(owner, nn.MultiheadAttention | nn.TransformerEncoderLayer)


def of_relative_positions(model: nn.Module) -> set[nn.Module]:
    """The layers that see DeBERTa's relative positions (arXiv 2006.03654), alone or besides the rows' tokens."""
    found = set()
    for owner in model.modules():
        if getattr(owner, "relative_attention", False):
            shared = ("query_proj", "key_proj") if getattr(owner, "share_att_key", False) else ()
            named = owner.named_children()
            found |= {module for name, module in named if name in shared or name.startswith("pos_")}
    return found


def _is_expert(name: str) -> bool:
    return re.search(r"\bexperts\.\w*\d+\.", name) is not None


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, under every name that those have."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; one that two modules share counts once."""
    sizes = [(_size(each), each.requires_grad) for each in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _size(weight: torch.Tensor) -> int:
    """The number of values of a weight that may be partitioned (ZeRO-3) or packed (bitsandbytes' 4 bits)."""
    packed = getattr(weight, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else getattr(weight, "ds_numel", weight.numel())


def print_trainable_parameters(model: nn.Module) -> None:
    """Print the number of trainable parameters, of all, and their percentage, in PEFT's words."""
    trainable, total = trainable_parameters(model)
    percentage = 100 * trainable / max(total, 1)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percentage:.4f}")


# ---- taking it off ----


@torch.no_grad()
def merge(model: nn.Module, task: str | int | None = None) -> nn.Module:
    """Fold the adapter into plain linear layers for one task, in place, and return the model.

    Modules saved whole keep their trained values. Nothing else of the adapter is left: the model's methods, hooks and
    attributes, and which weights require a gradient, are what they were before ``inject``. So it knows no tasks any
    more: the forward of a model of transformers ignores ``task_ids`` that are still passed to it, and ``generate``
    refuses them. Raises ``UserError`` for a task the adapter does not have, for a model without an adapter, for a base
    that is quantised, offloaded or computed from other weights, for a sum that its dtype cannot hold, and for a model
    with a head per task, naming the function that merges it.
    """
    # All before anything changes, for it may raise.
    if task is not None and injection_of(model):
        task_index(unwrap(model).mtl_lora_config.tasks, task)
    for name, module in named_modules(model):
        if instead := getattr(module, "merge_instead", None):
            raise UserError(f"{name} is of every task, and a merged model has one; use {instead}")
    layers = adapter_layers(model)
    for name, layer in layers.items():
        if "weight" not in layer.base_layer._parameters:
            raise UserError(f"the weight of {name} is computed from others, so it cannot take the adapter into it")
        require_in_memory(f"the weight of {name}", layer.base_layer.weight)
    merged = {layer.base_layer: layer.merged_weight(task) for layer in layers.values()}
    for name, weight in zip(layers, merged.values(), strict=True):
        require_finite(name, weight)
    _take_off(model, keep=True)
    for base, weight in merged.items():
        weight = weight.T.contiguous() if is_conv1d(base) else weight
        base.weight = _in_place_of(base.weight, weight)
    config, head = getattr(unwrap(model), "config", None), output_head(unwrap(model))
    if getattr(config, "_name_or_path", ""):
        # Another base now, which the next adapter must not record as the one before.
        config._name_or_path = ""
    tied = head is not None and getattr(config, "tie_word_embeddings", False)
    if tied and head.weight is not unwrap(model).get_input_embeddings().weight:
        _untie(unwrap(model), head)
    return model


def require_finite(name: str, weight: torch.Tensor) -> None:
    """Raise ``UserError`` for a merged weight that is not finite, as fp16 ends at 65,504."""
    if not weight.isfinite().all():
        raise UserError(
            f"the merged weight of {name} is not finite in {weight.dtype}; load the base in float32 (--dtype fp32)"
        )


def _in_place_of(before: nn.Parameter, weight: torch.Tensor) -> nn.Parameter:
    """A weight of a merged model, trained and marked (see ``_drawn_anew``) as the one before it."""
    weight = nn.Parameter(weight, requires_grad=before.requires_grad)
    weight._is_hf_initialized = getattr(before, "_is_hf_initialized", False)
    return weight


def _untie(root: nn.Module, head: nn.Module) -> None:
    """Have a model keep its output head beside its embeddings, when it is resized or saved."""
    if not getattr(root.config, "is_encoder_decoder", False):
        root.config.tie_word_embeddings = False
    elif isinstance(ties := getattr(root, "_tied_weights_keys", None), dict):
        # There it ties the embeddings of both halves too, and some scale the head's input by it.
        own = {f"{name}.{key}" for name, module in named_modules(root) if module is head for key in ("weight", "bias")}
        root._tied_weights_keys = {name: source for name, source in ties.items() if name not in own}


def unload(model: nn.Module) -> nn.Module:
    """Take the adapter off, in place, and return the model: the base model as it was before ``inject``.

    Raises ``UserError`` for a model without an adapter.
    """
    _take_off(model, keep=False)
    return model


def _take_off(model: nn.Module, keep: bool) -> None:
    """Undo everything that ``inject`` did; keep: modules saved whole keep their trained values."""
    root = unwrap(model)
    injection = injection_of(root)
    if injection is None:
        raise UserError("the model carries no adapter to merge or to unload")
    if injection.off:
        raise UserError("the adapter is off inside mtl_lora.disabled; merge or unload it outside that block")
    require_slots(injection.slots)
    replace_modules(root, {layer: layer.base_layer for layer in adapter_layers(root).values()})
    for parameter in injection.trainable:
        parameter.requires_grad_(True)
    for slot in injection.slots:
        trained = slot.put_original()
        if keep and slot.is_weight:
            slot.put(_in_place_of(slot.original, trained.detach().to(slot.original.dtype)))
        elif keep:
            slot.put(trained)
    routing.remove_overrides(root)
    _restore_ties(root, injection)
    for handle in injection.handles:
        handle.remove()
    for name in ("mtl_lora_config", "mtl_lora_injection", "mtl_lora_provenance"):
        if hasattr(root, name):
            delattr(root, name)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """A block in which the model is the base model: its own layers stand in their places, and its output is the
    base's bit for bit. ``task_ids`` are still taken, and not used."""
    layers = {layer: layer.base_layer for layer in adapter_layers(model).values()}
    injection = injection_of(model)
    slots = injection.slots if injection else []
    require_slots(slots)
    replace_modules(model, layers)
    trained = [slot.put_original() for slot in slots]
    was_off = injection is not None and injection.off
    if injection:
        injection.off = True
        _restore_ties(unwrap(model), injection)
    try:
        yield
    finally:
        if injection:
            injection.off = was_off
        for slot, tensor in zip(slots, trained, strict=True):
            slot.put(tensor)
        for layer, base in layers.items():
            layer.training = base.training  # the model may have changed its mode inside the block
        replace_modules(model, {base: layer for layer, base in layers.items()})
        if layers and injection:
            _rename_ties(unwrap(model), injection)


# ---- the hooks of an injected model; they run outside the region that torch.compile compiles ----


@torch._disable_dynamo
def _before_forward(model: nn.Module, arguments: tuple, options: dict) -> tuple[tuple, dict]:
    """Take task_ids out of the call, put them in force, and prepare a forward that trains."""
    injection = model.mtl_lora_injection
    task_ids = options.pop("task_ids", None)
    inputs = (options.get("input_ids"), options.get("inputs_embeds"), *arguments[:1])
    sample = next((value for value in inputs if isinstance(value, torch.Tensor)), None)
    keep = options.get("logits_to_keep") if injection.has_head else None
    route = routing.enter_model(task_ids, model.mtl_lora_config.tasks, sample, keep)
    if route is not None and (row_ids := route.row_ids) is not None:  # ids of every token would take memory for each
        # A model pickled by an earlier version has no such list.
        route.prepared = _prepared(getattr(injection, "layers", ()), row_ids)
    if model.training and torch.is_grad_enabled():
        routing.follow_checkpointing(injection.checkpointed)
        if injection.unchecked and not injection.off and not _is_compiled(model):
            _refuse_drifting_averages(model)
            for watcher in injection.watchers:  # a forward that was interrupted has left them
                watcher.remove()
            injection.watchers = [
                layer.register_forward_pre_hook(lambda called, _: injection.called.add(called))
                for layer in adapter_layers(model).values()
            ]
            injection.unchecked = bool(injection.watchers)
    return arguments, options


def _prepared(layers: list[AdapterLayer], task_ids: torch.Tensor) -> dict[nn.Module, torch.Tensor]:
    """What the layers' class prepares for the task ids (B,) of a forward, by layer; layers that are sharded do it
    themselves, when their parameters are gathered."""
    groups: dict[tuple, list[AdapterLayer]] = {}
    for layer in layers:
        first = getattr(layer, layer.parameter_names[0])
        if not is_sharded(first) and not first.is_meta:  # accelerate puts weights that it has offloaded on meta
            groups.setdefault(layer.prepared_alike(), []).append(layer)
    return {
        layer: tensor
        for (_, device, *_), group in groups.items()
        for layer, tensor in zip(group, group[0].prepare(group, routing.moved(task_ids, device)), strict=False)
    }


def _refuse_drifting_averages(model: nn.Module) -> None:
    """Raise ``UserError`` for a frozen batch norm in training mode: its running averages would change, unsaved."""
    kept = {module for slot in model.mtl_lora_injection.slots for module, key in slot.places if key == "running_mean"}
    for name, module in named_modules(model):
        tracks = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        if tracks and module.training and module not in kept:
            raise UserError(
                f"the batch norm {name} is frozen, and in training mode it changes its running averages, which a "
                "checkpoint would not hold; name it in modules_to_save, or call eval() on it before each forward"
            )


@torch._disable_dynamo
def _after_forward(model: nn.Module, arguments: tuple, output: object) -> None:
    """End the route, and raise for a layer that the first forward that trains has not called."""
    routing.leave_model()
    injection = model.mtl_lora_injection
    if not injection.watchers:
        return
    for watcher in injection.watchers:
        watcher.remove()
    called, injection.watchers, injection.called = injection.called, [], set()
    if output is None:  # the forward raised
        return
    layers = adapter_layers(model)
    unused = [name for name, layer in layers.items() if layer not in called and not _is_expert(name)]
    if unused and not injection.allow_unused:
        others = f" and {len(unused) - 1} others" if len(unused) > 1 else ""
        raise UserError(
            f"the adapter layer {unused[0]}{others} of {len(layers)} was not called in a forward that trains, so it "
            "would stay as it was drawn; leave it out of target_modules, or, if other batches reach it, pass "
            "allow_unused=True to inject"
        )
    injection.unchecked = False


def _is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` runs the forward or a part of it; hooks of layers would then be compiled with it, and
    one module's graph may run for another, whose hooks are not called."""
    if any(module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in model.modules()):
        return True
    frame, compilers = sys._getframe(), 0
    while frame is not None:
        compilers += frame.f_globals.get("__name__") == "torch._dynamo.eval_frame"
        frame = frame.f_back
    return compilers > 1  # one is the wrapper of the hook itself
