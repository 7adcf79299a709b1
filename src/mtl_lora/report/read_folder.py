"""From what a command line names to what can be shown: a study's folder, or folders of trainings and evaluations."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from mtl_lora.errors import UserError
from mtl_lora.files import read_json
from mtl_lora.language.tasks import Task, TaskSet
from mtl_lora.report.read_study import FILE_NAME as STUDY_NAME
from mtl_lora.report.read_study import read_study
from mtl_lora.report.results import FILE_NAME as RESULTS_NAME
from mtl_lora.report.results import Results, Score, mean_score, read_results
from mtl_lora.report.study import OVER_QUESTIONS, Experiment, Run, Scores, Study, Value
from mtl_lora.report.training_records import ANALYSIS_NAME, LOG_NAME, Analysis, Log, read_analysis, read_log

RUN_NAME = "run.json"  # what a training was told
CHECKPOINT_NAME = "mtl_lora_config.json"  # what a training made
EVALUATION = "evaluation"  # the folder in a checkpoint in which its evaluation stands by default


def read_all(paths: Sequence[str | Path]) -> list[Study]:
    """The studies among ``paths``, and all other folders as one; raises ``UserError`` for one that holds nothing."""
    studies = [read_one(path) for path in paths]
    single = [study for study in studies if not is_study(study)]
    return [study for study in studies if is_study(study)] + ([side_by_side(single)] if single else [])


def read_one(path: str | Path) -> Study:
    """A study, or one training or evaluation as a study of one experiment."""
    path = Path(path)
    if path.name == STUDY_NAME or (path / STUDY_NAME).is_file():
        return read_study(path if path.name == STUDY_NAME else path / STUDY_NAME)
    folder = path.parent if path.name == RESULTS_NAME else path
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; pass that of a study, a training or an evaluation")
    return _single(folder)


def is_study(study: Study) -> bool:
    """Whether it was read from a ``study.json``."""
    return study.path.name == STUDY_NAME


def side_by_side(studies: Sequence[Study]) -> Study:
    """Single trainings and evaluations as one study; raises ``UserError`` if their tasks differ."""
    first = studies[0]
    for other in studies[1:]:
        if set(other.tasks.names) != set(first.tasks.names):
            raise UserError(
                f"{other.path} is about the tasks {', '.join(other.tasks.names)} and {first.path} about "
                f"{', '.join(first.tasks.names)}; figures side by side need one set of tasks"
            )
    names = [study.name for study in studies]
    experiments = [
        _renamed(study.experiments[0], f"{study.name} ({study.path})" if names.count(study.name) > 1 else study.name)
        for study in studies
    ]
    majority = {task: value for study in reversed(studies) for task, value in study.majority.items()}
    return dataclasses.replace(first, experiments=tuple(experiments), majority=majority)


def _renamed(experiment: Experiment, name: str) -> Experiment:
    return dataclasses.replace(experiment, name=name, scores=dataclasses.replace(experiment.scores, label=name))


def _single(folder: Path) -> Study:
    places = [path for path in (folder / RESULTS_NAME, folder / EVALUATION / RESULTS_NAME) if path.is_file()]
    results = read_results(places[0]) if places else None
    if results and results.path.parent.name == EVALUATION and not _of_this_adapter(results, folder):
        print(f"{results.path} is of an earlier adapter of {folder} and left out; evaluate it again", file=sys.stderr)
        results = None
    log = read_log(folder / LOG_NAME) if (folder / LOG_NAME).is_file() else None
    analysis = read_analysis(folder / ANALYSIS_NAME) if (folder / ANALYSIS_NAME).is_file() else None
    if results is None and log is None and analysis is None:
        raise UserError(f"{folder} holds none of {STUDY_NAME}, {RESULTS_NAME}, {LOG_NAME} and {ANALYSIS_NAME}")
    facts = read_json(results.path, "the results file") if results else {}
    if (folder / RUN_NAME).is_file():
        facts = {**facts, "training": _object(folder / RUN_NAME, "what the run was told,")}
    if (folder / CHECKPOINT_NAME).is_file():
        facts = {"adapter": _object(folder / CHECKPOINT_NAME, "the checkpoint configuration"), **facts}
    name = results.name if results else folder.absolute().name
    method = results.method if results else analysis.method if analysis else None
    experiment = Experiment(
        name=name,
        method=method,
        group="main",
        scores=_scores(name, results),
        runs=(Run(None, log, analysis, facts),),
        trainable=results.trainable if results else None,
    )
    majority = {task: score.majority for task, score in results.tasks.items()} if results else {}
    return Study(
        path=folder,
        name=name,
        tasks=results.task_set if results else _tasks(facts, log, analysis),
        experiments=(experiment,),
        majority={task: value for task, value in majority.items() if value is not None},
        facts=facts,
    )


def _of_this_adapter(results: Results, folder: Path) -> bool:
    """Whether an evaluation in a checkpoint's folder is of the weights that lie there now."""
    if not (folder / CHECKPOINT_NAME).is_file():
        return True
    weights = _object(folder / CHECKPOINT_NAME, "the checkpoint configuration").get("weights_sha256")
    return results.settings.get("adapter_sha256") in (None, weights)


def _object(path: Path, what: str) -> dict:
    value = read_json(path, what)
    if not isinstance(value, dict):
        raise UserError(f"{what} {path} is no JSON object")
    return value


def _scores(name: str, results: Results | None) -> Scores:
    if results is None:
        return Scores(name, "main", {}, None)
    average = None if results.missing else results.average or mean_score(list(results.tasks.values()))
    tasks = {task: _value(score) for task, score in results.tasks.items()}
    return Scores(name, "main", tasks, average and _value(average))


def _value(score: Score) -> Value:
    if score.stderr is None:
        return Value(score.accuracy)
    low, high = score.accuracy - score.stderr, score.accuracy + score.stderr
    return Value(score.accuracy, low, high, None, OVER_QUESTIONS)


def _tasks(facts: dict, log: Log | None, analysis: Analysis | None) -> TaskSet:
    """The tasks of a training: as it was told, else by the names in its analysis or log."""
    if "training" in facts:
        return TaskSet.from_json(facts["training"].get("tasks"), RUN_NAME)
    names = analysis.tasks if analysis else [name for name in log.losses if name]
    return TaskSet(tuple(Task(name, index) for index, name in enumerate(names or ["task"])))
