"""The model card of an exported adapter: what it is, how it was trained, its score, its prompt, how to load it."""

import json
from pathlib import Path

from mtl_lora import files
from mtl_lora.adapter.checkpoint import CheckpointConfig
from mtl_lora.base_model import SMOLLM2
from mtl_lora.errors import UserError
from mtl_lora.language.prompts import template

DEFAULT_RESULTS = Path("evaluation") / "results.json"
SOURCES = {
    "lora": ("LoRA", "2106.09685"),
    "dora": ("DoRA", "2402.09353"),
    "multilora": ("MultiLoRA", "2311.11501"),
    "moelora": ("MoELoRA", "2310.18339"),
    "mtl_lora": ("MTL-LoRA", "2410.09437"),
}
# What of the adapter's and the run's settings belongs to which method's recipe; folders and logging do not.
_ADAPTER_KEYS = ("rank", "alpha", "use_rslora", "dropout", "target_modules", "tasks")
_METHOD_KEYS = {
    "multilora": ("num_B",),
    "moelora": ("num_experts", "task_embedding_dim"),
    "mtl_lora": ("num_B", "temperature", "lambda_shape"),
}
_TRAIN_KEYS = (
    "batch_size",
    "token_budget",
    "gradient_accumulation_steps",
    "sampling_temperature",
    "num_epochs",
    "max_steps",
    "learning_rate",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "train_on_inputs",
    "dtype",
    "seed",
)
NOT_MEASURED = "not measured"


def read_scores(checkpoint: str | Path, config: CheckpointConfig, results: str | Path | None) -> dict[str, str]:
    """Task to its score in words, from a results file of exactly these weights; empty where nothing was measured.

    results: None: the evaluation beside the checkpoint, which does not count if it is of other weights. Raises
    ``UserError`` for a file that was named and is of other weights, and for one that holds no scores.
    """
    path = Path(results) if results else Path(checkpoint) / DEFAULT_RESULTS
    path = path / DEFAULT_RESULTS.name if path.is_dir() else path
    if not results and not path.is_file():
        return {}
    value = files.read_json(path, "the results file")
    try:
        measured = (value.get("adapter") or {}).get("weights_sha256")
        scores = {task: _in_words(score, value.get("mode")) for task, score in value["tasks"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"the results file {path} holds no scores; pass the results.json of an evaluation") from None
    if measured == config.weights_sha256:
        return scores
    if results:
        raise UserError(f"the results file {path} is not of this checkpoint's weights; evaluate {checkpoint} again")
    return {}


def _in_words(score: dict, mode: str | None) -> str:
    accuracy, stderr, count = 100 * score["accuracy"], 100 * score["stderr"], int(score["n"])
    return f"{accuracy:.1f} % ± {stderr:.1f} of {count} questions" + (f", protocol `{mode}`" if mode else "")


def model_card(task: str, config: CheckpointConfig, base_model: str, rank: int, score: str | None) -> str:
    """The README.md of one exported task."""
    adapter, origin = config.adapter_config, config.origin_config
    title, source = SOURCES[adapter.method]
    kind = "a DoRA" if adapter.method == "dora" else "a plain LoRA"
    return f"""---
base_model: {json.dumps(base_model)}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- mtl-lora
---

# {task}: {title} as {kind} of rank {rank}

One task of an adapter trained with {title} ([arXiv {source}](https://arxiv.org/abs/{source})), folded into the
low-rank pair that equals it, so that PEFT and whatever reads PEFT's files run it without task ids. Written by mtl-lora
from the weights with sha256 `{config.weights_sha256}`.

Accuracy on {task}: {score or NOT_MEASURED}.

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
{_base_line(base_model)}
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "this folder")
tokenizer = AutoTokenizer.from_pretrained(base)
```
{_prompt(origin.prompt_template)}
## Recipe

| setting | value |
|---|---|
{_recipe(config)}
"""


def _base_line(base_model: str) -> str:
    if base_model == SMOLLM2:
        return (
            "from mtl_lora.base_model import BaseModel\n"
            f"base = BaseModel({base_model!r}).path  # fetched and converted on first use"
        )
    return f"base = {base_model!r}"


def _prompt(name: str | None) -> str:
    """The prompt that the adapter was trained with, byte for byte, and what follows it."""
    if name is None:
        return ""
    text = template(name).prompt({"instruction": "{instruction}"})
    about = f"It was trained on this prompt (template `{name}`), as a Python string; the answer follows it directly:"
    return f"\n{about}\n\n```python\n{text!r}\n```\n"


def _recipe(config: CheckpointConfig) -> str:
    adapter, origin = config.adapter_config, config.origin_config
    rows = {"method": adapter.method}
    rows |= {key: getattr(adapter, key) for key in _ADAPTER_KEYS + _METHOD_KEYS.get(adapter.method, ())}
    rows |= {"prompt template": origin.prompt_template, "cutoff_len": origin.cutoff_len}
    train = origin.train_settings or {}
    rows |= {key: train[key] for key in _TRAIN_KEYS if key in train}
    return "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items() if value is not None)


def _cell(value: object) -> str:
    text = ", ".join(value) if isinstance(value, list) else str(value)
    return " ".join(text.replace("|", "\\|").split())
