"""``job.json``: what is known of a job that was started, and whether it is the job that is asked for now."""

import dataclasses
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.report.results import FILE_NAME as RESULTS_NAME
from mtl_lora.study.jobs import Job, trained_by

STATE_NAME = "job.json"
_SHOWN = 80  # characters of two values that are still quoted in a sentence


@dataclasses.dataclass
class State:
    """A job's recipe, its command lines, and of each command: whether it is done, its seconds, its starts.

    A command that was killed and started again has the seconds of its last start alone.
    """

    recipe: dict
    commands: list[str]
    train: dict | None
    evaluate: dict

    @classmethod
    def fresh(cls, job: Job) -> "State":
        """Of a job that was never started."""
        train, evaluate = ({"done": False, "seconds": 0.0, "starts": 0} for _ in range(2))
        return cls(job.recipe, job.commands, train if job.train else None, evaluate)

    @property
    def steps(self) -> dict[str, dict]:
        """The commands there are, by name."""
        return {"train": self.train, "evaluate": self.evaluate} if self.train else {"evaluate": self.evaluate}

    @property
    def left(self) -> list[str]:
        """The names of the commands that are not done."""
        return [step for step, known in self.steps.items() if not known["done"]]

    def write(self, job: Job) -> None:
        """Keep it in the job's folder."""
        files.write_json(job.folder / STATE_NAME, dataclasses.asdict(self))


def read_state(job: Job, overwrite: bool = False) -> State | None:
    """The state of a job that was started before; None for one that was not.

    Raises ``UserError`` naming what differs if the folder's job has another recipe; with ``overwrite`` it counts as
    not started, or as trained if it is and another evaluation is all that differs.
    """
    path = job.folder / STATE_NAME
    if (job.folder.parent / STATE_NAME).is_file():
        raise UserError(f"{job.folder.parent} holds a run of another recipe; pass another --output_dir, or delete it")
    # Listed before the state is looked for: another thread may be writing the first state of this job.
    held = _visible(job.folder)
    if not path.is_file():
        if any(entry.is_file() for entry in held):
            raise UserError(f"{job.folder} holds files that no study made; pass another --output_dir")
        if held and not overwrite:
            raise UserError(
                f"{job.folder} holds runs of another recipe ({', '.join(sorted(entry.name for entry in held))}); pass "
                "--overwrite True to delete them, or another --output_dir"
            )
        return None
    state = State(**files.read_json(path, "the state of a job,"))
    if changed := changes(state.recipe, job.recipe):
        kept = job.train and state.train["done"] and trained_by(state.recipe) == trained_by(job.recipe)
        if overwrite:
            return dataclasses.replace(State.fresh(job), train=state.train) if kept else None
        again = "evaluate it anew and keep its training" if kept else "make it anew"
        raise UserError(
            f"{job.folder} was made by another recipe ({'; '.join(changed)}); pass --overwrite True to {again}, "
            "or another --output_dir"
        )
    return state


def _visible(folder: Path) -> list[Path]:
    """What a folder holds, none if it is not there, without files that are being written."""
    try:
        return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except FileNotFoundError:
        return []


def changes(before: dict, now: dict) -> list[str]:
    """``train.lora_r 8 -> 4``, one a key that differs; what is too long for a sentence is only named."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = (str(recipe.get(key, "not given")) for recipe in (before, now))
        if (key in before, before.get(key)) != (key in now, now.get(key)):
            found.append(f"{key} {old} -> {new}" if len(old + new) < _SHOWN else key)
    return found


def finished(job: Job, overwrite: bool = False) -> bool:
    """Whether nothing of a job is left to do; see ``read_state``."""
    state = read_state(job, overwrite)
    return state is not None and state.evaluate["done"] and (job.folder / RESULTS_NAME).is_file()
