"""The adapters on small random models of many architectures, on their own names for linear layers."""

import threading

import pytest
import torch
import transformers
from reference.architectures import ARCHITECTURES, OTHERS, Architecture
from reference.layers import assert_near
from reference.tiny import METHODS, TASKS, VOCABULARY, adapter_config, adapter_gradients, randomise, tiny_llama, tokens
from torch import nn
from transformers.pytorch_utils import Conv1D

import mtl_lora
from mtl_lora import AdapterConfig, route
from mtl_lora.adapter.targets import adapter_layers
from mtl_lora.errors import UserError
from mtl_lora.language.batches import IGNORED, token_losses
from mtl_lora.training import projection

IDS = torch.arange(len(TASKS))
MAMBA = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=8, state_size=4, num_hidden_layers=1)
EVERY = ARCHITECTURES + OTHERS
# Every architecture with MTL-LoRA; every method with a model of linear layers and one of Conv1D.
CASES = [(architecture, "mtl_lora") for architecture in EVERY]
CASES += [(one, method) for one in EVERY if one.name in ("Llama", "GPT2") for method in METHODS if method != "mtl_lora"]


def adapted(architecture: Architecture, method: str = "mtl_lora") -> nn.Module:
    """The model with random adapter weights on all linear layers."""
    return randomise(mtl_lora.inject(architecture.build(), adapter_config(method, target_modules="all-linear")))


@pytest.mark.parametrize(("architecture", "method"), CASES, ids=str)
def test_adapter_starts_at_the_base_and_is_trained_everywhere(architecture, method):
    model, inputs = architecture.build(torch.float32), architecture.inputs()
    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    expected = model(**inputs).logits
    mtl_lora.inject(model, adapter_config(method, target_modules="all-linear"))
    assert set(mtl_lora.adapter_layers(model)) == linear - {"lm_head"}
    assert len(linear - {"lm_head"}) == architecture.linear
    assert torch.equal(model(**inputs, task_ids=TASKS).logits, expected)
    randomise(model)
    model(**inputs, task_ids=TASKS).logits.square().mean().backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == weight.requires_grad, name
        assert not weight.requires_grad or weight.grad.any(), name


@pytest.mark.parametrize("architecture", EVERY, ids=str)
def test_targets_may_be_the_attention_alone(architecture):
    model = mtl_lora.inject(architecture.build(), adapter_config(target_modules=list(architecture.attention)))
    per_block = len(architecture.attention)
    assert len(mtl_lora.adapter_layers(model)) == (6 if architecture.has_encoder else 2) * per_block


@pytest.mark.parametrize("architecture", OTHERS, ids=str)
def test_each_row_of_an_encoder_is_computed_as_if_alone(architecture):
    model, inputs = adapted(architecture), architecture.inputs()
    mixed = model(**inputs, task_ids=IDS).logits
    for row in range(4):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        assert_near(model(**alone, task_ids=[TASKS[row]]).logits[0], mixed[row], 1e-12, f"row {row}")
    assert (model(**inputs, task_ids=IDS.flip(0)).logits - mixed).abs().max() > 0.01


def batch_of(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Answers of different length at the end of each row."""
    labels = input_ids.clone()
    for row, prompt in enumerate((3, 6, 1, 5)):
        labels[row, :prompt] = IGNORED
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels, "task_ids": IDS}


def losses_of_all_logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Token losses from the logits of every position."""
    with route.use(batch["task_ids"]):
        logits = model(input_ids=batch["input_ids"]).logits.log_softmax(dim=-1)
    return torch.stack(
        [
            -logits[row, position - 1, batch["labels"][row, position]]
            for row in range(4)
            for position in range(1, 7)
            if batch["labels"][row, position] != IGNORED
        ]
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_answer_only_logits_are_those_of_the_whole_row(architecture):
    model, batch = adapted(architecture), batch_of(tokens(4))
    losses, _, task_ids = token_losses(model, batch)
    assert_near(losses, losses_of_all_logits(model, batch), 1e-10, "losses")
    assert task_ids.tolist() == [0] * 4 + [1] * 1 + [2] * 6 + [3] * 2


def padded(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with rows cut to different lengths and padding at the right, as training has it."""
    for row, length in enumerate((5, 7, 4, 6)):
        batch["attention_mask"][row, length:] = 0
        batch["input_ids"][row, length:] = 0
        batch["labels"][row, length:] = IGNORED
    return batch


def own_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss that the model computes itself from labels and the logits of every position."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with route.use(batch["task_ids"]):
        return model(**given, use_cache=False).loss


def positions_projected(model: nn.Module) -> list[int]:
    """Collects how many positions each forward projects to the vocabulary."""
    counts = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: counts.append(output[..., 0].numel())
    )
    return counts


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_answer_only_loss_and_gradients_are_the_models_own(architecture, masked):
    """The reference has the mask of the padding; what lies on a causal model's right may go without one."""
    model, batch = adapted(architecture), padded(batch_of(tokens(4)))
    expected = own_loss(model, batch)
    expected.backward()
    if not masked:
        del batch["attention_mask"]
    gradients = adapter_gradients(model)
    counts = positions_projected(model)
    losses, *_ = token_losses(model, batch)
    losses.mean().backward()
    assert counts == [len(losses)] == [(batch["labels"] != IGNORED).sum()], "only answers go through the vocabulary"
    assert_near(losses.mean(), expected, 1e-6, "loss")  # the models' own is taken in float32
    for name, gradient in adapter_gradients(model).items():
        assert_near(gradient, gradients[name], 1e-5, name)


class OwnHead(transformers.LlamaForCausalLM):
    """A model that applies its output head's weight itself, past the layer and its hooks."""

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=hidden @ self.lm_head.weight.T)


class WithoutHead(transformers.LlamaForCausalLM):
    """A model that does not say which layer its output head is."""

    def get_output_embeddings(self):
        raise NotImplementedError


@pytest.mark.parametrize("kind", [OwnHead, WithoutHead])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["bare", "wrapped"])
def test_model_whose_head_is_not_seen_projects_whole_rows_and_says_so_once(wrap, kind, capsys):
    projection._say_that_all_is_projected.cache_clear()
    model = randomise(mtl_lora.inject(tiny_llama(), adapter_config()))
    batch = batch_of(tokens(4))
    expected, *_ = token_losses(wrap(model), batch)
    assert capsys.readouterr().err == ""
    model.__class__ = kind
    for _ in range(2):
        losses, _, task_ids = token_losses(wrap(model), batch)
        assert_near(losses, expected, 1e-12, "losses")
    assert task_ids.tolist() == [0] * 4 + [1] * 1 + [2] * 6 + [3] * 2
    assert capsys.readouterr().err.count(kind.__name__) == 1


def test_loss_leaves_no_hook_on_the_model_even_if_the_forward_raises():
    model, batch = adapted(ARCHITECTURES[0]), batch_of(tokens(4))
    head = model.get_output_embeddings()
    before = len(head._forward_pre_hooks)
    token_losses(model, batch)
    with pytest.raises(IndexError):
        token_losses(model, batch | {"input_ids": batch["input_ids"] + VOCABULARY})
    assert len(head._forward_pre_hooks) == before


def test_another_threads_forward_is_not_cut_to_the_answers():
    model, batch = adapted(ARCHITECTURES[0]), batch_of(tokens(4))
    found = []

    def plain(module, arguments, output):
        if not found:  # once, from within the loss's own forward
            found.append(None)
            thread = threading.Thread(target=lambda: found.append(model(input_ids=tokens(4), task_ids=IDS).logits))
            thread.start()
            thread.join()

    model.get_output_embeddings().register_forward_hook(plain)
    losses, *_ = token_losses(model, batch)
    assert found[1].shape[:2] == tokens(4).shape
    assert len(losses) == (batch["labels"] != IGNORED).sum()


@pytest.mark.parametrize("method", METHODS)
def test_batch_without_any_answer_has_no_losses(method):
    model, batch = tiny_llama().double(), batch_of(tokens(4))
    model = randomise(mtl_lora.inject(model, adapter_config(method, target_modules=["q_proj", "lm_head"]))).train()
    losses, weights, _ = token_losses(model, batch | {"labels": torch.full_like(batch["labels"], IGNORED)})
    assert losses.shape == weights.shape == (0,)
    losses.sum().backward()


def test_architecture_without_logits_to_keep_projects_answers_alone_too(capsys):
    torch.manual_seed(0)
    settings = transformers.xLSTMConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_heads=4)
    model = transformers.xLSTMForCausalLM(settings).double()
    model = randomise(mtl_lora.inject(model, adapter_config(target_modules=["q", "v", "out_proj"]))).train()
    batch = padded(batch_of(tokens(4)))
    counts = positions_projected(model)
    losses, *_ = token_losses(model, batch)
    assert counts == [len(losses)] and capsys.readouterr().err == ""
    assert_near(losses.mean(), own_loss(model, batch), 1e-6, "loss")


@pytest.mark.parametrize("method", ["lora", "mtl_lora"])
def test_adapted_head_is_routed_by_the_rows_of_its_answers(method):
    model, batch = tiny_llama().double(), padded(batch_of(tokens(4)))
    model = randomise(mtl_lora.inject(model, adapter_config(method, target_modules=["q_proj", "lm_head"]))).train()
    losses, *_ = token_losses(model, batch)
    assert_near(losses, losses_of_all_logits(model, batch), 1e-10, "losses")


@pytest.mark.parametrize("architecture", EVERY, ids=str)
def test_saved_adapter_loads_on_the_same_base_and_merges(architecture, tmp_path):
    model, inputs, third = adapted(architecture), architecture.inputs(), [TASKS[2]] * 4
    mtl_lora.save(model, tmp_path)
    loaded = mtl_lora.load(architecture.build(), tmp_path)
    assert torch.equal(loaded(**inputs, task_ids=IDS).logits, model(**inputs, task_ids=IDS).logits)
    expected = model(**inputs, task_ids=third).logits
    merged = mtl_lora.merge(model, TASKS[2])
    assert merged.state_dict().keys() == architecture.build().state_dict().keys()
    assert_near(merged(**inputs).logits, expected, 1e-10, "logits")


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("architecture", [one for one in EVERY if one.name in ("Llama", "GPT2", "T5", "Bart")], ids=str)
def test_mixed_batch_generates_what_each_row_does_alone(architecture, beams):
    model, input_ids = adapted(architecture), tokens(4)

    def generate(rows):
        prompt = input_ids[rows]
        options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), task_ids=[TASKS[row] for row in rows], **options
        ).tolist()

    assert generate([0, 1, 2, 3]) == [generate([row])[0] for row in range(4)]


class SparseIndexer(nn.Module):
    """Chooses the tokens of a sparse attention; transformers runs such modules without gradients."""

    def __init__(self):
        super().__init__()
        self.wk = nn.Linear(8, 8)


def test_all_linear_leaves_out_what_chooses_the_tokens_of_a_sparse_attention():
    model = nn.ModuleDict({"indexer": SparseIndexer(), "q_proj": nn.Linear(8, 8)})
    assert [*adapter_layers(mtl_lora.inject(model, adapter_config(target_modules="all-linear")))] == ["q_proj"]


@pytest.mark.parametrize(
    ("build", "target"),
    [
        (lambda: nn.TransformerEncoderLayer(8, 2, 16), "linear1"),
        (lambda: nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}), "out_proj"),
        (lambda: transformers.MambaForCausalLM(MAMBA), "x_proj"),
        (lambda: nn.ModuleDict({"indexer": SparseIndexer()}), "wk"),
    ],
    ids=["encoder layer", "attention", "Mamba", "indexer"],
)
def test_layer_whose_adapter_would_be_bypassed_or_never_trained_is_refused(build, target):
    model = build()
    with pytest.raises(UserError, match=f"{target} cannot carry an adapter: "):
        mtl_lora.inject(model, adapter_config(target_modules=[target]))
    assert not adapter_layers(model)


def test_an_earlier_checkpoint_with_adapters_on_such_layers_still_loads(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.ModuleDict({"indexer": SparseIndexer(), "q_proj": nn.Linear(8, 8)})

    earlier = AdapterConfig.from_json(adapter_config(target_modules="all-linear").to_json())
    mtl_lora.save(randomise(mtl_lora.inject(model(), earlier)), tmp_path / "earlier")
    assert [*adapter_layers(mtl_lora.load(model(), tmp_path / "earlier"))] == ["indexer.wk", "q_proj"]
    mtl_lora.save(mtl_lora.inject(model(), adapter_config(target_modules="all-linear")), tmp_path / "now")
    assert [*adapter_layers(mtl_lora.load(model(), tmp_path / "now"))] == ["q_proj"]


@pytest.mark.parametrize("target_modules", [["in_proj"], "all-linear"])
def test_projection_that_mamba_calls_can_be_adapted(target_modules):
    model = transformers.MambaForCausalLM(MAMBA)
    mtl_lora.inject(model, adapter_config(target_modules=target_modules))
    assert [*adapter_layers(model)] == ["backbone.layers.0.mixer.in_proj"]


@pytest.mark.parametrize("name", ["Bamba", "FalconH1", "Jamba", "NemotronH"])
def test_all_linear_adapts_what_a_hybrid_with_mamba_layers_calls(name):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_ssm": 32}
    sizes |= {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "attn_layer_indices": [1], "num_experts": 1}
    sizes |= {"attn_layer_period": 2, "attn_layer_offset": 1}
    sizes |= {"layers_block_type": ["mamba", "attention"]} if name == "NemotronH" else {}
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **sizes)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    found = {
        name.rpartition(".")[2]
        for name in adapter_layers(mtl_lora.inject(model, adapter_config(target_modules="all-linear")))
    }
    assert {"in_proj", "q_proj"} <= found and found.isdisjoint({"out_proj", "x_proj", "dt_proj"})
