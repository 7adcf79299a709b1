"""The results of one run: its evaluation's, or, for tasks trained alone, those of all their evaluations as one."""

from mtl_lora import files
from mtl_lora.report.predictions import FOLDER_NAME, predictions_path
from mtl_lora.report.results import FILE_NAME, Results, mean_score, read_results
from mtl_lora.study.planner import Run


def results_of(run: Run) -> Results:
    """The results of a finished run; those of single tasks are first put together in the run's folder."""
    if run.experiment.alone:
        merge(run)
    return read_results(run.folder)


def merge(run: Run) -> None:
    """Write ``results.json`` and predictions of all jobs of a run into its folder, as one evaluation would."""
    parts = [read_results(job.folder) for job in run.jobs]
    values = [files.read_json(part.path, "the results file") for part in parts]
    merged = dict(values[0])
    for key in ("tasks", "data"):
        merged[key] = {name: entry for value in values for name, entry in value[key].items()}
    average = mean_score([score for part in parts for score in part.tasks.values()])
    merged["average"] = {"accuracy": average.accuracy, "stderr": average.stderr, "tasks": len(merged["tasks"])}
    merged["command"] = "; ".join(value["command"] for value in values)
    # The run has an adapter a task, so no single one is its own.
    merged |= {"adapter": None, "settings": {**merged["settings"], "adapter_sha256": None}}
    for part in parts:
        for task in part.tasks:
            text = predictions_path(part, task).read_text(encoding="utf-8")
            _write_changed(run.folder / FOLDER_NAME / f"{task}.jsonl", text)
    files.write_json(run.folder / FILE_NAME, merged)


def _write_changed(path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        files.write_text(path, text)
