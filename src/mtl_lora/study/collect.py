"""The folder of a study that can be shared: study.json, table.md, and of every run its results, log and analysis."""

import json
import os
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.study import table
from mtl_lora.study.record import FILE_NAME

_PATH_FLAGS = ("--base_model", "--data_path", "--output_dir", "--tasks_file", "--cache_dir", "--data_dir")
_PATH_FLAGS += ("--checkpoint", "--deepspeed")


def collect(folder: Path, target: Path) -> None:
    """Copy what can be shared of the study in ``folder`` to ``target``; absolute paths become relative ones.

    Raises ``UserError`` if ``target`` is the study's folder or holds another study.
    """
    value = files.read_json(folder / FILE_NAME, "the study")
    if target.resolve() == folder.resolve():
        raise UserError(f"--collect {target} is the study's own folder; name another one")
    if (target / FILE_NAME).is_file():
        other = files.read_json(target / FILE_NAME, "the study").get("name")
        if other != value["name"]:
            raise UserError(f"--collect {target} holds the study {other!r}; name another folder")
    shown = {str(folder.absolute()): f"output/study/{value['name']}", str(Path.cwd()): "."}
    shown |= {path: os.path.basename(path) for path in absolute_paths(value)}
    written = {}
    for experiment in value["experiments"]:
        for run in experiment["runs"]:
            for part in (run, *run.get("parts", {}).values()):
                for key in ("results", "log", "analysis"):
                    if part[key]:
                        text = (folder / part[key]).read_text(encoding="utf-8")
                        written[target / part[key]] = _shown(text, shown)
    written[target / table.FILE_NAME] = (folder / table.FILE_NAME).read_text(encoding="utf-8")
    written[target / FILE_NAME] = _shown(json.dumps(value, indent=2, ensure_ascii=False) + "\n", shown)
    files.write_all({path: text.encode() for path, text in reversed(written.items())})
    print(f"collected {len(written)} files in {target}")


def absolute_paths(value: object) -> set[str]:
    """The absolute paths among the values of a grid's flags, wherever they stand in a record."""
    if isinstance(value, dict):
        return set().union(*(absolute_paths(entry) for entry in value.values()))
    if isinstance(value, list):
        return set().union(*(absolute_paths(entry) for entry in value))
    return {value} if isinstance(value, str) and os.path.isabs(value) and " " not in value else set()


def _shown(text: str, shown: dict[str, str]) -> str:
    """The text with every path as it is shown, the longest first."""
    for path in sorted(shown, key=len, reverse=True):
        text = text.replace(json.dumps(path)[1:-1], shown[path])
    return text
