"""Task routing: which task each row (or token) of the running batch belongs to.

Before a model runs, a hook resolves the names in ``task_ids``, or in the ``use`` block around it, checks the range and
stores the ids where the layers read them: per thread, never on the model, so that two threads, or two forwards before
one backward, cannot mix them up. B must be the first axis of every layer's input. Models with activations (L, B, k) are
not supported, and if L equals B this cannot be detected.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch
from torch import nn

from mtl_lora.errors import UserError

_SHAPES = "(batch,), one for each row, or (batch, length), one for each token"
_RULE = f"task_ids must be names or whole numbers of shape {_SHAPES}"


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """Tokens grouped into blocks of rows of equal length, so that a layer needs one task id per row, not per token.

    ids: the task id of each of the M rows of all blocks, (M,). sizes: (rows, length) of each block. The tokens of the
    blocks follow each other, and in a block the tokens of its rows.
    """

    ids: torch.Tensor
    sizes: tuple[tuple[int, int], ...]

    def split(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Split values of all rows, (M, ...), into one tensor (rows, ...) per block."""
        return values.split([rows for rows, _ in self.sizes])

    def map(self, function: Callable, z: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Apply ``function`` to the tokens (rows, length, R) and the row values (rows, ...) of each block.

        z: (N, R), all tokens. values: (M, ...), of all rows. Returns (N, R').
        """
        if len(self.sizes) == 1:
            return function(z.view(*self.sizes[0], z.shape[-1]), values).flatten(0, 1)
        tokens = [rows * length for rows, length in self.sizes]
        parts = zip(z.split(tokens), self.split(values), self.sizes, strict=True)
        return torch.cat([function(part.view(*size, z.shape[-1]), own).flatten(0, 1) for part, own, size in parts])


class Route:
    """The task ids of one batch: a tensor, or a list of names until an adapter's tasks are known.

    blocks: how ids of shape (1, L) group into rows, or None. Raises ``UserError`` unless ``task_ids`` are names or
    whole numbers of shape (B,) or (B, L).
    """

    def __init__(self, task_ids, blocks: Blocks | None = None):
        self.blocks = blocks
        self._in_range_of = -1  # the number of tasks for which the ids were found to be in range
        rows = task_ids
        if not isinstance(task_ids, torch.Tensor | str):
            rows = task_ids.tolist() if hasattr(task_ids, "tolist") else task_ids  # an array or a pandas column
            rows = first = list(rows) if isinstance(rows, Sequence) else rows  # a list, or a column of datasets
            while isinstance(first, list | tuple) and first:
                first = first[0]
            if isinstance(first, str):
                self.task_ids: torch.Tensor | list = list(rows)
                return
        try:
            task_ids = torch.as_tensor(rows)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"{_RULE}, not {task_ids!r}") from None
        dtype = task_ids.dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or task_ids.dim() not in (1, 2):
            raise UserError(f"{_RULE}, not {dtype} of shape {tuple(task_ids.shape)}")
        # A copy, because the caller may overwrite its tensor with the next batch's ids before the backward pass.
        self.task_ids = task_ids.to(torch.long, copy=True)

    @property
    def by_token(self) -> bool:
        """Whether every token has an id of its own, shape (B, L)."""
        rows = self.task_ids
        return any(isinstance(row, list | tuple) for row in rows) if isinstance(rows, list) else rows.dim() == 2

    def repeated(self, repeats: int) -> "Route":
        """Return the route of a batch in which every row is repeated ``repeats`` times (beam search)."""
        if isinstance(self.task_ids, list):
            return Route([row for row in self.task_ids for _ in range(repeats)])
        return Route(self.task_ids.repeat_interleave(repeats, dim=0))

    def bind(self, tasks: list[str], like: torch.Tensor | None = None, keep=None) -> "BoundRoute":
        """Return the checked ids for an adapter with these tasks; raises ``UserError`` for an unknown name or id.

        like: the model's input (B, L, ...), for its device and length. keep: the ``logits_to_keep`` of the forward.
        """
        ids = self._resolved(tasks)
        if like is not None:
            ids = moved(ids, like.device)
        is_sequence = like is not None and (like.dim() == 3 or (like.dim() == 2 and not like.is_floating_point()))
        length = like.shape[1] if is_sequence else None
        return BoundRoute(ids, length, None if keep is None else _kept(ids, length, keep), self.blocks)

    def _resolved(self, tasks: list[str]) -> torch.Tensor:
        ids = self.task_ids
        if isinstance(ids, list):
            index = {name: position for position, name in enumerate(tasks)}
            try:
                return torch.tensor([index[row] if isinstance(row, str) else [index[n] for n in row] for row in ids])
            except KeyError as error:
                raise UserError(f"there is no task {error.args[0]!r}; {_listed(tasks)}") from None
            except (TypeError, ValueError):
                raise UserError(f"{_RULE}, not {ids!r}") from None
        if self._in_range_of == len(tasks) or not ids.numel():
            return ids
        if is_traced():  # a negative id would select a task from the end; this one is out of range wherever it is used
            return ids.where(ids >= 0, len(tasks))
        rule = f"outside 0 to {len(tasks) - 1}; {_listed(tasks)}"
        if ids.is_cuda:  # without waiting for the device
            message = f"a task id is {rule}".encode()[:250].decode(errors="ignore")  # torch refuses 255 bytes and more
            torch._assert_async(((ids >= 0) & (ids < len(tasks))).all(), message)
        else:
            lowest, highest = int(ids.min()), int(ids.max())
            if lowest < 0 or highest >= len(tasks):
                raise UserError(f"task id {lowest if lowest < 0 else highest} is {rule}")
        self._in_range_of = len(tasks)
        return ids


def is_traced() -> bool:
    """Whether ``torch.export``, ``torch.jit.trace`` or a ``torch.func`` transform runs the code, so that values of
    tensors cannot be read, or only those of the example."""
    exporting = getattr(torch.compiler, "is_exporting", bool)  # the oldest supported torch lacks it
    return exporting() or torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None


def _listed(tasks: list[str]) -> str:
    return "the adapter's tasks are " + ", ".join(f"{index} {name}" for index, name in enumerate(tasks))


@dataclasses.dataclass(eq=False)
class BoundRoute:
    """The checked task ids of a running forward, as its layers read them."""

    task_ids: torch.Tensor  # (B,) or (B, L)
    length: int | None = None  # L of the model's input, if known: then layer inputs flattened to (B L, k) match too
    kept: "BoundRoute | None" = None  # the output head's route, if the forward projects only some positions
    blocks: Blocks | None = None  # how ids of shape (1, L) group into rows
    prepared: dict[nn.Module, torch.Tensor] = dataclasses.field(default_factory=dict)  # by layer, from ``prepare``

    @property
    def row_ids(self) -> torch.Tensor | None:
        """One id per row, (M,); None if there is one id per token."""
        if self.blocks is not None:
            return self.blocks.ids
        return self.task_ids if self.task_ids.dim() == 1 else None

    def ids_for(self, x: torch.Tensor) -> torch.Tensor:
        """Return the ids on the device of ``x``, a layer's input (B, ..., k), (B, 1, L, k) or (B L, k).

        Raises ``UserError`` if their shapes do not match.
        """
        ids = self.task_ids
        if ids.device != x.device:
            ids = self.task_ids = moved(ids, x.device)
            if self.blocks is not None:
                self.blocks = dataclasses.replace(self.blocks, ids=moved(self.blocks.ids, x.device))
        if x.dim() > ids.dim() and x.shape[: ids.dim()] == ids.shape:
            return ids
        if x.dim() == 4 and x.shape[1] == 1 and ids.shape == (len(x), x.shape[2]):  # as of DeepSeek's latent attention
            return ids
        is_flattened = x.dim() == 2 and self.length is not None and len(x) == len(ids) * self.length
        if is_flattened and (ids.dim() == 1 or ids.shape[1] == self.length):
            return ids
        way_out = f"pass ids of shape {_SHAPES}"
        if x.dim() == 3 and ids.dim() == 1 and x.shape[1] == len(ids):
            way_out += (
                "; if the model has its rows on the second axis, as Longformer, use a method without task ids, such as "
                "lora, or leave this layer out of the target modules"
            )
        raise UserError(
            f"a batch of shape {tuple(x.shape[:-1])} does not match task_ids of shape {tuple(ids.shape)}; {way_out}"
        )


def moved(ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return ids on a device, without waiting for the copy."""
    return ids.to(device, non_blocking=device.type == "cuda")


def _kept(ids: torch.Tensor, length: int | None, keep) -> BoundRoute | None:
    """Return the route of an output head that sees only the positions ``keep`` (transformers' ``logits_to_keep``).

    None if the head can use the route of the model.
    """
    selects_tokens = isinstance(keep, torch.Tensor) and keep.dim() == 2 and keep.dtype == torch.bool
    if length is None or (ids.dim() == 1 and not selects_tokens):
        return None
    by_token = ids if ids.dim() == 2 else ids[:, None].expand(-1, length)
    if isinstance(keep, int):
        return BoundRoute(by_token[:, -keep:]) if keep else None
    keep = keep.to(ids.device)
    if selects_tokens:
        return BoundRoute(by_token[keep])
    return BoundRoute(torch.take_along_dim(by_token, keep, dim=1) if keep.dim() == 2 else by_token[:, keep])


class TaskCollator:
    """A collator that keeps the ``task_ids`` of examples (names or ids), which other collators drop or cannot read.

    For transformers and TRL: ``Trainer(..., data_collator=TaskCollator(DataCollatorForLanguageModeling(...)))``. The
    Trainer's arguments must contain ``remove_unused_columns=False``. If accelerate splits batches across processes
    (``dispatch_batches``, its default for streamed data), ids must be numbers.

    collator: collates all other fields.
    """

    def __init__(self, collator: Callable[[list[dict]], MutableMapping]):
        self.collator = collator

    def __call__(self, examples: Sequence[Mapping]) -> MutableMapping:
        """Return the inner collator's batch with ``task_ids``; raises ``UserError`` for an example without them."""
        lacking = [number for number, example in enumerate(examples) if "task_ids" not in example]
        if lacking:
            fields = ", ".join(examples[lacking[0]])
            raise UserError(f"an example has no task_ids but {fields}; pass remove_unused_columns=False to the Trainer")
        rest = [{key: value for key, value in example.items() if key != "task_ids"} for example in examples]
        batch = self.collator(rest)
        batch["task_ids"] = Route([example["task_ids"] for example in examples]).task_ids
        return batch


# ---- the current routes of a thread ----


class _Routes:
    """The current routes of one thread."""

    depth: int = 0  # number of contexts that are entered
    outer: Route | None = None  # of ``use``
    model: BoundRoute | None = None  # of the running model
    backward: int = -1  # the backward pass in which ``outer`` was entered, -1 for none


class _Thread(threading.local):
    """Thread-local storage of the routes.

    ``torch.compile`` cannot read context variables, and torch 2.11 treats attributes of thread-local storage as
    constants; hence the routes are attributes of an object in it.
    """

    def __init__(self):
        self.routes = _Routes()


_thread = _Thread()


class RouteContext:
    """A context manager that makes routes current.

    It may be entered several times, because a graph that is retained is recomputed in every backward pass.
    """

    def __init__(self, outer: Route | None, model: BoundRoute | None = None):
        self.outer, self.model = outer, model
        self.before: list[tuple] = []  # the routes to restore, one entry for each time it is entered

    def __enter__(self) -> None:
        routes = _thread.routes
        self.before.append((routes.outer, routes.model, routes.backward, routes.depth))
        routes.outer, routes.model, routes.backward = self.outer, self.model, _backward_pass()
        routes.depth += 1

    def __exit__(self, raised, *exception) -> None:
        routes = _thread.routes
        *before, depth = self.before.pop()
        routes.depth -= 1
        if routes.depth == depth:
            routes.outer, routes.model, routes.backward = before
            return
        if not routes.depth:
            routes.outer, routes.model, routes.backward = None, None, -1
        if raised is not None:
            return
        raise UserError(
            "blocks of task ids did not end in the order in which they began, so forwards may have had the ids of "
            "another block; do not await or yield inside `with mtl_lora.route.use(...)`, pass task_ids to the model"
        )


def use(task_ids) -> RouteContext:
    """Set the task ids of all forwards inside a block: ``with mtl_lora.route.use(["boolq", "piqa"]):``.

    task_ids: names, or whole numbers in 0..T-1, of shape (B,), one per row, or (B, L), one per token. Names are looked
    up in the tasks of the model that runs. Raises ``UserError`` for anything else.
    """
    return RouteContext(Route(task_ids))


def use_blocks(blocks: Blocks) -> RouteContext:
    """Set the task ids of all forwards inside a block, for a batch of one row of tokens, grouped by ``blocks``."""
    by_token = [
        ids[:, None].expand(size).reshape(-1) for ids, size in zip(blocks.split(blocks.ids), blocks.sizes, strict=True)
    ]
    return RouteContext(Route(torch.cat(by_token)[None], blocks))


def current() -> Route | None:
    """Return the route of the innermost ``use`` block, or None outside of one."""
    return _thread.routes.outer


def repeat_rows(repeats: int) -> None:
    """Repeat every row of the current ``use`` block, if there is one, as ``generate`` repeats the rows of its batch."""
    if _thread.routes.outer is not None and repeats > 1:
        _thread.routes.outer = _thread.routes.outer.repeated(repeats)


def captured(prepared: bool = True) -> Callable[[], RouteContext]:
    """Return a function that makes a context manager inside which the present routes are current again.

    prepared: whether layers may read there what ``prepare`` has computed for this forward.
    """
    outer, model = _thread.routes.outer, _thread.routes.model
    if model is not None and not prepared:
        model = dataclasses.replace(model, prepared={})
    return functools.partial(RouteContext, outer, model)


def checkpoint_context() -> tuple[RouteContext, RouteContext]:
    """Return the contexts that keep task ids when activations are recomputed.

    Pass this function as ``context_fn`` to a non-reentrant ``torch.utils.checkpoint.checkpoint`` around adapter layers.
    """
    again = captured()
    return again(), again()


def enter_model(task_ids, tasks: list[str], like: torch.Tensor | None, keep) -> BoundRoute | None:
    """Make the ids passed to a forward current, or those of the ``use`` block around it; returns its checked route."""
    route = None if task_ids is None else Route(task_ids)
    # A model that is recomputed as a whole must not read the ``use`` block of another batch.
    if route is None and _thread.routes.backward == _backward_pass():
        route = _thread.routes.outer
    _thread.routes.model = route.bind(tasks, like, keep) if route is not None and tasks else None
    return _thread.routes.model


def select_rows(task_ids: torch.Tensor) -> None:
    """Set the task ids, of any shape, of the output head of the running model, which sees a selection of positions."""
    if _thread.routes.model is not None:
        _thread.routes.model.kept = BoundRoute(task_ids)


def leave_model() -> None:
    """Drop the route of the model at the end of a forward, also of one that raised."""
    _thread.routes.model = None


def prepared_for(layer) -> torch.Tensor | None:
    """Return what ``prepare`` computed for a layer in this forward; None if the layer must compute it itself."""
    # Compiled code may be reused for other layers, so it must not look up a tensor by layer.
    if torch.compiler.is_compiling():
        return None
    route = _thread.routes.model
    return None if route is None else route.prepared.get(layer)


def blocks_for(x: torch.Tensor, layer) -> Blocks:
    """Return the current task ids for the input ``x`` of a layer as blocks of rows.

    Raises ``UserError`` if there are none or if their shape does not match ``x``.
    """
    route = _route_of(layer)
    ids = route.ids_for(x).reshape(-1)  # each covers the same number of tokens
    return route.blocks or Blocks(ids, ((len(ids), x.shape[:-1].numel() // max(len(ids), 1)),))


def _route_of(layer) -> BoundRoute:
    outer, route = _thread.routes.outer, _thread.routes.model
    if route is not None:
        return route.kept if layer.is_head and route.kept is not None else route
    # The layer is called outside the forward of its model: alone, or in a bare encoder.
    if outer is not None and _thread.routes.backward == _backward_pass():
        return outer.bind(layer.tasks)
    if _backward_pass() != -1:
        raise UserError(
            "a layer is recomputed in the backward pass without the task ids of its forward: pass use_reentrant=False "
            "and context_fn=mtl_lora.route.checkpoint_context to torch.utils.checkpoint.checkpoint, or turn on the "
            "gradient checkpointing of transformers"
        )
    raise UserError(
        "this adapter needs task ids: call the whole model with task_ids=..., or inside `with "
        "mtl_lora.route.use(task_ids):` (a Trainer drops the column unless remove_unused_columns=False, its collator "
        "unless it is a mtl_lora.TaskCollator)"
    )


def _backward_pass() -> int:
    """Return the id of the backward pass that runs in this thread; -1 if none does."""
    return torch._C._current_graph_task_id()
