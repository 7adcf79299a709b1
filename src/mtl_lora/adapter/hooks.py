"""What an injected model does around its forward: it takes ``task_ids``, and the first forward is checked.

The hooks run outside the region that ``torch.compile`` compiles. Methods of the model are overridden, so that they take
``task_ids`` or keep them.
"""

import contextlib
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn

from mtl_lora.adapter import routing
from mtl_lora.adapter.layer import AdapterLayer, is_sharded
from mtl_lora.adapter.override import Override
from mtl_lora.adapter.saved import named_modules
from mtl_lora.adapter.targets import adapter_layers, is_expert, layers_in_words
from mtl_lora.errors import UserError

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
        unused = [name for name, layer in self.layers.items() if layer not in self.called and not is_expert(name)]
        return layers_in_words(unused, self.layers) if unused else ""


@torch._disable_dynamo
def before_forward(model: nn.Module, arguments: tuple, options: dict) -> tuple[tuple, dict]:
    """Take ``task_ids`` out of the call, set them as the current route, and set up the checks of a training forward."""
    injection = model.mtl_lora_injection
    task_ids = options.pop("task_ids", None)
    inputs = (options.get("input_ids"), options.get("inputs_embeds"), *arguments[:1])
    sample = next((value for value in inputs if isinstance(value, torch.Tensor)), None)
    keep = options.get("logits_to_keep") if injection.has_head else None
    route = routing.enter_model(task_ids, model.mtl_lora_config.tasks, sample, keep)
    if route is not None and (row_ids := route.row_ids) is not None:  # one tensor per token would need too much memory
        route.prepared = _prepared(injection.layers, row_ids)
    if model.training and torch.is_grad_enabled():
        follow_checkpointing(injection.checkpointed)
        if injection.unchecked and not injection.off and not _is_compiled(model):
            _start_watch(model)
    return arguments, options


def _start_watch(model: nn.Module) -> None:
    """Record which layers this forward calls, unless a forward in another thread is being recorded, and refuse norms
    whose averages would drift.

    Of forwards that run at the same time, such as those of DataParallel's replicas, one is checked.
    """
    injection = model.mtl_lora_injection
    with _watching:
        others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        if injection.watch is None or injection.watch.thread not in others:
            if injection.watch:  # left by an interrupted forward
                injection.watch.end()
            injection.watch = CallWatch(model)
            for handle in injection.norm_handles:  # of a forward that raised
                handle.remove()
            # They stay, and refuse any forward in training mode from now on: a later batch may reach other norms, and a
            # later train() undoes an eval(). Not from ``inject`` on, since norms may still be replaced (SyncBatchNorm).
            injection.norm_handles = [
                norm.register_forward_pre_hook(functools.partial(_refuse_drifting_averages, name))
                for name, norm in _frozen_norms(model)
            ]


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


def _frozen_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The frozen batch and instance norms by name that have running averages."""
    kept = {module for slot in model.mtl_lora_injection.slots for module, key in slot.places if key == "running_mean"}
    for name, module in named_modules(model):
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats and module not in kept:
            yield name, module


def _refuse_drifting_averages(name: str, norm: nn.Module, arguments: tuple) -> None:
    if norm.training:
        raise UserError(
            f"the {type(norm).__name__} {name} is frozen, but in training mode it changes its running averages, "
            "which a checkpoint would not hold; name it in modules_to_save, or call its eval() before each forward"
        )


@torch._disable_dynamo
def after_forward(model: nn.Module, arguments: tuple, output: object) -> None:
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


# ---- overridden methods ----


class Generate(Override):
    """``generate`` with ``task_ids``, which hold for the whole call, because it calls an encoder on its own."""

    name = "generate"

    def __call__(self, *arguments, task_ids=None, **options):
        mask, config = options.get("attention_mask"), getattr(self.module, "config", None)
        is_decoder = isinstance(mask, torch.Tensor) and not getattr(config, "is_encoder_decoder", False)
        if is_decoder and mask.dim() == 2 and not mask[:, -1].all():
            raise UserError('generate would continue after padding; pad on the left: tokenizer.padding_side = "left"')
        route = routing.current() if task_ids is None else routing.Route(task_ids)
        if route is not None and route.by_token:
            raise UserError("generate takes task_ids of shape (batch,), one for each row: new tokens have no ids")
        with routing.RouteContext(route):
            return self.original(*arguments, **options)


class SavePretrained(Override):
    """``save_pretrained`` with a warning, because it writes weights under the names of wrapped layers."""

    name = "save_pretrained"

    def __call__(self, *arguments, **options):
        if not self.module.mtl_lora_injection.off:
            warnings.warn(
                "save_pretrained writes the whole model under names that no plain model loads; save the adapter with "
                "mtl_lora.save, or the model after mtl_lora.merge",
                stacklevel=2,
            )
        return self.original(*arguments, **options)


class ExpandInputs(Override):
    """The step of ``generate`` that repeats the rows of a batch; it repeats the route as well."""

    name = "_expand_inputs_for_generation"

    def __call__(self, expand_size: int = 1, *arguments, **options):
        routing.repeat_rows(expand_size)
        return self.original(expand_size, *arguments, **options)


# State of a forward, besides its routes, that a recomputation needs. Each entry is called in the forward and returns a
# function that makes the context manager to enter in the recomputation.
recomputed: list[Callable[[], Callable[[], contextlib.AbstractContextManager]]] = []


class Checkpointing(Override):
    """Gradient checkpointing of transformers that restores the forward's routes in a recomputation, in any thread."""

    name = "_gradient_checkpointing_func"

    def __call__(self, run: Callable, *arguments, **options):
        if torch.compiler.is_compiling():  # a compiled graph is recomputed as a graph
            return self.before(run, *arguments, **options)
        reentrant = getattr(self.before, "keywords", {}).get("use_reentrant", True)
        # Each re-entrant block runs its own backward pass, and the first would free a graph that all share.
        again = [routing.captured(prepared=not reentrant), *(each() for each in recomputed)]

        def routed(*arguments, **options):
            with contextlib.ExitStack() as blocks:
                for block in again:
                    blocks.enter_context(block())
                return run(*arguments, **options)

        if reentrant:
            arguments = _with_gradient(arguments)
        return self.before(routed, *arguments, **options)


def follow_checkpointing(modules: list[nn.Module]) -> None:
    """Make the gradient checkpointing of these modules keep the routes; called before each training forward."""
    for module in modules:
        function = vars(module).get(Checkpointing.name)
        if function is not None and type(function) is not Checkpointing:
            Checkpointing(module)


def _with_gradient(arguments: tuple) -> tuple:
    """Return arguments of which at least one requires a gradient.

    Without one, re-entrant checkpointing computes no gradients for the weights either.
    """
    tensors = [value for value in arguments if isinstance(value, torch.Tensor) and value.is_floating_point()]
    if not torch.is_grad_enabled() or not tensors or any(value.requires_grad for value in tensors):
        return arguments
    return tuple(value.detach().requires_grad_() if value is tensors[0] else value for value in arguments)
