"""Places and small helpers that many tests use."""

import hashlib
import json
import random
import socket
from pathlib import Path

PROJECT = Path(__file__).parent.parent
QUICKSTART = PROJECT / "data" / "quickstart"


def free_port() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def quickstart_records() -> list[dict]:
    """The embedded training records."""
    return json.loads((QUICKSTART / "train.json").read_text())


def write_set(folder: Path, tasks: list[dict], train: list[dict], test: dict[str, list]) -> None:
    """A prepared set: ``train.json``, whose examples are shuffled, ``tasks.json`` and ``test/<task>/test.json``."""
    random.Random(0).shuffle(train)
    test = {f"test/{name}/test.json": examples for name, examples in test.items()}
    for name, value in {"tasks.json": tasks, "train.json": train, **test}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value))


def start(system: str, settings: dict) -> Path:
    """Train in this process; returns the output folder."""
    from mtl_lora import systems

    config = systems.part(system, "config").TrainConfig(**settings)
    systems.part(system, "train").run(config)
    return Path(config.output_dir)


def git_blob(content: bytes) -> str:
    """The id that git gives these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
