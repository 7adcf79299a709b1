"""The command line of exports and imports: ``python -m mtl_lora.export peft|merge|import-peft|import-original ...``."""

import argparse

from mtl_lora.config import DTYPES
from mtl_lora.errors import OneSentenceParser, user_errors_to_exit_code
from mtl_lora.language.tasks import COMMONSENSE, TaskSet, load_tasks_file


def make_parser() -> argparse.ArgumentParser:
    """All subcommands; each sets ``run``, a function of the parsed arguments."""
    parser = OneSentenceParser(prog="python -m mtl_lora.export", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_peft(commands)
    add_merge(commands)
    add_import_peft(commands)
    add_import_original(commands)
    return parser


def add_command(commands, name: str, about: str, run) -> argparse.ArgumentParser:
    """A subcommand with the flags that all have."""
    parser = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write, whole or not at all")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier output of this command (default: refuse)"
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run model code that the base model's repository brings (default: refuse)",
    )
    parser.set_defaults(run=run)
    return parser


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The flags that name a checkpoint and its base."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="adapter folder of a training run")
    parser.add_argument("--base_model", metavar="NAME", help="its base, a name or folder (default: as it says itself)")


def add_temperature(parser: argparse.ArgumentParser) -> None:
    """The flag of what a checkpoint of ours says and no other file does."""
    parser.add_argument(
        "--temperature", type=float, default=0.1, metavar="TAU", help="tau of softmax(w_t / tau) (default: %(default)s)"
    )


def add_tasks_file(parser: argparse.ArgumentParser) -> None:
    """The flag that names the tasks."""
    parser.add_argument(
        "--tasks_file", metavar="FILE", help="JSON file of the tasks (default: the eight commonsense tasks)"
    )


def add_peft(commands) -> None:
    """``peft``: one PEFT LoRA folder per task."""
    parser = add_command(commands, "peft", "Write one PEFT LoRA folder per task, with a model card.", run_peft)
    add_checkpoint(parser)
    parser.add_argument("--tasks", metavar="A,B", default="", help="tasks to export (default: all)")
    parser.add_argument(
        "--results",
        metavar="FILE",
        help="results.json for the card (default: the checkpoint's evaluation/results.json, if it is of these weights)",
    )


def add_merge(commands) -> None:
    """``merge``: a plain model for one task."""
    parser = add_command(commands, "merge", "Write a plain model with the adapter folded in for one task.", run_merge)
    add_checkpoint(parser)
    parser.add_argument(
        "--task", metavar="NAME", help="the task; lora, dora and multilora can do without (default: none)"
    )
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="auto",
        help="dtype of the weights; auto: the base model's own (default: %(default)s)",
    )


def add_import_peft(commands) -> None:
    """``import-peft``: a checkpoint that starts as a PEFT LoRA."""
    about = "Write a checkpoint that equals a PEFT LoRA for every task."
    parser = add_command(commands, "import-peft", about, run_import_peft)
    parser.add_argument("--peft", required=True, metavar="DIR", help="folder of a plain PEFT LoRA, in safetensors")
    parser.add_argument("--base_model", metavar="NAME", help="its base, a name or folder (default: as it says itself)")
    add_tasks_file(parser)
    parser.add_argument(
        "--method", choices=["mtl_lora", "lora"], default="mtl_lora", help="what to make of it (default: %(default)s)"
    )
    parser.add_argument(
        "--num_B", type=int, default=3, metavar="N", help="up-projections of MTL-LoRA (default: %(default)s)"
    )
    add_temperature(parser)
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="fixes MTL-LoRA's w (default: %(default)s)")
    parser.add_argument(
        "--template",
        default="alpaca",
        metavar="NAME",
        help="prompt template it was trained with: alpaca, original or plain (default: %(default)s)",
    )


def add_import_original(commands) -> None:
    """``import-original``: a checkpoint from the original repository's file."""
    about = "Write a checkpoint with the weights of the original MTL-LoRA repository's checkpoint file."
    parser = add_command(commands, "import-original", about, run_import_original)
    parser.add_argument("--file", required=True, help="its checkpoint file (.bin or .pt), read as tensors alone")
    parser.add_argument("--base_model", required=True, metavar="NAME", help="name or folder of its base")
    add_tasks_file(parser)
    parser.add_argument("--alpha", type=float, default=16.0, metavar="X", help="its lora_alpha (default: %(default)s)")
    add_temperature(parser)


def run_peft(options: dict) -> None:
    """Export, then name the folders."""
    from mtl_lora.export.peft_format import export_peft

    options["tasks"] = [name.strip() for name in options["tasks"].split(",") if name.strip()]
    print("\n".join(str(folder) for folder in export_peft(**options)))


def run_merge(options: dict) -> None:
    """Merge, then name the folder."""
    from mtl_lora.export.merged import export_merged

    print(export_merged(**options))


def run_import_peft(options: dict) -> None:
    """Import, then name the folder."""
    from mtl_lora.export.import_peft import import_peft

    print(import_peft(tasks=tasks_of(options), **options))


def run_import_original(options: dict) -> None:
    """Import, then name the folder."""
    from mtl_lora.export.import_original import import_original

    print(import_original(tasks=tasks_of(options), **options))


def tasks_of(options: dict) -> TaskSet:
    """The tasks of ``--tasks_file``, which is taken out of ``options``, else the eight."""
    path = options.pop("tasks_file")
    return load_tasks_file(path) if path else COMMONSENSE


def main(arguments: list[str] | None = None) -> None:
    """Run one subcommand; a user's mistake ends in one sentence and exit code 2."""
    with user_errors_to_exit_code():
        options = vars(make_parser().parse_args(arguments))
        del options["command"]
        options.pop("run")(options)


if __name__ == "__main__":
    main()
