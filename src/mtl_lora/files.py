"""Files that appear complete or not at all, claims of outputs by one command at a time, reading, and hashes."""

import contextlib
import ctypes
import errno
import fnmatch
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from mtl_lora.errors import UserError, disk_is_full

NAME = re.compile(r"(?!\.+$)[\w.\-]+")  # of tasks and other names that become file or folder names

# Read once: reading it means setting it for the whole process, which would race between threads.
UMASK = os.umask(0)
os.umask(UMASK)


_RANDOM = "[!.]" * 8  # glob of the random part that tempfile puts between prefix and suffix
_claims: set[int] = set()  # descriptors of the locks that this process holds


def _leave_claims_to_parent() -> None:
    # The workers of a data loader outlive a killed command by seconds, for which they would keep its locks.
    while _claims:
        os.close(_claims.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_claims_to_parent)


@contextlib.contextmanager
def claimed(output: str | Path, wait: bool = False) -> Iterator[list[int]]:
    """Keep other commands out of an output, a folder or a file, until the block or the process ends.

    The claim is a lock (flock) on ``.NAME.lock`` beside the output, which the system releases however the process ends.
    If the parent folder is not writable or is another file system, the output folder itself is locked. If locks are not
    available, a note on stderr says so. Files that a killed command left half-written beside the output are
    removed. In a distributed launch only the first process claims the output. Forks of the process do not hold the
    claim. Yields a list with the lock's descriptor, for commands that must hold it too.

    wait: wait for the command that holds the lock, in every process. Otherwise raises ``UserError`` if another command
    holds it.
    """
    if os.environ.get("RANK", "0") != "0" and not wait:
        yield []
        return
    output = Path(output).resolve()
    made = [folder for folder in output.parents if not folder.exists()]
    descriptor, beside, held = _locked(output, wait)
    owner = os.getpid()
    _claims.add(descriptor)
    try:
        if held:
            remove_leftovers(output)
        yield [descriptor]
    finally:
        if os.getpid() == owner:  # not in a fork
            _claims.remove(descriptor)
            if beside:
                beside.unlink(missing_ok=True)  # while it is still locked, see ``_locked``
            os.close(descriptor)
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _locked(output: Path, wait: bool) -> tuple[int, Path | None, bool]:
    """Return (descriptor of the lock, its file if that must be removed, whether locks are available)."""
    problem, held = "its lock file is removed again and again", True
    for _ in range(1000):
        beside, descriptor = output.parent / f".{output.name}.lock", None  # the name of "/" is empty
        try:
            if not os.path.ismount(output):
                output.parent.mkdir(parents=True, exist_ok=True)
                # A link in a folder from elsewhere could name any file.
                descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except FileNotFoundError as error:  # another command removed the folder that it had made
            problem = error.strerror
            continue
        except OSError as error:
            if not output.is_dir():
                raise UserError(f"{output} cannot be written ({error.strerror}); choose a writable folder") from None
        if descriptor is None:
            beside, descriptor = None, os.open(output, os.O_RDONLY)
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            # A command that the holder has started may hold the lock too, and outlive it.
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") if beside else ""
            os.close(descriptor)
            who = f" (process {holder}, or one that it has started)" if holder else ""
            way_out = "wait for it to end, stop it, or choose another output"
            raise UserError(f"{output} is in use by another command{who}; {way_out}") from None
        except (ImportError, OSError):
            held = False
            note = f"note: file locks are not available here; start no other command on {output} before this one ends"
            print(note, file=sys.stderr)
        # Its owner may have removed the file between our opening and locking it; such a lock protects nothing.
        with contextlib.suppress(FileNotFoundError):
            if beside is None or os.path.samestat(os.fstat(descriptor), beside.stat()):
                if beside and held:
                    with contextlib.suppress(OSError):  # a full disk
                        os.ftruncate(descriptor, 0)
                        os.write(descriptor, f"{os.getpid()} on {platform.node()}".encode())
                return descriptor, beside, held
        os.close(descriptor)
    raise UserError(f"{output} cannot be written ({problem}); choose a writable folder")


def remove_leftovers(output: Path) -> None:
    """Remove what a killed command left beside or in a claimed output; a folder that it moved aside is put back."""
    for path in output.parent.glob(f".{glob.escape(output.name)}.{_RANDOM}.old"):
        if output.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.replace(output)
    left = list(output.parent.glob(f".{glob.escape(output.name)}.{_RANDOM}.partial"))
    # Files inside the output are written under this claim, unless they have a claim of their own.
    for path in output.glob(f".*.{_RANDOM}.partial"):
        name = path.name.rsplit(".", 2)[0]
        left += [] if path.with_name(f"{name}.lock").exists() else [path]
    for path in left:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def reserved(folder: str | Path, size: int) -> BinaryIO:
    """Return an open, nameless file that reserves ``size`` bytes of a folder's disk until it is closed.

    Raises ``UserError`` if the disk has too little space.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < size:  # allocating would fill the disk for everybody before it fails
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with contextlib.ExitStack() as on_error:
            room = on_error.enter_context(tempfile.TemporaryFile(dir=folder))
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(room.fileno(), 0, size)
            else:
                room.write(bytes(size))
                room.flush()
            on_error.pop_all()
    except OSError as error:
        raise UserError(
            f"the disk of {folder} lacks room for the next save, {size / 2**20:,.1f} MiB ({error.strerror}); free some "
            "space, or choose another output"
        ) from None
    return room


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which is renamed to ``path`` if the block succeeds and removed if not.

    Raises ``UserError`` if the file cannot be written, and for a path that is a folder or a device.
    """
    path = Path(path)
    # A rename would replace a device such as /dev/null by a file, for everybody.
    if (os.path.exists(path) and not os.path.isfile(path)) or path.absolute().parent == Path("/dev"):
        raise UserError(f"{path} cannot be written because it is a folder or a device; pass the path of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose a writable folder") from None
    temporary = Path(name)
    try:
        os.close(handle)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        give_usual_permissions(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def give_usual_permissions(path: str | Path) -> None:
    """Give a file, or a folder and everything in it, the usual permissions; temporary files and folders are private."""
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
    """Yield a temporary folder that replaces ``output`` if the block succeeds, and is removed if not.

    patterns, overwrite, inputs, nested: as in ``check_output``. Raises ``UserError`` if another command uses
    ``output``, if it may not be replaced, or if it cannot be written.
    """
    output, temporary = Path(output).resolve(), None
    with claimed(output):
        check_output(output, patterns, overwrite, inputs, nested)
        try:
            temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
            yield temporary
            give_usual_permissions(temporary)
            take_place(temporary, output)
        except Exception as error:
            # safetensors reports a full disk by its own exception class, which its Rust module defines.
            if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError" and not disk_is_full(error):
                raise
            raise UserError(f"{output} cannot be written ({error}); no part of it was kept") from None
        finally:
            if temporary:
                shutil.rmtree(temporary, ignore_errors=True)


def check_output(
    output: str | Path, patterns: Sequence[str], overwrite: bool, inputs: Iterable[str | Path], nested: bool = False
) -> None:
    """Raise ``UserError`` unless ``output`` does not exist, is empty, or is an earlier output that may be replaced.

    patterns: names of the files that such an output holds. overwrite: whether an earlier output may be replaced.
    inputs: paths that the command reads, which must not be replaced. nested: whether the files lie in subfolders.
    """
    output = Path(output).resolve()
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output} is a file; pass a folder")
    entries = list(output.iterdir())
    if not entries:
        return
    read = [Path(path).resolve() for path in inputs]
    if any(path == output or output in path.parents for path in read):
        raise UserError(f"{output} holds an input of this command and cannot be replaced; pass another --output")
    if not overwrite:
        raise UserError(f"{output} is not empty; pass --overwrite to replace it, or another --output")
    # Other files, such as those of a training run, were not written by this command and must not be deleted by it.
    if nested:
        entries = [entry for part in entries for entry in (part.iterdir() if part.is_dir() else [part])]
    for entry in entries:
        if entry.is_dir() or not any(fnmatch.fnmatch(entry.name, pattern) for pattern in patterns):
            raise UserError(f"{output} holds {entry.name}, which this command did not write; pass another --output")


def take_place(temporary: Path, output: Path) -> None:
    """Move a folder to ``output``, replacing a folder there; in one step if the system supports it (Linux)."""
    if not output.exists():
        temporary.replace(output)
        return
    swap, here = sys.platform == "linux" and getattr(ctypes.CDLL(None), "renameat2", None), -100  # AT_FDCWD
    if swap and swap(here, os.fsencode(temporary), here, os.fsencode(output), 2) == 0:  # RENAME_EXCHANGE
        shutil.rmtree(temporary, ignore_errors=True)
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
    """Claim all files, write them under temporary names, then rename them, the first one last; raises ``UserError``.

    The old first file is deleted before the renames, so that a kill between two renames cannot leave it beside new
    files.
    """
    first, path = next(iter(contents)), None
    try:
        with contextlib.ExitStack() as stack:
            for path in contents:
                stack.enter_context(claimed(path))
            for path, content in contents.items():
                with stack.enter_context(atomic_path(path)).open("wb") as opened:
                    opened.write(content)
                    opened.flush()
                    os.fsync(opened.fileno())
            if len(contents) > 1:
                first.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another path") from None


def require_writable(folder: str | Path) -> None:
    """Raise ``UserError`` if files cannot be written to ``folder``, which need not exist; creates nothing."""
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{folder} cannot be written (Not a directory); choose a writable folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written (Permission denied); choose a writable folder")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically (UTF-8, newlines unchanged)."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file atomically, indented, with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def json_lines(values: Iterable[object]) -> str:
    """Return the values as JSON lines, one for each value."""
    texts = (json.dumps(value, ensure_ascii=False) for value in values)
    # A lone surrogate, which JSON can escape but UTF-8 cannot encode, stays escaped.
    return "".join(re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text) + "\n" for text in texts)


def records_bytes(records: list[dict]) -> bytes:
    """Return a JSON list, one record per line, in ASCII (other characters escaped), so any locale reads it the same."""
    return b"[\n" + b",\n".join(json.dumps(record).encode() for record in records) + b"\n]\n"


# The first bytes of files that are not UTF-8 text -> what such a file is.
_OTHER_FORMATS = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"\x1f\x8b": "compressed",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"PAR1": "parquet, whose file name must end in .parquet",
}


def read_utf8(path: str | Path, what: str) -> str:
    """Return the text of a file, without a BOM; raises ``UserError`` that names ``what``, the path and the problem."""
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
        if "\\u" in text:  # JSON can escape a lone surrogate, which could not be printed or written again
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} {path} holds text that is not Unicode: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} {path} is not JSON: {error}") from None
    return value


def read_object(path: str | Path, what: str) -> dict:
    """Return the JSON object in a file; raises ``UserError`` as ``read_json``, and for another JSON value."""
    value = read_json(path, what)
    if not isinstance(value, dict):
        raise UserError(f"{what} {path} must be a JSON object, not {type(value).__name__}")
    return value


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file; only a newline ends a line, because JSON may hold Unicode's other line separators."""
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}); pass a complete output folder") from None
    return text.removesuffix("\n").split("\n") if text else []


def sha256(path: str | Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal; raises ``UserError`` if the file cannot be read."""
    try:
        with Path(path).open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


@contextlib.contextmanager
def unchanged(path: str | Path, digest: str | None = None) -> Iterator[str]:
    """Yield the sha256 of a file that is read in the block; raises ``UserError`` if the file changed meanwhile.

    Another command may replace the file between hashing and reading, and the hash would then belong to other content.
    digest: the sha256, if it is known already.
    """
    digest = digest or sha256(path)
    yield digest
    if sha256(path) != digest:
        raise UserError(f"{path} was changed while it was read; run the same command again")


def sha256_of(content: bytes | memoryview) -> str:
    """Return the sha256 of bytes in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
