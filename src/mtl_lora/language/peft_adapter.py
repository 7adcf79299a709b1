"""A PEFT LoRA folder under the same protocol: for baselines that were trained elsewhere."""

from pathlib import Path

from transformers import PreTrainedModel

from mtl_lora import files
from mtl_lora.errors import UserError

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


class PeftAdapter:
    """What a PEFT folder says of itself; raises ``UserError`` if it is no LoRA in safetensors, or peft is missing."""

    def __init__(self, folder: str | Path):
        self.folder, self.weights = Path(folder), Path(folder) / WEIGHTS_NAME
        self.settings = files.read_json(self.folder / CONFIG_NAME, "the PEFT configuration")
        kind = self.settings.get("peft_type") if isinstance(self.settings, dict) else None
        if kind != "LORA":
            raise UserError(f"{self.folder / CONFIG_NAME} has peft_type {kind!r}; only LORA can be evaluated")
        if not self.weights.is_file():
            raise UserError(f"{self.folder} has no {WEIGHTS_NAME}; other formats, such as .bin, are not read")
        try:
            import peft
        except ImportError:
            raise UserError("--peft needs the package peft; install it with `pip install peft`") from None
        self._peft = peft
        self.base_model = self.settings.get("base_model_name_or_path") or None
        self.weights_sha256 = files.sha256(self.weights)

    def load(self, model: PreTrainedModel) -> PreTrainedModel:
        """``model`` with the adapter in its layers, by PEFT; raises ``UserError`` if they do not fit."""
        before = {name for name, _ in model.named_parameters()}
        try:
            wrapped = self._peft.PeftModel.from_pretrained(model, str(self.folder), torch_device="cpu")
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise UserError(f"PEFT cannot load {self.folder} ({str(error).splitlines()[0]})") from None
        found = wrapped.get_base_model()
        if {name for name, _ in found.named_parameters()} == before:
            raise UserError(f"{self.folder} adapts no layer of this model")
        return found
