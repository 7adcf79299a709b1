"""Every method as slow, obvious loops straight from its formula; shares no code with the implementation.

One function a method gives what the trained path adds to W x + b for one token of one task. Legend: k in, d out,
r rank, n up-projections, T tasks, s = alpha / r.
"""

import torch

from mtl_lora.config import AdapterConfig

Parameters = dict[str, torch.Tensor]


def lora(x: torch.Tensor, task: int, weight: torch.Tensor, p: Parameters, config: AdapterConfig) -> torch.Tensor:
    """s B A x."""
    return config.alpha / config.rank * (p["lora_B"] @ (p["lora_A"] @ x))


def mtl_lora(x: torch.Tensor, task: int, weight: torch.Tensor, p: Parameters, config: AdapterConfig) -> torch.Tensor:
    """s sum_i softmax(w_t / tau)_i B_i Lambda_t A x."""
    r = config.rank
    exponentials = [torch.exp(logit / config.temperature) for logit in p["lora_w"][task]]
    total = torch.zeros(weight.shape[0], dtype=x.dtype)
    for i in range(config.num_B):
        share = exponentials[i] / sum(exponentials)
        B_i = p["lora_B"][:, i * r : (i + 1) * r]
        total = total + share * (B_i @ (p["lora_lambda"][task] @ (p["lora_A"] @ x)))
    return config.alpha / r * total


UPDATES = {"lora": lora, "mtl_lora": mtl_lora}


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


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    """Fail, with the worst elements, where two tensors differ by more than ``tolerance`` of the largest magnitude.

    Magnitudes here are near 1; below 1e-3 they no longer count, for a gradient may be zero but for rounding.
    """
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.isfinite().all(), f"{name} is not finite"
    difference = (actual - expected).abs().flatten()
    allowed = tolerance * max(expected.abs().max().item(), 1e-3)
    if not difference.numel() or difference.max() <= allowed:
        return
    worst = difference.argsort(descending=True)[:3].tolist()
    lines = [f"  element {i}: {actual.flatten()[i]:.10g}, not {expected.flatten()[i]:.10g}" for i in worst]
    raise AssertionError(f"{name} is off by {difference.max():.3g}, allowed {allowed:.3g}\n" + "\n".join(lines))
