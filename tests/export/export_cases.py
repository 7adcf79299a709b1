"""The table of cases in which an exported adapter is compared with the routed model, and the comparison.

The tests run through it, and ``PYTHONPATH=tests python tests/export/export_cases.py`` prints what it measures; with a
checkpoint as its argument it measures that one, on the base model it was trained on, in float32 and float64.
"""

import sys
import tempfile
from pathlib import Path

import torch
from reference.tiny import FACTORED, TASKS, VOCABULARY, adapter_config, randomise, tiny_llama, tokens
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import mtl_lora
from mtl_lora import Origin, route
from mtl_lora.base_model import BaseModel

TOLERANCE = 1e-5  # of the largest logit, in float32
# Architecture -> what is adapted on it: nn.Linear, and GPT-2's Conv1D with biases and three outputs in one.
TARGETS = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"]}
# A scale that no whole lora_alpha gives, and rsLoRA's.
SCALES = [{"alpha": 0.5}, {"alpha": 7.3}, {"use_rslora": True}]


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Two layers, width 16, float32, with random biases: GPT-2 starts them at zero, where nobody would miss them."""
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


def load_base(folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The base model, to be compared with."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def save_adapter(base: str, folder: Path, label: str, **changes) -> Path:
    """Write a checkpoint with random weights of a method on ``base``; returns its folder."""
    model = load_base(base)
    changes = {"target_modules": TARGETS[model.config.model_type], **changes}
    randomise(mtl_lora.inject(model, adapter_config(label, **changes)), spread=0.3)
    mtl_lora.save(model, folder, Origin(base, BaseModel(base).fingerprint(), "alpaca"))
    return folder


@torch.no_grad()
def logits(model: nn.Module, task: int | None = None, input_ids: torch.Tensor | None = None) -> torch.Tensor:
    """Of two rows, under the route of a task or none."""
    input_ids = tokens(2) if input_ids is None else input_ids
    if task is None:
        return model(input_ids=input_ids).logits
    with route.use(torch.full((len(input_ids),), task)):
        return model(input_ids=input_ids).logits


def routed_logits(base: str, checkpoint: Path, task: str) -> torch.Tensor:
    """What an exported adapter must compute."""
    return logits(mtl_lora.load(load_base(base), checkpoint).eval(), TASKS.index(task))


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |actual - expected| / max |expected|."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def peft_difference(base: str, checkpoint: Path, folder: Path, task: str) -> float:
    """Of PEFT with ``folder`` on ``base`` from the routed model."""
    from peft import PeftModel

    return relative_difference(
        logits(PeftModel.from_pretrained(load_base(base), folder).eval()), routed_logits(base, checkpoint, task)
    )


def merged_difference(base: str, checkpoint: Path, folder: Path, task: str) -> float:
    """Of the plain model in ``folder`` from the routed model."""
    return relative_difference(logits(load_base(folder)), routed_logits(base, checkpoint, task))


def measure() -> None:
    """Print the largest difference over the tasks, one line an architecture and method."""
    from mtl_lora.export.merged import export_merged
    from mtl_lora.export.peft_format import export_peft

    print("| base | method | PEFT | merged |\n|---|---|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        for kind in TARGETS:
            base = save_base(kind, Path(name) / kind)
            for label in FACTORED:
                work = Path(name) / f"{kind}_{label}"
                checkpoint = save_adapter(base, work / "checkpoint", label)
                exported = dict(zip(TASKS, export_peft(checkpoint, work / "peft"), strict=True))
                merged = {task: export_merged(checkpoint, work / task, task) for task in TASKS}
                peft = max(peft_difference(base, checkpoint, exported[task], task) for task in TASKS)
                plain = max(merged_difference(base, checkpoint, merged[task], task) for task in TASKS)
                print(f"| {kind} | {label} | {peft:.1e} | {plain:.1e} |", flush=True)


def measure_checkpoint(checkpoint: str) -> None:
    """Print the difference for the first task of a trained checkpoint, one line a dtype."""
    from peft import PeftModel

    from mtl_lora.adapter.checkpoint import read_config
    from mtl_lora.base_model import BaseModel
    from mtl_lora.export.merged import export_merged
    from mtl_lora.export.peft_format import export_peft

    config = read_config(checkpoint)
    base, task = BaseModel(config.origin_config.base_model).path, config.adapter_config.tasks[0]
    print("| dtype | PEFT | merged |\n|---|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        (folder,) = export_peft(checkpoint, Path(name) / "peft", [task])
        for dtype, word in ((torch.float32, "fp32"), (torch.float64, "fp64")):
            routed = mtl_lora.load(load_base(base, dtype), checkpoint).eval()
            words = torch.randint(routed.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(2))
            expected = logits(routed, 0, words)
            adapted = PeftModel.from_pretrained(load_base(base, dtype), folder).to(dtype).eval()
            peft = relative_difference(logits(adapted, None, words), expected)
            plain = export_merged(checkpoint, Path(name) / word, task, dtype=word)
            merged = relative_difference(logits(load_base(plain, dtype), None, words), expected)
            print(f"| {dtype} | {peft:.1e} | {merged:.1e} |", flush=True)


if __name__ == "__main__":
    measure_checkpoint(sys.argv[1]) if len(sys.argv) > 1 else measure()
