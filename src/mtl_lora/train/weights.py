"""How many weights recipes would train, counted on models without memory.

    python -m mtl_lora.train.weights < RECIPES     a JSON list of objects with flags of finetune.py

prints a JSON list with ``[trained, all]`` for each, or the sentence that says why it can not be counted.
"""

import json
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import mtl_lora
from mtl_lora.config import AdapterConfig
from mtl_lora.errors import UserError, one_sentence
from mtl_lora.model import one_sentence_for, resolve
from mtl_lora.train.settings import TrainConfig


def model_without_memory(base_model: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """A base model of which only the shapes are there; raises ``UserError`` if its configuration can not be had."""
    with one_sentence_for(base_model):
        config = AutoConfig.from_pretrained(resolve(base_model), trust_remote_code=trust_remote_code)
        return shapes_of(config, trust_remote_code)


def shapes_of(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model by its configuration, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def trained_weights(model: PreTrainedModel, adapter: AdapterConfig) -> tuple[int, int]:
    """(trained, all) weights of a model that gets this adapter; raises ``UserError`` for targets it does not have."""
    mtl_lora.inject(model, adapter)
    return mtl_lora.trainable_parameters(model)


def main() -> None:
    """Count for the recipes on stdin."""
    counts = []
    for flags in json.load(sys.stdin):
        try:
            config = TrainConfig(**flags)
            model = model_without_memory(config.base_model, config.trust_remote_code)
            counts.append(trained_weights(model, config.adapter_config(config.task_set())))
        except UserError as error:
            counts.append(str(error))
    print(json.dumps(counts))


if __name__ == "__main__":
    with one_sentence():
        main()
