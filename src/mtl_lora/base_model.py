"""The base model as a handle: a name and a trust flag give configuration, weights, tokenizer and fingerprint."""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import struct
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
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import cached_file, logging

from mtl_lora.adapter.layer import is_quantised, is_sharded
from mtl_lora.artifacts import PEFT_CONFIG, PEFT_WEIGHTS
from mtl_lora.config import DTYPES
from mtl_lora.embedded import MODELS, model_folder
from mtl_lora.errors import UserError
from mtl_lora.files import read_object, sha256_of

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
STORED = "stored"  # the dtype in which a model's files hold its weights
INDEX_NAME, WEIGHTS_NAME, CONFIG_NAME = "model.safetensors.index.json", "model.safetensors", "config.json"
# Of a configuration, what changes nothing that is computed.
_NOT_COMPUTED = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
_SAMPLE_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Kind:
    """How models of one kind are loaded, and what a message calls one.

    auto_class: transformers' class that finds the model's own; own_head: whether the model's files need not hold
    what lies outside its ``base_model_prefix``, which is then drawn by torch's seed; embedded: one to try;
    encoder_decoder: the class for an encoder-decoder, where such a model is of this kind too.
    """

    auto_class: type
    words: str
    own_head: bool
    embedded: str
    encoder_decoder: type | None = None

    def auto_class_for(self, config: PreTrainedConfig) -> type:
        """The class that finds the model's own, by its configuration."""
        return self.encoder_decoder if self.encoder_decoder and config.is_encoder_decoder else self.auto_class

    @property
    def way_out(self) -> str:
        """The end of a message about a model that cannot be used."""
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
    """A model by name on the hub, folder, or embedded name, whether its own code may run, and its kind (``KINDS``).

    An ``encoder`` is its class for sequence classification: the encoder below ``base_model_prefix``, a BERT's pooler
    included, whose weights must all be there, and the head outside. A decoder that has such a class will do too.
    A ``vision`` model is one of images alone, or the vision tower of a model that has one (CLIP, SigLIP).
    Every method raises ``UserError`` with one sentence for a model that is missing, gated or of another kind.
    """

    name: str
    trust_remote_code: bool = False
    kind: str = "causal_lm"

    @property
    def path(self) -> str:
        """The name or folder that transformers reads; an embedded model is converted into the cache first."""
        return str(model_folder(self.name)) if self.name in MODELS else self.name

    @property
    def lasting_name(self) -> str:
        """The name as a checkpoint records it: of a folder the whole path, for elsewhere a relative one is another."""
        return str(Path(self.name).resolve()) if self.name not in MODELS and Path(self.name).is_dir() else self.name

    def config(self, **fields) -> PreTrainedConfig:
        """The model's configuration; fields: values to change in it, such as ``num_labels``."""
        with hub_errors(self.name, self.kind):
            config = AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code, **fields)
        if self.kind == "vision":
            config = getattr(config, "vision_config", config)
        self._check_kind(config)
        return config

    def _check_kind(self, config: PreTrainedConfig) -> None:
        """Raise ``UserError`` for an encoder as a causal model, which transformers allows, and texts as vision."""
        if self.kind == "vision" and not hasattr(config, "num_channels"):
            raise UserError(
                f"the model {self.name!r} does not read images ({config.model_type}); {KINDS[self.kind].way_out}"
            )
        if self.kind in ("causal_lm", "text_generator") and _is_encoder(config):
            raise UserError(
                f"the model {self.name!r} is an encoder ({config.model_type}), which does not predict the next token; "
                f"for a head per task pass --system nlu, or {KINDS[self.kind].way_out}"
            )

    def structure(self, **fields) -> PreTrainedModel:
        """The model on the meta device: every module and shape, no memory. fields: as of ``config``."""
        config = self.config(**fields)
        with hub_errors(self.name, self.kind):
            return structure_of(config, self.trust_remote_code, self.kind)

    def check_quantisation(self, training: bool = False) -> None:
        """Raise ``UserError`` for weights of 4 or 8 bits that cannot be read here, or not be trained on."""
        config = self.config()
        settings = getattr(config, "quantization_config", None)
        if not settings:
            return
        method = settings["quant_method"] if isinstance(settings, dict) else settings.quant_method
        about = f"the model {self.name!r} is quantised ({getattr(method, 'value', method)})"
        way_out = "pass the model that it was quantised from"
        with hub_errors(self.name, self.kind):
            try:
                AutoHfQuantizer.from_config(settings, pre_quantized=True).validate_environment(dtype=None)
            except (ImportError, RuntimeError, ValueError) as error:
                raise UserError(f"{about} and cannot be read here ({str(error).splitlines()[0]}); {way_out}") from None
        if training and "bitsandbytes" not in str(method):
            raise UserError(f"{about}, and adapters are trained on bitsandbytes' 4 and 8 bits alone; {way_out}")

    def check_positions(self, tokens: int, way_out: str) -> None:
        """Raise ``UserError``, which ends in ``way_out``, if the model has fewer positions than ``tokens``."""
        most = _positions(self)
        if isinstance(most, int) and 0 < most < tokens:
            raise UserError(
                f"the model {self.name!r} has {most} positions, fewer than the {tokens} tokens of {way_out}"
            )

    def load(self, dtype: str | torch.dtype = "auto", load_in_4bit: bool = False, **options) -> PreTrainedModel:
        """The model with its weights, from safetensors alone.

        dtype: a ``--dtype`` value, one of torch's, or ``STORED``. load_in_4bit: quantised by bitsandbytes as QLoRA does
        (NF4, twice, arXiv 2305.14314), computing in the dtype. options: further arguments of ``from_pretrained``, such
        as ``device_map``, ``attn_implementation``, ``num_labels`` or ``quantization_config``. A head that the files
        hold is loaded if its shapes fit. Raises ``UserError``.
        """
        kind = KINDS[self.kind]
        if "torch_dtype" in options:  # which transformers would let win over the dtype, or lose to it, by its version
            raise UserError("torch_dtype is not an option; pass dtype")
        if load_in_4bit:
            head = None  # transformers' own choice
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
            if torch.cuda.is_available():  # or every process would take the first GPU
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
                f"the model {self.name!r} holds a PEFT adapter too, which transformers has put on it, so it is not the "
                f"base model alone; move {PEFT_CONFIG} and {PEFT_WEIGHTS} to a folder of their own"
            )
        # transformers draws what is missing at random, and a base model with random weights is not one.
        missing = sorted(report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]})
        if kind.own_head and model.base_model is not model:
            missing = [key for key in missing if key.startswith(f"{model.base_model_prefix}.")]
        if missing:
            if any(".base_layer." in key for key in report["unexpected_keys"]):
                raise UserError(
                    f"the model {self.name!r} was saved with an adapter on it, and its layers would be drawn anew; "
                    "save an adapter with mtl_lora.save, and a model after mtl_lora.merge"
                )
            raise UserError(
                f"the model {self.name!r} lacks {len(missing)} of its weights, {missing[0]} among them; {kind.way_out}"
            )
        return model

    def load_as(self, expected: str | None, source: str, **options) -> PreTrainedModel:
        """``load``, where ``source`` is of a model of the class ``expected``; None, or a class that transformers does
        not have, for any. Raises ``UserError`` where another one is loaded."""
        known = expected is not None and hasattr(transformers, expected)
        way_out = f"{source} is of a {expected}: load that and pass it, mtl_lora.load(model, folder)"
        try:
            model = self.load(**options)
        except UserError as error:
            other = known and expected not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
            raise UserError(f"{error}; {way_out}" if other else str(error)) from None
        if known and expected not in {cls.__name__ for cls in type(model).__mro__}:
            raise UserError(f"the base model loads as a {type(model).__name__}, and {way_out}")
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with a pad token by the pad rule."""
        with hub_errors(self.name, self.kind):
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        if self.kind == "encoder" and getattr(self.config(), "type_vocab_size", 2) < 2:  # RoBERTa knows one type alone
            tokenizer.model_input_names = [each for each in tokenizer.model_input_names if each != "token_type_ids"]
        return with_pad_token(tokenizer)

    def weight_files(self) -> list[Path]:
        """The model's safetensors files."""
        path = self.path
        with hub_errors(self.name, self.kind):
            names = {WEIGHTS_NAME}  # before an index beside it, as transformers does
            if not cached_path(path, WEIGHTS_NAME) and (index := cached_path(path, INDEX_NAME)):
                names = set(json.loads(index.read_text())["weight_map"].values())
            found = [cached_path(path, name) for name in sorted(names)]
            if not found or None in found:  # a gated model or no network has a reason of its own
                cached_file(path, WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
        if not found or None in found:
            raise UserError(
                f"the model {self.name!r} has no safetensors weights; convert it with save_pretrained first"
            )
        return found

    def fingerprint(self) -> str:
        """A hash that distinguishes one base model's weights from another's, read from its files in under a second.

        Covers every tensor's name, dtype, shape and the first and last 4 KiB of its data, in name order, so it does
        not depend on how the weights are divided into files. Computed from files because under ZeRO-3 the tensors
        are partitioned.
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
        """A hash of ``config.json`` but for what changes nothing that is computed: weights do not say how they are
        used."""
        value = read_object(cached_path(self.path, CONFIG_NAME), "the model's configuration")
        return sha256_of(json.dumps({key: value[key] for key in value.keys() - _NOT_COMPUTED}, sort_keys=True).encode())

    def check_unchanged(self, fingerprint: str) -> None:
        """Raise ``UserError`` if a folder's files have another fingerprint now: what was loaded may be of either."""
        if Path(self.path).is_dir() and self.fingerprint() != fingerprint:
            raise UserError(f"the model {self.name!r} was replaced meanwhile; run the same command again")

    def _on_this_machine(self) -> "BaseModel":
        """The model by the folder of its files; raises what the hub does where they are not on this machine."""
        from huggingface_hub import snapshot_download

        if Path(self.path).is_dir():
            return self
        folder = snapshot_download(self.path, local_files_only=True, allow_patterns=["*.safetensors*"])
        return dataclasses.replace(self, name=folder)

    def local_fingerprint(self) -> str | None:
        """The fingerprint if the weights are on this machine, else None; nothing is downloaded for it."""
        try:
            return self._on_this_machine().fingerprint()
        except (UserError, OSError, ValueError):
            return None

    def changed_weight(self, weights: Mapping[str, torch.Tensor], prefix: str = "") -> str | None:
        """The name of one of a model's ``weights`` that is not what the files on this machine hold, but for rounding.

        The shape and the first row of every matrix are compared; None if they agree, or if there is nothing to compare.
        prefix: the model's ``base_model_prefix``.
        """
        own = {
            name: weight
            for name, weight in weights.items()
            if weight.dim() == 2 and not (weight.is_meta or is_sharded(weight) or is_quantised(weight))
        }
        # Files of an encoder alone have its names without the prefix.
        own |= {name.removeprefix(f"{prefix}."): weight for name, weight in own.items()}
        for path in self._on_this_machine().weight_files():
            with safe_open(path, framework="pt") as opened:
                for name in [name for name in opened.keys() if name in own]:  # noqa: SIM118 - not a mapping
                    if opened.get_slice(name).get_shape() != list(own[name].shape):  # added tokens, for one
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
                f"{source} was trained on another base model than {self.name!r}: its fingerprint is "
                f"{expected[:12]}..., not {found[:12]}...; pass --base_model"
            )


@functools.cache  # the hub is asked for a configuration each time
def _positions(base: BaseModel) -> int | None:
    most = getattr(base.config().get_text_config(), "max_position_embeddings", None)
    if base.kind == "encoder" and most:
        # RoBERTa counts its positions from behind the padding's.
        for name, module in base.structure().named_modules():
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                most -= module.padding_idx + 1
    return most


def _is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a model reads both directions: transformers has a causal class for a BERT too, for use as a decoder."""
    both = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() & MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()
    return both and not getattr(config, "is_decoder", False) and not config.is_encoder_decoder


def structure_of(config: PreTrainedConfig, trust_remote_code: bool = False, kind: str = "causal_lm") -> PreTrainedModel:
    """A model by its configuration, on the meta device."""
    with torch.device("meta"):
        return KINDS[kind].auto_class_for(config).from_config(config, trust_remote_code=trust_remote_code)


def quiet_deepspeed() -> None:
    """Without a GPU: keep DeepSpeed, which accelerate imports where it is installed, from warning of that."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def device_for_this_process() -> torch.device:
    """The accelerator of this process (its local rank's), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def choose_dtype(name: str | torch.dtype) -> torch.dtype:
    """The dtype of a ``--dtype`` value; ``auto`` is bf16 where the hardware multiplies it natively, else float32."""
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
    """Have a model recompute its activations in the backward pass, in the form that keeps everything's gradients."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # named so in newer versions
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


# On a CPU the backward pass of torch's fused attention takes several times that of the plain products, and at this
# length their (L, L) scores are small.
_EAGER_LENGTH = 512


def choose_attention(model: PreTrainedModel, device: torch.device, length: int) -> None:
    """Have a model that is trained on a device on rows of at most ``length`` tokens take the faster attention."""
    if device.type == "cpu" and length <= _EAGER_LENGTH:
        model.set_attn_implementation("eager")


@functools.cache
def accepts_argument(model_class: type[torch.nn.Module], argument: str) -> bool:
    """Whether the forward of a model's class has an argument of this name."""
    return argument in inspect.signature(model_class.forward).parameters


def last_logits(model: torch.nn.Module, count: int = 1) -> dict[str, int]:
    """The argument that has a model project its last positions alone to the vocabulary, for one that has it."""
    return {"logits_to_keep": count} if accepts_argument(type(model), "logits_to_keep") else {}


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Logits in a dtype in which log-probabilities are exact enough: float64 stays, all else becomes float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """position_ids of an attention mask (B, L): counted from each row's first real token.

    Padding gets 0 or a neighbour's, where nothing looks.
    """
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The pad rule: the tokenizer's own pad token, else unk, else EOS; never a new word, so no embedding is resized.

    Any of them is right, for padding is masked and labels are set by position, never by comparing ids with pad.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has no pad, unk or end-of-sequence token; set one in its tokenizer_config.json")
    return tokenizer


@contextlib.contextmanager
def hub_errors(name: str, kind: str = "causal_lm"):
    """Turn what transformers and the hub raise for a model that cannot be loaded into one sentence."""
    from huggingface_hub.errors import GatedRepoError

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a model's files are input, of which transformers raises whatever it likes
        causes, cause = [], error
        while cause is not None and cause not in causes:
            causes.append(cause)
            cause = cause.__cause__ or cause.__context__
        if any(isinstance(cause, GatedRepoError) for cause in causes) or "gated repo" in str(error):
            raise UserError(
                f"the model {name!r} is gated: accept its licence on huggingface.co and log in with `hf auth login`, "
                "or pass a folder that holds it"
            ) from None
        first = str(error).strip().split("\n")[0]
        if name.startswith(("/", "./", "../")) and not Path(name).exists():  # the hub's reason is about names
            first = "there is no such folder"
        raise UserError(f"the model {name!r} cannot be loaded ({first}); {KINDS[kind].way_out}") from None
    finally:
        logging.set_verbosity(verbosity)


def cached_path(name: str, filename: str) -> Path | None:
    """A file of a model by folder or hub name, downloaded if need be; None where there is none."""
    path = cached_file(
        name,
        filename,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(path) if path else None
