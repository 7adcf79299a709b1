"""Test sets as documents that lm-evaluation-harness reads token for token as ``--mode score`` does.

    prompt ... | the correct answer is | solution1 EOS
    |<------------ context ----------->|<-- choice -->|

The harness sums the log-probabilities of a choice's tokens. EOS is written out at the end of every choice, because the
harness adds none of its own. Tokens that all choices share add the same to each of them, so the likeliest stays it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from mtl_lora.base_model import BaseModel
from mtl_lora.errors import UserError
from mtl_lora.language.encode import Encoded, Encoder
from mtl_lora.language.examples import Example, load_examples
from mtl_lora.language.tasks import COMMONSENSE, Task, TaskSet

DATA_DIR = Path(__file__).resolve().parents[2] / "data" / "commonsense" / "test"


def load(
    mtl_lora_task: str,
    pretrained: str = "",
    tokenizer: str = "",
    data_dir: str = str(DATA_DIR),
    template: str = "alpaca",
    cutoff_len: int = 256,
    tasks_file: str = "",
    trust_remote_code: bool = False,
    **_,
) -> dict[str, Dataset]:
    """The documents of one task, each with ``context``, ``choices``, ``gold`` (place of the right one) and ``index``.

    pretrained, tokenizer, trust_remote_code: the harness's own --model_args. The others come with --metadata:
    data_dir holds <task>/test.json; template and cutoff_len are those of the checkpoint; tasks_file declares your own.
    Raises ``UserError`` for a missing tokenizer, file or task. Questions that the harness can only read by other tokens
    are counted on stderr.
    """
    if not (tokenizer or pretrained):
        raise UserError(f"the task {mtl_lora_task} needs the model's tokenizer; pass --model_args pretrained=...")
    tasks = TaskSet.load(tasks_file) if tasks_file else COMMONSENSE
    task = tasks[mtl_lora_task]
    if not task.options:
        raise UserError(f"the task {task.name} is free text and has no options to score")
    encoder = Encoder(
        BaseModel(tokenizer or pretrained, trust_remote_code).tokenizer(), template, int(cutoff_len), tasks
    )
    examples = load_examples(Path(data_dir) / task.name / "test.json", tasks, task.name, closed=True)
    encoded = encoder.encode(examples, with_answers=False)
    found, other = documents(task, encoder, examples, encoded, joiner="")
    if 2 * len(other) > len(examples):
        # A sentencepiece tokenizer begins an answer that it encodes alone with a space; in one text, that is a space.
        spaced = documents(task, encoder, examples, encoded, joiner=" ")
        found, other = min((found, other), spaced, key=lambda attempt: len(attempt[1]))
    if other:
        count = f"{len(other):,} of {len(examples):,} questions"
        print(f"{task.name}: the harness reads {count} by other tokens, first record {other[0]}", file=sys.stderr)
    return {"test": Dataset.from_list(found)}


def documents(
    task: Task, encoder: Encoder, examples: Sequence[Example], encoded: Sequence[Encoded], joiner: str
) -> tuple[list[dict], list[int]]:
    """(documents, places of those that the harness reads by other tokens), prompt and answer joined by ``joiner``."""
    opening, eos = task.answer_prefix.rstrip(), encoder.tokenizer.eos_token
    found, texts, expected = [], [], []
    for example, prompt in zip(examples, encoded, strict=True):
        context = prompt_text(encoder, example, prompt) + joiner + opening
        options = task.options_of(example.instruction)
        answers = [task.answer_prefix + option for option in options]
        choices = [answer.removeprefix(opening) + eos for answer in answers]
        gold = options.index(example.answer)
        found.append({"context": context, "choices": choices, "gold": gold, "index": example.index})
        texts += [context.rstrip(), *(context + choice for choice in choices)]
        expected.append([prompt.prompt_ids + encoder.answer_ids(answer) for answer in answers])
    ids = iter(encoder.tokenizer(texts)["input_ids"])
    other = []
    for document, wanted in zip(found, expected, strict=True):
        start = next(ids)
        read = [next(ids) for _ in wanted]
        # the harness cuts the choice's tokens off where the context alone ends
        if read != wanted or any(row[: len(start)] != start for row in read):
            other.append(document["index"])
    return found, other


def prompt_text(encoder: Encoder, example: Example, prompt: Encoded) -> str:
    """The prompt as text, shortened where the cutoff shortens it in tokens."""
    if not prompt.removed:
        return encoder.template.prompt(example.text())
    return encoder.tokenizer.decode(prompt.prompt_ids[len(encoder.prefix) :], clean_up_tokenization_spaces=False)
