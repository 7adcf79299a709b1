"""A method that a test declares in one class goes through training, evaluation and report like a built-in one, and so
does one that an installed package announces."""

import dataclasses
import json
import re
import sys
import tomllib

import pytest
import torch
from reference.tiny import TASKS, adapted_llama, tiny_llama, tokens
from shared import PROJECT, QUICKSTART

import mtl_lora
from mtl_lora import UserError, artifacts, cli
from mtl_lora.adapter import layer
from mtl_lora.adapter.checkpoint import start_from
from mtl_lora.adapter.config import AdapterConfig, Hyperparameters
from mtl_lora.adapter.layer import AdapterLayer, layer_class
from mtl_lora.config import flag
from mtl_lora.language.config import TrainConfig


@pytest.fixture
def toy():
    """A method with parameters of its own names; it is forgotten after the test, which others do not know of."""

    class ToyLayer(AdapterLayer):
        """y = W x + b + (alpha / r) strength U V dropout(x)."""

        method, title, paper = "toy", "Toy-LoRA", "2501.00001"

        @dataclasses.dataclass
        class Hyperparameters(Hyperparameters):
            strength: float = flag(1.0, "factor on the update")

            def validate(self) -> None:
                self.require("strength", "greater than 0", self.strength > 0)

        @staticmethod
        def shapes(config: AdapterConfig, k: int, d: int) -> dict[str, tuple[int, ...]]:
            return {"toy_V": (config.rank, k), "toy_U": (d, config.rank)}

        def reset_parameters(self) -> None:
            torch.nn.init.normal_(self.toy_V, std=0.1)
            torch.nn.init.zeros_(self.toy_U)

        def down(self) -> torch.Tensor:
            return self.toy_V

        def up(self) -> torch.Tensor:
            return self.hyperparameters.strength * self.toy_U

    yield ToyLayer
    for name in [name for name in layer._registered if name.endswith("toy")]:
        del layer._registered[name]


@pytest.mark.slow
def test_toy_method_is_trained_evaluated_and_reported(toy, tiny_base, records_file, cache_dir, tmp_path, capsys):
    run, scores = tmp_path / "run", tmp_path / "scores"
    flags = {"base_model": tiny_base, "data_path": records_file, "cache_dir": cache_dir, "output_dir": run}
    flags |= {"adapter_name": "toy", "strength": 0.5, "max_steps": 4, "save_step": 2, "learning_rate": 1e-2}
    cli.main(["train", *(f"--{name}={value}" for name, value in flags.items()), "--dtype=fp32"])
    assert json.loads((run / artifacts.RUN_CONFIG).read_text())["settings"]["strength"] == 0.5
    saved = json.loads((run / artifacts.CHECKPOINT_CONFIG).read_text())["adapter"]
    assert (saved["method"], saved["hyperparameters"]) == ("toy", {"strength": 0.5})
    analysis = json.loads((run / artifacts.ADAPTER_ANALYSIS).read_text())
    assert (analysis["method_title"], analysis["mixture"]) == ("Toy-LoRA", None)
    assert len(analysis["layers"]) == 8

    flags = {"checkpoint": run, "data_dir": QUICKSTART / "test", "output_dir": scores, "tasks": "boolq", "limit": 2}
    cli.main(["evaluate", *(f"--{name}={value}" for name, value in flags.items())])
    results = json.loads((scores / artifacts.RESULTS).read_text())
    assert (results["method"], results["method_title"]) == ("toy", "Toy-LoRA")
    capsys.readouterr()
    cli.main(["report", "table", str(scores)])
    assert results["name"] in capsys.readouterr().out


def test_a_start_finds_the_tasks_of_a_methods_own_parameter_on_any_axis(toy, tmp_path):
    class Gated(toy):
        """Of each task its column of a gate on the rank."""

        method, needs_task_ids, task_parameters = "gated_toy", True, ("toy_gate",)

        @staticmethod
        def shapes(config: AdapterConfig, k: int, d: int) -> dict[str, tuple[int, ...]]:
            return {**toy.shapes(config, k, d), "toy_gate": (config.rank, len(config.tasks))}

        def reset_parameters(self) -> None:
            super().reset_parameters()
            torch.nn.init.ones_(self.toy_gate)

    def model(tasks: list[str]) -> torch.nn.Module:
        config = AdapterConfig("gated_toy", rank=2, tasks=tasks, target_modules=["0"])
        return mtl_lora.inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)

    trained, swapped, longer = model(["a", "b"]), model(["b", "a"]), model(["c", "a", "b"])
    with torch.no_grad():
        trained[0].toy_gate.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    mtl_lora.save(trained, tmp_path)
    assert start_from(swapped, tmp_path) == [] and start_from(longer, tmp_path) == ["c"]
    assert swapped[0].toy_gate.tolist() == [[2, 1], [4, 3]]
    assert longer[0].toy_gate.tolist() == [[1, 1, 2], [1, 3, 4]]


def test_toy_method_is_saved_loaded_and_merged(toy, tmp_path):
    model, input_ids = adapted_llama("toy", strength=0.5), tokens(3)
    expected = model(input_ids=input_ids).logits
    mtl_lora.save(model, tmp_path)
    again = mtl_lora.load(tiny_llama(), tmp_path)
    assert torch.equal(again(input_ids=input_ids).logits, expected)
    assert torch.allclose(mtl_lora.merge(again)(input_ids=input_ids).logits, expected, rtol=1e-9)


def test_toy_method_has_its_flag_and_its_rule_at_once(toy, capsys):
    assert TrainConfig(strength=2.0).to_json()["strength"] == 2.0
    with pytest.raises(SystemExit):
        cli.parse(TrainConfig, ["--help"], "")
    shown = capsys.readouterr().out
    assert "--strength  (a number; default: 1.0)\n      Toy-LoRA: factor on the update" in shown
    assert "toy (Toy-LoRA)" in shown
    with pytest.raises(UserError, match=r"--strength must be greater than 0, not 0.0"):
        cli.parse(TrainConfig, ["--adapter_name=toy", "--strength=0"], "")
    # A flag that the chosen method does not read changes nothing.
    assert TrainConfig(adapter_name="lora", strength=0.0)


def test_a_name_is_declared_once(toy):
    with pytest.raises(TypeError, match="two classes declare the method 'toy'"):

        class Other(AdapterLayer):
            method, title = "toy", "Another"

    assert layer_class("toy") is toy


def test_settings_that_are_no_hyperparameters_are_refused_at_once():
    with pytest.raises(TypeError, match=r"Plain.Hyperparameters must be a subclass"):

        class Plain(AdapterLayer):
            method, title = "plain", "Plain"
            Hyperparameters = dataclasses.make_dataclass("Hyperparameters", [("strength", float, 1.0)])

    assert "plain" not in layer.methods()


# ---- a method of another package ----


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that puts a module on the path as ``pip`` installs the package of docs/own_method.md."""
    page = (PROJECT / "docs" / "own_method.md").read_text()
    project = tomllib.loads(*re.findall(r"```toml\n(.*?)```", page, re.S))["project"]
    ((group, methods),) = project["entry-points"].items()

    def put(code: str = re.findall(r"```python\n(.*?)```", page, re.S)[0]) -> None:
        folder = tmp_path / "site"
        (folder / "rank_gates-0.1.dist-info").mkdir(parents=True)
        described = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        (folder / "rank_gates-0.1.dist-info" / "METADATA").write_text(described)
        announced = "".join(f"{name} = {value}\n" for name, value in methods.items())
        (folder / "rank_gates-0.1.dist-info" / "entry_points.txt").write_text(f"[{group}]\n{announced}")
        (folder / "rank_gates.py").write_text(code)
        monkeypatch.syspath_prepend(folder)
        layer._import_methods.cache_clear()

    yield put
    monkeypatch.undo()
    layer._registered.pop("rank_gates", None)
    sys.modules.pop("rank_gates", None)
    layer._import_methods.cache_clear()


@pytest.mark.slow
def test_the_method_of_the_page_is_known_to_the_commands(install, tiny_base, records_file, cache_dir, tmp_path):
    install()
    run, output = tmp_path / "run", tmp_path / "peft"
    flags = {"base_model": tiny_base, "data_path": records_file, "cache_dir": cache_dir, "output_dir": run}
    flags |= {"adapter_name": "rank_gates", "max_steps": 3, "learning_rate": 1e-2, "dtype": "fp32"}
    cli.main(["train", *(f"--{name}={value}" for name, value in flags.items())])
    analysis = json.loads((run / artifacts.ADAPTER_ANALYSIS).read_text())
    assert analysis["method_title"] == "Rank gates"
    cli.main(["export", "peft", f"--checkpoint={run}", f"--output={output}", "--tasks=boolq"])
    assert (output / "boolq" / artifacts.PEFT_WEIGHTS).is_file()


def test_the_method_of_the_page_is_for_each_task_its_merged_model(install, tmp_path):
    install()
    ids = [0, 2, 1]
    model, input_ids = adapted_llama("rank_gates"), tokens(3)
    logits = model(input_ids=input_ids, task_ids=ids).logits
    mtl_lora.save(model, tmp_path / "adapter")
    for row, task in enumerate(ids):
        merged = mtl_lora.merge(mtl_lora.load(tiny_llama(), tmp_path / "adapter"), TASKS[task])
        assert torch.allclose(merged(input_ids=input_ids).logits[row], logits[row], rtol=1e-9)
    assert not torch.allclose(model(input_ids=input_ids, task_ids=[1, 1, 1]).logits, logits)


def test_a_file_that_is_run_may_be_the_one_that_is_announced(install):
    install()
    known = layer.layer_class("rank_gates")
    module = {"__name__": "__main__", "__module__": "__main__"}
    again = type("RankGatesLayer", (AdapterLayer,), {**vars(known), **module, "__qualname__": known.__qualname__})
    assert layer_class("rank_gates") is again


def test_a_package_whose_method_cannot_be_imported_is_named(install, capsys):
    install("import a_package_that_is_not_there")
    with pytest.raises(UserError, match=r"'rank_gates' is unknown.*if another package has it"):
        layer_class("rank_gates")
    note = capsys.readouterr().err
    assert re.fullmatch(r"note: .*the package rank-gates cannot be imported .*not_there.*uninstall it\n", note)
    assert layer_class("lora")
