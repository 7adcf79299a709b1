"""MTL-LoRA (arXiv 2410.09437, equations 5 to 7): each task has an r x r transform and a mixture of up-projections."""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mtl_lora.adapter import routing
from mtl_lora.adapter.config import AdapterConfig, Hyperparameters
from mtl_lora.adapter.layer import AdapterLayer, Factors, Streams, kaiming, task_index
from mtl_lora.config import flag

LAMBDA_SHAPES = ("full", "diagonal", "identity")
MIXTURES = ("learned", "uniform")
_MAX_PREPARED = 2**24  # most elements that ``prepare`` computes for all layers of a forward: 64 MB in float32


class MtlLoraLayer(AdapterLayer):
    """y = W x + b + (alpha / r) sum_i softmax(w_t / tau)_i B_i Lambda_t A dropout(x), i = 1..n, t the row's task.

    lora_A: (r, k), A, shared by all tasks, starts like the weight of a torch Linear. lora_lambda: (T, r, r), Lambda_t,
    starts at the identity; only its diagonal, (T, r), unless ``lambda_shape`` is "full". lora_w: (T, n), mixture logits
    w_t, start at random: with equal weights, all B_i would get the same gradient and stay equal. lora_B: (d, n r), the
    matrix [B_1 ... B_n], shared by all tasks, starts at zero. For ablations, ``lambda_shape="identity"`` keeps Lambda_t
    at the identity, and ``mixture="uniform"`` keeps w at zero, so that all B_i stay equal and n acts as 1.

    Everything that differs between tasks is done in rank space. With P_t = [m_1 Lambda_t; ...; m_n Lambda_t] of shape
    (n r, r) and m = softmax(w_t / tau), y += scale [B_1 ... B_n] (P_t (A x)). So a batch needs one product with A, one
    small product per row with the P_t of its task, and one product with the shared B: no copy of A or B per row, no
    loop over tasks, no synchronisation.
    """

    method, title, paper = "mtl_lora", "MTL-LoRA", "2410.09437"
    aliases = ("mlora",)
    no_decay = ("lora_lambda",)  # starts at the identity
    needs_task_ids = True
    makes_streams = True
    mixture_parts = "up-projections"
    task_parameters = ("lora_lambda", "lora_w")

    @dataclasses.dataclass
    class Hyperparameters(Hyperparameters):
        num_B: int = flag(3, "number n of up-projections", min=1)
        temperature: float = flag(0.1, "temperature tau of the mixture softmax(w_t / tau)", above=0)
        lambda_shape: str = flag(
            "full", "Lambda_t: full (r x r), diagonal, or identity (not trained)", choices=LAMBDA_SHAPES, before="full"
        )
        mixture: str = flag(
            "learned", "the mixture: learned, or uniform (not trained)", choices=MIXTURES, before="learned"
        )
        mixture_start: float = flag(
            1.0,
            "factor on the initial w, drawn from U(-1/sqrt n, 1/sqrt n); the paper's is 1, near 0 mixes evenly",
            above=0,
            before=1.0,
        )

    @staticmethod
    def shapes(config: AdapterConfig, k: int, d: int) -> dict[str, tuple[int, ...]]:
        T, n, r = len(config.tasks), config.num_B, config.rank
        return {
            "lora_A": (r, k),
            "lora_lambda": (T, r, r) if config.lambda_shape == "full" else (T, r),
            "lora_w": (T, n),
            "lora_B": (d, n * r),
        }

    @torch.no_grad()
    def reset_parameters(self) -> None:
        own = self.hyperparameters
        kaiming(self.lora_A)
        kaiming(self.lora_w)  # always drawn, so that the draws of later layers do not depend on ``mixture``
        self.lora_w.mul_(own.mixture_start if own.mixture == "learned" else 0)
        self.lora_w.requires_grad_(own.mixture == "learned")
        self.lora_lambda.requires_grad_(own.lambda_shape != "identity")
        self.lora_lambda.copy_(torch.ones(self.rank) if self.lora_lambda.dim() == 2 else torch.eye(self.rank))
        nn.init.zeros_(self.lora_B)

    def mixture(self, task_ids: torch.Tensor) -> torch.Tensor:
        """Return softmax(w_t / tau) for each task id, (M,) to (M, n)."""
        return F.softmax(self.lora_w[task_ids] / self.hyperparameters.temperature, dim=-1)

    def task_transforms(self, task_ids: torch.Tensor) -> torch.Tensor:
        """Return Lambda_t for each task id, (M,) to (M, r, r)."""
        transforms = self.lora_lambda[task_ids]
        return torch.diag_embed(transforms) if self.lora_lambda.dim() == 2 else transforms

    def combined_transform(self, task_ids: torch.Tensor) -> torch.Tensor:
        """Return P_t for each task id, (M,) to (M, n r, r); the cost does not grow with T."""
        return _combined(self.mixture(task_ids), self.task_transforms(task_ids))

    @classmethod
    def prepare(cls, layers: list["MtlLoraLayer"], task_ids: torch.Tensor) -> list[torch.Tensor]:
        """Return, for every layer, P_t transposed for each task id (G,), as one tensor (G, r, n r)."""
        first = layers[0]
        if torch._C._functorch.peek_interpreter_stack() is not None:  # torch.func cannot transform ``_Transforms``
            return []
        if len(layers) * len(task_ids) * first.lora_B.shape[1] * first.rank > _MAX_PREPARED:
            return []
        dtype = first.compute_dtype if first.base_layer.weight.is_floating_point() else first.parameter_dtype
        parameters = [layer.lora_w for layer in layers] + [layer.lora_lambda for layer in layers]
        return list(_Transforms.apply(task_ids, first.hyperparameters.temperature, dtype, *parameters))

    def mix(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        blocks, transform = routing.blocks_for(x, self), routing.prepared_for(self)
        # A transform that was prepared without gradients cannot be used where gradients are required.
        if transform is None or (torch.is_grad_enabled() and not transform.requires_grad):
            transform = self.combined_transform(blocks.ids).transpose(1, 2)
        return blocks.map(torch.bmm, z, transform.to(z.dtype))

    def streams(self, x: Streams) -> Streams:
        """Map streams (..., k) to a shared output y (..., d) and one output y_t per task, (T, ..., d).

        y = W x + b + (alpha / r) mean_i B_i A x~, that is, with Lambda = I and equal weights;
        y_t = W x + b + (alpha / r) sum_i softmax(w_t / tau)_i B_i Lambda_t A z_t.
        x~ = dropout(x). z_t is the task's own input without dropout, or x~ if the task has none yet.
        """
        output, dropped = self.base_and_dropped(x.shared)
        down, up = self.down().to(output.dtype), self.up().to(output.dtype)
        shared = F.linear(dropped, down)
        own = shared if x.tasks is None else F.linear(x.tasks.reshape(len(self.tasks), -1, self.in_features), down)
        transforms = self.combined_transform(torch.arange(len(self.tasks), device=down.device)).to(output.dtype)
        mixed = own @ transforms.transpose(1, 2)
        ups = up.T.expand(len(self.tasks), -1, -1)
        tasks = torch.baddbmm(output.expand(len(self.tasks), -1, -1), mixed, ups, alpha=self.scale)
        mean = up.unflatten(1, (self.hyperparameters.num_B, -1)).mean(dim=1)
        return self.as_streams(torch.addmm(output, shared, mean.T, alpha=self.scale), tasks, x)

    def factors(self, task: str | int | None = None) -> Factors:
        """Return A and B = [B_1 ... B_n] P_t for one task; raises ``UserError`` for an unknown task."""
        index = torch.tensor([task_index(self.tasks, task)], device=self.lora_w.device)
        return Factors(self.lora_A, self.lora_B @ self.combined_transform(index)[0], self.scale)


def _combined(weights: torch.Tensor, transforms: torch.Tensor) -> torch.Tensor:
    """Return [m_1 Lambda; ...; m_n Lambda], (..., n r, r), from weights m (..., n) and Lambda (..., r, r)."""
    return (weights[..., None, None] * transforms[..., None, :, :]).flatten(-3, -2)


def _versions(parameters: Sequence[torch.Tensor]) -> list[int | None]:
    """Return how often each parameter was changed in place; None for one that was made in inference mode."""
    return [None if parameter.is_inference() else parameter._version for parameter in parameters]


class _Transforms(torch.autograd.Function):
    """P_t transposed for each task id, as one tensor (G, r, n r) per layer, for M layers at once.

    Takes task ids (G,), tau, the dtype of the result, the lora_w (T, n) of all M layers, then their lora_lambda. A
    custom function because of the gradients: a layer that was not called gets none, and parts of a model may run their
    backward passes one after the other.
    """

    @staticmethod
    def forward(ctx, task_ids, temperature, dtype, *parameters):
        ctx.set_materialize_grads(False)
        # Not with save_for_backward: autograd would free them after the first of several backward passes.
        ctx.task_ids, ctx.temperature, ctx.parameters = task_ids, temperature, parameters
        ctx.versions = _versions(parameters)
        half = len(parameters) // 2
        weights, transforms = _picked(parameters[:half], parameters[half:], task_ids, temperature)
        return _combined(weights, transforms).to(dtype).transpose(-1, -2).unbind()

    @staticmethod
    def backward(ctx, *gradients):
        half, result = len(gradients), [None] * (2 * len(gradients))
        called = [index for index, gradient in enumerate(gradients) if gradient is not None]
        if _versions(ctx.parameters) != ctx.versions:
            raise RuntimeError(
                "a weight of the adapter was changed in place between a forward pass and its backward pass"
            )
        if called:
            logits = [ctx.parameters[index] for index in called]
            matrices = [ctx.parameters[half + index] for index in called]
            weights, transforms = _picked(logits, matrices, ctx.task_ids, ctx.temperature)
            found = torch.stack([gradients[index] for index in called]).to(weights.dtype)
            # (layer, id, n, r, r), because P_t stacks m_i Lambda over i.
            found = found.transpose(-1, -2).unflatten(-2, (weights.shape[-1], -1))
            by_weight = (found * transforms[:, :, None]).sum(dim=(-1, -2))
            # torch's own operation, so that the gradient equals that of a single layer bit for bit.
            by_logit = torch._softmax_backward_data(by_weight, weights, -1, weights.dtype) / ctx.temperature
            by_transform = (found * weights[..., None, None]).sum(dim=2)
            if matrices[0].dim() == 2:
                by_transform = by_transform.diagonal(dim1=-2, dim2=-1)
            layer = torch.arange(len(called), device=ctx.task_ids.device)[:, None]
            for offset, parameters, values in ((0, logits, by_logit), (half, matrices, by_transform)):
                total = values.new_zeros(len(called), *parameters[0].shape)
                total.index_put_((layer, ctx.task_ids), values, accumulate=True)
                for index, gradient in zip(called, total.unbind(), strict=True):
                    result[offset + index] = gradient
        return None, None, None, *result


def _picked(logits, matrices, task_ids, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(w_t / tau), (M, G, n), and Lambda_t, (M, G, r, r), of M layers for the task ids (G,)."""
    weights = F.softmax(torch.stack(list(logits))[:, task_ids] / temperature, dim=-1)
    transforms = torch.stack(list(matrices))[:, task_ids]
    return weights, torch.diag_embed(transforms) if transforms.dim() == 3 else transforms
