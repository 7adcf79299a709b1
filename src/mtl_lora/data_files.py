"""Read files of examples, questions and inputs: JSON, JSON lines, CSV and parquet.

All data is read with ``read_values``, so training data, test sets and prediction inputs support the same formats.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.tasks import TaskSet


def read_values(path: Path) -> list:
    """The values of a JSON list, ``{"data": [...]}`` or JSON lines file, or the rows of a CSV, TSV or parquet file.

    A file that does not end in .csv, .tsv or .parquet is read as JSON. A BOM and blank lines are skipped; an empty CSV
    cell or a parquet null means that the row lacks this field.
    """
    return READERS.get(path.suffix.lower(), _json_values)(path)


def examples_of(
    parse: Callable, path: str | Path, tasks: TaskSet, task: str | None = None, closed: bool = False
) -> list:
    """Return the examples of a file, each made by ``parse(value, index, source, tasks, task, closed)``; raises
    ``UserError`` for a file without examples."""
    values = read_values(Path(path))
    if not values:
        raise UserError(f"{path} holds no examples")
    return [parse(value, index, str(path), tasks, task, closed) for index, value in enumerate(values)]


def data_file(folder: str | Path, name: str) -> Path:
    """The path of a folder's data file ``name``: ``<name>.json`` or, if absent, the file with another supported ending.

    Returns the path of the missing ``.json`` if there is none. Raises ``UserError`` if there are several.
    """
    path = Path(folder, f"{name}.json")
    if path.is_file() or not path.parent.is_dir():
        return path
    found = sorted(each for each in path.parent.iterdir() if each.stem == name and each.suffix.lower() in READERS)
    if len(found) > 1:
        raise UserError(f"{folder} holds {' and '.join(each.name for each in found)}; keep only one of them")
    return found[0] if found else path


def _json_values(path: Path) -> list:
    text = files.read_utf8(path, "the data file")
    lines = path.suffix.lower() in (".jsonl", ".ndjson")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        # JSON lines in a file with another ending: an object followed by more text.
        if not lines and not ("Extra data" in str(error) and text.lstrip().startswith("{")):
            raise UserError(f"the data file {path} is not JSON: {error}") from None
    else:
        if isinstance(value, dict) and isinstance(value.get("data"), list):
            value = value["data"]
        if isinstance(value, list):
            return value
        # JSON lines of a single example, perhaps in a file with another ending.
        if lines or (isinstance(value, dict) and value.keys() & {"instruction", "input", "messages", "text", "image"}):
            return [value]
        raise UserError(f"{path} must hold a JSON list of examples, not {type(value).__name__}")
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            values += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
    return values


def _csv_rows(path: Path) -> list[dict[str, str]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = list(io.StringIO(files.read_utf8(path, "the data file"), newline=""))
    csv.field_size_limit(sys.maxsize)  # csv refuses cells above 128 KiB by default
    rows, reader = [], csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(filter(None, reader), [])]
        if len(set(header)) < len(header):
            raise UserError(f"{path}: the header names a column twice ({', '.join(header)})")
        ended = reader.line_num
        for row in filter(None, reader):
            if len(row) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num}: the row has {len(row)} cells and the header {len(header)}; cells "
                    f"are separated by {delimiter!r}, and a cell that contains it or a line break must be quoted"
                )
            spanned = [line for line in lines[ended : reader.line_num] if line.strip()]
            ended = reader.line_num
            if delimiter == "\t" and len(spanned) > 1 and {line.count("\t") for line in spanned} == {len(header) - 1}:
                # A text that begins with an unpaired quotation mark would swallow the rows after it into one cell.
                raise UserError(
                    f"{path}, lines up to {ended} are either {len(spanned)} rows or one row with quoted line breaks; "
                    "double the quotation marks inside texts and quote these texts, or pass JSON"
                )
            rows.append({name: cell for name, cell in zip(header, row, strict=True) if cell})
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not CSV: {error}") from None
    return rows


def _parquet_rows(path: Path) -> list[dict]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(
            f"{path} needs the package pyarrow; pass JSON, or in a checkout of mtl-lora: pip install '.[train]'"
        ) from None
    try:
        with ParquetFile(path) as opened:
            rows = opened.read().to_pylist()
        rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
        # Cells that JSON has no type for, such as a date or text stored as bytes, become text.
        text = json.dumps(rows, default=lambda cell: cell.decode() if isinstance(cell, bytes) else str(cell))
        return json.loads(text)
    except (OSError, ValueError, NotImplementedError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the data file {path} cannot be read as parquet ({reason}); write it again") from None


READERS: dict[str, Callable[[Path], list]] = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), _json_values),
    **dict.fromkeys((".csv", ".tsv"), _csv_rows),
    ".parquet": _parquet_rows,
}


# ---- fields of an example ----


def text_of(value: object, what: str) -> str:
    """Return ``value`` if it is a string that UTF-8 can encode; else raise ``UserError`` naming ``what``."""
    if not isinstance(value, str):
        raise UserError(f"{what} must be a string, not {value!r:.200}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair, such as "\ud800"
        raise UserError(f"{what} holds half a character (a lone surrogate), which no tokenizer can encode") from None
    return value


_LIKE_TEXT_B = ("textb", "textpair", "text2", "sentenceb", "sentence2", "question2", "hypothesis")


def refuse_slips(value: Mapping, where: str) -> None:
    """Raise ``UserError`` for a misspelling of the optional key ``text_b`` (textB), or another common name for it."""
    plain = [key for key in value if isinstance(key, str) and re.sub(r"[\W_]", "", key).lower() in _LIKE_TEXT_B]
    if plain and "text_b" not in value:
        raise UserError(f"{where} has the unknown field {plain[0]!r} (did you mean 'text_b'?)")


def whole_number(value: object) -> object:
    """The int in a table cell that holds it as text (CSV) or as a float (a column with gaps); else the value itself."""
    if isinstance(value, str) and re.fullmatch(r"(0|-?[1-9][0-9]{0,8})(\.0+)?", value):
        return int(value.partition(".")[0])
    return int(value) if isinstance(value, float) and value.is_integer() else value


def label_of(value: dict, labels: Sequence[str], where: str, task: str) -> str:
    """The label of an example, which gives it by name or, unless the labels are numbers themselves, by index from 0.

    Raises ``UserError`` if ``value`` has no ``label``, or one that the task does not have.
    """
    label = value.get("label")
    if label is None:
        raise UserError(f"{where} has no field 'label'")
    # With the labels 1, 2, 3 the value 1 is the first label, not the index of the second.
    are_numbers = any(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", each) for each in labels)
    if label in labels or (are_numbers and str(label) in labels):
        return str(label)
    number = whole_number(label)
    if are_numbers and str(number) in labels:
        return str(number)
    if not are_numbers and type(number) is int and 0 <= number < len(labels):
        return labels[number]
    why = " (numbers are labels here, not indices)" if are_numbers and type(number) is int else ""
    raise UserError(f"{where}: the label {label!r:.80} is not one of {task}'s labels: {', '.join(labels)}{why}")


def task_id_of(value: dict, where: str, tasks: TaskSet, task: str | None) -> int:
    """The id of an example's task, from its ``task_id``, its ``task`` (a name), and the ``task`` of the whole file.

    Raises ``UserError`` if they name no known task, or different ones.
    """
    found = []
    if value.get("task_id") is not None:
        given = whole_number(value["task_id"])
        if type(given) is not int or not 0 <= given < len(tasks):
            raise UserError(f"{where}: task_id {value['task_id']!r:.50} is not one of the tasks {tasks.describe()}")
        found.append(given)
    if value.get("task") is not None:
        if value["task"] not in tasks.names:
            raise UserError(f"{where}: task {value['task']!r} is not one of the tasks {tasks.describe()}")
        found.append(tasks[value["task"]].id)
    if task is not None:
        found.append(tasks[task].id)
    if not found and len(tasks) == 1:
        return 0
    if not found:
        raise UserError(
            f"{where} has no field 'task_id' (or 'task', a name), and --task is not passed; the tasks are "
            f"{tasks.describe()}"
        )
    if len(set(found)) > 1:
        names = " and ".join(tasks[task_id].name for task_id in found)
        raise UserError(f"{where} names different tasks: {names}")
    return found[0]
