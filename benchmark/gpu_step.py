"""A training step of LLaMA-2-7B's shape on a GPU: tokens a second, and the share of the card's matrix peak.

    python benchmark/gpu_step.py

The weights are random, in bf16 (nothing is downloaded). There is one batch of rows of equal length, with the last few
tokens of each row supervised. All sides share the frozen weights and take turns step by step.

The share counts only useful work, the same for every side: 4 x (weights of the frozen linear layers) x tokens FLOPs,
for forward and for backward to the input without weight gradients. Attention scores (below 1 % at this length), the
output head, adapters and recomputation are left out. The share is the rate of this work divided by the rate of one big
matrix product on the same card.
"""

import dataclasses
from functools import partial

import torch
from footprint import megabytes, tensor_bytes
from measure import clock, compared, count, keep, markdown_table, parser, ratio_table, shown, spread, turns
from pipelines import Pipeline, add_sides, pipeline
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mtl_lora.base_model import choose_dtype
from mtl_lora.errors import UserError, user_errors_to_exit_code
from mtl_lora.language.batches import IGNORED, supervised_positions
from mtl_lora.language.tasks import COMMONSENSE

ANSWER = 6  # supervised tokens of a row, as in the commonsense data


@dataclasses.dataclass
class Sizes:
    """Sizes of a LLaMA with random weights; by default LLaMA-2-7B's."""

    layers: int = 32
    width: int = 4096
    heads: int = 32
    vocabulary: int = 32000
    dtype: str = "bf16"

    @property
    def torch_dtype(self) -> torch.dtype:
        return choose_dtype(self.dtype)


@dataclasses.dataclass
class Measured:
    """One side's rows a second in each round, peak bytes of a step, and what made a step wait for the GPU (or None)."""

    rates: list[float]
    peak: int
    waits: str | None


def main() -> None:
    flags = parser(__doc__)
    add_sides(flags, "frozen,lora,mtl_lora,gathering,looping,peft_layer,peft,original")
    flags.add_flag("device", "cuda; cpu only to try the script out", choices=["cuda", "cpu"], default="cuda")
    flags.add_flag("layers", "layers of the model", type=count, default=32)
    flags.add_flag(
        "width", "hidden size; the width of feed-forward layers is 11008/4096 times that", type=count, default=4096
    )
    flags.add_flag("heads", "attention heads", type=count, default=32)
    flags.add_flag("vocabulary", "number of tokens", type=count, default=32000)
    flags.add_flag("batch_size", "rows of a step", type=count, default=8)
    flags.add_flag("length", "tokens of a row", type=count, default=128)
    flags.add_flag("dtype", "of the frozen weights", default="bf16")
    flags.add_flag("matrix", "width of the square matrices whose product gives the peak", type=count, default=8192)
    flags.add_flag(
        "steps", "steps of every side per round, without waiting for the GPU between them", type=count, default=5
    )
    flags.add_flag("rounds", "passes over all sides", type=count, default=10)
    arguments = flags.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "this benchmark needs a GPU and torch finds none; --device cpu, with small sizes, tries the script out"
        )
    names = [field.name for field in dataclasses.fields(Sizes)]
    sizes, device = Sizes(**{name: getattr(arguments, name) for name in names}), torch.device(arguments.device)
    base = random_llama(sizes, device)
    batch = random_batch(arguments.batch_size, arguments.length, arguments.vocabulary, device)
    measured = compare_sides(base, arguments.sides, batch, arguments.steps, arguments.rounds)
    peak = matrix_peak(arguments.matrix, sizes.torch_dtype, device)
    text, sides = side_table(measured, arguments.length, linear_weights(base), peak)
    text += (
        f"\n\n{linear_weights(base):,} random weights in frozen linear layers, {arguments.dtype}. A step: "
        f"{arguments.batch_size} x {arguments.length} tokens, forward and backward. Median (smallest to largest) of "
        f"{arguments.rounds} rounds of {arguments.steps} steps. Matrix peak: {peak / 1e12:.4g} TFLOP/s, squares of "
        f"{arguments.matrix}. Peak, MB: tensors of a step above all weights. Waits: whether a step waits for the GPU."
    )
    record = {"linear_weights": linear_weights(base), "matrix_flops": peak, "sides": sides}
    keep(__file__, text, record, arguments)


def compare_sides(base: nn.Module, names: list[str], batch: dict, steps: int, rounds: int) -> dict[str, Measured]:
    """Run every side for ``steps`` steps of one batch without waiting between them; the sides take turns in rounds."""
    sides = {name: pipeline(name, base) for name in names}
    plans = {"random": [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])}], "sorted": [batch]}
    batches = {name: side.batches(plans)[0] for name, side in sides.items()}
    rates = turns({name: [partial(several, side, batches[name], steps)] for name, side in sides.items()}, rounds)
    return {
        name: Measured(rates[name], tensor_bytes(partial(side.step, batches[name]))[1], what_waits(side, batches[name]))
        for name, side in sides.items()
    }


def several(side: Pipeline, batch: dict, times: int) -> int:
    """Run steps of a side without waiting for the GPU between them, and return their rows."""
    return sum(side.step(batch) for _ in range(times))


def what_waits(side: Pipeline, batch: dict) -> str | None:
    """Return what makes a step wait for the GPU; None if nothing does, or if there is no GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        side.step(batch)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        side.model.zero_grad(set_to_none=True)
    return None


def side_table(measured: dict[str, Measured], length: int, weights: int, matrix_flops: float) -> tuple[str, dict]:
    """Return the sides and their ratios as Markdown, and the same numbers as a record."""
    ratios = compared({name: side.rates for name, side in measured.items()})
    lines, results = [], {}
    for name, side in measured.items():
        tokens = [rate * length for rate in side.rates]
        share = spread([rate * 4 * weights / matrix_flops for rate in tokens])
        results[name] = {
            "tokens/s": spread(tokens),
            "share_of_peak": share,
            "peak_bytes": side.peak,
            "waits": side.waits,
            "ratios": ratios[name],
        }
        waits = "–" if not torch.cuda.is_available() else "yes" if side.waits else "no"
        lines.append([name, shown(results[name]["tokens/s"], 0), shown(share, 3), megabytes(side.peak), waits])
    text = markdown_table(["pipeline", "tokens/s", "share of matrix peak", "peak, MB", "waits"], lines)
    return text + (f"\n\n{ratio_table(ratios)}" if len(ratios) > 1 else ""), results


def random_llama(sizes: Sizes, device: torch.device) -> LlamaForCausalLM:
    """Return a LLaMA of these sizes with random weights, created on ``device``."""
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.width * 11008 // 4096,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(sizes.torch_dtype)
    try:
        with device:
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def random_batch(rows: int, length: int, vocabulary: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return random rows without padding, the last ``ANSWER`` tokens of each supervised, with random task ids."""
    input_ids = torch.randint(vocabulary, (rows, length), device=device)
    labels = input_ids.clone()
    labels[:, :-ANSWER] = IGNORED
    task_ids = torch.randint(len(COMMONSENSE), (rows,), device=device)
    batch = {"input_ids": input_ids, "labels": labels}
    return {**batch, "task_ids": task_ids, "supervised": supervised_positions(labels)}


def linear_weights(model: LlamaForCausalLM) -> int:
    """Return the number of weights in linear layers that every token goes through: all except the output head."""
    head = model.get_output_embeddings()
    layers = (module for module in model.modules() if isinstance(module, nn.Linear) and module is not head)
    return sum(layer.weight.numel() for layer in layers)


def matrix_peak(width: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the FLOPs a second of a product of two square matrices: the best of 10 runs of 10 products."""
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        start = clock()
        for _ in range(10):
            left @ right
        best = max(best, 10 * 2 * width**3 / (clock() - start))
    return best


if __name__ == "__main__":
    with user_errors_to_exit_code():
        main()
