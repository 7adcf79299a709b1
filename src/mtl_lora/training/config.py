"""The training flags that all systems share: model, data, adapter, batches, schedule, run. A system adds its own.

The flags are named as in the reference implementation and in LLM-Adapters.
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

# Fields of ``AdapterConfig`` -> flags, which are named as in the reference implementation and in LLM-Adapters.
ADAPTER_FLAGS = {
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
    """The configuration of a training run, common to all systems. Raises ``UserError`` for an invalid value.

    The hyperparameters of every registered method are flags too, passed and read by name (``TrainConfig(num_B=2)``,
    ``config.num_B``); the chosen method ignores those of other methods.
    """

    affects = "weights"
    system = ""  # the package that the configuration belongs to
    has_streams = False  # whether the system's models return an output for each task from one input
    made_by = ""  # the command that makes the default data file, named by the error if the file is missing
    default_tasks = None  # the task set without ``tasks_file``

    idle = dict.fromkeys(("task_rank", "task_scale", "shared_mode"), "belongs to MTLoRA, a method of --system dense")

    base_model: str = flag("smollm2-135m", "name or folder of the base model", group="the model and the data")
    data_path: str = flag(
        "commonsense_170k_taskid.json",
        "training examples, a file in JSON, JSON lines, CSV or parquet",
        affects="content",
    )
    tasks_file: str | None = flag(None, "JSON file that declares your own tasks", affects="content")
    task: str | None = flag(None, "task of all examples; none: each example names its task in a field task or task_id")
    cache_dir: str = flag(".cache/rows", "folder in which tokenised examples are cached", affects="nothing")

    adapter_name: str = flag("mtl_lora", "adapter method", aliases=("method",), group="the adapter")
    lora_r: int = flag(8, "rank r of the adapter", aliases=("rank",))
    lora_alpha: float = flag(16.0, "alpha; the adapter's update is scaled by alpha / r", aliases=("alpha",))
    lora_dropout: float = flag(0.05, "dropout probability on the adapter's input; 0: off", aliases=("dropout",))
    lora_target_modules: list[str] = flag(
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        "linear layers to adapt, as a,b: names, name endings, or regular expressions that match a whole name; "
        "all-linear: all that can carry an adapter, except the output head",
        aliases=("target_modules",),
    )
    modules_to_save: list[str] = flag(
        [],
        "modules to train in full and save with the adapter, as a,b: names, name endings or shell patterns; "
        "'*': the whole model; empty: none",
    )
    hyperparameters: dict = dataclasses.field(default_factory=dict)  # those of all methods, each a flag of its own
    use_rslora: bool = flag(False, "scale by alpha / sqrt(r) instead of alpha / r")
    lambda_num: int | None = flag(
        None, "number of matrices Lambda_t, which must equal the number of tasks; none: that number"
    )
    start_from: str | None = flag(
        None,
        "checkpoint of the same method to train further; its tasks are matched by name, and new ones may be added; "
        "none: the method's own start",
        aliases=("load_from_checkpoint",),
    )
    trust_remote_code: bool = flag(False, "run the model code in the base model's repository")

    output_dir: str = flag(
        "output/mtl_lora", "folder for the adapter, its checkpoints and logs", affects="nothing", group="output"
    )

    batch_size: int | str = flag(
        8,
        "examples per device and micro-batch; the global batch is batch_size x devices x gradient_accumulation_steps",
        min=1,
        group="batches and schedule",
    )
    token_budget: int = flag(
        0,
        "maximum tokens per device and micro-batch, padding included (examples x longest example); replaces "
        "batch_size, which then applies only to validation; 0: off",
        min=0,
    )
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimiser step", min=1)
    num_epochs: float = flag(3.0, "passes over the training examples", above=0)
    sampling_temperature: float = flag(
        1.0,
        "a task's proportion of an epoch is proportional to (its number of examples) ^ (1 / this value); "
        "1: the proportions of the data",
        min=1,
    )
    max_steps: int = flag(-1, "optimiser steps; overrides num_epochs; -1: off")
    length_pool: int = flag(
        128,
        "number of batches whose examples are sorted by length together, to reduce padding; 1: every batch mixes all "
        "tasks",
        min=1,
    )
    lr_scheduler_type: str = flag(
        "linear", f"learning rate schedule after the warm-up: {', '.join(SCHEDULES)}", choices=SCHEDULES
    )
    learning_rate: float = flag(3e-4, "peak learning rate of AdamW", above=0)
    warmup_ratio: float = flag(0.01, "fraction of the steps used for the linear warm-up; 0: off")
    weight_decay: float = flag(0.0, "AdamW weight decay; 0: off", min=0)
    max_grad_norm: float = flag(1.0, "norm to which gradients are clipped; 0: off", min=0)

    val_set_size: int = flag(
        0, "examples of all tasks held out for a validation loss at each save; 0: none", min=0, group="the run"
    )
    save_step: int = flag(200, "steps between checkpoints; 0: save only the final adapter", affects="nothing", min=0)
    save_total_limit: int = flag(
        3,
        "number of latest checkpoints to keep, beside the one of the lowest validation loss; 0: all",
        affects="nothing",
        min=0,
    )
    logging_steps: int = flag(10, "steps between log lines", affects="nothing", min=1)
    seed: int = flag(42, "random seed for data order, initialisation and dropout", min=0, max=2**32 - 1)
    dtype: str = flag(
        "auto",
        "dtype of the base model: bf16, fp32, fp64; auto: bf16 where the hardware supports it natively, else fp32",
        choices=DTYPES,
    )
    load_in_4bit: bool = flag(False, "load the base model in 4 bits, as QLoRA does; needs bitsandbytes")
    use_gradient_checkpointing: bool = flag(
        False, "recompute activations in the backward pass to save memory", by_outcome=True
    )
    cuda_graphs: bool = flag(
        False,
        "on one GPU: record the training step of each padded length as a CUDA graph and replay it; speeds up small "
        "steps",
    )
    deepspeed: str | None = flag(None, "DeepSpeed configuration file, such as config/zero2.json; none: off")
    resume_from_checkpoint: str | None = flag(
        None,
        "checkpoint folder to resume from; later checkpoints of the run are deleted; True: the latest; none: off",
        affects="nothing",
    )
    overwrite_output_dir: bool = flag(False, "delete the run that output_dir already holds", affects="nothing")
    wandb_project: str | None = flag(
        None, "Weights & Biases project to log to, also with WANDB_MODE=offline; none: off", affects="nothing"
    )
    tensorboard: bool = flag(False, "write TensorBoard logs to output_dir/tensorboard", affects="nothing")
    check: bool = flag(False, "check every setting and prepare the data, then stop", affects="nothing")
    local_rank: int = flag(
        -1,
        "passed by the deepspeed launcher and ignored; the environment variable LOCAL_RANK is used",
        affects="nothing",
    )

    def __init__(self, **values):
        values = values.pop("hyperparameters", {}) | values  # dataclasses.replace passes both; changed values win
        defaults = {each.name: each.default for each in self.flags()}
        if unknown := values.keys() - defaults.keys():
            raise TypeError(f"{type(self).__name__} has no flag {', '.join(sorted(unknown))}")
        values = copy.deepcopy(defaults) | values  # a list must not be shared
        own = {field.name for field in dataclasses.fields(self)}
        self.hyperparameters = {name: value for name, value in values.items() if name not in own}
        for name in own - {"hyperparameters"}:
            setattr(self, name, values[name])
        self.__post_init__()

    def __getattr__(self, name: str):
        # Called only for names that the instance lacks; an instance that is being copied has no attributes yet.
        try:
            return self.__dict__["hyperparameters"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None

    @classmethod
    def flags(cls) -> list[Flag]:
        """Return the flags in the order of the help text: the methods' flags in the place of ``hyperparameters``, and
        the system's own flags after the adapter's."""
        from mtl_lora.adapter.layer import methods

        shared = [field.name for field in dataclasses.fields(TrainingConfig)]
        place = {name: 0 if index < shared.index("output_dir") else 2 for index, name in enumerate(shared)}
        order = sorted(super().flags(), key=lambda each: place.get(each.name, 1))
        usable = {name: layer for name, layer in methods().items() if cls.has_streams or not layer.only_streams}
        names = [" or ".join((name, *layer.aliases)) + f" ({layer.title})" for name, layer in usable.items()]
        found = []
        for each in order:
            if each.name == "adapter_name":
                about = f"adapter method: {', '.join(names)}"
                each = dataclasses.replace(each, metadata={**each.metadata, "help": about})
            found += hyperparameter_flags() if each.name == "hyperparameters" else [each]
        return found

    def to_json(self) -> dict:
        """Return a flat JSON object of all flags."""
        return {each.name: copy.deepcopy(getattr(self, each.name)) for each in self.flags()}

    def validate(self) -> None:
        if isinstance(self.batch_size, str):
            raise UserError(
                f"batch_size must be a whole number, not {self.batch_size!r}; to size micro-batches in tokens, pass "
                "--token_budget",
                "batch_size",
            )
        # Without loss scaling, the gradients of fp16 activations underflow.
        self.require("dtype", "bf16, fp32 or fp64 for training, or auto", self.dtype != "fp16")
        self.require("warmup_ratio", "at least 0 and below 1", 0 <= self.warmup_ratio < 1)
        self.require("max_steps", "at least 1, or -1 to use num_epochs", self.max_steps >= 1 or self.max_steps == -1)
        if self.token_budget and self.length_pool != TrainingConfig.length_pool:
            raise UserError("--token_budget sorts all examples by length, so --length_pool has no effect; leave it out")
        if self.token_budget and self.sampling_temperature != 1:
            raise UserError("--token_budget and --sampling_temperature cannot be combined; pass only one")
        if self.val_set_size and not self.save_step:
            raise UserError(
                "--val_set_size needs checkpoints, because the validation loss is computed at each save; pass "
                "--save_step N, which does not affect the weights"
            )
        for name in ("deepspeed", "use_gradient_checkpointing", "load_in_4bit", "token_budget"):
            self.require("cuda_graphs", f"off with --{name}", not (self.cuda_graphs and getattr(self, name)))
        one = self.gradient_accumulation_steps == 1
        self.require("cuda_graphs", "off with --gradient_accumulation_steps", one or not self.cuda_graphs)
        tasks = self.task_set()
        if self.task is not None:
            tasks[self.task]  # report an unknown name as an error of the flag, not of an example
        self.adapter_config(tasks)

    def check_files(self) -> None:
        """Raise ``UserError`` if the data file does not exist."""
        if Path(self.data_path).is_dir():
            raise UserError(f"--data_path {self.data_path} is a folder; pass a file of training examples")
        if not Path(self.data_path).is_file():
            made = f"make it with `{self.made_by}`, or " if self.made_by and not self.tasks_file else ""
            raise UserError(f"the data file {self.data_path} does not exist; {made}pass --data_path FILE")

    def task_set(self) -> TaskSet:
        """Return the tasks to train on; raises ``UserError`` for an invalid tasks file or a ``lambda_num`` that is not
        the number of tasks."""
        tasks = self.read_tasks()
        if self.lambda_num is not None and self.lambda_num != len(tasks):
            raise UserError(
                f"lambda_num must be the number of tasks, {len(tasks)}, not {self.lambda_num}; leave it out"
            )
        return tasks

    def read_tasks(self) -> TaskSet:
        """Return the tasks that ``tasks_file`` declares or, without that file, the system's default tasks."""
        default = self.default_tasks
        return type(default).load(self.tasks_file) if self.tasks_file else default

    def adapter_config(self, tasks: TaskSet) -> AdapterConfig:
        """Return the adapter's configuration; raises ``UserError`` that names the flag."""
        from mtl_lora.adapter.layer import layer_class

        values = {field: getattr(self, name) for field, name in ADAPTER_FLAGS.items()}
        flags = ADAPTER_FLAGS | {name: name for name in self.hyperparameters}
        if len(targets := self.lora_target_modules) == 1 and not re.fullmatch(r"[\w.]+", targets[0]):
            values["target_modules"] = targets[0]  # all-linear, or a regular expression
        try:
            method = layer_class(self.adapter_name)
            if method.only_streams and not self.has_streams:
                raise UserError(f"method {method.method} is only for --system dense; choose another")
            declared = method.Hyperparameters.flags()
            read = {each.name: getattr(self, each.name) for each in declared}
            return AdapterConfig(**values, tasks=tasks.names, hyperparameters=read)
        except UserError as error:
            field, _, rest = str(error).partition(" ")
            raise UserError(f"--{flags[field]} {rest}" if field in flags else str(error)) from None

    def trainer_options(self) -> dict[str, object]:
        """Return the system's own values for transformers' ``TrainingArguments``."""
        return {}

    def count(self) -> tuple[int, int]:
        """Return the (trainable, total) number of parameters of the model, counted without loading its weights."""
        return part(self.system, "train").RUN(self).count()  # imports torch, which the flags alone do not need
