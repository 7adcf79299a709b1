"""``mtl-lora features``: what is written, resumed and refused, with tiny random vision models of several families."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import mtl_lora
from mtl_lora import cli
from mtl_lora.base_model import BaseModel
from mtl_lora.dense.layouts import read_image
from mtl_lora.errors import UserError
from mtl_lora.image_text import extract
from mtl_lora.image_text.features import FeatureStore
from mtl_lora.images import open_image

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 28, "patch_size": 14}
TEXT = {**SMALL, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
# family -> (model that is saved, the class of its images, vectors before the grid's)
FAMILIES = {
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config(**VISION), 1),
    "registers": (
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig(**VISION, num_register_tokens=4),
        5,
    ),
    "clip": (transformers.CLIPVisionModel, transformers.CLIPConfig(text_config=TEXT, vision_config=VISION), 1),
    "siglip": (transformers.SiglipVisionModel, transformers.SiglipConfig(text_config=TEXT, vision_config=VISION), 0),
    "vit": (transformers.ViTModel, transformers.ViTConfig(**VISION), 1),
    "swin": (
        transformers.SwinModel,
        transformers.SwinConfig(
            image_size=28, patch_size=7, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2
        ),
        0,
    ),
    "resnet": (
        transformers.ResNetModel,
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"),
        0,
    ),
}


def save_model(family: str, folder: Path) -> None:
    torch.manual_seed(0)
    made = FAMILIES[family][1]
    if family == "vit":  # the files of an image classifier have no pooler
        model = transformers.ViTForImageClassification(made)
    else:
        model = transformers.AutoModel.from_config(made)
    for parameter in model.parameters():  # or positions and biases would be zero
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor = {"image_processor_type": "CLIPImageProcessor", "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


@pytest.fixture(scope="session")
def vision(made_once):
    """The folder of a tiny model by family."""
    return lambda family: str(made_once(f"vision_{family}", lambda folder: save_model(family, folder)))


def picture(path: Path, seed: int, size=(40, 30), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def images(tmp_path) -> Path:
    """Five images of three formats, one of them in a subfolder, and a file that is none."""
    folder = tmp_path / "images"
    for seed, name in enumerate(("b.png", "a.JPG", "deep/c.2.png", "d.bmp", "e.png")):
        picture(folder / name, seed)
    (folder / "notes.txt").write_text("no image")
    return folder


def features(images: Path, output: Path, model: str, **flags) -> Path:
    flags = {"size": 28, "batch_size": 2, "device": "cpu", **flags}
    extract.run(extract.Extract(str(images), str(output), model, **flags))
    return output


@pytest.mark.parametrize(("family", "size"), [(family, 28) for family in FAMILIES] + [("clip", 42), ("dinov2", 42)])
def test_features_are_the_cells_of_the_models_last_hidden_state(images, vision, tmp_path, family, size):
    store = FeatureStore([features(images, tmp_path / "out.h5", vision(family), size=size)])
    assert set(store) == {"a", "b", "c.2", "d", "e"}
    own, _, before = FAMILIES[family]
    plain = own.from_pretrained(vision(family)).eval()
    prepared = transformers.CLIPImageProcessor.from_pretrained(vision(family))
    options = {"interpolate_pos_encoding": True} if (family, size) == ("clip", 42) else {}
    for image, name in (("a", "a.JPG"), ("c.2", "deep/c.2.png")):
        with Image.open(images / name) as opened:
            pixels = prepared(opened, size={"height": size, "width": size}, do_center_crop=False, return_tensors="pt")
        with torch.no_grad():
            hidden = plain(**pixels, **options).last_hidden_state[0]
        if family == "resnet":
            expected = torch.stack([hidden[:, row, column] for row in range(4) for column in range(4)])
        else:
            expected = hidden[before:]
        assert len(expected) == store.grid**2
        assert torch.allclose(store[image], expected, atol=2e-5)


@pytest.mark.parametrize(
    ("says", "factor", "offset"),
    [
        ({}, [1 / 255 / each for each in STD], [mean / each for mean, each in zip(MEAN, STD, strict=True)]),
        (
            {"do_rescale": False},
            [1 / each for each in STD],
            [mean / each for mean, each in zip(MEAN, STD, strict=True)],
        ),
        ({"do_normalize": False}, [1 / 255], [0.0]),
    ],
    ids=["both", "no rescaling", "no normalisation"],
)
def test_colours_are_scaled_as_the_models_processor_says(vision, edit_json, tmp_path, says, factor, offset):
    folder = shutil.copytree(vision("vit"), tmp_path / "model")
    edit_json(folder / "preprocessor_config.json", **says)
    grid = extract.GridFeatures(BaseModel(str(folder), kind="vision"), 28, torch.device("cpu"))
    assert grid.factor.flatten().tolist() == pytest.approx(factor)
    assert grid.offset.flatten().tolist() == pytest.approx(offset)


def test_what_a_processor_does_besides_is_refused(vision, tmp_path, monkeypatch):
    made = SimpleNamespace(do_rescale=False, do_normalize=False, do_flip_channel_order=True)
    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", lambda *arguments, **options: made)
    with pytest.raises(UserError, match="do_flip_channel_order"):
        extract.GridFeatures(BaseModel(vision("vit"), kind="vision"), 28, torch.device("cpu"))


def test_image_of_any_mode_is_read_upright(tmp_path):
    upright = Image.open(picture(tmp_path / "a.png", 0))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=turned)
    expected = extract.read_image(tmp_path / "a.png", 20)
    assert expected.shape == (3, 20, 20) and expected.dtype == torch.uint8
    assert torch.equal(extract.read_image(tmp_path / "turned.png", 20), expected)
    upright.convert("RGBA").save(tmp_path / "rgba.png")
    assert torch.equal(extract.read_image(tmp_path / "rgba.png", 20), expected)
    drawn = Image.new("RGBA", (30, 30))  # black, and all of it transparent but for a square
    drawn.paste((0, 0, 0, 255), (5, 5, 20, 20))
    drawn.save(tmp_path / "drawn.png")
    seen = extract.read_image(tmp_path / "drawn.png", 30)
    assert (seen[:, :5] == 255).all() and (seen[:, 6:19, 6:19] == 0).all()
    upright.convert("L").save(tmp_path / "grey.png")
    grey = extract.read_image(tmp_path / "grey.png", 20)
    assert torch.equal(grey[0], grey[2]) and grey.float().std() > 10


@pytest.mark.slow(1)
def test_killed_command_resumes_where_it_was(images, vision, tmp_path, monkeypatch, capsys):
    model, whole, output = vision("dinov2"), tmp_path / "whole.h5", tmp_path / "out.h5"
    features(images, whole, model)
    read, seen = extract.read_image, []

    def killed_at_the_last(path: Path, size: int) -> torch.Tensor:
        seen.append(path.stem)
        if path.stem == "e":
            raise KeyboardInterrupt
        return read(path, size)

    monkeypatch.setattr(extract, "read_image", killed_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        features(images, output, model)
    partial = tmp_path / "out.h5.partial"
    assert not output.exists() and partial.exists()
    with pytest.raises(mtl_lora.UserError, match=r"out.h5.partial cannot be read"):
        FeatureStore([partial])
    with partial.open("ab") as opened:
        opened.write(b"\1" * (4 * 4 * 16 + 100))  # of a batch that was cut off: a row and a part of one
    seen.clear()
    monkeypatch.setattr(extract, "read_image", lambda path, size: seen.append(path.stem) or read(path, size))
    features(images, output, model)
    assert seen == ["e"] and not partial.exists()
    assert {name.name for name in tmp_path.iterdir()} == {"images", "whole.h5", "out.h5"}
    first, second = FeatureStore([whole]), FeatureStore([output])
    assert all(torch.equal(first[image], second[image]) for image in "abde")
    features(images, output, model)
    assert seen == ["e"] and "out.h5 already holds the features of these 5 images" in capsys.readouterr().out
    # The rest of a command with another size is not taken for this one's.
    shutil.copy(output, partial)
    with pytest.raises(mtl_lora.UserError, match=r"out.h5.partial was not written by this command"):
        features(images, output, model, overwrite=True, size=42)
    assert partial.read_bytes() == output.read_bytes()
    partial.write_text('{"size": 28, "shape": [4, 16]}\n')
    features(images, output, model, overwrite=True, size=42)
    assert len(seen) == 6 and FeatureStore([output]).grid == 3
    # Another image of the same size in bytes is another image.
    path = next(path for path in images.iterdir() if path.stem == "a")
    for ending, count in ((b"1", 11), (b"2", 16), (b"2", 16)):
        path.write_bytes(path.read_bytes().removesuffix(b"1").removesuffix(b"2") + ending)
        features(images, output, model, overwrite=True, size=42)
        assert len(seen) == count


@pytest.mark.slow(1)
def test_features_of_images_that_are_replaced_are_not_taken_for_theirs(vision, tmp_path, monkeypatch):
    for number in range(66):  # of which a fingerprint reads every second
        picture(tmp_path / "images" / f"{number:02}.png", number, size=(4, 3))

    def extracted(**flags) -> str:
        made = features(tmp_path / "images", tmp_path / "out.h5", vision("dinov2"), batch_size=66, **flags)
        return FeatureStore([made]).fingerprint

    first = extracted()
    picture(tmp_path / "images" / "01.png", 99, size=(4, 3))
    with pytest.raises(mtl_lora.UserError, match="other images"):
        extracted()
    assert extracted(overwrite=True) != first
    read = extract.read_image

    def replaced(path: Path, size: int) -> torch.Tensor:
        found = read(path, size)
        return found if path.stem != "03" else (picture(path, 98, size=(4, 3)), found)[1]

    monkeypatch.setattr(extract, "read_image", replaced)
    with pytest.raises(mtl_lora.UserError, match="replaced while they were read"):
        extracted(overwrite=True, size=42)
    monkeypatch.undo()
    assert extracted(overwrite=True, size=42) and not (tmp_path / "out.h5.partial").exists()


@pytest.fixture
def refused(images, vision, tmp_path):
    """The sentence that a command is refused with, which has left nothing: ``refused(size=5)``."""

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".partial"}

    def start(model: str = "dinov2", output: Path = tmp_path / "out.h5", folder: Path = images, **flags) -> str:
        before = contents()
        with pytest.raises(mtl_lora.UserError) as caught:
            features(folder, output, vision(model) if model in FAMILIES else model, **flags)
        assert contents() == before
        return str(caught.value)

    return start


def test_a_program_of_postscript_is_no_image_whatever_its_ending(refused, images):
    (images / "drawing.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "drawing.png is not an image" in refused()
    for read in (open_image, read_image):
        with pytest.raises(mtl_lora.UserError, match="cannot identify image file"):
            read(images / "drawing.png")


def test_images_that_cannot_be_read_are_named(refused, images, tmp_path, monkeypatch):
    assert "is not a folder" in refused(folder=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "holds no image" in refused(folder=tmp_path / "empty")
    odd = picture(images / "ok.png", 0).rename(images / os.fsdecode(b"caf\xe9.png"))
    assert "caf" in (sentence := refused()) and "the file name" in sentence
    odd.unlink()
    (images / "text.png").write_text("no image")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    for number, size in enumerate(((60, 30), (90, 90))):  # Pillow warns of the first and refuses the second
        picture(images / f"huge_{number}.png", 0, size)
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(images / "deep.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(images / "float.tif")
    sentence = refused()
    for words in (
        "text.png is not an image",
        "huge_0.png has more than 1,500",
        "huge_1.png has more",
        "deep.png has more than 8",
        "float.tif has more than 8",
    ):
        assert words in sentence
    assert "a.JPG" not in sentence
    for name in ("text.png", "huge_0.png", "huge_1.png", "deep.png", "float.tif"):
        (images / name).unlink()
    cut = (images / "a.JPG").read_bytes()[:-600]
    (images / "a.JPG").write_bytes(cut)
    assert "a.JPG is broken" in refused()
    picture(images / "other" / "b.jpg", 9)
    sentence = refused()
    assert "the id 'b'" in sentence and "b.png" in sentence and "other/b.jpg" in sentence


def test_models_and_outputs_that_do_not_fit_are_refused(refused, images, vision, tiny_base, tmp_path):
    assert "does not read images (llama)" in refused(tiny_base)
    assert "multiple of 14" in refused(size=30)
    assert "--device gpu" in refused(device="gpu")
    bare = tmp_path / "bare"
    shutil.copytree(vision("dinov2"), bare)
    (bare / "preprocessor_config.json").unlink()
    assert "bare' cannot be loaded" in refused(str(bare))
    output = features(images, tmp_path / "out.h5", vision("dinov2"))
    assert "images of 28 pixels; pass --overwrite" in refused(size=42)
    assert "another model, " + vision("dinov2") in refused("clip")
    added = picture(images / "f.png", 7)
    assert "other images" in refused()
    added.unlink()
    (images / "e.png").rename(images / "z.png")  # the same pictures in the same order
    assert "other images" in refused()
    foreign = tmp_path / "notes.h5"
    foreign.write_text("mine")
    assert "notes.h5 was not written by mtl-lora features" in refused(output=foreign, overwrite=True)
    assert "cannot be written" in refused(output=output / "below.h5")
    with pytest.raises(SystemExit) as caught:
        cli.main(["features", "--images", str(images), "--output", str(output), "--sise", "28"])
    assert caught.value.code == 2
