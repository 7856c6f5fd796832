"""Every image of a folder becomes a row of the right split, with the label of its folder, or a warning says why not."""

import json
import os
import tarfile

import datasets
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image

from ddpm_hf.data.dataset import collate, training_set
from ddpm_hf.data.folders import picture_endings
from ddpm_hf.data.labels import label_names
from ddpm_hf.data.pixels import image_to_pixels
from ddpm_hf.data.sources import load_images


def make(folder, *paths):
    """Images at these paths; the one at the i-th is of grey level i. Returns the folder's path."""
    for i, path in enumerate(paths):
        path = folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in picture_endings():
            Image.new("L", (4, 4), i).convert("RGB").save(path, lossless=True)
        else:
            path.write_text("no image")
    return str(folder)


def rows(folder, split="train", streaming=False):
    """(path below the folder, name of the label or None) of every row."""
    data = load_images(folder, split, streaming).cast_column("image", datasets.Image(decode=False))
    names = data.features["label"].names if "label" in data.features else []
    return [
        (os.path.relpath(row["image"]["path"], folder), None if row.get("label") is None else names[row["label"]])
        for row in data
    ]


def columns(folder):
    return load_images(folder).column_names


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "classes",
    [
        ("bicycle", "bus", "train", "tram"),
        ("boat", "dev", "test", "train", "validation"),
        ("training shoe", "test tube", "eval-1"),
        ("train", "tram"),
        ("cat",),
    ],
)
def test_words_in_names_are_no_splits(tmp_path, classes, streaming):
    paths = [f"{name}/{file}.png" for name in classes for file in ("a", "my test", "train-1", "valid_2")]
    expected = sorted((path, path.split("/")[0]) for path in paths)
    assert rows(make(tmp_path, *paths), streaming=streaming) == expected
    assert load_images(str(tmp_path)).features["label"].names == sorted(classes)
    for split in ("test", "validation"):
        with pytest.raises(ValueError, match=f"split='{split}' is not a split or slice of {tmp_path}; it has train$"):
            load_images(str(tmp_path), split, streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_words_in_flat_names_are_no_splits(tmp_path, streaming):
    names = ["bike.png", "eval-1.png", "my test.png", "photo of a train.png", "test.png", "train.png", "val.png"]
    folder = make(tmp_path, *names)
    assert rows(folder, streaming=streaming) == [(name, None) for name in names] and columns(folder) == ["image"]


@pytest.mark.parametrize("streaming", [False, True])
def test_top_level_folders_are_splits_where_all_are_named_so(tmp_path, streaming, caplog):
    split_names = {"Train": "train", "val": "validation", "testing": "test"}
    paths = {name: [f"{name}/{label}/{i}.png" for label in ("bus", "train") for i in range(3)] for name in split_names}
    folder = make(tmp_path, *sum(paths.values(), []))
    for name, split in split_names.items():
        for asked in {split, name.lower()}:
            assert rows(folder, asked, streaming) == [(path, path.split("/")[1]) for path in paths[name]]
    assert rows(folder, "train[2:4]", streaming) == [("Train/bus/2.png", "bus"), ("Train/train/0.png", "train")]
    assert len(rows(folder, "train+val[:50%]", streaming)) == 9
    with pytest.raises(ValueError, match="split='held' is not .*; it has train, test, validation$"):
        load_images(folder, "held", streaming)
    assert not caplog.records
    make(tmp_path, "stray.png")
    assert len(rows(folder, "train")) == 6
    assert "left out 1 file beside the splits Train, testing, val: stray.png" in caplog.text


def test_a_single_folder_named_after_a_split_is_one(tmp_path):
    make(tmp_path, "a/train/0.png", "b/test/0.png", "c/test/x/0.png", "c/notes/read.txt")
    assert rows(str(tmp_path / "a")) == [("train/0.png", None)]
    assert rows(str(tmp_path / "b"), "test") == [("test/0.png", None)]
    assert rows(str(tmp_path / "c"), "test") == [("test/x/0.png", "x")]
    with pytest.raises(ValueError, match="split='train' is not a split or slice of .*b; it has test$"):
        load_images(str(tmp_path / "b"))


def test_folders_that_look_like_splits_but_are_classes_are_named(tmp_path, caplog):
    """Else test images would be trained on without a word."""
    folder = make(tmp_path, "train2017/0.png", "val2017/1.png")
    assert rows(folder) == [("train2017/0.png", "train2017"), ("val2017/1.png", "val2017")]
    assert 'is read as "train", as not all of its folders are named after a split: train2017, val2017' in caplog.text


def test_a_split_without_one_class_has_the_same_labels(tmp_path):
    folder = make(tmp_path, "train/ant/0.png", "train/bee/1.png", "train/cat/2.png", "test/ant/3.png", "test/cat/4.png")
    for split in ("train", "test"):
        assert load_images(folder, split).features["label"].names == ["ant", "bee", "cat"]
    assert rows(folder, "test") == [("test/ant/3.png", "ant"), ("test/cat/4.png", "cat")]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_without_one_class_is_labeled_by_name(tmp_path, streaming):
    make(tmp_path, "all/ant/0.png", "all/bee/1.png", "all/cat/2.png", "held out/cat/3.png")
    names = label_names(load_images(str(tmp_path / "all")), "label")
    held_out = load_images(str(tmp_path / "held out"), streaming=streaming)
    data = training_set(held_out, image_to_pixels((4, 4), 1), None, "label", 3, names, memory=0)
    assert names == ["ant", "bee", "cat"] and [item["class_labels"] for item in data] == [2]
    make(tmp_path, "held out/dog/3.png")
    held_out = load_images(str(tmp_path / "held out"), streaming=streaming)
    with pytest.raises(ValueError, match="has the label 'dog'; known are ant, bee, cat|is none of the known labels"):
        list(training_set(held_out, image_to_pixels((4, 4), 1), None, "label", 3, names))


def test_integer_names_are_in_order_of_value(tmp_path):
    folder = make(tmp_path / "a", *(f"{i}/0.png" for i in range(12)))
    assert label_names(load_images(folder), "label", 12) == [str(i) for i in range(12)]
    assert [name for _, name in sorted(rows(folder), key=lambda row: int(row[1]))] == [str(i) for i in range(12)]
    folder = make(tmp_path / "b", *(f"{name}/0.png" for name in ("10", "9", "1a")))
    assert label_names(load_images(folder), "label") == ["10", "1a", "9"]
    folder = make(tmp_path / "c", *(f"{name}/0.png" for name in ("007", "-1", "10")))
    assert label_names(load_images(folder), "label") == ["-1", "007", "10"]


def test_images_of_all_formats_that_pillow_reads(tmp_path, caplog):
    names = ["a.PNG", "b.JPEG", "c.avif", "d.qoi", "e.webp", "f.gif", "g.tif", "h.jpg"]
    folder = make(tmp_path, *names)
    assert [path for path, _ in rows(folder)] == names and not caplog.records
    data = training_set(load_images(folder), image_to_pixels((4, 4), 1))
    assert (data.tensors["pixels"][:, 0, 0, 0].int() - torch.arange(8)).abs().max() <= 1  # JPEG's


def test_images_of_a_plugin(tmp_path, monkeypatch):
    """As pillow-heif's .heic: the ending is registered, and Pillow recognizes the content."""
    monkeypatch.setitem(Image.EXTENSION, ".heic", "BMP")
    Image.new("RGB", (4, 4)).save(tmp_path / "0.bmp")
    (tmp_path / "0.bmp").rename(tmp_path / "0.HEIC")
    assert rows(str(tmp_path)) == [("0.HEIC", None)]


def test_what_is_no_image_is_named(tmp_path, caplog):
    folder = make(
        tmp_path, "a/0.png", "a/0.png.json", "a/Thumbs.db", "a/more.zip", "b/1.png", "readme.md", "b/film.mpg"
    )
    for hidden in (".DS_Store", "a/._0.png", ".ipynb_checkpoints/0.png", "__MACOSX/a/0.png", "@eaDir/0.png"):
        (tmp_path / hidden).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / hidden).write_bytes(b"x")
    assert rows(folder) == [("a/0.png", "a"), ("b/1.png", "b")]
    (record,) = caplog.records
    assert "left out 5 files that Pillow cannot read as images: a/0.png.json, a/Thumbs.db, " in record.message
    load_images(folder)
    assert len(caplog.records) == 1  # once, though held-out images are opened after those trained on


def test_classes_at_two_depths(tmp_path, caplog):
    folder = make(tmp_path, "a/0.png", "a/b/1.png", "c/2.png")
    assert rows(folder) == [("a/0.png", "a"), ("a/b/1.png", "b"), ("c/2.png", "c")]
    assert "images lie at several depths; each of the 3 folders that hold some is a class: a, a/b, c" in caplog.text


def test_images_beside_class_folders(tmp_path, caplog):
    folder = make(tmp_path, "0.png", "a/1.png", "b/2.png")
    assert rows(folder) == [("0.png", None), ("a/1.png", "a"), ("b/2.png", "b")]
    assert "no label for 1 image beside the class folders: 0.png" in caplog.text
    to_pixels = image_to_pixels((4, 4))
    assert len(training_set(load_images(folder), to_pixels)) == 3
    with pytest.raises(ValueError, match="label_column='label' has no value in 1 of 3 rows"):
        training_set(load_images(folder), to_pixels, label_column="label")


def test_folders_of_one_name_are_classes_of_their_own(tmp_path, caplog):
    folder = make(tmp_path, "cat/young/0.png", "dog/young/1.png", "dog/old/2.png")
    assert [name for _, name in rows(folder)] == ["cat/young", "dog/old", "dog/young"] and not caplog.records
    folder = make(tmp_path / "wrapped", "animals/cat/0.png", "animals/dog/1.png")
    assert [name for _, name in rows(folder)] == ["cat", "dog"]


def test_empty_folders_are_no_classes(tmp_path, caplog):
    folder = make(tmp_path, "cat/0.png", "dog/1.png")
    (tmp_path / "owl/young").mkdir(parents=True)
    assert load_images(folder).features["label"].names == ["cat", "dog"]
    assert "1 folder without images, which makes no class: owl" in caplog.text


def test_a_broken_link_is_a_broken_image(tmp_path):
    folder = make(tmp_path, "0.png", "1.png")
    (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="1 of 3 images cannot be read, the last .*2.png .FileNotFoundError"):
        training_set(load_images(folder), image_to_pixels((4, 4)))
    os.mkfifo(tmp_path / "3.png")  # which would be waited for without end
    with pytest.raises(ValueError, match="3.png is neither a file nor a folder; remove it"):
        load_images(folder)


def test_names_that_are_no_text(tmp_path):
    make(tmp_path, "0.png")
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb"):
        pass
    with pytest.raises(ValueError, match=r"xff.png' is no name in UTF-8; rename it"):
        load_images(str(tmp_path))


def write_metadata(path, entries):
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(entries).to_parquet(path)
    elif path.suffix == ".csv":
        lines = [",".join(entries[0]), *(",".join(map(str, entry.values())) for entry in entries)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_metadata_files(tmp_path, ending, streaming, caplog):
    folder = make(tmp_path, "train a.png", "b.png", "c.avif", "d.png", "sub/e.png")
    entries = [{"file_name": name, "label": i} for i, name in enumerate(("b.png", "c.avif", "train a.png"))]
    write_metadata(tmp_path / f"metadata.{ending}", entries)
    data = load_images(folder, "train", streaming)
    assert [row["label"] for row in data] == [0, 1, 2]
    assert [row["image"].getpixel((0, 0))[0] for row in data] == [1, 2, 0]
    assert f"left out 2 of 5 images, which metadata.{ending} does not name: d.png, sub/e.png" in caplog.text


def test_metadata_of_splits(tmp_path, caplog):
    """Each within its split, or one for all of them."""
    for name in ("own", "common"):
        make(tmp_path / name, "train/a.png", "train/b.png", "test/c.png")
    write_metadata(
        tmp_path / "own/train/metadata.csv", [{"file_name": "b.png", "kind": 1}, {"file_name": "a.png", "kind": 0}]
    )
    write_metadata(tmp_path / "own/test/metadata.csv", [{"file_name": "c.png", "kind": 2}])
    entries = [{"file_name": name, "kind": i} for i, name in enumerate(("train/a.png", "test/c.png", "train/b.png"))]
    write_metadata(tmp_path / "common/metadata.csv", entries)
    for name, kinds in (("own", [1, 0]), ("common", [0, 2])):
        assert load_images(str(tmp_path / name))["kind"] == kinds
    assert load_images(str(tmp_path / "own"), "test")["kind"] == [2]
    assert load_images(str(tmp_path / "common"), "test")["kind"] == [1] and not caplog.records


@pytest.mark.parametrize(
    "text", ["", "file_name,label\n", "id,label\n0,1\n", "file_name\n../0.png\n", "file_name\n/0.png\n"]
)
def test_metadata_that_does_not_describe_the_folder(tmp_path, text):
    folder = make(tmp_path, "0.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=f"{folder}: metadata.csv cannot be read: "):
        load_images(folder)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "files, expected, warned",
    [
        (["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"], {"train": 2, "test": 1}, False),
        (["data/train-00000-of-00001-0123456789abcdef", "data/validation-0"], {"train": 1, "val": 1}, False),
        (["train/0000", "train/0001", "test/0000"], {"train": 2, "test": 1}, False),
        (["train", "test"], {"train": 1, "test": 1}, False),
        (["tests", "trains"], {"train": 2}, False),
        (["my test photos", "photos"], {"train": 2}, True),
        (["set-train", "set-test"], {"train": 2}, True),
        (["train", "test", "more"], {"train": 3}, True),
    ],
)
def test_splits_of_tables(tmp_path, files, expected, warned, streaming, caplog):
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": [Image.new("L", (2, 2))]}, features=features)
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        table.to_parquet(tmp_path / f"{name}.parquet")
    for split, count in expected.items():
        assert len(list(load_images(str(tmp_path), split, streaming))) == count
    if len(expected) == 1:
        with pytest.raises(ValueError, match="train"):
            load_images(str(tmp_path), "test", streaming)
    assert ('every file is read as "train", as not all are named after a split' in caplog.text) == warned


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["png", "avif", "qoi"])
def test_images_in_tar_files_of_formats_that_pillow_reads(tmp_path, ending, streaming):
    make(tmp_path / "images", *(f"{i}.{ending}" for i in range(3)))
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "images", "images")
    data = training_set(load_images(str(tmp_path / "images.tar"), streaming=streaming), image_to_pixels((4, 4), 1))
    assert [int(item["pixels"][0, 0, 0]) for item in data] == [0, 1, 2]


def test_metadata_parquet_is_no_table(tmp_path):
    folder = make(tmp_path, "0.png", "1.png")
    write_metadata(tmp_path / "metadata.parquet", [{"file_name": "1.png"}, {"file_name": "0.png"}])
    assert [path for path, _ in rows(folder)] == ["1.png", "0.png"]


def test_a_stream_is_divided(tmp_path):
    """Among processes and their workers: every image once, none twice."""
    folder = make(tmp_path, *(f"{label}/{i}.png" for label in "ab" for i in range(20)))
    stream = load_images(folder, streaming=True).shuffle(seed=0, buffer_size=10)
    items = []
    for process in (0, 1):
        part = training_set(split_dataset_by_node(stream, process, 2), image_to_pixels((4, 4), 1), label_column="label")
        for batch in torch.utils.data.DataLoader(part, 4, num_workers=2, collate_fn=collate):
            items += zip(batch["pixels"][:, 0, 0, 0].tolist(), batch["class_labels"].tolist())
    assert sorted(items) == [(i, i // 20) for i in range(40)] and items != sorted(items)


def test_metadata_beside_tables_is_a_table_or_named(tmp_path, caplog):
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": [Image.new("L", (2, 2))]}, features=features)
    table.to_parquet(tmp_path / "metadata.parquet")
    (tmp_path / "metadata.csv").write_text("file_name\n0.png\n")
    assert len(load_images(str(tmp_path))) == 1
    assert "left out 1 file that Pillow cannot read as images: metadata.csv" in caplog.text
