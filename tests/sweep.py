"""Every model type of transformers that a system takes, against slow references: losses, gradients, answers, files.

    python tests/sweep.py --log FILE                     # causal language models; those that FILE has are left out
    python tests/sweep.py --log FILE --system nlu        # encoders and decoders with a head per task
    python tests/sweep.py --log FILE --system image_text # encoder-decoders and causal language models with images
    python tests/sweep.py --log FILE --only lfm2 mamba
    python tests/sweep.py --log FILE --only              # only the table of what FILE has

Each architecture is built tiny and random and written to a folder with a tokenizer; an MTL-LoRA checkpoint on it then
goes through what train, evaluate and export do. The reference is one row alone. Each runs in a process of its own with
limits, and becomes a JSON line: by check the largest difference relative to 1 + |value|, "refused: ..." for a sentence
of the library, or "error: ...".
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import threading
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
sys.path.insert(0, str(Path(__file__).parent))

import torch
import tqdm
import transformers
from sweeps.checks import TOLERANCE, table
from sweeps.image_text import ImageTextChecks
from sweeps.language import LanguageChecks
from sweeps.nlu import EncoderChecks

SYSTEMS = {checks.system: checks for checks in (LanguageChecks, EncoderChecks, ImageTextChecks)}


def run(system: str, kind: str, log: Path, memory: int, dtypes: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (memory << 30, memory << 30))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    # Some types of model have a tokenizer of their own, which reads the file of words in another way.
    transformers.AutoTokenizer.from_pretrained = transformers.PreTrainedTokenizerFast.from_pretrained
    with tempfile.TemporaryDirectory() as folder:
        record = SYSTEMS[system](kind, Path(folder), dtypes).all()
    with log.open("a") as lines:
        lines.write(json.dumps(record) + "\n")


def records(log: Path, system: str) -> list[dict]:
    """What a log has of a system; lines without one are of language models."""
    found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [record for record in found if record.get("system", "language") == system]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--system", choices=SYSTEMS, default="language")
    parser.add_argument("--only", nargs="*", help="model types; without it all of the system")
    parser.add_argument("--timeout", type=int, default=150, help="seconds for each")
    parser.add_argument("--memory", type=int, default=6, help="GiB for each")
    parser.add_argument("--dtypes", nargs="*", default=[*TOLERANCE], help="the first in which a model runs is used")
    flags = parser.parse_args()
    tqdm.tqdm.set_lock(threading.RLock())  # tqdm's own is shared by all forks, even after a kill of its holder
    done = {record["kind"] for record in records(flags.log, flags.system)}
    asked = SYSTEMS[flags.system].types if flags.only is None else flags.only
    for kind in (kind for kind in asked if kind not in done):
        arguments = flags.system, kind, flags.log, flags.memory, flags.dtypes
        child = multiprocessing.get_context("fork").Process(target=run, args=arguments)
        child.start()
        child.join(flags.timeout)
        if child.exitcode != 0:
            child.kill()
            died = {"system": flags.system, "kind": kind, "died": child.exitcode or "timeout"}
            with flags.log.open("a") as lines:
                lines.write(json.dumps(died) + "\n")
        print(kind, child.exitcode, file=sys.stderr, flush=True)
    print(table(records(flags.log, flags.system)))


if __name__ == "__main__":
    main()
