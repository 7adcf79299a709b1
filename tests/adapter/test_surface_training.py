"""Training in loops that know nothing of adapters: one's own, transformers' Trainer, TRL's SFTTrainer."""

import importlib.util

import datasets
import pytest
import torch
from reference.layers import assert_near
from reference.tiny import TASKS, adapted_llama, randomise, tokens
from transformers import AutoTokenizer, BatchEncoding, Trainer, TrainingArguments, default_data_collator

import mtl_lora
from mtl_lora import AdapterConfig, UserError
from mtl_lora.adapter.checkpoint import adapter_state
from mtl_lora.base_model import BaseModel

ROWS, STEPS, RATE = 4, 3, 1e-2
TASK_IDS = [2, 0, 3, 1]


def own_loop() -> dict[str, torch.Tensor]:
    """The adapter after three steps of AdamW on the same four rows."""
    model = adapted_llama().train()
    optimiser = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad], lr=RATE, weight_decay=0
    )
    for _ in range(STEPS):
        names = [TASKS[index] for index in TASK_IDS]
        model(input_ids=tokens(ROWS), labels=tokens(ROWS), task_ids=names).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return adapter_state(model)


def arguments(folder, **changes) -> dict:
    """What every trainer is given: all four rows in each step, and no schedule."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": ROWS,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": True,
        "bf16": False,
        **changes,
    }


def test_collator_keeps_names_and_says_what_it_lacks():
    collator = mtl_lora.TaskCollator(default_data_collator)
    batch = collator([{"labels": 1, "task_ids": "tides"}, {"labels": 0, "task_ids": "maps"}])
    assert batch["labels"].tolist() == [1, 0] and batch["task_ids"] == ["tides", "maps"]
    by_token = [["tides", "maps"], ["maps", "maps"]]
    assert collator([{"task_ids": ids} for ids in by_token])["task_ids"] == by_token
    with pytest.raises(UserError, match="remove_unused_columns=False"):
        collator([{"labels": 1}])
    for wrong in ([0], None, "maps"):  # beside an id of a row
        with pytest.raises(UserError, match="task_ids must be"):
            collator([{"task_ids": 0}, {"task_ids": wrong}])


@pytest.mark.parametrize("how", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_transformers_trainer_learns_what_ones_own_loop_does(how, tmp_path):
    checkpointing = {"gradient_checkpointing": how is not None, "gradient_checkpointing_kwargs": how}
    model, input_ids = adapted_llama(), tokens(ROWS).tolist()
    rows = datasets.Dataset.from_dict({"input_ids": input_ids, "labels": input_ids, "task_ids": TASK_IDS})
    Trainer(model, TrainingArguments(**arguments(tmp_path, **checkpointing)), train_dataset=rows).train()
    expected, start = own_loop(), adapter_state(adapted_llama())
    for name, weight in adapter_state(model).items():
        assert_near(weight, expected[name], 1e-6, name)
        assert (weight - start[name]).abs().max() > RATE


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_sft_trainer_of_trl_learns_each_row_with_its_task(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    names = ["birds", "tides", "birds", "maps"]

    def adapted(target: str) -> torch.nn.Module:
        config = AdapterConfig(rank=3, alpha=6, dropout=0.0, tasks=TASKS, target_modules=[target])
        return randomise(mtl_lora.inject(BaseModel(tiny_base).load("fp32"), config))

    def trained(model: torch.nn.Module, gradient_checkpointing: bool) -> dict[str, torch.Tensor]:
        rows = datasets.Dataset.from_dict({"input_ids": tokens(ROWS, 9).tolist(), "task_ids": names})
        options = arguments(tmp_path, gradient_checkpointing=gradient_checkpointing, logging_strategy="no")
        options |= {"max_length": 16, "eos_token": None}
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
        tokenizer.pad_token = tokenizer.eos_token
        trainer = SFTTrainer(
            model,
            SFTConfig(**options),
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=mtl_lora.TaskCollator(DataCollatorForLanguageModeling(pad_token_id=0)),
        )
        trainer.train()
        return adapter_state(model)

    expected, again = trained(adapted("q_proj"), False), trained(adapted("q_proj"), True)
    start = adapter_state(adapted("q_proj"))
    for name, weight in again.items():
        assert_near(weight, expected[name], 1e-3, name)
        moved = (weight - start[name]).abs()
        assert moved.max() > 0.001, name
        if "lora_lambda" in name or "lora_w" in name:
            assert not moved[TASKS.index("rivers")].any(), f"{name}: a task without rows has moved"
            assert moved[TASKS.index("birds")].any(), name
    # TRL multiplies by the weight of the output head without calling it.
    with pytest.raises(UserError, match="the adapter layer lm_head of 1 was not called"):
        trained(adapted("lm_head"), False)


def test_a_collator_keeps_the_kind_of_its_batch():
    def collated(examples):
        return BatchEncoding({"input_ids": torch.tensor([each["input_ids"] for each in examples])})

    examples = [{"input_ids": [1, 2], "task_ids": name} for name in TASKS[:2]]
    batch = mtl_lora.TaskCollator(collated)(examples).to("cpu")
    assert type(batch) is BatchEncoding and batch["task_ids"] == TASKS[:2]
