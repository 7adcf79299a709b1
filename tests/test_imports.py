"""Imports run one way, heavy packages are loaded where they are used, and nothing loads or runs what others pickled."""

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest
from shared import PROJECT

PACKAGE = PROJECT / "src" / "mtl_lora"
MODULES = sorted(PACKAGE.rglob("*.py"))
CODE = [*MODULES, *(path for folder in ("data", "benchmark") for path in (PROJECT / folder).rglob("*.py"))]
CODE += PROJECT.glob("*.py")

GROUND = {
    "analysis",
    "answer_config",
    "artifacts",
    "config",
    "data_files",
    "data_sets",
    "download",
    "embedded",
    "errors",
    "estimates",
    "files",
    "images",
    "memory",
    "metrics",
    "predictions",
    "results",
    "samples",
    "systems",
    "tasks",
    "text_table",
    "tokens",
    "train_log",
    "version",
}
DOORS = {"cli", "__main__"}  # they name the commands, and import one when it is called
SURFACE = {"mtl_lora", "route"}
BELOW_SYSTEMS = GROUND | SURFACE | {"adapter", "base_model"}
SYSTEMS = {"dense", "language", "nlu", "image_text"}
# Part of the package -> the other parts that it may import; "mtl_lora" is the package's public surface.
ALLOWED = {
    **dict.fromkeys(GROUND, GROUND),
    "__main__": GROUND | DOORS,
    "cli": GROUND | DOORS | {"training", "report"},
    **dict.fromkeys(SURFACE, GROUND | {"adapter", "base_model"}),
    "adapter": GROUND | {"base_model", "cli"},
    "base_model": GROUND | {"adapter"},
    "training": BELOW_SYSTEMS,
    "evaluation": BELOW_SYSTEMS,
    **{system: BELOW_SYSTEMS | DOORS | {"training", "evaluation"} for system in SYSTEMS},
    "export": BELOW_SYSTEMS | DOORS | SYSTEMS,
    "report": GROUND | DOORS,
    "study": GROUND | DOORS | {"report", "base_model"},  # the last, which loads torch, where a plan counts parameters
}
# Packages from elsewhere that a part may import; a part that is not named may import any.
PACKAGES = {
    **{part: set() for part in GROUND | DOORS},
    "download": {"pooch", "requests"},
    "embedded": {"torch", "transformers", "safetensors"},
    "data_files": {"pyarrow"},
    "estimates": {"numpy", "scipy"},
    "images": {"PIL"},
    "metrics": {"numpy"},
    "text_table": {"pandas", "jinja2"},
    "adapter": {"torch", "safetensors", "deepspeed"},  # the last only to gather weights that ZeRO-3 has partitioned
    "report": {"pandas", "scipy", "matplotlib", "numpy", "jinja2", "markupsafe", "PIL"},
    "study": set(),
}
LAZY = {"deepspeed", "wandb", "bitsandbytes", "matplotlib", "jinja2", "tensorboard", "peft", "pooch", "h5py"}
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def parsed(path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(tree: ast.AST) -> Iterator[str]:
    """The dotted names that are imported anywhere below ``tree``; of ``from a import b`` it is ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are written in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def runs_on_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """The import statements outside functions and ``if TYPE_CHECKING``."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, ast.FunctionDef) and not (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            waiting += ast.iter_child_nodes(node)


def part_of(name: str) -> str:
    """The part of the package that a dotted name belongs to; a name of the public surface belongs to ``mtl_lora``."""
    first = [*name.split("."), "mtl_lora"][1]
    exists = (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file()
    return first if exists and first != "__init__" else "mtl_lora"


def named(path) -> str:
    return path.relative_to(PROJECT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_imports_run_one_way_and_heavy_packages_are_imported_where_they_are_used(path):
    tree, first = parsed(path), path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    part = part_of(f"mtl_lora.{first}")
    names = set(imports_of(tree))
    own = {name for name in names if name.split(".")[0] == "mtl_lora"}
    assert {name for name in own if part_of(name) not in ALLOWED[part] | {part}} == set()
    foreign = {name.split(".")[0] for name in names - own} - sys.stdlib_module_names
    assert foreign <= PACKAGES.get(part, foreign)
    assert {name.split(".")[0] for node in runs_on_import(tree) for name in imports_of(node)} & LAZY == set()


@pytest.mark.parametrize("path", CODE, ids=named)
def test_nothing_reads_pickles_or_runs_code_of_model_repositories_unasked(path):
    tree = parsed(path)
    assert {name.split(".")[0] for name in imports_of(tree)} & PICKLES == set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            assert ast.unparse(node.func) != "torch.load" or given.get("weights_only") is True, f"line {node.lineno}"
            assert given.get("trust_remote_code") is not True and given.get("allow_pickle") is not True
        elif isinstance(node, ast.arguments):
            named = zip([*node.args, *node.kwonlyargs][::-1], [*node.defaults, *node.kw_defaults][::-1], strict=False)
            assert all(a.arg != "trust_remote_code" or getattr(d, "value", None) is not True for a, d in named)


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        (
            "import mtl_lora, mtl_lora.cli, mtl_lora.language.config, mtl_lora.nlu.config",
            {"torch", "numpy", "safetensors", "transformers"},
        ),
        ("import mtl_lora.study.runner, mtl_lora.report.__main__", {"torch", "transformers", "datasets", "pandas"}),
    ],
    ids=["command line", "report and study"],
)
def test_import_brings_no_more_than_it_needs(statement, unwanted):
    code = f"{statement}\nimport sys; print(*[name for name in {sorted(unwanted)!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == ("", "")
