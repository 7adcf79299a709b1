"""Evaluation and prediction for any system: answer the questions, write ``results.json`` or the output file."""

import collections
import contextlib
import dataclasses
import platform
import shlex
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import torch
import transformers

from mtl_lora import artifacts, files
from mtl_lora.config import Config
from mtl_lora.data_files import read_values
from mtl_lora.errors import UserError
from mtl_lora.evaluation.answers import (
    Predictions,
    Processes,
    answer_all,
    begin,
    check_settings,
    is_answered,
    require_own_settings,
)
from mtl_lora.evaluation.evaluator import Evaluator, Question, QuestionSets, shortened_note
from mtl_lora.results import Results, TaskNames
from mtl_lora.tasks import grouped
from mtl_lora.version import __version__, checkout_commit


def evaluate(
    evaluator: Evaluator, asked: QuestionSets, questions: Mapping[str, Sequence[Question]] | None = None
) -> dict[str, Results]:
    """Answer every question that has no answer yet; write and return the results of each protocol.

    questions: by protocol; None: the ``asked`` ones with every protocol. Returns an empty dictionary with ``check`` and
    on every process but the first.
    """
    config = evaluator.config
    questions = questions or dict.fromkeys(config.protocols, asked.questions)
    folders = {protocol: config.protocols[protocol] for protocol in questions}
    with contextlib.ExitStack() as stack:
        for folder in () if config.check else dict.fromkeys([config.output_folder, *folders.values()]):
            stack.enter_context(files.claimed(folder))
        results = _evaluate(evaluator, asked, questions, folders)
        if results:
            evaluator.finish(asked, results)
        return results


def _evaluate(evaluator: Evaluator, asked: QuestionSets, questions: Mapping, folders: Mapping) -> dict[str, Results]:
    """Run ``evaluate`` once the folders, by protocol, are claimed."""
    config = evaluator.config
    evaluator.note(shortened_note(asked.questions))
    for folder in folders.values():
        require_own_settings(folder)
    if not config.overwrite:
        way_out = "pass another --output_dir, or --overwrite to delete them"
        for protocol, folder in folders.items():
            check_settings(folder, evaluator.recorded_settings(protocol), way_out)
            check_results_stay(folder, questions[protocol], asked)
    if config.check:
        print(f"every setting is fine; {len(asked.questions):,} questions", file=sys.stderr)
        return {}
    results: dict[str, Results] = {}
    with Processes() as processes:
        if config.overwrite or not all(is_answered(folder, questions[each]) for each, folder in folders.items()):
            evaluator.load()  # may fail, so it comes before anything is deleted or written
        processes.barrier()  # the first process changes the folders only after all others have read them
        if processes.rank == 0:
            (Path(config.output_folder) / artifacts.AGREEMENT).unlink(missing_ok=True)
            for protocol, folder in folders.items():
                begin(folder, evaluator.recorded_settings(protocol), config.overwrite)
        processes.barrier()
        for protocol, folder in folders.items():
            answer_all(evaluator, protocol, questions[protocol], folder, processes)
            if processes.rank == 0:
                part = dataclasses.replace(asked, questions=questions[protocol])
                results[protocol] = collect(evaluator, protocol, part, gather(evaluator, folder, part))
                results[protocol].save(Path(folder) / artifacts.RESULTS)
            processes.barrier()
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
    way_out = "pass another --output_dir, or --overwrite to delete them"
    lost = [
        f"{name} ({task.n:,} questions)"
        for name, task in earlier.tasks.items()
        if name not in counts or (task.n > counts[name] and same[name])
    ]
    if lost:
        raise UserError(
            f"{path} holds the results of {', '.join(lost)}, which results of fewer questions would replace; evaluate "
            f"these too (existing answers are kept), or {way_out}"
        )
    # Test files that changed in the same folder are answered again.
    if earlier.test_sets not in (None, asked.source) and not all(same.values()):
        raise UserError(f"{path} holds the results of {earlier.test_sets}, not of {asked.source}; {way_out}")


def gather(evaluator: Evaluator, folder: str, asked: QuestionSets) -> dict[tuple[str, int], dict]:
    """Return every prediction line of a folder; answers to the given questions are extracted by the current rules."""
    predictions = Predictions(folder)
    lines = predictions.read()
    if other := [question for question in asked.questions if not question.answered_by(lines.get(question.key))]:
        task, index = other[0].key
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
    settings = evaluator.recorded_settings(protocol) | {"input_sha256": digest, "task": config.task}
    with contextlib.nullcontext() if config.check else files.claimed(config.output):
        _predict(evaluator, questions, settings)


def _predict(evaluator: Evaluator, questions: Mapping[str, Sequence[Question]], settings: dict) -> None:
    """Run ``predict`` once the output file is claimed. settings: every setting that an answer depends on."""
    config = evaluator.config
    output, partial = Path(config.output), Path(f"{config.output}.partial")
    files.require_writable(output.parent)
    require_own_settings(partial)
    if not config.overwrite:
        if output.exists() and not (partial / artifacts.EVAL_SETTINGS).exists():
            raise UserError(f"{output} already exists; pass another --output, or --overwrite to replace it")
        check_settings(partial, settings, f"delete it, or pass another --output, or --overwrite to replace {output}")
    everything = [question for part in questions.values() for question in part]
    evaluator.note(shortened_note(everything))
    if config.check:
        print(f"every setting is fine; {len(everything):,} examples", file=sys.stderr)
        return
    with Processes() as processes:
        if config.overwrite or not is_answered(partial, everything):
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
