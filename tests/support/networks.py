"""Small networks that are not the zero function, for 8x8 grey images."""

from ddpm_hf import DDPMUNet, NoisyClassifier

SIZES = dict(sample_size=8, in_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
DOWN = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"))


def small_unet(cls=DDPMUNet, **config):
    """A network in evaluation mode, with torch's random weights; `config` overrides."""
    unet = cls(**SIZES | DOWN | dict(out_channels=1, up_block_types=("AttnUpBlock2D", "UpBlock2D")) | config)
    unet.reset_parameters("torch")
    return unet.eval()


def small_classifier(cls=NoisyClassifier, **config):
    """A classifier of 4 classes in evaluation mode; `config` overrides."""
    return cls(**SIZES | DOWN | dict(num_classes=4, attention_head_dim=8) | config).eval()
