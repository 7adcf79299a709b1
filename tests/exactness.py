"""``python tests/exactness.py``: every method against its formula in every case, as the tables of docs/exactness.md."""

import itertools
import platform
from collections import defaultdict

import torch
from reference.cases import CASES, DTYPES, Case, compare
from reference.layers import relative_error

import mtl_lora


def worst(compared: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    """The relative error of the output, and the largest among those of the gradients."""
    errors = {name: relative_error(actual, expected) for name, (actual, expected) in compared.items()}
    return errors.pop("y"), max(errors.values())


def line(*cells: object) -> str:
    """A row of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def table(rows: dict[tuple, dict[torch.dtype, tuple[float, float]]], *keys: str) -> list[str]:
    """Lines of a table with, for each dtype, forward and gradient."""
    columns = [f"{str(dtype).removeprefix('torch.')} {part}" for dtype in DTYPES for part in ("y", "gradient")]
    lines = [line(*keys, *columns), line(*["---"] * len(keys), *["---:"] * len(columns))]
    for row, by_dtype in rows.items():
        errors = itertools.chain.from_iterable(by_dtype.get(dtype, (None, None)) for dtype in DTYPES)
        lines.append(line(*row, *("" if error is None else f"{error:.1e}" for error in errors)))
    return lines


def markdown(cases: list[Case]) -> str:
    """The worst relative errors by method, and below them those of every case."""
    single, by_method = defaultdict(dict), defaultdict(dict)
    for case in cases:
        errors = worst(compare(case))
        switches = ["on" if switch else "off" for switch in (case.dropout, case.checkpointing)]
        single[case.method, case.ids, *switches][case.dtype] = errors
        before = by_method[(case.method,)].get(case.dtype, (0.0, 0.0))
        by_method[(case.method,)][case.dtype] = tuple(map(max, before, errors))
    lines = [
        f"mtl-lora {mtl_lora.__version__}, torch {torch.__version__}, Python {platform.python_version()}, CPU; "
        f"{len(cases)} cases.",
        "",
        "## The worst case of each method",
        "",
        *table(by_method, "method"),
        "",
        "## Every case",
        "",
        *table(single, "method", "task ids", "dropout", "checkpointing"),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(CASES))
