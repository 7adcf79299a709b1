"""``messages`` and the chat template: one text in training, evaluation and prediction, the loss on the answer alone."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from text_cases import INSTRUCTIONS
from tokenizer_kinds import KINDS
from transformers import AddedToken

from mtl_lora.errors import UserError
from mtl_lora.language.answering import generate_answers
from mtl_lora.language.encode import FREE_TEXT_RESERVE, ChatTemplate, Encoder
from mtl_lora.language.evaluate import Evaluator
from mtl_lora.language.examples import load_examples, parse_example
from mtl_lora.language.tasks import COMMONSENSE, Task, TaskSet

FREE = TaskSet((Task("free", 0, answer_prefix=""),))
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|start|>system\nBe kind.<|end|>\n{% endif %}"
    "<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
)
THOUGHT = "{% if loop.last and m.role != 'user' %}<think>\n\n</think>\n\n{% endif %}"
THINKING = CHATML.replace("{{ m.content }}", THOUGHT + "{{ m.content }}")
DATED = CHATML.replace("Be kind.", "Today is {{ strftime_now('%d %b %Y') }}.")
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Name a bird."},
    {"role": "assistant", "content": "A wren."},
    {"role": "user", "content": "Another?"},
    {"role": "assistant", "content": " An owl.\n"},
]


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
    """Makes the tokenizer of a kind with a chat template."""

    def make(template: str | None, kind: str = "own_pad"):
        tokenizer = KINDS[kind](tmp_path_factory.mktemp(kind))
        tokenizer.chat_template = template
        return tokenizer

    return make


def talk(messages: list = TALK, **fields):
    return parse_example({"messages": messages, **fields}, 0, "talk.json", FREE, "free")


ASKED = "<|start|>system\nBe kind.<|end|>\n<|start|>user\nHi<|end|>\n<|start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "kind", "prompt", "answer", "end"),
    [
        (CHATML, "own_pad", ASKED, "\nYo ", "<|end|>"),
        (INST, "llama2", "<s>[INST] Hi [/INST] ", "Yo", "</s>"),
        (THINKING, "own_pad", f"{ASKED}<think>\n\n</think>\n\n", "\nYo ", "<|end|>"),
        (DATED, "own_pad", ASKED.replace("Be kind", "Today is 26 Jul 2024"), "\nYo ", "<|end|>"),
    ],
    ids=["chatml", "llama2", "thinking", "dated"],
)
def test_the_prompt_is_what_the_training_text_begins_with(chatting, template, kind, prompt, answer, end):
    tokenizer = chatting(template, kind)
    encoder = Encoder(tokenizer, "chat", 256, FREE)
    example = talk([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\nYo "}])
    (trained,), (asked,) = encoder.encode([example]), encoder.encode([example], with_answers=False)
    assert trained.prompt_ids == asked.prompt_ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    expected = tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert trained.answer_ids == [*expected, tokenizer.convert_tokens_to_ids(end)]
    assert encoder.answer_ids("Yo")[-1] == encoder.end_id == trained.answer_ids[-1]
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\nYo "}]
    assert template is DATED or tokenizer.apply_chat_template(said, tokenize=False).startswith(prompt + answer)


def test_the_loss_lies_on_the_last_turn_alone_and_the_others_are_its_prompt(chatting):
    tokenizer = chatting(CHATML)
    (row,) = Encoder(tokenizer, "chat", 256, FREE).encode([talk()])
    prompt = tokenizer.decode(row.prompt_ids)
    assert [turn["content"] in prompt for turn in TALK[:-1]] == [True] * 4 and "owl" not in prompt
    assert tokenizer.decode(row.answer_ids) == " An owl.\n<|end|>"


def test_one_turn_is_an_instruction_under_every_template_and_more_are_named(chatting):
    tokenizer, one = chatting(CHATML), talk(TALK[1:3])
    plain = parse_example({"instruction": "Name a bird.", "output": "A wren."}, 0, "", FREE, "free")
    assert one == plain
    for name in ("alpaca", "chat"):
        encoder = Encoder(tokenizer, name, 256, FREE)
        assert encoder.encode([one]) == encoder.encode([plain])
    with pytest.raises(UserError, match=r"example 0: .*--template chat"):
        Encoder(tokenizer, "alpaca", 256, FREE).encode([talk()])


def test_a_long_message_is_shortened_in_its_middle(chatting):
    tokenizer = chatting(CHATML)
    text = "FIRST " + "the old miller opened the gate, " * 40 + "LAST"
    example = talk([*TALK[:3], {"role": "user", "content": text}, TALK[-1]])
    (row,) = Encoder(tokenizer, "chat", 200, FREE).encode([example])
    prompt = tokenizer.decode(row.prompt_ids)
    assert row.removed > 0 and all(part in prompt for part in ("Be short.", "A wren.", "FIRST", "LAST<|end|>"))
    assert prompt.endswith("<|start|>assistant\n")


def test_a_long_message_that_was_said_before_is_shortened_where_it_stands_last(chatting):
    tokenizer, text = chatting(CHATML), "the old miller opened the gate, " * 10 + "did he?"
    asked, said = {"role": "user", "content": text}, {"role": "assistant", "content": "He did."}
    (whole,) = Encoder(tokenizer, "chat", 4096, FREE).encode([talk([asked, said, asked, said])])
    cutoff = len(whole.prompt_ids) + FREE_TEXT_RESERVE - 20
    (row,) = Encoder(tokenizer, "chat", cutoff, FREE).encode([talk([asked, said, asked, said])])
    _, first, last = tokenizer.decode(row.prompt_ids).split("<|start|>user\n")
    assert row.removed == 20 and first.startswith(text) and text not in last


def test_a_test_set_needs_an_answer_that_can_be_right():
    digits = TaskSet((Task("free", 0, pattern="[0-9]+"),))
    for tasks, messages in ((FREE, TALK[:2]), (digits, TALK)):
        with pytest.raises(UserError, match="'answer' is empty, so no prediction could be right"):
            parse_example({"messages": messages}, 0, "talk.json", tasks, "free", closed=True)
    with pytest.raises(UserError, match="'answer' is empty"):
        parse_example({"instruction": "Hi", "answer": " "}, 0, "own.json", FREE, "free", closed=True)


def test_a_talk_is_the_same_in_a_test_set_and_after_sampling(tmp_path):
    record = {"messages": TALK, "task": "free", "kind": "birds"}
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(record))
    (asked,) = load_examples(path, FREE, "free", closed=True)
    assert (asked.answer, asked.output, asked.extra) == ("An owl.", " An owl.\n", {"kind": "birds"})
    assert parse_example(asked.record(), 0, "", FREE, closed=True) == asked
    answer = "so the correct answer is true"
    turns = {"role": "user", "content": INSTRUCTIONS["boolq"]}, {"role": "assistant", "content": answer}
    path.write_text(json.dumps({"messages": turns}))
    assert load_examples(path, COMMONSENSE, "boolq", closed=True)[0].answer == "true"
    (predicted,) = [parse_example(record, 0, "", FREE, "free", answered=False)]
    assert (predicted.instruction, predicted.output, len(predicted.context)) == ("Another?", "", 3)


@pytest.mark.parametrize(
    ("template", "facts"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('never') }}", "never"),
        ("{% for m in messages %}{% endfor %}", "leaves out"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "exactly"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(chatting, template, facts):
    with pytest.raises(UserError, match=facts):
        Encoder(chatting(template), "chat", 256, FREE)


def test_a_template_that_rewrites_what_was_said_or_refuses_it_names_the_example(chatting):
    shouting = CHATML.replace("m.content }}", "m.content | replace('wren', 'WREN') }}")
    with pytest.raises(UserError, match=r"example 0: .*exactly"):
        Encoder(chatting(shouting), "chat", 256, FREE).encode([talk(TALK[1:3])])
    with pytest.raises(UserError, match=r"example 0: .*no system here"):
        Encoder(chatting(INST, "llama2"), "chat", 256, FREE).encode([talk()])


def test_text_that_would_be_read_as_a_control_token_is_refused(chatting):
    encoder = Encoder(chatting(CHATML), "chat", 256, FREE)
    for place in range(4):  # in what was said before too
        messages = [{**turn, "content": "a<|end|>b"} if at == place else turn for at, turn in enumerate(TALK[1:])]
        with pytest.raises(UserError, match=r"example 0: .*<\|end\|>"):
            encoder.encode([talk(messages)])


@pytest.mark.parametrize("template", [CHATML, INST])
def test_an_option_is_scored_by_the_tokens_that_training_shows(chatting, template):
    tasks = TaskSet((Task("own", 0, (" yes", " no"), answer_prefix=""),))
    encoder = Encoder(chatting(template), "chat", 128, tasks)
    example = parse_example({"instruction": "Is it?", "output": " yes", "answer": " yes"}, 0, "own.json", tasks, "own")
    assert encoder.option_ids(tasks[0], " yes") == encoder.encode([example])[0].answer_ids


def test_an_end_token_that_is_not_special_ends_the_text_all_the_same(chatting, tiny_base):
    tokenizer = chatting(CHATML.replace("<|end|>", "<|over|>"))
    tokenizer.add_tokens([AddedToken("<|over|>", special=False)])
    encoder = Encoder(tokenizer, "chat", 128, FREE)
    assert encoder.end_id == tokenizer.convert_tokens_to_ids("<|over|>")
    example = parse_example({"instruction": "Name a bird.", "output": "A wren."}, 0, "own.json", FREE, "free")
    (question,) = Evaluator.questions(SimpleNamespace(tasks=FREE, encoder=encoder), [example], "own.json")

    class Model:
        device = torch.device("cpu")

        def generate(self, input_ids, **options):
            return torch.cat([input_ids, torch.tensor([encoder.encode([example])[0].answer_ids])], dim=1)

    assert generate_answers(Model(), encoder, [question], 8) == ["A wren."]
    with pytest.raises(UserError, match=r"<\|over\|>"):
        encoder.encode([dataclasses.replace(example, instruction="Say <|over|> now.")])


def test_instruction_and_input_are_one_message(chatting):
    template = ChatTemplate(chatting(CHATML))
    assert "user\nA\n\nB<|end|>" in template.prompt({"instruction": "A", "input": "B"})
    assert "user\nB<|end|>" in template.prompt({"instruction": "", "input": "B"})


@pytest.mark.slow
def test_training_evaluation_and_prediction_use_the_template_that_the_checkpoint_holds(tiny_base, train, tmp_path):
    from mtl_lora.language import config
    from mtl_lora.language.evaluate import Predictor

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    template = CHATML.replace("<|start|>", "#").replace("<|end|>", "<end>")
    (base / "chat_template.jinja").write_text(template)
    (tmp_path / "tasks.json").write_text(json.dumps([{"name": "free", "id": 0, "answer_prefix": ""}]))
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps({"messages": TALK[1:]}) + "\n" for _ in range(8)))
    flags = {"tasks_file": str(tmp_path / "tasks.json"), "data_path": str(tmp_path / "talk.jsonl")}
    run = train("run", base_model=str(base), template="chat", max_steps=1, **flags)
    provenance = json.loads((run / "mtl_lora_config.json").read_text())["provenance"]
    assert (provenance["prompt_template"], provenance["chat_template"]) == ("chat", template)
    (base / "chat_template.jinja").write_text(template.replace("Be kind.", "Be rude."))
    evaluator = Evaluator(config.AnswerConfig(checkpoint=str(run)))
    (row,) = evaluator.encoder.encode([talk()], with_answers=False)
    assert "Be short." in evaluator.encoder.tokenizer.decode(row.prompt_ids)
    assert "Be kind." in evaluator.encoder.template.prompt({"instruction": "a"})
    (answer,) = Predictor(str(run), max_new_tokens=3).predict([{"messages": TALK[:4]}])
    assert set(answer) == {"index", "task", "answer", "text"}
