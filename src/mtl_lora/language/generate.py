"""Answers as generated text: KV cache, left padding with a mask, a shared prompt prefix, stop at EOS."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from mtl_lora import route
from mtl_lora.errors import UserError
from mtl_lora.language.batches import pad_left
from mtl_lora.language.encode import Encoder
from mtl_lora.language.prefix_cache import PrefixCaches
from mtl_lora.language.questions import Question


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
