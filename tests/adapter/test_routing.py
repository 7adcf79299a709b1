"""Each row gets the weights of its own task: on a real model, through every way that is known to lose the ids."""

import threading

import pytest
import torch
from reference.layers import assert_near
from reference.tiny import (
    FACTORED,
    METHODS,
    TASKS,
    adapted_llama,
    adapter_config,
    adapter_gradients,
    tiny_llama,
    tokens,
)

import mtl_lora
from mtl_lora import UserError, route
from mtl_lora.adapter import routing

IDS = torch.tensor([0, 1, 2, 3])
OTHER_IDS = torch.tensor([3, 3, 0, 1])
ROUTED = ["moelora", "mtl_lora", "mtl_lora_diagonal"]  # the methods with weights of their own for a task


def training_llama(checkpointing: bool, **changes) -> torch.nn.Module:
    """A model in training mode, which is when transformers checkpoints."""
    model = adapted_llama(**changes).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    return model


def loss_of(model, input_ids: torch.Tensor, task_ids: torch.Tensor) -> torch.Tensor:
    """A loss that is a sum over rows."""
    with route.use(task_ids):
        return model(input_ids=input_ids, use_cache=False).logits.square().sum()


def gradients_of(model, input_ids: torch.Tensor, task_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Adapter gradients of one plain step."""
    loss_of(model, input_ids, task_ids).backward()
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


# ---- rows and their tasks ----


@pytest.mark.parametrize("method", ROUTED)
def test_each_row_is_computed_as_if_alone_with_its_task(method):
    model, input_ids = adapted_llama(method), tokens(4)
    with route.use(IDS):
        mixed = model(input_ids=input_ids).logits
    for row, task_id in enumerate(IDS):
        with route.use(task_id[None]):
            assert_near(model(input_ids=input_ids[row : row + 1]).logits[0], mixed[row], 1e-12, f"row {row}")
    with route.use(OTHER_IDS):
        others = model(input_ids=input_ids).logits
    assert all((others[row] - mixed[row]).abs().max() > 0.01 for row in range(4))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_a_mixed_batch_are_the_sum_over_its_rows(method):
    model, input_ids = training_llama(False, method=method), tokens(4)
    rows = [gradients_of(model, input_ids[row : row + 1], IDS[row : row + 1]) for row in range(4)]
    assert_same_gradients(gradients_of(model, input_ids, IDS), total(*rows))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, list], ids=str)
def test_ids_may_be_any_whole_numbers(dtype):
    model, input_ids = adapted_llama(), tokens(4)
    with route.use(IDS):
        expected = model(input_ids=input_ids).logits
    with route.use(IDS.tolist() if dtype is list else IDS.to(dtype)):
        assert torch.equal(model(input_ids=input_ids).logits, expected)


# ---- ids by token ----


def test_token_ids_that_repeat_row_ids_change_nothing():
    model, input_ids = training_llama(False), tokens(4)
    expected = gradients_of(model, input_ids, IDS)
    assert_same_gradients(gradients_of(model, input_ids, IDS[:, None].expand(4, 7)), expected)


@pytest.mark.parametrize("method", ROUTED)
def test_each_token_of_a_packed_row_gets_its_own_task(method):
    model, input_ids = adapted_llama(method), tokens(4)
    packed = torch.cat([IDS[:, None].expand(4, 3), OTHER_IDS[:, None].expand(4, 4)], dim=1)
    with route.use(IDS):
        expected = model(input_ids=input_ids).logits
    with route.use(packed):
        logits = model(input_ids=input_ids).logits
    # Attention looks back only, so the first three tokens know nothing of the task that follows.
    assert_near(logits[:, :3], expected[:, :3], 1e-12, "tokens of the first task")
    assert all((logits[row, 3:] - expected[row, 3:]).abs().max() > 0.01 for row in range(4))


@pytest.mark.parametrize("method", ROUTED)
def test_token_ids_survive_checkpointing(method):
    input_ids = tokens(4)
    packed = torch.cat([IDS[:, None].expand(4, 3), OTHER_IDS[:, None].expand(4, 4)], dim=1)
    expected = gradients_of(training_llama(False, method=method), input_ids, packed)
    assert_same_gradients(gradients_of(training_llama(True, method=method), input_ids, packed), expected)


# ---- backward passes ----


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_recomputes_and_gives_the_plain_gradients(method):
    input_ids = tokens(4)
    runs = {}

    def gradients(checkpointing):
        model = training_llama(checkpointing, method=method, dropout=0.3)
        layer = next(iter(mtl_lora.adapter_layers(model).values()))
        layer.register_forward_pre_hook(lambda *_: runs.update({checkpointing: runs.get(checkpointing, 0) + 1}))
        torch.manual_seed(7)
        return gradients_of(model, input_ids, IDS)

    assert_same_gradients(gradients(True), gradients(False))
    assert runs == {False: 1, True: 2}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_two_forwards_may_precede_one_backward(method, checkpointing):
    first, second = tokens(4, seed=2), tokens(4, seed=3)
    plain = training_llama(False, method=method)
    expected = total(gradients_of(plain, first, IDS), gradients_of(plain, second, OTHER_IDS))
    model = training_llama(checkpointing, method=method)
    (loss_of(model, first, IDS) + loss_of(model, second, OTHER_IDS)).backward()
    assert_same_gradients(adapter_gradients(model), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_may_run_under_the_route_of_another_batch(checkpointing):
    input_ids = tokens(4)
    expected = gradients_of(training_llama(False), input_ids, IDS)
    model = training_llama(checkpointing)
    loss = loss_of(model, input_ids, IDS)
    with route.use(OTHER_IDS):
        loss.backward()
        assert torch.equal(routing.current().task_ids, OTHER_IDS)
    assert_same_gradients(adapter_gradients(model), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_uses_the_ids_of_its_forward_when_the_tensor_is_reused(checkpointing):
    input_ids = tokens(4)
    expected = gradients_of(training_llama(False), input_ids, IDS)
    model, buffer = training_llama(checkpointing), IDS.clone()
    loss = loss_of(model, input_ids, buffer)
    buffer.copy_(OTHER_IDS)
    loss.backward()
    assert_same_gradients(adapter_gradients(model), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_kept_graph_may_be_run_backward_twice(checkpointing):
    input_ids = tokens(4)
    expected = gradients_of(training_llama(False), input_ids, IDS)
    model = training_llama(checkpointing)
    loss = loss_of(model, input_ids, IDS)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same_gradients(adapter_gradients(model), total(expected, expected))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_over_two_micro_batches_equals_the_full_batch(checkpointing):
    input_ids = tokens(4)
    expected = gradients_of(training_llama(False), input_ids, IDS)
    model = training_llama(checkpointing)
    for rows in (slice(0, 2), slice(2, 4)):
        loss_of(model, input_ids[rows], IDS[rows]).backward()
    assert_same_gradients(adapter_gradients(model), expected)


# ---- generation ----


BEAMS = [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}]
BEAM_NAMES = ["greedy", "beams", "two of beams"]


def generate(model, input_ids: torch.Tensor, task_ids: torch.Tensor, **options) -> list[list[int]]:
    """New tokens; the tiny model has no end token, so all rows are equally long."""
    options = {"max_new_tokens": 5, "do_sample": False, **options}
    with route.use(task_ids):
        sequences = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    return sequences[:, input_ids.shape[1] :].tolist()


@pytest.mark.parametrize("beams", BEAMS, ids=BEAM_NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_mixed_batch_generates_what_each_row_does_alone_with_and_without_cache(method, beams):
    model, input_ids = adapted_llama(method), tokens(4)
    rows = [generate(model, input_ids[row : row + 1], IDS[row : row + 1], **beams) for row in range(4)]
    alone = [sequence for sequences in rows for sequence in sequences]
    assert generate(model, input_ids, IDS, **beams) == alone
    assert generate(model, input_ids, IDS, use_cache=False, **beams) == alone
    if method in ROUTED:
        assert generate(model, input_ids, OTHER_IDS, **beams) != alone


@pytest.mark.parametrize("method", METHODS)
def test_sampling_follows_the_seed(method):
    model, input_ids = adapted_llama(method), tokens(4)

    def sample(seed, **options):
        torch.manual_seed(seed)
        return generate(model, input_ids, IDS, do_sample=True, **options)

    first = sample(1)
    assert sample(1) == first
    assert sample(1, use_cache=False) == first
    assert sample(2) != first


def test_beams_leave_the_route_fit_for_the_next_forward():
    model, input_ids = adapted_llama(), tokens(4)
    with route.use(IDS):
        expected = model(input_ids=input_ids).logits
        model.generate(input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=2, num_beams=3)
        assert torch.equal(model(input_ids=input_ids).logits, expected)


@pytest.mark.parametrize("method", FACTORED)
def test_merged_model_generates_the_same_without_a_route(method):
    model, input_ids = adapted_llama(method), tokens(2)
    options = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    expected = generate(model, input_ids, torch.tensor([2, 2]), num_beams=3)
    sequences = mtl_lora.merge(model, TASKS[2]).generate(input_ids, **options)
    assert sequences[:, 7:].tolist() == expected


# ---- what is refused ----


def test_missing_ids_raise():
    model = adapted_llama()
    with pytest.raises(UserError, match=r"needs task ids: run the model inside `with mtl_lora.route.use\(task_ids\):`"):
        model(input_ids=tokens(2))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 12])
def test_batch_that_does_not_match_its_ids_raises_even_as_a_multiple(rows):
    model = adapted_llama()
    with route.use(IDS), pytest.raises(UserError, match=rf"batch of shape \({rows}, 7\) does not match .* \(4,\)"):
        model(input_ids=tokens(rows))


@pytest.mark.parametrize("shape", [(4, 6), (4, 14), (4, 1), (2, 7), (7, 4)], ids=str)
def test_token_ids_that_do_not_match_raise(shape):
    model = adapted_llama()
    with route.use(torch.zeros(shape, dtype=torch.long)), pytest.raises(UserError, match=r"\(4, 7\) does not match"):
        model(input_ids=tokens(4))


@pytest.mark.parametrize("wrong", [4, 99, -1, -100])
def test_id_out_of_range_names_itself_and_the_tasks(wrong):
    model = adapted_llama()
    message = f"task id {wrong} is outside 0 to 3; the adapter's tasks are 0 tides, 1 maps, 2 birds, 3 rivers"
    for task_ids in (torch.tensor([0, wrong]), torch.tensor([[0] * 7, [0] * 6 + [wrong]])):
        with route.use(task_ids), pytest.raises(UserError) as error:
            model(input_ids=tokens(2))
        assert str(error.value) == message


@pytest.mark.parametrize(
    "task_ids",
    [
        torch.tensor([0.0, 1.0]),
        torch.tensor([True, False]),
        torch.tensor([0, 1], dtype=torch.complex64),
        torch.tensor(1),
        torch.zeros(2, 2, 2, dtype=torch.long),
        torch.tensor([]),
        ["tides", "maps"],
        [[0], [0, 1]],
        None,
    ],
    ids=["float", "bool", "complex", "scalar", "three axes", "empty", "names", "ragged", "none"],
)
def test_ids_that_are_no_whole_numbers_by_row_or_token_raise(task_ids):
    with pytest.raises(UserError, match="task_ids must be"), route.use(task_ids):
        pass
    assert routing.current() is None


# ---- where a route holds ----


def test_inner_route_ends_with_its_block():
    with route.use(IDS):
        with route.use(OTHER_IDS):
            assert torch.equal(routing.current().task_ids, OTHER_IDS)
        assert torch.equal(routing.current().task_ids, IDS)
    assert routing.current() is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_route_is_left_when_the_model_raises(checkpointing):
    model = training_llama(checkpointing)
    with route.use(IDS):
        with pytest.raises(UserError), route.use(torch.tensor([0, 99])):
            model(input_ids=tokens(2))
        assert torch.equal(routing.current().task_ids, IDS)
    assert routing.current() is None


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ROUTED])
def test_checkpointed_forward_without_a_route_works_for_methods_that_need_none(method):
    input_ids = tokens(4)
    losses = []
    for checkpointing in (False, True):
        model = training_llama(checkpointing, method=method)
        loss = model(input_ids=input_ids, use_cache=False).logits.square().sum()
        loss.backward()
        losses.append(adapter_gradients(model))
    for name, gradient in losses[0].items():
        assert_near(losses[1][name], gradient, 1e-10, name)


def test_threads_route_apart():
    model, input_ids = adapted_llama(), tokens(4)
    with route.use(IDS):
        expected = model(input_ids=input_ids).logits
    with route.use(OTHER_IDS):
        expected_other = model(input_ids=input_ids).logits
    entered, found = threading.Barrier(2), {}

    def run(name, task_ids):
        with route.use(task_ids):
            entered.wait(timeout=30)  # both routes are in force before either model runs
            found[name] = model(input_ids=input_ids).logits.detach()

    threads = [threading.Thread(target=run, args=arguments) for arguments in (("one", IDS), ("other", OTHER_IDS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert torch.equal(found["one"], expected)
    assert torch.equal(found["other"], expected_other)


def test_new_thread_has_no_route_and_says_so():
    model, errors = adapted_llama(), []

    def run():
        try:
            model(input_ids=tokens(4))
        except UserError as error:
            errors.append(str(error))

    with route.use(IDS):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(timeout=30)
    assert len(errors) == 1
    assert "needs task ids" in errors[0]


def test_one_route_serves_two_models():
    input_ids = tokens(4)
    models = [adapted_llama(), adapted_llama("mtl_lora", num_B=1)]
    apart = []
    for model in models:
        with route.use(IDS):
            apart.append(model(input_ids=input_ids).logits)
    with route.use(IDS):
        together = [model(input_ids=input_ids).logits for model in models]
    assert all(torch.equal(one, other) for one, other in zip(apart, together, strict=True))


def test_models_with_different_tasks_check_ids_against_their_own():
    wide = adapted_llama()
    narrow = mtl_lora.inject(tiny_llama(), adapter_config(tasks=TASKS[:2]))
    with route.use(IDS):
        wide(input_ids=tokens(4))
        with pytest.raises(UserError, match="task id 3 is outside 0 to 1"):
            narrow(input_ids=tokens(4))
