"""Putting a page together: one HTML file that needs nothing beside it."""

import importlib.util
from pathlib import Path

from mtl_lora.errors import UserError
from mtl_lora.files import write_all
from mtl_lora.report.figures.draw import pictures
from mtl_lora.report.figures.picture import Picture, require_matplotlib
from mtl_lora.report.page import facts
from mtl_lora.report.page.inline_svg import inline_svg
from mtl_lora.report.page.more_tables import loss_tables, run_tables, search_tables, task_tables
from mtl_lora.report.page.tables import PageTable, difference_tables, result_tables
from mtl_lora.report.read_folder import is_study, read_one
from mtl_lora.report.study import Study

FILE_NAME = "page.html"
_PARTS = Path(__file__).parent


def write_page(run: str, output: str | None = None) -> Path:
    """Write the page of a study, a training or an evaluation; returns its path.

    Raises ``UserError`` for a folder that holds none of them, and where a package is missing.
    """
    require_matplotlib()
    if importlib.util.find_spec("jinja2") is None:
        raise UserError("pages need jinja2, which is not installed; run pip install 'mtl-lora[report]'")
    study = read_one(run)
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    path = Path(output) if output else folder / FILE_NAME
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {path} must be the path of an .html file")
    write_all({path: page(study).encode("utf-8")})
    return path


def page(study: Study) -> str:
    """The page as text. Everything from the study is escaped; styles, script and pictures are the package's own."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PARTS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    drawn = pictures(study)
    return environment.get_template("page.html").render(
        study=study,
        tables=tables(study),
        behind=tables_behind(study),
        pictures=[(picture, Markup(_inline(picture))) for picture in drawn],  # noqa: S704 - made by matplotlib
        settings=facts.settings(study),
        commands=facts.commands(study),
        provenance=facts.provenance(study),
        style=Markup((_PARTS / "page.css").read_text(encoding="utf-8")),  # noqa: S704 - the package's own
        script=Markup((_PARTS / "page.js").read_text(encoding="utf-8")),  # noqa: S704 - the package's own
    )


def tables(study: Study) -> list[PageTable]:
    """What the page opens with."""
    if is_study(study):
        return [*result_tables(study), *difference_tables(study)]
    return [*task_tables(study), *loss_tables(study)]


def tables_behind(study: Study) -> list[PageTable]:
    """What stands behind a study's figures."""
    return [*search_tables(study), *run_tables(study)] if is_study(study) else []


def _inline(picture: Picture) -> str:
    return inline_svg(picture.render("svg").decode("utf-8"), f"picture-{picture.name}", picture.title, picture.caption)
