"""Files of every format that was ever written are read, and give the numbers that they gave when they were written.

``tests/fixtures/v1`` holds what version 0.1.0 wrote; its README.md says how. The paths in those files are relative
to their folder, so the tests run inside it and write elsewhere.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parent / "fixtures" / "v1"
CHECKPOINTS = sorted(path.name for path in (FIXTURES / "checkpoints").iterdir())
EVALUATIONS = sorted(str(path.parent.relative_to(FIXTURES)) for path in FIXTURES.glob("evaluations/**/results.json"))
PEFT = ["lora/blank", "mtl_lora/hellaswag"]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32
ASKED = ["--dtype", "fp32", "--max_new_tokens", "12", "--data_dir"]


# ---- where today's code has what the tests need ----


def base_model():
    from mtl_lora.base_model import BaseModel

    return BaseModel("base").load("fp32")


def train(arguments: list[str]) -> None:
    from mtl_lora import cli
    from mtl_lora.language.config import TrainConfig
    from mtl_lora.training.run import train as run

    run(cli.parse(TrainConfig, arguments, ""))


def evaluate(arguments: list[str]) -> None:
    from mtl_lora import cli
    from mtl_lora.language.config import EvalConfig
    from mtl_lora.language.evaluate import run

    run(cli.parse(EvalConfig, arguments, ""))


def merged(checkpoint: str, task: str, output: Path):
    from mtl_lora.base_model import BaseModel
    from mtl_lora.export.merge import export_merged

    return BaseModel(str(export_merged(checkpoint, output, task, dtype="fp32"))).load("fp32")


def export_peft(checkpoint: str, task: str, output: Path) -> None:
    from mtl_lora.export.peft import export_peft

    export_peft(checkpoint, output, [task])


def analyse(checkpoint: str, output: Path) -> None:
    from mtl_lora.adapter.analysis import write_analysis

    write_analysis(checkpoint, output)


def scores(folder: str) -> tuple[dict, float]:
    """What a results file holds: the scores by task, and the average accuracy."""
    from mtl_lora.results import Results

    found = Results.load(folder)
    tasks = {
        name: {
            "accuracy": score.value,
            "stderr": score.stderr,
            "n": score.n,
            "majority": score.majority,
            "groups": {kind: group.value for kind, group in score.groups.items()},
        }
        for name, score in found.tasks.items()
    }
    return tasks, found.average.value


def report(*arguments: str) -> None:
    from mtl_lora.report.__main__ import main

    main([*arguments])


def read_folder(path: str):
    """A study of the report's, from the folder of a study, a training or an evaluation."""
    from mtl_lora.report.load import load_run

    return load_run(path)


# ---- tests ----


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "expected.safetensors")


@pytest.fixture(autouse=True)
def inside(monkeypatch):
    """The fixtures' folder as the working folder, and the one thread with which they were made."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(FIXTURES)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def logits(model, expected, tasks: int = 8) -> torch.Tensor:
    """(B, V) after the last token of each row of the expected numbers' batch."""
    import mtl_lora

    with mtl_lora.route.use(expected["batch.task_ids"] % tasks):
        return model.eval()(input_ids=expected["batch.input_ids"]).logits[:, -1]


def test_the_base_gives_its_logits(expected):
    torch.testing.assert_close(logits(base_model(), expected), expected["logits.base"], **TOLERANCE)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_gives_its_logits(name, expected):
    import mtl_lora

    model = mtl_lora.load(base_model(), f"checkpoints/{name}")
    tasks = model.mtl_lora_config.tasks
    found = logits(model, expected, len(tasks))
    torch.testing.assert_close(found, expected[f"logits.{name}"], **TOLERANCE)
    assert (found - expected["logits.base"]).abs().max() > 0.1  # the adapter acts


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_a_checkpoint_gives_the_updates_of_its_tasks(name, expected):
    import mtl_lora

    model = mtl_lora.load(base_model(), f"checkpoints/{name}")
    layers = sorted(mtl_lora.adapter_layers(model).items())
    factors = [[layer.factors(task) for task in model.mtl_lora_config.tasks] for _, layer in layers]
    found = [[(pair.scale * (pair.B.double() @ pair.A.double())).norm() for pair in row] for row in factors]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected[f"norms.{name}"], **TOLERANCE)


def test_a_checkpoint_saved_again_is_the_same(tmp_path):
    import mtl_lora

    mtl_lora.save(mtl_lora.load(base_model(), "checkpoints/mtl_lora"), tmp_path)
    before, after = load_file("checkpoints/mtl_lora/mtl_lora.safetensors"), load_file(tmp_path / "mtl_lora.safetensors")
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.slow
def test_an_unfinished_training_is_resumed_to_its_final_weights(expected, tmp_path):
    shutil.copytree("unfinished", tmp_path / "run")
    # The settings of then are flags of today.
    settings = json.loads(Path("unfinished/run.json").read_text())["settings"]
    changed = {"output_dir": tmp_path / "run", "cache_dir": tmp_path / "rows", "resume_from_checkpoint": True}
    train([f"--{name}={spelled(value)}" for name, value in (settings | changed).items() if value is not None])
    resumed = {name.removeprefix("resumed."): value for name, value in expected.items() if name.startswith("resumed.")}
    # Another kind of CPU rounds otherwise: 1.2e-5 with AVX2 alone.
    torch.testing.assert_close(load_file(tmp_path / "run" / "mtl_lora.safetensors"), resumed, rtol=0, atol=5e-5)
    log = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4, 5, 6]


def spelled(value: object) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


@pytest.mark.parametrize("path", PEFT)
def test_peft_reads_an_export_of_then_and_of_now(path, expected, tmp_path):
    from peft import PeftModel

    checkpoint, task = path.split("/")
    export_peft(f"checkpoints/{checkpoint}", task, tmp_path / "peft")
    for folder in (f"peft/{path}", tmp_path / "peft" / task):
        model = PeftModel.from_pretrained(base_model(), str(folder))
        torch.testing.assert_close(logits(model, expected), expected[f"logits.peft.{path}"], **TOLERANCE)
    torch.testing.assert_close(
        load_file(tmp_path / "peft" / task / "adapter_model.safetensors"),
        load_file(f"peft/{path}/adapter_model.safetensors"),
        **TOLERANCE,
    )


def test_a_merged_model_gives_the_logits_of_its_task(expected, tmp_path):
    model = merged("checkpoints/mtl_lora", "hellaswag", tmp_path / "merged")
    torch.testing.assert_close(logits(model, expected), expected["logits.merged.mtl_lora/hellaswag"], **TOLERANCE)


def test_the_analysis_of_a_checkpoint_is_the_one_written_then(tmp_path):
    analyse("checkpoints/mtl_lora", tmp_path / "analysis.json")
    found, before = (
        json.loads(path.read_text())
        for path in (tmp_path / "analysis.json", Path("checkpoints/mtl_lora/adapter_analysis.json"))
    )
    added = {"method_title", "mixture_parts", "mixture_at_start", "update_similarity_at_start"}  # in version 0.2.0
    assert found.keys() == before.keys() | added
    assert "the start was not kept" in found["notes"].pop()
    for key in before:
        assert_alike(found[key], before[key], key)


def assert_alike(found: object, before: object, where: str) -> None:
    """The same JSON value, numbers up to the rounding of six decimals."""
    if isinstance(before, dict):
        assert found.keys() == before.keys(), where
    entries = before if isinstance(before, dict) else range(len(before)) if isinstance(before, list) else ()
    for key in entries:
        assert_alike(found[key], before[key], f"{where}.{key}")
    if not isinstance(before, dict | list):
        assert found == (pytest.approx(before, abs=1e-5) if isinstance(before, float) else before), where


@pytest.mark.parametrize("folder", EVALUATIONS)
def test_the_report_reads_the_accuracies_of_a_results_file(folder):
    value = json.loads((Path(folder) / "results.json").read_text())
    tasks, average = scores(folder)
    assert average == pytest.approx(value["average"]["accuracy"], rel=1e-14)
    assert tasks == {
        name: {
            **{key: task.get(key) for key in ("accuracy", "n", "majority")},
            # Never 0, as that version wrote it for none or all right.
            "stderr": task["stderr"] or pytest.approx(math.sqrt(2 * (task["n"] + 2) / (task["n"] + 4) ** 3)),
            "groups": {kind: group["accuracy"] for kind, group in task["groups"].items()},
        }
        for name, task in value["tasks"].items()
    }


@pytest.mark.parametrize("mode", ["score", "generate"])
def test_the_report_tabulates_and_compares_results(mode, capsys):
    folders = [f"evaluations/{name}/{mode}" for name in ("base", "mtl_lora")]
    report("table", *folders)
    table = capsys.readouterr().out
    for folder in folders:
        assert f"{100 * scores(folder)[1]:.1f}" in table, folder
    report("compare", *folders, "--resamples", "100", "--format", "json")
    compared = capsys.readouterr().out
    assert all(name in compared for name in ("MTL-LoRA", "hellaswag"))
    report("details", *folders)
    assert "MTL-LoRA" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["checkpoints/mtl_lora", "evaluations/mtl_lora/score", "study"])
def test_the_report_reads_a_folder(path):
    assert read_folder(path).experiments


@pytest.mark.slow(1)
def test_an_evaluation_of_today_gives_the_predictions_of_then(tmp_path):
    asked = [*ASKED, "commonsense/questions", "--mode", "both"]
    evaluate(["--checkpoint", "checkpoints/mtl_lora", *asked, "--output_dir", str(tmp_path)])
    before = Path("evaluations/mtl_lora")
    for mode in ("score", "generate"):
        assert_same_predictions(tmp_path / mode, before / mode)
    found, stored = (json.loads((folder / "agreement.json").read_text()) for folder in (tmp_path, before))
    assert {key: found[key] for key in stored} == stored


def test_an_evaluation_of_a_peft_folder_gives_the_predictions_of_then(tmp_path):
    asked = [*ASKED, "own/questions", "--tasks_file", "own/tasks.json"]
    evaluate(["--peft", "peft/lora/blank", *asked, "--output_dir", str(tmp_path)])
    assert_same_predictions(tmp_path, Path("evaluations/peft_lora"))


def assert_same_predictions(found: Path, before: Path) -> None:
    stored = predictions(before)
    again = predictions(found)
    assert again.keys() == stored.keys()
    for key, record in stored.items():
        # The figures of an option's text; every other key is text or a truth value and the very same.
        assert again[key].get("scores") == pytest.approx(record.get("scores"), abs=1e-4), key
        assert {**again[key], "scores": None} == {**record, "scores": None}
    assert scores(str(found)) == scores(str(before))


def predictions(folder: Path) -> dict[tuple[str, int], dict]:
    lines = [line for path in (folder / "predictions").glob("*.jsonl") for line in path.read_text().split("\n") if line]
    return {(record["task"], record["index"]): record for record in map(json.loads, lines)}


def test_an_evaluation_of_then_is_continued(tmp_path):
    """Predictions that lie there are kept, and only what is missing is answered."""
    folder = tmp_path / "score"
    shutil.copytree("evaluations/mtl_lora/score", folder)
    (folder / "predictions" / "boolq.jsonl").unlink()
    for path in (folder / "predictions").glob("*.jsonl"):
        # A score that the model does not give shows that the stored line was kept.
        lines = [{**json.loads(line), "scores": [-1.0]} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = [*ASKED, "commonsense/questions", "--mode", "score"]
    evaluate(["--checkpoint", "checkpoints/mtl_lora", *asked, "--output_dir", str(folder)])
    again, stored = predictions(folder), predictions(Path("evaluations/mtl_lora/score"))
    assert again.keys() == stored.keys()
    assert {task for (task, _), record in again.items() if record["scores"] != [-1.0]} == {"boolq"}
    assert scores(str(folder)) == scores("evaluations/mtl_lora/score")
