"""Prepare photographs with four label maps: the 100 + 100 images of COCO128 that have panoptic labels.

    mtl-lora prepare coco128                     fetch them from GitHub with git, about 50 MB
    mtl-lora prepare coco128 --source DIR        use DIR/coco, which must have the same bytes

Writes a folder of images/, supercategory/, person/, thing/, boundary/, train.txt, test.txt and tasks.json: the
--data_path of training and --data_dir of evaluation; train2017 is train, val2017 is test. All four maps come from
COCO's panoptic labels (CC BY 4.0; the photographs have the licences of their owners on Flickr: fetch your own copy, do
not redistribute them):

    supercategory    of COCO's 133 categories, 27 groups
    person           other, person
    thing            stuff, thing: what can be counted
    boundary         pixels whose right or lower neighbour has another panoptic id

A pixel without a panoptic segment has no label in any map. With 100 training images the set shows how methods differ
when there are few images; its results are not comparable with COCO's leaderboards.
"""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from mtl_lora.config import Config, flag
from mtl_lora.data_sets import existing
from mtl_lora.dense.layouts import changes, read_png
from mtl_lora.dense.tasks import IGNORE, shipped
from mtl_lora.download import RemoteFolder
from mtl_lora.errors import UserError
from mtl_lora.files import atomic_directory, read_object

MANIFEST, TASKS_FILE = (Path(__file__).with_name(f"coco128{end}.json") for end in ("", "_tasks"))
SPLITS = {"train": "train2017", "test": "val2017"}


@dataclasses.dataclass
class Prepare(Config):
    """Where the files come from, and where the data set goes."""

    source: str | None = flag(None, "folder with coco/images and coco/panoptic_segmentation; none: download")
    output_dir: str = flag("data/coco128/prepared", "folder for the images and label maps", place=True)
    download_dir: str = flag("data/coco128/source", "folder where downloads are kept", place=True)
    base_url: str = flag("https://github.com", "base URL of the repository")
    manifest: str = flag(str(MANIFEST), "JSON file with commit, paths and hash of the repository's files")
    overwrite: bool = flag(False, "replace the output of an earlier command")


def run(config: Prepare) -> None:
    """Verify the source, then write the complete output folder or nothing; raises ``UserError``."""
    folder = RemoteFolder.from_json(read_object(config.manifest, "the manifest"), f"the manifest {config.manifest}")
    source = existing(config.source) if config.source else Path(config.download_dir)
    folder.check(source) if config.source else folder.fetch(source, config.base_url)
    counts, tasks = {}, shipped("coco128")
    groups = {name: index for index, name in enumerate(tasks["supercategory"].labels)}
    output = config.output_dir, ["*.png", "*.jpg", "*.txt", "tasks.json"], config.overwrite, [source], True
    with atomic_directory(*output) as made:
        for name in ("images", *tasks.names):
            (made / name).mkdir()
        for split, part in SPLITS.items():
            ids = write_split(source / folder.root, part, made, groups)
            (made / f"{split}.txt").write_text("".join(f"{id}\n" for id in ids))
            counts[split] = len(ids)
        shutil.copyfile(TASKS_FILE, made / "tasks.json")
    print(f"{counts['train']} training and {counts['test']} test images in {config.output_dir}")


def write_split(root: Path, part: str, made: Path, groups: dict[str, int]) -> list[str]:
    """Write the images and maps of a part of COCO, and return their ids. groups: the index of each super-category."""
    annotations = root / "panoptic_segmentation" / "annotations"
    path = annotations / f"panoptic_{part}.json"
    value, ids = read_object(path, "the annotations"), []
    try:
        categories = {each["id"]: each for each in value["categories"]}
        for entry in value["annotations"]:
            id = Path(entry["file_name"]).stem
            codes = read_png(annotations / f"panoptic_{part}" / entry["file_name"], 3)
            found = maps(
                codes, {each["id"]: categories[each["category_id"]] for each in entry["segments_info"]}, groups
            )
            for name, labels in found.items():
                Image.fromarray(labels).save(made / name / f"{id}.png")
            shutil.copyfile(root / "images" / part / f"{id}.jpg", made / "images" / f"{id}.jpg")
            ids.append(id)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not laid out as COCO's panoptic annotations; missing or wrong: {error}") from None
    return sorted(ids)


def maps(codes: np.ndarray, segments: dict[int, dict], groups: dict[str, int]) -> dict[str, np.ndarray]:
    """Return the four maps (H, W) of an image by name.

    codes: (H, W, 3), the panoptic id as red + 256 green + 65,536 blue. segments: the category of each panoptic id, with
    ``id``, ``isthing`` and ``supercategory``. groups: the index of each super-category.
    """
    panoptic = codes.astype(np.int64) @ np.array([1, 256, 65536])
    ids, place = np.unique(panoptic, return_inverse=True)
    place = place.reshape(panoptic.shape)
    found = {}
    rows = {
        "supercategory": lambda category: groups[category["supercategory"]],
        "person": lambda category: int(category["id"] == 1),
        "thing": lambda category: category["isthing"],
    }
    for name, label in rows.items():
        found[name] = np.array([label(segments[i]) if i else IGNORE for i in ids.tolist()], np.uint8)[place]
    return found | {"boundary": np.where(panoptic == 0, IGNORE, changes(panoptic)).astype(np.uint8)}
