"""A mixed batch through an encoder with a head per task equals every task alone through transformers' own model.

All in float64, with weights that are random everywhere.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from nlu_cases import SIZES, make_tokenizer
from reference.tiny import METHODS, adapter_config, randomise
from reference.tiny import TASKS as TASKS_OF_ADAPTER
from transformers import AutoModelForSequenceClassification

import mtl_lora
from mtl_lora import UserError
from mtl_lora.base_model import BaseModel
from mtl_lora.nlu import model as encoder
from mtl_lora.nlu.data import Collator
from mtl_lora.nlu.tasks import Task, TaskSet

TASKS = TaskSet(
    (
        Task("tone", 0, labels=("sad", "glad")),
        Task("rank", 1, regression=(1.0, 5.0)),
        Task("place", 2, labels=("sea", "hill", "town", "moor")),
        Task("spare", 3, labels=("yes", "no")),
    )
)
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Architecture -> what its configuration changes, and the modules of its head.
ARCHITECTURES = {
    "Bert": ({}, ["classifier"]),
    "Roberta": ({}, ["classifier"]),
    "DistilBert": ({"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24}, ["pre_classifier", "classifier"]),
    "DebertaV2": (
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True},
        ["pooler", "classifier"],
    ),
    "Deberta": ({"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, ["pooler", "classifier"]),
    "Electra": ({"embedding_size": 8}, ["classifier"]),
    "ModernBert": ({"global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3}, ["head", "classifier"]),
    "EuroBert": ({"num_key_value_heads": 2}, ["dense", "classifier"]),  # its heads see every token
    "Llama": ({"num_key_value_heads": 2}, ["score"]),
}
CASES = [("Bert", label) for label in METHODS] + [(name, "mtl_lora") for name in ARCHITECTURES if name != "Bert"]
# Rows of a mixed batch: (task id, length of the text, of a second text or 0, target).
ROWS = [(0, 5, 0, 1.0), (2, 3, 4, 3.0), (1, 2, 2, 0.25), (2, 6, 0, 0.0), (0, 3, 0, 0.0), (1, 4, 5, 0.9), (2, 1, 1, 2.0)]


def base_of(name: str, folder) -> BaseModel:
    """The architecture, small and in float64, in a folder."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | DROPOUT | ARCHITECTURES[name][0])
    AutoModelForSequenceClassification.from_config(config).double().base_model.save_pretrained(folder)
    return BaseModel(str(folder), kind="encoder")


def built(base: BaseModel, label: str, targets: list[str] | str = "all-linear"):
    """With adapters and heads of random weights."""
    model = encoder.load(base, TASKS, "fp64").eval()
    config = adapter_config(label, tasks=TASKS.names, target_modules=targets)
    mtl_lora.inject(model, encoder.in_encoder(config, model))
    randomise(model, spread=0.3)
    with torch.no_grad():
        for slot in model.mtl_lora_injection.slots:
            slot.get().add_(0.3 * torch.randn(slot.get().shape))
    return model


def rows(has_types: bool) -> list[dict]:
    draw, found = torch.Generator().manual_seed(3), []
    for task_id, first, second, target in ROWS:
        ids = torch.randint(5, SIZES["vocab_size"], (first + second,), generator=draw).tolist()
        types = {"token_type_ids": [0] * first + [1] * second} if has_types else {}
        found.append({"input_ids": ids, "task_id": task_id, "target": target} | types)
    return found


def name_in_plain(name: str, heads: list[str], task_id: int) -> str | None:
    """A weight's name in the plain model of a task; None for another task's head."""
    head, _, rest = name.partition(".")
    if head not in heads:
        return name
    number, _, rest = rest.partition(".")
    return f"{head}.{rest}" if int(number) == task_id else None


def plain_model(model, base: BaseModel, heads: list[str], task: Task):
    """transformers' own model of one task with the weights of ``model``: the encoder with its adapters, one head."""
    options = {"dtype": torch.float64, "num_labels": task.outputs, "pad_token_id": 0}
    plain = AutoModelForSequenceClassification.from_pretrained(base.path, **options).eval()
    mtl_lora.inject(plain, model.mtl_lora_config)
    named = {name_in_plain(name, heads, task.id): weight for name, weight in model.state_dict().items()}
    named.pop(None)
    plain.load_state_dict(named)
    return plain


def gradients(model) -> dict[str, torch.Tensor | None]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def test_losses_of_an_encoder_in_16_bits_are_taken_in_float32(tmp_path):
    model = built(base_of("Bert", tmp_path), "mtl_lora").bfloat16()
    losses, _, _ = encoder.TaskLosses(TASKS)(model, Collator(0)(rows(has_types=True)))
    assert losses.dtype == torch.float32


def test_regressions_alone_have_a_loss_at_the_end_of_their_range_too():
    """There the target is 1, which would be no label of one output."""
    losses_of = encoder.TaskLosses(TaskSet((Task("rank", 0, regression=(1.0, 5.0)),)))
    batch = {"task_ids": torch.tensor([0, 0]), "targets": torch.tensor([1.0, 0.5]), "input_ids": None}
    losses, weights, _ = losses_of(lambda **_: SimpleNamespace(logits=torch.tensor([[0.5], [0.5]])), batch)
    assert losses.tolist() == [0.25, 0.0] and weights.tolist() == [1, 1]


@pytest.mark.parametrize("name, label", CASES)
@pytest.mark.slow
def test_a_mixed_batch_equals_one_task_at_a_time(name, label, tmp_path):
    base, heads = base_of(name, tmp_path), ARCHITECTURES[name][1]
    model = built(base, label)
    assert list(encoder.task_heads(model)) == heads
    examples, collator = rows(has_types=name in ("Bert", "Deberta", "DebertaV2", "Electra")), Collator(0)
    batch = collator(examples)
    losses, weights, ids = encoder.TaskLosses(TASKS)(model, batch)
    losses.sum().backward()
    assert torch.equal(ids, batch["task_ids"]) and weights.tolist() == [1.0] * len(ROWS)
    found = gradients(model)
    assert all(gradient is not None for gradient in found.values())

    inputs = {key: value for key, value in batch.items() if key not in ("targets", "loss_weight")}
    logits = model(**inputs).logits
    expected = {key: torch.zeros_like(gradient) for key, gradient in found.items()}
    for task in TASKS:
        own = (ids == task.id).nonzero()[:, 0]
        if not len(own):
            continue  # its head has no gradient to add
        plain = plain_model(model, base, heads, task)
        batch = collator([examples[row] for row in own])
        targets, _ = batch.pop("targets"), batch.pop("loss_weight")
        answers = plain(**batch).logits
        torch.testing.assert_close(logits[own, : task.outputs], answers, rtol=1e-10, atol=1e-10)
        assert (logits[own, task.outputs :] <= torch.finfo(logits.dtype).min).all()
        if task.is_regression:
            one = F.mse_loss(answers[:, 0], targets, reduction="none")
        else:
            one = F.cross_entropy(answers, targets.long(), reduction="none")
        torch.testing.assert_close(losses[own], one, rtol=1e-10, atol=1e-10)
        one.sum().backward()
        plain_gradients = gradients(plain)
        for key in expected:
            if other := name_in_plain(key, heads, task.id):
                expected[key] += plain_gradients[other]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    spare = [key for key in found if f".{TASKS['spare'].id}." in key and key.startswith(tuple(heads))]
    assert spare and all(not found[key].any() for key in spare)
    assert all(found[key].any() for key in found if key not in spare), "nothing is compared where all is zero"


@pytest.mark.parametrize("name", ["Bart", "T5"])
def test_an_encoder_decoder_is_refused(name, tmp_path):
    sizes = {"vocab_size": 40, "d_model": 16, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    getattr(transformers, f"{name}Config")(**sizes).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="encoder-decoder"):
        encoder.structure(BaseModel(str(tmp_path), kind="encoder"), TASKS)


def test_a_head_that_reads_the_last_position_is_refused_for_rows_are_padded_there(tmp_path):
    transformers.XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=16).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="reads the last position"):
        encoder.structure(BaseModel(str(tmp_path), kind="encoder"), TASKS)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Mra", {"num_attention_heads": 2}),
        ("Reformer", {"axial_pos_embds_dim": [8, 8]}),
        ("Tapas", {"num_attention_heads": 2}),
    ],
)
def test_a_model_whose_classifier_is_of_no_use_is_refused(name, fields, tmp_path):
    getattr(transformers, f"{name}Config")(vocab_size=40, hidden_size=16, **fields).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^{name}ForSequenceClassification .*; pass another --base_model"):
        encoder.structure(BaseModel(str(tmp_path), kind="encoder"), TASKS)


def test_a_head_that_no_classifier_calls_gets_no_adapter(tmp_path):
    transformers.EsmConfig(**SIZES, mask_token_id=4).save_pretrained(tmp_path)
    model = encoder.structure(BaseModel(str(tmp_path), kind="encoder"), TASKS)
    chosen = encoder.in_encoder(adapter_config(tasks=TASKS.names, target_modules="all-linear"), model)
    names = mtl_lora.adapter_layers(mtl_lora.inject(model, chosen))
    assert names and not any("contact_head" in name for name in names)


def test_the_padding_of_batches_is_known_where_a_model_of_text_and_images_reads_it(tmp_path):
    """A decoder looks for the last token that is not padding; other padding would be taken for text."""
    for own in (None, 7):
        text = SIZES | {"num_key_value_heads": 2, "head_dim": 4, "pad_token_id": own}
        vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        transformers.Gemma3Config(text_config=text, vision_config=vision).save_pretrained(tmp_path)
        make_tokenizer(tmp_path)
        model = encoder.structure(BaseModel(str(tmp_path), kind="encoder"), TASKS)
        assert model.config.get_text_config().pad_token_id == 0


def test_a_layer_that_sees_relative_positions_is_left_out_or_refused(tmp_path):
    base = base_of("DebertaV2", tmp_path)
    model = built(base, "mtl_lora")
    endings = {name.rpartition(".")[2] for name in mtl_lora.adapter_layers(model)}
    assert endings == {"value_proj", "dense"}
    with pytest.raises(mtl_lora.UserError, match=r"query_proj.*relative positions"):
        built(base, "mtl_lora", ["query_proj"])
    assert mtl_lora.adapter_layers(built(base, "lora", ["query_proj"]))
    # So it is where the adapter is put on a model in Python.
    plain = transformers.DebertaV2ForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    config = adapter_config(target_modules=["key_proj"], modules_to_save=["classifier", "pooler"])
    with pytest.raises(mtl_lora.UserError, match=r"key_proj.*relative positions"):
        mtl_lora.inject(plain, config)
    mtl_lora.inject(plain, dataclasses.replace(config, target_modules="all-linear"))
    assert {name.rpartition(".")[2] for name in mtl_lora.adapter_layers(plain)} == endings
    plain(input_ids=torch.full((2, 5), 3), task_ids=TASKS_OF_ADAPTER[:2])


def test_all_linear_is_the_encoder_without_its_pooler(tmp_path):
    names = list(mtl_lora.adapter_layers(built(base_of("Bert", tmp_path), "lora")))
    assert len(names) == 2 * 6 and all(name.startswith("bert.encoder.layer.") for name in names)


def test_a_task_set_survives_a_trip_through_json():
    tasks = TaskSet((Task("tone", 0, labels=("sad", "glad"), weight=0.5), Task("rank", 1, regression=(1.0, 5.0))))
    assert TaskSet.from_json(tasks.to_json()) == tasks


def test_a_task_without_a_metric_has_accuracy_or_pearsons_correlation():
    assert [task.metric_name for task in TASKS] == ["accuracy", "pearson", "accuracy", "accuracy"]
