"""Put adapter layers on a model, and disable, unload or merge them."""

import contextlib
import copy
import dataclasses
import math
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.hooks import CallWatch, ExpandInputs, Generate, SavePretrained, after_forward, before_forward
from mtl_lora.adapter.layer import (
    AdapterLayer,
    is_conv1d,
    is_quantised,
    is_sharded,
    layer_class,
    require_in_memory,
    task_index,
)
from mtl_lora.adapter.override import remove_overrides
from mtl_lora.adapter.saved import Slot, find_slots, named_modules, require_slots, train_slots, unwrap
from mtl_lora.adapter.targets import (
    adapter_layers,
    find_targets,
    named_layers,
    output_head,
    replace_modules,
    targets_for,
    unusable_layers,
)
from mtl_lora.errors import UserError

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
    watch: CallWatch | None = None  # of the forward that is being checked
    handles: list = dataclasses.field(default_factory=list)  # handles of the model's hooks
    norm_handles: list = dataclasses.field(default_factory=list)  # and of those of its frozen batch norms
    off: bool = False  # whether the model is inside ``disabled``
    ties: tuple | None = None  # (was set on the instance, the original ``_tied_weights_keys``), if it was renamed


def inject(model: nn.Module, config: AdapterConfig, allow_unused: bool = False) -> nn.Module:
    """Wrap the targeted linear layers in place, freeze all other weights, and return the model.

    The model's forward and ``generate`` then take ``task_ids``: names, ids or a tensor, of shape (B,), one per row; the
    forward also of shape (B, L), one per token. Gradient checkpointing keeps them, however it is turned on. A linear
    layer that has several names in the model becomes one adapter layer under all of them.

    allow_unused: whether a batch may leave out adapter layers. By default, the first forward in training mode raises
    ``UserError`` for an adapter layer that it does not call.

    Raises ``UserError`` for a target that matches no linear layer (listing the linear layers of the model), for a layer
    that task ids cannot reach, and for a model that already carries an adapter. A failed call leaves the model as it
    was.
    """
    for value, kind in ((model, nn.Module), (config, AdapterConfig)):
        if not isinstance(value, kind):
            raise UserError(f"inject takes a model and an AdapterConfig, not {value!r:.60} as its {kind.__name__}")
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
    if config.target_modules == "all-linear" and not config.recorded and unusable_layers(root):
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
        layers=[each for each in layers.values() if each.prepares and not each.is_head],
        allow_unused=allow_unused,
        names=[*targets],
    )
    root.requires_grad_(False)
    for layer in layers.values():
        layer.train(root.training)
    replace_modules(root, layers)
    train_slots(root, slots, config.modules_to_save)
    _rename_ties(root, injection)
    for override in (Generate, ExpandInputs, *[SavePretrained] * bool(layers)):
        if callable(getattr(root, override.name, None)):
            override(root)
    injection.handles = [
        root.register_forward_pre_hook(before_forward, with_kwargs=True),
        root.register_forward_hook(after_forward, always_call=True),
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
    names = [name for name, _ in named_layers(root)]
    wrapped = {f"{name}.{key}": f"{name}.base_layer.{key}" for name in names for key in ("weight", "bias")}
    renamed = {wrapped.get(name, name): wrapped.get(source, source) for name, source in ties.items()}
    if renamed != ties:
        injection.ties = ("_tied_weights_keys" in vars(root), ties)
        root._tied_weights_keys = renamed


def _restore_ties(root: nn.Module, injection: Injection) -> None:
    if injection.ties:
        own, root._tied_weights_keys = injection.ties
        injection.ties = None
        if not own:
            del root._tied_weights_keys


def injection_of(model: nn.Module) -> Injection | None:
    """Return the state that ``inject`` keeps on a model; None for a model that carries no adapter."""
    return vars(unwrap(model)).get("mtl_lora_injection")


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trainable parameters and of all parameters; a shared parameter counts once."""
    trainable = total = 0
    for weight in model.parameters():
        packed = getattr(weight, "quant_state", None)  # of bitsandbytes' 4 bits; ds_numel is of ZeRO-3's partitions
        size = math.prod(packed.shape) if packed is not None else getattr(weight, "ds_numel", weight.numel())
        trainable, total = trainable + size * weight.requires_grad, total + size
    return trainable, total


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
    root, head = unwrap(model), output_head(unwrap(model))
    config = getattr(root, "config", None)
    if getattr(config, "_name_or_path", ""):
        config._name_or_path = ""  # the next adapter must not record the original base as its own
    tied = head is not None and getattr(config, "tie_word_embeddings", False)
    if tied and head.weight is not root.get_input_embeddings().weight:
        _untie(root, head)
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
    remove_overrides(root)
    _restore_ties(root, injection)
    for handle in (*injection.handles, *injection.norm_handles):
        handle.remove()
    for name in ("mtl_lora_config", "mtl_lora_injection", "mtl_lora_provenance"):
        vars(root).pop(name, None)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """A context manager inside which the model is its base model: its output is that of the base bit for bit.

    ``task_ids`` may still be passed and have no effect. Other threads see the base model too. Raises ``UserError`` for
    a module that only contains the model.
    """
    layers = {layer: layer.base_layer for layer in adapter_layers(model).values()}
    injection = injection_of(model)
    if injection is None:
        if layers or any(injection_of(module) for module in model.modules()):
            raise UserError(
                "mtl_lora.disabled needs the model that mtl_lora.inject returned, no part of it or module around it"
            )
        yield
        return
    require_slots(injection.slots)
    replace_modules(model, layers)
    trained = [slot.put_original() for slot in injection.slots]
    was_off, injection.off = injection.off, True
    _restore_ties(unwrap(model), injection)
    try:
        yield
    finally:
        injection.off = was_off
        for slot, tensor in zip(injection.slots, trained, strict=True):
            slot.put(tensor)
        for layer, base in layers.items():
            layer.training = base.training  # the model may have changed its mode inside the block
        replace_modules(model, {base: layer for layer, base in layers.items()})
        if layers:
            _rename_ties(unwrap(model), injection)
