"""A training step of LLaMA-2-7B's shape on a GPU: tokens a second, and the share of what the card can multiply.

    python benchmark/gpu_step.py

Random weights in bf16 (nothing is downloaded), one batch of rows of the same length, the last few tokens of each
supervised; all sides share the frozen weights and take turns step by step. The share counts useful work alone, the
same for every side: 4 x (weights of the frozen linear layers) x tokens FLOPs, for forward and backward to the input
without weight gradients; attention's scores (below 1 % at this length), the output head, adapters and recomputation
are left out. It is divided by the rate of one big matrix product on the same card.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from footprint import megabytes, tensor_bytes
from measure import clock, compared, count, keep, markdown_table, parser, ratio_table, shown, spread, turns
from pipelines import add_sides, pipeline
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mtl_lora.base_model import choose_dtype
from mtl_lora.errors import UserError, user_errors_to_exit_code
from mtl_lora.language.batches import IGNORED
from mtl_lora.language.tasks import COMMONSENSE

ANSWER = 6  # supervised tokens of a row, as in the commonsense data


def main() -> None:
    flags = parser(__doc__)
    add_sides(flags, "frozen,lora,mtl_lora,gathering,looping,peft_layer,peft,original")
    flags.add_flag("device", "cuda; cpu only to try the script out", choices=["cuda", "cpu"], default="cuda")
    flags.add_flag("layers", "of the model", type=count, default=32)
    flags.add_flag("width", "hidden size; feed-forward layers are 11008/4096 times as wide", type=count, default=4096)
    flags.add_flag("heads", "of attention", type=count, default=32)
    flags.add_flag("vocabulary", "number of tokens", type=count, default=32000)
    flags.add_flag("batch_size", "rows of a step", type=count, default=8)
    flags.add_flag("length", "tokens of a row", type=count, default=128)
    flags.add_flag("dtype", "of the frozen weights", default="bf16")
    flags.add_flag("matrix", "width of the square matrices whose product is the peak", type=count, default=8192)
    flags.add_flag("steps", "of every side in a round", type=count, default=5)
    flags.add_flag("rounds", "passes over all sides", type=count, default=10)
    arguments = flags.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "this benchmark needs a GPU and torch finds none; --device cpu, with small sizes, tries the script out"
        )
    dtype, device = choose_dtype(arguments.dtype), torch.device(arguments.device)
    base, batch = random_llama(arguments, dtype, device), random_batch(arguments, device)
    plans = {"random": [batch] * arguments.steps, "sorted": [batch] * arguments.steps}
    sides = {name: pipeline(name, base) for name in arguments.sides}
    work = {name: [partial(side.step, one) for one in side.batches(plans)] for name, side in sides.items()}
    rates = turns(work, arguments.rounds)
    peaks = {name: tensor_bytes(pieces[0])[1] for name, pieces in work.items()}
    report(rates, peaks, linear_weights(base), matrix_peak(arguments.matrix, dtype, device), arguments)


def report(rates: dict[str, list[float]], peaks: dict[str, int], weights: int, matrix_flops: float, arguments) -> None:
    """The table, from each side's rows a second by round and its peak in bytes."""
    ratios, lines, results = compared(rates), [], {}
    for name, values in rates.items():
        tokens = [rate * arguments.length for rate in values]
        share = spread([rate * 4 * weights / matrix_flops for rate in tokens])
        results[name] = {"tokens/s": spread(tokens), "share_of_peak": share, "peak_bytes": peaks[name]}
        results[name]["ratios"] = ratios[name]
        lines.append([name, shown(results[name]["tokens/s"], 0), shown(share, 3), megabytes(peaks[name])])
    text = markdown_table(["pipeline", "tokens/s", "share of matrix peak", "peak, MB"], lines)
    text += f"\n\n{ratio_table(ratios)}" if len(ratios) > 1 else ""
    text += (
        f"\n\n{weights:,} random weights in frozen linear layers, {arguments.dtype}. A step: {arguments.batch_size} x "
        f"{arguments.length} tokens, forward and backward. Median (smallest to largest) of {arguments.rounds} rounds "
        f"of {arguments.steps} steps. Matrix peak: {matrix_flops / 1e12:.4g} TFLOP/s, squares of {arguments.matrix}. "
        "Peak, MB: tensors of a step above all weights."
    )
    settings = {name: value for name, value in vars(arguments).items() if name != "results"}
    record = {"settings": settings, "linear_weights": weights, "matrix_flops": matrix_flops, "sides": results}
    keep(Path(__file__).stem, text, record, arguments.results)


def random_llama(arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """A LLaMA of the asked-for size, its weights drawn where they will stay."""
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        intermediate_size=arguments.width * 11008 // 4096,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.heads,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def random_batch(arguments: argparse.Namespace, device: torch.device) -> dict[str, torch.Tensor]:
    """Rows of random tokens without padding, with the last ``ANSWER`` of each supervised and tasks drawn at random."""
    input_ids = torch.randint(arguments.vocabulary, (arguments.batch_size, arguments.length), device=device)
    labels = input_ids.clone()
    labels[:, :-ANSWER] = IGNORED
    task_ids = torch.randint(len(COMMONSENSE), (arguments.batch_size,), device=device)
    ones = torch.ones_like(input_ids)
    return {"input_ids": input_ids, "attention_mask": ones, "labels": labels, "task_ids": task_ids}


def linear_weights(model: LlamaForCausalLM) -> int:
    """Weights of the linear layers that every token goes through: all but the output head."""
    head = model.get_output_embeddings()
    layers = (module for module in model.modules() if isinstance(module, nn.Linear) and module is not head)
    return sum(layer.weight.numel() for layer in layers)


def matrix_peak(width: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs a second of a product of two square matrices: the best of 10 times 10 products."""
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
