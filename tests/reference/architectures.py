"""Small random models of many architectures of transformers."""

import dataclasses

import torch
import transformers
from reference.tiny import VOCABULARY
from torch import nn

GROUPED = {"num_key_value_heads": 2}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """name: of the transformers classes. attention: the linear layers of its attention. linear: how many a block has.

    config: the configuration's class, where its name does not follow from the model's.
    """

    name: str
    attention: tuple[str, ...]
    linear: int
    settings: dict = dataclasses.field(default_factory=dict)
    config: str = ""

    def __str__(self):
        return self.name

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Two layers of width 16 with random weights, the same at every call."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config or f"{self.name}Config")(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.4,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            **self.settings,
        )
        model_class = f"{self.name}LMHeadModel" if self.name == "GPT2" else f"{self.name}ForCausalLM"
        return getattr(transformers, model_class)(config).to(dtype).eval()


QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
ARCHITECTURES = [
    Architecture("Llama", QKVO, 7, GROUPED),
    Architecture("Mistral", QKVO, 7, {**GROUPED, "sliding_window": 4}),
    Architecture("Qwen2", QKVO, 7, GROUPED),
    Architecture("Qwen3", QKVO, 7, {**GROUPED, "head_dim": 6}),
    Architecture("Gemma", QKVO, 7, {"num_key_value_heads": 1, "head_dim": 8}),
    # Soft-capped logits: the model's own head must be used.
    Architecture("Gemma2", QKVO, 7, {**GROUPED, "head_dim": 8, "final_logit_softcapping": 2.0}),
    Architecture("Gemma3", QKVO, 7, {**GROUPED, "head_dim": 8}, config="Gemma3TextConfig"),
    Architecture("Phi", ("q_proj", "k_proj", "v_proj", "dense"), 6, GROUPED),
    Architecture("Phi3", ("qkv_proj", "o_proj"), 4, GROUPED),
    Architecture("GPT2", ("c_attn", "attn.c_proj"), 4),
    Architecture("GPTNeoX", ("query_key_value", "attention.dense"), 4),
]
