"""Small random models of many architectures of transformers: decoders, encoder-decoders, an encoder."""

import dataclasses

import torch
import transformers
from reference.tiny import VOCABULARY, tokens
from torch import nn

GROUPED = {"num_key_value_heads": 2}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """name: of the transformers classes. attention: the linear layers of its attention. linear: how many the model has,
    without its output head. head: what follows the name in the model's class. config: the configuration's class, where
    its name does not follow from the model's.
    """

    name: str
    attention: tuple[str, ...]
    linear: int
    settings: dict = dataclasses.field(default_factory=dict)
    config: str = ""
    head: str = "ForCausalLM"

    def __str__(self):
        return self.name

    @property
    def has_encoder(self) -> bool:
        """Whether rows are read by an encoder and continued by a decoder."""
        return self.head == "ForConditionalGeneration"

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Two layers (of encoder and decoder each) of width 16 with random weights, the same at every call."""
        torch.manual_seed(0)
        settings = SIZES | {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        if self.has_encoder:
            settings = SIZES | {"decoder_start_token_id": 0}
        config = getattr(transformers, self.config or f"{self.name}Config")(**settings | self.settings)
        return getattr(transformers, f"{self.name}{self.head}")(config).to(dtype).eval()

    def inputs(self, rows: int = 4) -> dict[str, torch.Tensor]:
        """Arguments of a forward on random tokens."""
        return {"input_ids": tokens(rows)} | ({"decoder_input_ids": tokens(rows, 5, 3)} if self.has_encoder else {})


SIZES = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
ARCHITECTURES = [
    Architecture("Llama", QKVO, 14, GROUPED),
    Architecture("Mistral", QKVO, 14, {**GROUPED, "sliding_window": 4}),
    Architecture("Qwen2", QKVO, 14, GROUPED),
    Architecture("Qwen3", QKVO, 14, {**GROUPED, "head_dim": 6}),
    Architecture("Gemma", QKVO, 14, {"num_key_value_heads": 1, "head_dim": 8}),
    # Soft-capped logits: the model's own head must be used.
    Architecture("Gemma2", QKVO, 14, {**GROUPED, "head_dim": 8, "final_logit_softcapping": 2.0}),
    Architecture("Gemma3", QKVO, 14, {**GROUPED, "head_dim": 8}, config="Gemma3TextConfig"),
    Architecture("Phi", ("q_proj", "k_proj", "v_proj", "dense"), 12, GROUPED),
    Architecture("Phi3", ("qkv_proj", "o_proj"), 8, GROUPED),
    Architecture("GPT2", ("c_attn", "attn.c_proj"), 8, head="LMHeadModel"),
    Architecture("GPTNeoX", ("query_key_value", "attention.dense"), 8),
]

# Two layers of an encoder and two of a decoder; the decoder attends twice.
BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.4, "forced_eos_token_id": None}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "initializer_factor": 3.0}
T5["attn_implementation"] = "eager"  # the fused one picks another kernel where the bias of positions is frozen
OTHERS = [
    Architecture("T5", ("q", "k", "v", "o"), 2 * (4 + 2) + 2 * (8 + 2), T5, head="ForConditionalGeneration"),
    Architecture(
        "Bart",
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        2 * (4 + 2) + 2 * (8 + 2),
        BART,
        head="ForConditionalGeneration",
    ),
    # The pooler and the classifier see one position of each row.
    Architecture(
        "Bert", ("query", "key", "value", "attention.output.dense"), 2 * 6 + 2, head="ForSequenceClassification"
    ),
]
