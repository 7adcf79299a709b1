"""``mtl-lora evaluate``: from test sets to predictions to ``results.json``."""

import collections
import contextlib
import dataclasses
import math
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import safetensors
import torch
import transformers

from mtl_lora import artifacts, files
from mtl_lora.errors import UserError
from mtl_lora.language.config import EvalConfig
from mtl_lora.language.evaluator import (
    Evaluator,
    Predictions,
    Processes,
    answer_all,
    begin,
    check_settings,
    is_answered,
)
from mtl_lora.language.metrics import task_result
from mtl_lora.language.questions import Question, QuestionSets, load_questions
from mtl_lora.results import Results, TaskNames, Trainable
from mtl_lora.version import __version__, checkout_commit


def run(config: EvalConfig) -> dict[str, Results]:
    """Answer every question that has no answer yet; writes and returns the results of each protocol.

    With ``mode="both"`` each protocol has a folder, results and a name of its own, and ``agreement.json`` beside them
    says how often they agree. Empty with ``check``, and on every process but the first.
    """
    evaluator = Evaluator(config)
    asked = load_questions(config.data_dir, evaluator.tasks, config.tasks, evaluator.encoder, config.limit)
    questions = dict.fromkeys(config.protocols, asked.questions)
    if config.mode == "both":
        free_text = {question.task.name for question in asked.questions if not question.options}
        questions["score"] = [each for each in asked.questions if each.task.name not in free_text]
    # Of free text alone there is nothing to score.
    folders = {protocol: folder for protocol, folder in config.protocols.items() if questions[protocol]}
    evaluator.prepare(questions)
    with contextlib.ExitStack() as stack:
        for folder in () if config.check else dict.fromkeys([config.output_folder, *folders.values()]):
            stack.enter_context(files.claimed(folder))
        return _run(config, evaluator, asked, questions, folders)


def _run(
    config: EvalConfig,
    evaluator: Evaluator,
    asked: QuestionSets,
    questions: dict[str, list[Question]],
    folders: dict[str, str],
) -> dict[str, Results]:
    """``run`` with the output folders claimed; questions and folders: by protocol."""
    if not config.overwrite:
        way_out = "pass another --output_dir, or --overwrite to delete them"
        for protocol, folder in folders.items():
            check_settings(folder, evaluator.settings(protocol), way_out)
            check_results_stay(folder, questions[protocol], asked.sha256)
    if config.check:
        print(f"every setting is fine; {len(asked.questions):,} questions", file=sys.stderr)
        return {}
    found: dict[str, dict[tuple[str, int], dict]] = {}
    results: dict[str, Results] = {}
    with Processes() as processes:
        if config.overwrite or not all(is_answered(folder, questions[each]) for each, folder in folders.items()):
            evaluator.load()  # may fail, and so before anything is deleted or written
        if processes.rank == 0:
            (Path(config.output_folder) / artifacts.AGREEMENT).unlink(missing_ok=True)
            for protocol, folder in folders.items():
                begin(folder, evaluator.settings(protocol), config.overwrite)
        processes.barrier()
        for protocol, folder in folders.items():
            answer_all(evaluator, protocol, questions[protocol], folder, processes)
            if processes.rank == 0:
                part = dataclasses.replace(asked, questions=questions[protocol])
                found[protocol] = _gather(folder, part)
                results[protocol] = collect(evaluator, config, protocol, part, found[protocol])
                results[protocol].save(Path(folder) / artifacts.RESULTS)
            processes.barrier()
        if processes.rank == 0 and len(folders) > 1:
            value = agreement((question.key for question in questions["score"]), *found.values())
            files.write_json(Path(config.output_folder) / artifacts.AGREEMENT, value)
    return results


def check_results_stay(folder: str, asked: Sequence[Question], sha256: dict[str, str]) -> None:
    """Raise ``UserError`` if the results in a folder count more questions than are asked now of a test set, or a task
    that is not asked at all: those of a part would replace them.
    """
    path = Path(folder) / artifacts.RESULTS
    if not path.is_file():
        return
    earlier, counts = Results.load(path), collections.Counter(question.task.name for question in asked)
    lost = [
        f"{name} ({task.n:,} questions)"
        for name, task in earlier.tasks.items()
        if name not in counts or (task.n > counts[name] and earlier.data.get(name) in (None, sha256[name]))
    ]
    if lost:
        raise UserError(
            f"{path} holds the results of {', '.join(lost)}, which those of fewer would replace; ask for these too "
            "(what was answered stays), or pass another --output_dir, or --overwrite to delete them"
        )


def _gather(folder: str, asked: QuestionSets) -> dict[tuple[str, int], dict]:
    """Every prediction line of a folder, those of the questions with their answers extracted by today's rules."""
    predictions = Predictions(folder)
    lines = predictions.read()
    lines |= {question.key: question.extract_again(lines[question.key]) for question in asked.questions}
    predictions.gather(lines, asked.sizes)
    return lines


def collect(
    evaluator: Evaluator, config: EvalConfig, protocol: str, asked: QuestionSets, lines: dict[tuple[str, int], dict]
) -> Results:
    """What was measured, and everything needed to trace and repeat it."""
    by_task: dict[str, list[Question]] = {}
    for question in asked.questions:
        by_task.setdefault(question.task.name, []).append(question)
    adapter, peft = evaluator.adapter, evaluator.peft
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    trainable = None
    if adapter:
        trainable = Trainable(*evaluator.base_model.count(adapter.adapter_config))
    elif peft:
        own, base = _sizes(peft.weights), _sizes(*evaluator.base_model.weight_files())
        # A module that is trained and saved whole takes the place of the base's.
        trainable = Trainable(sum(own.values()), sum((base | own).values()))
    tasks = {
        name: task_result(part[0].task, [lines[question.key] for question in part]) for name, part in by_task.items()
    }
    for untrained in (adapter and adapter.provenance_config.untrained_tasks) or ():
        if untrained in tasks:
            tasks[untrained].measured["untrained"] = True
    name = config.name or evaluator.method_title or evaluator.base_model.name
    return Results(
        name=f"{name} ({protocol})" if config.mode == "both" else name,
        method=evaluator.method,
        method_title=evaluator.method_title,
        base_model=evaluator.base_model.name,
        mode=protocol,
        trainable=trainable,
        tasks=tasks,
        task_set=TaskNames.from_json(evaluator.tasks.to_json()),
        settings=evaluator.settings(protocol)
        | {"limit": config.limit, "batch_size": config.batch_size}
        | ({} if protocol == "score" else {"extraction": max(task.extraction for task in evaluator.tasks)}),
        data={name: asked.sha256[name] for name in by_task},
        adapter=adapter.to_json() if adapter else peft.settings if peft else None,
        versions={
            "mtl_lora": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        device=device,
        commit=checkout_commit(),
    )


def agreement(
    asked: Iterable[tuple[str, int]], first: dict[tuple[str, int], dict], second: dict[tuple[str, int], dict]
) -> dict:
    """How often two protocols give a question the same answer: a fraction by task and over all."""
    by_task: dict[str, list[bool]] = {}
    for key in asked:
        by_task.setdefault(key[0], []).append(first[key]["parsed"] == second[key]["parsed"])
    same = [value for values in by_task.values() for value in values]
    return {
        "tasks": {task: sum(values) / len(values) for task, values in by_task.items()},
        "all": sum(same) / len(same),
        "n": len(same),
    }


def _sizes(*paths: Path) -> dict[str, int]:
    """The number of parameters of each tensor in safetensors files, by its name in the model."""
    sizes = {}
    for path in paths:
        with safetensors.safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                shape = opened.get_slice(name).get_shape()
                sizes[name.removeprefix(artifacts.PEFT_PREFIX)] = math.prod(shape)
    return sizes
