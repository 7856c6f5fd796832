"""Moving pictures of the denoising: what their frames show, when, and what is refused before a step is made."""

import os
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from ddpm_hf import CascadePipeline, DDPMSuperResolutionPipeline, VariationalDDPMScheduler
from ddpm_hf.evaluation import animate
from ddpm_hf.extras import MissingExtra
from ddpm_hf.hub.card import write_model_card
from support.scripts import script


def steps_of(count=4, channels=1, height=8, width=8, steps=5, scale=1.0):
    """(t, x_t, predicted x_0) without samples at the end; images of few colors."""
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, 4, (count, channels, height, width), generator=generator) * (2 / 3) - 1
    for t in range(steps - 1, -1, -1):
        noise = torch.randn(x_0.shape, generator=generator)
        yield t, scale * (x_0 * (1 - t / steps) + noise * t / steps), x_0 * (1 - t / steps)


def tiles(frame, count, size, scale, columns, top=None, left=0):
    """The images (count, ...) of a grid in a frame, reduced to their own pixels; `top` is where the grid begins."""
    height, width = (side * scale + 4 for side in size)
    frame = np.asarray(frame)
    rows = -(-count // columns)
    top = frame.shape[0] - rows * height if top is None else top
    grid = frame[top : top + rows * height, left : left + columns * width]
    cells = [grid[i // columns * height :, i % columns * width :][2 : height - 2, 2 : width - 2] for i in range(count)]
    return np.stack([cell[scale // 2 :: scale, scale // 2 :: scale] for cell in cells])


def pixels(images):
    """Images in [-1, 1] as 8-bit pixels, channels last, no channels for grey."""
    values = ((images / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).byte().numpy()
    return values[..., 0] if values.shape[-1] == 1 else values


def decoded(path, mode="RGB"):
    """Frames of a file, and the milliseconds for which each is shown."""
    with Image.open(path) as picture:
        frames = [(frame.convert(mode), frame.info["duration"]) for frame in ImageSequence.Iterator(picture)]
    return [frame for frame, _ in frames], [duration for _, duration in frames]


@pytest.mark.parametrize("ending", ["gif", "WEBP"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_shows_the_steps(tmp_path, ending, channels):
    path, mode = tmp_path / f"a.{ending}", "L" if channels == 1 else "RGB"
    returned = animate(steps_of(channels=channels), path, fps=12.5, pause=1.5)
    frames, durations = decoded(path, mode)
    assert durations == [80] * 5 + [1500] and len(returned) == 6 and os.listdir(tmp_path) == [path.name]
    sides, steps = dict(count=4, size=(8, 8), scale=16, columns=2), list(steps_of(channels=channels))
    right = frames[0].width - 2 * (8 * 16 + 4)
    tolerance = 96 if (ending, channels) == ("gif", 3) else 0  # 256 colors, dithered
    for frame, (_, x_t, x_0) in zip(frames, [*steps, (-1, steps[-1][2], steps[-1][2])], strict=True):
        for images, left in ((x_t, 0), (x_0, right)):
            shown, expected = tiles(frame, **sides, left=left).astype(int), pixels(images).astype(int)
            assert np.abs(shown - expected).max() <= tolerance
            assert np.abs(shown - expected).mean() <= tolerance / 12
    if ending == "WEBP" or channels == 1:
        assert all(np.array_equal(*pair) for pair in zip(frames, returned))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_video_shows_the_steps(tmp_path, channels):
    pytest.importorskip("av")
    import imageio.v3

    path = tmp_path / "a.mp4"
    returned = animate(steps_of(1, channels, 9, 9), path, "x_t", fps=10, pause=0.5)
    assert returned[0].width % 2 or returned[0].height % 2
    video = imageio.v3.imread(path, plugin="pyav")
    properties = imageio.v3.immeta(path, plugin="pyav")
    assert (properties["codec"], properties["video_format"], properties["fps"]) == ("h264", "yuv420p", 10)
    assert len(video) == 5 + 5 and video.shape[1] % 2 == 0 and video.shape[2] % 2 == 0
    for frame, expected in zip(video, returned):
        expected = np.asarray(expected.convert("RGB")).astype(int)
        shown = frame[: expected.shape[0], : expected.shape[1]].astype(int)
        assert np.abs(shown - expected).mean() < 12  # of 255; lossy, and colors are of half the resolution
    assert np.abs(video[5:].astype(int) - video[5]).mean() < 4 and os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("number", [1, 5, 6, 7, 63, 64, 1000])
def test_the_number_of_frames_is_bounded(number):
    """And what is shown is evenly spaced, beginning with noise and ending with the samples."""
    x = torch.zeros(1, 1, 2, 2)
    seen = []
    steps = ((t, x + (number - 1 - t) / 512 - 1, x) for t in range(number - 1, -1, -1))
    frames = animate(steps, None, "x_t", max_frames=6)
    seen = [tiles(frame, 1, (2, 2), 128, 1)[0, 0, 0] for frame in frames]
    stride = next(2**k for k in range(20) if -(-number // 2**k) < 6)
    expected = [round(min(255, i / 1024 * 255)) for i in range(0, number, stride)]
    assert len(frames) == len(expected) + 1 <= 6
    assert np.abs(np.array(seen[:-1], int) - expected).max() <= 1 and seen[-1] == 128


def test_what_is_shown():
    grids = {what: animate(steps_of(), None, what) for what in ("both", "x_t", "x_0")}
    width = 2 * (8 * 16 + 4)
    assert {what: frames[0].width for what, frames in grids.items()} == {
        "both": 2 * width + 12,
        "x_t": width,
        "x_0": width,
    }
    for i, frame in enumerate(grids["both"]):
        top = frame.height - width  # the titles differ
        left, right = (
            frame.crop((0, top, width, frame.height)),
            frame.crop((width + 12, top, frame.width, frame.height)),
        )
        for part, what in ((left, "x_t"), (right, "x_0")):
            assert part.tobytes() == grids[what][i].crop((0, top, width, frame.height)).tobytes()
    titles = [np.asarray(frame.crop((0, 0, frame.width, 16))) for frame in grids["x_t"]]
    assert all((title < 128).sum() > 20 for title in titles)
    assert all(not np.array_equal(*pair) for pair in zip(titles, titles[1:]))


def test_wide_grids_stand_one_above_the_other():
    frame = animate(steps_of(count=6), None, columns=6, captions=list("abcdef"))[-1]
    width = 6 * (8 * 8 + 4)
    assert frame.width == width and frame.height > 2 * (8 * 8 + 4)
    below = tiles(frame, 6, (8, 8), 8, 6)
    *_, (_, _, x_0) = steps_of(count=6)
    assert np.array_equal(below, pixels(x_0))


def test_noise_of_any_scale_is_shown_as_noise():
    (frame, *_), (_, large, _) = animate(steps_of(scale=300.0), None, "x_t"), next(steps_of(scale=300.0))
    assert np.array_equal(tiles(frame, 4, (8, 8), 16, 2), pixels(large / large.std(correction=0)))
    assert np.isin(tiles(frame, 4, (8, 8), 16, 2), [0, 255]).mean() < 0.5


def test_transparent_images_are_shown_on_white(tmp_path):
    x_0 = torch.full((1, 4, 4, 4), -1.0)
    x_0[:, 3, :2] = 1  # opaque black above, nothing below
    animate([(0, x_0, x_0)], tmp_path / "a.webp", "x_0")
    frames, _ = decoded(tmp_path / "a.webp")
    shown = tiles(frames[-1], 1, (4, 4), 64, 1)[0]
    assert (shown[:2] == 0).all() and (shown[2:] == 255).all()


def test_large_images_are_shrunk(tmp_path):
    """Frames have a bounded size, whatever the samples have; an area's mean stays."""
    x_0 = torch.zeros(4, 3, 700, 1400)
    x_0[..., :700] = 1
    (*_, frame) = animate([(0, x_0, x_0)], None, "x_0")
    assert frame.width == 2 * (512 + 4) and frame.height < 2 * (256 + 4) + 40
    shown = tiles(frame, 4, (256, 512), 1, 2)
    assert (shown[:, :, :256] == 255).all() and (shown[:, :, 256:] == 128).all()


class Untouched:
    """Steps of which none may be made."""

    def __iter__(self):
        raise AssertionError("sampling began")


@pytest.mark.parametrize(
    ("path", "kwargs", "message"),
    [
        ("a.png", {}, "a.png: animations are written as .gif, .webp or .mp4$"),
        ("a", {}, "a: animations are written as .gif"),
        ("folder.gif", {}, "folder.gif is a folder; give a file$"),
        ("no/a.gif", {}, "no/a.gif: there is no such folder$"),
        ("a.gif", dict(what="x"), "^what='x' must be one of both, x_t, x_0$"),
        ("a.gif", dict(fps=0), "^fps=0 must be above 0, and at most 50$"),
        ("a.gif", dict(fps=float("nan")), "^fps=nan must be"),
        ("a.gif", dict(pause=-1), "^pause=-1 must be seconds"),
        ("a.gif", dict(max_frames=1), "^max_frames=1 must be an integer, 2 or more$"),
    ],
)
def test_mistakes_before_the_first_step(tmp_path, monkeypatch, path, kwargs, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(ValueError, match=message):
        animate(Untouched(), path, **kwargs)


@pytest.mark.parametrize("module", ["av", "imageio"])
def test_a_video_without_its_extra(tmp_path, monkeypatch, module):
    for name in ("av", "imageio"):
        monkeypatch.setitem(sys.modules, name, sys)
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(MissingExtra, match=rf'^.mp4 files need {module}; pip install "ddpm-hf\[video\]"'):
        animate(Untouched(), tmp_path / "a.mp4")


def test_nothing_incomplete_is_left(tmp_path):
    """A broken sampling, and a picture that cannot be written, leave the file that was there."""
    path = tmp_path / "a.gif"
    path.write_bytes(b"old")

    def broken():
        yield next(steps_of())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        animate(broken(), path)
    with pytest.raises(ValueError, match="^steps is empty"):
        animate([], path)
    with pytest.raises(ValueError, match="^images of 2 channels cannot be shown; animations are of 1, 3 or 4$"):
        animate(steps_of(channels=2), path)
    with pytest.raises(ValueError, match="^what='both' needs steps that predict x_0"):
        animate([(0, torch.zeros(1, 1, 2, 2), None)], path)
    code = f"""
import resource, signal
import torch
from ddpm_hf.evaluation import animate
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # as on a full disk
x = torch.randn(4, 1, 16, 16)
try:
    animate([(0, x, x)], {str(path)!r})
except OSError as error:
    print("OSError", error.errno)
"""
    script_path = tmp_path.parent / "full_disk.py"
    script_path.write_text(code)
    result = subprocess.run([sys.executable, script_path], capture_output=True, text=True)
    assert result.stdout == "OSError 27\n", result.stderr
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.gif"]


def test_the_pipelines_steps_and_samples(make_pipeline):
    """`with_samples` ends with what a call gives, for schedulers that predict no x_0, too."""
    pipeline = make_pipeline()
    for scheduler in (pipeline.scheduler, diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)):
        pipeline.scheduler = scheduler
        seeded = dict(generator=torch.Generator().manual_seed(0), num_inference_steps=5)
        *steps, (t, samples, x_0) = pipeline.progressive(3, with_samples=True, **seeded)
        images = pipeline(3, output_type="latent", **seeded | dict(generator=torch.Generator().manual_seed(0))).images
        assert t == -1 and torch.equal(samples, images) and torch.equal(x_0, images) and len(steps) == 5
        frames = animate([*steps, (t, samples, x_0)], None, "x_t")
        assert len(frames) == 6 and np.array_equal(tiles(frames[-1], 3, (8, 8), 16, 2), pixels(images))


NAMES = ["ant", "bee", "cat"]


def sample(*argv, **kwargs):
    return script("sample.py", "--steps", 4, *argv, **kwargs)


def test_the_command(make_pipeline, tmp_path):
    pipeline = make_pipeline(num_class_embeds=3)
    pipeline.unet.class_names = NAMES
    pipeline.save_pretrained(tmp_path / "pipeline")
    write_model_card(tmp_path / "pipeline")
    out, card = tmp_path / "a.webp", tmp_path / "pipeline/README.md"
    options = ("--count", 2, "--class_label", "bee", "--eta", 0, "--seed", 3)
    result = sample(tmp_path / "pipeline", *options, "--show", "x_t", "--fps", 4, "--animation", out)
    advised = tmp_path / "pipeline/animation.webp"
    assert result.stdout == f"wrote {out}\n--animation {advised} puts it on the model card\n"
    frames, durations = decoded(out, "L")
    assert durations == [250] * 4 + [2000]
    seeded = dict(generator=torch.Generator().manual_seed(3), num_inference_steps=4, eta=0.0)
    images = pipeline(2, class_labels="bee", output_type="latent", **seeded).images
    assert np.array_equal(tiles(frames[-1], 2, (8, 8), 16, 2), pixels(images))
    assert "animation" not in card.read_text()
    result = sample(tmp_path / "pipeline", "--count", 3, "--animation", advised)
    assert result.stdout == f"wrote {advised}\n{card} shows it\n"
    assert "![from noise to samples](animation.webp)" in card.read_text()
    card.write_text("mine")
    assert sample(tmp_path / "pipeline", "--count", 1, "--animation", advised).stdout == f"wrote {advised}\n"
    assert card.read_text() == "mine"


def test_what_the_command_refuses(make_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline = make_pipeline()
    pipeline.save_pretrained("plain")
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained("solver")
    upsampler = DDPMSuperResolutionPipeline(
        make_pipeline(sample_size=16, channels=2, out_channels=1).unet, VariationalDDPMScheduler(), low_resolution=8
    )
    upsampler.save_pretrained("upsampler")
    CascadePipeline(make_pipeline(), upsampler).save_pretrained("cascade")
    before = sorted(os.listdir())
    for argv, message in [
        (["none", "--animation", "a.png"], "a.png: animations are written as .gif, .webp or .mp4"),
        (["none", "--animation", "a.gif", "--out", "a.png"], "--animation and --out make two pictures; give one of them"),
        (["none", "--animation", "a.gif", "--progressive", 2], "--animation and --progressive make two pictures"),
        (["none", "--animation", "a.gif", "--show", "x"], "--show: invalid choice"),
        (["none", "--animation", "a.gif", "--fps", 0], "--fps: 0 must be a number, 1 to 50"),
        (["solver", "--animation", "a.gif"], "--show both needs steps that predict x_0, as those of DDPM and DDIM; show x_t"),
        (["upsampler", "--animation", "a.gif"], "--animation is not for a DDPMSuperResolutionPipeline"),
        (["cascade", "--animation", "a.gif"], "--animation is not for a CascadePipeline"),
    ]:  # fmt: skip
        result = sample(*argv, check=False)
        assert result.returncode and message in result.stderr.splitlines()[-1], result.stderr
        assert sorted(os.listdir()) == before
    sample("solver", "--animation", "a.gif", "--show", "x_t", "--count", 1)
    assert Image.open("a.gif").n_frames == 5
