"""``mtl-lora report table | details | compare | figures | page``: each command a dataclass of its flags."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from mtl_lora import artifacts
from mtl_lora.cli import parse
from mtl_lora.config import REQUIRED, Config, closest, flag
from mtl_lora.errors import UserError
from mtl_lora.files import write_text
from mtl_lora.report import compare as comparing
from mtl_lora.report import table as tables
from mtl_lora.report.load import predictions_path
from mtl_lora.results import Results

SUFFIXES = {".csv": "csv", ".tex": "latex", ".json": "json", ".html": "html"}
LEAST_RESAMPLES, MOST_RESAMPLES = 100, 1_000_000
_RESULTS = f"results: each a {artifacts.RESULTS}, or a folder that has one"
_RUNS = "folders of trainings, evaluations or studies"
_FORMAT = "default: as the suffix of --output says, else markdown"


@dataclasses.dataclass
class TableConfig(Config):
    """``table``: results side by side."""

    results: list[str] = flag(REQUIRED, _RESULTS, positional=True)
    format: str | None = flag(None, f"{', '.join(tables.RENDERERS)}; {_FORMAT}")
    published: bool = flag(False, "add published figures (commonsense tasks only)")
    difference: bool = flag(False, "add the last minus the first; its standard error treats questions as independent")
    output: str | None = flag(None, "write to this file; none: print")

    def validate(self) -> None:
        _check_format(self, tables.RENDERERS)

    def run(self) -> None:
        """Read, build, render, then print or write."""
        results = [Results.load(path) for path in self.results]
        _check_output(self.output, [result.path for result in results])
        table = tables.build_table(results, self.published, self.difference)
        _hand_out(self, tables.RENDERERS, table)


@dataclasses.dataclass
class DetailsConfig(Config):
    """``details``: each evaluation by itself."""

    results: list[str] = flag(REQUIRED, _RESULTS, positional=True)

    def run(self) -> None:
        """Print a table an evaluation."""
        found = [tables.details(Results.load(path)) for path in self.results]
        print("\n".join(f"{tables.markdown_text(table.title)}\n\n{table.markdown()}\n" for table in found), end="")


@dataclasses.dataclass
class CompareConfig(Config):
    """``compare``: two runs question by question."""

    runs: list[str] = flag(REQUIRED, "two runs, A and B: evaluations' output folders", positional=True)
    format: str | None = flag(None, f"{', '.join(comparing.RENDERERS)}; {_FORMAT}")
    output: str | None = flag(None, "write to this file; none: print")
    seed: int = flag(0, "of the bootstrap, from 0")
    resamples: int = flag(10_000, f"of the bootstrap, {LEAST_RESAMPLES} to {MOST_RESAMPLES}")

    def validate(self) -> None:
        self.require("runs", "two folders, A and B", len(self.runs) == 2)
        self.require("seed", "a whole number from 0", self.seed >= 0)
        rule = f"a whole number from {LEAST_RESAMPLES} to {MOST_RESAMPLES}"
        self.require("resamples", rule, LEAST_RESAMPLES <= self.resamples <= MOST_RESAMPLES)
        _check_format(self, comparing.RENDERERS)

    def run(self) -> None:
        """Read, compare, render, then print or write."""
        a, b = (Results.load(path) for path in self.runs)
        predictions = [predictions_path(run, task) for run in (a, b) for task in run.tasks]
        _check_output(self.output, [a.path, b.path, *predictions])
        _hand_out(self, comparing.RENDERERS, comparing.compare(a, b, self.seed, self.resamples))


@dataclasses.dataclass
class FiguresConfig(Config):
    """``figures``: drawn from whatever the folders hold numbers for; single runs side by side."""

    runs: list[str] = flag(REQUIRED, _RUNS, positional=True)
    output: str | None = flag(None, "folder of the figures; none: figures in the one folder")
    format: str = flag("svg,png", "svg, png, or both with a comma")

    def validate(self) -> None:
        self.formats = list(dict.fromkeys(name.strip().lower() for name in self.format.split(",")))
        self.require("format", "svg or png, or both with a comma", set(self.formats) <= {"svg", "png"})

    def run(self) -> None:
        """Draw, then name the files."""
        from mtl_lora.report.figures import write_figures

        print("\n".join(map(str, write_figures(self.runs, self.output, self.formats))))


@dataclasses.dataclass
class PageConfig(Config):
    """``page``: one HTML file that needs nothing beside it."""

    run_folder: list[str] = flag(REQUIRED, "the folder of one training, evaluation or study", positional=True)
    output: str | None = flag(None, "path of the .html file; none: page.html in the folder")

    def validate(self) -> None:
        self.require("run_folder", "one folder", len(self.run_folder) == 1)

    def run(self) -> None:
        """Write, then name the file."""
        from mtl_lora.report.page import write_page

        print(write_page(self.run_folder[0], self.output))


COMMANDS = {
    "table": (TableConfig, "Results by task and on average, one row an evaluation."),
    "details": (DetailsConfig, "Each evaluation by itself: unparsed answers, other measures, the answers given."),
    "compare": (CompareConfig, "B minus A by task, on the same questions: paired bootstrap interval and McNemar's p."),
    "figures": (FiguresConfig, "Figures of whatever the folders hold numbers for; prints the paths written."),
    "page": (PageConfig, "One HTML file: tables, figures, settings, commands and where everything comes from."),
}


def main(arguments: Sequence[str]) -> None:
    """Run one command; raises ``UserError`` for a user's mistake."""
    if not arguments or arguments[0] in ("--help", "-h"):
        lines = [f"  {name:8}  {about}" for name, (_, about) in COMMANDS.items()]
        print("\n".join(["usage: mtl-lora report COMMAND ... (COMMAND --help lists its flags)", "", *lines]))
        return
    if arguments[0] not in COMMANDS:
        raise UserError(f"unknown command report {arguments[0]!r}{closest(arguments[0], list(COMMANDS))}")
    config_class, about = COMMANDS[arguments[0]]
    parse(config_class, arguments[1:], about).run()


def _check_format(config: TableConfig | CompareConfig, renderers: dict) -> None:
    config.require("format", f"one of {', '.join(renderers)}", config.format is None or config.format in renderers)


def _check_output(output: str | None, inputs: list[Path]) -> None:
    if output and Path(output).is_dir():
        raise UserError(f"--output {output} is a folder; name a file in it")
    if output and Path(output).resolve() in {path.resolve() for path in inputs}:
        raise UserError(f"--output {output} is one of the files to read and would be lost; name another file")


def _hand_out(config: TableConfig | CompareConfig, renderers: dict, content) -> None:
    """Render; print or write; and print the notes to stderr where the format has no place for them."""
    suffix = SUFFIXES.get(Path(config.output or "").suffix.lower())
    style = config.format or (suffix if suffix in renderers else "markdown")
    text = renderers[style](content)
    if config.output:
        write_text(config.output, text)
    else:
        print(text, end="")
    if style == "csv":
        # A warning that rows are not comparable must not be lost.
        print("\n".join(content.notes), file=sys.stderr)
