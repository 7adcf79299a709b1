"""Output folders that appear whole or not at all, and never in place of something that is no earlier output."""

import contextlib
import fnmatch
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

from mtl_lora.errors import UserError


@contextlib.contextmanager
def whole_folder(
    output: str | Path,
    patterns: Sequence[str],
    overwrite: bool,
    inputs: Iterable[str | Path] = (),
    nested: bool = False,
) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its place when the block ends well, and is removed if not.

    patterns: names of the files that such an output holds; nested: its subfolders hold them instead. inputs: what is
    read, and so must not be replaced. Raises ``UserError`` if ``output`` is in use and may not be replaced, or can
    not be written.
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
        _give_usual_permissions(temporary)
        _take_place(temporary, output)
    except (OSError, SafetensorError) as error:
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
    if not overwrite:
        raise UserError(f"{output} is not empty; pass --overwrite to replace it, or another --output")
    read = [Path(path).resolve() for path in inputs]
    if any(path == output or output in path.parents for path in read):
        raise UserError(f"{output} holds what is read and cannot be replaced by it; pass another --output")
    # Whatever else lies there, such as a training run, was not made by this command and is not deleted by it.
    if nested:
        entries = [entry for part in entries for entry in (part.iterdir() if part.is_dir() else [part])]
    for entry in entries:
        if entry.is_dir() or not any(fnmatch.fnmatch(entry.name, pattern) for pattern in patterns):
            raise UserError(f"{output} holds {entry.name}, which this command did not write; pass another --output")


def _give_usual_permissions(folder: Path) -> None:
    """Temporary folders and safetensors' files are made for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


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
