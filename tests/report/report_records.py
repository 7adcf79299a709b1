"""Records of results files that the tests of reports share, and the table that two of them make."""

import copy
import re

from mtl_lora.language.tasks import COMMONSENSE
from mtl_lora.report import __main__ as command_line

TWO_TASKS = {"tasks": [{"name": "first", "id": 0, "title": "First"}, {"name": "second", "id": 1}], "columns": []}
BASE = {
    "schema": 1,
    "name": "base",
    "method": None,
    "base_model": "smollm2-135m",
    "mode": "score",
    "trainable": None,
    "tasks": {
        "first": {"accuracy": 0.5, "stderr": 0.03, "n": 300, "majority": 0.6},
        "second": {"accuracy": 0.25, "stderr": 0.04, "n": 100, "majority": 0.3},
    },
    "task_set": TWO_TASKS,
    "data": {"first": "aaaa", "second": "bbbb"},
}
TUNED = {
    **BASE,
    "name": "mtl_lora",
    "method": "mtl_lora",
    "trainable": {"adapter": 16_845_824, "total": 6_755_261_248},
    "tasks": {
        "first": {"accuracy": 0.75, "stderr": 0.03, "n": 300, "majority": 0.6},
        "second": {"accuracy": 0.2, "stderr": 0.03, "n": 100, "majority": 0.3},
    },
}
COMMONSENSE_RESULTS = {
    "name": "lora",
    "tasks": {name: {"accuracy": 0.683, "stderr": 0.008, "n": 100} for name in COMMONSENSE.names},
    "task_set": COMMONSENSE.to_json(),
}

EXPECTED = """\
| Method                          | Trained weights, M (%) |       First |     second |     Average |
| ------------------------------- | ---------------------: | ----------: | ---------: | ----------: |
| always the most frequent answer |                      – |        60.0 |       30.0 |        45.0 |
| base                            |                      – |  50.0 ± 3.0 | 25.0 ± 4.0 |  37.5 ± 2.5 |
| mtl_lora                        |         16.85 (0.25 %) |  75.0 ± 3.0 | 20.0 ± 3.0 |  47.5 ± 2.1 |
| difference                      |                      – | +25.0 ± 4.2 | -5.0 ± 5.0 | +10.0 ± 3.3 |

- Questions: first 300, second 100.
- Accuracy in percent; ± is one standard error.
- Mode: score.
- Base model: smollm2-135m.
- The difference is mtl_lora (the last results file) minus base (the first) in percentage points; its standard error \
treats the questions of the two rows as independent.
"""


def changed(record: dict, **places) -> dict:
    """A deep copy with some places set: ``tasks__first__n=5``; ``...`` removes the key."""
    record = copy.deepcopy(record)
    for place, value in places.items():
        *path, key = place.split("__")
        holder = record
        for step in path:
            holder = holder[step]
        if value is ...:
            del holder[key]
        else:
            holder[key] = value
    return record


def unescaped_pipes(line: str) -> int:
    return len(re.findall(r"(?<!\\)(?:\\\\)*\|", line))


def grid(text: str) -> dict[str, list[str]]:
    """Cells of a rendered markdown table by row label."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {line[0]: line[1:] for line in cells}


def run_command(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command line of reports."""
    code = 0
    try:
        command_line.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()
