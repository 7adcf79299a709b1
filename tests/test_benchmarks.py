"""Benchmarks run at tiny sizes, measure what they say, and their baselines compute what ours compute."""

import contextlib
import io
import json
import runpy
import sys
import tarfile
import time

import pytest
import torch
from reference.tiny import adapter_config, randomise, tiny_llama
from shared import PROJECT, QUICKSTART
from torch import nn
from transformers import SwinConfig

from mtl_lora import cli, route
from mtl_lora.adapter.layer import layer_class

FOLDER = PROJECT / "benchmark"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if "__main__" in path.read_text())
README = (FOLDER / "README.md").read_text()
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The modules that the scripts share, found as when a script starts."""
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script in this process: ``run("name.py", "--flag", ...)`` returns what it printed."""

    def start(name: str, *flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(FOLDER / name), *flags])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return start


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_a_help(run, capsys, script):
    with pytest.raises(SystemExit) as exit:
        run(script, "--help")
    assert exit.value.code == 0
    assert f"python benchmark/{script}" in capsys.readouterr().out


# ---- tiny runs ----


def test_adapter_layer_keeps_a_table_and_a_json_line(run, tmp_path):
    flags = ["--shapes", "4x3x8", "--dropout", "0.05", "--rounds", "1", "--repeats", "1", "--dtype", "fp32"]
    printed = run("adapter_layer.py", *flags, "--results", str(tmp_path))
    record = json.loads((tmp_path / "adapter_layer.jsonl").read_text())
    assert json.loads(printed.splitlines()[-1]) == record
    assert "| looping" in (tmp_path / "adapter_layer.md").read_text()
    assert {"command", "commit", "torch", "peft", "device", "threads"} <= record.keys()
    (case,) = record["cases"]
    assert case["layers"]["mtl_lora"]["peak_bytes"] > case["layers"]["frozen"]["peak_bytes"]


@pytest.mark.slow
def test_train_step_runs_every_kind_of_side_and_any_number_of_tasks(run, tiny_base):
    sides = ["frozen", "original", "peft", "lora", "mtl_lora", "gathering", "looping", "peft_layer"]
    flags = [f"--base_model={tiny_base}", "--records=8", "--rounds=1", "--results=none", "--dtype=fp32"]
    printed = run("train_step.py", *flags, f"--sides={','.join(sides)}", "--tasks=64", "--optimiser", "--memory")
    record = json.loads(printed.splitlines()[-1])
    assert list(record["sides"]) == [*sides, "mtl_lora_64_tasks"]
    peaks = {name: one["peak_bytes"] for name, one in record["sides"].items()}
    assert peaks["frozen"] < peaks["lora"] < peaks["mtl_lora"]
    assert peaks["original"] < peaks["mtl_lora"]  # gradient checkpointing


@pytest.mark.slow(15)
def test_gpu_report_runs_every_step_on_a_cpu_in_tiny_sizes(run, tiny_base, tmp_path, monkeypatch):
    """The steps and their commands in this process; the next test has the processes of the steps."""
    import gpu_steps

    def in_this_process(command: list[str]) -> str:
        assert command[:3] == [sys.executable, "-m", "mtl_lora"]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            cli.main(command[3:])
        return printed.getvalue().strip()

    monkeypatch.setattr(gpu_steps, "run", in_this_process)
    for number, start in zip("1234", ("step", "profile", "train", "evaluate"), strict=True):
        run("gpu_report.py", str(tmp_path), "--only", number, "--dry", "True", "--base_model", tiny_base)
        record = json.loads((tmp_path / f"step-{number}.json").read_text())
        assert {"command", "commit", "torch", "device"} <= record.keys(), start
    step, profile, train, answers = (json.loads((tmp_path / f"step-{n}.json").read_text()) for n in "1234")
    assert step["matrix_flops"] > 0 and step["bytes_a_second"] > 0
    assert step["length_16"]["sides"]["mtl_lora_512_tasks"]["ratios"]["mtl_lora"]["median"] > 0
    assert profile["mtl_lora_12"]["kernels"] > profile["frozen_12"]["kernels"]
    assert profile["compiled"]["mtl_lora, compiled"]["mtl_lora, eager"]["median"] > 0
    assert train["steps"] == 2 and len(train["lora"]["log"]) >= 2
    assert "\n| MTL-LoRA " in (tmp_path / "step-3.md").read_text()
    assert answers["questions/s"].keys() >= {"one at a time, no cache", "generate, batch auto", "score, batch 2"}


@pytest.mark.slow
def test_gpu_report_keeps_what_it_has_and_says_where_to_go_on(run, tmp_path, capsys):
    (tmp_path / "step-2.md").write_text("from before\n")
    (tmp_path / "step-4.md").write_text("of an earlier run\n")
    with pytest.raises(SystemExit) as exit:
        run("gpu_report.py", str(tmp_path), "--from", "4", "--dry", "True")  # there is no trained adapter
    assert exit.value.code == 2
    assert "--from 4" in capsys.readouterr().err
    report = (tmp_path / "report.md").read_text()
    assert "from before" in report and "of an earlier run" not in report and report.count("Not measured.") == 3
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert {"report.md", "step-2.md", "step-4.log"} <= set(archive.getnames())


@no_gpu
def test_gpu_report_needs_a_gpu(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("gpu_report.py", str(tmp_path))
    assert "torch finds none" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_compares_both_protocols_with_one_question_at_a_time(run, trained):
    flags = [f"--checkpoint={trained}", f"--data_dir={QUICKSTART / 'test'}", "--questions=1", "--rounds=1"]
    record = json.loads(run("evaluate.py", *flags, "--results=none", "--dtype=fp32").splitlines()[-1])
    assert list(record["sides"]) == ["one at a time, no cache", "generate", "score", "floor of score"]
    assert all(side["questions/s"]["median"] > 0 for side in record["sides"].values())


@pytest.mark.slow
def test_memory_counts_the_adapter_and_the_optimiser(run, tiny_base):
    flags = ["--records=8", "--batch_size=2", "--dtype=fp32", "--alone=mtl_lora"]
    found = json.loads(run("memory.py", f"--base_model={tiny_base}", *flags).splitlines()[-1])
    assert found["tensors"] > found["held"] + 3 * 4 * found["trained"]


@pytest.mark.slow
def test_dense_compares_one_forward_of_all_tasks_with_a_model_of_each(run, tmp_path):
    sizes = {"patch_size": 2, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 2}
    SwinConfig(**sizes).save_pretrained(tmp_path)
    flags = ["--tasks", "2", "--image_size", "16", "--rounds", "1", "--rank", "4", "--config", str(tmp_path)]
    record = json.loads(run("dense.py", *flags, "--results", "none").splitlines()[-1])
    whole, alone = record["results"]
    assert whole["decoders"] and not alone["decoders"]
    assert whole["one"]["trained"] < whole["separate"]["trained"]
    assert alone["one"]["peak_bytes"] < whole["one"]["peak_bytes"]
    one = whole["separate"]  # there are the gradients of one model's trained weights, of the many that are separate
    assert one["peak_bytes"] > one["weight_bytes"] + 4 * one["trained"] / 2


@pytest.mark.slow
def test_gpu_step_can_be_tried_out_on_a_cpu(run):
    sizes = ["--layers=2", "--width=16", "--heads=2", "--vocabulary=50", "--length=12", "--matrix=32"]
    flags = ["--device=cpu", *sizes, "--batch_size=2", "--steps=1", "--rounds=1", "--results=none", "--dtype=fp32"]
    flags.append("--sides=frozen,mtl_lora")
    record = json.loads(run("gpu_step.py", *flags).splitlines()[-1])
    assert record["linear_weights"] == 2 * (4 * 16 * 16 + 3 * 16 * 43)
    assert record["sides"]["mtl_lora"]["share_of_peak"]["median"] > 0


@no_gpu
def test_gpu_step_without_a_gpu_is_one_sentence(run, capsys):
    with pytest.raises(SystemExit) as exit:
        run("gpu_step.py")
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("error: this benchmark needs a GPU and torch finds none")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--sides=lora,dorra"], "there is no side 'dorra'; the sides are original, peft"),
        (["--tasks=2,0"], "it must be a whole number from 1, not '0'"),
        (["--records=12"], "--records must be a multiple of the 8 tasks, not 12"),
        (["--records=80000"], "records of boolq, 10000 are needed; lower --records"),
        (["--records=16", "--batch_size=3"], "--records must be a multiple of --batch_size 3, not 16"),
    ],
)
def test_a_wrong_flag_is_answered_in_one_sentence(run, capsys, tiny_base, flags, sentence):
    with pytest.raises(SystemExit) as exit:
        run("train_step.py", f"--base_model={tiny_base}", *flags)
    assert exit.value.code == 2
    assert sentence in capsys.readouterr().err


# ---- what is compared ----


@pytest.mark.parametrize("form", ["gathering", "looping"])
def test_other_forms_of_the_layer_compute_what_ours_computes(form):
    """Outputs, and gradients of the input and of every weight, for rows of some of the tasks in any order."""
    from baselines.gathering import GatheringLayer
    from baselines.looping import LoopingLayer

    torch.manual_seed(0)
    base = nn.Linear(5, 7, bias=False).double().requires_grad_(False)
    layer = randomise(layer_class("mtl_lora")(base, adapter_config()))
    other = {"gathering": GatheringLayer, "looping": LoopingLayer}[form]
    other.task_ids = task_ids = torch.tensor([2, 0, 3, 2, 0])
    x, gradient = torch.randn(5, 3, 5).double().requires_grad_(), torch.randn(5, 3, 7).double()
    found = []
    for one in (layer, other(layer)):
        with route.use(task_ids):
            output = one(x)
        found.append([output, *torch.autograd.grad(output, [x, *layer.adapter_parameters().values()], gradient)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=1e-12)


def test_pipelines_share_the_frozen_weights_and_leave_the_base_as_it_is():
    from pipelines import pipeline

    base = tiny_llama(torch.float32)
    names = [name for name, _ in base.named_modules()]
    own = {weight.data_ptr() for weight in base.parameters()}
    for side in ("mtl_lora", "peft", "frozen"):
        frozen = [weight for weight in pipeline(side, base).model.parameters() if not weight.requires_grad]
        assert {weight.data_ptr() for weight in frozen} == own
    assert [name for name, _ in base.named_modules()] == names


def test_task_ids_are_spread_over_all_tasks():
    from batches import spread_tasks

    batches = [{"task_ids": torch.zeros(4, dtype=torch.long)} for _ in range(3)]
    few, many = (torch.cat([batch["task_ids"] for batch in spread_tasks(batches, count)]) for count in (3, 24))
    assert few.bincount().tolist() == [4, 4, 4]
    assert sorted(many.tolist()) == list(range(0, 24, 2))


# ---- how it is measured ----


@pytest.mark.slow(1)
def test_sides_take_turns_piece_by_piece_and_the_first_round_is_not_kept():
    from measure import turns

    done = []

    def piece(name: str) -> int:
        done.append(name)
        return 1

    sides = {name: [lambda name=name: piece(name)] * 3 for name in ("a", "b")}
    rates = turns(sides, 2)
    assert {name: len(values) for name, values in rates.items()} == {"a": 2, "b": 2}
    assert [set(done[index : index + 2]) for index in range(0, 18, 2)] == [{"a", "b"}] * 9
    assert {done[index] for index in range(0, 18, 2)} == {"a", "b"}  # neither is always the first


@pytest.mark.slow
def test_a_slow_side_has_a_lower_rate():
    from measure import ratio, rounds

    rates = rounds({"fast": lambda: 4.0, "slow": lambda: time.sleep(0.05) or 4.0}, 3)
    assert ratio(rates["slow"], rates["fast"])["median"] < 1


def test_interval_of_a_median():
    from measure import interval

    assert interval([2.0] * 5) == [2.0, 2.0]
    values = [float(value) for value in range(1, 102)]
    low, high = interval(values)
    assert 35 < low < 51 < high < 67  # by the sign test 41 to 61
    assert interval(values) == [low, high]


@no_gpu
def test_bytes_of_tensors_are_exact():
    from footprint import tensor_bytes

    def work() -> torch.Tensor:
        kept, passing = torch.empty(1000), torch.empty(2000)
        del passing
        return kept

    work()
    assert tensor_bytes(work) == (4000, 12000)


def test_the_table_on_paper_is_what_its_script_prints(run):
    assert run("scaling_on_paper.py").strip() in README
