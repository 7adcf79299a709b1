"""The analysis of a checkpoint, in rank space and without its base, equals the dense one with its base at hand."""

import json

import pytest
import torch
from reference import layers as reference
from reference.tiny import METHODS, TASKS, adapted_llama, adapter_config, randomise, tiny_llama

import mtl_lora
from mtl_lora import artifacts
from mtl_lora.adapter import checkpoint
from mtl_lora.adapter.analysis import MOST_TASKS, analyse, in_depth_order, main, write_analysis
from mtl_lora.adapter.checkpoint import read_config
from mtl_lora.errors import UserError

SHARED = ["lora", "dora", "multilora"]
PER_TASK = ["moelora", "mtl_lora", "mtl_lora_diagonal"]
MATRICES = ["lambda_similarity", "lambda_minus_identity_similarity", "update_similarity", "update_similarity_by_module"]


def dense_update(layer, task: int, config) -> torch.Tensor:
    """s B_t A_t as a (d, k) matrix: what the slow formula adds to each unit vector."""
    weights = {name: weight.detach().double() for name, weight in layer.adapter_parameters().items()}
    nothing = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    columns = [
        reference.UPDATES[config.method](x, task, nothing, weights, config)
        for x in torch.eye(layer.in_features, dtype=torch.float64)
    ]
    return torch.stack(columns, dim=1)


def dense_lambda(layer, task: int, config) -> torch.Tensor:
    transform = layer.lora_lambda[task].detach().double()
    return torch.diag(transform) if config.lambda_shape == "diagonal" else transform


def mean_cosines(layers, matrix_of) -> torch.Tensor:
    """Cosines of the tasks' matrices, entry by entry as one would on paper, and their mean over layers."""
    by_layer = []
    for layer in layers:
        matrices = [matrix_of(layer, task) for task in range(len(TASKS))]
        by_layer.append([[(s * t).sum() / (s.norm() * t.norm()) for t in matrices] for s in matrices])
    return torch.tensor(by_layer, dtype=torch.float64).mean(dim=0)


def near(actual: list, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(actual, dtype=torch.float64), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", PER_TASK)
def test_similarity_of_updates_is_that_of_the_dense_matrices(method, dtype, tmp_path):
    model = adapted_llama(method, dtype)
    mtl_lora.save(model, tmp_path)
    found, config, layers = analyse(tmp_path), adapter_config(method), mtl_lora.adapter_layers(model)

    def update(layer, task):
        return dense_update(layer, task, config)

    near(found["update_similarity"], mean_cosines(layers.values(), update))
    assert list(found["update_similarity_by_module"]) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    for module, similarity in found["update_similarity_by_module"].items():
        near(similarity, mean_cosines([layer for name, layer in layers.items() if name.endswith(module)], update))
    assert found["layers"] == list(layers) and found["tasks"] == TASKS and found["method"] == config.method


@pytest.mark.parametrize("method", ["mtl_lora", "mtl_lora_diagonal"])
def test_similarity_of_lambda_is_that_of_the_square_matrices(method, tmp_path):
    model = adapted_llama(method)
    mtl_lora.save(model, tmp_path)
    found, config, layers = analyse(tmp_path), adapter_config(method), mtl_lora.adapter_layers(model).values()
    identity = torch.eye(config.rank, dtype=torch.float64)
    near(found["lambda_similarity"], mean_cosines(layers, lambda layer, task: dense_lambda(layer, task, config)))
    near(
        found["lambda_minus_identity_similarity"],
        mean_cosines(layers, lambda layer, task: dense_lambda(layer, task, config) - identity),
    )


@pytest.mark.parametrize("method", PER_TASK)
def test_mixture_is_the_softmax_of_each_layer(method, tmp_path):
    model = adapted_llama(method)
    mtl_lora.save(model, tmp_path)
    found = analyse(tmp_path)["mixture"]
    layers = mtl_lora.adapter_layers(model)
    assert list(found) == list(layers)
    for name, layer in layers.items():
        if method == "moelora":
            logits = [layer.lora_gate.detach() @ embedding for embedding in layer.lora_task_embedding.detach()]
        else:
            logits = list(layer.lora_w.detach() / layer.hyperparameters.temperature)
        near(found[name], torch.stack([torch.stack(reference.softmax(row)) for row in logits]))


@pytest.mark.parametrize("method", PER_TASK)
def test_what_was_learned_stands_beside_the_start(method, tmp_path):
    model, config = mtl_lora.inject(tiny_llama(), adapter_config(method)), adapter_config(method)
    checkpoint.save_start(model, tmp_path, checkpoint.adapter_state(model))
    layers = mtl_lora.adapter_layers(model)
    drawn = {
        name: {key: getattr(layer, key).clone() for key in layer.task_parameters} for name, layer in layers.items()
    }
    untrained = {name: layer.mixture(torch.arange(len(TASKS))).detach() for name, layer in layers.items()}
    mtl_lora.save(randomise(model), tmp_path)
    found = analyse(tmp_path)
    for name, layer in layers.items():
        near(found["mixture_at_start"][name], untrained[name])
        assert found["mixture"][name] != found["mixture_at_start"][name]
        for key, value in drawn[name].items():
            getattr(layer, key).data = value
    start = mean_cosines(layers.values(), lambda layer, task: dense_update(layer, task, config))
    near(found["update_similarity_at_start"], start)
    assert found["update_similarity"] != found["update_similarity_at_start"]
    assert not any("start was not kept" in note for note in found["notes"])
    other = mtl_lora.inject(tiny_llama(), adapter_config(method, tasks=TASKS[:2]))
    checkpoint.save_start(other, tmp_path, checkpoint.adapter_state(other))
    with pytest.raises(UserError, match=artifacts.ADAPTER_START):
        analyse(tmp_path)


@pytest.mark.parametrize("method", SHARED)
def test_a_method_that_is_the_same_for_every_task_has_nothing_to_compare(method, tmp_path):
    mtl_lora.save(adapted_llama(method), tmp_path)
    found = analyse(tmp_path)
    assert [found[key] for key in ["mixture", *MATRICES]] == [None] * 5
    assert len(found["layers"]) == 8


@pytest.mark.parametrize("method", METHODS)
def test_an_untrained_adapter_gives_null_where_a_cosine_is_undefined(method, tmp_path):
    mtl_lora.save(mtl_lora.inject(tiny_llama(), adapter_config(method)), tmp_path)
    found = json.loads(write_analysis(tmp_path).read_text(), parse_constant=pytest.fail)
    undefined = [[None] * len(TASKS)] * len(TASKS)
    if method in PER_TASK:
        assert found["update_similarity"] == found["update_similarity_by_module"]["q_proj"] == undefined
        assert found["mixture"] and "null where the cosine is undefined" in found["notes"][0]
    if method.startswith("mtl_lora"):
        assert found["lambda_minus_identity_similarity"] == undefined
        assert found["lambda_similarity"] == [[1.0] * len(TASKS)] * len(TASKS)


def test_an_untrained_task_and_an_untrained_layer_are_left_out_of_the_means(tmp_path):
    model = adapted_llama()
    first, *others = mtl_lora.adapter_layers(model).values()
    with torch.no_grad():
        first.lora_B.zero_()
        for layer in (first, *others):
            layer.lora_lambda[2] = torch.eye(layer.rank)
    mtl_lora.save(model, tmp_path)
    found, config = analyse(tmp_path), adapter_config()
    near(found["update_similarity"], mean_cosines(others, lambda layer, task: dense_update(layer, task, config)))
    minus_identity = found["lambda_minus_identity_similarity"]
    assert minus_identity[2] == [None] * 4 and [row[2] for row in minus_identity] == [None] * 4
    assert minus_identity[0][1] is not None


def test_a_gate_that_reads_the_input_leaves_a_note_and_no_tables(tmp_path):
    mtl_lora.save(adapted_llama("hydralora"), tmp_path)
    found = analyse(tmp_path)
    assert [found[key] for key in ["mixture", *MATRICES]] == [None] * 5
    assert len(found["layers"]) == 8 and "HydraLoRA has no factors" in found["notes"][0]


def test_titles_of_method_and_parts_come_from_the_method(tmp_path):
    for method, title, parts in [("moelora", "MoELoRA", "experts"), ("lora", "LoRA", None)]:
        mtl_lora.save(adapted_llama(method), tmp_path / method)
        found = analyse(tmp_path / method)
        assert (found["method_title"], found["mixture_parts"]) == (title, parts)


def test_many_tasks_leave_the_matrices_out_and_say_so(tmp_path):
    tasks = [f"task{index}" for index in range(MOST_TASKS + 1)]
    mtl_lora.save(adapted_llama(tasks=tasks), tmp_path)
    found = analyse(tmp_path)
    assert [found[key] for key in MATRICES] == [None] * 4
    assert len(found["mixture"]["model.layers.0.self_attn.q_proj"]) == len(tasks)
    assert found["notes"][0] == "similarities are left out: they are for up to 64 tasks, and there are 65"


def test_the_file_names_its_weights_and_holds_what_was_computed(tmp_path):
    mtl_lora.save(adapted_llama(), tmp_path)
    path = write_analysis(tmp_path)
    found, exact = json.loads(path.read_text()), analyse(tmp_path)
    assert path == tmp_path / artifacts.ADAPTER_ANALYSIS and found.keys() == exact.keys()
    assert found["adapter_sha256"] == read_config(tmp_path).weights_sha256
    torch.testing.assert_close(
        torch.tensor(found["update_similarity"]), torch.tensor(exact["update_similarity"]), rtol=0, atol=1e-6
    )
    again = path.read_bytes()
    assert write_analysis(tmp_path).read_bytes() == again


def test_every_way_of_naming_the_layers_can_be_analysed(tmp_path):
    for index, targets in enumerate(["all-linear", r".*layers\.1\..*_proj", ["model.layers.0.self_attn.q_proj"]]):
        model = adapted_llama(target_modules=targets)
        mtl_lora.save(model, tmp_path / str(index))
        assert set(analyse(tmp_path / str(index))["layers"]) == set(mtl_lora.adapter_layers(model))


def test_layers_stand_from_input_to_output_and_as_targets_are_listed():
    names = ["layers.10.self.k", "layers.10.self.q", "layers.2.self.k", "layers.2.self.q", "head"]
    order = [*(f"layers.{number}.self.{module}" for number in (2, 10) for module in "qk")]
    assert list(in_depth_order(dict.fromkeys(names), ["q", "k"])) == ["head", *order]
    assert list(in_depth_order(dict.fromkeys(names), "all-linear"))[1:] == sorted(order[:2]) + sorted(order[2:])


def test_a_damaged_checkpoint_ends_in_one_sentence(tmp_path, capsys):
    mtl_lora.save(randomise(adapted_llama()), tmp_path)
    weights = tmp_path / artifacts.CHECKPOINT_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    for folder, complaint in [(tmp_path, "is damaged"), (tmp_path / "missing", artifacts.CHECKPOINT_CONFIG)]:
        with pytest.raises(SystemExit) as stop:
            main([str(folder)])
        out, err = capsys.readouterr()
        assert (stop.value.code, out, err.count("\n")) == (2, "", 1) and complaint in err
    assert not (tmp_path / artifacts.ADAPTER_ANALYSIS).exists()


def test_the_command_needs_the_checkpoint_alone(tmp_path, capsys):
    mtl_lora.save(adapted_llama(), tmp_path / "adapter")
    output = tmp_path / "elsewhere" / "analysis.json"
    main([str(tmp_path / "adapter"), "--output", str(output)])
    assert capsys.readouterr().out == f"{output}\n"
    assert json.loads(output.read_text())["kind"] == "adapter_analysis"
    with pytest.raises(SystemExit):
        main([str(tmp_path / "adapter"), str(tmp_path / "adapter"), "--output", str(output)])
