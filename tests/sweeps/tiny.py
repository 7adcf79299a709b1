"""Tiny random models of every type of transformers, and a tokenizer for them."""

import re
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerFast

VOCABULARY = 120

# Settings by value: what a configuration has of them is set, in every part of it.
SIZES = {
    0: "bos_token_id pad_token_id decoder_start_token_id max_window_layers num_nextn_predict_layers "
    "num_kv_shared_layers",
    1: "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group "
    "num_dense_layers first_k_dense_replace moe_layer_start_index",
    2: "num_hidden_layers n_layer n_layers num_layers num_blocks depth encoder_layers decoder_layers eos_token_id "
    "num_encoder_layers num_decoder_layers num_key_value_heads num_kv_heads swa_num_key_value_heads n_mamba_heads "
    "linear_num_key_heads linear_num_value_heads moe_layer_end_index mamba_n_groups n_groups o_groups moe_k moe_topk "
    "num_experts_per_tok num_experts_per_token moe_top_k",
    3: "num_channels",
    4: "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
    "swa_num_attention_heads num_encoder_attention_heads num_decoder_attention_heads linear_num_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim rotary_dim laurel_rank mamba_n_heads "
    "hidden_size_per_layer_input mamba_num_heads mamba_d_state state_size ssm_state_size",
    8: "head_dim kv_channels swa_head_dim linear_head_dim global_head_dim dim_head linear_key_head_dim d_kv "
    "linear_value_head_dim index_head_dim q_lora_rank kv_lora_rank qk_nope_head_dim v_head_dim o_lora_rank "
    "mamba_d_head mamba_head_dim mamba_dt_rank time_step_rank sliding_window sliding_window_size window_size "
    "local_attention attention_window_size attention_chunk_size mamba_chunk_size chunk_size index_topk "
    "keep_window_size query_pre_attn_scalar",
    14: "patch_size",
    16: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_experts_intermediate_size "
    "moe_shared_expert_intermediate_size",
    28: "image_size",
    # index_n_heads: with few heads the scores of many tokens are 0, and such ties are broken at random.
    32: "hidden_size d_model n_embd lru_width attention_hidden_size embed_dim hidden_size_global index_n_heads",
    40: "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff dff dim_ff ffn_hidden_size mlp_dim "
    "intermediate_size_mlp dense_intermediate_size",
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size",
    256: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length original_max_position_embeddings",
}
OWN = {name: value for value, names in SIZES.items() for name in names.split()}
OWN |= {"tie_word_embeddings": False, "use_sliding_window": True, "swiglu_limit": 4.0, "initializer_range": 0.3}
PATTERNS = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types", "block_types")  # a kind per layer
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXER = {"heads": 2, "kv_heads": 1, "head_dim": 8, "budget": 8, "compress_ratio": 4}
INDEXER = {f"indexer_{name}".replace("indexer_heads", "indexer_n_heads"): value for name, value in INDEXER.items()}
# What else an architecture needs; None takes a setting out.
MORE = {
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "distilbert": {"dim": 32, "hidden_dim": 40},
    "dory": {  # a first, a repeated and a last layer
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "dots1": {"n_routed_experts": 4, "num_local_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 1},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 32},
    "flaubert": {"emb_dim": 32},
    "gemma3n": {"vision_config": {"architecture": "test_vit"}},  # of timm, which a text does not reach
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    **{name: {"decoder_start_token_id": 0} for name in ("mbart", "mt5", "plbart", "switch_transformers", "t5", "umt5")},
    **{name: {"unpadded_vocab_size": VOCABULARY} for name in ("inkling2_text", "inkling2_loop_text")},
    **{name: {"head_dim": 8} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 32},
    "mamba2": {"head_dim": 16},
    "mistral4": {"head_dim": 12},
    "mobilebert": {  # without norms, so that wider layers would saturate its pooler
        "embedding_size": 32,
        "true_hidden_size": 32,
        "intra_bottleneck_size": 32,
        "num_feedforward_networks": 1,
    },
    "moshi": {"sliding_window": 256},  # whose mask has no window, but whose cache has one
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "perceiver": {"num_latents": 8, "d_latents": 32},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
    },
    "roc_bert": {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY},
    "squeezebert": {"embedding_size": 32},
    "xlm": {"emb_dim": 32},
    "xlstm": {"hidden_size": 128, **dict.fromkeys(("v_head_dim", "qk_head_dim", "chunk_size", "num_blocks"))},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "head_dim": None},
    "zaya": {"num_experts_per_tok": 1},
}


def settings_of(config: object) -> dict:
    """Settings of a tiny model for a configuration with the default values, and for its parts."""
    there = {name: value for name, value in vars(config).items() if value is not None}
    found = {name: value for name, value in OWN.items() if name in there}
    found |= {name: type(old)(0) for name, old in there.items() if re.search(r"drop(out)?(_p|_prob|_rate)?$", name)}
    if "qk_rope_head_dim" in found:  # latent attention, whose keys have as many heads as its queries
        found |= {name: 4 for name in ("head_dim", "num_key_value_heads") if name in there}
        found |= {"qk_head_dim": 12} if "qk_head_dim" in there else {}
    kinds = {name: list(dict.fromkeys(there.get(name, ()))) for name in PATTERNS}
    layers = max([2, *map(len, kinds.values())])
    found |= {name: (own * layers)[:layers] for name, own in kinds.items() if own}
    found |= {name: layers for name in ("num_hidden_layers", "num_layers") if name in found}
    parts = {name: there[name] for name in getattr(config, "sub_configs", {}) if name in there}
    return found | {name: settings_of(part) | {"model_type": part.model_type} for name, part in parts.items()}


def updated(settings: dict, more: dict) -> dict:
    """Settings with others in their place, part by part."""
    for name, value in more.items():
        inner = isinstance(value, dict) and isinstance(settings.get(name), dict)
        settings[name] = updated(settings[name], value) if inner else value
    return {name: value for name, value in settings.items() if value is not None or name not in more}


def configure(kind: str) -> PreTrainedConfig:
    """The configuration of a tiny model of a type."""
    return CONFIG_MAPPING[kind](**updated(settings_of(CONFIG_MAPPING[kind]()), MORE.get(kind, {})))


@torch.no_grad()
def build(config: PreTrainedConfig, auto_class: type) -> torch.nn.Module:
    """A model with weights, biases and norms so random that everything counts."""
    torch.manual_seed(0)
    model, draws = auto_class.from_config(config).eval(), torch.Generator().manual_seed(1)
    for weight in model.parameters():
        spread, kept = (0.25, 0.0) if weight.dim() > 1 else (0.1, 1.0)
        weight.copy_(kept * weight + spread * torch.randn(weight.shape, generator=draws))
    model.generation_config = transformers.GenerationConfig()
    return model


def save_tokenizer(
    folder: Path, text: str = "", marks: dict[str, str] | None = None, rows: tuple[str, str] = ("$A", "$A $B:1"), **more
) -> None:
    """Write a tokenizer of whole words: those of ``text``, and w0, w1, ...

    marks: special tokens by name, besides padding, unknown words and the end. rows: what a text and a pair become.
    """
    marks = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"} | (marks or {})
    words = list(dict.fromkeys([*marks.values(), *text.split()]))
    words += [f"w{index}" for index in range(VOCABULARY - len(words))]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    places = [(mark, words.index(mark)) for mark in marks.values()]
    made.post_processor = processors.TemplateProcessing(single=rows[0], pair=rows[1], special_tokens=places)
    PreTrainedTokenizerFast(tokenizer_object=made, **marks, **more).save_pretrained(folder)
