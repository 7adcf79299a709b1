"""Evaluation and prediction for any system: answer questions, resume after a kill, write ``results.json``.

Each answer is appended as one JSON line as soon as it is given, so a killed run can resume. Several processes share
the questions. A system's ``Evaluator`` provides the model and its answers.
"""

import abc
import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from tqdm import tqdm
from transformers import LogitsProcessor

import mtl_lora
from mtl_lora import artifacts, files
from mtl_lora.adapter.checkpoint import CheckpointConfig, Provenance, read_config
from mtl_lora.adapter.hooks import CallWatch
from mtl_lora.adapter.layer import layer_class
from mtl_lora.answer_config import AUTO
from mtl_lora.base_model import BaseModel, choose_dtype, device_for_this_process
from mtl_lora.config import Config
from mtl_lora.data_files import data_file, read_values
from mtl_lora.errors import UserError, require_package
from mtl_lora.memory import keep_freed_memory
from mtl_lora.results import Comparability, Results, TaskNames, TaskResult, Trainable
from mtl_lora.systems import BASE_KINDS
from mtl_lora.tasks import Task, TaskSet
from mtl_lora.version import __version__, checkout_commit

PARTS = "~part-*.jsonl"  # no task name begins with "~"
ADAPTER_CONFIG, BASE_CONFIG = "adapter_config_sha256", "base_config_sha256"  # in settings.json


@dataclasses.dataclass
class Question:
    """One example prepared for a model. row: the ``Encoder``'s output, where the prompt ids alone are not enough."""

    task: Task
    example: Any  # the system's own class; has ``index``, its position in the file
    prompt_ids: list[int]
    prompt_sha256: str
    row: dict = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int]:
        """(task name, example index), which is unique within an evaluation."""
        return self.task.name, self.example.index

    def answered_by(self, line: Mapping | None) -> bool:
        """Return whether a prediction line, perhaps of an earlier test set, answers exactly this prompt and target."""
        raise NotImplementedError

    def extract_again(self, line: dict) -> dict:
        """Return this question's prediction line with the answer extracted again by the current rules."""
        raise NotImplementedError


class Evaluator(abc.ABC):
    """A model with its encoder and tasks, which answers batches of questions for ``evaluate`` and ``predict``.

    adapter: the checkpoint's configuration, or None. method: name of the adapter's method, or None; method_title: the
    name that tables show.
    """

    config: Config
    system: str
    version: int  # increased when code changes give the same model and settings another answer
    # Tokens per batch with --batch_size auto; larger batches are no faster.
    token_budget, gpu_token_budget = 2048, 65536
    base_model: BaseModel
    base_fingerprint: str
    load_in_4bit: bool
    tasks: TaskSet
    cutoff_len: int
    adapter: CheckpointConfig | None
    model: torch.nn.Module | None = None  # None until it is loaded
    method: str | None = None
    method_title: str | None = None
    variant: str = ""  # of an ablation; appended to the name in tables
    comparability = Comparability()

    def read_checkpoint(self) -> Provenance:
        """Set adapter and method from ``--checkpoint``, if one is passed, and return the checkpoint's provenance.

        Raises ``UserError`` for a checkpoint of another system.
        """
        path = self.config.checkpoint
        self.adapter = read_config(path) if path else None
        if not self.adapter:
            return Provenance()
        provenance, layer = self.adapter.provenance_config, layer_class(self.adapter.adapter_config.method)
        if provenance.system != self.system:
            about = f"{path} is a checkpoint of the system {provenance.system}, not {self.system}"
            raise UserError(f"{about}; leave out --system, and the command takes the checkpoint's")
        self.method, self.method_title = layer.method, layer.title
        return provenance

    def refuse_flags(self, defined: Mapping[str, object]) -> None:
        """Raise ``UserError`` for a passed flag that the checkpoint defines. defined: its values by flag, or None."""
        for flag, value in defined.items():
            if value and getattr(self.config, flag) is not None:
                raise UserError(f"--{flag} cannot be combined with --checkpoint: {self.config.checkpoint} defines it")

    def use_tasks(self, provenance: Provenance, default: TaskSet) -> None:
        """Set the tasks: the checkpoint's, else those of ``--tasks_file``, else the default.

        Raises ``UserError`` unless they are the tasks that the adapter has weights for.
        """
        config, kind = self.config, type(default)
        if provenance.task_set:
            self.tasks = kind.from_json(provenance.task_set, f"the task set of {config.checkpoint}")
        else:
            self.tasks = kind.load(config.tasks_file) if config.tasks_file else default
        self.made_by = getattr(config, "made_by", "") if self.tasks.names == default.names else ""
        adapted = self.adapter.adapter_config.tasks if self.adapter else []
        if adapted and adapted != self.tasks.names:
            raise UserError(
                f"{config.checkpoint} has weights for the tasks {', '.join(adapted)}, in this order, but the questions "
                f"are of {', '.join(self.tasks.names)}; pass --tasks_file FILE that declares its tasks"
            )

    def use_base(self, name: str | None, provenance: Provenance) -> None:
        """Set the base model ``name``, which must be of the system's kind.

        Raises ``UserError`` for None, for a model that cannot be read here, and for one that is not the checkpoint's.
        """
        config = self.config
        if name is None:
            raise UserError(f"{config.checkpoint} does not name its base model; pass --base_model")
        base = self.base_model = BaseModel(name, config.trust_remote_code, BASE_KINDS[self.system])
        self.fitting: dict[tuple[str, str], int] = {}  # by task and protocol, the most tokens to try at once
        base.check_quantisation()
        self.load_in_4bit = provenance.load_in_4bit if config.load_in_4bit is None else config.load_in_4bit
        require_package("load_in_4bit", "bitsandbytes", self.load_in_4bit)
        self.base_fingerprint, self.base_config = base.fingerprint(), base.config_sha256()
        base.check_fingerprint(provenance.base_fingerprint, self.base_fingerprint, config.checkpoint)

    @property
    def asked_tasks(self) -> Iterable[str]:
        """Names of the tasks to answer, as far as they are known before the model is loaded."""
        return self.tasks.names

    @staticmethod
    def note(lines: Iterable[str]) -> None:
        """Print lines on stderr, from the first process only."""
        if int(os.environ.get("RANK", "0")) == 0:
            print(*(f"{line}\n" for line in lines), sep="", end="", file=sys.stderr)

    def check_unchanged(self) -> None:
        """Raise ``UserError`` if the base model or the checkpoint changed after their hashes were read, since answers
        are recorded under these hashes."""
        self.base_model.check_unchanged(self.base_fingerprint)
        if self.adapter and read_config(self.config.checkpoint) != self.adapter:
            raise UserError(f"{self.config.checkpoint} was replaced meanwhile; run the same command again")

    def settings(self, protocol: str) -> dict:
        """Every setting that an answer depends on; the batch size and the number of processes are not among them.

        protocol: how questions are answered, or a name for a mixture of protocols.
        """
        return {
            "mode": protocol,
            "protocol": self.version,
            "base_fingerprint": self.base_fingerprint,
            "adapter_sha256": self.adapter.weights_sha256 if self.adapter else None,
            "cutoff_len": self.cutoff_len,
            "tasks_sha256": self.tasks.answers_sha256,
            "dtype": str(choose_dtype(self.config.dtype)),
        } | ({"load_in_4bit": True} if self.load_in_4bit else {})

    def recorded_settings(self, protocol: str) -> dict:
        """The content of ``settings.json``: ``settings`` and the hashes of base model and adapter configuration."""
        own, recorded = self.adapter_json(), self.settings(protocol) | {BASE_CONFIG: self.base_config}
        if own is None:
            return recorded
        own = own.get("adapter", own)  # a PEFT configuration has no key "adapter"
        # The base model is identified by its fingerprint, not by its name.
        own = json.dumps({**own, "base_model_name_or_path": None}, sort_keys=True)
        return recorded | {ADAPTER_CONFIG: files.sha256_of(own.encode())}

    def load(self) -> None:
        """Build the model and move it to this process's device; does nothing if it is loaded already."""
        if self.model is not None:
            return
        if self.adapter:
            self.note(self.adapter.provenance_config.untrained_note(self.asked_tasks))
        device = device_for_this_process()
        keep_freed_memory(device.type)
        model = self.build()
        if self.adapter:
            mtl_lora.load(model, self.config.checkpoint)
        self.check_unchanged()
        self.model = model.eval().to(device)
        for layer in mtl_lora.adapter_layers(self.model).values():
            layer.keep_constants()
        self._watch_first_forward()

    def _watch_first_forward(self) -> None:
        """Note adapter layers that the first forward does not call, such as those that a fused kernel bypasses."""
        watch = CallWatch(self.model)

        def end(*_) -> None:
            first.remove()
            if unused := watch.end():
                about = "has no effect here, because this model does not call it"
                self.note([f"{unused} {about}, so the answers are not those of the whole adapter"])

        first = self.model.register_forward_hook(end)

    def structure(self) -> torch.nn.Module:
        """The model that ``build`` returns, on the meta device: every module and shape, but no memory."""
        return self.base_model.structure()

    @abc.abstractmethod
    def build(self) -> torch.nn.Module:
        """Return the base model with its weights, into which ``load`` injects the checkpoint's adapter."""

    def batches(self, questions: Sequence[Question], protocol: str) -> list[list[Question]]:
        """The batches in which questions are answered; they do not depend on the process or on resuming."""
        budget = self.gpu_token_budget if torch.cuda.is_available() else self.token_budget
        length = functools.partial(self.tokens, protocol=protocol)
        return plan_batches(questions, self.config.batch_size, budget, length)

    def tokens(self, question: Question, protocol: str) -> int:
        """The tokens that a question uses of a batch's budget; also the measure of its GPU memory."""
        return len(question.prompt_ids)

    def in_halves(self, answer: Callable[[list], list], questions: Sequence[Question], protocol: str) -> list[dict]:
        """Return ``answer(questions)`` for one batch; if it does not fit in the GPU's memory, answer it in halves.

        A number of tokens that did not fit is not tried again for other batches of the same task and protocol. Raises
        ``UserError`` where a single question does not fit.
        """
        questions, key = list(questions), (questions[0].task.name, protocol)
        size = len(questions) * max(self.tokens(each, protocol) for each in questions)
        if len(questions) == 1 or size <= self.fitting.get(key, size):
            try:
                return answer(questions)
            except torch.OutOfMemoryError:
                if len(questions) == 1:
                    way_out = "use a larger GPU or --dtype bf16"
                    raise UserError(f"the GPU's memory does not hold a single question; {way_out}") from None
            # Outside the except block, because the error keeps the tensors of the failed forward pass alive.
            self.fitting[key] = size // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        halves = questions[: len(questions) // 2], questions[len(questions) // 2 :]
        return [line for half in halves for line in self.in_halves(answer, half, protocol)]

    @abc.abstractmethod
    def answer(self, questions: Sequence[Question], protocol: str) -> list[dict]:
        """Return the prediction lines of a batch of questions; the model must be loaded."""

    @abc.abstractmethod
    def task_result(self, task: Task, lines: Sequence[dict]) -> TaskResult:
        """Return one task's result from at least one prediction line."""

    def to_predict(self, values: Sequence[object], source: str, task: str | None) -> dict[str, list[Question]]:
        """Return the questions for JSON examples, by the protocol that answers them.

        task: the task of examples that name none. Raises ``UserError`` naming ``source`` and the example.
        """
        raise NotImplementedError

    def result(self, question: Question, line: Mapping) -> dict:
        """Return the result of ``predict`` for one example, from its prediction line."""
        return result_of(question, line, question.task.labels)

    def complete(self, questions: Sequence[Question], lines: Mapping[tuple[str, int], dict]) -> dict:
        """Return the lines of all questions, with the scores that depend on the other questions of a task added."""
        return dict(lines)

    def trainable(self) -> Trainable | None:
        """The number of adapter parameters and of all model parameters; None without an adapter."""
        if not self.adapter:
            return None
        return Trainable(*mtl_lora.trainable_parameters(mtl_lora.inject(self.structure(), self.adapter.adapter_config)))

    def adapter_json(self) -> dict | None:
        """The adapter's own description."""
        return self.adapter.to_json() if self.adapter else None

    def results_settings(self, protocol: str) -> dict:
        """Settings that ``results.json`` records in addition to ``settings``."""
        return {}

    def questions(self, examples: Sequence, source: str | Path) -> list[Question]:
        """Return examples as questions; raises ``UserError`` naming ``source`` and the example."""
        raise NotImplementedError

    def finish(self, asked: "QuestionSets", results: dict[str, Results]) -> None:  # noqa: B027
        """Write whatever else belongs beside the results; called in the first process."""


# ---- questions ----


@dataclasses.dataclass
class QuestionSets:
    """The questions to answer. source: absolute path of the folder with the test files; sha256: hash of each task's
    test file; sizes: number of examples in each task's test file."""

    source: str
    questions: list = dataclasses.field(default_factory=list)
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)


def load_questions(evaluator: Evaluator, load: Callable[..., list], chosen: Sequence[str] = ()) -> QuestionSets:
    """Read ``data_dir/<task>/test.json`` (or .jsonl, .csv ...) of the tasks ``--tasks``, else ``chosen``, else all.

    load: ``(path, tasks, task name, closed=True) -> examples``. Raises ``UserError`` for an unknown task, a missing
    file and a broken example.
    """
    config, tasks = evaluator.config, evaluator.tasks
    found = QuestionSets(str(Path(config.data_dir).resolve()))
    for task in [tasks[name] for name in dict.fromkeys(config.tasks or chosen)] or list(tasks):
        path = data_file(Path(config.data_dir) / task.name, "test")
        if not path.is_file():
            raise UserError(
                f"there is no test file {path}; "
                + (f"make it with `{evaluator.made_by}`, or " if evaluator.made_by else "")
                + "pass --data_dir DIR, or --tasks with the tasks that have one"
            )
        with files.unchanged(path) as digest:
            examples = load(path, tasks, task.name, closed=True)
        found.sha256[task.name], found.sizes[task.name] = digest, len(examples)
        found.questions += evaluator.questions(examples[: config.limit or None], path)
    return found


def plan_batches(
    questions: Sequence[Question],
    batch_size: int | str,
    token_budget: int,
    length: Callable[[Question], int],
) -> list[list[Question]]:
    """Split questions into batches of at most ``batch_size`` questions, or with ``auto`` of ``token_budget`` tokens.

    A batch has questions of one task, sorted by length (longest first), so they share a prompt prefix and need little
    padding. Every batch has at least one question. The order of ``questions`` does not matter. length: returns the
    number of tokens of a question.
    """
    batches = []
    by_task: dict[int, list[Question]] = {}
    for question in questions:
        by_task.setdefault(question.task.id, []).append(question)
    for rows in by_task.values():
        rows.sort(key=lambda question: (-length(question), question.key))
        start = 0
        while start < len(rows):
            longest = length(rows[start])
            size = max(token_budget // longest, 1) if batch_size == AUTO else batch_size
            batches.append(rows[start : start + size])
            start += size
    return batches


def not_finite(what: str) -> UserError:
    """Return the error for values that are not finite; what: names them, such as "question 3 has the scores ..."."""
    return UserError(
        f"{what}, which are not finite: the base model or the adapter contains NaN or infinite values, or the range of "
        "its dtype is too small; see the training's log, or pass --dtype fp32"
    )


def likeliest(question: Question, scores: Sequence[float]) -> int:
    """Return the index of the highest score, the first of equal ones; raises ``UserError`` unless all are finite."""
    if not all(map(math.isfinite, scores)):
        raise not_finite(f"question {question.key[1]} of {question.task.name} has the scores {list(scores)}")
    return max(range(len(scores)), key=scores.__getitem__)


class NotANumber(LogitsProcessor):
    """Remembers whether any logit was NaN; the flag stays on the GPU, so that tokens need no synchronisation."""

    found: torch.Tensor | bool = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.found = self.found | scores.isnan().any()
        return scores


# ---- evaluate and predict ----


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


class Predictor:
    """Answers examples from Python; the model is loaded with the first of them.

    A system's subclass names its ``Evaluator`` and ``AnswerConfig``, and the ``field`` that an example given as a
    plain string stands for.
    """

    evaluator_class: type[Evaluator]
    config_class: type[Config]
    field: str

    def __init__(self, checkpoint: str | Path | None = None, **flags):
        path = None if checkpoint is None else str(checkpoint)
        self.evaluator = self.evaluator_class(self.config_class(checkpoint=path, **flags))

    def predict(self, examples: Sequence[Mapping | str], task: str | None = None, **how: object) -> list[dict]:
        """Return one result per example, in order. An example that is a string has only ``field``. task: the task of
        examples that name none."""
        if isinstance(examples, str | Mapping):
            raise UserError("predict takes a list of examples, not a single one; pass [example]")
        values = [{self.field: example} if isinstance(example, str) else example for example in examples]
        values = [dict(value) if isinstance(value, Mapping) else value for value in values]
        questions = self.evaluator.to_predict(values, "the examples", task, **how)
        if any(questions.values()):
            self.evaluator.load()
        answered = []
        for protocol, part in questions.items():
            for batch in self.evaluator.batches(part, protocol):
                answered += zip(batch, self.evaluator.answer(batch, protocol), strict=True)
        answered.sort(key=lambda pair: pair[0].key[1])
        return [self.evaluator.result(*pair) for pair in answered]


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
    if config.check:
        print(f"every setting is fine; {len(everything):,} examples", file=sys.stderr)
        return
    with Processes() as processes:
        if config.overwrite or not is_answered(partial, everything):
            evaluator.load()  # may fail, so it comes before anything is deleted or written
        processes.barrier()  # the first process changes the folder only after all others have read it
        if processes.rank == 0:
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


def inputs(parse: Callable, values: Sequence[object], source: str, tasks: TaskSet, task: str | None) -> list:
    """Parse JSON values into examples to predict. parse: the system's ``parse_example``; task: the task of examples
    that name none."""
    if task is not None:
        tasks[task]  # report an unknown task as an error of the flag, not of an example
    return [parse(value, index, source, tasks, task, answered=False) for index, value in enumerate(values)]


def result_of(question: Question, line: Mapping, labels: Sequence[str], **shown: object) -> dict:
    """Return the result of ``predict`` for one example, from its prediction line.

    Its keys are ``index`` (the example's position in the input), the fields ``shown``, the example's extra fields
    unless they have the name of a key of the result, ``task`` and ``answer``. Scored labels add ``scores`` and
    ``probabilities`` by label; a generated answer adds its whole ``text``.
    """
    example = question.example
    extra = {key: entry for key, entry in example.extra.items() if key not in ("index", "scores", "probabilities")}
    result = {"index": example.index, **shown, **extra, "task": question.task.name, "answer": line["parsed"]}
    if "scores" not in line:
        return result | {key: line[key] for key in ("text",) if key in line}
    probabilities = torch.tensor(line["scores"], dtype=torch.float64).softmax(dim=0).tolist()
    by_label = {"scores": line["scores"], "probabilities": probabilities}
    return result | {name: dict(zip(labels, each, strict=True)) for name, each in by_label.items()}


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
    by_task: dict[str, list[Question]] = {}
    for question in asked.questions:
        by_task.setdefault(question.task.name, []).append(question)
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


# ---- answers on disk, written by several processes, resumed after a kill ----


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


def is_answered(folder: str | Path, questions: Sequence[Question]) -> bool:
    """Return whether every question has an answer in ``folder``."""
    found = Predictions(folder).read()
    return all(question.answered_by(found.get(question.key)) for question in questions)


def answer_all(
    evaluator: Evaluator, protocol: str, questions: Sequence[Question], folder: str | Path, processes: Processes
) -> None:
    """Answer the questions without a prediction line in ``folder`` and append their lines; the processes share them.

    If one line of a batch is missing, the whole batch is answered, so scores do not depend on where a run was killed.
    """
    predictions = Predictions(folder, processes.rank)
    found = predictions.read()
    done = {question.key for question in questions if question.answered_by(found.get(question.key))}
    processes.barrier()  # no process appends before all have read
    waiting = [batch for batch in evaluator.batches(questions, protocol) if any(one.key not in done for one in batch)]
    if processes.rank == 0 and (kept := len(questions) - sum(map(len, waiting))):
        print(f"{kept:,} answers in {folder} are kept; pass --overwrite True to replace them", file=sys.stderr)
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
        parts = set(self.folder.glob(PARTS))
        gathered = sorted(set(self.folder.glob("*.jsonl")) - parts)
        for path in [*gathered, *sorted(parts)]:
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


def require_own_settings(folder: str | Path) -> None:
    """Raise ``UserError`` if the folder has another program's ``settings.json``, which would be overwritten."""
    path = Path(folder) / artifacts.EVAL_SETTINGS
    if path.exists() and "base_fingerprint" not in files.read_object(path, "the settings of an earlier evaluation"):
        raise UserError(f"{path} was not written by an evaluation; choose another output, or delete it")


def check_settings(folder: str | Path, settings: dict, way_out: str) -> None:
    """Raise ``UserError`` naming the settings that differ if a folder holds answers given under other settings."""
    path = Path(folder) / artifacts.EVAL_SETTINGS
    if not any((Path(folder) / artifacts.PREDICTIONS).glob("*.jsonl")):
        return
    if not path.exists():
        raise UserError(f"{folder} holds answers without their {path.name}; {way_out}")
    # Earlier versions did not record these keys.
    missing = {"protocol": 1} | {key: settings[key] for key in (ADAPTER_CONFIG, BASE_CONFIG) if key in settings}
    earlier = missing | files.read_object(path, "the settings of an earlier evaluation")
    different = sorted(key for key in earlier.keys() | settings.keys() if earlier.get(key) != settings.get(key))
    if different:
        raise UserError(f"{folder} holds answers given with another {', '.join(different)}; {way_out}")


def begin(folder: str | Path, settings: dict, overwrite: bool) -> None:
    """Prepare a folder, already checked, for answers under ``settings``. overwrite: delete the evaluation in it."""
    if overwrite:
        artifacts.remove_evaluation(folder)
    predictions = Predictions(folder)
    for left in predictions.folder.glob(".*.partial"):  # temporary files of a killed evaluation
        left.unlink()
    # Gather the files that the processes of a killed evaluation left: this launch may divide the questions in another
    # way, and the order of the files decides which of two lines for a question counts.
    if any(predictions.folder.glob(PARTS)):
        predictions.gather(predictions.read(), {})
    files.write_json(Path(folder) / artifacts.EVAL_SETTINGS, settings)
