"""Generation and scoring against slow references, on models whose every adapter weight matters."""

import json
from types import SimpleNamespace

import pytest
import torch
from reference.architectures import ARCHITECTURES, Architecture
from reference.tiny import TASKS, VOCABULARY, adapted_llama, adapter_config, randomise, tiny_llama
from shared import QUICKSTART

import mtl_lora
from mtl_lora import route
from mtl_lora.errors import UserError
from mtl_lora.evaluation import likeliest, load_questions
from mtl_lora.language.answering import (
    OptionScorer,
    PrefixCaches,
    continuations,
    generate_answers,
    per_token,
    reads_padding,
    takes_own_mask,
)
from mtl_lora.language.config import EvalConfig
from mtl_lora.language.evaluate import Evaluator, Question
from mtl_lora.language.examples import Example, load_examples
from mtl_lora.language.tasks import Task

# ---- scores on every architecture ----

PREFIX = [3, 1, 4, 1, 5, 9, 2, 6, 5]
PROMPTS = [PREFIX + rest for rest in ([9, 2, 6], [5], [3, 5, 8, 9, 7, 9, 3], [2, 3])]
# Options by the name that stands for their tokens: alike at the start, one token and several, 2 as EOS.
ANSWERS = {
    "w": [8, 4, 2],
    "x": [8, 7, 2],
    "y": [6, 1, 8, 2],
    "z": [6, 2],
    "u": [5, 2],
    "v": [2],
    "t": [3, 8, 8, 8, 2],
    "s": [1, 2],
}
OPTIONS = [("w", "x"), ("y", "z", "u"), ("v", "w"), ("t", "y", "v", "x")]


class Tokens:
    """What scoring needs of an encoder: the ids of an answer, and the pad token, which also is a word."""

    class tokenizer:
        pad_token_id = 0

    def option_ids(self, task: Task, option: str) -> list[int]:
        return ANSWERS[option]


def questions(task_ids: list[int]) -> list[Question]:
    return [
        Question(Task("own", task_id, options, answer_prefix=""), Example("", "", "", "", task_id, row), prompt, "")
        for row, (task_id, options, prompt) in enumerate(zip(task_ids, OPTIONS, PROMPTS, strict=True))
    ]


def slow(model, asked: list[Question]) -> list[list[float]]:
    """One forward per option, without padding or cache: the log-probability of its answer from where it differs."""
    found = []
    for question in asked:
        answers = [ANSWERS[option] for option in question.options]
        shared = next(index for index in range(5) if len({answer[index] for answer in answers}) > 1)
        start, scores = len(question.prompt_ids) + shared, []
        for answer in answers:
            ids = question.prompt_ids + answer
            with torch.no_grad(), route.use(torch.tensor([question.task.id])):
                logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logp[place - 1, ids[place]].item() for place in range(start, len(ids))))
        found.append(scores)
    return found


def flat(scores: list[list[float]]) -> list[float]:
    return [value for row in scores for value in row]


# Layers with a sliding window forget tokens, and with a mask of ours they would not.
SLIDING = {"Mistral", "Gemma2", "Gemma3"}


@pytest.mark.parametrize("reuse", [False, True], ids=["whole", "prefix reused"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_padded_batch_gives_every_option_its_log_probability(architecture, reuse):
    model, tolerance = architecture.build(), 1e-9
    if model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    else:
        # Eager attention takes its softmax in float32, where the float64 mask of a row of padding alone becomes -inf.
        model, tolerance = model.float(), 1e-4
    model = randomise(mtl_lora.inject(model, adapter_config(target_modules=list(architecture.attention))), spread=0.2)
    # With a reused prefix all questions are of one task; a model that cannot reuse one computes the whole prompt.
    asked = questions([1] * len(PROMPTS) if reuse else list(range(len(PROMPTS))))
    caches = PrefixCaches(model, {1: PREFIX}) if reuse else None
    expected = pytest.approx(flat(slow(model, asked)), abs=tolerance)
    scorer = OptionScorer(model, Tokens(), caches)
    assert scorer.one_pass == (None if takes_own_mask(model) else False)
    assert flat(scorer.scores(asked)) == expected
    assert scorer.one_pass == (architecture.name not in SLIDING)
    scorer.one_pass = False  # as a model that does not take a mask of ours
    assert flat(scorer.scores(asked)) == expected


GROUPED = {"num_key_value_heads": 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4}
# Layers with states of a row, windows that count columns, a forward that reads masks of two dimensions alone.
OTHERWISE = [
    Architecture("Lfm2", (), 0, {**GROUPED, "layer_types": ["conv", "full_attention"]}),
    Architecture("Mamba", (), 0, {"state_size": 4}),
    Architecture("FalconH1", (), 0, {**GROUPED, **MAMBA, "mamba_d_ssm": 16, "mamba_d_head": 4}),
    Architecture("GraniteMoeHybrid", (), 0, GROUPED | MAMBA | {"layer_types": ["mamba", "attention"]}),
    Architecture("GPTNeo", (), 0, {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}),
    Architecture("Falcon", (), 0, {"alibi": True, "multi_query": False, "parallel_attn": False}),
]


def drawn(architecture) -> torch.nn.Module:
    """The model with weights so large that everything counts."""
    model, draws = architecture.build(torch.float32), torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data = torch.randn(weight.shape, generator=draws) * 0.3
    return model


@pytest.mark.parametrize("reuse", [False, True], ids=["whole", "prefix reused"])
@pytest.mark.parametrize("architecture", OTHERWISE, ids=str)
def test_models_of_other_kinds_score_options_behind_their_own_context(architecture, reuse):
    model, asked = drawn(architecture), questions([1] * len(PROMPTS))
    scorer = OptionScorer(model, Tokens(), PrefixCaches(model, {1: PREFIX}) if reuse else None)
    for _ in range(2):
        assert flat(scorer.scores(asked)) == pytest.approx(flat(slow(model, asked)), abs=1e-4)
    assert scorer.one_pass is False


# What stands before a row changes their state, whatever the mask says.
READING = [
    Architecture("Rwkv", (), 0, {"attention_hidden_size": 16}),
    Architecture(
        "RecurrentGemma", (), 0, {**GROUPED, "lru_width": 16, "head_dim": 4, "block_types": ["recurrent", "attention"]}
    ),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES + OTHERWISE + READING, ids=str)
def test_a_model_that_reads_padding_is_found_out(architecture):
    model = drawn(architecture)
    assert reads_padding(model, PROMPTS[0], 0, 0) == (architecture in READING)
    if architecture in READING:  # question by question it has no padding to read
        asked = questions([1] * len(PROMPTS))
        scorer = OptionScorer(model, Tokens(), PrefixCaches(model, {1: PREFIX}))
        found = [scorer.scores([question])[0] for question in asked]
        assert flat(found) == pytest.approx(flat(slow(model, asked)), abs=1e-4)


@pytest.mark.slow(1)
def test_questions_to_such_a_model_are_answered_one_by_one(evaluator, asked, monkeypatch):
    rows = []
    handle = evaluator.model.register_forward_pre_hook(
        lambda _, __, named: rows.append(len(named["input_ids"])), with_kwargs=True
    )
    expected = [evaluator.answer(asked, protocol) for protocol in ("score", "generate")]
    assert max(rows) > 1
    rows.clear()
    monkeypatch.setattr(evaluator, "one_by_one", True)
    monkeypatch.setattr(evaluator.scorer, "one_pass", True)
    found = [evaluator.answer(asked, protocol) for protocol in ("score", "generate")]
    handle.remove()
    assert {*rows} == {1}
    assert [[line["parsed"] for line in lines] for lines in found] == [
        [line["parsed"] for line in lines] for lines in expected
    ]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.4)], ids=str)
def test_scores_in_the_dtypes_and_attentions_of_use(implementation, dtype, tolerance):
    model = tiny_llama(dtype)
    model.set_attn_implementation(implementation)
    asked = questions([0] * len(PROMPTS))
    scorer, expected = OptionScorer(model, Tokens()), flat(slow(tiny_llama(torch.float64), asked))
    assert flat(scorer.scores(asked)) == pytest.approx(expected, abs=tolerance)
    assert scorer.one_pass


def test_scores_of_a_model_in_16_bits_are_taken_in_float32():
    scores = OptionScorer(tiny_llama(torch.bfloat16), Tokens()).scores(questions([0] * len(PROMPTS)))
    of_one_token, _ = scores[2]
    assert of_one_token != torch.tensor(of_one_token, dtype=torch.bfloat16).item()


class Careless(type(tiny_llama())):
    """Takes a mask of its caller's and does something else with it, but only where there is padding."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0, **options):
        if attention_mask is not None and attention_mask.dim() == 4 and (attention_mask[:, 0, -1, 0] < 0).any():
            attention_mask = None
        options |= {"position_ids": position_ids, "logits_to_keep": logits_to_keep}
        return super().forward(input_ids, attention_mask, **options)


def test_model_that_ignores_the_mask_is_found_out_and_runs_twice(capsys):
    model = tiny_llama(torch.float32)
    model.__class__ = Careless
    model.set_attn_implementation("sdpa")
    asked, scorer = questions([0] * len(PROMPTS)), OptionScorer(model, Tokens())
    for _ in range(2):
        assert flat(scorer.scores(asked)) == pytest.approx(flat(slow(model, asked)), abs=1e-4)
    assert scorer.one_pass is False
    assert capsys.readouterr().err.count("Careless") == 1
    scorer.one_pass = True
    assert flat(scorer.scores(asked)) != pytest.approx(flat(slow(model, asked)), abs=1e-3)


class Counting(type(tiny_llama())):
    """Accepts position ids and counts the columns, padding and all."""

    def forward(self, input_ids=None, position_ids=None, logits_to_keep=0, **options):
        return super().forward(input_ids, logits_to_keep=logits_to_keep, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model_that_counts_columns_reads_every_prompt_whole(dtype, capsys):
    model, asked = tiny_llama(dtype), questions([1] * len(PROMPTS))
    assert PrefixCaches(model, {1: PREFIX}).start(1, 2)[1] == len(PREFIX)
    model.__class__ = Counting
    caches = PrefixCaches(model, {1: PREFIX})
    for _ in range(2):
        scores = OptionScorer(model, Tokens(), caches).scores(asked)
        assert flat(scores) == pytest.approx(flat(slow(model, asked)), abs=1e-4 if dtype == torch.float32 else 0.4)
    assert not caches.usable
    assert capsys.readouterr().err.count("Counting counts the padding after a prompt prefix") == 1


def test_tables_hold_what_the_tests_above_need():
    assert {len(ANSWERS[option]) for options in OPTIONS for option in options} == {1, 2, 3, 4, 5}
    assert len({len(prompt) for prompt in PROMPTS}) == len(PROMPTS) <= len(TASKS)
    assert max(token for answer in ANSWERS.values() for token in answer) < VOCABULARY


def test_prefix_goes_through_the_model_once_for_each_task():
    model, lengths = adapted_llama(dtype=torch.float32), []
    caches = PrefixCaches(model, {0: PREFIX, 1: PREFIX, 2: PREFIX})
    caches.start(2, 1)  # the first time, whether the model counts columns is tried too
    model.register_forward_pre_hook(lambda _, __, named: lengths.append(named["input_ids"].shape), with_kwargs=True)
    for task_id in (0, 0, 1, 1):
        OptionScorer(model, Tokens(), caches).scores(questions([task_id] * len(PROMPTS)))
    assert lengths.count((1, len(PREFIX))) == 2


def test_options_with_the_same_tokens_are_refused_by_name():
    ANSWERS["V"] = ANSWERS["v"]
    question = Question(Task("own", 0, ("v", "w", "V"), answer_prefix=""), Example("", "", "", "", 0, 0), PREFIX, "")
    with pytest.raises(UserError, match="'v' and 'V' of the task own"):
        continuations(question, Tokens())


def test_scores_and_logits_that_are_not_numbers_are_refused():
    model = adapted_llama(dtype=torch.float32)
    next(iter(mtl_lora.adapter_layers(model).values())).lora_A.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"question 0 of own has the scores .*nan"):
        asked = questions([0] * len(PROMPTS))
        likeliest(asked[0], OptionScorer(model, Tokens()).scores(asked)[0])
    encoder = Tokens()
    encoder.end_id = 2
    encoder.tokenizer = type("Tokenizer", (), {"pad_token_id": 0, "eos_token_id": 2})
    with pytest.raises(UserError, match="questions of own, which are not finite"):
        generate_answers(model, encoder, questions([0] * len(PROMPTS)), 2)


def test_what_is_written_ends_with_the_template_or_with_the_sequence():
    model, encoder = adapted_llama(dtype=torch.float32), Tokens()

    def written(end: int, eos: int) -> list[int]:
        encoder.end_id = end
        encoder.tokenizer = SimpleNamespace(
            pad_token_id=0, eos_token_id=eos, batch_decode=lambda ids, **_: ids.tolist()
        )
        (tokens,) = generate_answers(model, encoder, questions([0] * len(PROMPTS))[:1], 6)
        return tokens

    unseen = VOCABULARY + 1
    first, second, *_ = whole = written(unseen, unseen)
    assert len(whole) == 6 and first != second
    assert written(second, unseen) == [first, unseen] and written(unseen, second) == [first, second]


def test_ties_go_to_the_lowest_option():
    assert likeliest(questions([0] * len(PROMPTS))[0], [-2.0, -1.0, -1.0]) == 1


# ---- real prompts and a real tokenizer ----


@pytest.fixture(scope="module")
def evaluator(trained):
    made = Evaluator(EvalConfig(checkpoint=trained, dtype="fp64", data_dir=str(QUICKSTART / "test"), limit=2))
    made.load()
    return made


@pytest.fixture
def asked(evaluator) -> list[Question]:
    """Two questions of each task; made for each test, which may change them."""
    return load_questions(evaluator, load_examples).questions


def own(question: Question, *options: str) -> Question:
    """The question with options of its own."""
    question.task = Task("own", question.task.id, options)
    question.example = Example("Which?", "", "x", options[0], question.task.id, 0)
    return question


def slow_score(evaluator, question, option: str) -> float:
    """Log-probability of the option's tokens and EOS: one forward per option, no cache, no padding."""
    shared, _ = continuations(question, evaluator.encoder)
    ids = torch.tensor([question.prompt_ids + evaluator.encoder.answer_ids(question.task.answer_prefix + option)])
    with torch.no_grad(), route.use(torch.tensor([question.task.id])):
        logp = evaluator.model(input_ids=ids).logits[0].log_softmax(-1)
    start = len(question.prompt_ids) + len(shared)
    return sum(logp[place - 1, ids[0, place]].item() for place in range(start, ids.shape[1]))


@pytest.mark.slow(1)
def test_option_scores_the_log_probability_of_its_tokens_and_eos(evaluator, asked):
    asked.append(own(asked.pop(), "red", "red kite", "a very old red kite", "solution1", "solution10"))
    found = OptionScorer(evaluator.model, evaluator.encoder).scores(asked)
    for question, scores in zip(asked, found, strict=True):
        assert scores == pytest.approx([slow_score(evaluator, question, one) for one in question.options], abs=1e-6)


def test_eos_keeps_an_option_from_winning_by_being_the_beginning_of_another(evaluator, asked):
    _, (short, long) = continuations(own(asked[0], "solution1", "solution10"), evaluator.encoder)
    assert short[-1] == long[-1] == evaluator.encoder.tokenizer.eos_token_id


def slow_greedy(evaluator, question, tokens: int) -> str:
    ids, tokenizer = list(question.prompt_ids), evaluator.encoder.tokenizer
    for _ in range(tokens):
        with torch.no_grad(), route.use(torch.tensor([question.task.id])):
            best = evaluator.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        ids.append(best)
        if best == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[len(question.prompt_ids) :], skip_special_tokens=True)


@pytest.mark.slow(1)
def test_generation_in_mixed_batches_is_greedy_decoding_of_each_question_alone(evaluator, asked):
    texts = generate_answers(evaluator.model, evaluator.encoder, asked, 6)
    assert texts == [slow_greedy(evaluator, question, 6) for question in asked]


@pytest.mark.slow(1)
def test_beams_in_a_mixed_batch_are_those_of_each_question_alone(evaluator, asked):
    together = generate_answers(evaluator.model, evaluator.encoder, asked[::3], 6, 3)
    assert together == [generate_answers(evaluator.model, evaluator.encoder, [one], 6, 3)[0] for one in asked[::3]]
    assert together != generate_answers(evaluator.model, evaluator.encoder, asked[::3], 6), "greedy finds others"


def test_another_task_id_gives_other_scores(evaluator, asked):
    """The route reaches the layers: the same prompt under another task is another function."""
    (before,) = evaluator.scorer.scores(asked[:1])
    asked[0].task = Task("other", (asked[0].task.id + 1) % 8, asked[0].task.options)
    (after,) = evaluator.scorer.scores(asked[:1])
    assert before != pytest.approx(after, abs=1e-9)


def test_scoring_free_text_is_refused(tmp_path, tiny_base):
    (tmp_path / "tasks.json").write_text(json.dumps([{"name": "free", "id": 0}]))
    made = Evaluator(EvalConfig(base_model=tiny_base, tasks_file=str(tmp_path / "tasks.json")))
    question = Question(made.tasks["free"], Example("a", "", "b", "b", 0, 0), [1], "")
    with pytest.raises(UserError, match=r"free is free text.*--mode generate"):
        made.prepare({"score": [question]})


def test_length_normalised_scores_are_by_token_with_eos():
    """Behind what the options share: y has four tokens of its own, z and u have two, and so have w and x."""
    first, second, *_ = questions([0] * len(PROMPTS))
    assert per_token(first, Tokens(), [-6.0, -3.0]) == [-3.0, -1.5]
    assert per_token(second, Tokens(), [-6.0, -4.0, -3.0]) == [-1.5, -2.0, -1.5]


def test_the_answer_is_the_likeliest_option_whatever_its_length():
    made, (_, asked, *_) = Evaluator.__new__(Evaluator), questions([0] * len(PROMPTS))
    made.encoder, made.scorer = Tokens(), SimpleNamespace(scores=lambda asked: [[-6.0, -4.0, -3.5]])
    (line,) = made.answer([asked], "score")
    assert (line["parsed"], line["normalised"], line["scores"]) == ("u", "y", [-6.0, -4.0, -3.5])
