"""An imported adapter computes what it computes where it was trained; what a checkpoint cannot hold is one sentence."""

import dataclasses
import inspect
import json
import shutil

import pytest
import torch
from export_cases import FOUR, TARGETS, TOLERANCE, difference, load_base, logits, routed, save_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from reference import layers as reference
from reference.layers import assert_near
from reference.tiny import TASKS, adapter_config
from safetensors.torch import load_file, save_file
from torch import nn

import mtl_lora
from mtl_lora import route
from mtl_lora.adapter.checkpoint import adapter_state, read_config
from mtl_lora.artifacts import CHECKPOINT_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS
from mtl_lora.base_model import BaseModel
from mtl_lora.export.__main__ import ImportOriginal, ImportPeft
from mtl_lora.export.importers import import_original, import_peft
from mtl_lora.export.peft import export_peft
from mtl_lora.language.tasks import COMMONSENSE, TaskSet

ORIGINAL = reference.__file__.replace("layers.py", "original_layers.safetensors")


def tasks_file(folder, tasks: TaskSet) -> str:
    """A tasks file on disk."""
    path = folder / "tasks.json"
    path.write_text(json.dumps(tasks.to_json()))
    return str(path)


# ---- from PEFT ----


def save_peft(base: str, folder, **options):
    """A LoRA that PEFT made on ``base``, with random weights; returns its folder."""
    torch.manual_seed(3)
    model = load_base(base)
    targets = {"target_modules": TARGETS[model.config.model_type]}
    settings = {"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(**{**targets, **settings, **options}))
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain_lora(bases, tmp_path_factory):
    """A PEFT LoRA on the tiny LLaMA, read only."""
    return save_peft(bases["llama"], tmp_path_factory.mktemp("peft") / "lora")


@pytest.fixture
def peft_folder(plain_lora, tmp_path):
    """The same for a test that may damage it."""
    return shutil.copytree(plain_lora, tmp_path / "peft")


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_alpha": 5, "lora_dropout": 0.25}], ids=str)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.slow
def test_import_equals_the_peft_lora_for_every_task(bases, tmp_path, kind, options):
    folder = save_peft(bases[kind], tmp_path / "peft", **options)
    expected = logits(PeftModel.from_pretrained(load_base(bases[kind]), folder).eval())
    assert difference(logits(load_base(bases[kind])), expected) > 0.1
    for method in ("mtl_lora", "lora"):
        imported = import_peft(folder, tmp_path / method, FOUR, method)
        model = routed(bases[kind], imported)
        assert all(difference(logits(model, task), expected) < TOLERANCE for task in TASKS)
        adapter = read_config(imported).adapter_config
        assert (adapter.method, adapter.rank, adapter.tasks) == (method, 3, TASKS)
        assert (adapter.alpha, adapter.dropout) == (options.get("lora_alpha", 6), options.get("lora_dropout", 0.0))
        assert sorted(adapter.target_modules) == sorted(TARGETS[kind])


def test_imported_checkpoint_records_its_provenance(bases, command, peft_folder, tmp_path):
    flags = {"template": "original", "num_B": 2, "temperature": 0.5}
    printed = command("import-peft", peft=peft_folder, output=tmp_path / "ours", **flags)
    assert printed == [str(tmp_path / "ours")]
    config = read_config(tmp_path / "ours")
    provenance, adapter = config.provenance_config, config.adapter_config
    assert provenance.base_model == bases["llama"]
    assert provenance.base_fingerprint == BaseModel(bases["llama"]).fingerprint()
    assert provenance.prompt_template == "original"
    assert TaskSet.from_json(provenance.task_set) == COMMONSENSE
    assert (adapter.tasks, adapter.num_B, adapter.temperature) == (COMMONSENSE.names, 2, 0.5)


def test_a_base_by_a_relative_path_is_recorded_as_it_is_found_from_elsewhere(bases, peft_folder, tmp_path, monkeypatch):
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    import_peft(peft_folder, "imported", FOUR, base_model=BaseModel("base"))
    assert read_config("imported").provenance_config.base_model == str(base)
    (folder,) = export_peft("imported", "exported", [TASKS[0]], base_model=BaseModel("base"))
    assert json.loads((folder / PEFT_CONFIG).read_text())["base_model_name_or_path"] == str(base)


def test_up_projections_start_equal_and_diverge_in_training(bases, peft_folder, tmp_path):
    model = mtl_lora.load(load_base(bases["llama"]), import_peft(peft_folder, tmp_path / "ours", FOUR))
    layer = next(iter(mtl_lora.adapter_layers(model).values()))
    first, second, third = layer.lora_B.detach().clone().split(3, dim=1)
    assert torch.equal(first, second) and torch.equal(first, third)
    assert torch.equal(layer.lora_lambda.detach(), torch.eye(3).expand(4, 3, 3))
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    with route.use(torch.tensor([0, 1])):
        model(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]])).logits.square().mean().backward()
    optimizer.step()
    first, second, _ = layer.lora_B.detach().split(3, dim=1)
    assert (first - second).abs().max() > 0.01 * (first - third).abs().max() > 0


def test_seed_fixes_the_mixture_logits_and_nothing_else(peft_folder, tmp_path):
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.randn(3)
        states.append(load_file(import_peft(peft_folder, tmp_path / name, FOUR, seed=seed) / CHECKPOINT_WEIGHTS))
    same = [{name for name, tensor in states[0].items() if torch.equal(tensor, other[name])} for other in states[1:]]
    assert same[0] == set(states[0])
    assert same[1] == {name for name in states[0] if not name.endswith("lora_w")}


def test_an_import_leaves_torchs_generator_as_it_was(peft_folder, tmp_path):
    before = torch.get_rng_state()
    import_peft(peft_folder, tmp_path / "ours", FOUR)
    assert torch.equal(torch.get_rng_state(), before)


def test_lora_to_peft_and_back_is_bit_for_bit_the_same(checkpoints, tmp_path):
    (folder,) = export_peft(checkpoints("gpt2", "lora"), tmp_path / "peft", ["maps"])
    back = import_peft(folder, tmp_path / "back", FOUR, "lora")
    ours, theirs = (load_file(path / CHECKPOINT_WEIGHTS) for path in (checkpoints("gpt2", "lora"), back))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_base_that_cannot_be_loaded_is_noted(peft_folder, tmp_path, edit_json, capsys, bases):
    edit_json(peft_folder / PEFT_CONFIG, base_model_name_or_path="no/such-model")
    imported = import_peft(peft_folder, tmp_path / "ours", FOUR)
    assert "note: layer names are not compared" in capsys.readouterr().err
    provenance = read_config(imported).provenance_config
    assert (provenance.base_model, provenance.base_fingerprint) == ("no/such-model", None)
    assert mtl_lora.adapter_layers(routed(bases["llama"], imported))


BEYOND_A_PLAIN_LORA = {
    "use_dora": True,
    "lora_bias": True,
    "bias": "all",
    "init_lora_weights": "pissa",
    "modules_to_save": ["lm_head"],
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "trainable_token_indices": [1],
    "some_future_option": {"on": 1},
}


@pytest.mark.parametrize(
    "key, value, message",
    [
        *((key, value, f"sets {key} to {value!r}") for key, value in BEYOND_A_PLAIN_LORA.items()),
        ("peft_type", "IA3", "does not describe a LoRA: its peft_type must be LORA"),
        ("r", 4, "where (4, k) was expected"),
        ("r", "3", "must set r to a number above 0, not '3'"),
        ("lora_alpha", None, "must set lora_alpha to a number above 0, not None"),
        ("base_model_name_or_path", None, "does not record its base model; pass --base_model"),
    ],
)
def test_peft_configuration_that_cannot_be_imported_is_refused(refused, peft_folder, edit_json, key, value, message):
    edit_json(peft_folder / PEFT_CONFIG, **{key: value})
    assert message in refused("import-peft", peft=peft_folder)


def as_pickle(tensors, path):
    torch.save(tensors, path.with_name("adapter_model.bin"))
    path.unlink()


def with_tensors(**changes):
    """Weights with a tensor of one layer, or of another module, of another shape; None takes a tensor out."""

    def change(tensors, path):
        for name, shape in changes.items():
            key = Q_PROJ.format(name) if len(name) == 1 else f"model.{name.replace('__', '.')}.weight"
            tensors |= {key: None if shape is None else torch.ones(shape)}
        save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)

    return change


Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
DAMAGED = {
    "pickle": (as_pickle, "has only the pickle adapter_model.bin"),
    "no weights": (lambda tensors, path: path.unlink(), "has no adapter_model.safetensors"),
    "cut off": (lambda tensors, path: path.write_bytes(path.read_bytes()[:-4]), "is not a safetensors file"),
    "no B": (with_tensors(B=None), "lacks model.layers.1.self_attn.q_proj.lora_B"),
    "rank": (with_tensors(A=(2, 16)), "1.self_attn.q_proj.lora_A has shape (2, 16), where (3, k) was expected"),
    "size": (with_tensors(A=(3, 8)), "q_proj.lora_A has shape [3, 8], not [3, 16]"),
    "layer": (with_tensors(q__lora_A=(3, 3), q__lora_B=(3, 3)), "no linear layer is named 'model.q'"),
    "embedding": (with_tensors(q__lora_embedding_A=(3, 3)), "is not part of a plain LoRA on linear layers"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_peft_weights_that_cannot_be_read_are_refused(refused, peft_folder, case):
    damage, message = DAMAGED[case]
    damage(load_file(peft_folder / PEFT_WEIGHTS), peft_folder / PEFT_WEIGHTS)
    assert message in refused("import-peft", peft=peft_folder)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"num_B": 0}, "num_B must be at least 1"),
        ({"temperature": 0}, "temperature must be greater than 0"),
        ({"template": "poem"}, "poem"),
        ({"method": "dora"}, "method must be one of mtl_lora, lora, not 'dora'"),
        ({"tasks_file": "nowhere.json"}, "the tasks file nowhere.json cannot be read"),
    ],
    ids=str,
)
def test_wrong_flag_of_an_import_is_refused(refused, peft_folder, flags, message):
    assert message in refused("import-peft", peft=peft_folder, **flags)


def test_flags_and_arguments_of_imports_have_the_same_defaults_which_are_the_papers():
    found = {}
    for command, function in ((ImportPeft, import_peft), (ImportOriginal, import_original)):
        flags = {each.name: each.default for each in dataclasses.fields(command)}
        given = {name: each.default for name, each in inspect.signature(function).parameters.items()}
        shared = [name for name in flags.keys() & given.keys() if given[name] is not inspect.Parameter.empty]
        assert {name: flags[name] for name in shared} == {name: given[name] for name in shared}
        found[command] = {name: flags[name] for name in shared if name not in ("base_model", "overwrite")}
    peft = {"method": "mtl_lora", "num_B": 3, "temperature": 0.1, "seed": 42, "template": "alpaca"}
    assert found == {ImportPeft: peft, ImportOriginal: {"alpha": 16.0, "temperature": 0.1}}


# ---- from the original repository ----


@pytest.mark.parametrize(("label", "temperature"), [("mtl_lora", 0.5), ("mtl_lora_diagonal", 0.1)])
def test_imported_layer_computes_what_the_original_computed(command, tmp_path, label, temperature):
    original = load_file(ORIGINAL)  # the original's own weights and outputs
    weights = {name: original[f"{label}.{name}"] for name in ("lora_A", "lora_lambdas", "lora_B", "lora_B_w")}
    torch.save({f"module.layer.{name}": weight for name, weight in weights.items()}, tmp_path / "adapter.bin")
    command(
        "import-original",
        file=tmp_path / "adapter.bin",
        output=tmp_path / "ours",
        base_model="no/such-model",
        tasks_file=tasks_file(tmp_path, TaskSet(FOUR.tasks[:3])),
        alpha=16,
        temperature=temperature,
    )
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(12, 10, bias=False).double())
    model.layer.weight.data.copy_(original["W"])
    mtl_lora.load(model, tmp_path / "ours").eval()
    with route.use(original["task_ids"]), torch.no_grad():
        y = model(original["x"])
    # The checkpoint is float32, and the original takes the softmax in it.
    assert_near(y, original[f"{label}.y"], 1e-6, "y")
    assert (original["x"] @ original["W"].T - original[f"{label}.y"]).abs().max() > 0.1


@pytest.fixture(scope="module")
def state(bases, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Our own weights for eight tasks on the tiny LLaMA."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    return load_file(save_adapter(bases["llama"], folder, "mtl_lora", tasks=COMMONSENSE.names) / CHECKPOINT_WEIGHTS)


@pytest.fixture
def original(state) -> dict[str, torch.Tensor]:
    """The same weights as the original saves them, for a test that may change them."""
    renamed, saved = {"lora_lambda": "lora_lambdas", "lora_w": "lora_B_w"}, {}
    for key in sorted(state, key=lambda key: "q_proj" not in key):
        (name, _, weight), tensor = key.rpartition("."), state[key]
        if weight == "lora_A":
            tensor = tensor[None]
        elif weight == "lora_B":
            tensor = torch.stack(tensor.chunk(3, dim=1))
        saved[f"{name}.{renamed.get(weight, weight)}"] = tensor
    return saved


@pytest.fixture
def refused_original(bases, refused, tmp_path):
    """Import an original file that must be refused; returns the sentence."""

    def run(tensors=None, **flags) -> str:
        if tensors is not None:
            torch.save(tensors, tmp_path / "adapter.bin")
        return refused("import-original", file=tmp_path / "adapter.bin", base_model=bases["llama"], **flags)

    return run


@pytest.mark.parametrize(
    "prefix, dtype",
    [("", torch.float32), ("module.", torch.bfloat16), ("module.base_model.model.", torch.float32)],
    ids=str,
)
def test_original_checkpoint_is_imported_weight_by_weight(bases, state, original, command, tmp_path, prefix, dtype):
    torch.save({prefix + name: tensor.to(dtype) for name, tensor in original.items()}, tmp_path / "adapter.pt")
    flags = {"base_model": bases["llama"], "temperature": 0.5, "alpha": 6}
    command("import-original", file=tmp_path / "adapter.pt", output=tmp_path / "ours", **flags)
    model = mtl_lora.load(load_base(bases["llama"]), tmp_path / "ours")
    for name, tensor in adapter_state(model).items():
        assert torch.equal(tensor, state[name].to(dtype).float()), name
    adapter = model.mtl_lora_config
    targets = adapter.target_modules
    assert adapter == adapter_config("mtl_lora", tasks=COMMONSENSE.names, dropout=0.05, target_modules=targets)
    assert sorted(targets) == sorted(TARGETS["llama"])
    provenance = read_config(tmp_path / "ours").provenance_config
    assert provenance.prompt_template == "original"
    assert provenance.base_fingerprint == BaseModel(bases["llama"]).fingerprint()
    assert TaskSet.from_json(provenance.task_set) == COMMONSENSE


FIRST, LAST = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
LAST_OF_RANK_4 = {"lora_A": (1, 4, 24), "lora_lambdas": (8, 4, 4), "lora_B": (3, 16, 4)}
OTHER_LAYER = {"lora_A": (1, 3, 16), "lora_lambdas": (8, 3, 3), "lora_B": (3, 16, 3), "lora_B_w": (8, 3)}


@pytest.mark.parametrize(
    "layer, changes, message",
    [
        (FIRST, {"lora_A": (3, 16)}, f"{FIRST}.lora_A has shape (3, 16), where (1, r, k) was expected"),
        (FIRST, {"lora_A": (2, 3, 16)}, f"{FIRST}.lora_A has shape (2, 3, 16), where (1, r, k) was expected"),
        (FIRST, {"lora_A": (0,)}, f"{FIRST}.lora_A has shape (0,), where (1, r, k) was expected"),
        (FIRST, {"lora_A": (1, 3, 8)}, f"{FIRST}.lora_A has shape [3, 8], not [3, 16]"),
        (FIRST, {"lora_B": (3, 16, 4)}, f"{FIRST}.lora_B has shape (3, 16, 4), where (3, d, 3) was expected"),
        (FIRST, {"lora_B_w": (8, 2)}, f"{FIRST}.lora_B has shape (3, 16, 3), where (2, d, 3) was expected"),
        (FIRST, {"lora_B_w": (8,)}, f"{FIRST}.lora_B_w has shape (8,), where (T, n) was expected"),
        (FIRST, {"lora_lambdas": (7, 3, 3)}, f"{FIRST}.lora_lambdas has shape (7, 3, 3), where (8, 3, 3) was expected"),
        (FIRST, {"lora_lambdas": (8, 3)}, f"{FIRST}.lora_lambdas has shape (8, 3), where (8, 3, 3) was expected"),
        (FIRST, {"lora_scaler": ()}, f"holds {FIRST}.lora_scaler, which is not a weight of the original's"),
        (FIRST, {"lora_A": {"a": 1}}, f"holds {FIRST}.lora_A, which is not a weight of the original's"),
        (FIRST, {"lora_A": torch.ones(1, 3, 16, dtype=torch.long)}, f"holds {FIRST}.lora_A, which is not a weight"),
        (FIRST, {"lora_B_w": None}, f"lacks {FIRST}.lora_B_w"),
        (LAST, LAST_OF_RANK_4, f"{LAST}.lora_A has shape (1, 4, 24), where (1, 3, k) was expected"),
        ("model.layers.7.q", OTHER_LAYER, "no linear layer is named 'model.layers.7.q'"),
    ],
    ids=str,
)
def test_original_checkpoint_that_does_not_fit_names_the_tensor(refused_original, original, layer, changes, message):
    """changes: tensors of one layer, by shape; None takes a tensor out."""
    for name, value in changes.items():
        original[f"{layer}.{name}"] = torch.ones(value) if isinstance(value, tuple) else value
    assert message in refused_original({name: value for name, value in original.items() if value is not None})


def test_number_of_tasks_must_be_the_files(refused_original, original, tmp_path):
    sentence = refused_original(original, tasks_file=tasks_file(tmp_path, FOUR))
    assert "has 8 tasks, not the 4 of tides, maps, birds, rivers; pass --tasks_file" in sentence


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_an_original_checkpoint_is_never_run(refused_original, original, tmp_path):
    sentence = refused_original({**original, "trap": Trap(tmp_path / "ran")})
    assert "adapter.bin cannot be read as a file of tensors only" in sentence
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "missing"])
def test_file_that_is_not_a_checkpoint_is_one_sentence(refused_original, tmp_path, content):
    if content is not None:
        (tmp_path / "adapter.bin").write_bytes(content)
    assert "adapter.bin" in refused_original()
    assert "holds a dict; it must hold tensors by name" in refused_original({})
