"""Whole files or none: written under a temporary name and renamed; hashed to tell a changed byte."""

import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mtl_lora.errors import UserError

# Read once: it can only be read by setting it, which is the whole process's and so would race between threads.
UMASK = os.umask(0)
os.umask(UMASK)


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
        give_usual_permissions(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def give_usual_permissions(path: str | Path) -> None:
    """Give a file, or a folder with all that it holds, the permissions of new ones; temporary ones are private."""
    path = Path(path)
    for entry in (path, *path.rglob("*")) if path.is_dir() else (path,):
        entry.chmod((0o777 if entry.is_dir() else 0o666) & ~UMASK)


@contextlib.contextmanager
def atomic_directory(
    output: str | Path,
    patterns: Sequence[str],
    overwrite: bool,
    inputs: Iterable[str | Path] = (),
    nested: bool = False,
) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its place when the block ends well, and is removed if not.

    patterns: names of the files that such an output holds; nested: its subfolders hold them. inputs: what is read,
    and so must not be replaced. Raises ``UserError`` if ``output`` is in use and may not be replaced, or cannot be
    written.
    """
    check_output(output, patterns, overwrite, inputs, nested)
    output = Path(output).resolve()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}); choose a writable folder") from None
    try:
        yield temporary
        give_usual_permissions(temporary)
        _take_place(temporary, output)
    except Exception as error:
        # safetensors reports a full disk by an exception class of its own, which its Rust module defines.
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise UserError(f"{output} cannot be written ({error}); nothing was kept of it") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_output(
    output: str | Path, patterns: Sequence[str], overwrite: bool, inputs: Iterable[str | Path], nested: bool = False
) -> None:
    """Raise ``UserError`` unless ``output`` is free, empty, or an earlier output that may be replaced."""
    output = Path(output).resolve()
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output} is a file; name a folder")
    entries = list(output.iterdir())
    if not entries:
        return
    read = [Path(path).resolve() for path in inputs]
    if any(path == output or output in path.parents for path in read):
        raise UserError(f"{output} holds what is read and cannot be replaced by it; pass another --output")
    if not overwrite:
        raise UserError(f"{output} is not empty; pass --overwrite to replace it, or another --output")
    # Anything else, such as a training run, was not made by this command and is not deleted by it.
    if nested:
        entries = [entry for part in entries for entry in (part.iterdir() if part.is_dir() else [part])]
    for entry in entries:
        if entry.is_dir() or not any(fnmatch.fnmatch(entry.name, pattern) for pattern in patterns):
            raise UserError(f"{output} holds {entry.name}, which this command did not write; pass another --output")


def _take_place(temporary: Path, output: Path) -> None:
    if not output.exists():
        temporary.replace(output)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent))
    output.replace(aside)
    try:
        temporary.replace(output)
    except OSError:
        aside.replace(output)
        raise
    shutil.rmtree(aside, ignore_errors=True)


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


def json_lines(values: Iterable[object]) -> str:
    """JSON lines, one for each value."""
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def records_bytes(records: list[dict]) -> bytes:
    """A JSON list, one record a line, in ASCII (other characters escaped): it reads the same under any locale."""
    return b"[\n" + b",\n".join(json.dumps(record).encode() for record in records) + b"\n]\n"


# How files begin that are not UTF-8 text, and what they are.
_OTHER_FORMATS = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"\x1f\x8b": "compressed",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"PAR1": "parquet, whose names end in .parquet",
}


def read_utf8(path: str | Path, what: str) -> str:
    """The text of a file, without a BOM; raises ``UserError`` that names ``what``, the path and what it is instead."""
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"{what} {path} cannot be read ({getattr(error, 'strerror', error)})") from None
    for start, kind in _OTHER_FORMATS.items():
        if content.startswith(start):
            raise UserError(f"{what} {path} is {kind}; save it as UTF-8 text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{what} {path} is not UTF-8 text in line {line}; save it as UTF-8 text") from None


def read_json(path: str | Path, what: str) -> typing.Any:
    """Read a JSON file; raises ``UserError`` that names ``what`` and the path if it is missing or broken."""
    text = read_utf8(path, what)
    try:
        value = json.loads(text)
        if "\\u" in text:  # JSON can spell half of a character, which could not be printed or written again
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} {path} holds text that is not Unicode: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} {path} is not JSON: {error}") from None
    return value


def read_object(path: str | Path, what: str) -> dict:
    """The JSON object in a file; errors as ``read_json``."""
    value = read_json(path, what)
    if not isinstance(value, dict):
        raise UserError(f"{what} {path} must be a JSON object, not {type(value).__name__}")
    return value


def read_lines(path: Path) -> list[str]:
    """The lines of a file; only a newline ends one, for JSON may hold the other line separators of Unicode."""
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}); pass a whole output folder") from None
    return text.removesuffix("\n").split("\n") if text else []


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
