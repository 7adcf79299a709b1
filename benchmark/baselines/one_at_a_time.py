"""The evaluation baseline, frozen: one question at a time, recomputing the whole text for every token.

Evaluation scripts of this family work this way: no KV cache, batch size 1, greedy, up to 8 new tokens, ended by EOS.
Nothing in it is slowed down on purpose: same model, dtype and threads, no gradients, and only the last position is
projected to the vocabulary.
"""

import torch

from mtl_lora import route
from mtl_lora.language.evaluate import Question


@torch.inference_mode()
def answer(model, tokenizer, question: Question, max_new_tokens: int = 8) -> str:
    """Return the text generated after a prompt."""
    ids = list(question.prompt_ids)
    for _ in range(max_new_tokens):
        with route.use(torch.tensor([question.task.id])):
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[len(question.prompt_ids) :], skip_special_tokens=True)
