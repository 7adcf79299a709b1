"""One HTML file of a study or a run that needs nothing beside it: tables, figures, settings, commands, hashes."""

import base64
import json
from pathlib import Path

from mtl_lora.errors import UserError
from mtl_lora.files import write_all
from mtl_lora.report.figures import draw
from mtl_lora.report.load import Study, load_run
from mtl_lora.report.table import details, study_tables
from mtl_lora.results import object_of

FILE_NAME = "page.html"


def write_page(run: str, output: str | None = None) -> Path:
    """Write the page of a study, a training or an evaluation; returns its path. Everything it shows is escaped.

    Raises ``UserError`` for a folder that holds none of them.
    """
    study = load_run(run)
    path = Path(output) if output else (Path(run) if Path(run).is_dir() else Path(run).parent) / FILE_NAME
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {path} must be the path of an .html file")
    import jinja2

    tables = study_tables(study)
    if study.facts:
        tables = [details(study.name, study.task_set, study.runs[0].tasks)] if study.scored else []
    sources = ((each, base64.b64encode(each.render("svg")).decode()) for each in draw(study))
    drawings = [(drawing, f"data:image/svg+xml;base64,{source}") for drawing, source in sources]
    facts = {name: words for name, values in (study.facts or _facts(study)).items() if (words := _in_words(values))}
    loader, rules = jinja2.FileSystemLoader(Path(__file__).parent), {"trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, **rules)
    text = environment.get_template(FILE_NAME).render(study=study, tables=tables, drawings=drawings, facts=facts)
    write_all({path: text.encode("utf-8")})
    return path


def _facts(study: Study) -> dict[str, dict]:
    """By section: what the study was made from, then every run without its scores."""
    shown = ("name", "about", "notes", "experiments", "transfer", "search", "task_set")
    facts = {"study": {key: value for key, value in object_of(study).items() if key not in shown}}
    for experiment, run in ((each, run) for each in study.experiments for run in each.runs):
        name = experiment.name if run.seed is None else f"{experiment.name}, seed {run.seed}"
        facts[name] = {key: value for key, value in object_of(run).items() if key not in ("tasks", "seed")}
    return facts


def _in_words(value: object, name: str = "") -> dict[str, str]:
    """Facts by name, of those that are known; a nested object's keys stand behind its own."""
    if isinstance(value, dict):
        return {key: text for part, entry in value.items() for key, text in _in_words(entry, f"{name} {part}").items()}
    if isinstance(value, list):
        known = (entry for entry in value if entry is not None)
        value = "\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in known)
    return {} if value in (None, "") else {name.strip().replace("_", " "): str(value)}
