"""The quick-start data set: the bytes its generator gives, the eight formats, and no way to the answer but reading."""

import collections
import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
from shared import QUICKSTART as FOLDER

from mtl_lora.language.tasks import COMMONSENSE

KINDS = ("easy", "hard")
STANDARD_ERRORS = 3  # how far from chance a heuristic may be by luck
COUNTS = {("train", "easy"): 210, ("train", "hard"): 30, ("test", "easy"): 30, ("test", "hard"): 30}
ARTICLES = {"a", "an", "the"}


def numbered(word: str, count: int, separator: str) -> str:
    """The part of a pattern that captures the options ``Word1: ... Word2: ...``."""
    return separator.join(rf"{word}{number}: (.+?)" for number in range(1, count + 1))


ANSWER4 = (
    r"Please choose the correct answer to the question: (.+?)\n\n"
    rf"{numbered('Answer', 4, ' ')}\n\nAnswer format: answer1/answer2/answer3/answer4"
)
SKELETONS = {
    "boolq": r"Please answer the following question with true or false, question: (.+\?)\n\nAnswer format: true/false",
    "piqa": r"Please choose the correct solution to the question: (.+?)\n\n"
    rf"{numbered('Solution', 2, chr(10) * 2)}\n\nAnswer format: solution1/solution2",
    "social_i_qa": r"Please choose the correct answer to the question: (.+?)\n\n"
    rf"{numbered('Answer', 3, ' ')}\n\nAnswer format: answer1/answer2/answer3",
    "hellaswag": r"Please choose the correct ending to complete the given sentence: (.+?)\n\n"
    rf"{numbered('Ending', 4, ' ')}\n\nAnswer format: ending1/ending2/ending3/ending4",
    "winogrande": r"Please choose the correct answer to fill in the blank to complete the given sentence: (.*_.*?)\n\n"
    rf"{numbered('Option', 2, ' ')} Answer format: option1/option2",
    "ARC-Challenge": ANSWER4,
    "ARC-Easy": ANSWER4,
    "openbookqa": ANSWER4,
}


def load(name: str):
    """Import a script of the data folder, which is no package."""
    if name not in sys.modules:
        specification = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(sys.modules[name])
    return sys.modules[name]


drafts, generate = load("drafts"), load("generate")


def read(split: str, task: str) -> list[dict]:
    """The committed records of one task and split."""
    path = FOLDER / ("train.json" if split == "train" else f"test/{task}/test.json")
    records = json.loads(path.read_text(encoding="utf-8"))
    return [record for record in records if record["task_id"] == COMMONSENSE[task].id]


DATA = {(split, task): read(split, task) for split in ("train", "test") for task in COMMONSENSE.names}
EVERY = [(split, task, record) for (split, task), records in DATA.items() for record in records]


def parse(task: str, instruction: str) -> tuple[str, list[str]]:
    """(stem, option texts) of an instruction; for boolq the options are true and false."""
    stem, *options = re.fullmatch(SKELETONS[task], instruction).groups()
    return stem, options or ["true", "false"]


def right_text(task: str, record: dict) -> str:
    """The text of the right option."""
    return parse(task, record["instruction"])[1][COMMONSENSE[task].options.index(record["answer"])]


def words(text: str) -> list[str]:
    """The words of a text without articles, in lower case."""
    return [word for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in ARTICLES]


def spaced(text: str) -> str:
    """A text's words in such a form that ``in`` finds whole words; of a fact about somebody, what follows the name."""
    return f" {' '.join(words(text.rpartition('{name}')[2]))} "


def accuracy_above_chance(split: str, kind: str, scores) -> float:
    """How many standard errors above chance it comes to choose the option with the highest of ``scores(task, record)``.

    A tie counts as the share of the right option, so that ties say nothing.
    """
    gained, variance = 0.0, 0.0
    for (data_split, task), records in DATA.items():
        for record in records:
            if data_split != split or record["kind"] != kind:
                continue
            values = scores(task, record)
            best = [index for index, value in enumerate(values) if value == max(values)]
            right = COMMONSENSE[task].options.index(record["answer"])
            gained += (right in best) / len(best) - 1 / len(values)
            variance += (1 - 1 / len(values)) / len(values)
    return gained / math.sqrt(variance)


@pytest.mark.slow(1)
def test_the_generator_gives_the_committed_bytes():
    texts = generate.build()
    committed = {path.relative_to(FOLDER).as_posix() for path in FOLDER.glob("test/*/*")} | {"train.json"}
    assert committed == set(texts)
    for name, text in texts.items():
        assert (FOLDER / name).read_bytes() == text.encode("utf-8"), name


@pytest.mark.slow(1)
def test_check_names_the_file_that_differs_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    (tmp_path / "train.json").write_text("[]\n")
    with pytest.raises(SystemExit) as stopped:
        generate.main(["--check"])
    assert stopped.value.code == 2
    assert str(tmp_path / "train.json") in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]
    assert (tmp_path / "train.json").read_text() == "[]\n"


@pytest.mark.parametrize("task", COMMONSENSE.names)
def test_each_task_has_the_promised_number_of_records(task):
    found = {
        (split, kind): sum(record["kind"] == kind for record in DATA[split, task])
        for split in ("train", "test")
        for kind in KINDS
    }
    assert found == COUNTS


def test_records_have_the_five_fields_and_their_kind():
    for _, task, record in EVERY:
        assert list(record) == ["instruction", "input", "output", "answer", "task_id", "kind"]
        assert record["input"] == "" and record["kind"] in KINDS
        assert record["output"] == "the correct answer is " + record["answer"]
        assert record["task_id"] == COMMONSENSE[task].id


@pytest.mark.parametrize("task", COMMONSENSE.names)
def test_instructions_have_the_skeleton_of_their_task(task):
    for split in ("train", "test"):
        for record in DATA[split, task]:
            assert re.fullmatch(SKELETONS[task], record["instruction"]), record["instruction"]
            options = COMMONSENSE[task].options_of(record["instruction"])
            assert record["answer"] in options and len(options) == drafts.CHOICES[task]


def test_options_differ_within_a_record():
    for _, task, record in EVERY:
        options = parse(task, record["instruction"])[1]
        assert len({option.lower() for option in options}) == drafts.CHOICES[task], record["instruction"]


def test_records_are_short():
    assert max(len(record["instruction"].split()) for _, _, record in EVERY) <= 60


@pytest.mark.parametrize("task", COMMONSENSE.names)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_label_is_equally_often_right(split, kind, task):
    labels = COMMONSENSE[task].options[: drafts.CHOICES[task]]
    counts = collections.Counter(record["answer"] for record in DATA[split, task] if record["kind"] == kind)
    assert set(counts) == set(labels)
    assert max(counts.values()) - min(counts.values()) <= 1, counts


@pytest.mark.parametrize("task", [task for task in COMMONSENSE.names if task != "boolq"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_an_option_text_is_wrong_in_proportion_to_how_often_it_is_right(split, kind, task):
    right, wrong = collections.Counter(), collections.Counter()
    for record in DATA[split, task]:
        if record["kind"] == kind:
            options = parse(task, record["instruction"])[1]
            right[right_text(task, record)] += 1
            wrong.update(option for option in options if option != right_text(task, record))
    assert wrong == {text: count * (drafts.CHOICES[task] - 1) for text, count in right.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_boolq_asks_for_a_word_as_often_truly_as_falsely(split, kind):
    asked = {"true": collections.Counter(), "false": collections.Counter()}
    for record in DATA[split, "boolq"]:
        if record["kind"] == kind:
            asked[record["answer"]][words(parse("boolq", record["instruction"])[0])[-1]] += 1
    assert asked["true"] == asked["false"]


def test_no_record_occurs_twice():
    instructions = [record["instruction"] for _, _, record in EVERY]
    assert len(set(instructions)) == len(instructions)


def test_no_test_record_is_a_training_record_with_its_options_in_another_order():
    def unordered(task: str, record: dict) -> tuple:
        stem, options = parse(task, record["instruction"])
        return task, stem, tuple(sorted(options))

    found = {"train": set(), "test": set()}
    for split, task, record in EVERY:
        found[split].add(unordered(task, record))
    assert not found["train"] & found["test"]


def test_easy_test_stories_join_words_that_no_training_story_joins():
    joined = {
        split: {frozenset(draft.fact) for task in COMMONSENSE.names for draft in drafts.easy_drafts(task, split)}
        for split in ("train", "test")
    }
    assert not joined["train"] & joined["test"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_drafts_say_truly_which_words_or_fact_they_are_about(split):
    for task in COMMONSENSE.names:
        for draft in drafts.easy_drafts(task, split) + drafts.hard_drafts(task, split):
            stem, right = spaced(draft.stem), spaced(draft.right)
            first, second = map(spaced, draft.fact)
            assert first in stem, draft
            assert second in (stem if draft.kind == "easy" else right) or task == "boolq", draft
            assert draft.kind == "hard" or first in right or task == "boolq", draft


def test_hard_test_facts_are_never_told_or_asked_in_training():
    """By the facts of the tables, in either direction, and by the text of all committed training records."""
    facts = {
        split: [draft for task in COMMONSENSE.names for draft in drafts.hard_drafts(task, split)]
        for split in ("train", "test")
    }
    pairs = {split: {frozenset(map(spaced, draft.fact)) for draft in facts[split]} for split in facts}
    assert not pairs["train"] & pairs["test"]
    told = []
    for split, task, record in EVERY:
        if split == "train":
            stem = spaced(parse(task, record["instruction"])[0])
            told.append((stem, stem if task == "boolq" else spaced(right_text(task, record))))
    for draft in facts["test"]:
        subject, right = map(spaced, draft.fact)
        for stem, answer in told:
            assert not (subject in stem and right in answer), (draft.fact, stem, answer)
            assert not (right in stem and subject in answer), (draft.fact, stem, answer)


def test_hard_test_facts_are_all_different():
    facts = [draft.fact for task in COMMONSENSE.names for draft in drafts.hard_drafts(task, "test")]
    assert len({frozenset(fact) for fact in facts}) >= len(facts) - 15  # an opposite is asked from both of its sides
    assert len(set(facts)) == len(facts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_that_was_most_often_right_in_training_is_no_help(kind):
    right, shown = collections.Counter(), collections.Counter()
    for split, task, record in EVERY:
        if split == "train":
            right[task, right_text(task, record)] += 1
            shown.update((task, option) for option in parse(task, record["instruction"])[1])

    def often(task: str, record: dict) -> list[float]:
        return [right[task, option] for option in parse(task, record["instruction"])[1]]

    def in_proportion(task: str, record: dict) -> list[float]:
        options = parse(task, record["instruction"])[1]
        return [right[task, option] / max(1, shown[task, option]) for option in options]

    for scores in (often, in_proportion):
        assert abs(accuracy_above_chance("test", kind, scores)) < STANDARD_ERRORS


HEURISTICS = {
    "first": lambda options: [-index for index in range(len(options))],
    "last": lambda options: list(range(len(options))),
    "longest": lambda options: [len(option) for option in options],
    "shortest": lambda options: [-len(option) for option in options],
    "most words": lambda options: [len(option.split()) for option in options],
    "most capitals": lambda options: [sum(letter.isupper() for letter in option) for option in options],
}


@pytest.mark.parametrize("heuristic", HEURISTICS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_place_length_and_capitals_of_an_option_are_no_help(split, kind, heuristic):
    def scores(task: str, record: dict) -> list[int]:
        options = parse(task, record["instruction"])[1]
        # boolq's true and false have one length and place each; as many are right of either.
        return [0] * len(options) if task == "boolq" else HEURISTICS[heuristic](options)

    assert abs(accuracy_above_chance(split, kind, scores)) < STANDARD_ERRORS


def test_no_option_of_a_hard_record_stands_in_its_text():
    for _, task, record in EVERY:
        if record["kind"] == "hard":
            stem, options = parse(task, record["instruction"])
            assert not [option for option in options if spaced(option) in spaced(stem)], record["instruction"]


def test_common_words_answer_the_easy_records_and_not_the_hard_ones():
    def mentioned(task: str, record: dict) -> list[int]:
        stem, options = parse(task, record["instruction"])
        return [len(set(words(stem)) & set(words(option))) for option in options]

    for split in ("train", "test"):
        assert accuracy_above_chance(split, "easy", mentioned) > 5 * STANDARD_ERRORS
        assert accuracy_above_chance(split, "hard", mentioned) < STANDARD_ERRORS


def test_a_table_that_can_not_be_dealt_is_refused():
    with pytest.raises(drafts.UserError, match="list more facts"):
        drafts.deal(["kite", "kite", "bell"], [set()] * 3, 1, drafts.generator_for("test"))


def plain(text: str) -> str:
    """A text without what need not differ: case, white space and punctuation."""
    return " ".join(re.findall(r"[\w']+", text.lower()))


@pytest.mark.slow
def test_nothing_is_taken_from_the_benchmarks():
    if "COMMONSENSE_DATA" not in os.environ:
        pytest.skip("COMMONSENSE_DATA does not name a folder that holds llm_adapters/ with the real records")
    files = sorted(Path(os.environ["COMMONSENSE_DATA"]).glob("llm_adapters/*/*.json"))
    assert {path.parent.name for path in files} == set(COMMONSENSE.names)
    instructions = {record["instruction"] for path in files for record in json.loads(path.read_bytes())}
    instructions = {plain(instruction) for instruction in instructions}
    assert not {plain(record["instruction"]) for _, _, record in EVERY} & instructions
    stems = {plain(parse(task, record["instruction"])[0]) for _, task, record in EVERY}
    # A stem can only be in there if each of its runs of three words is.
    runs = {stem: runs_of_three(stem) for stem in stems}
    wanted = set().union(*runs.values())
    found = set().union(*(wanted & runs_of_three(instruction) for instruction in instructions))
    rest = [stem for stem in sorted(stems) if runs[stem] <= found]
    everything = "\n".join(f" {instruction} " for instruction in instructions)
    assert [stem for stem in rest if f" {stem} " in everything] == []


def runs_of_three(text: str) -> set[tuple[str, ...]]:
    """Every three words that stand side by side."""
    words = text.split()
    return set(zip(words, words[1:], words[2:], strict=False))
