"""Write the quick-start data set: eight tasks in the formats of the eight commonsense tasks, from two hand-made tables.

    python data/quickstart/generate.py            write train.json and test/<task>/test.json
    python data/quickstart/generate.py --check    write nothing; fail if the files are not what the tables give

``stories.json`` gives the easy records, whose answer is a word of the text; ``facts.json`` gives the hard ones, whose
answer must be known. The same tables give the same bytes everywhere. README.md beside this file says what is held out.
"""

import argparse
import json

from drafts import CHOICES, FOLDER, Draft, easy_drafts, generator_for, hard_drafts, shuffled

from mtl_lora.errors import UserError, user_errors_to_exit_code
from mtl_lora.files import write_text
from mtl_lora.language.tasks import COMMONSENSE, OPTIONS_MARKER

QUESTION = "Please choose the correct answer to the question: "
OPENINGS = {
    "boolq": "Please answer the following question with true or false, question: ",
    "piqa": "Please choose the correct solution to the question: ",
    "social_i_qa": QUESTION,
    "hellaswag": "Please choose the correct ending to complete the given sentence: ",
    "winogrande": "Please choose the correct answer to fill in the blank to complete the given sentence: ",
    "ARC-Challenge": QUESTION,
    "ARC-Easy": QUESTION,
    "openbookqa": QUESTION,
}


def records_of(task: str, split: str) -> list[dict]:
    """The records of one task and split in random order, each label equally often for each kind."""
    rng = generator_for(task, split, "order")
    records = []
    for drafts in (easy_drafts(task, split), hard_drafts(task, split)):
        places = shuffled([index % CHOICES[task] for index in range(len(drafts))], rng)
        records += [record(draft, place) for draft, place in zip(drafts, places, strict=True)]
    return shuffled(records, rng)


def record(draft: Draft, place: int) -> dict:
    """A finished record: the right option stands at ``place``, counted from 0 (boolq has no order of options)."""
    task = COMMONSENSE[draft.task]
    labels = task.options[: CHOICES[task.name]]
    if task.name == "boolq":
        place = labels.index(draft.right)
    options = [*draft.wrong[:place], draft.right, *draft.wrong[place:]]
    return {
        "instruction": instruction(task.name, labels, draft.stem, options),
        "input": "",
        "output": task.answer_prefix + labels[place],
        "answer": labels[place],
        "task_id": task.id,
        "kind": draft.kind,
    }


def instruction(task: str, labels: tuple[str, ...], stem: str, options: list[str]) -> str:
    """The bytes around stem and options, white space included, as the eight tasks have them."""
    named = [f"{label.capitalize()}: {option}" for label, option in zip(labels, options, strict=True)]
    listed = {"boolq": "", "piqa": "\n\n".join(named) + "\n\n", "winogrande": " ".join(named) + " "}
    options_text = listed.get(task, " ".join(named) + "\n\n")
    return f"{OPENINGS[task]}{stem}\n\n{options_text}{OPTIONS_MARKER}{'/'.join(labels)}"


def as_text(records: list[dict]) -> str:
    """A JSON list with one record a line, which makes a change readable."""
    return "[\n" + ",\n".join(json.dumps(record, ensure_ascii=True) for record in records) + "\n]\n"


def build() -> dict[str, str]:
    """The text of every file of the data set by its path in this folder."""
    train = [record for task in COMMONSENSE.names for record in records_of(task, "train")]
    texts = {"train.json": as_text(shuffled(train, generator_for("train")))}
    for task in COMMONSENSE.names:
        texts[f"test/{task}/test.json"] = as_text(records_of(task, "test"))
    return texts


def main(arguments: list[str] | None = None) -> None:
    """Run the command; a file that differs under ``--check`` is one sentence on stderr and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files that are there (default: write)")
    check = parser.parse_args(arguments).check
    with user_errors_to_exit_code():
        for name, text in build().items():
            path = FOLDER / name
            if not check:
                write_text(path, text)
            elif not path.is_file() or path.read_bytes() != text.encode("utf-8"):
                raise UserError(f"{path} is not what the tables give; run python data/quickstart/generate.py")
            print(f"{'same' if check else 'wrote'} {name}")


if __name__ == "__main__":
    main()
