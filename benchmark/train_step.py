"""Samples a second of whole training pipelines on the same examples: forward, backward and, optionally, optimiser.

    python benchmark/train_step.py --data_path commonsense_170k_taskid.json
    python benchmark/train_step.py --data_path commonsense_170k_taskid.json --sides lora --tasks 2,8,64,512

All sides run in one process with the same base weights, dtype, threads and examples, and take turns batch by batch.
--tasks shows whether the cost grows with the number of tasks.
"""

from functools import partial

import torch
from batches import add_data, encoded_rows, make_batches, tokens_that_run
from footprint import megabytes, tensor_bytes
from measure import compared, count, counts, keep, markdown_table, parser, ratio_table, shown, spread, turns
from pipelines import Pipeline, add_sides, pipeline

from mtl_lora.base_model import BaseModel, device_for_this_process
from mtl_lora.errors import user_errors_to_exit_code
from mtl_lora.memory import keep_freed_memory


def main() -> None:
    flags = parser(__doc__)
    add_data(flags, records=128)
    add_sides(flags, "frozen,original,peft,lora,mtl_lora")
    flags.add_flag("tasks", "further sides: MTL-LoRA with n tasks each, such as 2,8,64,512", type=counts)
    flags.add_flag("rounds", "passes of every side over all examples", type=count, default=8)
    flags.add_argument(
        "--optimiser", action="store_true", help="also run AdamW on the trainable parameters after every batch"
    )
    flags.add_argument("--memory", action="store_true", help="also measure the peak of a step on the longest batch")
    arguments = flags.parse_args()
    arguments.sides += [f"mtl_lora_{tasks}_tasks" for tasks in arguments.tasks or ()]
    tokenizer, device = BaseModel(arguments.base_model).tokenizer(), device_for_this_process()
    keep_freed_memory(device.type)  # as finetune.py does; the process has one C library, so every side gains
    rows = encoded_rows(arguments.data_path, arguments.of or arguments.records, tokenizer)
    plans = make_batches(rows, arguments.batch_size, tokenizer.pad_token_id, device, arguments.records)
    base = BaseModel(arguments.base_model).load(arguments.dtype).to(device)
    sides = {name: pipeline(name, base, arguments.optimiser) for name in arguments.sides}
    rates = turns({name: work(side, plans) for name, side in sides.items()}, arguments.rounds)
    ratios = compared(rates)
    tokens_a_row = sum(int(batch["lengths"].sum()) for batch in plans["shared"]) / arguments.records
    results = {
        name: {
            "samples/s": spread(values),
            "tokens/s": spread([rate * tokens_a_row for rate in values]),
            "ratios": ratios[name],
            "peak_bytes": peak(sides[name], plans) if arguments.memory else None,
        }
        for name, values in rates.items()
    }
    padded = tokens_that_run(plans)
    text = markdown_table(
        ["pipeline", "samples/s", "tokens/s", *(["peak, MB"] if arguments.memory else [])],
        [
            [name, shown(one["samples/s"]), shown(one["tokens/s"], 0)]
            + ([megabytes(one["peak_bytes"])] if arguments.memory else [])
            for name, one in results.items()
        ],
    )
    text += f"\n\n{ratio_table(ratios)}" if len(ratios) > 1 else ""
    text += (
        f"\n\n{arguments.records} records, {arguments.records * tokens_a_row:,.0f} tokens; with padding "
        f"{padded['random']:,} in random batches of {arguments.batch_size}, {padded['sorted']:,} sorted, "
        f"{padded['shared']:,} with shared prompt prefixes, where {padded['least']:,} must run, "
        f"{padded['sorted'] / padded['least']:.2f} times fewer. {arguments.base_model}, {base.dtype}, "
        f"{'with' if arguments.optimiser else 'without'} optimiser; median (smallest to largest) of "
        f"{arguments.rounds} rounds, the sides taking turns batch by batch; tokens a second are those of the records, "
        "without padding and however often they run."
    )
    if arguments.memory:
        text += " Peak: tensors of a step on the longest batch, above weights and optimiser state."
    record = {"dtype": str(base.dtype), "tokens": padded, "sides": results}
    keep(__file__, text, record, arguments)


def work(side: Pipeline, plans: dict[str, list[dict]]) -> list[partial]:
    """Return a pass of a pipeline over all examples, batch by batch."""
    return [partial(side.step, batch) for batch in side.batches(plans)]


def peak(side: Pipeline, plans: dict[str, list[dict]]) -> int:
    """Return the peak of tensor bytes in a step on a pipeline's longest batch, above what exists between steps."""
    longest = max(side.batches(plans), key=lambda batch: batch.get("packed", batch)["input_ids"].numel())
    return tensor_bytes(lambda: side.step(longest))[1]


if __name__ == "__main__":
    torch.manual_seed(0)
    with user_errors_to_exit_code():
        main()
