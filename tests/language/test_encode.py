"""Token ids: the same prompt for training and evaluation, loss on exactly the answer, nothing lost but the middle."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_cases import INSTRUCTIONS, example
from tokenizer_kinds import ADDS_BOS, KINDS, SPACES, llama2
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mtl_lora.errors import UserError
from mtl_lora.language.batches import IGNORED, Collator, pad_left
from mtl_lora.language.encode import FREE_TEXT_RESERVE, TEMPLATES, Encoder, template
from mtl_lora.language.tasks import COMMONSENSE, Task, TaskSet

WORDS = "the old miller opened the gate and let the river carry sand to the harbour, "
CUTOFFS = {"uncut": 1024, "cut": 100}


def spelled(tokenizer, ids: list[int]) -> str:
    """The text of token ids without special tokens; byte tokens are joined before they are read.

    ``decode`` of a tokenizer with byte fallback spoils a line end that follows half a character.
    """
    tokens = [token for token in tokenizer.convert_ids_to_tokens(ids) if token not in tokenizer.all_special_tokens]
    if not any(re.fullmatch("<0x[0-9A-F]{2}>", token) for token in tokens):
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    spelt = b"".join(
        bytes([int(token[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", token) else token.replace("▁", " ").encode()
        for token in tokens
    )
    return spelt.decode(errors="replace").removeprefix(" ")


def joined(encoded) -> dict:
    """An encoded example as the collator takes it."""
    ids = encoded.prompt_ids + encoded.answer_ids
    return {"input_ids": ids, "prompt_length": len(encoded.prompt_ids), "task_id": encoded.task_id}


def every_answer(task: str, **fields) -> list:
    """One record with each of the answers it allows."""
    made = example(task, **fields)
    options = COMMONSENSE[task].options_of(made.instruction)
    return [example(task, answer=option, **fields) for option in options]


# ---- templates ----

SHORT = {"instruction": "Name a bird.\nAny bird.", "input": ""}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
    "\n"
    "### Instruction:\n"
    "Name a bird.\n"
    "Any bird.\n"
    "\n"
    "### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n"
    "\n"
    "### Instruction:\n"
    "Name a bird.\n"
    "Any bird.\n"
    "\n"
    "### Input:\n"
    "It sings.\n"
    "\n"
    "### Response:\n"
)
ORIGINAL = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
    "\n"
    "                ### Instruction:\n"
    "                Name a bird.\n"
    "Any bird.\n"
    "                \n"
    "                ### Response:\n"
    "                "
)
ORIGINAL_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request. \n"
    "\n"
    "                ### Instruction:\n"
    "                Name a bird.\n"
    "Any bird.\n"
    "                \n"
    "                ### Input:\n"
    "                It sings.\n"
    "                \n"
    "                ### Response:\n"
    "                "
)

PLAIN = "Task:\nName a bird.\nAny bird.\nAnswer:\n"
PLAIN_WITH_INPUT = "Task:\nName a bird.\nAny bird.\nInput:\nIt sings.\nAnswer:\n"


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("alpaca", "", ALPACA),
        ("alpaca", "It sings.", ALPACA_WITH_INPUT),
        ("original", "", ORIGINAL),
        ("original", "It sings.", ORIGINAL_WITH_INPUT),
        ("plain", "", PLAIN),
        ("plain", "It sings.", PLAIN_WITH_INPUT),
    ],
)
def test_template_has_exactly_these_bytes(name, text, expected):
    record = {**SHORT, "input": text}
    assert template(name).prompt(record) == expected
    assert "".join(template(name).split(record)) == expected


def test_record_without_input_field_is_one_with_empty_input():
    assert template("alpaca").prompt({"instruction": SHORT["instruction"]}) == ALPACA


def test_unknown_template_names_those_there_are():
    with pytest.raises(UserError, match=r"unknown prompt template 'orignal'.*'original'"):
        template("orignal")


# ---- the same prompt at training and at evaluation ----


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("cutoff", CUTOFFS.values(), ids=list(CUTOFFS))
def test_prompt_ids_do_not_depend_on_training_or_on_the_right_answer(tokenizer, name, cutoff):
    encoder = Encoder(tokenizer, name, cutoff, COMMONSENSE)
    for task in COMMONSENSE.names:
        instruction = WORDS * 3 + INSTRUCTIONS[task]
        records = every_answer(task, instruction=instruction)
        trained, evaluated = encoder.encode(records), encoder.encode(records, with_answers=False)
        assert len({tuple(row.prompt_ids) for row in trained + evaluated}) == 1
        assert all(row.answer_ids for row in trained) and not any(row.answer_ids for row in evaluated)
        assert (trained[0].removed > 0) == (cutoff == CUTOFFS["cut"])


def test_prompt_ids_do_not_depend_on_the_other_records_of_a_chunk(tokenizer):
    encoder = Encoder(tokenizer, "alpaca", CUTOFFS["cut"], COMMONSENSE)
    records = [example(task, instruction=WORDS * n + INSTRUCTIONS[task]) for n, task in enumerate(COMMONSENSE.names)]
    together = encoder.encode(records)
    alone = [Encoder(tokenizer, "alpaca", CUTOFFS["cut"], COMMONSENSE).encode([record])[0] for record in records]
    assert together == alone
    assert {row.removed > 0 for row in together} == {True, False}


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_prompt_and_answer_are_tokenised_apart(tokenizer, name):
    encoder = Encoder(tokenizer, name, 1024, COMMONSENSE)
    for task in COMMONSENSE.names:
        record = example(task)
        (row,) = encoder.encode([record])
        assert row.prompt_ids == tokenizer(template(name).prompt(record.text()))["input_ids"]
        answer = tokenizer(record.output, add_special_tokens=False)["input_ids"]
        assert row.answer_ids == [*answer, tokenizer.eos_token_id]


def test_tokenising_in_one_piece_would_merge_across_the_boundary(tokenizer):
    # Otherwise the test above could not tell joining ids from joining texts.
    record = example("boolq")
    (row,) = Encoder(tokenizer, "original", 1024, COMMONSENSE).encode([record])
    text = template("original").prompt(record.text()) + record.output
    assert tokenizer(text)["input_ids"] != row.prompt_ids + row.answer_ids[:-1]


def test_prompt_begins_with_bos_exactly_when_the_tokenizer_adds_it(tokenizer, kind):
    (row,) = Encoder(tokenizer, "alpaca", 1024, COMMONSENSE).encode([example("piqa")])
    special = [token for token in row.prompt_ids if token in tokenizer.all_special_ids]
    assert special == ([tokenizer.bos_token_id] if kind in ADDS_BOS else [])
    assert row.prompt_ids[: len(special)] == special


def test_tokenizer_that_ends_every_text_with_eos_does_not_end_the_prompt_so(tmp_path):
    tokenizer = llama2(tmp_path, add_eos_token=True)
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    (row,) = Encoder(tokenizer, "alpaca", 1024, COMMONSENSE).encode([example("piqa")])
    assert row.prompt_ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in row.prompt_ids
    assert row.answer_ids.count(tokenizer.eos_token_id) == 1


def test_what_looks_like_a_control_token_is_text(tokenizer):
    written = "".join(tokenizer.all_special_tokens)
    record = example("piqa", instruction=f"a{written}b", output=f"the correct answer is {written}")
    encoder = Encoder(tokenizer, "alpaca", 1024, COMMONSENSE)
    (row,) = encoder.encode([record])
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert not control & {*row.prompt_ids[len(encoder.prefix) :], *row.answer_ids[:-1]}
    assert record.instruction in tokenizer.decode(row.prompt_ids)


def test_text_that_a_tokenizer_cannot_but_read_as_a_control_token_is_refused():
    words = {"<end>": 0, "<unk>": 1, **{word: index for index, word in enumerate("ab", 2)}}
    special = {"unk_token": "<unk>", "eos_token": "<end>"}
    plain = Tokenizer(models.WordLevel(words, special["unk_token"]))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **special)
    encoder = Encoder(tokenizer, "plain", 256, COMMONSENSE)
    with pytest.raises(UserError, match=r"example 3.*'<end>'"):
        encoder.encode([example("piqa", instruction="a <end> b", index=3)])
    with pytest.raises(UserError, match=r"example 4.*'<end>'"):
        encoder.encode([example("piqa", instruction="a b", output="a <end> b", index=4)])
    assert encoder.encode([example("piqa", instruction="a <unk> b")])


def test_tokenizer_without_eos_is_refused(tokenizers):
    class Endless:
        eos_token_id = None

    with pytest.raises(UserError, match="no end-of-sequence token"):
        Encoder(Endless(), "alpaca", 256, COMMONSENSE)


def test_a_tokenizer_that_merges_its_special_tokens_with_the_text_is_refused(tokenizer):
    class Merging:
        """Puts a token before a text that swallows the text's first one."""

        eos_token_id, name_or_path = tokenizer.eos_token_id, "merging"
        added_tokens_decoder, all_special_ids, unk_token_id = {}, [101], None

        def __call__(self, text, add_special_tokens=True, **options):
            return {"input_ids": [101] if add_special_tokens else [7]}

    with pytest.raises(UserError, match=r"'merging'.*special tokens"):
        Encoder(Merging(), "alpaca", 256, COMMONSENSE)


# ---- labels ----


def test_exactly_the_answer_and_eos_carry_loss(tokenizer):
    records = [example(task, instruction=WORDS * n + INSTRUCTIONS[task]) for n, task in enumerate(COMMONSENSE.names)]
    encoded = Encoder(tokenizer, "alpaca", 128, COMMONSENSE).encode(records)
    batch = Collator(tokenizer.pad_token_id)([joined(row) for row in encoded])
    assert batch["task_ids"].tolist() == list(range(8))
    assert len({len(row.prompt_ids + row.answer_ids) for row in encoded}) > 1, "rows must differ in length"
    for index, (record, row) in enumerate(zip(records, encoded, strict=True)):
        prompt, whole = len(row.prompt_ids), len(row.prompt_ids + row.answer_ids)
        labels = batch["labels"][index].tolist()
        assert [at for at, label in enumerate(labels) if label != IGNORED] == list(range(prompt, whole))
        assert labels[whole - 1] == tokenizer.eos_token_id
        assert spelled(tokenizer, labels[prompt : whole - 1]) == record.output
        assert batch["input_ids"][index, :whole].tolist() == row.prompt_ids + row.answer_ids
        assert set(batch["input_ids"][index, whole:].tolist()) <= {tokenizer.pad_token_id}
        assert set(labels[whole:]) <= {IGNORED}


def test_train_on_inputs_puts_loss_on_everything_but_padding(tokenizer):
    records = [example("winogrande"), example("boolq")]
    encoded = Encoder(tokenizer, "alpaca", 256, COMMONSENSE).encode(records)
    batch = Collator(tokenizer.pad_token_id, train_on_inputs=True)([joined(row) for row in encoded])
    supervised = batch["labels"] != IGNORED
    lengths = [len(row.prompt_ids + row.answer_ids) for row in encoded]
    assert supervised.tolist() == [[at < length for at in range(max(lengths))] for length in lengths]
    assert batch["labels"][supervised].tolist() == batch["input_ids"][supervised].tolist()
    assert not supervised.all(), "one row must be padded"


def test_left_padding_keeps_prompts_at_the_end_with_a_mask():
    input_ids, attention_mask = pad_left([[5, 6, 7], [8]], pad_token_id=9)
    assert input_ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


# ---- the cutoff ----


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("text", ["", "It is the sluice of the lower mill."], ids=["no input", "input"])
def test_long_instruction_loses_tokens_from_its_middle_only(tokenizer, name, text):
    cutoff = 128
    days = ", ".join(f"on day {day} the miller opened the gate" for day in range(1, 60))
    record = example("boolq", instruction=f"START {days} END", answer="false", input=text)
    whole = tokenizer(template(name).prompt(record.text()))["input_ids"]
    (row,) = Encoder(tokenizer, name, cutoff, COMMONSENSE).encode([record])
    opening, _, closing = template(name).split(record.text())

    answers = [f"the correct answer is {word}" for word in ("true", "false")]
    longest = max(map(len, tokenizer(answers, add_special_tokens=False)["input_ids"])) + len(["EOS"])
    assert len(row.prompt_ids) == cutoff - longest
    assert row.removed == len(whole) - len(row.prompt_ids) > 0
    cuts = [n for n in range(len(row.prompt_ids)) if whole[:n] + whole[n + row.removed :] == row.prompt_ids]
    assert cuts, "what is left must be the beginning and the end of the whole prompt"
    head, tail = spelled(tokenizer, whole[: cuts[0]]), spelled(tokenizer, whole[cuts[0] + row.removed :])
    assert head.startswith(opening + "START")
    assert tail.endswith((text or "END") + closing)
    assert len(head) - len(opening) > 50 and len(tail) - len(closing) > 50, "both ends keep their share"
    assert spelled(tokenizer, row.answer_ids) == record.output


def test_shortened_row_with_the_longest_answer_fills_the_cutoff_exactly(tokenizer):
    for task in COMMONSENSE.names:
        encoder = Encoder(tokenizer, "alpaca", 120, COMMONSENSE)
        rows = encoder.encode(every_answer(task, instruction=WORDS * 9 + INSTRUCTIONS[task]))
        assert all(row.removed > 0 for row in rows)
        assert max(len(row.prompt_ids + row.answer_ids) for row in rows) == 120


def test_prompt_that_just_fits_is_not_cut_and_one_token_less_is(tokenizer):
    record = example("hellaswag")
    (row,) = Encoder(tokenizer, "alpaca", 1024, COMMONSENSE).encode([record])
    encoder = Encoder(tokenizer, "alpaca", 1024, COMMONSENSE)
    longest = max(len(encoder.answer_ids(f"the correct answer is ending{n}")) for n in range(1, 5))
    fits = len(row.prompt_ids) + longest
    assert Encoder(tokenizer, "alpaca", fits, COMMONSENSE).encode([record])[0].removed == 0
    assert Encoder(tokenizer, "alpaca", fits - 1, COMMONSENSE).encode([record])[0].removed == 1


def test_free_text_answer_longer_than_its_reserve_still_fits_in_the_cutoff(tokenizer):
    tasks = TaskSet((Task("free", 0),))
    record = example("boolq", instruction=WORDS * 30, output=WORDS * 4)
    (row,) = Encoder(tokenizer, "alpaca", 256, tasks).encode([record])
    assert len(row.answer_ids) > FREE_TEXT_RESERVE
    assert len(row.prompt_ids + row.answer_ids) == 256
    assert spelled(tokenizer, row.answer_ids) == record.output


def test_a_shortened_prompt_leaves_free_text_32_tokens_in_every_version(tokenizer):
    encoder = Encoder(tokenizer, "alpaca", 256, TaskSet((Task("free", 0),)))
    (row,) = encoder.encode([example("boolq", instruction=WORDS * 30)], with_answers=False)
    assert len(row.prompt_ids) == 256 - 32


def test_answer_that_alone_exceeds_the_cutoff_names_its_record(tokenizer):
    records = [example("boolq"), example("boolq", output="the correct answer is " + WORDS * 30, index=1)]
    encoder = Encoder(tokenizer, "alpaca", 200, COMMONSENSE)
    with pytest.raises(UserError, match=r"example 1: the answer alone has \d+ tokens, more than the cutoff_len 200"):
        encoder.encode(records)


def test_cutoff_too_small_for_the_template_names_record_and_a_cutoff_that_suffices(tokenizer):
    record = example("piqa", index=7)
    with pytest.raises(UserError, match=r"example 7: cutoff_len 24 leaves no room .*to \d+") as caught:
        Encoder(tokenizer, "alpaca", 24, COMMONSENSE).encode([record])
    enough = int(re.search(r"to (\d+) or more", str(caught.value)).group(1))
    (row,) = Encoder(tokenizer, "alpaca", enough, COMMONSENSE).encode([record])
    assert row.removed > 0
    with pytest.raises(UserError, match="leaves no room"):
        Encoder(tokenizer, "alpaca", enough - 1, COMMONSENSE).encode([record])


# Instructions whose ends merge with the white space of a template.
UNTIDY = [
    "   \n\t " + WORDS * 9 + " .\n\n   ",
    "\n\n" + WORDS * 9 + "?\n",
    " éb é☃ \t\t.abthe \n\n,   b\n\n ?,?the  \n\na.a\n    !\néba \n\n?\na the . ,wordb.b b!!   ?",
    "     " + WORDS * 9 + SPACES + "\n" + SPACES,
]


@pytest.mark.parametrize("instruction", UNTIDY)
@pytest.mark.parametrize("name", list(TEMPLATES))
def test_smallest_cutoff_that_is_accepted_still_keeps_the_template_whole(tokenizer, name, instruction):
    accepted, tasks = 0, TaskSet((COMMONSENSE["boolq"],))
    for cutoff in range(40, 100):
        try:
            (row,) = Encoder(tokenizer, name, cutoff, tasks).encode([example("boolq", instruction=instruction)])
        except UserError:
            assert not accepted
            continue
        accepted += 1
        text = spelled(tokenizer, row.prompt_ids)
        assert text.startswith(template(name).opening) and text.endswith(template(name).closing)
    assert accepted


# Words, line ends and runs of white space, so that tokens of template and instruction would merge, and any text.
instructions = st.lists(
    st.sampled_from(["a", "b", "word", " the ", ".", "\n", "\n\n", "\t", "  ", " " * 16, "é", "☃", "10", "### "])
    | st.text(max_size=8),
    min_size=1,
    max_size=80,
).map("".join)


@pytest.mark.slow(1)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    instruction=instructions,
    kind=st.sampled_from(list(KINDS)),
    name=st.sampled_from(list(TEMPLATES)),
    cutoff=st.integers(60, 200),
    task=st.sampled_from(COMMONSENSE.names),
    data=st.data(),
)
def test_any_instruction_keeps_opening_marker_and_answer_within_the_cutoff(
    tokenizers, instruction, kind, name, cutoff, task, data
):
    tokenizer = tokenizers[kind]
    if any(token in instruction for token in tokenizer.all_special_tokens):
        return
    answer = data.draw(st.sampled_from(COMMONSENSE[task].options))
    record = example(task, instruction=instruction, answer=answer)
    encoder = Encoder(tokenizer, name, cutoff, COMMONSENSE)
    try:
        (row,) = encoder.encode([record])
    except UserError as error:
        assert "leaves no room" in str(error) and cutoff < 90
        return
    assert row.prompt_ids == encoder.encode([record], with_answers=False)[0].prompt_ids
    assert len(row.prompt_ids + row.answer_ids) <= cutoff
    text, used = spelled(tokenizer, row.prompt_ids), template(name)
    assert text.startswith(used.opening) and text.endswith(used.closing)
    whole = tokenizer(used.prompt(record.text()))["input_ids"]
    assert row.removed == len(whole) - len(row.prompt_ids)
    if not row.removed:
        assert text == used.prompt(record.text())
    labels = Collator(tokenizer.pad_token_id)([joined(row)])["labels"][0]
    assert spelled(tokenizer, labels[labels != IGNORED].tolist()) == record.output
