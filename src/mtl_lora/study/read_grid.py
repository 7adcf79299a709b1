"""Reading a grid file: every key, flag and name is checked before anything is planned."""

from collections.abc import Sequence
from pathlib import Path

from mtl_lora import files
from mtl_lora.config import Config, closest
from mtl_lora.errors import UserError
from mtl_lora.language.config import EvalConfig, TrainConfig
from mtl_lora.study.grid import Experiment, Grid, Search, Study

# Flags that the study sets itself, and those without which runs of one table would not be comparable.
OWN_TRAIN = ("output_dir", "seed", "resume_from_checkpoint", "overwrite_output_dir", "check", "local_rank")
SHARED_TRAIN = ("base_model", "data_path", "tasks_file", "template", "cutoff_len")
OWN_EVALUATE = ("checkpoint", "peft", "output_dir", "name", "limit", "overwrite", "check", "local_rank")
FROM_TRAIN = ("base_model", "tasks_file", "template", "cutoff_len")
SHARED_EVALUATE = ("data_dir", "mode", "max_new_tokens", "num_beams")


def read_grid(path: str | Path) -> Study:
    """Read and check a grid file; raises ``UserError`` naming the file, the experiment and the key that is wrong."""
    source = f"the grid {path}"
    grid = Grid.from_json(files.read_json(path, "the grid"), source)
    experiments = tuple(
        Experiment.from_json(value, f"{source}, experiment {value.get('name', index)!r}")
        for index, value in enumerate(grid.experiments)
    )
    for field in ("name", "slug"):
        values = [getattr(experiment, field) for experiment in experiments]
        if repeated := next((value for value in values if values.count(value) > 1), None):
            raise UserError(f"{source} has two experiments with the {field} {repeated!r}; names must differ")
    search = None if grid.search is None else Search.from_json(grid.search, f"{source}, search")
    _check_flags(grid, experiments, search, source)
    tasks = TrainConfig.from_json(grid.train, f"{source}, train").task_set()
    common = EvalConfig.from_json({"base_model": "any", **grid.evaluate}, f"{source}, evaluate")
    if common.mode == "both":
        raise UserError(f"{source}, evaluate: mode is both, and a table has one; choose generate or score")
    study = Study(Path(path), grid, experiments, search, tasks)
    _check_names(study, source)
    _check_search(study, common.data_dir, source)
    return study


def _check_flags(grid: Grid, experiments: Sequence[Experiment], search: Search | None, source: str) -> None:
    """Every flag by itself: whether the script has it, and whether a grid, experiment or search may set it."""
    _check_keys(grid.train, TrainConfig, OWN_TRAIN, (), f"{source}, train")
    _check_keys(grid.evaluate, EvalConfig, OWN_EVALUATE, (), f"{source}, evaluate")
    for experiment in experiments:
        where = f"{source}, experiment {experiment.name!r}"
        _check_keys(experiment.train or {}, TrainConfig, OWN_TRAIN, SHARED_TRAIN, f"{where}, train")
        _check_keys(experiment.evaluate, EvalConfig, OWN_EVALUATE, SHARED_EVALUATE, f"{where}, evaluate")
    if search:
        _check_keys({search.flag: 0, **search.train}, TrainConfig, OWN_TRAIN, SHARED_TRAIN, f"{source}, search")


def _check_keys(flags: dict, config: type[Config], own: tuple, shared: tuple, source: str) -> None:
    known = [flag.name for flag in config.flags()]
    for key in flags:
        if key not in known:
            raise UserError(f"{source} has the unknown flag {key!r}{closest(key, known)}")
        if config is EvalConfig and key in FROM_TRAIN:
            raise UserError(f"{source}: {key} is said once, in the grid's train; leave it out here")
        if key == "limit":
            raise UserError(f"{source}: limit takes the first questions; use the grid's test_records, a fixed sample")
        if key in own:
            raise UserError(f"{source}: {key} is set by the study itself; leave it out")
        if key in shared:
            raise UserError(f"{source}: {key} must be the same for all experiments; set it in the grid's own flags")


def _check_names(study: Study, source: str) -> None:
    """Names of other experiments and of tasks, and one experiment of single tasks in a group."""
    if study.grid.baseline:
        study.experiment(study.grid.baseline)
    alone, grid_tasks = set(), study.grid.evaluate.get("tasks", [])
    for experiment in study.experiments:
        where = f"{source}, experiment {experiment.name!r}"
        study.baseline(experiment)
        for task in [*experiment.only_tasks, *experiment.evaluate.get("tasks", grid_tasks)]:
            if task not in study.tasks.names:
                raise UserError(f"{where}: there is no task {task!r}; the tasks are {study.tasks.describe()}")
        for task in [*experiment.evaluate.get("tasks", []), *(experiment.only_tasks if experiment.alone else [])]:
            if grid_tasks and task not in grid_tasks:
                raise UserError(f"{where}: {task} is asked, and the grid's evaluate has the tasks {grid_tasks} alone")
        if experiment.alone:
            if experiment.group in alone:
                raise UserError(f"{where}: the group {experiment.group!r} has an experiment with alone already")
            if "tasks" in experiment.evaluate:
                raise UserError(f"{where}: alone asks each training its own task; leave out evaluate's tasks")
            alone.add(experiment.group)


def _check_search(study: Study, test_dir: str, source: str) -> None:
    """What the search is for, and that it does not choose by the test sets."""
    for experiment in study.experiments:
        if not isinstance(experiment.search, str):
            continue
        where = f"{source}, experiment {experiment.name!r}"
        if study.search is None:
            raise UserError(f"{where}: search names {experiment.search!r}, and the grid has no search")
        if study.search.flag in (experiment.train or {}):
            raise UserError(f"{where}: search names {experiment.search!r}, and train sets {study.search.flag} itself")
        if study.searched_as(study.experiment(experiment.search)) != study.experiment(experiment.search):
            raise UserError(f"{where}: search names {experiment.search!r}, for which nothing is searched")
    if study.search is None:
        return
    if Path(study.search.data_dir).resolve() == Path(test_dir).resolve():
        raise UserError(
            f"{source}, search: data_dir is {study.search.data_dir}, the test sets themselves; choose by a development "
            "set"
        )
