"""Save and load an adapter: weights in ``mtl_lora.safetensors``, described by ``mtl_lora_config.json``.

The configuration holds the sha256 of the weights, because safetensors does not detect a flipped bit. PEFT's file names
are used only by exports for PEFT.
"""

import copy
import dataclasses
import importlib.util
import math
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mtl_lora import embedded, files, systems
from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.inject import inject, injection_of, unload
from mtl_lora.adapter.layer import gathered, is_partitioned, layer_sizes, parameter_shapes, require_in_memory
from mtl_lora.adapter.saved import Slot, find_slots, require_slots, unwrap
from mtl_lora.adapter.targets import adapter_layers
from mtl_lora.artifacts import ADAPTER_START as START_NAME
from mtl_lora.artifacts import CHECKPOINT_CONFIG as CONFIG_NAME
from mtl_lora.artifacts import CHECKPOINT_WEIGHTS as WEIGHTS_NAME
from mtl_lora.config import Config
from mtl_lora.errors import UserError, first_of
from mtl_lora.version import __version__

FORMAT = 2  # format 1 can be read too: it calls "provenance" "origin", and its hyperparameters are not nested

State = dict[str, torch.Tensor]


@dataclasses.dataclass
class Provenance(Config):
    """The provenance of an adapter: base model, prompt, tasks and settings, so that loading it needs no other input."""

    base_model: str | None = None  # name or folder
    base_fingerprint: str | None = None  # see BaseModel.fingerprint
    prompt_template: str | None = None  # a name in mtl_lora.language.encode
    cutoff_len: int | None = None  # in tokens
    task_set: dict | None = None  # TaskSet.to_json()
    train_settings: dict | None = None  # the flags of the training
    data_sha256: str | None = None  # of the training data: the file, or for images what their folder holds
    commit: str | None = None  # of this project, if the adapter was trained from a git checkout
    system: str = "language"  # the subpackage that trained it
    base_class: str | None = None  # the base model's class in transformers
    untrained_tasks: list[str] | None = None  # tasks without training examples; None: not recorded
    pairs: dict | None = None  # by task, whether its examples are pairs of texts; without tasks that have both
    chat_template: str | None = None  # the tokenizer's, if it was the prompt template
    model_settings: dict | None = None  # the settings of the modules that the system puts on the base model

    @property
    def load_in_4bit(self) -> bool:
        """Whether the base model was loaded in 4 bits for training."""
        return bool((self.train_settings or {}).get("load_in_4bit"))

    def untrained_note(self, tasks: Iterable[str]) -> list[str]:
        """Return one line that names those of ``tasks`` without training examples; an empty list if all had some."""
        found = [task for task in tasks if task in (self.untrained_tasks or ())]
        return [f"note: the adapter had no training examples of {', '.join(found)}"] if found else []


Origin = Provenance  # the earlier name


@dataclasses.dataclass
class CheckpointConfig(Config):
    """The content of ``mtl_lora_config.json``."""

    format: int
    library_version: str
    adapter: dict
    provenance: dict
    weights_sha256: str

    @property
    def adapter_config(self) -> AdapterConfig:
        """The configuration of the adapter, validated when the file was read."""
        return AdapterConfig.from_json(self.adapter)

    @property
    def provenance_config(self) -> Provenance:
        """The provenance of the adapter, validated when the file was read."""
        return Provenance.from_json(self.provenance)


def adapter_tensors(model: nn.Module) -> State:
    """Return the tensors that a checkpoint of ``model`` holds, as the model uses them, not copied.

    Adapter parameters are named ``<module>.<parameter>``; tensors of modules saved whole keep their own names. Raises
    ``UserError`` for a model without an adapter, and if an adapter layer, or a module saved whole, was replaced or
    resized after ``inject``.
    """
    injection = injection_of(model)
    if injection is None:
        raise UserError("the model carries no adapter; put one on with mtl_lora.inject")
    if injection.off:
        raise UserError("the adapter is off inside mtl_lora.disabled; save it outside that block")
    there = set(unwrap(model).modules())
    require_slots(injection.slots)
    for slot in injection.slots:
        if not any(module in there for module, _ in slot.places):
            raise UserError(f"the module of {slot.name} was replaced after inject; resize or replace it before inject")
    layers = adapter_layers(model)
    if gone := [name for name in injection.names if name not in layers]:
        raise UserError(f"the adapter layer {gone[0]} was replaced after inject, and its weights are lost")
    own = {
        f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.adapter_parameters().items()
    }
    return own | {slot.name: slot.get() for slot in injection.slots}


def adapter_state(model: nn.Module) -> State:
    """Return ``adapter_tensors`` detached; if ZeRO-3 has partitioned some, gathered copies on the CPU.

    Under ZeRO-3 all processes must call this. Raises ``UserError`` for a model that FSDP has sharded.
    """
    tensors = adapter_tensors(model)
    classes = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    if "FullyShardedDataParallel" in classes or any(hasattr(tensor, "full_tensor") for tensor in tensors.values()):
        raise UserError(
            "FSDP has sharded this model, so its adapter cannot be saved; to spread a base over GPUs use DeepSpeed's "
            "ZeRO-3, or gather the tensors yourself and pass them as state"
        )
    if not any(map(is_partitioned, tensors.values())):
        return {name: tensor.detach() for name, tensor in tensors.items()}
    with gathered(*tensors.values()):
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def save(
    model: nn.Module, folder: str | Path, provenance: Provenance | None = None, state: State | None = None
) -> None:
    """Save the adapter of ``model`` to ``folder``.

    Both files are written or neither, and a half-written folder never loads: over an earlier adapter, a kill between
    the two renames at the end leaves a folder that is refused. Adapter weights in bf16 or fp16 are stored as float32.

    provenance: by default the provenance that the adapter was loaded with, else the name of the base model, with its
        fingerprint if its files are on this machine.
    state: the result of ``adapter_state``, if the tensors were gathered elsewhere (ZeRO-3).

    Warns of a trainable weight that is not saved and, without ``provenance``, of base weights that differ from the
    recorded files. Raises ``UserError`` for a value that is not finite and for a weight that accelerate has offloaded.
    """
    folder, root = Path(folder), unwrap(model)
    held = {id(tensor) for tensor in adapter_tensors(model).values()}
    if left := [name for name, weight in root.named_parameters() if weight.requires_grad and id(weight) not in held]:
        warnings.warn(f"{first_of(left)} can be trained but is not saved; name it in modules_to_save", stacklevel=2)
    state = adapter_state(model) if state is None else state
    _require_numbers(state, f"the adapter cannot be saved to {folder}")
    if provenance is None:
        provenance = getattr(root, "mtl_lora_provenance", None) or _base_of(root)
        if name := _changed_weight(provenance, root, injection_of(root).slots):
            warnings.warn(
                f"this model's {name} is not what the files of {provenance.base_model!r} hold, which mtl_lora.load("
                "folder) uses; put the adapter on the right base with mtl_lora.load(model, folder), and save added "
                "tokens with the adapter: modules_to_save",
                stacklevel=2,
            )
    # Both files are complete before either gets its final name; the weights are renamed first.
    with files.atomic_path(folder / CONFIG_NAME) as config_file, files.atomic_path(folder / WEIGHTS_NAME) as weights:
        save_file({name: _stored(tensor) for name, tensor in state.items()}, weights)
        adapter, digest = root.mtl_lora_config.to_json(), files.sha256(weights)
        config = CheckpointConfig(FORMAT, __version__, adapter, provenance.to_json(), digest)
        files.write_json(config_file, config.to_json())


def save_start(model: nn.Module, folder: str | Path, state: State) -> None:
    """Save the initial values of the parameters that make tasks differ, for the analysis of the trained adapter.

    state: ``adapter_state`` before training. Saved rather than drawn again, because drawing them again would need the
    base model and the same device and torch version.
    """
    layers = adapter_layers(model).items()
    own = {key: state[key] for name, layer in layers for key in (f"{name}.{each}" for each in layer.task_parameters)}
    if own:
        with files.atomic_path(Path(folder) / START_NAME) as path:
            save_file({name: _stored(tensor) for name, tensor in own.items()}, path)


def load_start(layers: dict[str, nn.Module], folder: str | Path) -> bool:
    """Put the values that ``save_start`` saved into layers of ``adapter_without_base``; False if a folder has none.

    Raises ``UserError`` for a file that does not fit these layers.
    """
    path = Path(folder) / START_NAME
    if not path.is_file():
        return False
    own = {f"{name}.{key}": (layer, key) for name, layer in layers.items() for key in layer.task_parameters}
    state = read_tensors(path)
    if {name: tensor.shape for name, tensor in state.items()} != {n: getattr(*place).shape for n, place in own.items()}:
        raise UserError(f"{path} does not hold the initial values of the adapter beside it; delete it")
    for name, (layer, key) in own.items():
        setattr(layer, key, nn.Parameter(state[name].to(getattr(layer, key).dtype), requires_grad=False))
    return True


def read_tensors(path: Path) -> State:
    """Return the tensors of a safetensors file, on the CPU; raises ``UserError`` for another file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from None


def _require_numbers(state: State, source: str) -> None:
    """Raise ``UserError`` naming the first tensor with a value that is not finite, or not in memory."""
    for name, tensor in state.items():
        require_in_memory(f"{source}: {name}", tensor)
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{source}: {name} holds values that are not finite; lower the learning rate, or use an earlier "
                "checkpoint"
            )


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as it is stored: contiguous, on the CPU, bf16 and fp16 as float32."""
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return (tensor.float() if half else tensor).cpu().contiguous()


def _name_of(model: nn.Module) -> str:
    """Return the name or folder that a model was loaded from; an empty string if it shows none."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if name and Path(name).is_dir():  # absolute, or by the name of an embedded model, whose folder is a cache
        name = embedded.name_of(Path(name).resolve()) or str(Path(name).resolve())
    return name


def _base_of(model: nn.Module) -> Provenance:
    """Return the provenance that a model itself shows: the base it was loaded from and what its own modules record."""
    name, fingerprint = _name_of(model), None
    own = next((each.base_provenance() for each in model.modules() if hasattr(each, "base_provenance")), {})
    if not name:
        return Provenance(**own)
    if importlib.util.find_spec("transformers") is not None:
        from mtl_lora.base_model import BaseModel

        fingerprint = BaseModel(name).local_fingerprint()
    if getattr(model, "is_loaded_in_4bit", False):
        own["train_settings"] = {"load_in_4bit": True}
    # For a subclass, by the user or FSDP, the class in transformers that it derives from.
    classes = (cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models."))
    return Provenance(name, fingerprint, base_class=next(classes, type(model)).__name__, **own)


def _changed_weight(base: Provenance, model: nn.Module, slots: list[Slot]) -> str | None:
    """Return the name of a base weight that differs from the recorded files, ignoring ``slots``, which are saved.

    None if no weight differs or nothing can be compared.
    """
    # Weights dequantised from 4 bits differ from the files on purpose.
    if not base.base_fingerprint or not base.base_model or base.load_in_4bit:
        return None
    from mtl_lora.base_model import BaseModel

    saved = {id(slot.get()) for slot in slots}
    named = unwrap(model).named_parameters()
    own = {name.replace(".base_layer.", "."): weight for name, weight in named if id(weight) not in saved}
    try:
        return BaseModel(base.base_model).changed_weight(own, getattr(unwrap(model), "base_model_prefix", ""))
    except (UserError, OSError, ValueError):  # its files are not on this machine
        return None


def read_config(folder: str | Path) -> CheckpointConfig:
    """Read and validate ``mtl_lora_config.json``; raises ``UserError`` naming the file and the problem."""
    path = systems.checkpoint_config(folder)
    value = files.read_object(path, "the checkpoint configuration")
    found = value.get("format", FORMAT)  # first, because another format has other keys
    if found not in (1, FORMAT):
        raise UserError(f"{path} has format {found}, and this version reads formats 1 and {FORMAT}; update mtl-lora")
    key = "origin" if found == 1 else "provenance"
    if found == 1 and key in value:
        value["provenance"] = value.pop(key)
    config = CheckpointConfig.from_json(value, str(path))
    AdapterConfig.from_json(config.adapter, f"{path}, 'adapter'")
    Provenance.from_json(config.provenance, f"{path}, '{key}'")
    return config


def load(
    base_model: nn.Module | str | Path, folder: str | Path | None = None, allow_unused: bool = False, **options
) -> nn.Module:
    """Return a model with the adapter of a checkpoint.

    ``load(folder)`` loads the base model that the checkpoint names and puts the adapter on it. ``load(base_model,
    folder)`` puts the adapter on a model that is already loaded, in place.

    allow_unused: as for ``inject``.
    options: only for ``load(folder)``: ``trust_remote_code`` and arguments of ``BaseModel.load`` such as ``dtype`` or
        ``device_map``.

    Raises ``UserError`` for a base model other than the checkpoint's (if the files of both are on this machine to
    compare), for a changed byte, for a missing or unexpected tensor, and for a wrong shape or dtype, naming the tensor.
    A model that was passed is then left as it was.
    """
    if isinstance(folder, nn.Module):
        raise UserError("the model comes first: mtl_lora.load(base_model, folder)")
    if folder is None and isinstance(base_model, nn.Module):
        raise UserError("the folder of the checkpoint is missing: mtl_lora.load(base_model, folder)")
    if folder is not None and not isinstance(base_model, nn.Module):
        raise UserError(f"the base model must be a loaded model, not {base_model!r}; or call mtl_lora.load(folder)")
    source = base_model if folder is None else folder
    if folder is not None and options:
        raise UserError(
            f"{next(iter(options))} is an option of mtl_lora.load(folder), which loads the base model; leave it out, "
            "because here the base model is loaded already"
        )
    config = read_config(source)
    provenance = config.provenance_config
    if folder is None:
        base_model = _build_base(provenance, source, **options)
    else:
        _check_base(base_model, folder, config)
    state = read_weights(source, config)
    _check_size(config.adapter_config, state, str(Path(source) / WEIGHTS_NAME))
    model = inject(base_model, config.adapter_config, allow_unused)
    try:
        load_state(model, state, str(Path(source) / WEIGHTS_NAME))
    except UserError:
        unload(model)
        raise
    unwrap(model).mtl_lora_provenance = provenance
    return model


def _check_base(model: nn.Module, folder: str | Path, config: CheckpointConfig) -> None:
    """Raise ``UserError`` for a model that is not the base of a checkpoint; warn where nothing shows whether it is."""
    provenance = config.provenance_config
    if provenance.system != "language":
        systems.part(provenance.system, "model").check_base(model, provenance, folder)
    if not provenance.base_model and (name := _name_of(unwrap(model))):
        warnings.warn(
            f"{folder} names no base model (it was trained on a merged model, or on one that came from no files), so "
            f"nothing shows whether it belongs to {name!r}",
            stacklevel=3,
        )
    expected = provenance.base_fingerprint
    if not expected:
        return
    found = _base_of(unwrap(model))
    if found.base_fingerprint is None:
        warnings.warn(
            f"{folder} was trained on the base model {provenance.base_model!r}, with which this model cannot be "
            "compared, because it was not loaded from files on this machine",
            stacklevel=3,
        )
    elif found.base_fingerprint != expected:
        raise UserError(
            f"the checkpoint {folder} was trained on another base model than {found.base_model!r}: its fingerprint "
            f"is {expected[:12]}..., not {found.base_fingerprint[:12]}...; load {provenance.base_model!r}"
        )
    slots = find_slots(unwrap(model), config.adapter_config.modules_to_save)
    if not provenance.load_in_4bit and (name := _changed_weight(found, model, slots)):
        warnings.warn(
            f"{folder} was trained on the files of {found.base_model!r}, and this model's {name} is not what they hold",
            stacklevel=3,
        )


def _build_base(provenance: Provenance, folder: str | Path, trust_remote_code: bool = False, **options) -> nn.Module:
    if not provenance.base_model:
        raise UserError(f"the checkpoint {folder} names no base model; pass it: mtl_lora.load(base_model, folder)")
    if importlib.util.find_spec("transformers") is None:
        raise UserError("mtl_lora.load(folder) needs the package transformers; install it, or pass the base model")
    from mtl_lora.base_model import BaseModel

    systems.check(provenance.system)
    base = BaseModel(provenance.base_model, trust_remote_code, systems.SYSTEMS[provenance.system])
    if provenance.base_fingerprint:
        base.check_fingerprint(provenance.base_fingerprint, base.fingerprint(), folder)
    options = {"load_in_4bit": provenance.load_in_4bit, **options}
    if provenance.system == "language":
        return base.load_as(provenance.base_class, f"the adapter in {folder}", **options)
    return systems.part(provenance.system, "model").base_of(base, provenance, **options)


def read_weights(folder: str | Path, config: CheckpointConfig) -> State:
    """Return the tensors of a checkpoint, on the CPU.

    Raises ``UserError`` if the file is missing or damaged (its sha256 differs), or holds values that are not finite.
    """
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise UserError(f"the checkpoint {folder} has no {WEIGHTS_NAME}")
    digest = files.sha256(path)
    if digest != config.weights_sha256:
        raise UserError(
            f"{path} is damaged (its sha256 is {digest[:12]}..., and {CONFIG_NAME} says "
            f"{config.weights_sha256[:12]}...); copy it again"
        )
    state = read_tensors(path)
    _require_numbers(state, str(path))
    return state


def split_state(config: AdapterConfig, state: State) -> tuple[State, State]:
    """Split the tensors of a checkpoint into those of adapter layers and those of modules saved whole."""
    own = parameter_shapes(config, 1, 1)
    adapter = {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] in own}
    return adapter, {name: tensor for name, tensor in state.items() if name not in adapter}


def _check_size(config: AdapterConfig, state: State, source: str) -> None:
    """Raise ``UserError`` if a configuration describes far more weights than the file holds.

    Called before memory is allocated: ``load_state`` compares every name and shape, but with the layers of a model.
    """
    described = sum(map(math.prod, parameter_shapes(config, 1, 1).values()))  # of the smallest possible layer
    for name, sizes in layer_sizes(config, state).items():
        described += sum(map(math.prod, parameter_shapes(config.at(name), *sizes).values()))
    held = sum(tensor.numel() for tensor in state.values())
    if described > 10 * max(held, 10**7):
        found = f"{held:,} numbers, but {CONFIG_NAME} describes more than {described:,}"
        raise UserError(f"{source} holds {found}; copy both again")


@torch.no_grad()
def load_state(model: nn.Module, state: State, source: str) -> None:
    """Copy tensors into the adapter of ``model``; raises ``UserError`` unless names, shapes and dtypes agree."""
    own, problem = adapter_tensors(model), f"{source} does not fit this model:"
    parts = []
    for label, keys in (("lacks", own.keys() - state.keys()), ("has unknown", state.keys() - own.keys())):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            parts.append(f"{label} {', '.join(sorted(keys)[:3])}{more}")
    if parts:
        raise UserError(f"{problem} it {' and '.join(parts)}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise UserError(f"{problem} {name} has shape {list(tensor.shape)}, not {list(own[name].shape)}")
        # float32 weights are exact in a float64 model; any other conversion is refused, because it may round.
        exact = own[name].is_floating_point() and tensor.dtype == torch.float32
        if not exact and tensor.dtype != own[name].dtype:
            way_out = "; load the base with dtype fp64" if tensor.dtype == torch.float64 else ""
            raise UserError(f"{problem} {name} has dtype {tensor.dtype}, not {own[name].dtype}{way_out}")
    for name, tensor in state.items():
        own[name].copy_(tensor)


# ---- the start of another training ----


def require_same_method(config: AdapterConfig, earlier: AdapterConfig, folder: str | Path) -> None:
    """Raise ``UserError`` unless the checkpoint in ``folder``, of configuration ``earlier``, may be the start of an
    adapter of ``config``: with the same method, rank, scale and hyperparameters."""
    free = ("tasks", "dropout", "target_modules", "modules_to_save")  # layers and modules show in the weights' names
    before, now = earlier.to_json(), config.to_json()
    if other := [f"{key} {before[key]}, not {now[key]}" for key in now if key not in free and before[key] != now[key]]:
        raise UserError(f"the checkpoint {folder} cannot be the start of this adapter: it has {'; '.join(other)}")


@torch.no_grad()
def start_from(model: nn.Module, folder: str | Path) -> list[str]:
    """Copy the weights of a checkpoint into the adapter of ``model``, as the start of another training.

    What a method has for each task is copied by the name of the task: a task that the checkpoint lacks keeps its
    initial values, and one that the model lacks is left out. Returns the names of the former. Raises ``UserError`` for
    another method, rank, scale or hyperparameter, and for other layers or modules saved whole.
    """
    recorded, config = read_config(folder), unwrap(model).mtl_lora_config
    earlier = recorded.adapter_config
    require_same_method(config, earlier, folder)
    longer = copy.deepcopy(config)
    longer.tasks = [*config.tasks, ""]
    shapes, of_more = parameter_shapes(config, 1, 1), parameter_shapes(longer, 1, 1)
    changed = {name: [*map(int.__ne__, shape, of_more[name])] for name, shape in shapes.items()}
    axes = {name: where.index(True) for name, where in changed.items() if True in where}  # of the tasks
    state, places = read_weights(folder, recorded), {task: index for index, task in enumerate(earlier.tasks)}
    for name, tensor in adapter_state(model).items():
        if name in state and (axis := axes.get(name.rpartition(".")[2])) is not None:
            rows = dict(zip(config.tasks, tensor.to(state[name]).unbind(axis), strict=True))
            rows |= {task: state[name].select(axis, places[task]) for task in rows.keys() & places.keys()}
            state[name] = torch.stack([*rows.values()], dim=axis)
    load_state(model, state, str(Path(folder) / WEIGHTS_NAME))
    return [task for task in config.tasks if task not in places]


# ---- without the base model ----


def adapter_without_base(
    folder: str | Path, config: CheckpointConfig, base: nn.Module | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return the adapter of a checkpoint on a base without weights, for methods such as ``factors`` of its layers.

    base: a model structure on the meta device; None: layers of the sizes that the checkpoint's weights show, or no
        layers if they do not show them.
    dtype: of the adapter weights; None: as stored.

    Modules saved whole are left out. Raises ``UserError`` for a damaged checkpoint or one that does not fit the base.
    """
    adapter = config.adapter_config
    state, _ = split_state(adapter, read_weights(folder, config))
    adapter.modules_to_save = []
    state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}
    sizes = layer_sizes(adapter, state)
    model = base or stand_in(sizes)
    if not base and not sizes:
        return model
    if any(tensor.dtype == torch.float64 for tensor in state.values()):
        model.to(torch.float64)
    inject(model, adapter)
    load_state(model, state, str(folder))  # on the meta device this only compares names, shapes and dtypes
    for name, layer in adapter_layers(model).items():
        for key in layer.parameter_names:
            setattr(layer, key, nn.Parameter(state[f"{name}.{key}"], requires_grad=False))
    return model


def stand_in(sizes: dict[str, tuple[int, int]]) -> nn.Module:
    """Return a module tree on the meta device with only a linear layer of each size (k, d) under its dotted name."""
    root = nn.Module()
    for name, (in_features, out_features) in sizes.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            parent = parent._modules.setdefault(part, nn.Module())
        parent._modules[last] = nn.Linear(in_features, out_features, bias=False, device="meta")
    return root
