"""Mutated inputs for every command: each ends well or in one sentence with exit code 2, never in a traceback.

    python tests/mutations.py --inputs 10000 --seed 0            # one process; prints counts, and every failure
    python tests/mutations.py --seed 0 --only 17                 # one of them again

An input is a valid file or command line of ``good_inputs`` with something changed: values of JSON (taken out, replaced
by odd ones, renamed, repeated), bytes (flipped, cut, inserted, in another encoding), or flags. Its number and the seed
decide it.
"""

import argparse
import collections
import contextlib
import csv
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import good_inputs
from good_inputs import Ended, complete, run, write

DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]
ODD = [
    *(None, True, False, 0, -1, 7, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("nan"), 2**31, 2**70, 10**400),
    *("", " ", "0", "-1", "nan", "true", "none", "a", "a/b", "../a", "é☃", "a\ud800", "\0", "a\nb"),
    *("x" * 300, "%s{}"),
    *([], {}, [[]], [None], {"": None}, {"a": {"a": 1}}, ["a", 1], DEEP),
]
SMALL = [value for value in ODD if not (isinstance(value, int | float) and abs(value) > 100)]
BYTES = [b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b'"', b"{", b"]", b",", b"\\", b"PAR1", b"\xff" * 9, b"9" * 40]


Line = str | list[str] | Callable[[], object]  # what ``good_inputs.run`` takes

# ---- mutations ----


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The paths of all values inside a JSON value, its own first."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, entry in entries for place in places(entry, (*path, key)))]


def changed_json(value: object, draw: random.Random, odd: list = ODD) -> object:
    """A copy of a JSON value with one to three places changed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        *path, key = draw.choice(places(value)) or (None,)
        if key is None:
            if draw.random() < 0.1:
                return draw.choice(odd)
            continue
        holder = value
        for step in path:
            holder = holder[step]
        kind = draw.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, holder[key])
        elif kind == 1:
            holder[draw.choice([f"{key}s", key.upper(), "", "new", "a\ud800"])] = holder.pop(key)
        elif kind == 2 and isinstance(holder[key], str):
            text, at = holder[key], draw.randrange(len(holder[key]) + 1)
            holder[key] = text[:at] + draw.choice(["\ud800", "\0", "é", "\u2028", "<end>", "/", " "]) + text[at:]
        elif kind == 3:
            other = value
            for step in draw.choice(places(value)):
                other = other[step]
            holder[key] = json.loads(json.dumps(other))
        else:
            holder[key] = draw.choice(odd)
    return value


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bytes with one to three of them changed, cut, inserted or repeated, or in another encoding."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        at, other = sorted((draw.randrange(len(content) + 1), draw.randrange(len(content) + 1)))
        if draw.random() < 0.5:  # near the beginning, where headers are
            at = min(at, draw.randrange(64))
        kind = draw.randrange(6)
        if kind == 0 and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at]
        elif kind == 2:
            content = content[:at] + content[other:]
        elif kind == 3:
            content = content[:at] + content[at:other][:200] + content[at:]
        elif kind == 4 and draw.random() < 0.2:
            content = content.decode("utf-8", "replace").encode(
                draw.choice(["utf-16", "utf-8-sig", "cp1252", "utf-32"]), "replace"
            )
        else:
            content = content[:at] + draw.choice(BYTES) + content[at:]
    return content


def changed(value: object, draw: random.Random, odd: list = ODD) -> bytes:
    """A JSON value as the bytes of a file, with values, bytes or both changed."""
    kind = draw.random()
    if kind < 0.8:
        value = changed_json(value, draw, odd)
    content = json.dumps(value).encode()
    return changed_bytes(content, draw) if kind > 0.7 else content


# ---- what is mutated: each writes what it needs and returns the command line ----


def examples(records: list, draw: random.Random) -> tuple[str, bytes]:
    """(ending, content) of a mutated file of examples in one of the formats."""
    ending = draw.choice([".json", ".json", ".jsonl", ".csv", ".tsv", ".parquet"])
    if ending == ".json":
        return ending, changed(draw.choice([records, {"data": records}]), draw)
    if ending in (".csv", ".tsv"):  # which have no cells for a conversation
        records = [record for record in records if "messages" not in record]
    values = changed_json(records, draw)
    values = values if isinstance(values, list) else [values]
    if ending == ".jsonl":
        content = "".join(json.dumps(value) + "\n" for value in values).encode()
        return ending, changed_bytes(content, draw) if draw.random() < 0.3 else content
    flat = [value for value in values if isinstance(value, dict)]
    if ending == ".parquet":
        return ending, parquet(flat, draw)
    names = list(dict.fromkeys(str(key) for value in flat for key in value))
    written = io.StringIO(newline="")
    writer = csv.writer(written, delimiter="," if ending == ".csv" else "\t")
    writer.writerows([names, *([str(value.get(name, "")) for name in names] for value in flat)])
    content = written.getvalue().encode("utf-8", "surrogatepass")
    return ending, changed_bytes(content, draw) if draw.random() < 0.5 else content


def parquet(values: list[dict], draw: random.Random) -> bytes:
    """A parquet file, sometimes cut off: flipped bytes could ask its reader for any amount of memory."""
    import pyarrow
    from pyarrow import parquet

    written = io.BytesIO()
    try:
        table = pyarrow.Table.from_pylist(values)
        parquet.write_table(table, written)
    except (pyarrow.ArrowException, ValueError, OverflowError, TypeError):  # columns of one type alone
        words = [{key: repr(entry) for key, entry in value.items() if key.isascii()} for value in values]
        parquet.write_table(pyarrow.Table.from_pylist(words), written)
    content = written.getvalue()
    return content[: draw.randrange(len(content))] if draw.random() < 0.2 else content


def training_data(draw: random.Random) -> str:
    talk = {"messages": [*good_inputs.TALK["messages"], *good_inputs.TALK["messages"]], "task": "free"}
    records = [good_inputs.MOOD, good_inputs.FREE, *draw.choice([[], [], [good_inputs.TALK], [talk]])]
    ending, content = examples(records, draw)
    write(Path(f"m/data{ending}"), content)
    return f"train --data_path=m/data{ending}"


def test_set(draw: random.Random) -> str:
    records = json.loads(Path("questions/boolq/test.json").read_text())[:3]
    ending, content = examples(records, draw)
    write(Path(f"m/boolq/test{ending}"), content)
    return f"evaluate --data_dir=m --tasks=boolq --mode={draw.choice(['generate', 'score'])}"


def prediction_input(draw: random.Random) -> str:
    ending, content = examples([{"instruction": "Is it?", "kind": "a"}, good_inputs.TALK | {"task": "boolq"}], draw)
    write(Path(f"m/in{ending}"), content)
    return f"predict --input=m/in{ending}"


def tasks_file(draw: random.Random) -> str:
    value = draw.choice([good_inputs.TASKS, {"tasks": good_inputs.TASKS, "columns": ["free", "mood"]}])
    write(Path("m/tasks.json"), changed(value, draw))
    return "train --tasks_file=m/tasks.json"


def checkpoint_configuration(draw: random.Random) -> str:
    shutil.copytree("ck", "m/ck")
    write(Path("m/ck/mtl_lora_config.json"), changed(json.loads(Path("ck/mtl_lora_config.json").read_text()), draw))
    return draw.choice(["evaluate --checkpoint=m/ck --limit=2", "export peft --checkpoint=m/ck --tasks=boolq"])


def checkpoint_weights(draw: random.Random) -> str:
    """The bytes of a checkpoint's tensors, with the hash that fits them."""
    from mtl_lora.files import sha256_of

    shutil.copytree("ck", "m/ck")
    content = changed_bytes(Path("ck/mtl_lora.safetensors").read_bytes(), draw)
    write(Path("m/ck/mtl_lora.safetensors"), content)
    config = json.loads(Path("ck/mtl_lora_config.json").read_text())
    write(Path("m/ck/mtl_lora_config.json"), {**config, "weights_sha256": sha256_of(content)})
    return "export peft --checkpoint=m/ck --tasks=boolq"


def base_model(draw: random.Random) -> str:
    shutil.copytree("base", "m/base")
    if draw.random() < 0.5:
        write(Path("m/base/model.safetensors"), changed_bytes(Path("base/model.safetensors").read_bytes(), draw))
    else:  # no large numbers: a model of 2**31 layers would be built
        write(Path("m/base/config.json"), changed_json(json.loads(Path("base/config.json").read_text()), draw, SMALL))
    return "train --base_model=m/base"


def peft_configuration(draw: random.Random) -> str:
    shutil.copytree("peft", "m/peft")
    write(Path("m/peft/adapter_config.json"), changed(json.loads(Path("peft/adapter_config.json").read_text()), draw))
    imported = "export import-peft --peft=m/peft"
    asked = "evaluate ~checkpoint --peft=m/peft --tasks_file=tasks.json --data_dir=tests"
    return draw.choice([imported, imported, asked])


def peft_weights(draw: random.Random) -> str:
    shutil.copytree("peft", "m/peft")
    write(
        Path("m/peft/adapter_model.safetensors"),
        changed_bytes(Path("peft/adapter_model.safetensors").read_bytes(), draw),
    )
    return "export import-peft --peft=m/peft"


def original_weights(draw: random.Random) -> str:
    import torch

    if draw.random() < 0.5:
        write(Path("m/original.pt"), changed_bytes(Path("original.pt").read_bytes(), draw))
    else:
        shapes = {name: list(tensor.shape) for name, tensor in torch.load("original.pt", weights_only=True).items()}
        shapes = changed_json(shapes, draw, [0, 1, 5, [2, 2]])
        shapes = shapes if isinstance(shapes, dict) else {}
        shapes = {
            name: [size for size in shape if type(size) is int]
            for name, shape in shapes.items()
            if isinstance(shape, list)
        }
        torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, "m/original.pt")
    return "export import-original --file=m/original.pt"


def results(draw: random.Random) -> str:
    shutil.copytree("ev", "m/ev")
    write(Path("m/ev/results.json"), changed(json.loads(Path("ev/results.json").read_text()), draw))
    return draw.choice(
        ["report table m/ev", "report details m/ev", "report compare m/ev ev0", "report table ev0 m/ev --difference"]
    )


def predictions(draw: random.Random) -> str:
    shutil.copytree("ev", "m/ev")
    path = Path("m/ev/predictions/boolq.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = changed_json(lines, draw)
    content = "".join(json.dumps(line) + "\n" for line in (lines if isinstance(lines, list) else [lines])).encode()
    write(path, changed_bytes(content, draw) if draw.random() < 0.3 else content)
    return "report compare m/ev ev0 --resamples=100"


def training_left(draw: random.Random) -> Line:
    """What a training leaves: its log, its analysis, its settings."""
    name = draw.choice(["train_log.jsonl", "adapter_analysis.json", "run.json", "mtl_lora_config.json"])
    shutil.copytree("ck", "m/run")
    path = Path("m/run", name)
    content = path.read_bytes()
    write(path, changed_bytes(content, draw) if name.endswith("l") else changed(json.loads(content), draw))
    return shown("m/run", draw)


def study(draw: random.Random) -> Line:
    shutil.copytree("study", "m/study")
    write(Path("m/study/study.json"), changed(json.loads(Path("study/study.json").read_text()), draw))
    return shown("m/study", draw)


def shown(folder: str, draw: random.Random) -> Line:
    """The page of a folder; mostly without its figures, which take seconds to draw."""
    from mtl_lora.report.load import analysis_of, load_run, log_of
    from mtl_lora.report.table import study_tables

    def tables() -> None:
        study = load_run(folder)
        found = study_tables(study) if not study.facts else []
        for each in study.runs:
            log_of(study, each)
            analysis_of(study, each)
        print(*(table.markdown() for table in found))

    return tables if draw.random() < 0.97 else f"report page {folder} --output=m/page.html"


def grid(draw: random.Random) -> str:
    write(Path("m/grid.json"), changed(good_inputs.GRID, draw))
    return "study --grid=m/grid.json"


def earlier_settings(draw: random.Random) -> str:
    settings = json.loads(Path("ev/settings.json").read_text())
    settings |= {"mode": "generate", "max_new_tokens": 32, "num_beams": 1}
    write(Path("m/out/predictions/boolq.jsonl"), b"")
    write(Path("m/out/settings.json"), changed(settings, draw))
    return "evaluate --output_dir=m/out --limit=2"


def run_to_resume(draw: random.Random) -> str:
    from mtl_lora.cli import parse
    from mtl_lora.language.config import TrainConfig
    from mtl_lora.language.tasks import TaskSet

    shutil.copytree("ck", "m/out/checkpoint-2")
    write(Path("m/out/checkpoint-2/trainer_state.json"), {})
    settings = parse(TrainConfig, complete("train --output_dir=m/out --resume_from_checkpoint=True")[1:], "").to_json()
    tasks = TaskSet.from_json(good_inputs.TASKS).to_json()
    path = Path("m/out/checkpoint-2/mtl_lora_config.json")
    config = json.loads(path.read_text())
    config["origin"] |= {"train_settings": settings, "task_set": tasks}  # else all would be of another run
    write(path, config)
    write(Path("m/out/run.json"), changed({"settings": settings, "tasks": tasks, "world_size": 1}, draw))
    return "train --output_dir=m/out --resume_from_checkpoint=True"


def deepspeed(draw: random.Random) -> str:
    write(Path("m/zero.json"), changed(json.loads(Path("zero2.json").read_text()), draw, SMALL))
    return "train --deepspeed=m/zero.json"


def flags(draw: random.Random) -> list[str]:
    """A command line with one to three odd flags; ``--check`` keeps commands from working."""
    from mtl_lora.export.__main__ import COMMANDS as EXPORTS
    from mtl_lora.language.config import EvalConfig, PredictConfig, TrainConfig
    from mtl_lora.report.__main__ import CompareConfig, TableConfig
    from mtl_lora.study.config import StudyConfig

    of = {"train": TrainConfig, "evaluate": EvalConfig, "predict": PredictConfig, "study": StudyConfig}
    of |= {f"export {name}": config for name, config in EXPORTS.items()}
    of |= {"report table ev": TableConfig, "report compare ev ev0": CompareConfig}
    command = draw.choice(list(of))
    names = [flag.name for flag in of[command].flags() if flag.name not in ("check", "report", "base_model", "collect")]
    text = [str(value) for value in ODD if not isinstance(value, list)] + [
        "a,b",
        "[",
        "'",
        "tests",
        "tasks.json",
        "1e400",
    ]
    given = {}
    for _ in range(draw.choice((1, 1, 2, 3))):
        name, value = draw.choice(names), draw.choice(text)
        if draw.random() < 0.1:
            name = draw.choice([name.upper(), f"{name}x", name[1:], "", name.replace("_", "-")])
        value = value.replace("\0", "").replace("../", "")  # no argument of a program holds a NUL
        given[name] = draw.choice([[f"--{name}={value}"], [f"--{name}", value], [f"--{name}"]])
    words = [word for each in given.values() for word in each]
    known = {word.split("=")[0][2:] for word in words}
    default = [f for f in good_inputs.DEFAULTS.get(command, "").split() if f[2:].split("=")[0] not in known]
    return [*command.split(), *default, *words]


KINDS: dict[Callable[[random.Random], Line], int] = {  # with how often each is drawn
    **dict.fromkeys((training_data, tasks_file, flags, grid, results), 4),
    **dict.fromkeys((test_set, prediction_input, checkpoint_configuration, predictions, peft_configuration), 3),
    **dict.fromkeys(
        (checkpoint_weights, peft_weights, base_model, run_to_resume, earlier_settings, original_weights), 2
    ),
    **dict.fromkeys((study, training_left, deepspeed), 1),
}


# ---- running them ----


@contextlib.contextmanager
def inside(folder: Path):
    """The folder of good inputs, made if need be, as the working folder."""
    from huggingface_hub import constants

    if not (folder / "grid.json").exists():
        good_inputs.make(folder)
        shutil.copy(good_inputs.PROJECT / "config" / "zero2.json", folder)
    before, constants.HF_HUB_OFFLINE = Path.cwd(), True
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def attempt(kind: Callable[[random.Random], Line], draw: random.Random) -> tuple[Line, Ended, str]:
    """Run one mutated input inside the folder; returns the line, how it ended, and what is wrong with that or ''."""
    for name in ("m", "out", "out.jsonl", "out.jsonl.partial"):
        path = Path(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    Path("m").mkdir()
    line = kind(draw)
    ended = run(line)
    if ended.code not in (0, 2):
        return line, ended, f"ended with {ended.code}"
    if ended.code == 2 and (ended.err.count("error: ") < 1 or not ended.sentence or "\n" in ended.sentence):
        return line, ended, "is not one sentence"
    return line, ended, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=1000, help="number of mutated inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this one alone and print all it says")
    parser.add_argument("--kind", help="of this kind alone, such as tasks_file")
    options = parser.parse_args()
    kinds = [kind for kind, weight in KINDS.items() for _ in range(weight) if options.kind in (None, kind.__name__)]
    counts, failures, started = collections.Counter(), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder, inside(Path(folder)):
        numbers = range(options.inputs) if options.only is None else [options.only]
        for number in numbers:
            draw = random.Random(f"{options.seed} {number}")
            kind = draw.choice(kinds)
            line, ended, wrong = attempt(kind, draw)
            counts[kind.__name__, ended.code] += 1
            if options.only is not None:
                print(line, ended.code, ended.out, ended.err, sep="\n")
            if wrong:
                failures += 1
                print(
                    f"seed {options.seed}, input {number} ({kind.__name__}) {wrong}: {line}\n{ended.err[-1500:]}",
                    flush=True,
                )
            if (number + 1) % 500 == 0:
                print(f"{number + 1:,} inputs, {failures} failures, {time.monotonic() - started:.0f} s", flush=True)
    print(f"seed {options.seed}: {sum(counts.values()):,} inputs, {failures} failures")
    for name in dict.fromkeys(name for name, _ in counts):
        refused, taken = counts[name, 2], counts[name, 0]
        print(f"{name:<26}{refused + taken:>7,}  refused {refused:>6,}  taken {taken:>6,}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
