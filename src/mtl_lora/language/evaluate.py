"""``mtl-lora evaluate`` and ``predict`` for language models: by generated text, by the likeliest option, or by both."""

import collections
import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import safetensors
from transformers import GenerationConfig, PreTrainedModel

from mtl_lora import artifacts, evaluation, files
from mtl_lora.errors import UserError, note, within
from mtl_lora.evaluation import likeliest, load_questions
from mtl_lora.language import answering
from mtl_lora.language.config import PROTOCOLS, AnswerConfig, EvalConfig, PredictConfig, TrainConfig
from mtl_lora.language.encode import Encoder
from mtl_lora.language.examples import Example, load_examples, parse_example
from mtl_lora.language.tasks import Task, extract_answer, strict_answer
from mtl_lora.metrics import same_text, text_f1
from mtl_lora.results import Results, TaskResult, Trainable, measure
from mtl_lora.tasks import grouped


class Question(evaluation.Question):
    """One example prepared for a model."""

    @property
    def options(self) -> tuple[str, ...]:
        """The answers that this question allows; empty for free text."""
        return self.task.options_of(self.example.instruction)

    def answer_in(self, text: str) -> dict:
        """The answer fields of a prediction line, extracted from generated text."""
        answer = {"parsed": extract_answer(self.task, text), "text": text}
        if self.options:
            return answer | {"strict": strict_answer(self.task, self.options, text)}
        return answer | {"f1": text_f1(answer["parsed"], self.example.answer)}

    def line(self, answer: Mapping) -> dict:
        """The question's prediction line: the target as ``answer``, whether it was met, and the given answer's fields.

        answer: the result of ``answer_in`` or, from scoring, ``parsed``, ``normalised`` (the length-normalised choice)
        and ``scores``.
        """
        target, parsed = self.example.answer, answer["parsed"]
        as_written = self.options or self.task.metric_name == "accuracy"
        correct = parsed == target if as_written else same_text(parsed, target)
        line = {"task": self.task.name, "index": self.example.index, "answer": target, "correct": correct}
        line |= {**answer, "prompt_sha256": self.prompt_sha256}
        if "kind" in self.example.extra:
            line["kind"] = self.example.extra["kind"]
        return line

    def extract_again(self, line: dict) -> dict:
        """A line of this question, with its answer extracted again by today's rules, or kept if it was scored."""
        if "text" in line:
            return self.line(self.answer_in(line["text"]))
        return self.line({key: line[key] for key in ("parsed", "normalised", "scores") if key in line})


class Evaluator(evaluation.Evaluator):
    """A language model, its prompt template and its tasks.

    All settings are checked before the model is loaded; raises ``UserError`` for invalid ones.

    adapter: the checkpoint's configuration; peft: the PEFT adapter; both are None for a base model alone. method,
    method_title: the adapter's method and its title in tables, or None. template, cutoff_len, tasks: the checkpoint's,
    else those of the flags.
    """

    system, version, default_cutoff_len = "language", 1, TrainConfig.cutoff_len
    one_by_one = False  # True for a model whose answers padding changes

    def __init__(self, config: AnswerConfig):
        self.peft = PeftAdapter(config.peft) if config.peft else None
        super().__init__(config, self.peft and self.peft.base_model)
        if self.peft:
            self.method, self.method_title = "peft_lora", "LoRA (PEFT)"
        self.template = self.origin.prompt_template or config.template or TrainConfig.template
        tokenizer = self.base_model.tokenizer()
        tokenizer.chat_template = self.origin.chat_template or tokenizer.chat_template
        self.encoder = Encoder(tokenizer, self.template, self.cutoff_len, self.tasks)
        self.prefixes: dict[int, list[int]] = {}
        self.caches: answering.PrefixCaches | None = None
        self.scorer: answering.OptionScorer | None = None

    def settings(self, protocol: str) -> dict:
        settings = super().settings(protocol) | {"template": self.template}
        if self.peft:
            settings["adapter_sha256"] = self.peft.weights_sha256
        if protocol != "score":
            settings |= {"max_new_tokens": self.config.max_new_tokens, "num_beams": self.config.num_beams}
        return settings

    def prepare(self, questions: Mapping[str, Sequence[Question]]) -> None:
        """Check the questions of each protocol, and find the prompt prefix that the questions of each task share."""
        for question in questions.get("score", ()):
            answering.continuations(question, self.encoder)
        more = self.config.max_new_tokens
        written = (len(each.prompt_ids) + more for each in questions.get("generate", ()))
        way_out = f"a prompt and --max_new_tokens {more}; lower it"
        self.base_model.check_positions(max(written, default=0), way_out)
        self._note_long_answers(questions.get("generate", ()))
        reserves = self.encoder.reserves
        scored = (len(each.prompt_ids) + reserves[each.task.id] for each in questions.get("score", ()))
        way_out = "a prompt and an option; pass a smaller --cutoff_len"
        self.base_model.check_positions(max(scored, default=0), way_out)
        by_task = grouped(itertools.chain(*questions.values()), lambda question: question.task.id)
        prompts = {task_id: [each.prompt_ids for each in part] for task_id, part in by_task.items()}
        self.prefixes = {task_id: answering.shared_prefix(rows) for task_id, rows in prompts.items()}
        if self.caches is not None:
            self.caches.use(self.prefixes)

    def _note_long_answers(self, questions: Sequence[Question]) -> None:
        """Note each task with questions whose answer has more tokens than are generated."""
        most, found = self.config.max_new_tokens, collections.Counter()
        for each in questions:
            prefix = each.task.answer_prefix if each.options else ""
            answers = [each.example.answer] if each.example.answer else each.options
            # An answer is complete even if there is no room left for the token that ends it.
            found[each.task.name] += any(len(self.encoder.answer_ids(prefix + text)) - 1 > most for text in answers)
        for name, count in (+found).items():
            note(
                f"{count:,} questions of {name} have an answer with more tokens than --max_new_tokens {most}, which "
                "therefore cannot be generated in full; raise it"
            )

    def questions(self, examples: Sequence[Example], source: str | Path) -> list[Question]:
        """Encode examples as questions; raises ``UserError`` naming ``source`` and the example."""
        with within(source, ", "):
            prompts = self.encoder.encode(examples, with_answers=False)
        found = []
        for example, encoded in zip(examples, prompts, strict=True):
            digest, row = files.sha256_of(str(encoded.prompt_ids).encode()), {"removed": encoded.removed}
            found.append(Question(self.tasks[example.task_id], example, encoded.prompt_ids, digest, row))
        return found

    def to_predict(
        self, values: Sequence[object], source: str, task: str | None, mode: str | None = None
    ) -> dict[str, list[Question]]:
        if mode not in (None, *PROTOCOLS):
            raise UserError(f"mode must be one of {', '.join(PROTOCOLS)}, or None, not {mode!r}")
        examples = evaluation.inputs(parse_example, values, source, self.tasks, task)
        found = self.questions(examples, source) if examples else []
        by_protocol = grouped(found, lambda each: mode or ("score" if each.options else "generate"))
        self.prepare(by_protocol)
        return by_protocol

    @property
    def asked_tasks(self) -> Iterable[str]:
        return [self.tasks[task_id].name for task_id in self.prefixes]

    def build(self) -> PreTrainedModel:
        model = self.base_model.load(self.config.dtype, self.load_in_4bit)
        if self.peft:
            model = self.peft.load(model)
        # generate reads every setting it is not given (a repetition penalty, tokens to suppress) from here.
        model.generation_config = GenerationConfig()
        return model

    def check_unchanged(self) -> None:
        super().check_unchanged()
        if self.peft and not self.peft.is_unchanged():
            raise UserError(f"{self.config.peft} was replaced while the model was loading; run the same command again")

    def _load(self) -> None:
        super()._load()
        head = self.model.get_output_embeddings()
        if head is not None:
            # generate and ``logits_to_keep=1`` slice the last position out of (B, L, k). A CPU multiplies such a view
            # by the (k, V) matrix row by row and copies the matrix each time: a third of an evaluation of SmolLM2-135M.
            head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
        tokenizer, task_id = self.encoder.tokenizer, next(iter(self.tasks)).id
        probe = tokenizer("What is read first?")["input_ids"]
        self.one_by_one = answering.reads_padding(self.model, probe, tokenizer.pad_token_id, task_id)
        if self.one_by_one:
            name = type(self.model).__name__
            note(f"{name} does not ignore the padding before shorter rows, so questions are answered one by one")
        if self.config.reuse_prefix:
            self.caches = answering.PrefixCaches(self.model, self.prefixes, padded=not self.one_by_one)
        self.scorer = answering.OptionScorer(self.model, self.encoder, self.caches)

    def tokens(self, question: Question, protocol: str) -> int:
        prompt = len(question.prompt_ids)
        if protocol != "score":
            return prompt * self.config.num_beams
        return max(prompt, sum(len(self.encoder.option_ids(question.task, option)) for option in question.options))

    def answer(self, questions: Sequence[Question], protocol: str) -> list[dict]:
        """The prediction lines of a batch of questions of one task, with the model loaded."""
        way = self._score if protocol == "score" else self._generate
        parts = [[question] for question in questions] if self.one_by_one else [questions]
        answers = [each for part in parts for each in self.in_halves(way, part, protocol)]
        return [question.line(answer) for question, answer in zip(questions, answers, strict=True)]

    @staticmethod
    def task_result(task: Task, lines: Sequence[dict]) -> TaskResult:
        """The result of ``results.measure``, and what ``Question.line`` gives besides:

        - unparsed: the proportion of texts from which no answer was extracted.
        - strict (generated options): the metric and ``unparsed`` if the whole text must be the answer.
        - acc_norm (scored options): the metric of the length-normalised choice.
        - f1 (free text): the mean token F1.
        """

        def measured(key: str, **more: float) -> TaskResult:
            unparsed = sum(line[key] == "" for line in lines) / len(lines)
            return measure(task.metric_name, lines, task.options, key, unparsed=unparsed, **more)

        f1 = {"f1": statistics.fmean(line["f1"] for line in lines)} if all("f1" in line for line in lines) else {}
        keys = {"strict": "strict", "acc_norm": "normalised"}
        others = {name: measured(key) for name, key in keys.items() if all(key in line for line in lines)}
        result = measured("parsed", **f1)
        return dataclasses.replace(result, others=result.others | others)

    def trainable(self) -> Trainable | None:
        if not self.peft:
            return super().trainable()
        own, base = _sizes(self.peft.weights), _sizes(*self.base_model.weight_files())
        # A module that is trained and saved in full replaces the base model's module of the same name.
        return Trainable(sum(own.values()), sum((base | own).values()))

    def adapter_json(self) -> dict | None:
        return self.peft.settings if self.peft else super().adapter_json()

    def results_settings(self, protocol: str) -> dict:
        return {} if protocol == "score" else {"extraction": max(task.extraction for task in self.tasks)}

    def finish(self, asked: evaluation.QuestionSets, results: dict[str, Results]) -> None:
        """Of two protocols, write the proportion of questions to which both give the same answer."""
        if len(results) < 2:
            return
        first, second = (evaluation.Predictions(self.config.protocols[protocol]).read() for protocol in results)
        keys = [question.key for question in asked.questions if question.key in first and question.key in second]
        same = {key: first[key]["parsed"] == second[key]["parsed"] for key in keys}
        by_task = grouped(keys, lambda key: key[0])
        tasks = {task: sum(same[key] for key in own) / len(own) for task, own in by_task.items()}
        value = {"tasks": tasks, "all": sum(same.values()) / len(same), "n": len(same)}
        files.write_json(Path(self.config.output_folder) / artifacts.AGREEMENT, value)

    def _score(self, questions: Sequence[Question]) -> list[dict]:
        scores = self.scorer.scores(questions)
        answers = []
        for question, values in zip(questions, scores, strict=True):
            normalised = answering.per_token(question, self.encoder, values)
            best, best_normalised = (question.options[likeliest(question, each)] for each in (values, normalised))
            answers.append({"parsed": best, "normalised": best_normalised, "scores": values})
        return answers

    def _generate(self, questions: Sequence[Question]) -> list[dict]:
        limits = self.config.max_new_tokens, self.config.num_beams
        texts = answering.generate_answers(self.model, self.encoder, questions, *limits, self.caches)
        return [question.answer_in(text) for question, text in zip(questions, texts, strict=True)]


def run(config: EvalConfig) -> dict[str, Results]:
    """Evaluate as ``config`` says, see ``evaluation.evaluate``.

    With ``mode="both"`` each protocol has its own folder and results, and ``agreement.json`` beside them says how often
    the protocols agree.
    """
    evaluator = Evaluator(config)
    asked = load_questions(evaluator, load_examples)
    questions = dict.fromkeys(config.protocols, asked.questions)
    if config.mode == "both":
        questions["score"] = [question for question in asked.questions if question.options]
    # If all tasks are free text, there is nothing to score.
    questions = {protocol: part for protocol, part in questions.items() if part}
    evaluator.prepare(questions)
    return evaluation.evaluate(evaluator, asked, questions)


# ---- prediction ----


class Predictor(evaluation.Predictor):
    """Answers examples from Python; the model is loaded at the first call of ``predict``.

        predictor = Predictor("output/run")
        predictor.predict([{"instruction": "Is the sky blue?"}], task="boolq")
        # [{"index": 0, "task": "boolq", "answer": "true", "scores": {...}, "probabilities": {...}}]

    A result with scored options has their ``scores`` (log-probabilities in nats) and ``probabilities`` (normalised over
    the options); a result with generated text has ``text``. ``predict(..., mode=)`` takes ``score``, ``generate``, or
    None: score options and generate free text.
    """

    evaluator_class, config_class, field = Evaluator, AnswerConfig, "instruction"

    def predict(
        self, examples: Sequence[Mapping | str], task: str | None = None, mode: str | None = None
    ) -> list[dict]:
        return super().predict(examples, task, mode=mode)


def predict(config: PredictConfig) -> None:
    """Answer every example of the input file that has no answer yet, then write the complete output file."""
    evaluation.predict(Evaluator(config), config.mode or "score, generate for free text", mode=config.mode)


# ---- an adapter in PEFT's format ----


class PeftAdapter:
    """A LoRA adapter in PEFT's format; raises ``UserError`` unless it is saved as safetensors and peft is installed."""

    def __init__(self, folder: str | Path):
        self.folder, self.weights = Path(folder), Path(folder) / artifacts.PEFT_WEIGHTS
        self.settings = files.read_object(self.folder / artifacts.PEFT_CONFIG, "the PEFT configuration")
        kind = self.settings.get("peft_type")
        if kind != "LORA":
            raise UserError(f"{self.folder / artifacts.PEFT_CONFIG} has peft_type {kind!r}; only LORA can be evaluated")
        if self.settings.get("alora_invocation_tokens"):
            raise UserError(
                f"{self.folder} is an activated LoRA, which this evaluation would not activate; merge it first"
            )
        if not self.weights.is_file():
            raise UserError(f"{self.folder} has no {self.weights.name}; other formats, such as .bin, are not read")
        try:
            import peft  # noqa: F401 - it may be there but broken, which must be known before the model is loaded
        except ImportError:
            raise UserError("--peft needs the package peft; install it with `pip install peft`") from None
        self.base_model = self.settings.get("base_model_name_or_path") or None
        if not isinstance(self.base_model, str | None):
            raise UserError(
                f"{self.folder / artifacts.PEFT_CONFIG}: base_model_name_or_path must be a string; correct it"
            )
        self.weights_sha256 = files.sha256(self.weights)

    def is_unchanged(self) -> bool:
        """Whether the folder still holds the weights and settings that were read."""
        again = PeftAdapter(self.folder)
        return (again.weights_sha256, again.settings) == (self.weights_sha256, self.settings)

    def load(self, model: PreTrainedModel) -> PreTrainedModel:
        """Have PEFT load the adapter into the layers of ``model``; raises ``UserError`` if they do not match."""
        import peft

        before = {name for name, _ in model.named_parameters()}
        try:
            wrapped = peft.PeftModel.from_pretrained(model, str(self.folder), torch_device="cpu")
        except (ValueError, RuntimeError, KeyError, TypeError, OSError, safetensors.SafetensorError) as error:
            raise UserError(f"PEFT cannot load {self.folder} ({str(error).splitlines()[0]})") from None
        found = wrapped.get_base_model()
        # PEFT ignores tensors that have no place in the model and initialises at random what the file lacks, so the
        # names are compared here. The file may hold embeddings too.
        needed = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        needed, all_there = (
            {name.removeprefix(artifacts.PEFT_PREFIX) for name in names} for names in (needed, wrapped.state_dict())
        )
        held = _sizes(self.weights).keys()
        if other := sorted((needed - held) | (held - needed - all_there)):
            raise UserError(f"{self.folder} and this base model do not match: {other[0]} is only in one of them")
        if {name for name, _ in found.named_parameters()} == before:
            raise UserError(f"{self.folder} adapts no layer of this model")
        return found


def _sizes(*paths: Path) -> dict[str, int]:
    """The number of parameters of each tensor in safetensors files, by its name in the model."""
    sizes = {}
    for path in paths:
        with safetensors.safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                shape = opened.get_slice(name).get_shape()
                sizes[name.removeprefix(artifacts.PEFT_PREFIX)] = math.prod(shape)
    return sizes
