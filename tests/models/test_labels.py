"""What class labels mean: names and pre-processing that are saved with a network, and compared by name."""

import json
import logging

import datasets
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from PIL import Image

from ddpm_hf import (
    CascadePipeline,
    DDPMImagePipeline,
    DDPMSuperResolutionPipeline,
    DDPMUNet,
    VariationalDDPMScheduler,
)
from ddpm_hf.files.label_names import check_label_names
from ddpm_hf.training.command_line import load_config
from ddpm_hf.training.config import ConfigError, TrainConfig
from ddpm_hf.training.inputs import held_out_images, open_images, record_data
from support.networks import small_classifier

NAMES = ["ant", "bee", "cat"]
HOW = {"background": "black", "crop": "none", "label_column": "kind"}


@pytest.fixture
def named(make_pipeline):
    """A pipeline of ants, bees and cats."""
    pipeline = make_pipeline(num_class_embeds=3)
    pipeline.unet.class_names, pipeline.unet.preprocessing = NAMES, HOW
    return pipeline


def make_classifier(names=NAMES, **changes):
    classifier = small_classifier(num_classes=3, scheduler=dict(VariationalDDPMScheduler().config), **changes)
    classifier.class_names = names
    return classifier


def run(pipeline, *arguments, **kwargs):
    kwargs = dict(num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(0)) | kwargs
    return pipeline(*arguments or (2,), **kwargs).images


def test_names_and_preprocessing_are_saved(named, tmp_path, caplog):
    DDPMImagePipeline(named.unet, named.scheduler, make_classifier()).save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours/unet/config.json").read_text())
    assert saved["_ddpm_hf"] == {"class_names": NAMES, "preprocessing": HOW} and "class_names" not in saved
    opened = DDPMImagePipeline.from_pretrained(tmp_path / "ours")
    assert opened.labels == {"ant": 0, "bee": 1, "cat": 2} and opened.unet.preprocessing == HOW
    assert opened.classifier.class_names == NAMES
    DDPMImagePipeline(named.unet, named.scheduler).save_pretrained(tmp_path / "plain")
    with caplog.at_level(logging.WARNING):
        stock = DDPMPipeline.from_pretrained(tmp_path / "plain")
    assert type(stock.unet) is UNet2DModel and not caplog.records
    assert DDPMImagePipeline(**stock.components).unet.class_names == NAMES
    stock.save_pretrained(tmp_path / "stock")
    reopened = DDPMImagePipeline.from_pretrained(tmp_path / "stock")
    assert reopened.class_names == NAMES and reopened.unet.preprocessing == HOW
    reopened.optimize(compile=False)
    assert reopened.labels["cat"] == 2
    torch.testing.assert_close(run(reopened, class_labels="bee"), run(named, class_labels=1), rtol=0, atol=1e-4)


def test_a_network_without_names(make_pipeline):
    for pipeline in make_pipeline(), make_pipeline(num_class_embeds=3):
        assert pipeline.labels == {} and pipeline.class_names is None and pipeline.unet.preprocessing == {}
        with pytest.raises(ValueError, match="label='cat': the names of the classes are not known; give numbers"):
            pipeline.get_label_ids("cat")
    with pytest.raises(ValueError, match="class_labels='cat': the names of the classes are not known"):
        pipeline(1, class_labels="cat")


def test_labels_by_name(named):
    assert named.get_label_ids("cat") == [2] and named.get_label_ids(["bee", "ant", "bee"]) == [1, 0, 1]
    expected = run(named, class_labels=[2, 0])
    for labels in (["cat", "ant"], ("cat", 0), [2, "ant"]):
        torch.testing.assert_close(run(named, class_labels=labels), expected, rtol=0, atol=0)
    torch.testing.assert_close(run(named, class_labels="bee"), run(named, class_labels=1), rtol=0, atol=0)
    a, b = torch.rand(2, 2, 1, 8, 8) * 2 - 1
    actual, expected = (
        named.interpolate(
            a, b, [0.2, 0.8], 500, class_labels=labels, generator=torch.Generator().manual_seed(0),
            num_inference_steps=4, output_type="latent",
        ).images
        for labels in (["cat", "ant"], [2, 0])
    )  # fmt: skip
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    *_, (_, _, actual) = named.progressive(1, torch.Generator().manual_seed(0), 3, class_labels="cat")
    torch.testing.assert_close(actual, run(named, 1, class_labels=2))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("cats", "'cats' is not the name of a class; did you mean 'cat'?"),
        ("Bee", "'Bee' is not the name of a class; did you mean 'bee'?"),
        ("zebra", r"'zebra' is not the name of a class; known: \['ant', 'bee', 'cat'\]"),
        (["ant", "b"], "'b' is not the name of a class; did you mean 'bee'?"),
        ("z" * 5000, r"z\.\.\.z+' is not the name of a class"),
    ],
)
def test_names_that_are_not_known(named, label, message):
    for call in (named.get_label_ids, lambda label: named(2, class_labels=label)):
        with pytest.raises(ValueError, match=message) as error:
            call(label)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("names", ["cat", ["ant", "ant"], ["ant", 1], [], {"ant": 0}, ["a", "b", "c", "d"], 3])
def test_what_is_no_list_of_names(named, names):
    with pytest.raises(ValueError, match="class_names="):
        named.unet.class_names = names
    assert named.class_names == NAMES
    named.unet.register_to_config(_ddpm_hf={"class_names": names})  # as a stranger's config may hold it
    with pytest.raises(ValueError, match="class_names="):
        named.labels  # noqa: B018


@pytest.mark.parametrize("name", ["x" * 501, "\udc80"])
def test_names_that_could_not_be_read_again(named, tmp_path, name):
    """Refused when they are set, and of data before it is trained on."""
    with pytest.raises(
        ValueError, match="^class_names=.* must be a list of at most 100,000 texts of 500 .* shorter names$"
    ):
        named.unet.class_names = ["ant", "bee", name]
    config = TrainConfig(data="digits")
    with pytest.raises(ConfigError, match="^data='digits': class_names=.* must be"):
        record_data(named.unet, config, [name])
    assert named.unet.class_names == NAMES


def test_names_of_more_than_a_config_may_have():
    names = [f"{i:0500}" for i in range(10_000)]
    assert check_label_names(names[:5000]) == names[:5000]
    with pytest.raises(ValueError, match="3 MiB in all; give shorter names"):
        check_label_names(names)


def test_what_is_no_preprocessing(make_pipeline):
    unet = make_pipeline().unet
    for wrong in ({"background": 3}, {"colour": "red"}, ["black"], "black"):
        with pytest.raises(ValueError, match="preprocessing=.* must have texts by the keys background, crop"):
            unet.preprocessing = wrong
    for entry in ("text", [1]):
        with pytest.raises(ValueError, match="_ddpm_hf=.* must hold keys and values"):
            DDPMUNet.from_config({**unet.config, "_ddpm_hf": entry}).preprocessing  # noqa: B018
    with pytest.raises(ValueError, match="has 1 names, but this network has no classes"):
        unet.class_names = ["ant"]


def test_setting_one_keeps_the_others(make_pipeline):
    unet = make_pipeline(num_class_embeds=4, _ddpm_hf={"null_class": 3}).unet
    unet.class_names = ("ant", "bee", "cat")  # the label for no class has no name
    unet.preprocessing = HOW
    assert unet.null_class == 3 and unet.class_names == NAMES and unet.preprocessing == HOW
    unet.class_names = None
    assert unet.config["_ddpm_hf"] == {"null_class": 3, "preprocessing": HOW}


def test_a_classifier_that_was_set_later_is_saved(named, tmp_path):
    for classifier, saved in ((make_classifier(), True), (None, False)):
        named.classifier = classifier
        named.save_pretrained(tmp_path / str(saved))
        assert (tmp_path / str(saved) / "classifier/config.json").is_file() == saved
        assert (DDPMImagePipeline.from_pretrained(tmp_path / str(saved)).classifier is not None) == saved


def test_a_classifier_of_other_classes(named, make_pipeline):
    """Of as many, under other names or in another order, where the names of both are known."""
    for names in (["ant", "cat", "bee"], ["ant", "bee", "dog"]):
        named.classifier = make_classifier(names)
        with pytest.raises(ValueError, match="label [12] is '.*' of the network, '.*' of the classifier"):
            run(named, class_labels=1, classifier_scale=1.0)
    named.classifier = make_classifier(None)
    run(named, class_labels="bee", classifier_scale=1.0)
    unnamed = make_pipeline(num_class_embeds=3)
    unnamed.classifier = make_classifier()
    run(unnamed, class_labels=1, classifier_scale=1.0)
    unconditional = make_pipeline()
    unconditional.classifier = make_classifier()
    assert unconditional.labels == {"ant": 0, "bee": 1, "cat": 2}
    by_name, by_number = (run(unconditional, class_labels=label, classifier_scale=5.0) for label in ("bee", 1))
    torch.testing.assert_close(by_name, by_number, rtol=0, atol=0)


def test_two_stages(make_pipeline, named, tmp_path):
    net = make_pipeline(sample_size=16, num_class_embeds=3, channels=2, out_channels=1).unet
    upsampler = DDPMSuperResolutionPipeline(net, VariationalDDPMScheduler(), low_resolution=8)
    upsampler.unet.class_names = NAMES
    small = torch.zeros(2, 1, 8, 8)
    expected = run(upsampler, small, class_labels=[2, 0])
    torch.testing.assert_close(run(upsampler, small, class_labels=["cat", "ant"]), expected, rtol=0, atol=0)
    CascadePipeline(named, upsampler).save_pretrained(tmp_path)
    cascade = CascadePipeline.from_pretrained(tmp_path)
    cascade.set_progress_bar_config(disable=True)
    assert cascade.labels == {"ant": 0, "bee": 1, "cat": 2} and cascade.get_label_ids("cat") == [2]
    by_name, by_number = (run(cascade, 1, class_labels=label, upsampler_steps=3) for label in ("cat", 2))
    torch.testing.assert_close(by_name, by_number, rtol=0, atol=0)
    upsampler.unet.class_names = ["ant", "cat", "bee"]
    with pytest.raises(ValueError, match="label 1 is 'bee' of base, 'cat' of upsampler"):
        CascadePipeline(named, upsampler)
    assert CascadePipeline(make_pipeline(), upsampler).labels == {"ant": 0, "cat": 1, "bee": 2}


def test_held_out_data_without_one_of_the_classes(tmp_path):
    """Has the labels of the training data, whatever its own classes are; those of integers are called by them."""
    for folder, classes in (("train", "abc"), ("held_out", "cb"), ("integers", "21")):
        for name in classes:
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(3):
                Image.new("L", (8, 8), ord(name)).save(tmp_path / folder / name / f"{i}.png")
    rows = {"image": [Image.new("L", (8, 8), i) for i in range(4)], "label": [0, 1, 2, 2]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    for data, held_out, expected, labels in (
        ("train", "held_out", ["a", "b", "c"], {98: 1, 99: 2}),
        ("rows.parquet", "integers", ["0", "1", "2"], {49: 1, 50: 2}),
    ):
        arguments = ["--data", tmp_path / data, "--eval_data", tmp_path / held_out, "--eval_split", "train"]
        arguments += ["--label_column", "label", "--unet.num_class_embeds", 3, "--scheduler.levels", 256]
        config, *_ = load_config([*map(str, arguments), "--output_dir", str(tmp_path / "run")])
        names = open_images(config).class_names
        x_start, class_labels = held_out_images(config, names)
        pixels = ((x_start[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        assert names == expected and len(pixels) == 6
        assert [labels[pixel] for pixel in pixels] == class_labels.tolist()
