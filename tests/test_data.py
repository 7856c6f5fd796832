import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ddpm_hf.data import (
    check_levels,
    image_column,
    image_transform,
    load_images,
    pixels_to_tensor,
    random_flip,
    tensor_to_pixels,
    training_set,
)


@pytest.fixture
def folder(tmp_path):
    random = np.random.RandomState(0)
    for i in range(4):
        Image.fromarray(random.randint(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("levels", [2, 17, 256, 1000])
def test_pixels_there_and_back(levels):
    pixels = torch.arange(levels)
    x = pixels_to_tensor(pixels, levels)
    assert x[0] == -1 and x[-1] == 1 and x.dtype == torch.float32
    torch.testing.assert_close(x, 2 * pixels / (levels - 1) - 1)
    assert torch.equal(tensor_to_pixels(x, levels).long(), pixels)
    assert torch.equal(tensor_to_pixels(x + 0.9 / (levels - 1), levels).long(), pixels)  # nearest, and clamped
    with pytest.raises(ValueError, match=f"levels={levels - 1}"):
        pixels_to_tensor(pixels, levels - 1)


def test_digits_are_the_real_ones():
    parts = [load_images("digits", split) for split in ("train", "test")]
    assert [len(part) for part in parts] == [1437, 360]
    found = np.stack([np.asarray(image) for part in parts for image in part["image"]])
    expected = load_digits().images.astype(np.uint8)
    assert sorted(map(bytes, found)) == sorted(map(bytes, expected))
    labels = {image.tobytes(): label for image, label in zip(expected, load_digits().target)}
    for row in parts[1]:
        assert labels[np.asarray(row["image"]).tobytes()] == row["label"]
    with pytest.raises(ValueError, match="split='validation'"):
        load_images("digits", "validation")


def test_mnist_is_padded():
    data = load_images("mnist", "test")
    image = np.asarray(data[0]["image"])
    assert len(data) == 1000 and image.shape == (32, 32) and image[2:-2, 2:-2].max() > 200
    assert not image[:2].any() and not image[:, -2:].any()


def test_training_items():
    data = training_set(load_images("digits"), image_transform((8, 8), 1, 17), label_column="label")
    batch = next(iter(torch.utils.data.DataLoader(data, 5)))
    assert batch["x_start"].shape == (5, 1, 8, 8) and batch["x_start"].dtype == torch.float32
    assert batch["class_labels"].dtype == torch.int64
    raw = load_images("digits")[:5]
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in raw["image"]])
    assert torch.equal(tensor_to_pixels(batch["x_start"], 17)[:, 0], pixels)
    assert batch["class_labels"].tolist() == raw["label"]


def test_image_folder_is_scaled_and_cut(folder):
    data = load_images(str(folder))
    x = image_transform((16, 8), 3)(data[0]["image"])
    assert x.shape == (3, 16, 8) and x.min() >= -1 and x.max() <= 1
    same = image_transform((20, 30), 3)(data[0]["image"])
    assert torch.equal(tensor_to_pixels(same).permute(1, 2, 0), torch.from_numpy(np.array(data[0]["image"])))
    assert image_transform((20, 30), 1)(data[0]["image"]).shape == (1, 20, 30)


def test_sixteen_bits_are_scaled_not_cut():
    ramp = np.linspace(0, 65535, 16).reshape(4, 4).astype(np.uint16)
    x = image_transform((4, 4), 1)(Image.fromarray(ramp))
    assert torch.equal(tensor_to_pixels(x)[0], torch.from_numpy((ramp >> 8).astype(np.uint8)))
    with pytest.raises(ValueError, match="32 bits"):
        image_transform((4, 4), 1)(Image.fromarray(ramp.astype(np.float32)))


def test_local_parquet(folder, tmp_path):
    rows = {"picture": [str(folder / f"{i}.png") for i in range(4)], "kind": [0, 1, 0, 1]}
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("int64")})
    path = tmp_path / "parquet" / "rows.parquet"
    path.parent.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    for source in (str(path), str(path.parent)):
        data = load_images(source)
        assert image_column(data) == "picture" and len(data) == 4
    assert len(load_images(str(path), "train[:3]")) == 3
    with pytest.raises(ValueError, match="image_column='image'"):
        image_column(data, "image")
    with pytest.raises(ValueError, match="image_column='kind' holds"):
        image_column(data, "kind")
    with pytest.raises(ValueError, match="label_column='label'"):
        training_set(data, image_transform((8, 8)), label_column="label")
    with pytest.raises(ValueError, match="image_column is needed"):
        image_column(data.remove_columns("picture"))


def test_flips_every_other_image():
    images = torch.rand(400, 1, 3, 4)
    found = random_flip(images)
    flipped = (found == images.flip(-1)).flatten(1).all(1)
    assert 140 < flipped.sum() < 260 and torch.equal(found[~flipped], images[~flipped])


def test_wrong_levels_are_told():
    with pytest.raises(ValueError, match="pixel of 200"):
        image_transform((2, 2), 1, levels=17)(Image.new("L", (2, 2), 200))


def test_sixteen_bits_kept(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 65536, (8, 6)).astype(np.uint16)
    image = Image.fromarray(pixels)
    assert image.mode == "I;16"
    x = image_transform((8, 6), 1, levels=65536)(image)
    assert np.array_equal(tensor_to_pixels(x, 65536)[0].numpy(), pixels)
    for size, channels, other in (((8, 8), 1, image), ((8, 6), 3, image), ((8, 6), 1, image.convert("L"))):
        with pytest.raises(ValueError, match="levels=65536 takes 16-bit grey images"):
            image_transform(size, channels, 65536)(other)


def test_levels_of_the_built_in_data():
    check_levels("digits", 17)
    check_levels("my/images", 17)
    for source, levels in (("digits", 256), ("mnist", 17)):
        with pytest.raises(ValueError, match=f"levels={levels}, but the data set {source!r} has"):
            check_levels(source, levels)
    with pytest.raises(ValueError, match="channels=2"):
        image_transform((8, 8), 2)
