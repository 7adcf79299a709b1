"""``mtl-lora report table | details | compare | figures | page``: each command is a dataclass of its flags."""

import base64
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mtl_lora import artifacts, cli
from mtl_lora.config import REQUIRED, Config, flag
from mtl_lora.errors import UserError
from mtl_lora.estimates import RESAMPLES, SEED
from mtl_lora.files import write_all
from mtl_lora.report import figures
from mtl_lora.report.compare import compare
from mtl_lora.report.load import Study, load_run
from mtl_lora.report.table import build_table, details, examples, study_report, study_tables
from mtl_lora.results import Results, object_of
from mtl_lora.text_table import FORMATS, markdown_text

PAGE = "page.html"  # the template, and the default name of the page made from it
_RESULTS = f"results: each a {artifacts.RESULTS}, or the folder of an evaluation or of a checkpoint that was evaluated"


@dataclasses.dataclass(kw_only=True)
class Rendered(Config):
    """Base of commands that print a report or write it to a file."""

    format: str | None = flag(None, f"{', '.join(FORMATS)}; none: by the suffix of --output", choices=FORMATS)
    output: str | None = flag(None, "write to this file; none: print")


@dataclasses.dataclass(kw_only=True)
class TableConfig(Rendered):
    """Results by task and on average, one row per evaluation; of a study, its tables."""

    results: list[str] = flag(REQUIRED, f"{_RESULTS}; or a single study", positional=True)
    published: bool = flag(False, "add rows of published results (commonsense tasks only)")
    difference: bool = flag(False, "add a row, last minus first; its standard error takes questions as independent")
    baselines: list[str] = flag([], "results of single-task models, as a,b, to add a column Delta_m (dense prediction)")

    def run(self) -> None:
        if studies := [path for path in self.results if artifacts.is_study(path)]:
            if len(self.results) > 1 or self.published or self.difference or self.baselines:
                raise UserError(f"the tables of the study {studies[0]} take no other rows; pass its folder alone")
            study = Study.load(studies[0])
            kept = [study.path, study.path.with_name(artifacts.STUDY_TABLE)]
            return study_report(study).write(self.output, self.format, kept)
        results, baselines = _loaded(self.results), _loaded(self.baselines)
        report = build_table(results, self.published, self.difference, baselines)
        report.write(self.output, self.format, [result.path for result in [*results, *baselines]])


def _loaded(paths: Sequence[str]) -> list[Results]:
    return [each for path in paths for each in Results.load_all(path)]


@dataclasses.dataclass
class DetailsConfig(Config):
    """A table for each evaluation: the majority class, unparsed answers, other measures, the answers given."""

    results: list[str] = flag(REQUIRED, _RESULTS, positional=True)

    def run(self) -> None:
        tables = map(details, _loaded(self.results))
        print("\n".join(f"{markdown_text(each.title)}\n\n{each.markdown()}\n" for each in tables), end="")


@dataclasses.dataclass(kw_only=True)
class CompareConfig(Rendered):
    """B minus A by task, on the same questions: paired bootstrap interval and McNemar's exact p."""

    runs: list[str] = flag(REQUIRED, "runs: A and B, the output folders of two evaluations", positional=True)
    seed: int = flag(SEED, "seed of the bootstrap, from 0", min=0)
    resamples: int = flag(RESAMPLES, "number of bootstrap resamples, 100 to 1000000")
    tasks: list[str] = flag([], "compare only these tasks, as a,b; empty: all tasks that both runs have scores of")
    mode: str | None = flag(None, "protocol to compare, where both runs have several", choices=artifacts.PROTOCOLS)

    def validate(self) -> None:
        self.require("runs", "two folders, A and B", len(self.runs) == 2)
        self.require("resamples", "a whole number from 100 to 1000000", 100 <= self.resamples <= 1_000_000)

    def run(self) -> None:
        sides = [Results.load_all(path) for path in self.runs]
        pairs = [(a, b) for a, b in itertools.product(*sides) if a.mode == b.mode == (self.mode or a.mode)]
        if len(pairs) > 1 or (self.mode and not pairs):
            modes = [" and ".join(f"{each.mode} ({each.path})" for each in side) for side in sides]
            way_out = "pass --mode, or the path of one results file for each"
            raise UserError(f"A has {modes[0]}, B has {modes[1]}, but a comparison is of one protocol; {way_out}")
        a, b = pairs[0] if pairs else (side[0] for side in sides)
        predictions = [run.predictions_path(task) for run in (a, b) for task in run.tasks]
        report = compare(a, b, self.seed, self.resamples, self.tasks)
        report.write(self.output, self.format, [a.path, b.path, *predictions])


@dataclasses.dataclass
class FiguresConfig(Config):
    """Every figure that the folders hold numbers for, with single runs side by side; prints the paths written."""

    runs: list[str] = flag(REQUIRED, "runs: folders of trainings, evaluations or studies", positional=True)
    output: str | None = flag(None, "folder of the figures; none, for one run: its subfolder figures")
    format: str = flag("svg,png", "svg, png, or both separated by a comma")

    def run(self) -> None:
        formats = list(dict.fromkeys(name.strip().lower() for name in self.format.split(",")))
        self.require("format", "svg or png, or both separated by a comma", set(formats) <= set(figures.FORMATS))
        print("\n".join(map(str, figures.write_figures(self.runs, self.output, formats))))


@dataclasses.dataclass
class PageConfig(Config):
    """One self-contained HTML file: tables, figures, settings, commands and hashes."""

    runs: list[str] = flag(REQUIRED, "run: the folder of one training, evaluation or study", positional=True)
    output: str | None = flag(None, f"path of the .html file; none: {PAGE} in the run's folder")

    def validate(self) -> None:
        self.require("runs", "one folder", len(self.runs) == 1)

    def run(self) -> None:
        print(write_page(self.runs[0], self.output))


def write_page(run: str, output: str | None = None) -> Path:
    """Write the page of a study, a training or an evaluation, with all content escaped, and return its path; raises
    ``UserError`` for a folder that holds none of these."""
    study = load_run(run)
    path = Path(output) if output else (Path(run) if Path(run).is_dir() else Path(run).parent) / PAGE
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {path} must be the path of an .html file")
    import jinja2

    tables = [] if study.facts else study_tables(study)
    for results in (Results.load(run.results) for run in study.runs if study.facts and run.results):
        tables += [table for table in (details(results), examples(results)) if table.rows]
    drawings = [(each, base64.b64encode(each.render("svg")).decode()) for each in figures.draw(study)]
    facts = {name: words for name, values in (study.facts or _facts(study)).items() if (words := _in_words(values))}
    rules = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    template = jinja2.Template(Path(__file__).with_name(PAGE).read_text(encoding="utf-8"), **rules)
    write_all({path: template.render(study=study, tables=tables, drawings=drawings, facts=facts).encode("utf-8")})
    return path


def _facts(study: Study) -> dict[str, dict]:
    """Facts by section: what the study was made from, then each run without its scores."""
    shown = ("name", "about", "notes", "experiments", "transfer", "search", "task_set")
    facts = {"study": {key: value for key, value in object_of(study).items() if key not in shown}}
    for experiment, run in ((each, run) for each in study.experiments for run in each.runs):
        name = experiment.name if run.seed is None else f"{experiment.name}, seed {run.seed}"
        facts[name] = {key: value for key, value in object_of(run).items() if key not in ("tasks", "seed")}
    return facts


def _in_words(value: object, name: str = "") -> dict[str, str]:
    """Return the known facts as text by name; a nested key follows the name of its object."""
    if isinstance(value, dict):
        return {key: text for part, entry in value.items() for key, text in _in_words(entry, f"{name} {part}").items()}
    if isinstance(value, list):
        known = (entry for entry in value if entry is not None)
        value = "\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in known)
    return {} if value in (None, "") else {name.strip().replace("_", " "): str(value)}


COMMANDS = {"table": TableConfig, "details": DetailsConfig, "compare": CompareConfig}
COMMANDS |= {"figures": FiguresConfig, "page": PageConfig}


def main(arguments: Sequence[str]) -> None:
    """Run one report command; raises ``UserError`` for a user's mistake."""
    if command := cli.parse_one_of("report", COMMANDS, arguments):
        command.run()


if __name__ == "__main__":
    cli.main(["report", *sys.argv[1:]])
