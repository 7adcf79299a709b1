"""Captions against their references: what CIDEr and BLEU-4 need of each, by the scorers of pycocoevalcap."""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mtl_lora.errors import UserError

PTB, SIMPLE = "ptb", "simple"
_ENDINGS = r"n't|'(?:s|re|ve|ll|d|m)\b"
_BRACKETS = str.maketrans({"(": " -lrb- ", ")": " -rrb- ", "’": "'"})  # coco-caption counts brackets, by these names
_WORDS = re.compile(rf"-[lr]rb-|{_ENDINGS}|[^\W_]+?(?={_ENDINGS})|[^\W_]+(?:[-.,/&][^\W_]+)*|[&$%#@+*=<>]")


def caption_rows(captions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str) -> list[dict]:
    """Of each caption ``cider``, its CIDEr-D (1411.5726) from 0 to 10 among all of these references, and ``bleu4``,
    the numbers that BLEU-4 is computed from; rows of the metrics of these names.

    tokenizer: one of ``tokenizer_here``. Raises ``UserError`` without the package pycocoevalcap.
    """
    bleu_scorer, CiderScorer = _scorers()
    texts = tokenized([*captions, *(text for each in references for text in each)], tokenizer)
    given, rest = texts[: len(captions)], iter(texts[len(captions) :])
    wanted = [[next(rest) for _ in each] for each in references]
    scorer, rows = CiderScorer(), []
    for caption, own in zip(given, wanted, strict=True):
        scorer += (caption, own)
        counts = bleu_scorer.cook_test(caption, bleu_scorer.cook_refs(own), eff="closest")
        rows.append({"bleu4": [*counts["correct"], *counts["guess"], counts["testlen"], counts["reflen"]]})
    _, scores = scorer.compute_score()
    return [{"cider": float(score), **row} for score, row in zip(scores, rows, strict=True)]


def _scorers() -> tuple:
    try:
        from pycocoevalcap.bleu import bleu_scorer
        from pycocoevalcap.cider.cider_scorer import CiderScorer
    except ImportError:
        raise UserError(
            "captions are measured by the package pycocoevalcap; install it with `pip install pycocoevalcap`, or "
            "leave their tasks out of --tasks"
        ) from None
    return bleu_scorer, CiderScorer


def tokenizer_here(wanted: str) -> str:
    """The tokenizer in effect: ``ptb`` where a Java runs it, else ``simple``.

    Raises ``UserError`` for ``ptb`` without it, and without the package pycocoevalcap.
    """
    _scorers()
    if wanted == SIMPLE:
        return SIMPLE
    try:
        _ptb(["a"])
    except UserError as error:
        if wanted == PTB:
            raise
        print(f"captions are tokenised in the simple way: {error}", file=sys.stderr)
        return SIMPLE
    return PTB


def tokenized(texts: Sequence[str], tokenizer: str) -> list[str]:
    """Lower-case tokens with a space between them, without punctuation.

    ``ptb``: the Stanford PTBTokenizer that pycocoevalcap brings, as coco-caption uses it. ``simple``: words, with
    hyphens and the points in numbers, endings such as n't and 's apart, and signs such as & and $.
    """
    lines = [" ".join(text.split()) for text in texts]
    if tokenizer == PTB:
        return _ptb(lines)
    return [" ".join(_WORDS.findall(line.lower().translate(_BRACKETS))) for line in lines]


def _ptb(lines: Sequence[str]) -> list[str]:
    """The tokens of lines. The package's own wrapper writes into its folder, and drops lines in silence."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    java = shutil.which("java")
    if java is None:
        raise UserError("the PTB tokenizer needs Java, which is not here; install one, or pass another tokenizer")
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = [java, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    command += ["-encoding", "UTF-8"]
    run = subprocess.run(command, input="".join(f"{line}\n" for line in lines).encode(), capture_output=True)
    found = run.stdout.decode(errors="replace").split("\n")[:-1]
    if run.returncode or len(found) != len(lines):
        reason = run.stderr.decode(errors="replace").strip().split("\n")[0]
        raise UserError(f"the PTB tokenizer fails with the Java at {java} ({reason:.200}); install another")
    dropped = {*ptbtokenizer.PUNCTUATIONS}
    return [" ".join(word for word in line.split() if word not in dropped) for line in found]
