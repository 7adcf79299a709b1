"""Answers as generated text: KV cache, left padding with a mask, a shared opening, stop when every row has ended."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mtl_lora import route
from mtl_lora.language.collate import pad_left
from mtl_lora.language.prefix_cache import OpeningCaches
from mtl_lora.language.questions import Question


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_new_tokens: int,
    num_beams: int,
    openings: OpeningCaches | None = None,
    opening: Sequence[int] = (),
) -> list[str]:
    """The text generated after each prompt, without special tokens. Greedy, or beam search; never sampled.

    opening: the tokens that all prompts begin with, if the questions are of one task and ``openings`` keeps them.
    """
    cache = openings.cache(questions[0].task.id, opening, len(questions) * num_beams) if openings else None
    input_ids, attention_mask = pad_left(
        [question.prompt_ids for question in questions], tokenizer.pad_token_id, len(opening) if cache else 0
    )
    # A fresh configuration: the one a base model brings may ask for sampling.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with route.use(torch.tensor([question.task.id for question in questions])):
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=settings,
            **({"past_key_values": cache} if cache else {}),
        )
    return tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
