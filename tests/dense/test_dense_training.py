"""Trainings of a tiny Swin on tiny folders: as a plain loop, split into micro-batches, resumed, in the real layouts."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_cases import make_folder, make_nyud, make_pascal, make_swin, write_png
from safetensors.torch import load_file
from torch import nn
from transformers import SwinConfig, SwinModel, TrainingArguments, set_seed

import mtl_lora
from mtl_lora import UserError, cli
from mtl_lora.base_model import BaseModel
from mtl_lora.dense import losses as kinds
from mtl_lora.dense import model as dense
from mtl_lora.dense.config import TrainConfig
from mtl_lora.dense.data import DenseDataset
from mtl_lora.dense.tasks import IGNORE, Task, TaskSet
from mtl_lora.dense.train import Collator, DenseRun
from mtl_lora.training.run import train as run
from mtl_lora.training.sampler import LengthGroupedBatchSampler

STEPS = 4


@pytest.fixture(scope="module")
def swin(made_once) -> str:
    """The folder of a tiny Swin."""
    return str(made_once("tiny_swin", make_swin))


@pytest.fixture
def train(swin, no_old_objects, one_thread, tmp_path):
    """Train in this process: ``train("name", flag=value, ...)`` returns the output folder and the configuration."""
    if not (tmp_path / "data").exists():
        make_folder(tmp_path / "data", 13, 16)

    def start(name: str, **changes):
        settings = {
            "base_model": swin,
            "data_path": str(tmp_path / "data"),
            "output_dir": str(tmp_path / name),
            "image_size": 16,
            "dtype": "fp64",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "batch_size": 4,
            "max_steps": STEPS,
            "save_step": 0,
            "logging_steps": 1,
            "learning_rate": 3e-3,
            "warmup_ratio": 0.0,
            "lr_scheduler_type": "constant_with_warmup",
            "weight_decay": 0.0,
            **changes,
        }
        config = TrainConfig(**settings)
        run(config)
        return tmp_path / name, config

    return start


def log_of(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def plain_loss(output: torch.Tensor, label: torch.Tensor, kind: str) -> list[torch.Tensor]:
    """What every labelled value of a map costs, one by one."""
    if kind in ("semantic", "parts"):
        chosen = output.log_softmax(dim=1).movedim(1, -1)[label != IGNORE]
        return [-row[value] for row, value in zip(chosen, label[label != IGNORE], strict=True)]
    if kind == "normals":
        output = output / output.norm(dim=1, keepdim=True)
    pairs = zip(output[label != IGNORE], label[label != IGNORE], strict=True)
    if kind in ("normals", "depth"):
        return [abs(value - target) for value, target in pairs]
    negative = float((label == 0).sum()) / max(int((label != IGNORE).sum()), 1)
    weight = 0.95 if kind == "edges" else negative
    return [-weight * F.logsigmoid(v) if target else -(1 - weight) * F.logsigmoid(-v) for v, target in pairs]


LABELS = {
    "semantic": lambda draw: torch.randint(0, 4, (2, 5, 5), generator=draw),
    "parts": lambda draw: torch.randint(0, 4, (2, 5, 5), generator=draw),
    "saliency": lambda draw: (torch.rand(2, 1, 5, 5, generator=draw) > 0.7).double(),
    "edges": lambda draw: (torch.rand(2, 1, 5, 5, generator=draw) > 0.7).double(),
    "normals": lambda draw: F.normalize(torch.randn(2, 3, 5, 5, generator=draw, dtype=torch.float64), dim=1),
    "depth": lambda draw: 5 * torch.rand(2, 1, 5, 5, generator=draw, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", LABELS)
def test_loss_is_the_mean_over_labelled_values(kind):
    draw = torch.Generator().manual_seed(1)
    task = Task("one", 0, kind=kind, classes=4 if kind in ("semantic", "parts") else 0)
    tasks, label = TaskSet((task,)), LABELS[kind](draw)
    label[0, ..., :2, :] = IGNORE
    output = torch.randn(2, task.outputs, 5, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    batch = {"pixel_values": None, "one": label}
    loss, weight, _ = kinds.task_losses(tasks, lambda _: {"one": output}, batch)
    parts = plain_loss(output, label, kind)
    torch.testing.assert_close(loss[0], sum(parts) / len(parts))
    assert weight.item() == len(parts) == (120 if kind == "normals" else 40)
    batch["one"] = torch.full_like(label, IGNORE)
    loss, weight, _ = kinds.task_losses(tasks, lambda _: {"one": output}, batch)
    loss.sum().backward()
    assert (loss.item(), weight.item()) == (0, 0) and not output.grad.any()


@pytest.fixture
def still_norms(monkeypatch) -> None:
    """Batch norms that do not look at their batch, which would make micro-batches differ from a whole one."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)

    monkeypatch.setattr(nn.BatchNorm2d, "forward", forward)


@pytest.mark.slow
def test_training_equals_a_plain_loop_however_a_step_is_split(train, still_norms, tmp_path, swin):
    tasks = ["things", "far", "normal"]  # saliency's balance is of its micro-batch
    folder, config = train("one", tasks=tasks, augmentation="pascal")
    split, _ = train("split", tasks=tasks, augmentation="pascal", batch_size=1, gradient_accumulation_steps=4)
    data = DenseDataset(config.data_path, "train", config.task_set(), 16, "pascal", config.seed)
    set_seed(config.seed)
    model = dense.load(BaseModel(swin, kind="vision"), data.tasks, "fp64")
    mtl_lora.inject(model, dense.placed(config.adapter_config(data.tasks), model)).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    sampler = LengthGroupedBatchSampler(np.ones(len(data)), np.zeros(len(data), int), 4, config.seed)
    batches = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches += [[data.item(index, epoch) for index in indices] for indices in sampler]
    assert len(batches) == 6 and data.item(0, 0)["image"].ne(data.item(0, 1)["image"]).any()
    for items, line, other in zip(batches[:STEPS], log_of(folder), log_of(split), strict=True):
        outputs, total = model(torch.stack([item["image"] for item in items])), 0.0
        for task in data.tasks:
            label = torch.stack([item["labels"][task.name] for item in items])
            values = plain_loss(outputs[task.name], label.double() if task.kind != "semantic" else label, task.kind)
            mean = sum(values) / len(values)
            assert line[f"loss/{task.name}"] == pytest.approx(mean.item(), rel=1e-6)
            total = total + task.weight * mean
        assert (line["loss"], other["loss"]) == (pytest.approx(total.item(), rel=1e-6),) * 2
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad()
    expected = {name: tensor.detach() for name, tensor in mtl_lora.adapter.checkpoint.adapter_tensors(model).items()}
    for run_folder in (folder, split):
        torch.testing.assert_close(load_file(run_folder / "mtl_lora.safetensors"), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_resumed_training_equals_one_that_ran_through(train):
    flags = {"adapter_name": "mtl_lora", "num_B": 2, "lora_dropout": 0.2, "drop_path": 0.3, "augmentation": "pascal"}
    flags |= {"max_steps": 6, "save_step": 4, "dtype": "fp32"}
    whole, _ = train("whole", **flags)
    again, _ = train("again", **flags, resume_from_checkpoint=str(whole / "checkpoint-4"))  # in the second epoch
    found, expected = (load_file(folder / "mtl_lora.safetensors") for folder in (again, whole))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_training_does_not_go_on_with_another_loss_weight(train, tmp_path):
    folder, _ = train("run", max_steps=1, save_step=1)
    tasks = json.loads((tmp_path / "data" / "tasks.json").read_text())
    tasks[1]["weight"] = 0.01
    (tmp_path / "data" / "tasks.json").write_text(json.dumps(tasks))
    with pytest.raises(UserError, match=r"cannot be resumed.*loss weights"):
        train("run", max_steps=1, save_step=1, resume_from_checkpoint=str(folder / "checkpoint-1"))


@pytest.mark.parametrize("make", [make_pascal, make_nyud])
@pytest.mark.slow
def test_real_layouts_train_with_every_baseline(make, train, tmp_path):
    flags = {"data_path": str(make(tmp_path / "real", 4)), "max_steps": 1, "batch_size": 4, "dtype": "fp32"}
    names = ["semseg", "human_parts", "sal", "normals"] if make is make_pascal else ["semseg", "depth", "normals"]
    folder, config = train("mtlora", **flags, downsampler=True)
    assert config.task_set().names == names and {f"loss/{name}" for name in names} <= log_of(folder)[0].keys()
    adapter = json.loads((folder / "mtl_lora_config.json").read_text())["adapter"]
    assert adapter["target_modules"][-1] == "reduction" and len(adapter["task_modules"]) == 12
    _, config = train("single", **flags, tasks=["normals"], adapter_name="none", modules_to_save=["*"])
    assert config.task_set().names == ["normals"] and config.count()[0] == config.count()[1]
    decoders = load_file(train("decoders", **flags, adapter_name="none")[0] / "mtl_lora.safetensors")
    assert all(name.startswith("decoders.") for name in decoders)


@pytest.mark.parametrize("flags", [{"downsampler": True}, {"adapter_name": "none", "modules_to_save": ["*"]}])
@pytest.mark.slow
def test_half_precision_trains_float32_weights(flags, train):
    folder, _ = train("half", **flags, dtype="bf16", max_steps=3)
    losses = [line["loss"] for line in log_of(folder)]
    assert losses[-1] < losses[0]
    kept = load_file(folder / "mtl_lora.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32, torch.int64}  # batches that a norm has counted
    model = mtl_lora.load(folder, dtype="bf16").eval()
    outputs = model(torch.zeros(1, 3, 16, 16))
    assert all(output.dtype == torch.float32 and torch.isfinite(output).all() for output in outputs.values())


def test_task_that_no_image_of_a_step_has_adds_nothing(train, tmp_path):
    for index in range(2, 13):
        (tmp_path / "data" / "normal" / f"{index}.npy").unlink()
    folder, config = train("rare", missing_labels=True, batch_size=1, dtype="fp32")
    weights = {task.name: task.weight for task in config.task_set()}
    for line in log_of(folder):
        means = {name: line[f"loss/{name}"] for name in weights if f"loss/{name}" in line}
        assert line["loss"] == pytest.approx(sum(weights[name] * mean for name, mean in means.items()), rel=1e-5)
    assert "normal" not in means


def test_map_that_is_wrong_is_named_by_the_process_that_reads_it(train, tmp_path):
    make_folder(tmp_path / "data", 20, 16)
    write_png(tmp_path / "data" / "things" / "18.png", np.full((16, 16), 3))
    with pytest.raises(UserError, match=r"^\S*things/18\.png holds 3; .*") as caught:
        train("late", workers=1, max_steps=20)
    assert "\n" not in str(caught.value)


def test_epoch_reaches_the_augmentation(tmp_path):
    data = DenseDataset(make_folder(tmp_path, 4, 16), "train", size=16, augmentation="pascal", seed=3)
    Collator(data).set_epoch(2)
    assert torch.equal(data[1]["image"], data.item(1, 2)["image"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"length_pool": 1}, "--length_pool has no effect"),
        ({"lr_scheduler_type": "linear", "min_lr_rate": 0.1}, "--min_lr_rate has no effect"),
        ({"augmentation": "crop"}, "augmentation must be one of none, flip"),
    ],
)
def test_a_flag_without_effect_or_of_an_unknown_value_is_refused(swin, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        TrainConfig(base_model=swin, data_path=str(make_folder(tmp_path)), **flags)


def test_defaults_are_those_of_the_original(swin, tmp_path):
    """300 epochs with 20 of warm-up, from 5e-7 to 5e-4 and down to 5e-6; scale 4 (arXiv 2403.20320)."""
    config = TrainConfig(base_model=swin, data_path=str(make_folder(tmp_path)), output_dir=str(tmp_path / "run"))
    assert (config.weight_decay, config.max_grad_norm, config.lora_alpha / config.lora_r) == (0.05, 5, 4)
    assert (config.learning_rate, config.image_size) == (5e-4 * 32 / 512, 448)
    assert config.warmup_ratio == pytest.approx(20 / 300) and config.lr_scheduler_type == "cosine"
    for least in (5e-6 / 5e-4, 0.2):
        rates = config.trainer_options()["lr_scheduler_kwargs"]
        assert rates == pytest.approx({"min_lr_rate": least, "warmup_lr_rate": least / 10})
        config.min_lr_rate = 0.2


@pytest.mark.parametrize(("flag", "last"), [(None, 0.1), (0.0, 0.0), (0.3, 0.3)])
def test_drop_path_is_the_flag_or_that_of_the_base_model(swin, tmp_path, flag, last):
    base = tmp_path / "base"
    SwinModel(SwinConfig.from_pretrained(swin, drop_path_rate=0.1)).save_pretrained(base)
    settings = {"data_path": str(make_folder(tmp_path / "data")), "output_dir": str(tmp_path / "run"), "dtype": "fp32"}
    training = DenseRun(TrainConfig(base_model=str(base), drop_path=flag, **settings))
    training.arguments = TrainingArguments(str(tmp_path / "run"), use_cpu=True)
    block = training.load_base().backbone.encoder.layers[3].blocks[-1]
    assert block.drop_path.drop_prob == pytest.approx(last)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"data_path": "nowhere"}, "nowhere"),
        ({"val_set_size": 2}, "val_set_size"),
        ({"deepspeed": "config/zero2.json"}, "deepspeed"),
        ({"adapter_name": "moelora"}, "--adapter_name moelora"),
        ({"lora_target_modules": "qkv"}, "--lora_target_modules: fc1, fc2, o_proj"),
        ({"tasks": "thing"}, "thing"),
        ({"shared_mode": "matrix3"}, "shared_mode"),
        ({"drop_path": 1.5}, "drop_path"),
    ],
)
def test_mistake_is_one_sentence_that_names_the_flag(swin, tmp_path, capsys, flags, words):
    make_folder(tmp_path / "data", 5, 32)
    flags = {
        "base_model": swin,
        "data_path": tmp_path / "data",
        "output_dir": tmp_path / "run",
        "image_size": 32,
    } | flags
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--system=dense", *(f"--{name}={value}" for name, value in flags.items())])
    error = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and words in error and "\n" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_image_size_follows_the_patches_of_a_vit(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 14, "image_size": 28}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "vit")
    data = str(make_folder(tmp_path / "data", 5, 28))
    flags = {"base_model": str(tmp_path / "vit"), "data_path": data, "output_dir": str(tmp_path / "run")}
    with pytest.raises(UserError, match="multiple of 14"):
        run(TrainConfig(**flags, image_size=30))
    run(TrainConfig(**flags, image_size=28, max_steps=1, batch_size=2, save_step=0, logging_steps=1))
    assert log_of(tmp_path / "run")
