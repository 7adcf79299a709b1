"""What a system provides for its evaluation: questions, and an ``Evaluator`` that answers them in batches."""

import abc
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

import mtl_lora
from mtl_lora import files
from mtl_lora.adapter.checkpoint import CheckpointConfig, Provenance, read_config
from mtl_lora.adapter.hooks import CallWatch
from mtl_lora.adapter.layer import layer_class
from mtl_lora.answer_config import AUTO
from mtl_lora.base_model import LOADING, BaseModel, choose_dtype, device_for_this_process
from mtl_lora.config import Config
from mtl_lora.data_files import data_file
from mtl_lora.errors import UserError, note, require_package
from mtl_lora.memory import keep_freed_memory
from mtl_lora.results import Comparability, Results, TaskResult, Trainable
from mtl_lora.systems import SYSTEMS
from mtl_lora.tasks import Task, TaskSet, grouped

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

    @property
    def options(self) -> Sequence[str]:
        """The answers that can be scored; empty if there are none."""
        return self.task.labels

    @property
    def target(self) -> dict:
        """The keys of a prediction line that say what is right."""
        return {"answer": self.example.answer}

    def answered_by(self, line: Mapping | None) -> bool:
        """Return whether a prediction line, perhaps of an earlier test set, answers exactly this prompt and target."""
        said = line and line.get("text", line.get("parsed"))
        expected = self.target | {"prompt_sha256": self.prompt_sha256}
        return isinstance(said, str | float) and {key: line.get(key) for key in expected} == expected

    def extract_again(self, line: dict) -> dict:
        """Return this question's prediction line with the answer extracted again by the current rules."""
        raise NotImplementedError


def shortened_note(questions: Sequence[Question]) -> list[str]:
    """Return a line that says how many questions lost tokens to the cutoff; empty if none did."""
    cut = sum(getattr(question, "row", {}).get("removed", 0) > 0 for question in questions)  # images have no row
    return [f"{cut:,} of {len(questions):,} questions are longer than the cutoff and were shortened"] if cut else []


@dataclasses.dataclass
class QuestionSets:
    """The questions to answer. source: absolute path of the folder with the test files; sha256: hash of each task's
    test file; sizes: number of examples in each task's test file."""

    source: str
    questions: list = dataclasses.field(default_factory=list)
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)


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
    default_cutoff_len: int  # where neither a checkpoint nor the flags set one

    def __init__(self, config: Config, base_model: str | None = None):
        """Check the settings and read the tasks and the base model, whose name may be elsewhere than in a checkpoint.

        Raises ``UserError`` for a flag that the checkpoint defines.
        """
        self.config = config
        origin = self.origin = self.read_checkpoint()
        defined = {"template": origin.prompt_template, "cutoff_len": origin.cutoff_len, "tasks_file": origin.task_set}
        for flag, value in defined.items():
            if value and getattr(config, flag, None) is not None:
                raise UserError(f"--{flag} cannot be combined with --checkpoint: {config.checkpoint} defines it")
        self.use_tasks(origin)
        self.cutoff_len = origin.cutoff_len or config.cutoff_len or self.default_cutoff_len
        self.use_base(config.base_model or base_model or origin.base_model, origin)

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

    def use_tasks(self, provenance: Provenance) -> None:
        """Set the tasks: the checkpoint's, else those of ``--tasks_file``, else the default ones.

        Raises ``UserError`` unless they are the tasks that the adapter has weights for.
        """
        config, default = self.config, self.config.default_tasks
        if provenance.task_set:
            self.tasks = type(default).from_json(provenance.task_set, f"the task set of {config.checkpoint}")
        else:
            self.tasks = type(default).load(config.tasks_file) if config.tasks_file else default
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
            raise UserError(f"{config.adapter} does not name its base model; pass --base_model")
        base = self.base_model = BaseModel(name, config.trust_remote_code, SYSTEMS[self.system])
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
        with LOADING:  # several threads may ask for the first answers
            if self.model is None:
                try:
                    self._load()
                except BaseException:  # the next call loads it anew, with all that comes after the model
                    self.model = None
                    raise

    def _load(self) -> None:
        if self.adapter:
            note(*self.adapter.provenance_config.untrained_note(self.asked_tasks))
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
                note(f"{unused} {about}, so the answers are not those of the whole adapter")

        first = self.model.register_forward_hook(end)

    def structure(self) -> torch.nn.Module:
        """The model that ``build`` returns, on the meta device: every module and shape, but no memory."""
        return self.base_model.structure()

    @abc.abstractmethod
    def build(self) -> torch.nn.Module:
        """Return the base model with its weights, into which ``load`` injects the checkpoint's adapter."""

    def batches(self, questions: Sequence[Question], protocol: str) -> list[list[Question]]:
        """The batches in which questions are answered; they do not depend on the process or on resuming.

        A batch has questions of one task, the longest first, so they share a prompt prefix and need little padding: at
        most ``batch_size`` questions, or with ``auto`` a budget of tokens, but at least one question.
        """
        budget = self.gpu_token_budget if torch.cuda.is_available() else self.token_budget
        batches, size = [], self.config.batch_size
        for rows in grouped(questions, lambda question: question.task.id).values():
            rows.sort(key=lambda question: (-self.tokens(question, protocol), question.key))
            start = 0
            while start < len(rows):
                end = start + (max(budget // self.tokens(rows[start], protocol), 1) if size == AUTO else size)
                batches.append(rows[start:end])
                start = end
        return batches

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

    def result(self, question: Question, line: Mapping, **shown: object) -> dict:
        """Return the result of ``predict`` for one example, from its prediction line.

        Its keys are ``index`` (the example's position in the input), the fields ``shown``, the example's extra fields
        unless they have the name of a key of the result, ``task`` and ``answer``. Scored options add ``scores`` and
        ``probabilities`` by option; a generated answer adds its whole ``text``.
        """
        example = question.example
        extra = {key: entry for key, entry in example.extra.items() if key not in ("index", "scores", "probabilities")}
        result = {"index": example.index, **shown, **extra, "task": question.task.name, "answer": line["parsed"]}
        if "scores" not in line:
            return result | {key: line[key] for key in ("text",) if key in line}
        probabilities = torch.tensor(line["scores"], dtype=torch.float64).softmax(dim=0).tolist()
        both = {"scores": line["scores"], "probabilities": probabilities}
        return result | {name: dict(zip(question.options, each, strict=True)) for name, each in both.items()}

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

    def finish(self, asked: QuestionSets, results: dict[str, Results]) -> None:  # noqa: B027
        """Write whatever else belongs beside the results; called in the first process."""


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
            made = f"make it with `{config.made_by}`, or " if tasks.names == config.default_tasks.names else ""
            own = "" if config.checkpoint or config.tasks_file else "--tasks_file FILE for your own tasks, "
            way_out = f"{made}pass {own}--data_dir DIR, or --tasks with the tasks that have one"
            raise UserError(f"there is no test file {path}; {way_out}")
        with files.unchanged(path) as digest:
            examples = load(path, tasks, task.name, closed=True)
        found.sha256[task.name], found.sizes[task.name] = digest, len(examples)
        found.questions += evaluator.questions(examples[: config.limit or None], path)
    return found


def inputs(parse: Callable, values: Sequence[object], source: str, tasks: TaskSet, task: str | None) -> list:
    """Parse JSON values into examples to predict. parse: the system's ``parse_example``; task: the task of examples
    that name none."""
    if task is not None:
        tasks[task]  # report an unknown task as an error of the flag, not of an example
    return [parse(value, index, source, tasks, task, answered=False) for index, value in enumerate(values)]


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


class _NotANumber(LogitsProcessor):
    """Remembers whether any logit was NaN; the flag stays on the GPU, so that tokens need no synchronisation."""

    found: torch.Tensor | bool = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.found = self.found | scores.isnan().any()
        return scores


def generate(
    model: PreTrainedModel, task: Task, inputs: Mapping[str, object], task_ids: torch.Tensor, **settings
) -> torch.Tensor:
    """Return the ids that ``model.generate(**inputs)`` gives, greedily or by beam search, never by sampling.

    settings: of transformers' ``GenerationConfig``. Raises ``UserError`` for NaN logits.
    """
    # A fresh configuration, because the base model's own may turn on sampling.
    fresh, seen = GenerationConfig(do_sample=False, use_cache=True, **settings), _NotANumber()
    with mtl_lora.route.use(task_ids):
        output = model.generate(**inputs, generation_config=fresh, logits_processor=[seen])
    if bool(seen.found):
        raise not_finite(f"the model gives logits for questions of {task.name}")
    return output
