import pytest
import torch

from ddpm_hf import DDPMImagePipeline, DDPMUNet, VariationalDDPMScheduler


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def make_pipeline():
    """A tiny pipeline whose network is not the zero function."""

    def make(sample_size=8, channels=1, scheduler=None, out_channels=None, **unet):
        net = DDPMUNet(
            sample_size=sample_size,
            in_channels=channels,
            out_channels=out_channels or channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **unet,
        )
        net.reset_parameters("torch")
        pipeline = DDPMImagePipeline(net.eval(), scheduler or VariationalDDPMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make
