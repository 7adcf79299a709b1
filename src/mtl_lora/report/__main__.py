"""The command line of reports: ``python -m mtl_lora.report table RESULTS...``."""

import argparse
import sys
from pathlib import Path

from mtl_lora.errors import OneSentenceParser, UserError, one_sentence
from mtl_lora.files import write_text
from mtl_lora.report.render import RENDERERS
from mtl_lora.report.results import FILE_NAME, read_results
from mtl_lora.report.table import build_table

SUFFIXES = {".md": "markdown", ".markdown": "markdown", ".csv": "csv", ".tex": "latex"}


def make_parser() -> argparse.ArgumentParser:
    """All subcommands; each sets ``run``, a function of the parsed arguments."""
    parser = OneSentenceParser(prog="python -m mtl_lora.report", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_table(commands)
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
    style = arguments.format or _format_of(arguments.output)
    text = RENDERERS[style](table)
    if arguments.output:
        write_text(arguments.output, text)
    else:
        print(text, end="")
    if style == "csv":
        # CSV has no place for notes, and a warning that rows are not comparable must not be lost.
        print("\n".join(table.notes), file=sys.stderr)


def _format_of(output: str | None) -> str:
    """The format that a file's suffix asks for; markdown for any other suffix and for the terminal."""
    return SUFFIXES.get(Path(output or "").suffix.lower(), "markdown")


def _check_output(output: str, inputs: list[Path]) -> None:
    if Path(output).is_dir():
        raise UserError(f"--output {output} is a folder; name a file in it")
    if Path(output).resolve() in {path.resolve() for path in inputs}:
        raise UserError(f"--output {output} is one of the RESULTS and would be lost; name another file")


def main(arguments: list[str] | None = None) -> None:
    """Run one subcommand; a user's mistake ends in one sentence and exit code 2."""
    with one_sentence():
        parsed = make_parser().parse_args(arguments)
        parsed.run(parsed)


if __name__ == "__main__":
    main()
