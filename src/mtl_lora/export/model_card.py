"""The model card of an exported task: what it is, its result, its prompt, how to load it, how it was trained."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from mtl_lora import artifacts
from mtl_lora.adapter.checkpoint import CheckpointConfig
from mtl_lora.adapter.config import hyperparameter_flags
from mtl_lora.adapter.layer import layer_class
from mtl_lora.embedded import MODELS
from mtl_lora.errors import UserError
from mtl_lora.language.encode import CHAT, template
from mtl_lora.language.tasks import Task as LanguageTask
from mtl_lora.language.tasks import TaskSet as LanguageTaskSet
from mtl_lora.metrics import METRICS, scale_of, title_of
from mtl_lora.nlu.tasks import Task, TaskSet
from mtl_lora.results import Results
from mtl_lora.systems import part
from mtl_lora.text_table import code_span, markdown_text
from mtl_lora.version import __version__

# Training flags without a row of their own: another row states them, or they are paths on the training machine.
_WITHOUT_ROW = {"base_model", "adapter_name", "lambda_num", "use_rslora", "template", "cutoff_len", "deepspeed"}
_WITHOUT_ROW |= {"trust_remote_code", "start_from"}
_PIPELINES = {"AutoModelForSequenceClassification": "text-classification", "AutoModelForCausalLM": "text-generation"}


def read_scores(checkpoint: str | Path, config: CheckpointConfig, results: str | Path | None) -> dict[str, str]:
    """Return each task's result in words, from a results file of exactly these weights; empty without such a file.

    results: a results file or its folder; None: the evaluation in the checkpoint's folder, ignored if it is of other
    weights. Raises ``UserError`` for a ``results`` of other weights and for a file that is not a results file.
    """
    path = Path(results) if results else Path(checkpoint) / artifacts.EVALUATION
    measured = Results.load_all(path, needed=results is not None)
    own = [each for each in measured if (each.adapter or {}).get("weights_sha256") == config.weights_sha256]
    if results and not own:
        raise UserError(f"the results file {path} does not belong to this checkpoint's weights; evaluate {checkpoint}")
    tasks = dict.fromkeys(task for each in own for task in each.tasks)
    return {task: "; ".join(_score(each, task) for each in own if task in each.tasks) for task in tasks}


def _score(results: Results, task: str) -> str:
    result = results.tasks[task]
    metric = METRICS.get(result.metric)
    scale, unit = scale_of(result.metric), "" if metric is None or metric.lowest < 0 or metric.unit else " %"
    spread = "" if result.stderr is None else f" ± {scale * result.stderr:.1f}"
    protocol = f", protocol {code_span(results.mode)}" if results.mode else ""
    return (
        f"{markdown_text(title_of(result.metric))} {scale * result.value:.1f}{unit}{spread} (n = {result.n}{protocol})"
    )


def task_type(base_class: str | None) -> str | None:
    """Return PEFT's task type of a transformers class, by which PEFT chooses its own class.

    An unknown class, and a model of images and text that predicts the next token, is a CAUSAL_LM; None if PEFT has no
    name for the task.
    """
    if base_class is None or not hasattr(transformers, base_class):
        return "CAUSAL_LM"
    if base_class in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values():
        return "SEQ_2_SEQ_LM"
    if base_class in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or base_class.endswith("ForConditionalGeneration"):
        return "CAUSAL_LM"
    return {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}.get(
        base_class[base_class.rfind("For") :]
    )


def hub_name(base_model: str) -> str | None:
    """Return the name if it is a hub name, else None: a card must not contain a path, which means nothing elsewhere."""
    is_name = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", base_model) and base_model not in MODELS
    return base_model if is_name and not Path(base_model).exists() else None


def error_text(error: float | None) -> str:
    """Return the relative error of a truncated update in words; empty for an exact one."""
    return "" if error is None else f", relative error of the update {error:.3g} (Frobenius norm, all layers)"


def model_card(
    task: str,
    config: CheckpointConfig,
    base_model: str,
    rank: int | None,
    score: str | None,
    error: float | None = None,
    pad_token_id: int | None = None,
) -> str:
    """Return the README.md of one exported task, which can be pushed to a hub unchanged.

    rank: of the exported low-rank pair, or None for a merged model. score: see ``read_scores``. error: relative error
    of a truncated update, None for an exact one. pad_token_id: the one that batches need and the base model's
    configuration lacks, or None.
    """
    adapter, provenance = config.adapter_config, config.provenance_config
    method = layer_class(adapter.method)
    own, prompt = None, _prompt(provenance.prompt_template)
    if provenance.system == "nlu":
        own = TaskSet.from_json(provenance.task_set, "the checkpoint's task set")[task]
    elif provenance.task_set is not None:
        asked = LanguageTaskSet.from_json(provenance.task_set, "the checkpoint's task set")
        prompt += _answers(asked[task]) if task in asked.names else ""
    about_base = f"\nThe base model: {MODELS[base_model].note}\n" if base_model in MODELS else ""
    auto = "AutoModelForCausalLM" if task_type(provenance.base_class) == "CAUSAL_LM" else provenance.base_class
    auto = "AutoModelForSequenceClassification" if own else auto
    header = f"base_model: {json.dumps(base_model)}\n" if hub_name(base_model) else ""
    header += f"pipeline_tag: {_PIPELINES[auto]}\n" if auto in _PIPELINES else ""
    if rank is None:
        title, library = "a plain model", "transformers"
        form = "It is merged into the base model's weights"
    else:
        title, library = f"a PEFT adapter of rank {rank}{error_text(error)}", "peft"
        pair = "a low-rank pair that equals it" if error is None else "the plain LoRA of this rank closest to it"
        form = f"It is written as {pair}, so that PEFT and programs that read PEFT's format run it\nwithout task ids"
    untrained = " The adapter had no training examples of this task." if provenance.untrained_note([task]) else ""
    measured = "" if error is None else " (of the adapter before it was truncated)"
    paper = f" ([arXiv {method.paper}](https://arxiv.org/abs/{method.paper}))" if method.paper else ""
    return f"""---
{header}library_name: {library}
tags:
- lora
- mtl-lora
---

# {markdown_text(task)}: {method.title} as {title}

One task of an adapter trained with {method.title}{paper}.
{form}. Written by mtl-lora {__version__} with
transformers {transformers.__version__} from the weights with sha256 `{config.weights_sha256}`.

Result on {markdown_text(task)}{measured}: {score or "not measured"}.{untrained}
{_about_task(own) if own else ""}{about_base}
## Use

```python
{_use(base_model, rank, auto, own, pad_token_id)}
```
{prompt}
## Recipe

| setting | value |
|---|---|
{_recipe(config)}
"""


def _about_task(task: Task) -> str:
    """Describe what an encoder's outputs mean, and its metric."""
    if task.is_regression:
        low, high = task.regression
        outputs = f"A regression: the only logit is the predicted number, in a range from {low:g} to {high:g}."
    else:
        outputs = f"Labels, in the order of the logits: {_codes(task.labels)}."
    return f"\n{outputs} Metric: {title_of(task.metric_name)}.\n"


def _use(base_model: str, rank: int | None, auto: str, task: Task | None, pad_token_id: int | None) -> str:
    """Return the code that loads the folder, to be copied; auto: the transformers class that loads the model."""
    if rank is None:
        return f"""from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")"""
    base, needed = repr(hub_name(base_model) or "the folder of its base model"), ""
    if base_model in MODELS:
        base = f"BaseModel({base_model!r}).path  # fetched on first use"
        needed = "\nfrom mtl_lora.base_model import BaseModel"
    lines = [f'model = PeftModel.from_pretrained({auto}.from_pretrained(base), "this folder")']
    if task:
        facts = {"num_labels": task.outputs}
        # PEFT's configuration cannot hold these.
        if task.is_regression:
            facts["problem_type"] = "regression"
        else:
            facts["id2label"] = dict(enumerate(task.labels))
            facts["label2id"] = {label: index for index, label in enumerate(task.labels)}
        facts["ignore_mismatched_sizes"] = True  # the base model may have a head of its own
        lines = [f"model = {auto}.from_pretrained(", "    base,"]
        lines += [f"    {name}={value!r}," for name, value in facts.items()]
        lines.append(")")
        if pad_token_id is not None:  # where a decoder reads it, also in a model of text and more
            lines.append(f"model.config.get_text_config().pad_token_id = {pad_token_id}")
        lines.append('model = PeftModel.from_pretrained(model, "this folder")')
    loading = "\n".join(lines)
    return f"""from peft import PeftModel
from transformers import {auto}, AutoTokenizer{needed}

base = {base}
{loading}
tokenizer = AutoTokenizer.from_pretrained(base)"""


def _prompt(name: str | None) -> str:
    """Return the section with the prompt that the adapter was trained with, byte for byte."""
    if name is None:
        return ""
    if name == CHAT:
        return "\nIt was trained on the prompts that the tokenizer's `apply_chat_template` makes for generation.\n"
    text = template(name).prompt({"instruction": "{instruction}"})
    about = f"It was trained on this prompt (template `{name}`), as a Python string; the answer follows it directly:"
    return f"\n{about}\n\n```python\n{text!r}\n```\n"


def _codes(texts: Sequence[str]) -> str:
    return ", ".join(code_span(repr(text)) for text in texts)


def _answers(task: LanguageTask) -> str:
    """Describe how the answers in the training data are written, if the task declares it; else empty."""
    parts = [f"An answer is one of {_codes(task.options)}."] if task.options else []
    if task.options and task.answer_prefix:
        parts.append(f"It follows {_codes([task.answer_prefix])}.")
    if task.question:
        parts.append(f"The instruction of a text is {_codes([task.instruction_of('{text}')])}.")
    return f"\n{' '.join(parts)}\n" if parts else ""


def _recipe(config: CheckpointConfig) -> str:
    adapter, provenance = config.adapter_config, config.provenance_config
    settings = provenance.train_settings or {}
    rows = {field.name: getattr(adapter, field.name) for field in dataclasses.fields(adapter)}
    rows |= rows.pop("hyperparameters").to_json()
    rows |= {"prompt template": provenance.prompt_template, "cutoff_len": provenance.cutoff_len}
    without_row = _WITHOUT_ROW | {flag.name for flag in hyperparameter_flags()}
    # Not its path, which means nothing elsewhere.
    rows["started from"] = "another checkpoint" if settings.get("start_from") else None
    weighted = [task for task in (provenance.task_set or {}).get("tasks", ()) if task.get("weight", 1) != 1]
    rows["loss weights"] = [f"{task['name']} {task['weight']:g}" for task in weighted]
    rows["mtl-lora of the training"] = config.library_version
    affecting = part(provenance.system, "config").TrainConfig.names_affecting("weights")
    for name, value in settings.items():
        if name in affecting and name not in without_row and not name.startswith("lora_"):
            rows[name] = value
    texts = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in rows.items()
        if value not in (None, [])
    }
    return "\n".join(f"| {key} | {markdown_text(text)} |" for key, text in texts.items())
