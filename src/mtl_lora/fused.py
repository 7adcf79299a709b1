"""The low-rank path of LoRA and MTL-LoRA on a GPU as six Triton kernels, instead of some fifty small ones of torch.

A training step of a model in bf16 launches kernels faster than a processor can queue them, so what counts is their
number (benchmark/LOG.md). Forward: dropout, A and the mixing of a task in one kernel, B and the sum in another.
Backward: four (three for LoRA). Weights are read as they are stored, in float32, and products run in the activations'
dtype with float32 sums. Every sum has a fixed order, so results are the same bit for bit from run to run.

G groups of L rows share a task, N = G L rows; k in_features, d out_features, r rank, n up-projections, T tasks.
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

_LARGEST_RANK, _LARGEST_WIDTH = 32, 128  # r and n r, for which the tiles below fit in any GPU's shared memory


@dataclasses.dataclass
class Mixing:
    """What MTL-LoRA does between A and B: z to [w_t1 Lambda_t z; ...; w_tn Lambda_t z], w_t = softmax(logits_t / tau).

    transforms: (T, r, r), or (T, r) for diagonal ones. logits: (T, n). task_ids: (G,), on the weights' device.
    """

    transforms: torch.Tensor
    logits: torch.Tensor
    temperature: float
    task_ids: torch.Tensor


def applies(rows: torch.Tensor, output: torch.Tensor, rank: int, width: int, groups: int) -> bool:
    """Whether the kernels take rows (N, k) on a GPU, of this many groups, and the output (N, d) of the base layer.

    width: n r. Groups of a single row, as ids for every token make, are many programs of little work each.
    """
    return (
        rows.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and output.dtype == rows.dtype
        and output._base is None
        and output.is_contiguous()
        and rank <= _LARGEST_RANK
        and width <= _LARGEST_WIDTH
        and 0 < len(rows) <= max(16, len(rows) // groups) * 65536
        and (groups <= 512 or len(rows) >= 16 * groups)
    )


def low_rank(
    rows: torch.Tensor,
    output: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    dropout: float = 0.0,
    mixing: Mixing | None = None,
) -> torch.Tensor:
    """``output`` (N, d) += scale * mixed(dropout(rows) A^T) B^T, in place, with gradients for all; returns it.

    rows: (N, k). A: (r, k). B: (d, n r). dropout: the probability; masks come from torch's global CPU generator.
    """
    seed = int(torch.randint(2**31 - 1, ())) if dropout else 0
    settings = (scale, dropout, seed, mixing.temperature if mixing else 1.0)
    parts = (mixing.transforms, mixing.logits, mixing.task_ids) if mixing else (None, None, None)
    return _LowRank.apply(rows.contiguous(), output, A, B, *parts, settings)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, output, A, B, transforms, logits, task_ids, settings):
        scale, dropout, seed, temperature = settings
        (N, k), (d, R), r = rows.shape, B.shape, len(A)
        groups = 1 if task_ids is None else len(task_ids)
        z = torch.empty(N, r, dtype=torch.float32, device=rows.device)
        mixed = z if task_ids is None else torch.empty(N, R, dtype=torch.float32, device=rows.device)
        shapes = _shapes(r, R, transforms)
        with _on(rows):
            length = N // groups
            _down[(groups, triton.cdiv(length, 16))](
                rows, A, transforms, logits, task_ids, z, mixed, length, k, seed, dropout, 1 / temperature,
                **shapes, DROP=dropout > 0, ROWS=16, COLUMNS=4096 // shapes["RP"],
            )  # fmt: skip
            _up[(triton.cdiv(N, 64), triton.cdiv(d, 64))](
                output, mixed, B, N, d, scale, R=R, RP=_power(R), ROWS=64, COLUMNS=64
            )
        ctx.mark_dirty(output)
        ctx.save_for_backward(rows, A, B, transforms, logits, task_ids, z, mixed)
        ctx.settings = settings
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rows, A, B, transforms, logits, task_ids, z, mixed = ctx.saved_tensors
        scale, dropout, seed, temperature = ctx.settings
        (N, k), (d, R), r = rows.shape, B.shape, len(A)
        groups = 1 if task_ids is None else len(task_ids)
        length, g = N // groups, gradient.contiguous()
        shapes = _shapes(r, R, transforms)
        blocks = triton.cdiv(length, 16)
        z_gradient, A_gradient, B_gradient = torch.empty_like(z), torch.empty_like(A), torch.empty_like(B)
        rows_gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        parts = logit_parts = transforms_gradient = logits_gradient = None
        if task_ids is not None:
            size = transforms[0].numel()
            parts = torch.empty(groups * blocks, size, dtype=torch.float32, device=rows.device)
            logit_parts = torch.empty(groups * blocks, logits.shape[1], dtype=torch.float32, device=rows.device)
            transforms_gradient, logits_gradient = torch.empty_like(transforms), torch.empty_like(logits)
        with _on(rows):
            _middle[(groups, blocks)](
                g, B, transforms, logits, task_ids, z, z_gradient, parts, logit_parts, length, d, scale,
                1 / temperature, **shapes, ROWS=16, COLUMNS=2048 // shapes["RP"],
            )  # fmt: skip
            if task_ids is not None:
                _by_task[(len(transforms),)](
                    parts, logit_parts, task_ids, transforms_gradient, logits_gradient, groups * blocks, blocks,
                    SIZE=size, SP=_power(size), n=logits.shape[1], NP=shapes["NP"],
                    BLOCKS=max(1, min(16, 4096 // _power(size))),
                )  # fmt: skip
            _up_gradient[(triton.cdiv(d, 32),)](
                g, mixed, B_gradient, N, d, scale, R=R, RP=_power(R), ROWS=64, COLUMNS=32
            )
            _down_gradient[(triton.cdiv(k, 32),)](
                rows, A, z_gradient, A_gradient, rows_gradient, N, k, seed, dropout,
                r=r, RP=shapes["RP"], DROP=dropout > 0, INPUT=rows_gradient is not None, ROWS=64, COLUMNS=32,
            )  # fmt: skip
        return rows_gradient, gradient, A_gradient, B_gradient, transforms_gradient, logits_gradient, None, None


def _on(tensor: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else torch.no_grad()


@functools.cache
def _power(size: int) -> int:
    """The power of two, from 16, that holds ``size``: what the sides of a tile must be."""
    return max(16, triton.next_power_of_2(size))


def _shapes(r: int, R: int, transforms: torch.Tensor | None) -> dict[str, int]:
    mode = 0 if transforms is None else 1 if transforms.dim() == 3 else 2
    n = R // r
    return {"r": r, "n": n, "RP": _power(r), "NP": triton.next_power_of_2(n), "MODE": mode}


# In all kernels: MODE 0 no mixing (LoRA), 1 full transforms, 2 diagonal ones; RP and NP: r (or n r) and n, padded.


@triton.jit
def _dropped(x, row, column, k, seed, p):
    kept = tl.rand(seed, row[:, None] * k + column[None, :]) >= p
    return tl.where(kept, x.to(tl.float32) / (1 - p), 0.0).to(x.dtype)


@triton.jit
def _softmax(logits_ptr, task, by_temperature, n: tl.constexpr, NP: tl.constexpr):
    i = tl.arange(0, NP)
    logits = tl.load(logits_ptr + task * n + i, mask=i < n, other=float("-inf")) * by_temperature
    exponentials = tl.exp(logits - tl.max(logits, axis=0))
    return exponentials / tl.sum(exponentials, axis=0)


@triton.jit
def _element(vector, i: tl.constexpr, NP: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, NP) == i, vector, 0.0), axis=0)


@triton.jit
def _square(transforms_ptr, task, r: tl.constexpr, RP: tl.constexpr):
    j = tl.arange(0, RP)
    inside = (j[:, None] < r) & (j[None, :] < r)
    return tl.load(transforms_ptr + task * r * r + j[:, None] * r + j[None, :], mask=inside, other=0.0)


@triton.jit
def _transformed(z, transforms_ptr, task, r: tl.constexpr, RP: tl.constexpr, MODE: tl.constexpr):
    if MODE == 1:
        return tl.dot(z, tl.trans(_square(transforms_ptr, task, r, RP)), input_precision="ieee")
    j = tl.arange(0, RP)
    return z * tl.load(transforms_ptr + task * r + j, mask=j < r, other=0.0)[None, :]


@triton.jit
def _down(
    x_ptr, A_ptr, transforms_ptr, logits_ptr, ids_ptr, z_ptr, mixed_ptr, length, k, seed, p, by_temperature,
    r: tl.constexpr, n: tl.constexpr, RP: tl.constexpr, NP: tl.constexpr, MODE: tl.constexpr, DROP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """z = dropout(x) A^T for a block of rows of one group, and what the group's task makes of it."""
    within = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = tl.program_id(0) * length + within
    j = tl.arange(0, RP)
    place = row.to(tl.int64)[:, None]
    z = tl.zeros((ROWS, RP), dtype=tl.float32)
    for start in range(0, k, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (within < length)[:, None] & (column < k)[None, :]
        x = tl.load(x_ptr + place * k + column[None, :], mask=inside, other=0.0)
        if DROP:
            x = _dropped(x, row, column, k, seed, p)
        A = tl.load(A_ptr + j[:, None] * k + column[None, :], mask=(j < r)[:, None] & (column < k)[None, :], other=0.0)
        z = tl.dot(x, tl.trans(A.to(x.dtype)), z, input_precision="ieee")
    inside = (within < length)[:, None] & (j < r)[None, :]
    tl.store(z_ptr + place * r + j[None, :], z, mask=inside)
    if MODE:
        task = tl.load(ids_ptr + tl.program_id(0))
        transformed = _transformed(z, transforms_ptr, task, r, RP, MODE)
        weights = _softmax(logits_ptr, task, by_temperature, n, NP)
        for i in tl.static_range(n):
            part = _element(weights, i, NP) * transformed
            tl.store(mixed_ptr + place * (n * r) + i * r + j[None, :], part, mask=inside)


@triton.jit
def _up(
    output_ptr, mixed_ptr, B_ptr, N, d, scale,
    R: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """output += scale * mixed B^T for a block of rows and columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    j = tl.arange(0, RP)
    target = output_ptr + row.to(tl.int64)[:, None] * d + column[None, :]
    inside = (row < N)[:, None] & (column < d)[None, :]
    output = tl.load(target, mask=inside, other=0.0)
    mixed = tl.load(mixed_ptr + row[:, None] * R + j[None, :], mask=(row < N)[:, None] & (j < R)[None, :], other=0.0)
    B = tl.load(B_ptr + column[:, None] * R + j[None, :], mask=(column < d)[:, None] & (j < R)[None, :], other=0.0)
    added = tl.dot(mixed.to(output.dtype), tl.trans(B.to(output.dtype)), input_precision="ieee")
    tl.store(target, (output.to(tl.float32) + scale * added).to(output.dtype), mask=inside)


@triton.jit
def _middle(
    g_ptr, B_ptr, transforms_ptr, logits_ptr, ids_ptr, z_ptr, z_gradient_ptr, parts_ptr, logit_parts_ptr, length, d,
    scale, by_temperature,
    r: tl.constexpr, n: tl.constexpr, RP: tl.constexpr, NP: tl.constexpr, MODE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From the output's gradient g to that of z, and this block's part of those of its task's transform and logits.

    With h = sum_i w_i B_i, the gradient of Lambda z is g h; that of w_i is the sum of (g^T Lambda z) * B_i.
    """
    within = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = tl.program_id(0) * length + within
    j = tl.arange(0, RP)
    place = row.to(tl.int64)[:, None]
    z_inside = (within < length)[:, None] & (j < r)[None, :]
    inner = tl.zeros((ROWS, RP), dtype=tl.float32)  # the gradient of Lambda z
    if MODE:
        task = tl.load(ids_ptr + tl.program_id(0))
        z = tl.load(z_ptr + place * r + j[None, :], mask=z_inside, other=0.0)
        transformed = _transformed(z, transforms_ptr, task, r, RP, MODE)
        weights = _softmax(logits_ptr, task, by_temperature, n, NP)
        weight_gradients = tl.zeros((NP,), dtype=tl.float32)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        g_inside = (within < length)[:, None] & (column < d)[None, :]
        B_inside = (column < d)[:, None] & (j < r)[None, :]
        g = tl.load(g_ptr + place * d + column[None, :], mask=g_inside, other=0.0)
        if MODE:
            product = tl.dot(tl.trans(g), transformed.to(g.dtype), input_precision="ieee")  # (COLUMNS, RP)
            B = tl.zeros((COLUMNS, RP), dtype=tl.float32)
            for i in tl.static_range(n):
                B_i = tl.load(B_ptr + column[:, None] * (n * r) + i * r + j[None, :], mask=B_inside, other=0.0)
                B += _element(weights, i, NP) * B_i
                one = tl.sum(tl.sum(product * B_i, axis=1), axis=0)
                weight_gradients += tl.where(tl.arange(0, NP) == i, one, 0.0)
        else:
            B = tl.load(B_ptr + column[:, None] * r + j[None, :], mask=B_inside, other=0.0)
        inner = tl.dot(g, B.to(g.dtype), inner, input_precision="ieee")
    inner = inner * scale
    if MODE == 0:
        tl.store(z_gradient_ptr + place * r + j[None, :], inner, mask=z_inside)
    else:
        block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        if MODE == 1:
            square = _square(transforms_ptr, task, r, RP)
            z_gradient = tl.dot(inner, square, input_precision="ieee")
            part = tl.dot(tl.trans(inner), z, input_precision="ieee")
            square_inside = (j < r)[:, None] & (j < r)[None, :]
            tl.store(parts_ptr + block * r * r + j[:, None] * r + j[None, :], part, mask=square_inside)
        else:
            diagonal = tl.load(transforms_ptr + task * r + j, mask=j < r, other=0.0)
            z_gradient = inner * diagonal[None, :]
            tl.store(parts_ptr + block * r + j, tl.sum(inner * z, axis=0), mask=j < r)
        tl.store(z_gradient_ptr + place * r + j[None, :], z_gradient, mask=z_inside)
        weight_gradients = weight_gradients * scale
        mean = tl.sum(weights * weight_gradients, axis=0)
        logit_gradients = weights * (weight_gradients - mean) * by_temperature
        i = tl.arange(0, NP)
        tl.store(logit_parts_ptr + block * n + i, logit_gradients, mask=i < n)


@triton.jit
def _by_task(
    parts_ptr, logit_parts_ptr, ids_ptr, transforms_gradient_ptr, logits_gradient_ptr, count, blocks,
    SIZE: tl.constexpr, SP: tl.constexpr, n: tl.constexpr, NP: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The sums of one task's parts, in the order of the blocks; zero for a task without rows."""
    task = tl.program_id(0)
    j, i = tl.arange(0, SP), tl.arange(0, NP)
    total = tl.zeros((SP,), dtype=tl.float32)
    logit_total = tl.zeros((NP,), dtype=tl.float32)
    for start in range(0, count, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        mine = tl.load(ids_ptr + block // blocks, mask=block < count, other=-1) == task
        parts = tl.load(
            parts_ptr + block[:, None] * SIZE + j[None, :], mask=mine[:, None] & (j < SIZE)[None, :], other=0.0
        )
        total += tl.sum(parts, axis=0)
        inside = mine[:, None] & (i < n)[None, :]
        logit_total += tl.sum(
            tl.load(logit_parts_ptr + block[:, None] * n + i[None, :], mask=inside, other=0.0), axis=0
        )
    tl.store(transforms_gradient_ptr + task * SIZE + j, total, mask=j < SIZE)
    tl.store(logits_gradient_ptr + task * n + i, logit_total, mask=i < n)


@triton.jit
def _up_gradient(
    g_ptr, mixed_ptr, B_gradient_ptr, N, d, scale,
    R: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of B, scale * g^T mixed, for a block of its rows."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    j = tl.arange(0, RP)
    total = tl.zeros((COLUMNS, RP), dtype=tl.float32)
    for start in range(0, N, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < N)[:, None] & (column < d)[None, :]
        g = tl.load(g_ptr + row.to(tl.int64)[:, None] * d + column[None, :], mask=inside, other=0.0)
        mixed_inside = (row < N)[:, None] & (j < R)[None, :]
        mixed = tl.load(mixed_ptr + row[:, None] * R + j[None, :], mask=mixed_inside, other=0.0)
        total = tl.dot(tl.trans(g), mixed.to(g.dtype), total, input_precision="ieee")
    inside = (column < d)[:, None] & (j < R)[None, :]
    tl.store(B_gradient_ptr + column[:, None] * R + j[None, :], total * scale, mask=inside)


@triton.jit
def _down_gradient(
    x_ptr, A_ptr, z_gradient_ptr, A_gradient_ptr, x_gradient_ptr, N, k, seed, p,
    r: tl.constexpr, RP: tl.constexpr, DROP: tl.constexpr, INPUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradients of A and of x for a block of columns of both, with the dropout of the forward pass drawn again."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    j = tl.arange(0, RP)
    A_inside = (j < r)[:, None] & (column < k)[None, :]
    A = tl.load(A_ptr + j[:, None] * k + column[None, :], mask=A_inside, other=0.0)
    total = tl.zeros((RP, COLUMNS), dtype=tl.float32)
    for start in range(0, N, ROWS):
        row = start + tl.arange(0, ROWS)
        place = row.to(tl.int64)[:, None] * k + column[None, :]
        inside = (row < N)[:, None] & (column < k)[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0)
        z_inside = (row < N)[:, None] & (j < r)[None, :]
        z_gradient = tl.load(z_gradient_ptr + row[:, None] * r + j[None, :], mask=z_inside, other=0.0).to(x.dtype)
        dropped = x
        if DROP:
            dropped = _dropped(x, row, column, k, seed, p)
        total = tl.dot(tl.trans(z_gradient), dropped, total, input_precision="ieee")
        if INPUT:
            x_gradient = tl.dot(z_gradient, A.to(x.dtype), input_precision="ieee").to(x.dtype)
            if DROP:
                x_gradient = _dropped(x_gradient, row, column, k, seed, p)
            tl.store(x_gradient_ptr + place, x_gradient, mask=inside)
    tl.store(A_gradient_ptr + j[:, None] * k + column[None, :], total, mask=A_inside)
