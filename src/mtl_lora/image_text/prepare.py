"""Build the open image-text tasks from downloaded or local pictures and questions; verify them; write the data sets.

    mtl-lora prepare image_text                                     easy-VQA and NLVR, fetched from GitHub with git
    mtl-lora prepare image_text --tasks easy_vqa,nlvr,flickr8k      also captions of photographs, for research only
    mtl-lora prepare image_text --source DIR                        use DIR/easy_vqa/data, DIR/nlvr/nlvr, DIR/flickr8k
    mtl-lora prepare image_text --limit 800                         at most 800 training images per task

Writes images/, train.json (all tasks, in order of task id), tasks.json (the --tasks_file of training),
dev/<task>/test.json and test/<task>/test.json (each a --data_dir of evaluation): lists of {"task", "image", "text",
"answer"}; captions have no "text", and in dev and test sets a list "answers". An image's id is its file name without
the extension; mtl-lora features extracts the features of images/. Paths are relative to the current folder.

NLVR is trained on its hidden and dev sets without the sentences of its test set, which is not the official protocol.
flickr8k is 991 of the 8,000 pictures. Git fetches single folders of a pinned commit and checks each file against the
commit's id; one hash per folder (see ``RemoteFolder``) then verifies a download and --source alike.
"""

import dataclasses
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Container, Hashable, Iterable
from pathlib import Path

from mtl_lora.config import Config, closest, flag
from mtl_lora.data_sets import SPLITS, Examples, Sizes, content, existing, split_off, write_sets
from mtl_lora.download import RemoteFolder
from mtl_lora.errors import UserError
from mtl_lora.files import atomic_directory, claimed, read_json, read_lines, read_object

MANIFEST, TASKS_FILE = (Path(__file__).with_name(name) for name in ("open_sets.json", "open_tasks.json"))
DEV_PART = 10  # one training image (NLVR: sentence) in 10 goes to the dev set
KINDS = ("yes_no", "color", "shape")
COLORS = {"black", "gray", "red", "blue", "green", "yellow", "teal", "brown"}
Images = dict[str, Path]  # image id -> file
Parts = dict[str, Examples]  # split -> examples


@dataclasses.dataclass
class Prepare(Config):
    """Which tasks to build, where their files come from, and where the data sets go."""

    tasks: list[str] = flag(["easy_vqa", "nlvr"], "tasks among easy_vqa, nlvr and flickr8k, as a,b; ids in that order")
    source: str | None = flag(None, "folder with easy_vqa/data, nlvr/nlvr and flickr8k; none: download")
    output_dir: str = flag("data/image_text", "folder for images/, train.json, tasks.json, dev/ and test/", place=True)
    limit: int = flag(0, "maximum training images per task, with all their examples; 0: all", min=0)
    kinds: list[str] = flag([], f"kinds of easy_vqa questions, among {', '.join(KINDS)}, as a,b; empty: all")
    download_dir: str = flag("data/image_text/source", "folder where downloads are kept", place=True)
    base_url: str = flag("https://github.com", "base URL of the repositories")
    manifest: str = flag(str(MANIFEST), "JSON file with commit, paths and hash of each repository, and set sizes")


def run(config: Prepare) -> None:
    """Read and check everything before writing anything; raises ``UserError``."""
    tasks = json.loads(TASKS_FILE.read_text())["tasks"]
    known = [task["name"] for task in tasks]
    if unknown := [name for name in config.tasks if name not in known]:
        raise UserError(f"--tasks names {unknown[0]!r}{closest(unknown[0], known)}")
    tasks = [task for task in tasks if task["name"] in (config.tasks or known)]
    if unknown := [kind for kind in config.kinds if kind not in KINDS]:
        raise UserError(f"--kinds names {unknown[0]!r}{closest(unknown[0], KINDS)}")
    folders, sizes = read_manifest(config.manifest, [task["name"] for task in tasks])
    source = existing(config.source) if config.source else Path(config.download_dir)
    for each in folders:
        each.check(source) if config.source else each.fetch(source, config.base_url)
    sets, images = {}, {}
    for task in tasks:
        name = task["name"]
        sets[name], found = READERS[name](source)
        images |= found
        if config.kinds and name == "easy_vqa":
            for part, examples in sets[name].items():
                sets[name][part] = [example for example in examples if example["kind"] in config.kinds]
            sizes[name].clear()
        if config.limit:
            sets[name]["train"] = limited(sets[name]["train"], config.limit)
            sizes[name].pop("train", None)
    used = {example["image"] for parts in sets.values() for part in parts.values() for example in part}
    output = Path(config.output_dir)
    lines = ",\n".join(f"    {json.dumps(task | {'id': number})}" for number, task in enumerate(tasks))
    with claimed(output):
        with atomic_directory(output / "images", IMAGES, overwrite=True, inputs=[source]) as target:
            for image in sorted(used):
                shutil.copyfile(images[image], target / f"{image}{images[image].suffix}")
            (output / "train.json").unlink(missing_ok=True)  # an old one must not stay beside new images after a kill
        print(write_sets(output, sets, sizes, 0, f'{{\n  "tasks": [\n{lines}\n  ]\n}}\n'.encode()))
    print(f"{len(used):,} images in {output / 'images'}")


def read_manifest(path: str, names: list[str]) -> tuple[list[RemoteFolder], Sizes]:
    """Return the folders of these tasks, and the known number of examples by task and split; raises ``UserError``."""
    value = read_object(path, "the manifest")
    try:
        entries = [entry for name in names for entry in value[name]["folders"]]
        folders = [RemoteFolder.from_json(entry, f"the manifest {path}") for entry in entries]
        return folders, {name: {part: int(value[name]["records"][part]) for part in SPLITS} for name in names}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the manifest {path} must be laid out as {MANIFEST}; missing or wrong: {error}") from None


def limited(examples: Examples, count: int) -> Examples:
    """Return the examples of ``count`` sampled images, or pairs of images, in the order of the examples."""
    images = set(split_off(list(dict.fromkeys(str(example["image"]) for example in examples)), count)[0])
    return [example for example in examples if str(example["image"]) in images]


def divided(examples: Examples, key: Callable[[dict], Hashable], most: int = sys.maxsize) -> tuple[Examples, Examples]:
    """Return (dev, train): dev has all examples of a tenth of the keys, at least one key and at most ``most``."""
    keys = list(dict.fromkeys(map(key, examples)))
    chosen = set(split_off(keys, min(most, max(len(keys) // DEV_PART, 1)))[0])
    parts = [], []
    for example in examples:
        parts[key(example) not in chosen].append(example)
    return parts


# ---- easy-VQA ----


def read_easy_vqa(folder: Path) -> tuple[Parts, Images]:
    """Return questions about drawn shapes; dev has a tenth of the training images with all their questions."""
    found, images = {}, {}
    for part in ("train", "test"):
        path = folder / "easy_vqa" / "data" / part / "questions.json"
        found[part] = []
        for index, entry in enumerate(read_json(path, "the questions")):
            if not (isinstance(entry, list) and list(map(type, entry)) == [str, str, int]):
                raise UserError(f"{path}, question {index} must be [text, answer, image number], not {entry!r:.80}")
            text, answer, number = entry
            image = f"easy_vqa_{part}_{number}"
            images[image] = path.parent / "images" / f"{number}.png"
            kind = "yes_no" if answer in ("yes", "no") else "color" if answer in COLORS else "shape"
            found[part].append({"task": "easy_vqa", "image": image, "text": text, "answer": answer, "kind": kind})
    dev, train = divided(found["train"], lambda example: example["image"])
    return {"train": train, "dev": dev, "test": found["test"]}, images


# ---- NLVR ----


def read_nlvr(folder: Path) -> tuple[Parts, Images]:
    """Return true and false statements about three boxes of shapes.

    Each statement has pictures with the boxes in several orders: two of them are training examples, dev and test sets
    have the first only. Statements with the same sentence share its number as "group", for consistency.
    """
    found, images = {}, {}
    for part in ("hidden", "dev", "test"):
        path = folder / "nlvr" / "nlvr" / part / f"{part}.json"
        found[part] = []
        files = {file.stem: file for file in (path.parent / "images").glob("*/*.png")}
        for index, line in enumerate(read_lines(path), 1):
            statement, identifier, label = _statement(line, f"{path}, line {index}")
            for order in (0, 1):
                image = f"{part}-{identifier}-{order}"
                if image not in files:
                    raise UserError(f"{path}, line {index}: its picture {image}.png is missing")
                images[image] = files[image]
                group = f"{part}-{identifier.split('-')[0]}"
                found[part].append({"task": "nlvr", "image": image, "text": statement, "answer": label, "group": group})
    tested = {content(example["text"]) for example in found["test"]}
    others = [example for example in found["hidden"] + found["dev"] if content(example["text"]) not in tested]
    dev, train = divided(others, lambda example: content(example["text"]))
    return {"train": train, "dev": first_order(dev), "test": first_order(found["test"])}, images


def _statement(line: str, where: str) -> tuple[str, str, str]:
    """Return (sentence, identifier, label) of a line of JSON; raises ``UserError``."""
    try:
        value = json.loads(line)
        text, identifier, label = (value[name] for name in ("sentence", "identifier", "label"))
        if label in ("true", "false") and re.fullmatch(r"\d+-\d+", identifier) and text.split():
            return " ".join(text.split()), identifier, label
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f'{where} must have a sentence, an identifier such as 12-0 and the label "true" or "false"')


def first_order(examples: Iterable[dict]) -> Examples:
    """Return the examples whose picture has the boxes in the first order."""
    return [example for example in examples if example["image"].endswith("-0")]


# ---- Flickr8k ----


def read_flickr8k(folder: Path) -> tuple[Parts, Images]:
    """Return captions of photographs in Karpathy's split: one example per caption in train, per picture elsewhere."""
    images = {file.stem: file for file in (folder / "flickr8k" / "data" / "images").glob("*.jpg")}
    found: Parts = {"train": [], "dev": [], "test": []}
    karpathy(folder / "flickr8k" / "dataset_flickr8k.zip", "flickr8k", found, images)
    return found, images


def karpathy(path: Path, task: str, found: Parts, images: Container[str] | None = None) -> None:
    """Add to ``found`` the captions in one of Karpathy's JSON files, or its zip, in his split, with restval in train:
    one example per caption in train, per picture elsewhere.

    images: file names without extension, the only pictures to take; None: all. Raises ``UserError`` naming a malformed
    entry.
    """
    if path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as opened:
                value = json.loads(opened.read(path.with_suffix(".json").name))
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} cannot be read ({error})") from None
    else:
        value = read_object(path, "the captions")
    if not isinstance(value.get("images"), list):
        raise UserError(f'{path} must be an object with a list "images"')
    for index, entry in enumerate(value["images"]):
        try:
            captions = [" ".join(each["raw"].split()) for each in entry["sentences"]]
            image, split = entry["filename"].rsplit(".", 1)[0], entry["split"]
            wrong = split not in ("train", "restval", "val", "test") or not all(captions) or not captions
        except (KeyError, TypeError, AttributeError):
            wrong = True
        if wrong:
            raise UserError(f"{path}, image {index} must have filename, split and sentences, each with a raw text")
        if images is not None and image not in images:
            continue
        example = {"task": task, "image": image}
        if split in ("train", "restval"):
            found["train"] += [example | {"answer": caption} for caption in captions]
        else:
            found["dev" if split == "val" else "test"].append(example | {"answers": captions})


# The file names of these sets' pictures; any other file in images/ is the user's and must not be deleted.
IMAGES = ("easy_vqa_*.png", "train-*.png", "dev-*.png", "hidden-*.png", "test-*.png", "[0-9]*_*.jpg")
READERS = {"easy_vqa": read_easy_vqa, "nlvr": read_nlvr, "flickr8k": read_flickr8k}
