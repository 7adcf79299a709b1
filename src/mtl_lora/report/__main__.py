"""The command line of reports: ``python -m mtl_lora.report table | details | compare | figures | page ...``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mtl_lora.errors import OneSentenceParser, UserError, user_errors_to_exit_code
from mtl_lora.files import write_text
from mtl_lora.report import render_compare
from mtl_lora.report.compare import compare
from mtl_lora.report.details import details
from mtl_lora.report.predictions import predictions_path
from mtl_lora.report.render import RENDERERS
from mtl_lora.report.results import FILE_NAME, read_results
from mtl_lora.report.showing import add_figures, add_page
from mtl_lora.report.table import build_table

SUFFIXES = {".md": "markdown", ".markdown": "markdown", ".csv": "csv", ".tex": "latex"}
COMPARE_SUFFIXES = {".md": "markdown", ".markdown": "markdown", ".csv": "csv", ".json": "json"}
LEAST_RESAMPLES, MOST_RESAMPLES = 100, 1_000_000


def make_parser() -> argparse.ArgumentParser:
    """All subcommands; each sets ``run``, a function of the parsed arguments."""
    parser = OneSentenceParser(prog="python -m mtl_lora.report", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_table(commands)
    add_details(commands)
    add_compare(commands)
    add_figures(commands)
    add_page(commands)
    return parser


def add_table(commands) -> None:
    """``table``: results side by side."""
    about = "Accuracy per task and on average, one row a results file."
    parser = commands.add_parser("table", help=about, description=about, allow_abbrev=False)
    parser.add_argument("results", nargs="+", metavar="RESULTS", help=f"a {FILE_NAME}, or a folder that contains one")
    parser.add_argument(
        "--format", choices=list(RENDERERS), help="default: as the suffix of --output says, else markdown"
    )
    parser.add_argument("--published", action="store_true", help="add published figures (commonsense tasks only)")
    parser.add_argument("--output", metavar="FILE", help="write to a file (default: print)")
    parser.add_argument(
        "--difference",
        action="store_true",
        help="add the last results minus the first; its standard error treats their questions as independent",
    )
    parser.set_defaults(run=run_table)


def run_table(arguments: argparse.Namespace) -> None:
    """Read, build, render, then print or write."""
    results = [read_results(path) for path in arguments.results]
    if arguments.output:
        _check_output(arguments.output, [result.path for result in results])
    table = build_table(results, arguments.published, arguments.difference)
    style = arguments.format or _format_of(arguments.output, SUFFIXES)
    _hand_out(RENDERERS[style](table), arguments.output, table.notes if style == "csv" else ())


def add_details(commands) -> None:
    """``details``: how the answers of each run were read."""
    about = "Each run by itself: unparsed answers, stricter readings, the answers given, beside the accuracy."
    parser = commands.add_parser("details", help=about, description=about, allow_abbrev=False)
    parser.add_argument("results", nargs="+", metavar="RESULTS", help=f"a {FILE_NAME}, or a folder that contains one")
    parser.set_defaults(
        run=lambda arguments: print("\n".join(details(read_results(path)) for path in arguments.results), end="")
    )


def add_compare(commands) -> None:
    """``compare``: two runs question by question."""
    about = "B minus A per task, on the same questions: paired bootstrap interval and McNemar's exact p."
    parser = commands.add_parser("compare", help=about, description=about, allow_abbrev=False)
    for name in "AB":
        parser.add_argument(name, help=f"an evaluation's output folder, with {FILE_NAME} and predictions/")
    parser.add_argument(
        "--format",
        choices=list(render_compare.RENDERERS),
        help="default: as the suffix of --output says, else markdown",
    )
    parser.add_argument("--output", metavar="FILE", help="write to a file (default: print)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap, from 0 (default: %(default)s)")
    parser.add_argument(
        "--resamples",
        type=int,
        default=10_000,
        help=f"of the bootstrap, {LEAST_RESAMPLES} to {MOST_RESAMPLES} (default: %(default)s)",
    )
    parser.set_defaults(run=run_compare)


def run_compare(arguments: argparse.Namespace) -> None:
    """Read, compare, render, then print or write."""
    if arguments.seed < 0:
        raise UserError(f"--seed is {arguments.seed}; it must be a whole number from 0")
    if not LEAST_RESAMPLES <= arguments.resamples <= MOST_RESAMPLES:
        raise UserError(
            f"--resamples is {arguments.resamples}; it must be a whole number from {LEAST_RESAMPLES} to "
            f"{MOST_RESAMPLES}"
        )
    runs = [read_results(path) for path in (arguments.A, arguments.B)]
    if arguments.output:
        predictions = [predictions_path(run, task) for run in runs for task in run.tasks]
        _check_output(arguments.output, [*(run.path for run in runs), *predictions])
    comparison = compare(*runs, seed=arguments.seed, resamples=arguments.resamples)
    style = arguments.format or _format_of(arguments.output, COMPARE_SUFFIXES)
    text = render_compare.RENDERERS[style](comparison)
    _hand_out(text, arguments.output, comparison.notes if style == "csv" else ())


def _hand_out(text: str, output: str | None, notes: Sequence[str]) -> None:
    """Print ``text`` or write it to a file, and ``notes`` to stderr: CSV has no place for them."""
    if output:
        write_text(output, text)
    else:
        print(text, end="")
    if notes:
        # A warning that rows are not comparable must not be lost.
        print("\n".join(notes), file=sys.stderr)


def _format_of(output: str | None, suffixes: dict[str, str]) -> str:
    """The format that a file's suffix asks for; markdown for any other suffix and for the terminal."""
    return suffixes.get(Path(output or "").suffix.lower(), "markdown")


def _check_output(output: str, inputs: list[Path]) -> None:
    if Path(output).is_dir():
        raise UserError(f"--output {output} is a folder; name a file in it")
    if Path(output).resolve() in {path.resolve() for path in inputs}:
        raise UserError(f"--output {output} is one of the files to read and would be lost; name another file")


def main(arguments: list[str] | None = None) -> None:
    """Run one subcommand; a user's mistake ends in one sentence and exit code 2."""
    with user_errors_to_exit_code():
        parsed = make_parser().parse_args(arguments)
        parsed.run(parsed)


if __name__ == "__main__":
    main()
