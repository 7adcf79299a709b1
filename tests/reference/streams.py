"""Streams, slow and obvious: transformers' own Swin or DINOv2 runs the shared stream, and each task's runs by itself.

Of a layer, ``weights`` are its adapter's by name. Nothing here is shared between tasks, batched or fused.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.swin.modeling_swin import window_partition

from mtl_lora.adapter.config import AdapterConfig


def low_rank(A: torch.Tensor, B: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """B A x for each row."""
    return (x @ A.T) @ B.T


def layer(base: nn.Linear, weights: dict, config: AdapterConfig, x: torch.Tensor, own: list | None):
    """(shared output, a list of the tasks' outputs) for the shared input and, if any, the tasks'."""
    frozen = x @ base.weight.T + (0 if base.bias is None else base.bias)
    s, tasks = config.alpha / config.rank, range(len(config.tasks))
    inputs = [x for _ in tasks] if own is None else own
    if config.method == "mtl_lora":
        n, r = config.num_B, config.rank
        ups = [weights["lora_B"][:, i * r : (i + 1) * r] for i in range(n)]
        shared = frozen + s * sum(low_rank(weights["lora_A"], up, x) for up in ups) / n
        outputs = []
        for t in tasks:
            mixture = torch.softmax(weights["lora_w"][t] / config.temperature, dim=0)
            z = (inputs[t] @ weights["lora_A"].T) @ weights["lora_lambda"][t].T
            outputs.append(frozen + s * sum(mixture[i] * (z @ ups[i].T) for i in range(n)))
        return shared, outputs
    terms = [config.task_scale * low_rank(weights["task_A"][t], weights["task_B"][t], inputs[t]) for t in tasks]
    if config.shared_mode == "addition":
        outputs = [frozen + term for term in terms]
        norm = weights["stream_norm_weight"], weights["stream_norm_bias"]
        return frozen + F.layer_norm(sum(outputs), frozen.shape[-1:], *norm), outputs
    shared = frozen + s * low_rank(weights["lora_A"], weights["lora_B"], x)
    common = shared if config.shared_mode == "matrixv2" else frozen
    return shared, [common + term for term in terms]


class Shared(nn.Module):
    """A linear layer with LoRA, or with one part of a fused one's B."""

    def __init__(self, base: nn.Linear, A: torch.Tensor, B: torch.Tensor, scale: float):
        super().__init__()
        self.base, self.factors = base, (A, B, scale)

    def forward(self, x):
        A, B, scale = self.factors
        return self.base(x) + scale * low_rank(A, B, x)


class OwnOfTasks(nn.Module):
    """A task-specific layer that keeps what it gave each task. inputs: gives the tasks'; None: they have none."""

    def __init__(self, base: nn.Linear, weights: dict, config: AdapterConfig):
        super().__init__()
        self.base, self.weights, self.config, self.inputs, self.outputs = base, weights, config, None, None

    def forward(self, x):
        own = None if self.inputs is None else self.inputs()
        shared, self.outputs = layer(self.base, self.weights, self.config, x, own)
        return shared


def put(plain: nn.Module, weights: dict[str, dict], config: AdapterConfig) -> None:
    """Put the layers of a model of ``dense`` on transformers' own, by the names that they have in the backbone."""
    scale = config.alpha / config.rank
    for name, own in weights.items():
        parent, last = plain.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if last == "qkv":
            for part, B in zip(("q_proj", "k_proj", "v_proj"), own["lora_B"].chunk(3), strict=True):
                setattr(parent, part, Shared(getattr(parent, part), own["lora_A"], B, scale))
        elif config.is_at(f"backbone.{name}", config.task_modules):
            setattr(parent, last, OwnOfTasks(getattr(parent, last), own, config))
        else:
            setattr(parent, last, Shared(getattr(parent, last), own["lora_A"], own["lora_B"], scale))


def in_order(windows: torch.Tensor, size: int, grid: tuple[int, int], shift: int) -> torch.Tensor:
    """Rows (B W, N, C) of shifted windows of a padded map to the tokens (B, h w, C) that they come from."""
    height, width = grid
    padded = [-(-side // size) * size for side in grid]
    number = torch.full(padded, -1)
    number[:height, :width] = torch.arange(height * width).view(height, width)
    places = window_partition(torch.roll(number, (-shift, -shift), (0, 1))[None, :, :, None], size).reshape(-1)
    rows = windows.reshape(-1, len(places), windows.shape[-1])
    where = {int(place): index for index, place in enumerate(places) if place >= 0}
    return rows[:, [where[token] for token in range(height * width)]]


class Follower:
    """The streams of the tasks in one last block, which transformers' own forward of the block sets off."""

    def __init__(self, block: nn.Module, swin: bool):
        self.block, self.swin = block, swin
        mlp = block.mlp
        self.own = isinstance(mlp.fc1, OwnOfTasks)
        block.register_forward_pre_hook(self.before, with_kwargs=True)
        if self.own:
            mlp.fc1.inputs = lambda: [(block.layernorm_after if swin else block.norm2)(x) for x in self.between()]
            mlp.fc2.inputs = lambda: [mlp.activation_fn(hidden) for hidden in mlp.fc1.outputs]

    def before(self, block, arguments, options):
        self.x = arguments[0] if arguments else options["hidden_states"]
        self.grid = (arguments[1] if len(arguments) > 1 else options["input_dimensions"]) if self.swin else None

    def between(self) -> list[torch.Tensor]:
        """Each task's tokens between attention and feed-forward layers."""
        outputs = self.block.attention.o_proj.outputs
        if not self.swin:
            return [self.x + self.block.layer_scale1(output) for output in outputs]
        size, shift = self.block.window_size, self.block.shift_size
        return [self.x + in_order(output, size, self.grid, shift) for output in outputs]

    def tokens(self) -> list[torch.Tensor]:
        """Each task's tokens behind the block."""
        scale = (lambda each: each) if self.swin else self.block.layer_scale2
        outputs = self.block.mlp.fc2.outputs
        return [x + scale(output) for x, output in zip(self.between(), outputs, strict=True)]


def swin_maps(plain: nn.Module, pixels: torch.Tensor) -> list[tuple[torch.Tensor, list | None]]:
    """Of four stages the shared map (B, C, h, w) and the tasks', for transformers' SwinModel with ``put`` layers."""
    followers = [Follower(stage.blocks[-1], True) for stage in plain.encoder.layers]
    shared = plain(pixels, output_hidden_states=True).reshaped_hidden_states[1:]
    found = []
    for follower, stage, maps in zip(followers, plain.encoder.layers, shared, strict=True):
        own = None
        if follower.own:
            merge = (
                (lambda each: each)
                if stage.downsample is None
                else lambda x, s=stage, f=follower: s.downsample(x, f.grid)
            )
            own = [merge(each).transpose(1, 2).reshape(maps.shape) for each in follower.tokens()]
        found.append((maps, own))
    return found


def vit_maps(plain: nn.Module, pixels: torch.Tensor) -> list[tuple[torch.Tensor, list | None]]:
    """The same for Dinov2Model, its maps at 4, 2, 1 and 1/2 times the patch grid."""
    depth = len(plain.encoder.layer) // 4
    followers = [Follower(plain.encoder.layer[depth * (stage + 1) - 1], False) for stage in range(4)]
    shared = plain(pixels, output_hidden_states=True).hidden_states[depth::depth]
    side = pixels.shape[-1] // plain.config.patch_size

    def as_map(tokens, factor):
        maps = tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, side, side)
        return F.interpolate(maps, size=(int(side * factor),) * 2, mode="bilinear")

    found = []
    for follower, tokens, factor in zip(followers, shared, (4, 2, 1, 0.5), strict=True):
        own = [as_map(each, factor) for each in follower.tokens()] if follower.own else None
        found.append((as_map(tokens, factor), own))
    return found
