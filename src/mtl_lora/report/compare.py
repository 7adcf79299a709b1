"""By how much two runs on the same questions differ: task by task, and on average."""

import collections
import math
import reprlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtl_lora.errors import UserError
from mtl_lora.report.load import Prediction, read_predictions
from mtl_lora.report.study_model import CONFIDENCE, Difference
from mtl_lora.report.table import AVERAGE, NOTHING, Report, TextTable, interval_text, percent, require
from mtl_lora.results import Results

if TYPE_CHECKING:
    import numpy

NEEDED_SETTINGS = ("mode", "base_fingerprint", "template", "cutoff_len")
# What is compared, and what the answers do not depend on. Any other setting, a future one too, is protocol.
# (limit decides which questions are asked, and those are compared one by one; so are the definitions of tasks.)
FREE_SETTINGS = {"base_fingerprint", "adapter_sha256", "tasks_sha256", "dtype", "batch_size", "limit"}
CHANGE_KEYS = ("a", "b", "difference", "low", "high")
# Numbers drawn at a time: 32 MiB of counts, however many resamples and distinct differences there are.
_DRAWN_AT_ONCE = 2**22
Pairs = list[tuple[Prediction, Prediction]]


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test (Psychometrika 12, 1947) from the counts of discordant pairs.

    min(1, 2 sum_{k <= min(b, c)} C(n, k) / 2^n) with b = ``only_a``, c = ``only_b``, n = b + c. It is 1 without
    discordant pairs and never 0: the smallest float stands for all below it. Raises ``UserError`` without scipy.
    """
    require("scipy")
    from scipy.special import bdtr

    return min(1.0, max(2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)), math.ulp(0.0)))


def bootstrap_means(differences: Sequence[float], seed: Sequence[int], resamples: int) -> "numpy.ndarray":
    """Means (resamples,) of as many ``differences`` as there are, drawn from them with replacement.

    One difference a question, so a resample keeps the two answers to a question together.
    """
    import numpy

    # How often each distinct value comes up is multinomial: the same law as drawing question by question, in less
    # time. Values stand in the order of the questions, so that negated differences give negated means.
    counted = collections.Counter(differences)
    values = numpy.array(list(counted), dtype=numpy.float64)
    n = len(differences)
    proportions = numpy.array(list(counted.values())) / n
    generator = numpy.random.default_rng(seed)
    rows = max(1, _DRAWN_AT_ONCE // len(values))
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return numpy.concatenate([generator.multinomial(n, proportions, size) @ values for size in sizes]) / n


def task_means(task: str, differences: Sequence[float], seed: int, resamples: int) -> "numpy.ndarray":
    """``bootstrap_means`` of one task's differences, from a stream of its own: other tasks do not change them."""
    return bootstrap_means(differences, [seed, *task.encode()], resamples)


def percentile_interval(means: "numpy.ndarray") -> tuple[float, float]:
    """The middle ``CONFIDENCE`` of bootstrap means (Efron and Tibshirani, An Introduction to the Bootstrap, 1993)."""
    import numpy

    tail = (1 - CONFIDENCE) / 2
    low, high = numpy.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def check_comparable(a: Results, b: Results, tasks: Sequence[str]) -> None:
    """Raise ``UserError`` unless both scored ``tasks`` on the same data by one protocol."""
    for results in (a, b):
        needed = {f"settings.{key}": results.settings.get(key) for key in NEEDED_SETTINGS}
        needed |= {f"data.{name}": results.data.get(name) for name in tasks}
        for key in [key for key, value in needed.items() if value is None]:
            raise UserError(f"{results.path}: {key} is missing, without which nothing can be compared; evaluate again")
    keys = [key for key in dict.fromkeys([*a.settings, *b.settings]) if key not in FREE_SETTINGS]
    differing = [key for key in keys if a.settings.get(key) != b.settings.get(key)]
    if differing:
        values = (f"{key} ({_shown(a, key)} and {_shown(b, key)})" for key in differing)
        raise _not_comparable(a, b, f"they differ in {', '.join(values)}")
    redefined = [name for name in tasks if a.task_set.definition(name) != b.task_set.definition(name)]
    if redefined:
        raise _not_comparable(a, b, f"they declare other options, pattern or answer prefix of {', '.join(redefined)}")
    other_data = [name for name in tasks if a.data[name] != b.data[name]]
    if other_data:
        raise _not_comparable(a, b, f"their test data of {', '.join(other_data)} are not the same (sha256)")


def paired_answers(a: Results, b: Results, tasks: Sequence[str]) -> dict[str, Pairs]:
    """By task, the answers of A and of B to each question, in the order of their indices.

    Raises ``UserError`` unless both can be compared and answered the same questions, asked in the same words. (Another
    base model may have another tokenizer and so other prompt ids; only with one base must these agree.)
    """
    check_comparable(a, b, tasks)
    same_base = a.settings["base_fingerprint"] == b.settings["base_fingerprint"]
    found: dict[str, Pairs] = {}
    for task in tasks:
        of_a, of_b = read_predictions(a, task), read_predictions(b, task)
        alone = sorted(of_a.keys() - of_b.keys()) or sorted(of_b.keys() - of_a.keys())
        if alone:
            place = (of_a.get(alone[0]) or of_b[alone[0]]).place
            limits = f"limit {_shown(a, 'limit')} and {_shown(b, 'limit')}"
            raise _not_comparable(a, b, f"question {alone[0]} of {task} ({place}) is in one of them alone ({limits})")
        found[task] = [(of_a[index], of_b[index]) for index in sorted(of_a)]
        for first, last in found[task]:
            other = "right answer" if first.answer != last.answer else ""
            if same_base and first.prompt_sha256 != last.prompt_sha256:
                other = other or "prompt, with one base model,"
            if other:
                where = f"{first.place}; {last.place}"
                raise _not_comparable(a, b, f"question {first.index} of {task} has another {other} in each ({where})")
    return found


def _shown(results: Results, key: str) -> str:
    return reprlib.repr(results.settings[key]) if key in results.settings else "none"


def _not_comparable(a: Results, b: Results, reason: str) -> UserError:
    return UserError(f"{a.path} and {b.path} are not comparable: {reason}")


def compare(a: Results, b: Results, seed: int = 0, resamples: int = 10_000) -> Report:
    """B against A, from their predictions; intervals are of ``resamples`` seeded resamples.

    The report's value has ``tasks`` in column order, and their ``average``: n questions, ``accuracy`` (mean score of A
    and of B, ``difference`` B - A, its ``low`` and ``high``), the numbers ``only_a`` and ``only_b`` of questions that
    one alone answered right, p, and ``f1`` or None. Raises ``UserError`` saying what differs where the two are not
    comparable, and for broken predictions.
    """
    for one, other in ((a, b), (b, a)):
        alone = [name for name in one.tasks if name not in other.tasks]
        if alone:
            raise _not_comparable(a, b, f"there are scores of {', '.join(alone)} in {one.path} alone")
    tasks, means = {}, {"correct": [], "f1": []}

    def change(name: str, key: str, pairs: Pairs) -> dict | None:
        scores = [(getattr(first, key), getattr(last, key)) for first, last in pairs]
        if any(None in pair for pair in scores):
            return None
        means[key].append(task_means(name, [float(y) - float(x) for x, y in scores], seed, resamples))
        return _change(*(math.fsum(side) / len(pairs) for side in zip(*scores, strict=True)), means[key][-1])

    for name, pairs in paired_answers(a, b, a.scored).items():
        right = collections.Counter((first.correct, last.correct) for first, last in pairs)
        changes = [change(name, key, pairs) for key in means]
        tasks[name] = _compared(len(pairs), right[True, False], right[False, True], *changes)
    # Every task weighs the same; questions were resampled within each task (a stratified bootstrap).
    averages = []
    for key, drawn in (("accuracy", means["correct"]), ("f1", means["f1"])):
        changes = [row[key] for row in tasks.values()]
        known = None not in changes
        sides = [math.fsum(each[side] for each in changes) / len(changes) for side in "ab"] if known else ()
        averages.append(_change(*sides, sum(drawn) / len(changes)) if known else None)
    average = _compared(*(sum(row[key] for row in tasks.values()) for key in ("n", "only_a", "only_b")), *averages)

    rows = {**tasks, None: average}
    titles = [*map(a.task_set.title, tasks), AVERAGE]
    interval, with_f1 = f"{100 * CONFIDENCE:.0f} % interval", any(row["f1"] for row in tasks.values())
    header = ["Task", "Questions", "A", "B", "B - A", interval, "Only A right", "Only B right", "p"]
    header += ["F1 A", "F1 B", "F1 B - A", f"F1 {interval}"] if with_f1 else []
    lines = [
        [title, f"{row['n']:,}", *_texts(row["accuracy"]), f"{row['only_a']:,}", f"{row['only_b']:,}", p_text(row["p"])]
        + (_texts(row["f1"]) if with_f1 else [])
        for title, row in zip(titles, rows.values(), strict=True)
    ]
    records: list[dict] = []
    for name, row in rows.items():
        records.append({"task": name})
        for key, value in row.items():
            is_change = key in ("accuracy", "f1")
            records[-1] |= (
                {f"{key} {part}": (value or {}).get(part) for part in CHANGE_KEYS} if is_change else {key: value}
            )
    notes = _notes(a, b, [name for name, row in tasks.items() if row["f1"] is None], seed, resamples)
    value = {
        side: {"name": run.name, "results": str(run.path), "base_model": run.base_model, "settings": run.settings}
        for side, run in (("a", a), ("b", b))
    }
    value |= {"tasks": tasks, "average": average, "confidence": CONFIDENCE, "resamples": resamples, "seed": seed}
    return Report([TextTable("", header, lines)], records, notes, value | {"notes": notes})


def _compared(n: int, only_a: int, only_b: int, accuracy: dict, f1: dict | None) -> dict:
    p = mcnemar_p(only_a, only_b)
    return {"n": n, "accuracy": accuracy, "only_a": only_a, "only_b": only_b, "p": p, "f1": f1}


def _change(a: float, b: float, means: "numpy.ndarray") -> dict:
    return dict(zip(CHANGE_KEYS, (a, b, b - a, *percentile_interval(means)), strict=True))


def _texts(change: dict | None) -> list[str]:
    if change is None:
        return [NOTHING] * 4
    difference = Difference(change["difference"], change["low"], change["high"])
    signed = percent(difference.difference, signed=True)
    return [percent(change["a"]), percent(change["b"]), signed, interval_text(difference, signed=True)]


def p_text(p: float) -> str:
    """Four decimals, or ``<0.0001``."""
    return f"{p:.4f}" if p >= 0.0001 else "<0.0001"


def _notes(a: Results, b: Results, without_f1: Sequence[str], seed: int, resamples: int) -> list[str]:
    """What the numbers are, and what differs between the runs besides what is compared."""
    notes = [
        f"A: {a.name} ({a.path.parent}). B: {b.name} ({b.path.parent}). B - A in percentage points.",
        f"Interval: {100 * CONFIDENCE:.0f} % percentile interval of a paired bootstrap, {resamples:,} resamples of the "
        f"questions within each task, seed {seed}.",
        "p: exact two-sided McNemar test of the questions that only A answers right against those that only B does; "
        "not corrected for the number of tasks.",
        "Average: every task weighs the same in the scores, every question in p, which pools the questions of all "
        "tasks.",
    ]
    if 0 < len(without_f1) < len(a.tasks):
        notes.append(f"No F1 for {', '.join(without_f1)}, nor on average: not every prediction has one.")
    if a.settings["base_fingerprint"] != b.settings["base_fingerprint"]:
        notes.append(f"The base models differ: A {a.base_model or 'unknown'}, B {b.base_model or 'unknown'}.")
    if a.settings.get("dtype") != b.settings.get("dtype"):
        notes.append(f"The dtypes differ: A {a.settings.get('dtype')}, B {b.settings.get('dtype')}.")
    return notes
