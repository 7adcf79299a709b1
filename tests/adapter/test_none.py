"""The method without an adapter: heads on a frozen base, or full fine-tuning, through everything that a method has."""

import copy
import json
import shutil

import pytest
import torch
from reference.tiny import TASKS, VOCABULARY, tiny_llama, tokens
from safetensors.torch import load_file
from shared import QUICKSTART
from torch import nn

import mtl_lora
from mtl_lora import AdapterConfig, UserError, artifacts, cli
from mtl_lora.export.merge import export_merged
from mtl_lora.export.peft import export_peft


def trained_whole(*entries: str, **changes) -> AdapterConfig:
    return AdapterConfig(method="none", modules_to_save=list(entries), tasks=TASKS, **changes)


def tied_llama(dtype: torch.dtype = torch.float64):
    model = tiny_llama(dtype)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def steps(model: nn.Module, count: int = 4, **options) -> None:
    """AdamW on the trainable weights."""
    optimiser = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    model.train()
    for seed in range(count):
        ids = tokens(3, seed=seed)
        model(input_ids=ids, labels=ids, **options).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


def test_full_fine_tuning_is_that_of_plain_torch_bit_for_bit_with_ties():
    plain, model = tied_llama(), mtl_lora.inject(tied_llama(), trained_whole("*"))
    size = sum(weight.numel() for weight in plain.parameters())
    assert mtl_lora.trainable_parameters(model) == (size, size) and not mtl_lora.adapter_layers(model)
    steps(plain)
    steps(model, task_ids=["maps", "tides", "birds"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for (name, expected), weight in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(weight, expected), name
    assert not torch.equal(plain.lm_head.weight, tied_llama().lm_head.weight)


def test_a_head_alone_is_trained_saved_loaded_merged_and_taken_off(tmp_path):
    base, ids = tiny_llama(), tokens(2)
    start, model = base(input_ids=ids).logits, mtl_lora.inject(tiny_llama(), trained_whole("lm_head"))
    assert torch.equal(model(input_ids=ids).logits, start)
    with pytest.raises(UserError, match="already carries an adapter"):
        mtl_lora.inject(model, trained_whole("lm_head"))
    assert mtl_lora.trainable_parameters(model)[0] == VOCABULARY * 16
    steps(model)
    trained = model(input_ids=ids, task_ids=[3, 0]).logits
    assert not torch.allclose(trained, start)
    for name, weight in base.named_parameters():
        assert name == "lm_head.weight" or torch.equal(weight, model.get_parameter(name)), name

    mtl_lora.save(model, tmp_path)
    assert set(load_file(tmp_path / artifacts.CHECKPOINT_WEIGHTS)) == {"lm_head.weight"}
    assert json.loads((tmp_path / artifacts.CHECKPOINT_CONFIG).read_text())["adapter"]["target_modules"] == []
    again = mtl_lora.load(tiny_llama(), tmp_path)
    with mtl_lora.disabled(again):
        assert torch.equal(again(input_ids=ids, task_ids=[3, 0]).logits, start)
    assert torch.equal(again(input_ids=ids).logits, trained)
    with pytest.raises(UserError, match="no task 'storms'"):
        mtl_lora.merge(again, "storms")
    assert torch.equal(mtl_lora.merge(again, "maps")(input_ids=ids).logits, trained)
    assert torch.equal(mtl_lora.unload(model)(input_ids=ids).logits, start)
    for plain in (again, model):
        with pytest.raises(UserError, match="carries no adapter"):
            mtl_lora.save(plain, tmp_path)
        with pytest.raises(UserError, match="carries no adapter"):
            mtl_lora.unload(plain)


class Root(nn.Module):
    """Weights and buffers of its own, beside a batch norm's."""

    def __init__(self):
        super().__init__()
        self.shift, self.norm = nn.Parameter(torch.zeros(4)), nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.norm(x + self.shift)


def test_every_weight_and_buffer_of_the_model_itself_is_saved_too(tmp_path):
    model, x = mtl_lora.inject(Root(), trained_whole("*")), torch.randn(8, 4)
    with torch.no_grad():
        model.shift += 0.5
    model.train()(x).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    mtl_lora.save(model, tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = mtl_lora.load(Root(), tmp_path)
    assert state.keys() == again.state_dict().keys() and state["calls"] == state["norm.num_batches_tracked"] == 1
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in state.items())
    assert mtl_lora.unload(again).calls == 0


def test_a_bfloat16_base_is_trained_in_float32_and_generates_as_before():
    base, prompt = tied_llama(torch.bfloat16), tokens(2, 5)
    model = mtl_lora.inject(copy.deepcopy(base), trained_whole("*"))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert torch.equal(model(input_ids=prompt).logits, base(input_ids=prompt).logits)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 4, "do_sample": False}
    found = model.generate(input_ids=prompt, task_ids=["maps", "tides"], **options)
    assert torch.equal(found, base.generate(input_ids=prompt, **options))


def test_what_cannot_be_is_refused(tiny_base, records_file, cache_dir, tmp_path, capsys):
    with pytest.raises(UserError, match=r"^modules_to_save must name at least one module"):
        mtl_lora.inject(tiny_llama(), trained_whole())
    flags = {"base_model": tiny_base, "data_path": records_file, "cache_dir": cache_dir, "output_dir": tmp_path / "run"}

    def refused(**more) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", "--check", *(f"--{name}={value}" for name, value in {**flags, **more}.items())])
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert "error: --modules_to_save must name at least one module" in refused(adapter_name="none")
    assert "--modules_to_save: no module with weights is named 'haed'" in refused(
        adapter_name="none", modules_to_save="haed"
    )
    assert "q_proj is both in target_modules and in modules_to_save" in refused(modules_to_save="*")
    both = {"modules_to_save": "*", "lora_target_modules": "all-linear"}
    assert "no linear layer that modules_to_save leaves" in refused(**both)


def test_flags_of_an_adapter_are_named_as_unread(train, capsys):
    flags = {"adapter_name": "none", "modules_to_save": ["lm_head"], "max_steps": 1}
    train("none", **flags, lora_dropout=0.4, lora_r=5)
    assert "none does not read --lora_dropout, --lora_r\n" in capsys.readouterr().err
    train("lora", **flags | {"adapter_name": "lora"}, lora_dropout=0.4, lora_r=5)
    assert "does not read --lora_" not in capsys.readouterr().err


def test_a_run_is_resumed_evaluated_analysed_and_exported(train, tiny_base, tmp_path):
    flags = {"adapter_name": "none", "modules_to_save": ["*"], "save_step": 2, "save_total_limit": 0}
    whole, weights = train("whole", **flags), artifacts.CHECKPOINT_WEIGHTS
    shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    cut = train("cut", **flags, resume_from_checkpoint="True")
    assert (cut / weights).read_bytes() == (whole / weights).read_bytes()
    state, base = load_file(whole / weights), load_file(f"{tiny_base}/model.safetensors")
    assert state.keys() == base.keys() and not any(torch.equal(state[name], base[name]) for name in base)
    analysis = json.loads((whole / artifacts.ADAPTER_ANALYSIS).read_text())
    assert (analysis["method_title"], analysis["layers"]) == ("No adapter", [])
    cli.main(["evaluate", f"--checkpoint={whole}", f"--data_dir={QUICKSTART / 'test'}", "--tasks=boolq", "--limit=4"])
    results = json.loads((whole / artifacts.EVALUATION / artifacts.RESULTS).read_text())
    assert (results["method"], results["tasks"]["boolq"]["n"]) == ("none", 4)
    with pytest.raises(UserError, match="merge command"):
        export_peft(whole, tmp_path / "peft")
    merged = load_file(export_merged(whole, tmp_path / "merged", dtype="fp32") / "model.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in merged.items())
