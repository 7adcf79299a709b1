"""Whole files or none: written under a temporary name and renamed; hashed to tell a changed byte."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mtl_lora.errors import UserError


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the block ends well and is removed when it fails.

    Raises ``UserError`` naming the folder when it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose a writable folder") from None
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files for the owner alone; give the final file the usual permissions.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_all(contents: dict[Path, bytes]) -> None:
    """Write all files under temporary names, then rename them, the first one last; raises ``UserError``."""
    path = None
    try:
        with contextlib.ExitStack() as stack:
            for path, content in contents.items():
                if path.is_dir():
                    raise UserError(f"{path} cannot be written, it is a folder; pass the path of a file")
                stack.enter_context(atomic_path(path)).write_bytes(content)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another place") from None


def require_writable(folder: str | Path) -> None:
    """Raise ``UserError`` if files cannot be written to ``folder``, which need not exist; makes nothing."""
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{folder} cannot be written (Not a directory); choose a writable folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written (Permission denied); choose a writable folder")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically (UTF-8, newlines as they are)."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file atomically, indented, with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def records_bytes(records: list[dict]) -> bytes:
    """A JSON list, one record a line, in ASCII (other characters escaped): it reads the same under any locale."""
    return b"[\n" + b",\n".join(json.dumps(record).encode() for record in records) + b"\n]\n"


def read_json(path: str | Path, what: str) -> object:
    """Read a JSON file; raises ``UserError`` that names ``what`` and the path if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} {path} is not JSON: {error}") from None


def sha256(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal; raises ``UserError`` if it cannot be read."""
    try:
        with Path(path).open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def sha256_of(content: bytes) -> str:
    """The sha256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
