"""MTLoRA (arXiv 2403.20320): one output for all tasks and one per task from the same input and frozen product."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from mtl_lora.adapter.config import AdapterConfig, Hyperparameters
from mtl_lora.adapter.layer import AdapterLayer, Streams, kaiming
from mtl_lora.config import flag

MODES = ("matrix", "matrixv2", "addition")


class MtloraLayer(AdapterLayer):
    """y = W x + b + s B A x~ for all tasks, and y_t = W x + b + s_t B_t A_t z_t for task t, with x~ = dropout(x).

    z_t is the task's own input without dropout, or x~ if the task has no input of its own yet; W is applied to the
    shared input only. lora_A (r, k) and lora_B (d, r): the shared pair, s = alpha / r. task_A (T, q, k) and task_B
    (T, d, q): one pair of rank q per task, with a constant s_t. Every A starts like the weight of a torch Linear, every
    B at zero. ``shared_mode`` is one of:
      matrix    as above
      matrixv2  y_t also contains the term of the shared pair
      addition  no shared pair: y = W x + b + LayerNorm(sum_t y_t), so the layer does not start as its base
    Layers that are not task-specific (``AdapterConfig.task_modules``) are LoRA layers.
    """

    method, title, paper = "mtlora", "MTLoRA", "2403.20320"
    has_factors = False
    why_no_factors = "its tasks' outputs share the product with one input and not the input"
    makes_streams = only_streams = True
    no_decay = ("stream_norm_weight", "stream_norm_bias")

    @dataclasses.dataclass
    class Hyperparameters(Hyperparameters):
        task_rank: int = flag(4, "rank of each task's own pair", min=1)
        task_scale: float = flag(4.0, "scale of each task's own pair, a constant", above=0)
        shared_mode: str = flag("matrix", f"how shared and task outputs meet: {', '.join(MODES)}", choices=MODES)

    @staticmethod
    def shapes(config: AdapterConfig, k: int, d: int) -> dict[str, tuple[int, ...]]:
        T, r, q = len(config.tasks), config.rank, config.task_rank
        if config.shared_mode == "addition":
            shared = {"stream_norm_weight": (d,), "stream_norm_bias": (d,)}
        else:
            shared = {"lora_A": (r, k), "lora_B": (d, r)}
        return {**shared, "task_A": (T, q, k), "task_B": (T, d, q)}

    def reset_parameters(self) -> None:
        if self.hyperparameters.shared_mode == "addition":
            nn.init.ones_(self.stream_norm_weight)
            nn.init.zeros_(self.stream_norm_bias)
        else:
            kaiming(self.lora_A)
            nn.init.zeros_(self.lora_B)
        for each in self.task_A:
            kaiming(each)
        nn.init.zeros_(self.task_B)

    def streams(self, x: Streams) -> Streams:
        own, T, mode = self.hyperparameters, len(self.tasks), self.hyperparameters.shared_mode
        output, dropped = self.base_and_dropped(x.shared)
        A, B = self.task_A.to(output.dtype), self.task_B.to(output.dtype)
        if x.tasks is None:
            z = F.linear(dropped, A.flatten(0, 1)).unflatten(1, (T, -1)).transpose(0, 1)
        else:
            z = torch.bmm(x.tasks.reshape(T, -1, self.in_features), A.transpose(1, 2))
        shared = output
        if mode != "addition":
            z_shared, up = F.linear(dropped, self.lora_A.to(output.dtype)), self.lora_B.to(output.dtype)
            shared = torch.addmm(output, z_shared, up.T, alpha=self.scale)
        common = shared if mode == "matrixv2" else output
        tasks = torch.baddbmm(common.expand(T, -1, -1), z, B.transpose(1, 2), alpha=own.task_scale)
        if mode == "addition":
            norm = (self.stream_norm_weight.to(output.dtype), self.stream_norm_bias.to(output.dtype))
            shared = output + F.layer_norm(tasks.sum(dim=0), (self.out_features,), *norm)
        return self.as_streams(shared, tasks, x)
