"""Export a plain model folder for one task: the adapter merged into the base model's weights, and the tokenizer."""

import sys
from pathlib import Path

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import GENERATION_CONFIG_NAME

import mtl_lora
from mtl_lora import files
from mtl_lora.adapter.checkpoint import read_config, read_weights
from mtl_lora.adapter.inject import require_finite
from mtl_lora.adapter.layer import layer_class, task_index
from mtl_lora.base_model import STORED, BaseModel, cached_path, hub_errors, quiet_deepspeed
from mtl_lora.errors import UserError, require_package
from mtl_lora.export.model_card import model_card, read_scores
from mtl_lora.export.peft import CARD_NAME, base_for, load_base, tasks_of_heads
from mtl_lora.export.peft import recorded_base as recorded_base  # the command calls it on this module
from mtl_lora.nlu.model import single_task

# The files that transformers writes for a model and its tokenizer.
FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "*.py"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*"),
)
# A base model with any of these has a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
TOKENIZER_FILES += ("spiece.model",)


def export_merged(
    checkpoint: str | Path,
    output: str | Path,
    task: str | None = None,
    base_model: BaseModel | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Write a plain model that equals the base model with the adapter for ``task``, and return its folder.

    ``AutoModelForCausalLM.from_pretrained`` loads it; for an encoder ``AutoModelForSequenceClassification`` does, with
    the task's head, and a model card lies beside it. task: may be None on a language model if the method is the same
    for every task. base_model: None for the recorded one. dtype: ``auto`` is the base model's own, so that the files do
    not depend on the machine. Raises ``UserError`` for a method without factors, an unknown task, a quantised base
    model, a base model other than the one trained on, a damaged checkpoint, an ``output`` in use, and a merged weight
    that its dtype cannot hold.
    """
    quiet_deepspeed()
    config = read_config(checkpoint)
    adapter, method = config.adapter_config, layer_class(config.adapter_config.method)
    method.require_factors()
    heads = tasks_of_heads(config)
    if task is None and (heads or method.needs_task_ids):
        own = "a head" if heads else "weights"
        raise UserError(f"{method.title} has {own} for each task; pass --task, one of {', '.join(adapter.tasks)}")
    if task is not None:
        task_index(adapter.tasks, task)
    base_model = base_for(checkpoint, config, base_model)
    # Validate before loading the base model.
    inputs = [checkpoint, base_model.path]
    written = (*FILES, CARD_NAME) if heads else FILES
    files.check_output(output, written, overwrite, inputs)
    scores = read_scores(checkpoint, config, None) if heads else {}
    read_weights(checkpoint, config)
    if getattr(base_model.config(), "quantization_config", None):
        raise UserError(
            f"the base model {base_model.name!r} is quantised, so the adapter cannot be merged into its weights; pass "
            "--base_model with the model it was quantised from, or export with the peft command"
        )
    if not heads:
        part = base_model.structure()
        if type(part.config) not in AutoModelForCausalLM._model_mapping and not hasattr(part.config, "auto_map"):
            raise UserError(
                f"{type(part).__name__} is a part of {base_model.name!r} that transformers cannot load alone; use the "
                "checkpoint itself, or export it with the peft command"
            )
    base_model.check_fingerprint(config.provenance_config.base_fingerprint, base_model.fingerprint(), checkpoint)
    in_4bit = config.provenance_config.load_in_4bit
    require_package("load_in_4bit", "bitsandbytes", in_4bit)
    for note in config.provenance_config.untrained_note([task]):
        print(note, file=sys.stderr)
    base = load_base(base_model, config, STORED if dtype == "auto" else dtype, in_4bit)
    # An adapter trained on 4-bit weights fits their dequantised values, not the weights that they were quantised from.
    model = mtl_lora.load(base.dequantize() if in_4bit else base, checkpoint)
    if heads:
        single_task(model, task)
    else:
        mtl_lora.merge(model, task)
    for name, weight in model.named_parameters():  # also those outside the adapter's layers
        require_finite(name.removesuffix(".weight"), weight)
    with files.atomic_directory(output, written, overwrite, inputs) as folder:
        try:
            model.save_pretrained(folder)
        except ValueError as error:
            if "eneration" not in str(error):
                raise
            raise UserError(
                f"transformers {transformers.__version__} does not write the merged model "
                f"({' '.join(str(error).split())}); correct the base model's {GENERATION_CONFIG_NAME}"
            ) from None
        _save_tokenizer(base_model, folder)
        if heads:
            files.write_text(folder / CARD_NAME, model_card(task, config, base_model.name, None, scores.get(task)))
    return Path(output)


def _save_tokenizer(base_model: BaseModel, folder: Path) -> None:
    """Write the base model's own tokenizer, unchanged: the pad rule is for programs that need to pad."""
    # Without tokenizer files transformers makes up an empty tokenizer for some architectures.
    if not any(cached_path(base_model.path, name) for name in TOKENIZER_FILES):
        print(f"note: no tokenizer was written, since the base model {base_model.name!r} has none", file=sys.stderr)
        return
    with hub_errors(base_model.name, base_model.kind):
        tokenizer = AutoTokenizer.from_pretrained(base_model.path, trust_remote_code=base_model.trust_remote_code)
    tokenizer.save_pretrained(folder)
