"""evaluate.py: which images and labels it measures, how it says so, and where it writes."""

import dataclasses
import json
import os
import re
import shlex

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import DDPMUNet, VariationalDDPMScheduler
from ddpm_hf.cli.evaluate import command_of, make_parser
from ddpm_hf.data.sources import load_images
from ddpm_hf.evaluation.images import load_tensor
from ddpm_hf.evaluation.report_folder import check_out, data_of, held_out_of, own_folder
from ddpm_hf.hub.card import card_text, evaluation_command, write_model_card
from ddpm_hf.hub.contents import published_files
from ddpm_hf.hub.records import weights_digest
from ddpm_hf.hub.upload import push_folder
from ddpm_hf.training.config import TrainConfig
from ddpm_hf.training.saving import save_pipeline
from support.scripts import script

NAMES = ["ant", "bee", "cat"]
TOLD = {
    "split": "train",
    "steps": 1,
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.1,
}  # training.json
TOLD |= {"ema_decay": 0.0, "seed": 0, "loss": "simple", "weighting": "none"}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    """What is written to the current folder is seen there."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def run_folder(make_pipeline, tmp_path):
    """The pipeline of a run, as train.py leaves it: of three classes, trained on stretched images on black."""
    pipeline = make_pipeline(num_class_embeds=3, scheduler=VariationalDDPMScheduler(levels=256))
    torch.nn.init.normal_(pipeline.unet.class_embedding.weight, std=3.0)  # so that labels are seen in the numbers
    pipeline.unet.class_names = NAMES
    pipeline.unet.preprocessing = {"background": "black", "crop": "none", "label_column": "kind"}
    folder = tmp_path / "run/pipeline"
    pipeline.save_pretrained(folder)
    write_model_card(folder)
    for name in ("config.yaml", "environment.json"):
        (tmp_path / "run" / name).write_text("{}\n")
    return folder


def save_rows(path, names, labels, column="kind"):
    """Partly transparent images of 12x8, a shape for each name, as a parquet file."""
    rng, images = np.random.default_rng(0), []
    for label in labels:
        pixels = rng.integers(0, 256, (8, 12, 4), dtype=np.uint8)
        pixels[..., 3] = np.where(np.arange(12) < 3 * (1 + NAMES.index(names[label])), 255, 0)
        images.append(Image.fromarray(pixels))
    features = datasets.Features({"image": datasets.Image(), column: datasets.ClassLabel(names=names)})
    datasets.Dataset.from_dict({"image": images, column: labels}, features=features).to_parquet(path)
    return path


def evaluate(*argv, **kwargs):
    return script("evaluate.py", "--split", "train", "--steps", 12, "--estimate", 8, *argv, **kwargs)


def every_term(*argv):
    return script("evaluate.py", "--split", "train", "--steps", 3, *argv)


def report_of(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_a_subset_is_random_and_fixed(make_pipeline, tmp_path):
    """Of a folder sorted by class: images of all classes, the same ones again, those of a smaller subset among them."""
    for label in range(4):
        (tmp_path / f"images/{label}").mkdir(parents=True)
        for i in range(25):
            grey = np.full((8, 8), 60 * label + i, np.uint8)
            Image.fromarray(grey).save(tmp_path / f"images/{label}/{i:02}.png")
    unet = make_pipeline(num_class_embeds=4).unet
    unet.class_names = list("0123")
    x_start, labels = load_tensor(str(tmp_path / "images"), "train", unet, 256, 40)
    assert len(x_start) == 40 and labels.bincount(minlength=4).min() >= 5
    chosen = np.random.default_rng(0).permutation(100)
    whole, all_labels = load_tensor(str(tmp_path / "images"), "train", unet, 256)
    assert torch.equal(all_labels, torch.arange(100) // 25)
    assert torch.equal(x_start, whole[chosen[:40]]) and torch.equal(labels, all_labels[chosen[:40]])
    assert torch.equal(load_tensor(str(tmp_path / "images"), "train", unet, 256, 10)[0], x_start[:10])
    for count in (100, 1000):
        assert torch.equal(load_tensor(str(tmp_path / "images"), "train", unet, 256, count)[0], whole)
    first = tmp_path / f"images/{chosen[0] // 25}/{chosen[0] % 25:02}.png"
    first.write_bytes(first.read_bytes()[:40])  # the next one that can be read takes its place
    left, _ = load_tensor(str(tmp_path / "images"), "train", unet, 256, 9, max_broken=0.1)
    assert torch.equal(left, x_start[1:10])


def test_the_subset_and_the_command_are_reported(run_folder, tmp_path):
    rows = save_rows(tmp_path / "rows with 'spaces'.parquet", NAMES, [0] * 8 + [1] * 8 + [2] * 8)
    output = evaluate(run_folder, "--data", rows, "--images", 5, "--seed", 3, "--batch_size", 2).stdout
    report = report_of(run_folder)
    assert "bits/dim over 5 of 24 images, a fixed random subset (" in output
    assert report["subset"] == {"of": 24, "seed": 0, "rows": "numpy.random.default_rng(0).permutation(24)[:5]"}
    os.chdir(run_folder.parent)
    os.symlink(rows, rows.name)
    words = shlex.split(report["command"])
    assert words[:2] == ["python", "training/evaluate.py"]
    script("evaluate.py", *words[2:], "--out", tmp_path / "again")
    repeated = report_of(tmp_path / "again")
    assert repeated["total"] == report["total"] and repeated["command"] == report["command"]
    assert str(tmp_path) not in json.dumps(report)
    evaluate(run_folder, "--data", rows)
    assert report_of(run_folder)["images"] == 24 and "subset" not in report_of(run_folder)


def test_what_the_run_set_aside_is_measured(run_folder, tmp_path):
    """Of the data that it was trained on; all of other data, or where that is asked for."""
    rows = save_rows(tmp_path / "rows.parquet", NAMES, [0] * 8 + [1] * 8 + [2] * 8)
    (run_folder / "training.json").write_text(json.dumps(TOLD | {"data": "rows.parquet", "held_out": 0.25}))
    aside = np.sort(np.random.default_rng(0).permutation(24)[:6])
    kept = datasets.load_dataset("parquet", data_files=str(rows), split="train").select(aside)
    kept.to_parquet(tmp_path / "aside.parquet")
    printed = evaluate(run_folder, "--data", rows, "--histogram", "train").stdout
    report = report_of(run_folder)
    assert "bits/dim over 6 images that held_out=0.25 sets aside of 24 (" in printed
    assert report["images"] == 6 and report["held_out"] == 0.25 and "--held_out 0.25" in report["command"]
    card = (run_folder / "README.md").read_text()
    assert "Over 6 images that the training set aside (held_out=0.25) of split `train` of `rows.parquet`," in card
    evaluate(run_folder, "--data", tmp_path / "aside.parquet")
    other = report_of(run_folder)
    assert other["total"] == report["total"] and other["held_out"] is None and "--held_out" not in other["command"]
    evaluate(run_folder, "--data", rows, "--held_out", 0)
    assert report_of(run_folder)["images"] == 24 and "--held_out 0.0" in report_of(run_folder)["command"]


def test_the_command_of_the_card_works_where_it_was_given(run_folder, tmp_path, monkeypatch):
    """Relative paths are as they were given; of a path elsewhere only the last name is told, and the Hub has its own."""
    save_rows(tmp_path / "rows.parquet", NAMES, [0, 1, 2])
    for folder, pipeline, data in (
        (tmp_path, "run/pipeline", "rows.parquet"),
        (tmp_path / "here", "../run", "../rows.parquet"),
    ):
        monkeypatch.chdir(folder)
        evaluate(pipeline, "--data", data)
        words = f"training/evaluate.py {pipeline.removesuffix('/pipeline')}/pipeline --data {data} --split train "
        assert words in (run_folder / "README.md").read_text() and words in report_of(run_folder)["command"]
    assert "training/evaluate.py user/ants --data ../rows.parquet --split train " in card_text(run_folder, "user/ants")
    monkeypatch.chdir(tmp_path)
    for pipeline, words in ((run_folder, "run/pipeline"), (".", "here")):
        arguments = make_parser().parse_args([str(pipeline), "--data", "digits"])
        monkeypatch.chdir(tmp_path if pipeline == run_folder else tmp_path / "here")
        assert command_of(make_parser(), arguments) == f"ddpm-hf evaluate {words} --data digits"


def test_the_split_if_left_out(run_folder, tmp_path):
    """It is test, or what the run held out of the only split; other data needs --split."""

    def measure(*argv, **kwargs):
        return script("evaluate.py", run_folder, "--steps", 12, "--estimate", 8, *argv, **kwargs)

    rows = save_rows(tmp_path / "rows.parquet", NAMES, [0] * 8 + [1] * 8 + [2] * 8)
    result = measure("--data", rows, check=False)
    assert result.returncode == 1 and "evaluate.py: give --split: without it, " in result.stderr.splitlines()[-1]
    assert "train" in result.stderr.splitlines()[-1]
    record = TOLD | {"data": "rows.parquet", "held_out": 0.25, "images": 24}
    (run_folder / "training.json").write_text(json.dumps(record))
    printed = measure("--data", rows).stdout
    assert f"{rows} has no split 'test': measuring the images of 'train' that the run held out\n" in printed
    assert "bits/dim over 6 images that held_out=0.25 sets aside of 24 (" in printed
    report = report_of(run_folder)
    assert report["split"] == "train" and "--split train --held_out 0.25" in report["command"]
    result = measure("--data", rows, "--split", "test", check=False)
    assert result.returncode == 1 and "give --split" not in result.stderr
    (run_folder / "training.json").write_text(json.dumps(record | {"held_out": 0.0}))
    assert "give --split: without it, " in measure("--data", rows, check=False).stderr
    for split, label in (("train", "ant"), ("test", "bee")):
        (tmp_path / "pictures" / split / label).mkdir(parents=True)
        Image.new("L", (8, 8), 9).save(tmp_path / "pictures" / split / label / "0.png")
    (run_folder / "training.json").write_text(json.dumps(record | {"data": "pictures"}))
    printed = measure("--data", tmp_path / "pictures").stdout
    assert f"bits/dim over 1 images ({tmp_path / 'pictures'}, test)" in printed


def test_data_without_labels(run_folder, tmp_path):
    (tmp_path / "flat").mkdir()
    Image.new("L", (8, 8), 9).save(tmp_path / "flat/0.png")
    result = evaluate(run_folder, "--data", tmp_path / "flat", check=False)
    message = f"{tmp_path / 'flat'} has no class labels (columns: image), but the network is class-conditional; "
    assert result.returncode == 1 and message in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("run_facts", "data"),
    [
        ({"data": "mnist"}, "mnist"),
        ({"data": "user/birds", "hub_dataset": "user/birds"}, "user/birds"),
        ({"data": "birds"}, None),
        (None, "digits"),
    ],
)
def test_data_if_left_out_is_that_of_the_training(tmp_path, run_facts, data):
    """Of a local folder the record has only the last name, so it must be given."""
    if run_facts:
        (tmp_path / "training.json").write_text(json.dumps(TOLD | run_facts))
    if data:
        assert data_of(str(tmp_path)) == data_of("user/pipeline", tmp_path) == data
    else:
        with pytest.raises(ValueError, match="was trained on 'birds', a local folder or file; give --data"):
            data_of(str(tmp_path))


@pytest.mark.parametrize("source", ["link", ".", "../pictures/"])
def test_names_of_local_data_are_those_of_the_folders(make_pipeline, tmp_path, monkeypatch, source):
    """However they are written: training.json has a name, and what was set aside is found by it."""
    data, folder = tmp_path / "pictures", tmp_path / "run/pipeline"
    data.mkdir()
    (data / "link").symlink_to(data)
    folder.parent.mkdir()
    monkeypatch.chdir(data)
    config, pipeline = TrainConfig(data=source, held_out=0.25, output_dir=str(tmp_path / "run")), make_pipeline()
    save_pipeline(pipeline, folder, config=config, step=5, split_size=24)
    run_facts = json.loads((folder / "training.json").read_text())
    assert (run_facts["data"], run_facts["images"]) == ("pictures", 24) and "README.md" in published_files(folder)
    assert held_out_of(str(folder), source, "train", 24) == held_out_of(folder, str(data), "train") == 0.25
    assert held_out_of(folder, "digits", "train", 24) == held_out_of(folder, source, "test", 24) == 0
    (data / "digits").symlink_to(tmp_path)  # a name of built-in data is that, whatever lies there
    save_pipeline(pipeline, folder, config=dataclasses.replace(config, data="digits"), step=5, split_size=24)
    assert data_of(str(folder)) == json.loads((folder / "training.json").read_text())["data"] == "digits"
    monkeypatch.chdir(folder)
    assert card_text(".") == card_text(folder)


def test_other_data_of_the_same_name_is_measured_whole(tmp_path, capsys):
    (tmp_path / "training.json").write_text(json.dumps(TOLD | {"data": "here", "held_out": 0.25, "images": 24}))
    assert held_out_of(tmp_path, ".", "train", 24) == 0.25 and capsys.readouterr().err == ""
    assert held_out_of(tmp_path, ".", "train", 23) == 0
    message = "the run set aside held_out=0.25 of 24 images, but . has 23: all are measured, those that it was trained on too\n"
    assert capsys.readouterr().err == message


def test_the_training_record_of_a_pipeline_on_the_hub(hub, run_folder, tmp_path):
    rows = save_rows(tmp_path / "rows.parquet", NAMES, [0] * 8 + [1] * 8 + [2] * 8)
    record = {"data": "rows.parquet", "held_out": 0.25, "weights": weights_digest(run_folder)}
    (run_folder / "training.json").write_text(json.dumps(TOLD | record))
    push_folder(run_folder, "user/measured")
    assert "over 6 images that held_out=0.25 sets aside of 24 (" in evaluate("user/measured", "--data", rows).stdout


@pytest.mark.parametrize(
    "source",
    [
        "/etc",
        "../secret",
        "private",
        "user/x.parquet",
        "imagefolder",
        "https://host/x.tar",
        "hf://datasets/x/y",
        "a\x1b",
    ],
)
def test_a_strangers_record_chooses_no_files(tmp_path, source):
    (tmp_path / "here/private").mkdir()
    (tmp_path / "training.json").write_text(json.dumps(TOLD | {"data": source, "hub_dataset": source}))
    with pytest.raises(ValueError, match="is not the id of a data set on the Hub; give --data") as error:
        data_of(str(tmp_path))
    assert f"hub_dataset={source!r}" in str(error.value)


@pytest.mark.parametrize(
    ("program", "words"),
    [("evaluate.py", ["python", "training/evaluate.py"]), ("ddpm-hf evaluate", ["ddpm-hf", "evaluate"])],
)
def test_the_command_has_every_option_that_is_not_its_default(program, words):
    parser = make_parser(program)
    data = ["--data", "digits"]  # it is known by then
    plain = parser.parse_args(["pipeline", *data])
    values = {int: 9, float: 0.25, str: "it's 100% $HOME; -x"}
    for option, value in vars(plain).items():
        if option in ("pipeline", "out", "scheduler.KEY"):
            continue
        if option == "scheduler_settings":
            argv = [
                "--scheduler.solver_order",
                "9",
                "--scheduler.algorithm_type=it's",
                "--scheduler.trained_betas=[0.1, 0.2]",
            ]
        elif value is False:
            argv = [f"--{option}"]
        elif option == "dequantization":
            argv = ["--dequantization", "uniform"]
        else:
            kind = next((kind for kind in values if _takes(parser, option, values[kind])), str)
            argv = [f"--{option}", str(values[kind])]
        arguments = parser.parse_args(["pipeline", *data, *argv])
        assert arguments != plain
        command = command_of(parser, arguments)
        assert shlex.split(command)[:2] == words
        assert parser.parse_args(shlex.split(command)[2:]) == arguments, option
        assert evaluation_command(command) == command  # as the card shows it
    for text in ("-5", "--steps"):  # begins as an option
        arguments = parser.parse_args(["pipeline", *data, f"--label_column={text}", f"--split={text}"])
        command = command_of(parser, arguments)
        assert parser.parse_args(shlex.split(command)[2:]) == arguments and evaluation_command(command) == command
    assert "out" not in command_of(parser, parser.parse_args(["pipeline", *data, "--out", "/home/me"]))


def _takes(parser, option, value):
    try:
        parser.parse_args(["pipeline", f"--{option}", str(value)])
    except SystemExit:
        return False
    return True


def test_a_hub_id_measures_what_its_folder_does(hub, run_folder, tmp_path):
    """Names of labels, background, crop and label column are in the pipeline; without them it is another number."""
    data = save_rows(tmp_path / "rows.parquet", ["cat", "ant", "bee"], [0, 1, 2, 0, 1, 2])  # in another order
    push_folder(run_folder, "user/measured")
    evaluate(run_folder, "--data", data, "--out", tmp_path / "a")
    output = evaluate("user/measured", "--data", data, "--out", tmp_path / "b").stdout
    a, b = report_of(tmp_path / "a"), report_of(tmp_path / "b")
    assert a["total"] == b["total"] and f"wrote {tmp_path / 'b'}/evaluation.json" in output
    assert b["command"].startswith("python training/evaluate.py user/measured --data rows.parquet ")
    ordered = save_rows(tmp_path / "ordered.parquet", NAMES, [2, 0, 1, 2, 0, 1])  # the same images under the same names
    evaluate(run_folder, "--data", ordered, "--out", tmp_path / "c")
    assert report_of(tmp_path / "c")["total"] == a["total"]
    config = run_folder / "unet/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_ddpm_hf": {"class_names": NAMES}}))
    evaluate(run_folder, "--data", data, "--out", tmp_path / "d", "--label_column", "kind")
    assert abs(report_of(tmp_path / "d")["total"] - a["total"]) > 0.01


def test_a_split_without_a_class_keeps_the_labels(run_folder, tmp_path):
    unet = load_unet(run_folder)
    for names, labels, expected in ((["bee", "cat"], [1, 0, 1], [2, 1, 2]), (["cat"], [0, 0], [2, 2])):
        data = save_rows(tmp_path / "part.parquet", names, labels)
        assert load_tensor(str(data), "train", unet, 256)[1].tolist() == expected
    for label in ("bee", "cat"):
        (tmp_path / "folder" / label).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (8, 8), 9).save(tmp_path / f"folder/{label}/{i}.png")
    assert load_tensor(str(tmp_path / "folder"), "train", unet, 256)[1].tolist() == [1, 1, 2, 2]


def load_unet(folder):
    return DDPMUNet.from_pretrained(folder, subfolder="unet")


def test_the_label_column(make_pipeline, tmp_path):
    """The one of the training if the data has it, else the only one of classes, else "label"."""
    unet = make_pipeline(num_class_embeds=2).unet
    image, classes = [Image.new("L", (8, 8), 9)] * 2, datasets.ClassLabel(names=["a", "b"])

    def labels_of(**features):
        rows = {"image": image, **{name: [1, 0] if name == "x" else [0, 1] for name in features}}
        features = datasets.Features({"image": datasets.Image(), **features})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
        return load_tensor(str(tmp_path / "rows.parquet"), "train", unet, 256)[1].tolist()

    integer = datasets.Value("int64")
    assert labels_of(x=classes, y=integer) == [1, 0]
    assert labels_of(x=integer, label=integer) == [0, 1]
    assert labels_of(x=classes, label=classes) == [0, 1]
    with pytest.raises(ValueError, match="the network is class-conditional: give label_column, .* image, x, y"):
        labels_of(x=integer, y=integer)
    unet.preprocessing = {"label_column": "x"}
    assert labels_of(x=integer, label=classes) == [1, 0]
    assert labels_of(y=classes) == [0, 1]
    with pytest.raises(ValueError, match="label_column='y', but the network is not class-conditional"):
        load_tensor(str(tmp_path / "rows.parquet"), "train", make_pipeline().unet, 256, label_column="y")


def test_where_it_writes(run_folder, tmp_path):
    """Into a run's own pipeline and into --out; not into the current folder, nor into a pipeline from elsewhere."""
    files = ["evaluation.csv", "evaluation.json", "evaluation.png"]
    data = save_rows(tmp_path / "rows.parquet", NAMES, [0, 1, 2])
    strangers = tmp_path / "copied"
    os.rename(run_folder, strangers)
    mine = {name: f"my own {name}" for name in (*files, "README.md")}
    for name, text in mine.items():
        (tmp_path / "here" / name).write_text(text)
    before = {path.name for path in strangers.iterdir()}
    output = evaluate(strangers, "--data", data).stdout
    assert "not written; give --out FOLDER" in output and {path.name for path in strangers.iterdir()} == before
    evaluate(strangers, "--data", data, "--out", tmp_path / "out")
    assert mine == {name: (tmp_path / "here" / name).read_text() for name in mine}
    assert os.listdir(tmp_path / "out") == ["evaluation.json"]
    os.rename(strangers, run_folder)
    every_term(run_folder, "--data", data)
    assert {path.name for path in run_folder.iterdir()} == before | {*files}
    assert f"{report_of(run_folder)['total']:.4f}" in (run_folder / "README.md").read_text()
    evaluate(run_folder, "--data", data)  # without a table of terms: the old one goes
    assert {path.name for path in run_folder.iterdir()} == before | {"evaluation.json"}


def test_what_is_in_the_way_stays(run_folder, tmp_path):
    """Refused before the pipeline is opened: files that no evaluation has written, and folders that are none."""
    data, out = save_rows(tmp_path / "rows.parquet", NAMES, [0, 1, 2]), tmp_path / "out"
    every_term(run_folder, "--data", data, "--out", out)
    assert sorted(os.listdir(out)) == ["evaluation.csv", "evaluation.json", "evaluation.png"]
    evaluate(run_folder, "--data", data, "--out", out)  # takes its place
    assert os.listdir(out) == ["evaluation.json"]
    for name in ("evaluation.csv", "evaluation.png", "evaluation.json"):
        (out / name).write_text("mine")
        result = evaluate("no/pipeline", "--data", data, "--out", out, check=False)
        assert result.returncode == 1 and f"holds {name}, which is not of an evaluation" in result.stderr
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    (out / "evaluation.json").symlink_to(tmp_path / "nowhere")
    result = evaluate("no/pipeline", "--data", data, "--out", out, check=False)
    assert result.returncode == 1 and "holds evaluation.json" in result.stderr
    for wrong, message in (
        (data, "is a file; give a folder"),
        (tmp_path / "no/such", "there is no folder .*/no; make it first"),
    ):
        result = evaluate("no/pipeline", "--data", data, "--out", wrong, check=False)
        assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1
        assert re.search(message, result.stderr)


def test_a_whole_run_of_another_user_is_not_ones_own(run_folder, monkeypatch):
    assert own_folder(str(run_folder)) == run_folder
    monkeypatch.setattr("os.geteuid", lambda: os.stat(run_folder).st_uid + 1)
    assert own_folder(str(run_folder)) is None


def test_a_folder_of_somebody_else(folder_of_a_stranger):
    os.chmod(folder_of_a_stranger, 0o500)
    for out in (folder_of_a_stranger, folder_of_a_stranger / "new"):
        with pytest.raises(ValueError, match="may not be written to; give another folder"):
            check_out(str(out))


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["--images", "0"], 2, "argument --images: 0 must be an integer, 1 or more"),
        (["--batch_size", "1.5"], 2, "argument --batch_size: 1.5 must be an integer, 1 or more"),
        (["--levels", "1"], 2, "argument --levels: 1 must be an integer, 2 to 65536"),
        (["--max_broken", "nan"], 2, "argument --max_broken: nan must be a number, 0 to 1"),
        (["--tolerance", "0"], 2, "argument --tolerance: 0 must be a number, 1e-12 to 1"),
        (["--seed", "1e3"], 2, "argument --seed: 1e3 must be an integer"),
        (["--steps", "9" * 400], 1, "steps"),
        (["--steps", "2000"], 1, "evaluate.py: --steps 2000 must be an integer, 1 to 1000"),
        (["--device", "gpu"], 1, "--device gpu cannot be used"),
        (["--levels", "17"], 1, "levels=17, but the data has a pixel of 2"),
        (["--label_column", "sort"], 1, "label_column='sort' is not in the data; it has image, kind"),
        (["--split", "test"], 1, "test"),
        (["--split", "+".join(["train"] * 90)], 1, "must be text of 1 to 500 characters; shorten it"),
        (["--data", "no/such/folder"], 1, "no/such/folder"),
        (["--histogram", "validation"], 1, "validation"),
    ],
)
def test_mistakes(run_folder, tmp_path, argv, status, message):
    data = save_rows(tmp_path / "rows.parquet", NAMES, [0, 1, 2])
    result = script("evaluate.py", run_folder, "--data", data, "--split", "train", "--steps", 3, *argv, check=False)
    assert result.returncode == status and message in result.stderr.splitlines()[-1], result.stderr
    assert not (run_folder / "evaluation.json").exists()
    assert status == 2 or len([line for line in result.stderr.splitlines() if line.startswith("evaluate.py")]) == 1


def test_a_hub_id_that_is_not_there(hub):
    for name in ("user/no-such-pipeline", "a/b/c", "no/such/../folder"):
        result = script("evaluate.py", name, check=False)
        lines = result.stderr.strip().splitlines()
        assert result.returncode == 1 and len(lines) == 1 and lines[0].startswith("evaluate.py: "), result.stderr


def test_another_data_set_of_other_classes(run_folder, tmp_path):
    data = load_images("digits", "test").select(range(4)).rename_column("label", "kind")
    data.to_parquet(tmp_path / "digits.parquet")
    result = evaluate(run_folder, "--data", tmp_path / "digits.parquet", check=False)
    assert result.returncode == 1 and "label_column='kind' has the label '" in result.stderr
    assert "known are ant, bee, cat" in result.stderr
