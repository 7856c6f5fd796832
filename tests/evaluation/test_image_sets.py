"""Generated and real images as 8-bit pixels, read in blocks."""

import io
import tracemalloc
import zipfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.data.sources import load_images
from ddpm_hf.evaluation.image_sets import DataImages, open_images
from ddpm_hf.evaluation.images import read_tensor


def random_pixels(count, height=5, width=7, channels=3):
    shape = (count, height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def picture(pixels):
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def write_folder(folder, pixels):
    """The order of names is not that of writing, and there are sub-folders and other files."""
    for i in reversed(range(len(pixels))):
        path = folder / ("a" if i < 3 else "b") / f"{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(pixels[i]).save(path)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("no picture")


def write_parquet(path, pixels):
    rows = {"image": [picture(entry) for entry in pixels], "seed": list(range(len(pixels)))}
    features = datasets.Features({"image": datasets.Image(), "seed": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_folder_a_parquet_and_an_npz_hold_the_same_images(tmp_path, channels):
    pixels = random_pixels(11, channels=channels)
    write_folder(tmp_path / "folder", pixels)
    write_parquet(tmp_path / "x.parquet", pixels)
    np.savez(tmp_path / "x.npz", arr_0=pixels, arr_1=np.arange(11))
    np.savez_compressed(tmp_path / "small.npz", arr_1=np.arange(11), arr_0=pixels)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    for name in ("folder", "x.parquet", "x.npz", "small.npz"):
        images = open_images(tmp_path / name)
        assert (len(images), images.size, images.channels) == (11, (5, 7), channels)
        for rows in (range(11), range(2, 5), range(8, 11), range(1, 3), slice(4, None), range(0, 11, 4)):
            found = images.read(rows)
            assert found.dtype == torch.uint8 and torch.equal(found, expected[rows.start : rows.stop : rows.step]), name
        assert images.read(range(3, 3)).shape == (0, channels, 5, 7)
        assert images.description["images"] == name and images.description["size"] == [5, 7]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_not_read_whole(tmp_path, save):
    pixels = np.zeros((2000, 128, 128, 3), dtype=np.uint8)  # 98 MB
    pixels[1995:] = 7
    save(tmp_path / "x.npz", arr_0=pixels)
    tracemalloc.start()
    images = open_images(tmp_path / "x.npz")
    read = images.read(range(1990, 2000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # zipfile skips 16 MB at a time
    assert (read[:5] == 0).all() and (read[5:] == 7).all()


def test_a_damaged_npz_is_named(tmp_path):
    path, header = tmp_path / "x.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr="|u1", fortran_order=False, shape=(9, 5, 7, 3)))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("arr_0.npy", header.getvalue() + bytes(300))
    with pytest.raises(ValueError, match="x.npz.*arr_0 is truncated"):
        open_images(path)
    np.savez_compressed(path, arr_0=random_pixels(100))
    content = bytearray(path.read_bytes())
    content[500:540] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.npz is damaged"):
        open_images(path).read(slice(None))
    content[40:100] = bytes(60)  # the header of the array
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.npz is no whole .npz"):
        open_images(path)
    content[6] |= 1  # encrypted
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.npz is no whole .npz .*encrypted"):
        open_images(path)


def npz(**arrays):
    return lambda path: np.savez(path / "x.npz", **arrays)


def folder_with(**pictures):
    def write(path):
        (path / "x.npz").mkdir()
        for name, content in pictures.items():
            file = path / "x.npz" / f"{name}.png"
            file.write_bytes(content) if isinstance(content, bytes) else content.save(file)

    return write


def grey(size=(4, 4), mode="L"):
    return Image.new(mode, size)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (npz(arr_0=random_pixels(2).astype(np.float32)), "x.npz.*float32, not uint8; write pixels 0 to 255"),
        (npz(images=random_pixels(2)), "x.npz has no arr_0 .it has images.; save the images as arr_0"),
        (npz(arr_0=random_pixels(2)[0]), r"shape \(5, 7, 3\); write uint8 \(N, H, W, C\)"),
        (npz(arr_0=random_pixels(2).transpose(0, 3, 1, 2).copy()), r"shape \(2, 3, 5, 7\)"),
        (npz(arr_0=random_pixels(0)), "no images; give a file with some"),
        (npz(arr_0=np.array([{}], dtype=object)), "object, not uint8"),
        (lambda path: (path / "x.npz").write_bytes(b"PK\x03\x04"), "x.npz is no whole .npz.*make it again"),
        (folder_with(), "x.npz' holds no pictures .*give a folder with some"),
        (folder_with(a=grey(), b=grey((4, 6))), "b.png has 4x6 pixels, .*a.png has 4x4; give a folder of one size"),
        (folder_with(a=grey(), b=grey(mode="RGB")), "b.png has 3 channels, .*a.png has 1; give a folder of one kind"),
        (folder_with(a=grey(), b=b"\x89PNG\r\n\x1a\n"), "b.png cannot be read as a picture"),
        (folder_with(a=b"nothing"), "a.png cannot be read as a picture"),
        (lambda path: None, "images='.*x.npz': there is no such folder or file"),
    ],
)
def test_bad_images_are_named_in_one_line(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        open_images(tmp_path / "x.npz").read(slice(None))
    assert "\n" not in str(caught.value)


def test_a_truncated_picture_is_named(tmp_path):
    write_folder(tmp_path, random_pixels(4, 40, 40))
    path = tmp_path / "b/00003.png"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="00003.png cannot be read"):
        open_images(tmp_path).read(range(2, 4))


def test_the_upper_eight_of_sixteen_bits_are_read(tmp_path):
    values = np.array([[0, 255, 256], [40000, 65280, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert open_images(tmp_path).read(range(1)).flatten().tolist() == [0, 0, 1, 156, 255, 255]


def test_real_images_are_those_of_the_training_in_eight_bits(make_pipeline):
    unet = make_pipeline().unet
    dataset = load_images("digits", "test")
    for count in (None, 20):
        images = DataImages(dataset, unet, 17, count, data="digits", split="test")
        x_start, _ = read_tensor(dataset, unet, 17, count)
        # the picture that a pipeline makes of these values
        expected = ((x_start / 2 + 0.5) * 255).round().to(torch.uint8)
        assert len(images) == len(expected) and torch.equal(images.read(slice(None)), expected)
        assert torch.equal(images.read(range(5, 9)), expected[5:9])
    assert images.description["levels"] == 17 and images.description["count"] == 20
    again = DataImages(load_images("digits", "test"), unet, 17, 20, data="digits", split="test")
    assert again.description == images.description
    other = DataImages(load_images("digits", "train"), unet, 17, 20, data="digits", split="test")
    assert other.description["fingerprint"] != images.description["fingerprint"]


def test_real_images_are_scaled_and_cropped_to_the_network(tmp_path, make_pipeline):
    Image.new("RGBA", (20, 30), (255, 0, 0, 0)).save(tmp_path / "a.png")
    unet = make_pipeline(channels=3).unet
    unet.preprocessing = {"background": "blue", "crop": "center"}
    images = DataImages(load_images(str(tmp_path)), unet, 256)
    assert images.size == (8, 8) and images.channels == 3 and images.description["background"] == "blue"
    assert (images.read(range(1)) == torch.tensor([0, 0, 255])[:, None, None]).all()
    before = images.description["fingerprint"]
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    assert DataImages(load_images(str(tmp_path)), unet, 256).description["fingerprint"] != before


def test_sixteen_bits_become_eight(tmp_path, make_pipeline):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(values).save(tmp_path / "a.png")
    images = DataImages(load_images(str(tmp_path)), make_pipeline().unet, 65536)
    assert images.read(range(1))[0, 0].tolist() == np.round(values / 257).astype(int).tolist()
