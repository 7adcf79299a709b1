"""Training of language models: the encoded examples, the model, and losses with or without shared prompt prefixes."""

import dataclasses
from collections.abc import Iterable

import datasets
import numpy as np
from transformers import PreTrainedModel

from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.layer import is_linear, layer_class
from mtl_lora.adapter.targets import find_targets, fused_experts, output_head, targets_for
from mtl_lora.base_model import choose_attention
from mtl_lora.errors import note
from mtl_lora.language.batches import CheckedLosses, Collator, sharing_probe, token_losses, training_rows
from mtl_lora.language.encode import CHAT, Encoder
from mtl_lora.language.prefix import Packer, longest_pair, prefixes_to_share
from mtl_lora.training.rows import row_columns
from mtl_lora.training.run import Run


class LanguageRun(Run):
    """A training run of a causal language model."""

    shortened_at = "the middle of their instructions"

    def place_adapter(self, adapter: AdapterConfig, structure: PreTrainedModel) -> tuple[AdapterConfig, list[str]]:
        return in_language_model(adapter, structure)

    def rows(self, digest: str) -> datasets.Dataset:
        config, self.tokenizer = self.config, self.base.tokenizer()
        encoder = Encoder(self.tokenizer, config.template, config.cutoff_len, self.tasks)
        return training_rows(config.data_path, encoder, config.cache_dir, config.task, digest)

    def plan(self, structure: PreTrainedModel) -> tuple[np.ndarray, bool]:
        config, columns = self.config, row_columns(self.train)
        self.prefixes, about = {}, "prompt prefixes are not shared (--cuda_graphs)"
        if not self.cuda_graphs:
            self.prefixes, about = prefixes_to_share(config.reuse_prefix, self.train, structure, self.adapter.dropout)
        note(about)
        lengths = columns["length"]
        if not config.token_budget:  # a token budget counts whole prompts
            shared = np.array([len(self.prefixes.get(task.id, ())) for task in self.tasks])
            lengths = lengths - shared[columns["task_id"]]
        return lengths, bool(self.prefixes)

    def load_base(self) -> PreTrainedModel:
        model = super().load_base()
        choose_attention(model, self.arguments.device, self.config.cutoff_len)
        return model

    def ends(self):
        config, losses, packer = self.config, token_losses, None
        if self.prefixes:
            needs_ids, pad = layer_class(self.adapter.method).needs_task_ids, self.tokenizer.pad_token_id
            packer, columns = Packer(self.prefixes, needs_ids, pad), row_columns(self.train)
            pair = longest_pair(columns["length"], columns["task_id"], self.prefixes)
            probe = sharing_probe([self.train[index] for index in pair], packer)
            losses = CheckedLosses(probe, dropout=config.reuse_prefix == "always")  # perhaps the base model's own
        lengths = self.recorded_lengths()
        return Collator(self.tokenizer.pad_token_id, config.train_on_inputs, packer, lengths), losses

    def facts(self) -> dict[str, object]:
        return {"shared_prefixes": bool(self.prefixes)}

    def deciding_facts(self, configuration: dict) -> dict[str, object]:
        shared = configuration.get("shared_prefixes", False)
        return super().deciding_facts(configuration) | {"shared prompt prefixes, see --reuse_prefix": shared}

    def provenance(self) -> dict[str, object]:
        template = self.config.template
        return {
            "prompt_template": template,
            "chat_template": self.tokenizer.get_chat_template() if template == CHAT else None,
            "cutoff_len": self.config.cutoff_len,
        }


RUN = LanguageRun


def in_language_model(adapter: AdapterConfig, structure: PreTrainedModel) -> tuple[AdapterConfig, list[str]]:
    """(the adapter without targets that text does not reach, such as image or audio towers, notes on what gets none).

    Raises ``UserError`` as ``find_targets`` does.
    """
    weights, notes = {name: weight.numel() for name, weight in structure.named_parameters()}, []

    def percentage(names: Iterable[str]) -> str:
        return f"{100 * sum(weights[name] for name in names) / sum(weights.values()):.1f} % of the model's weights"

    within, towers, asked, head = None, [], adapter.target_modules, output_head(structure)
    if structure.config.get_text_config() is not structure.config:
        within = {*structure.get_decoder().modules(), head}
        towers = [name for name in weights if structure.get_submodule(name.rpartition(".")[0]) not in within]
    targets = find_targets(structure, adapter, within)
    if towers:
        adapter = dataclasses.replace(adapter, target_modules=targets_for(targets, structure))
        where = ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name in towers))
        notes.append(f"text does not reach {where} ({percentage(towers)}), which get no adapter")
    fused = [name for name in fused_experts(structure) if name not in towers]
    endings, saved = ({name.rpartition(".")[2] for name in names} for names in (targets, adapter.modules_to_save))
    if asked == "all-linear":
        linear = [name for name, module in structure.named_modules() if is_linear(module) and module is not head]
        left_out = {name.rpartition(".")[2] for name in linear if f"{name}.weight" not in towers} - endings - saved
        if left_out:
            notes.append(f"all-linear leaves out {', '.join(sorted(left_out))}, which cannot carry an adapter here")
    if fused and (asked == "all-linear" or not endings.isdisjoint(name.rpartition(".")[2] for name in fused)):
        notes.append(f"the experts are fused and get no adapter: {fused[0]} and others hold {percentage(fused)}")
    return adapter, notes
