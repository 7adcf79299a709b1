"""Arguments become a checked configuration, every mistake is one sentence, and every command is found."""

import contextlib
import dataclasses
import importlib
import os
import re
import subprocess
import sys

import pytest
from shared import PROJECT

from mtl_lora import cli
from mtl_lora.config import REQUIRED, Config, closest, flag
from mtl_lora.errors import EXIT_CODE, UserError
from mtl_lora.export.__main__ import COMMANDS as EXPORTS
from mtl_lora.language.config import EvalConfig, PredictConfig, TrainConfig
from mtl_lora.report.__main__ import COMMANDS as REPORTS
from mtl_lora.study.config import StudyConfig
from mtl_lora.version import __version__


def parse(*arguments: str) -> TrainConfig:
    """The training configuration of a command line."""
    return cli.parse(TrainConfig, list(arguments), TrainConfig.__doc__)


def one_sentence(caught: pytest.ExceptionInfo, *facts: str) -> None:
    """An error's message is one line that holds every fact."""
    text = str(caught.value)
    assert "\n" not in text
    assert [fact for fact in facts if fact not in text] == [], text


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
    (["--num_epochs=0.5"], "num_epochs", 0.5),
    (["--lora_target_modules", "q_proj,v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
    (["--lora_target_modules", " q_proj , v_proj, "], "lora_target_modules", ["q_proj", "v_proj"]),
    (["--lora_target_modules", '["q_proj", "v_proj"]'], "lora_target_modules", ["q_proj", "v_proj"]),
    (["--lora_target_modules=['q_proj', 'v_proj']"], "lora_target_modules", ["q_proj", "v_proj"]),
    (["--lora_target_modules=[q_proj, v_proj]"], "lora_target_modules", ["q_proj", "v_proj"]),
    (["--lora_target_modules", "q_proj"], "lora_target_modules", ["q_proj"]),
    (["--lora_target_modules", "[qv]_proj"], "lora_target_modules", ["[qv]_proj"]),
    (["--lora_target_modules", "[qv]_proj,o_proj"], "lora_target_modules", ["[qv]_proj", "o_proj"]),
    # the commas of a regular expression are its own
    (["--lora_target_modules", r"layers\.(0|1){1,2}\..*"], "lora_target_modules", [r"layers\.(0|1){1,2}\..*"]),
    (["--lora_target_modules", r".*\.[a,b]\w{1,3},o_proj"], "lora_target_modules", [r".*\.[a,b]\w{1,3}", "o_proj"]),
    (["--lora_target_modules", "0,1"], "lora_target_modules", ["0", "1"]),
    (["--train_on_inputs"], "train_on_inputs", True),
    (["--train_on_inputs", "True"], "train_on_inputs", True),
    (["--train_on_inputs=yes"], "train_on_inputs", True),
    (["--train_on_inputs=1"], "train_on_inputs", True),
    (["--train_on_inputs", "False"], "train_on_inputs", False),
    (["--train_on_inputs=no"], "train_on_inputs", False),
    (["--train_on_inputs", "0"], "train_on_inputs", False),
    (["--deepspeed", "None"], "deepspeed", None),
    (["--deepspeed="], "deepspeed", None),
    (["--lambda_num", "none"], "lambda_num", None),
    (["--lambda_num", "8"], "lambda_num", 8),
    (["--num_B", "2"], "num_B", 2),
    (["--resume_from_checkpoint", "True"], "resume_from_checkpoint", "True"),
    # a string stays a string, whatever it looks like
    (["--output_dir", "2024"], "output_dir", "2024"),
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


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("nun_B", "num_B", "num_B"),
        ("MTL-LoR", "MTL-LoRA", "MTL-LoRA"),
        ("LORA", "lora", "lora"),
        ("mtl-lora", "mtl_lora", "mtl_lora"),
    ],
)
def test_slip_of_the_pen_is_told_whatever_the_case(word, known, meant):
    assert closest(word, [known, "eval_steps", "alpha"]) == f" (did you mean {meant!r}?)"
    assert closest("max_steps", ["eval_steps"]) == "; known are eval_steps"


def test_flags_go_together_in_any_spelling():
    config = parse("--check", "--seed=1", "--train-on-inputs", "--lora_r", "4", "--overwrite_output_dir", "False")
    expected = TrainConfig(check=True, seed=1, train_on_inputs=True, lora_r=4, overwrite_output_dir=False)
    assert config == expected


@dataclasses.dataclass
class Small(Config):
    """A command with arguments that have no flag, a switch, a flag without a default and one with an earlier name."""

    files: list[str] = flag(REQUIRED, "files to read", positional=True)
    output: str = flag(REQUIRED, "where to")
    check: bool = flag(False, "only check")
    seeds: list[int] = flag([], "seeds; empty: none")
    reuse: bool = flag(True, "reuse", aliases=("share_opening",))
    limit: int | None = flag(None, "most of them; none: no limit")
    size: int | str = flag("auto", "a number, or auto")


def small(*arguments: str) -> Small:
    return cli.parse(Small, list(arguments), "About.")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["a", "--output", "o", "b"], {"files": ["a", "b"]}),
        (["--output=o", "--check", "a", "b"], {"files": ["a", "b"], "check": True}),
        (["--output=o", "--check", "False", "a"], {"files": ["a"], "check": False}),
        (["a", "--output=o", "--check"], {"files": ["a"], "check": True}),
        (["-", "--", "--output=o"], {"files": ["-", "--"]}),
        (["a", "--output=o", "--share_opening", "False"], {"files": ["a"], "reuse": False}),
        (["a", "--output=o", "--share-opening=no"], {"files": ["a"], "reuse": False}),
        (["a", "--output=o", "--seeds", "3,4"], {"files": ["a"], "seeds": [3, 4]}),
        (["a", "--output=o", "--size", "auto"], {"files": ["a"], "size": "auto"}),
        (["a", "--output=o", "--size=-2"], {"files": ["a"], "size": -2}),
        (["a", "--output=o", "--size=--5"], {"files": ["a"], "size": "--5"}),
    ],
)
def test_positional_arguments_switches_and_earlier_names(arguments, expected):
    assert small(*arguments) == Small(**{"output": "o", **expected})


def test_home_folder_is_written_as_in_a_shell(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert small("a", "--output=~/out").output == "/home/me/out" and small("a", "--output", "x~/o").output == "x~/o"
    assert small("~/a", "--output", "~/b\\1") == Small(files=["/home/me/a"], output="/home/me/b\\1")


def test_home_folder_is_known_before_the_system_is_chosen_by_the_checkpoint(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mtl_lora_config.json").write_text('{"provenance": {"system": "nlu"}}')
    with pytest.raises(SystemExit):
        cli.main(["predict", "--checkpoint=~/own", "--system", "language"])
    assert f"{tmp_path}/own belongs to the system nlu" in capsys.readouterr().err


@pytest.mark.parametrize(("word", "value"), [([], True), (["none"], None), (["False"], False)])
def test_a_switch_that_may_be_left_to_the_checkpoint_is_true_alone(word, value):
    given = cli.parse(EvalConfig, ["--base_model", "b", "--load_in_4bit", *word, "--limit", "3"], TrainConfig.__doc__)
    assert (given.load_in_4bit, given.limit) == (value, 3)


def test_defaults_of_lists_are_not_shared_between_configurations():
    small("a", "--output=o", "--seeds", "1").seeds.append(2)
    assert small("a", "--output=o").seeds == small("a", "--output=o", "--seeds=").seeds == []


def test_defaults_of_a_door_replace_those_of_the_configuration(capsys):
    defaults = {"output": "o"}
    assert cli.parse(Small, ["a"], "About.", defaults).output == "o"
    assert cli.parse(Small, ["a", "--output=p"], "About.", defaults).output == "p"
    with pytest.raises(SystemExit):
        cli.parse(Small, ["--help"], "About.", defaults)
    assert "--output  (a string; default: o)" in capsys.readouterr().out


# ---- what is refused ----


@pytest.mark.parametrize(
    "arguments, facts",
    [
        (["a"], ["--output", "required"]),
        (["--output=o"], ["files to read", "at least one"]),
        (["a", "--files", "b"], ["--files"]),
        (["a", "--output=o", "--reuse=1", "--share_opening=0"], ["--reuse", "twice"]),
        (["a", "--output=o", "--seeds=1,b"], ["--seeds", "a list of whole numbers", "'1,b'"]),
    ],
)
def test_missing_or_repeated_argument_is_one_sentence(arguments, facts):
    with pytest.raises(UserError) as caught:
        small(*arguments)
    one_sentence(caught, *facts)


# ---- help ----


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--seed", "3", "--help"], ["--unknown", "--help"]])
def test_help_is_printed_without_work(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith(TrainConfig.__doc__) and err == ""


@pytest.mark.parametrize("config_class", [TrainConfig, EvalConfig])
def test_help_has_name_type_default_and_meaning_of_every_flag(config_class):
    lines = cli.help_text(config_class.flags(), TrainConfig.__doc__).splitlines()
    for one in config_class.flags():
        (at,) = [n for n, line in enumerate(lines) if re.match(rf"  --{one.name}\b", line)]
        assert "default: " in lines[at] and lines[at + 1].strip() == one.metadata["help"] != ""


def test_help_groups_the_flags_in_one_style_and_without_marks():
    for config_class, first, groups in ((TrainConfig, "base_model", 6), (EvalConfig, "checkpoint", 4)):
        lines = cli.help_text(config_class.flags(), TrainConfig.__doc__).splitlines()
        headings = [n for n, line in enumerate(lines) if re.fullmatch(r"\w.*:", line)][1:]
        assert len(headings) == groups and lines[headings[0] + 1].startswith(f"  --{first}")
    documented = [*REPORTS.values(), *EXPORTS.values()]
    for config_class in (TrainConfig, EvalConfig, PredictConfig, StudyConfig, *documented):
        text = cli.help_text(config_class.flags(), config_class.__doc__ if config_class in documented else "")
        assert not re.search(r"``|[\w)] = |\b[01] is ", text), config_class


@pytest.mark.parametrize("entries", [["a,b", "c"], ["a(b", "c"], ["x]", "{y"], ["\U0001f600,x", "é"], ["it's"]])
def test_a_list_comes_back_from_the_way_it_is_spelled(entries):
    assert parse("--lora_target_modules", cli.spelled(entries)).lora_target_modules == entries


@pytest.mark.parametrize("name", [one.name for one in TrainConfig.flags()])
def test_default_as_help_spells_it_can_be_passed(name):
    text = cli.help_text(TrainConfig.flags(), TrainConfig.__doc__)
    shown = text.split(f"  --{name}")[1].split("default: ")[1].split(")\n")[0]
    assert parse(f"--{name}={shown}") == TrainConfig()


# ---- commands ----


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_command_lists_its_commands(arguments, capsys):
    cli.main(arguments)
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)


def test_a_system_without_its_flag_is_told_the_flag(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "nlu"])
    assert "--system nlu" in capsys.readouterr().err


def test_a_flag_of_another_system_is_left_out_where_the_checkpoint_decides():
    for flags, way_out in ((["--mode=score"], "pass --system"), (["--checkpoint=x", "--mode=score"], "leave the flag")):
        with pytest.raises(UserError) as caught:
            cli.evaluate(["--system=nlu", *flags])
        one_sentence(caught, "--mode", "--system language", way_out)


def test_help_leaves_out_the_flags_that_a_system_refuses(capsys):
    with pytest.raises(SystemExit):
        cli.main(["predict", "--system", "dense", "--help"])
    out = capsys.readouterr().out
    assert "--input " in out and "--task " not in out and "--cutoff_len " not in out


def test_the_command_says_its_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"mtl-lora {__version__}\n"


@pytest.mark.parametrize("given", [None, "0.5"])
def test_a_progress_bar_in_a_log_file_is_written_every_ten_seconds_unless_told_otherwise(monkeypatch, given):
    monkeypatch.setenv("TQDM_MININTERVAL", given or "")  # restored after the test, whatever the command sets
    if given is None:
        monkeypatch.delenv("TQDM_MININTERVAL")
    with contextlib.suppress(SystemExit):
        cli.main(["report", "--help"])
    assert os.environ["TQDM_MININTERVAL"] == (given or "10")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_help(name, capsys):
    with contextlib.suppress(SystemExit):
        cli.main([name, "--help"])
    out, err = capsys.readouterr()
    assert "--" in out and err == ""


def test_missing_package_names_the_extra_that_brings_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mtl_lora.language.prepare.textclass", None)
    with pytest.raises(ModuleNotFoundError):  # a module of the package itself is a fault of the program
        cli.main(["prepare", "textclass"])
    monkeypatch.setattr(cli, "prepare", lambda arguments: importlib.import_module("no_such_package.part"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["prepare", "textclass"])
    err = capsys.readouterr().err
    assert stopped.value.code == EXIT_CODE and "no_such_package" in err and "'.[data]'" in err


# ---- the doors ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, code, facts, unwanted",
    [
        # the flags of a training are those of the methods, which are layers
        (["finetune.py", "--learning_rates", "8"], EXIT_CODE, ["--learning_rates"], {"transformers", "datasets"}),
        (["commonsense_evaluate.py", "--help"], 0, [], {"torch"}),
        (["-m", "mtl_lora", "evaluate", "--limit", "-1", "--base_model", "b"], EXIT_CODE, ["limit", "-1"], {"torch"}),
    ],
    ids=["unknown flag", "help", "wrong value"],
)
def test_a_door_answers_at_once(arguments, code, facts, unwanted):
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == code and unwanted & loaded == set()
    assert len(said) == bool(code) and all(fact in said[0] for fact in facts)
    assert bool(done.stdout) is (code == 0)
