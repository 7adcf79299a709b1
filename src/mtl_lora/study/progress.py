"""Progress lines: which job of how many, how long it took, and about how long the rest will take."""

import statistics
from collections.abc import Hashable, Mapping, Sequence


class Progress:
    """Counts jobs, of which ``at_once`` run side by side, and keeps how long their commands took, by kind of job.

    jobs: by what tells one from another, (kind, names of the commands that are left of it).
    """

    def __init__(self, jobs: Mapping[Hashable, tuple[str, Sequence[str]]], at_once: int = 1):
        self.at_once = at_once
        self.waiting, self.total, self.done = dict(jobs), len(jobs), 0
        self.seconds: dict[tuple[str, str], list[float]] = {}

    def finish(self, job: Hashable, seconds: Mapping[str, float]) -> None:
        """One job is done; seconds: by command, of those that say how long it takes."""
        kind, _ = self.waiting.pop(job)
        self.done += 1
        for step, value in seconds.items():
            self.seconds.setdefault((step, kind), []).append(value)

    def left(self) -> float | None:
        """Seconds that the waiting jobs will take, by the mean of their kind, else of their stage (the first word)."""
        total = 0.0
        for kind, steps in self.waiting.values():
            for step in steps:
                stage = kind.split()[0]
                known = self.seconds.get((step, kind)) or self._of_stage(step, stage) or self._of_stage(step, "")
                if not known:
                    return None
                total += statistics.fmean(known)
        return total / self.at_once

    def _of_stage(self, step: str, stage: str) -> list[float]:
        own = [known for (name, kind), known in self.seconds.items() if name == step and kind.startswith(stage)]
        return [value for known in own for value in known]

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
