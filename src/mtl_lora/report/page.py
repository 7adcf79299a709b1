"""One HTML file of a study or a run that needs nothing beside it: tables, figures, settings, commands, hashes."""

import base64
import json
from pathlib import Path

from mtl_lora.errors import UserError
from mtl_lora.files import write_all
from mtl_lora.report.figures import draw
from mtl_lora.report.load import RunFolder, load_run
from mtl_lora.report.study_model import Study
from mtl_lora.report.table import NOTHING, TextTable, details, percent, study_tables

FILE_NAME = "page.html"
_HASH = 12  # characters shown of a sha256 or commit in a table
_LONG = 120  # characters from which a setting is folded away


def write_page(run: str, output: str | None = None) -> Path:
    """Write the page of a study, a training or an evaluation; returns its path.

    Raises ``UserError`` for a folder that holds none of them, and where a package is missing.
    """
    loaded = load_run(run)
    path = Path(output) if output else (Path(run) if Path(run).is_dir() else Path(run).parent) / FILE_NAME
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {path} must be the path of an .html file")
    write_all({path: page(loaded).encode("utf-8")})
    return path


def page(run: Study | RunFolder) -> str:
    """The page as text. Everything that a run holds is escaped."""
    try:
        import jinja2
    except ImportError:
        raise UserError("pages need jinja2, which is not installed; run pip install 'mtl-lora[report]'") from None
    study = run if isinstance(run, Study) else run.study()
    about = _about_study(run) if isinstance(run, Study) else _about_run(run)
    drawings = [
        (drawing, "data:image/svg+xml;base64," + base64.b64encode(drawing.render("svg")).decode())
        for drawing in draw(study)
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(FILE_NAME).render(study=study, drawings=drawings, long=_LONG, **about)


def _about_study(study: Study) -> dict:
    """Tables, settings, commands and provenance of a study."""
    test: dict[str, dict] = {}
    for run in study.runs:
        for task, digest in run.test_data_sha256.items():
            test.setdefault(task, {})[digest] = None
    train = dict.fromkeys(job.train_data_sha256 for job in study.jobs)
    return {
        "tables": [*study_tables(study), _runs(study)],
        "settings": _facts({"base model": study.base_model, "grid": study.grid}),
        "commands": {
            experiment.name + ("" if run.seed is None else f", seed {run.seed}"): run.commands
            for experiment in study.experiments
            for run in experiment.runs
            if run.commands
        },
        "provenance": _facts(
            {
                "commit": [*dict.fromkeys(study.commits or [study.commit])],
                "training commit": [*dict.fromkeys(job.train_commit for job in study.jobs)],
                "device": study.devices or study.device,
                "version of": study.versions,
                "grid sha256": study.grid_sha256,
                "training data sha256": [*train],
                "test data sha256": {task: [*digests] for task, digests in test.items()},
            }
        ),
    }


def _runs(study: Study) -> TextTable:
    """Every run of a study: its seed, steps, time, average and hashes."""
    header = ["Experiment", "Seed", "Steps", "Training, min", "Evaluation, min", "Average"]
    header += ["Adapter sha256", "Training data sha256", "Training commit", "Evaluation commit"]
    rows = []
    for experiment in study.experiments:
        for run in experiment.runs:
            minutes = [
                None if (s := run.seconds.get(step)) is None else f"{s / 60:.1f}" for step in ("train", "evaluate")
            ]
            average = None if run.average is None else percent(run.average)
            hashes = (run.adapter_sha256, run.train_data_sha256, run.train_commit, run.commit)
            values = [run.seed, run.steps, *minutes, average, *(digest and digest[:_HASH] for digest in hashes)]
            rows.append([experiment.name, *(NOTHING if value is None else str(value) for value in values)])
    return TextTable("Runs", header, rows)


def _about_run(run: RunFolder) -> dict:
    """The same of a single training, evaluation or both."""
    results, origin = run.results, run.adapter.get("origin") or {}
    command = results.command if results else None
    return {
        "tables": [details(results)] if results else [],
        "settings": _facts(
            {
                **({key: getattr(results, key) for key in ("base_model", "method", "mode")} if results else {}),
                "evaluation": results.settings if results else None,
                "training": run.training.get("settings"),
            }
        ),
        "commands": {"evaluation": [f"python {command}"]} if command else {},
        "provenance": _facts(
            {
                "commit": results and results.commit,
                "training commit": origin.get("commit"),
                "device": results and results.device,
                "version of": results and results.versions,
                "adapter sha256": run.adapter.get("weights_sha256"),
                "base model fingerprint": origin.get("base_fingerprint"),
                "training data sha256": run.training.get("data_sha256"),
                "test data sha256": results and results.data,
            }
        ),
    }


def _facts(values: dict) -> dict[str, str]:
    """Names and values in words, of those that are known; a nested object's keys behind its own."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= {f"{name} {key}": text for key, text in _facts(value).items()}
        elif isinstance(value, list) and all(isinstance(entry, str | int | float | None) for entry in value):
            found[name] = ", ".join(str(entry) for entry in value if entry is not None)
        elif value is not None:
            found[name] = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
    return {name.replace("_", " "): text for name, text in found.items() if text}
