"""Progress lines: which job of how many, how long it took, and about how long the rest will take."""

import statistics
from collections.abc import Sequence


class Progress:
    """Counts jobs, of which ``at_once`` run side by side, and keeps how long the finished ones took, by kind."""

    def __init__(self, kinds: Sequence[str], at_once: int = 1):
        self.at_once = at_once
        self.waiting, self.total, self.done = list(kinds), len(kinds), 0
        self.seconds: dict[str, list[float]] = {}

    def finish(self, kind: str, seconds: float, whole: bool = True) -> None:
        """One job is done; ``whole`` False: it was started more than once, so its seconds say little."""
        self.waiting.remove(kind)
        self.done += 1
        if whole:
            self.seconds.setdefault(kind, []).append(seconds)

    def left(self) -> float | None:
        """Seconds that the waiting jobs will take, by the mean of their kind, else of their stage (the first word)."""
        total = 0.0
        for kind in self.waiting:
            known = self.seconds.get(kind) or self._of_stage(kind.split()[0]) or self._of_stage("")
            if not known:
                return None
            total += statistics.fmean(known)
        return total / self.at_once

    def _of_stage(self, stage: str) -> list[float]:
        return [second for kind, seconds in self.seconds.items() if kind.startswith(stage) for second in seconds]

    def line(self, label: str, seconds: dict[str, float | None], average: float) -> str:
        """``[ 7/16] MTL-LoRA seed 1: train 5:12 evaluate 0:40, average 71.2; about 52 min left``."""
        counted = f"[{self.done:>{len(str(self.total))}}/{self.total}]"
        steps = " ".join(f"{step} {clock(value)}" for step, value in seconds.items() if value is not None)
        left = self.left()
        rest = f"; about {roughly(left)} left" if self.waiting and left is not None else ""
        return f"{counted} {label}: {steps}, average {100 * average:.1f}{rest}"


def clock(seconds: float) -> str:
    """``5:12``, or ``1:05:12`` from an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def roughly(seconds: float) -> str:
    """``40 s``, ``52 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
