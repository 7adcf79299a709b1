"""An output folder is there whole or not at all, and what this command did not write is never deleted."""

import os
from pathlib import Path

import pytest

from mtl_lora.errors import UserError
from mtl_lora.export.folders import whole_folder

NAMES = ("a.json", "b*.bin")


def write(output, text: str = "new", **options) -> None:
    """An output of two files."""
    with whole_folder(output, NAMES, **{"overwrite": False, **options}) as folder:
        (folder / "a.json").write_text(text)
        (folder / "b1.bin").write_text(text)


def contents(folder) -> dict[str, str]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_folder_appears_at_the_end_and_nothing_stays_beside_it(tmp_path):
    with whole_folder(tmp_path / "new" / "out", NAMES, False) as folder:
        (folder / "a.json").write_text("text")
        assert not (tmp_path / "new" / "out").exists()
    assert contents(tmp_path) == {"new/out/a.json": "text"}
    assert os.listdir(tmp_path / "new") == ["out"]


def test_folder_and_files_get_the_usual_permissions(tmp_path):
    with whole_folder(tmp_path / "out", NAMES, False) as folder:
        (folder / "part").mkdir()
        for path in (folder / "a.json", folder / "part" / "b.bin"):
            path.touch(mode=0o600)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        usual = tmp_path / ("folder" if path.is_dir() else "file")
        assert path.stat().st_mode == usual.stat().st_mode, path


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert contents(tmp_path) == {"out/a.json": "new", "out/b1.bin": "new"}


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), UserError("bad"), KeyboardInterrupt()])
@pytest.mark.parametrize("earlier", [False, True])
def test_failure_leaves_what_was_there(tmp_path, failure, earlier):
    if earlier:
        write(tmp_path / "out", "old")
    before = contents(tmp_path)
    with pytest.raises(BaseException) as caught, whole_folder(tmp_path / "out", NAMES, True) as folder:
        (folder / "a.json").write_text("half")
        raise failure
    if isinstance(failure, OSError):
        assert isinstance(caught.value, UserError)
        assert "cannot be written ([Errno 28] No space left on device)" in str(caught.value)
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == (["out"] if earlier else [])


def test_failure_at_the_last_moment_brings_the_old_folder_back(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    replace = Path.replace

    def fail(self, target):
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == {"out/a.json": "old", "out/b1.bin": "old"}
    assert os.listdir(tmp_path) == ["out"]


def test_earlier_output_is_replaced_whole_when_told_to(tmp_path):
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "b2.bin").write_text("of an earlier output alone")
    with pytest.raises(UserError, match="out is not empty; pass --overwrite to replace it, or another --output"):
        write(tmp_path / "out")
    write(tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == {"out/a.json": "new", "out/b1.bin": "new"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("foreign", ["thesis.tex", "checkpoint-100/a.json", "b/a.json"])
def test_what_the_command_did_not_write_is_not_deleted(tmp_path, foreign):
    write(tmp_path / "out", "old")
    path = tmp_path / "out" / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text("dear")
    with pytest.raises(UserError, match=f"holds {foreign.split('/')[0]}, which this command did not write"):
        write(tmp_path / "out", overwrite=True)
    assert path.read_text() == "dear"


def test_nested_output_is_known_by_the_files_in_its_folders(tmp_path):
    for part in ("one", "two"):
        write(tmp_path / "out" / part, "old")
    with whole_folder(tmp_path / "out", NAMES, True, nested=True) as folder:
        (folder / "three").mkdir()
        (folder / "three" / "a.json").write_text("new")
    assert contents(tmp_path) == {"out/three/a.json": "new"}
    (tmp_path / "out" / "notes").write_text("dear")
    with pytest.raises(UserError, match="holds notes, which"), whole_folder(tmp_path / "out", NAMES, True, nested=True):
        pass


@pytest.mark.parametrize("read", ["out", "out/one"])
def test_what_is_read_is_not_replaced(tmp_path, read):
    write(tmp_path / "out" / "one", "old")
    with (
        pytest.raises(UserError, match="holds what is read"),
        whole_folder(tmp_path / "out", NAMES, True, [tmp_path / read], nested=True),
    ):
        pass


def test_file_in_the_place_of_the_folder_is_one_sentence(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out is a file; name a folder"):
        write(tmp_path / "out")
    with pytest.raises(UserError, match=r"out/in cannot be written \(.*\); choose a writable folder"):
        write(tmp_path / "out" / "in")
