"""``python tests/exactness.py``: each method's worst relative error against its formula, for docs/exactness.md."""

from collections import defaultdict

from reference.cases import CASES, DTYPES, compare
from reference.layers import relative_error

worst = defaultdict(float)
for case in CASES:
    for name, (actual, expected) in compare(case).items():
        key = case.method, case.dtype, "y" if name == "y" else "gradient"
        worst[key] = max(worst[key], relative_error(actual, expected))
columns = [(dtype, part) for dtype in DTYPES for part in ("y", "gradient")]
print("| method |", " | ".join(f"{str(dtype).removeprefix('torch.')} {part}" for dtype, part in columns), "|")
print("| --- |", " | ".join(["---:"] * len(columns)), "|")
for method in dict.fromkeys(case.method for case in CASES):
    print(f"| {method} |", " | ".join(f"{worst[method, *column]:.1e}" for column in columns), "|")
