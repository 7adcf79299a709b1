"""How a model answers a batch of questions: with generated text, or with the likeliest option.

Generation uses a KV cache and left padding with a mask, and stops at EOS. The score of an option is the summed
log-probability of its tokens and EOS after the prompt.

    prompt ... | the correct answer is  answer | 1  EOS
               |<------- shared ------------->|<continuation>

The tokens that all options of a question share add the same to every score, so they count as context. EOS belongs to
the continuation so that solution1 does not win over solution10 by being shorter.

The last token of a continuation is only predicted, never fed to the model. The other tokens run in the same pass as the
contexts, placed after them, and a mask keeps the options apart:

    prompt prefix | padding | context ... | 1 | 2 | 3 | 4 | padding
                                           each sees the context and itself, no other option

If a model does not support such a mask, these tokens run in a second pass, on the cache of the first pass repeated for
each option. If the model has recurrences or convolutions, whose state covers a whole row and cannot be reused like
that, the second pass runs each option after its whole context.

Either way the prompt prefix that all questions of a task share goes through the model once.
"""

import copy
import sys
from collections.abc import Mapping, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mtl_lora import route
from mtl_lora.base_model import accepts_argument, at_least_float32, cache_argument, last_logits, positions_of
from mtl_lora.errors import UserError
from mtl_lora.evaluation import Question, generate
from mtl_lora.language.batches import pad_left
from mtl_lora.language.encode import Encoder
from mtl_lora.tokens import common_prefix
from mtl_lora.training.rows import padded

_LEAST_PREFIX = 8  # tokens; with a shorter shared prompt prefix, copying its cache costs more than it saves
_ATTENTION = ("sdpa", "eager")  # implementations that accept the caller's mask, (B, 1, Q, K)
# (relative, absolute) differences of a score, in nats, that are rounding; 1e-4 for other dtypes. A model that
# interprets a mask in another way is off by nats.
_TOLERANCE = {torch.bfloat16: (0.1, 0.5), torch.float16: (0.02, 0.1)}


# ---- shared prompt prefixes ----


def shared_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The common prefix of all prompts, leaving at least one token of each; empty if it is too short."""
    shared = common_prefix(prompts)[: min(map(len, prompts)) - 1]
    return shared if len(shared) >= _LEAST_PREFIX else []


class PrefixCaches:
    """Keys and values of each task's prompt prefix, computed when it is first needed.

    Under task routing they depend on the task from the second layer on, so each task has a prefix of its own.

    prefixes: tokens by task id. In a left-padded row the prefix stands before the padding. It is reused only if this
    position changes nothing: the model accepts position ids, no layer attends to a window of columns, its cache keeps
    every token, and, if rows are ``padded``, padding after a cached prefix changes no probability (see
    ``counts_columns``).
    """

    def __init__(self, model: PreTrainedModel, prefixes: Mapping[int, Sequence[int]], padded: bool = True):
        self.model = model
        self.usable = accepts_argument(type(model), "position_ids") and not has_local_layers(model)
        self._checked = not padded
        self.use(prefixes)

    def use(self, prefixes: Mapping[int, Sequence[int]]) -> None:
        """Replace the prefixes and drop their caches."""
        self.prefixes = prefixes
        self._caches: dict[int, DynamicCache] = {}

    @torch.inference_mode()
    def start(self, task_id: int, rows: int) -> tuple[DynamicCache | None, int]:
        """(a cache with the task's prefix in each of ``rows`` rows, the prefix length); (None, 0) if there is none."""
        prefix = self.prefixes.get(task_id)
        if not prefix or not self.usable:
            return None, 0
        if task_id not in self._caches:
            found = _cached(self.model, prefix, task_id)
            self.usable = type(found) is DynamicCache and all(type(layer) is DynamicLayer for layer in found.layers)
            if self.usable and not self._checked:
                self.usable = self._checked = not counts_columns(self.model, prefix, task_id)
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
    """The text generated after each prompt, without special tokens. Greedy or beam search; never sampled.

    caches: prompt prefix caches; with them all questions must belong to one task. Raises ``UserError`` for NaN logits.
    """
    tokenizer = encoder.tokenizer
    cache, start = caches.start(questions[0].task.id, len(questions) * num_beams) if caches else (None, 0)
    prompts = [question.prompt_ids for question in questions]
    input_ids, mask = pad_left(prompts, tokenizer.pad_token_id, start)
    inputs = {"input_ids": input_ids.to(model.device), "attention_mask": mask.to(model.device)}
    inputs |= {cache_argument(model): cache} if cache else {}
    task_ids = torch.tensor([question.task.id for question in questions])
    settings = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "pad_token_id": tokenizer.pad_token_id}
    settings["eos_token_id"] = [*{encoder.end_id, tokenizer.eos_token_id}]
    output = generate(model, questions[0].task, inputs, task_ids, **settings)
    answers = output[:, input_ids.shape[1] :]
    # The token that ends a chat answer need not be one that ``skip_special_tokens`` removes, but EOS is.
    answers = answers.masked_fill(answers == encoder.end_id, tokenizer.eos_token_id)
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


# ---- the likeliest option ----


def continuations(question: Question, encoder: Encoder) -> tuple[list[int], list[list[int]]]:
    """(the tokens that all options share, the remaining tokens of each option), encoded as in training.

    Raises ``UserError`` for free text and for two options that have the same tokens.
    """
    task, options = question.task, question.options
    if not options:
        way_out = "pass --mode generate, or leave the task out"
        raise UserError(f"the task {task.name} is free text and has no options to score; {way_out}")
    answers = [encoder.option_ids(task, option) for option in options]
    for index, answer in enumerate(answers):
        if answer in answers[:index]:
            raise UserError(
                f"the options {options[answers.index(answer)]!r} and {options[index]!r} of the task {task.name} are "
                "the same tokens to this tokenizer, so no score can tell them apart; rename one of them"
            )
    # Every answer ends in EOS, so no answer is a prefix of another, and no option is left without tokens.
    shared = len(common_prefix(answers))
    return answers[0][:shared], [answer[shared:] for answer in answers]


class OptionScorer:
    """Scores the options of questions with one model.

    one_pass: whether the model scores all options in one pass; None until the first question has been scored both ways
    to see whether one pass gives the same scores as two.
    """

    def __init__(self, model: PreTrainedModel, encoder: Encoder, caches: PrefixCaches | None = None):
        self.model, self.encoder, self.caches = model, encoder, caches
        self.one_pass = None if takes_own_mask(model) else False

    @torch.inference_mode()
    def scores(self, questions: Sequence[Question]) -> list[list[float]]:
        """The log-probability in nats of every option of every question, in the order of its options.

        With prompt prefix caches all questions must belong to one task. The scores may be NaN or infinite.
        """
        parts = [continuations(question, self.encoder) for question in questions]
        contexts = [question.prompt_ids + shared for question, (shared, _) in zip(questions, parts, strict=True)]
        options, task_ids = [options for _, options in parts], [question.task.id for question in questions]
        if self.one_pass is None:
            self.one_pass = self._agree(contexts[0], options[0], task_ids[0])
        return self._sums(contexts, options, task_ids, self.one_pass)

    def _agree(self, context: list[int], options: list[list[int]], task_id: int) -> bool:
        """Whether one pass gives the same scores as two; a model may accept a mask and interpret it in another way."""
        contexts = [context, context + context[-1:]]  # of two lengths, so that padding is tested too
        asked = contexts, [options] * 2, [task_id] * 2
        relative, absolute = _TOLERANCE.get(self.model.dtype, (1e-4, 1e-4))
        two = torch.tensor(self._sums(*asked, one_pass=False))
        try:
            one = torch.tensor(self._sums(*asked, one_pass=True))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # any error of a forward that does not support a 4D mask
            one = torch.full_like(two, torch.inf)
        agree = torch.allclose(one, two, rtol=relative, atol=absolute, equal_nan=True)
        if agree and not ignores_positions(self.model, context, task_id):  # which short options in 16 bits do not show
            return True
        print(f"{type(self.model).__name__} cannot score options in one pass, so two are run", file=sys.stderr)
        return False

    def _sums(self, contexts: list, options: list[list[list[int]]], task_ids: list[int], one_pass: bool) -> list:
        """The summed log-probability of each option of each row, in float64."""
        pad, device = self.encoder.tokenizer.pad_token_id, self.model.device
        cache, start = self.caches.start(task_ids[0], len(contexts)) if self.caches else (None, 0)
        input_ids, mask = pad_left(contexts, pad, start)
        rows = torch.tensor([row for row, part in enumerate(options) for _ in part])
        flat = [option for part in options for option in part]
        # An option may have one token, which leaves nothing to feed and a tensor of no type.
        fed, wanted = (padded(part, pad).long() for part in ([each[:-1] for each in flat], [each[1:] for each in flat]))
        real = torch.arange(fed.shape[1]) < torch.tensor([[len(option) - 1] for option in flat])
        run = self._in_one_pass if one_pass else self._in_two_passes
        first, later = run(input_ids, mask, cache, start, torch.tensor(task_ids), rows, fed, real)
        sums = _log_probability(first[rows], torch.tensor([option[0] for option in flat], device=device))
        if fed.shape[1]:
            sums += (_log_probability(later, wanted.to(device)) * real.to(device)).sum(dim=1)
        return [part.tolist() for part in torch.split(sums.cpu(), [len(part) for part in options])]

    # Arguments of both, for N options of B questions: input_ids, mask (B, L); cache of the first ``start`` columns;
    # rows (N,): the question of each option; fed (N, E): the tokens of each option except its last, padded;
    # real (N, E): which of them are not padding. Both return the logits after the contexts (B, V) and after each fed
    # token (N, E, V).

    def _in_two_passes(self, input_ids, mask, cache, start, task_ids, rows, fed, real) -> tuple:
        output = _run(self.model, task_ids, input_ids[:, start:], mask, cache=cache, use_cache=True)
        if not fed.shape[1]:
            return output.logits[:, -1], None
        cache, whole_mask = output.get(cache_argument(self.model)), torch.cat([mask[rows], real.to(mask.dtype)], dim=1)
        # A recurrent or convolutional state cannot be copied to other rows, or continued by several tokens at once, and
        # a model's own kind of layer may hold more than keys and values.
        if type(cache) is not DynamicCache or any(
            hasattr(layer, "conv_states") or type(layer).__module__ != DynamicLayer.__module__ for layer in cache.layers
        ):
            again, cache = torch.cat([input_ids[rows], fed], dim=1), None
        else:
            again = fed
            cache.batch_select_indices(rows.to(self.model.device))
        options = {"cache": cache, "use_cache": cache is not None}
        later = _run(self.model, task_ids[rows], again, whole_mask, fed.shape[1], **options)
        return output.logits[:, -1], later.logits[:, -fed.shape[1] :]

    def _in_one_pass(self, input_ids, mask, cache, start, task_ids, rows, fed, real) -> tuple:
        # The tokens of a row's options take the columns after its context, one option after another.
        used, first = [0] * len(input_ids), []
        for row, count in zip(rows.tolist(), real.sum(dim=1).tolist(), strict=True):
            first.append(used[row])
            used[row] += count
        columns = torch.tensor(first)[:, None] + torch.arange(fed.shape[1])
        at = rows[:, None].expand_as(fed)[real], columns[real]
        tokens, depths, owners = (torch.full((len(input_ids), max(used)), value) for value in (0, 0, -1))
        tokens[at] = fed[real]
        depths[at] = torch.arange(fed.shape[1]).expand_as(fed)[real]
        owners[at] = torch.arange(len(fed))[:, None].expand_as(fed)[real]
        positions = torch.cat([positions_of(mask), mask.sum(dim=1, keepdim=True) + depths], dim=1)
        visible, dtype = _visible(mask, owners)[:, None, start:], self.model.dtype
        hidden = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
        together = torch.cat([input_ids, tokens], dim=1)[:, start:]
        options = {"positions": positions[:, start:], "cache": cache, "use_cache": cache is not None}
        logits = _run(self.model, task_ids, together, hidden, max(used) + 1, **options).logits
        return logits[:, 0], logits[rows[:, None], (columns + 1).clamp(max=max(used))]


def _run(model: PreTrainedModel, task_ids, input_ids, mask, count: int = 1, positions=None, cache=None, **options):
    """The output for the tokens (B, L) of the last columns, with the logits of the last ``count``.

    mask: (B, columns), or of one's own with ``positions``. positions: None for those of the mask.
    """
    if accepts_argument(type(model), "position_ids"):
        positions = positions_of(mask)[:, -input_ids.shape[1] :] if positions is None else positions
        options["position_ids"] = positions.to(model.device)
    options |= {} if cache is None else {cache_argument(model): cache}
    inputs = {"input_ids": input_ids.to(model.device), "attention_mask": mask.to(model.device)}
    with route.use(task_ids):
        return model(**inputs, **last_logits(model, count), **options)


def _cached(model: PreTrainedModel, prefix: Sequence[int], task_id: int):
    """The cache that a model returns for a prompt prefix; None if it returns none."""
    ids = torch.tensor([prefix])
    return _run(model, torch.tensor([task_id]), ids, torch.ones_like(ids), use_cache=True).get(cache_argument(model))


def takes_own_mask(model: PreTrainedModel) -> bool:
    """Whether a model appears to accept position ids and the caller's own mask, and none of its layers drops tokens."""
    if model.config._attn_implementation not in _ATTENTION or has_local_layers(model):
        return False
    if not accepts_argument(type(model), "position_ids") or not accepts_argument(type(model), "logits_to_keep"):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def has_local_layers(model: PreTrainedModel) -> bool:
    """Whether layers attend to a window of columns that counts padding too, which their cache does not show."""
    return "local" in getattr(model.config, "attention_layers", ())  # as GPT-Neo names them


@torch.inference_mode()
def reads_padding(model: PreTrainedModel, tokens: list[int], pad: int, task_id: int) -> bool:
    """Whether the padding before a row of ``tokens`` changes its probabilities.

    Some recurrent models process padding like text.
    """

    def last(rows: list[list[int]], fill: int) -> torch.Tensor:
        """The log-probabilities behind the first row, padded with the token ``fill``."""
        input_ids, mask = pad_left(rows, fill)
        task_ids, start, cache = torch.tensor([task_id] * len(rows)), 0, None
        # The last token on a cache, as in generation, where a model may count the columns of the mask otherwise. Where
        # all layers are recurrent, it takes no mask then.
        for end in (-1, None) if len(rows) > 1 else (None,):
            output = _run(model, task_ids, input_ids[:, start:end], mask[:, :end], cache=cache)
            found = output.get(cache_argument(model))
            if found is not None and not all(getattr(found, "is_linear", [False])):
                start, cache = -1, found
        return at_least_float32(output.logits[0, -1]).log_softmax(dim=-1)

    padded = [tokens, tokens * 2]
    alone, beside, other = last([tokens], pad), last(padded, pad), last(padded, tokens[-1])
    likely = alone.topk(min(10, len(alone))).indices
    # Which token pads decides nothing in a model that ignores padding, not even a rounding. A shape of its own rounds
    # otherwise in 16 bits, so there only a large difference shows positions that padding shifts.
    is_read = (beside - other)[likely].abs().max() > 1e-2
    return bool(is_read or (alone - beside)[likely].abs().max() > (1.0 if model.dtype in _TOLERANCE else 1e-2))


@torch.inference_mode()
def ignores_positions(model: PreTrainedModel, tokens: Sequence[int], task_id: int) -> bool:
    """Whether another position of the last token changes nothing, although the model accepts position ids."""
    ids, found = torch.tensor([tokens]), []
    for last in (len(tokens) - 1, 0):
        positions = torch.arange(len(tokens))[None]
        positions[0, -1] = last
        output = _run(model, torch.tensor([task_id]), ids, torch.ones_like(ids), positions=positions)
        found.append(output.logits[0, -1])
    return torch.equal(*found)


@torch.inference_mode()
def counts_columns(model: PreTrainedModel, tokens: Sequence[int], task_id: int) -> bool:
    """Whether padding between a cached prefix and what follows changes the probabilities; a line says so.

    A model may accept position ids and count the columns of its cache all the same. tokens: a prompt prefix, of which
    the first ``_LEAST_PREFIX`` are cached. The measure is the Kullback-Leibler divergence in nats: in bf16 rounding
    gives some 1e-4, and a position that is off by 64 some 0.3 (SmolLM2-135M).
    """
    prefix = list(tokens[:_LEAST_PREFIX])

    def last(padding: int, start: int, cache=None) -> torch.Tensor:
        """The log-probabilities behind the prefix, ``padding`` columns and a token, computed from ``start`` on."""
        row = torch.tensor([[*prefix, *[0] * padding, prefix[0]]])
        mask = torch.tensor([[*[1] * len(prefix), *[0] * padding, 1]])
        output = _run(model, torch.tensor([task_id]), row[:, start:], mask, cache=cache)
        return at_least_float32(output.logits[0, -1]).log_softmax(dim=-1)

    expected = last(0, 0)
    cache = _cached(model, prefix, task_id)
    try:
        found = last(64, len(prefix), cache)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # such as a column beyond the table of positions
        found = expected * torch.nan
    divergence = (expected.exp() * (expected - found))[expected.isfinite()].sum()  # without tokens of no probability
    if counts := not divergence <= (1e-2 if model.dtype in _TOLERANCE else 1e-4):
        name = type(model).__name__
        print(f"{name} counts the padding after a prompt prefix in its cache, so none is reused", file=sys.stderr)
    return counts


def _visible(mask: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """Which key each query sees, (B, L + E, L + E): earlier real tokens of the context and of its own option.

    owners (B, E): the option of each column, -1 for padding. Every token sees itself, even padding, because a softmax
    over no key is NaN.
    """
    length, width = mask.shape[1], owners.shape[1]
    owner = torch.cat([mask.long() - 2, owners], dim=1)  # context -1, its padding -2
    real = torch.cat([mask.bool(), owners >= 0], dim=1)
    same = owner[:, :, None] == owner[:, None, :]
    of_context = torch.arange(length + width) < length
    earlier = torch.ones(length + width, length + width, dtype=torch.bool).tril()
    return (earlier & (same | of_context) & real[:, None, :]) | torch.eye(length + width, dtype=torch.bool)


def _log_probability(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of tokens (...) under logits (..., V), computed in float32 or better, returned as float64."""
    logits = at_least_float32(logits)
    return (logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(dim=-1)).double()


def per_token(question: Question, encoder: Encoder, scores: Sequence[float]) -> list[float]:
    """Length-normalised scores: each score divided by the number of tokens it sums over, EOS included."""
    _, options = continuations(question, encoder)
    return [score / len(option) for score, option in zip(scores, options, strict=True)]
