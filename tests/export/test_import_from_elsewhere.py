"""An imported adapter computes what it computed where it comes from; what cannot be held here is one sentence."""

import json

import pytest
import torch
from export_cases import TARGETS, TOLERANCE, load_base, logits, relative_difference, save_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from reference import layers as reference
from reference.layers import assert_near
from reference.tiny import TASKS, adapter_config
from safetensors.torch import load_file, save_file
from torch import nn

import mtl_lora
from mtl_lora import UserError, route
from mtl_lora.adapter.checkpoint import adapter_state, read_config
from mtl_lora.base_model import BaseModel
from mtl_lora.export.import_original import import_original
from mtl_lora.export.import_peft import import_peft
from mtl_lora.export.peft_format import export_peft
from mtl_lora.language.tasks import COMMONSENSE, Task, TaskSet

ORIGINAL = reference.__file__.replace("layers.py", "original_layers.safetensors")
FOUR = TaskSet(tuple(Task(name, index) for index, name in enumerate(TASKS)))


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


@pytest.fixture
def peft_folder(bases, tmp_path):
    """A PEFT LoRA on the tiny LLaMA that a test may spoil."""
    return save_peft(bases["llama"], tmp_path / "peft")


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_alpha": 5, "lora_dropout": 0.25}], ids=str)
@pytest.mark.parametrize("method", ["mtl_lora", "lora"])
@pytest.mark.parametrize("kind", TARGETS)
def test_import_equals_the_peft_lora_for_every_task(bases, tmp_path, kind, method, options):
    folder = save_peft(bases[kind], tmp_path / "peft", **options)
    expected = logits(PeftModel.from_pretrained(load_base(bases[kind]), folder).eval())
    assert relative_difference(logits(load_base(bases[kind])), expected) > 0.1
    imported = import_peft(folder, tmp_path / "ours", FOUR, method)
    model = mtl_lora.load(load_base(bases[kind]), imported).eval()
    for task in range(len(FOUR)):
        assert relative_difference(logits(model, task), expected) < TOLERANCE
    adapter = read_config(imported).adapter_config
    assert (adapter.rank, adapter.alpha, adapter.tasks) == (3, options.get("lora_alpha", 6), TASKS)
    assert adapter.dropout == options.get("lora_dropout", 0.0)
    assert sorted(adapter.target_modules) == sorted(TARGETS[kind])


def test_imported_checkpoint_says_where_it_comes_from(bases, command, peft_folder, tmp_path):
    command("import-peft", peft=peft_folder, output=tmp_path / "ours", template="original")
    config = read_config(tmp_path / "ours")
    origin = config.origin_config
    assert (origin.base_model, origin.base_fingerprint) == (bases["llama"], BaseModel(bases["llama"]).fingerprint())
    assert origin.prompt_template == "original"
    assert TaskSet.from_json(origin.task_set) == COMMONSENSE
    assert config.adapter_config.tasks == COMMONSENSE.names
    assert (config.adapter_config.num_B, config.adapter_config.temperature) == (3, 0.1)


def test_up_projections_start_alike_and_part_when_training_goes_on(bases, peft_folder, tmp_path):
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


def test_seed_fixes_what_is_drawn(peft_folder, tmp_path):
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.randn(3)
        states.append(load_file(import_peft(peft_folder, tmp_path / name, FOUR, seed=seed) / "mtl_lora.safetensors"))
    same = [{name for name, tensor in states[0].items() if torch.equal(tensor, other[name])} for other in states[1:]]
    assert same[0] == set(states[0])
    assert same[1] == {name for name in states[0] if not name.endswith("lora_w")}


def test_lora_goes_to_peft_and_back_bit_for_bit(bases, checkpoints, tmp_path):
    checkpoint = checkpoints("gpt2", "lora")
    (folder,) = export_peft(checkpoint, tmp_path / "peft", ["maps"])
    back = import_peft(folder, tmp_path / "back", FOUR, "lora")
    ours, theirs = (load_file(path / "mtl_lora.safetensors") for path in (checkpoint, back))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_base_that_can_not_be_had_is_noted(peft_folder, tmp_path, command, edit_json, capsys, bases):
    edit_json(peft_folder / "adapter_config.json", base_model_name_or_path="no/such-model")
    imported = import_peft(peft_folder, tmp_path / "ours", FOUR)
    assert "note: layer names are not compared" in capsys.readouterr().err
    origin = read_config(imported).origin_config
    assert (origin.base_model, origin.base_fingerprint) == ("no/such-model", None)
    assert mtl_lora.adapter_layers(mtl_lora.load(load_base(bases["llama"]), imported))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_dora": True}, "sets use_dora to True"),
        ({"bias": "all"}, "sets bias to 'all'"),
        ({"lora_bias": True}, "sets lora_bias to True"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save to ['lm_head']"),
        ({"rank_pattern": {"q_proj": 2}}, "sets rank_pattern to {'q_proj': 2}"),
        ({"alpha_pattern": {"q_proj": 2}}, "sets alpha_pattern to {'q_proj': 2}"),
        ({"trainable_token_indices": [1]}, "sets trainable_token_indices to [1]"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "which is no part of a plain LoRA on linear layers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_peft_adapter_that_is_no_plain_lora_is_refused(refused, bases, tmp_path, options, message):
    folder = save_peft(bases["llama"], tmp_path / "peft", **options)
    assert message in refused("import-peft", peft=folder, output=tmp_path / "ours")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "IA3"}, "describes no LoRA: its peft_type must be LORA"),
        ({"init_lora_weights": "pissa"}, "sets init_lora_weights to 'pissa'"),
        ({"some_future_option": {"on": 1}}, "sets some_future_option to {'on': 1}"),
        ({"r": 4}, "where (4, k) was expected"),
        ({"r": "3"}, "must set r to a number, not '3'"),
        ({"lora_alpha": None}, "must set lora_alpha to a number, not None"),
        ({"base_model_name_or_path": None}, "does not say its base model; pass --base_model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_peft_configuration_that_can_not_be_held_is_refused(
    refused, peft_folder, tmp_path, edit_json, changes, message
):
    edit_json(peft_folder / "adapter_config.json", **changes)
    assert message in refused("import-peft", peft=peft_folder, output=tmp_path / "ours")


def as_pickle(tensors, folder):
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def without_weights(tensors, folder):
    (folder / "adapter_model.safetensors").unlink()


def cut_off(tensors, folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def without_one_B(tensors, folder):
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, folder / "adapter_model.safetensors")


def with_another_rank(tensors, folder):
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    tensors[name.format("A")], tensors[name.format("B")] = torch.ones(2, 16), torch.ones(16, 2)
    save_file(tensors, folder / "adapter_model.safetensors")


def with_another_size(tensors, folder):
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"] = torch.ones(3, 8)
    save_file(tensors, folder / "adapter_model.safetensors")


def with_another_layer(tensors, folder):
    for side, shape in (("A", (3, 16)), ("B", (16, 3))):
        tensors[f"base_model.model.model.layers.2.self_attn.q_proj.lora_{side}.weight"] = torch.ones(shape)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (as_pickle, "has only the pickle adapter_model.bin"),
        (without_weights, "has no adapter_model.safetensors"),
        (cut_off, "adapter_model.safetensors is no safetensors file"),
        (without_one_B, "lacks model.layers.1.self_attn.q_proj.lora_B"),
        (with_another_rank, "layers.1.self_attn.q_proj.lora_A.weight has shape (2, 16), where (3, k) was expected"),
        (with_another_size, "takes model.layers.1.self_attn.q_proj for a layer of 8 to 16 features"),
        (with_another_layer, "adapts model.layers.2.self_attn.q_proj, which is no linear layer of the base model"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_peft_weights_that_can_not_be_read_are_refused(refused, peft_folder, tmp_path, spoil, message):
    spoil(load_file(peft_folder / "adapter_model.safetensors"), peft_folder)
    assert message in refused("import-peft", peft=peft_folder, output=tmp_path / "ours")


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"num_B": 0}, "num_B must be at least 1"),
        ({"temperature": 0}, "temperature must be greater than 0"),
        ({"template": "poem"}, "poem"),
        ({"method": "dora"}, "invalid choice: 'dora'"),
        ({"tasks_file": "nowhere.json"}, "the tasks file nowhere.json cannot be read"),
    ],
    ids=str,
)
def test_wrong_flag_of_an_import_is_refused(refused, peft_folder, tmp_path, flags, message):
    assert message in refused("import-peft", peft=peft_folder, output=tmp_path / "ours", **flags)


# ---- from the original repository ----


def original_weights(label: str) -> dict[str, torch.Tensor]:
    """The original's own numbers for one layer, by the original's names, and its output ``y``."""
    found = {name: value for name, value in load_file(ORIGINAL).items() if name.startswith(f"{label}.")}
    return {name.removeprefix(f"{label}."): value for name, value in found.items() if ".grad." not in name}


@pytest.mark.parametrize(("label", "temperature"), [("mtl_lora", 0.5), ("mtl_lora_diagonal", 0.1)])
def test_imported_layer_computes_what_the_original_computed(command, tmp_path, label, temperature):
    weights, shared = original_weights(label), load_file(ORIGINAL)
    names = ("lora_A", "lora_lambdas", "lora_B", "lora_B_w")
    torch.save({f"module.layer.{name}": weights[name] for name in names}, tmp_path / "adapter.bin")
    three = TaskSet(FOUR.tasks[:3])
    command(
        "import-original",
        file=tmp_path / "adapter.bin",
        output=tmp_path / "ours",
        base_model="no/such-model",
        tasks_file=tasks_file(tmp_path, three),
        alpha=16,
        temperature=temperature,
    )
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(12, 10, bias=False).double())
    model.layer.weight.data.copy_(shared["W"])
    mtl_lora.load(model, tmp_path / "ours").eval()
    with route.use(shared["task_ids"]), torch.no_grad():
        y = model(shared["x"])
    # The checkpoint is float32, and the original takes the softmax in it.
    assert_near(y, weights["y"], 1e-6, "y")
    assert (shared["x"] @ shared["W"].T - weights["y"]).abs().max() > 0.1


def as_original(state: dict[str, torch.Tensor], num_B: int) -> dict[str, torch.Tensor]:
    """Weights of this library as the original saves them."""
    renamed = {"lora_lambda": "lora_lambdas", "lora_w": "lora_B_w"}
    saved = {}
    for key, tensor in state.items():
        name, _, weight = key.rpartition(".")
        if weight == "lora_A":
            tensor = tensor[None]
        elif weight == "lora_B":
            tensor = torch.stack(tensor.chunk(num_B, dim=1))
        saved[f"{name}.{renamed.get(weight, weight)}"] = tensor
    return saved


@pytest.fixture
def original(bases, tmp_path):
    """The original's file for eight tasks on the tiny LLaMA, as tensors that a test may spoil, and our own state."""
    checkpoint = save_adapter(bases["llama"], tmp_path / "trained", "mtl_lora", tasks=COMMONSENSE.names)
    state = adapter_state(mtl_lora.load(load_base(bases["llama"]), checkpoint))
    return as_original(state, 3), state


@pytest.mark.parametrize("prefix", ["", "module.", "base_model.model.", "module.base_model.model."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_original_checkpoint_is_imported_weight_by_weight(bases, original, command, tmp_path, prefix, dtype):
    tensors, state = original
    torch.save({prefix + name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / "final_checkpoint.pt")
    command(
        "import-original",
        file=tmp_path / "final_checkpoint.pt",
        output=tmp_path / "ours",
        base_model=bases["llama"],
        temperature=0.5,
        alpha=6,
    )
    model = mtl_lora.load(load_base(bases["llama"]), tmp_path / "ours")
    for name, tensor in adapter_state(model).items():
        assert torch.equal(tensor, state[name].to(dtype).float()), name
    expected = adapter_config("mtl_lora", tasks=COMMONSENSE.names, dropout=0.05, target_modules=TARGETS["llama"])
    assert model.mtl_lora_config == expected
    origin = model.mtl_lora_origin
    assert (origin.prompt_template, origin.base_fingerprint) == ("original", BaseModel(bases["llama"]).fingerprint())
    assert TaskSet.from_json(origin.task_set) == COMMONSENSE


def edit(name: str, value):
    """A change to one tensor of the first layer."""

    def change(tensors):
        tensors[f"model.layers.0.self_attn.q_proj.{name}"] = value

    return change


def take_out(name: str):
    def change(tensors):
        del tensors[f"model.layers.0.self_attn.q_proj.{name}"]

    return change


def rename_a_layer(tensors):
    for weight in ("lora_A", "lora_lambdas", "lora_B", "lora_B_w"):
        tensors[f"model.layers.7.self_attn.q_proj.{weight}"] = tensors.pop(f"model.layers.0.self_attn.q_proj.{weight}")


FIRST, LAST = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    "change, message",
    [
        (edit("lora_A", torch.ones(3, 16)), f"{FIRST}.lora_A has shape (3, 16), where (1, r, k) was expected"),
        (edit("lora_A", torch.ones(2, 3, 16)), f"{FIRST}.lora_A has shape (2, 3, 16), where (1, r, k) was expected"),
        (edit("lora_B", torch.ones(3, 16, 4)), f"{FIRST}.lora_B has shape (3, 16, 4), where (3, d, 3) was expected"),
        (edit("lora_B_w", torch.ones(8, 2)), f"{FIRST}.lora_B has shape (3, 16, 3), where (2, d, 3) was expected"),
        (edit("lora_B_w", torch.ones(8)), f"{FIRST}.lora_B_w has shape (8,), where (T, n) was expected"),
        (
            edit("lora_lambdas", torch.ones(7, 3, 3)),
            f"{FIRST}.lora_lambdas has shape (7, 3, 3), where (8, 3, 3) was expected",
        ),
        (edit("lora_lambdas", torch.ones(8, 3)), "lora_lambdas has shape (8, 3, 3), where (8, 3) was expected"),
        (edit("lora_A", torch.ones(0)), f"{FIRST}.lora_A has shape (0,), where (1, r, k) was expected"),
        (edit("lora_A", torch.ones(1, 3, 8)), f"takes {FIRST} for a layer of 8 to 16 features"),
        (edit("lora_scaler", torch.ones(())), f"holds {FIRST}.lora_scaler, which is no weight of the original's"),
        (edit("lora_A", {"a": 1}), f"holds {FIRST}.lora_A, which is no weight of the original's"),
        (edit("lora_A", torch.ones(1, 3, 16, dtype=torch.long)), f"holds {FIRST}.lora_A, which is no weight"),
        (take_out("lora_B_w"), f"lacks {FIRST}.lora_B_w"),
        (rename_a_layer, "adapts model.layers.7.self_attn.q_proj, which is no linear layer of the base model"),
        (dict.clear, "holds a dict; it must hold tensors by name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_original_checkpoint_that_does_not_fit_names_the_tensor(bases, refused, original, tmp_path, change, message):
    tensors, _ = original
    change(tensors)
    torch.save(tensors, tmp_path / "adapter.bin")
    sentence = refused(
        "import-original", file=tmp_path / "adapter.bin", output=tmp_path / "ours", base_model=bases["llama"]
    )
    assert message in sentence


def test_layers_of_an_original_checkpoint_must_agree(refused, bases, original, tmp_path):
    tensors, _ = original
    for weight, shape in (("lora_A", (1, 4, 24)), ("lora_lambdas", (8, 4, 4)), ("lora_B", (3, 16, 4))):
        tensors[f"{LAST}.{weight}"] = torch.ones(shape)
    torch.save(tensors, tmp_path / "adapter.bin")
    sentence = refused(
        "import-original", file=tmp_path / "adapter.bin", output=tmp_path / "ours", base_model=bases["llama"]
    )
    assert f"{LAST}.lora_A has shape (1, 4, 24), where (1, 3, k) was expected" in sentence


def test_number_of_tasks_must_be_the_files(refused, bases, original, tmp_path):
    torch.save(original[0], tmp_path / "adapter.bin")
    sentence = refused(
        "import-original",
        file=tmp_path / "adapter.bin",
        output=tmp_path / "ours",
        base_model=bases["llama"],
        tasks_file=tasks_file(tmp_path, FOUR),
    )
    assert "has 8 tasks and not the 4 of tides, maps, birds, rivers; pass --tasks_file" in sentence


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_an_original_checkpoint_is_never_run(bases, original, tmp_path):
    torch.save({**original[0], "trap": Trap(tmp_path / "ran")}, tmp_path / "adapter.bin")
    with pytest.raises(UserError, match=r"adapter\.bin cannot be read as a file of tensors alone") as caught:
        import_original(tmp_path / "adapter.bin", tmp_path / "ours", bases["llama"], COMMONSENSE)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "missing"])
def test_file_that_is_no_checkpoint_is_one_sentence(refused, bases, tmp_path, content):
    if content is not None:
        (tmp_path / "adapter.bin").write_bytes(content)
    sentence = refused(
        "import-original", file=tmp_path / "adapter.bin", output=tmp_path / "ours", base_model=bases["llama"]
    )
    assert "adapter.bin" in sentence
