"""A handle on the base model: from a name and a trust flag, its configuration, weights, tokenizer and fingerprint."""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import struct
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import cached_file, logging

from mtl_lora.adapter.layer import is_quantised, is_sharded
from mtl_lora.artifacts import CHECKPOINT_CONFIG, PEFT_CONFIG, PEFT_WEIGHTS
from mtl_lora.config import DTYPES
from mtl_lora.embedded import MODELS, model_folder
from mtl_lora.errors import UserError
from mtl_lora.files import read_object, sha256_of

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
STORED = "stored"  # the dtype of the weights in the model's files
INDEX_NAME, WEIGHTS_NAME, CONFIG_NAME = "model.safetensors.index.json", "model.safetensors", "config.json"
# Keys of config.json that do not affect what the model computes.
_NOT_COMPUTED = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
_SAMPLE_BYTES = 4096
LOADING = threading.RLock()  # transformers changes global state while it loads: in two threads it then fails for good
# Causal types that cannot be trained in batches, and why.
_UNFIT = {
    "prophetnet": "its outputs depend on the length of the longest row",
    "reformer": "its training needs rows of one fixed length",
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """How to load one kind of model, and what to call it in messages.

    auto_class: the auto class of transformers that resolves to the model's own class. words: the kind as messages name
    it. own_head: whether the files may lack the weights outside ``base_model_prefix`` (the head), which torch's random
    generator then initialises. embedded: the embedded model to suggest. encoder_decoder: the auto class for
    encoder-decoders, if they belong to this kind.
    """

    auto_class: type
    words: str
    own_head: bool
    embedded: str
    encoder_decoder: type | None = None

    def auto_class_for(self, config: PreTrainedConfig) -> type:
        """Return the auto class for a model with this configuration."""
        return self.encoder_decoder if self.encoder_decoder and config.is_encoder_decoder else self.auto_class

    @property
    def way_out(self) -> str:
        """The advice that ends an error message about a model that cannot be used."""
        return (
            f"pass the folder of {self.words} with safetensors weights, a name on the Hugging Face hub, "
            f"or {self.embedded!r}"
        )


KINDS = {
    "causal_lm": Kind(AutoModelForCausalLM, "a causal language model", False, "smollm2-135m"),
    "encoder": Kind(AutoModelForSequenceClassification, "an encoder", True, "minilm-l6"),
    "text_generator": Kind(
        AutoModelForCausalLM,
        "a causal language model or an encoder-decoder",
        False,
        "smollm2-135m",
        AutoModelForSeq2SeqLM,
    ),
    "vision": Kind(AutoModel, "a vision model", False, "dinov2-small"),
}


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A base model, given by its name on the hub, its folder, or its embedded name.

    trust_remote_code: whether the model's own code may run. kind: a key of ``KINDS``. An ``encoder`` is loaded as its
    sequence-classification class: the weights below ``base_model_prefix``, including BERT's pooler, must all be in the
    files; the head need not be. A decoder that has such a class is accepted too. A ``vision`` model is an image-only
    model, or the vision tower of a model that has one (CLIP, SigLIP). Methods raise ``UserError`` with one
    sentence for a model that is missing, gated or of another kind.
    """

    name: str
    trust_remote_code: bool = False
    kind: str = "causal_lm"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"there is no kind of model {self.kind!r}; kind is one of {', '.join(KINDS)}")

    @property
    def path(self) -> str:
        """The name or folder to pass to transformers; an embedded model is first converted into the cache."""
        return str(model_folder(self.name)) if self.name in MODELS else self.name

    @property
    def lasting_name(self) -> str:
        """The name that a checkpoint records; for a folder the absolute path, which holds from any directory."""
        return str(Path(self.name).resolve()) if self.name not in MODELS and Path(self.name).is_dir() else self.name

    def config(self, **fields) -> PreTrainedConfig:
        """Load the model's configuration. fields: values to override, such as ``num_labels``."""
        with hub_errors(self.name, self.kind):
            config = AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code, **fields)
        if self.kind == "vision":
            config = getattr(config, "vision_config", None) or config
        self._check_kind(config)
        return config

    def _check_kind(self, config: PreTrainedConfig) -> None:
        """Raise ``UserError`` for an encoder as a causal model, which transformers allows, and for text as vision."""
        if self.kind == "vision" and not hasattr(config, "num_channels"):
            raise UserError(
                f"the model {self.name!r} does not read images ({config.model_type}); {KINDS[self.kind].way_out}"
            )
        if self.kind == "causal_lm" and config.model_type in _UNFIT:
            about = f"the model {self.name!r} is of no use here: {_UNFIT[config.model_type]} ({config.model_type})"
            raise UserError(f"{about}; {KINDS[self.kind].way_out}")
        if self.kind in ("causal_lm", "text_generator") and _is_encoder(config):
            raise UserError(
                f"the model {self.name!r} is an encoder ({config.model_type}), which does not predict the next token; "
                f"for a head per task pass --system nlu, or {KINDS[self.kind].way_out}"
            )

    def structure(self, **fields) -> PreTrainedModel:
        """Build the model on the meta device: every module and shape, no memory. fields: as for ``config``."""
        config = self.config(**fields)
        with hub_errors(self.name, self.kind), torch.device("meta"):
            return KINDS[self.kind].auto_class_for(config).from_config(config, trust_remote_code=self.trust_remote_code)

    def check_quantisation(self, training: bool = False) -> None:
        """Raise ``UserError`` for quantised weights that cannot be read here or, with ``training``, be trained on."""
        config = self.config()
        settings = getattr(config, "quantization_config", None)
        if not settings:
            return
        # Early versions of bitsandbytes wrote no method.
        method = settings.get("quant_method", "bitsandbytes") if isinstance(settings, dict) else settings.quant_method
        about = f"the model {self.name!r} is quantised ({getattr(method, 'value', method)})"
        way_out = "pass the model that it was quantised from"
        with hub_errors(self.name, self.kind):
            try:
                AutoHfQuantizer.from_config(settings, pre_quantized=True).validate_environment(dtype=None)
            except (ImportError, RuntimeError, ValueError) as error:
                raise UserError(f"{about} and cannot be read here ({str(error).splitlines()[0]}); {way_out}") from None
        if training and "bitsandbytes" not in str(method):
            raise UserError(f"{about}, but adapters can be trained only on bitsandbytes' 4 and 8 bits; {way_out}")

    def check_positions(self, tokens: int, way_out: str) -> None:
        """Raise ``UserError``, ending in ``way_out``, if the model has fewer than ``tokens`` positions."""
        most = _positions(self)
        if isinstance(most, int) and 0 < most < tokens:
            raise UserError(
                f"the model {self.name!r} has {most} positions, fewer than the {tokens} tokens of {way_out}"
            )

    def load(self, dtype: str | torch.dtype = "auto", load_in_4bit: bool = False, **options) -> PreTrainedModel:
        """Load the model with its weights, from safetensors files only.

        dtype: a ``--dtype`` value, a dtype of torch, or ``STORED``. load_in_4bit: quantise with bitsandbytes as QLoRA
        does (NF4 with double quantisation, arXiv 2305.14314) and compute in the dtype. options: further arguments of
        ``from_pretrained``, such as ``device_map``, ``attn_implementation``, ``num_labels`` or ``quantization_config``.
        A head in the files is loaded if its shapes fit. Raises ``UserError``.
        """
        kind = KINDS[self.kind]
        if "torch_dtype" in options:  # whether it or dtype takes precedence depends on the version of transformers
            raise UserError("torch_dtype is not an option; pass dtype")
        if load_in_4bit:
            head = None  # transformers chooses the modules to leave in full precision
            if kind.own_head:
                structure = self.structure()
                head = [name for name, module in structure.named_children() if module is not structure.base_model]
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=self.config().dtype if dtype == STORED else choose_dtype(dtype),
                llm_int8_skip_modules=head,
            )
            if torch.cuda.is_available():  # otherwise every process would use the first GPU
                options.setdefault("device_map", {"": device_for_this_process()})
        if self.kind == "vision":
            options["config"] = self.config()
        with hub_errors(self.name, self.kind):
            auto_class = kind.auto_class_for(self.config()) if kind.encoder_decoder else kind.auto_class
            model, report = auto_class.from_pretrained(
                self.path,
                dtype="auto" if dtype == STORED else choose_dtype(dtype),
                use_safetensors=True,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=kind.own_head,
                **options,
            )
        self._check_kind(model.config)
        if getattr(model, "_hf_peft_config_loaded", False):
            raise UserError(
                f"the model {self.name!r} also holds a PEFT adapter, which transformers has added to it, so it is not "
                f"the plain base model; move {PEFT_CONFIG} and {PEFT_WEIGHTS} to a folder of their own"
            )
        # transformers initialises missing weights at random, which a base model must not have.
        missing = sorted(report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]})
        if kind.own_head and model.base_model is not model:
            missing = [key for key in missing if key.startswith(f"{model.base_model_prefix}.")]
        if missing:
            if any(".base_layer." in key for key in report["unexpected_keys"]):
                raise UserError(
                    f"the model {self.name!r} was saved with an adapter on it, so its layers would be random; save an "
                    "adapter with mtl_lora.save, and a model after mtl_lora.merge"
                )
            raise UserError(
                f"the model {self.name!r} lacks {len(missing)} of its weights, {missing[0]} among them; {kind.way_out}"
            )
        if model.dtype == torch.float64 and "experts_implementation" not in options:
            model.set_experts_implementation("eager")  # the default's grouped product of torch takes no float64
        return model

    def load_as(self, expected: str | None, source: str, **options) -> PreTrainedModel:
        """Call ``load`` and check that the model has the class ``expected``, the one that ``source`` belongs to.

        expected: None, or a class that transformers does not have, accepts any. Raises ``UserError`` for another class.
        """
        known = expected is not None and hasattr(transformers, expected)
        way_out = f"{source} belongs to a {expected}: load that and pass it to mtl_lora.load(model, folder)"
        try:
            model = self.load(**options)
        except UserError as error:
            other = known and expected not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
            raise UserError(f"{error}; {way_out}" if other else str(error)) from None
        if known and expected not in {cls.__name__ for cls in type(model).__mro__}:
            raise UserError(f"the base model loads as a {type(model).__name__}, but {way_out}")
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer, with a pad token by the pad rule (``with_pad_token``)."""
        with hub_errors(self.name, self.kind):
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        if self.kind == "encoder" and getattr(self.config(), "type_vocab_size", 2) < 2:  # RoBERTa has a single type
            tokenizer.model_input_names = [each for each in tokenizer.model_input_names if each != "token_type_ids"]
        return with_pad_token(tokenizer)

    def weight_files(self) -> list[Path]:
        """Return the model's safetensors files."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError

        path = self.path
        of_hub = not Path(path).is_dir()
        if of_hub:
            self.config()  # says why a model cannot be had
        with hub_errors(self.name, self.kind):
            names = {WEIGHTS_NAME}  # takes precedence over an index beside it, as in transformers
            if not cached_path(path, WEIGHTS_NAME) and (index := cached_path(path, INDEX_NAME)):
                names = set(json.loads(index.read_text())["weight_map"].values())
            found = [cached_path(path, name) for name in sorted(names)]
            if of_hub and (not found or None in found):
                with contextlib.suppress(RemoteEntryNotFoundError):  # any other error names its reason
                    hf_hub_download(path, WEIGHTS_NAME)
        if not found or None in found:
            raise UserError(
                f"the model {self.name!r} has no safetensors weights; convert it with save_pretrained first"
            )
        return found

    def fingerprint(self) -> str:
        """Return a hash that tells one base model's weights from another's, read from its files in under a second.

        It covers every tensor's name, dtype, shape and the first and last 4 KiB of its data, in name order, so it does
        not depend on how the weights are divided into files. It is computed from the files because under ZeRO-3 the
        tensors are partitioned.
        """
        entries = {}
        for path in self.weight_files():
            with hub_errors(self.name, self.kind), path.open("rb") as opened:
                (header_size,) = struct.unpack("<Q", opened.read(8))
                if header_size > path.stat().st_size:
                    raise ValueError(f"{path.name} is not a safetensors file, or was cut off")
                header = json.loads(opened.read(header_size))
                header.pop("__metadata__", None)
                for tensor, facts in header.items():
                    start, end = (8 + header_size + offset for offset in facts["data_offsets"])
                    opened.seek(start)
                    head = opened.read(min(_SAMPLE_BYTES, end - start))
                    opened.seek(max(start, end - _SAMPLE_BYTES))
                    tail = opened.read(min(_SAMPLE_BYTES, end - start))
                    entries[tensor] = (facts["dtype"], facts["shape"], hashlib.sha256(head + tail).hexdigest())
        return hashlib.sha256(json.dumps(sorted(entries.items())).encode()).hexdigest()

    def config_sha256(self) -> str:
        """Return a hash of ``config.json``, which decides how the weights are used, without the keys that do not affect
        the computation."""
        value = read_object(cached_path(self.path, CONFIG_NAME), "the model's configuration")
        return sha256_of(json.dumps({key: value[key] for key in value.keys() - _NOT_COMPUTED}, sort_keys=True).encode())

    def check_unchanged(self, fingerprint: str) -> None:
        """Raise ``UserError`` if the files of a local model no longer have this fingerprint, since the loaded weights
        may then be the old or the new ones."""
        if Path(self.path).is_dir() and self.fingerprint() != fingerprint:
            raise UserError(f"the model {self.name!r} was replaced during the run; run the same command again")

    def _local(self) -> "BaseModel":
        """Return this model under the local folder of its files; raises the hub's error if there is none."""
        from huggingface_hub import snapshot_download

        if Path(self.path).is_dir():
            return self
        folder = snapshot_download(self.path, local_files_only=True, allow_patterns=["*.safetensors*"])
        return dataclasses.replace(self, name=folder)

    def local_fingerprint(self) -> str | None:
        """Return the fingerprint if the weights are on this machine, else None; downloads nothing from the hub."""
        try:
            return self._local().fingerprint()
        except (UserError, OSError, ValueError):
            return None

    def changed_weight(self, weights: Mapping[str, torch.Tensor], prefix: str = "") -> str | None:
        """Return the name of a weight in ``weights`` that differs from the files on this machine by more than rounding.

        Compares the shape and the first row of every matrix; returns None if all agree or there is nothing to compare.
        prefix: the model's ``base_model_prefix``.
        """
        own = {
            name: weight
            for name, weight in weights.items()
            if weight.dim() == 2 and not (weight.is_meta or is_sharded(weight) or is_quantised(weight))
        }
        # The files of a bare encoder name its weights without the prefix.
        own |= {name.removeprefix(f"{prefix}."): weight for name, weight in own.items()}
        for path in self._local().weight_files():
            with safe_open(path, framework="pt") as opened:
                for name in [name for name in opened.keys() if name in own]:  # noqa: SIM118 - not a mapping
                    if opened.get_slice(name).get_shape() != list(own[name].shape):  # such as after adding tokens
                        return name
                    there, here = opened.get_slice(name)[:1].float(), own[name][:1].detach().cpu()
                    near = {"rtol": 0.02, "atol": 1e-3 * there.abs().max()}
                    if not torch.allclose(here.float(), there, **near):
                        return name
        return None

    def check_fingerprint(self, expected: str | None, found: str | None, source: str | Path) -> None:
        """Raise ``UserError`` if both fingerprints are known and differ: ``source`` belongs to another base model."""
        if expected and found and found != expected:
            raise UserError(
                f"{source} was trained on another base model than {self.name!r}: it records the fingerprint "
                f"{expected[:12]}..., not {found[:12]}...; pass that model: --base_model, or load(base_model, folder)"
            )


@functools.cache  # loading a configuration asks the hub each time
def _positions(base: BaseModel) -> int | None:
    most = getattr(base.config().get_text_config(), "max_position_embeddings", None)
    if base.kind == "encoder" and most:
        # RoBERTa's positions start after padding_idx.
        for name, module in base.structure().named_modules():
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                most -= module.padding_idx + 1
    return most


def _is_encoder(config: PreTrainedConfig) -> bool:
    """Return whether a model is bidirectional: transformers has a causal class for BERT too, for use as a decoder."""
    both = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() & MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()
    both |= {"bert-generation", "cpmant", "xlnet"}  # with a causal class only
    return config.model_type in both and not getattr(config, "is_decoder", False) and not config.is_encoder_decoder


def quiet_deepspeed() -> None:
    """Without a GPU: keep DeepSpeed, which accelerate imports if it is installed, from warning about that."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def device_for_this_process() -> torch.device:
    """Return the accelerator of this process, chosen by its local rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def choose_dtype(name: str | torch.dtype) -> torch.dtype:
    """Return the dtype of a ``--dtype`` value; ``auto``: bf16 if the hardware multiplies it natively, else float32."""
    if isinstance(name, torch.dtype) and name in _DTYPES.values():
        return name
    if name in _DTYPES:
        return _DTYPES[name]
    if name != "auto":
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        native = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Make a model recompute its activations in the backward pass, in the non-reentrant form that keeps gradients."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # the name in newer versions
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


# On a CPU the backward pass of torch's fused attention takes several times as long as that of plain matrix products,
# whose (L, L) scores are small up to this length.
_EAGER_LENGTH = 512


def choose_attention(model: PreTrainedModel, device: torch.device, length: int) -> None:
    """Make a model use the faster attention for training on ``device`` with rows of at most ``length`` tokens."""
    if device.type == "cpu" and length <= _EAGER_LENGTH:
        model.set_attn_implementation("eager")


@functools.cache
def accepts_argument(model_class: type[torch.nn.Module], argument: str) -> bool:
    """Return whether the ``forward`` of a model class has an argument of this name."""
    return argument in inspect.signature(model_class.forward).parameters


def last_logits(model: torch.nn.Module, count: int = 1) -> dict[str, int]:
    """Return the argument that limits a model's logits to its last ``count`` positions; empty if it has none."""
    return {"logits_to_keep": count} if accepts_argument(type(model), "logits_to_keep") else {}


def cache_argument(model: torch.nn.Module) -> str:
    """Return the name of a model's KV cache, as an argument and in the output; transformers 5.24 renamed it."""
    return "cache" if accepts_argument(type(model), "cache") else "past_key_values"


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in a dtype precise enough for log-probabilities: float64 is kept, all else becomes float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Return the position_ids (B, L) of an attention mask (B, L), counted from each row's first real token.

    Padding gets 0 or its neighbour's position, which has no effect since padding is masked.
    """
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Apply the pad rule: pad with the pad token, else unk, else EOS; never add a token, so no embedding is resized.

    Any of them is correct, since padding is masked and labels are set by position, never by comparing ids with pad.
    Raises ``UserError`` if the tokenizer has none of them.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has no pad, unk or end-of-sequence token; set one in its tokenizer_config.json")
    return tokenizer


@contextlib.contextmanager
def hub_errors(name: str, kind: str = "causal_lm"):
    """Turn anything that transformers or the hub raises for a model that cannot be loaded into a ``UserError``."""
    from huggingface_hub.errors import GatedRepoError

    LOADING.acquire()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a model's files are user input, for which transformers raises errors of any kind
        causes, cause = [], error
        while cause is not None and cause not in causes:
            causes.append(cause)
            cause = cause.__cause__ or cause.__context__
        if any(isinstance(cause, GatedRepoError) for cause in causes) or "gated repo" in str(error):
            raise UserError(
                f"the model {name!r} is gated: accept its licence on huggingface.co and log in with `hf auth login`, "
                "or pass a folder that holds it"
            ) from None
        is_whole = Path(name, "config.json").is_file()
        if Path(name, CHECKPOINT_CONFIG).is_file() and not is_whole:
            raise UserError(f"{name} is a checkpoint, not a base model; its {CHECKPOINT_CONFIG} names that") from None
        if Path(name, PEFT_CONFIG).is_file() and not is_whole:
            raise UserError(f"{name} is an adapter of PEFT, not a base model; its {PEFT_CONFIG} names that") from None
        first = str(error).strip().split("\n")[0]
        if name.startswith(("/", "./", "../")) and not Path(name).exists():  # the hub would only object to the name
            first = "there is no such folder"
        raise UserError(f"the model {name!r} cannot be loaded ({first}); {KINDS[kind].way_out}") from None
    finally:
        logging.set_verbosity(verbosity)
        LOADING.release()


def cached_path(name: str, filename: str) -> Path | None:
    """Return the path of one file of a model (a folder or hub name), downloaded if needed; None if there is none."""
    path = cached_file(
        name,
        filename,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(path) if path else None
