"""Answers to batches of questions: generated text, or the likeliest option, after a shared prompt prefix.

The tokens with which all prompts of a task begin go through the model once. Under task routing keys and values depend
on the task from the second layer on, so a prefix belongs to one task.

The score of an option is the summed log-probability of its tokens and EOS after the prompt:

    prompt ... | the correct answer is  answer | 1  EOS
               |<------- shared ------------->|<continuation>

The tokens that all options of a question share have the same probability for each of them, so they are context. EOS
belongs to the continuation so that solution1 does not win over solution10 by being shorter. One pass over the contexts
of a batch fills the cache and gives the first token of every continuation; the few tokens after it run on that cache,
all options of all questions in one batch. This takes any model with a cache.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import log_softmax
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from mtl_lora import route
from mtl_lora.base_model import accepts_argument, at_least_float32, last_logits, positions_of
from mtl_lora.errors import UserError
from mtl_lora.language.batches import pad_left
from mtl_lora.language.encode import Encoder
from mtl_lora.language.questions import Question

_LEAST = 8  # tokens; below, the copies cost more than they save


def shared_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all prompts begin with, at least one short of the shortest; empty if they are few."""
    first, last = min(prompts), max(prompts)
    length = min(len(prompt) for prompt in prompts) - 1
    same = next((index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), length)
    return list(first[: min(same, length)]) if min(same, length) >= _LEAST else []


class PrefixCaches:
    """Keys and values of each task's prompt prefix, computed when it is first needed.

    prefixes: tokens by task id. In a left-padded row the prefix stands before the padding, so it is reused only where
    that changes nothing: the model takes positions, and its cache keeps every token (no sliding window).
    """

    def __init__(self, model: PreTrainedModel, prefixes: Mapping[int, Sequence[int]]):
        self.model, self.prefixes = model, prefixes
        self.usable = accepts_argument(type(model), "position_ids")
        self._caches: dict[int, DynamicCache] = {}

    @torch.inference_mode()
    def start(self, task_id: int, rows: int) -> tuple[DynamicCache | None, int]:
        """(a cache that holds the task's prefix in each of ``rows`` rows, its length); (None, 0) without one."""
        prefix = self.prefixes.get(task_id)
        if not prefix or not self.usable:
            return None, 0
        if task_id not in self._caches:
            ids = torch.tensor([prefix], device=self.model.device)
            with route.use(torch.tensor([task_id])):
                found = self.model(input_ids=ids, use_cache=True, **last_logits(self.model)).past_key_values
            self.usable = type(found) is DynamicCache and all(type(layer) is DynamicLayer for layer in found.layers)
            if not self.usable:
                return None, 0
            self._caches[task_id] = found
        cache = copy.deepcopy(self._caches[task_id])
        cache.batch_repeat_interleave(rows)
        return cache, len(prefix)


# ---- generated text ----


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    encoder: Encoder,
    questions: Sequence[Question],
    max_new_tokens: int,
    num_beams: int = 1,
    caches: PrefixCaches | None = None,
) -> list[str]:
    """The text generated after each prompt, without special tokens. Greedy, or beam search; never sampled.

    caches: of prompt prefixes; the questions must then be of one task. Raises ``UserError`` for logits that are not
    numbers.
    """
    tokenizer = encoder.tokenizer
    cache, start = caches.start(questions[0].task.id, len(questions) * num_beams) if caches else (None, 0)
    prompts = [question.prompt_ids for question in questions]
    input_ids, attention_mask = pad_left(prompts, tokenizer.pad_token_id, start)
    # A fresh configuration: the one a base model brings may ask for sampling.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    seen = _NotANumber()
    with route.use(torch.tensor([question.task.id for question in questions])):
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=settings,
            logits_processor=[seen],
            **({"past_key_values": cache} if cache else {}),
        )
    if bool(seen.found):
        raise UserError(
            f"the model gives logits that are not numbers for questions of {questions[0].task.name}: the base model or "
            "the adapter holds values that are no numbers; see the training's log"
        )
    return tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)


class _NotANumber(LogitsProcessor):
    """Remembers whether any logit was NaN, on its device, so that a GPU is not synchronised at every token."""

    found: torch.Tensor | bool = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.found = self.found | scores.isnan().any()
        return scores


# ---- the likeliest option ----


def continuations(question: Question, encoder: Encoder) -> tuple[list[int], list[list[int]]]:
    """(tokens that all options share, the rest of each option's), cut from the answers as training encodes them.

    Raises ``UserError`` for free text and for two options that have the same tokens.
    """
    task, options = question.task, question.options
    if not options:
        raise UserError(f"the task {task.name} is free text and has no options to score; use --mode generate")
    answers = [encoder.answer_ids(task.answer_prefix + option) for option in options]
    for index, answer in enumerate(answers):
        if answer in answers[:index]:
            raise UserError(
                f"the options {options[answers.index(answer)]!r} and {options[index]!r} of the task {task.name} are "
                "the same tokens to this tokenizer, so no score can tell them apart; rename one of them"
            )
    shared = 0
    # Every answer ends in EOS, so no answer is the beginning of another and the shared part ends before any of them.
    while len({answer[shared] for answer in answers}) == 1:
        shared += 1
    return answers[0][:shared], [answer[shared:] for answer in answers]


@torch.inference_mode()
def score_options(
    model: PreTrainedModel, encoder: Encoder, questions: Sequence[Question], caches: PrefixCaches | None = None
) -> list[list[float]]:
    """The score of every option of every question: log-probabilities in nats, in the order of its options.

    caches: of prompt prefixes; the questions must then be of one task. Raises ``UserError`` for a score that is not
    finite.
    """
    parts = [continuations(question, encoder) for question in questions]
    contexts = [question.prompt_ids + shared for question, (shared, _) in zip(questions, parts, strict=True)]
    rows = [row for row, (_, options) in enumerate(parts) for _ in options]
    flat = [option for _, options in parts for option in options]
    pad, task_ids = encoder.tokenizer.pad_token_id, torch.tensor([question.task.id for question in questions])
    cache, start = caches.start(questions[0].task.id, len(questions)) if caches else (None, 0)
    input_ids, mask = (tensor.to(model.device) for tensor in pad_left(contexts, pad, start))
    with route.use(task_ids):
        output = model(
            input_ids=input_ids[:, start:],
            attention_mask=mask,
            **_positions(model, mask, start),
            past_key_values=cache,
            use_cache=True,
            **last_logits(model),
        )
    scores = _log_probabilities(output.logits[:, -1])[rows, [option[0] for option in flat]].double()
    longer = [index for index, option in enumerate(flat) if len(option) > 1]
    if longer:
        chosen = torch.tensor([rows[index] for index in longer])
        cache = _repeat_rows(output.past_key_values, chosen.to(model.device))
        with route.use(task_ids[chosen]):
            scores[longer] += _later_tokens(
                model, cache, mask[chosen.to(mask.device)], [flat[index] for index in longer], pad
            )
    found = [part.tolist() for part in torch.split(scores.cpu(), [len(options) for _, options in parts])]
    for question, values in zip(questions, found, strict=True):
        if not torch.tensor(values).isfinite().all():
            raise UserError(
                f"question {question.example.index} of {question.task.name} has the scores {values}, which are not "
                "finite: the base model or the adapter holds values that are no numbers; see the training's log"
            )
    return found


def _later_tokens(model, cache: Cache, mask: torch.Tensor, options: list[list[int]], pad: int) -> torch.Tensor:
    """Summed log-probability of each option's tokens after its first, which is fed; cache and mask have its row."""
    length, device = max(len(option) for option in options) - 1, mask.device
    fed = torch.tensor([(option[:-1] + [pad] * length)[:length] for option in options], device=device)
    wanted = torch.tensor([(option[1:] + [pad] * length)[:length] for option in options], device=device)
    real = torch.tensor([[column < len(option) - 1 for column in range(length)] for option in options], device=device)
    whole_mask = torch.cat([mask, real.to(mask.dtype)], dim=1)
    logits = model(
        input_ids=fed,
        attention_mask=whole_mask,
        **_positions(model, whole_mask, mask.shape[1]),
        past_key_values=cache,
        use_cache=True,
    ).logits
    logp = _log_probabilities(logits).gather(2, wanted[:, :, None])[:, :, 0]
    return (logp.double() * real).sum(dim=1)


def _repeat_rows(cache: Cache, rows: torch.Tensor) -> Cache:
    """The cache with the given rows of its batch, in place; a layer that keeps every token repeats them when read."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = _RepeatedLayer(layer, rows)
        else:
            layer.batch_select_indices(rows)
    return cache


class _RepeatedLayer(DynamicLayer):
    """A layer for one more pass, which copies its rows only when it is read: one layer's copies at a time."""

    def __init__(self, layer: DynamicLayer, rows: torch.Tensor):
        super().__init__()
        self.__dict__.update(vars(layer))
        self.rows = rows

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__) -> tuple[torch.Tensor, ...]:
        """(keys, values) of the rows with the new tokens behind them; they are not kept."""
        return self._with(self.keys, key_states), self._with(self.values, value_states)

    def _with(self, kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        length = kept.shape[2]
        whole = new.new_empty(len(self.rows), kept.shape[1], length + new.shape[2], kept.shape[3])
        torch.index_select(kept, 0, self.rows, out=whole[:, :, :length])
        whole[:, :, length:] = new
        return whole


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """log softmax over the vocabulary, in float32 at least."""
    return log_softmax(at_least_float32(logits), dim=-1)


def _positions(model: PreTrainedModel, mask: torch.Tensor, start: int) -> dict[str, torch.Tensor]:
    """position_ids of the columns from ``start``, for a model that takes them."""
    if not accepts_argument(type(model), "position_ids"):
        return {}
    return {"position_ids": positions_of(mask)[:, start:]}


def best_option(options: Sequence[str], scores: Sequence[float]) -> str:
    """The option with the highest score; of equals, the lowest."""
    return options[max(range(len(scores)), key=lambda index: (scores[index], -index))]


def per_token(question: Question, encoder: Encoder, scores: Sequence[float]) -> list[float]:
    """Length-normalised scores: divided by the number of tokens they sum over, EOS included."""
    _, options = continuations(question, encoder)
    return [score / len(option) for score, option in zip(scores, options, strict=True)]
