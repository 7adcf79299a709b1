"""The open image-text tasks, of small made-up repositories in the layouts of their sources, and of the real ones."""

import io
import json
import os
import re
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from shared import PROJECT, git_blob

from mtl_lora import cli
from mtl_lora.files import sha256_of
from mtl_lora.image_text.examples import load_examples
from mtl_lora.image_text.prepare import MANIFEST as MANIFEST_FILE
from mtl_lora.image_text.prepare import TASKS_FILE
from mtl_lora.image_text.tasks import TaskSet

MANIFEST = json.loads(MANIFEST_FILE.read_text())
TASKS = json.loads(TASKS_FILE.read_text())["tasks"]
COUNT = 20  # training pictures of easy-VQA
# split -> (identifier, sentence, label)
NLVR = {
    "hidden": [("1-0", "One  box.", "true"), ("1-1", "One  box.", "false"), ("2-0", "in TEST", "true")]
    + [(f"{number}-0", f"Sentence {number}.", "false") for number in range(3, 22)],
    "dev": [("1-0", "Of dev", "true"), ("2-0", "In test?", "true")],
    "test": [("7-0", "In test.", "true"), ("7-1", "In test.", "false")],
}
# name -> (split, captions)
FLICKR = {
    "1_a": ("train", ["A  dog .", "Dogs"]),
    "2_b": ("val", ["A cat", "Cats ."]),
    "3_c": ("test", ["A man", "a man"]),
    "4_gone": ("train", ["No picture"]),
}


def raw_files() -> dict[str, bytes]:
    """Path below a source -> content; every picture has another color."""
    files, pixels = {}, iter(range(1, 10**6))

    def picture() -> bytes:
        number, content = next(pixels), io.BytesIO()
        Image.new("RGB", (2, 2), (number % 256, number // 256, 7)).save(content, "png")
        return content.getvalue()

    for part, count in (("train", COUNT), ("test", 2)):
        questions = []
        for number in range(count):
            files[f"easy_vqa/data/{part}/images/{number}.png"] = picture()
            questions += [["what color?", "teal", number], ["is it a box?", "no", number], ["what?", "circle", number]]
        files[f"easy_vqa/data/{part}/questions.json"] = json.dumps(questions).encode()
    for part, statements in NLVR.items():
        lines = []
        for identifier, sentence, label in statements:
            for order in range(3):
                files[f"nlvr/nlvr/{part}/images/0/{part}-{identifier}-{order}.png"] = picture()
            lines.append(json.dumps({"sentence": sentence, "identifier": identifier, "label": label}))
        files[f"nlvr/nlvr/{part}/{part}.json"] = "\n".join([*lines, ""]).encode()
    for name in list(FLICKR)[:3]:
        files[f"flickr8k/data/images/{name}.jpg"] = picture()
    entries = [
        {"filename": f"{name}.jpg", "split": split, "sentences": [{"raw": raw} for raw in captions]}
        for name, (split, captions) in FLICKR.items()
    ]
    files["flickr8k/dataset_flickr8k.zip"] = zipped({"images": entries, "dataset": "flickr8k"})
    return files


def zipped(value: object) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as opened:
        opened.writestr("dataset_flickr8k.json", json.dumps(value))
    return content.getvalue()


def expect(world) -> None:
    """Have the manifest expect what the source holds now."""
    manifest = json.loads(json.dumps(MANIFEST))
    for task in manifest.values():
        for folder in task["folders"]:
            root = world.source / folder["root"]
            paths = sorted({path.relative_to(root).as_posix() for each in folder["paths"] for path in root.glob(each)})
            lines = "".join(f"{git_blob((root / path).read_bytes())} {path}\n" for path in paths)
            folder |= {
                "count": len(paths),
                "sha256": sha256_of(lines.encode()),
                "commit": world.commits.get(folder["repository"], "0" * 40),
            }
    world.manifest.write_text(json.dumps(manifest))


@pytest.fixture
def world(tmp_path):
    """Raw files of three tasks, a manifest that knows them, and where to write."""
    source = tmp_path / "source"
    for name, content in raw_files().items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    output, manifest = tmp_path / "out", tmp_path / "manifest.json"
    flags = {"--manifest": manifest, "--output_dir": output, "--tasks": "easy_vqa,nlvr,flickr8k"}
    world = SimpleNamespace(
        set=["image_text"], folder=tmp_path, source=source, output=output, manifest=manifest, flags=flags, commits={}
    )
    expect(world)
    return world


def written(folder: Path) -> dict[str, dict[str, list[dict]]]:
    """The examples that were written, by task and split; every one can be read, and every image is there."""
    tasks = TaskSet.load(folder / "tasks.json")
    read = load_examples(folder / "train.json", tasks)
    train = json.loads((folder / "train.json").read_text())
    assert [example.task_id for example in read] == sorted(example.task_id for example in read)
    sets = {name: {"train": [each for each in train if each["task"] == name]} for name in tasks.names}
    for name in tasks.names:
        for part in ("dev", "test"):
            path = folder / part / name / "test.json"
            read += load_examples(path, tasks, closed=True)
            sets[name][part] = json.loads(path.read_text())
    used = {image for example in read for image in example.images}
    assert {path.stem for path in (folder / "images").iterdir()} == used
    return sets


def test_files_become_examples_and_images_with_ids_of_their_own(run, world):
    assert "known set has" in run()
    sets = written(world.output)
    assert json.loads((world.output / "tasks.json").read_text())["tasks"] == TASKS
    easy = sets["easy_vqa"]
    dev = {example["image"] for example in easy["dev"]}
    assert len(dev) == COUNT // 10 and not dev & {example["image"] for example in easy["train"]}
    assert [len(easy[part]) for part in ("train", "dev", "test")] == [3 * (COUNT - 2), 6, 6]
    record = {"task": "easy_vqa", "image": "easy_vqa_test_1", "text": "what color?", "answer": "teal", "kind": "color"}
    assert easy["test"][3] == record and {each["kind"] for each in easy["train"]} == {"color", "shape", "yes_no"}
    copied = (world.output / "images" / "easy_vqa_test_1.png").read_bytes()
    assert copied == (world.source / "easy_vqa" / "data" / "test" / "images" / "1.png").read_bytes()

    nlvr = sets["nlvr"]
    record = {"task": "nlvr", "image": "test-7-1-0", "text": "In test.", "answer": "false", "group": "test-7"}
    assert nlvr["test"][1] == record and len(nlvr["test"]) == 2
    assert len(nlvr["dev"]) == 2  # a tenth of 21 sentences
    sentences = [{example["text"] for example in nlvr[part]} for part in ("train", "dev")]
    assert not sentences[0] & sentences[1]
    # Without those of the test set, in other capitals and stops; each with both orders.
    assert sentences[0] | sentences[1] == {"One box.", "Of dev", *(f"Sentence {number}." for number in range(3, 22))}
    assert {example["image"][-2:] for example in nlvr["dev"]} == {"-0"}
    assert len(nlvr["train"]) == 2 * (22 - len(nlvr["dev"]))

    assert sets["flickr8k"] == {
        "train": [{"task": "flickr8k", "image": "1_a", "answer": caption} for caption in ("A dog .", "Dogs")],
        "dev": [{"task": "flickr8k", "image": "2_b", "answers": ["A cat", "Cats ."]}],
        "test": [{"task": "flickr8k", "image": "3_c", "answers": ["A man", "a man"]}],
    }


def test_limit_takes_images_with_all_their_examples_and_replaces_the_folder(run, world):
    run()
    whole = written(world.output)
    run("--limit", 4, "--tasks", "nlvr,easy_vqa")
    sets = written(world.output)
    assert list(sets) == ["easy_vqa", "nlvr"]
    images = [example["image"] for example in sets["easy_vqa"]["train"]]
    assert len(images) == 12 and len(set(images)) == 4
    assert sets["easy_vqa"]["test"] == whole["easy_vqa"]["test"] and len(sets["nlvr"]["train"]) == 4


def test_pictures_of_ones_own_in_the_folder_stay(run, world, capsys):
    run()
    own = world.output / "images" / "holiday.jpg"
    own.write_bytes(b"a picture")
    with pytest.raises(SystemExit):
        run()
    assert "holiday.jpg, which this command did not write" in capsys.readouterr().err and own.is_file()


def test_kinds_are_those_of_easy_vqa(run, world):
    run()
    whole = written(world.output)
    run("--kinds", "color,shape", "--tasks", "nlvr,easy_vqa")
    sets = written(world.output)
    for part, examples in whole["easy_vqa"].items():
        assert sets["easy_vqa"][part] == [each for each in examples if each["kind"] != "yes_no"]
    assert sets["nlvr"] == whole["nlvr"] and any(each["kind"] == "yes_no" for each in whole["easy_vqa"]["train"])


def commit(folder: Path) -> str:
    """The id of a new repository's commit of all that the folder holds."""
    (folder / "large.bin").write_bytes(b"not asked for")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    leave_out = ["config", "uploadpack.allowFilter", "true"]  # as GitHub can
    for command in (["init", "-q"], leave_out, ["add", "."], ["commit", "-qm", "data"]):
        subprocess.run([*git, *command], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.slow
def test_folders_are_fetched_by_git_once_and_mended(run, world, capsys, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    hub, downloads = world.folder / "hub", world.folder / "downloads"
    for repository, root, part in (
        ("vzhou842/easy-VQA", "", "easy_vqa"),
        ("lil-lab/nlvr", "nlvr", "nlvr"),
        ("quantumnaan/sic_translator", "flickr8k", "data"),
        ("bhuvana0901/Image-Captioning-and-Segmentation-ZD", "flickr8k", "dataset_flickr8k.zip"),
    ):
        (hub / repository).mkdir(parents=True)
        (world.source / root / part).rename(hub / repository / part)
        world.commits[repository] = commit(hub / repository)
    manifest = json.loads(world.manifest.read_text())
    for task in manifest.values():
        for folder in task["folders"]:
            folder["commit"] = world.commits[folder["repository"]]
    world.manifest.write_text(json.dumps(manifest))
    flags = ("--base_url", f"file://{hub}", "--download_dir", downloads)
    run(*flags, source=False)
    names = {path.name for path in downloads.rglob("*") if path.is_file()}
    assert "large.bin" not in names and "test-7-1-1.png" in names and "test-7-1-2.png" not in names
    assert {path.name for path in downloads.iterdir()} == {"easy_vqa", "nlvr", "flickr8k"}
    written(world.output)
    hub.rename(world.folder / "away")
    run(*flags, source=False)  # all is there
    (downloads / "nlvr" / "nlvr" / "dev" / "dev.json").write_text("other")
    (world.folder / "away").rename(hub)
    run(*flags, source=False)
    assert "Of dev" in (downloads / "nlvr" / "nlvr" / "dev" / "dev.json").read_text()
    written(world.output)
    run(*flags[2:], "--base_url", "file:///nowhere", source=False)
    next((downloads / "flickr8k").rglob("*.jpg")).unlink()
    with pytest.raises(SystemExit):
        run(*flags[2:], "--base_url", "file:///nowhere", source=False)
    error = capsys.readouterr().err
    assert "file:///nowhere/quantumnaan/sic_translator cannot be fetched (git fetch: " in error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("easy_vqa/data/test/questions.json", [["a", "b"]], "questions.json, question 0 must be [text, answer"),
        (
            "nlvr/nlvr/dev/dev.json",
            {"sentence": "A", "identifier": "1-0", "label": "yes"},
            "line 1 must have a sentence",
        ),
        ("nlvr/nlvr/dev/dev.json", {"sentence": "A", "identifier": "9-0", "label": "true"}, "dev-9-0-0.png is missing"),
        ("flickr8k/dataset_flickr8k.zip", {"images": [{"filename": "a.jpg", "split": "train"}]}, "image 0 must have"),
        (
            "flickr8k/dataset_flickr8k.zip",
            {"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": " "}]}]},
            "image 0 must",
        ),
    ],
)
def test_malformed_file_is_one_sentence(refused, world, name, content, message):
    path = world.source / name
    path.write_bytes(zipped(content) if path.suffix == ".zip" else json.dumps(content).encode())
    expect(world)
    sentence = refused()
    assert str(path) in sentence and message in sentence


def test_unknown_kind_is_refused(refused):
    assert "--kinds" in (sentence := refused("--kinds", "colour")) and "'color'" in sentence


def test_source_with_other_files_is_refused(refused, world):
    path = world.source / "nlvr" / "nlvr" / "test" / "test.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"true", b"TRUE"))
    assert "nlvr is not lil-lab/nlvr" in refused() and "other bytes" in refused()
    path.unlink()
    assert "files match" in refused()
    path.write_bytes(content)
    assert "is not a folder" in refused("--source", world.folder / "none", source=False)
    assert "did you mean 'nlvr'" in refused("--tasks", "nlvr2")
    world.manifest.write_text("{}")
    assert "must be laid out as" in refused()


def test_manifest_and_readme_agree():
    table = (PROJECT / "data" / "image_text" / "README.md").read_text()
    for name, entry in MANIFEST.items():
        row = next(line for line in table.splitlines() if line.startswith(f"| {name} "))
        assert [cell.strip() for cell in row.split("|")[3:6]] == [f"{count:,}" for count in entry["records"].values()]
        for folder in entry["folders"]:
            assert folder["repository"] in row and f"`{folder['commit'][:12]}`" in row


@pytest.mark.slow(10)
def test_real_files_give_the_known_examples(tmp_path, capsys):
    folder = os.environ.get("COMMONSENSE_DATA")
    names = [name for name in MANIFEST if folder and Path(folder, name).is_dir()]
    if not names:
        pytest.skip("COMMONSENSE_DATA is not set to a folder with easy_vqa/data, nlvr/nlvr or flickr8k/data")
    cli.main(["prepare", "image_text", "--source", folder, "--tasks", ",".join(names), "--output_dir", str(tmp_path)])
    assert "known set" not in capsys.readouterr().out
    sets = written(tmp_path)
    if "nlvr" in names:
        tested = {re.sub(r"\W", "", example["text"]).lower() for example in sets["nlvr"]["test"]}
        assert len(tested) == 245
        for part in ("train", "dev"):
            assert not tested & {re.sub(r"\W", "", example["text"]).lower() for example in sets["nlvr"][part]}
    if "easy_vqa" in names:
        assert len({example["answer"] for example in sets["easy_vqa"]["train"]}) == 13
