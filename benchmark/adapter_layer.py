"""Speed of forward and backward of one adapter layer: every method, other forms of MTL-LoRA, and the frozen layer.

    python benchmark/adapter_layer.py

All layers wrap the same frozen linear layer without bias (k = d, 8 tasks, r 8) and get the same input and gradient:
  frozen      a reference, not a bound: forward, and backward to the input
  peft        PEFT's LoRA layer (peft.tuners.lora.Linear) with the same dropout
  lora, dora, multilora, moelora, mtl_lora   ours
  gathering   MTL-LoRA with copies of A, Lambda and B for every row (baselines/gathering.py)
  looping     MTL-LoRA as a loop over the tasks of the batch (baselines/looping.py)
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from baselines.gathering import GatheringLayer
from baselines.looping import LoopingLayer
from footprint import megabytes, tensor_bytes
from measure import count, fractions, keep, markdown_table, parser, ratio, shown, spread, turns
from pipelines import adapter_config, with_peft
from torch import nn

from mtl_lora import route
from mtl_lora.adapter.layer import layer_class, methods
from mtl_lora.base_model import choose_dtype, device_for_this_process
from mtl_lora.errors import user_errors_to_exit_code

TASKS = [f"task{number}" for number in range(8)]


def main() -> None:
    flags = parser(__doc__)
    flags.add_flag("shapes", "rows x tokens x width", type=shapes, default="8x128x576,8x128x2048,8x256x4096")
    flags.add_flag("dropout", "dropout probabilities", type=fractions, default="0,0.05")
    flags.add_flag("dtype", "of the frozen weight and the input; auto: bf16 where the hardware has it", default="auto")
    flags.add_flag("repeats", "passes of a layer per turn", type=count, default=5)
    flags.add_flag("rounds", "turns of every layer", type=count, default=30)
    flags.add_argument("--forward", action="store_true", help="the forward pass alone, without gradients")
    arguments = flags.parse_args()
    dtype, texts, cases = choose_dtype(arguments.dtype), [], []
    if arguments.forward:
        arguments.dropout = [0.0]  # nothing is dropped outside training
    for shape in arguments.shapes:
        for dropout in arguments.dropout:
            text, case = measure_shape(shape, dropout, dtype, arguments)
            texts.append(text)
            cases.append({"shape": shape, "dropout": dropout, **case})
            print(text, end="\n\n", file=sys.stderr, flush=True)
    passes = "Forward without gradients" if arguments.forward else "Forward and backward"
    texts.append(
        f"{passes}, {dtype}, 8 tasks, r 8. Median (smallest to largest) of {arguments.rounds} rounds of "
        f"{arguments.repeats}, the layers taking turns; of ratios the 95 % interval of the median. Peak: tensors of "
        "one pass."
    )
    record = {"dtype": str(dtype), "forward_only": arguments.forward, "rounds": arguments.rounds, "cases": cases}
    keep(__file__, "\n\n".join(texts), record, arguments)


def shapes(text: str) -> list[list[int]]:
    """Parse ``8x128x576,...`` into [[8, 128, 576], ...]; the type of a flag."""
    rows = [[int(size) for size in part.split("x")] for part in text.split(",")]
    if any(len(row) != 3 for row in rows):
        raise ValueError
    return rows


def measure_shape(
    shape: list[int], dropout: float, dtype: torch.dtype, arguments: argparse.Namespace
) -> tuple[str, dict]:
    """Return the table of one input shape, and the same numbers as a record."""
    passes, present = layer_passes(shape, dropout, dtype, arguments.forward)
    pieces = {name: [partial(repeated, one, arguments.repeats)] for name, one in passes.items()}
    rates = turns(pieces, arguments.rounds)
    lines, results = [], {}
    batch, length, width = shape
    for name, values in rates.items():
        of_frozen, ours = ratio(values, rates["frozen"]), ratio(rates["mtl_lora"], values)
        one = {"tokens/s": spread(values), "seconds": spread([batch * length / rate for rate in values])}
        one |= {"peak_bytes": tensor_bytes(passes[name])[1], "speed / frozen": of_frozen, "mtl_lora's / its": ours}
        results[name] = one
        milliseconds = shown({key: 1e3 * value for key, value in one["seconds"].items()})
        speeds = [f"{one['tokens/s']['median']:,.0f}", megabytes(one["peak_bytes"])]
        lines.append([name, milliseconds, *speeds, shown_interval(of_frozen), shown_interval(ours)])
    table = markdown_table(["layer", "ms", "tokens/s", "peak, MB", "speed / frozen", "mtl_lora's speed / its"], lines)
    title = f"({batch} x {length}, {width}), dropout {dropout:g}, {present} of 8 tasks in the batch"
    return f"{title}\n\n{table}", {"tasks_present": present, "layers": results}


def shown_interval(value: dict) -> str:
    """Return ``median (low to high)`` of a ratio, where low and high are the interval of the median."""
    low, high = value["interval"]
    return shown({"median": value["median"], "low": low, "high": high})


def layer_passes(
    shape: list[int], dropout: float, dtype: torch.dtype, forward_only: bool = False
) -> tuple[dict[str, Callable[[], int]], int]:
    """Return, by layer, a function that runs one pass and returns its tokens; and the number of tasks in the batch."""
    batch, length, width = shape
    torch.manual_seed(0)
    device = device_for_this_process()
    base = nn.Linear(width, width, bias=False, device=device, dtype=dtype).requires_grad_(False)
    layers = {"frozen": base, "peft": peft_layer(base, dropout)}
    adapting = [method for method, layer in methods().items() if layer.adapts and not layer.only_streams]
    layers |= {method: layer_class(method)(base, adapter_config(method, dropout, TASKS)) for method in adapting}
    layers |= {"gathering": GatheringLayer(layers["mtl_lora"]), "looping": LoopingLayer(layers["mtl_lora"])}
    x = torch.randn(batch, length, width, device=device, dtype=dtype, requires_grad=not forward_only)
    gradient = torch.randn_like(x)
    task_ids = torch.randint(len(TASKS), (batch,)).to(device)  # as in a batch drawn at random
    GatheringLayer.task_ids = LoopingLayer.task_ids = task_ids
    one_pass, training = (forward_pass, False) if forward_only else (both_passes, True)
    passes = {name: partial(one_pass, layer.train(training), x, gradient, task_ids) for name, layer in layers.items()}
    return passes, len(task_ids.unique())


def peft_layer(base: nn.Linear, dropout: float) -> nn.Module:
    """Wrap a linear layer in PEFT's layer, as ``get_peft_model`` does for its users."""
    return with_peft(nn.Sequential(base), dropout, ["0"]).base_model.model[0]


def both_passes(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor, task_ids: torch.Tensor) -> int:
    """Run forward, and backward to the input and the adapter's weights; x and gradient are (B, L, k). Return B L."""
    with route.use(task_ids):
        output = layer(x)
    output.backward(gradient)
    layer.zero_grad(set_to_none=True)
    x.grad = None
    return x.shape[0] * x.shape[1]


@torch.no_grad()
def forward_pass(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor, task_ids: torch.Tensor) -> int:
    """Run the forward pass alone; x is (B, L, k). Return B L."""
    with route.use(task_ids):
        layer(x)
    return x.shape[0] * x.shape[1]


def repeated(work: Callable[[], int], times: int) -> int:
    """Run several passes and return their tokens in total."""
    return sum(work() for _ in range(times))


if __name__ == "__main__":
    with user_errors_to_exit_code():
        main()
