"""The predictions behind a results file: read from disk, and paired with the predictions of another evaluation."""

import contextlib
import dataclasses
import json
import reprlib
import statistics
from collections.abc import Iterator, Mapping, Sequence

from mtl_lora import files
from mtl_lora.errors import UserError, within
from mtl_lora.estimates import Difference, percentile_interval
from mtl_lora.metrics import METRICS, Mean, one_unit, title_of
from mtl_lora.results import Fraction, Index, Reader, Results, Score
from mtl_lora.text_table import shortened


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One answered question, read from a line of a predictions file.

    answer: the right answer. parsed: the given answer. Both are strings, or numbers in a regression. correct: whether
    ``parsed`` is right. f1: token F1 of free text. score: the score under a soft metric. cider, bleu4: the metric's
    inputs for one caption. counts: the metric's inputs for one map, whose ``answer`` is a hash of its labels.
    place: ``FILE, line N``, for error messages.
    """

    task: str
    index: Index
    answer: object
    prompt_sha256: str
    parsed: object = None
    correct: bool | None = None
    f1: Fraction | None = None
    score: Fraction | None = None
    cider: Score | None = None
    bleu4: list[float] | None = None
    counts: list[float] | None = None
    place: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Paired:
    """The answers of evaluations A and B to every question of one task, in order of the question index.

    rows: the per-question inputs of ``metric``, for A and for B; see ``Metric.rows``.
    """

    metric: str
    answers: list[tuple[Prediction, Prediction]]
    rows: tuple[Sequence, Sequence]

    @property
    def f1s(self) -> list[list[float]] | None:
        """The F1 of every answer of A and of B; None if any answer has none."""
        sides = [[answer.f1 for answer in side] for side in zip(*self.answers, strict=True)]
        return None if any(None in side for side in sides) else sides


def read_predictions(results: Results, task: str) -> dict[int, Prediction]:
    """The predictions of ``task`` that ``results`` counts, by question index.

    Raises ``UserError`` naming the file and line for a missing or unreadable file, a torn line, a line that lacks a
    key, a question answered twice, and predictions that do not add up to the value in the results file.
    """
    path, score, found = results.predictions_path(task), results.tasks[task], {}
    metric = METRICS.get(score.metric)
    if metric is None:
        raise UserError(
            f"{results.path}: {task} has the metric {score.metric}, which is not one of {', '.join(METRICS)}"
        )
    kind = float if metric.needs == "numbers" else str
    keys = {"correct": bool, "f1": Fraction, "parsed": kind, "score": Fraction, "cider": Score, "bleu4": list[float]}
    keys["counts"] = list[float]
    needed = {"answer": kind, metric.key: keys[metric.key]}
    for number, line in enumerate(files.read_lines(path), 1):
        reader = Reader(f"{path}, line {number}")
        try:
            record = reader.read(dict, json.loads(line))
        except (ValueError, RecursionError):  # a UserError is a ValueError
            raise reader.wrong("the line", line, "a whole JSON object; evaluate again with --overwrite") from None
        for key, expected in needed.items():
            reader.key(record, key, expected)
        prediction = Prediction(**reader.fields(Prediction, record), place=reader.source)
        if prediction.task != task:
            raise reader.wrong("task", prediction.task, f"{task}, whose predictions this file holds")
        if prediction.index in found:
            earlier = found[prediction.index].place
            raise UserError(f"{reader.source} answers question {prediction.index} a second time, after {earlier}")
        found[prediction.index] = prediction
    limit = results.settings.get("limit")
    if type(limit) is int and limit > 0:
        # The folder may still hold answers of an earlier evaluation with a larger limit, which are not counted here.
        found = {index: prediction for index, prediction in found.items() if index < limit}
    value = metric.value_of(_rows(results, task, [*found.values()])) if found else 0.0
    # Accuracies are compared as numbers of right answers, because earlier versions may have rounded the proportion.
    if len(found) != score.n or abs(value - score.value) > (0.5 / score.n if metric.key == "correct" else 1e-6):
        there, here = (
            f"{round(share * n):,} of {n:,} questions right"
            if metric.key == "correct"
            else f"{title_of(score.metric)} {share:.4f} of {n:,} questions"
            for share, n in ((value, len(found)), (score.value, score.n))
        )
        raise UserError(f"{path} has {there} and {results.path} counts {here}; evaluate again with --overwrite")
    return found


def _rows(results: Results, task: str, predictions: Sequence[Prediction]) -> Sequence:
    """The per-question inputs of the task's metric (see ``Metric.rows``), from the written scores or the answers."""
    metric = METRICS[results.tasks[task].metric]
    if metric.has_written_rows or isinstance(metric, Mean):
        return metric.written([getattr(each, metric.key) for each in predictions])
    sides = ([getattr(each, key) for each in predictions] for key in ("parsed", "answer"))
    with within(f"{results.path}: {task}"):
        return metric.rows(*sides, results.task_set.labels(task))


def first_answers(results: Results) -> Iterator[tuple[str, int, bool, str, str]]:
    """The first right and the first wrong prediction of each scored task that has a predictions file.

    Yields (task, question index, whether it is right, the right answer, the text or answer given); both texts are cut
    to 160 characters.
    """
    for name in results.scored:
        path, seen = results.predictions_path(name), set()
        for text in files.read_lines(path) if path.is_file() else ():
            # Skip a broken line: these predictions are only shown as examples.
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                line = json.loads(text)
                right, index, said = bool(line["correct"]), line["index"], line.get("text") or line["parsed"]
                if right not in seen:
                    answer, said = (shortened(each, 160) for each in (line["answer"], said))
                    seen.add(right)
                    yield name, index, right, answer, said


def shared_tasks(a: Results, b: Results, tasks: Sequence[str] = ()) -> list[str]:
    """Return those of ``tasks`` that A and B have scores of, in column order; without ``tasks``, all of these.

    Raises ``UserError`` if there is none, or if one of ``tasks`` is not among them.
    """
    shared = [name for name in a.scored if name in b.tasks]
    if not shared:
        raise UserError(f"{a.path} and {b.path} have no scored task in common")
    if lacking := [name for name in tasks if name not in shared]:
        scores = f"{', '.join(shared)}, but not of {', '.join(lacking)}"
        raise UserError(f"{a.path} and {b.path} both have scores of {scores}")
    return [name for name in shared if name in tasks] if tasks else shared


def check_comparable(a: Results, b: Results, tasks: Sequence[str]) -> None:
    """Raise ``UserError`` unless A and B evaluated ``tasks`` on the same data with the same protocol."""
    for results in (a, b):
        needed = {f"settings.{key}": results.settings.get(key) for key in results.comparability.needed}
        needed |= {f"data.{name}": results.data.get(name) for name in tasks}
        for key in [key for key, value in needed.items() if value is None]:
            raise UserError(f"{results.path}: {key} is missing, and a comparison needs it; evaluate again")
    may_differ = (*a.comparability.noted, *a.comparability.free)
    keys = [key for key in dict.fromkeys([*a.settings, *b.settings]) if key not in may_differ]
    if differing := [key for key in keys if a.settings.get(key) != b.settings.get(key)]:
        values = (f"{key} ({_shown(a, key)} and {_shown(b, key)})" for key in differing)
        raise _not_comparable(a, b, f"they differ in {', '.join(values)}")
    if redefined := [name for name in tasks if a.task_set.definition(name) != b.task_set.definition(name)]:
        raise _not_comparable(
            a, b, f"they declare different options, labels, range, pattern or answer prefix for {', '.join(redefined)}"
        )
    if measured := [name for name in tasks if a.tasks[name].measure != b.tasks[name].measure]:
        measures = (f"{name} by {a.tasks[name].measure} and {b.tasks[name].measure}" for name in measured)
        raise _not_comparable(a, b, f"they measure {', '.join(measures)}, and metrics and tokenizers must agree")
    if other_data := [name for name in tasks if a.data[name] != b.data[name]]:
        raise _not_comparable(a, b, f"their test data of {', '.join(other_data)} are not the same (sha256)")


def paired_answers(a: Results, b: Results, tasks: Sequence[str]) -> dict[str, Paired]:
    """The paired answers of A and B, by task.

    Raises ``UserError`` unless A and B are comparable and answered the same questions. With one base model the prompts
    must be the same too; another base model may have another tokenizer, and so other prompt ids.
    """
    check_comparable(a, b, tasks)
    same_base = a.settings.get("base_fingerprint") == b.settings.get("base_fingerprint")
    found = {}
    for task in tasks:
        of_a, of_b = read_predictions(a, task), read_predictions(b, task)
        if alone := sorted(of_a.keys() ^ of_b.keys()):
            where = f"{(of_a | of_b)[alone[0]].place}; limit {_shown(a, 'limit')} and {_shown(b, 'limit')}"
            raise _not_comparable(a, b, f"question {alone[0]} of {task} is only in one of them ({where})")
        answers = [(of_a[index], of_b[index]) for index in sorted(of_a)]
        for first, last in answers:
            same_prompt = first.prompt_sha256 == last.prompt_sha256 or not same_base
            if first.answer != last.answer or not same_prompt:
                differing = "prompts (with one base model)" if first.answer == last.answer else "right answers"
                where = f"{first.place}; {last.place}"
                raise _not_comparable(a, b, f"question {first.index} of {task} has different {differing} ({where})")
        rows = (_rows(run, task, side) for run, side in zip((a, b), zip(*answers, strict=True), strict=True))
        found[task] = Paired(a.tasks[task].metric, answers, tuple(rows))
    return found


def differences(
    measured: Mapping[str, tuple[str, Sequence]], scored: Sequence[str], seed: int, resamples: int
) -> dict | None:
    """The differences B minus A with their intervals: ``tasks`` by name and their ``average`` over ``scored``, which is
    None unless all of these are measured and all tasks have one unit; None without tasks.

    measured: for each task, its metric and one (rows of A, rows of B) for each pair of runs; a task's difference is the
    mean over these pairs. The questions are resampled within each task (a stratified bootstrap), and every task weighs
    the same. A difference that is the same in all resamples has no interval, see ``Interval``.
    """
    found = {
        task: METRICS[metric].difference(pairs, [seed, *task.encode()], resamples)
        for task, (metric, pairs) in measured.items()
    }
    tasks = {name: Difference(value, *percentile_interval(drawn)) for name, (value, drawn) in found.items()}
    average = None
    if scored and {*scored} <= {*tasks} and one_unit(metric for metric, _ in measured.values()):
        interval = percentile_interval(sum(found[name][1] for name in scored) / len(scored))
        average = Difference(statistics.fmean(tasks[name].difference for name in scored), *interval)
    return {"tasks": tasks, "average": average} if tasks else None


def _shown(results: Results, key: str) -> str:
    return reprlib.repr(results.settings[key]) if key in results.settings else "none"


def _not_comparable(a: Results, b: Results, reason: str) -> UserError:
    return UserError(f"{a.path} and {b.path} are not comparable: {reason}")
