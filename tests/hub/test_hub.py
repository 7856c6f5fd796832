"""Publishing to, and opening from, a Hub: the one of conftest.py on 127.0.0.1."""

import json
import re
import shutil
import traceback

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import EMAModel
from huggingface_hub import ModelCard, constants
from PIL import Image

from ddpm_hf import DDPMImagePipeline, VariationalDDPMScheduler, VPSDEScheduler
from ddpm_hf.data.sources import digits, load_images
from ddpm_hf.hub.card import model_card, write_model_card
from ddpm_hf.hub.errors import HubError
from ddpm_hf.hub.records import weights_digest
from ddpm_hf.hub.upload import push_folder
from support.elsewhere import ROUNDING, open_elsewhere, run_elsewhere


def images_of(pipeline, **kwargs):
    generator = torch.Generator().manual_seed(0)
    kwargs = kwargs if "timesteps" in kwargs else {"num_inference_steps": 20, **kwargs}
    return pipeline(batch_size=2, generator=generator, output_type="np", **kwargs).images


@pytest.fixture
def saved(make_pipeline, tmp_path):
    """A folder as train.py and evaluate.py leave it."""
    scheduler = VariationalDDPMScheduler(beta_schedule="cosine", timestep_spacing="iddpm", levels=17)
    folder = tmp_path / "run/pipeline"
    make_pipeline(scheduler=scheduler).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(TRAINING))
    write_model_card(folder)
    return folder


TRAINING = {
    "preset": "iddpm-cifar10", "data": "digits", "split": "train", "steps": 7, "batch_size": 2, "ema_decay": 0.5,
    "gradient_accumulation_steps": 3, "learning_rate": 0.1, "loss": "simple", "seed": 0, "hub_dataset": "user/images",
    "versions": {"torch": "2.0"},
}  # fmt: skip


def classes(opener):
    ours = "DDPMImagePipeline DDPMUNet VariationalDDPMScheduler"
    return "DDPMPipeline UNet2DModel DDPMScheduler" if opener == "stock" else ours


# from a folder, all of them are in test_pipeline.py
SLOW = [pytest.param(opener, marks=pytest.mark.slow) for opener in ("stock", "remote", "package", "branch")]


@pytest.mark.parametrize("opener", SLOW)
def test_who_opens_what(hub, saved, tmp_path, opener):
    push_folder(saved, f"user/opened-{opener}")
    pipe = DDPMImagePipeline.from_pretrained(saved)
    # stock classes read "iddpm" spacing as "leading"
    here = images_of(pipe, timesteps=range(950, -1, -50)) if opener == "stock" else images_of(pipe)
    output = open_elsewhere(opener, f"user/opened-{opener}", tmp_path / "out", tmp_path / "home", steps=20)
    assert classes(opener) in output and "messages: []" in output
    images = np.load(tmp_path / "out.npy")
    if opener == "stock":  # steps in its own order
        np.testing.assert_allclose(images, here, atol=1 / 255)
    else:
        np.testing.assert_allclose(images, here, atol=ROUNDING)
    weights, expected = (
        torch.load(tmp_path / "out.pt"),
        DDPMImagePipeline.from_pretrained(saved).unet.state_dict(),
    )
    assert weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in expected)


def test_what_is_published(hub, saved):
    (saved / "optimizer.bin").write_bytes(b"x")
    (saved / "checkpoints").mkdir()
    (saved / "checkpoints/model.safetensors").write_bytes(b"x")
    (saved / "notes.txt").write_text("mine")
    for name in ("samples.png", "animation.webp", "animation.mp4"):
        (saved / name).write_bytes(b"x")
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    info = push_folder(saved, "user/published", license="mit", private=True, commit_message="First")
    assert info.commit_url.startswith(f"{hub.url}/user/published/commit/")
    files = hub.files("user/published")
    assert sorted(files) == [
        "README.md", "animation.webp", "model_index.json", "pipeline.py", "samples.png", "scheduler/scheduler_config.json",
        "training.json",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    repository = hub.repositories["model", "user/published"]
    assert repository["private"] and repository["log"][1:] == [("main", "First"), ("remote-code", "First")]
    other = hub.files("user/published", "remote-code")
    assert {name for name in files if files[name] != other[name]} == {"model_index.json"}
    uploads = [request for request in hub.requests if request[0] == "PUT"]
    weights = {**hub.repositories["model", "user/published"]["commits"][repository["branches"]["main"]]}
    sha = weights["unet/diffusion_pytorch_model.safetensors"]["sha256"]
    assert sum(sha in path for _, path, _ in uploads) == 1  # for both branches
    assert before == {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    card = ModelCard(files["README.md"].decode())
    assert (
        card.data.license == "mit" and card.data.datasets == ["user/images"] and card.data.library_name == "diffusers"
    )
    assert (
        "Begun from preset `iddpm-cifar10`. " in card.text
        and "7 optimizer steps" in card.text
        and '"user/published"' in card.text
        and "torch 2.0" in card.text
    )
    assert "![from noise to samples](animation.webp)" in card.text and "animation.gif" not in card.text
    assert "![samples](samples.png)" in card.text and "Not measured" in card.text and card.data.eval_results is None


def test_pushing_again_sends_what_is_missing(hub, saved):
    push_folder(saved, "user/again")
    log = len(hub.repositories["model", "user/again"]["log"])
    push_folder(saved, "user/again")
    assert len(hub.repositories["model", "user/again"]["log"]) == log  # no empty commit
    evaluation = {"total": 3.0, "standard_error": 0.1, "prior": 0.0, "kl": 2.5, "decoder": 0.5, "first_timestep": 0}
    evaluation |= {"images": 4, "split": "test", "data": "digits", "steps": 1000, "seed": 0, "sampling_error": None}
    evaluation |= {"command": "python training/evaluate.py pipeline --images 4"}
    (saved / "evaluation.json").write_text(json.dumps(evaluation))
    write_model_card(saved)
    uploads = sum(method == "PUT" for method, *_ in hub.requests)
    push_folder(saved, "user/again")
    assert sum(method == "PUT" for method, *_ in hub.requests) == uploads
    card = ModelCard(hub.files("user/again")["README.md"].decode())
    result = card.data.eval_results[0]
    assert (result.metric_value, result.dataset_name, result.dataset_split) == (3.0, "digits", "test")
    command = "python training/evaluate.py user/again --images 4"
    assert result.metric_args == {"command": command} and f"`{command}`" in card.text
    assert f"`{evaluation['command']}`" in (saved / "README.md").read_text()  # of the folder
    (saved / "README.md").write_text("---\nlibrary_name: diffusers\n---\nMine\n")
    push_folder(saved, "user/again")
    assert hub.files("user/again")["README.md"].endswith(b"Mine\n")


def test_a_pipeline_pushes_itself(hub, saved, make_pipeline, tmp_path):
    push_folder(saved, "user/itself")
    files = hub.files("user/itself")
    pipeline = DDPMImagePipeline.from_pretrained("user/itself", cache_dir=tmp_path / "a")
    log = len(hub.repositories["model", "user/itself"]["log"])
    pipeline.push_to_hub("user/itself")
    assert hub.files("user/itself") == files and len(hub.repositories["model", "user/itself"]["log"]) == log
    # other weights: the numbers of the old ones are removed
    other = make_pipeline(scheduler=pipeline.scheduler)
    other.unet.conv_in.bias.data.add_(1)
    other.push_to_hub("user/itself", commit_message="Other weights")
    files = hub.files("user/itself")
    assert "training.json" not in files and b"Not recorded" in files["README.md"]
    other.push_to_hub("user/itself", create_pr=True)
    other.unet.conv_in.bias.data.add_(1)
    info = other.push_to_hub("user/itself", create_pr=True)
    assert info.pr_url.startswith(f"{hub.url}/user/itself/discussions/") and hub.files("user/itself") == files
    other.save_pretrained(tmp_path / "itself", push_to_hub=True, revision="trial", repo_id="user/itself")
    assert hub.files("user/itself") == files and hub.files("user/itself", "trial") != files
    assert not (tmp_path / "itself/README.md").exists()
    other.save_pretrained(tmp_path / "named-by-folder", push_to_hub=True)
    assert "model_index.json" in hub.files("user/named-by-folder")


def test_a_pipeline_pushes_what_its_folder_has_beside_the_weights(hub, saved, tmp_path):
    """The same files as push.py sends, as long as the weights are those of the folder."""
    evaluation = {**EVALUATION, "weights": weights_digest(saved)}
    (saved / "evaluation.json").write_text(json.dumps(evaluation))
    for name in (
        "samples.png",
        "animation.gif",
        "training.png",
        "evaluation.png",
        "evaluation.csv",
        "LICENSE",
        "notes.txt",
    ):
        (saved / name).write_bytes(name.encode())
    write_model_card(saved)
    push_folder(saved, "user/by-folder")
    pipeline = DDPMImagePipeline.from_pretrained(saved)
    pipeline.push_to_hub("user/by-itself")
    files, others = hub.files("user/by-folder"), hub.files("user/by-itself")
    assert (
        files.keys() == others.keys()
        and {"samples.png", "animation.gif", "evaluation.csv", "training.json", "LICENSE"} <= files.keys()
    )
    assert all(files[name] == others[name] for name in files if name != "README.md")
    assert files["README.md"].replace(b"by-folder", b"by-itself").rpartition(b"<!--")[0] in others["README.md"]
    opened = DDPMImagePipeline.from_pretrained("user/by-folder", cache_dir=tmp_path)
    assert opened.folder.parent.name == "snapshots" and opened.config._name_or_path == "user/by-folder"
    opened.push_to_hub("user/by-hub")
    repeated = hub.files("user/by-hub")
    assert repeated.keys() == files.keys() and all(
        files[name] == repeated[name] for name in files if name != "README.md"
    )
    (saved / "samples.png").unlink()
    (saved / "samples.png").symlink_to(__file__)
    with pytest.raises(ValueError, match="samples.png is a link to outside"):
        pipeline.push_to_hub("user/by-itself")
    pipeline.unet.conv_in.bias.data.add_(1)
    pipeline.push_to_hub("user/by-itself-changed")
    assert (
        not {"samples.png", "animation.gif", "evaluation.json", "training.json"}
        & hub.files("user/by-itself-changed").keys()
    )


@pytest.mark.parametrize(
    "fault, token, name, message",
    [
        (None, "nobody", "user/broken", "no valid token; run `hf auth login`"),
        (None, "reader", "user/broken", "this token may not write there"),
        (None, "writer", "other/broken", "this token may not write there"),
        (None, "writer", "user/bro ken", "is no name of a repository"),
        (dict(match="POST .*/commit/main", do="drop"), "writer", "user/broken", "was not reached or broke off"),
        (dict(match="POST .*/commit/main", do=412), "writer", "user/broken", "push again"),
        (dict(match="POST .*/commit/main", do=409), "writer", "user/broken", "taken by somebody else"),
        (dict(match="POST .*/commit/main", do=500), "writer", "user/broken", "the Hub answered 500; nothing is lost"),
        (dict(match="PUT /signed", do=403, times=9), "writer", "user/broken", "may not write"),
        (dict(match="POST /api/repos/create", do="drop", times=9), "writer", "user/broken", "was not reached"),
        (
            dict(match="POST .*/commit/remote-code", do=500),
            "writer",
            "user/broken",
            r"user/broken/commit/\w+ is published, but "
            "not yet its branch 'remote-code': push again to complete it .*the Hub answered 500",
        ),
        (
            dict(match="POST .*/branch/remote-code", do=404),
            "writer",
            "user/broken",
            "is published, but not yet its branch",
        ),
    ],
)
def test_a_push_that_breaks(hub, saved, fault, token, name, message):
    push_folder(saved, "user/broken")
    before, local = hub.files("user/broken"), {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    pipeline = DDPMImagePipeline.from_pretrained(saved)
    pipeline.unet.conv_in.bias.data.fill_(len(hub.requests))  # as nobody has sent before
    other = saved.parent / "other"
    pipeline.save_pretrained(other)
    hub.faults[:] = [fault] if fault else []
    with pytest.raises(HubError, match=message) as caught:
        push_folder(other, name, token=token)
    hub.faults.clear()
    assert "\n" not in str(caught.value) and name in str(caught.value)
    assert token not in str(caught.value)
    if not fault or "remote-code" not in fault["match"]:
        assert hub.files("user/broken") == before
    assert local == {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    push_folder(other, "user/broken", token="writer")  # and again, without the fault
    assert hub.files("user/broken")["model_index.json"] == before["model_index.json"]
    weights = "unet/diffusion_pytorch_model.safetensors"
    for branch in "main", "remote-code":
        assert hub.files("user/broken", branch)[weights] == (other / weights).read_bytes()


def test_an_upload_that_is_cut_once_is_sent_again(hub, saved):
    hub.faults[:] = [
        dict(match="PUT /signed", do="drop"),
        dict(match="POST .*/commit/main", do=0.5),
    ]  # and a slow commit
    DDPMImagePipeline.from_pretrained(saved).push_to_hub("user/cut")
    hub.faults.clear()
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert hub.files("user/cut")[weights] == (saved / weights).read_bytes()


def test_folders_that_are_not_published(hub, saved, make_pipeline, tmp_path):
    requests = len(hub.requests)

    def refused(folder, message):
        with pytest.raises(ValueError, match=message) as caught:
            push_folder(folder, "user/never")
        assert "\n" not in str(caught.value)

    refused(tmp_path, "is no pipeline: it has no model_index.json")
    make_pipeline().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    refused(tmp_path / "pickled", r"pickled/unet/diffusion_pytorch_model.bin is a pickle.*save_pretrained")
    shutil.copytree(saved, tmp_path / "mixed")
    make_pipeline(channels=3).unet.save_pretrained(tmp_path / "three")
    shutil.copy(tmp_path / "three/config.json", tmp_path / "mixed/unet")
    refused(
        tmp_path / "mixed", r"holds 'conv_in.weight' of shape \[8, 1, 3, 3\], its config.json asks for \[8, 3, 3, 3\]"
    )
    shutil.copytree(saved, tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost/scheduler")
    refused(tmp_path / "lost", "lost/scheduler has no config")
    diffusers.DDPMPipeline.from_pretrained(saved).save_pretrained(tmp_path / "stock")
    refused(tmp_path / "stock", "was not saved by DDPMImagePipeline .* save it again")
    assert len(hub.requests) == requests and ("model", "user/never") not in hub.repositories


def test_another_models_repository_is_not_overwritten(hub, saved):
    repository = hub.create("user/taken")
    entry = hub.entry("model_index.json", b'{"_class_name": "StableDiffusionPipeline"}')
    hub.commit(repository, "main", {"model_index.json": entry}, "other")
    with pytest.raises(HubError, match="user/taken holds a StableDiffusionPipeline already; choose another name"):
        push_folder(saved, "user/taken")


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_other_schedulers_are_published_as_they_are(hub, saved, tmp_path, scheduler):
    pipeline = DDPMImagePipeline.from_pretrained(saved)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.push_to_hub(f"user/{scheduler.__name__}")
    reopened = DDPMImagePipeline.from_pretrained(f"user/{scheduler.__name__}", cache_dir=tmp_path / "cache")
    assert type(reopened.scheduler) is scheduler
    np.testing.assert_allclose(images_of(reopened), images_of(pipeline), atol=ROUNDING)


def test_variants_shards_and_dtypes(hub, saved, tmp_path):
    pipeline = DDPMImagePipeline.from_pretrained(saved)
    pipeline.push_to_hub("user/variants", max_shard_size="20KB")
    files = hub.files("user/variants")
    assert sum(name.endswith(".safetensors") for name in files) > 1
    half = DDPMImagePipeline.from_pretrained(saved, torch_dtype=torch.float16)
    half.push_to_hub("user/variants", variant="fp16")
    reopened = DDPMImagePipeline.from_pretrained("user/variants", cache_dir=tmp_path / "a")
    np.testing.assert_allclose(images_of(reopened), images_of(pipeline), atol=ROUNDING)
    read = DDPMImagePipeline.from_pretrained(
        "user/variants", variant="fp16", torch_dtype=torch.float16, cache_dir=tmp_path
    )
    assert read.unet.dtype == torch.float16 and torch.equal(read.unet.conv_in.weight, half.unet.conv_in.weight)


def test_stock_repositories_open_as_ours(hub, tmp_path):
    torch.manual_seed(1)
    blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4, **blocks)
    stock = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(clip_sample=False))
    stock.push_to_hub("user/stock", token="writer")
    ours = DDPMImagePipeline.from_pretrained("user/stock", cache_dir=tmp_path)
    assert type(ours.scheduler) is VariationalDDPMScheduler and ours.scheduler.config.clip_sample is False
    np.testing.assert_allclose(images_of(ours), images_of(stock), atol=1e-3)


ROUND = """
import sys
import diffusers
from ddpm_hf import DDPMImagePipeline

x, repo, out, *openers = sys.argv[1:]
for i, opener in enumerate(openers):
    if opener == "package":
        pipe = DDPMImagePipeline.from_pretrained(x)
    elif opener == "remote":
        pipe = diffusers.DiffusionPipeline.from_pretrained(x, custom_pipeline=x, trust_remote_code=True)
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(x)
        pipe = DDPMImagePipeline(pipe.unet, pipe.scheduler)
    x = f"{out}/{i}"
    pipe.save_pretrained(x)
if opener == "remote":  # the package publishes
    pipe = DDPMImagePipeline.from_pretrained(x)
pipe.push_to_hub(repo)
"""
ORDERS = [(first, second) for first in ("stock", "package", "remote") for second in ("stock", "package", "remote")]
# each of these orders, one after the other
CHAIN = ("stock", "stock", "package", "package", "remote", "remote", "stock", "remote", "package", "stock")


@pytest.mark.slow
@pytest.mark.parametrize(
    "openers, scheduler",
    [(order, None) for order in ORDERS]
    + [(CHAIN, kind) for kind in (None, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler)],
)
def test_round_trips(hub, saved, tmp_path, openers, scheduler):
    """load -> save -> load -> push leaves the files as they were; stock classes keep what they do not know."""
    pipeline = DDPMImagePipeline.from_pretrained(saved)
    if scheduler:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    repo = f"user/{''.join(opener[0] for opener in openers)}-{type(pipeline.scheduler).__name__}"
    pipeline.push_to_hub(f"{repo}-source")
    run_elsewhere(ROUND, tmp_path / "home", f"{repo}-source", repo, tmp_path / "out", *openers)
    files, source = hub.files(repo), hub.files(f"{repo}-source")
    for name in ("model_index.json", "pipeline.py", "unet/diffusion_pytorch_model.safetensors"):
        assert files[name] == source[name], name
    for name in ("unet/config.json", "scheduler/scheduler_config.json"):
        assert json.loads(files[name]) == json.loads(source[name]), name
    reopened = DDPMImagePipeline.from_pretrained(repo, cache_dir=tmp_path / "cache")
    assert type(reopened.scheduler) is type(pipeline.scheduler)
    np.testing.assert_allclose(images_of(reopened), images_of(pipeline), atol=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("do", ["drop", 503])
def test_a_hub_that_stays_broken(hub, saved, do):
    pipeline = DDPMImagePipeline.from_pretrained(saved)
    pipeline.unet.conv_in.bias.data.fill_(len(hub.requests))  # as nobody has sent before
    hub.faults[:] = [dict(match="PUT /signed", do=do, times=99)]
    with pytest.raises(HubError, match="was not reached|answered 503"):
        pipeline.push_to_hub("user/stays-broken")
    hub.faults.clear()
    assert list(hub.files("user/stays-broken")) == []


def test_what_does_not_open_as_ours(saved, make_pipeline, tmp_path):
    def refused(folder, error, message):
        with pytest.raises(error, match=message) as caught:
            DDPMImagePipeline.from_pretrained(folder)
        assert "\n" not in str(caught.value).strip()

    refused(saved.parent, OSError, "no file named model_index.json .*run")
    make_pipeline().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    refused(tmp_path / "pickled", ValueError, "pickled/unet has no safetensors; .* save_pretrained writes safetensors")
    opened = DDPMImagePipeline.from_pretrained(tmp_path / "pickled", use_safetensors=False)  # trusted
    assert type(opened.unet).__name__ == "DDPMUNet"
    shutil.copytree(saved, tmp_path / "mixed")
    make_pipeline(channels=3).unet.save_config(tmp_path / "mixed/unet")
    refused(
        tmp_path / "mixed", ValueError, "mixed/unet: its weights are of another network than its config.json: conv_in"
    )
    shutil.copytree(saved, tmp_path / "cut")
    weights = tmp_path / "cut/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(tmp_path / "cut", OSError, "cut/unet/diffusion_pytorch_model.safetensors")
    shutil.copytree(saved, tmp_path / "other")
    index = json.loads((saved / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "other/model_index.json").write_text(json.dumps(index))
    refused(tmp_path / "other", ValueError, "holds a StableDiffusionPipeline of scheduler, unet, vae; this class opens")


def test_keys_of_a_newer_version_are_named_and_kept(saved, tmp_path, caplog):
    files = [saved / "unet/config.json", saved / "scheduler/scheduler_config.json"]
    for path in files:
        path.write_text(json.dumps({**json.loads(path.read_text()), "of_tomorrow": 3}))
    pipeline = DDPMImagePipeline.from_pretrained(saved)
    assert "of_tomorrow" in caplog.text
    pipeline.save_pretrained(tmp_path / "again")
    for path in files:
        assert json.loads((tmp_path / "again" / path.relative_to(saved)).read_text())["of_tomorrow"] == 3


def test_data_sets_on_the_hub(hub):
    digits("test").select(range(32)).push_to_hub("user/images", split="train", token="writer")
    images = load_images("user/images", "train")
    assert images[3]["image"].size == (8, 8) and len(images) == 32
    streamed = next(iter(load_images("user/images", "train", streaming=True)))
    assert np.array_equal(np.asarray(streamed["image"]), np.asarray(images[0]["image"]))


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def test_weights_of_before_are_never_what_is_opened(hub, saved, tmp_path):
    pipeline = DDPMImagePipeline.from_pretrained(saved)
    pipeline.push_to_hub("user/before", max_shard_size="20KB")
    half = DDPMImagePipeline.from_pretrained(saved, torch_dtype=torch.float16)
    half.push_to_hub("user/before", variant="fp16")
    files = hub.files("user/before")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in files and "README.md" in files
    pipeline.unet.conv_in.bias.data.fill_(5)
    pipeline.push_to_hub("user/before")
    left = [name for name in hub.files("user/before") if name.startswith("unet/") and name != "unet/config.json"]
    assert left == [WEIGHTS]  # neither shards nor a variant of other weights
    opened = DDPMImagePipeline.from_pretrained("user/before", cache_dir=tmp_path)
    assert (opened.unet.conv_in.bias == 5).all()


def test_a_variant_beside_leaves_card_and_numbers(hub, saved):
    (saved / "README.md").write_text("---\nlibrary_name: diffusers\n---\nMine\n")
    push_folder(saved, "user/beside")
    before = hub.files("user/beside")
    DDPMImagePipeline.from_pretrained(saved, torch_dtype=torch.float16).push_to_hub("user/beside", variant="fp16")
    files = hub.files("user/beside")
    assert files.keys() - before.keys() == {"unet/diffusion_pytorch_model.fp16.safetensors"}
    assert all(files[name] == before[name] for name in before)


def test_remote_code_is_as_main(hub, saved, make_pipeline):
    push_folder(saved, "user/same")
    other = make_pipeline()
    other.unet.conv_in.bias.data.fill_(7)
    for fault in (dict(match="POST .*/commit/remote-code", do=500), dict(match="POST .*/branch/remote-code", do=500)):
        other.unet.conv_in.bias.data.add_(1)
        hub.faults[:] = [fault]
        with pytest.raises(HubError, match="answered 500"):
            other.push_to_hub("user/same")
        hub.faults.clear()
        other.push_to_hub("user/same")
        main, branch = hub.files("user/same"), hub.files("user/same", "remote-code")
        assert main.keys() == branch.keys() and "training.json" not in main
        assert [name for name in main if main[name] != branch[name]] == ["model_index.json"]
        assert json.loads(branch["model_index.json"])["_class_name"] == ["pipeline", "DDPMImagePipeline"]
    with pytest.raises(ValueError, match="is kept by this package beside main"):
        push_folder(saved, "user/same", revision="remote-code")


EVALUATION = {
    "total": 3.0, "standard_error": None, "prior": 0.0, "kl": 2.5, "decoder": 0.5, "first_timestep": 0, "images": 4,
    "split": "test", "data": "digits", "steps": 1000, "seed": 0, "sampling_error": None,
}  # fmt: skip


def test_numbers_of_other_weights_are_left_out(hub, saved):
    evaluation = {**EVALUATION, "weights": weights_digest(saved)}
    (saved / "evaluation.json").write_text(json.dumps(evaluation))
    (saved / "evaluation.png").write_bytes(b"x")
    write_model_card(saved)
    push_folder(saved, "user/other-weights", license="mit")
    files = hub.files("user/other-weights")
    assert b"| total | 3.0000 |" in files["README.md"] and "evaluation.png" in files
    pipeline = DDPMImagePipeline.from_pretrained(saved)
    pipeline.unet.conv_in.bias.data.fill_(3)
    pipeline.save_pretrained(
        saved, push_to_hub=True, repo_id="user/other-weights"
    )  # beside the numbers of the old ones
    files = hub.files("user/other-weights")
    card = ModelCard(files["README.md"].decode())
    assert "Not measured" in card.text and card.data.license == "mit"  # which stays
    assert not [name for name in files if name.startswith("evaluation")]


@pytest.mark.parametrize("scheduler", [DDIMScheduler, diffusers.PNDMScheduler, DPMSolverMultistepScheduler])
def test_pipelines_with_schedulers_of_their_own(hub, make_pipeline, scheduler):
    make_pipeline(scheduler=scheduler()).push_to_hub(f"user/own-{scheduler.__name__}")
    card = hub.files(f"user/own-{scheduler.__name__}")["README.md"].decode()
    assert "trained with" not in card and "grey levels of the data" not in card and "Not recorded" in card


def test_pipelines_of_continuous_time(hub, make_pipeline, tmp_path):
    """Under our class's name: no stock class draws from them. Trusted code has all it needs; a chain then takes its place."""
    chain = VariationalDDPMScheduler(beta_schedule="cosine")
    pipe = make_pipeline(scheduler=VPSDEScheduler.from_config(chain.config, predictor="ddim"))
    pipe.push_to_hub("user/continuous")
    here = images_of(pipe)
    for extra in ({}, {"custom_pipeline": "user/continuous"}, {"revision": "remote-code"}):
        opened = DiffusionPipeline.from_pretrained("user/continuous", trust_remote_code=True, **extra)
        opened.set_progress_bar_config(disable=True)
        assert [type(part).__name__ for part in (opened, opened.scheduler)] == ["DDPMImagePipeline", "VPSDEScheduler"]
        np.testing.assert_allclose(images_of(opened), here, atol=ROUNDING)
    assert type(DDPMImagePipeline.from_pretrained("user/continuous").scheduler) is VPSDEScheduler
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained("user/continuous")
    card = str(model_card_of(pipe, tmp_path / "vp"))
    assert "VP SDE through the betas of a chain" in card and "a network of continuous time" in card
    pipe.scheduler = chain
    pipe.push_to_hub("user/continuous")
    assert type(DiffusionPipeline.from_pretrained("user/continuous")).__name__ == "DDPMPipeline"
    assert "scheduler/sde_scheduler.py" not in hub.files("user/continuous")


def model_card_of(pipe, folder):
    pipe.save_pretrained(folder)
    return model_card(folder)


def test_the_card_shows_calls_that_run(hub, saved, make_pipeline):
    call, first = (
        'from_pretrained("user/first", revision="remote-code"',
        push_folder(saved, "user/first", create_pr=True),
    )
    assert call not in hub.files("user/first", first.pr_revision)["README.md"].decode()
    push_folder(saved, "user/first")
    assert call in hub.files("user/first")["README.md"].decode()
    make_pipeline(num_class_embeds=3).push_to_hub("classes")  # of the token's own name
    card = hub.files("user/classes")["README.md"].decode()
    assert "Plain diffusers cannot sample a class-conditional network" in card
    assert 'from_pretrained("user/classes")' in card and "pipe(batch_size=4)" not in card


@pytest.mark.parametrize("labels", [{}, {"num_class_embeds": 3}])
def test_the_calls_of_a_local_card(tmp_path, monkeypatch, make_pipeline, labels):
    """Its repository is a placeholder; with the folder in its place every example runs, and ends in a picture."""
    folder = tmp_path / "run/pipeline"
    make_pipeline(scheduler=VariationalDDPMScheduler(4), **labels).save_pretrained(folder)
    card = model_card(folder, remote_code=False)
    assert card.data.pipeline_tag == (None if labels else "unconditional-image-generation")
    assert card.data.model_name == "run" and "\n# run\n" in card.text
    blocks = re.findall("```python\n(.*?)```", card.text, re.DOTALL)
    assert len(blocks) == (1 if labels else 2) and all(
        block.count('("USER/run"') == block.count("pipe = ") for block in blocks
    )
    last = blocks[-1]
    assert "\n# or with ddpm-hf installed\n" in last
    monkeypatch.chdir(tmp_path)
    exec(last.replace('"USER/run"', repr(str(folder))), {})
    assert Image.open("sample.png").size == (8, 8)


@pytest.mark.parametrize(
    ("steps", "ema_decay", "words"),
    [
        (20, 0.9999, "whose decay rose to 0.6897 at the last step."),
        (1, 0.5, "whose decay rose to 0 at the last step."),
        (1000, 0.5, "with decay 0.5."),
    ],
)
def test_the_card_names_the_decay_of_the_average_that_was_reached(saved, steps, ema_decay, words):
    (saved / "training.json").write_text(json.dumps(TRAINING | {"steps": steps, "ema_decay": ema_decay}))
    assert f"The weights are an exponential moving average {words}" in model_card(saved).text
    average = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=ema_decay)
    for _ in range(steps):
        average.step([])
    reached = float(re.search(r"decay(?: rose to)? ([0-9.]*[0-9])", words)[1])
    assert average.cur_decay_value == pytest.approx(reached, abs=1e-4)


def test_the_license_is_the_one_that_was_said(hub, saved, make_pipeline):
    push_folder(saved, "user/licensed", license="mit")
    push_folder(saved, "user/licensed")  # which says nothing of it
    first = hub.files("user/licensed")
    assert ModelCard(first["README.md"].decode()).data.license == "mit"
    (saved / "README.md").unlink()
    push_folder(saved, "user/licensed", license="apache-2.0")
    card = hub.files("user/licensed")["README.md"].decode()
    assert card.replace("apache-2.0", "mit").rpartition("<!--")[0] == first["README.md"].decode().rpartition("<!--")[0]
    make_pipeline().push_to_hub("user/licensed")  # other weights: the card is still this package's
    card = ModelCard(hub.files("user/licensed")["README.md"].decode())
    assert card.data.license == "apache-2.0" and "Not recorded" in card.text
    (saved / "README.md").write_text("---\ntags:\n- mine\n---\nMine\n")
    push_folder(saved, "user/licensed", license="mit")
    card = ModelCard(hub.files("user/licensed")["README.md"].decode())
    assert (card.data.license, card.data.tags, card.text.strip()) == ("mit", ["mine"], "Mine")
    (saved / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match="README.md: its header is not YAML .*; mend it by hand"):
        push_folder(saved, "user/licensed", license="mit")
    push_folder(saved, "user/licensed")
    (saved / "README.md").unlink()
    make_pipeline().push_to_hub("user/licensed")  # over what has no license that can be read


@pytest.mark.parametrize("name", ["training", "evaluation"])
@pytest.mark.parametrize(
    "values, message",
    [
        ("[]", r"json holds \[\], not an object of keys and values"),
        ("null", "json holds None, not an object"),
        ("{}", "json: data=None must be text .*; remove the file"),
        (
            '{"data": "digits", "split": "test", "loss": "vlb", "total": NaN}',
            "json: (total=nan|steps=None) must be a.*; remove the file",
        ),
    ],
)
def test_numbers_that_nobody_measured(saved, name, values, message):
    (saved / f"{name}.json").write_text(values)
    with pytest.raises(ValueError, match=f"{name}.{message}") as caught:
        push_folder(saved, "user/never")
    assert "\n" not in str(caught.value)


def test_pull_requests_are_added_to(hub, saved, make_pipeline):
    push_folder(saved, "user/request")
    first = make_pipeline()
    first.unet.conv_in.bias.data.add_(1)
    pr = first.push_to_hub("user/request", create_pr=True).pr_revision
    assert b'revision="remote-code"' not in hub.files("user/request", pr)["README.md"]  # which is of main
    first.unet.conv_in.bias.data.add_(1)
    requests = len(hub.requests)
    first.push_to_hub("user/request", revision=pr)
    assert not [path for method, path, _ in hub.requests[requests:] if method == "POST" and "/branch/" in path]
    with pytest.raises(HubError, match="revision='' is no name of a branch"):
        push_folder(saved, "user/request", revision="")
    with pytest.raises(HubError, match="no valid token"):
        push_folder(saved, "user/request", token="a\nb")


def test_what_is_not_the_networks_fault_is_not_called_so(hub, saved, monkeypatch):
    (saved / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match="evaluation.json is not JSON .*; save the pipeline again"):
        push_folder(saved, "user/fault")
    (saved / "evaluation.json").unlink()
    for name in ("unet/trainer_state.json", "scheduler/optimizer.safetensors"):
        (saved / name).write_bytes(b"x")
    push_folder(saved, "user/fault")
    assert not [name for name in hub.files("user/fault") if "trainer" in name or "optimizer" in name]
    secret = "x" * 30
    with pytest.raises(HubError, match="reached|token") as caught:
        push_folder(saved, "user/fault", token=f"{secret}\x01")
    assert secret not in "".join(traceback.format_exception(caught.value))
    repository = hub.create("user/of-others")
    hub.commit(repository, "main", {"config.json": hub.entry("config.json", b"{}")}, "other")
    with pytest.raises(HubError, match="user/of-others holds something that is no pipeline; choose another name"):
        push_folder(saved, "user/of-others")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set; unset it"):
        push_folder(saved, "user/fault")


def test_shards_and_index_that_do_not_belong_together(saved):
    pipeline = DDPMImagePipeline.from_pretrained(saved)
    pipeline.save_pretrained(saved, max_shard_size="20KB")
    pipeline.save_pretrained(saved)  # diffusers leaves the index
    with pytest.raises(ValueError, match="do not belong together; save the pipeline to an empty folder"):
        push_folder(saved, "user/shards")
