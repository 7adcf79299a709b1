"""Seconds until a training run has its data: examples read, validated and tokenised, or read from the cache.

    python benchmark/startup.py --data_path commonsense_170k_taskid.json

Sides, each with a fresh cache folder and with a filled one:
  rows     ``training_rows`` in this process, with everything imported and the tokenizer loaded
  process  ``finetune.py --check True`` as a user runs it, from the start of Python to its end: imports, settings,
           the base model's configuration, the rows, the plan of the batches
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
from measure import PROJECT, count, keep, markdown_table, parser, rounds, shown, spread
from transformers import PreTrainedTokenizerBase

from mtl_lora.base_model import BaseModel
from mtl_lora.errors import user_errors_to_exit_code
from mtl_lora.language.batches import training_rows
from mtl_lora.language.encode import Encoder
from mtl_lora.language.tasks import COMMONSENSE
from mtl_lora.training.rows import row_columns

CUTOFF = 256


def main() -> None:
    flags = parser(__doc__)
    flags.add_flag("data_path", "training examples", default="commonsense_170k_taskid.json")
    flags.add_flag("base_model", "base model whose tokenizer is used", default="smollm2-135m")
    flags.add_flag("records", "use only the first n examples; none: all", type=count)
    flags.add_flag("rounds", "times that each side is timed", type=count, default=3)
    arguments = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data_path = Path(arguments.data_path).resolve()
        if arguments.records:
            data_path = first_records(arguments.data_path, arguments.records, folder)
        tokenizer = BaseModel(arguments.base_model).tokenizer()

        def rows(cache_dir: Path) -> int:
            return len(rows_of(data_path, tokenizer, cache_dir))

        def process(cache_dir: Path) -> int:
            check(data_path, arguments.base_model, cache_dir)
            return total

        encoded = rows_of(data_path, tokenizer, folder / "filled")
        total, tokens = len(encoded), int(row_columns(encoded)["length"].sum())
        made = {
            "rows, fresh": lambda: rows(Path(tempfile.mkdtemp(dir=folder))),
            "rows, filled": lambda: rows(folder / "filled"),
            "process, fresh": lambda: process(Path(tempfile.mkdtemp(dir=folder))),
            "process, filled": lambda: process(folder / "filled"),
        }
        rates = rounds(made, arguments.rounds)
    seconds = {name: spread([total / rate for rate in values]) for name, values in rates.items()}
    header = ["seconds", "fresh cache folder", "filled cache folder"]
    lines = [
        [what, *(shown(seconds[f"{side}, {cache}"]) for cache in ("fresh", "filled"))]
        for side, what in (("rows", "rows, in one process"), ("process", "whole process, `finetune.py --check True`"))
    ]
    text = markdown_table(header, lines)
    text += (
        f"\n\n{total:,} records, {tokens:,} tokens, tokenizer of {arguments.base_model}, cutoff {CUTOFF}; median "
        f"(smallest to largest) of {arguments.rounds} rounds."
    )
    record = {"records": total, "tokens": tokens, "sides": seconds}
    keep(__file__, text, record, arguments)


def first_records(data_path: str, count: int, folder: Path) -> Path:
    """Write the first ``count`` examples to a data file and return its path."""
    records = json.loads(Path(data_path).read_text(encoding="utf-8"))
    path = folder / "records.json"
    path.write_text(json.dumps(records[:count]), encoding="utf-8")
    return path


def rows_of(data_path: Path, tokenizer: PreTrainedTokenizerBase, cache_dir: Path) -> datasets.Dataset:
    """Return the encoded rows, as training has them."""
    return training_rows(data_path, Encoder(tokenizer, "alpaca", CUTOFF, COMMONSENSE), cache_dir)


def check(data_path: Path, base_model: str, cache_dir: Path) -> None:
    """Do everything that a training run does before it loads the base model's weights."""
    flags = {"base_model": base_model, "data_path": data_path, "cache_dir": cache_dir, "cutoff_len": CUTOFF}
    flags |= {"output_dir": cache_dir / "run", "check": True}
    command = [sys.executable, str(PROJECT / "finetune.py"), *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


if __name__ == "__main__":
    with user_errors_to_exit_code():
        main()
