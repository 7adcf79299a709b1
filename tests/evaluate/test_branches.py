"""All options in one pass: the scores of one plain forward an option, on every architecture that takes it."""

import pytest
import torch
from reference.architectures import ARCHITECTURES
from reference.tiny import TASKS, VOCABULARY, adapter_config, randomise, tiny_llama
from transformers import DynamicCache

import mtl_lora
from mtl_lora import route
from mtl_lora.language import option_scoring as score
from mtl_lora.language.branches import branch_scores, takes_branches
from mtl_lora.language.collate import pad_left
from mtl_lora.language.on_cache import cache_scores

# Layers with a sliding window forget tokens, and with a mask of ours they would not.
SLIDING = {"Mistral", "Gemma2", "Gemma3"}
OPENING = [3, 1, 4, 1, 5]
CONTEXTS = [OPENING + rest for rest in ([9, 2, 6], [5], [3, 5, 8, 9, 7, 9, 3], [2, 3])]
TAILS = [[[4, 2], [7, 2]], [[6, 1, 8, 2], [6, 2], [5, 2]], [[2], [3, 2]], [[8, 8, 8, 2], [9, 2], [2], [1, 1, 2]]]


def on_batch(scores, model, start: int = 0) -> list[list[float]]:
    """A batch through one of the two ways, the first ``start`` tokens of every row from a cache."""
    ids = torch.arange(len(CONTEXTS)) % len(TASKS)
    cache = None
    input_ids, mask = pad_left(CONTEXTS, 0, start)
    with torch.no_grad(), route.use(ids):
        if start:
            cache = DynamicCache(config=model.config)
            model(input_ids=input_ids[:, :start], past_key_values=cache, use_cache=True)
        return scores(model, input_ids, mask, TAILS, cache, 0)


def slow(model) -> list[list[float]]:
    """One forward a tail, without padding or cache."""
    found = []
    for row, (context, tails) in enumerate(zip(CONTEXTS, TAILS, strict=True)):
        found.append([])
        for tail in tails:
            with torch.no_grad(), route.use(torch.tensor([row % len(TASKS)])):
                logp = model(input_ids=torch.tensor([context + tail])).logits[0].log_softmax(-1)
            found[-1].append(sum(logp[len(context) - 1 + j, token].item() for j, token in enumerate(tail)))
    return found


def flat(scores: list[list[float]]) -> list[float]:
    return [value for row in scores for value in row]


def adapted(architecture):
    return randomise(
        mtl_lora.inject(architecture.build(), adapter_config(target_modules=list(architecture.attention))), spread=0.2
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_a_model_is_asked_in_one_pass_unless_a_layer_forgets_tokens(architecture):
    assert takes_branches(architecture.build()) == (architecture.name not in SLIDING)


@pytest.mark.parametrize("start", [0, len(OPENING)], ids=["whole", "opening from a cache"])
@pytest.mark.parametrize("architecture", [one for one in ARCHITECTURES if one.name not in SLIDING], ids=str)
def test_one_pass_gives_every_tail_its_log_probability(architecture, start):
    model = adapted(architecture)
    assert flat(on_batch(branch_scores, model, start)) == pytest.approx(flat(slow(model)), abs=1e-9)


@pytest.mark.parametrize("start", [0, len(OPENING)], ids=["whole", "opening from a cache"])
@pytest.mark.parametrize("architecture", [one for one in ARCHITECTURES if one.name not in SLIDING], ids=str)
def test_two_passes_give_the_same(architecture, start):
    model = adapted(architecture)
    assert flat(on_batch(cache_scores, model, start)) == pytest.approx(flat(slow(model)), abs=1e-9)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.4)], ids=str)
def test_one_pass_in_the_dtypes_and_attentions_of_use(implementation, dtype, tolerance):
    model = tiny_llama(dtype)
    model.set_attn_implementation(implementation)
    found = flat(on_batch(branch_scores, model))
    assert found == pytest.approx(flat(slow(tiny_llama(torch.float64))), abs=tolerance)


def test_an_option_does_not_see_another():
    model = tiny_llama()
    alone = [
        branch_scores(model, *pad_left([context], 0), [[tail]], None, 0)[0][0]
        for context, tails in zip(CONTEXTS, TAILS, strict=True)
        for tail in tails
    ]
    assert alone == pytest.approx(flat(on_batch(branch_scores, model)), abs=1e-6)


class _Careless(type(tiny_llama())):
    """Takes a mask of its caller's and looks at everything before all the same."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0, **options):
        attention_mask = None if attention_mask is not None and attention_mask.dim() == 4 else attention_mask
        return super().forward(
            input_ids, attention_mask, position_ids=position_ids, logits_to_keep=logits_to_keep, **options
        )


def test_a_model_that_ignores_the_mask_is_found_out_and_asked_in_two_passes(capsys, monkeypatch):
    model = tiny_llama()
    model.__class__ = _Careless
    model.set_attn_implementation("sdpa")
    assert takes_branches(model)
    assert flat(on_batch(branch_scores, model)) != pytest.approx(flat(slow(model)), abs=1e-3)
    questions = [_Question(context) for context in CONTEXTS]
    monkeypatch.setattr(score, "option_tails", lambda question, _: ([], TAILS[CONTEXTS.index(question.prompt_ids)]))
    found = [score.score_options(model, None, questions, 0) for _ in range(2)]
    assert found[0] == found[1]
    assert flat(found[0]) == pytest.approx(flat(slow(model)), abs=1e-9)
    assert capsys.readouterr().err.count("does not score all options in one pass") == 1


class _Question:
    """What scoring reads of a question."""

    def __init__(self, prompt_ids: list[int]):
        self.prompt_ids, self.task = prompt_ids, type("Task", (), {"id": 0})


def test_the_tables_cover_what_they_claim():
    lengths = {len(tail) for tails in TAILS for tail in tails}
    assert lengths == {1, 2, 3, 4} and len({len(context) for context in CONTEXTS}) == len(CONTEXTS)
    assert max(token for tails in TAILS for tail in tails for token in tail) < VOCABULARY
