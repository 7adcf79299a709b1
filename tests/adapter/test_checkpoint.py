"""What is saved is what is loaded, bit for bit; anything else is one sentence and leaves the model as it was."""

import hashlib
import json
import pickle

import pytest
import torch
from reference.tiny import METHODS, TASKS, adapted_llama, adapter_config, randomise, tiny_llama, tokens
from safetensors.torch import load_file, save_file
from torch import nn

import mtl_lora
from mtl_lora import Provenance, UserError, artifacts, route
from mtl_lora.adapter import checkpoint
from mtl_lora.adapter.checkpoint import CONFIG_NAME, WEIGHTS_NAME, adapter_state, adapter_tensors

FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of an MTL-LoRA model."""
    folder = tmp_path / "adapter"
    mtl_lora.save(adapted_llama(), folder)
    return folder


def logits(model) -> torch.Tensor:
    """Of four rows with four tasks."""
    with torch.no_grad(), route.use(torch.tensor([0, 1, 2, 3])):
        return model(input_ids=tokens(4)).logits


def edit_config(folder, **changes) -> None:
    """Change keys of the configuration file; None takes the key out."""
    path = folder / CONFIG_NAME
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not None}))


def edit_weights(folder, change) -> None:
    """Rewrite the weights after ``change`` has edited the tensors, with the sha256 that then belongs to them."""
    state = load_file(folder / WEIGHTS_NAME)
    change(state)
    save_file(state, folder / WEIGHTS_NAME)
    sign(folder)


def sign(folder) -> None:
    """Make the configuration state the sha256 of the weights file as it is."""
    edit_config(folder, weights_sha256=hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest())


def assert_refused(folder, message: str) -> None:
    """Loading raises one sentence, and leaves a model without a trace of an adapter."""
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    modules = {name: id(module) for name, module in model.named_modules()}
    weights = {name: (id(weight), weight.clone(), weight.requires_grad) for name, weight in model.named_parameters()}
    expected = logits(model)
    with pytest.raises(UserError, match=message) as error:
        mtl_lora.load(model, folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    for name, weight in model.named_parameters():
        identity, value, trained = weights.pop(name)
        assert (id(weight), weight.requires_grad) == (identity, trained), name
        assert torch.equal(weight, value), name
    assert not weights
    assert not hasattr(model, "mtl_lora_config")
    assert not hasattr(model, "mtl_lora_provenance")
    assert not hasattr(model, "mtl_lora_injection")
    assert torch.equal(logits(model), expected)
    # What is left takes another adapter.
    mtl_lora.inject(model, adapter_config())


# ---- round trip ----


@pytest.mark.parametrize(
    ("method", "dtype"),
    [*((method, torch.float32) for method in METHODS), ("mtl_lora", torch.float64), ("mtl_lora", torch.bfloat16)],
    ids=str,
)
def test_loaded_adapter_is_the_saved_one_bit_for_bit(method, dtype, tmp_path):
    model = adapted_llama(method, dtype)
    provenance = Provenance(base_model="tiny", prompt_template="alpaca", cutoff_len=256, task_set={"tasks": []})
    mtl_lora.save(model, tmp_path, provenance)
    loaded = mtl_lora.load(tiny_llama(dtype), tmp_path)
    expected = adapter_state(model)
    assert adapter_state(loaded).keys() == expected.keys()
    for name, weight in adapter_state(loaded).items():
        assert (weight.dtype, weight.shape) == (expected[name].dtype, expected[name].shape), name
        assert torch.equal(weight, expected[name]), name
    assert loaded.mtl_lora_config == model.mtl_lora_config
    assert loaded.mtl_lora_provenance == provenance
    assert torch.equal(logits(loaded), logits(model))
    trained = {name for name, weight in loaded.named_parameters() if weight.requires_grad}
    assert trained == expected.keys()


def test_saved_weights_are_float32_that_bfloat16_can_not_represent(tmp_path):
    model = randomise(mtl_lora.inject(tiny_llama(torch.bfloat16), adapter_config()))
    mtl_lora.save(model, tmp_path)
    for name, weight in load_file(tmp_path / WEIGHTS_NAME).items():
        assert weight.dtype == torch.float32, name
        assert not torch.equal(weight, weight.bfloat16().float()), name


def test_float64_model_takes_float32_weights_as_they_are(tmp_path):
    mtl_lora.save(adapted_llama(dtype=torch.float32), tmp_path)
    loaded = adapter_state(mtl_lora.load(tiny_llama(torch.float64), tmp_path))
    for name, weight in load_file(tmp_path / WEIGHTS_NAME).items():
        assert loaded[name].dtype == torch.float64, name
        assert torch.equal(loaded[name], weight.double()), name


def test_float64_weights_are_not_rounded_for_a_float32_model(saved):
    model = tiny_llama(torch.float32)
    with pytest.raises(UserError, match=r"has dtype .*float64, not .*float32"):
        mtl_lora.load(model, saved)
    assert not mtl_lora.adapter_layers(model)


def test_same_adapter_is_saved_as_the_same_bytes(saved, tmp_path):
    loaded = mtl_lora.load(tiny_llama(), saved)
    mtl_lora.save(loaded, tmp_path / "again")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_provenance_stays_with_a_loaded_adapter_and_goes_with_a_merged_one(tmp_path):
    mtl_lora.save(adapted_llama(), tmp_path / "first", Provenance(base_model="tiny"))
    model = mtl_lora.load(tiny_llama(), tmp_path / "first")
    mtl_lora.save(model, tmp_path / "second")
    assert checkpoint.read_config(tmp_path / "second").provenance_config.base_model == "tiny"
    # The merged model is another base, which the next adapter must not take for the first one.
    mtl_lora.inject(mtl_lora.merge(model, "maps"), adapter_config())
    mtl_lora.save(model, tmp_path / "third")
    assert checkpoint.read_config(tmp_path / "third").provenance_config.base_model is None


def test_checkpoint_is_two_files_that_say_what_they_are(saved):
    assert sorted(path.name for path in saved.iterdir()) == [WEIGHTS_NAME, CONFIG_NAME]
    config = checkpoint.read_config(saved)
    assert config.adapter_config == adapter_config()
    assert config.library_version == mtl_lora.__version__
    assert config.weights_sha256 == hashlib.sha256((saved / WEIGHTS_NAME).read_bytes()).hexdigest()


def test_saving_again_replaces_the_old_adapter(saved):
    model = randomise(adapted_llama("lora"), seed=9)
    mtl_lora.save(model, saved)
    assert torch.equal(logits(mtl_lora.load(tiny_llama(), saved)), logits(model))


# ---- damaged and foreign files ----


def drop(*names):
    return lambda state: [state.pop(name) for name in names]


def add(name):
    return lambda state: state.update({name: torch.zeros(2)})


def replace(name, change):
    return lambda state: state.update({name: change(state[name]).contiguous()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{FIRST}.lora_A"), rf"lacks {FIRST}.lora_A$"),
        (drop(f"{FIRST}.lora_A", f"{FIRST}.lora_w"), rf"lacks {FIRST}.lora_A, {FIRST}.lora_w$"),
        (add("lora_A"), r"has unknown lora_A$"),
        (add(f"{FIRST}.weight"), rf"has unknown {FIRST}.weight$"),
        (lambda state: (drop(f"{FIRST}.lora_B")(state), add("b")(state)), rf"lacks {FIRST}.lora_B and has unknown b$"),
        (lambda state: state.clear(), r"lacks .*lora_A, .*lora_B, .*lora_lambda and 29 more$"),
        (replace(f"{FIRST}.lora_A", lambda a: a.T), rf"{FIRST}.lora_A has shape .*\[16, 3\].* not .*\[3, 16\]"),
        (replace(f"{FIRST}.lora_w", lambda w: w[:3]), rf"{FIRST}.lora_w has shape .*\[3, 3\].* not .*\[4, 3\]"),
        (replace(f"{FIRST}.lora_w", lambda w: w.flatten()), rf"{FIRST}.lora_w has shape .*\[12\].* not .*\[4, 3\]"),
        (replace(f"{FIRST}.lora_B", torch.Tensor.bfloat16), rf"{FIRST}.lora_B has dtype .*bfloat16.* not .*float64"),
        (replace(f"{FIRST}.lora_B", torch.Tensor.int), rf"{FIRST}.lora_B has dtype .*int32.* not .*float64"),
    ],
    ids=[
        "missing", "two missing", "unexpected", "base weight", "renamed", "empty",
        "transposed", "fewer tasks", "flat", "bfloat16", "whole numbers",
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(saved, change, message):
    edit_weights(saved, change)
    assert_refused(saved, message)


def test_adapter_of_another_model_is_refused(tmp_path):
    narrow = adapted_llama(target_modules=["q_proj"])
    mtl_lora.save(narrow, tmp_path)
    edit_config(tmp_path, adapter=adapter_config(target_modules=["q_proj", "gate_proj"]).to_json())
    assert_refused(tmp_path, r"lacks model.layers.0.mlp.gate_proj.lora_A")


@pytest.mark.parametrize("position", [0, 100, -1])
def test_flipped_bit_is_detected(saved, position):
    path = saved / WEIGHTS_NAME
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    assert_refused(saved, "damaged")


@pytest.mark.parametrize("kept", [0, 5, 500, -1])
def test_truncated_file_is_detected(saved, kept):
    path = saved / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(saved, "damaged")


@pytest.mark.parametrize("content", [b"", b"no tensors here", b"\xff" * 64], ids=["empty", "text", "bytes"])
def test_signed_file_that_is_no_safetensors_is_refused(saved, content):
    (saved / WEIGHTS_NAME).write_bytes(content)
    sign(saved)
    assert_refused(saved, "not a safetensors file")


class Payload:
    """Runs when it is unpickled."""

    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


def test_pickle_is_never_read(saved):
    (saved / WEIGHTS_NAME).write_bytes(pickle.dumps(Payload()))
    sign(saved)
    assert_refused(saved, "not a safetensors file")
    torch.save({"weights": Payload()}, saved / WEIGHTS_NAME)
    sign(saved)
    assert_refused(saved, "not a safetensors file")
    assert not Payload.ran


def test_loading_calls_no_unpickler(saved, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("a pickle was read")

    model = tiny_llama()
    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, forbidden)
    mtl_lora.load(model, saved)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_half_a_checkpoint_is_refused(saved, name):
    (saved / name).unlink()
    assert_refused(saved, f"has no {name}")


def test_folder_that_is_not_there_is_refused(tmp_path):
    assert_refused(tmp_path / "nowhere", "not an MTL-LoRA checkpoint")


def test_a_half_finished_training_names_its_last_checkpoint(tmp_path):
    for name in ("checkpoint-4", "checkpoint-12"):
        (tmp_path / name).mkdir()
        (tmp_path / name / artifacts.RESUME_STATE).touch()
    assert_refused(tmp_path, "is an unfinished training; pass .*checkpoint-12, or resume it")


@pytest.mark.parametrize("text", ["", "{", "\x00\x01", "[" * 100_000], ids=["empty", "open", "bytes", "deep"])
def test_configuration_that_is_no_json_is_refused(saved, text):
    (saved / CONFIG_NAME).write_text(text)
    assert_refused(saved, "is not JSON")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 3}, "has format 3, and this version reads formats 1 and 2; update"),
        ({"format": 3, "compression": "zip"}, "has format 3"),
        ({"format": "2"}, "has format 2"),
        ({"format": None}, "lacks the key 'format'"),
        ({"weights_sha256": None}, "lacks the key 'weights_sha256'"),
        ({"adapter": None}, "lacks the key 'adapter'"),
        ({"weight_sha256": "0"}, r"unknown key 'weight_sha256' \(did you mean 'weights_sha256'\?\)"),
        ({"adapter": {"rnk": 8}}, r"'adapter' has the unknown key 'rnk' \(did you mean 'rank'\?\)"),
        ({"adapter": {**adapter_config().to_json(), "rank": 0}}, "'adapter': rank must be at least 1, not 0"),
        ({"adapter": {"tasks": TASKS}}, "'adapter' lacks the key 'method'"),
        ({"adapter": ["lora"]}, "adapter must be"),
        ({"provenance": {"base": "tiny"}}, "'provenance' has the unknown key 'base'"),
        ({"provenance": {"cutoff_len": "256"}}, "cutoff_len must be a whole number or none, not '256'"),
        ({"origin": {}}, "has the unknown key 'origin'"),
        ({"format": 1, "provenance": None, "origin": {"base": "tiny"}}, "'origin' has the unknown key 'base'"),
    ],
    ids=str,
)
def test_configuration_that_is_wrong_is_refused(saved, changes, message):
    edit_config(saved, **changes)
    assert_refused(saved, message)


def test_configuration_that_is_a_list_is_refused(saved):
    (saved / CONFIG_NAME).write_text("[]")
    assert_refused(saved, "must be a JSON object, not list")


def test_checkpoint_for_a_model_without_its_targets_is_refused(tmp_path):
    mtl_lora.save(adapted_llama(), tmp_path)
    edit_config(tmp_path, adapter=adapter_config(target_modules=["c_attn"]).to_json())
    model = tiny_llama()
    with pytest.raises(UserError, match="no linear layer is named 'c_attn'"):
        mtl_lora.load(model, tmp_path)
    assert not mtl_lora.adapter_layers(model)
    assert all(weight.requires_grad for weight in model.parameters())


# ---- saving fails ----


def test_save_below_a_file_names_the_path_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        mtl_lora.save(adapted_llama(), tmp_path / "file" / "adapter")
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("failing", ["weights", "configuration"])
def test_failed_save_leaves_no_half_and_keeps_what_was_there(failing, saved, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    provenance = None
    if failing == "weights":

        def full_disk(tensors, path):
            path.write_bytes(b"half of the wei")
            raise OSError("no space left on device")

        monkeypatch.setattr(checkpoint, "save_file", full_disk)
    else:
        provenance = Provenance(train_settings={"folder": tmp_path})  # a path is not JSON
    for folder in (saved, tmp_path / "fresh"):
        with pytest.raises((OSError, TypeError)):
            mtl_lora.save(randomise(adapted_llama(), seed=9), folder, provenance)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert not list((tmp_path / "fresh").iterdir())


def test_save_without_an_adapter_says_so(tmp_path):
    with pytest.raises(UserError, match="carries no adapter"):
        mtl_lora.save(tiny_llama(), tmp_path)
    assert not list(tmp_path.iterdir())


# ---- injecting ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_modules": ["q_proj", "c_attn"]},
            r"no linear layer is named 'c_attn'; this model has q_proj \(2\), k_proj \(2\), .*lm_head \(1\)",
        ),
        ({"target_modules": ["proj"]}, "no linear layer is named 'proj'"),
        ({"target_modules": ["self_attn"]}, "no linear layer is named 'self_attn'"),
        ({"target_modules": ["embed_tokens"]}, "no linear layer is named 'embed_tokens'"),
        (
            {"target_modules": "q_proj"},
            r"no linear layer's whole name matches the expression 'q_proj'; "
            r"this model has q_proj \(2\), .*, for example model.layers.0.self_attn.q_proj",
        ),
        ({"target_modules": "layers.(0"}, r"expression 'layers.\(0' is not a regular expression: missing \)"),
    ],
    ids=["one of two", "part of a name", "a block", "an embedding", "an expression", "no expression"],
)
def test_target_that_is_no_linear_layer_is_named_and_nothing_changes(changes, message):
    model = tiny_llama()
    expected = logits(model)
    with pytest.raises(UserError, match=message):
        mtl_lora.inject(model, adapter_config(**changes))
    assert not mtl_lora.adapter_layers(model)
    assert not hasattr(model, "mtl_lora_config")
    assert all(weight.requires_grad for weight in model.parameters())
    assert torch.equal(logits(model), expected)


def test_second_injection_is_refused_and_the_first_stays():
    model = adapted_llama()
    expected = logits(model)
    for method in METHODS:
        with pytest.raises(UserError, match="already carries an adapter"):
            mtl_lora.inject(model, adapter_config(method, target_modules=["gate_proj"]))
    assert len(mtl_lora.adapter_layers(model)) == 8
    assert model.mtl_lora_config == adapter_config()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.Linear(2, 2)], ids=["none", "itself"])
def test_all_linear_in_a_model_without_linear_layers_is_refused(model):
    with pytest.raises(UserError, match="'all-linear' finds no linear layer"):
        mtl_lora.inject(model, adapter_config(target_modules="all-linear"))


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (r".*\.1\..*\.[qv]_proj", [f"model.layers.1.self_attn.{name}_proj" for name in "qv"]),
        (r"lm_head|.*0\.mlp\.up_proj", ["model.layers.0.mlp.up_proj", "lm_head"]),
    ],
)
def test_targets_may_be_an_expression_for_the_whole_name(expression, expected):
    model = mtl_lora.inject(tiny_llama(), adapter_config(target_modules=expression))
    assert list(mtl_lora.adapter_layers(model)) == expected


def test_all_linear_leaves_out_the_output_head():
    model = mtl_lora.inject(tiny_llama(), adapter_config(target_modules="all-linear"))
    assert len(mtl_lora.adapter_layers(model)) == 2 * 7
    assert type(model.lm_head) is nn.Linear


def test_targets_are_whole_names_or_endings():
    model = mtl_lora.inject(tiny_llama(), adapter_config(target_modules=[FIRST, "mlp.down_proj"]))
    assert list(mtl_lora.adapter_layers(model)) == [FIRST, *(f"model.layers.{i}.mlp.down_proj" for i in (0, 1))]


# ---- the start of another training ----


@pytest.mark.parametrize("method", METHODS)
def test_a_start_has_the_tasks_of_the_checkpoint_by_name_and_new_ones_as_they_were(tmp_path, method):
    trained = adapted_llama(method)
    mtl_lora.save(trained, tmp_path)
    tasks = ["lakes", TASKS[2], TASKS[0], "hills", "seas"]  # new ones, others in another order, two gone
    torch.manual_seed(3)
    model = mtl_lora.inject(tiny_llama(), adapter_config(method, tasks=tasks, dropout=0.3))
    fresh = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    assert checkpoint.start_from(model, tmp_path) == ["lakes", "hills", "seas"]
    input_ids = tokens(2)
    with torch.no_grad():
        for task in tasks[1:3]:
            given = model.eval()(input_ids=input_ids, task_ids=[task] * 2).logits
            assert torch.equal(given, trained.eval()(input_ids=input_ids, task_ids=[task] * 2).logits)
    for layer in mtl_lora.adapter_layers(model).values():
        for name in layer.task_parameters:
            if getattr(layer, name).shape[0] == len(tasks):
                (own,) = [key for key, value in adapter_tensors(model).items() if value is getattr(layer, name)]
                new = [0, 3, 4]
                assert torch.equal(getattr(layer, name)[new], fresh[own][new])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 8}, "rank 4, not 8"),
        ({"alpha": 3}, "alpha .*, not 3"),
        ({"temperature": 0.3}, "hyperparameters .*not .*0.3"),
        ({"target_modules": ["q_proj"]}, "has unknown model.layers"),
    ],
)
def test_a_start_of_another_adapter_is_refused(tmp_path, changes, words):
    mtl_lora.save(adapted_llama("mtl_lora", rank=4), tmp_path)
    with pytest.raises(UserError, match=words):
        checkpoint.start_from(mtl_lora.inject(tiny_llama(), adapter_config(**{"rank": 4, **changes})), tmp_path)
    mtl_lora.save(adapted_llama("lora"), tmp_path / "lora")
    with pytest.raises(UserError, match="method lora, not mtl_lora"):
        checkpoint.start_from(adapted_llama("mtl_lora"), tmp_path / "lora")
