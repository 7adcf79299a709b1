"""Whether predictions depend on batch size, reused prompt prefixes, processes, or the dtype (float32, bf16).

    python benchmark/invariance.py --checkpoint output/quickstart/checkpoint --data_dir data/commonsense/test

Each variant is a run of commonsense_evaluate.py in a folder of its own; predictions are compared line by line. In
float32 every changed answer is listed with its margin: for ``score``, the distance of the first variant's two best
options.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import PROJECT, count, cpu_cores, keep, markdown_table, parser

from mtl_lora.errors import UserError, user_errors_to_exit_code
from mtl_lora.evaluation import Predictions

VARIANTS = {
    "batches of 32": ["--batch_size", "32"],
    "batches of 7": ["--batch_size", "7"],
    "one at a time": ["--batch_size", "1"],
    "batches of 32, prefix not reused": ["--batch_size", "32", "--reuse_prefix", "False"],
    "batches of 7, two processes": ["--batch_size", "7"],
}


def main() -> None:
    flags = parser(__doc__)
    flags.add_flag("checkpoint", "folder of a trained adapter", required=True)
    flags.add_flag("data_dir", "folder with <task>/test.json", default="data/commonsense/test")
    flags.add_flag("limit", "first questions of each task, in float32", type=count, default=63)
    flags.add_flag("bf16_limit", "questions of each task in bf16", type=count, default=125)
    arguments = flags.parse_args()
    lines, flips = [], []
    with tempfile.TemporaryDirectory() as folder:
        for mode in ("score", "generate"):
            first = None
            for name, flags in VARIANTS.items():
                start = time.perf_counter()
                found = evaluate(arguments, folder, mode, name, "fp32", arguments.limit, flags)
                first = first or found
                changed = [key for key in first if first[key]["parsed"] != found[key]["parsed"]]
                flips += [f"{mode}, {name}, {key}: margin {margin(first[key])}" for key in changed]
                seconds = time.perf_counter() - start
                lines.append(
                    [mode, "fp32", name, f"{len(found)}", f"{len(changed)}", apart(first, found), f"{seconds:.0f}"]
                )
                print(lines[-1], file=sys.stderr, flush=True)
            one, other = (
                evaluate(arguments, folder, mode, name, "bf16", arguments.bf16_limit, VARIANTS[name])
                for name in ("batches of 32", "batches of 7")
            )
            changed = [key for key in one if one[key]["parsed"] != other[key]["parsed"]]
            lines.append([mode, "bf16", "batches of 7", f"{len(one)}", f"{len(changed)}", apart(one, other), ""])
    header = ["mode", "dtype", "against batches of 32", "questions", "answers differ", "largest score difference", "s"]
    text = markdown_table(header, lines) + "\n\n" + ("\n".join(flips) or "No answer differs in float32.")
    record = {"rows": [dict(zip(header, line, strict=True)) for line in lines], "flips": flips}
    keep(__file__, text, record, arguments)


def evaluate(arguments, folder: str, mode: str, name: str, dtype: str, limit: int, flags: list[str]) -> dict:
    """Run one evaluation and return its predictions by (task, index)."""
    output = Path(folder) / f"{mode} {dtype} {name}"
    launcher = [sys.executable]
    threads = os.environ.get("OMP_NUM_THREADS", str(cpu_cores()))
    if "two processes" in name:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533"]
        threads = str(max(int(threads) // 2, 1))
    where = {"checkpoint": Path(arguments.checkpoint).resolve(), "data_dir": Path(arguments.data_dir).resolve()}
    what = {"output_dir": output, "mode": mode, "dtype": dtype, "limit": limit, "max_new_tokens": 8}
    settings = [f"--{name}={value}" for name, value in (where | what).items()]
    done = subprocess.run(
        [*launcher, "commonsense_evaluate.py", *settings, *flags],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": threads},
        stdout=subprocess.DEVNULL,
    )
    if done.returncode:
        raise UserError(f"the evaluation {name!r} failed; see its output above")
    return Predictions(output).read()


def margin(record: dict) -> str:
    """Return the distance of the two best options, in nats; for generated text the text itself."""
    if "scores" not in record:
        return repr(record["text"])
    best, second = sorted(record["scores"], reverse=True)[:2]
    return f"{best - second:.1e}"


def apart(first: dict, second: dict) -> str:
    """Return the largest difference of two runs' option scores, in nats."""
    if any("scores" not in record for record in first.values()):
        return ""
    pairs = (zip(first[key]["scores"], second[key]["scores"], strict=True) for key in first)
    return f"{max(abs(a - b) for pair in pairs for a, b in pair):.1e}"


if __name__ == "__main__":
    with user_errors_to_exit_code():
        main()
