"""A handful of the kills, pairs of commands at once and full disks that ``stress.py`` does by the hundred."""

import subprocess
import sys

import pytest
from shared import PROJECT

KILLS = (4, 41, 43, 44, 48, 49, 52, 57, 58, 59)  # one of a training, the others of what takes less time
# Two trainings of one folder; two evaluations, of which one asks for less; two exports; two predictions.
PAIRS = (666, 280, 179, 99)
DISKS = (8, 12, 22)


@pytest.mark.slow(30)
def test_kills_pairs_and_full_disks_leave_the_former_state_or_the_new_one():
    chosen = {"kill": KILLS, "pair": PAIRS, "disk": DISKS}
    trials = [f"{kind}-{number}" for kind, numbers in chosen.items() for number in numbers]
    command = [sys.executable, "tests/stress.py", "--seed", "0", "--only", *trials]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    facts = [f"{kind}: {len(numbers)} trials, seed 0, 0 faults" for kind, numbers in chosen.items()]
    assert all(fact in done.stdout for fact in (*facts, "SIGKILL", "one refused", "full disks")), done.stdout
