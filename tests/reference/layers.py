"""Every method as slow, obvious loops straight from its formula; shares no code with the implementation.

One function a method gives what the trained path adds to W x + b for one token of one task. Legend: k in, d out,
r rank, n up-projections, T tasks, s = alpha / r (or alpha / sqrt(r), rsLoRA). The weights ``p`` are stacked
as each layer's docstring says, and taken apart here.
"""

import math

import torch

from mtl_lora.adapter.config import AdapterConfig

Parameters = dict[str, torch.Tensor]


def scale(config: AdapterConfig) -> float:
    """s."""
    return config.alpha / math.sqrt(config.rank) if config.use_rslora else config.alpha / config.rank


def softmax(logits: torch.Tensor) -> list[torch.Tensor]:
    """exp(l_i) / sum_j exp(l_j)."""
    exponentials = [torch.exp(logit) for logit in logits]
    return [exponential / sum(exponentials) for exponential in exponentials]


def lora(x: torch.Tensor, task: int, weight: torch.Tensor, p: Parameters, config: AdapterConfig) -> torch.Tensor:
    """s B A x."""
    return scale(config) * (p["lora_B"] @ (p["lora_A"] @ x))


def dora(x: torch.Tensor, task: int, weight: torch.Tensor, p: Parameters, config: AdapterConfig) -> torch.Tensor:
    """(c - 1) * W x + c * s B A x, with c = m / ||W + s B A|| by row; the norm is constant in the backward pass."""
    s = scale(config)
    adapted = (weight + s * (p["lora_B"] @ p["lora_A"])).detach()
    norm = torch.stack([(row * row).sum().sqrt() for row in adapted])
    c = p["lora_magnitude"] / norm
    return (c - 1) * (weight @ x) + c * (s * (p["lora_B"] @ (p["lora_A"] @ x)))


def multilora(x: torch.Tensor, task: int, weight: torch.Tensor, p: Parameters, config: AdapterConfig) -> torch.Tensor:
    """s sum_i c_i * (B_i A_i x)."""
    total = torch.zeros(weight.shape[0], dtype=x.dtype)
    for i in range(config.num_B):
        block = slice(i * config.rank, (i + 1) * config.rank)
        total = total + p["lora_scaling"][i] * (p["lora_B"][:, block] @ (p["lora_A"][block] @ x))
    return scale(config) * total


def moelora(x: torch.Tensor, task: int, weight: torch.Tensor, p: Parameters, config: AdapterConfig) -> torch.Tensor:
    """s sum_i softmax(G e_t)_i B_i A_i x, each expert of rank r / N."""
    gate = softmax(p["lora_gate"] @ p["lora_task_embedding"][task])
    expert_rank = config.rank // config.num_experts
    total = torch.zeros(weight.shape[0], dtype=x.dtype)
    for i in range(config.num_experts):
        block = slice(i * expert_rank, (i + 1) * expert_rank)
        total = total + gate[i] * (p["lora_B"][:, block] @ (p["lora_A"][block] @ x))
    return scale(config) * total


def mtl_lora(x: torch.Tensor, task: int, weight: torch.Tensor, p: Parameters, config: AdapterConfig) -> torch.Tensor:
    """s sum_i softmax(w_t / tau)_i B_i Lambda_t A x."""
    shares = softmax(p["lora_w"][task] / config.temperature)
    transform = p["lora_lambda"][task]
    if config.lambda_shape == "diagonal":
        transform = torch.diag(transform)
    total = torch.zeros(weight.shape[0], dtype=x.dtype)
    for i in range(config.num_B):
        block = slice(i * config.rank, (i + 1) * config.rank)
        total = total + shares[i] * (p["lora_B"][:, block] @ (transform @ (p["lora_A"] @ x)))
    return scale(config) * total


def hydralora(x: torch.Tensor, task: int, weight: torch.Tensor, p: Parameters, config: AdapterConfig) -> torch.Tensor:
    """s sum_i softmax(G x)_i B_i A x."""
    gate = softmax(p["lora_gate"] @ x)
    total = torch.zeros(weight.shape[0], dtype=x.dtype)
    for i in range(config.num_B):
        block = slice(i * config.rank, (i + 1) * config.rank)
        total = total + gate[i] * (p["lora_B"][:, block] @ (p["lora_A"] @ x))
    return scale(config) * total


UPDATES = {
    "lora": lora,
    "dora": dora,
    "multilora": multilora,
    "moelora": moelora,
    "mtl_lora": mtl_lora,
    "hydralora": hydralora,
}


def forward(
    x: torch.Tensor,
    task_ids: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    parameters: Parameters,
    config: AdapterConfig,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """y (..., d) of a layer for x (..., k), token by token.

    task_ids: one a row, or one a token, as the leading sizes of x. mask: what dropout multiplied x with, or None.
    """
    outputs = []
    for position in torch.cartesian_prod(*(torch.arange(size) for size in x.shape[:-1])).reshape(-1, x.dim() - 1):
        token = tuple(position.tolist())
        y = weight @ x[token]
        if bias is not None:
            y = y + bias
        dropped = x[token] if mask is None else x[token] * mask[token]
        task = int(task_ids[token[: task_ids.dim()]])
        outputs.append(y + UPDATES[config.method](dropped, task, weight, parameters, config))
    return torch.stack(outputs).reshape(*x.shape[:-1], -1)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest magnitude expected.

    Magnitudes here are near 1; below 1e-3 they no longer count, for a gradient may be zero but for rounding.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    """Fail, with the worst elements, where two tensors have a ``relative_error`` above ``tolerance``."""
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.isfinite().all(), f"{name} is not finite"
    error = relative_error(actual, expected)
    if error <= tolerance:
        return
    worst = (actual - expected).abs().flatten().argsort(descending=True)[:3].tolist()
    lines = [f"  element {i}: {actual.flatten()[i]:.10g}, not {expected.flatten()[i]:.10g}" for i in worst]
    raise AssertionError(f"{name} is off by {error:.3g} of its size, allowed {tolerance:.3g}\n" + "\n".join(lines))
