"""Methods of an injected model that are overridden, so that they take ``task_ids`` or keep them."""

import contextlib
import inspect
import warnings
from collections.abc import Callable

import torch
from torch import nn

from mtl_lora.adapter import routing
from mtl_lora.errors import UserError


class Override:
    """A callable set on a module in place of its method ``name``.

    An object, not a closure, so that an injected model can be pickled and copied.
    """

    name: str

    def __init__(self, module: nn.Module):
        self.module, self.before = module, vars(module).get(self.name)
        setattr(module, self.name, self)

    @property
    def original(self) -> Callable:
        """The method that the module has without this override."""
        return self.before or inspect.getattr_static(type(self.module), self.name).__get__(self.module)


def remove_overrides(model: nn.Module) -> None:
    """Restore the original methods of all modules of a model."""
    for module in model.modules():
        for override in [value for value in vars(module).values() if isinstance(value, Override)]:
            delattr(module, override.name)
            if override.before is not None:
                setattr(module, override.name, override.before)


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
