"""What ``--check`` prints: every experiment with its seeds, trained weights and command lines."""

import json
import subprocess
import sys
from collections.abc import Sequence

from mtl_lora.report.render import trainable_text
from mtl_lora.report.results import Trainable
from mtl_lora.study.grid import Experiment
from mtl_lora.study.jobs import Job
from mtl_lora.study.planner import Planner, Run


def plan(planner: Planner, chosen: Sequence[Experiment], candidates: dict[str, list[Run]]) -> str:
    """A text of a few lines an experiment; ``candidates`` are the runs of each search."""
    study = planner.study
    lines, total = [f"{study.grid.name}: {study.grid.about}"], 0
    for name, runs in candidates.items():
        count = sum(len(run.jobs) for run in runs)
        values = ", ".join(f"{run.value:g}" for run in runs)
        lines.append(f"search of {study.search.flag} for {name}: {values}; runs: {count}")
        total += count
    jobs = {
        experiment.name: [job for seed in study.seeds(experiment) for job in planner.run(experiment, seed).jobs]
        for experiment in chosen
    }
    weights = _trained_weights({name: own[0] for name, own in jobs.items() if own[0].train})
    for experiment in chosen:
        own = jobs[experiment.name]
        facts = [f"runs: {len(own)}", *([weights[experiment.name]] if experiment.name in weights else [])]
        lines.append(f"{experiment.name}; {', '.join(facts)}")
        lines += [f"    {command}" for command in own[0].commands]
        total += len(own)
    lines.append(f"every recipe is fine; {total} runs in {planner.folder}")
    return "\n".join(lines)


def _trained_weights(jobs: dict[str, Job]) -> dict[str, str]:
    """What each recipe trains, in words; counted in a process of its own, for a study loads no model."""
    asked = json.dumps([job.train for job in jobs.values()])
    words = [sys.executable, "-m", "mtl_lora.language.weights"]
    done = subprocess.run(words, input=asked, capture_output=True, text=True)
    if done.returncode:
        return dict.fromkeys(jobs, "trained weights not counted")
    return {
        name: f"trained weights not counted ({count})"
        if isinstance(count, str)
        else f"trained weights, M (%): {trainable_text(Trainable(*count))}"
        for name, count in zip(jobs, json.loads(done.stdout), strict=True)
    }
