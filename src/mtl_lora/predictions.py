"""The answers that a results file counts: predictions read from disk, and paired with those of another evaluation."""

import contextlib
import dataclasses
import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mtl_lora import artifacts, files
from mtl_lora.errors import UserError, within
from mtl_lora.estimates import intervals
from mtl_lora.metrics import METRICS, Mean, one_unit, title_of
from mtl_lora.results import Fraction, Index, Reader, Results, Score


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One answered question: the right answer, the one given (texts, or numbers of a regression), whether it is right.

    f1: of free text. score: of soft scores. cider, bleu4: rows of a caption; counts: the row of a map, whose ``answer``
    is a hash of the labels. place: ``FILE, line N``, for errors.
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
    """The answers of A and of B to each question of a task, in the order of their indices.

    rows: of A and of B, what the task's ``metric`` needs of each question, see ``Metric``.
    """

    metric: str
    answers: list[tuple[Prediction, Prediction]]
    rows: tuple[Sequence, Sequence]


def predictions_path(results: Results, task: str) -> Path:
    """Where the predictions of one task lie."""
    return results.path.parent / artifacts.PREDICTIONS / f"{task}.jsonl"


def read_predictions(results: Results, task: str) -> dict[int, Prediction]:
    """Predictions by index of the question, for every question of ``task`` that ``results`` counts.

    Raises ``UserError`` naming the file and line for a missing or unreadable file, a torn line, a record without its
    keys, a question answered twice, and predictions that are not those that the results file counts.
    """
    path, score, found = predictions_path(results, task), results.tasks[task], {}
    metric = METRICS.get(score.metric)
    if metric is None:
        raise UserError(f"{results.path}: {task} is measured by {score.metric}; only {', '.join(METRICS)} compare")
    kind = float if metric.needs == "numbers" else str
    keys = {"correct": bool, "f1": Fraction, "parsed": kind, "score": Fraction, "cider": Score, "bleu4": list[float]}
    keys["counts"] = list[float]
    needed = {"answer": kind, metric.key: keys[metric.key]}
    for number, line in enumerate(files.read_lines(path), 1):
        reader = Reader(f"{path}, line {number}")
        try:
            record = reader.read(dict, json.loads(line))
        except (ValueError, RecursionError):  # a UserError is one of the former
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
        # A folder keeps what an earlier evaluation with a larger limit answered; the results file does not count it.
        found = {index: prediction for index, prediction in found.items() if index < limit}
    value = metric.value_of(_rows(results, task, [*found.values()])) if found else 0.0
    # As numbers of right answers, where that is what is counted: an earlier version may have rounded the proportion.
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
    """What the task's metric needs of each question, see ``Metric``: the scores that were written, or the answers."""
    metric = METRICS[results.tasks[task].metric]
    if metric.has_written_rows:
        return metric.written([getattr(each, metric.key) for each in predictions])
    if isinstance(metric, Mean):
        return [float(getattr(each, metric.key)) for each in predictions]
    sides = ([getattr(each, key) for each in predictions] for key in ("parsed", "answer"))
    with within(f"{results.path}: {task}"):
        return metric.rows(*sides, results.task_set.labels(task))


def first_answers(results: Results) -> Iterator[tuple[str, int, bool, str, str]]:
    """Of each task whose predictions are there, the first right one and the first wrong: the task, the question's
    index, whether it is right, the right answer, and what was said, cut short."""
    for name in results.scored:
        path, seen = predictions_path(results, name), set()
        for text in files.read_lines(path) if path.is_file() else ():
            # A broken line is no example.
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                line = json.loads(text)
                right, index, said = bool(line["correct"]), line["index"], line.get("text") or line["parsed"]
                if right not in seen:
                    answer, said = (" ".join(each.split()) for each in (line["answer"], said))
                    answer, said = (each if len(each) <= 160 else f"{each[:159]}…" for each in (answer, said))
                    seen.add(right)
                    yield name, index, right, answer, said


def check_comparable(a: Results, b: Results, tasks: Sequence[str]) -> None:
    """Raise ``UserError`` unless both scored ``tasks`` on the same data by one protocol."""
    for results in (a, b):
        needed = {f"settings.{key}": results.settings.get(key) for key in results.comparability.needed}
        needed |= {f"data.{name}": results.data.get(name) for name in tasks}
        for key in [key for key, value in needed.items() if value is None]:
            raise UserError(f"{results.path}: {key} is missing, without which nothing can be compared; evaluate again")
    may_differ = (*a.comparability.noted, *a.comparability.free)
    keys = [key for key in dict.fromkeys([*a.settings, *b.settings]) if key not in may_differ]
    if differing := [key for key in keys if a.settings.get(key) != b.settings.get(key)]:
        values = (f"{key} ({_shown(a, key)} and {_shown(b, key)})" for key in differing)
        raise _not_comparable(a, b, f"they differ in {', '.join(values)}")
    if redefined := [name for name in tasks if a.task_set.definition(name) != b.task_set.definition(name)]:
        raise _not_comparable(
            a, b, f"they declare other options, labels, range, pattern or answer prefix of {', '.join(redefined)}"
        )
    if measured := [name for name in tasks if a.tasks[name].measure != b.tasks[name].measure]:
        measures = (f"{name} by {a.tasks[name].measure} and {b.tasks[name].measure}" for name in measured)
        raise _not_comparable(a, b, f"they measure {', '.join(measures)}, and metrics and tokenizers must agree")
    if other_data := [name for name in tasks if a.data[name] != b.data[name]]:
        raise _not_comparable(a, b, f"their test data of {', '.join(other_data)} are not the same (sha256)")


def paired_answers(a: Results, b: Results, tasks: Sequence[str]) -> dict[str, Paired]:
    """By task that both scored, the answers of A and of B.

    Raises ``UserError`` unless both can be compared and answered the same questions, asked in the same words. (Another
    base model may have another tokenizer and so other prompt ids; only with one base must these agree.)
    """
    check_comparable(a, b, tasks)
    same_base = a.settings.get("base_fingerprint") == b.settings.get("base_fingerprint")
    found = {}
    for task in tasks:
        of_a, of_b = read_predictions(a, task), read_predictions(b, task)
        if alone := sorted(of_a.keys() ^ of_b.keys()):
            where = f"{(of_a | of_b)[alone[0]].place}; limit {_shown(a, 'limit')} and {_shown(b, 'limit')}"
            raise _not_comparable(a, b, f"question {alone[0]} of {task} is in one of them alone ({where})")
        answers = [(of_a[index], of_b[index]) for index in sorted(of_a)]
        for first, last in answers:
            same_prompt = first.prompt_sha256 == last.prompt_sha256 or not same_base
            if first.answer != last.answer or not same_prompt:
                other = "prompt, with one base model," if first.answer == last.answer else "right answer"
                where = f"{first.place}; {last.place}"
                raise _not_comparable(a, b, f"question {first.index} of {task} has another {other} in each ({where})")
        rows = (_rows(run, task, side) for run, side in zip((a, b), zip(*answers, strict=True), strict=True))
        found[task] = Paired(a.tasks[task].metric, answers, tuple(rows))
    return found


def differences(
    measured: Mapping[str, tuple[str, Sequence]], scored: Sequence[str], seed: int, resamples: int
) -> dict | None:
    """B minus A by task, and on average over ``scored`` where they have one unit, see ``intervals``.

    measured: by task its metric and, of each pair of runs, the rows of A and of B; the mean over pairs is compared.
    """
    found = {
        task: METRICS[metric].difference(pairs, [seed, *task.encode()], resamples)
        for task, (metric, pairs) in measured.items()
    }
    return intervals(found, scored if one_unit(metric for metric, _ in measured.values()) else ())


def _shown(results: Results, key: str) -> str:
    return reprlib.repr(results.settings[key]) if key in results.settings else "none"


def _not_comparable(a: Results, b: Results, reason: str) -> UserError:
    return UserError(f"{a.path} and {b.path} are not comparable: {reason}")
