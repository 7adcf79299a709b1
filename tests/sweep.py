"""Every causal language model of transformers against slow references: losses, scores, answers, files, gradients.

    python tests/sweep.py --log FILE                     # all of them; those that FILE has already are left out
    python tests/sweep.py --log FILE --only lfm2 mamba
    python tests/sweep.py --log FILE --only              # only the table of what FILE has

Each architecture is built tiny and random and written to a folder with a tokenizer; an MTL-LoRA checkpoint on it then
goes through what train, evaluate and export do. The reference is one row alone: no padding, no cache, all logits. Each
runs in a process of its own with limits, and becomes a JSON line: by check the largest difference relative to
1 + |value|, "refused: ..." for a sentence of the library, or "error: ...".
"""

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import traceback
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
sys.path.insert(0, str(Path(__file__).parent))

import datasets
import peft
import torch
import transformers
from reference.tiny import adapter_config, adapter_gradients, randomise
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import mtl_lora
from mtl_lora import Provenance, route
from mtl_lora.adapter.layer import is_linear
from mtl_lora.adapter.targets import adapter_layers, output_head
from mtl_lora.base_model import BaseModel, choose_attention, with_pad_token
from mtl_lora.errors import UserError
from mtl_lora.export.merge import export_merged
from mtl_lora.export.peft import export_peft
from mtl_lora.language.answering import OptionScorer, PrefixCaches, continuations
from mtl_lora.language.batches import CheckedLosses, Collator, sharing_probe, token_losses
from mtl_lora.language.config import EvalConfig
from mtl_lora.language.encode import TEMPLATES
from mtl_lora.language.evaluate import Evaluator
from mtl_lora.language.examples import Example
from mtl_lora.language.prefix import Packer, longest_pair, prefixes_to_share
from mtl_lora.language.tasks import Task, TaskSet
from mtl_lora.language.token_cache import COLUMNS
from mtl_lora.language.train import in_language_model

VOCABULARY = 120
TOLERANCE = {"fp64": 1e-4, "fp32": 3e-3}  # norms and softmaxes of many models are taken in float32
NAMES = "tides", "maps", "birds", "rivers"
OPTIONS = {"tides": ("high", "low", "very low"), "maps": ("a", "b c"), "birds": ("owl", "owl owl crow"), "rivers": ()}
TASKS = TaskSet(tuple(Task(name, index, OPTIONS[name], answer_prefix="it is ") for index, name in enumerate(NAMES)))

# ---- tiny models ----

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
    "dots1": {"n_routed_experts": 4, "num_local_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "falcon_h1": {"mamba_d_ssm": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    **{name: {"head_dim": 8} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "moshi": {"sliding_window": 256},  # whose mask has no window, but whose cache has one
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
    },
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


@torch.no_grad()
def build(kind: str) -> tuple[torch.nn.Module, object]:
    """(the model, with weights, biases and norms so random that everything counts; its configuration)."""
    config = CONFIG_MAPPING[kind](**updated(settings_of(CONFIG_MAPPING[kind]()), MORE.get(kind, {})))
    torch.manual_seed(0)
    model, draws = AutoModelForCausalLM.from_config(config).eval(), torch.Generator().manual_seed(1)
    for weight in model.parameters():
        spread, kept = (0.25, 0.0) if weight.dim() > 1 else (0.1, 1.0)
        weight.copy_(kept * weight + spread * torch.randn(weight.shape, generator=draws))
    model.generation_config = transformers.GenerationConfig()
    return model, config


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of whole words: those of the template and of the tasks, and w0, w1, ..."""
    plain, options = TEMPLATES["plain"], [option for each in OPTIONS.values() for option in each]
    words = ["<pad>", "<unk>", "<end>", *" ".join([plain.opening, plain.closing, "it is", *options]).split()]
    words = list(dict.fromkeys(words))
    words += [f"w{index}" for index in range(VOCABULARY - len(words))]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


# ---- the slow reference ----


def logits_of(model: torch.nn.Module, ids: list[int], task_id: int) -> torch.Tensor:
    """The logits of a row alone, (L, V)."""
    with route.use(torch.tensor([task_id])):
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def slow_scores(model: torch.nn.Module, encoder, question) -> list[float]:
    """The log-probability of each option from where they differ."""
    (shared, options), scores = continuations(question, encoder), []
    for option in options:
        ids = question.prompt_ids + shared + option
        logp = logits_of(model, ids, question.task.id).log_softmax(-1)
        scores.append(sum(logp[place - 1, ids[place]].item() for place in range(len(ids) - len(option), len(ids))))
    return scores


def slow_greedy(model: torch.nn.Module, encoder, question, most: int) -> tuple[str, float]:
    """(the text, by how much the second best token was at least behind)."""
    ids, margin = list(question.prompt_ids), float("inf")
    while len(ids) < len(question.prompt_ids) + most and ids[-1] != encoder.end_id:
        (first, second), (best, _) = logits_of(model, ids, question.task.id)[-1].topk(2)
        margin = min(margin, (first - second).item())
        ids.append(best.item())
    return encoder.tokenizer.decode(ids[len(question.prompt_ids) :], skip_special_tokens=True), margin


def apart(found, expected) -> float:
    """The largest difference relative to 1 + |expected|."""
    found, expected = (torch.as_tensor(each, dtype=torch.float64).detach() for each in (found, expected))
    return ((found - expected).abs() / (1 + expected.abs())).max().item()


def example(task: int, index: int, words: int) -> Example:
    """An example of random words, the first of which all examples of a task have."""
    own = torch.randint(0, 80, (words,), generator=torch.Generator().manual_seed(97 * task + index)).tolist()
    answers = OPTIONS[NAMES[task]] or ("w5 w6",)
    answer = answers[index % len(answers)]
    text = " ".join(f"w{number}" for number in [*range(10 * task, 10 * task + 9), *own])
    return Example(text, "", f"it is {answer}", answer, task, index)


@torch.no_grad()
def called(model: torch.nn.Module) -> list[str]:
    """The names of the linear layers that a forward calls, without the head and experts."""
    found, head = [], output_head(model)
    for name, module in model.named_modules():
        if is_linear(module) and module is not head and "experts." not in name:
            module.register_forward_hook(lambda *_, name=name: found.append(name))
    logits_of(model, [5, 6, 7, 8], 0)
    return list(dict.fromkeys(found))


# ---- the checks ----


class Checks:
    """The checks of one architecture; ``record`` becomes its line of the log."""

    def __init__(self, kind: str, folder: Path, dtypes: list[str]):
        self.kind, self.dtypes = kind, dtypes
        self.base, self.checkpoint = folder / "base", folder / "checkpoint"
        self.record: dict = {"kind": kind}

    def attempt(self, name: str, check, *arguments) -> object:
        """Run a check and record what it returns or raises, and what it says."""
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                result = check(*arguments)
            except UserError as error:
                result = f"refused: {error}"
            except Exception as error:
                places = traceback.extract_tb(error.__traceback__)
                inner = [one for one in places if "/mtl_lora/" in one.filename] + places[-1:]
                where = " ".join(f"{Path(one.filename).name}:{one.lineno}" for one in inner[-4:])
                result = f"error: {type(error).__name__}: {str(error)[:300]} [{where}]"
        if not isinstance(result, Evaluator):
            self.record[name] = result
        lines = [line for line in said.getvalue().splitlines() if re.search("shared|padding|two are run|vocabul", line)]
        if lines:
            self.record.setdefault("said", {})[name] = lines
        return result

    def all(self) -> dict:
        if self.attempt("build", self.build) is None:
            built = self.record
            for dtype in self.dtypes:
                self.dtype, self.record = dtype, {**built, "dtype": dtype}
                if self.attempt("load", self.load) is None and self.of_model():
                    break
        return self.record

    def of_model(self) -> bool:
        """Run all checks; returns whether the model runs in this dtype."""
        if str(self.attempt("reference", self.reference)).startswith("error"):
            return False
        self.attempt("losses", self.losses, False)
        self.attempt("losses_eager", self.losses, True)
        self.model.eval()
        self.attempt("saved", self.saved)
        made = self.attempt("evaluator", self.evaluator)
        for reuse in (True, False) if isinstance(made, Evaluator) else ():
            made.caches = PrefixCaches(made.model, made.prefixes) if reuse else None
            made.scorer = OptionScorer(made.model, made.encoder, made.caches)
            self.attempt(f"scores_{reuse}", self.scores, made)
            self.attempt(f"answers_{reuse}", self.answers, made)
        # A mask in float64 may be infinite in the float32 of an eager softmax.
        if "which are not finite" in str(self.record) and self.dtype != self.dtypes[-1]:
            return False
        for name in ("peft", "merged_export", "merge", "unload"):
            self.attempt(name, getattr(self, name))
        return True

    def build(self) -> None:
        model, config = build(self.kind)
        self.record |= {"class": type(model).__name__, "parameters": model.num_parameters()}
        model.save_pretrained(self.base)
        if type(config) is not type(model.config):  # of text and more
            config.save_pretrained(self.base)
        save_tokenizer(self.base)

    def fresh(self) -> torch.nn.Module:
        return BaseModel(str(self.base)).load(self.dtype).eval()

    def load(self) -> None:
        """Put adapters on all linear layers or, where these are refused, on those that a forward calls."""
        base, targets = BaseModel(str(self.base)), "all-linear"
        self.structure = base.structure()
        while True:
            try:
                config = adapter_config(target_modules=targets, tasks=list(NAMES))
                config, self.record["notes"] = in_language_model(config, self.structure)
                self.model = randomise(mtl_lora.inject(self.fresh(), config), spread=0.3).train()
                logits_of(self.model, [5, 6, 7], 0)
                break
            except UserError as error:
                self.record.setdefault("all_linear", f"refused: {error}")
                named = str(error).replace(":", " ").split()
                left = called(self.fresh()) if targets == "all-linear" else [one for one in targets if one not in named]
                if not left or left == targets:
                    raise
                targets = left
        self.record["layers"] = len(adapter_layers(self.model))
        provenance = Provenance(str(self.base), base.fingerprint(), "plain", 128, task_set=TASKS.to_json())
        mtl_lora.save(self.model, self.checkpoint, provenance)
        self.encoder = Evaluator(EvalConfig(checkpoint=str(self.checkpoint), dtype=self.dtype)).encoder

    @torch.no_grad()
    def reference(self) -> dict:
        """How much logits depend on the task and the first token, which the other checks presuppose, and on later
        tokens, on which no causal model depends."""
        self.model.eval()
        ids = torch.randint(10, VOCABULARY, (12,), generator=torch.Generator().manual_seed(3)).tolist()
        one = logits_of(self.model, ids, 0)
        if not one.isfinite().all():
            raise ValueError("logits are not finite")
        other_first, other_last = [ids[0] ^ 1, *ids[1:]], [*ids[:-1], ids[-1] ^ 1]
        return {
            "task": apart(logits_of(self.model, ids, 1), one),
            "first_token": apart(logits_of(self.model, other_first, 0)[-1], one[-1]),
            "not_causal": apart(logits_of(self.model, other_last, 0)[:-1], one[:-1]),
        }

    def losses(self, eager: bool) -> dict:
        """Losses and gradients of a padded batch, with and without shared prefixes, against those of rows alone."""
        model, before, found = self.model.train(), self.model.config._attn_implementation, {}
        if eager:
            choose_attention(model, torch.device("cpu"), 128)
        asked = [
            example(*each) for each in ((0, 0, 3), (1, 0, 9), (2, 1, 1), (0, 1, 6), (3, 0, 12), (0, 2, 4), (1, 1, 2))
        ]
        rows = [{"input_ids": one.prompt_ids + one.answer_ids, **vars(one)} for one in self.encoder.encode(asked)]
        rows = [row | {"prompt_length": len(row["prompt_ids"]), "length": len(row["input_ids"])} for row in rows]
        rows = [{name: row[name] for name in COLUMNS} for row in rows]
        alone = []
        for row in rows:
            logp = logits_of(model, row["input_ids"], row["task_id"]).log_softmax(-1)
            places = range(row["prompt_length"], row["length"])
            alone += [-logp[place - 1, row["input_ids"][place]] for place in places]
        alone = torch.stack(alone)
        weights = torch.linspace(1, 2, len(alone), dtype=alone.dtype)
        (alone * weights).sum().backward()
        expected = adapter_gradients(model)
        lacking = [name for name, one in expected.items() if one is None or not one.any()]
        found |= {"without_gradient": len(lacking)} | ({"lacking": lacking[:4]} if lacking else {})
        expected = {name: one for name, one in expected.items() if name not in lacking}
        scale = max(one.abs().max().item() for one in expected.values())

        def compare(label: str, losses: torch.Tensor) -> None:
            found[label] = apart(losses, alone)
            (losses * weights).sum().backward()
            own = adapter_gradients(model)
            off = [(own[name] - one).abs().max().item() for name, one in expected.items()]
            found[f"{label}_gradients"] = max(off) / scale

        compare("padded", token_losses(model, Collator(0)(rows))[0])
        table = datasets.Dataset.from_list(rows, features=COLUMNS)
        prefixes, found["sharing"] = prefixes_to_share("auto", table, self.structure, 0.0)
        if prefixes:
            packer = Packer(prefixes, True, 0)
            lengths, tasks = (table.with_format("numpy")[name][:] for name in ("length", "task_id"))
            pair = [rows[index] for index in longest_pair(lengths, tasks, prefixes)]
            checked, batch = CheckedLosses(sharing_probe(pair, packer), False), Collator(0, packer=packer)(rows)
            compare("shared", checked(model, batch)[0])
            found["shares"] = checked.shares and "packed" in batch
        model.set_attn_implementation(before)
        return found

    @torch.no_grad()
    def saved(self) -> float:
        """0.0: the same logits after saving and loading."""
        encoded = self.encoder.encode([example(task, task, 4 + task) for task in range(4)])
        self.ids = [(one.prompt_ids, one.task_id) for one in encoded]
        self.routed = [logits_of(self.model, *row) for row in self.ids]
        loaded = mtl_lora.load(self.fresh(), self.checkpoint).eval()
        return max(apart(logits_of(loaded, *row), one) for row, one in zip(self.ids, self.routed, strict=True))

    @torch.no_grad()
    def evaluator(self) -> Evaluator:
        made = Evaluator(EvalConfig(checkpoint=str(self.checkpoint), dtype=self.dtype, max_new_tokens=6))
        asked = [[example(task, index, words) for index, words in enumerate((3, 9, 1, 6))] for task in (0, 1)]
        self.questions = [made.questions(examples, "here") for examples in asked]
        made.prepare(dict.fromkeys(("score", "generate"), self.questions[0] + self.questions[1]))
        made.load()
        self.record["one_by_one"] = made.one_by_one
        every = self.questions[0] + self.questions[1]
        self.slow = {each.prompt_sha256: slow_scores(self.model, made.encoder, each) for each in every}
        self.texts = {each.prompt_sha256: slow_greedy(self.model, made.encoder, each, 6) for each in every}
        return made

    def scores(self, made: Evaluator) -> dict:
        pairs = []
        for asked in self.questions:
            lines = made.answer(asked, "score")
            pairs += [(line["scores"], self.slow[each.prompt_sha256]) for each, line in zip(asked, lines, strict=True)]
        used = {"caches": bool(made.caches and made.caches.usable), "one_pass": made.scorer.one_pass}
        return {"scores": max(apart(*pair) for pair in pairs), **used}

    def answers(self, made: Evaluator) -> dict:
        """How many answers are others, without those that a rounding may decide."""
        wrong = []
        for asked in self.questions:
            for question, line in zip(asked, made.answer(asked, "generate"), strict=True):
                text, margin = self.texts[question.prompt_sha256]
                if line["text"].split() != text.split() and margin > TOLERANCE[self.dtype]:
                    wrong.append((line["text"], text))
        return {"others": len(wrong)} | ({"example": wrong[0]} if wrong else {})

    @torch.no_grad()
    def from_routed(self, model: torch.nn.Module, task: int) -> float:
        """The difference of a model without routing from the routed one."""
        pairs = [(ids, one) for (ids, own), one in zip(self.ids, self.routed, strict=True) if own == task]
        return max(apart(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0], one) for ids, one in pairs)

    def peft(self) -> float:
        folders = export_peft(self.checkpoint, self.checkpoint.parent / "peft", list(NAMES[:2]))
        adapted = [peft.PeftModel.from_pretrained(self.fresh(), folder).eval() for folder in folders]
        return max(self.from_routed(model, task) for task, model in enumerate(adapted))

    def merged_export(self) -> float:
        folder = export_merged(self.checkpoint, self.checkpoint.parent / "merged", NAMES[1], dtype=self.dtype)
        return self.from_routed(BaseModel(str(folder)).load(self.dtype).eval(), 1)

    def merge(self) -> float:
        return self.from_routed(mtl_lora.merge(copy.deepcopy(self.model), NAMES[2]), 2)

    @torch.no_grad()
    def unload(self) -> float:
        plain, base = mtl_lora.unload(self.model), self.fresh()
        return max(apart(logits_of(plain, *row), logits_of(base, *row)) for row in self.ids)


# ---- the table ----


def wrong(record: dict) -> list[str]:
    """The checks of an architecture that raised, or whose difference is more than rounding."""
    most, found = TOLERANCE.get(record.get("dtype"), 0.0), []

    def look(name: str, value: object) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                look(f"{name}.{key}", each)
        elif str(value).startswith("error"):
            found.append(name)
        elif isinstance(value, float | int) and not isinstance(value, bool):
            counted = name.rpartition(".")[2] in ("others", "without_gradient")
            found.extend([name] * (value > 0 if counted else not value <= most))

    for name, value in record.items():
        if name not in ("parameters", "layers", "notes", "said", "reference"):
            look(name, value)
    reference = record["reference"]
    look("reference", reference if isinstance(reference, str) else {"not_causal": reference["not_causal"]})
    return found


def verdict(record: dict) -> str:
    """What came of an architecture, in words."""
    if "died" in record:
        return f"ended by {record['died']}"
    if record["build"] is not None:
        return "not built here"
    if isinstance(record["load"], str):
        return "refused" if record["load"].startswith("refused") else "raises"
    if found := wrong(record):
        return f"differs in {', '.join(found)}"
    notes = {"peft": "no PEFT export", "merged_export": "no merged export", "all_linear": "not all-linear"}
    said = [words for key, words in notes.items() if str(record.get(key)).startswith("refused")]
    return ", ".join(["equal", *said, *["questions one by one"] * record["one_by_one"]])


def table(records: list[dict]) -> str:
    """The model types by verdict."""
    found: dict[str, list[str]] = {}
    for record in records:
        found.setdefault(verdict(record), []).append(record["kind"])
    return "\n".join(f"{words} ({len(kinds)}): {', '.join(kinds)}" for words, kinds in sorted(found.items()))


# ---- processes ----


def run(kind: str, log: Path, memory: int, dtypes: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (memory << 30, memory << 30))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    # Some types of model have a tokenizer of their own, which reads the file of words in another way.
    BaseModel.tokenizer = lambda base: with_pad_token(PreTrainedTokenizerFast.from_pretrained(base.path))
    with tempfile.TemporaryDirectory() as folder:
        record = Checks(kind, Path(folder), dtypes).all()
    with log.open("a") as lines:
        lines.write(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES], help="model types")
    parser.add_argument("--timeout", type=int, default=150, help="seconds for each")
    parser.add_argument("--memory", type=int, default=6, help="GiB for each")
    parser.add_argument("--dtypes", nargs="*", default=[*TOLERANCE], help="the first in which a model runs is used")
    flags = parser.parse_args()
    done = {json.loads(line)["kind"] for line in flags.log.read_text().splitlines()} if flags.log.exists() else set()
    for kind in (kind for kind in flags.only if kind not in done):
        arguments = kind, flags.log, flags.memory, flags.dtypes
        child = multiprocessing.get_context("fork").Process(target=run, args=arguments)
        child.start()
        child.join(flags.timeout)
        if child.exitcode != 0:
            child.kill()
            with flags.log.open("a") as lines:
                lines.write(json.dumps({"kind": kind, "died": child.exitcode or "timeout"}) + "\n")
        print(kind, child.exitcode, file=sys.stderr, flush=True)
    print(table([json.loads(line) for line in flags.log.read_text().splitlines()]))


if __name__ == "__main__":
    main()
