"""The flags of training that every system has: model, data, adapter, batches, schedule, run. A system adds its own.

Names are those of the original and of LLM-Adapters.
"""

import copy
import dataclasses
import re
from pathlib import Path

from mtl_lora.adapter.config import AdapterConfig, hyperparameter_flags
from mtl_lora.config import DTYPES, Config, Flag, flag
from mtl_lora.errors import UserError
from mtl_lora.systems import part
from mtl_lora.tasks import TaskSet

# The adapter's own words and the flags that users of the original and of LLM-Adapters know.
_ADAPTER_FLAGS = {
    "method": "adapter_name",
    "rank": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "use_rslora": "use_rslora",
    "modules_to_save": "modules_to_save",
}
SCHEDULES = ("linear", "cosine", "constant_with_warmup")


@dataclasses.dataclass(init=False)
class TrainingConfig(Config):
    """What configures a training of any system. Raises ``UserError`` for a value that cannot be.

    The hyperparameters of every registered method are flags too, read and passed by name (``config.num_B``,
    ``TrainConfig(num_B=2)``); those that the chosen method does not read change nothing.
    """

    affects = "weights"
    system = ""  # the package that it belongs to
    has_streams = False  # whether the system's models have an output for each task of one input
    made_by = ""  # the command that makes the data file, where the default's is missing

    idle = dict.fromkeys(("task_rank", "task_scale", "shared_mode"), "is of MTLoRA, a method of --system dense")

    base_model: str = flag(
        "smollm2-135m",
        "name or folder of the base model",
        group="what is trained, on what",
    )
    data_path: str = flag(
        "commonsense_170k_taskid.json",
        "JSON, JSON lines, CSV or parquet of examples",
        affects="content",
    )
    tasks_file: str | None = flag(None, "JSON file that declares your own tasks", affects="content")
    task: str | None = flag(None, "task of all examples; none: each example names its own with task or task_id")
    cache_dir: str = flag(".cache/rows", "folder for tokenised data", affects="nothing")

    adapter_name: str = flag("mtl_lora", "method", aliases=("method",), group="the adapter")
    lora_r: int = flag(8, "rank r of the adapter", aliases=("rank",))
    lora_alpha: float = flag(16.0, "numerator of the scale alpha / r", aliases=("alpha",))
    lora_dropout: float = flag(0.05, "dropout probability on the adapter's input; 0: off", aliases=("dropout",))
    lora_target_modules: list[str] = flag(
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        "linear layers to adapt: names or regular expressions of whole names as a,b; or all-linear",
        aliases=("target_modules",),
    )
    modules_to_save: list[str] = flag(
        [], "modules trained and saved whole beside the adapter: names, endings or patterns, as a,b; '*': every weight"
    )
    hyperparameters: dict = dataclasses.field(default_factory=dict)  # of all methods; each is a flag of its own
    use_rslora: bool = flag(False, "scale by alpha / sqrt(r) instead of alpha / r")
    lambda_num: int | None = flag(None, "number of matrices Lambda_t; none: the number of tasks, as it must be")
    trust_remote_code: bool = flag(False, "run model code that the base model's repository brings")

    output_dir: str = flag(
        "output/mtl_lora", "folder for the adapter, its checkpoints and logs", affects="nothing", group="output"
    )

    batch_size: int | str = flag(
        8,
        "examples per device and micro-batch; the global batch is this x devices x gradient_accumulation_steps",
        min=1,
        group="batches and schedule",
    )
    token_budget: int = flag(
        0,
        "most tokens per device and micro-batch, padding included (examples x longest example); replaces batch_size, "
        "which then applies to validation alone; 0: off",
        min=0,
    )
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimiser step", min=1)
    num_epochs: float = flag(3.0, "passes over the training examples", above=0)
    sampling_temperature: float = flag(
        1.0,
        "a task's proportion of an epoch is that of its examples ^ (1 / this); 1: the data's own proportions",
        min=1,
    )
    max_steps: int = flag(-1, "optimiser steps; overrides num_epochs; -1: off")
    length_pool: int = flag(
        128, "batches sorted by length together, against padding; 1: every batch is a mixture of all tasks", min=1
    )
    lr_scheduler_type: str = flag("linear", f"after the warm-up: {', '.join(SCHEDULES)}", choices=SCHEDULES)
    learning_rate: float = flag(3e-4, "peak learning rate of AdamW", above=0)
    warmup_ratio: float = flag(0.01, "fraction of the steps with linear warm-up")
    weight_decay: float = flag(0.0, "AdamW weight decay; 0: off", min=0)
    max_grad_norm: float = flag(1.0, "gradient clipping norm; 0: off", min=0)

    val_set_size: int = flag(0, "examples held out for a validation loss at every save; 0: off", min=0, group="the run")
    save_step: int = flag(200, "steps between checkpoints; 0: only the final adapter", affects="nothing", min=0)
    save_total_limit: int = flag(3, "checkpoints kept; 0: all", affects="nothing", min=0)
    logging_steps: int = flag(10, "steps between log lines", affects="nothing", min=1)
    seed: int = flag(42, "fixes data order, initialisation and dropout", min=0, max=2**32 - 1)
    dtype: str = flag(
        "auto", "base model dtype: bf16, fp32, fp64; auto: bf16 where the hardware multiplies it", choices=DTYPES
    )
    load_in_4bit: bool = flag(False, "load the base model in 4 bits, as QLoRA does; needs bitsandbytes")
    use_gradient_checkpointing: bool = flag(
        False, "recompute activations in the backward pass to save memory", by_outcome=True
    )
    cuda_graphs: bool = flag(
        False, "on one GPU: record the step of each padded length and replay it, which small steps need to be fast"
    )
    deepspeed: str | None = flag(None, "DeepSpeed configuration, such as config/zero2.json; none: off")
    resume_from_checkpoint: str | None = flag(
        None, "checkpoint folder to resume from, which gives up later ones; True: the last", affects="nothing"
    )
    overwrite_output_dir: bool = flag(False, "delete a run that output_dir already holds", affects="nothing")
    wandb_project: str | None = flag(
        None, "log to this Weights & Biases project; WANDB_MODE=offline works", affects="nothing"
    )
    tensorboard: bool = flag(False, "log for TensorBoard below output_dir", affects="nothing")
    check: bool = flag(False, "check every setting and prepare the data, then stop", affects="nothing")
    local_rank: int = flag(
        -1, "set by the deepspeed launcher; the environment's LOCAL_RANK is what counts", affects="nothing"
    )

    def __init__(self, **values):
        values = values.pop("hyperparameters", {}) | values  # what dataclasses.replace changes goes over what it copies
        defaults = {each.name: each.default for each in self.flags()}
        if unknown := values.keys() - defaults.keys():
            raise TypeError(f"{type(self).__name__} has no flag {', '.join(sorted(unknown))}")
        values = defaults | values
        own = {field.name for field in dataclasses.fields(self)}
        self.hyperparameters = {name: value for name, value in values.items() if name not in own}
        for name in own - {"hyperparameters"}:
            setattr(self, name, values[name])
        self.__post_init__()

    def __getattr__(self, name: str):
        # Reached for names that are no attribute of the instance; a copy under construction has none at all.
        try:
            return self.__dict__["hyperparameters"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None

    @classmethod
    def flags(cls) -> list[Flag]:
        """The flags in the order of a help text: those of the methods for ``hyperparameters``, a system's own behind
        the adapter's."""
        from mtl_lora.adapter.layer import methods

        own = {field.name for field in dataclasses.fields(cls)} - {f.name for f in dataclasses.fields(TrainingConfig)}
        order = super().flags()
        first = [each.name for each in order].index("output_dir")
        order = [
            *[each for each in order[:first] if each.name not in own],
            *[each for each in order if each.name in own],
            *[each for each in order[first:] if each.name not in own],
        ]

        usable = {name: layer for name, layer in methods().items() if cls.has_streams or not layer.only_streams}
        names = [" or ".join((name, *layer.aliases)) + f" ({layer.title})" for name, layer in usable.items()]
        found = []
        for each in order:
            if each.name == "adapter_name":
                each = dataclasses.replace(each, metadata={**each.metadata, "help": f"method: {', '.join(names)}"})
            found += hyperparameter_flags() if each.name == "hyperparameters" else [each]
        return found

    def to_json(self) -> dict:
        """A flat JSON object of every flag."""
        return {each.name: copy.deepcopy(getattr(self, each.name)) for each in self.flags()}

    def validate(self) -> None:
        if isinstance(self.batch_size, str):
            raise UserError(
                f"batch_size must be a whole number, not {self.batch_size!r}; to fill micro-batches by tokens pass "
                "--token_budget",
                "batch_size",
            )
        # Gradients of fp16 activations underflow without a scaled loss.
        self.require("dtype", "bf16 or fp32 for training, or auto", self.dtype != "fp16")
        self.require("warmup_ratio", "at least 0 and below 1", 0 <= self.warmup_ratio < 1)
        self.require("max_steps", "at least 1, or -1 for num_epochs", self.max_steps >= 1 or self.max_steps == -1)
        if self.token_budget and self.length_pool != TrainingConfig.length_pool:
            raise UserError("--token_budget sorts all examples by length, so --length_pool has no effect; pass one")
        if self.token_budget and self.sampling_temperature != 1:
            raise UserError("--token_budget and --sampling_temperature cannot be combined; pass one")
        if self.val_set_size and not self.save_step:
            raise UserError(
                "--val_set_size holds out examples for a loss at each save; pass --save_step N, which changes no weight"
            )
        for name in ("deepspeed", "use_gradient_checkpointing", "load_in_4bit", "token_budget"):
            self.require("cuda_graphs", f"off with --{name}", not (self.cuda_graphs and getattr(self, name)))
        one = self.gradient_accumulation_steps == 1
        self.require("cuda_graphs", "off with --gradient_accumulation_steps", one or not self.cuda_graphs)
        tasks = self.task_set()
        if self.task is not None:
            tasks[self.task]  # an unknown name is an error of the flag, not of an example
        self.adapter_config(tasks)

    def check_files(self) -> None:
        """Raise ``UserError`` if the data file is not there."""
        if not Path(self.data_path).is_file():
            made = f"make it with `{self.made_by}`, or " if self.made_by and not self.tasks_file else ""
            raise UserError(f"there is no data file {self.data_path}; {made}pass --data_path FILE")

    def task_set(self) -> TaskSet:
        """The tasks to train on; raises ``UserError`` for a bad tasks file or a contradicting ``lambda_num``."""
        tasks = self.read_tasks()
        if self.lambda_num is not None and self.lambda_num != len(tasks):
            raise UserError(
                f"lambda_num must be the number of tasks, {len(tasks)}, not {self.lambda_num}; leave it out"
            )
        return tasks

    def read_tasks(self) -> TaskSet:
        """The tasks of ``tasks_file``, or those of the system without one."""
        raise NotImplementedError

    def adapter_config(self, tasks: TaskSet) -> AdapterConfig:
        """The adapter part of the settings; raises ``UserError`` that names the flag."""
        from mtl_lora.adapter.layer import layer_class

        values = {field: getattr(self, name) for field, name in _ADAPTER_FLAGS.items()}
        flags = _ADAPTER_FLAGS | {name: name for name in self.hyperparameters}
        if len(targets := self.lora_target_modules) == 1 and not re.fullmatch(r"[\w.]+", targets[0]):
            values["target_modules"] = targets[0]  # all-linear, or an expression
        try:
            method = layer_class(self.adapter_name)
            if method.only_streams and not self.has_streams:
                raise UserError(f"method {method.method} is for maps of images, of the system dense; name another")
            declared = method.Hyperparameters.flags()
            read = {each.name: getattr(self, each.name) for each in declared}
            return AdapterConfig(**values, tasks=tasks.names, hyperparameters=read)
        except UserError as error:
            field, _, rest = str(error).partition(" ")
            raise UserError(f"--{flags[field]} {rest}" if field in flags else str(error)) from None

    def trainer_options(self) -> dict[str, object]:
        """What a system sets of transformers' ``TrainingArguments`` beside the flags that all have."""
        return {}

    def count(self) -> tuple[int, int]:
        """(trainable, all) parameters of the model that is trained, counted without its weights."""
        return part(self.system, "train").RUN(self).count()  # with torch, which flags need for nothing else
