"""What a page says besides its tables and pictures: settings, commands, and where everything comes from."""

import dataclasses
import json

from mtl_lora.report.read_folder import is_study
from mtl_lora.report.study import Study

_LONG = 120  # characters from which a value is folded away


@dataclasses.dataclass(frozen=True)
class Fact:
    """A name and its value in words; a long one is shown when asked for."""

    name: str
    text: str

    @property
    def long(self) -> bool:
        return len(self.text) > _LONG or "\n" in self.text


@dataclasses.dataclass(frozen=True)
class Commands:
    """The commands of one run under its name."""

    name: str
    lines: tuple[str, ...]


def settings(study: Study) -> list[Fact]:
    """What was asked for: a study's grid, or the settings of one training and evaluation."""
    facts = study.facts
    if is_study(study):
        found = {"base model": facts.get("base_model"), "tasks": _tasks(study), "grid": facts.get("grid")}
    else:
        training = facts.get("training") or {}
        found = {key: facts.get(key) for key in ("base_model", "method", "mode")}
        found |= {"tasks": _tasks(study)}
        found |= {f"evaluation: {key}": value for key, value in (facts.get("settings") or {}).items()}
        found |= {f"training: {key}": value for key, value in (training.get("settings") or {}).items()}
    return as_facts(found)


def commands(study: Study) -> list[Commands]:
    """What to type to have it again."""
    if not is_study(study):
        command = study.facts.get("command")
        return [Commands("evaluation", (f"python {command}",))] if command else []
    found = []
    for experiment in study.experiments:
        for run in experiment.runs:
            name = experiment.name if run.seed is None else f"{experiment.name}, seed {run.seed}"
            lines = tuple(map(str, run.facts.get("commands") or ()))
            if lines:
                found.append(Commands(name, lines))
    return found


def provenance(study: Study) -> list[Fact]:
    """Commit, versions, device and hashes."""
    facts = study.facts
    adapter = facts.get("adapter") if isinstance(facts.get("adapter"), dict) else {}
    origin, training = adapter.get("origin") or {}, facts.get("training") or {}
    found = {
        "commit": facts.get("commit"),
        "training commit": origin.get("commit"),
        "device": facts.get("device"),
        **{f"version of {name}": version for name, version in (facts.get("versions") or {}).items()},
        "grid sha256": facts.get("grid_sha256"),
        "adapter sha256": adapter.get("weights_sha256"),
        "base model fingerprint": origin.get("base_fingerprint"),
        "training data sha256": training.get("data_sha256") or _train_data(study),
        **{f"test data sha256, {task}": digest for task, digest in _test_data(study).items()},
    }
    return as_facts(found)


def as_facts(found: dict) -> list[Fact]:
    """What is known of it, in words."""
    return [Fact(name.replace("_", " "), _words(value)) for name, value in found.items() if value is not None]


def _words(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(entry, str | int | float) for entry in value):
        return ", ".join(map(str, value))
    return json.dumps(value, indent=2, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _tasks(study: Study) -> str:
    options = {task.name: "/".join(task.options) or "free text" for task in study.tasks}
    return "; ".join(f"{name} ({allowed})" for name, allowed in options.items())


def _train_data(study: Study) -> str | None:
    hashes = [run.facts.get("train_data_sha256") for experiment in study.experiments for run in experiment.runs]
    return ", ".join(dict.fromkeys(filter(None, hashes))) or None


def _test_data(study: Study) -> dict:
    """By task: of the evaluation, or of all runs of a study, several where they differ."""
    if not is_study(study):
        return study.facts.get("data") or {}
    found: dict[str, dict] = {}
    for experiment in study.experiments:
        for run in experiment.runs:
            for task, digest in (run.facts.get("test_data_sha256") or {}).items():
                found.setdefault(task, {})[digest] = None
    return {task: ", ".join(map(str, digests)) for task, digests in found.items()}
