"""What a config leaves open: found in the data, or taken from the pipeline that a run begins with."""

import inspect
import json
import types

import accelerate
import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from PIL import Image

from ddpm_hf import DDPMImagePipeline, VariationalDDPMScheduler, VPSDEScheduler
from ddpm_hf.schedulers import conditioning_times
from ddpm_hf.training.command_line import load_config
from ddpm_hf.training.config import ClassifierConfig, ConfigError, as_yaml
from ddpm_hf.training.diffusion import DiffusionTask
from ddpm_hf.training.from_pipeline import check_class_names
from ddpm_hf.training.header import print_header
from ddpm_hf.training.inputs import held_out_images, open_images
from ddpm_hf.training.resolve import resolve
from ddpm_hf.training.resume import checkpoint_to_resume
from ddpm_hf.training.trackers import open_trackers
from support.scripts import script
from support.versions import needs


def resolved(*argv, kind=None):
    config, _ = load_config([str(argument) for argument in argv], *([kind] if kind else []))
    return resolve(config)


def pictures(folder, count, size, color=(200, 30, 30), mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    for i in range(count):
        pixels = noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8) if color else None
        image = Image.fromarray(pixels) if color else Image.new("RGB", size, (i, i, i))
        image.convert(mode).save(folder / f"{i:03}.png")


# the data


def test_a_folder_of_classes(tmp_path, monkeypatch, capsys):
    """Side 28 (their median, divisible by 4), colors, two classes, 5 % of 40 held out, a network of two halvings."""
    for name, size in (("cat", (30, 28)), ("dog", (28, 40))):
        pictures(tmp_path / "my pets" / name, 20, size)
    monkeypatch.chdir(tmp_path)
    config = resolved("--data", "my pets")
    assert (config.image_size, config.channels, config.label_column, config.classes) == (28, 3, "label", 2)
    assert (config.output_dir, config.held_out, config.batch_size) == ("runs/my-pets", 0.05, 38)
    assert config.unet["block_out_channels"] == [128, 256, 256] and config.scheduler == {}
    assert config.unet["down_block_types"] == [
        "DownBlock2D",
        "AttnDownBlock2D",
        "DownBlock2D",
    ]  # attention at 14 pixels
    assert config.unet["up_block_types"] == ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
    print_header(config, 1_234_567)
    printed = capsys.readouterr().err
    assert printed.startswith("train.py: data='my pets': 40 images\n  image_size=28 (") and "with 2 classes" in printed
    assert "\n  held_out=0.05 (2 images" in printed
    assert "\n  unet.block_out_channels=128,256,256\n  steps=1000, batch_size=38, learning_rate=0.0002\n" in printed
    assert "\n  1.23 M parameters, output_dir=runs/my-pets\nEach can be given as --key value" in printed
    (tmp_path / "written.yaml").write_text(as_yaml(config))
    assert as_yaml(resolved("--config", "written.yaml")) == as_yaml(config)  # all is said: the data is not looked at
    assert not capsys.readouterr().err
    with torch.device("meta"):
        assert DiffusionTask(config).network.config.sample_size == (28, 28)


@pytest.mark.parametrize(
    ("sizes", "side"),
    [([(8, 8)], 8), ([(5, 5)], 8), ([(50, 90)], 48), ([(300, 200)], 64), ([(16, 16), (16, 99), (40, 40)], 16)],
)
def test_the_size_of_pictures(tmp_path, sizes, side):
    for i, size in enumerate(sizes):
        pictures(tmp_path / "data", 1, size)
        (tmp_path / "data/000.png").rename(tmp_path / f"data/{i + 7}.png")
    config = resolved("--data", tmp_path / "data", "--output_dir", tmp_path / "run")
    assert config.image_size == side and config.label_column is None and config.batch_size == len(sizes)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_pictures_without_color_have_one_channel(tmp_path, mode):
    pictures(tmp_path / "data", 3, (8, 8), color=None, mode=mode)
    arguments = ["--data", tmp_path / "data", "--output_dir", tmp_path / "run"]
    assert resolved(*arguments).channels == 1 and resolved(*arguments, "--channels", 4).channels == 4
    hidden = Image.new("RGBA", (8, 8), (255, 0, 0, 0))  # its red shows nowhere
    hidden.save(tmp_path / "data/hidden.png")
    assert resolved(*arguments).channels == 1
    hidden.putpixel((3, 3), (255, 0, 0, 9))
    hidden.save(tmp_path / "data/hidden.png")
    assert resolved(*arguments).channels == 3


def test_what_is_given_stays(tmp_path):
    pictures(tmp_path / "data/a", 30, (32, 32))
    pictures(tmp_path / "data/b", 30, (32, 32))
    (tmp_path / "mine.yaml").write_text("data: data\nimage_size: 16\nunet:\n  block_out_channels: [8, 16]\n")
    arguments = ["--config", tmp_path / "mine.yaml", "--data", tmp_path / "data", "--output_dir", tmp_path / "run"]
    config = resolved(*arguments, "--label_column", "null", "--batch_size", 3, "--eval_every", 0, "--unet.dropout", 0)
    assert (config.image_size, config.label_column, config.classes, config.batch_size) == (16, None, None, 3)
    assert (config.held_out, config.eval_every, config.unet["dropout"]) == (0, 0, 0)
    assert config.unet["norm_num_groups"] == 8 and config.unet["down_block_types"] == ["AttnDownBlock2D", "DownBlock2D"]
    block_types = [
        "--unet.down_block_types",
        "DownBlock2D,DownBlock2D",
        "--unet.up_block_types",
        "[UpBlock2D, UpBlock2D]",
    ]
    assert resolved(*arguments, *block_types).unet == {
        "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
        "num_class_embeds": 2,
    }  # fmt: skip


def test_built_in_data_without_a_preset(tmp_path):
    config = resolved("--data", "digits", "--output_dir", tmp_path)
    assert (config.image_size, config.channels, config.scheduler, config.classes) == (8, 1, {"levels": 17}, 10)
    assert config.held_out == 0 and config.eval_every == 1000  # there is a test split
    config = resolved("--data", "digits", "--output_dir", tmp_path, kind=ClassifierConfig)
    assert (config.image_size, config.channels, config.classes) == (8, 1, 10)
    assert load_config([])[0].preset == "digits" and load_config(["--config", "mnist"])[0].preset == "mnist"


@pytest.mark.parametrize(("side", "parameters"), [(32, 35.7e6), (256, 114e6)])
def test_networks_fit_the_size(tmp_path, side, parameters):
    """35.7 and 114 million are those of Ho et al., CIFAR-10 and CelebA-HQ."""
    pictures(tmp_path / "data", 1, (8, 8))
    config = resolved("--data", tmp_path / "data", "--image_size", side, "--output_dir", tmp_path / "run")
    with torch.device("meta"):
        assert DiffusionTask(config).network.num_parameters() == pytest.approx(parameters, rel=0.005)


def test_the_images_held_out_are_not_trained_on(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(40):
        Image.new("L", (8, 8), i).save(tmp_path / f"data/{i}.png")
    config = resolved("--data", tmp_path / "data", "--output_dir", tmp_path / "run", "--held_out", "0.2")
    trained = {image.getpixel((0, 0)) for image in open_images(config).images["image"]}
    x_start, labels = held_out_images(config, None)
    held_out = {round((value + 1) * 127.5) for value in x_start[:, 0, 0, 0].tolist()}
    assert labels is None and len(held_out) == 8 and len(trained) == 32 and not trained & held_out
    assert trained | held_out == set(range(40)) and not held_out <= set(range(32, 40))
    for extra, message in (
        (["--streaming"], "is not for streams"),
        (["--eval_data", "x"], "name held-out images twice"),
    ):
        with pytest.raises(ConfigError, match=f"held_out=0.2 .*{message}"):
            resolved("--data", tmp_path / "data", "--held_out", "0.2", *extra)


def test_own_pictures_from_nothing_to_a_pipeline(tmp_path):
    """As a user begins: a folder of pictures, no config; and the same command again knows what was found."""
    for name in "ab":
        pictures(tmp_path / "data" / name, 15, (9, 9))
    arguments = [
        "--data",
        tmp_path / "data",
        "--output_dir",
        tmp_path / "run",
        "--lr_schedule",
        "constant",
        "--eval_every",
        2,
    ]
    arguments += ["--sample_count", 2, "--sample_steps", 2, "--eval_images", 1, "--eval_evaluations", 8]
    arguments += ["--unet.block_out_channels", "8,16"]
    script("train.py", *arguments, "--steps", 2)
    pipeline = DDPMImagePipeline.from_pretrained(tmp_path / "run/pipeline")
    assert pipeline.unet.config.num_class_embeds == 2 and tuple(pipeline.unet.config.sample_size) == (8, 8)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["held_out"] == 0.05
    pictures(tmp_path / "data/a", 1, (300, 300))
    resumed = script("train.py", *arguments, "--steps", 3, "--learning_rate", 0.01)
    assert "their shorter side" not in resumed.stderr and "image_size=8, channels=3, 2 classes" in resumed.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in rows if "learning_rate" in row] == [0.0002, 0.01]
    assert [row["step"] for row in rows if "bits_per_dim" in row] == [2, 3]


# a pipeline


@pytest.fixture
def saved(tmp_path, make_pipeline):
    def save(name="pipeline", **components):
        make_pipeline(**components).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def test_the_process_is_the_pipelines(tmp_path, saved):
    """A cosine pipeline stays one, whatever the preset's process; what changes no learned thing may be changed."""
    process = VariationalDDPMScheduler(200, beta_schedule="cosine", prediction_type="v_prediction", levels=256)
    folder = saved(scheduler=process, channels=3, sample_size=16)
    arguments = ["--config", "mnist", "--data", "digits", "--init_from", folder, "--output_dir", tmp_path / "run"]
    arguments += ["--sample_steps", "50"]
    config = resolved(*arguments, "--unet.dropout", 0.3, "--scheduler.variance_type", "fixed_large")
    assert (config.image_size, config.channels, config.unet["dropout"]) == (16, 3, 0.3)
    task = DiffusionTask(config)
    unet, scheduler = task.network, task.scheduler
    torch.testing.assert_close(scheduler.betas, process.betas, rtol=0, atol=0)
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.variance_type == "fixed_large"
    assert scheduler.levels == 17  # the data's
    assert unet.config.block_out_channels == [8, 16]
    same = ["--scheduler.beta_schedule", "cosine", "--scheduler.num_train_timesteps", 200, "--unet.norm_num_groups", 4]
    torch.testing.assert_close(
        DiffusionTask(resolved(*arguments, *same)).scheduler.betas, process.betas, rtol=0, atol=0
    )
    for extra, message in (
        (["--scheduler.beta_schedule", "linear"], "scheduler.beta_schedule='linear', but .* with 'cosine'"),
        (["--scheduler.num_train_timesteps", 100], "scheduler.num_train_timesteps=100, but .* with 200"),
        (["--scheduler.prediction_type", "epsilon"], "prediction_type='epsilon', but .* with 'v_prediction'"),
        (["--unet.block_out_channels", "[8, 32]"], r"unet.block_out_channels=\[8, 32\], but .* has \[8, 16\]"),
        (["--process", "vp"], "process='vp', but .* has 'ddpm'"),
        (["--channels", 1], "channels=1, but .* has 3"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            resolved(*arguments, *extra)
        assert "\n" not in str(caught.value) and "init_from=" in str(caught.value)
    (tmp_path / "mine.yaml").write_text("base: mnist\nscheduler:\n  beta_schedule: linear\n")
    arguments[1] = tmp_path / "mine.yaml"  # of a file of the user's it is asked for
    with pytest.raises(ConfigError, match="scheduler.beta_schedule='linear', but"):
        resolved(*arguments)


def test_a_network_that_stock_does_not_have(tmp_path, saved):
    """The settings that its config keeps apart are the pipeline's, too."""
    folder = saved(num_attention_heads=2, block_scale_factor=1.5)
    arguments = ["--init_from", folder, "--output_dir", tmp_path / "run"]
    config = resolved(*arguments, "--unet.num_attention_heads", 2)
    assert (config.unet["num_attention_heads"], config.unet["block_scale_factor"]) == (2, 1.5)
    network, original = DiffusionTask(config).network, DDPMImagePipeline.from_pretrained(folder).unet
    assert network.arguments == {**original.arguments, "sample_size": (8, 8)}
    with pytest.raises(ConfigError, match="unet.num_attention_heads=4, but the network of .* has 2; leave it out"):
        resolved(*arguments, "--unet.num_attention_heads", 4)
    chosen = resolved("--config", "digits", "--unet.num_attention_heads", 2, "--output_dir", tmp_path / "new")
    assert DiffusionTask(chosen).network.mid_block.attentions[0].heads == 2


def test_a_stock_pipeline(tmp_path):
    kwargs = dict(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, down_block_types=["DownBlock2D"] * 2
    )
    unet = UNet2DModel(16, **kwargs, up_block_types=["UpBlock2D"] * 2)
    for scheduler in (DDPMScheduler(beta_schedule="squaredcos_cap_v2"), DDIMScheduler(beta_end=0.03)):
        DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "stock")
        config = resolved("--init_from", tmp_path / "stock", "--output_dir", tmp_path / "run")
        torch.testing.assert_close(DiffusionTask(config).scheduler.betas.float(), scheduler.betas, rtol=1e-3, atol=0)


def test_an_optimized_chain(tmp_path, saved):
    """Variances and lists that were computed after training do not outlive more training."""
    chain = dict(variance_type="analytic", x_start_mse=[0.1] * 20, timestep_lists={"optimal": {"1": [3]}})
    folder = saved(scheduler=VariationalDDPMScheduler(20, **chain))
    words = ["--init_from", folder, "--output_dir", tmp_path / "run", "--sample_steps", 10]
    scheduler = DiffusionTask(resolved(*words)).scheduler
    assert (scheduler.variance_type, scheduler.timestep_lists) == ("fixed_small", {})
    assert not scheduler.config["_ddpm_hf"].keys() & chain.keys()
    words += ["--scheduler.variance_type", "fixed_large"]
    assert DiffusionTask(resolved(*words)).scheduler.variance_type == "fixed_large"


def test_a_pipeline_of_continuous_time(tmp_path, saved):
    folder = saved(scheduler=VPSDEScheduler(beta_max=15.0))
    arguments = ["--init_from", folder, "--output_dir", tmp_path / "run", "--scheduler.predictor", "ddim"]
    config = resolved(*arguments)
    assert (config.process, config.scheduler["beta_max"], config.scheduler["predictor"]) == ("vp", 15.0, "ddim")
    with pytest.raises(ConfigError, match=r"scheduler.beta_max=20.0, but .* trained with 15.0"):
        resolved(*arguments, "--scheduler.beta_max", "20.0")


@pytest.mark.parametrize("cls", [None, DDIMScheduler, DPMSolverMultistepScheduler])
def test_what_a_network_is_told_is_the_pipelines(tmp_path, saved, cls):
    process = VariationalDDPMScheduler(4000, beta_schedule="cosine", rescale_timesteps=True)
    folder = saved(scheduler=process if cls is None else cls.from_config(process.config))
    arguments = ["--init_from", folder, "--output_dir", tmp_path / "run", "--sample_steps", "50"]
    for extra in [], ["--scheduler.rescale_timesteps", "true"]:
        config = resolved(*arguments, *extra)
        scheduler = DiffusionTask(config).scheduler
        assert config.scheduler["rescale_timesteps"] is True and conditioning_times(scheduler, 8) == 2
        torch.testing.assert_close(scheduler.betas, process.betas, rtol=1e-6, atol=0)
    with pytest.raises(ConfigError, match="scheduler.rescale_timesteps=False, but the network of .* trained with True"):
        resolved(*arguments, "--scheduler.rescale_timesteps", "false")


def test_discrete_noise_levels(tmp_path):
    arguments = ["--data", "digits", "--process", "ve", "--scheduler.conditioning", "level_index"]
    arguments += ["--output_dir", tmp_path / "run"]
    with pytest.raises(ConfigError, match="^scheduler.conditioning=level_index: held-out bits/dim .* --eval_every 0"):
        resolved(*arguments, "--eval_every", 5)
    task = DiffusionTask(resolved(*arguments, "--eval_every", 0))
    assert task.scheduler.sde.has_levels and task.network.config.time_embedding_type == "positional"


def test_classes_keep_their_labels(tmp_path, make_pipeline):
    """A name that both have must have one label; others are new classes."""
    pipeline = make_pipeline(num_class_embeds=2)
    pipeline.unet.class_names = ["cat", "dog"]
    pipeline.save_pretrained(tmp_path / "pipeline")
    config, _ = load_config(["--init_from", str(tmp_path / "pipeline"), "--output_dir", str(tmp_path / "run")])
    for names in (["cat", "dog"], ["cow", "hen"], ["cat", "hen"], None):
        check_class_names(config, names)
    with pytest.raises(
        ConfigError, match="its label 1 is 'dog', which is 0 in the data; give data with the classes cat, dog"
    ):
        check_class_names(config, ["dog", "cat"])


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", ['{"_use_default_values": null}', "[" * 100_000])
def test_a_config_that_cannot_be_used_is_named(tmp_path, saved, file, content):
    path = saved() / file
    if content[0] == "{":
        content = json.dumps(json.loads(path.read_text()) | json.loads(content))
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"^init_from='{tmp_path}/pipeline': .*{path}") as caught:
        resolved("--init_from", tmp_path / "pipeline", "--output_dir", tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_names_of_strangers_are_shortened(tmp_path, make_pipeline):
    pipeline = make_pipeline(num_class_embeds=1000)
    pipeline.unet.class_names = ["\x1b[2J", *(f"class {i}" for i in range(999))]
    pipeline.save_pretrained(tmp_path / "pipeline")
    config, _ = load_config(["--init_from", str(tmp_path / "pipeline"), "--output_dir", str(tmp_path / "run")])
    with pytest.raises(ConfigError, match="its label 1 is 'class 0', which is 0 in the data; ") as caught:
        check_class_names(config, ["class 0", "\x1b[2J"])
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 400


@needs("accelerate", "1.9", "it has no trackio")
def test_what_trackers_are_given(tmp_path):
    """By the names that accelerate's trackers take: project, and a run's name that is its folder's unless given."""
    calls = []
    accelerator = types.SimpleNamespace(init_trackers=lambda *arguments: calls.append(arguments))
    for extra, name in (([], "run"), (["--tracker_run", "second"], "second")):
        config, _ = load_config(["--output_dir", str(tmp_path / "run"), "--tracker_project", "mine", *extra])
        open_trackers(config, accelerator)
        project, values, names = calls.pop()
        assert project == "mine" and values["seed"] == "0" and names["wandb"] == {"name": name}
    for tracker, arguments in names.items():  # each class passes them on, or takes them itself
        assert tracker in accelerate.tracking.LOGGER_TYPE_TO_CLASS
        parameters = inspect.signature(accelerate.tracking.LOGGER_TYPE_TO_CLASS[tracker]).parameters
        assert "kwargs" in parameters or arguments.keys() <= parameters.keys()


def test_a_learned_variance_is_trained(tmp_path, saved):
    folder = saved(scheduler=VariationalDDPMScheduler(variance_type="learned_range"), out_channels=2)
    arguments = ["--init_from", folder, "--output_dir", tmp_path / "run"]
    config = resolved(*arguments)
    assert (config.loss, config.channels, config.scheduler["variance_type"]) == ("hybrid", 1, "learned_range")
    assert resolved(*arguments, "--loss", "vlb").loss == "vlb"


def test_resuming_what_began_with_a_pipeline(tmp_path, saved):
    """Without opening the pipeline, and compared with what was asked for."""
    folder = saved(scheduler=VariationalDDPMScheduler(200, beta_schedule="cosine"))
    arguments = ["--init_from", folder, "--output_dir", tmp_path / "run", "--sample_steps", "50"]
    config = resolved(*arguments, "--unet.dropout", 0.3)
    for path in (tmp_path / "run", tmp_path / "run/checkpoints/0000005"):
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").write_text(as_yaml(config))
    folder.rename(tmp_path / "away")
    repeated = resolved(*arguments, "--unet.dropout", 0.3)
    assert as_yaml(repeated) == as_yaml(config) and checkpoint_to_resume(repeated).name == "0000005"
    assert as_yaml(resolved(*arguments)) == as_yaml(config)  # not said again, as it was
    for extra, message in (
        (["--unet.dropout", "0.1"], "^unet.dropout=0.1, but .*0000005 was trained with 0.3; "),
        (["--scheduler.beta_schedule", "linear"], "^scheduler.beta_schedule='linear', but .* with 'cosine'; "),
    ):
        with pytest.raises(ConfigError, match=message):
            resolved(*arguments, *extra)
