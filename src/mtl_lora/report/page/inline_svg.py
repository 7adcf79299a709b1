"""A picture's SVG file as part of a page: without what belongs to a file, with ids of its own and a name to be read."""

import html
import re

_FILE_PARTS = re.compile(
    r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<(metadata|title)>.*?</\1>|<style\b.*?</style>", re.DOTALL
)
_IDS = re.compile(r'(\bid="|\bhref="#|\burl\(#)')
# What matplotlib's style sheet says of all elements: on a page that sheet would mean the page's.
_STYLE = "stroke-linejoin: round; stroke-linecap: butt"


def inline_svg(svg: str, name: str, title: str, description: str) -> str:
    """The ``<svg>`` element alone, named by ``title`` and ``description``; ids begin with ``name``, as must be unique.

    Nothing in it refers to anything outside it.
    """
    svg = _IDS.sub(rf"\g<1>{name}-", _FILE_PARTS.sub("", svg).strip())
    labels = (
        f'<title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-description">{html.escape(description)}</desc>'
    )
    named = f'role="img" aria-labelledby="{name}-title" aria-describedby="{name}-description" style="{_STYLE}"'
    return re.sub(r"<svg\b([^>]*)>", lambda match: f"<svg {named}{match.group(1)}>{labels}", svg, count=1)
