"""The model card of an exported task: what it is, its result, its prompt, how to load it, how it was trained."""

import dataclasses
import json
import re
from pathlib import Path

from mtl_lora import artifacts
from mtl_lora.adapter.checkpoint import CheckpointConfig
from mtl_lora.adapter.config import hyperparameter_flags
from mtl_lora.adapter.layer import layer_class
from mtl_lora.embedded import MODELS
from mtl_lora.errors import UserError
from mtl_lora.language.config import TrainConfig
from mtl_lora.language.encode import CHAT, template
from mtl_lora.metrics import METRICS, title_of
from mtl_lora.results import Results

NOT_MEASURED = "not measured"
# Training flags without a row of their own: other rows state them, or they are a path of the machine that trained.
_WITHOUT_ROW = {"base_model", "adapter_name", "lambda_num", "use_rslora", "template", "cutoff_len", "deepspeed"}
_WITHOUT_ROW |= {"trust_remote_code"}


def read_scores(checkpoint: str | Path, config: CheckpointConfig, results: str | Path | None) -> dict[str, str]:
    """A sentence with the result of each task, from a results file of exactly these weights; empty without one.

    results: a results file or its folder; None: the evaluation in the checkpoint's folder, ignored where it is of
    other weights. Raises ``UserError`` for a named file of other weights and for a file that is not a results file.
    """
    path = Path(results) if results else Path(checkpoint) / artifacts.EVALUATION
    measured = Results.load_all(path, needed=results is not None)
    own = [each for each in measured if (each.adapter or {}).get("weights_sha256") == config.weights_sha256]
    if results and not own:
        raise UserError(f"the results file {path} is not of this checkpoint's weights; evaluate {checkpoint} again")
    tasks = dict.fromkeys(task for each in own for task in each.tasks)
    return {task: "; ".join(_score(each, task) for each in own if task in each.tasks) for task in tasks}


def _score(results: Results, task: str) -> str:
    result = results.tasks[task]
    metric = METRICS.get(result.metric)
    scale, unit = 100 if metric else 1, "" if metric is None or metric.lowest < 0 else " %"
    spread = "" if result.stderr is None else f" ± {scale * result.stderr:.1f}"
    protocol = f", protocol `{results.mode}`" if results.mode else ""
    return f"{title_of(result.metric)} {scale * result.value:.1f}{unit}{spread} (n = {result.n}{protocol})"


def hub_name(base_model: str) -> str | None:
    """The name if it is one on the hub: a folder's path means nothing elsewhere, and a card names no machine."""
    return base_model if re.fullmatch(r"\w[\w.-]*/[\w.-]+", base_model) and not Path(base_model).exists() else None


def error_text(error: float | None) -> str:
    """What a truncated update lacks; empty for an exact one."""
    return "" if error is None else f", relative error of the update {error:.3g} (Frobenius norm, all layers)"


def model_card(
    task: str, config: CheckpointConfig, base_model: str, rank: int, score: str | None, error: float | None = None
) -> str:
    """The README.md of one exported task, to be pushed to a hub as it is.

    rank: of the exported pair; score: see ``read_scores``; error: that of a truncated update, None for an exact one.
    """
    adapter, provenance = config.adapter_config, config.provenance_config
    method = layer_class(adapter.method)
    base = repr(hub_name(base_model) or "the folder of its base model")
    needed = about_base = ""
    if base_model in MODELS:
        base = f"BaseModel({base_model!r}).path  # fetched on first use"
        needed = "\nfrom mtl_lora.base_model import BaseModel"
        about_base = f"\nThe base model: {MODELS[base_model].note}\n"
    header = f"base_model: {json.dumps(base_model)}\n" if hub_name(base_model) else ""
    equal = "low-rank pair that equals it" if error is None else "plain LoRA of this rank that is closest to it"
    measured = "" if error is None else " (of the adapter before it was truncated)"
    paper = f" ([arXiv {method.paper}](https://arxiv.org/abs/{method.paper}))" if method.paper else ""
    return f"""---
{header}library_name: peft
pipeline_tag: text-generation
tags:
- lora
- mtl-lora
---

# {task}: {method.title} as a PEFT adapter of rank {rank}{error_text(error)}

One task of an adapter trained with {method.title}{paper}.
It is folded into the {equal}, so that PEFT and every program that reads PEFT's format run it
without task ids. Written by mtl-lora from the weights with sha256 `{config.weights_sha256}`.

Result on {task}{measured}: {score or NOT_MEASURED}.
{about_base}
## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer{needed}

base = {base}
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "this folder")
tokenizer = AutoTokenizer.from_pretrained(base)
```
{_prompt(provenance.prompt_template)}
## Recipe

| setting | value |
|---|---|
{_recipe(config)}
"""


def _prompt(name: str | None) -> str:
    """The prompt that the adapter was trained with, byte for byte."""
    if name is None:
        return ""
    if name == CHAT:
        return "\nIt was trained on the prompts that the tokenizer's `apply_chat_template` makes for generation.\n"
    text = template(name).prompt({"instruction": "{instruction}"})
    about = f"It was trained on this prompt (template `{name}`), as a Python string; the answer follows it directly:"
    return f"\n{about}\n\n```python\n{text!r}\n```\n"


def _recipe(config: CheckpointConfig) -> str:
    adapter, provenance = config.adapter_config, config.provenance_config
    rows = {field.name: getattr(adapter, field.name) for field in dataclasses.fields(adapter)}
    rows |= rows.pop("hyperparameters").to_json()
    rows |= {"prompt template": provenance.prompt_template, "cutoff_len": provenance.cutoff_len}
    without_row = _WITHOUT_ROW | {flag.name for flag in hyperparameter_flags()}
    affecting = TrainConfig.names_affecting("weights")
    for name, value in (provenance.train_settings or {}).items():
        if name in affecting and name not in without_row and not name.startswith("lora_"):
            rows[name] = value
    return "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items() if value not in (None, []))


def _cell(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(text.replace("|", "\\|").split())
