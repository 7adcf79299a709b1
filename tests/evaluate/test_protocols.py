"""Generation and scoring against slow references, on a tiny model with an adapter whose every weight matters."""

import json

import pytest
import torch
from shared import QUICKSTART

from mtl_lora import route
from mtl_lora.language.config import EvalConfig
from mtl_lora.language.evaluator import Evaluation
from mtl_lora.language.generate import generate_answers
from mtl_lora.language.option_scoring import best_option, option_tails, score_options
from mtl_lora.language.tasks import Task


@pytest.fixture
def evaluation(trained):
    made = Evaluation(EvalConfig(checkpoint=trained, data_dir=str(QUICKSTART / "test"), limit=3, dtype="fp64"))
    made.load()
    return made


def slow_score(evaluation, question, option: str) -> float:
    """Log-probability of the option's tokens and EOS: one whole forward an option, no cache, no padding."""
    opening, _ = option_tails(question, evaluation.encoder)
    answer = evaluation.encoder.answer_ids(question.task.answer_prefix + option)
    ids = torch.tensor([question.prompt_ids + answer])
    with torch.no_grad(), route.use(torch.tensor([question.task.id])):
        logp = evaluation.model(input_ids=ids).logits[0].log_softmax(-1)
    start = len(question.prompt_ids) + len(opening)
    return sum(logp[position - 1, ids[0, position]].item() for position in range(start, ids.shape[1]))


def test_an_option_scores_the_log_probability_of_its_tokens_and_eos(evaluation):
    questions = evaluation.questions
    found = score_options(evaluation.model, evaluation.encoder, questions, evaluation.tokenizer.pad_token_id)
    for question, scores in zip(questions, found, strict=True):
        assert len(scores) == len(question.options)
        for option, score in zip(question.options, scores, strict=True):
            assert score == pytest.approx(slow_score(evaluation, question, option), abs=1e-6)


def test_options_of_several_words_and_different_length_are_scored_whole(evaluation, monkeypatch):
    question = evaluation.questions[0]
    options = ("red", "red kite", "a very old red kite", "solution1", "solution10")
    question.task = Task("own", question.task.id, options)
    question.example = type(question.example)("What flies?", "", "x", "red", question.task.id, 0)
    (scores,) = score_options(evaluation.model, evaluation.encoder, [question], evaluation.tokenizer.pad_token_id)
    expected = [slow_score(evaluation, question, option) for option in options]
    assert scores == pytest.approx(expected, abs=1e-6)


def test_eos_keeps_an_option_from_winning_by_being_the_beginning_of_another(evaluation):
    question = evaluation.questions[0]
    question.task = Task("own", question.task.id, ("solution1", "solution10"))
    question.example = type(question.example)("Which?", "", "x", "solution1", question.task.id, 0)
    _, (short, long) = option_tails(question, evaluation.encoder)
    assert short[-1] == long[-1] == evaluation.tokenizer.eos_token_id


def test_ties_go_to_the_lowest_option():
    assert best_option(["a", "b", "c"], [-2.0, -1.0, -1.0]) == "b"


def slow_greedy(evaluation, question, tokens: int) -> str:
    ids = list(question.prompt_ids)
    for _ in range(tokens):
        with torch.no_grad(), route.use(torch.tensor([question.task.id])):
            best = evaluation.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        ids.append(best)
        if best == evaluation.tokenizer.eos_token_id:
            break
    return evaluation.tokenizer.decode(ids[len(question.prompt_ids) :], skip_special_tokens=True)


def test_generation_in_mixed_batches_is_greedy_decoding_of_each_question_alone(evaluation):
    texts = generate_answers(evaluation.model, evaluation.tokenizer, evaluation.questions, 8, 1)
    assert texts == [slow_greedy(evaluation, question, 8) for question in evaluation.questions]


def test_beams_in_a_mixed_batch_are_those_of_each_question_alone(evaluation):
    together = generate_answers(evaluation.model, evaluation.tokenizer, evaluation.questions[:8], 8, 3)
    alone = [
        generate_answers(evaluation.model, evaluation.tokenizer, [question], 8, 3)[0]
        for question in evaluation.questions[:8]
    ]
    assert together == alone


def test_another_task_id_gives_other_scores(evaluation):
    """The route reaches the layers: the same prompt under another task is another function."""
    question = evaluation.questions[0]
    pad = evaluation.tokenizer.pad_token_id
    (before,) = score_options(evaluation.model, evaluation.encoder, [question], pad)
    question.task = Task("other", (question.task.id + 1) % 8, question.task.options)
    (after,) = score_options(evaluation.model, evaluation.encoder, [question], pad)
    assert before != pytest.approx(after, abs=1e-9)


def test_scoring_free_text_is_refused(tmp_path, tiny_base):
    (tmp_path / "tasks.json").write_text(json.dumps([{"name": "free", "id": 0}]))
    (tmp_path / "free").mkdir()
    (tmp_path / "free" / "test.json").write_text(json.dumps([{"instruction": "a", "output": "b", "answer": "b"}]))
    with pytest.raises(ValueError, match=r"free text.*--mode generate"):
        Evaluation(
            EvalConfig(
                base_model=tiny_base, tasks_file=str(tmp_path / "tasks.json"), data_dir=str(tmp_path), mode="score"
            )
        )
