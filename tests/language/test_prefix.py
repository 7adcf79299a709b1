"""Shared prompt prefixes in training: the losses and gradients of whole rows, or whole rows."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers
from reference.architectures import ARCHITECTURES
from reference.layers import assert_near
from reference.tiny import METHODS, VOCABULARY, adapted_llama, adapter_config, adapter_gradients, randomise
from transformers.models.llama.modeling_llama import LlamaAttention

import mtl_lora
from mtl_lora.adapter.checkpoint import adapter_state
from mtl_lora.adapter.layer import layer_class
from mtl_lora.language.batches import COLUMNS, CheckedLosses, Collator, sharing_probe, token_losses
from mtl_lora.language.config import TrainConfig
from mtl_lora.language.prefix import Packer, let_attention_share, longest_pair, prefixes_to_share, task_prefixes
from mtl_lora.language.train import LanguageRun

PREFIXES = {0: [5, 6, 7, 8, 9], 1: [5, 6, 7, 1, 2, 3, 4], 2: [5, 6, 7, 8, 9]}  # those of 0 and 2 are equal; 3 has none


def make_rows(task_ids: list[int], prefixes=PREFIXES, answer: int = 2) -> list[dict]:
    """Examples of random tokens behind their task's prefix, of different length."""
    generator = np.random.default_rng(5)
    tokens = [
        prefixes.get(task_id, []) + generator.integers(1, VOCABULARY, generator.integers(answer + 1, 9)).tolist()
        for task_id in task_ids
    ]
    return [
        {"input_ids": ids, "prompt_length": len(ids) - answer, "task_id": task_id, "length": len(ids), "removed": 0}
        for ids, task_id in zip(tokens, task_ids, strict=True)
    ]


ROWS = make_rows([0, 1, 1, 2, 0, 0, 3, 2, 1])


def both(model, rows=ROWS, train_on_inputs=False, by_task=True, prefixes=PREFIXES, losses=token_losses):
    """(losses, gradients) of a step on whole rows, and on rows that share their prefixes."""
    found = []
    for packer in (None, Packer(prefixes, by_task, 0)):
        batch = Collator(0, train_on_inputs, packer)(rows)
        assert ("packed" in batch) == (packer is not None)
        of_tokens, _, tasks = losses(model, batch)
        (of_tokens * torch.linspace(1, 2, len(of_tokens))).sum().backward()
        found.append((of_tokens.detach(), adapter_gradients(model), tasks))
        model.zero_grad()
    return found


def assert_alike(whole, shared, tolerance: float = 2e-6) -> None:
    # A norm of most of these models, and an eager softmax, is taken in float32.
    assert_near(shared[0], whole[0], tolerance, "losses")
    assert torch.equal(shared[2], whole[2])
    assert shared[1].keys() == whole[1].keys()
    for name, gradient in whole[1].items():
        assert_near(shared[1][name], gradient, tolerance, name)


def sharing(model, attention: str = "sdpa"):
    model.set_attn_implementation(attention)
    let_attention_share(model)
    return model


@pytest.mark.parametrize("train_on_inputs", [False, True], ids=["answers", "all tokens"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_losses_and_gradients_of_whole_rows(method, train_on_inputs):
    model = sharing(randomise(adapted_llama(method=method).double()).train())
    assert_alike(*both(model, ROWS, train_on_inputs, layer_class(method.removesuffix("_diagonal")).needs_task_ids))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_fifty_steps_in_float32_end_at_the_weights_of_whole_rows(method):
    batches = [make_rows(task_ids) for task_ids in ([0, 1, 1, 2, 0], [2, 2, 1, 1, 3], [0, 0, 0, 1, 1])]
    ends = []
    for packer in (None, Packer(PREFIXES, True, 0)):
        model = sharing(randomise(adapted_llama(method=method)).train())
        optimiser = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
        losses = []
        for step in range(50):
            loss = token_losses(model, Collator(0, packer=packer)(batches[step % 3]))[0].mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
        ends.append((torch.tensor(losses), adapter_state(model)))
    (whole, expected), (shared, found) = ends
    assert whole[-3:].sum() < 0.95 * whole[:3].sum()
    torch.testing.assert_close(shared, whole, rtol=1e-5, atol=1e-5)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_every_architecture_has_the_losses_and_gradients_of_whole_rows(architecture):
    model = randomise(mtl_lora.inject(architecture.build(), adapter_config(target_modules="all-linear")))
    assert_alike(*both(sharing(model, "eager" if architecture.name == "Gemma2" else "sdpa")))


@pytest.mark.parametrize(
    "options", [{"use_reentrant": False}, {"use_reentrant": True}], ids=["non-reentrant", "reentrant"]
)
def test_gradient_checkpointing_recomputes_shared_prefixes(options):
    plain, checkpointed = (sharing(randomise(adapted_llama().double()).train()) for _ in range(2))
    checkpointed.gradient_checkpointing_enable(options)
    assert_alike(both(plain)[0], both(checkpointed)[1])


@pytest.mark.parametrize(
    ("rows", "prefixes"),
    [
        (make_rows([1] * 5), PREFIXES),  # one task
        (make_rows([0, 2, 2, 3, 3], {0: [5, 6, 7, 8, 9], 2: [5, 6, 7, 8, 9]}), PREFIXES),
        (make_rows([0, 0, 0, 3]), {0: list(range(5, 30))} | {0: PREFIXES[0]}),
        # Rows of a task that begin otherwise than its prefix, or end within it, run whole.
        ([*make_rows([1, 1, 1, 1]), *make_rows([1, 1], {})], PREFIXES),
    ],
    ids=["one task", "equal prefixes", "others without", "some begin otherwise"],
)
@pytest.mark.parametrize("by_task", [True, False], ids=["by task", "across tasks"])
def test_rows_of_all_kinds(rows, prefixes, by_task):
    # Across tasks only where the adapter has no task ids.
    model = sharing(randomise(adapted_llama(method="mtl_lora" if by_task else "lora").double()))
    assert_alike(*both(model, rows, by_task=by_task, prefixes=prefixes))


def test_tasks_with_equal_prefixes_share_one_where_the_adapter_has_no_task_ids():
    sizes = [Packer(PREFIXES, by_task, 0)(ROWS, 16, torch.tensor([15]))["sizes"][0][0] for by_task in (True, False)]
    assert sizes == [4, 3]  # the row without a prefix is a group too


def test_rows_without_a_prefix_stay_as_they_are():
    assert "packed" not in Collator(0, packer=Packer(PREFIXES, True, 0))(make_rows([3, 3, 3]))


def dataset(rows: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, features=COLUMNS)


def test_prefixes_are_the_longest_that_all_prompts_of_a_task_have():
    rows = ROWS + make_rows([1], {1: PREFIXES[1][:6]})  # one row of task 1 shares 6 tokens alone
    rows += [{**ROWS[0], "task_id": 3, "prompt_length": 6}] * 2  # equal rows: a token of the prompt is left over
    expected = {0: PREFIXES[0], 1: PREFIXES[1][:6], 2: PREFIXES[2], 3: ROWS[0]["input_ids"][:5]}
    rows = [row for row in rows if row is not ROWS[6]]
    found = task_prefixes(dataset(rows))
    for task_id, prefix in expected.items():
        assert found[task_id][: len(prefix)] == prefix, task_id
    assert len(found[3]) == 5
    # Of a selection of the examples, as a validation split leaves it.
    some = [0, 3, 4, 5]
    assert task_prefixes(dataset(ROWS).select(some)) == task_prefixes(dataset([ROWS[index] for index in some]))


@pytest.mark.parametrize(
    ("mode", "dropout", "shares"),
    [("auto", 0.0, True), ("auto", 0.05, False), ("always", 0.05, True), ("never", 0.0, False)],
)
def test_prefixes_are_shared_where_the_losses_stay_the_same_or_on_request(mode, dropout, shares):
    prefixes, line = prefixes_to_share(mode, dataset(ROWS), adapted_llama(), dropout)
    assert bool(prefixes) == shares
    assert line.startswith("shared") == shares


def test_dropout_of_the_base_model_counts_as_dropout():
    gpt2 = next(one for one in ARCHITECTURES if one.name == "GPT2").build()
    assert not prefixes_to_share("auto", dataset(ROWS), gpt2, 0.0)[0]
    assert prefixes_to_share("always", dataset(ROWS), gpt2, 0.0)[0]
    llama = adapted_llama()  # whose attention has a dropout that is no module
    llama.config.attention_dropout = 0.1
    assert not prefixes_to_share("auto", dataset(ROWS), llama, 0.0)[0]
    composite = adapted_llama()
    assert prefixes_to_share("auto", dataset(ROWS), composite, 0.0)[0]
    composite.config.get_text_config = lambda **_: SimpleNamespace(attention_dropout=0.1)
    assert not prefixes_to_share("auto", dataset(ROWS), composite, 0.0)[0]


@pytest.mark.parametrize(("method", "owners"), [("mtl_lora", [0, 1, 2]), ("lora", [0, 1, 0])])
def test_a_training_shares_a_prefix_across_tasks_only_where_the_adapter_has_no_task_ids(method, owners):
    run = LanguageRun.__new__(LanguageRun)
    run.config, run.adapter = TrainConfig(adapter_name=method), adapter_config(method)
    run.prefixes, run.train, run.tokenizer = PREFIXES, dataset(ROWS), SimpleNamespace(pad_token_id=0)
    collator, _ = run.ends()
    assert [collator.packer.owner[task_id] for task_id in PREFIXES] == owners


def hybrid() -> torch.nn.Module:
    """A model that mixes tokens by convolutions too, which know nothing of blocks."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.Lfm2Config(
        **sizes,
        num_hidden_layers=2,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        initializer_range=0.4,
    )
    model = transformers.Lfm2ForCausalLM(config)
    return randomise(mtl_lora.inject(model, adapter_config(target_modules=["q_proj", "v_proj"]))).train()


def linear() -> torch.nn.Module:
    """A model with a layer of linear attention."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 2, "head_dim": 4}
    return transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(**sizes))


@pytest.mark.parametrize("build", [hybrid, linear])
def test_a_model_with_convolutions_or_linear_attention_shares_none_on_request_either(build):
    prefixes, line = prefixes_to_share("always", dataset(ROWS), build(), 0.0)
    assert not prefixes and "more than attention" in line


def windowed() -> torch.nn.Module:
    """A model whose layers do not hand their window of 4 tokens to the attention."""
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        num_experts=2,
        num_experts_per_tok=1,
        layer_types=["sliding_attention"] * 2,
        use_sliding_window=True,
        sliding_window=4,
        initializer_range=0.4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = transformers.Qwen2MoeForCausalLM(config)
    return randomise(mtl_lora.inject(model, adapter_config(target_modules=["q_proj", "v_proj"]))).train()


def not_finite() -> torch.nn.Module:
    """A model that has losses of whole rows alone."""
    model = adapted_llama(dtype=torch.float32).train()
    model.model.norm.register_forward_hook(lambda _, inputs, output: output * (1 if len(inputs[0]) > 1 else np.nan))
    return model


def probe() -> dict:
    return sharing_probe(ROWS[1:3], Packer(PREFIXES, True, 0))


@pytest.mark.parametrize("build", [hybrid, windowed, not_finite], ids=lambda build: build.__name__)
def test_a_model_whose_losses_would_be_others_gets_whole_rows_and_a_line(build, capsys):
    model, losses = build(), CheckedLosses(probe(), dropout=False)
    attention = model.config._attn_implementation
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    whole, shared = both(model, losses=losses)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.config._attn_implementation == attention
    assert_alike(whole, shared, 0)
    assert capsys.readouterr().err.count("cannot share them") == 1


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_check_passes_where_only_dropout_differs(dropout, capsys):
    model, losses = adapted_llama(dropout=dropout).train(), CheckedLosses(probe(), dropout > 0)
    losses(model, Collator(0, packer=Packer(PREFIXES, True, 0))(ROWS))
    assert losses.shares and model.training
    assert capsys.readouterr().err == ""


def test_the_check_reads_the_longest_example_that_shares_a_prefix_and_another_of_its_task():
    lengths, task_ids = np.array([5, 9, 30, 8, 7, 12]), np.array([0, 1, 2, 1, 1, 3])
    assert longest_pair(lengths, task_ids, {0: [1], 1: [1]}) == [3, 1]
    assert longest_pair(lengths, task_ids, {0: [1], 3: [1]}) == [5, 5]  # twice, and the two still share
    assert len(probe()["supervised"]) == sum(len(row["input_ids"]) - 1 for row in ROWS[1:3]), "along whole rows"


class DerivedAttention(LlamaAttention):
    """As the code of a model that a repository brings derives it, in a module without an attention of its own."""


def test_a_derived_attention_uses_that_of_its_model():
    model = sharing(randomise(adapted_llama().double()).train(), "eager")
    for layer in model.model.layers:
        layer.self_attn.__class__ = DerivedAttention
    assert_alike(*both(model))
