"""What reports read besides results and studies: training logs, adapter analyses, folders of runs, predictions."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mtl_lora import artifacts
from mtl_lora.errors import UserError
from mtl_lora.report.study_model import Estimate, Experiment, Job, Run, Study, Summary
from mtl_lora.results import Results, TaskNames
from mtl_lora.typed_json import UNWRITTEN, Fraction, Index, Reader, Text, read_object

Losses = dict[str, dict[int, float]]  # by task, "" for all of them, and by step, in order of steps
Matrix = list[list[float | None]]
# Key of the analysis -> what is compared, in words.
SIMILARITIES = {"lambda_similarity": "Λₜ", "lambda_minus_identity_similarity": "Λₜ − I"}
SIMILARITIES |= {"update_similarity": "update s Bₜ Aₜ"}


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What an adapter does for each task: see ``mtl_lora.adapter.analysis``, which writes it.

    mixture: by layer, (T, n). Similarities (T, T): cosines of Lambda_t, of Lambda_t - I, of the updates, and of
    these by adapted module; None where the method is the same for every task, and an entry where it is undefined.
    """

    method: Text
    tasks: list[str]
    layers: list[str]
    mixture: dict[str, Matrix] = dataclasses.field(default_factory=dict)
    lambda_similarity: Matrix | None = None
    lambda_minus_identity_similarity: Matrix | None = None
    update_similarity: Matrix | None = None
    update_similarity_by_module: dict[str, Matrix] = dataclasses.field(default_factory=dict)

    @property
    def similarities(self) -> dict[str, Matrix]:
        """What is compared, in words, to its matrix."""
        return {words: matrix for key, words in SIMILARITIES.items() if (matrix := getattr(self, key))}


def read_log(path: Path) -> Losses:
    """The losses of a training log; raises ``UserError`` naming file and line."""
    losses: Losses = {"": {}}
    for number, line in enumerate(_lines(path), start=1):
        try:
            entry = json.loads(line)
            step = int(entry["step"])
            for key in entry:
                if key == "loss" or key.startswith("loss/"):
                    losses.setdefault(key.removeprefix("loss").removeprefix("/"), {})[step] = float(entry[key])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}, line {number} is not a log line of a training; delete the line") from None
    return {task: dict(sorted(curve.items())) for task, curve in losses.items()}


def read_analysis(path: Path) -> Analysis:
    """The analysis of an adapter; raises ``UserError`` naming file and key."""
    value, reader = read_object(path, "the adapter's analysis"), Reader(str(path))
    if value.get("kind") != "adapter_analysis" or value.get("schema") != 1:
        raise UserError(f"{path} is not an analysis of schema 1; write it with python -m mtl_lora.adapter.analysis")
    analysis = reader.read(Analysis, value)
    T = len(analysis.tasks)
    parts = ("mixture", "update_similarity_by_module")
    matrices = {f"{part}.{key}": matrix for part in parts for key, matrix in getattr(analysis, part).items()}
    for key, matrix in (matrices | {key: getattr(analysis, key) for key in SIMILARITIES}).items():
        if matrix is not None:
            width = len(matrix[0]) if matrix and key.startswith("mixture.") else T
            if [len(row) for row in matrix] != [width] * T:
                raise reader.wrong(key, matrix, f"{T} rows of equally many numbers, {T} for a similarity")
    return analysis


def log_of(study: Study, run: Run) -> Losses | None:
    """The training log of a run; of tasks that were trained alone, that of all its parts."""
    logs = [read_log(_file(study, job, "log")) for job in run.jobs if job.log]
    # The loss over all tasks is that of no part.
    several = {"": {}} if len(logs) > 1 else {}
    return {task: curve for log in logs for task, curve in log.items()} | several if logs else None


def analysis_of(study: Study, run: Run) -> Analysis | None:
    """The analysis of a run's adapter."""
    return read_analysis(_file(study, run, "analysis")) if run.analysis else None


def _file(study: Study, job: Job, key: str) -> Path:
    path = study.path.parent / getattr(job, key)
    if not path.is_file():
        reason = f"{key} of the run {job.folder} names {getattr(job, key)}, which is not there"
        raise UserError(f"{study.path}: {reason}; collect the study again")
    return path


def _lines(path: Path) -> list[str]:
    """The lines of a file; only a newline ends one, for JSON may hold the other line separators of Unicode."""
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}); pass a whole output folder") from None
    return text.removesuffix("\n").split("\n") if text else []


def load_run(path: str | Path) -> Study:
    """A study; or the folder of one training, one evaluation or both, as a study of one experiment.

    Raises ``UserError`` for a folder that holds nothing of a run.
    """
    path = Path(path)
    if path.name == artifacts.STUDY or (path / artifacts.STUDY).is_file():
        return Study.load(path)
    folder = path.parent if path.name == artifacts.RESULTS else path
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; pass that of a study, a training or an evaluation")
    names = (artifacts.TRAIN_LOG, artifacts.ADAPTER_ANALYSIS, artifacts.RUN_CONFIG, artifacts.CHECKPOINT_CONFIG)
    log, analysis, *rest = ((folder / name).absolute() if (folder / name).is_file() else None for name in names)
    training, adapter = (read_object(file, "the configuration") if file else {} for file in rest)
    results = _own_results(folder, adapter)
    run = {"folder": str(folder), "log": log and str(log), "analysis": analysis and str(analysis)}
    adapts = read_analysis(analysis) if analysis else None
    if results:
        name, method, task_set, tasks = results.name, results.method, results.task_set, results.tasks
    elif log or analysis:
        # As the training was configured, else by the names in its analysis or log.
        known = adapts.tasks if adapts else [*filter(None, read_log(log))] or ["task"]
        listed = {"tasks": [{"name": name, "id": index} for index, name in enumerate(known)]}
        task_set = TaskNames.from_json(training.get("tasks") or listed, str(folder / artifacts.RUN_CONFIG))
        name, method, tasks = folder.absolute().name, adapts and adapts.method, {}
    else:
        names = (artifacts.STUDY, artifacts.RESULTS, artifacts.TRAIN_LOG, artifacts.ADAPTER_ANALYSIS)
        raise UserError(f"{folder} holds none of {', '.join(names)}")
    average = results and results.whole_average
    summary = Summary({task: Estimate(tasks[task].value) for task in tasks}, average and Estimate(average.value))
    facts = {"name": name, "method": method, "trainable": results and results.trainable, "summary": summary}
    experiment = Experiment(**facts, runs=[Run(**run, tasks=tasks)])
    evaluation = results.to_json() if results else {}
    facts = {"evaluation": evaluation, "training": training, "adapter": adapter or evaluation.get("adapter")}
    return Study(name=name, task_set=task_set, experiments=[experiment], path=folder, facts=facts)


def _own_results(folder: Path, adapter: dict) -> Results | None:
    """The results in a folder or in its evaluation's; None, with a line on stderr, for those of an earlier adapter."""
    beside = folder / artifacts.EVALUATION / artifacts.RESULTS
    if (folder / artifacts.RESULTS).is_file() or not beside.is_file():
        return Results.load(folder) if (folder / artifacts.RESULTS).is_file() else None
    results = Results.load(beside)
    if adapter and results.settings.get("adapter_sha256") not in (None, adapter.get("weights_sha256")):
        print(f"{beside} is of an earlier adapter of {folder} and left out; evaluate it again", file=sys.stderr)
        return None
    return results


def load_studies(paths: Sequence[str | Path]) -> list[Study]:
    """The studies among ``paths``, and all single runs as one, whose experiments they are.

    Raises ``UserError`` for a folder that holds nothing, and for single runs whose tasks differ.
    """
    found = [load_run(path) for path in paths]
    single, experiments = [study for study in found if study.facts], []
    names = [study.name for study in single]
    for study in single:
        if set(study.task_set.names) != set(single[0].task_set.names):
            raise UserError(
                f"{study.path} is about the tasks {', '.join(study.task_set.names)} and {single[0].path} about "
                f"{', '.join(single[0].task_set.names)}; figures side by side need one set of tasks"
            )
        name = f"{study.name} ({study.path})" if names.count(study.name) > 1 else study.name
        experiments.append(dataclasses.replace(study.experiments[0], name=name))
    side_by_side = [dataclasses.replace(study, experiments=experiments) for study in single[:1]]
    return [study for study in found if not study.facts] + side_by_side


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One answered question: the right answer, whether it was given, its F1 (a fraction) if it has one.

    place: ``FILE, line N``, for errors.
    """

    task: str
    index: Index
    answer: str
    correct: bool
    prompt_sha256: str
    f1: Fraction | None = None
    place: str = dataclasses.field(default="", compare=False, metadata=UNWRITTEN)


def predictions_path(results: Results, task: str) -> Path:
    """Where the predictions of one task lie."""
    return results.path.parent / artifacts.PREDICTIONS / f"{task}.jsonl"


def read_predictions(results: Results, task: str) -> dict[int, Prediction]:
    """Predictions by index of the question, for every question of ``task`` that ``results`` counts.

    Raises ``UserError`` naming the file and line for a missing or unreadable file, a torn line, a record without its
    keys, a question answered twice, and predictions that are not those that the results file counts.
    """
    path, score, found = predictions_path(results, task), results.tasks[task], {}
    if score.metric not in ("accuracy", "exact_match"):
        raise UserError(
            f"{results.path}: the metric of {task} is {score.metric}; questions are compared by accuracy or exact_match"
        )
    for number, line in enumerate(_lines(path), 1):
        reader = Reader(f"{path}, line {number}")
        try:
            record = reader.read(dict, json.loads(line))
        except (ValueError, RecursionError):  # a UserError is one of the former
            raise reader.wrong("the line", line, "a whole JSON object; evaluate again with --overwrite") from None
        prediction = Prediction(**reader.fields(Prediction, record), place=reader.source)
        if prediction.task != task:
            raise reader.wrong("task", prediction.task, f"{task}, whose predictions this file holds")
        if prediction.index in found:
            earlier = found[prediction.index].place
            raise UserError(f"{reader.source} answers question {prediction.index} a second time, after {earlier}")
        found[prediction.index] = prediction
    limit = results.settings.get("limit")
    if type(limit) is int and limit > 0:
        # A folder keeps what an earlier evaluation with a larger limit answered; the results file does not count it.
        found = {index: prediction for index, prediction in found.items() if index < limit}
    right, counted = sum(prediction.correct for prediction in found.values()), round(score.value * score.n)
    if (len(found), right) != (score.n, counted):
        raise UserError(
            f"{path} has {right:,} of {len(found):,} questions right where {results.path} counts {counted:,} of "
            f"{score.n:,}; evaluate again with --overwrite"
        )
    return found
