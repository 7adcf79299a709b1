"""The commands that draw: ``figures`` and ``page``."""

import argparse

from mtl_lora.errors import UserError

_RUN = "a training's output folder, an evaluation's, or a study's"


def add_figures(commands) -> None:
    """``figures``: pictures of runs and studies."""
    about = "Pictures of whatever the folders hold numbers for; prints the paths written."
    parser = commands.add_parser("figures", help=about, description=about, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"{_RUN}; single runs are drawn side by side")
    parser.add_argument("--output", metavar="DIR", help="folder of the pictures (default: figures in the one RUN)")
    parser.add_argument("--format", default="svg,png", help="svg, png, or both with a comma (default: %(default)s)")
    parser.set_defaults(run=run_figures)


def run_figures(arguments: argparse.Namespace) -> None:
    """Draw, then name the files."""
    from mtl_lora.report.figures.draw import write_figures
    from mtl_lora.report.figures.picture import FORMATS

    formats = list(dict.fromkeys(name.strip().lower() for name in arguments.format.split(",")))
    if not set(formats) <= set(FORMATS):
        raise UserError(f"--format is {arguments.format!r}; it must be {' or '.join(FORMATS)}, or both with a comma")
    print("\n".join(map(str, write_figures(arguments.runs, arguments.output, formats))))


def add_page(commands) -> None:
    """``page``: one HTML file with everything."""
    about = "One HTML file, complete in itself: tables, pictures, notes, commands and where everything comes from."
    parser = commands.add_parser("page", help=about, description=about, allow_abbrev=False)
    parser.add_argument("run_folder", metavar="RUN", help=_RUN)
    parser.add_argument("--output", metavar="FILE", help="default: page.html in RUN")
    parser.set_defaults(run=run_page)


def run_page(arguments: argparse.Namespace) -> None:
    """Write, then name the file."""
    from mtl_lora.report.page.write import write_page

    print(write_page(arguments.run_folder, arguments.output))
