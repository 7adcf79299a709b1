"""Tasks, examples, rows and batches of pictures with texts."""

import collections
import json

import pytest
import torch
from image_text_cases import TASKS, examples
from transformers import AutoConfig, AutoTokenizer

from mtl_lora.errors import UserError
from mtl_lora.image_text.data import IGNORED, Collator, Encoder, mean_answer_tokens, training_rows
from mtl_lora.image_text.examples import load_examples, parse_example
from mtl_lora.image_text.tasks import OPEN_SETS, VLBART, TaskSet

SET = TaskSet.from_json([{**task, "metric": ""} for task in TASKS])
BOS, PAD, EOS = 0, 1, 2  # of the tiny BART


class Store(dict):
    """Features of any picture: its number in every cell."""

    def __missing__(self, image: str) -> torch.Tensor:
        return torch.full((9, 4), float(image[1:]))


def encoder_of(folder: str, tasks: TaskSet = SET, cutoff_len: int = 32) -> Encoder:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return Encoder(tokenizer, AutoConfig.from_pretrained(folder), cutoff_len, tasks)


def example(task: str, index: int = 0, tasks: TaskSet = SET, **fields):
    return parse_example({"task": task, "image": "p0", **fields}, index, "FILE", tasks)


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"prompt": "vqa:"}, ["'vqa:'", "{text} once"]),
        ({"answer": "caption", "prompt": "{text}"}, ["cannot contain {text}"]),
        ({"answer": "closed"}, ["'closed'", "open, choice, caption"]),
        ({"answer": "choice"}, ["labels"]),
        ({"labels": ["a", "b"]}, ["labels", "choice"]),
        ({"answer": "choice", "labels": ["a"]}, ["two different labels"]),
        ({"loss": "pixel"}, ["'pixel'", "example, token"]),
        ({"max_answer": 1}, ["max_answer", "1"]),
        ({"metric": "pearson"}, ["'pearson'", "exact_match"]),
    ],
)
def test_a_task_that_contradicts_itself_is_refused_by_name(entry, named):
    with pytest.raises(UserError) as raised:
        TaskSet.from_json([{"name": "mine", "id": 0, **entry}])
    assert all(each in str(raised.value) for each in ["'mine'", *named])


def test_a_task_set_survives_its_json_and_only_what_decides_answers_changes_its_hash():
    for tasks in (SET, VLBART, OPEN_SETS):
        assert TaskSet.from_json(json.loads(json.dumps(tasks.to_json()))) == tasks
    other = TaskSet.from_json([{**TASKS[0], "metric": "", "title": "Another"}])
    assert other.answers_sha256 == TaskSet.from_json([{**TASKS[0], "metric": ""}]).answers_sha256
    assert other.answers_sha256 != TaskSet.from_json([{**TASKS[0], "metric": "", "prompt": "q: {text}"}]).answers_sha256
    assert [task.loss for task in VLBART] == ["example", "example", "example", "token"]


RIGHT = {"image": "p0", "text": "what is red?", "answer": "box", "task": "vqa"}
WRONG = {
    "no object": (["a"], ["object"]),
    "no image": ({**RIGHT, "image": None}, ["no field 'image'"]),
    "an empty list of images": ({**RIGHT, "image": []}, ["'image'", "[]"]),
    "an image of another type": ({**RIGHT, "image": ["p0", 1.5]}, ["'image'", "1.5"]),
    "no text": ({**RIGHT, "text": None}, ["no field 'text'"]),
    "an empty text": ({**RIGHT, "text": "  "}, ["'text' is empty"]),
    "half a character": ({**RIGHT, "text": "\ud800"}, ["'text'", "surrogate"]),
    "no answer": ({**RIGHT, "answer": None}, ["no field 'answer'"]),
    "both": ({**RIGHT, "answers": {"box": 1}}, ["'answer' and 'answers'"]),
    "an empty answer": ({**RIGHT, "answer": " "}, ["'answer'", "empty"]),
    "a number": ({**RIGHT, "answer": 3}, ["'answer'", "3"]),
    "answers of another type": ({**RIGHT, "answer": None, "answers": "box"}, ["'answers'", "'box'"]),
    "no answers": ({**RIGHT, "answer": None, "answers": []}, ["'answers'", "[]"]),
    "a score above 1": ({**RIGHT, "answer": None, "answers": {"box": 1.5}}, ["'box'", "1.5"]),
    "a score that is no number": ({**RIGHT, "answer": None, "answers": {"box": True}}, ["'box'", "True"]),
    "one annotator": ({**RIGHT, "annotators": ["box"]}, ["'annotators'", "at least 4"]),
    "three annotators": ({**RIGHT, "annotators": ["box"] * 3}, ["'annotators'", "at least 4"]),
    "an unknown label": ({**RIGHT, "task": "nlvr", "answer": "yes"}, ["'yes'", "false, true"]),
    "two labels": ({**RIGHT, "task": "nlvr", "answer": None, "answers": ["true", "false"]}, ["one right answer"]),
    "an empty caption": ({"image": "p0", "answer": "", "task": "caption"}, ["'answer'", "empty"]),
    "an empty reference": ({"image": "p0", "answers": ["a box", ""], "task": "caption"}, ["'answers'", "empty"]),
    "the text of a caption": ({**RIGHT, "task": "caption"}, ["'text'", "caption"]),
    "an unknown task": ({**RIGHT, "task": "gqa"}, ["'gqa'", "vqa 0"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_broken_example_is_named_with_its_file_and_field(case):
    value, named = WRONG[case]
    with pytest.raises(UserError) as raised:
        parse_example(value, 3, "FILE", SET)
    assert all(each in str(raised.value) for each in ["FILE, example 3", *named])


def test_of_answers_that_are_equal_but_for_spaces_the_highest_score_counts():
    for scores in ({"red": 1.0, " red": 0.3, "blue": 0.5}, {" red": 0.3, "blue": 0.5, "red": 1.0}):
        assert parse_example(RIGHT | {"answer": None, "answers": scores}, 0, "FILE", SET).answers == {
            "red": 1.0,
            "blue": 0.5,
        }


def test_the_originals_tasks_are_as_it_has_them():
    """But for GQA's prompt, which it begins with gpa."""
    found = {
        task.name: (task.id, task.prompt, task.max_text, task.generated_tokens, task.loss, task.metric_name)
        for task in VLBART
    }
    assert found == {
        "vqa": (0, "vqa: {text}", 20, 10, "example", "vqa_accuracy_official"),
        "gqa": (1, "gqa: {text}", 20, 20, "example", "accuracy"),
        "nlvr": (2, "nlvr: {text}", 0, 20, "example", "accuracy"),
        "caption": (3, "caption: ", 40, 40, "token", "cider"),
    }
    assert VLBART["nlvr"].labels == ("false", "true")


def test_examples_keep_every_answer_and_come_back_from_their_records(tmp_path):
    values = [
        {"task": "vqa", "image": 7, "text": "a?", "answers": {"red": 0.3, "dark red": 1, "blue": 0}, "kind": "other"},
        {"task": "vqa", "image": "p1", "text": "b?", "answers": {}, "annotators": ["x", "y", "x", "x"]},
        {"task": "nlvr", "image": ["p1", "p2"], "text": "c", "answer": "true", "group": 4},
        {"task": "caption", "image": "p3", "answers": ["one", "two", "one"]},
    ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(values))
    found = load_examples(path, SET)
    assert [(each.images, each.answers, each.answer) for each in found] == [
        (("7",), {"red": 0.3, "dark red": 1.0}, "dark red"),
        (("p1",), {}, ""),
        (("p1", "p2"), {"true": 1.0}, "true"),
        (("p3",), {"one": 1.0, "two": 1.0}, "one"),
    ]
    assert [each.annotators for each in found] == [(), ("x", "y", "x", "x"), (), ("one", "two", "one")]
    path.write_text(json.dumps([each.record() for each in found]))
    again = load_examples(path, SET)
    assert again == found and [each.extra for each in again] == [{"kind": "other"}, {}, {"group": 4}, {}]
    with pytest.raises(UserError, match=r"example 1 has no answer with a score above 0"):
        load_examples(path, SET, closed=True)


@pytest.mark.parametrize("model", ["bart", "causal"])
def test_a_prompt_has_the_same_ids_in_training_and_evaluation_and_the_answer_and_eos_carry_the_loss(model, request):
    """Right behind each other the words of a prompt and an answer would merge into other tokens."""
    encoder = encoder_of(request.getfixturevalue(model))
    asked = [example("vqa", text="what is the b", answer="ox"), example("caption", 1, answer="red box")]
    rows = encoder.encode(asked)
    assert [row["prompt_ids"] for row in rows] == [row["prompt_ids"] for row in encoder.encode(asked, answered=False)]
    batch = Collator(encoder, Store(), visual_tokens=4)(rows)
    plain = encoder.tokenizer
    for index, (row, prompt, answer) in enumerate(
        zip(rows, ["vqa: what is the b", "caption:"], ["ox", "red box"], strict=True)
    ):
        carries = batch["labels"][index] != IGNORED
        ids = plain(answer if model == "bart" else f" {answer}", add_special_tokens=False)["input_ids"]
        if model == "bart":
            assert row["prompt_ids"] == plain(prompt)["input_ids"]
            assert batch["labels"][index][carries].tolist() == [BOS, *ids, EOS]
            assert batch["decoder_input_ids"][index][carries].tolist() == [EOS, BOS, *ids]
        else:
            assert row["prompt_ids"] == plain(prompt)["input_ids"]
            start = len(row["prompt_ids"])
            assert batch["input_ids"][index, start:][carries[start:]].tolist() == [*ids, plain.eos_token_id]
            assert batch["labels"][index][carries].tolist() == [*ids, plain.eos_token_id] and not carries[:start].any()


@pytest.mark.parametrize("model", ["bart", "causal"])
def test_pictures_and_texts_are_padded_and_masked_in_the_order_of_the_model(model, request):
    encoder = encoder_of(request.getfixturevalue(model))
    asked = [
        example("nlvr", image=["p1", "p2"], text="a box", answer="true"),
        example("nlvr", text="the box is on the ball", answer="false"),
    ]
    for answered in (True, False):
        rows = encoder.encode(asked, answered)
        batch = Collator(encoder, Store(), visual_tokens=4)(rows)
        assert batch["features"].shape == (2, 2, 9, 4)
        assert batch["features"][:, :, 0, 0].tolist() == [[1, 2], [0, 0]]
        joined = answered and model == "causal"
        lengths = [len(row["prompt_ids"]) + (len(row["answers"][0]) if joined else 0) for row in rows]
        length = batch["input_ids"].shape[1]
        text = [[1] * each + [0] * (length - each) for each in lengths]
        if model == "causal" and not answered:
            text = [row[::-1] for row in text]
            assert batch["input_ids"][0].tolist()[-lengths[0] :] == rows[0]["prompt_ids"]
        visual = [[1] * 8, [1] * 4 + [0] * 4]
        order = zip(text, visual, strict=True) if model == "bart" else zip(visual, text, strict=True)
        assert batch["attention_mask"].tolist() == [first + last for first, last in order]
        assert ("labels" in batch) == answered


def test_what_is_too_long_loses_the_end_of_its_text_and_of_its_answer_but_no_word_of_the_prompt(bart):
    tasks = TaskSet.from_json([{"name": "mine", "id": 0, "prompt": "on {text} is", "max_text": 12, "max_answer": 6}])
    encoder, text = encoder_of(bart, tasks), "red blue green box ball dog two three left right"
    (row,) = encoder.encode([example("mine", tasks=tasks, text=text, answer=text)])
    whole = encoder.tokenizer(f"on {text} is")["input_ids"]
    tail = len(encoder.tokenizer(" is", add_special_tokens=False)["input_ids"]) + 1
    assert row["prompt_ids"] == whole[: 12 - tail] + whole[-tail:]
    answer = encoder.tokenizer(text)["input_ids"]
    assert row["answers"] == [[*answer[:5], EOS]]
    assert row["removed"] == len(whole) - 12 + len(answer) - 6
    (row,) = encoder_of(bart, tasks, cutoff_len=10).encode([example("mine", tasks=tasks, text=text, answer=text)])
    assert row["prompt_ids"] == whole[: 10 - tail] + whole[-tail:]  # the lower of both limits
    narrow = TaskSet.from_json([{"name": "mine", "id": 0, "prompt": "on the left {text} is", "max_text": 8}])
    with pytest.raises(UserError, match="example 5: 8 tokens leave no room"):
        encoder_of(bart, narrow).encode([example("mine", 5, tasks=narrow, text=text, answer="a")])


def test_labels_that_no_score_could_tell_apart_and_that_are_cut_are_refused(bart):
    task = {"name": "mine", "id": 0, "answer": "choice", "labels": ["red", "green blue red"]}
    with pytest.raises(UserError, match="'green blue red' of mine has"):
        encoder_of(bart, TaskSet.from_json([task | {"max_answer": 4}]))
    encoder = encoder_of(bart, TaskSet.from_json([task]))
    encoder._answers = {label: [BOS, 9, EOS] for label in task["labels"]}  # as of a tokenizer without case
    with pytest.raises(UserError, match="'red' and 'green blue red' of the task mine are the same tokens"):
        encoder._labels(encoder.tasks[0])


def test_a_drawn_answer_follows_the_scores_and_depends_on_seed_epoch_and_example_alone(bart):
    encoder = encoder_of(bart)
    (row,) = encoder.encode([example("vqa", text="a?", answers={"red": 0.9, "blue": 0.3})])
    draws = collections.Counter()
    for epoch in range(600):
        collator = Collator(encoder, Store(), 4, seed=3)
        collator.set_epoch(epoch)
        index = collator.drawn(row | {"example": 11})
        other = Collator(encoder, Store(), 4, seed=3)
        other.drawn(row | {"example": 5})  # what was drawn before changes nothing
        other.set_epoch(epoch)
        assert other.drawn(row | {"example": 11}) == index
        draws[index] += 1
    assert draws[0] / 600 == pytest.approx(0.75, abs=0.05)
    differing = [
        sum(Collator(encoder, Store(), 4, seed).drawn(row | {"example": each}) for each in range(100))
        for seed in (0, 1)
    ]
    assert differing[0] != differing[1]


def test_weights_add_up_to_examples_and_those_of_captions_to_tokens_over_their_mean(bart, pictures, tmp_path):
    encoder = encoder_of(bart)
    rows = training_rows(pictures / "train.json", encoder, tmp_path)
    means = mean_answer_tokens(rows, SET)
    captions = [row for row in rows if row["task_id"] == 2]
    assert means == {2: sum(len(row["answers"][0]) for row in captions) / len(captions)}
    chosen = [*rows.select(range(20)), {**rows[0], "task_id": 0, "answers": [[BOS, EOS]], "scores": [0.0]}]
    batch = Collator(encoder, Store(), 4, 0, means)(chosen)
    tokens = (batch["labels"] != IGNORED).sum(dim=1)
    of_examples = batch["task_ids"] != 2
    assert (batch["weights"] * tokens)[of_examples].allclose(torch.ones(int(of_examples.sum()), dtype=torch.float64))
    assert batch["weights"][~of_examples].unique().tolist() == pytest.approx([1 / means[2]])
    assert batch["loss_weight"] == pytest.approx((batch["weights"] * tokens).sum().item())
    assert batch["scores"][-1] == 0 and {1.0, 0.3} >= set(batch["scores"][:-1].tolist())


def test_an_example_of_several_answers_counts_by_the_mean_of_their_lengths():
    rows = {"task_id": [2, 2, 0], "answers": [[[5] * 2, [5] * 4], [[5] * 6], [[5] * 9]]}
    assert mean_answer_tokens(rows, SET) == {2: (3 + 6) / 2}


def test_rows_come_from_the_cache_unless_what_shapes_them_changes(bart, causal, pictures, tmp_path):
    path = pictures / "train.json"
    rows = training_rows(path, encoder_of(bart), tmp_path)
    assert training_rows(path, encoder_of(bart), tmp_path)[:] == rows[:]
    assert rows[0]["example"] == 0 and rows["image_count"] == [len(each) for each in rows["images"]]
    assert len(list(tmp_path.glob("*.arrow"))) == 1
    for other in (encoder_of(causal), encoder_of(bart, cutoff_len=31)):
        training_rows(path, other, tmp_path)
    assert len(list(tmp_path.glob("*.arrow"))) == 3
    other = encoder_of(bart)
    other.is_encoder_decoder = False  # a causal model with the same tokenizer
    training_rows(path, other, tmp_path)
    other = encoder_of(bart)
    other.tokenizer.add_tokens(["zebra"])
    training_rows(path, other, tmp_path)
    assert len(list(tmp_path.glob("*.arrow"))) == 5
    assert len(rows) == len(load_examples(path, SET)) == 3 * len(examples("vqa", 16))


def test_the_length_of_a_row_is_with_its_longest_answer(bart, tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"image": "p0", "text": "what?", "answers": {"box": 1, "a red box": 0.5}}]))
    (row,) = training_rows(path, encoder_of(bart), tmp_path, "vqa")
    short, long = map(len, row["answers"])
    assert short < long and row["length"] == len(row["prompt_ids"]) + long


def test_a_file_that_names_no_task_is_not_taken_from_the_cache_as_of_another_one(bart, tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"image": "p0", "text": "a box", "answer": "true"}]))
    rows = [training_rows(path, encoder_of(bart), tmp_path, task) for task in ("vqa", "nlvr")]
    assert [each["task_id"][0] for each in rows] == [0, 1]


@pytest.mark.parametrize("model", ["bart", "causal"])
def test_what_looks_like_a_control_token_in_a_text_is_text(model, request):
    encoder = encoder_of(request.getfixturevalue(model))
    (row,) = encoder.encode([example("vqa", text="is </s> red?", answer="</s> box")])
    assert row["prompt_ids"].count(encoder.tokenizer.eos_token_id) == (model == "bart")
    assert row["answers"][0].count(encoder.tokenizer.eos_token_id) == 1


def test_rows_of_tasks_that_ask_otherwise_are_not_taken_from_the_cache(bart, pictures, tmp_path):
    other = TaskSet.from_json([{**task, "metric": "", "prompt": f"now {task['prompt']}"} for task in TASKS])
    rows = [training_rows(pictures / "train.json", encoder_of(bart, tasks), tmp_path) for tasks in (SET, other)]
    lengths = [[len(ids) for ids in each["prompt_ids"]] for each in rows]
    assert all(one < more for one, more in zip(*lengths, strict=True))
