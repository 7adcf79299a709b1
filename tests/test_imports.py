"""Imports run one way, heavy packages are loaded where they are used, and nothing loads or runs what others pickled."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mtl_lora

PROJECT = Path(__file__).resolve().parent.parent
PACKAGE = PROJECT / "src" / "mtl_lora"
MODULES = sorted(PACKAGE.rglob("*.py"))
CODE = [*MODULES, *PROJECT.glob("*.py"), *(PROJECT / "data").rglob("*.py"), *(PROJECT / "benchmark").rglob("*.py")]

# Part of the package -> parts it may import. "mtl_lora" itself is the door to the adapters for those above them.
GROUND = {"errors", "files", "version"}
TEXT = {"tasks", "config", "prompts", "data"}
EVERYTHING_BELOW = {"mtl_lora", "adapter", "model", "memory", "export", *TEXT}
ALLOWED = {
    "errors": set(),
    "version": set(),
    "files": {"errors"},
    "mtl_lora": {"version"},
    "tasks": GROUND,
    "config": GROUND,
    "download": GROUND,
    "memory": set(),
    "smollm2": GROUND,
    "prompts": GROUND | {"tasks", "config"},
    "cli": GROUND | {"config"},
    "data": GROUND | TEXT,
    "adapter": GROUND | {"config"},
    "model": GROUND | {"config", "smollm2"},
    "export": GROUND | {"adapter", "config", "model", "tasks", "prompts", "mtl_lora"},
    "report": {"errors", "files", "tasks"},
    "train": GROUND | EVERYTHING_BELOW,
    "evaluate": GROUND | EVERYTHING_BELOW,
    # Of data, train and evaluate only what needs no model: see NEEDS_NO_MODEL.
    "study": GROUND | {"cli", "config", "tasks", "data", "report", "train", "evaluate"},
}
# What a study, which starts the two scripts as a user does, may know of the parts behind them.
NEEDS_NO_MODEL = {"data": "mtl_lora.language.examples", "train": "mtl_lora.language.config"}
NEEDS_NO_MODEL["evaluate"] = ("mtl_lora.language.config", "mtl_lora.language.output")
# Part of the package -> packages from elsewhere it may import; parts that are not named may import any.
PACKAGES = {
    **{part: set() for part in ("errors", "version", "files", "memory", "mtl_lora", "tasks", "config", "prompts")},
    "adapter": {"torch", "safetensors", "deepspeed"},  # the last only to gather weights that ZeRO-3 has spread
    "cli": {"fire"},
    "report": {"matplotlib", "numpy", "jinja2", "markupsafe"},
    "study": set(),
}
ONLY_WHEN_ASKED_FOR = {"deepspeed", "wandb", "bitsandbytes", "matplotlib", "jinja2", "tensorboard", "peft"}
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """The dotted names a module imports anywhere in it; of ``from a import b`` both ``a`` and ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are written in full"
            if node.module != "mtl_lora":
                yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(name: str) -> str:
    """The part of the package a dotted name of it belongs to; a lazy name of the package belongs to its home."""
    _, _, rest = name.partition(".")
    first = rest.split(".")[0]
    if not (PACKAGE / first).is_dir() and not (PACKAGE / f"{first}.py").is_file():
        return part_of(mtl_lora._HOMES[first]) if first in mtl_lora._HOMES else "mtl_lora"
    return first or "mtl_lora"


def part_of_file(path: Path) -> str:
    """The part of the package a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "mtl_lora" if first == "__init__" else first


def wrong_directions(part: str, tree: ast.AST) -> list[str]:
    """The names of the package that a module of ``part`` imports against the rule."""
    own = [name for name in imports_of(tree) if name.split(".")[0] == "mtl_lora"]
    return [name for name in own if part_of(name) not in ALLOWED[part] | {part}]


def models_in_a_study(tree: ast.AST) -> list[str]:
    """The names that a module of ``study`` imports of parts which work with models, but for what needs none."""
    own = [name for name in imports_of(tree) if name.split(".")[0] == "mtl_lora"]
    return [name for name in own if not name.startswith(NEEDS_NO_MODEL.get(part_of(name), "mtl_lora"))]


def foreign_packages(part: str, tree: ast.AST) -> set[str]:
    """The packages from elsewhere that a module of ``part`` imports against the rule."""
    names = {name.split(".")[0] for name in imports_of(tree)} - {"mtl_lora"} - sys.stdlib_module_names
    return names - PACKAGES.get(part, names)


def eager_imports(tree: ast.Module) -> set[str]:
    """Packages for which someone has to ask, imported by merely importing the module."""
    delayed = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    # What stands under TYPE_CHECKING is for reading alone and never runs.
    delayed += [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    inner = {id(node) for function in delayed for node in ast.walk(function)}
    outside = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) and id(n) not in inner]
    return {name.split(".")[0] for node in outside for name in imports_of(node)} & ONLY_WHEN_ASKED_FOR


def unsafe_lines(tree: ast.AST) -> list[int]:
    """Lines that read pickles, or that run a model repository's code without being told to."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += [node.lineno for name in imports_of(node) if name.split(".")[0] in PICKLES]
        if isinstance(node, ast.Call):
            constants = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            name = ast.unparse(node.func)
            torchs = name == "torch.load" or (name == "load" and "torch.load" in imports_of(tree))
            if torchs and constants.get("weights_only") is not True:
                found.append(node.lineno)
            if constants.get("trust_remote_code") is True or constants.get("allow_pickle") is True:
                found.append(node.lineno)
        if isinstance(node, ast.arguments):
            named = [*zip(node.args[::-1], node.defaults[::-1], strict=False)]
            named += [*zip(node.kwonlyargs, node.kw_defaults, strict=True)]
            for argument, default in named:
                if argument.arg == "trust_remote_code" and getattr(default, "value", None) is True:
                    found.append(argument.lineno)
    return found


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def named(path: Path) -> str:
    """A file by its place in the project."""
    return path.relative_to(PROJECT).as_posix()


# ---- the project ----


def test_every_part_of_the_package_has_its_place_in_the_order():
    assert {part_of_file(path) for path in MODULES} <= set(ALLOWED)


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_imports_run_one_way(path):
    part = part_of_file(path)
    assert wrong_directions(part, parsed(path)) == []
    assert foreign_packages(part, parsed(path)) == set()


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_packages_someone_must_ask_for_are_imported_where_they_are_used(path):
    assert eager_imports(parsed(path)) == set()


@pytest.mark.parametrize("path", CODE, ids=named)
def test_nothing_reads_pickles_or_runs_code_of_model_repositories_unasked(path):
    assert unsafe_lines(parsed(path)) == []


@pytest.mark.parametrize("path", sorted(PROJECT.glob("*.py")), ids=named)
def test_scripts_use_the_package_alone(path):
    foreign = {name.split(".")[0] for name in imports_of(parsed(path))} - {"mtl_lora"}
    assert foreign <= sys.stdlib_module_names


def test_train_and_evaluate_never_import_each_other():
    assert "evaluate" not in ALLOWED["train"] and "train" not in ALLOWED["evaluate"]


@pytest.mark.parametrize("path", sorted((PACKAGE / "study").glob("*.py")), ids=named)
def test_a_study_knows_settings_and_records_but_no_model(path):
    assert models_in_a_study(parsed(path)) == []


def test_the_order_of_parts_has_no_circle():
    placed: set[str] = set()
    while len(placed) < len(ALLOWED):
        ready = {part for part, below in ALLOWED.items() if part not in placed and below - {part} <= placed}
        assert ready, f"these import each other: {sorted(set(ALLOWED) - placed)}"
        placed |= ready


# ---- what is loaded when ----

LOADED = [
    # (statement, packages that must not come with it)
    ("import mtl_lora", {"torch", "numpy", "safetensors", "transformers"}),
    (
        "import mtl_lora.cli, mtl_lora.language.tasks, mtl_lora.language.prompts, mtl_lora.language.config",
        {"torch", "transformers"},
    ),
    ("import mtl_lora.report.__main__", {"torch", "numpy", "transformers", "matplotlib", "jinja2"}),
    ("import mtl_lora.study.__main__", {"torch", "numpy", "transformers", "datasets"}),
    (
        "import mtl_lora; mtl_lora.inject, mtl_lora.load, mtl_lora.save, mtl_lora.route, mtl_lora.merge",
        {"transformers", "datasets", "accelerate", "fire", "peft"},
    ),
]


@pytest.mark.parametrize("statement, unwanted", LOADED, ids=["package", "command line", "report", "study", "adapters"])
def test_import_brings_no_more_than_it_needs(statement, unwanted):
    code = f"{statement}\nimport sys; print(*[name for name in {sorted(unwanted)!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == ("", "")


# ---- the rules themselves can fail ----


@pytest.mark.parametrize(
    "part, line",
    [
        ("train", "from mtl_lora.language.evaluate import run"),
        ("evaluate", "import mtl_lora.training.trainer"),
        ("report", "from mtl_lora import model"),
        ("report", "from mtl_lora import route"),
        ("adapter", "from mtl_lora.language.tasks import COMMONSENSE"),
        ("adapter", "def f():\n    from mtl_lora import prompts"),
        ("data", "import mtl_lora"),
        ("tasks", "from mtl_lora.config import closest"),
        ("errors", "from mtl_lora import files"),
        ("train", "from mtl_lora.study.grid import Grid"),
        ("study", "from mtl_lora import model"),
    ],
)
def test_import_against_the_order_is_found(part, line):
    assert wrong_directions(part, ast.parse(line))


@pytest.mark.parametrize("line", ["from mtl_lora.language.train import run", "import mtl_lora.language.token_cache"])
def test_model_in_a_study_is_found(line):
    assert models_in_a_study(ast.parse(line))


@pytest.mark.parametrize(
    "part, line", [("adapter", "import transformers"), ("tasks", "def f():\n    import numpy.linalg")]
)
def test_package_against_the_rule_is_found(part, line):
    assert foreign_packages(part, ast.parse(line))


def test_eager_import_is_found_and_a_delayed_one_is_not():
    assert eager_imports(ast.parse("try:\n    import deepspeed.zero\nexcept ImportError:\n    pass")) == {"deepspeed"}
    assert eager_imports(ast.parse("class A:\n    def f(self):\n        import deepspeed")) == set()
    assert eager_imports(ast.parse("if TYPE_CHECKING:\n    import matplotlib")) == set()
    assert eager_imports(ast.parse("if True:\n    import matplotlib")) == {"matplotlib"}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=chosen)",
        "from torch import load\nload(path)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "def f(name, trust_remote_code=True): pass",
        "def f(*, trust_remote_code=True): pass",
    ],
)
def test_unsafe_line_is_found(line):
    assert unsafe_lines(ast.parse(line))


@pytest.mark.parametrize(
    "line",
    ["torch.load(path, weights_only=True)", "f(trust_remote_code=config.trust_remote_code)", "json.load(opened)"],
)
def test_safe_line_is_left_alone(line):
    assert not unsafe_lines(ast.parse(line))
