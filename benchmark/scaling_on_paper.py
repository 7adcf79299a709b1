"""Communication and computing time of a step of LLaMA-2-7B on 8 to 64 GPUs: computed, not measured.

    python benchmark/scaling_on_paper.py

Only adapter weights travel; every GPU holds the frozen base. For N GPUs in a ring and P trainable float32 parameters:
  reduce-scatter of the gradients   (N - 1) / N x 4 P bytes sent by each GPU
  all-gather of the weights         (N - 1) / N x 4 P bytes
  ZeRO-2                            both: 2 (N - 1) / N x 4 P
  DeepSpeed 0.19 as configured      all-reduces the gradients (`use_multi_rank_bucket_allreduce`, its default) and
                                    all-gathers the weights: 3 (N - 1) / N x 4 P. The times below assume this.
A ring passes each link once, so the slowest link decides, even if eight GPUs share one network card:
  communication = 3 (N - 1) / N x 4 P / bandwidth + 3 (N - 1) x latency
Computing, without weight gradients of frozen layers (W weights, t tokens; 2 W t forward, 2 W t backward to the input):
  compute = 4 x W x t / (peak x utilisation)
Nothing overlaps (`overlap_comm` is off in config/zero2.json), so efficiency = compute / (compute + communication).
Left out: attention scores, the adapter itself, waiting for the slowest GPU, and loading data.
"""

import argparse

from measure import Parser, markdown_table

from mtl_lora.errors import user_errors_to_exit_code

TRAINED = 16_845_824  # MTL-LoRA r 8, n 3, 8 tasks on q/k/v/o; float32
WEIGHTS = 6.7e9
TOKENS_A_ROW = 105
GPUS = (8, 16, 32, 64)
# Bytes a second in one direction, and seconds of one hop of a ring (an assumption).
LINKS = {
    "NVLink, 450 GB/s": (450e9, 5e-6),
    "PCIe, 32 GB/s": (32e9, 10e-6),
    "Ethernet, 100 Gb/s": (12.5e9, 30e-6),
    "Ethernet, 10 Gb/s": (1.25e9, 50e-6),
}


def sent_bytes(gpus: int, passes: int) -> float:
    """Return the bytes that each GPU sends in a step; passes: 2 for ZeRO-2, 3 for an all-reduce and an all-gather."""
    return passes * (gpus - 1) / gpus * 4 * TRAINED


def communication(gpus: int, bandwidth: float, latency: float) -> float:
    """Return the seconds of a step in which the GPUs exchange gradients and weights."""
    return sent_bytes(gpus, 3) / bandwidth + 3 * (gpus - 1) * latency


def compute(rows: float, flops: float) -> float:
    """Return the seconds of forward and backward of ``rows`` rows on one GPU with ``flops`` FLOPs a second."""
    return 4 * WEIGHTS * rows * TOKENS_A_ROW / flops


def table(rows_of: dict[int, float], flops: float) -> str:
    """Return a table with a line for each number of GPUs, given its rows a GPU: computing time, and for each link
    communication time and efficiency."""
    lines = []
    for gpus, rows in rows_of.items():
        seconds, line = compute(rows, flops), [str(gpus), f"{rows:g}", f"{rows * gpus:g}"]
        line.append(f"{1e3 * seconds:.0f}")
        for bandwidth, latency in LINKS.values():
            exchange = communication(gpus, bandwidth, latency)
            line.append(f"{1e3 * exchange:.1f} ({100 * seconds / (seconds + exchange):.0f} %)")
        lines.append(line)
    return markdown_table(["GPUs", "rows a GPU", "rows a step", "compute, ms", *LINKS], lines)


def text(peak: float, utilisation: float) -> str:
    """Return everything that is printed; peak in TFLOP/s."""
    flops, most = peak * 1e12 * utilisation, 3 * 4 * TRAINED
    sent = markdown_table(
        ["GPUs", "reduce-scatter + all-gather, MB", "all-reduce + all-gather, MB"],
        [[str(gpus), *(f"{sent_bytes(gpus, passes) / 1e6:.1f}" for passes in (2, 3))] for gpus in GPUS],
    )
    needed = markdown_table(
        ["rows a GPU", "compute, ms", "90 %, Gb/s", "50 %, Gb/s"],
        [
            [f"{rows}", f"{1e3 * compute(rows, flops):.0f}"]
            + [f"{8 * most / (compute(rows, flops) * (1 / share - 1)) / 1e9:.1f}" for share in (0.9, 0.5)]
            for rows in (8, 4, 2, 1)
        ],
    )
    return "\n\n".join(
        [
            f"Bytes sent by each GPU in a step, {TRAINED:,} trainable float32 parameters:",
            sent,
            f"8 rows a GPU, so more GPUs mean more rows a step. Assumed: {peak:g} TFLOP/s a GPU at "
            f"{100 * utilisation:g} % utilisation. For each link: communication in ms (efficiency):",
            table(dict.fromkeys(GPUS, 8), flops),
            "The same 64 rows a step for any number of GPUs:",
            table({gpus: 64 / gpus for gpus in GPUS}, flops),
            "Bandwidth that the slowest link needs for efficiencies of 90 and 50 %, for many GPUs, without latency:",
            needed,
        ]
    )


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_flag("peak", "TFLOP/s of a GPU in bf16 (312: an A100)", type=float, default=312)
    parser.add_flag("utilisation", "assumed proportion of the peak that training reaches", type=float, default=0.4)
    arguments = parser.parse_args()
    print(text(arguments.peak, arguments.utilisation))


if __name__ == "__main__":
    with user_errors_to_exit_code():
        main()
