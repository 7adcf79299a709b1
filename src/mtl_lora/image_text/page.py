"""Write a page of pictures with questions, right answers and model answers, as one self-contained HTML file.

Users make it from their own copy of the pictures, whose licences may not allow sharing the page.
"""

import base64
import collections
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.images import open_image
from mtl_lora.tasks import TaskSet

_SIDE = 240  # maximum pixels per side of a picture
_STYLE = """body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1.2em; }
figure { margin: 0; padding: .8em; border: 1px solid #ccc; border-radius: 6px; overflow-wrap: anywhere; }
figure div { display: flex; gap: .6em; justify-content: center; align-items: center; margin-bottom: .6em; }
img { min-width: 0; max-width: 100%; image-rendering: pixelated; } img:only-child { min-width: 128px; }
small { color: #666; } .right { color: #116329; } .wrong { color: #a40e26; }
.right::after { content: " ✓"; } .wrong::after { content: " ✗"; }"""


def evenly(tasks: TaskSet, questions: Sequence, count: int) -> list:
    """Return up to ``count`` questions, equally many per task, evenly spaced over its test set whatever the answers."""
    by_task = {task.id: [each for each in questions if each.task.id == task.id] for task in tasks}
    by_task = {task_id: part for task_id, part in by_task.items() if part}
    chosen = []
    for place, part in enumerate(by_task.values()):
        share = min(count // len(by_task) + (place < count % len(by_task)), len(part))
        chosen += [part[index * len(part) // share] for index in range(share)]
    return chosen


def sources(pictures: Mapping[str, Path], questions: Iterable, folder: str) -> dict[str, str]:
    """Return a data URL of the picture of each image that the questions show.

    pictures: the files of ``folder`` by image id. Raises ``UserError`` for a picture that is missing or broken.
    """
    shown = list(dict.fromkeys(image for question in questions for image in question.row["images"]))
    if missing := [image for image in shown if image not in pictures]:
        raise UserError(f"--pictures {folder} has no picture of {', '.join(map(repr, missing[:3]))}; pass its folder")
    return {image: _source(pictures[image]) for image in shown}


def write(path: Path, title: str, questions: Sequence, lines: Mapping, sources: Mapping[str, str]) -> None:
    """Write the page of ``questions``. lines: their prediction lines by key. sources: a result of ``sources``."""
    figures = "\n".join(_figure(question, lines[question.key], sources) for question in questions)
    title, note = html.escape(title), f"{len(questions):,} of the questions, from all over the test sets"
    head = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n<style>{_STYLE}</style>'
    head += '\n<meta name="viewport" content="width=device-width, initial-scale=1">'
    files.write_text(path, f"{head}\n<h1>{title}</h1>\n<p>{note}</p>\n<main>\n{figures}\n</main></html>\n")


def _figure(question, line: Mapping, sources: Mapping[str, str]) -> str:
    example, wanted = question.example, line.get("answers", [line["answer"]] if "answer" in line else [])
    right = line.get("correct", line.get("score", 0) >= 0.5 if "score" in line else None)
    style = "" if right is None else ' class="right"' if right else ' class="wrong"'
    drawn = "".join(f'<img alt="" src="{sources[image]}">' for image in question.row["images"])
    # Soft scores, or how many annotators gave each answer.
    counts = wanted if isinstance(wanted, Mapping) else dict(collections.Counter(wanted).most_common())
    wanted = "; ".join(text if count == 1 else f"{text} ({count:g})" for text, count in counts.items())
    score = f" ({line['score']:.2g})" if 0 < line.get("score", 0) < 1 else ""
    texts = [f"<small>{html.escape(question.task.title)}</small>", html.escape(example.text or "")]
    texts += [f"right: {html.escape(wanted)}", f"model: <b{style}>{html.escape(line['parsed'])}</b>{score}"]
    return f"<figure><div>{drawn}</div><figcaption>{'<br>'.join(filter(None, texts))}</figcaption></figure>"


def _source(path: Path) -> str:
    """Return a picture as a data URL, scaled down if it is large."""
    picture = open_image(path)
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
