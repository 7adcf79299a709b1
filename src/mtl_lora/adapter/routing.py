"""Task routing: which task each row (or token) of the running batch belongs to.

``with route.use(task_ids):`` around forward, loss and ``generate``; adapter layers read the ids when they run.
The route is not stored on the model and not passed by hooks: ids on the model go wrong when two forwards precede
one backward, and hooks are gone when gradient checkpointing recomputes.
"""

import contextlib
import contextvars
import functools

import torch

from mtl_lora.errors import UserError

_current: contextvars.ContextVar["Route | None"] = contextvars.ContextVar("mtl_lora_route", default=None)


class Route:
    """Task ids of one batch.

    task_ids: integer tensor, (B,) for one id a row or (B, L) for one id a token (packed rows).
    """

    def __init__(self, task_ids: torch.Tensor):
        try:
            task_ids = torch.as_tensor(task_ids)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"task_ids must be a tensor of whole numbers, not {task_ids!r}") from None
        dtype = task_ids.dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or task_ids.dim() not in (1, 2):
            raise UserError(
                "task_ids must be whole numbers of shape (batch,) or (batch, length), "
                f"not {task_ids.dtype} of shape {tuple(task_ids.shape)}"
            )
        # A copy, for the backward pass may come after the caller has filled its tensor with the next batch's ids.
        self._by_repeats = {1: task_ids.to(torch.long, copy=True)}
        # The smallest and largest id are read once here, where the ids usually still lie on the CPU, so that layers
        # on a GPU need no synchronisation to refuse an id out of range.
        self.lowest, self.highest = (int(task_ids.min()), int(task_ids.max())) if task_ids.numel() else (0, 0)

    @property
    def task_ids(self) -> torch.Tensor:
        """The ids as they were given."""
        return self._by_repeats[1]

    def repeat(self, repeats: int) -> None:
        """Let the route also serve a batch in which every row stands ``repeats`` times (beam search)."""
        self._by_repeats[repeats] = self.task_ids.repeat_interleave(repeats, dim=0)

    def ids_for(self, x: torch.Tensor, tasks: list[str]) -> torch.Tensor:
        """Ids on ``x``'s device for a layer input of shape (B, ..., k); raises ``UserError`` if they do not fit."""
        if self.lowest < 0 or self.highest >= len(tasks):
            wrong = self.lowest if self.lowest < 0 else self.highest
            listed = ", ".join(f"{index} {name}" for index, name in enumerate(tasks))
            raise UserError(f"task id {wrong} is outside 0 to {len(tasks) - 1}; the adapter's tasks are {listed}")
        for repeats, task_ids in self._by_repeats.items():
            if x.dim() > task_ids.dim() and x.shape[: task_ids.dim()] == task_ids.shape:
                if task_ids.device != x.device:
                    task_ids = self._by_repeats[repeats] = task_ids.to(x.device)
                return task_ids
        raise UserError(
            f"a batch of shape {tuple(x.shape[:-1])} does not match task_ids of shape {tuple(self.task_ids.shape)}; "
            "pass one id per row, (batch,), or one per token, (batch, length)"
        )


@contextlib.contextmanager
def use(task_ids: torch.Tensor):
    """Route the forwards inside the block: ``task_ids`` (B,) or (B, L), integers in 0..T-1."""
    token = _current.set(Route(task_ids))
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Route | None:
    """The route in force, or None outside ``use``."""
    return _current.get()


def task_ids_for(x: torch.Tensor, tasks: list[str]) -> torch.Tensor:
    """The ids in force for a layer input; raises ``UserError`` where there are none or they do not fit."""
    route = current()
    if route is None:
        raise UserError("this adapter needs task ids: run the model inside `with mtl_lora.route.use(task_ids):`")
    return route.ids_for(x, tasks)


class _Restored:
    """Enters a route anew each time: a graph that is kept for a second backward pass is recomputed twice."""

    def __init__(self, route: Route):
        self.route = route

    def __enter__(self) -> None:
        self.token = _current.set(self.route)

    def __exit__(self, *exception) -> None:
        _current.reset(self.token)


def checkpoint_context():
    """``context_fn`` for non-reentrant ``torch.utils.checkpoint``: the recomputation runs under the forward's route.

    The first context is entered as a checkpointed layer runs, the second in the backward pass, by which time
    another batch may have been routed.
    """
    route = current()
    return contextlib.nullcontext(), contextlib.nullcontext() if route is None else _Restored(route)


def enable_gradient_checkpointing(model: torch.nn.Module) -> None:
    """Turn on gradient checkpointing of a transformers model in the one form that keeps the route."""
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_context})


def follow_beams(model: torch.nn.Module) -> None:
    """Have the route repeat its rows where ``generate`` of a transformers model repeats the batch.

    Repeating is announced by the model, never guessed from sizes: a batch that is by accident a multiple of its
    ids stays an error.
    """
    expand = getattr(model, "_expand_inputs_for_generation", None)
    if expand is None or getattr(expand, "follows_beams", False):
        return

    @functools.wraps(expand)
    def expand_with_route(expand_size: int = 1, *arguments, **options):
        if current() is not None and expand_size > 1:
            current().repeat(expand_size)
        return expand(expand_size, *arguments, **options)

    expand_with_route.follows_beams = True
    model._expand_inputs_for_generation = expand_with_route
