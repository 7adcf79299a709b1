"""MTL-LoRA (arXiv 2410.09437, equations 5 to 7): a task's own r x r transform and its own mixture of up-projections."""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mtl_lora.adapter import routing
from mtl_lora.adapter.config import AdapterConfig, Hyperparameters
from mtl_lora.adapter.layer import AdapterLayer, Factors, Streams, kaiming
from mtl_lora.config import flag

LAMBDA_SHAPES = ("full", "diagonal", "identity")
MIXTURES = ("learned", "uniform")
_LARGEST = 2**24  # numbers that are prepared for all layers of a forward: 64 MB


class MtlLoraLayer(AdapterLayer):
    """y = W x + b + (alpha / r) sum_i softmax(w_t / tau)_i B_i Lambda_t A dropout(x), i = 1..n, t the row's task.

    lora_A: (r, k), shared. lora_lambda: (T, r, r), Lambda_t, starts at the identity; with ``lambda_shape="diagonal"``
    (T, r), its diagonal. lora_w: (T, n), mixture logits; drawn at random, for with equal weights every B_i would get
    the same gradient and stay equal to its twins. lora_B: (d, n r), the matrix [B_1 ... B_n], starts at zero.
    Without a part, for studies of what each does: ``lambda_shape="identity"`` keeps Lambda_t at its start, and
    ``mixture="uniform"`` keeps w at zero, so that n acts as 1.

    Everything that differs between tasks fits in rank space: with P_t = [w_t1 Lambda_t; ...; w_tn Lambda_t] of shape
    (n r, r), y += scale [B_1 ... B_n] (P_t (A x)). So the batch needs one product with A, one small product per row
    picked by task id, and one with the shared B; no copy of A or B per row, no loop over tasks, no synchronisation.
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
            "w starts at this times U(-1/sqrt n, 1/sqrt n); the paper's is 1, near 0 mixes evenly",
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

    @property
    def diagonal(self) -> bool:
        """Whether Lambda_t is stored as its diagonal."""
        return self.hyperparameters.lambda_shape != "full"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        own = self.hyperparameters
        kaiming(self.lora_A)
        kaiming(self.lora_w)  # drawn where it is not learned too, so that what is drawn next is the same
        self.lora_w.mul_(own.mixture_start if own.mixture == "learned" else 0)
        self.lora_w.requires_grad_(own.mixture == "learned")
        self.lora_lambda.requires_grad_(own.lambda_shape != "identity")
        self.lora_lambda.copy_(torch.ones(self.rank) if self.diagonal else torch.eye(self.rank))
        nn.init.zeros_(self.lora_B)

    def mixture(self, task_ids: torch.Tensor) -> torch.Tensor:
        """softmax(w_t / tau) for each id: (M,) to (M, n)."""
        return F.softmax(self.lora_w[task_ids] / self.hyperparameters.temperature, dim=-1)

    def task_transforms(self, task_ids: torch.Tensor) -> torch.Tensor:
        """Lambda_t for each id: (M,) to (M, r, r)."""
        transforms = self.lora_lambda[task_ids]
        return torch.diag_embed(transforms) if self.diagonal else transforms

    def combined_transform(self, task_ids: torch.Tensor) -> torch.Tensor:
        """P_t for each id: (M,) to (M, n r, r). Gathered before it is built, so the cost does not grow with T."""
        return _combined(self.mixture(task_ids), self.task_transforms(task_ids))

    @classmethod
    def prepare(cls, layers: list["MtlLoraLayer"], task_ids: torch.Tensor) -> list[torch.Tensor]:
        """P_t transposed for each id, (G, r, n r), of every layer."""
        first = layers[0]
        if torch._C._functorch.peek_interpreter_stack() is not None:  # torch.func transforms plain operations alone
            return []
        if len(layers) * len(task_ids) * first.lora_B.shape[1] * first.rank > _LARGEST:
            return []
        dtype = first.compute_dtype if first.base_layer.weight.is_floating_point() else first.parameter_dtype
        parameters = [layer.lora_w for layer in layers] + [layer.lora_lambda for layer in layers]
        return list(_Transforms.apply(task_ids, first.hyperparameters.temperature, dtype, *parameters))

    def mix(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        blocks, transform = routing.blocks_for(x, self), routing.prepared_for(self)
        # One that was prepared where no gradient was wanted is of no use where one is.
        if transform is None or (torch.is_grad_enabled() and not transform.requires_grad):
            transform = self.combined_transform(blocks.ids).transpose(1, 2)
        return blocks.map(torch.bmm, z, transform.to(z.dtype))

    def streams(self, x: Streams) -> Streams:
        """The shared stream has Lambda = I and equal weights, y = W x + b + (alpha / r) mean_i B_i A x~; task t's is

        y_t = W x + b + (alpha / r) sum_i softmax(w_t / tau)_i B_i Lambda_t A z_t, where z_t is x~ or the task's input.
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
        """A and B = [B_1 ... B_n] P_t for one task; raises ``UserError`` for a task that is not there."""
        index = torch.tensor([self.task_index(task)], device=self.lora_w.device)
        return Factors(self.lora_A, self.lora_B @ self.combined_transform(index)[0], self.scale)


def _combined(weights: torch.Tensor, transforms: torch.Tensor) -> torch.Tensor:
    """[w_1 Lambda; ...; w_n Lambda] of weights (..., n) and Lambda (..., r, r): (..., n r, r)."""
    return (weights[..., None, None] * transforms[..., None, :, :]).flatten(-3, -2)


def _versions(parameters: Sequence[torch.Tensor]) -> list[int | None]:
    """How often each was changed in place; not counted for a model that was built in inference mode."""
    return [None if parameter.is_inference() else parameter._version for parameter in parameters]


class _Transforms(torch.autograd.Function):
    """Ids (G,), tau, the dtype of the result, M lora_w (T, n) and M lora_lambda to M P_t transposed, (G, r, n r).

    A function of its own because of the gradients: a layer that was not called has none, and parts of a model may be
    differentiated one after the other, each once.
    """

    @staticmethod
    def forward(ctx, task_ids, temperature, dtype, *parameters):
        ctx.set_materialize_grads(False)
        # Not saved by autograd, which would free them after the first of several backward passes.
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
            # (layer, id, n, r, r), as P_t is [w_i Lambda] over i.
            found = found.transpose(-1, -2).unflatten(-2, (weights.shape[-1], -1))
            by_weight = (found * transforms[:, :, None]).sum(dim=(-1, -2))
            # torch's own operation, so that the sums are those of a layer alone, bit for bit.
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
    """softmax(w_t / tau) (M, G, n) and Lambda_t (M, G, r, r) of M layers for the ids (G,)."""
    weights = F.softmax(torch.stack(list(logits))[:, task_ids] / temperature, dim=-1)
    transforms = torch.stack(list(matrices))[:, task_ids]
    return weights, torch.diag_embed(transforms) if transforms.dim() == 3 else transforms
