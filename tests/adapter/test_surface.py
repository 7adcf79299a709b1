"""What a model is while it carries an adapter, and after: copies, wrappers, the base beneath, modules saved whole."""

import contextlib
import copy
import dataclasses
import pickle
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from reference.architectures import OTHERS
from reference.layers import assert_near
from reference.tiny import (
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
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PhimoeConfig,
    PhimoeForCausalLM,
)

import mtl_lora
from mtl_lora import UserError, route
from mtl_lora.adapter.checkpoint import WEIGHTS_NAME, adapter_state, adapter_tensors, read_config
from mtl_lora.adapter.inject import trainable_parameters
from mtl_lora.adapter.targets import fused_experts
from mtl_lora.base_model import BaseModel


def logits(model, **options) -> torch.Tensor:
    """Of four rows with four tasks."""
    with torch.no_grad():
        return model(input_ids=tokens(4), task_ids=TASKS, **options).logits


def generated(model, **options) -> torch.Tensor:
    """Greedy, with beams, which expand the rows."""
    prompt = tokens(2)
    options |= {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    return model.generate(prompt, **options)


def pickled(model: nn.Module) -> nn.Module:
    """A copy through pickle."""
    return pickle.loads(pickle.dumps(model))  # noqa: S301


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_ids": [["maps"] * 7] * 2}, "one for each row"),
        ({"task_ids": torch.zeros(2, 7, dtype=torch.long)}, "one for each row"),
        ({"task_ids": [0, 1], "attention_mask": torch.ones(2, 7).tril(5)}, "pad on the left"),
    ],
)
def test_generate_refuses_ids_by_token_and_padding_on_the_right(options, message):
    with pytest.raises(UserError, match=message):
        adapted_llama().generate(tokens(2), **options)
    if options.keys() == {"task_ids"}:
        with pytest.raises(UserError, match=message), route.use(options["task_ids"]):
            adapted_llama().generate(tokens(2))


# ---- copies, and what is left when the adapter is gone ----


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_is_a_model_of_its_own(duplicate):
    model = adapted_llama(modules_to_save=["model.norm"])
    expected, sequences = logits(model), generated(model, task_ids=["maps", "birds"])
    twin = duplicate(model)
    randomise(model, seed=5)
    mtl_lora.unload(model)
    assert torch.equal(logits(twin), expected)
    assert torch.equal(generated(twin, task_ids=["maps", "birds"]), sequences)
    with mtl_lora.disabled(twin):
        assert torch.equal(logits(twin), tiny_llama()(input_ids=tokens(4)).logits)
    mtl_lora.unload(twin)
    assert not mtl_lora.adapter_layers(twin)


def facts(model: nn.Module) -> dict:
    """Everything about a model that an adapter could leave a trace in, except its weights."""
    return {
        "modules": [
            (
                name,
                type(module),
                sorted(vars(module)),
                {key for key, value in vars(module).items() if "hook" in key and value},
            )
            for name, module in model.named_modules()
        ],
        "gradients": {name: weight.requires_grad for name, weight in model.named_parameters()},
        "dtypes": {name: tensor.dtype for name, tensor in model.state_dict().items()},
        "config": model.config.to_dict(),
        "functions": {type(vars(module).get("_gradient_checkpointing_func")) for module in model.modules()},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "taking_off", [mtl_lora.unload, lambda model: mtl_lora.merge(model, "maps")], ids=["unload", "merge"]
)
def test_nothing_is_left_of_an_adapter_that_was_taken_off(taking_off, dtype):
    def base():
        model = tiny_llama(dtype).train()
        for frozen in (model.model.embed_tokens, model.model.layers[1].post_attention_layernorm):
            frozen.requires_grad_(False)
        model.gradient_checkpointing_enable()
        for hook in model._require_grads_hooks:  # transformers' own, a closure that does not pickle
            hook.remove()
        return model

    model, expected = base(), facts(base())
    mtl_lora.inject(model, adapter_config(modules_to_save=["model.norm", "*.post_attention_layernorm.weight"]))
    randomise(model)
    model(input_ids=tokens(4), task_ids=TASKS, use_cache=False).logits.sum().backward()
    generated(model.eval(), task_ids=["maps", "birds"])
    assert taking_off(model) is model
    found = facts(model.train())
    assert found == expected
    model.zero_grad()
    twin = pickled(model.eval())
    assert torch.equal(generated(twin), generated(model))
    with pytest.raises(TypeError, match="task_ids"):
        nn.Linear.__call__(model.lm_head, torch.zeros(16), task_ids=TASKS)
    if taking_off is mtl_lora.unload:
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, base().state_dict()[name]), name


def test_a_merged_model_is_not_the_base_that_it_was_loaded_from():
    names = []
    for taking_off in (mtl_lora.merge, mtl_lora.unload):
        model = adapted_llama("lora")
        model.config._name_or_path = "some/model"
        names.append(taking_off(model).config._name_or_path)
    assert names == ["", "some/model"]


def test_there_must_be_an_adapter_to_take_off():
    for take_off in (mtl_lora.unload, mtl_lora.merge):
        with pytest.raises(UserError, match="carries no adapter"):
            take_off(tiny_llama())


@pytest.mark.parametrize("method", METHODS)
def test_a_disabled_adapter_is_the_base_bit_for_bit(method):
    model = adapted_llama(method, torch.float32, modules_to_save=["norm"])
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    expected, base = logits(model), tiny_llama(torch.float32)(input_ids=tokens(4)).logits
    assert not torch.equal(expected, base)
    for _ in range(2):
        with pytest.raises(KeyError), mtl_lora.disabled(model):
            assert torch.equal(logits(model), base)
            with mtl_lora.disabled(model), route.use(TASKS):
                assert torch.equal(model(input_ids=tokens(4)).logits, base)
            assert torch.equal(model(input_ids=tokens(4)).logits, base)
            raise KeyError
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("method", ["mtl_lora", "none"])
def test_a_disabled_adapter_is_not_saved_as_if_it_were_there(method, tmp_path):
    model = adapted_llama(method, modules_to_save=["norm"])
    with mtl_lora.disabled(model):
        with mtl_lora.disabled(model):
            pass
        for refused in (lambda: mtl_lora.save(model, tmp_path / "adapter"), lambda: mtl_lora.unload(model)):
            with pytest.raises(UserError, match=r"off inside mtl_lora\.disabled"):
                refused()
    assert not (tmp_path / "adapter").exists()
    mtl_lora.save(model, tmp_path / "adapter")


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_built_in_inference_mode_computes_the_same(method):
    expected = logits(adapted_llama(method))
    with torch.inference_mode():
        assert torch.equal(adapted_llama(method)(input_ids=tokens(4), task_ids=TASKS).logits, expected)


@pytest.mark.parametrize(
    ("changes", "name"),
    [({}, "the target model.layers.0.self_attn.q_proj"), ({"modules_to_save": ["norm"]}, "model.norm.weight")],
)
def test_what_accelerate_has_offloaded_gets_no_adapter_and_no_copy_for_neither_has_values(changes, name):
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(tiny_llama(torch.float32), execution_device="cpu")
    with pytest.raises(UserError, match=rf"{name} is not in memory, because accelerate has offloaded it"):
        mtl_lora.inject(model, adapter_config(**changes))


def test_what_needs_values_is_refused_once_they_are_offloaded_and_the_model_stays(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = adapted_llama(modules_to_save=["norm"])
    expected = logits(model)
    accelerate.cpu_offload(model, execution_device="cpu")

    def turn_off():
        with mtl_lora.disabled(model):
            pass

    refused = [lambda: mtl_lora.merge(model, 0), lambda: mtl_lora.unload(model), lambda: mtl_lora.save(model, tmp_path)]
    for needs_values in (*refused, turn_off):
        with pytest.raises(UserError, match="is not in memory, because accelerate has offloaded it"):
            needs_values()
    assert torch.equal(logits(model), expected) and not any(tmp_path.iterdir())
    model = accelerate.cpu_offload(adapted_llama("dora"), execution_device="cpu")
    with pytest.raises(UserError, match="a weight whose norm DoRA needs is not in memory"):
        logits(model)


def test_a_weight_that_is_computed_from_others_takes_no_adapter_into_it():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.utils.parametrizations.weight_norm(model[0])
    mtl_lora.inject(model, adapter_config(target_modules=["0"]))
    with pytest.raises(UserError, match="the weight of 0 is computed from others"):
        mtl_lora.merge(model, 0)
    assert mtl_lora.adapter_layers(model)


@pytest.mark.parametrize("method", METHODS)
def test_a_state_dict_of_the_whole_model_gives_the_same_model(method):
    model, other = adapted_llama(method), mtl_lora.inject(tiny_llama(seed=5), adapter_config(method))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_is_in_the_mode_of_its_model(training):
    model = mtl_lora.inject(tiny_llama().train(training), adapter_config(dropout=0.5))
    assert {module.training for module in model.modules()} == {training}
    assert torch.equal(logits(randomise(model)), logits(model)) != training


@pytest.mark.parametrize("method", ["none", "mtl_lora"])
def test_a_module_around_a_model_is_not_disabled_in_its_place(method):
    around = nn.Sequential(adapted_llama(method, modules_to_save=["norm"]))
    with pytest.raises(UserError, match="module around it"), mtl_lora.disabled(around):
        pass


def test_the_mode_that_is_set_while_an_adapter_is_disabled_holds_afterwards():
    model = adapted_llama(dropout=0.5).train()
    with mtl_lora.disabled(model):
        model.eval()
    assert torch.equal(logits(model), logits(model))


# ---- silence is impossible ----


class ReadsWeight(nn.Module):
    """Uses the weight of a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.calls = ("out",)

    def forward(self, x):
        x = F.linear(x, self.qkv.weight, self.qkv.bias)
        for name in self.calls:
            x = getattr(self, name)(x)
        return x


def test_a_layer_that_is_never_called_is_named_by_the_first_forward_that_trains():
    model, x = ReadsWeight(), torch.randn(2, 8)
    mtl_lora.inject(model, adapter_config(target_modules=["qkv", "out"]))
    model.eval()(x, task_ids=[0, 1])
    with torch.no_grad():
        model.train()(x, task_ids=[0, 1])
    for _ in range(2):
        with pytest.raises(UserError, match=r"the adapter layer qkv of 2 was not called .* allow_unused=True"):
            model(x, task_ids=[0, 1])
    assert not any(layer._forward_pre_hooks for layer in mtl_lora.adapter_layers(model).values())
    with mtl_lora.disabled(model):  # in which no layer can be called
        model(x, task_ids=[0, 1])
    with pytest.raises(UserError, match="was not called"):
        model(x, task_ids=[0, 1])
    model.calls = ("qkv", "out")
    model(x, task_ids=[0, 1])
    model.calls = ()  # looked at once
    model(x, task_ids=[0, 1])


def test_layers_that_other_batches_reach_may_be_allowed(tmp_path):
    model = mtl_lora.inject(ReadsWeight(), adapter_config(target_modules=["qkv", "out"]), allow_unused=True)
    model(torch.randn(2, 8), task_ids=[0, 1])
    mtl_lora.save(model, tmp_path)
    mtl_lora.load(ReadsWeight(), tmp_path, allow_unused=True)(torch.randn(2, 8), task_ids=[0, 1])
    with pytest.raises(UserError, match=r"dtype is an option of mtl_lora\.load\(folder\)"):
        mtl_lora.load(ReadsWeight(), tmp_path, dtype="bf16")


class Mixture(nn.Module):
    """A router would choose: here the first of two experts gets everything."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, x):
        return self.experts[0]["up"](x)


def test_an_expert_that_gets_no_token_is_no_layer_that_is_never_called():
    model = mtl_lora.inject(Mixture(), adapter_config("lora", target_modules=["up"])).train()
    assert model(torch.randn(2, 8)).shape == (2, 8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_are_seen_through_checkpointing(reentrant):
    model = adapted_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(input_ids=tokens(4), task_ids=TASKS, use_cache=False)
    assert not model.mtl_lora_injection.unchecked


def shared() -> nn.ModuleDict:
    """One linear layer under two names, and one of its own."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    return nn.ModuleDict(
        {"enc": nn.ModuleDict({"proj": layer}), "dec": nn.ModuleDict({"proj": layer}), "out": nn.Linear(8, 8)}
    )


@pytest.mark.parametrize("target", ["proj", "dec.proj", "enc.proj"])
def test_a_layer_under_two_names_becomes_one_adapter_layer_under_both(target, tmp_path):
    model = randomise(mtl_lora.inject(shared(), adapter_config(target_modules=[target])))
    assert list(mtl_lora.adapter_layers(model)) == ["enc.proj"]
    assert model["enc"]["proj"] is model["dec"]["proj"]
    mtl_lora.save(model, tmp_path)
    loaded = mtl_lora.load(shared(), tmp_path)
    with route.use([0, 1]):
        assert torch.equal(loaded["dec"]["proj"](torch.ones(2, 8)), model["enc"]["proj"](torch.ones(2, 8)))
    base = mtl_lora.unload(model)
    assert base["enc"]["proj"] is base["dec"]["proj"]
    assert type(base["dec"]["proj"]) is nn.Linear


# ---- wrapped models ----


def compiled_block(model):
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


def checkpointed_block(model):
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    return model


WRAPPED = [lambda model: torch.compile(model, backend="eager"), nn.DataParallel, compiled_block, checkpointed_block]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("wrap", WRAPPED, ids=["compiled", "data parallel", "compiled block", "checkpointed block"])
def test_a_wrapped_model_saves_names_that_load(wrap, when, tmp_path):
    if when == "before":
        model = wrap(tiny_llama())
        assert mtl_lora.inject(model, adapter_config(modules_to_save=["norm"])) is model
        randomise(model)
    else:
        model = wrap(adapted_llama(modules_to_save=["norm"]))
    mtl_lora.save(model, tmp_path)
    loaded = mtl_lora.load(tiny_llama(), tmp_path)
    assert adapter_state(loaded).keys() == adapter_state(model).keys() == load_file(tmp_path / WEIGHTS_NAME).keys()
    assert torch.equal(logits(loaded), logits(adapted_llama(modules_to_save=["norm"])))
    again = adapter_state(mtl_lora.load(wrap(tiny_llama()), tmp_path))
    assert all(torch.equal(again[name], tensor) for name, tensor in adapter_state(loaded).items())
    mtl_lora.unload(model)
    with pytest.raises(UserError, match="carries no adapter"):
        mtl_lora.save(model, tmp_path)


def test_a_sharded_model_is_refused(tmp_path):
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(adapted_llama(), use_orig_params=True, device_id=torch.device("cpu"))
        second = adapted_llama()
        fully_shard(second, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        for each in (model, second):
            with pytest.raises(UserError, match="FSDP has sharded"):
                mtl_lora.save(each, tmp_path)
        with pytest.raises(UserError, match="divided among processes"):
            mtl_lora.merge(second, TASKS[0])
        assert mtl_lora.adapter_layers(second)
    finally:
        destroy_process_group()
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_refused_where_processes_would_not_share_its_gradients():
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        sharded = tiny_llama()
        fully_shard(sharded.model.layers[0], mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        for model in (nn.parallel.DistributedDataParallel(tiny_llama()), sharded):
            with pytest.raises(UserError, match="already prepared for several processes"):
                mtl_lora.inject(model, adapter_config())
            assert not mtl_lora.adapter_layers(model)
    finally:
        destroy_process_group()


def test_an_averaged_model_is_saved_and_one_inside_another_module_is_not_turned_off(tmp_path):
    model = adapted_llama()
    mtl_lora.save(torch.optim.swa_utils.AveragedModel(model), tmp_path)
    assert torch.equal(logits(mtl_lora.load(tiny_llama(), tmp_path)), logits(model))
    with pytest.raises(UserError, match="no part of it or module around it"), mtl_lora.disabled(nn.ModuleList([model])):
        pass


def test_an_adapter_layer_that_was_replaced_is_missed_when_saving(tmp_path):
    model = adapted_llama()
    model.model.layers[1].self_attn.q_proj = nn.Linear(16, 16)
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.q_proj was replaced"):
        mtl_lora.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_what_watches_a_base_layer_sees_what_it_would_see_without_the_adapter(method):
    def watched(model, seen: list):
        layer = model.model.layers[0].self_attn.q_proj
        layer.register_forward_hook(lambda _, inputs, output: seen.extend([*inputs, output]))
        return model

    expected, found, everywhere = [], [], []
    watched(tiny_llama(), expected)(input_ids=tokens(4))
    model = randomise(mtl_lora.inject(watched(tiny_llama(), found), adapter_config(method)))
    logits(model)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    layer = model.model.layers[0].self_attn.k_proj.base_layer
    keep = nn.modules.module.register_module_forward_hook(
        lambda module, _, output: everywhere.append(output) if module is layer else None
    )
    try:
        logits(model)
    finally:
        keep.remove()
    base, kept = tiny_llama(), []
    base.model.layers[0].self_attn.k_proj.register_forward_hook(lambda _, __, output: kept.append(output))
    base(input_ids=tokens(4))
    assert torch.equal(everywhere[0].view_as(kept[0]), kept[0])


def test_only_one_of_forwards_at_the_same_time_looks_for_unused_layers():
    model, inside = adapted_llama().train(), threading.Barrier(2)
    found = []

    def meet(*_):
        inside.wait(timeout=30)

    def step():
        try:
            model(input_ids=tokens(4), task_ids=TASKS, use_cache=False)
        except UserError as error:
            found.append(error)

    model.model.embed_tokens.register_forward_hook(meet)

    threads = [threading.Thread(target=step) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not found and not model.mtl_lora_injection.unchecked
    assert not any(layer._forward_pre_hooks for layer in mtl_lora.adapter_layers(model).values())


def test_a_model_whose_first_training_forward_was_interrupted_can_be_copied():
    def interrupt(*_):
        raise KeyboardInterrupt

    model = adapted_llama().train()
    handle = model.lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=tokens(4), task_ids=TASKS)
    handle.remove()
    assert torch.equal(logits(copy.deepcopy(model).eval()), logits(model.eval()))


# ---- modules saved whole ----


def head_and_norm() -> nn.Module:
    """Linear layers, a batch norm with buffers, and a part whose names hold dots."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "body": nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)),
            "head": nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
        }
    )


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = head_and_norm()
        self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return self.parts["head"](self.parts["body"](x) + self.shift)


def test_only_a_frozen_norm_that_is_called_is_refused():
    """A tower that a batch does not reach may hold batch norms; a refused forward changes no average."""

    class Tower(Network):
        def __init__(self):
            super().__init__()
            self.tower = nn.BatchNorm1d(8)

        def forward(self, x, image=None):
            return super().forward(x if image is None else x + self.tower(image))

    network = Tower()
    model = mtl_lora.inject(network, adapter_config(target_modules=["body.0"], tasks=["one"])).train()
    with pytest.raises(UserError, match=r"the BatchNorm1d parts.body.1 is frozen"):
        model(torch.randn(6, 8), task_ids=[0] * 6)
    assert not model.parts["body"][1].running_mean.any()
    model.parts["body"][1].eval()
    model(torch.randn(6, 8), task_ids=[0] * 6)
    image = torch.randn(6, 8)
    with pytest.raises(UserError, match="the BatchNorm1d tower is frozen"):
        model(torch.randn(6, 8), image, task_ids=[0] * 6)
    assert not model.tower.running_mean.any()
    model.eval()(torch.randn(6, 8), image, task_ids=[0] * 6)
    copied = copy.deepcopy(model).train()
    copied.parts["body"][1].eval()
    with pytest.raises(UserError, match="the BatchNorm1d tower is frozen"):
        copied(torch.randn(6, 8), image, task_ids=[0] * 6)
    with pytest.raises(UserError, match=r"the BatchNorm1d parts.body.1 is frozen"):
        copied.train()(torch.randn(6, 8), task_ids=[0] * 6)
    mtl_lora.unload(copied).train()(torch.randn(6, 8), image)


SAVED = {
    "a name": (["parts.head"], {"parts.head.0.weight", "parts.head.0.bias", "parts.head.1.weight", "parts.head.1.bias",
                                "parts.head.2.weight", "parts.head.2.bias"}),
    "an ending": (["head.1"], {"parts.head.1.weight", "parts.head.1.bias"}),
    "buffers": (["body.1"], {f"parts.body.1.{key}" for key in
                             ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}),
    "a pattern": (["*.bias"], {f"parts.{name}.bias" for name in
                               ("body.0", "body.1", "body.2", "head.0", "head.1", "head.2")}),
    "a parameter": (["shift"], {"shift"}),
    "two": (["head.2", "*.head.*.bias"], {"parts.head.2.weight"} | {f"parts.head.{index}.bias" for index in range(3)}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entry", SAVED)
def test_modules_are_trained_and_saved_whole_beside_the_adapter(entry, dtype, tmp_path):
    entries, names = SAVED[entry]
    x, base = torch.randn(6, 8).to(dtype), Network().to(dtype)
    config = adapter_config(target_modules=["body.0"], tasks=["one"], modules_to_save=entries)
    expected, trained_base = base.eval()(x), copy.deepcopy(base).train()(x)
    model = mtl_lora.inject(copy.deepcopy(base), config)
    ids = [0] * 6
    assert torch.equal(model(x, task_ids=ids), expected)
    state = adapter_state(model)
    assert {name for name in state if "lora" not in name} == names
    masters = torch.float64 if dtype == torch.float64 else torch.float32
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(model.get_parameter(name).dtype == masters for name in trainable)
    assert {name.replace("0.base_layer.", "0.") for name in trainable if "lora" not in name} == {
        name for name in names if "running" not in name and "num_" not in name
    }

    optimiser = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    if "buffers" not in entry:
        with pytest.raises(UserError, match=r"the BatchNorm1d parts.body.1 is frozen"):
            model.train()(x, task_ids=ids)
        trained_base = expected
        model.parts["body"][1].eval()
    else:
        model.train()
    y = model(x, task_ids=ids)
    assert torch.equal(y, trained_base)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    gradients = adapter_gradients(model)
    assert all(gradient.any() and gradient.dtype == masters for name, gradient in gradients.items() if "lora_B" in name)
    for name, weight in model.named_parameters():
        weight.grad = gradients.get(name)
    optimiser.step()
    model.eval()
    after = model(x, task_ids=ids)
    assert not torch.equal(after, expected)
    mtl_lora.save(model, tmp_path)
    loaded = mtl_lora.load(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(loaded(x, task_ids=ids), after)
    for name, tensor in adapter_state(loaded).items():
        assert torch.equal(tensor, adapter_state(model)[name]), name

    with mtl_lora.disabled(model):
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x, task_ids=ids), after)
    merged, unloaded = mtl_lora.merge(loaded, "one"), mtl_lora.unload(model)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    assert_near(merged(x), after, tolerance, "merged")
    assert all(tensor.dtype == base.state_dict()[name].dtype for name, tensor in merged.state_dict().items())
    for name, tensor in unloaded.state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name]), name


def test_a_bfloat16_model_with_saved_modules_checkpoints_to_the_same_gradients():
    def gradients(checkpointing=False):
        model = mtl_lora.inject(
            tiny_llama(torch.bfloat16).train(),
            adapter_config(modules_to_save=["model.norm", "*layernorm*", "layers.1.mlp.gate_proj"]),
        )
        randomise(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=tokens(4), task_ids=TASKS, use_cache=False).logits.float().square().mean().backward()
        return adapter_gradients(model)

    expected = gradients()
    assert sum("lora" not in name for name in expected) == 2 * 2 + 1 + 1
    for name, gradient in gradients(checkpointing=True).items():
        assert torch.equal(gradient, expected[name]), name


def test_tied_weights_stay_tied():
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    mtl_lora.inject(model, adapter_config(modules_to_save=["lm_head"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad
    assert [name for name in adapter_state(model) if "lora" not in name] == ["lm_head.weight"]
    mtl_lora.unload(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_frozen_instance_norm_with_running_averages_is_refused_in_training_mode():
    base = nn.Sequential(nn.Linear(8, 8), nn.Unflatten(1, (4, 2)), nn.InstanceNorm1d(4, track_running_stats=True))
    model = mtl_lora.inject(base, adapter_config(target_modules=["0"], tasks=["one"]))
    with pytest.raises(UserError, match="the InstanceNorm1d 2 is frozen"):
        model.train()(torch.ones(3, 8), task_ids=[0] * 3)
    model.eval()(torch.ones(3, 8), task_ids=[0] * 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"modules_to_save": ["nrom"]},
            r"modules_to_save: no module with weights is named 'nrom' \(did you mean 'norm'",
        ),
        ({"modules_to_save": ["rotary_emb"]}, "no module with weights is named 'rotary_emb'"),
        ({"modules_to_save": ["layers.0.self_attn"]}, "q_proj is both in target_modules and in modules_to_save"),
        ({"modules_to_save": ["*.weight"]}, "is both in target_modules and in modules_to_save"),
    ],
)
def test_modules_that_cannot_be_saved_are_refused_and_nothing_changes(changes, message):
    model = tiny_llama()
    expected = facts(model)
    with pytest.raises(UserError, match=message):
        mtl_lora.inject(model, adapter_config(**changes))
    assert facts(model) == expected


@pytest.mark.parametrize("method", METHODS)
def test_a_bias_that_is_saved_whole_keeps_the_dtype_of_the_base(method):
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)).bfloat16()
    x = torch.randn(2, 8).bfloat16()
    expected = base(x)
    model = mtl_lora.inject(base, adapter_config(method, target_modules=["0"], modules_to_save=["*.bias"]))
    assert torch.equal(model(x, task_ids=[0, 1]), expected)


class SlowHead(nn.Linear):
    """Reads its weight late; lets the thread called "first" through first."""

    def forward(self, x):
        time.sleep(0.05 if threading.current_thread().name == "first" else 0.2)
        return super().forward(x)


@pytest.mark.slow(1)
def test_threads_that_share_modules_saved_whole_do_not_see_each_others_casts():
    model = nn.Sequential(OrderedDict(body=nn.Linear(8, 8), head=SlowHead(8, 3))).bfloat16().eval()
    mtl_lora.inject(model, adapter_config(target_modules=["body"], modules_to_save=["head"]))
    x, found = torch.randn(2, 8).bfloat16(), []
    expected = model(x, task_ids=[0, 1])

    def answer(delay):
        time.sleep(delay)
        found.append(model(x, task_ids=[0, 1]))

    threads = [
        threading.Thread(target=answer, args=(delay,), name=name) for name, delay in (("first", 0), ("second", 0.02))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and all(torch.equal(each, expected) for each in found)


@pytest.mark.parametrize("taking_off", [mtl_lora.unload, mtl_lora.merge, mtl_lora.disabled])
def test_a_model_that_was_cast_after_injection_is_of_one_dtype_without_the_adapter(taking_off):
    model = adapted_llama("lora", torch.float32, modules_to_save=["lm_head"]).to(torch.bfloat16)
    with taking_off(model) if taking_off is mtl_lora.disabled else contextlib.nullcontext(taking_off(model)):
        assert model(input_ids=tokens(2)).logits.dtype == torch.bfloat16


def test_modules_saved_whole_compute_in_the_dtype_that_the_model_was_cast_to():
    model = adapted_llama("lora", torch.bfloat16, modules_to_save=["lm_head"]).float()
    expected = logits(model)
    assert expected.dtype == torch.float32
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert {parameter.dtype for parameter in mtl_lora.merge(model, TASKS[0]).parameters()} == {torch.float32}
    assert model(input_ids=tokens(2)).logits.dtype == torch.float32


@pytest.mark.parametrize("whole", ["lm_head", "embed_tokens"])
def test_a_module_saved_whole_that_was_resized_is_not_saved_as_it_was(tmp_path, whole):
    model = adapted_llama("lora", torch.float32, modules_to_save=[whole])
    model.resize_token_embeddings(model.config.vocab_size + 8)
    with pytest.raises(UserError, match=rf"{whole}\.weight .*before"):
        mtl_lora.save(model, tmp_path / "adapter")


def test_a_quantised_module_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"1\.weight is quantised and cannot be trained"):
        mtl_lora.inject(model, adapter_config(target_modules=["0"], modules_to_save=["1"]))


def test_all_linear_leaves_out_what_is_saved_whole():
    model = mtl_lora.inject(tiny_llama(), adapter_config(target_modules="all-linear", modules_to_save=["layers.1.mlp"]))
    assert len(mtl_lora.adapter_layers(model)) == 7 + 4


def test_a_classifier_is_trained_beside_the_adapter(tmp_path):
    (bert,) = (each for each in OTHERS if each.name == "Bert")
    model = mtl_lora.inject(bert.build(), adapter_config(target_modules=["query"], modules_to_save=["classifier"]))
    randomise(model)
    with torch.no_grad():
        model.classifier.weight.normal_()
    mtl_lora.save(model, tmp_path)
    loaded = mtl_lora.load(bert.build(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    state = load_file(tmp_path / WEIGHTS_NAME)
    assert torch.equal(state["classifier.weight"], model.classifier.weight)


def test_a_trainable_weight_that_is_not_saved_is_warned_of(tmp_path):
    (bert,) = (each for each in OTHERS if each.name == "Bert")
    model = mtl_lora.inject(bert.build(), adapter_config(target_modules="all-linear"))
    model.classifier.bias.requires_grad_(True)
    with pytest.warns(UserWarning, match="classifier.base_layer.bias can be trained but is not saved"):
        mtl_lora.save(model, tmp_path)


@pytest.mark.parametrize("targets", [["query"], "all-linear"], ids=str)
def test_a_frozen_head_that_no_file_holds_is_warned_of(tmp_path, targets):
    (bert,) = (each for each in OTHERS if each.name == "Bert")
    bert.build().bert.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="classifier.weight, classifier.bias: not as in the base model's files"):
        mtl_lora.inject(BertForSequenceClassification.from_pretrained(tmp_path), adapter_config(target_modules=targets))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = BertForSequenceClassification.from_pretrained(tmp_path)
        model = mtl_lora.inject(model, adapter_config(target_modules=["query"], modules_to_save=["classifier"]))
        mtl_lora.unload(model).save_pretrained(tmp_path / "whole")
        model = BertForSequenceClassification.from_pretrained(tmp_path / "whole")
        mtl_lora.inject(model, adapter_config(target_modules=["query"]))
        fresh = mtl_lora.inject(bert.build(), adapter_config(target_modules=["query"]))  # all of it is random
        mtl_lora.inject(mtl_lora.merge(fresh, TASKS[0]), adapter_config(target_modules=["query"]))


def test_added_tokens_that_are_not_saved_are_warned_of(tmp_path):
    def resized(**changes) -> nn.Module:
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
        model.resize_token_embeddings(VOCABULARY + 3)
        return randomise(mtl_lora.inject(model, adapter_config(**changes)))

    tiny_llama().save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match=r"lm_head.weight: not as in .* added tokens"):
        model = resized()
    with pytest.warns(UserWarning, match=r"\.weight is not what the files .* added tokens .*modules_to_save"):
        mtl_lora.save(model, tmp_path / "lost")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = resized(modules_to_save=["embed_tokens", "lm_head"])
        mtl_lora.save(model, tmp_path / "kept")
        again = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
        again.resize_token_embeddings(VOCABULARY + 3)
        again = mtl_lora.load(again, tmp_path / "kept")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_that_was_cast_is_stored_in_float32_and_loads(tmp_path, dtype):
    model = adapted_llama(dtype=torch.float32).to(dtype)
    mtl_lora.save(model, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS_NAME).values()} == {torch.float32}
    loaded = mtl_lora.load(tiny_llama(torch.float32), tmp_path)
    for left, right in zip(adapter_tensors(loaded).values(), adapter_tensors(model).values(), strict=True):
        assert torch.equal(left, right.float())


# ---- the base model of a checkpoint ----


def test_a_checkpoint_names_its_base_and_is_loaded_alone(tiny_base, tmp_path, monkeypatch):
    from mtl_lora.export.peft import export_peft

    monkeypatch.chdir(f"{tiny_base}/..")
    relative = tiny_base.rpartition("/")[2]
    model = BaseModel(relative).load("fp32")
    config = adapter_config(target_modules=["q_proj"])
    mtl_lora.save(randomise(mtl_lora.inject(model, config)), tmp_path / "adapter")
    provenance = read_config(tmp_path / "adapter").provenance_config
    assert provenance.base_model == tiny_base
    assert provenance.base_fingerprint == BaseModel(tiny_base).fingerprint()
    assert (provenance.system, provenance.base_class) == ("language", "LlamaForCausalLM")
    monkeypatch.chdir(tmp_path)
    loaded = mtl_lora.load(tmp_path / "adapter", dtype="fp32")
    assert torch.equal(logits(loaded), logits(model))
    exported = export_peft(tmp_path / "adapter", tmp_path / "peft")
    assert exported


def test_a_base_that_was_trained_in_4_bits_is_loaded_so(tiny_base, tmp_path, monkeypatch):
    asked, quantised = [], {"load_in_4bit": True}
    monkeypatch.setattr(BaseModel, "load_as", lambda base, *words, **options: asked.append(options) or tiny_llama())
    for settings, flags in (({}, {}), (quantised, {}), (quantised, {"load_in_4bit": False})):
        model = mtl_lora.inject(tiny_llama(), adapter_config())
        mtl_lora.save(model, tmp_path, mtl_lora.Provenance(tiny_base, train_settings=settings))
        mtl_lora.load(tmp_path, **flags)
    assert [options["load_in_4bit"] for options in asked] == [False, True, False]


def test_a_base_in_memory_that_its_files_do_not_hold_is_warned_of(tiny_base, tmp_path):
    model = BaseModel(tiny_base).load("fp32")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(1)
    mtl_lora.inject(model, adapter_config(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.warns(UserWarning, match="q_proj.weight is not what the files of .* hold"):
        mtl_lora.save(model, tmp_path)
    model = mtl_lora.inject(BaseModel(tiny_base).load("bf16"), adapter_config(modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.lm_head.weight.add_(1)  # which the checkpoint holds
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mtl_lora.save(model, tmp_path)


def test_a_base_of_another_class_is_not_loaded_in_its_place(tiny_base, tmp_path):
    config = adapter_config(target_modules=["q_proj"])
    model = mtl_lora.inject(LlamaForSequenceClassification.from_pretrained(tiny_base, num_labels=2), config)
    mtl_lora.save(model, tmp_path)
    with pytest.raises(UserError, match=r"a LlamaForCausalLM, .* to a LlamaForSequenceClassification: load that"):
        mtl_lora.load(tmp_path)


class Mine(LlamaForCausalLM):
    """One's own class of a model of transformers."""


def test_a_base_of_a_class_of_ones_own_is_loaded_as_that_of_transformers(tiny_base, tmp_path):
    model = mtl_lora.inject(Mine.from_pretrained(tiny_base, dtype="float32"), adapter_config(target_modules=["q_proj"]))
    mtl_lora.save(randomise(model), tmp_path)
    assert read_config(tmp_path).provenance_config.base_class == "LlamaForCausalLM"
    assert torch.equal(logits(mtl_lora.load(tmp_path, dtype="fp32")), logits(model.eval()))


def test_a_model_that_is_trained_whole_is_saved_by_transformers_as_it_is(tmp_path):
    model = mtl_lora.inject(tiny_llama(), adapter_config("none", modules_to_save=["*"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)


def test_a_name_is_no_base_model_to_put_an_adapter_on(tiny_base, tmp_path):
    with pytest.raises(UserError, match=r"must be a loaded model, not .*; or call mtl_lora\.load\(folder\)"):
        mtl_lora.load(tiny_base, tmp_path)


def test_what_the_caller_does_to_its_configuration_does_not_reach_the_model(tmp_path):
    tasks = list(TASKS)
    config = adapter_config(tasks=tasks)
    model = randomise(mtl_lora.inject(tiny_llama(), config))
    expected = logits(model)
    config.alpha, config.rank = 64, 3
    tasks.reverse()
    mtl_lora.save(model, tmp_path)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(mtl_lora.load(tiny_llama(), tmp_path)), expected)


def test_an_adapter_on_a_tied_head_is_known_to_transformers(tmp_path):
    config = tiny_llama().config
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config).float().eval()
    ties = model._tied_weights_keys
    mtl_lora.inject(model, adapter_config(target_modules=["q_proj", "lm_head"]))
    randomise(model)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.warns(UserWarning, match=r"no plain model loads; save the adapter with mtl_lora\.save"):
        model.save_pretrained(tmp_path / "whole")  # as transformers' Trainer does
    merged = mtl_lora.merge(copy.deepcopy(model), TASKS[0])
    assert merged.config.tie_word_embeddings is False and merged._tied_weights_keys == ties
    expected = merged(input_ids=tokens(2)).logits
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(input_ids=tokens(2)).logits, expected)
    with mtl_lora.disabled(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        model.tie_weights()
        model.save_pretrained(tmp_path / "base")
    assert model._tied_weights_keys != ties
    mtl_lora.unload(model)
    assert "_tied_weights_keys" not in vars(model) and model.config.tie_word_embeddings


def test_an_adapter_on_a_tied_bias_is_known_to_transformers(tmp_path):
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = mtl_lora.inject(BertForMaskedLM(config), adapter_config(target_modules=["query", "decoder"]))
    model.tie_weights()
    assert model.cls.predictions.decoder.base_layer.bias is model.cls.predictions.bias
    with pytest.warns(UserWarning, match="no plain model loads"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["T5", "UMT5", "Bart"])
def test_merging_the_tied_head_of_an_encoder_decoder_keeps_the_rest_of_it(tmp_path, name):
    (found,) = (each for each in OTHERS if each.name == {"UMT5": "T5"}.get(name, name))
    found = dataclasses.replace(found, name=name)
    model, inputs = found.build(), found.inputs(2)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    body = "q_proj" if name == "Bart" else "q"
    randomise(mtl_lora.inject(model, adapter_config(target_modules=[body, "lm_head"])))
    expected = model(**inputs, task_ids=[TASKS[0]] * 2).logits
    before = model.lm_head.base_layer.weight
    merged = mtl_lora.merge(model, TASKS[0])
    assert merged.lm_head.weight is not before and before is merged.get_input_embeddings().weight
    torch.testing.assert_close(merged(**inputs).logits, expected)
    merged.save_pretrained(tmp_path)
    attention = model.config._attn_implementation  # of transformers 5.17's UMT5 the two differ
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64, attn_implementation=attention)
    torch.testing.assert_close(loaded(**inputs).logits, expected)
    merged.tie_weights()  # as resizing does
    torch.testing.assert_close(merged(**inputs).logits, expected)


def test_a_merged_weight_that_its_dtype_cannot_hold_is_refused_and_nothing_changes():
    model = adapted_llama("lora", torch.float16, alpha=1e7)
    with pytest.raises(UserError, match=r"weight of model.layers.0.self_attn.q_proj is not finite in torch.float16"):
        mtl_lora.merge(model)
    assert mtl_lora.adapter_layers(model)


@pytest.mark.parametrize("method", METHODS)
def test_a_hook_on_a_frozen_layer_keeps_that_layers_output(method):
    model, kept = adapted_llama(method), []
    layer = model.model.layers[0].self_attn.q_proj
    expected = adapter_gradients_of(model)
    layer.base_layer.register_forward_hook(lambda module, inputs, output: kept.append((inputs[0], output)))
    logits(model)
    torch.testing.assert_close(kept[0][1], F.linear(kept[0][0], layer.base_layer.weight), rtol=0, atol=0)
    for module in model.modules():
        module.register_full_backward_hook(lambda *_: None)
    for name, gradient in adapter_gradients_of(model).items():
        torch.testing.assert_close(gradient, expected[name])


def adapter_gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    model(input_ids=tokens(len(TASKS)), task_ids=TASKS).logits.square().mean().backward()
    return adapter_gradients(model)


def test_a_forward_that_was_interrupted_leaves_a_model_that_pickles():
    model = adapted_llama().train()

    def interrupted(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=tokens(1), task_ids=[TASKS[0]])
    handle.remove()
    model(input_ids=tokens(1), task_ids=[TASKS[0]])
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))  # noqa: S301 - made here


def test_routers_of_experts_are_no_linear_layers():
    config = PhimoeConfig(**tiny_llama().config.to_dict() | {"num_local_experts": 2, "num_experts_per_tok": 2})
    model = PhimoeForCausalLM(config)
    mtl_lora.inject(model, adapter_config("lora", target_modules="all-linear"), allow_unused=True)
    assert not any("router" in name for name in mtl_lora.adapter_layers(model))
    assert logits(model).isfinite().all()


def test_one_matrix_is_no_stack_of_experts():
    model = nn.ModuleDict({"experts": nn.Module(), "gate": nn.Conv1d(4, 4, 2)})
    model.experts.one, model.experts.two = nn.Parameter(torch.zeros(1, 5, 4)), nn.Parameter(torch.zeros(2, 5, 4))
    assert [*fused_experts(model)] == ["experts.two"]


def test_a_model_without_the_folder_of_its_checkpoint_is_named():
    with pytest.raises(UserError, match="folder of the checkpoint is missing"):
        mtl_lora.load(tiny_llama())


def test_a_whole_model_that_another_program_saved_with_its_adapter_is_refused(tiny_base, tmp_path):
    with pytest.warns(UserWarning, match="no plain model loads"):
        mtl_lora.inject(BaseModel(tiny_base).load("fp32"), adapter_config()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"saved with an adapter on it.*mtl_lora\.save"):
        BaseModel(str(tmp_path)).load()
    with pytest.raises(UserError, match="not an MTL-LoRA checkpoint"):
        mtl_lora.load(tmp_path)


def test_a_base_whose_files_were_replaced_is_not_loaded(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    model = BaseModel(str(base)).load("fp32")
    mtl_lora.save(mtl_lora.inject(model, adapter_config(target_modules=["q_proj"])), tmp_path / "adapter")
    with torch.no_grad():
        other = BaseModel(tiny_base).load("fp32")
        other.model.norm.weight.add_(1)
    other.save_pretrained(base)
    with pytest.raises(UserError, match="was trained on another base model than"):
        mtl_lora.load(tmp_path / "adapter")


def test_another_base_than_the_checkpoints_is_refused(tiny_base, tmp_path):
    model = BaseModel(tiny_base).load("fp32")
    mtl_lora.save(mtl_lora.inject(model, adapter_config(target_modules=["q_proj"])), tmp_path / "adapter")
    other = BaseModel(tiny_base).load("fp32")
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    other = BaseModel(str(tmp_path / "other")).load("fp32")
    with pytest.raises(UserError, match="was trained on another base model than") as error:
        mtl_lora.load(other, tmp_path / "adapter")
    assert tiny_base in str(error.value)
    assert not mtl_lora.adapter_layers(other)
    scaled = BaseModel(tiny_base).load("bf16")
    with torch.no_grad():
        scaled.model.layers[1].mlp.up_proj.weight.mul_(1.05)
        scaled.model.embed_tokens.weight.mul_(1.05)
    with pytest.warns(UserWarning, match=f"files of '{tiny_base}', and this model's .* is not what they hold"):
        mtl_lora.load(scaled, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mtl_lora.load(BaseModel(tiny_base).load("bf16").float(), tmp_path / "adapter")
    other.config._name_or_path = ""
    with pytest.warns(UserWarning, match="cannot be compared"):
        mtl_lora.load(other, tmp_path / "adapter")
    # A model that was merged is another base too, and does not pass for the one it came from, in a wrapper neither.
    merged = mtl_lora.merge(nn.DataParallel(model), "maps").module
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mtl_lora.save(mtl_lora.inject(merged, adapter_config(target_modules=["q_proj"])), tmp_path / "second")
    assert read_config(tmp_path / "second").provenance_config.base_model is None
    with pytest.raises(UserError, match="names no base model"):
        mtl_lora.load(tmp_path / "second")


# ---- the names ----


def test_trainable_parameters_are_printed_as_peft_prints_them(capsys):
    mtl_lora.print_trainable_parameters(adapted_llama("lora", target_modules=["q_proj"]))
    assert capsys.readouterr().out == "trainable params: 192 || all params: 5,296 || trainable%: 3.6254\n"


def test_a_weight_that_is_partitioned_or_packed_counts_with_all_its_values():
    model = nn.ModuleList([nn.Linear(2, 3, bias=False) for _ in range(2)])
    model[0].weight.ds_numel = 50
    model[1].weight.quant_state = SimpleNamespace(shape=(6, 7))
    model[1].requires_grad_(False)
    assert trainable_parameters(model) == (50, 92)


@pytest.mark.slow
def test_adapters_need_torch_and_safetensors_alone(tmp_path):
    """They work where nothing else is installed, and where it is they do not even look for it."""
    program = f"""
import sys
asked = []
class Absent:
    def find_spec(name, *_):
        if name.split(".")[0] in ("transformers", "peft", "accelerate", "datasets"):
            asked.append(name)
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent)
import torch, mtl_lora, mtl_lora.route
from mtl_lora import route
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
base = torch.nn.Sequential(*[torch.nn.Linear(8, 8) if index != 1 else torch.nn.ReLU() for index in range(3)])
base.load_state_dict(model.state_dict())
config = mtl_lora.AdapterConfig(rank=2, tasks=["a", "b"], target_modules=["0"], modules_to_save=["2"])
mtl_lora.inject(model, config)
model(torch.ones(2, 8), task_ids=["a", "b"]).sum().backward()
assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
mtl_lora.save(model, {str(tmp_path)!r})
loaded = mtl_lora.load(base, {str(tmp_path)!r})
with route.use(["b", "a"]), mtl_lora.disabled(loaded):
    loaded(torch.ones(2, 8))
mtl_lora.merge(loaded, "a")
mtl_lora.unload(model)
mtl_lora.print_trainable_parameters(model)
assert not asked, asked
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "trainable params: 144 || all params: 144 || trainable%: 100.0000\n"


def test_inject_says_what_it_takes():
    model, config = tiny_llama(), adapter_config("lora")
    for arguments, words in (((config, model), "as its Module"), ((model, {"r": 8}), r"not \{'r': 8\} as its Adap")):
        with pytest.raises(UserError, match=rf"inject takes a model and an AdapterConfig, .*{words}"):
            mtl_lora.inject(*arguments)
