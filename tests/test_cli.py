"""Flags become a checked configuration, and every mistake is one sentence before any work begins."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtl_lora import cli
from mtl_lora.config import Config, flag
from mtl_lora.errors import EXIT_CODE, UserError
from mtl_lora.language.config import TRAIN_ABOUT as ABOUT
from mtl_lora.language.config import TrainConfig

PROJECT = Path(__file__).resolve().parent.parent


def parse(*arguments: str) -> TrainConfig:
    """The training configuration of a command line."""
    return cli.parse(TrainConfig, list(arguments), ABOUT)


# ---- what is understood ----


def test_no_flags_give_the_defaults():
    assert parse() == TrainConfig()


SPELLINGS = [
    # (arguments, field, value)
    (["--seed=7"], "seed", 7),
    (["--seed", "7"], "seed", 7),
    (["--max-steps", "9"], "max_steps", 9),
    (["--max_steps", "-1"], "max_steps", -1),
    (["--local-rank=-1"], "local_rank", -1),
    (["--lora_alpha", "32"], "lora_alpha", 32.0),
    (["--learning_rate", "1e-3"], "learning_rate", 0.001),
    (["--batch_size", "16"], "batch_size", 16),
    (["--batch_size", "auto"], "batch_size", "auto"),
    (["--num_epochs=0.5"], "num_epochs", 0.5),
    (["--lora_target_modules", "q_proj,v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
    (["--lora_target_modules", " q_proj , v_proj, "], "lora_target_modules", ["q_proj", "v_proj"]),
    (["--lora_target_modules", '["q_proj", "v_proj"]'], "lora_target_modules", ["q_proj", "v_proj"]),
    (["--lora_target_modules=['q_proj', 'v_proj']"], "lora_target_modules", ["q_proj", "v_proj"]),
    (["--lora_target_modules=[q_proj, v_proj]"], "lora_target_modules", ["q_proj", "v_proj"]),
    (["--lora_target_modules", "q_proj"], "lora_target_modules", ["q_proj"]),
    (["--lora_target_modules", "[qv]_proj"], "lora_target_modules", ["[qv]_proj"]),
    (["--lora_target_modules", "[qv]_proj,o_proj"], "lora_target_modules", ["[qv]_proj", "o_proj"]),
    (["--lora_target_modules", "0,1"], "lora_target_modules", ["0", "1"]),
    (["--train_on_inputs"], "train_on_inputs", True),
    (["--train_on_inputs", "True"], "train_on_inputs", True),
    (["--train_on_inputs=yes"], "train_on_inputs", True),
    (["--train_on_inputs=1"], "train_on_inputs", True),
    (["--train_on_inputs", "False"], "train_on_inputs", False),
    (["--train_on_inputs=false"], "train_on_inputs", False),
    (["--train_on_inputs=no"], "train_on_inputs", False),
    (["--train_on_inputs", "0"], "train_on_inputs", False),
    (["--deepspeed", "None"], "deepspeed", None),
    (["--deepspeed="], "deepspeed", None),
    (["--lambda_num", "none"], "lambda_num", None),
    (["--lambda_num", "8"], "lambda_num", 8),
    (["--resume_from_checkpoint", "True"], "resume_from_checkpoint", "True"),
    # a string stays a string, whatever it looks like
    (["--output_dir", "2024"], "output_dir", "2024"),
    (["--output_dir=007"], "output_dir", "007"),
    (["--wandb_project", "1e3"], "wandb_project", "1e3"),
    (["--base_model", "True"], "base_model", "True"),
    (["--base_model", "[a, b]"], "base_model", "[a, b]"),
    (["--base_model", "a=b --seed=1"], "base_model", "a=b --seed=1"),
    (["--data_path", "None"], "data_path", "None"),
    (["--data_path", "-"], "data_path", "-"),
    (["--data_path", "deep (1)/é ☃\n.json"], "data_path", "deep (1)/é ☃\n.json"),
]


@pytest.mark.parametrize("arguments, field, value", SPELLINGS, ids=[" ".join(row[0]) for row in SPELLINGS])
def test_flag_is_read_as_its_declared_type(arguments, field, value):
    config = parse(*arguments)
    read = getattr(config, field)
    assert read == value and type(read) is type(value)
    assert config == dataclasses.replace(TrainConfig(), **{field: value}), "no other field may change"


def test_flags_go_together_in_any_spelling():
    config = parse("--check", "--seed=1", "--train-on-inputs", "--lora_r", "4", "--overwrite_output_dir", "False")
    expected = TrainConfig(check=True, seed=1, train_on_inputs=True, lora_r=4, overwrite_output_dir=False)
    assert config == expected


def test_parsing_writes_nothing(capsys):
    parse("--seed", "3")
    assert capsys.readouterr() == ("", "")


@dataclasses.dataclass
class Small(Config):
    """A configuration with an empty list, as the evaluation has."""

    names: list[str] = flag([], "names; empty: all")
    limit: int | None = flag(None, "most of them; none: no limit")


def test_defaults_of_lists_are_not_shared_between_configurations():
    cli.parse(Small, ["--names", "a,b"], "about").names.append("c")
    assert cli.parse(Small, [], "about").names == []
    assert cli.parse(Small, ["--names="], "about").names == []


# ---- what is refused ----

REFUSED = [
    # (arguments, message)
    (["--learning_rates", "8"], r"unknown flag --learning_rates \(did you mean 'learning_rate'\?\)"),
    (["--learning-rates=8"], r"unknown flag --learning_rates \(did you mean"),
    (["--zzz", "8"], r"unknown flag --zzz; known are base_model, data_path, .*, local_rank"),
    (["--=8"], "unknown flag --;"),
    (["--help_me"], "unknown flag --help_me"),
    (["8"], "the argument '8' belongs to no flag; write --name value"),
    (["--seed", "8", "9"], "the argument '9' belongs to no flag"),
    (["--seed=8", "train"], "the argument 'train' belongs to no flag"),
    (["-s", "8"], "the argument '-s' belongs to no flag"),
    (["--"], "the argument '--' belongs to no flag"),
    (["--", "--verbose"], "the argument '--' belongs to no flag"),
    ([""], "the argument '' belongs to no flag"),
    (["--seed"], "the flag --seed needs a value: a whole number"),
    (["--base_model", "--seed", "8"], "the flag --base_model needs a value: a string"),
    (["--deepspeed"], "the flag --deepspeed needs a value: a string or none"),
    (["--seed", "8", "--seed", "8"], "the flag --seed is given twice"),
    (["--max_steps=8", "--max-steps", "8"], "the flag --max_steps is given twice"),
    (["--check", "--check"], "the flag --check is given twice"),
    (["--seed", "eight"], "--seed must be a whole number, not 'eight'"),
    (["--seed", "8.0"], r"--seed must be a whole number, not '8\.0'"),
    (["--seed="], "--seed must be a whole number, not ''"),
    (["--seed", "True"], "--seed must be a whole number, not 'True'"),
    (["--lora_alpha", "16,0"], "--lora_alpha must be a number, not '16,0'"),
    (["--learning_rate", "nan"], "learning_rate must be a number, not nan"),
    (["--learning_rate", "inf"], "learning_rate must be a number, not inf"),
    (["--lambda_num", "all"], "--lambda_num must be a whole number or none, not 'all'"),
    (["--check", "maybe"], "--check must be True or False, not 'maybe'"),
    (["--train_on_inputs=2"], "--train_on_inputs must be True or False, not '2'"),
    (["--lora_target_modules", '["q_proj"'], r"--lora_target_modules must be a list of strings, not '\[\"q_proj\"'"),
    (["--lora_target_modules", '["q_proj" + 1]'], "--lora_target_modules must be a list of strings"),
]


@pytest.mark.parametrize("arguments, message", REFUSED, ids=[" ".join(row[0]) or "empty" for row in REFUSED])
def test_argument_that_is_not_understood_is_one_sentence(arguments, message, capsys):
    with pytest.raises(UserError, match=f"^{message}") as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


# ---- help ----


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--seed", "3", "--help"], ["--unknown", "--help"]])
def test_help_is_printed_without_work(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith(ABOUT) and err == ""


def test_help_says_name_type_default_and_meaning_of_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    lines = capsys.readouterr().out.splitlines()
    for field in dataclasses.fields(TrainConfig):
        (at,) = [n for n, line in enumerate(lines) if line.startswith(f"  --{field.name} ")]
        default = getattr(TrainConfig(), field.name)
        shown = "none" if default is None else ",".join(default) if isinstance(default, list) else str(default)
        assert lines[at].endswith(f"; default: {shown})")
        assert lines[at + 1].strip() == field.metadata["help"]


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
def test_default_as_help_spells_it_can_be_passed(field):
    shown = cli.help_text(TrainConfig, ABOUT).split(f"--{field.name}  (")[1].split("default: ")[1].split(")\n")[0]
    assert parse(f"--{field.name}={shown}") == TrainConfig()


# ---- the script ----


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in the project's folder."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_script_answers_a_bad_flag_with_one_line_and_exit_code_2():
    done = command("finetune.py", "--learning_rates", "8")
    assert done.returncode == EXIT_CODE == 2
    assert done.stderr == "error: unknown flag --learning_rates (did you mean 'learning_rate'?)\n"
    assert done.stdout == ""


def test_under_a_launcher_one_process_of_a_node_says_what_is_wrong():
    done = command("finetune.py", "--learning_rates", "8", LOCAL_RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_CODE, "", "")


WITHOUT_TORCH = """
import runpy, sys
sys.argv = ["finetune.py", *{arguments}]
try:
    runpy.run_path("finetune.py", run_name="__main__")
except SystemExit as stopped:
    heavy = {{"torch", "transformers", "datasets", "numpy"}} & set(sys.modules)
    print(stopped.code, sorted(heavy), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments, code",
    [(["--learning_rates", "8"], 2), (["--lora_r", "0"], 2), (["--help"], 0)],
    ids=["flag", "value", "help"],
)
def test_flags_are_answered_without_loading_torch(arguments, code):
    done = command("-c", WITHOUT_TORCH.format(arguments=arguments))
    assert done.stderr.splitlines()[-1] == f"{code} []"


# ---- settings that cannot work ----


@pytest.fixture
def refused(tiny_base, records_file, cache_dir, tmp_path, monkeypatch):
    """Run training with settings that must be refused before the model is loaded; the sentence comes back."""
    from mtl_lora.language import train as run

    def load_no_model(*arguments, **options):
        raise AssertionError("the model must not be loaded with such settings")

    monkeypatch.setattr(run, "load_model", load_no_model)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)

    def start(**settings) -> str:
        paths = {"base_model": tiny_base, "data_path": records_file, "cache_dir": cache_dir, "output_dir": "out"}
        with pytest.raises(UserError) as caught:
            run.run(TrainConfig(**{**paths, **settings}))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return start


BAD_SETTINGS = {
    # name of the case: (settings, message)
    "rank": ({"lora_r": 0}, "lora_r must be at least 1, not 0"),
    "rank a fraction": ({"lora_r": 1.5}, "lora_r must be a whole number, not 1.5"),
    "alpha": ({"lora_alpha": 0.0}, "lora_alpha must be greater than 0, not 0.0"),
    "dropout": ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1, not 1.0"),
    "dropout negative": ({"lora_dropout": -0.1}, "lora_dropout must be at least 0 and below 1, not -0.1"),
    "temperature": ({"temperature": 0.0}, "temperature must be greater than 0, not 0.0"),
    "num_B": ({"num_B": 0}, "num_B must be at least 1, not 0"),
    "method": ({"adapter_name": "lorra"}, "adapter_name must be one of "),
    "no targets": ({"lora_target_modules": []}, "lora_target_modules must be at least one name"),
    "unknown target": (
        {"lora_target_modules": ["query"]},
        "--lora_target_modules: no linear layer is named 'query'; this model has q_proj (2), k_proj (2)",
    ),
    "lambda_num": ({"lambda_num": 3}, "lambda_num must be the number of tasks, 8, not 3"),
    "batch": ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    "batch a word": ({"batch_size": "all"}, "batch_size must be a whole number or auto, not 'all'"),
    "budget": ({"token_budget": -1}, "token_budget must be at least 0, not -1"),
    "budget below a row": ({"token_budget": 30}, "token_budget must be at least the longest row's "),
    "budget and auto": (
        {"token_budget": 2048, "batch_size": "auto"},
        "--token_budget and --batch_size auto both say how large a micro-batch is; pass one",
    ),
    "budget and pool": ({"token_budget": 2048, "length_pool": 1}, "it does not go with --length_pool; pass one"),
    "sampling temperature": ({"sampling_temperature": 0.5}, "sampling_temperature must be at least 1, not 0.5"),
    "accumulation": ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
    "learning rate": ({"learning_rate": 0.0}, "learning_rate must be greater than 0"),
    "learning rate NaN": ({"learning_rate": float("nan")}, "learning_rate must be a number, not nan"),
    "warm-up": ({"warmup_ratio": 1.0}, "warmup_ratio must be at least 0 and below 1"),
    "epochs": ({"num_epochs": 0.0}, "num_epochs must be greater than 0"),
    "steps": ({"max_steps": 0}, "max_steps must be at least 1, or -1 for num_epochs, not 0"),
    "seed": ({"seed": -1}, "seed must be at least 0, not -1"),
    "cutoff": ({"cutoff_len": 0}, "cutoff_len must be at least 1"),
    "cutoff below the template": ({"cutoff_len": 20}, "cutoff_len 20 leaves no room for an instruction"),
    "template": ({"template": "alpacca"}, "unknown prompt template 'alpacca' (did you mean 'alpaca'?)"),
    "dtype": ({"dtype": "fp8"}, "dtype must be one of auto, bf16, fp32, fp64, not 'fp8'"),
    "held-out rows": ({"val_set_size": 96}, "val_set_size must be below the number of rows, 96, not 96"),
    "tasks file": ({"tasks_file": "nowhere.json"}, "the tasks file nowhere.json cannot be read"),
    "data file": ({"data_path": "nowhere.json"}, "the data file nowhere.json does not exist"),
    "data a folder": ({"data_path": "."}, "the data file . does not exist"),
    "base model": ({"base_model": "./nowhere"}, "the model './nowhere' cannot be loaded"),
    "base model a file": ({"base_model": "file"}, "the model 'file' cannot be loaded"),
    "DeepSpeed": ({"deepspeed": "nowhere.json"}, "the DeepSpeed configuration nowhere.json cannot be read"),
    "DeepSpeed no JSON": ({"deepspeed": "file"}, "the DeepSpeed configuration file is not JSON"),
    "resume from nowhere": (
        {"resume_from_checkpoint": "nowhere"},
        "nowhere holds no resume state; pass a checkpoint-N folder",
    ),
    "resume nothing": ({"resume_from_checkpoint": "True"}, "out holds no whole checkpoint"),
    "resume and overwrite": (
        {"resume_from_checkpoint": "True", "overwrite_output_dir": True},
        "--resume_from_checkpoint and --overwrite_output_dir contradict each other",
    ),
    "cache below a file": ({"cache_dir": "file/rows"}, "the cache folder file/rows cannot be written"),
    "output below a file": ({"output_dir": "file/out"}, "cannot be written (Not a directory)"),
    "output a file": ({"output_dir": "file"}, "cannot be written"),
}


@pytest.mark.parametrize("settings, message", BAD_SETTINGS.values(), ids=list(BAD_SETTINGS))
def test_setting_that_can_not_work_is_refused_before_the_model_loads(refused, tmp_path, settings, message):
    (tmp_path / "file").write_text("not JSON")
    assert message in refused(**settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"], "nothing may be left behind"


@pytest.mark.parametrize(
    "package, settings", [("wandb", {"wandb_project": "p"}), ("tensorboard", {"tensorboard": True})]
)
def test_flag_whose_package_is_missing_says_how_to_install_it(refused, monkeypatch, package, settings):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    (flag_name,) = settings
    expected = f"--{flag_name} needs the package {package}; install it with `pip install {package}`"
    assert refused(**settings) == expected


@pytest.mark.parametrize(
    "left", ["run.json", "train_log.jsonl", "mtl_lora_config.json", "checkpoint-3/trainer_state.json"]
)
def test_output_folder_that_holds_a_run_is_left_as_it_is(refused, tmp_path, left):
    path = tmp_path / "out" / left
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"step": 3}))
    assert "out already holds a run; pass --resume_from_checkpoint True" in refused()
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == [path]
    assert path.read_text() == json.dumps({"step": 3})
