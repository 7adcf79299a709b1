"""Places and small helpers that many tests use."""

import hashlib
import json
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


def git_blob(content: bytes) -> str:
    """The id that git gives these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
