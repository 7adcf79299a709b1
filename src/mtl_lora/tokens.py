"""What a tokenizer of transformers adds to a text, and where rows of ids begin alike; for systems that cut prompts."""

import itertools
from collections.abc import Callable, Iterable, Sequence

from mtl_lora.errors import UserError


def control_ids(tokenizer) -> set[int]:
    """Return the ids that no text may have; raises ``UserError`` for a tokenizer without EOS."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    special = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    return {*tokenizer.all_special_ids, *special} - {tokenizer.unk_token_id}


def added_ids(tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer by itself puts before and after a text (BOS, EOS); both may be empty."""
    bare = tokenizer("a", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise UserError(
        f"the tokenizer {tokenizer.name_or_path!r} merges its special tokens with the text next to them (ids {full} "
        f"for 'a', {bare} without them), so a prompt cannot be cut; use another tokenizer"
    )


def refuse_control(tokenizer, control: set[int], ids: Iterable[int], index: int) -> None:
    """Raise ``UserError`` for an example whose text this tokenizer always encodes as a control token."""
    if found := control.intersection(ids):
        token = tokenizer.convert_ids_to_tokens(found.pop())
        raise UserError(f"example {index} contains {token!r}, a control token for this tokenizer; remove it")


def common_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    """Return the longest common prefix of all rows."""
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return [column[0] for column in same]


def fixed_ends(ids: list[int], above: str, below: str, tokenise: Callable) -> tuple[int, int]:
    """Return how many ids at the start and at the end of a prompt belong to the template's texts around its middle."""
    # With a letter next to it, white space at the boundary is tokenised as in the prompt.
    before, after = tokenise([f"{above}a", f"a{below}"])
    return len(common_prefix([ids, before])), len(common_prefix([ids[::-1], after[::-1]])) if below else 0
