"""Features by image id, of one file and of a folder in the original's layout, and what is refused in their place."""

import pickle

import h5py
import numpy as np
import pytest
import torch

import mtl_lora
from mtl_lora.image_text.features import FeatureStore


def write(path, images: dict[str, np.ndarray]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as opened:
        for image, features in images.items():
            opened.create_dataset(f"{image}/features", data=features)
    return path


def random(seed: int, cells: int = 9, dim: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((cells, dim))


@pytest.fixture
def both(tmp_path):
    """One file with two images and a folder with a third, in other float types."""
    file = write(tmp_path / "ours.h5", {"b.1": random(0).astype("float32"), "a": random(1)})
    write(tmp_path / "folder" / "train-3-img0.h5", {"train-3-img0": random(2).astype("float16")})
    return [file, tmp_path / "folder"]


def test_images_of_files_and_folders_are_one_store(both):
    store = FeatureStore(both)
    assert set(store) == {"a", "b.1", "train-3-img0"} and len(store) == 3
    assert (store.grid, store.dim) == (3, 5)
    for image, seed, dtype in (("b.1", 0, "float32"), ("a", 1, "float64"), ("train-3-img0", 2, "float16")):
        expected = torch.from_numpy(random(seed).astype(dtype)).float()
        assert store[image].dtype == torch.float32 and torch.equal(store[image], expected)
    store.check(["a", "train-3-img0", "a"])
    again = pickle.loads(pickle.dumps(store))  # noqa: S301 - as a worker process gets it
    assert torch.equal(again["a"], store["a"]) and again.fingerprint == store.fingerprint


def test_fingerprint_is_of_ids_and_features_not_of_files(both, tmp_path):
    first = FeatureStore(both).fingerprint
    moved = write(tmp_path / "moved.h5", {"a": random(1), "b.1": random(0)})
    assert FeatureStore([both[1], moved]).fingerprint == first
    other = write(tmp_path / "other.h5", {"a": random(1), "b.1": random(3)})
    assert FeatureStore([both[1], other]).fingerprint != first
    assert FeatureStore([moved]).fingerprint != first
    renamed = write(tmp_path / "renamed.h5", {"a": random(1), "b.2": random(0)})
    assert FeatureStore([both[1], renamed]).fingerprint != first


def test_check_names_all_that_is_wrong_at_once(tmp_path):
    images = {"a": random(0), "grid": random(0, 8), "deep": random(0, 9, 6), "four": random(0, 4)}
    store = FeatureStore([write(tmp_path / "f.h5", images)])
    with pytest.raises(mtl_lora.UserError) as caught:
        store.check(["a", "gone", "grid", "deep", "four"])
    sentence = str(caught.value)
    for words in ("'gone' has none", "'grid' in", "(8, 5)", "'deep' are (9, 6)", "(4, 5)", "(9, 5)"):
        assert words in sentence
    assert "the features of 4 of 5 images" in sentence and "'a' in" not in sentence
    with pytest.raises(mtl_lora.UserError, match="1,000 in all"):
        store.check(map(str, range(1000)))
    with pytest.raises(mtl_lora.UserError, match="no features of the image 'gone'"):
        store["gone"]
    with pytest.raises(mtl_lora.UserError, match=r"'grid' in .*\(8, 5\)"):
        store["grid"]


def test_files_that_are_no_features_are_refused(both, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.h5").write_bytes(both[0].read_bytes()[:700])
    whole = both[0].read_bytes()
    name = whole.index(b"SNOD")  # a damage in the table of groups
    (tmp_path / "damaged.h5").write_bytes(whole[:name] + b"\xff" * 40 + whole[name + 40 :])
    bad = random(0)
    bad[3, 2] = np.inf
    with h5py.File(tmp_path / "odd.h5", "w") as opened:
        opened["array"], opened["words/features"], opened["nan/features"] = random(0), "text", bad
        opened.create_group("bare")
    for paths, message in (
        ([tmp_path / "empty"], "holds no features"),
        ([], "holds no features"),
        ([tmp_path / "none.h5"], "no such file"),
        ([tmp_path / "broken.h5"], "broken.h5 cannot be read"),
        ([tmp_path / "damaged.h5"], "damaged.h5 cannot be read"),
        ([*both, both[0]], "'a' is in .*ours.h5 and .*ours.h5"),
    ):
        with pytest.raises(mtl_lora.UserError, match=message):
            FeatureStore(paths)
    store = FeatureStore([tmp_path / "odd.h5"])
    for image in ("array", "words", "bare"):
        with pytest.raises(mtl_lora.UserError, match=f"'{image}' in .*odd.h5 cannot be read"):
            store[image]
    with pytest.raises(mtl_lora.UserError, match=r"'nan' in .*odd.h5 are not all finite"):
        store["nan"]
