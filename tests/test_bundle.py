"""The bundle for a machine without network: what it carries, how its parts arrive, and what is there afterwards."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pip
import pytest
from shared import PROJECT

import mtl_lora
from mtl_lora.cli import parse

loaded = importlib.util.spec_from_file_location("bundle", PROJECT / "script" / "bundle.py")
bundle = importlib.util.module_from_spec(loaded)
sys.modules["bundle"] = bundle  # where a dataclass looks for the types of its fields
loaded.loader.exec_module(bundle)

COMMIT = "0123abc+changes"
LAUNCHER = "from mtl_lora.version import __version__\ndef main():\n    print('mtl-lora', __version__)\n"


def wheel(folder: Path, name: str, version: str, requires: tuple = (), modules: dict | None = None) -> Path:
    """A pure Python wheel; modules: the source of each, by name."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    information = f"{name}-{version}.dist-info"
    metadata = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
    with zipfile.ZipFile(path, "w") as made:
        for module, content in (modules or {}).items():
            made.writestr(f"{name}/{module}.py", content)
        made.writestr(f"{information}/METADATA", "\n".join(["Metadata-Version: 2.1", *metadata, ""]))
        made.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        made.writestr(f"{information}/entry_points.txt", "[console_scripts]\nmtl-lora = mtl_lora.launcher:main\n")
        made.writestr(f"{information}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A bundle in four parts whose project is its version and nothing else."""
    folder = tmp_path_factory.mktemp("bundling")
    stage, out = folder / "stage", folder / "out"
    for made in ("wheels", "model", "project"):
        (stage / made).mkdir(parents=True)
    out.mkdir()
    version = (PROJECT / "src" / "mtl_lora" / "version.py").read_text()
    modules = {"__init__": "", "launcher": LAUNCHER, "version": version}
    wheel(stage / "wheels", "mtl_lora", "0.2.0", modules=modules)
    shutil.make_archive(str(folder / "pip"), "zip", Path(pip.__file__).parents[1], "pip")
    (folder / "pip.zip").rename(stage / "pip.whl")
    (stage / "BUNDLE_COMMIT").write_text(f"{COMMIT}\n")
    (stage / "image.txt").write_text("torch>=2.4\nno-such-package>=1\n")
    (stage / "project" / "train.json").write_text("[]")
    archive = bundle.pack(stage, folder / bundle.ARCHIVE)
    parts = bundle.split(archive, out, archive.stat().st_size // 4 + 1)
    assert [name for name, _ in parts] == ["part-01", "part-02", "part-03", "part-04"]
    return out


def unbundle(source: Path, into: Path) -> subprocess.CompletedProcess:
    """The script in an almost empty environment, under the interpreter of the tests."""
    command = ["bash", PROJECT / "script" / "unbundle.sh", source, into]
    clean = {"PATH": os.environ["PATH"], "PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, env=clean)


@pytest.fixture
def sent(small, tmp_path) -> Path:
    """A folder where all parts have arrived."""
    return Path(shutil.copytree(small, tmp_path / "sent"))


def installed(into: Path) -> bool:
    return (into / "UNPACKED").exists()


@pytest.mark.slow(1)
def test_parts_are_at_most_the_size_and_join_to_the_archive_of_the_sums(small, tmp_path):
    lines = [line.split() for line in (small / "SHA256SUMS").read_text().splitlines()]
    joined = tmp_path / bundle.ARCHIVE
    joined.write_bytes(b"".join((small / name).read_bytes() for _, name in lines[:-1]))
    largest = joined.stat().st_size // 4 + 1
    assert all((small / name).stat().st_size <= largest for _, name in lines[:-1])
    for total, name in lines:
        assert bundle.sha256(joined if name == bundle.ARCHIVE else small / name) == total


def test_the_same_content_gives_the_same_bytes(tmp_path):
    def packed(name: str) -> bytes:
        (tmp_path / name / "project").mkdir(parents=True)
        (tmp_path / name / "project" / "a.txt").write_text("a")
        os.utime(tmp_path / name / "project" / "a.txt", (len(name), len(name)))
        return bundle.pack(tmp_path / name, tmp_path / f"{name}.tar").read_bytes()

    assert packed("one") == packed("three")


@pytest.mark.slow
def test_parts_that_arrive_one_by_one_are_kept_and_the_last_one_installs(small, tmp_path):
    into = tmp_path / "a node" / "here"
    for arrived, missing in (
        ("part-03", "SHA256SUMS"),
        ("SHA256SUMS", "part-01 part-02 part-04"),
        ("part-01", "part-02 part-04"),
        ("part-04", "part-02"),
    ):
        folder = tmp_path / arrived
        folder.mkdir()
        shutil.copy(small / arrived, folder)
        found = unbundle(folder, into)
        assert found.returncode == 3 and f"missing: {missing}" in found.stdout and not installed(into)
    folder = tmp_path / "last"
    folder.mkdir()
    shutil.copy(small / "part-02", folder)
    found = unbundle(folder, into)
    assert found.returncode == 0, found.stderr
    assert "mtl-lora 0.2.0" in found.stdout and found.stdout.endswith((into / "environment.sh").read_text())
    assert "counts on no-such-package>=1 in the image, which lacks it" in found.stderr and "torch" not in found.stderr

    ask = "from mtl_lora.version import checkout_commit; print(checkout_commit())"
    lines = f'. {str(into / "environment.sh")!r}; mtl-lora; ls train.json; "$0" -c "{ask}"'
    clean = {"PATH": os.environ["PATH"]}
    shell = subprocess.run(["bash", "-ec", lines, sys.executable], capture_output=True, text=True, env=clean)
    assert shell.stdout.splitlines() == ["mtl-lora 0.2.0", "train.json", COMMIT], shell.stderr
    again = unbundle(folder, into)
    assert again.returncode == 0 and again.stdout == (into / "environment.sh").read_text()


@pytest.mark.slow
def test_interrupted_call_can_be_repeated(sent, tmp_path):
    into = tmp_path / "into"
    for left in (".unpacking/site", "site/mtl_lora", "parts"):
        (into / left).mkdir(parents=True)
    (into / "site" / "half.py").write_text("")
    (into / "parts" / "part-01.partial").write_text("half")
    found = unbundle(sent, into)
    assert found.returncode == 0, found.stderr
    assert installed(into) and not (into / "site" / "half.py").exists() and not (into / ".unpacking").exists()


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"x" + content[1:]])
def test_corrupt_part_is_named_and_others_are_kept(small, sent, tmp_path, damage):
    part, into = sent / "part-02", tmp_path / "into"
    part.write_bytes(damage(part.read_bytes()))
    found = unbundle(sent, into)
    assert found.returncode == 2 and "part-02" in found.stderr and len(found.stderr.splitlines()) == 1
    kept = {path.name for path in (into / "parts").iterdir()}
    assert kept == {"SHA256SUMS", "part-01", "part-03", "part-04"} and not installed(into)


def test_part_that_came_corrupt_before_the_sums_is_named_and_replaced(small, tmp_path):
    first, into = tmp_path / "first", tmp_path / "into"
    first.mkdir()
    (first / "part-01").write_bytes(b"other bytes")
    assert unbundle(first, into).returncode == 3
    shutil.copy(small / "SHA256SUMS", first)
    (first / "part-01").unlink()
    found = unbundle(first, into)
    assert found.returncode == 2 and "part-01" in found.stderr
    shutil.copy(small / "part-01", first)
    found = unbundle(first, into)
    assert found.returncode == 3 and "missing: part-02 part-03 part-04" in found.stdout


def cut_sums(sent: Path, into: Path) -> None:
    (sent / "SHA256SUMS").write_text("\n".join((sent / "SHA256SUMS").read_text().splitlines()[:-1]))


def own_project(sent: Path, into: Path) -> None:
    (into / "project").mkdir(parents=True)


def other_bundle(sent: Path, into: Path) -> None:
    into.mkdir()
    (into / "UNPACKED").write_text("0" * 64)


@pytest.mark.parametrize(
    ("arrange", "sentence"),
    [
        (cut_sums, "SHA256SUMS is cut off or was changed"),
        (own_project, "project already exists and is not replaced"),
        (other_bundle, "holds another bundle"),
    ],
)
def test_what_cannot_be_unpacked_is_one_sentence(sent, tmp_path, arrange, sentence):
    arrange(sent, tmp_path / "into")
    found = unbundle(sent, tmp_path / "into")
    assert found.returncode == 2 and sentence in found.stderr and len(found.stderr.splitlines()) == 1


# ---- what is carried ----


@pytest.fixture
def index(tmp_path):
    """Fetch from wheels made here: the newest version that fits, by name and version what it requires."""
    published = {
        ("tool", "1.0"): ("helper>=1", "torch>=2", "old-python; python_version < '3.12'", "fast; extra == 'speed'"),
        ("helper", "1.0"): (),
        ("helper", "2.0"): (),
        ("fast", "1.0"): ("tool",),
        ("strict", "1.0"): ("helper<2",),
    }

    def fetch(wanted: str) -> Path:
        requirement = bundle.Requirement(wanted)
        fitting = [key for key in published if key[0] == requirement.name and key[1] in requirement.specifier]
        return wheel(tmp_path, *max(fitting), published[max(fitting)])

    return fetch


def test_wheels_are_what_the_image_lacks_for_its_python(index, tmp_path):
    have = {"python": bundle.Version("3.12"), "torch": bundle.Version("2.11")}
    wheels, relied_on = bundle.resolve(["tool[speed]", "strict", "torch>=2.4"], have, {}, index)
    assert sorted(path.name.split("-py3")[0] for path in wheels) == ["fast-1.0", "helper-1.0", "strict-1.0", "tool-1.0"]
    assert not (tmp_path / "helper-2.0-py3-none-any.whl").exists(), "a version that a later requirement excludes"
    assert relied_on == ["torch>=2,>=2.4"]
    pinned = {"helper": bundle.SpecifierSet("==1.0")}
    assert [path.name.split("-py3")[0] for path in bundle.resolve(["helper"], have, pinned, index)[0]] == ["helper-1.0"]


def test_image_with_a_version_that_does_not_fit_is_refused(index):
    have = {"python": bundle.Version("3.12"), "torch": bundle.Version("1.13")}
    with pytest.raises(mtl_lora.UserError, match=r"the image has torch 1\.13 but tool needs torch>=2"):
        bundle.resolve(["tool"], have, {}, index)


def test_stock_image_names_its_python_and_meets_what_the_project_asks_of_it():
    have = bundle.read_have(str(PROJECT / "script" / "stock_image.txt"))
    assert str(have["python"]) == "3.12" and {"torch", "transformers", "huggingface-hub"} <= set(have)
    lacking = {"datasets", "fire", "gguf", "deepspeed", "pooch", "dill", "multiprocess", "termcolor", "wandb", "trl"}
    assert not lacking & set(have)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [("torch\n", "must name the Python"), ("python==3.12\ntorch>=2\n", "line 2: 'torch>=2' must be name or name==")],
)
def test_list_of_the_image_that_cannot_be_read_is_one_sentence(tmp_path, lines, sentence):
    (tmp_path / "have.txt").write_text(lines)
    with pytest.raises(mtl_lora.UserError, match=sentence):
        bundle.read_have(str(tmp_path / "have.txt"))


@pytest.mark.parametrize(
    "arguments",
    [[], ["a", "b"], ["a", "--only", "x"], ["a", "--part_mb", "0"], ["a", "--allow_partial"], ["a", "--models", "x"]],
)
def test_flags_that_do_not_fit_are_refused(arguments):
    with pytest.raises(mtl_lora.UserError):
        parse(bundle.Bundle, arguments, "")


def test_source_that_only_one_python_builds_is_refused(monkeypatch, tmp_path):
    def no_wheel(*arguments):
        if arguments[0] == "download":
            raise mtl_lora.UserError("pip download compiled failed")
        folder = Path(arguments[arguments.index("--wheel-dir") + 1])
        (folder / "compiled-1.0-cp311-cp311-linux_x86_64.whl").write_text("")

    monkeypatch.setattr(bundle, "pip", no_wheel)
    with pytest.raises(mtl_lora.UserError, match=r"compiled has no wheel for Python 3\.12 and is not pure Python"):
        bundle.fetch("compiled", bundle.Version("3.12"), tmp_path)


@pytest.mark.slow(30)
def test_real_bundle_installs_the_project_and_its_packages(monkeypatch, tmp_path):
    def no_models(folder: Path, models: list) -> list:  # they are 90 MB to fetch
        folder.mkdir()
        return models

    monkeypatch.setattr(bundle, "carry_models", no_models)
    names = [name for name in bundle.read_have(str(PROJECT / "script" / "stock_image.txt")) if name != "python"]
    python = "python==" + ".".join(map(str, sys.version_info[:2]))
    (tmp_path / "have.txt").write_text("\n".join([python, *names]))
    bundle.run(bundle.Bundle(out=[str(tmp_path / "out")], have=str(tmp_path / "have.txt"), part_mb=2))
    into = tmp_path / "into"
    found = unbundle(tmp_path / "out", into)
    assert found.returncode == 0 and "warning" not in found.stderr, found.stderr
    assert {"datasets", "dill", "fire", "gguf", "mtl_lora"} <= {path.name for path in (into / "site").iterdir()}
    assert not (into / "site" / "torch").exists() and (into / "project" / "script" / "quickstart.sh").is_file()
    assert (into / "BUNDLE_COMMIT").read_text().strip() == mtl_lora.version.checkout_commit()


def test_the_commit_is_of_this_checkout_whatever_repository_the_environment_names(tmp_path, monkeypatch):
    commit = mtl_lora.version.checkout_commit()
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert mtl_lora.version.checkout_commit() == commit
