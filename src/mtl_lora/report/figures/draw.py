"""All pictures that a study or a run has the numbers for, and writing them to files."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mtl_lora.errors import UserError
from mtl_lora.files import write_all
from mtl_lora.report.figures.accuracy import accuracy
from mtl_lora.report.figures.mixture import mixture
from mtl_lora.report.figures.picture import FORMATS, Picture, require_matplotlib, slug, with_different_names
from mtl_lora.report.figures.similarity import similarity
from mtl_lora.report.figures.training_loss import training_loss
from mtl_lora.report.figures.transfer import transfer
from mtl_lora.report.read_folder import read_all
from mtl_lora.report.study import Study

# In the order of a page.
KINDS = (accuracy, transfer, training_loss, mixture, similarity)


def pictures(study: Study) -> list[Picture]:
    """What can be drawn of a study, each under a name of its own."""
    return list(with_different_names([picture for kind in KINDS for picture in kind(study)]))


def pictures_of_all(runs: Sequence[str]) -> list[Picture]:
    """What can be drawn of several folders; with more than one study, names begin with the study's.

    Raises ``UserError`` if that is nothing.
    """
    studies = read_all(runs)
    drawn = []
    for study in studies:
        prefix = f"{slug(study.name)}_" if len(studies) > 1 else ""
        drawn += [dataclasses.replace(picture, name=f"{prefix}{picture.name}") for picture in pictures(study)]
    if not drawn:
        raise UserError(f"there is nothing to draw in {', '.join(map(str, runs))}")
    return list(with_different_names(drawn))


def write_figures(runs: Sequence[str], output: str | None, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Draw everything the folders hold numbers for into ``output`` (default: ``figures`` in the one folder).

    Raises ``UserError`` if there is nothing to draw, or several folders and no ``output``.
    """
    require_matplotlib()
    if output is None and len(runs) > 1:
        raise UserError("several runs are drawn together; pass --output DIR for their pictures")
    folder = Path(output) if output else _own_folder(runs[0]) / "figures"
    found = pictures_of_all(runs)
    contents = {folder / f"{picture.name}.{style}": picture.render(style) for picture in found for style in formats}
    write_all(contents)
    return list(contents)


def _own_folder(run: str) -> Path:
    return Path(run) if Path(run).is_dir() else Path(run).parent
