"""Score captions against their references for CIDEr and BLEU-4, with the scorers of pycocoevalcap."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mtl_lora.errors import UserError, note

PTB, SIMPLE = "ptb", "simple"
_ENDINGS = r"n't|'(?:s|re|ve|ll|d|m)\b"
_BRACKETS = str.maketrans({"(": " -lrb- ", ")": " -rrb- ", "’": "'"})  # to coco-caption brackets are tokens, so named
_WORDS = re.compile(rf"-[lr]rb-|{_ENDINGS}|[^\W_]+?(?={_ENDINGS})|[^\W_]+(?:[-.,/&][^\W_]+)*|[&$%#@+*=<>]")


def caption_rows(captions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str) -> list[dict]:
    """Return for each caption the rows of the metrics ``cider`` and ``bleu4``.

    cider: CIDEr-D (arXiv 1411.5726), 0 to 10, with document frequencies from all of these references. bleu4: the counts
    from which BLEU-4 is computed. tokenizer: a result of ``tokenizer_here``. Raises ``UserError`` if the package
    pycocoevalcap is not installed.
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
            "captions are scored with the package pycocoevalcap; install it with `pip install pycocoevalcap`, or "
            "leave caption tasks out of --tasks"
        ) from None
    return bleu_scorer, CiderScorer


def tokenizer_here(wanted: str) -> str:
    """Return the tokenizer to use: ``ptb`` if Java can run it here, unless ``simple`` is wanted.

    wanted: ``ptb``, ``simple`` or ``auto``, which falls back to ``simple`` with a note on stderr. Raises ``UserError``
    if ``ptb`` is wanted and cannot run, and if the package pycocoevalcap is not installed.
    """
    _scorers()
    if wanted == SIMPLE:
        return SIMPLE
    try:
        _ptb(["a"])
    except UserError as error:
        if wanted == PTB:
            raise
        note(f"captions are tokenised with the simple tokenizer: {error}")
        return SIMPLE
    return PTB


def tokenized(texts: Sequence[str], tokenizer: str) -> list[str]:
    """Return each text as lower-case tokens separated by spaces, without punctuation.

    ``ptb``: the Stanford PTBTokenizer that comes with pycocoevalcap, used as in coco-caption. ``simple``: tokens are
    words, which keep inner hyphens and decimal points; endings such as n't and 's; and signs such as & and $.
    """
    lines = [" ".join(text.split()) for text in texts]
    if tokenizer == PTB:
        return _ptb(lines)
    return [" ".join(_WORDS.findall(line.lower().translate(_BRACKETS))) for line in lines]


def _ptb(lines: Sequence[str]) -> list[str]:
    """Tokenise lines by calling the jar, as the package's wrapper writes into its own folder and may drop lines."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    java = shutil.which("java")
    if java is None:
        raise UserError("the PTB tokenizer needs Java, which is not installed; install it, or pass another tokenizer")
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
