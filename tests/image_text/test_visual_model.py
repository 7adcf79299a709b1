"""Visual tokens in BART, T5 and a causal language model: against a slow encoder, and batches against single rows.

All in float64, with weights that are random everywhere.
"""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from reference.tiny import TASKS, adapter_config, randomise
from sweeps.tiny import configure
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
)
from transformers import T5ForConditionalGeneration as T5Model

import mtl_lora
from mtl_lora import AdapterConfig, Provenance, UserError
from mtl_lora.adapter.checkpoint import read_config
from mtl_lora.adapter.inject import trainable_parameters
from mtl_lora.base_model import BaseModel, enable_checkpointing
from mtl_lora.export.merge import export_merged
from mtl_lora.export.peft import export_peft
from mtl_lora.image_text import model as visual
from mtl_lora.image_text import train
from mtl_lora.image_text.data import IGNORED
from mtl_lora.image_text.model import VisualConfig

VOCABULARY, DIM, GRID, PAD = 40, 5, 3, 1
IMAGES = VisualConfig(dim=DIM, grid=GRID, pool=2)
TOKENS = IMAGES.tokens
SPECIAL = {"bos_token_id": 0, "pad_token_id": PAD, "eos_token_id": 2}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, **SPECIAL}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "bart": (
        BartForConditionalGeneration,
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=40,
            init_std=0.4,
            dropout=0.0,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
            **SPECIAL,
        ),
    ),
    "t5": (
        T5Model,
        T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            dropout_rate=0.0,
            initializer_factor=1.0,
            tie_word_embeddings=False,
            decoder_start_token_id=PAD,
            **SPECIAL,
        ),
    ),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, max_position_embeddings=64, initializer_range=0.4)),
    "mamba": (  # whose state passes over padding
        MambaForCausalLM,
        MambaConfig(
            vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.4, **SPECIAL
        ),
    ),
}
TARGETS = {"bart": ["q_proj", "v_proj"], "t5": ["q", "v"], "llama": ["q_proj", "v_proj"]}
TARGETS |= {"mamba": ["in_proj"]}
CASES = [(name, method) for name in MODELS for method in ("mtl_lora", "lora")]
# Of each row the task, the tokens of its text and of its answer, and its images.
ROWS = [(0, 5, 2, 1), (3, 2, 4, 2), (1, 7, 1, 1), (0, 3, 3, 2), (2, 1, 2, 1)]


def base_folder(name: str, folder) -> BaseModel:
    """The architecture, small and in float64, in a folder."""
    torch.manual_seed(0)
    architecture, config = MODELS[name]
    architecture(config).double().save_pretrained(folder)
    return BaseModel(str(folder), kind="text_generator")


def built(base: BaseModel, name: str, method: str = "mtl_lora"):
    """With a visual embedding and adapters of random weights."""
    torch.manual_seed(1)
    model = visual.with_images(base.load("fp64"), IMAGES).eval()
    config = adapter_config(method, target_modules=TARGETS[name], modules_to_save=["*norm*.weight"])
    mtl_lora.inject(model, visual.in_language_model(config, model))
    randomise(model)
    with torch.no_grad():
        for slot in model.mtl_lora_injection.slots:
            if slot.is_weight:
                slot.get().add_(0.3 * torch.randn(slot.get().shape))
    return model


@pytest.fixture(params=CASES, ids="-".join)
def model(request, tmp_path):
    name, method = request.param
    return built(base_folder(name, tmp_path), name, method)


def rows() -> list[dict]:
    draw, found = torch.Generator().manual_seed(3), []
    for task, text, answer, images in ROWS:
        ids = torch.randint(3, VOCABULARY, (text + answer,), generator=draw)
        features = torch.randn(images, GRID**2, DIM, generator=draw, dtype=torch.float64)
        found.append({"task": task, "text": ids[:text], "answer": ids[text:], "features": features})
    return found


def padded(values: list[torch.Tensor], fill: int, left: bool = False) -> torch.Tensor:
    length = max(map(len, values))
    filled = [
        F.pad(value, (length - len(value), 0) if left else (0, length - len(value)), value=fill) for value in values
    ]
    return torch.stack(filled)


def inputs_of(model, examples: list[dict], left: bool = False, answers: bool = True) -> dict[str, torch.Tensor]:
    """The inputs of a forward: text (in a causal model with its answer behind it), padded, and images."""
    behind = visual.text_first(model)
    texts = [row["text"] if behind or not answers else torch.cat([row["text"], row["answer"]]) for row in examples]
    most = max(len(row["features"]) for row in examples)
    features = torch.stack([F.pad(row["features"], (0, 0, 0, 0, 0, most - len(row["features"]))) for row in examples])
    seen = padded([torch.ones(len(row["features"]) * TOKENS, dtype=torch.long) for row in examples], 0)
    read = padded([torch.ones_like(text) for text in texts], 0, left)
    batch = {"input_ids": padded(texts, PAD, left), "features": features}
    batch["attention_mask"] = torch.cat([read, seen] if behind else [seen, read], dim=1)
    batch["task_ids"] = [TASKS[row["task"]] for row in examples]
    if behind and answers:
        start = model.config.decoder_start_token_id
        shifted = [torch.cat([torch.tensor([start]), row["answer"][:-1]]) for row in examples]
        batch["decoder_input_ids"] = padded(shifted, PAD)
    return batch


def answer_losses(model, examples: list[dict]) -> list[torch.Tensor]:
    """Of each row the cross-entropies of its answer's tokens."""
    logits, behind, found = model(**inputs_of(model, examples)).logits, visual.text_first(model), []
    for row, own in zip(examples, logits, strict=True):
        if not behind:
            images = max(len(each["features"]) for each in examples)
            own = own[images * TOKENS + len(row["text"]) - 1 :]
        found.append(F.cross_entropy(own[: len(row["answer"])], row["answer"], reduction="none"))
    return found


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


def test_losses_of_a_model_in_16_bits_are_taken_in_float32(tmp_path):
    model = built(base_folder("llama", tmp_path), "llama").bfloat16()
    batch = inputs_of(model, rows())
    labels = [torch.cat([torch.full_like(row["text"], IGNORED), row["answer"]]) for row in rows()]
    batch |= {"labels": padded(labels, IGNORED), "scores": torch.ones(len(ROWS)), "weights": torch.ones(len(ROWS))}
    batch["task_ids"] = torch.tensor([row["task"] for row in rows()])
    losses, _, _ = train.answer_losses(model, batch)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, torch.cat(answer_losses(model.float(), rows())), rtol=0.1, atol=0.1)


def test_a_mixed_batch_equals_one_row_at_a_time(model):
    together = answer_losses(model, rows())
    torch.cat(together).sum().backward()
    found = gradients(model)
    alone = [answer_losses(model, [row])[0] for row in rows()]
    torch.cat(alone).sum().backward()
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found, gradients(model), rtol=1e-9, atol=1e-10)
    # The box of a grid's cell is zero, and so is the gradient of its weight.
    still = [name for name, gradient in found.items() if not gradient.any()]
    assert still == ["visual_embedding.box.weight"]


def test_the_window_of_a_local_attention_does_not_count_padding(tmp_path):
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, max_position_embeddings=64, initializer_range=0.4, sliding_window=4)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    model = visual.with_images(BaseModel(str(tmp_path), kind="text_generator").load("fp32"), IMAGES).eval()
    config = adapter_config(target_modules=TARGETS["llama"], modules_to_save=[])
    randomise(mtl_lora.inject(model, visual.in_language_model(config, model)))
    alone = [answer_losses(model, [row])[0] for row in rows()]
    torch.testing.assert_close(answer_losses(model, rows()), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_generated_answers_of_a_mixed_batch_are_those_of_its_rows(name, beams, tmp_path):
    model = built(base_folder(name, tmp_path), name)
    options = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False}
    whole = model.generate(**inputs_of(model, rows(), left=not visual.text_first(model), answers=False), **options)
    answers = set()
    for row, found in zip(rows(), whole, strict=True):
        alone = model.generate(**inputs_of(model, [row], answers=False), **options)[0]
        assert found[: len(alone)].tolist() == alone.tolist() and (found[len(alone) :] == PAD).all()
        answers.add(tuple(alone.tolist()))
    assert len(answers) > 1
    if not visual.text_first(model):
        assert whole.shape[1] <= 5, "the new tokens alone"


def test_tasks_and_images_change_the_answer(model):
    first = rows()[1]
    plain, features = answer_losses(model, [first])[0], first["features"]
    for other in ({"features": features.flip(0)}, {"features": features.flip(1)}, {"features": features[:1]}):
        assert not torch.allclose(answer_losses(model, [first | other])[0], plain, rtol=1e-3), other
    if model.mtl_lora_config.method == "mtl_lora":
        assert not torch.allclose(answer_losses(model, [first | {"task": 0}])[0], plain, rtol=1e-3)


# ---- against a slow encoder ----


def slow_tokens(weights: dict[str, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    """The visual tokens of one row's images (I, G, D), cell by cell, with max pooling of overlapping windows."""

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    found = []
    for image, cells in enumerate(features):
        for token in range(TOKENS):
            row, column = divmod(token, IMAGES.pool)
            rows = range(row * GRID // IMAGES.pool, math.ceil((row + 1) * GRID / IMAGES.pool))
            columns = range(column * GRID // IMAGES.pool, math.ceil((column + 1) * GRID / IMAGES.pool))
            cell = torch.stack([cells[GRID * i + j] for i in rows for j in columns]).amax(dim=0)
            content = norm("feature_norm", weights["feature.weight"] @ cell + weights["feature.bias"])
            box = norm("box_norm", weights["box.weight"] @ cell.new_zeros(5) + weights["box.bias"])
            found.append(content + box + weights["image_order.weight"][image] + weights["object_order"][token])
    return torch.stack(found)


def slow_bart_encoder(model, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """The encoder's states (L + I N, d) of one row, head by head; the adapter's layers are called as they are."""
    encoder, weights = model.model.encoder, dict(model.visual_embedding.state_dict(keep_vars=True))
    text = model.model.shared.weight[ids] + encoder.embed_positions.weight[2 : 2 + len(ids)]
    x = torch.cat([encoder.layernorm_embedding(text), slow_tokens(weights, features)])
    for layer in encoder.layers:
        attention, heads = layer.self_attn, []
        query, key, value = (part(x[None])[0] for part in (attention.q_proj, attention.k_proj, attention.v_proj))
        for start in range(0, 16, 4):
            head = slice(start, start + 4)
            heads.append((query[:, head] @ key[:, head].T / 2).softmax(dim=1) @ value[:, head])
        x = layer.self_attn_layer_norm(x + attention.out_proj(torch.cat(heads, dim=1)))
        x = layer.final_layer_norm(x + layer.fc2(F.gelu(layer.fc1(x))))
    return x


def test_barts_encoder_equals_a_slow_one_forward_and_backward(tmp_path):
    model = built(base_folder("bart", tmp_path), "bart")
    examples = rows()
    found = model(**inputs_of(model, examples)).encoder_last_hidden_state
    draw = torch.Generator().manual_seed(4)
    total, expected = 0.0, []
    longest = max(len(row["text"]) for row in examples)
    for row, states in zip(examples, found, strict=True):
        own = torch.cat([states[: len(row["text"])], states[longest : longest + len(row["features"]) * TOKENS]])
        with mtl_lora.route.use([row["task"]]):
            slow = slow_bart_encoder(model, row["text"], row["features"])
        torch.testing.assert_close(own, slow, rtol=1e-11, atol=1e-11)
        weight = torch.randn(own.shape, generator=draw, dtype=torch.float64)
        total, expected = total + (own * weight).sum(), [*expected, (slow * weight).sum()]
    total.backward()
    in_encoder = {name: gradient for name, gradient in gradients(model).items() if gradient is not None}
    sum(expected).backward()
    slow_gradients = {name: gradient for name, gradient in gradients(model).items() if gradient is not None}
    assert in_encoder.keys() == slow_gradients.keys() and "visual_embedding.feature.weight" in in_encoder
    torch.testing.assert_close(in_encoder, slow_gradients, rtol=1e-9, atol=1e-10)


# ---- counts ----

BART_BASE = BartConfig(vocab_size=50265 + 200, encoder_layers=6, decoder_layers=6, d_model=768)
BART_BASE.encoder_attention_heads = BART_BASE.decoder_attention_heads = 12
BART_BASE.encoder_ffn_dim = BART_BASE.decoder_ffn_dim = 3072


def bart_base(tmp_path, **adapter):
    """BART-base with the original's 36 images' cells of 2,048 numbers, an adapter on queries and values."""
    BART_BASE.save_pretrained(tmp_path)
    model = visual.with_images(
        BaseModel(str(tmp_path), kind="text_generator").structure(), VisualConfig(dim=2048, grid=7, pool=6)
    )
    config = AdapterConfig(tasks=TASKS, target_modules=["q_proj", "v_proj"], dropout=0, **adapter)
    return mtl_lora.inject(model, visual.in_language_model(config, model))


BIASES, NORMS = ["*.bias"], ["*.bias", "*layer_norm.weight", "*layernorm_embedding.weight"]


def test_the_originals_numbers_of_trained_weights(tmp_path):
    model = bart_base(tmp_path, method="mtl_lora", rank=64, num_B=2, temperature=0.8)
    layers = mtl_lora.adapter_layers(model)
    sizes = {sum(weight.numel() for weight in layer.adapter_parameters().values()) for layer in layers.values()}
    assert (len(layers), sizes) == (36, {163_848})
    images = sum(weight.numel() for weight in model.visual_embedding.parameters())
    assert (images, model.visual_embedding.object_order.shape) == (1_582_848, (36, 768))
    assert trainable_parameters(model)[0] == 5_898_528 + images

    # The percentages are those published for VL-BART.
    lora = bart_base(tmp_path, method="lora", rank=128, modules_to_save=BIASES)
    dora = bart_base(tmp_path, method="dora", rank=128, modules_to_save=NORMS)
    for model, weights, published in ((lora, 0, 5.93), (dora, 36 * 768 + 24_576, 5.96)):
        trained, total = trainable_parameters(model)
        assert trained - weights == 7_077_888 + images + 101_376 + 24_576 == 8_786_688
        assert round(100 * trained / total, 2) == published


# ---- keeping and taking off ----


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_gives_the_same_outputs_and_the_frozen_rows_again(name, tmp_path):
    model = built(base_folder(name, tmp_path / "base"), name)
    batch = inputs_of(model, rows())
    outputs = model(**batch).logits
    mtl_lora.save(model, tmp_path / "adapter")
    assert read_config(tmp_path / "adapter").provenance_config.model_settings == IMAGES.to_json()
    torch.manual_seed(5)  # another draw of everything
    again = mtl_lora.load(tmp_path / "adapter", dtype="fp64").eval()
    assert torch.equal(again.visual_embedding.object_order, model.visual_embedding.object_order)
    assert torch.equal(again(**batch).logits, outputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own bytes
        assert torch.equal(other(**batch).logits, outputs)
        assert other.generate.module is other
        ask = inputs_of(model, rows()[:1], answers=False) | {"max_new_tokens": 3}
        assert torch.equal(other.generate(**ask), model.generate(**ask))
    for command, task in ((export_peft, [TASKS[0]]), (export_merged, TASKS[0])):
        with pytest.raises(UserError, match=r"system image_text.*mtl_lora\.merge"):
            command(tmp_path / "adapter", tmp_path / "out", task)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"3 x 3 cells of 5"):
        mtl_lora.load(BaseModel(str(tmp_path / "base"), kind="text_generator").load("fp64"), tmp_path / "adapter")


@pytest.mark.parametrize("name", MODELS)
def test_a_block_that_is_recomputed_has_the_gradients_of_one_that_is_kept(name, tmp_path):
    found = []
    for again in (False, True):
        model = built(base_folder(name, tmp_path), name).train()
        if again:
            enable_checkpointing(model)
        torch.cat(answer_losses(model, rows())).sum().backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_merged_unloaded_and_disabled_models_keep_a_visual_embedding(model, tmp_path):
    batch = inputs_of(model, rows())
    with mtl_lora.disabled(model):
        drawn = model(**batch).logits
    of_one = {**batch, "task_ids": [TASKS[2]] * len(ROWS)}
    expected, text = (
        model(**of_one).logits,
        {name: batch[name] for name in batch if name not in ("features", "task_ids")},
    )
    merged, unloaded = mtl_lora.merge(copy.deepcopy(model), TASKS[2]), mtl_lora.unload(model)
    plain = {name: value for name, value in batch.items() if name != "task_ids"}
    torch.testing.assert_close(merged(**plain).logits, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(unloaded(**plain).logits, drawn)
    # Without images it is the language model that it was.
    text = {name: value for name, value in plain.items() if name not in ("features", "attention_mask")}
    own = BaseModel(str(tmp_path), kind="text_generator").load("fp64").eval()
    assert torch.equal(unloaded(**text).logits, own(**text).logits)


# ---- mistakes ----


def test_inputs_that_do_not_fit_are_one_sentence(tmp_path):
    model = built(base_folder("llama", tmp_path), "llama")
    batch = inputs_of(model, rows()[:1])
    for wrong, words in [
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask.*\(1, 11\).*7 tokens.*4 visual.*\(1, 3\)"),
        ({"features": torch.zeros(1, 3, GRID**2, DIM)}, r"at most 2.*\(1, 3, 9, 5\)"),
        ({"features": torch.zeros(1, 1, GRID**2, DIM + 1)}, r"9, 5\).*\(1, 1, 9, 6\)"),
        ({"features": torch.zeros(2, 1, GRID**2, DIM), "attention_mask": None}, "1 rows, and features 2"),
        ({"input_ids": None}, "input_ids"),
    ]:
        with pytest.raises(UserError, match=words):
            model(**batch | wrong)
    model(**batch)
    with pytest.raises(UserError, match="pool"):
        VisualConfig(dim=DIM, grid=2, pool=3)


def test_a_visual_embedding_for_other_images_is_not_taken_for_the_checkpoints():
    images, model = VisualConfig(dim=DIM, grid=GRID), torch.nn.Module()
    model.visual_embedding = visual.VisualEmbedding(images, 8)
    own, other = (Provenance(system="image_text", model_settings=each.to_json()) for each in (images, IMAGES))
    visual.check_base(model, own, "folder")
    with pytest.raises(UserError, match="has no such module"):
        visual.check_base(model, other, "folder")


def test_an_encoder_decoder_of_another_family_is_refused():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": VOCABULARY}
    with pytest.raises(UserError, match=r"joined to a pegasus.*bart, mbart"):
        visual.with_images(PegasusForConditionalGeneration(PegasusConfig(**sizes, **heads)), IMAGES)


@pytest.mark.slow(1)
def test_a_causal_model_that_cannot_be_shown_images_is_refused():
    mixer = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_d_ssm": 32}
    models = [FalconH1ForCausalLM(FalconH1Config(**SIZES, **mixer)), RwkvForCausalLM(RwkvConfig(hidden_size=16))]
    by_layer = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 2}
    models.append(Gemma3nForCausalLM(Gemma3nTextConfig(**SIZES, **by_layer, head_dim=4, num_kv_shared_layers=0)))
    with torch.device("meta"):
        models += [AutoModelForCausalLM.from_config(configure(kind)) for kind in ("blt", "deepseek_v4")]
    for model in models:
        with pytest.raises(UserError, match=f"a {model.config.model_type} cannot be shown images"):
            visual.with_images(model, IMAGES)


@pytest.mark.parametrize(
    ("name", "expected"), [("llama", 0.01), ("t5", 0.01), ("bart", 1.0), ("gemma", 0.01 * 16**0.5)]
)
def test_visual_tokens_begin_as_large_as_what_they_stand_beside(name, expected):
    """That is embedded words, or in BART what comes of its norm."""
    gemma = GemmaConfig(**SIZES, head_dim=8, max_position_embeddings=64)
    architecture, config = (MODELS | {"gemma": (GemmaForCausalLM, gemma)})[name]
    model = architecture(config).double()
    model.config.initializer_range = 0.01
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.01)
    tokens = visual.with_images(model, IMAGES).visual_embedding(torch.randn(8, 1, GRID**2, DIM))
    assert 1 / 3 < tokens.std().item() / expected < 3
