"""``table.md``: the methods by task over seeds, each against its baseline, transfer, and what the search found."""

from collections.abc import Sequence

from mtl_lora.language.tasks import Task, TaskSet
from mtl_lora.report.render import MARKDOWN, NOTHING, markdown_table, percent, trainable_text
from mtl_lora.report.results import Trainable
from mtl_lora.report.rows import MAJORITY_LABEL, Cell
from mtl_lora.study.notes import single_runs

FILE_NAME = "table.md"


def render(value: dict) -> str:
    """The whole file from the content of ``study.json``."""
    tasks = TaskSet.from_json(value["task_set"], "the study's task_set")
    columns = [tasks[name] for name in tasks.columns if name in value["data"]["test"]["records"]]
    groups = list(dict.fromkeys(experiment["group"] for experiment in value["experiments"]))
    parts = [f"# {MARKDOWN.text(value['name'])}", MARKDOWN.text(value["about"])]
    for group in groups:
        if len(groups) > 1:
            parts.append(f"## {MARKDOWN.text(group)}")
        kept = [experiment for experiment in value["experiments"] if experiment["group"] == group]
        parts.append(_accuracies(kept, columns, single_runs(value)))
        if compared := [experiment for experiment in kept if experiment["against"]]:
            parts.append(_differences(compared, columns))
    if value["transfer"]:
        parts += ["## Transfer: trained together minus each task trained alone", _transfer(value["transfer"], columns)]
    if value["search"]:
        parts += [f"## Search of {MARKDOWN.text(value['search']['flag'])} on the development set"]
        parts.append(_search(value["search"]))
    parts.append("\n".join(f"- {MARKDOWN.text(note)}" for note in value["notes"]))
    return "\n\n".join(parts) + "\n"


def _accuracies(experiments: Sequence[dict], columns: Sequence[Task], one_seed: bool) -> str:
    header = ["Method", "Trained weights, M (%)", "Rank", "Learning rate", *(task.title for task in columns), "Average"]
    header += [] if one_seed else ["95 % interval"]
    lines = [_majority(experiments[0], columns, len(header))]
    for experiment in experiments:
        summary = experiment["summary"]
        cells = [_cell(experiment, summary["tasks"].get(task.name), task.name, one_seed) for task in columns]
        cells.append(_cell(experiment, summary["average"], None, one_seed))
        line = [MARKDOWN.text(experiment["name"]), _weights(experiment), *_settings(experiment), *cells]
        lines.append(line if one_seed else [*line, _interval(summary["average"])])
    return markdown_table([MARKDOWN.text(heading) for heading in header], lines)


def _cell(experiment: dict, summary: dict | None, task: str | None, one_seed: bool) -> str:
    """Mean ± standard deviation over seeds; of a single run of a study with one seed ± its standard error."""
    if summary is None:
        return NOTHING
    spread = summary["sd"]
    if one_seed:
        tasks = experiment["runs"][0]["tasks"]
        errors = [tasks[task]["stderr"]] if task else [score["stderr"] for score in tasks.values()]
        spread = sum(error**2 for error in errors) ** 0.5 / len(errors)
    return MARKDOWN.cell(Cell(summary["mean"], spread))


def _weights(experiment: dict) -> str:
    """Trained weights of one adapter, and how many adapters there are."""
    if experiment["trainable"] is None:
        return NOTHING
    text = trainable_text(Trainable(**experiment["trainable"]))
    return f"{experiment['adapters']} x {text}" if experiment["adapters"] > 1 else text


def _settings(experiment: dict) -> list[str]:
    values = (experiment["rank"], experiment["learning_rate"])
    return [NOTHING if value is None else f"{value:g}" for value in values]


def _interval(summary: dict | None, signed: bool = False) -> str:
    if summary is None or summary["low"] is None:
        return NOTHING
    return f"{percent(summary['low'], signed)} to {percent(summary['high'], signed)}"


def _majority(experiment: dict, columns: Sequence[Task], width: int) -> list[str]:
    """What always giving a task's most frequent answer scores on these questions."""
    tasks = experiment["runs"][0]["tasks"]
    shares = [tasks[task.name]["majority"] if task.name in tasks else None for task in columns]
    cells = [NOTHING if share is None else percent(share) for share in shares]
    average = NOTHING if None in shares else percent(sum(shares) / len(shares))
    line = [MAJORITY_LABEL, NOTHING, NOTHING, NOTHING, *cells, average]
    return line + [NOTHING] * (width - len(line))


def _differences(experiments: Sequence[dict], columns: Sequence[Task]) -> str:
    header = ["Difference", *(task.title for task in columns), "Average"]
    lines = [
        [
            MARKDOWN.text(f"{experiment['name']} - {experiment['against']['baseline']}"),
            *_difference_cells(experiment["against"], columns),
        ]
        for experiment in experiments
    ]
    return markdown_table([MARKDOWN.text(heading) for heading in header], lines)


def _difference_cells(value: dict, columns: Sequence[Task]) -> list[str]:
    entries = [*(value["tasks"].get(task.name) for task in columns), value["average"]]
    return [
        NOTHING if entry is None else f"{percent(entry['difference'], signed=True)} ({_interval(entry, signed=True)})"
        for entry in entries
    ]


def _transfer(rows: Sequence[dict], columns: Sequence[Task]) -> str:
    header = ["Together - alone", "Group", *(task.title for task in columns), "Average"]
    lines = [
        [
            MARKDOWN.text(f"{row['experiment']} - {row['alone']}"),
            MARKDOWN.text(row["group"]),
            *_difference_cells(row, columns),
        ]
        for row in rows
    ]
    return markdown_table([MARKDOWN.text(heading) for heading in header], lines)


def _search(search: dict) -> str:
    """One column a value, the chosen one in bold."""
    values = [candidate["value"] for candidate in search["experiments"][0]["candidates"]]
    lines = []
    for experiment in search["experiments"]:
        line = [MARKDOWN.text(experiment["name"])]
        for candidate in experiment["candidates"]:
            text = percent(candidate["dev"])
            line.append(f"**{text}**" if candidate["value"] == experiment["chosen"] else text)
        lines.append(line)
    return markdown_table(["Dev average", *(f"{value:g}" for value in values)], lines)
