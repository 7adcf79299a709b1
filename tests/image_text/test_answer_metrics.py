"""Soft VQA accuracy on cases worked out by hand; captions against a slow CIDEr and a BLEU worked out by hand."""

import collections
import importlib.util
import math
import shutil

import pytest

from mtl_lora.errors import UserError
from mtl_lora.image_text import captions
from mtl_lora.metrics import METRICS, units_text, vqa_accuracy, vqa_accuracy_official, vqa_normalised
from mtl_lora.results import TaskResult, measure

needs_scorers = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None, reason="the package pycocoevalcap is not here"
)
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="Java is not here")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Red\n", "red"),
        ("on\tthe left", "on left"),
        ("a/b-c", "b c"),  # no space beside the signs, so spaces come for them; and a is an article
        ("yes-no, well -now", "yesno well now"),  # beside a space somewhere, so they go everywhere
        ("left-\nright-hand", "left righthand"),  # a line break is a space to the rule
        ("1,000-2", "10002"),  # a number with a comma: all signs go
        ("u.s. 3.5 5.", "us 3.5 5"),
        ("Ten", "10"),
        ("none", "0"),
        ("one of an apple", "1 of apple"),
        ("dont couldnt've yall'd've", "don't couldn't've y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("it's: ok'", "it's: ok'"),  # colons and apostrophes are no signs of the rule
    ],
)
def test_an_answer_is_normalised_by_the_official_rules(text, expected):
    assert vqa_normalised(text) == expected


@pytest.mark.parametrize(
    ("text", "target", "soft", "official"),
    [
        ("red", ["red"] + ["blue"] * 9, 0.3, 0.3),  # of ten people nine see one other who says so: 9/10 x 1/3
        ("red", ["red"] * 2 + ["blue"] * 8, 0.6, 0.6),  # 8/10 x 2/3 + 2/10 x 1/3
        ("red", ["red"] * 3 + ["blue"] * 7, 0.9, 0.9),
        ("red", ["red"] * 4 + ["blue"] * 6, 1.0, 1.0),
        ("T-shirt", ["t-shirt"] * 3 + ["shirt"] * 7, 0.9, 0.9),  # punctuation goes on both sides
        ("yes!", ["Yes!"] * 10, 1.0, 0.0),  # all the same: the official rule leaves the people's as they are
        ("red", ["red."] * 10, 1.0, 0.0),
        ("red", ["red."] * 9 + ["blue"], 1.0, 1.0),
        ("yes", ["yes!"] * 9 + ["no"], 1.0, 0.0),  # a space comes for the sign, and stays there
        ("two", ["two"] * 9 + ["2"], 1.0, 0.3),  # officially digits are for what is predicted alone
        ("the dog", ["the dog"] * 5 + ["dog"] * 5, 1.0, 1.0),
        ("the dog", ["the dog"] * 9 + ["cat"], 1.0, 0.0),
        ("", ["the"] * 10, 0.0, 0.0),
        ("A", ["a"] * 10, 1.0, 0.0),  # nothing is left of an article, which is then compared as it is
        ("Red", {"red": 0.6, "rED": 1.0, "blue": 0.3}, 1.0, 0.0),
        ("red", {"red": 0.6, "a red": 0.9}, 0.9, 0.6),
        ("green", {"red": 0.6}, 0.0, 0.0),
        ("", {}, 0.0, 0.0),
    ],
)
def test_soft_accuracy_is_that_of_the_cases_worked_out_by_hand(text, target, soft, official):
    assert (vqa_accuracy(text, target), vqa_accuracy_official(text, target)) == pytest.approx((soft, official))


def test_soft_scores_are_measured_with_the_majority_class_and_an_error():
    said = [("red", {"red": 1.0, "blue": 0.3}), ("blue", {"blue": 0.9}), ("box", {"green": 1.0, "blue": 0.6})]
    lines = [{"parsed": text, "answer": next(iter(target)), "answers": target} for text, target in said]
    result = measure("vqa_accuracy", lines)
    assert result.value == pytest.approx((1 + 0.9 + 0) / 3) and result.stderr > 0
    assert result.majority == pytest.approx((0.3 + 0.9 + 0.6) / 3)  # blue has the most of all scores
    people = [{**line, "answers": ["blue"] * 4 + ["red"] * 6} for line in lines]
    assert measure("vqa_accuracy", people).majority == 1
    assert TaskResult.read_json(reader(), result.to_json(), "task") == result


def reader():
    from mtl_lora.results import Reader

    return Reader("FILE", 2)


# ---- captions ----

CAPTIONS = ["a dog runs on the grass", "two dogs", "a red red red box", ""]
REFERENCES = [
    ["a dog runs on grass", "the dog runs on the green grass quickly"],
    ["two dogs run", "two dogs"],
    ["a red box", "the box is red"],
    ["a bird", "birds"],
]


def slow_cider(given: list[str], wanted: list[list[str]]) -> list[float]:
    """CIDEr-D by its formula: cosines of tf-idf of n words, clipped at the reference's, times exp(-delta^2 / 72)."""

    def grams(text, n):
        words = text.split()
        return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    found = []
    for caption, references in zip(given, wanted, strict=True):
        total = 0.0
        for n in range(1, 5):
            for reference in references:

                def weight(gram, n=n):
                    seen = sum(any(gram in grams(text, n) for text in each) for each in wanted)
                    return math.log(len(wanted)) - math.log(max(seen, 1))

                a = {gram: count * weight(gram) for gram, count in grams(caption, n).items()}
                b = {gram: count * weight(gram) for gram, count in grams(reference, n).items()}
                norms = math.sqrt(sum(v * v for v in a.values())) * math.sqrt(sum(v * v for v in b.values()))
                dot = sum(min(a[gram], b[gram]) * b[gram] for gram in a if gram in b)
                # Lengths are counted in pairs of words, as the published scorer does.
                delta = sum(grams(caption, 2).values()) - sum(grams(reference, 2).values())
                total += (dot / norms if norms else 0) * math.exp(-(delta**2) / 72)
        found.append(10 * total / 4 / len(references))
    return found


@needs_scorers
def test_cider_is_that_of_a_slow_one_and_is_measured_from_the_lines_alone():
    rows = captions.caption_rows(CAPTIONS, REFERENCES, "simple")
    scores = [row["cider"] for row in rows]
    assert scores == pytest.approx(slow_cider(CAPTIONS, REFERENCES)) and scores[3] == 0 < min(scores[:3])
    result = measure("cider", [{"parsed": "any", "answer": "any", "answers": [], **row} for row in rows])
    assert result.value == pytest.approx(sum(scores) / 4) and result.value > 1 and result.stderr > 0
    assert result.majority is None and "predicted" not in result.measured
    assert units_text(["cider", "bleu4"]) == "CIDEr times 100; BLEU-4 in percent; "
    assert TaskResult.read_json(reader(), result.to_json(), "task") == result


@needs_scorers
def test_bleu_is_that_of_the_scorer_and_of_a_hand():
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    rows = captions.caption_rows(CAPTIONS, REFERENCES, "simple")
    metric, scorer = METRICS["bleu4"], BleuScorer()
    for caption, references in zip(CAPTIONS, REFERENCES, strict=True):
        scorer += (caption, references)
    found = metric.value_of(metric.written([row["bleu4"] for row in rows]))
    assert found == pytest.approx(scorer.compute_score(option="closest")[0][3])
    # a dog runs on the grass: 6 of 6 words; of two words a-dog dog-runs runs-on on-the of 5; a-dog-runs dog-runs-on
    # runs-on-the of 4; a-dog-runs-on dog-runs-on-the of 3; as long as 5, the closest, so no penalty.
    assert rows[0]["bleu4"] == [6, 4, 3, 2, 6, 5, 4, 3, 6, 5]
    alone = metric.value_of(metric.written([rows[0]["bleu4"]]))
    assert alone == pytest.approx((6 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    short = metric.value_of(metric.written([[3, 2, 1, 1, 3, 2, 1, 1, 3, 6]]))
    assert short == pytest.approx(math.exp(1 - 6 / 3))
    few = captions.caption_rows(["red dog runs"], [["red dog runs"]], "simple")[0]["bleu4"]  # of four words it has none
    assert few == [3, 2, 1, 0, 3, 2, 1, 0, 3, 3]
    scorer = BleuScorer("red dog runs", ["red dog runs"])
    assert metric.value_of(metric.written([few])) == pytest.approx(scorer.compute_score(option="closest")[0][3])
    assert metric.value_of(metric.written([few])) < 0.04


def test_simple_tokens_are_lower_case_words_with_their_endings_apart():
    assert captions.tokenized(["A  Dog's (RED) toy, isn't it?"], "simple") == ["a dog 's -lrb- red -rrb- toy is n't it"]


@needs_scorers
@needs_java
@pytest.mark.slow(seconds=2)
def test_both_tokenizers_agree_on_plain_captions():
    texts = ["A dog's toy, isn't it?  (red)", "", "Two-thirds & 1,000.5 -- can't!", "über \n straße"]
    assert captions.tokenized(texts, "ptb") == captions.tokenized(texts, "simple")
    assert captions.tokenized(texts[:1], "simple") == ["a dog 's toy is n't it -lrb- red -rrb-"]
    assert captions.tokenizer_here("auto") == "ptb"


@needs_scorers
def test_without_java_the_simple_tokenizer_is_taken_with_a_word_on_it(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert captions.tokenizer_here("auto") == captions.tokenizer_here("simple") == "simple"
    assert "Java" in capsys.readouterr().err
    with pytest.raises(UserError, match="Java"):
        captions.tokenizer_here("ptb")
