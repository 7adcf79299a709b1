"""What the sweeps of all systems share: the checks of one architecture, their record, and what came of it in words."""

import contextlib
import io
import re
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from reference.tiny import TASKS as NAMES
from reference.tiny import adapter_config, adapter_gradients, randomise
from sweeps.tiny import build, configure

import mtl_lora
from mtl_lora import AdapterConfig, Provenance
from mtl_lora.adapter.layer import is_linear
from mtl_lora.adapter.targets import adapter_layers, output_head
from mtl_lora.base_model import KINDS, BaseModel
from mtl_lora.errors import UserError
from mtl_lora.systems import SYSTEMS

TOLERANCE = {"fp64": 1e-4, "fp32": 3e-3}  # norms and softmaxes of many models are taken in float32


def apart(found, expected) -> float:
    """The largest difference relative to 1 + |expected|."""
    found, expected = (torch.as_tensor(each, dtype=torch.float64).detach() for each in (found, expected))
    return ((found - expected).abs() / (1 + expected.abs())).max().item()


def largest(differences: Iterable[float]) -> float:
    """NaN if any is, which Python's ``max`` may pass over."""
    return torch.tensor([*differences], dtype=torch.float64).max().item()


class Checks:
    """The checks of one architecture; ``record`` becomes its line of the log.

    A system says which model types it sweeps (``types``), how a base model is read, where its adapter goes, what is
    compared with one row alone (``reference``, ``compare``), and the names of the ``exports`` among its methods.
    """

    system: str
    types: tuple[str, ...]
    exports: tuple[str, ...] = ()

    def __init__(self, kind: str, folder: Path, dtypes: list[str]):
        self.kind, self.dtypes = kind, dtypes
        self.base, self.checkpoint = folder / "base", folder / "checkpoint"
        self.record: dict = {"system": self.system, "kind": kind}

    # ---- what a system says ----

    def save_tokenizer(self, model: torch.nn.Module) -> None:
        """Write a tokenizer beside the base model."""
        raise NotImplementedError

    def read_structure(self) -> torch.nn.Module:
        """The base model as the adapter finds it, on the meta device."""
        raise NotImplementedError

    def fresh(self) -> torch.nn.Module:
        """The base model as the adapter finds it; weights that are not in its files are the same each time."""
        raise NotImplementedError

    def place(self, adapter: AdapterConfig) -> tuple[AdapterConfig, list[str]]:
        """(the adapter as a training puts it on the model, notes)."""
        raise NotImplementedError

    def may_adapt(self, name: str) -> bool:
        """Whether a layer belongs to those that an adapter may have."""
        return True

    def forward(self, model: torch.nn.Module) -> None:
        """Run a short row through a model."""
        raise NotImplementedError

    def provenance(self) -> dict:
        """What a checkpoint records besides its base model."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Read from the checkpoint what the checks need, and set ``rows``, a row for each task."""
        raise NotImplementedError

    def outputs(self, model: torch.nn.Module, row: object) -> torch.Tensor:
        """The outputs for a row alone."""
        raise NotImplementedError

    def reference(self) -> dict:
        """How much outputs depend on what they should depend on, which the other checks presuppose."""
        raise NotImplementedError

    def compare(self) -> None:
        """Attempt every check but the exports."""
        raise NotImplementedError

    # ---- what is the same for all ----

    def attempt(self, name: str, check: Callable, *arguments) -> object:
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
        self.compare()
        # A mask in float64 may be infinite in the float32 of an eager softmax.
        if re.search("which are not finite|: nan", str(self.record)) and self.dtype != self.dtypes[-1]:
            return False
        for name in self.exports:
            self.attempt(name, getattr(self, name))
        return True

    def handle(self) -> BaseModel:
        return BaseModel(str(self.base), kind=SYSTEMS[self.system])

    def build(self) -> None:
        config = configure(self.kind)
        config.save_pretrained(self.base)
        auto_class = KINDS[SYSTEMS[self.system]].auto_class_for(config)
        if type(config) not in auto_class._model_mapping:  # loading it is refused
            return
        model = build(config, auto_class)
        self.record |= {"class": type(model).__name__, "parameters": model.num_parameters()}
        model.save_pretrained(self.base)
        if type(config) is not type(model.config):  # of text and more
            config.save_pretrained(self.base)
        self.save_tokenizer(model)

    def load(self) -> None:
        """Put adapters on all linear layers or, where these are refused, on those that a forward calls."""
        self.structure, targets = self.read_structure(), "all-linear"
        while True:
            try:
                config, self.record["notes"] = self.place(adapter_config(target_modules=targets, tasks=list(NAMES)))
                self.model = self.adapted(config).train()
                self.forward(self.model)
                break
            except UserError as error:
                self.record.setdefault("all_linear", f"refused: {error}")
                named = str(error).replace(":", " ").split()
                left = self.called() if targets == "all-linear" else [one for one in targets if one not in named]
                if not left or left == targets:
                    raise
                targets = left
        self.record["layers"] = len(adapter_layers(self.model))
        base = self.handle()
        provenance = Provenance(str(self.base), base.fingerprint(), system=self.system, **self.provenance())
        mtl_lora.save(self.model, self.checkpoint, provenance)
        self.prepare()

    @torch.no_grad()
    def adapted(self, config: AdapterConfig) -> torch.nn.Module:
        """The base model with random adapters and random changes of the modules that are saved whole."""
        model = randomise(mtl_lora.inject(self.fresh(), config), spread=0.3)
        draws = torch.Generator().manual_seed(4)
        for slot in model.mtl_lora_injection.slots:
            if slot.is_weight:
                slot.get().add_(0.3 * torch.randn(slot.get().shape, generator=draws))
        return model

    @torch.no_grad()
    def called(self) -> list[str]:
        """The names of the linear layers that a forward calls, without the head and experts."""
        model, found = self.fresh(), []
        head = output_head(model)
        for name, module in model.named_modules():
            if is_linear(module) and module is not head and "experts." not in name and self.may_adapt(name):
                module.register_forward_hook(lambda *_, name=name: found.append(name))
        self.forward(model)
        return list(dict.fromkeys(found))

    def compare_losses(
        self, alone: torch.Tensor, batches: dict[str, Callable[[], torch.Tensor]], idle: Iterable[str] = ()
    ) -> dict:
        """Differences of the losses (N,) of batches, and of their adapter gradients, from those of rows alone.

        idle: parts of the names of weights that have no gradient by design.
        """
        weights = torch.linspace(1, 2, len(alone), dtype=alone.dtype)
        (alone * weights).sum().backward()
        expected = adapter_gradients(self.model)
        expected = {name: one for name, one in expected.items() if not any(part in name for part in idle)}
        lacking = [name for name, one in expected.items() if one is None or not one.any()]
        found = {"without_gradient": len(lacking)} | ({"lacking": lacking[:4]} if lacking else {})
        expected = {name: one for name, one in expected.items() if name not in lacking}
        scale = largest(one.abs().max().item() for one in expected.values())
        for label, losses_of in batches.items():
            losses = losses_of()
            found[label] = apart(losses, alone)
            (losses * weights).sum().backward()
            own = adapter_gradients(self.model)
            off = ((own[name] - one).abs().max().item() for name, one in expected.items())
            found[f"{label}_gradients"] = largest(off) / scale
        return found

    @torch.no_grad()
    def saved(self) -> float:
        """0.0: the same outputs after saving and loading."""
        self.routed = [self.outputs(self.model, row) for row in self.rows]
        loaded = mtl_lora.load(self.fresh(), self.checkpoint).eval()
        return largest(apart(self.outputs(loaded, row), one) for row, one in zip(self.rows, self.routed, strict=True))

    @torch.no_grad()
    def unload(self) -> float:
        plain, base = mtl_lora.unload(self.model), self.fresh()
        return largest(apart(self.outputs(plain, row), self.outputs(base, row)) for row in self.rows)


# ---- what came of it ----

_REFUSED = {"peft": "no PEFT export", "merged_export": "no merged export", "all_linear": "not all-linear"}


def wrong(record: dict) -> list[str]:
    """The checks of an architecture that raised, or whose difference is more than rounding."""
    most, found = TOLERANCE.get(record.get("dtype"), 0.0), []

    def look(name: str, value: object) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                look(f"{name}.{key}", each)
        elif str(value).startswith("error") or (str(value).startswith("refused") and name not in _REFUSED):
            found.append(name)
        elif isinstance(value, float | int) and not isinstance(value, bool):
            counted = name.rpartition(".")[2] in ("others", "without_gradient")
            found.extend([name] * (value > 0 if counted else not value <= most))

    for name, value in record.items():
        if name not in ("parameters", "layers", "notes", "said", "reference"):
            look(name, value)
    look("reference", {"not_causal": record["reference"].get("not_causal", 0.0)})
    return found


def verdict(record: dict) -> str:
    """What came of an architecture, in words."""
    if "died" in record:
        return f"ended by {record['died']}"
    if record["build"] is not None:
        return "not built here"
    if isinstance(record["load"], str):
        return "refused" if record["load"].startswith("refused") else "raises"
    if isinstance(record["reference"], str):
        return "raises"
    if found := wrong(record):
        return f"differs in {', '.join(found)}"
    said = [words for key, words in _REFUSED.items() if str(record.get(key)).startswith("refused")]
    return ", ".join(["equal", *said, *["questions one by one"] * record.get("one_by_one", False)])


def table(records: list[dict]) -> str:
    """The model types by verdict."""
    found: dict[str, list[str]] = {}
    for record in records:
        found.setdefault(verdict(record), []).append(record["kind"])
    return "\n".join(f"{words} ({len(kinds)}): {', '.join(kinds)}" for words, kinds in sorted(found.items()))
