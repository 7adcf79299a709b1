"""The flags of ``python -m mtl_lora.study`` as one validated dataclass."""

import dataclasses

from mtl_lora.config import Config, flag
from mtl_lora.errors import UserError

ABOUT = """Run every experiment of a grid file over its seeds, and write study.json and table.md."""


@dataclasses.dataclass
class StudyConfig(Config):
    """Everything a study is told besides its grid."""

    grid: str | None = flag(None, "JSON file that describes the experiments, such as script/grids/quickstart.json")
    output_dir: str | None = flag(
        None, "folder for all runs, study.json and table.md; none: output/study/<grid's name>"
    )
    only: list[str] = flag([], "run these experiments alone, as a,b; empty: all")
    check: bool = flag(False, "check the grid and every recipe, print the plan, then stop")
    report: bool = flag(False, "start nothing: study.json and table.md of the runs that are finished")
    overwrite: bool = flag(
        False, "make runs of another recipe anew; one that differs in its evaluation alone keeps its training"
    )
    parallel: int = flag(1, "runs side by side, each with its share of the CPU's threads or a GPU of its own")
    collect: str | None = flag(None, "at the end, a folder for what can be shared: no weights, predictions or data")

    def validate(self) -> None:
        if not self.grid:
            raise UserError("pass --grid FILE, such as script/grids/quickstart.json")
        if self.parallel < 1:
            raise UserError(f"parallel must be at least 1, not {self.parallel}")
        if self.check and self.report:
            raise UserError("--check stops before anything is written and --report writes; pass one")
