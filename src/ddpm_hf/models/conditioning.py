"""The low-resolution image that a super-resolution network sees beside x_t (IDDPM, appendix; ADM, section 5)."""

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor


def downsample(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Shrinks images (B, C, H, W) to (height, width) `size`: each new pixel is the mean of the pixels that it covers."""
    return F.interpolate(images, size, mode="area")


def condition_planes(
    images: torch.Tensor,
    size: tuple[int, int],
    noise_level: torch.Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """The planes that a super-resolution network sees beside x_t: low-resolution images, upsampled bilinearly.

    Args:
        images: (B, C, h, w) in [-1, 1].
        size: (height, width) of x_t.
        noise_level: s, (B,) in [0, 1), for Gaussian conditioning augmentation (Ho et al. 2021, "Cascaded Diffusion Models",
            section 4): the images become sqrt(1 - s^2) images + s noise, and s is one more plane. None: neither.
        generator: of that noise.

    Returns:
        (B, C, height, width), or (B, C + 1, height, width) with a noise level.
    """
    if noise_level is None:
        return F.interpolate(images, size, mode="bilinear", align_corners=False)
    std = noise_level.to(images).view(-1, 1, 1, 1)
    noise = randn_tensor(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    planes = F.interpolate(images * (1 - std**2).sqrt() + std * noise, size, mode="bilinear", align_corners=False)
    return torch.cat((planes, std.expand(-1, 1, *size)), dim=1)


class Conditioned:
    """A network with fixed planes (B, P, H, W) beside x_t, called like a network without them.

    x_t may have a multiple of B images: the planes are then repeated, as guidance needs it.
    """

    def __init__(self, network, planes: torch.Tensor):
        self.network, self.planes = network, planes

    def __call__(self, sample: torch.Tensor, *args, **kwargs):
        planes = self.planes.to(sample).repeat(len(sample) // len(self.planes), 1, 1, 1)
        return self.network(torch.cat((sample, planes), dim=1), *args, **kwargs)
