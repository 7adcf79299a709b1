"""The systems: the kinds of base models and tasks with which adapters are trained. All are subpackages of one layout.

``config``: ``TrainConfig``, ``EvalConfig``, ``PredictConfig``, whose docstrings are the first lines of their help;
``train``: ``RUN``; ``evaluate``: ``run``, ``predict``, ``Predictor``; ``examples``: ``DATA``, from which a study takes
samples (see ``samples``). The systems are named here and imported only when one is used; no module imports them all.
"""

import importlib
import re
import types
from collections.abc import Callable
from pathlib import Path

from mtl_lora import artifacts, files
from mtl_lora.errors import UserError

# The systems, and the kind of each one's base models, a key of ``base_model.KINDS``. The first is the default.
SYSTEMS = {"language": "causal_lm", "nlu": "encoder", "image_text": "text_generator", "dense": "vision"}


def part(system: str, name: str) -> types.ModuleType:
    """Return the module ``name`` of a system; raises ``UserError`` for an unknown system."""
    check(system)
    return importlib.import_module(f"mtl_lora.{system}.{name}")


def predictor_of(package: str) -> Callable[[str], type]:
    """Return the ``__getattr__`` of a system's package, which imports its ``Predictor`` only on first use, so that the
    package's flags can be read without torch."""

    def load(name: str) -> type:
        if name != "Predictor":
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(f"{package}.evaluate").Predictor

    return load


def check(system: object) -> None:
    """Raise ``UserError`` for an unknown system."""
    if system not in SYSTEMS:
        raise UserError(f"--system must be one of {', '.join(SYSTEMS)}, not {system!r}")


def checkpoint_config(folder: str | Path) -> Path:
    """Return the path of a checkpoint's configuration; raises ``UserError`` if the folder has none."""
    path = Path(folder) / artifacts.CHECKPOINT_CONFIG
    if path.is_file():
        return path
    found = f"{folder} is not an MTL-LoRA checkpoint: it has no {path.name}"
    if saved := artifacts.checkpoints(folder):
        found = (
            f"{folder} is an unfinished training; pass {saved[-1]}, or resume it (train --resume_from_checkpoint True)"
        )
    elif (path.parent / artifacts.PEFT_CONFIG).is_file():
        found += ", but PEFT's; `mtl-lora export import-peft` makes one of it; language models are evaluated by --peft"
    if not path.parent.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        found = f"there is no folder {folder}; if it is a name on the Hugging Face hub, download it first with `hf "
        found += f"download {folder} --local-dir {path.parent.name}` and pass that folder"
    raise UserError(found)


def of_checkpoint(folder: str | Path) -> str | None:
    """Return the system that trained a checkpoint, or None if the folder is not a checkpoint or its configuration is
    broken.

    Raises ``UserError`` for a system that this version does not have.
    """
    path = Path(folder) / artifacts.CHECKPOINT_CONFIG
    try:
        found = files.read_object(path, "the checkpoint configuration")["provenance"]["system"]
    except (UserError, KeyError, TypeError):
        return None
    if not isinstance(found, str):
        return None
    if found not in SYSTEMS:
        raise UserError(
            f"{path} names the system {found!r}, which this version does not have (it has {', '.join(SYSTEMS)}); "
            "install a newer version"
        )
    return found
