"""Answers as the likeliest option: the summed log-probability of an option's tokens and EOS after the prompt.

    prompt ... | the correct answer is  answer | 1  EOS
               |<------- opening ------------->|<tail>

The opening is what all options of a question share in tokens; its probability is the same for all of them, so it is
part of the context. EOS belongs to the tail so that solution1 does not win over solution10 by being shorter.
One pass over prompt and opening fills the cache and gives the first token of every tail; the few tokens after it run
on that cache, all options of all questions in one batch.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from mtl_lora import route
from mtl_lora.data.collate import pad_left
from mtl_lora.data.encode import Encoder
from mtl_lora.errors import UserError
from mtl_lora.evaluate.opening import OpeningCaches
from mtl_lora.evaluate.questions import Question
from mtl_lora.model import takes


def option_tails(question: Question, encoder: Encoder) -> tuple[list[int], list[list[int]]]:
    """(opening, tail of each option) in tokens, cut from the answers as training encodes them."""
    if not question.options:
        raise UserError(f"the task {question.task.name} is free text and has no options to score; use --mode generate")
    answers = [encoder.answer_ids(question.task.answer_prefix + option) for option in question.options]
    shared = 0
    # Every answer ends in EOS, so no answer is the beginning of another and the opening ends before any of them does.
    while len({answer[shared] for answer in answers}) == 1:
        shared += 1
    return answers[0][:shared], [answer[shared:] for answer in answers]


@torch.inference_mode()
def score_options(
    model: PreTrainedModel,
    encoder: Encoder,
    questions: Sequence[Question],
    pad_token_id: int,
    openings: OpeningCaches | None = None,
    opening: Sequence[int] = (),
) -> list[list[float]]:
    """The score of every option of every question: log-probabilities in nats, in the order of its options.

    opening: the tokens that all prompts begin with, if the questions are of one task and ``openings`` keeps them.
    """
    cache = openings.cache(questions[0].task.id, opening, len(questions)) if openings else None
    start = len(opening) if cache else 0
    parts = [option_tails(question, encoder) for question in questions]
    contexts = [question.prompt_ids + said for question, (said, _) in zip(questions, parts, strict=True)]
    input_ids, mask = pad_left(contexts, pad_token_id, start)
    input_ids, mask = input_ids.to(model.device), mask.to(model.device)
    task_ids = torch.tensor([question.task.id for question in questions])
    with route.use(task_ids):
        output = model(
            input_ids=input_ids[:, start:],
            attention_mask=mask,
            **_positions(model, mask, start),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    first = _log_probabilities(output.logits[:, -1])
    rows = [row for row, (_, tails) in enumerate(parts) for _ in tails]
    tails = [tail for _, tails in parts for tail in tails]
    scores = first[rows, [tail[0] for tail in tails]].double()
    later = [index for index, tail in enumerate(tails) if len(tail) > 1]
    if later:
        chosen = [rows[index] for index in later]
        cache = output.past_key_values
        cache.batch_select_indices(torch.tensor(chosen, device=model.device))
        with route.use(task_ids[chosen]):
            scores[later] += _tail_scores(model, cache, mask[chosen], [tails[index] for index in later], pad_token_id)
    return [part.tolist() for part in torch.split(scores.cpu(), [len(tails) for _, tails in parts])]


def _tail_scores(model, cache, mask: torch.Tensor, tails: list[list[int]], pad_token_id: int) -> torch.Tensor:
    """Summed log-probability of each tail after its first token, which is fed; cache and mask have a row a tail."""
    length = max(len(tail) for tail in tails) - 1
    device = mask.device
    fed = torch.tensor([(tail[:-1] + [pad_token_id] * length)[:length] for tail in tails], device=device)
    wanted = torch.tensor([(tail[1:] + [pad_token_id] * length)[:length] for tail in tails], device=device)
    real = torch.tensor([[1] * (len(tail) - 1) + [0] * (length - len(tail) + 1) for tail in tails], device=device)
    whole_mask = torch.cat([mask, real], dim=1)
    logits = model(
        input_ids=fed,
        attention_mask=whole_mask,
        **_positions(model, whole_mask, mask.shape[1]),
        past_key_values=cache,
        use_cache=True,
    ).logits
    logp = _log_probabilities(logits).gather(2, wanted[:, :, None])[:, :, 0]
    return (logp.double() * real).sum(dim=1)


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """log softmax over the vocabulary, in float32 at least."""
    return log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def _positions(model: PreTrainedModel, mask: torch.Tensor, start: int) -> dict[str, torch.Tensor]:
    """position_ids of the columns from ``start``, for a model that takes them.

    They count from each row's first real token; padding gets 0 or a neighbour's, where nothing looks.
    """
    if not takes(type(model), "position_ids"):
        return {}
    return {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)[:, start:]}


def best_option(options: Sequence[str], scores: Sequence[float]) -> str:
    """The option with the highest score; of equals, the lowest."""
    return options[max(range(len(scores)), key=lambda index: (scores[index], -index))]


def per_token(question: Question, encoder: Encoder, scores: Sequence[float]) -> list[float]:
    """Scores divided by the number of tokens they sum over, EOS included: the length-normalised ones."""
    _, tails = option_tails(question, encoder)
    return [score / len(tail) for score, tail in zip(scores, tails, strict=True)]
