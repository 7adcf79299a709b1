"""A page of pictures with what was asked, what is right and what the model said: one HTML file that needs nothing
beside it. Whoever has the pictures makes it; their licences may not allow to pass it on."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.tasks import TaskSet

NAME = "pictures.html"  # in the folder of an evaluation
_SIDE = 240  # most pixels of a picture
_STYLE = """body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1.2em; }
figure { margin: 0; padding: .8em; border: 1px solid #ccc; border-radius: 6px; }
img { display: block; max-width: 100%; min-width: 128px; margin: 0 auto .6em; image-rendering: pixelated; }
small { color: #666; } .right { color: #116329; } .wrong { color: #a40e26; }"""


def evenly(tasks: TaskSet, questions: Sequence, count: int) -> list:
    """``count`` questions, as many of each task, from all over its test set: chosen without a look at the answers."""
    asked = {task.id: [each for each in questions if each.task.id == task.id] for task in tasks}
    asked = {task_id: part for task_id, part in asked.items() if part}
    chosen = []
    for place, part in enumerate(asked.values()):
        share = min(count // len(asked) + (place < count % len(asked)), len(part))
        chosen += [part[index * len(part) // share] for index in range(share)]
    return chosen


def check(pictures: Mapping[str, Path], questions: Iterable, folder: str) -> None:
    """Raise ``UserError`` for a question whose picture is not among ``pictures``, those of a folder by image id."""
    missing = [image for question in questions for image in question.row["images"] if image not in pictures]
    if missing:
        raise UserError(f"--pictures {folder} has no picture of {', '.join(map(repr, missing[:3]))}; pass its folder")


def write(path: Path, title: str, questions: Iterable, lines: Mapping, pictures: Mapping[str, Path]) -> None:
    """questions: those to show; lines: by key, their prediction lines."""
    figures = "\n".join(_figure(question, lines[question.key], pictures) for question in questions)
    title = html.escape(title)
    head = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n<style>{_STYLE}</style>'
    files.write_text(path, f"{head}\n<h1>{title}</h1>\n<main>\n{figures}\n</main></html>\n")


def _figure(question, line: Mapping, pictures: Mapping[str, Path]) -> str:
    example, wanted = question.example, line.get("answers", [line["answer"]] if "answer" in line else [])
    right = line.get("correct", line.get("score", 0) >= 0.5 if "score" in line else None)
    style = "" if right is None else ' class="right"' if right else ' class="wrong"'
    drawn = "".join(f'<img alt="" src="{_source(pictures[image])}">' for image in question.row["images"])
    texts = [f"<small>{html.escape(question.task.title)}</small>", html.escape(example.text or "")]
    texts += [f"right: {html.escape('; '.join(wanted))}", f"model: <b{style}>{html.escape(line['parsed'])}</b>"]
    return f"<figure>{drawn}<figcaption>{'<br>'.join(filter(None, texts))}</figcaption></figure>"


def _source(path: Path) -> str:
    """A picture as a data address, made smaller where it is large."""
    from PIL import Image

    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
