"""Each row gets the weights of its own task: on a real model, through every way that is known to lose the ids."""

import contextlib
import threading
import warnings
from functools import partial

import datasets
import numpy as np
import pandas
import pytest
import torch
import transformers
from reference.architectures import OTHERS
from reference.layers import assert_near
from reference.tiny import (
    FACTORED,
    METHODS,
    TASKS,
    VOCABULARY,
    adapted_llama,
    adapter_config,
    adapter_gradients,
    randomise,
    tiny_llama,
    tokens,
)
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig

import mtl_lora
from mtl_lora import UserError, route

IDS = torch.tensor([0, 1, 2, 3])
OTHER_IDS = torch.tensor([3, 3, 0, 1])
ROUTED = ["moelora", "mtl_lora", "mtl_lora_diagonal"]  # the methods with weights of their own for a task
DOORS = ["argument", "block"]
# As transformers takes them; None: no checkpointing.
CHECKPOINTING = {"none": None, "non-reentrant": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}
PACKED = torch.cat([IDS[:, None].expand(4, 3), OTHER_IDS[:, None].expand(4, 4)], dim=1)


def logits(model, input_ids: torch.Tensor, task_ids, door: str = "argument", **options) -> torch.Tensor:
    """Of one forward."""
    if door == "argument":
        return model(input_ids=input_ids, task_ids=task_ids, use_cache=False, **options).logits
    with route.use(task_ids):
        return model(input_ids=input_ids, use_cache=False, **options).logits


def training_llama(checkpointing: str = "none", **changes) -> torch.nn.Module:
    """A model in training mode, which is when transformers checkpoints."""
    model = adapted_llama(**changes).train()
    if CHECKPOINTING[checkpointing] is not None:
        model.gradient_checkpointing_enable(CHECKPOINTING[checkpointing])
    return model


def loss_of(model, input_ids: torch.Tensor, task_ids, door: str = "argument") -> torch.Tensor:
    """A loss that is a sum over rows."""
    return logits(model, input_ids, task_ids, door).square().sum()


def gradients_of(model, input_ids: torch.Tensor, task_ids, door: str = "argument") -> dict[str, torch.Tensor]:
    """Adapter gradients of one plain step."""
    loss_of(model, input_ids, task_ids, door).backward()
    return adapter_gradients(model)


def assert_same_gradients(actual: dict, expected: dict) -> None:
    """All adapter weights have a gradient, and the one expected."""
    assert expected
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), f"{name} shows nothing: its gradient is zero"
        assert_near(actual[name], gradient, 1e-10, name)


def total(*gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sum of gradients by name."""
    return {name: sum(each[name] for each in gradients) for name in gradients[0]}


def in_thread(function) -> None:
    """Run in a new thread, which has no route, and raise here what it raised."""
    raised = []

    def run():
        try:
            function()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=60)
    if raised:
        raise raised[0]


# ---- rows and their tasks ----


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("method", ROUTED)
def test_each_row_is_computed_as_if_alone_with_its_task(method, door):
    model, input_ids = adapted_llama(method), tokens(4)
    mixed = logits(model, input_ids, TASKS, door)
    for row, task_id in enumerate(IDS):
        assert_near(logits(model, input_ids[row : row + 1], task_id[None])[0], mixed[row], 1e-12, f"row {row}")
    others = logits(model, input_ids, OTHER_IDS, door)
    assert all((others[row] - mixed[row]).abs().max() > 0.01 for row in range(4))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_a_mixed_batch_are_the_sum_over_its_rows(method):
    model, input_ids = training_llama(method=method), tokens(4)
    rows = [gradients_of(model, input_ids[row : row + 1], IDS[row : row + 1]) for row in range(4)]
    assert_same_gradients(gradients_of(model, input_ids, IDS), total(*rows))


@pytest.mark.parametrize("door", DOORS)
def test_ids_may_be_names_or_any_whole_numbers(door):
    model, input_ids = adapted_llama(), tokens(4)
    expected = logits(model, input_ids, OTHER_IDS)
    names = [TASKS[index] for index in OTHER_IDS]
    given = [OTHER_IDS.to(dtype) for dtype in (torch.int32, torch.int16, torch.uint8)]
    given += [OTHER_IDS.tolist(), tuple(OTHER_IDS.tolist()), OTHER_IDS.numpy(), names, tuple(names), np.array(names)]
    given += [[[name] * 7 for name in names], pandas.Series([0, *OTHER_IDS.tolist()])[1:], pandas.Series(names)]
    for task_ids in given:
        assert torch.equal(logits(model, input_ids, task_ids, door), expected), task_ids


def test_ids_may_be_a_column_of_a_data_set():
    model, tasks = adapted_llama(), [TASKS[2], TASKS[0]]
    column = datasets.Dataset.from_dict({"task": tasks})["task"]
    assert torch.equal(logits(model, tokens(2), column), logits(model, tokens(2), tasks))


def test_gradients_of_each_row_by_a_transform_are_those_of_the_row_alone():
    """torch.func's grad inside vmap, with dropout too, which then is torch's own."""
    model = adapted_llama("mtl_lora")
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def loss(weights, row, task_id):
        options = {"task_ids": task_id[None], "use_cache": False}
        return torch.func.functional_call(model, weights, (row[None],), options).logits.square().sum()

    detached = {name: weight.detach() for name, weight in trained.items()}
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(detached, tokens(4), IDS)
    for index in range(4):
        alone = torch.autograd.grad(loss(trained, tokens(4)[index], IDS[index]), list(trained.values()))
        for name, expected in zip(trained, alone, strict=True):
            torch.testing.assert_close(found[name][index], expected)


def exported(model, *example):
    return torch.export.export(model, example).module()


def traced(model, *example):
    return torch.jit.trace(model, example, check_trace=False)


def over_rows(model, *example):
    return lambda x, ids: torch.func.vmap(lambda row, task_id: model(row[None], task_id[None])[0])(x, ids)


class WithIds(torch.nn.Module):
    def __init__(self, method):
        super().__init__()
        layers = torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.ReLU(), torch.nn.Linear(10, 12)).double()
        config = adapter_config(method, target_modules=["0", "2"])
        self.adapted = randomise(mtl_lora.inject(layers, config)).eval()

    def forward(self, x, task_ids):
        return self.adapted(x, task_ids=task_ids)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", [exported, traced, over_rows])
@pytest.mark.parametrize("method", ROUTED)
def test_traced_model_takes_other_ids_and_none_outside_the_range(method, way):
    torch.manual_seed(0)
    model, x = WithIds(method), torch.randn(4, 7, 12, dtype=torch.float64)
    found = way(model, x, IDS)
    for ids in (IDS, OTHER_IDS):
        assert_near(found(x, ids), model(x, ids), 1e-12, str(ids))
    for wrong in (-1, len(TASKS)):
        with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
            found(x, torch.tensor([0, 1, 2, wrong]))


def test_gradients_by_a_transform_take_dropout():
    model = mtl_lora.inject(tiny_llama(torch.float32), adapter_config(dropout=0.3)).train()
    trained = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    loss = lambda weights: torch.func.functional_call(  # noqa: E731
        model, weights, (tokens(4),), {"task_ids": IDS, "use_cache": False}
    ).logits.sum()
    assert {*torch.func.grad(loss)(trained)} == {*trained}


def test_argument_goes_before_the_block_and_ends_with_the_call():
    model, input_ids = adapted_llama(), tokens(4)
    with route.use(IDS):
        assert torch.equal(logits(model, input_ids, OTHER_IDS), logits(model, input_ids, OTHER_IDS, "block"))
        assert torch.equal(model(input_ids=input_ids).logits, logits(model, input_ids, IDS))
    with pytest.raises(UserError, match="needs task ids"):
        model(input_ids=input_ids)


@pytest.mark.parametrize("tasks", [TASKS, []], ids=["tasks", "no tasks"])
def test_a_method_without_tasks_of_its_own_takes_the_argument_too(tasks):
    model = randomise(mtl_lora.inject(tiny_llama(), adapter_config("lora", tasks=tasks)))
    expected = model(input_ids=tokens(4)).logits
    assert torch.equal(logits(model, tokens(4), IDS), expected)
    if tasks:
        with pytest.raises(UserError, match="there is no task 'moon'"):
            logits(model, tokens(4), ["moon"] * 4)


# ---- ids by token ----


def test_token_ids_that_repeat_row_ids_change_nothing():
    model, input_ids = training_llama(), tokens(4)
    expected = gradients_of(model, input_ids, IDS)
    assert_same_gradients(gradients_of(model, input_ids, IDS[:, None].expand(4, 7)), expected)


@pytest.mark.parametrize("method", ROUTED)
def test_each_token_of_a_packed_row_gets_its_own_task(method):
    model, input_ids = adapted_llama(method), tokens(4)
    expected, packed = logits(model, input_ids, IDS), logits(model, input_ids, PACKED)
    # Attention looks back only, so the first three tokens know nothing of the task that follows.
    assert_near(packed[:, :3], expected[:, :3], 1e-12, "tokens of the first task")
    assert all((packed[row, 3:] - expected[row, 3:]).abs().max() > 0.01 for row in range(4))


@pytest.mark.parametrize("checkpointing", ["non-reentrant", "reentrant"])
def test_token_ids_survive_checkpointing(checkpointing):
    expected = gradients_of(training_llama(), tokens(4), PACKED)
    assert_same_gradients(gradients_of(training_llama(checkpointing), tokens(4), PACKED), expected)


# ---- rows that are flattened, and heads that see some positions ----


MOE = transformers.Qwen2MoeConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    initializer_range=0.4,
    pad_token_id=0,
)


@pytest.mark.parametrize("method", ["moelora", "mtl_lora"])
def test_flattened_tokens_of_a_mixture_of_experts_keep_their_tasks(method):
    torch.manual_seed(0)
    model = transformers.Qwen2MoeForCausalLM(MOE).eval()
    model = randomise(mtl_lora.inject(model, adapter_config(method, target_modules="all-linear")))
    assert "model.layers.0.mlp.shared_expert.up_proj" in mtl_lora.adapter_layers(model)
    input_ids = tokens(4)
    mixed, packed = logits(model, input_ids, IDS), logits(model, input_ids, PACKED)
    for row in range(4):
        alone = input_ids[row : row + 1]
        assert_near(logits(model, alone, IDS[row : row + 1])[0], mixed[row], 1e-5, f"row {row}")
        assert_near(logits(model, alone, PACKED[row : row + 1])[0], packed[row], 1e-5, f"packed row {row}")
    assert (mixed - logits(model, input_ids, OTHER_IDS)).abs().max() > 0.01


def with_layer(name: str) -> torch.nn.Module:
    """A model with one linear layer of this name."""
    model = torch.nn.Linear(8, 8)
    for part in reversed(name.split(".")):
        model = torch.nn.ModuleDict({part: model})
    return model


@pytest.mark.parametrize("name", ["experts.0.up", "mlp.experts.expert_3.wi"])  # the latter is Switch's
def test_experts_that_see_tokens_in_an_order_of_their_own_are_refused_where_ids_are_needed(name):
    with pytest.raises(UserError, match=f"{name} cannot carry an adapter of the method mtl_lora"):
        mtl_lora.inject(with_layer(name), adapter_config(target_modules=[name]))
    mtl_lora.inject(with_layer(name), adapter_config("lora", target_modules=[name]))


@pytest.mark.parametrize("name", ["mlp.shared_expert.up", "mlp.experts_norm"])
def test_what_is_named_like_experts_and_sees_every_token_is_none_of_them(name):
    model = mtl_lora.inject(with_layer(name), adapter_config(target_modules=[name]))
    assert list(mtl_lora.adapter_layers(model)) == [name]


def test_adapted_output_head_is_routed_where_only_some_positions_are_projected():
    model, input_ids = adapted_llama(target_modules=["q_proj", "lm_head"]), tokens(4)
    mask = torch.rand(4, 7, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[:, 0] = torch.tensor([True, False, True, False])
    four = torch.zeros(4, 7, dtype=torch.bool)
    four[[0, 0, 2, 3], [1, 5, 0, 2]] = True  # as many positions as rows, and not one of each
    places = torch.tensor([[0, 4], [1, 2], [6, 6], [3, 5]])
    for task_ids in (IDS, PACKED):
        whole = logits(model, input_ids, task_ids)
        cases = [(2, whole[:, -2:]), (torch.tensor([1, 4]), whole[:, [1, 4]])]
        if hasattr(transformers.modeling_utils, "slice_logits_to_keep"):  # newer versions take places of each row too
            cases += [(mask, whole[mask]), (four, whole[four])]
            cases.append((places, torch.take_along_dim(whole, places[..., None], dim=1)))
        for keep, expected in cases:
            found = logits(model, input_ids, task_ids, logits_to_keep=keep)
            assert_near(found, expected, 1e-12, f"{keep}")


# ---- backward passes ----


@pytest.mark.parametrize(
    ("method", "checkpointing"), [*((method, "non-reentrant") for method in METHODS), ("mtl_lora", "reentrant")]
)
def test_checkpointing_recomputes_and_gives_the_plain_gradients(method, checkpointing):
    runs = {}

    def gradients(how):
        model = training_llama(how, method=method, dropout=0.3)
        layer = next(iter(mtl_lora.adapter_layers(model).values()))
        layer.register_forward_pre_hook(lambda *_: runs.update({how: runs.get(how, 0) + 1}))
        torch.manual_seed(7)
        return gradients_of(model, tokens(4), IDS)

    assert_same_gradients(gradients(checkpointing), gradients("none"))
    assert runs == {"none": 1, checkpointing: 2}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_two_forwards_may_precede_one_backward(checkpointing, door):
    first, second = tokens(4, seed=2), tokens(4, seed=3)
    plain, model = training_llama(), training_llama(checkpointing)
    expected = total(gradients_of(plain, first, IDS), gradients_of(plain, second, OTHER_IDS))
    (loss_of(model, first, IDS, door) + loss_of(model, second, OTHER_IDS, door)).backward()
    assert_same_gradients(adapter_gradients(model), expected)


def backward_under_another_route(loss, task_ids):
    with route.use(OTHER_IDS):
        loss.backward()
        assert torch.equal(route.current().task_ids, OTHER_IDS)


def backward_with_a_reused_tensor(loss, task_ids):
    task_ids.copy_(OTHER_IDS)
    loss.backward()


def backward_in_another_thread(loss, task_ids):
    in_thread(loss.backward)


def backward_twice(loss, task_ids):
    loss.backward(retain_graph=True)
    loss.backward()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize(
    "backward",
    [backward_under_another_route, backward_with_a_reused_tensor, backward_in_another_thread, backward_twice],
)
def test_backward_uses_the_ids_of_its_forward(backward, checkpointing, door):
    expected = gradients_of(training_llama(), tokens(4), IDS)
    model, task_ids = training_llama(checkpointing), IDS.clone()
    backward(loss_of(model, tokens(4), task_ids, door), task_ids)
    times = 2 if backward is backward_twice else 1
    assert_same_gradients(adapter_gradients(model), {name: times * value for name, value in expected.items()})


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_accumulation_over_two_micro_batches_equals_the_full_batch(checkpointing):
    expected = gradients_of(training_llama(), tokens(4), IDS)
    model = training_llama(checkpointing)
    for rows in (slice(0, 2), slice(2, 4)):
        loss_of(model, tokens(4)[rows], IDS[rows]).backward()
    assert_same_gradients(adapter_gradients(model), expected)


def test_checkpointing_that_was_on_before_the_adapter_keeps_the_ids():
    model = tiny_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    randomise(mtl_lora.inject(model, adapter_config()))
    loss = loss_of(model, tokens(4), IDS)
    backward_under_another_route(loss, IDS)
    assert_same_gradients(adapter_gradients(model), gradients_of(training_llama(), tokens(4), IDS))


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ROUTED])
def test_checkpointed_forward_without_ids_works_for_methods_that_need_none(method):
    plain, model = training_llama(method=method), training_llama("reentrant", method=method)
    for each in (plain, model):
        each(input_ids=tokens(4), use_cache=False).logits.square().sum().backward()
    assert_same_gradients(adapter_gradients(model), adapter_gradients(plain))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_ones_own_that_loses_the_ids_is_refused_whatever_block_is_around_the_backward(reentrant):
    model = training_llama()
    layer, x = model.model.layers[0].mlp, torch.randn(4, 7, 16, dtype=torch.float64, requires_grad=True)
    mtl_lora.unload(model)
    randomise(mtl_lora.inject(model, adapter_config(target_modules=["up_proj"])))
    with route.use(IDS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = [checkpoint(layer, x, use_reentrant=reentrant).sum() for _ in range(2)]
    with pytest.raises(UserError, match="recomputed in the backward pass without the task ids"):
        losses[0].backward()
    with route.use(OTHER_IDS), pytest.raises(UserError, match=r"context_fn=mtl_lora\.route\.checkpoint_context"):
        losses[1].backward()


@pytest.mark.parametrize("door", DOORS)
def test_a_whole_model_may_be_checkpointed_with_its_ids_as_an_argument(door):
    model = training_llama()
    options = {"use_reentrant": False, "use_cache": False}
    if door == "argument":
        loss = checkpoint(model, tokens(4), task_ids=IDS, **options).logits.square().sum()
    else:
        with route.use(IDS):
            loss = checkpoint(model, tokens(4), context_fn=route.checkpoint_context, **options).logits.square().sum()
    backward_under_another_route(loss, IDS)
    assert_same_gradients(adapter_gradients(model), gradients_of(training_llama(), tokens(4), IDS))


def test_a_whole_model_that_is_recomputed_reads_no_other_batchs_block():
    model = training_llama()
    with route.use(IDS):
        loss = checkpoint(model, tokens(4), use_reentrant=False, use_cache=False).logits.sum()
    with route.use(OTHER_IDS), pytest.raises(UserError, match="recomputed in the backward pass without the task ids"):
        loss.backward()


# ---- torch.compile ----


class Blocks(torch.nn.Module):
    """Two blocks that are checkpointed as transformers checkpoints its layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2)).double()
        self.gradient_checkpointing = False

    def forward(self, x):
        for block in self.blocks:
            x = self._gradient_checkpointing_func(block, x) if self.gradient_checkpointing else block(x)
            x = x.tanh()
        return x


@pytest.fixture
def compilations():
    """How many frames torch.compile has compiled."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant"])
def test_compiled_model_equals_the_plain_one_and_is_not_compiled_for_every_batch(checkpointing, compilations):
    model = randomise(mtl_lora.inject(Blocks(), adapter_config(target_modules=["0", "1"]), allow_unused=True))
    if CHECKPOINTING[checkpointing]:
        model.gradient_checkpointing = True
        model._gradient_checkpointing_func = partial(checkpoint, **CHECKPOINTING[checkpointing])
    compiled = torch.compile(model, backend=compilations, fullgraph=True)
    counts = []

    def gradients(which, x, task_ids, door):
        with route.use(task_ids) if door == "block" else contextlib.nullcontext():
            y = which(x) if door == "block" else which(x, task_ids=task_ids)
        y.square().sum().backward()
        return adapter_gradients(model)

    batches = [(4, 7, IDS), (4, 7, TASKS[::-1]), (3, 5, ["maps", "maps", "tides"]), (2, 6, [1, 3]), (5, 3, [2] * 5)]
    if checkpointing == "none":
        batches += [(4, 7, PACKED), (2, 5, PACKED[:2, 1:6]), (3, 6, PACKED[1:, :6])]
    for rows, length, task_ids in batches:
        x = torch.randn(rows, length, 8, dtype=torch.float64, requires_grad=True)
        for door in DOORS:
            assert_same_gradients(gradients(compiled, x, task_ids, door), gradients(model, x, task_ids, door))
        counts.append(compilations.frame_count)
    assert counts[1] == counts[0], "other ids of the same shape are no reason to compile"
    assert counts[4] == counts[2], "nor are other sizes, once two have been seen"
    assert counts[-1] == counts[-2]
    with pytest.raises(UserError, match="task id 9 is outside 0 to 3"):
        compiled(torch.zeros(2, 3, 8), task_ids=[0, 9])


@pytest.mark.slow
def test_compiled_language_model_is_one_graph(compilations):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4
    )
    model = randomise(mtl_lora.inject(transformers.LlamaForCausalLM(config).eval(), adapter_config()))
    compiled = torch.compile(model, backend=compilations, fullgraph=True)
    with torch.no_grad():
        for task_ids in (IDS, TASKS[::-1]):
            assert torch.equal(logits(compiled, tokens(4), task_ids), logits(model, tokens(4), task_ids))
    assert compilations.frame_count == 1


def compile_in_place(blocks: torch.nn.ModuleList, backend) -> None:
    for block in blocks:
        block.compile(backend=backend)


def wrap_each(blocks: torch.nn.ModuleList, backend) -> None:
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block, backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "compile_blocks"), [("mtl_lora", compile_in_place), ("moelora", wrap_each)])
def test_each_of_several_compiled_blocks_has_its_own_weights(method, compile_blocks, compilations):
    """A graph is compiled once for all blocks; what one block looked up by its layers must not be in it."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
    llama = transformers.LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).double()
    model = randomise(mtl_lora.inject(llama, adapter_config(method=method))).train()
    batches = [(tokens(4), IDS), (tokens(4), TASKS[::-1]), (tokens(4)[:2, 1:], ["maps", "maps"])]
    expected = [gradients_of(model, *batch) for batch in batches]
    model.mtl_lora_injection.unchecked = True
    compile_blocks(model.model.layers, compilations)
    for batch, gradients in zip(batches, expected, strict=True):
        found = gradients_of(model, *batch)
        assert_same_gradients({name.replace("_orig_mod.", ""): found[name] for name in found}, gradients)
    assert compilations.frame_count <= 4


# ---- generation ----


BEAMS = [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}]
BEAM_NAMES = ["greedy", "beams", "two of beams"]
GENERATED = [("mtl_lora", beams) for beams in BEAMS] + [
    (method, BEAMS[2]) for method in METHODS if method != "mtl_lora"
]


def generate(model, input_ids: torch.Tensor, task_ids=None, **options) -> list[list[int]]:
    """New tokens; the tiny model has no end token, so all rows are equally long."""
    options = {"max_new_tokens": 4, "do_sample": False, **options}
    if task_ids is not None:
        options["task_ids"] = task_ids
    sequences = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    return sequences[:, input_ids.shape[1] :].tolist()


@pytest.mark.parametrize(("method", "beams"), GENERATED, ids=str)
def test_mixed_batch_generates_what_each_row_does_alone_with_and_without_cache(method, beams):
    model, input_ids = adapted_llama(method), tokens(4)
    rows = [generate(model, input_ids[row : row + 1], [TASKS[row]], **beams) for row in range(4)]
    alone = [sequence for sequences in rows for sequence in sequences]
    assert generate(model, input_ids, IDS, **beams) == alone
    with route.use(TASKS):
        assert generate(model, input_ids, use_cache=False, **beams) == alone
    if method in ROUTED:
        assert generate(model, input_ids, OTHER_IDS, **beams) != alone


def test_prompts_padded_at_the_right_are_refused_for_a_decoder():
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[1, 5:] = 0
    with pytest.raises(UserError, match="padding_side"):
        adapted_llama().generate(input_ids=tokens(4), attention_mask=mask, task_ids=TASKS)


def test_prompts_of_an_encoder_decoder_may_be_padded_at_the_right():
    (t5,) = (each for each in OTHERS if each.name == "T5")
    model = mtl_lora.inject(t5.build(torch.float32), adapter_config(target_modules=["q"]))
    mask = torch.tensor([[1] * 5 + [0] * 2, [1] * 7])
    found = model.generate(input_ids=tokens(2), attention_mask=mask, task_ids=TASKS[:2], max_new_tokens=2)
    assert len(found) == 2


def test_sampling_follows_the_seed():
    model, input_ids = adapted_llama(), tokens(4)

    def sample(seed, **options):
        torch.manual_seed(seed)
        return generate(model, input_ids, IDS, do_sample=True, **options)

    first = sample(1)
    assert sample(1) == first
    assert sample(1, use_cache=False) == first
    assert sample(2) != first


def test_beams_leave_the_route_fit_for_the_next_forward():
    model, input_ids = adapted_llama(), tokens(4)
    with route.use(TASKS):
        expected = model(input_ids=input_ids).logits
        generate(model, input_ids, num_beams=3)
        assert torch.equal(model(input_ids=input_ids).logits, expected)
    generate(model, input_ids, IDS, num_beams=3)
    with pytest.raises(UserError, match="needs task ids"):
        generate(model, input_ids)


def test_streaming_thread_takes_its_ids_with_it():
    model, input_ids = adapted_llama(), tokens(1)
    streamed = []

    class Streamer(transformers.generation.BaseStreamer):
        def put(self, value):
            streamed.extend(value.flatten().tolist())

        def end(self):
            pass

    options = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 4, "do_sample": False}
    options |= {"inputs": input_ids, "streamer": Streamer(), "task_ids": ["birds"]}
    thread = threading.Thread(target=model.generate, kwargs=options)
    with route.use(["maps"]):
        thread.start()
        thread.join(timeout=60)
    assert streamed[7:] == generate(model, input_ids, [2])[0] != generate(model, input_ids, [1])[0]


@pytest.mark.parametrize("method", FACTORED)
def test_merged_model_generates_the_same_without_a_route(method):
    model, input_ids = adapted_llama(method), tokens(2)
    expected = generate(model, input_ids, ["birds", "birds"], num_beams=3)
    assert generate(mtl_lora.merge(model, "birds"), input_ids, num_beams=3) == expected


# ---- what is refused ----


class Windows(torch.nn.Module):
    """Attention over windows of 4 x 4 of images (B, H, W, k), as Swin cuts them."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(6, 6)

    def forward(self, x):
        rows, height, width, k = x.shape
        x = x.view(rows, height // 4, 4, width // 4, 4, k).transpose(2, 3).reshape(-1, 16, k)
        return self.qkv(x)


class Flattening(torch.nn.Module):
    """Gives its layer some positions of (B, L, k), flattened."""

    def __init__(self, kept: int):
        super().__init__()
        self.kept, self.linear = kept, torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x[:, : self.kept].flatten(0, 1))


def test_missing_ids_raise():
    with pytest.raises(UserError, match=r"needs task ids: call the whole model with task_ids=.*mtl_lora.route.use"):
        adapted_llama()(input_ids=tokens(2))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 12])
def test_batch_that_does_not_match_its_ids_raises_even_as_a_multiple(rows):
    with pytest.raises(UserError, match=rf"batch of shape \({rows}, 7\) does not match .* \(4,\)"):
        logits(adapted_llama(), tokens(rows), IDS)


def test_windows_of_images_are_refused_since_their_rows_are_not_the_batch():
    model = mtl_lora.inject(Windows(), adapter_config(target_modules=["qkv"]))
    with pytest.raises(UserError, match=r"batch of shape \(16, 16\) does not match .* \(4,\)"):
        model(torch.randn(4, 8, 8, 6), task_ids=TASKS)


def test_rows_on_the_second_axis_are_refused_with_a_way_out():
    model = mtl_lora.inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), adapter_config(target_modules=["0"]))
    with pytest.raises(UserError, match=r"batch of shape \(7, 4\) does not match .* a method without task ids"):
        model(torch.randn(7, 4, 4), task_ids=IDS)


@pytest.mark.parametrize(
    ("kept", "task_ids"), [(2, IDS), (5, IDS[:, None].expand(4, 3))], ids=["fewer rows", "ids of another length"]
)
def test_flattened_rows_that_are_not_those_of_the_batch_are_refused(kept, task_ids):
    model = mtl_lora.inject(Flattening(kept), adapter_config(target_modules=["linear"]))
    with pytest.raises(UserError, match="does not match task_ids"):
        model(torch.randn(4, 5, 4), task_ids=task_ids)


@pytest.mark.parametrize("shape", [(4, 6), (4, 14), (4, 1), (2, 7), (7, 4)], ids=str)
def test_token_ids_that_do_not_match_raise(shape):
    with pytest.raises(UserError, match=r"\(4, 7\) does not match"):
        logits(adapted_llama(), tokens(4), torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("wrong", [4, 99, -1, -100, "moon"])
def test_a_task_that_is_not_there_is_named_with_those_that_are(wrong, door):
    model, right = adapted_llama(), "maps" if wrong == "moon" else 0
    for task_ids in ([right, wrong], [[right] * 7, [right] * 6 + [wrong]]):
        with pytest.raises(UserError, match=str(wrong)) as error:
            logits(model, tokens(2), task_ids, door)
        assert str(error.value).endswith("the adapter's tasks are 0 tides, 1 maps, 2 birds, 3 rivers")


@pytest.mark.parametrize(
    "task_ids",
    [
        torch.tensor([0.0, 1.0]),
        torch.tensor([True, False]),
        torch.tensor([0, 1], dtype=torch.complex64),
        torch.tensor(1),
        torch.zeros(2, 2, 2, dtype=torch.long),
        torch.tensor([]),
        [[0], [0, 1]],
        "maps",
        None,
    ],
    ids=["float", "bool", "complex", "scalar", "three axes", "empty", "ragged", "one name", "none"],
)
def test_ids_of_another_kind_or_shape_raise(task_ids):
    with pytest.raises(UserError, match="task_ids must be"), route.use(task_ids):
        pass
    assert route.current() is None


@pytest.mark.parametrize("task_ids", [[["maps"], ["maps", "maps"]], ["maps", 0], [[["maps"]]]], ids=str)
def test_names_of_another_shape_raise(task_ids):
    with pytest.raises(UserError, match="task_ids must be"):
        logits(adapted_llama(), tokens(2), task_ids)


# ---- where a route holds ----


def test_a_block_that_is_entered_inside_itself_ends_with_the_outer_one():
    block = route.use(["maps"])
    with block:
        with block:
            pass
        assert route.current() is block.outer
    assert route.current() is None


def test_inner_route_ends_with_its_block():
    with route.use(IDS):
        with route.use(OTHER_IDS):
            assert torch.equal(route.current().task_ids, OTHER_IDS)
        assert torch.equal(route.current().task_ids, IDS)
    assert route.current() is None


def test_blocks_that_end_in_another_order_than_they_began_are_reported():
    def request(task_ids):
        with route.use(task_ids):
            yield route.current().task_ids
            yield route.current().task_ids

    one, other = request(IDS), request(OTHER_IDS)
    next(one), next(other)
    assert torch.equal(next(one), OTHER_IDS)  # of the other block
    with pytest.raises(UserError, match="do not await or yield inside"):
        next(one, None)
    with pytest.raises(UserError, match="do not await or yield inside"):
        for _ in other:
            pass
    assert route.current() is None
    one, other = request(IDS), request(OTHER_IDS)
    next(one), next(other)
    with pytest.raises(ValueError, match="its own"):  # an error on its way out is not replaced
        one.throw(ValueError("its own"))
    other.close()
    assert route.current() is None


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant"])
def test_route_is_left_when_the_model_raises(checkpointing, door):
    model = training_llama(checkpointing)
    with route.use(IDS):
        with pytest.raises(UserError):
            logits(model, tokens(2), [0, 1, 2], door)
        assert torch.equal(route.current().task_ids, IDS)
        assert torch.equal(model(input_ids=tokens(4)).logits, logits(model, tokens(4), IDS))
    assert route.current() is None
    with pytest.raises(UserError, match="needs task ids"):
        model(input_ids=tokens(3))


@pytest.mark.parametrize("door", DOORS)
def test_threads_route_apart(door):
    model, input_ids = adapted_llama(), tokens(4)
    expected = {name: logits(model, input_ids, ids) for name, ids in (("one", IDS), ("other", OTHER_IDS))}
    inside, found = threading.Barrier(2), {}

    def wait(*_):
        inside.wait(timeout=30)  # both threads are inside the model before either goes on

    model.model.layers[0].register_forward_hook(wait)

    def run(name, task_ids):
        found[name] = logits(model, input_ids, task_ids, door).detach()

    threads = [threading.Thread(target=run, args=arguments) for arguments in (("one", IDS), ("other", OTHER_IDS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_new_thread_has_no_route_and_says_so():
    model = adapted_llama()
    with route.use(IDS), pytest.raises(UserError, match="needs task ids"):
        in_thread(lambda: model(input_ids=tokens(4)))


def test_one_route_serves_models_with_different_tasks():
    input_ids, reversed_tasks = tokens(4), TASKS[::-1]
    models = [adapted_llama(), adapted_llama("mtl_lora", num_B=1), adapted_llama(tasks=reversed_tasks)]
    apart = [logits(model, input_ids, TASKS) for model in models]
    with route.use(TASKS):
        together = [model(input_ids=input_ids).logits for model in models]
    assert all(torch.equal(one, other) for one, other in zip(apart, together, strict=True))
    assert torch.equal(apart[2], logits(models[2], input_ids, IDS.flip(0)))
    narrow = mtl_lora.inject(tiny_llama(), adapter_config(tasks=TASKS[:2]))
    with route.use(IDS):
        models[0](input_ids=input_ids)
        with pytest.raises(UserError, match="task id 3 is outside 0 to 1"):
            narrow(input_ids=input_ids)
