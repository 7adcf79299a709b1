"""Peak memory of a training step by method, against LoRA and the frozen base; each side runs in its own process.

    python benchmark/memory.py --data_path commonsense_170k_taskid.json

All sides run the same batch, the longest examples, which determine the peak of an epoch. Everything above the loaded
base model is counted: adapter, gradients, AdamW's state, activations.
  held     tensors that the forward pass leaves for the backward pass
  tensors  the peak of all tensors in a step, from torch's allocator: exact, the same in every repeat
  process  the growth of the process while it builds the adapter and runs two steps (resident; on a GPU: reserved)
"""

import argparse
import json
import subprocess
import sys

import torch
from accelerate.utils import send_to_device
from batches import add_data, encoded_rows
from footprint import megabytes, process_growth, tensor_bytes
from measure import count, keep, markdown_table, parser, spread
from pipelines import Pipeline, add_sides, pipeline

from mtl_lora.adapter.inject import trainable_parameters
from mtl_lora.base_model import BaseModel, device_for_this_process
from mtl_lora.errors import UserError, user_errors_to_exit_code
from mtl_lora.language.batches import Collator

MEASURES = ("held", "tensors", "process")


def main() -> None:
    flags = parser(__doc__)
    add_data(flags, records=256)
    add_sides(flags, "frozen,lora,dora,multilora,moelora,mtl_lora,gathering,looping,peft_layer,peft,original")
    flags.add_flag("repeats", "processes of each side, in turns", type=count, default=3)
    flags.add_flag(
        "alone", "measure one side in this process and print a JSON line; the script starts its sides with it"
    )
    arguments = flags.parse_args()
    if arguments.alone:
        print(json.dumps(measure_alone(arguments)))
        return
    found: dict[str, list[dict]] = {name: [] for name in arguments.sides}
    for repeat in range(arguments.repeats):
        for name in arguments.sides if repeat % 2 else reversed(arguments.sides):
            found[name].append(measure_in_own_process(name, arguments))
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    report(found, arguments)


def measure_in_own_process(name: str, arguments: argparse.Namespace) -> dict:
    """Run ``measure_alone`` in a fresh process and return its result."""
    given = [f"--{flag}={getattr(arguments, flag)}" for flag in ("data_path", "base_model", "records", "batch_size")]
    command = [sys.executable, __file__, f"--alone={name}", f"--dtype={arguments.dtype}", *given]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the process of {name} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_alone(arguments: argparse.Namespace) -> dict:
    """Return the bytes that one side needs above the base model, and its number of trainable parameters."""
    tokenizer, device = BaseModel(arguments.base_model).tokenizer(), device_for_this_process()
    rows = encoded_rows(arguments.data_path, arguments.records, tokenizer)
    longest = sorted(rows, key=lambda row: len(row["input_ids"]))[-arguments.batch_size :]
    batch = send_to_device(Collator(tokenizer.pad_token_id)(longest), device)
    base = BaseModel(arguments.base_model).load(arguments.dtype).to(device)
    for weight in base.parameters():
        weight.sum()  # a memory-mapped weight becomes resident when it is first read
    side = None

    def two_steps() -> None:
        """Run two steps; only the second has the optimiser's state from its start."""
        nonlocal side
        side = pipeline(arguments.alone, base, with_optimiser=True)
        (one,) = side.batches({"random": [batch], "sorted": [batch]})
        side.step(one)
        side.step(one)

    process = process_growth(two_steps)
    (one,) = side.batches({"random": [batch], "sorted": [batch]})
    kept = kept_bytes(side)
    held, _ = tensor_bytes(lambda: side.forward(one))
    _, peak = tensor_bytes(lambda: side.step(one))
    return {
        "held": held,
        "tensors": kept + peak,
        "process": process,
        "trained": trainable_parameters(side.model)[0],
        "shape": list(batch["input_ids"].shape),
        "dtype": str(base.dtype),
    }


def kept_bytes(side: Pipeline) -> int:
    """Return the bytes of trainable parameters and optimiser state: what exists between two steps, above the base."""
    weights = [parameter for parameter in side.model.parameters() if parameter.requires_grad]
    states = side.optimiser.state.values() if side.optimiser else ()
    kept = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*weights, *kept))


def report(found: dict[str, list[dict]], arguments: argparse.Namespace) -> None:
    """Print and keep the table: megabytes by side, and their ratios to LoRA and to the frozen base."""
    results, lines = {}, []
    references = [name for name in ("lora", "frozen") if name in found]
    for name, repeats in found.items():
        known = [measure for measure in MEASURES if repeats[0][measure] is not None]
        results[name] = {measure: spread([one[measure] for one in repeats]) for measure in known}
        results[name]["trained"] = repeats[0]["trained"]
    for name, one in results.items():
        process = one.get("process")
        limits = f" ({megabytes(process['low'])} to {megabytes(process['high'])})" if process else ""
        tensors = one["tensors"]["median"]
        lines.append(
            [
                name,
                f"{one['trained']:,}",
                megabytes(one["held"]["median"]),
                megabytes(tensors),
                megabytes(process and process["median"]) + limits,
                *(f"{tensors / results[other]['tensors']['median']:.3f}" for other in references),
            ]
        )
    header = ["pipeline", "trainable parameters", "held, MB", "tensors, MB", "process, MB"]
    text = markdown_table([*header, *(f"tensors / {other}'s" for other in references)], lines)
    facts = next(iter(found.values()))[0]
    shape = " x ".join(str(size) for size in facts["shape"])
    text += (
        f"\n\nA step on {shape} tokens, {arguments.base_model}, {facts['dtype']}, AdamW; MB are 10^6 bytes above the "
        f"loaded base model; median of {arguments.repeats} processes, of the process's growth (smallest to largest)."
    )
    record = {"shape": facts["shape"], "dtype": facts["dtype"], "sides": results}
    keep(__file__, text, record, arguments)


if __name__ == "__main__":
    with user_errors_to_exit_code():
        main()
