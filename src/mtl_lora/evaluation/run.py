"""Evaluation and prediction for any system: answer the questions, write ``results.json`` or the output file.

Each answer is appended as one JSON line as soon as it is given, so a killed run can resume. Several processes share the
questions.
"""

import collections
import contextlib
import dataclasses
import json
import os
import platform
import shlex
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import torch
import transformers
from tqdm import tqdm

from mtl_lora import artifacts, files
from mtl_lora.config import Config
from mtl_lora.data_files import read_values
from mtl_lora.errors import UserError, note
from mtl_lora.evaluation.evaluator import ADAPTER_CONFIG, BASE_CONFIG, Evaluator, Question, QuestionSets, shortened_note
from mtl_lora.results import Results, TaskNames
from mtl_lora.tasks import grouped
from mtl_lora.version import __version__, checkout_commit

_WAY_OUT = "pass another --output_dir, or --overwrite to delete them"
PARTS = "~part-*.jsonl"  # no task name begins with "~"


class Processes:
    """Context manager for the processes of a distributed launch, or for a single process without a launch."""

    def __init__(self):
        self.rank, self.count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def __enter__(self) -> "Processes":
        if self.count > 1:  # only barriers cross between processes, so gloo serves GPU runs too
            torch.distributed.init_process_group("gloo")
        return self

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            torch.distributed.barrier()

    def __exit__(self, *exception) -> None:
        if self.count > 1:
            torch.distributed.destroy_process_group()


def unanswered(questions: Sequence[Question], lines: Mapping[tuple[str, int], dict]) -> list[tuple[str, int]]:
    """Return the keys of the questions without an answer in prediction lines."""
    return [question.key for question in questions if not question.answered_by(lines.get(question.key))]


def answer_all(
    evaluator: Evaluator, protocol: str, questions: Sequence[Question], folder: str | Path, processes: Processes
) -> None:
    """Answer the questions without a prediction line in ``folder`` and append their lines; the processes share them.

    If one line of a batch is missing, the whole batch is answered, so scores do not depend on where a run was killed.
    """
    predictions = Predictions(folder, processes.rank)
    open_keys = {*unanswered(questions, predictions.read())}
    processes.barrier()  # no process appends before all have read
    waiting = [batch for batch in evaluator.batches(questions, protocol) if any(one.key in open_keys for one in batch)]
    if processes.rank == 0 and (kept := len(questions) - sum(map(len, waiting))):
        about = f"{kept:,} answers in {folder} are kept"
        if not waiting:
            about = f"no question is asked: {folder} holds all answers"
        note(f"{about}; pass --overwrite True to replace them")
    own = waiting[processes.rank :: processes.count]
    if own:
        evaluator.load()
        total = sum(len(batch) for batch in own)
        with tqdm(total=total, desc=protocol, unit=" questions", smoothing=0.02, disable=processes.rank > 0) as bar:
            for batch in own:
                predictions.append(evaluator.answer(batch, protocol))
                bar.update(len(batch))
    processes.barrier()


class Predictions:
    """The prediction lines in an evaluation's folder; each process appends to its own file."""

    def __init__(self, folder: str | Path, rank: int = 0):
        self.folder = Path(folder) / artifacts.PREDICTIONS
        self.own = self.folder / f"~part-{rank}.jsonl"

    def read(self) -> dict[tuple[str, int], dict]:
        """Return every complete line by (task, index); a line cut off by a kill is skipped, so it is answered again."""
        found = {}
        # Lines of a run in progress are newer than the gathered ones, so they are read last.
        for path in sorted(self.folder.glob("*.jsonl"), key=lambda path: (path.match(PARTS), path)):
            for text in path.read_bytes().split(b"\n"):  # bytes: a cut line may end inside a character
                try:
                    line = json.loads(text)
                    task, index = line["task"], line["index"]
                    if files.NAME.fullmatch(task) and type(index) is int and index >= 0:  # the task names a file
                        found[task, index] = line
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
        return found

    def append(self, lines: list[dict]) -> None:
        """Append lines to this process's file, after a line break, since a kill may have cut off the last line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.own.open("a", encoding="utf-8") as opened:
            opened.write("\n" + files.json_lines(lines))

    def gather(self, lines: Mapping[tuple[str, int], dict], sizes: Mapping[str, int]) -> None:
        """Write ``lines`` to one file per task, ordered by question index, and delete the files of the processes.

        sizes: number of examples by task; lines beyond it belong to an earlier, larger test set and are dropped.
        """
        by_task: dict[str, list[dict]] = {}
        for (task, index), line in sorted(lines.items()):
            if task not in sizes or index < sizes[task]:
                by_task.setdefault(task, []).append(line)
        for task, kept in by_task.items():
            files.write_text(self.folder / f"{task}.jsonl", files.json_lines(kept))
        for part in self.folder.glob(PARTS):
            part.unlink()


def check_settings(folder: str | Path, settings: dict, overwrite: bool, way_out: str) -> None:
    """Raise ``UserError`` if a folder has another program's ``settings.json``, which would be overwritten, or unless
    ``overwrite`` answers given under other settings, naming those that differ."""
    path, earlier = Path(folder) / artifacts.EVAL_SETTINGS, None
    if path.exists():
        earlier = files.read_object(path, "the settings of an earlier evaluation")
        if "base_fingerprint" not in earlier:
            raise UserError(f"{path} was not written by an evaluation; choose another output, or delete it")
    if overwrite or not any((Path(folder) / artifacts.PREDICTIONS).glob("*.jsonl")):
        return
    if earlier is None:
        raise UserError(f"{folder} holds answers without their {path.name}; {way_out}")
    # Earlier versions did not record these keys.
    missing = {"protocol": 1} | {key: settings[key] for key in (ADAPTER_CONFIG, BASE_CONFIG) if key in settings}
    earlier = missing | earlier
    different = sorted(key for key in earlier.keys() | settings.keys() if earlier.get(key) != settings.get(key))
    if different:
        raise UserError(f"{folder} holds answers given with another {', '.join(different)}; {way_out}")


def begin(folder: str | Path, settings: dict, overwrite: bool) -> None:
    """Prepare a folder, already checked, for answers under ``settings``. overwrite: delete the evaluation in it."""
    if overwrite:
        artifacts.remove_evaluation(folder)
    predictions = Predictions(folder)
    files.remove_leftovers(predictions.folder)
    # Gather the files that the processes of a killed evaluation left: this launch may divide the questions in another
    # way, and the order of the files decides which of two lines for a question counts.
    if any(predictions.folder.glob(PARTS)):
        predictions.gather(predictions.read(), {})
    files.write_json(Path(folder) / artifacts.EVAL_SETTINGS, settings)


# ---- commands ----


def evaluate(
    evaluator: Evaluator, asked: QuestionSets, questions: Mapping[str, Sequence[Question]] | None = None
) -> dict[str, Results]:
    """Answer every question that has no answer yet; write and return the results of each protocol.

    questions: by protocol; None: the ``asked`` ones with every protocol. Returns an empty dictionary with ``check`` and
    on every process but the first.
    """
    config, results = evaluator.config, {}
    questions = questions or dict.fromkeys(config.protocols, asked.questions)
    folders = {protocol: config.protocols[protocol] for protocol in questions}
    settings = {protocol: evaluator.recorded_settings(protocol) for protocol in questions}
    with contextlib.ExitStack() as stack:
        for folder in () if config.check else dict.fromkeys([config.output_folder, *folders.values()]):
            stack.enter_context(files.claimed(folder))
        note(*shortened_note(asked.questions))
        for protocol, folder in folders.items():
            check_settings(folder, settings[protocol], config.overwrite, _WAY_OUT)
            if not config.overwrite:
                check_results_stay(folder, questions[protocol], asked)
        if config.check:
            print(f"every setting is fine; {len(asked.questions):,} questions", file=sys.stderr)
            return results
        with Processes() as processes:
            lacking = (unanswered(questions[each], Predictions(folder).read()) for each, folder in folders.items())
            if config.overwrite or any(lacking):
                evaluator.load()  # may fail, so it comes before anything is deleted or written
            processes.barrier()  # the first process changes the folders only after all others have read them
            if processes.rank == 0:
                (Path(config.output_folder) / artifacts.AGREEMENT).unlink(missing_ok=True)
                for protocol, folder in folders.items():
                    begin(folder, settings[protocol], config.overwrite)
            processes.barrier()
            for protocol, folder in folders.items():
                answer_all(evaluator, protocol, questions[protocol], folder, processes)
                if processes.rank == 0:
                    part = dataclasses.replace(asked, questions=questions[protocol])
                    results[protocol] = collect(evaluator, protocol, part, gather(evaluator, folder, part))
                    results[protocol].save(Path(folder) / artifacts.RESULTS)
                processes.barrier()
        if results:
            evaluator.finish(asked, results)
    return results


def check_results_stay(folder: str, questions: Sequence[Question], asked: QuestionSets) -> None:
    """Raise ``UserError`` if the new results would replace results of more questions, more tasks or other test sets.

    That is the case if the folder's results count more questions of the same test file, a task that is not asked now,
    or test files from another folder whose content differs.
    """
    path = Path(folder) / artifacts.RESULTS
    if not path.is_file():
        return
    earlier, counts = Results.load(path), collections.Counter(question.task.name for question in questions)
    same = {name: earlier.data.get(name) in (None, asked.sha256[name]) for name in counts}
    lost = [
        f"{name} ({task.n:,} questions)"
        for name, task in earlier.tasks.items()
        if name not in counts or (task.n > counts[name] and same[name])
    ]
    if lost:
        raise UserError(
            f"{path} holds the results of {', '.join(lost)}, which results of fewer questions would replace; evaluate "
            f"these too (existing answers are kept), or {_WAY_OUT}"
        )
    # Test files that changed in the same folder are answered again.
    if earlier.test_sets not in (None, asked.source) and not all(same.values()):
        raise UserError(f"{path} holds the results of {earlier.test_sets}, not of {asked.source}; {_WAY_OUT}")


def gather(evaluator: Evaluator, folder: str, asked: QuestionSets) -> dict[tuple[str, int], dict]:
    """Return every prediction line of a folder; answers to the given questions are extracted by the current rules."""
    predictions = Predictions(folder)
    lines = predictions.read()
    if other := unanswered(asked.questions, lines):
        task, index = other[0]
        raise UserError(f"{folder} answers a different question as question {index} of {task}; pass --overwrite")
    own = {question.key: question.extract_again(lines[question.key]) for question in asked.questions}
    lines |= evaluator.complete(asked.questions, own)
    predictions.gather(lines, asked.sizes)
    return lines


def collect(evaluator: Evaluator, protocol: str, asked: QuestionSets, lines: Mapping[tuple[str, int], dict]) -> Results:
    """Return the results: what was measured, and everything needed to trace and repeat it."""
    config, adapter = evaluator.config, evaluator.adapter
    by_task = grouped(asked.questions, lambda question: question.task.name)
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    tasks = {
        name: evaluator.task_result(part[0].task, [lines[question.key] for question in part])
        for name, part in by_task.items()
    }
    for untrained in (adapter and adapter.provenance_config.untrained_tasks) or ():
        if untrained in tasks:
            tasks[untrained].measured["untrained"] = True
    name = (config.name or evaluator.method_title or evaluator.base_model.name) + evaluator.variant
    settings = evaluator.settings(protocol) | {"limit": config.limit, "batch_size": config.batch_size}
    return Results(
        system=evaluator.system,
        name=name if config.protocols[protocol] == config.output_folder else f"{name} ({protocol})",
        method=evaluator.method,
        method_title=evaluator.method_title,
        base_model=evaluator.base_model.name,
        mode=protocol,
        trainable=evaluator.trainable(),
        tasks=tasks,
        task_set=TaskNames.from_json(evaluator.tasks.to_json()),
        settings=settings | evaluator.results_settings(protocol),
        comparability=evaluator.comparability,
        data={name: asked.sha256[name] for name in by_task},
        test_sets=asked.source,
        adapter=evaluator.adapter_json(),
        versions={
            "mtl_lora": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        commit=checkout_commit(),
    )


def predict(evaluator: Evaluator, protocol: str, **how: object) -> None:
    """Answer every example of the input that has no answer yet, then write the whole output file.

    Until then the answers are kept in ``<output>.partial``, from which the same command resumes. protocol: the one
    recorded in the settings, which may name a mixture of protocols. how: passed to ``to_predict``.
    """
    config = evaluator.config
    with files.unchanged(config.input) as digest:
        values = read_values(Path(config.input))
    questions = evaluator.to_predict(values, config.input, config.task, **how)
    everything = [question for part in questions.values() for question in part]
    settings = evaluator.recorded_settings(protocol) | {"input_sha256": digest, "task": config.task}
    output, partial = Path(config.output), Path(f"{config.output}.partial")
    with contextlib.ExitStack() as stack:
        if not config.check:
            stack.enter_context(files.claimed(output))
        files.require_writable(output.parent)
        if output.exists() and not config.overwrite and not (partial / artifacts.EVAL_SETTINGS).exists():
            raise UserError(f"{output} already exists; pass another --output, or --overwrite to replace it")
        way_out = f"delete it, or pass another --output, or --overwrite to replace {output}"
        check_settings(partial, settings, config.overwrite, way_out)
        note(*shortened_note(everything))
        if config.check:
            print(f"every setting is fine; {len(everything):,} examples", file=sys.stderr)
            return
        processes = stack.enter_context(Processes())
        if config.overwrite or unanswered(everything, Predictions(partial).read()):
            evaluator.load()  # may fail, so it comes before anything is deleted or written
        processes.barrier()  # the first process changes the folder only after all others have read it
        if processes.rank == 0:
            files.remove_leftovers(partial)  # the claim of the output is for this folder too
            begin(partial, settings, config.overwrite)
        processes.barrier()
        for protocol, part in questions.items():
            answer_all(evaluator, protocol, part, partial, processes)
        if processes.rank == 0:
            lines = Predictions(partial).read()
            everything.sort(key=lambda question: question.key[1])
            results = [evaluator.result(question, lines[question.key]) for question in everything]
            files.write_text(output, files.json_lines(results))
            artifacts.remove_evaluation(partial)
            with contextlib.suppress(OSError):  # the folder stays if another program put a file into it
                partial.rmdir()
            print(f"{len(results):,} answers in {output}", file=sys.stderr)


# Threads take turns: the prompt prefixes that a language model's questions share belong to one request.
_answering = threading.RLock()


class Predictor:
    """Answers examples from Python; the model is loaded with the first of them.

    checkpoint: output folder of a training run, which names its base model and tasks. flags: those of ``mtl-lora
    predict`` that say how to answer (``base_model``, ``dtype``, ``batch_size`` ...). Raises ``UserError`` as the
    command does. A system's subclass names its ``Evaluator`` and ``AnswerConfig``, and the ``field`` that an example
    given as a plain string stands for.
    """

    evaluator_class: type[Evaluator]
    config_class: type[Config]
    field: str

    def __init__(self, checkpoint: str | Path | None = None, **flags):
        path = None if checkpoint is None else str(checkpoint)
        named = self.config_class.named({"checkpoint": path, **flags}, "the Predictor")
        self.evaluator = self.evaluator_class(self.config_class(**named))

    def load(self) -> None:
        """Load the model now, as a service should before its first request, and not with the first examples."""
        self.evaluator.load()

    def predict(self, examples: Sequence[Mapping | str], task: str | None = None, **how: object) -> list[dict]:
        """Return one result per example, in order. An example that is a string has only ``field``. task: the task of
        examples that name none."""
        if isinstance(examples, str | Mapping):
            raise UserError("predict takes a list of examples, not a single one; pass [example]")
        values = [{self.field: example} if isinstance(example, str) else example for example in examples]
        values = [dict(value) if isinstance(value, Mapping) else value for value in values]
        answered = []
        with _answering:
            questions = self.evaluator.to_predict(values, "the examples", task, **how)
            if any(questions.values()):
                self.load()
            for protocol, part in questions.items():
                for batch in self.evaluator.batches(part, protocol):
                    answered += zip(batch, self.evaluator.answer(batch, protocol), strict=True)
        answered.sort(key=lambda pair: pair[0].key[1])
        return [self.evaluator.result(*pair) for pair in answered]
