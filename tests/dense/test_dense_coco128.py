import json

import numpy as np
import pytest
from PIL import Image

from mtl_lora import files
from mtl_lora.cli import main
from mtl_lora.dense.coco128 import MANIFEST, maps
from mtl_lora.dense.data import DenseDataset
from mtl_lora.dense.tasks import shipped
from mtl_lora.download import git_blob_sha1

CATEGORIES = [
    {"id": 1, "name": "person", "supercategory": "person", "isthing": 1},
    {"id": 2, "name": "bicycle", "supercategory": "vehicle", "isthing": 1},
    {"id": 187, "name": "sky-other-merged", "supercategory": "sky", "isthing": 0},
]
GROUPS = {name: index for index, name in enumerate(shipped("coco128")["supercategory"].labels)}
# Panoptic ids: two people side by side, a bicycle whose id takes three bytes, the sky, and a pixel of nothing.
IDS = np.array([[7, 7, 8, 8], [7, 7, 8, 0], [70_000, 70_000, 300, 300]])
SEGMENTS = {7: 1, 8: 1, 70_000: 2, 300: 187}


def codes() -> np.ndarray:
    return np.stack([IDS % 256, IDS // 256 % 256, IDS // 65536], axis=-1).astype(np.uint8)


def test_maps_are_those_of_the_panoptic_ids():
    categories = {each["id"]: each for each in CATEGORIES}
    found = maps(codes(), {id: categories[number] for id, number in SEGMENTS.items()}, GROUPS)
    person, vehicle, sky = (GROUPS[name] for name in ("person", "vehicle", "sky"))
    assert found["supercategory"].tolist() == [[person] * 4, [person] * 3 + [255], [vehicle] * 2 + [sky] * 2]
    assert found["person"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 255], [0, 0, 0, 0]]
    assert found["thing"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 255], [1, 1, 0, 0]]
    assert found["boundary"].tolist() == [[0, 1, 0, 1], [1, 1, 1, 255], [0, 1, 0, 0]]


@pytest.fixture
def source(tmp_path):
    """A folder in the repository's layout, of one image a part, and its manifest."""
    root = tmp_path / "source" / "coco"
    for part, id in (("train2017", "000000000009"), ("val2017", "000000000139")):
        labels = root / "panoptic_segmentation" / "annotations"
        (labels / f"panoptic_{part}").mkdir(parents=True)
        (root / "images" / part).mkdir(parents=True)
        segments = [{"id": id, "category_id": number} for id, number in SEGMENTS.items()]
        value = {"categories": CATEGORIES, "annotations": [{"file_name": f"{id}.png", "segments_info": segments}]}
        (labels / f"panoptic_{part}.json").write_text(json.dumps(value))
        Image.fromarray(codes()).save(labels / f"panoptic_{part}" / f"{id}.png")
        Image.fromarray(np.full((3, 4, 3), 90, np.uint8)).save(root / "images" / part / f"{id}.jpg")
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.*"))
    lines = "".join(f"{git_blob_sha1(root / path)} {path}\n" for path in paths)
    manifest = json.loads(MANIFEST.read_text()) | {"paths": paths, "count": len(paths)}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"sha256": files.sha256_of(lines.encode())}))
    return tmp_path


def test_prepared_folder_is_a_data_set(source, capsys):
    command = ["prepare", "coco128", "--source", str(source / "source"), "--output_dir", str(source / "out")]
    command += ["--manifest", str(source / "manifest.json")]
    main(command)
    data = DenseDataset(source / "out", "test", size=12)
    assert data.ids == ["000000000139"] and data.tasks.names == ["supercategory", "person", "thing", "boundary"]
    assert data[0]["labels"]["person"][1::4, 1::3].tolist() == [[1, 1, 1, 1], [1, 1, 1, 255], [0, 0, 0, 0]]
    (source / "source/coco/images/val2017/000000000139.jpg").write_bytes(b"other")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*command, "--overwrite"])
    assert "other bytes" in capsys.readouterr().err and len(DenseDataset(source / "out", "test", size=12)) == 1


def test_manifest_names_the_images_that_have_labels():
    manifest = json.loads(MANIFEST.read_text())
    images = [path for path in manifest["paths"] if path.startswith("images/")]
    assert len(images) == 200 and manifest["count"] == 200 + 200 + 2
