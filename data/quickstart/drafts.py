"""What the quick-start records ask: stories from ``stories.json`` (easy) and facts from ``facts.json`` (hard).

A draft is a record before its options have an order. Both sides of the split are made here, and so is the rule that
a text is a wrong option as often, in proportion, as it is the right one.
"""

import dataclasses
import functools
import itertools
import random
import re
import string
from pathlib import Path

from mtl_lora.errors import UserError
from mtl_lora.files import read_json

FOLDER = Path(__file__).resolve().parent
SEED = 2411
SPLITS = ("train", "test")
HELD_OUT_SHARE = 4  # every fourth pair of words is kept for the easy test records
ATTEMPTS = 1000
CHOICES = {
    "boolq": 2, "piqa": 2, "social_i_qa": 3, "hellaswag": 4, "winogrande": 2, "ARC-Challenge": 4, "ARC-Easy": 4,
    "openbookqa": 4,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Draft:
    """A record before its options have an order.

    fact: for a hard record the subject and object it asks for; for an easy one the two words that its story joins.
    right and wrong: the texts of the options; for boolq these are true and false.
    """

    task: str
    kind: str
    fact: tuple[str, str]
    stem: str
    right: str
    wrong: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Stories:
    """The word lists and story forms of ``stories.json``.

    words: the words of each list, in the order that decides which pairs are held out.
    seconds: the second form of a word that has one: ``found`` has ``find``, ``Ann`` has ``she``.
    """

    words: dict[str, list[str]]
    seconds: dict[str, str]
    forms: list[dict]

    def held_out(self, first: str, second: str) -> bool:
        """Whether the stories that join these two words, of two different lists, are test stories."""
        places = [words.index(word) for word in (first, second) for words in self.words.values() if word in words]
        return sum(places) % HELD_OUT_SHARE == 0


@functools.cache
def stories() -> Stories:
    """Read ``stories.json``; an entry ``found|find`` is the word ``found`` with the second form ``find``."""
    table = read_json(FOLDER / "stories.json", "the table of stories")
    entries = {slot: [entry.split("|") for entry in entries] for slot, entries in table["words"].items()}
    words = {slot: [entry[0] for entry in listed] for slot, listed in entries.items()}
    both = list(itertools.chain(*words.values()))
    if len(set(both)) != len(both):
        raise UserError(f"stories.json lists {sorted({word for word in both if both.count(word) > 1})} more than once")
    return Stories(words, {entry[0]: entry[-1] for listed in entries.values() for entry in listed}, table["forms"])


@functools.cache
def relations() -> list[dict]:
    """Read ``facts.json``; a relation with ``pairs`` holds in both directions, so each pair gives two facts."""
    table = read_json(FOLDER / "facts.json", "the table of facts")
    for relation in table:
        for split in SPLITS:
            facts = [(subject, right, set(*also)) for subject, right, *also in relation[split]]
            turned = [(right, subject, also) for subject, right, also in facts if relation.get("pairs")]
            relation[split] = facts + turned
    return table


def generator_for(*names: object) -> random.Random:
    """Random numbers of one part of the data set, so that a change of one table leaves the other parts alone."""
    return random.Random("/".join(map(str, (SEED, *names))))


def pick(items: list, rng: random.Random):
    """One of the items, by ``random()`` as in ``shuffled``: the one method that Python promises never to change."""
    return items[int(rng.random() * len(items))]


def shuffled(items: list, rng: random.Random) -> list:
    """A copy in random order (Fisher-Yates)."""
    items = list(items)
    for last in range(len(items) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        items[last], items[other] = items[other], items[last]
    return items


def deal(rights: list[str], refused: list[set[str]], count: int, rng: random.Random) -> list[tuple[str, ...]]:
    """``count`` wrong options for each right one: every column of them is the right options in another order.

    So a text is wrong exactly ``count`` times as often as it is right, and its frequency tells nothing.
    """
    for _ in range(ATTEMPTS):
        taken = [{right} | more for right, more in zip(rights, refused, strict=True)]
        columns = []
        while len(columns) < count and (column := rearranged(rights, taken, rng)):
            columns.append(column)
            for row, word in zip(taken, column, strict=True):
                row.add(word)
        if len(columns) == count:
            return list(zip(*columns, strict=True))
    raise UserError(f"no {count} wrong options for each of {sorted(set(rights))}; refuse fewer or list more facts")


def rearranged(words: list[str], taken: list[set[str]], rng: random.Random) -> list[str]:
    """The words in an order in which none is taken in its row; empty if a few swaps do not get there."""
    column = shuffled(words, rng)
    for row, row_taken in enumerate(taken):
        if column[row] not in row_taken:
            continue
        swaps = [i for i, word in enumerate(column) if word not in row_taken and column[row] not in taken[i]]
        if not swaps:
            return []
        other = pick(swaps, rng)
        column[row], column[other] = column[other], column[row]
    return column


def easy_drafts(task: str, split: str) -> list[Draft]:
    """The story records: the right option is a word of the text."""
    drafts = []
    for number, form in enumerate(form for form in stories().forms if form["task"] == task):
        rng = generator_for(task, split, "easy", number)
        order = shuffled(stories().words[form["asked"]], rng)
        # boolq asks for the same words in its true and its false half, so that no word tells the answer.
        truths = (True, False) if task == "boolq" else (True,)
        for truth in truths:
            rights = shuffled(list(itertools.islice(itertools.cycle(order), form[split] // len(truths))), rng)
            wrongs = deal(rights, [set()] * len(rights), CHOICES[task] - 1, rng)
            for index, (right, wrong) in enumerate(zip(rights, wrongs, strict=True)):
                stem = form["stems"][index % len(form["stems"])]
                partner = partner_of(right, form["with"], split, rng)
                drafts.append(tell(form, stem, partner, right, wrong, truth, rng))
    return drafts


def partner_of(word: str, slot: str, split: str, rng: random.Random) -> str:
    """A word of another list whose pair with this one is on this side of the split."""
    held_out = split == "test"
    return pick([other for other in stories().words[slot] if stories().held_out(word, other) == held_out], rng)


def tell(form: dict, stem: str, partner: str, right: str, wrong: tuple, truth: bool, rng: random.Random) -> Draft:
    """The draft of one story: the asked word, its partner, and any words in the other slots."""
    asked = form["asked"]
    values = {asked: right, form["with"]: partner, f"other_{asked}": wrong[0], "asked": right if truth else wrong[0]}
    stem = fill(stem, values, rng)
    if form["task"] == "boolq":
        return Draft("boolq", "easy", (right, partner), stem.lower(), *true_or_false(truth))
    first, *others = (form["option"].format(**{asked: word}) for word in (right, *wrong))
    return Draft(form["task"], "easy", (right, partner), stem, first, tuple(others))


def fill(stem: str, values: dict[str, str], rng: random.Random) -> str:
    """Put words into a template: given ones, else any word of the slot's list that is not there yet.

    ``{other_place}`` is a second word of the list of ``{place}``; ``{verb2}`` the second form of the word ``{verb}``.
    """
    values = dict(values)
    for _, slot, _, _ in string.Formatter().parse(stem):
        slot = (slot or "").removesuffix("2")
        if slot and slot not in values:
            words = stories().words[slot.removeprefix("other_")]
            values[slot] = pick([word for word in words if word not in values.values()], rng)
    seconds = {f"{slot}2": stories().seconds[word] for slot, word in values.items() if word in stories().seconds}
    return stem.format(**values, **seconds)


def true_or_false(truth: bool) -> tuple[str, tuple[str, ...]]:
    """The right and the wrong option of a boolq record."""
    return ("true", ("false",)) if truth else ("false", ("true",))


def hard_drafts(task: str, split: str) -> list[Draft]:
    """The records that need a fact, one for each fact."""
    drafts = []
    for relation in (relation for relation in relations() if relation["task"] == task):
        rng = generator_for(task, split, "hard", relation["relation"])
        if task == "boolq":
            drafts += judged(relation, split, rng)
        else:
            drafts += chosen(relation, split, rng)
    return drafts


def chosen(relation: dict, split: str, rng: random.Random) -> list[Draft]:
    """One record for each fact of a relation, with wrong options that are the right ones of other facts."""
    facts, templates = relation[split], relation["stems"]
    rights = [right for _, right, _ in facts]
    # An option that the text mentions would be the answer of an easy record.
    refused = [also | {word for word in rights if mentions(subject, word)} for subject, _, also in facts]
    wrongs = deal(rights, refused, CHOICES[relation["task"]] - 1, rng)
    drafts = []
    for index, ((subject, right, _), wrong) in enumerate(zip(facts, wrongs, strict=True)):
        stem = templates[index % len(templates)].replace("{subject}", subject)
        first, *others = (relation["option"].format(object=word) for word in (right, *wrong))
        drafts.append(Draft(relation["task"], "hard", (subject, right), fill(stem, {}, rng), first, tuple(others)))
    return drafts


def judged(relation: dict, split: str, rng: random.Random) -> list[Draft]:
    """boolq: the first half of the facts is asked truly, the second falsely."""
    facts = relation[split]
    half = len(facts) // 2
    asked = [(facts[:half], True), (facts[half:], False)]
    values = {right for _, right, _ in facts}
    drafts = []
    for part, truth in asked:
        for subject, right, _ in part:
            value = right if truth else min(values - {right})
            stem = fill(relation["stems"][0], {"subject": subject, "object": value}, rng)
            drafts.append(Draft("boolq", "hard", (subject, right), stem.lower(), *true_or_false(truth)))
    return drafts


def mentions(text: str, phrase: str) -> bool:
    """Whether the phrase stands in the text as whole words."""
    return re.search(rf"\b{re.escape(phrase)}\b", text, re.IGNORECASE) is not None
