"""Thousands of samples: each depends on its seed alone, in whatever batch, process or attempt it is drawn."""

import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import datasets
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import (
    CascadePipeline,
    DDPMImagePipeline,
    SubVPSDEScheduler,
    VariationalDDPMScheduler,
    VESDEScheduler,
    VPSDEScheduler,
)
from ddpm_hf.evaluation.generation import Generator, find_batch_size, generate
from ddpm_hf.evaluation.processes import Processes
from ddpm_hf.evaluation.sample_files import SampleFolder
from ddpm_hf.evaluation.scheduler_by_name import use_scheduler
from ddpm_hf.evaluation.seeds import labels_of_seeds, parse_seeds, seeds_in_words
from support.scripts import ROOT, command

NAMES = ["ant", "bee", "cat"]
CPU = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def folder(make_pipeline, tmp_path):
    pipeline = make_pipeline(num_class_embeds=3)
    pipeline.unet.class_names = NAMES
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def digests(folder):
    """The content of every file of a folder, but for the pipeline's name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def sample(*argv, **kwargs):
    return command("sample", *argv, "--device", "cpu", **kwargs)


def test_seeds():
    assert parse_seeds("0-3,7, 9 - 10") == [0, 1, 2, 3, 7, 9, 10]
    assert seeds_in_words([0, 1, 2, 3, 7, 9, 10]) == "0-3,7,9-10"
    assert seeds_in_words(list(range(0, 40, 2))) == "0,2,4,...,38"
    for text, message in {
        "0-5,3": "overlap: 3 is named twice",
        "5-0": "the range descends; give 0-5",
        "a": "must be numbers and ranges",
        "-1": "must be numbers and ranges",
        "0-99999999999": "more than 10,000,000",
        "": "must be numbers",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_seeds(text)


def test_labels_follow_from_the_seed():
    assert labels_of_seeds("balanced", [0, 1, 2, 3, 30], 3) == [0, 1, 2, 0, 0]
    assert labels_of_seeds(2, [5, 6], 3) == [2, 2]
    random = labels_of_seeds("random", range(3000), 3)
    assert labels_of_seeds("random", [17], 3) == [random[17]]
    counts = np.bincount(random, minlength=3)
    assert ((counts - 1000) ** 2 / 1000).sum() < 13.8  # chi-squared, 2 degrees of freedom: exceeded once in 1,000
    with pytest.raises(ValueError, match="class_labels=3 must be balanced, random, or 0 to 2"):
        labels_of_seeds(3, [0], 3)


SCHEDULERS = {
    "ancestral": VariationalDDPMScheduler(),
    "ve": VESDEScheduler(correct_steps=1, corrector="langevin"),
    "vp": VPSDEScheduler(),
    **{
        name: getattr(diffusers, name)()
        for name in (
            "DDIMScheduler",
            "DPMSolverMultistepScheduler",
            "EulerAncestralDiscreteScheduler",
            "HeunDiscreteScheduler",
            "LCMScheduler",
            "PNDMScheduler",
            "SASolverScheduler",
            "UniPCMultistepScheduler",
        )
    },
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_image_depends_on_its_seed_alone(make_pipeline, name):
    """Whatever is drawn beside it: the noise of every step, and the corrector's step size, are the image's own."""
    generator = Generator(make_pipeline(scheduler=SCHEDULERS[name]), num_inference_steps=6)
    together = generator.draw([3, 8, 5, 0])
    for place, seed in enumerate((3, 8, 5, 0)):
        assert (np.asarray(generator.draw([seed])[0]) == np.asarray(together[place])).all()
    assert (np.asarray(together[0]) != np.asarray(together[1])).any()


def test_a_scheduler_with_noise_of_its_own_is_refused(make_pipeline):
    class Scheduler(diffusers.DDIMScheduler):
        noise_sampler = None

    with pytest.raises(ValueError, match="draws its own noise, which no seed determines"):
        Generator(make_pipeline(scheduler=Scheduler()))


def test_images_are_those_of_the_pipeline(make_pipeline, tmp_path):
    pipeline = make_pipeline(channels=3)
    generate(pipeline, [4, 11], tmp_path / "samples", batch_size=2, num_inference_steps=3, eta=0.5)
    for seed in (4, 11):
        alone = pipeline(generator=torch.Generator().manual_seed(seed), num_inference_steps=3, eta=0.5).images[0]
        assert (np.asarray(Image.open(tmp_path / f"samples/{seed:08d}.png")) == np.asarray(alone)).all()


def test_every_batch_size_and_every_resumption_gives_the_same_files(folder, tmp_path):
    argv = [folder, "--count", 23, "--steps", 3, "--class_labels", "random"]
    sample(*argv, "--batch_size", 5, "--out", f"{tmp_path}/a/")
    sample(*argv, "--batch_size", 16, "--out", f"{tmp_path}/b/")
    whole = digests(tmp_path / "a")
    assert digests(tmp_path / "b") == whole and len(whole) == 25
    # a killed run leaves some files; after a power cut, one of them may have lost its end
    for name in ("00000003.png", "metadata.csv"):
        (tmp_path / "b" / name).unlink()
    cut = tmp_path / "b/00000007.png"
    cut.write_bytes(cut.read_bytes()[:-20])
    (tmp_path / "b/.00000009.png.0123456789abcdef.tmp").write_bytes(b"half")
    kept = (tmp_path / "b/00000001.png").stat().st_mtime_ns
    sample(*argv, "--batch_size", "auto", "--out", f"{tmp_path}/b")  # without / now that it holds samples
    assert digests(tmp_path / "b") == whole
    assert (tmp_path / "b/00000001.png").stat().st_mtime_ns == kept
    # more of them later
    sample(folder, "--seeds", "23-29", "--steps", 3, "--class_labels", "random", "--out", f"{tmp_path}/b/")
    assert len(digests(tmp_path / "b")) == 32


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_seeds(make_pipeline, tmp_path, world_size):
    """Here they are threads, which wait for each other at a barrier."""
    pipeline, seeds, barrier = make_pipeline(), range(20), threading.Barrier(world_size)
    generate(pipeline, seeds, tmp_path / "alone", batch_size=4, num_inference_steps=2)
    drawn = []

    class Process(Processes):
        def wait(self):
            barrier.wait(60)

    def run(rank):
        mine = copy.deepcopy(pipeline)
        process = Process(rank, world_size)
        draw = mine.__class__.__call__

        def counting(self, count, **kwargs):
            drawn.append((rank, count))
            return draw(self, count, **kwargs)

        mine.__class__ = type("Counting", (mine.__class__,), {"__call__": counting})
        generate(mine, seeds, tmp_path / "shared", batch_size=3, processes=process, num_inference_steps=2)

    with ThreadPoolExecutor(world_size) as pool:
        list(pool.map(run, range(world_size)))
    assert digests(tmp_path / "shared") == digests(tmp_path / "alone")
    shares = [sum(count for of, count in drawn if of == rank) for rank in range(world_size)]
    assert sum(shares) == 20 and max(shares) - min(shares) <= 1


@pytest.mark.slow
def test_processes_wait_for_hours_and_draw_a_sheet_once(folder, tmp_path):
    """One of them may be much slower; NCCL's own limit is 10 minutes."""
    pair = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    (tmp_path / "limit.py").write_text(
        "import torch\n"
        "from ddpm_hf.evaluation.processes import Processes\n"
        "processes = Processes.launched()\n"
        "backend = torch.distributed.group.WORLD._get_backend(torch.device('cpu'))\n"
        "print(backend.options._timeout.days, 'days')\n"
        "processes.leave()\n"
    )
    argv = [
        "-m",
        "ddpm_hf",
        "sample",
        folder,
        "--count",
        2,
        "--steps",
        2,
        "--device",
        "cpu",
        "--out",
        tmp_path / "x.png",
    ]
    environment = {**os.environ, **CPU, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    for words, line in ([tmp_path / "limit.py"], "7 days"), (argv, f"wrote {tmp_path}/x.png"):
        result = subprocess.run([*pair, *map(str, words)], env=environment, capture_output=True, text=True)
        lines = result.stdout.splitlines()
        assert result.returncode == 0 and set(lines) == {line}, result.stderr
    assert len(lines) == 1


@pytest.mark.slow
def test_torchrun_and_a_kill(folder, tmp_path):
    """2,048 images by one process, by two of which both are killed and started anew, and by another batch size."""
    argv = ["-m", "ddpm_hf", "sample", folder, "--count", 2048, "--steps", 10, "--device", "cpu"]
    environment = {**os.environ, **CPU, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}

    def start(launcher, batch_size, out):
        words = [*launcher, *argv, "--batch_size", batch_size, "--out", f"{out}/"]
        return subprocess.Popen([*map(str, words)], env=environment, stderr=subprocess.PIPE, text=True)

    alone = start([sys.executable], 64, tmp_path / "alone")
    assert alone.wait() == 0, alone.stderr.read()
    pair = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    killed = start(pair, 16, tmp_path / "pair")
    while len(list((tmp_path / "pair").glob("*.png"))) < 300:
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(killed.pid)], capture_output=True, text=True).stdout.split()
    for pid in (killed.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    killed.wait()
    time.sleep(1)
    assert len(list((tmp_path / "pair").glob("*.png"))) < 2048
    resumed = start(pair, 16, tmp_path / "pair")
    assert resumed.wait() == 0, resumed.stderr.read()
    assert digests(tmp_path / "pair") == digests(tmp_path / "alone")


def test_packed_files(folder, tmp_path):
    for out in ("samples/", "samples.npz", "samples.parquet"):
        result = sample(folder, "--seeds", "5-8,2", "--steps", 2, "--batch_size", 3, "--out", f"{tmp_path}/{out}")
        assert result.stdout == f"wrote {tmp_path / out}, 5 images\n"
    assert sorted(os.listdir(tmp_path)) == ["pipeline", "samples", "samples.npz", "samples.parquet"]
    order = [5, 6, 7, 8, 2]
    images = [np.asarray(Image.open(tmp_path / f"samples/{seed:08d}.png")) for seed in order]
    with np.load(tmp_path / "samples.npz") as packed:
        assert packed["arr_0"].dtype == np.uint8 and packed["arr_0"].shape == (5, 8, 8, 1)
        assert (packed["arr_0"][..., 0] == np.stack(images)).all()
        assert packed["arr_1"].tolist() == [2, 0, 1, 2, 2]
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "samples.parquet"), split="train")
    assert rows["seed"][:] == order and rows["label"][:] == [2, 0, 1, 2, 2]
    assert rows.features["label"].names == NAMES
    assert all((np.asarray(row["image"]) == image).all() for row, image in zip(rows, images))
    table = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "samples"), split="train")
    assert table["seed"][:] == [2, 5, 6, 7, 8] and table["class"][:] == ["cat", "cat", "ant", "bee", "cat"]
    assert all((np.asarray(row["image"]) == images[order.index(row["seed"])]).all() for row in table)


def test_a_killed_run_of_a_packed_file_goes_on(make_pipeline, tmp_path):
    """Its images wait in a folder beside it."""
    pipeline, parts = make_pipeline(), tmp_path / "x.npz.parts"
    folder = SampleFolder(parts, Generator(pipeline, num_inference_steps=2).record(""))
    folder.begin()
    folder.write(1, Image.new("L", (8, 8), 77))
    generate(pipeline, range(3), tmp_path / "x.npz", batch_size=3, num_inference_steps=2)
    assert os.listdir(tmp_path) == ["x.npz"]
    with np.load(tmp_path / "x.npz") as packed:
        assert (packed["arr_0"][1] == 77).all() and packed.files == ["arr_0"]


def test_samples_of_another_run_are_kept(folder, make_pipeline, tmp_path):
    out = f"{tmp_path}/samples/"
    sample(folder, "--count", 2, "--steps", 2, "--out", out)
    before = digests(out)
    for extra, message in {
        ("--steps", 3): "with steps=2, not 3",
        ("--steps", 2, "--class_labels", "bee"): "with class_labels='balanced', not 1",
        ("--steps", 2, "--eta", 0): "with eta=None, not 0",
        ("--steps", 2, "--scheduler", "DDIMScheduler"): "with schedulers=",
    }.items():
        result = sample(folder, "--count", 4, *extra, "--out", out, check=False)
        assert result.returncode == 1 and message in result.stderr and result.stderr.count("\n") == 1
    other = make_pipeline(num_class_embeds=3)
    with torch.no_grad():
        other.unet.conv_in.bias += 1
    other.save_pretrained(tmp_path / "other")
    assert "of another run, with weights=" in sample(tmp_path / "other", "--steps", 2, "--out", out, check=False).stderr
    assert digests(out) == before


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["--out", "mine/"], 1, "mine holds other files and no samples.json; give an empty folder"),
        (["--out", "no/such/"], 1, "make it first"),
        (["--out", "a.npz"], 1, "a.npz exists; move it away, or give another name"),
        (["--out", "x/", "--seeds", "0-5,5"], 1, "overlap: 5 is named twice"),
        (
            ["--out", "x/", "--seed", "-2"],
            1,
            "seed=-2 with 64 images: the seeds of single images are 0 to 999999999999999999",
        ),
        (
            ["--out", "x/", "--seed", 2**63 - 2],
            1,
            "seed=9223372036854775806 with 64 images: the seeds of single images are",
        ),
        (
            ["--out", "x/", "--count", 10**8],
            1,
            "100,000,000 seeds are more than 10,000,000; draw them in several folders",
        ),
        (["--out", "x/", "--seeds", "0-5", "--count", "3"], 2, "both say how many; give one of them"),
        (["--out", "x/", "--progressive", "3"], 2, "--progressive is for a sheet; give --out FILE.png"),
        (["--out", "x.png", "--seeds", "0-5"], 2, "--seeds is for single images; give --out FOLDER/, .npz or .parquet"),
        (["--out", "x/", "--batch_size", "0"], 2, "argument --batch_size: 0 must be an integer, 1 or more"),
        (["--out", "x/", "--class_labels", "dog"], 1, "'dog' is not the name of a class"),
        (
            ["--out", "x/", "--scheduler", "DDIMSchedular"],
            1,
            "no scheduler of diffusers; did you mean 'DDIMScheduler'?",
        ),
        (["--out", "x/", "--scheduler.eta", "1"], 1, "scheduler.eta is no setting of VariationalDDPMScheduler"),
        (
            ["--out", "x/", "--scheduler", "DPMSolverMultistepScheduler", "--scheduler.algorithm_type", "best"],
            1,
            "DPMSolverMultistepScheduler with {'algorithm_type': 'best'}: best is not implemented",
        ),
        (["--out", "x/", "--scheduler.clip_sample"], 2, "--scheduler.clip_sample needs a value"),
    ],
)
def test_mistakes_leave_everything_as_it_is(folder, tmp_path, monkeypatch, argv, status, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    (tmp_path / "a.npz").write_text("years of work")
    result = sample(folder, "--steps", 2, *argv, check=False)
    assert result.returncode == status and message in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "mine", "pipeline"] and os.listdir("mine") == ["thesis.txt"]


def test_a_full_disk_loses_nothing(folder, tmp_path, monkeypatch):
    written, write = [], SampleFolder.write

    def full(self, seed, image):
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        written.append(seed)
        write(self, seed, image)

    argv = [folder, "--count", 9, "--steps", 2, "--batch_size", 2, "--out", f"{tmp_path}/samples/"]
    monkeypatch.setattr(SampleFolder, "write", full)
    result = sample(*argv, check=False)
    assert result.returncode == 1 and "No space left on device; complete images stay" in result.stderr
    assert len(list((tmp_path / "samples").glob("*.png"))) == 4
    monkeypatch.undo()
    sample(*argv)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 9


def test_another_scheduler(folder, tmp_path):
    """The same images as from the pipeline with the scheduler that diffusers' users would set."""
    argv = [folder, "--seeds", "3", "--steps", 5, "--scheduler", "DPMSolverMultistepScheduler"]
    sample(*argv, "--scheduler.solver_order", 3, "--class_labels", "bee", "--out", f"{tmp_path}/samples/")
    pipeline = DDPMImagePipeline.from_pretrained(folder)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, solver_order=3)
    image = pipeline(generator=torch.Generator().manual_seed(3), num_inference_steps=5, class_labels=1).images[0]
    assert (np.asarray(Image.open(tmp_path / "samples/00000003.png")) == np.asarray(image)).all()
    record = json.loads((tmp_path / "samples/samples.json").read_text())
    assert record["schedulers"][0]["solver_order"] == 3 and record["steps"] == 5


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_scheduler_of_another_process_is_refused(make_pipeline):
    """It would draw garbage: other noise levels, or steps with other arguments."""

    def swapped(scheduler, name, **settings):
        pipeline = make_pipeline(scheduler=scheduler)
        use_scheduler(pipeline, name, settings)
        return pipeline.scheduler

    vp, ve, sub_vp = VPSDEScheduler(), VESDEScheduler(), SubVPSDEScheduler()
    cosine = VariationalDDPMScheduler(beta_schedule="cosine", num_train_timesteps=50, levels=17)
    for scheduler, name in [
        *((cosine, name) for name in ("EDMEulerScheduler", "IPNDMScheduler", "FlowMatchEulerDiscreteScheduler")),
        *((cosine, name) for name in ("ScoreSdeVeScheduler", "CogVideoXDPMScheduler")),
        *((VariationalDDPMScheduler(), name) for name in ("RePaintScheduler", "SubVPSDEScheduler")),
        (vp, "HeunDiscreteScheduler"),  # whose own betas are others
        (VPSDEScheduler(beta_min=1.0), "DDIMScheduler"),
        (sub_vp, "VPSDEScheduler"),
        (ve, "IPNDMScheduler"),
    ]:
        with pytest.raises(ValueError, match=f"{name} does not sample the process of this pipeline"):
            swapped(scheduler, name)
    for scheduler, name in [(cosine, "UniPCMultistepScheduler"), (cosine, "VPSDEScheduler"), (vp, "DDIMScheduler")]:
        assert type(swapped(scheduler, name)).__name__ == name
    assert swapped(cosine, "DDIMScheduler", rescale_betas_zero_snr=True).alphas_cumprod[-1] == 0
    assert (
        type(swapped(vp, "HeunDiscreteScheduler", beta_start=1e-4, beta_end=0.02)).__name__ == "HeunDiscreteScheduler"
    )
    assert type(swapped(ve, None, snr=0.1)) is VESDEScheduler
    assert swapped(cosine, "DDIMScheduler").levels == 17  # grey levels of the data
    if find_spec("torchsde") is None:
        with pytest.raises(ValueError, match="DPMSolverSDEScheduler needs torch and torchsde; install them"):
            swapped(cosine, "DPMSolverSDEScheduler")


def test_plain_diffusers_pipelines(tmp_path):
    from support.networks import small_unet

    unet = diffusers.UNet2DModel.from_config(small_unet(sample_size=8, in_channels=1, out_channels=1).config)
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "stock")
    sample(tmp_path / "stock", "--count", 2, "--steps", 4, "--out", f"{tmp_path}/samples/")
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(generator=torch.Generator().manual_seed(1), num_inference_steps=4).images[0]
    difference = np.asarray(stock).astype(int) - np.asarray(Image.open(tmp_path / "samples/00000001.png")).astype(int)
    assert abs(difference).max() <= 1  # float32 in another order


def test_cascades(make_pipeline, make_upsampler, tmp_path):
    CascadePipeline(make_pipeline(num_class_embeds=3), make_upsampler(noise=0.5)).save_pretrained(tmp_path / "cascade")
    argv = [tmp_path / "cascade", "--count", 5, "--steps", 2, "--noise_level", 0.3]
    sample(*argv, "--batch_size", 2, "--out", f"{tmp_path}/a/")
    sample(*argv, "--batch_size", 5, "--out", f"{tmp_path}/b/")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert Image.open(tmp_path / "a/00000000.png").size == (16, 16)
    sample(*argv, "--scheduler", "DDIMScheduler", "--out", f"{tmp_path}/c/")
    record = json.loads((tmp_path / "c/samples.json").read_text())
    assert [settings["_class_name"] for settings in record["schedulers"]] == ["DDIMScheduler"] * 2


def test_upsamplers_enlarge_the_image_of_the_seed(make_upsampler, tmp_path):
    """Seed s enlarges image s of the data, with its class, and from the first one again after the last."""
    pipeline, small = make_upsampler(num_class_embeds=10), torch.rand(3, 1, 8, 8) * 2 - 1
    given = dict(low_resolution=small, low_resolution_labels=torch.tensor([7, 8, 9]), num_inference_steps=2)
    generate(pipeline, range(5), tmp_path / "samples", batch_size=2, **given)
    expected = pipeline(small[1:2], torch.Generator().manual_seed(4), 2, class_labels=[8]).images[0]
    assert (np.asarray(Image.open(tmp_path / "samples/00000004.png")) == np.asarray(expected)).all()
    assert (tmp_path / "samples/metadata.csv").read_text().splitlines()[-1] == "00000004.png,4,8"
    pipeline.scheduler = VariationalDDPMScheduler(levels=17)
    pipeline.save_pretrained(tmp_path / "pipeline")
    argv = ["--data", "digits", "--count", 3, "--steps", 2, "--out", f"{tmp_path}/digits/"]
    assert sample(tmp_path / "pipeline", *argv).stdout.endswith("3 images\n")


def test_the_batch_size_that_is_found():
    """A device that takes 1 s a batch and 0.1 s more for each image beyond 8, and has memory for 20 images."""
    clock, tried = [0.0], []

    def attempt(size):
        tried.append(size)
        if size > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        clock[0] += 1 + 0.1 * max(0, size - 8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpm_hf.evaluation.generation.time.perf_counter", lambda: clock[0])
        assert find_batch_size(attempt, 1000) == (16, "32 do not fit into memory")
        assert max(tried) == 32
        assert find_batch_size(attempt, 6) == (6, "the fastest")
        with pytest.raises(RuntimeError, match="out of memory"):
            find_batch_size(lambda size: attempt(21), 6)


def test_the_batch_shrinks_where_memory_is_short(make_pipeline, tmp_path, monkeypatch, capsys):
    draw = Generator.draw

    def drawing(self, seeds, **kwargs):
        if len(seeds) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return draw(self, seeds, **kwargs)

    monkeypatch.setattr(Generator, "draw", drawing)
    generate(make_pipeline(), range(7), tmp_path / "samples", batch_size=8, num_inference_steps=2)
    assert "batch_size=2 from here on" in capsys.readouterr().err
    assert len(list((tmp_path / "samples").glob("*.png"))) == 7


def test_the_last_batch_of_an_optimized_pipeline_is_full(make_pipeline, tmp_path, monkeypatch):
    """A batch of another size would be compiled again; what fills it up is not written."""
    sizes, draw = [], Generator.draw

    def drawing(self, seeds, **kwargs):
        sizes.append(len(seeds))
        return draw(self, seeds, **kwargs)

    monkeypatch.setattr(Generator, "draw", drawing)
    pipeline = make_pipeline()
    generate(pipeline, range(7), tmp_path / "plain", batch_size=3, num_inference_steps=2)
    pipeline.optimize(compile=False)
    generate(pipeline, range(10, 17), tmp_path / "optimized", batch_size=3, num_inference_steps=2)
    assert sizes == [3, 3, 1, 3, 3, 3]
    names = sorted(path.name for path in (tmp_path / "optimized").glob("*.png"))
    assert names == [f"{seed:08d}.png" for seed in range(10, 17)]
