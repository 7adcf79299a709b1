"""Put adapter layers on a model, find them, and disable, unload or merge them."""

import contextlib
import copy
import dataclasses
import math
import re
import sys
import threading
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
from mtl_lora.errors import UserError, first_of

# Wrappers and mixins that collect the weights whose gradients processes share when they are made.
_OF_SEVERAL_PROCESSES = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


@dataclasses.dataclass(eq=False)
class Injection:
    """The state that ``inject`` keeps on a model: what to undo later, and what the model's hooks need."""

    trainable: list[nn.Parameter]  # weights that required a gradient before ``inject``
    slots: list[Slot]  # the weights and buffers of modules_to_save
    checkpointed: list[nn.Module]  # modules for which transformers may turn on gradient checkpointing
    has_head: bool  # whether the output head carries an adapter
    layers: list[AdapterLayer]  # layers that override ``prepare``, without the output head
    allow_unused: bool  # whether a training forward may leave out adapter layers
    unchecked: bool = True  # whether no training forward has been checked for unused layers yet
    names: list[str] = dataclasses.field(default_factory=list)  # of all adapter layers
    watch: "CallWatch | None" = None  # of the forward that is being checked
    handles: list = dataclasses.field(default_factory=list)  # handles of the model's hooks
    off: bool = False  # whether the model is inside ``disabled``
    ties: tuple | None = None  # (was set on the instance, the original ``_tied_weights_keys``), if it was renamed


_watching = threading.Lock()  # held while a forward looks whether another one is checked


class CallWatch:
    """Records which adapter layers of a model are called, until ``end``. thread: the ident of the thread that watches
    its forward."""

    def __init__(self, model: nn.Module):
        self.layers, self.called, self.thread = adapter_layers(model), set(), threading.get_ident()
        self.handles = [layer.register_forward_pre_hook(self._record) for layer in self.layers.values()]

    def _record(self, layer: AdapterLayer, arguments: tuple) -> None:
        self.called.add(layer)

    def end(self) -> str:
        """Remove the hooks; return in words the layers that were not called, without experts (a router chooses these);
        an empty string if there are none."""
        for handle in self.handles:
            handle.remove()
        unused = [name for name, layer in self.layers.items() if layer not in self.called and not _is_expert(name)]
        return f"the adapter layer {first_of(unused)} of {len(self.layers)}" if unused else ""


def inject(model: nn.Module, config: AdapterConfig, allow_unused: bool = False) -> nn.Module:
    """Wrap the targeted linear layers in place, freeze all other weights, and return the model.

    The model's forward and ``generate`` then take ``task_ids``: names, ids or a tensor, of shape (B,), one per row, or
    (B, L), one per token. Gradient checkpointing keeps them, however it is turned on. A linear layer that has several
    names in the model becomes one adapter layer under all of them.

    allow_unused: whether a batch may leave out adapter layers. By default, the first forward in training mode raises
    ``UserError`` for an adapter layer that it does not call.

    Raises ``UserError`` for a target that matches no linear layer (listing the linear layers of the model), for a layer
    that task ids cannot reach, and for a model that already carries an adapter. A failed call leaves the model as it
    was.
    """
    root, config = unwrap(model), copy.deepcopy(config)  # a copy, because the caller may change its own later
    classes = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    if wrapper := next((name for name in _OF_SEVERAL_PROCESSES if name in classes), None):
        raise UserError(
            f"the model is already prepared for several processes ({wrapper}), which would not share the gradients of "
            "adapter weights that are added now; put the adapter on first"
        )
    if adapter_layers(root) or any(injection_of(module) for module in root.modules()):
        raise UserError("the model already carries an adapter; load a fresh base model, or merge it first")
    slots = find_slots(root, config.modules_to_save)
    targets = find_targets(root, config)
    if config.target_modules == "all-linear" and not config.recorded and _unusable(root):
        config.target_modules = targets_for(targets, root)  # the checkpoint says which layers these were
    for entry in config.task_modules:
        if not any(config.is_at(name, [entry]) for name in targets):
            raise UserError(f"task_modules: none of the {len(targets)} adapted layers is named {entry!r}")
    own = {module: config.at(name) for name, module in targets.items()}
    layers = {module: layer_class(each.method)(module, each) for module, each in own.items()}
    if not_loaded := _not_loaded(root, slots):
        warnings.warn(
            f"{', '.join(not_loaded)}: not as in the base model's files (a new head, or added tokens), and neither "
            "trained nor saved, so whoever loads the adapter gets other values; name the module in modules_to_save",
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
        names=[*targets],
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


def _not_loaded(root: nn.Module, slots: list[Slot]) -> list[str]:
    """Return the names of weights that transformers initialised or resized instead of loading, without ``slots``."""
    saved, named = {slot.original for slot in slots}, dict(root.named_parameters())
    # transformers marks the weights that it loads. A model that was not loaded has no marks, and quantised or sharded
    # weights lose theirs.
    unmarked = {name: weight for name, weight in named.items() if not getattr(weight, "_is_hf_initialized", False)}
    if len(unmarked) == len(named):
        return []
    own = {name: weight for name, weight in unmarked.items() if weight not in saved}
    return [name for name, weight in own.items() if not (is_quantised(weight) or is_sharded(weight))]


def _rename_ties(root: nn.Module, injection: Injection) -> None:
    """Rename the weights of wrapped layers in ``_tied_weights_keys``, by which transformers ties and saves weights."""
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
    """Return the state that ``inject`` keeps on a model; None for a model that carries no adapter."""
    return vars(unwrap(model)).get("mtl_lora_injection")


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return the adapter layers of a model by module name, in the model's order; each once, by its first name."""
    return _first_names(_named_layers(model))


def _named_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
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
    unusable = {} if config.recorded else _unusable(model)  # earlier versions put adapters on some of these
    if config.target_modules == "all-linear":
        left_out = {*saved, output_head(model), *without_task, *unusable}
        left_out |= {module for name, module in linears if needs_task_ids and _is_expert(name)}
        targets = _first_names((name, module) for name, module in linears if module not in left_out)
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
        if needs_task_ids and _is_expert(name):
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


def _unusable(model: nn.Module) -> dict[nn.Module, str]:
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


def _is_expert(name: str) -> bool:
    return re.search(r"\bexperts\.\w*\d+\.", name) is not None


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Replace modules of a model, under every name that they have. replacements: from old to new module."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trainable parameters and of all parameters; a shared parameter counts once."""
    sizes = [(_size(each), each.requires_grad) for each in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _size(weight: torch.Tensor) -> int:
    """Return the number of values of a weight, which may be partitioned (ZeRO-3) or packed (bitsandbytes, 4 bits)."""
    packed = getattr(weight, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else getattr(weight, "ds_numel", weight.numel())


def print_trainable_parameters(model: nn.Module) -> None:
    """Print the number of trainable parameters, of all parameters, and the percentage, in PEFT's format."""
    trainable, total = trainable_parameters(model)
    percentage = 100 * trainable / max(total, 1)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percentage:.4f}")


# ---- taking it off ----


@torch.no_grad()
def merge(model: nn.Module, task: str | int | None = None) -> nn.Module:
    """Merge the adapter for one task into the base's linear layers, in place, and return the model.

    task: a name or an id; None for a method whose layers are the same for every task.

    Modules saved whole keep their trained values. Nothing else of the adapter remains: methods, hooks, attributes and
    which weights require a gradient are as before ``inject``. The model no longer knows tasks: the forward of a
    transformers model ignores ``task_ids``, and ``generate`` refuses them.

    Raises ``UserError`` for an unknown task, for a model without an adapter, for a method without factors, for a base
    weight that is quantised, offloaded, divided among processes or computed from other weights, for a merged weight
    that its dtype cannot hold, and for a model with a head per task, naming what to use instead.
    """
    # Everything that may raise comes before anything is changed.
    if task is not None and injection_of(model):
        task_index(unwrap(model).mtl_lora_config.tasks, task)
    for name, module in named_modules(model):
        if instead := getattr(module, "merge_instead", None):
            raise UserError(f"{name} has a part for each task, and a merged model is for one task; use {instead}")
    layers = adapter_layers(model)
    for name, layer in layers.items():
        if "weight" not in layer.base_layer._parameters:
            raise UserError(f"the weight of {name} is computed from others, so no adapter can be merged into it")
        if is_sharded(layer.base_layer.weight):
            raise UserError(
                f"the weight of {name} is divided among processes (ZeRO-3, FSDP); load the adapter on a whole model "
                "and merge it there"
            )
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
        # The next adapter must not record the original base as its own.
        config._name_or_path = ""
    tied = head is not None and getattr(config, "tie_word_embeddings", False)
    if tied and head.weight is not unwrap(model).get_input_embeddings().weight:
        _untie(unwrap(model), head)
    return model


def require_finite(name: str, weight: torch.Tensor) -> None:
    """Raise ``UserError`` for a merged weight that is not finite, such as an fp16 weight beyond 65,504."""
    if not weight.isfinite().all():
        raise UserError(
            f"the merged weight of {name} is not finite in {weight.dtype}; load the base in float32 (--dtype fp32)"
        )


def _in_place_of(before: nn.Parameter, weight: torch.Tensor) -> nn.Parameter:
    """Return ``weight`` as a parameter with ``before``'s requires_grad and mark of loaded weights (``_not_loaded``)."""
    weight = nn.Parameter(weight, requires_grad=before.requires_grad)
    weight._is_hf_initialized = getattr(before, "_is_hf_initialized", False)
    return weight


def _untie(root: nn.Module, head: nn.Module) -> None:
    """Untie the output head from the embeddings, so that resizing or saving the model keeps both."""
    if not getattr(root.config, "is_encoder_decoder", False):
        root.config.tie_word_embeddings = False
    elif isinstance(ties := getattr(root, "_tied_weights_keys", None), dict):
        # Here the setting also ties the embeddings of encoder and decoder, and in some models scales the head's input.
        own = {f"{name}.{key}" for name, module in named_modules(root) if module is head for key in ("weight", "bias")}
        root._tied_weights_keys = {name: source for name, source in ties.items() if name not in own}


def unload(model: nn.Module) -> nn.Module:
    """Remove the adapter in place and return the model, which is the base model as it was before ``inject``.

    Raises ``UserError`` for a model without an adapter.
    """
    _take_off(model, keep=False)
    return model


def _take_off(model: nn.Module, keep: bool) -> None:
    """Undo everything that ``inject`` did. keep: whether modules saved whole keep their trained values."""
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
    """A context manager inside which the model is its base model: its output is that of the base bit for bit.

    ``task_ids`` may still be passed and have no effect. Other threads see the base model too. Raises ``UserError`` for
    a module that only contains the model.
    """
    layers = {layer: layer.base_layer for layer in adapter_layers(model).values()}
    injection = injection_of(model)
    if layers and injection is None:
        raise UserError(
            "mtl_lora.disabled needs the model that mtl_lora.inject returned, no part of it or module around it"
        )
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
    """Take ``task_ids`` out of the call, set them as the current route, and set up the checks of a training forward."""
    injection = model.mtl_lora_injection
    task_ids = options.pop("task_ids", None)
    inputs = (options.get("input_ids"), options.get("inputs_embeds"), *arguments[:1])
    sample = next((value for value in inputs if isinstance(value, torch.Tensor)), None)
    keep = options.get("logits_to_keep") if injection.has_head else None
    route = routing.enter_model(task_ids, model.mtl_lora_config.tasks, sample, keep)
    if route is not None and (row_ids := route.row_ids) is not None:  # one tensor per token would need too much memory
        # A model pickled by an earlier version has no such list.
        route.prepared = _prepared(getattr(injection, "layers", ()), row_ids)
    if model.training and torch.is_grad_enabled():
        routing.follow_checkpointing(injection.checkpointed)
        if injection.unchecked and not injection.off and not _is_compiled(model):
            _refuse_drifting_averages(model)
            with _watching:
                # Of forwards that run at the same time, such as those of DataParallel's replicas, one is checked.
                others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
                if injection.watch is None or injection.watch.thread not in others:
                    if injection.watch:  # left by an interrupted forward
                        injection.watch.end()
                    injection.watch = CallWatch(model)
    return arguments, options


def _prepared(layers: list[AdapterLayer], task_ids: torch.Tensor) -> dict[nn.Module, torch.Tensor]:
    """Return what ``AdapterLayer.prepare`` computes for the task ids (M,) of the rows of a forward, by layer.

    Sharded layers are left out: they compute it themselves while their parameters are gathered.
    """
    groups: dict[tuple, list[AdapterLayer]] = {}
    for layer in layers:
        first = getattr(layer, layer.parameter_names[0])
        if not is_sharded(first) and not first.is_meta:  # a weight that accelerate has offloaded is on meta
            groups.setdefault(layer.prepared_alike(), []).append(layer)
    return {
        layer: tensor
        for (_, device, *_), group in groups.items()
        for layer, tensor in zip(group, group[0].prepare(group, routing.moved(task_ids, device)), strict=False)
    }


def _refuse_drifting_averages(model: nn.Module) -> None:
    """Raise ``UserError`` for a frozen batch or instance norm whose running averages would change unsaved."""
    kept = {module for slot in model.mtl_lora_injection.slots for module, key in slot.places if key == "running_mean"}
    for name, module in named_modules(model):
        tracks = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        if tracks and module.training and module not in kept:
            raise UserError(
                f"the {type(module).__name__} {name} is frozen, but in training mode it changes its running averages, "
                "which a checkpoint would not hold; name it in modules_to_save, or call its eval() before each forward"
            )


@torch._disable_dynamo
def _after_forward(model: nn.Module, arguments: tuple, output: object) -> None:
    """End the route of the forward; raise ``UserError`` if the first training forward has not called a layer."""
    routing.leave_model()
    injection = model.mtl_lora_injection
    watch = injection.watch
    if watch is None or watch.thread != threading.get_ident():
        return
    injection.watch = None
    unused = watch.end()
    if output is None:  # the forward raised
        return
    if unused and not injection.allow_unused:
        raise UserError(
            f"{unused} was not called in a training forward, so it would keep its initial values; name target_modules "
            "without it, or, if other batches reach it, pass allow_unused=True to inject"
        )
    injection.unchecked = False


def _is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` runs the forward or a part of it.

    Hooks of layers would then be compiled too, and the graph of one module may run for another without its hooks.
    """
    if any(module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in model.modules()):
        return True
    frame, compilers = sys._getframe(), 0
    while frame is not None:
        compilers += frame.f_globals.get("__name__") == "torch._dynamo.eval_frame"
        frame = frame.f_back
    return compilers > 1  # one is the wrapper of the hook itself
