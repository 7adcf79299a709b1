"""A plain model folder for one task: the adapter folded into the base model's weights, its tokenizer beside it."""

import sys
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer

import mtl_lora
from mtl_lora.adapter.checkpoint import read_config, read_weights
from mtl_lora.adapter.inject import layer_class
from mtl_lora.base_model import BaseModel, cached_path, choose_dtype, hub_errors
from mtl_lora.config import DTYPES
from mtl_lora.errors import UserError
from mtl_lora.export.folders import check_output, whole_folder
from mtl_lora.export.peft_format import check_task

# What transformers writes for a model and its tokenizer.
FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "*.py"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*"),
)

# Any of them is a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def export_merged(
    checkpoint: str | Path,
    output: str | Path,
    task: str | None = None,
    base_model: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write the model that equals the adapter for ``task``, for ``AutoModelForCausalLM.from_pretrained``.

    task: may be None for a method that is the same for every task. dtype: ``auto`` is the base model's own (float32
    for one that is neither bf16 nor float32), so that the files do not depend on the machine. Raises ``UserError``
    for a task that is not there, a quantised base, another base, a damaged checkpoint, and an ``output`` in use.
    """
    config = read_config(checkpoint)
    adapter = config.adapter_config
    if task is None and layer_class(adapter.method).needs_task_ids:
        raise UserError(f"{adapter.method} needs a task; pass --task, one of {', '.join(adapter.tasks)}")
    if task is not None:
        check_task(adapter.tasks, task)
    base_model = base_model or config.origin_config.base_model
    if base_model is None:
        raise UserError(f"{checkpoint} does not say its base model; pass --base_model")
    # What is wrong is told before the base model is loaded.
    inputs = [checkpoint, BaseModel(base_model).path]
    check_output(output, FILES, overwrite, inputs)
    read_weights(checkpoint, config)
    settings = BaseModel(base_model, trust_remote_code).config()
    if getattr(settings, "quantization_config", None):
        raise UserError(
            f"the base model {base_model!r} is quantised and cannot take the adapter into its weights; pass "
            "--base_model with the model it was quantised from, or export with the peft command"
        )
    base = BaseModel(base_model, trust_remote_code)
    base.check_fingerprint(config.origin_config.base_fingerprint, base.fingerprint(), checkpoint)
    if dtype == "auto":
        own = (name for name in DTYPES if name != "auto" and choose_dtype(name) == settings.dtype)
        dtype = next(own, "fp32")
    model = mtl_lora.load(BaseModel(base_model, trust_remote_code).load(dtype), checkpoint)
    untie_changed_head(mtl_lora.merge(model, task))
    with whole_folder(output, FILES, overwrite, inputs) as folder:
        model.save_pretrained(folder)
        _save_tokenizer(base_model, folder, trust_remote_code)
    return Path(output)


def untie_changed_head(model: nn.Module) -> None:
    """Say in the configuration that head and embedding differ, where the adapter was on one of a tied pair."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and model.config.tie_word_embeddings and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False


def _save_tokenizer(base_model: str, folder: Path, trust_remote_code: bool) -> None:
    """The base model's own, unchanged; the pad rule is for whoever needs to pad."""
    # Without its files transformers makes an empty tokenizer up for some architectures.
    if not any(cached_path(BaseModel(base_model).path, name) for name in TOKENIZER_FILES):
        print(f"note: no tokenizer was written, for the base model {base_model!r} has none", file=sys.stderr)
        return
    with hub_errors(base_model):
        tokenizer = AutoTokenizer.from_pretrained(BaseModel(base_model).path, trust_remote_code=trust_remote_code)
    tokenizer.save_pretrained(folder)
