"""The training pipelines that benchmarks compare: ours, the reference implementation, PEFT's, and the frozen base."""

import argparse
import copy
import dataclasses
import re
from collections.abc import Callable

import torch
from baselines import gathering, looping
from batches import spread_tasks
from measure import Parser
from torch import nn
from transformers import PreTrainedModel

import mtl_lora
from mtl_lora import route
from mtl_lora.adapter.layer import methods
from mtl_lora.adapter.mtl_lora import MtlLoraLayer
from mtl_lora.base_model import enable_checkpointing
from mtl_lora.language.batches import token_losses
from mtl_lora.language.prefix import let_attention_share
from mtl_lora.language.tasks import COMMONSENSE

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK, ALPHA, DROPOUT = 8, 16, 0.05
SIDES = {
    "original": "the reference implementation: random batches padded to their longest row, logits for every token, "
    "gradient checkpointing, the gathering form of MTL-LoRA (baselines/gathering.py)",
    "peft": "PEFT's LoRA in its usual set-up: random padded batches, logits for every token, no checkpointing",
    **dict.fromkeys(
        (name for name, layer in methods().items() if not layer.only_streams),
        "ours: rows of similar length, logits for answers only",
    ),
    "gathering": "as mtl_lora, but with layers in the gathering form (baselines/gathering.py)",
    "looping": "as mtl_lora, but with layers that loop over the tasks (baselines/looping.py)",
    "peft_layer": "as lora, but with PEFT's layers",
    "frozen": "a reference, not a bound: no adapter; forward and backward to the embeddings, on our batches and logits",
    "mtl_lora_N_tasks": "as mtl_lora with N tasks; the same rows have ids spread over all N tasks",
    "NAME_shared": "as NAME, but a prompt prefix that a task's rows share runs once per batch",
    "NAME_compiled": "as NAME, with every block but the first compiled one by one",
}
_BASELINE_LAYERS = {
    "original": gathering.GatheringLayer,
    "gathering": gathering.GatheringLayer,
    "looping": looping.LoopingLayer,
}
_ANY_TASKS = re.compile(r"mtl_lora_([1-9]\d*)_tasks")


@dataclasses.dataclass
class Pipeline:
    """A model, the plan of its batches (see ``make_batches``), its loss function, and an optimiser or None."""

    model: nn.Module
    plan: str
    loss: Callable[[nn.Module, dict], torch.Tensor]
    optimiser: torch.optim.Optimizer | None
    tasks: int | None = None

    def forward(self, batch: dict) -> torch.Tensor:
        """Return the loss of a batch."""
        gathering.GatheringLayer.task_ids = looping.LoopingLayer.task_ids = batch["task_ids"]
        return self.loss(self.model, batch)

    def step(self, batch: dict) -> int:
        """Run one training step and return its number of rows."""
        self.forward(batch).backward()
        if self.optimiser:
            self.optimiser.step()
        self.model.zero_grad(set_to_none=True)
        return len(batch["task_ids"])

    def batches(self, plans: dict[str, list[dict]]) -> list[dict]:
        """Return this pipeline's batches from ``plans`` (see ``make_batches``)."""
        return spread_tasks(plans[self.plan], self.tasks) if self.tasks else plans[self.plan]


def add_sides(parser: Parser, default: str) -> None:
    """Add the flag ``--sides``, and list the sides below the help."""
    parser.add_flag("sides", "pipelines to compare, in the order of the table", type=side_names, default=default)
    parser.epilog = "\n".join(["sides:", *(f"  {name:18}{text}" for name, text in SIDES.items())])


def side_names(text: str) -> list[str]:
    """Parse ``a,b`` into a list of pipelines; the type of a flag."""
    names = [name for name in text.split(",") if name]
    for name in names:
        plain = name.removesuffix("_compiled").removesuffix("_shared")
        if not (plain in SIDES or _ANY_TASKS.fullmatch(plain)) or plain in ("mtl_lora_N_tasks", "NAME"):
            raise argparse.ArgumentTypeError(f"there is no side {name!r}; the sides are {', '.join(SIDES)}")
    return names


def pipeline(name: str, base: PreTrainedModel, with_optimiser: bool = False) -> Pipeline:
    """Build one of ``SIDES`` (``mtl_lora_64_tasks`` sets N to 64) on a base model, whose modules do not change."""
    if name.endswith("_compiled"):
        side = pipeline(name.removesuffix("_compiled"), base, with_optimiser)
        # Not the first, whose input needs no gradient: one graph then serves all others.
        for block in side.model.model.layers[1:]:
            block.compile(backend="eager" if base.device.type == "cpu" else "inductor")
        return side
    if name.endswith("_shared"):
        side = pipeline(name.removesuffix("_shared"), base, with_optimiser)
        let_attention_share(side.model)
        return dataclasses.replace(side, plan="shared")
    torch.manual_seed(0)
    model, several = twin(base), _ANY_TASKS.fullmatch(name)
    tasks = int(several.group(1)) if several else None
    whole = name in ("original", "peft")
    if name in ("peft", "peft_layer"):
        model = with_peft(model, DROPOUT, TARGETS, None if name == "peft_layer" else "CAUSAL_LM")
        model = model if whole else model.get_base_model()  # its forward has the argument logits_to_keep
    elif name == "frozen":
        model.enable_input_require_grads()
    else:
        names = [f"task{number}" for number in range(tasks)] if tasks else COMMONSENSE.names
        config = adapter_config(name if name in methods() else "mtl_lora", DROPOUT, names)
        mtl_lora.inject(
            model, config, allow_unused=name in _BASELINE_LAYERS
        )  # the other forms call the layer's parts instead
        if name in _BASELINE_LAYERS:
            replace_layers(model, _BASELINE_LAYERS[name])
            model.mtl_lora_injection.layers = []  # these layers compute alone what ours prepare together
    if name == "original":
        enable_checkpointing(model)
    if not whole and model.device.type == "cpu":
        model.set_attn_implementation("eager")  # as training on a CPU does
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4) if with_optimiser and trained else None
    return Pipeline(model, "random" if whole else "sorted", whole_loss if whole else answer_loss, optimiser, tasks)


def twin(base: nn.Module) -> nn.Module:
    """Return a copy of a model's modules that shares its weights, and freeze them."""
    base.requires_grad_(False)
    shared = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in shared})


def adapter_config(method: str, dropout: float, tasks: list[str]) -> mtl_lora.AdapterConfig:
    """Return a configuration with the paper's sizes."""
    return mtl_lora.AdapterConfig(
        method=method, rank=RANK, alpha=ALPHA, dropout=dropout, tasks=tasks, target_modules=TARGETS
    )


def with_peft(model: nn.Module, dropout: float, targets: list[str], task_type: str | None = None) -> nn.Module:
    """Put PEFT's LoRA of the same rank, scale and dropout on a model."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": dropout, "target_modules": targets}
    return get_peft_model(model, LoraConfig(**settings, task_type=task_type))


def replace_layers(model: nn.Module, form: type[nn.Module]) -> None:
    """Replace every ``MtlLoraLayer`` of a model with another form that wraps it."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MtlLoraLayer)}
    for name, layer in layers.items():
        model.set_submodule(name, form(layer))


def whole_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """Return the loss that the model computes from labels, with logits for every token."""
    with route.use(batch["task_ids"]):
        return model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
            use_cache=False,
        ).loss


def answer_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """Return the loss that our training computes, with logits for the answers only."""
    return token_losses(model, batch)[0].mean()
