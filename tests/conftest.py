import os
import tempfile
from pathlib import Path

from support.hub_server import HubServer

# networks this small are slower on more threads, and far slower beside other work; torch reads it when it is imported
os.environ["OMP_NUM_THREADS"] = "1"
# huggingface_hub reads these when it is imported
FOLDER = tempfile.TemporaryDirectory(prefix="ddpm-hf-hub-")
HUB = HubServer(Path(FOLDER.name) / "hub")
os.environ.update(HF_ENDPOINT=HUB.url, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_TOKEN="writer")
os.environ.update(HF_HOME=f"{FOLDER.name}/home", HF_HUB_DISABLE_TELEMETRY="1")

if os.environ.get("SIMULATED_ACCELERATOR"):  # "cuda" or "mps"; torch finds it when it is imported
    from support import simulated_accelerator

    simulated_accelerator.start(os.environ["SIMULATED_ACCELERATOR"])

import pytest  # noqa: E402
import torch  # noqa: E402

from ddpm_hf import DDPMImagePipeline, DDPMSuperResolutionPipeline, VariationalDDPMScheduler  # noqa: E402
from support.networks import small_unet  # noqa: E402


@pytest.fixture(scope="session")
def hub():
    """A Hub of files on 127.0.0.1; the token is that of its user "user"."""
    with HUB:
        yield HUB


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def folder_of_a_stranger():
    """An empty folder of a user who is not root: root may do everything. Its parents may be passed."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def make_pipeline():
    """A tiny pipeline whose network is not the zero function."""

    def make(sample_size=8, channels=1, scheduler=None, out_channels=None, **unet):
        channels = dict(in_channels=channels, out_channels=out_channels or channels)
        net = small_unet(sample_size=sample_size, **channels, **unet)
        pipeline = DDPMImagePipeline(net, scheduler or VariationalDDPMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture
def make_upsampler():
    """A tiny super-resolution pipeline whose network is not the zero function."""

    def make(channels=1, noise=0.0, learned=False, size=16, low=8, **unet):
        in_channels, out_channels = 2 * channels + (noise > 0), channels * (2 if learned else 1)
        net = small_unet(sample_size=size, in_channels=in_channels, out_channels=out_channels, **unet)
        scheduler = VariationalDDPMScheduler(variance_type="learned_range" if learned else "fixed_small")
        kwargs = dict(low_resolution=low, conditioning_noise=noise)
        pipeline = DDPMSuperResolutionPipeline(net, scheduler, **kwargs)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make
