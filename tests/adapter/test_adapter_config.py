"""The configuration holds what its method declares, and reads what earlier versions wrote."""

import copy
import dataclasses
import json
import math
import pickle

import pytest

from mtl_lora import AdapterConfig, UserError
from mtl_lora.adapter.layer import layer_class, methods
from mtl_lora.language.config import TrainConfig
from mtl_lora.language.tasks import COMMONSENSE

# The adapter's part of a configuration file as version 0.1.0 wrote it: flat, with the fields of every method.
FORMAT_1 = {
    "method": "mtl_lora",
    "rank": 4,
    "alpha": 2.0,
    "dropout": 0.1,
    "target_modules": ["q_proj"],
    "tasks": ["boolq", "piqa"],
    "num_B": 2,
    "temperature": 0.5,
    "lambda_shape": "diagonal",
    "num_experts": 4,
    "task_embedding_dim": 16,
    "use_rslora": True,
}
# Fields that came after the first checkpoints, and those that MTL-LoRA does not read.
NOT_REQUIRED = {"use_rslora", "lambda_shape", "num_experts", "task_embedding_dim"}


def test_every_method_declares_what_tables_and_cards_say_of_it():
    found = {name: (layer.title, layer.paper) for name, layer in methods().items()}
    assert found == {
        "dora": ("DoRA", "2402.09353"),
        "hydralora": ("HydraLoRA", "2404.19245"),
        "lora": ("LoRA", "2106.09685"),
        "moelora": ("MoELoRA", "2310.18339"),
        "mtlora": ("MTLoRA", "2403.20320"),
        "mtl_lora": ("MTL-LoRA", "2410.09437"),
        "multilora": ("MultiLoRA", "2311.11501"),
        "none": ("No adapter", ""),
    }
    assert {name for name, layer in methods().items() if not layer.has_factors} == {"hydralora", "mtlora"}
    assert {name for name, layer in methods().items() if layer.needs_task_ids} == {"moelora", "mtl_lora"}
    assert {name: layer.no_decay for name, layer in methods().items() if layer.no_decay} == {
        "dora": ("lora_magnitude",),
        "mtlora": ("stream_norm_weight", "stream_norm_bias"),
        "mtl_lora": ("lora_lambda",),
    }
    assert layer_class("mlora") is layer_class("mtl_lora")


def test_hyperparameters_are_given_and_read_by_name_and_stored_nested():
    config = AdapterConfig(method="mlora", tasks=["boolq"], num_B=2)
    assert (config.method, config.num_B, config.temperature, config.hyperparameters.num_B) == ("mtl_lora", 2, 0.1, 2)
    stored = json.loads(json.dumps(config.to_json()))
    assert stored["hyperparameters"] == {
        "num_B": 2,
        "temperature": 0.1,
        "lambda_shape": "full",
        "mixture": "learned",
        "mixture_start": 1.0,
    }
    assert AdapterConfig.from_json(stored) == config == copy.deepcopy(config) == pickle.loads(pickle.dumps(config))  # noqa: S301
    assert dataclasses.replace(config, rank=2, num_B=5).to_json() == {
        **stored, "rank": 2, "hyperparameters": {**stored["hyperparameters"], "num_B": 5}
    }  # fmt: skip
    with pytest.raises(AttributeError, match="num_experts"):
        _ = config.num_experts


def refused(*facts, **settings):
    """A row of the table below, read as settings and what the error must say of them."""
    return pytest.param(settings, facts, id=str(settings))


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        refused("tasks", "MTL-LoRA", tasks=[]),
        refused("tasks", "MoELoRA", method="moelora", tasks=[]),
        refused("tasks", "tides", tasks=["tides", "maps", "tides"]),
        refused("tasks", "a list of strings", "'tides'", tasks="tides"),
        refused("tasks", "a list of strings", tasks=[0, 1]),
        refused("method", "'mtl-lora'", "did you mean 'mtl_lora'", method="mtl-lora"),
        refused("method", "'prompt'", "multilora", method="prompt"),
        refused("method", "None", method=None),
        refused("num_B", "lora", method="lora", num_B=3),
        refused("rnak", "'rank'", rnak=3),
        *(refused("rank", "at least 1", str(value), rank=value) for value in (0, -8)),
        *(refused("rank", "a whole number", repr(value), rank=value) for value in (True, 8.0, "8")),
        refused("alpha", "greater than 0", alpha=0),
        *(refused("alpha", "a number", str(value), alpha=value) for value in (math.nan, math.inf, False)),
        *(refused("dropout", "below 1", str(value), dropout=value) for value in (1, -0.05)),
        refused("dropout", "a number", dropout=math.nan),
        refused("use_rslora", "True or False", use_rslora=1),
        refused("modules_to_save", "not empty", modules_to_save=["norm", ""]),
        *(refused("target_modules", "at least one name", target_modules=value) for value in ("", [])),
        refused("target_modules", "a list of strings", target_modules=["q_proj", 1]),
        *(refused("temperature", "greater than 0", str(value), temperature=value) for value in (0, -0.1)),
        refused("temperature", "a number", temperature=math.nan),
        refused("lambda_shape", "full, diagonal", "'lower'", lambda_shape="lower"),
        *(refused("num_B", "at least 1", method=name, num_B=0) for name in ("mtl_lora", "multilora", "hydralora")),
        refused("num_B", "a whole number", "1.5", num_B=1.5),
        refused("rank", "3 experts", "8", method="moelora", num_experts=3),
        *(
            refused(name, "at least 1", **{"method": "moelora", name: 0})
            for name in ("num_experts", "task_embedding_dim")
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(settings, facts):
    with pytest.raises(UserError) as caught:
        AdapterConfig(**{"tasks": ["tides", "maps"], **settings})
    text = str(caught.value)
    assert text.startswith(facts[0]) and all(fact in text for fact in facts) and "\n" not in text


def test_the_default_method_asks_for_tasks():
    with pytest.raises(UserError, match=r"^tasks must be the names of the tasks in id order"):
        AdapterConfig()


@pytest.mark.parametrize("method", sorted(methods().keys() - {"none", "mtlora"}))
def test_format_1_is_read(method):
    config = AdapterConfig.from_json({**FORMAT_1, "method": method})
    read = [flag.name for flag in layer_class(method).Hyperparameters.flags()]
    later = {"mixture": "learned", "mixture_start": 1.0}  # what was fixed then
    assert {name: getattr(config, name) for name in read} == {name: (FORMAT_1 | later)[name] for name in read}
    assert (config.method, config.rank, config.use_rslora, config.modules_to_save) == (method, 4, True, [])


@pytest.mark.parametrize("field", ["use_rslora", "lambda_shape"])
def test_a_file_without_a_later_field_takes_what_was_fixed_then(field):
    flat = {key: value for key, value in FORMAT_1.items() if key != field}
    assert getattr(AdapterConfig.from_json(flat), field) == {"use_rslora": False, "lambda_shape": "full"}[field]
    nested = AdapterConfig.from_json(FORMAT_1).to_json()
    nested.pop(field, None)
    nested["hyperparameters"].pop(field, None)
    nested.pop("modules_to_save")
    assert AdapterConfig.from_json(nested) == AdapterConfig.from_json(flat)


@pytest.mark.parametrize("field", sorted(FORMAT_1.keys() - NOT_REQUIRED))
def test_any_other_field_that_is_lost_is_named(field):
    nested = AdapterConfig.from_json(FORMAT_1).to_json()
    for value in (dict(FORMAT_1), nested):
        value.pop(field, None)
        value.get("hyperparameters", {}).pop(field, None)
        with pytest.raises(UserError, match=rf"^file\.json.*{field}"):
            AdapterConfig.from_json(value, "file.json")


def test_an_unknown_key_is_named():
    nested = AdapterConfig.from_json(FORMAT_1).to_json()
    inside = {**nested, "hyperparameters": {**nested["hyperparameters"], "tau": 1.0}}
    flat = {**FORMAT_1, "rang": 1}
    with pytest.raises(UserError, match=r"^file\.json has the unknown key 'rnk' \(did you mean 'rank'"):
        AdapterConfig.from_json({"rnk": 8}, "file.json")
    for value, key in [(flat, "rang"), ({**nested, "num_experts": 2}, "num_experts"), (inside, "tau")]:
        with pytest.raises(UserError, match=rf"^file\.json.* unknown key '{key}'"):
            AdapterConfig.from_json(value, "file.json")


# ---- the flags of a training ----


def test_flags_of_all_methods_are_there_once_and_flat():
    names = [flag.name for flag in TrainConfig.flags()]
    declared = {flag.name for layer in methods().values() for flag in layer.Hyperparameters.flags()}
    assert len(names) == len(set(names)) and declared <= set(names) and "hyperparameters" not in names
    (shared,) = [flag for flag in TrainConfig.flags() if flag.name == "num_B"]
    assert all(title in shared.metadata["help"] for title in ("MTL-LoRA", "MultiLoRA", "HydraLoRA"))
    assert declared <= TrainConfig.names_affecting("weights")


def test_training_flags_survive_copies_and_json():
    config = TrainConfig(num_B=2, max_steps=7)
    assert (config.num_B, config.to_json()["num_B"], config.to_json()["num_experts"]) == (2, 2, 8)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config != TrainConfig(max_steps=7)
    assert dataclasses.replace(config, seed=1).num_B == copy.deepcopy(config).num_B == 2
    with pytest.raises(TypeError, match="nunm_B"):
        TrainConfig(nunm_B=2)
    with pytest.raises(UserError, match="num_B must be a whole number"):
        TrainConfig(num_B="2")
    with pytest.raises(UserError, match=r"--adapter_name mtlora .*dense"):
        TrainConfig(adapter_name="mtlora")


@pytest.mark.parametrize("method", sorted(methods().keys() - {"mtlora"}))
def test_a_training_passes_on_what_its_method_reads(method):
    adapter = TrainConfig(adapter_name=method, num_B=5, num_experts=4, temperature=0.3).adapter_config(COMMONSENSE)
    given = {"num_B": 5, "num_experts": 4, "temperature": 0.3}
    read = adapter.hyperparameters.to_json()
    assert all(read[name] == value for name, value in given.items() if name in read)
    assert read.keys() == {flag.name for flag in layer_class(method).Hyperparameters.flags()}


def test_a_training_passes_on_what_every_method_reads():
    assert TrainConfig().adapter_config(COMMONSENSE) == AdapterConfig(tasks=COMMONSENSE.names)
    given = {"lora_r": 4, "lora_alpha": 3.0, "lora_dropout": 0.25, "lora_target_modules": ["up_proj"]}
    given |= {"use_rslora": True, "modules_to_save": ["norm"]}
    expected = {name.removeprefix("lora_"): value for name, value in given.items()}
    expected = AdapterConfig(tasks=COMMONSENSE.names, rank=expected.pop("r"), **expected)
    assert TrainConfig(**given).adapter_config(COMMONSENSE) == expected


def test_layers_that_tasks_share_have_the_adapters_own_settings():
    own = {"dropout": 0.25, "tasks": ["a"], "use_rslora": True, "modules_to_save": ["norm"]}
    config = AdapterConfig("mtlora", 4, 3.0, **own, task_modules=["fc2"])
    shared = config.at("layers.0.fc1")
    assert (shared.method, shared.rank, shared.scale, config.scale) == ("lora", 4, 1.5, 1.5)  # 3 / sqrt 4
    assert {name: getattr(shared, name) for name in own} == own
    assert config.at("layers.0.fc2") is config


def test_defaults_of_mtlora_are_the_originals():
    config = AdapterConfig("mtlora", tasks=["a"])
    assert config.hyperparameters.to_json() == {"task_rank": 4, "task_scale": 4.0, "shared_mode": "matrix"}
