"""The folder of a study that can be shared: study.json, table.md, and of every run its results, log and analysis."""

import json
from collections.abc import Iterator
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.study import table
from mtl_lora.study.record import FILE_NAME
from mtl_lora.study.run_record import records_of_runs

_COLLECTED = ("results", "log", "analysis")


def collect(folder: Path, target: Path) -> None:
    """Copy what can be shared of the study in ``folder`` to ``target``, without a path of this machine in it.

    Raises ``UserError`` if ``target`` is the study's own folder or holds another study.
    """
    value = files.read_json(folder / FILE_NAME, "the study")
    if target.resolve() == folder.resolve():
        raise UserError(f"--collect {target} is the study's own folder; name another one")
    if (target / FILE_NAME).is_file():
        other = files.read_json(target / FILE_NAME, "the study").get("name")
        if other != value["name"]:
            raise UserError(f"--collect {target} holds the study {other!r}; name another folder")
    shown = shown_paths(folder, value)
    texts = {target / name: (folder / name).read_text(encoding="utf-8") for name in collected_files(value)}
    texts = {path: without_paths(text, shown) for path, text in texts.items()}
    value = json.loads(without_paths(json.dumps(value), shown))
    texts = {
        target / FILE_NAME: json.dumps(value, indent=2, ensure_ascii=False) + "\n",
        target / table.FILE_NAME: table.render(value),
        **texts,
    }
    files.write_all({path: text.encode("utf-8") for path, text in texts.items()})
    print(f"collected {len(texts)} files in {target}")


def collected_files(value: dict) -> Iterator[str]:
    """The files of the runs, relative to the study's folder."""
    for run in records_of_runs(value):
        yield from (run[key] for key in _COLLECTED if run[key])


def shown_paths(folder: Path, value: dict) -> dict[str, str]:
    """How each absolute path of the study is shown: as in a fresh checkout, or by its last name alone."""
    given = {path: Path(path).name for path in absolute_paths(value["grid"])}
    return {**given, str(Path.cwd()): ".", str(folder.absolute()): f"output/study/{value['name']}"}


def absolute_paths(value: object) -> set[str]:
    """The values anywhere in a grid that are absolute paths."""
    if isinstance(value, dict | list):
        entries = value.values() if isinstance(value, dict) else value
        return set().union(*map(absolute_paths, entries))
    return {value} if isinstance(value, str) and Path(value).is_absolute() else set()


def without_paths(text: str, shown: dict[str, str]) -> str:
    """JSON text with every path of ``shown`` as it is shown, the longest first."""
    for path in sorted(shown, key=len, reverse=True):
        text = text.replace(json.dumps(path)[1:-1], shown[path])
    return text
