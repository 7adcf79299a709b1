"""The architectures and comparisons of the export tests: an exported adapter against the routed model."""

import copy
import functools
from pathlib import Path

import torch
from reference.tiny import TASKS, VOCABULARY, adapter_config, randomise, tiny_llama, tokens
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import mtl_lora
from mtl_lora import Provenance
from mtl_lora.base_model import BaseModel
from mtl_lora.language.tasks import Task, TaskSet

TOLERANCE = 1e-5  # of the largest logit, in float32
FOUR = TaskSet(tuple(Task(name, index) for index, name in enumerate(TASKS)))
# Architecture -> what is adapted on it: nn.Linear, and GPT-2's Conv1D with biases and three outputs in one.
TARGETS = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"]}


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Two layers, width 16, float32, with random biases: GPT-2 starts them at zero, where a lost one is not seen."""
    torch.manual_seed(seed)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.4}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **ids)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.4)
    return model


def save_base(kind: str, folder: Path) -> str:
    """Write the tiny base model of an architecture in float32; returns its folder."""
    (tiny_llama(torch.float32) if kind == "llama" else tiny_gpt2()).save_pretrained(folder)
    return str(folder)


@functools.cache
def _stored(folder: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_base(folder: str | Path) -> nn.Module:
    """The model of a folder that does not change, in float32."""
    return copy.deepcopy(_stored(str(folder)))


def save_adapter(base: str, folder: Path, label: str, **changes) -> Path:
    """Write a checkpoint with random weights of a method on ``base``; returns its folder."""
    model = load_base(base)
    changes = {"target_modules": TARGETS[model.config.model_type], **changes}
    randomise(mtl_lora.inject(model, adapter_config(label, **changes)), spread=0.3)
    for slot in model.mtl_lora_injection.slots:  # modules_to_save
        slot.get().data.mul_(1.5)
    mtl_lora.save(model, folder, Provenance(base, BaseModel(base).fingerprint(), "alpaca"))
    return folder


@torch.no_grad()
def logits(model: nn.Module, task: str | None = None) -> torch.Tensor:
    """Of two rows of a task, or of no task."""
    return model(input_ids=tokens(2), **({} if task is None else {"task_ids": [task, task]})).logits


def routed(base: str | Path, checkpoint: Path) -> nn.Module:
    """The model that an export must equal."""
    return mtl_lora.load(load_base(base), checkpoint).eval()


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |actual - expected| / max |expected|."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def peft_difference(base: str | Path, checkpoint: Path, folder: Path, task: str) -> float:
    """Of PEFT with ``folder`` on ``base`` from the routed model."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(base), folder).eval()
    return difference(logits(model), logits(routed(base, checkpoint), task))
