"""What reports read besides results and studies: training logs, adapter analyses, folders of runs, predictions."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mtl_lora import artifacts
from mtl_lora.errors import UserError
from mtl_lora.report.study_model import Estimate, Experiment, Job, Run, Study, Summary
from mtl_lora.results import Results, TaskNames
from mtl_lora.typed_json import UNWRITTEN, Fraction, Index, Reader, Text, read_object

Matrix = list[list[float | None]]
# Key of the analysis -> what is compared, in words.
SIMILARITIES = {
    "lambda_similarity": "Λₜ",
    "lambda_minus_identity_similarity": "Λₜ − I",
    "update_similarity": "update s Bₜ Aₜ",
}


# ---- what a training leaves ----


@dataclasses.dataclass(frozen=True)
class Log:
    """The training loss by step: ``losses[""]`` over all tasks, ``losses["cr"]`` of one; in order of steps."""

    losses: dict[str, dict[int, float]]


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
        found = {words: getattr(self, key) for key, words in SIMILARITIES.items()}
        return {words: matrix for words, matrix in found.items() if matrix}


def read_log(path: Path) -> Log:
    """The losses of a training log; raises ``UserError`` naming file and line."""
    losses: dict[str, dict[int, float]] = {"": {}}
    for number, line in enumerate(_lines(path, "the training log"), start=1):
        try:
            entry = json.loads(line)
            step = int(entry["step"])
            for key in entry:
                if key == "loss" or key.startswith("loss/"):
                    losses.setdefault(key.removeprefix("loss").removeprefix("/"), {})[step] = float(entry[key])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}, line {number} is not a log line of a training; delete the line") from None
    return Log({task: dict(sorted(curve.items())) for task, curve in losses.items()})


def read_analysis(path: Path) -> Analysis:
    """The analysis of an adapter; raises ``UserError`` naming file and key."""
    value = read_object(path, "the adapter's analysis")
    if value.get("kind") != "adapter_analysis" or value.get("schema") != 1:
        raise UserError(f"{path} is not an analysis of schema 1; write it with python -m mtl_lora.adapter.analysis")
    reader = Reader(str(path))
    analysis = reader.read(Analysis, value)
    T = len(analysis.tasks)
    square = {key: matrix for key in SIMILARITIES if (matrix := getattr(analysis, key)) is not None}
    square |= {f"update_similarity_by_module.{name}": m for name, m in analysis.update_similarity_by_module.items()}
    for key, matrix in square.items():
        if [len(row) for row in matrix] != [T] * T:
            raise reader.wrong(key, matrix, f"{T} x {T}")
    for layer, matrix in analysis.mixture.items():
        if len(matrix) != T or len({len(row) for row in matrix}) != 1:
            raise reader.wrong(f"mixture.{layer}", matrix, f"{T} rows of equally many numbers")
    return analysis


def _lines(path: Path, what: str) -> list[str]:
    """The lines of a file; only a newline ends one, for JSON may hold the other line separators of Unicode."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror}); pass a whole output folder") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text: {error}") from None
    return text.removesuffix("\n").split("\n") if text else []


def log_of(study: Study, run: Run) -> Log | None:
    """The training log of a run; of tasks that were trained alone, that of all its parts."""
    logs = [read_log(_file(study, job, "log")) for job in run.jobs if job.log]
    if len(logs) < 2:
        return logs[0] if logs else None
    # The loss over all tasks is that of no part.
    return Log({task: curve for log in logs for task, curve in log.losses.items()} | {"": {}})


def analysis_of(study: Study, run: Run) -> Analysis | None:
    """The analysis of a run's adapter."""
    return read_analysis(_file(study, run, "analysis")) if run.analysis else None


def _file(study: Study, job: Job, key: str) -> Path:
    path = study.path.parent / getattr(job, key)
    if path.is_file():
        return path
    reason = f"{key} of the run {job.folder} names {getattr(job, key)}, which is not there"
    raise UserError(f"{study.path}: {reason}; collect the study again")


# ---- folders of single runs ----


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The folder of one training, one evaluation or both. log, analysis: files that are there.

    training: the run configuration (``run.json``); adapter: the checkpoint's configuration; empty where there is none.
    """

    path: Path
    results: Results | None
    log: Path | None
    analysis: Path | None
    training: dict
    adapter: dict

    @classmethod
    def load(cls, path: str | Path) -> "RunFolder":
        """Read a folder, or that of a results file; raises ``UserError`` for one that holds nothing of a run."""
        path = Path(path)
        path = path.parent if path.name == artifacts.RESULTS else path
        if not path.is_dir():
            raise UserError(f"there is no folder {path}; pass that of a study, a training or an evaluation")
        places = {"training": artifacts.RUN_CONFIG, "adapter": artifacts.CHECKPOINT_CONFIG}
        there = {key: path / name for key, name in places.items() if (path / name).is_file()}
        facts = {key: read_object(there[key], "the configuration") if key in there else {} for key in places}
        log, analysis = (path / name for name in (artifacts.TRAIN_LOG, artifacts.ADAPTER_ANALYSIS))
        log, analysis = log if log.is_file() else None, analysis if analysis.is_file() else None
        results = _own_results(path, facts["adapter"])
        if not (results or log or analysis):
            names = (artifacts.STUDY, artifacts.RESULTS, artifacts.TRAIN_LOG, artifacts.ADAPTER_ANALYSIS)
            raise UserError(f"{path} holds none of {', '.join(names)}")
        return cls(path, results, log, analysis, **facts)

    def study(self) -> Study:
        """The run as a study of one experiment."""
        results = self.results
        tasks = results.tasks if results else {}
        whole = results.whole_average if results else None
        name = results.name if results else self.path.absolute().name
        run = Run(
            folder=str(self.path),
            tasks=tasks,
            log=self.log and str(self.log.absolute()),
            analysis=self.analysis and str(self.analysis.absolute()),
        )
        experiment = Experiment(
            name=name,
            method=results.method if results else read_analysis(self.analysis).method if self.analysis else None,
            trainable=results.trainable if results else None,
            runs=[run],
            summary=Summary({task: Estimate(tasks[task].value) for task in tasks}, whole and Estimate(whole.value)),
        )
        task_set = results.task_set if results else self._task_set()
        return Study(name=name, task_set=task_set, experiments=[experiment], path=self.path)

    def _task_set(self) -> TaskNames:
        """The tasks of a training: as it was configured, else by the names in its analysis or log."""
        if self.training.get("tasks"):
            return TaskNames.from_json(self.training["tasks"], str(self.path / artifacts.RUN_CONFIG))
        names = read_analysis(self.analysis).tasks if self.analysis else [*filter(None, read_log(self.log).losses)]
        tasks = [{"name": name, "id": index} for index, name in enumerate(names or ["task"])]
        return TaskNames.from_json({"tasks": tasks}, str(self.path))


def _own_results(folder: Path, adapter: dict) -> Results | None:
    """The results in a folder or in its evaluation's; None, with a line on stderr, for those of an earlier adapter."""
    beside = folder / artifacts.EVALUATION / artifacts.RESULTS
    places = [path for path in (folder / artifacts.RESULTS, beside) if path.is_file()]
    results = Results.load(places[0]) if places else None
    digests = {results.settings.get("adapter_sha256"), adapter.get("weights_sha256")} - {None} if results else set()
    if results and results.path == beside and adapter and len(digests) > 1:
        print(f"{beside} is of an earlier adapter of {folder} and left out; evaluate it again", file=sys.stderr)
        return None
    return results


def load_studies(paths: Sequence[str | Path]) -> list[Study]:
    """The studies among ``paths``, and all other folders as one; raises ``UserError`` for one that holds nothing."""
    found = [load_run(path) for path in paths]
    single = [run.study() for run in found if isinstance(run, RunFolder)]
    return [run for run in found if isinstance(run, Study)] + ([_side_by_side(single)] if single else [])


def load_run(path: str | Path) -> Study | RunFolder:
    """A study, or the folder of one training or evaluation."""
    path = Path(path)
    is_study = path.name == artifacts.STUDY or (path / artifacts.STUDY).is_file()
    return Study.load(path) if is_study else RunFolder.load(path)


def _side_by_side(studies: Sequence[Study]) -> Study:
    """Single runs as one study; raises ``UserError`` if their tasks differ."""
    first, names = studies[0], [study.name for study in studies]
    experiments = []
    for study in studies:
        if set(study.task_set.names) != set(first.task_set.names):
            raise UserError(
                f"{study.path} is about the tasks {', '.join(study.task_set.names)} and {first.path} about "
                f"{', '.join(first.task_set.names)}; figures side by side need one set of tasks"
            )
        (experiment,) = study.experiments
        name = f"{study.name} ({study.path})" if names.count(study.name) > 1 else study.name
        experiments.append(dataclasses.replace(experiment, name=name))
    return dataclasses.replace(first, experiments=experiments)


# ---- predictions ----


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


def read_predictions(results: Results, tasks: Sequence[str] = ()) -> dict[str, dict[int, Prediction]]:
    """Predictions by task (default: all with a result) and index, for every question that ``results`` counts.

    Raises ``UserError`` naming the file and line for a missing or unreadable file, a torn line, a record without its
    keys, a question answered twice, and predictions that are not those that the results file counts.
    """
    return {task: _read_task(results, task) for task in tasks or results.tasks}


def _read_task(results: Results, task: str) -> dict[int, Prediction]:
    path = predictions_path(results, task)
    found: dict[int, Prediction] = {}
    for prediction in _predictions(path):
        place = prediction.place
        if prediction.task != task:
            raise UserError(f"{place} is a prediction of the task {prediction.task!r}; this file holds those of {task}")
        if prediction.index in found:
            earlier = found[prediction.index].place
            raise UserError(f"{place} answers question {prediction.index} a second time, after {earlier}; keep one")
        found[prediction.index] = prediction
    limit = results.settings.get("limit")
    if type(limit) is int and limit > 0:
        # A folder keeps what an earlier evaluation with a larger limit answered; the results file does not count it.
        found = {index: prediction for index, prediction in found.items() if index < limit}
    score = results.tasks[task]
    if score.metric != "accuracy":
        raise UserError(
            f"{results.path}: tasks.{task} has the metric {score.metric}; questions are compared by accuracy"
        )
    right, counted = sum(prediction.correct for prediction in found.values()), round(score.value * score.n)
    if (len(found), right) != (score.n, counted):
        raise UserError(
            f"{path} has {right:,} of {len(found):,} questions right where {results.path} counts {counted:,} of "
            f"{score.n:,}; evaluate again with --overwrite"
        )
    return found


def _predictions(path: Path) -> Iterator[Prediction]:
    for number, line in enumerate(_lines(path, "the predictions"), 1):
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        reader = Reader(place)
        if not isinstance(record, dict):
            raise reader.wrong("the line", line, "a whole JSON object; evaluate again with --overwrite")
        yield Prediction(**reader.fields(Prediction, record), place=place)
