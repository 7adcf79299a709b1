"""A model with streams equals transformers' own backbone with each task's stream run by itself; and what it trains.

All in float64, with weights that are random everywhere.
"""

import copy

import pytest
import torch
from reference import streams as reference
from reference.tiny import adapter_config, randomise
from transformers import AutoModel, Dinov2Config, Dinov2Model, SwinConfig, SwinModel

import mtl_lora
from mtl_lora import UserError
from mtl_lora.adapter.inject import trainable_parameters
from mtl_lora.adapter.layer import Streams, layer_class
from mtl_lora.base_model import BaseModel, enable_checkpointing
from mtl_lora.dense import model as dense
from mtl_lora.dense.backbones import with_streams
from mtl_lora.dense.tasks import Task, TaskSet, shipped

TASKS = TaskSet(
    (
        Task("things", 0, kind="semantic", classes=4),
        Task("front", 1, kind="saliency"),
        Task("normal", 2, kind="normals"),
    )
)
# Windows of 3 on grids of 20, 10, 5 and 3: padded, shifted, and as large as the map.
SWIN = SwinConfig(
    image_size=40,
    patch_size=2,
    embed_dim=8,
    depths=[1, 2, 1, 2],
    num_heads=[1, 2, 2, 4],
    window_size=3,
    initializer_range=0.2,
)
VIT = Dinov2Config(
    image_size=24, patch_size=4, hidden_size=16, num_hidden_layers=8, num_attention_heads=2, initializer_range=0.2
)
BACKBONES = {"swin": (SwinModel, SWIN, reference.swin_maps), "vit": (Dinov2Model, VIT, reference.vit_maps)}
# Label -> the method, its own settings, and whether patch merging carries an adapter.
METHODS = {
    "mtlora": ("mtlora", {"task_rank": 2, "task_scale": 1.5}, False),
    "mtlora_plus": ("mtlora", {"task_rank": 2}, True),
    "matrixv2": ("mtlora", {"shared_mode": "matrixv2"}, False),
    "addition": ("mtlora", {"shared_mode": "addition"}, False),
    "mtl_lora": ("mtl_lora", {"num_B": 2}, False),
    "lora": ("lora", {}, False),
    "none": ("none", {}, False),
}
CASES = [
    (backbone, label) for backbone in BACKBONES for label in METHODS if (backbone, label) != ("vit", "mtlora_plus")
]


def plain_backbone(backbone: str):
    """transformers' own, of random weights, norms and tables among them."""
    torch.manual_seed(0)
    kind, config, _ = BACKBONES[backbone]
    plain = kind(config).double().eval()
    with torch.no_grad():
        for weight in plain.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return plain


def built(backbone: str, label: str, tasks: TaskSet = TASKS, random: bool = True, **changes):
    method, own, plus = METHODS[label]
    model = dense.DenseModel(with_streams(plain_backbone(backbone)), tasks).eval()
    config = adapter_config(method, tasks=tasks.names, target_modules="all-linear", **own | changes)
    mtl_lora.inject(model, dense.placed(config, model, plus))
    if not random:
        return model
    randomise(model, spread=0.3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for slot in model.mtl_lora_injection.slots:
            if slot.original.is_floating_point():
                draw = torch.randn if slot.is_weight else torch.rand  # a running variance stays positive
                slot.get().add_(0.05 * draw(slot.get().shape, generator=generator, dtype=torch.float64))
    return model


def images(backbone: str, count: int = 2) -> torch.Tensor:
    side = BACKBONES[backbone][1].image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def reference_outputs(model, backbone: str, pixels: torch.Tensor):
    """Every task's output, and the tensors in it that are trained, by the names that they have in ``model``."""
    plain, decoders = plain_backbone(backbone), copy.deepcopy(model.decoders)
    leaves = {
        name: tensor.detach().clone() for name, tensor in mtl_lora.adapter.checkpoint.adapter_tensors(model).items()
    }
    layers: dict[str, dict] = {name.removeprefix("backbone."): {} for name in mtl_lora.adapter_layers(model)}
    for name, tensor in leaves.items():
        place, _, key = name.removeprefix("backbone.").rpartition(".")
        if place in layers:
            layers[place][key] = tensor.requires_grad_()
        elif name.startswith("backbone."):
            plain.get_parameter(name.removeprefix("backbone.")).data.copy_(tensor)
    config = model.mtl_lora_config
    reference.put(plain, layers, config)
    maps, outputs = BACKBONES[backbone][2](plain, pixels), {}
    for task, decoder in zip(model.decoders.task_set, decoders, strict=True):
        chosen = [shared if own is None else own[task.id] for shared, own in maps]
        outputs[task.name] = decoder(chosen, pixels.shape[-2:])
    trained = {f"backbone.{name}": weight for name, weight in plain.named_parameters()}
    trained |= {f"decoders.{name}": weight for name, weight in decoders.named_parameters()}
    trained |= {f"backbone.{place}.{key}": weight for place, own in layers.items() for key, weight in own.items()}
    return outputs, trained


def weighted(outputs: dict[str, torch.Tensor], names=None) -> torch.Tensor:
    """A sum with fixed random weights, so that every value has a gradient of its own."""
    generator = torch.Generator().manual_seed(11)
    drawn = {name: torch.randn(each.shape, generator=generator, dtype=torch.float64) for name, each in outputs.items()}
    return sum((drawn[name] * outputs[name]).sum() for name in names or outputs)


@pytest.mark.parametrize("backbone, label", CASES)
@pytest.mark.slow
def test_outputs_and_gradients_equal_those_of_each_task_by_itself(backbone, label):
    model, pixels = built(backbone, label), images(backbone)
    outputs = model(pixels)
    expected, weights = reference_outputs(model, backbone, pixels)
    torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-9)
    weighted(outputs).backward()
    weighted(expected).backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    idle = []
    for name, weight in trained.items():
        if weight.grad is None or not weight.grad.any():
            idle.append(name)
            assert weights[name].grad is None or not weights[name].grad.any(), name
        else:
            torch.testing.assert_close(
                weight.grad, weights[name].grad, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
            )
    # The last shared output goes to no decoder where tasks have their own, so what makes it alone is idle.
    unread = {"mtlora": ["lora_A", "lora_B"], "mtlora_plus": ["lora_A", "lora_B"]}.get(label, [])
    unread = ["stream_norm_weight", "stream_norm_bias"] if label == "addition" else unread
    assert sorted(name.rpartition(".")[2] for name in idle) == sorted(unread)
    assert all(".mlp.fc2." in name for name in idle)


@pytest.mark.parametrize("label", ["mtlora", "matrixv2", "addition", "mtl_lora"])
@pytest.mark.parametrize("split", [False, True], ids=["shared input", "input of each task"])
def test_layer_equals_the_formula(label, split):
    torch.manual_seed(0)
    method, own, _ = METHODS[label]
    config = adapter_config(method, **own)
    base = torch.nn.Linear(5, 7).double()
    layer = randomise(layer_class(config.method)(base, config))
    x, tasks = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(4, 2, 3, 5, dtype=torch.float64)
    found = layer(Streams(x, tasks if split else None))
    shared, outputs = reference.layer(base, layer.adapter_parameters(), config, x, list(tasks) if split else None)
    torch.testing.assert_close(found, Streams(shared, torch.stack(outputs)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("label", ["mtlora", "mtl_lora"])
def test_dropout_is_on_the_shared_input_alone_and_the_same_for_all(label):
    config = adapter_config(label, dropout=0.5, **METHODS[label][1])
    base = torch.nn.Linear(64, 8).double()
    layer = randomise(layer_class(config.method)(base, config)).train()
    still = copy.deepcopy(layer).eval()
    x, tasks = torch.randn(1, 9, 64, dtype=torch.float64), torch.randn(4, 1, 9, 64, dtype=torch.float64)
    torch.manual_seed(3)
    found = layer(Streams(x, tasks))
    assert torch.equal(found.tasks, still(Streams(x, tasks)).tasks) and not torch.equal(
        found.shared, still(Streams(x)).shared
    )
    torch.manual_seed(3)
    _, dropped = layer.base_and_dropped(x)
    torch.manual_seed(3)
    low_rank = layer(Streams(x)).tasks - base(x)  # linear in what is dropped
    torch.testing.assert_close(low_rank, still(Streams(dropped[None])).tasks - base(dropped[None]))


@pytest.mark.parametrize("backbone, label", [case for case in CASES if case[1] not in ("addition", "none")])
def test_backbone_starts_as_the_pretrained_one_bit_for_bit(backbone, label):
    model, pixels = built(backbone, label, random=False), images(backbone)
    with torch.no_grad():
        maps = BACKBONES[backbone][2](plain_backbone(backbone), pixels)
        for stage, (plain, _) in zip(model.backbone(pixels), maps, strict=True):
            assert torch.equal(stage.shared, plain)
            assert (stage.tasks is None) == (label == "lora")
            for each in () if stage.tasks is None else stage.tasks:  # T times the rows, which a CPU may round otherwise
                torch.testing.assert_close(each, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("label", ["mtlora", "matrixv2", "addition", "mtl_lora"])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.slow
def test_loss_of_a_task_reaches_what_is_its_own_and_what_is_shared(backbone, label):
    """With ``addition`` the shared stream is made of the tasks' own, so that a loss reaches all that it is made of."""
    model, pixels = built(backbone, label), images(backbone, 1)
    for task in TASKS:
        model.zero_grad(set_to_none=True)
        weighted(model(pixels), [task.name]).backward()
        for name, layer in mtl_lora.adapter_layers(model).items():
            last = name == f"backbone.{model.backbone.last_blocks[-1]}.mlp.fc2"
            for key, weight in layer.adapter_parameters().items():
                if key.startswith(("task_", "lora_lambda", "lora_w")):
                    reached = [bool(each.any()) for each in weight.grad]
                    every = label == "addition" and not last
                    assert reached == [every or other.id == task.id for other in TASKS], (name, key)
                else:  # of the last layer no task's output reads the shared pair or norm
                    idle = last and label in ("mtlora", "addition")
                    assert idle or weight.grad.any(), (name, key)
        for other, decoder in zip(TASKS, model.decoders, strict=True):
            reached = {weight.grad is not None for weight in decoder.parameters()}
            assert reached == {other.id == task.id}


@pytest.mark.parametrize("label", ["mtlora", "addition"])
@pytest.mark.slow
def test_overflow_that_no_decoder_reads_changes_nothing(label):
    found = []
    for factor in (1.0, 1e308):
        model = built("swin", label).train()
        last = mtl_lora.adapter_layers(model)["backbone.encoder.layers.3.blocks.1.mlp.fc2"]
        unread = last.stream_norm_weight if label == "addition" else last.lora_B
        with torch.no_grad():
            unread.mul_(factor)
            assert model.backbone(images("swin"))[-1].shared.isfinite().all() == (factor == 1)
        model.backbone.set_drop_path(0.0)
        outputs = model(images("swin"))
        weighted(outputs).backward()
        assert not unread.grad.any()
        found.append((outputs, {name: weight.grad for name, weight in model.named_parameters()}))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_image_equals_its_row_of_a_batch(backbone):
    model, pixels = built(backbone, "mtlora"), images(backbone, 3)
    with torch.no_grad():
        whole = model(pixels)
        for index in range(len(pixels)):
            alone = model(pixels[index : index + 1])
            torch.testing.assert_close(alone, {name: each[index : index + 1] for name, each in whole.items()})


@pytest.mark.slow(1)
def test_checkpointing_of_blocks_changes_nothing():
    found = []
    for checkpointed in (False, True):
        model = built("swin", "mtlora").train()
        model.backbone.set_drop_path(0.0)
        if checkpointed:
            enable_checkpointing(model)
        weighted(model(images("swin"))).backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    torch.testing.assert_close(*found)
    assert all(gradient is not None for gradient in found[0].values()), "a weight without one stops DDP"


@pytest.mark.parametrize("backbone, label", [("swin", "mtlora"), ("vit", "mtl_lora"), ("swin", "none")])
@pytest.mark.slow
def test_saved_model_loads_with_every_value(backbone, label, tmp_path):
    plain_backbone(backbone).save_pretrained(tmp_path / "base")
    base = BaseModel(str(tmp_path / "base"), kind="vision")
    model = dense.load(base, TASKS, "fp64")
    method, own, plus = METHODS[label]
    config = adapter_config(
        method, tasks=TASKS.names, target_modules="all-linear", modules_to_save=["*"][: label == "none"], **own
    )
    mtl_lora.inject(model, dense.placed(config, model, plus))
    randomise(model, spread=0.3)
    model.train()(images(backbone))  # the running averages of the batch norms move
    mtl_lora.save(model, tmp_path / "adapter")
    again = mtl_lora.load(tmp_path / "adapter", dtype="fp64").eval()
    assert again.decoders[0].norm.num_batches_tracked == 1
    with torch.no_grad():
        assert all(map(torch.equal, again(images(backbone)).values(), model.eval()(images(backbone)).values()))
    with pytest.raises(UserError, match="things, front, normal"):
        mtl_lora.load(dense.load(base, shipped("pascal"), "fp64"), tmp_path / "adapter")
    with pytest.raises(UserError, match="the checkpoint itself"):
        mtl_lora.merge(model)


# ---- what trains, on Swin-T at 448 pixels with the four tasks of PASCAL (arXiv 2403.20320) ----


def swin_tiny(method: str, rank: int, downsampler: bool = False, **settings):
    """The model with an adapter, without memory."""
    tasks = shipped("pascal")
    with torch.device("meta"):  # the configuration's defaults are those of swin-tiny
        model = dense.DenseModel(with_streams(AutoModel.from_config(SwinConfig(image_size=448))), tasks)
    config = adapter_config(
        method, rank=rank, alpha=4 * rank, tasks=tasks.names, target_modules="all-linear", **settings
    )
    return mtl_lora.inject(model, dense.placed(config, model, downsampler))


@pytest.mark.parametrize(
    "rank, low_rank, trained, trained_plus",
    [
        (16, 1_406_976, 4_953_146, 3_469_370),
        (32, 2_537_472, 6_083_642, 4_664_378),
        (64, 4_798_464, 8_344_634, 7_054_394),
    ],
)
def test_swin_tiny_trains_what_the_original_trains(rank, low_rank, trained, trained_plus):
    model = swin_tiny("mtlora", rank)
    layers = mtl_lora.adapter_layers(model).values()
    decoders = sum(weight.numel() for weight in model.decoders.parameters())
    reductions = sum(w.numel() for name, w in model.named_parameters() if name.endswith("reduction.weight"))
    assert (decoders, reductions) == (1_946_624, 1_548_288)
    assert sum(weight.numel() for layer in layers for weight in layer.adapter_parameters().values()) == low_rank
    assert trainable_parameters(model)[0] == trained == decoders + reductions + low_rank + 51_258
    assert trainable_parameters(swin_tiny("mtlora", rank, downsampler=True))[0] == trained_plus


@pytest.mark.slow(1)
def test_baselines_on_swin_tiny_train_what_they_say():
    backbone = sum(weight.numel() for weight in swin_tiny("none", 1).backbone.parameters())
    assert trainable_parameters(swin_tiny("none", 1))[0] == 1_946_624
    assert trainable_parameters(swin_tiny("none", 1, modules_to_save=["*"]))[0] == 1_946_624 + backbone
    assert trainable_parameters(swin_tiny("lora", 16))[0] == 1_946_624 + 1_130_496 + 51_258 + 1_548_288
    # In each of twelve layers two B more than LoRA has, of d = C, 4 C and C, and four transforms and mixtures.
    extra = 2 * 16 * (1 + 4 + 1) * (96 + 192 + 384 + 768) + 12 * 4 * (16 * 16 + 3)
    assert trainable_parameters(swin_tiny("mtl_lora", 16, num_B=3))[0] == 4_676_666 + extra


def test_a_vit_trains_its_patch_embedding_and_every_norm():
    model = built("vit", "mtlora", random=False)
    own = {
        weight for layer in mtl_lora.adapter_layers(model).values() for weight in layer.adapter_parameters().values()
    }
    trained = {name: weight for name, weight in model.backbone.named_parameters() if weight.requires_grad}
    whole = {name for name, weight in trained.items() if weight not in own}
    patches = "embeddings.patch_embeddings.projection"
    norms = [f"encoder.layer.{block}.norm{number}" for block in range(8) for number in (1, 2)]
    assert whole == {f"{name}.{key}" for name in (patches, *norms) for key in ("weight", "bias")}


def test_what_cannot_be_placed_is_named():
    model = dense.DenseModel(with_streams(plain_backbone("vit")), TASKS)
    for method, changes, plus, words in [
        ("moelora", {}, False, "adapter_name moelora"),
        ("mtlora", {"target_modules": ["qkv", "fc1"]}, False, "fc2, o_proj"),
        ("mtlora", {}, True, "downsampler .* dinov2"),
    ]:
        settings = {"tasks": TASKS.names, "target_modules": "all-linear"} | changes
        with pytest.raises(UserError, match=words):
            dense.placed(adapter_config(method, **settings), model, plus)
    with pytest.raises(UserError, match="multiples of 4"):
        model(torch.zeros(1, 3, 26, 24))
    of_old = plain_backbone("vit")
    of_old.encoder.layer[0].attention = torch.nn.Identity()
    with pytest.raises(UserError, match=r"transformers>=5\.18"):
        with_streams(of_old)


def test_drop_path_grows_from_none_to_its_rate():
    backbone = built("swin", "mtlora").backbone
    backbone.set_drop_path(0.3)
    rates = [module.drop_path.drop_prob for module in backbone.modules() if hasattr(module, "drop_path")]
    assert rates == pytest.approx([0.06 * block for block in range(6)])  # of 1, 2, 1 and 2 blocks


def test_attention_drops_in_training_alone():
    for backbone in BACKBONES:
        model, pixels = with_streams(plain_backbone(backbone)), images(backbone, 1)
        still = model(pixels)[-1].shared
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        assert torch.equal(model(pixels)[-1].shared, still)
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.train()
        assert not torch.allclose(model(pixels)[-1].shared, still)


class Dropped(torch.nn.Module):
    """Stochastic depth that drops every path."""

    def forward(self, x):
        return 0 * x


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_block_whose_paths_are_dropped_gives_its_input(backbone):
    model = built(backbone, "mtlora").backbone
    x, more = torch.randn(1, 36, model.channels[0], dtype=torch.float64), []
    if backbone == "swin":
        x, more = x[..., : SWIN.embed_dim], [(6, 6)]
    last = model.get_submodule(model.last_blocks[0])
    last.drop_path = Dropped()
    streams = last(x, *more)
    assert torch.equal(streams.shared, x) and all(torch.equal(each, x) for each in streams.tasks)


def test_windows_of_an_oblong_map_are_those_of_transformers():
    """A map of which one side is a window alone is not shifted."""
    plain, model = plain_backbone("swin"), with_streams(plain_backbone("swin"))
    for grid in ((10, 4), (10, 3)):
        x = torch.randn(1, grid[0] * grid[1], 16, dtype=torch.float64)
        blocks = (each.encoder.layers[1].blocks[1] for each in (plain, model))
        expected, found = (block(x, grid) for block in blocks)
        torch.testing.assert_close(found.shared, expected[0])


def test_averages_of_a_decoder_follow_each_batch_by_a_tenth():
    decoder = dense.Decoder([3, 4, 5, 6], 2).train()
    maps = [torch.randn(2, channels, 4, 4) for channels in (3, 4, 5, 6)]
    seen = []
    decoder.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].mean(dim=(0, 2, 3))))
    decoder(maps, (8, 8))
    torch.testing.assert_close(decoder.norm.running_mean, 0.1 * seen[0])


@torch.no_grad()
def test_a_decoder_equals_one_that_is_written_out():
    """Projections, the smaller maps enlarged behind the largest, a hidden layer, its norm, ReLU, the outputs."""
    generator = torch.Generator().manual_seed(0)
    decoder = dense.Decoder([3, 4, 5, 6], 2).double().eval()
    for tensor in decoder.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.3)
    norm = decoder.norm
    norm.running_var.add_(1)
    sizes = zip((3, 4, 5, 6), (8, 4, 2, 1), strict=True)
    maps = [torch.randn(2, k, side, side, generator=generator, dtype=torch.float64) for k, side in sizes]

    def linear(layer, x):
        found = torch.einsum("dk,bkhw->bdhw", layer.weight[:, :, 0, 0], x)
        return found if layer.bias is None else found + layer.bias[:, None, None]

    def enlarged(x, side):
        return torch.nn.functional.interpolate(x, (side, side), mode="bilinear", align_corners=False)

    joined = [enlarged(linear(layer, x), 8) for layer, x in zip(decoder.projections, maps, strict=True)]
    hidden = linear(decoder.hidden, torch.cat(joined, dim=1))
    spread = (norm.running_var + norm.eps).sqrt()
    mean, spread, weight, bias = (each[:, None, None] for each in (norm.running_mean, spread, norm.weight, norm.bias))
    hidden = ((hidden - mean) / spread * weight + bias).clamp(min=0)
    torch.testing.assert_close(decoder(maps, (16, 16)), enlarged(linear(decoder.output, hidden), 16))


@torch.no_grad()
def test_a_swin_takes_images_of_any_size():
    outputs = built("swin", "lora")(torch.zeros(1, 3, 37, 42, dtype=torch.float64))
    assert {name: tuple(each.shape) for name, each in outputs.items()} == {
        "things": (1, 4, 37, 42),
        "front": (1, 1, 37, 42),
        "normal": (1, 3, 37, 42),
    }
