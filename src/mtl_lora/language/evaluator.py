"""One evaluation: who is asked (base model, adapter), in which words, and how a batch of questions is answered."""

from collections.abc import Callable

import torch
from transformers import GenerationConfig

import mtl_lora
from mtl_lora.adapter import checkpoint
from mtl_lora.base_model import BaseModel, choose_dtype, device_for_this_process
from mtl_lora.errors import UserError
from mtl_lora.language.batches import GPU_TOKEN_BUDGET, TOKEN_BUDGET, plan_batches
from mtl_lora.language.config import EvalConfig
from mtl_lora.language.encode import Encoder
from mtl_lora.language.generate import generate_answers
from mtl_lora.language.metrics import exact_match, extract_answer, strict_answer, token_f1
from mtl_lora.language.option_scoring import best_option, option_tails, per_token, score_options
from mtl_lora.language.peft_adapter import PeftAdapter
from mtl_lora.language.prefix_cache import OpeningCaches, shared_opening
from mtl_lora.language.questions import Question, load_questions
from mtl_lora.language.tasks import COMMONSENSE, TaskSet, load_tasks_file
from mtl_lora.memory import keep_freed_memory

_DEFAULT_TEMPLATE, _DEFAULT_CUTOFF = "alpaca", 256


class Evaluation:
    """What is evaluated, settled before a model is loaded; raises ``UserError`` for whatever cannot be."""

    def __init__(self, config: EvalConfig):
        self.config = config
        self.adapter = checkpoint.read_config(config.checkpoint) if config.checkpoint else None
        self.peft = PeftAdapter(config.peft) if config.peft else None
        origin = self.adapter.origin_config if self.adapter else checkpoint.Origin()
        base_model = config.base_model or (self.peft.base_model if self.peft else origin.base_model)
        if base_model is None:
            raise UserError(f"{config.checkpoint or config.peft} does not say its base model; pass --base_model")
        self.base_model = base_model
        _refuse_what_is_known(config, origin)
        self.template = origin.prompt_template or config.template or _DEFAULT_TEMPLATE
        self.cutoff_len = origin.cutoff_len or config.cutoff_len or _DEFAULT_CUTOFF
        self.tasks = self._tasks(origin)
        self.base_fingerprint = BaseModel(base_model).fingerprint()
        if origin.base_fingerprint and origin.base_fingerprint != self.base_fingerprint:
            raise UserError(
                f"{config.checkpoint} was trained on another base model than {base_model!r}: its fingerprint is "
                f"{origin.base_fingerprint[:12]}..., not {self.base_fingerprint[:12]}...; pass --base_model"
            )
        self.tokenizer = BaseModel(base_model, config.trust_remote_code).tokenizer()
        self.encoder = Encoder(self.tokenizer, self.template, self.cutoff_len, self.tasks)
        self.questions, self.data_hashes = load_questions(
            config.data_dir, self.tasks, config.tasks, self.encoder, config.limit
        )
        if "score" in config.protocols:
            for question in self.questions:
                option_tails(question, self.encoder)
        self.openings = self._shared_openings()
        self.model = None

    def _tasks(self, origin: checkpoint.Origin) -> TaskSet:
        config = self.config
        if origin.task_set:
            tasks = TaskSet.from_json(origin.task_set, f"the task set of {config.checkpoint}")
        else:
            tasks = load_tasks_file(config.tasks_file) if config.tasks_file else COMMONSENSE
        adapted = self.adapter.adapter_config.tasks if self.adapter else []
        if adapted and adapted != tasks.names:
            raise UserError(
                f"{config.checkpoint} has weights for the tasks {', '.join(adapted)}, in this order, and would be "
                f"asked about {', '.join(tasks.names)}; pass --tasks_file FILE that declares its tasks"
            )
        return tasks

    def _shared_openings(self) -> dict[int, list[int]]:
        """By task id, the tokens that all its prompts begin with."""
        prompts: dict[int, list[list[int]]] = {}
        for question in self.questions:
            prompts.setdefault(question.task.id, []).append(question.prompt_ids)
        return {task_id: shared_opening(rows) for task_id, rows in prompts.items()}

    @property
    def adapter_sha256(self) -> str | None:
        """The hash of the adapter's weights; None for a base model alone."""
        return self.adapter.weights_sha256 if self.adapter else self.peft.weights_sha256 if self.peft else None

    def settings(self, protocol: str) -> dict:
        """Everything that a prediction depends on; batch size and the number of processes are not part of it."""
        config = self.config
        settings = {
            "mode": protocol,
            "base_fingerprint": self.base_fingerprint,
            "adapter_sha256": self.adapter_sha256,
            "template": self.template,
            "cutoff_len": self.cutoff_len,
            "tasks_sha256": self.tasks.answers_sha256,
            "dtype": str(choose_dtype(self.config.dtype)),
        }
        if protocol == "generate":
            settings |= {"max_new_tokens": config.max_new_tokens, "num_beams": config.num_beams}
        return settings

    def batches(self) -> list[list[Question]]:
        """All questions in the batches in which they are answered, whoever answers them and whenever."""
        budget = GPU_TOKEN_BUDGET if torch.cuda.is_available() else TOKEN_BUDGET
        return plan_batches(self.questions, self.config.batch_size, budget)

    def load(self) -> None:
        """Build the model on this process's device, once."""
        if self.model is not None:
            return
        device = device_for_this_process()
        keep_freed_memory(device.type)
        model = BaseModel(self.base_model, self.config.trust_remote_code).load(self.config.dtype)
        if self.adapter:
            mtl_lora.load(model, self.config.checkpoint)
        elif self.peft:
            model = self.peft.load(model)
        # generate fills whatever it is not told (a repetition penalty, tokens to suppress) from here.
        model.generation_config = GenerationConfig()
        self.model = model.eval().to(device)
        _feed_whole_matrices(self.model.get_output_embeddings())
        self.caches = OpeningCaches(self.model) if self.config.share_opening else None

    def answer(self, questions: list[Question], protocol: str) -> list[dict]:
        """Prediction records of a batch of questions of one task."""
        answer: Callable = self._score if protocol == "score" else self._generate
        opening = self.openings[questions[0].task.id] if self.caches else []
        found = in_halves(lambda rows: answer(rows, opening), questions)
        return [_record(question, values) for question, values in zip(questions, found, strict=True)]

    def _score(self, questions: list[Question], opening: list[int]) -> list[dict]:
        pad = self.tokenizer.pad_token_id
        scores = score_options(self.model, self.encoder, questions, pad, self.caches, opening)
        return [
            {
                "parsed": best_option(question.options, values),
                "normalised": best_option(question.options, per_token(question, self.encoder, values)),
                "scores": values,
            }
            for question, values in zip(questions, scores, strict=True)
        ]

    def _generate(self, questions: list[Question], opening: list[int]) -> list[dict]:
        config = self.config
        texts = generate_answers(
            self.model, self.tokenizer, questions, config.max_new_tokens, config.num_beams, self.caches, opening
        )
        return [text_record(question, text) for question, text in zip(questions, texts, strict=True)]


def _refuse_what_is_known(config: EvalConfig, origin: checkpoint.Origin) -> None:
    """Raise ``UserError`` for a flag that the checkpoint answers itself."""
    known = {
        "template": origin.prompt_template,
        "cutoff_len": origin.cutoff_len,
        "tasks_file": origin.task_set,
    }
    for name, value in known.items():
        if value and getattr(config, name) is not None:
            raise UserError(f"--{name} goes without --checkpoint; {config.checkpoint} says it itself")


def in_halves(answer: Callable[[list], list], rows: list) -> list:
    """``answer(rows)``; rows that do not fit in a GPU's memory together are answered in halves.

    Raises ``UserError`` where a single row does not fit.
    """
    try:
        return answer(rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise UserError(
                "the GPU's memory does not hold a single question; take a larger GPU or --dtype bf16"
            ) from None
    # Outside the except block, for the error holds on to the tensors of the pass that failed.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(rows) // 2
    return in_halves(answer, rows[:middle]) + in_halves(answer, rows[middle:])


def text_record(question: Question, text: str) -> dict:
    """What is read out of a generated text, as a prediction record keeps it."""
    record = {"parsed": extract_answer(question.task, text), "text": text}
    if question.options:
        return record | {"strict": strict_answer(question.task, question.options, text)}
    return record | {"f1": token_f1(record["parsed"], question.example.answer)}


def _record(question: Question, values: dict) -> dict:
    """One line of the predictions file."""
    right, parsed = question.example.answer, values["parsed"]
    correct = parsed == right if question.options else exact_match(parsed, right)
    record = {"task": question.task.name, "index": question.example.index, "answer": right, "correct": correct}
    record |= {**values, "prompt_sha256": question.prompt_sha256}
    if "kind" in question.example.extra:
        record["kind"] = question.example.extra["kind"]
    return record


def _feed_whole_matrices(head: torch.nn.Module | None) -> None:
    """Have the output head see no slice of a larger tensor: torch would multiply it row by row on a CPU.

    generate and ``logits_to_keep=1`` cut the last position out of (B, L, k); on such a view a product by the (k, V)
    matrix copies that matrix once a row, a third of the time of an evaluation of SmolLM2-135M.
    """
    if head is not None:
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
