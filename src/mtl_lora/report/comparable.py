"""Whether two runs can be compared: same tasks, same data, same protocol, and question by question the same prompt."""

import reprlib

from mtl_lora.errors import UserError
from mtl_lora.report.predictions import Prediction
from mtl_lora.report.results import Results

NEEDED_SETTINGS = ("mode", "base_fingerprint", "template", "cutoff_len")
# What is compared, and what the answers do not depend on. Any other setting, a future one too, is protocol.
# (limit decides which questions are asked, and those are compared one by one; so are the definitions of tasks.)
FREE_SETTINGS = {"base_fingerprint", "adapter_sha256", "tasks_sha256", "dtype", "batch_size", "limit"}


def check_comparable(a: Results, b: Results) -> None:
    """Raise ``UserError`` unless both scored the same tasks on the same data by one protocol."""
    for results in (a, b):
        for key in NEEDED_SETTINGS:
            if results.settings.get(key) is None:
                raise UserError(f"{results.path}: settings.{key} is missing, without which nothing can be compared")
        for name in results.tasks:
            if name not in results.data:
                raise UserError(f"{results.path}: data.{name} is missing; it must be the sha256 of the test data")
    keys = [key for key in dict.fromkeys([*a.settings, *b.settings]) if key not in FREE_SETTINGS]
    differing = [key for key in keys if a.settings.get(key) != b.settings.get(key)]
    if differing:
        values = (f"{key} ({_shown(a.settings, key)} and {_shown(b.settings, key)})" for key in differing)
        raise _not_comparable(a, b, f"they differ in {', '.join(values)}")
    for one, other in ((a, b), (b, a)):
        alone = [name for name in one.tasks if name not in other.tasks]
        if alone:
            raise _not_comparable(a, b, f"there are scores of {', '.join(alone)} in {one.path} alone")
    redefined = [name for name in a.tasks if a.task_set[name].extraction_key != b.task_set[name].extraction_key]
    if redefined:
        raise _not_comparable(a, b, f"they declare other options, pattern or answer prefix of {', '.join(redefined)}")
    other_data = [name for name in a.tasks if a.data[name] != b.data[name]]
    if other_data:
        raise _not_comparable(a, b, f"their test data of {', '.join(other_data)} are not the same (sha256)")


def _shown(settings: dict, key: str) -> str:
    return reprlib.repr(settings[key]) if key in settings else "none"


def check_same_questions(
    a: Results, b: Results, task: str, answers_a: dict[int, Prediction], answers_b: dict[int, Prediction]
) -> None:
    """Raise ``UserError`` unless both answered the same questions of a task, asked in the same words.

    Another base model may have another tokenizer and so other prompt ids; only with one base must these agree.
    """
    for one, other in ((answers_a, answers_b), (answers_b, answers_a)):
        alone = sorted(one.keys() - other.keys())
        if alone:
            limits = f"limit {_shown(a.settings, 'limit')} and {_shown(b.settings, 'limit')}"
            reason = f"question {alone[0]} of {task} ({one[alone[0]].place}) is in one of them alone ({limits})"
            raise _not_comparable(a, b, reason)
    same_base = a.settings["base_fingerprint"] == b.settings["base_fingerprint"]
    for index, first in sorted(answers_a.items()):
        last = answers_b[index]
        places = f"({first.place}; {last.place})"
        if first.answer != last.answer:
            raise _not_comparable(a, b, f"question {index} of {task} has another right answer in each {places}")
        if same_base and first.prompt_sha256 != last.prompt_sha256:
            reason = f"question {index} of {task} has another prompt in each, with one base model {places}"
            raise _not_comparable(a, b, reason)


def _not_comparable(a: Results, b: Results, reason: str) -> UserError:
    return UserError(f"{a.path} and {b.path} are not comparable: {reason}")
