"""Answers as the likeliest option: the summed log-probability of an option's tokens and EOS after the prompt.

    prompt ... | the correct answer is  answer | 1  EOS
               |<------- opening ------------->|<tail>

The opening is what all options of a question share in tokens; its probability is the same for all of them, so it is
part of the context. EOS belongs to the tail so that solution1 does not win over solution10 by being shorter.
One pass scores all options of a batch of questions (``branches``); a model that cannot be asked so takes two
(``on_cache``).
"""

import sys
import weakref
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from mtl_lora import route
from mtl_lora.errors import UserError
from mtl_lora.language.branches import branch_scores, takes_branches
from mtl_lora.language.collate import pad_left
from mtl_lora.language.encode import Encoder
from mtl_lora.language.on_cache import cache_scores
from mtl_lora.language.prefix_cache import OpeningCaches
from mtl_lora.language.questions import Question

# By model, whether one pass gives the scores of two: tried on the first question that it is asked.
_one_pass: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()
_TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01}  # of a score, in its own size; other dtypes 1e-4


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
    parts = [option_tails(question, encoder) for question in questions]
    contexts = [question.prompt_ids + said for question, (said, _) in zip(questions, parts, strict=True)]
    tails = [tails for _, tails in parts]
    task_ids = torch.tensor([question.task.id for question in questions])

    def ask(scores, rows: int):
        """``scores`` of the first so many questions."""
        cache = openings.cache(questions[0].task.id, opening, rows) if openings else None
        input_ids, mask = pad_left(contexts[:rows], pad_token_id, len(opening) if cache else 0)
        with route.use(task_ids[:rows]):
            return scores(model, input_ids, mask, tails[:rows], cache, pad_token_id)

    if model not in _one_pass:
        _one_pass[model] = takes_branches(model) and _agree(ask(branch_scores, 1), ask(cache_scores, 1), model)
    return ask(branch_scores if _one_pass[model] else cache_scores, len(questions))


def _agree(one: list[list[float]], other: list[list[float]], model: PreTrainedModel) -> bool:
    """Whether both ways give a question the same scores; a model may take a mask and do something else with it."""
    tolerance = _TOLERANCE.get(model.dtype, 1e-4)
    one, other = torch.tensor(one), torch.tensor(other)
    if torch.allclose(one, other, rtol=tolerance, atol=tolerance):
        return True
    print(f"{type(model).__name__} does not score all options in one pass alike: they take two", file=sys.stderr)
    return False


def best_option(options: Sequence[str], scores: Sequence[float]) -> str:
    """The option with the highest score; of equals, the lowest."""
    return options[max(range(len(scores)), key=lambda index: (scores[index], -index))]


def per_token(question: Question, encoder: Encoder, scores: Sequence[float]) -> list[float]:
    """Scores divided by the number of tokens they sum over, EOS included: the length-normalised ones."""
    _, tails = option_tails(question, encoder)
    return [score / len(tail) for score, tail in zip(scores, tails, strict=True)]
