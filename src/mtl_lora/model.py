"""The base model and its tokenizer: any causal LM of transformers, the dtype rule, the pad rule, the fingerprint."""

import contextlib
import functools
import hashlib
import inspect
import json
import os
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

from mtl_lora.config import DTYPES
from mtl_lora.errors import UserError
from mtl_lora.smollm2 import NAME as SMOLLM2
from mtl_lora.smollm2 import smollm2_folder

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
INDEX_NAME, WEIGHTS_NAME = "model.safetensors.index.json", "model.safetensors"
_SAMPLE_BYTES = 4096
_WAY_OUT = (
    "pass the folder of a causal language model with safetensors weights, a name on the Hugging Face hub, "
    f"or {SMOLLM2!r}"
)


def device_for_this_process() -> torch.device:
    """The accelerator of this process (its local rank's), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def choose_dtype(name: str) -> torch.dtype:
    """The dtype of a ``--dtype`` value; ``auto`` is bf16 where the hardware multiplies it natively, else float32."""
    if name not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    if name in _DTYPES:
        return _DTYPES[name]
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        native = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def resolve(name: str) -> str:
    """The name or folder that transformers reads: the embedded default is converted into the cache first."""
    return str(smollm2_folder()) if name == SMOLLM2 else name


@functools.cache
def takes(model_class: type[torch.nn.Module], argument: str) -> bool:
    """Whether the forward of a model's class has an argument of this name."""
    return argument in inspect.signature(model_class.forward).parameters


def last_logits(model: torch.nn.Module) -> dict[str, int]:
    """The argument that has a model project its last position alone to the vocabulary, for one that has it."""
    return {"logits_to_keep": 1} if takes(type(model), "logits_to_keep") else {}


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Logits in a dtype in which log-probabilities are exact enough: float64 stays, all else becomes float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """position_ids of an attention mask (B, L): counted from each row's first real token.

    Padding gets 0 or a neighbour's, where nothing looks.
    """
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def load_model(name: str, dtype: str = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal LM by name or folder, from safetensors alone.

    Raises ``UserError`` with one sentence for a model that is missing, gated, or not a causal LM.
    """
    with one_sentence_for(name):
        model, report = AutoModelForCausalLM.from_pretrained(
            resolve(name),
            dtype=choose_dtype(dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    # transformers draws what is missing at random; a base model with random weights is none.
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"the model {name!r} lacks {len(missing)} of its weights, {missing[0]} among them; {_WAY_OUT}")
    return model


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, with a pad token by the pad rule."""
    with one_sentence_for(name):
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=trust_remote_code)
    return with_pad_token(tokenizer)


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
def one_sentence_for(name: str):
    """Turn what transformers and the hub raise for a model that can not be had into one sentence."""
    from huggingface_hub.errors import GatedRepoError

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except UserError:
        raise
    # ImportError: a base in 4 or 8 bits without the package that reads it.
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, struct.error) as error:
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
        raise UserError(f"the model {name!r} can not be loaded ({first}); {_WAY_OUT}") from None
    finally:
        logging.set_verbosity(verbosity)


def fingerprint(name: str) -> str:
    """A hash that tells one base model's weights from another's, read from its files in well under a second.

    Covers every tensor's name, dtype, shape and the first and last bytes of its data, in name order, so it does not
    depend on how the weights are cut into files. Computed from files because under ZeRO-3 tensors lie in pieces.
    """
    entries = {}
    for path in weight_files(resolve(name)):
        with one_sentence_for(name), path.open("rb") as opened:
            (header_size,) = struct.unpack("<Q", opened.read(8))
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


def weight_files(name: str) -> list[Path]:
    """The safetensors files of a model by folder or hub name; raises ``UserError`` if it has none."""
    with one_sentence_for(name):
        index = _file_of(name, INDEX_NAME)
    if index:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        found = [_file_of(name, part) for part in names]
    else:
        found = [_file_of(name, WEIGHTS_NAME)]
    if not found or None in found:
        raise UserError(f"the model {name!r} has no safetensors weights; convert it with save_pretrained first")
    return found


def _file_of(name: str, filename: str) -> Path | None:
    path = cached_file(
        name,
        filename,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(path) if path else None
