"""Import the weights of other programs as a checkpoint: a plain PEFT LoRA, or the original repository's MTL-LoRA."""

import math
import re
from pathlib import Path

import torch

from mtl_lora import artifacts, files
from mtl_lora.adapter import checkpoint
from mtl_lora.adapter.checkpoint import State, stand_in
from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.inject import inject
from mtl_lora.adapter.layer import kaiming, layer_sizes
from mtl_lora.adapter.targets import targets_for
from mtl_lora.base_model import BaseModel
from mtl_lora.errors import UserError
from mtl_lora.export.peft import structure_if_known
from mtl_lora.language import encode
from mtl_lora.language.tasks import TaskSet

# ---- from PEFT ----

PEFT_PICKLE = "adapter_model.bin"
# Options of PEFT that are read here or do not change what a saved adapter computes.
_READ_OR_IDLE = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "base_model_name_or_path", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "fan_in_fan_out", "inference_mode", "auto_mapping", "peft_version"),
    *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    *("runtime_config", "ensure_weight_tying", "peft_type", "task_type"),
}
# Options and the values with which an adapter is a plain LoRA; every other option must be off. The initialisations
# that are not listed also change the base model's weights.
_PLAIN = {
    "bias": ("none",),
    "revision": ("main",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}
_PEFT_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.(?P<weight>lora_[AB])\.weight")


def import_peft(
    peft: str | Path,
    output: str | Path,
    tasks: TaskSet,
    method: str = "mtl_lora",
    base_model: BaseModel | None = None,
    num_B: int = 3,
    temperature: float = 0.1,
    seed: int = 42,
    template: str = "alpaca",
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint that equals a PEFT LoRA for each of ``tasks``, and return its folder.

    method: ``lora``, or ``mtl_lora``: every B_i is the LoRA's B (the mixture weights sum to 1), Lambda_t is the
    identity, and w is drawn at random from ``seed``, so that the B_i diverge when training continues. num_B and
    temperature: of MTL-LoRA only. base_model: None for the recorded one. template: name of the prompt template that the
    LoRA was trained with. Raises ``UserError`` for a pickle, an option beyond a plain LoRA, a tensor with an unexpected
    name or shape, and layers that the base model does not have.
    """
    encode.template(template)
    folder = Path(peft)
    options = _read_options(folder)
    pairs = _read_pairs(folder, options["r"])
    own = {"num_B": num_B, "temperature": temperature} if method == "mtl_lora" else {}
    own |= {"dropout": options.get("lora_dropout") or 0.0, "use_rslora": bool(options.get("use_rslora"))}
    adapter = AdapterConfig(method, options["r"], options["lora_alpha"], tasks=tasks.names, **own)
    state = _mtl_lora_state(pairs, adapter, seed) if method == "mtl_lora" else pairs
    base_model = base_model or recorded_base(folder)
    return _write_checkpoint(output, adapter, state, base_model, template, tasks, folder, overwrite)


def recorded_base(peft: str | Path) -> BaseModel:
    """Return the base model that a PEFT configuration records; raises ``UserError`` if it records none."""
    name = _read_options(Path(peft)).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{Path(peft) / artifacts.PEFT_CONFIG} does not record its base model; pass --base_model")
    return BaseModel(name)


def _read_options(folder: Path) -> dict:
    """Read ``adapter_config.json`` and check that it describes a plain LoRA."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; pass the folder of a PEFT LoRA")
    path = folder / artifacts.PEFT_CONFIG
    options = files.read_object(path, "the PEFT configuration")
    if options.get("peft_type") != "LORA":
        raise UserError(f"{path} does not describe a LoRA: its peft_type must be LORA")
    if options.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(
            f"{path} has the task_type {options['task_type']!r:.99}, but only a LoRA of a causal language model can be "
            "imported; train an encoder here with mtl-lora train --system nlu"
        )
    for key, value in options.items():
        if value and key not in _READ_OR_IDLE and value not in _PLAIN.get(key, ()):
            raise UserError(
                f"{path} sets {key} to {value!r:.99}, which a checkpoint cannot hold; only a plain LoRA can be imported"
            )
    for key, types in (("r", (int,)), ("lora_alpha", (int, float))):
        if type(options.get(key)) not in types or not 0 < options[key] < math.inf:
            raise UserError(f"{path} must set {key} to a number above 0, not {options.get(key)!r:.200}")
    return options


def _read_pairs(folder: Path, r: int) -> State:
    """Read the tensors ``<module>.lora_A`` (r, k) and ``<module>.lora_B`` (d, r) in float32."""
    path = folder / artifacts.PEFT_WEIGHTS
    if not path.is_file():
        if (folder / PEFT_PICKLE).is_file():
            raise UserError(f"{folder} has only the pickle {PEFT_PICKLE}; load it in PEFT and save it as safetensors")
        raise UserError(f"{folder} has no {artifacts.PEFT_WEIGHTS}; pass the folder of a PEFT LoRA")
    pairs = _renamed(path, checkpoint.read_tensors(path), _PEFT_TENSOR, "not part of a plain LoRA on linear layers")
    _check_tensors(path, pairs, {"lora_A": (r, "k"), "lora_B": ("d", r)})
    return pairs


def _mtl_lora_state(pairs: State, adapter: AdapterConfig, seed: int) -> State:
    """Return the weights of an MTL-LoRA that equals the LoRA ``pairs`` for every task."""
    state: State = {}
    T, r, n = len(adapter.tasks), adapter.rank, adapter.num_B
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in _modules(pairs):
            A, B, w = pairs[f"{name}.lora_A"], pairs[f"{name}.lora_B"], torch.empty(T, n)
            kaiming(w)
            state |= {f"{name}.lora_A": A, f"{name}.lora_lambda": torch.eye(r).repeat(T, 1, 1), f"{name}.lora_w": w}
            state[f"{name}.lora_B"] = B.repeat(1, n)
    return state


# ---- from the original repository ----

_ORIGINAL_TENSOR = re.compile(
    r"(?:module\.|base_model\.model\.)*(?P<module>.+)\.(?P<weight>lora_A|lora_lambdas|lora_B|lora_B_w)"
)


def import_original(
    file: str | Path,
    output: str | Path,
    base_model: BaseModel,
    tasks: TaskSet,
    alpha: float = 16.0,
    temperature: float = 0.1,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint with the weights of the original repository's MTL-LoRA (github.com/pUmpKin-Co/MTL-LoRA).

    The rank, the numbers of up-projections and tasks, and the form of Lambda_t follow from the shapes: lora_A
    (1, r, k), lora_lambdas (T, r, r) or their diagonals (T, r), lora_B (n, d, r), lora_B_w (T, n). The original's files
    do not hold alpha and temperature, so they are passed. The prompt template is recorded as ``original``. Returns the
    checkpoint's folder; raises ``UserError`` naming the tensor that does not fit.
    """
    path = Path(file)
    tensors = _read_tensors(path)
    diagonal = {tensor.dim() for key, tensor in tensors.items() if key.endswith(".lora_lambdas")} == {2}
    shapes = {"lora_A": (1, "r", "k"), "lora_B_w": ("T", "n"), "lora_B": ("n", "d", "r")}
    shapes["lora_lambdas"] = ("T", "r") if diagonal else ("T", "r", "r")
    sizes = _check_tensors(path, tensors, shapes)
    if len(tasks) != sizes["T"]:
        raise UserError(
            f"{path} has {sizes['T']} tasks, not the {len(tasks)} of {', '.join(tasks.names)}; "
            "pass --tasks_file with the file's tasks in id order"
        )
    state: State = {}
    for name in _modules(tensors):
        A, lambdas, w, B = (tensors[f"{name}.{weight}"] for weight in ("lora_A", "lora_lambdas", "lora_B_w", "lora_B"))
        state |= {f"{name}.lora_A": A[0], f"{name}.lora_lambda": lambdas, f"{name}.lora_w": w}
        state[f"{name}.lora_B"] = torch.cat(list(B), dim=1)
    own = {"num_B": sizes["n"], "temperature": temperature, "lambda_shape": "diagonal" if diagonal else "full"}
    adapter = AdapterConfig(method="mtl_lora", rank=sizes["r"], alpha=alpha, tasks=tasks.names, **own)
    return _write_checkpoint(output, adapter, state, base_model, "original", tasks, path, overwrite)


def _read_tensors(path: Path) -> State:
    """Read the file's tensors in float32, by ``<module>.<weight>`` without the prefixes that wrappers add."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; pass the checkpoint file of the original repository")
    try:
        value = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # for bytes that are not tensors torch raises half a dozen kinds of errors
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} cannot be read as a file of tensors only ({reason})") from None
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path} holds a {type(value).__name__}; it must hold tensors by name")
    about = "not a weight of the original's MTL-LoRA: lora_A, lora_lambdas, lora_B and lora_B_w of linear layers"
    return _renamed(path, value, _ORIGINAL_TENSOR, about)


# ---- shared by both imports ----


def _renamed(path: Path, tensors: dict, pattern: re.Pattern, about: str) -> State:
    """Return the tensors in float32, named by the pattern's ``<module>.<weight>``.

    Raises ``UserError`` for a tensor that does not match; ``about`` is what the message calls it.
    """
    found: State = {}
    for name, tensor in tensors.items():
        match = pattern.fullmatch(str(name))
        if not match or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise UserError(f"{path} holds {name}, which is {about}")
        found[f"{match['module']}.{match['weight']}"] = tensor.detach().float()
    return found


def _modules(tensors: State) -> list[str]:
    return list(dict.fromkeys(key.rpartition(".")[0] for key in tensors))


def _check_tensors(path: Path, tensors: State, shapes: dict[str, tuple[int | str, ...]]) -> dict[str, int]:
    """Raise ``UserError`` naming a tensor that a module lacks or has in another shape than ``shapes`` allows.

    A letter in a shape stands for any size from 1. The sizes r, T and n must be the same in all modules and are
    returned; k and d may differ.
    """
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    sizes: dict[str, int] = {}
    for key, shape in ((f"{name}.{weight}", shape) for name in _modules(tensors) for weight, shape in shapes.items()):
        if key not in tensors:
            raise UserError(f"{path} lacks {key}")
        found, expected = tuple(tensors[key].shape), tuple(sizes.get(size, size) for size in shape)
        pairs = list(zip(found, expected, strict=False))
        if len(found) != len(shape) or any(size < 1 if isinstance(rule, str) else size != rule for size, rule in pairs):
            rule = ", ".join(map(str, expected))
            raise UserError(f"{path}: {key} has shape {found}, where ({rule}) was expected")
        sizes |= {rule: size for size, rule in pairs if rule in ("r", "T", "n")}
    return sizes


def _write_checkpoint(
    output: str | Path,
    adapter: AdapterConfig,
    state: State,
    base_model: BaseModel,
    template: str,
    tasks: TaskSet,
    source: Path,
    overwrite: bool,
) -> Path:
    """Write ``state`` as a checkpoint that targets the layers in it; they must fit the base model if that is known."""
    sizes, base = layer_sizes(adapter, state), structure_if_known(base_model)
    targets = targets_for(sizes, base)
    adapter.target_modules = list(sizes)
    try:
        # On the meta device this only compares names, shapes and dtypes; nothing is copied.
        model = inject(base or stand_in(sizes), adapter)
        checkpoint.load_state(model, state, str(source))
    except UserError as error:
        raise UserError(f"{error}; {base_model.name!r} is not the base model of {source}: pass --base_model") from None
    model.mtl_lora_config.target_modules = targets
    fingerprint = base_model.local_fingerprint()
    provenance = checkpoint.Provenance(base_model.lasting_name, fingerprint, template, task_set=tasks.to_json())
    names = (artifacts.CHECKPOINT_CONFIG, artifacts.CHECKPOINT_WEIGHTS)
    with files.atomic_directory(output, names, overwrite, [source]) as folder:
        checkpoint.save(model, folder, provenance, state)
    return Path(output)
