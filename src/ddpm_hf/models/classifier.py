"""A classifier of noisy images, for classifier guidance (Dhariwal & Nichol 2021, section 4: "ADM")."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from ddpm_hf.arguments import checked_arguments, shown, sides
from ddpm_hf.files.saved_config import package_only
from ddpm_hf.models.blocks import ActivatedNorm
from ddpm_hf.models.network_config import DOWN_BLOCKS, MAX_PARAMETERS, NETWORK_RANGES, plain_names
from ddpm_hf.models.unet import DDPMUNet, Encoder, time_tensor

POOLS = ("attention", "average")


# the keys of `DDPMUNet` that `Encoder` reads, with their defaults
ENCODER_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(DDPMUNet.__init__).parameters.items()
    if name not in ("self", "up_block_types")
}


class AttentionPool(nn.Module):
    """(B, C, H, W) -> (B, outputs): attention of the mean to all positions (Radford et al. 2021, as in ADM)."""

    def __init__(self, positions, channels, head_dim, outputs):
        super().__init__()
        self.heads = channels // head_dim
        self.positional_embedding = nn.Parameter(torch.randn(positions + 1, channels) / channels**0.5)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, outputs)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)  # (B, HW, C)
        x = torch.cat((x.mean(1, keepdim=True), x), dim=1) + self.positional_embedding
        q, k, v = (
            to(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for to, h in ((self.to_q, x[:, :1]), (self.to_k, x), (self.to_v, x))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))


class AveragePool(nn.Module):
    """(B, C, H, W) -> (B, outputs): the mean over all positions, and a linear layer."""

    def __init__(self, channels, outputs):
        super().__init__()
        self.to_out = nn.Linear(channels, outputs)

    def forward(self, x):
        return self.to_out(x.mean((2, 3)))


class NoisyClassifier(Encoder):
    """log p(y | x_t): the way down and the middle of `DDPMUNet`, then a pool over the positions (ADM, section 4).

    Args:
        sample_size: side of the images, or (height, width).
        in_channels, block_out_channels, down_block_types, layers_per_block, attention_head_dim, norm_num_groups, norm_eps,
            dropout, downsample_type, resnet_time_scale_shift, num_attention_heads, sinusoid_dim: as in `DDPMUNet`; the
            defaults are ADM's blocks.
        num_classes: labels are 0 .. num_classes - 1.
        pool: "attention" or "average".
        scheduler: config of the scheduler whose x_t it was trained on; a pipeline compares it with its own.

    Raises:
        ValueError: the config is not supported, or beyond the limits of `DDPMUNet`; one line that names the key, the value
            and what is supported.
    """

    source_name = "noisy_classifier"

    @checked_arguments(**NETWORK_RANGES, num_classes="[2, 100000000]", pool=POOLS)
    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int],
        num_classes: int,
        in_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 256, 384, 512),
        down_block_types: tuple[str, ...] = (
            "ResnetDownsampleBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
        ),
        layers_per_block: int = 4,
        attention_head_dim: int | None = 64,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        downsample_type: str = "resnet",
        resnet_time_scale_shift: str = "scale_shift",
        pool: str = "attention",
        scheduler: dict | None = None,
        num_attention_heads: int | None = None,
        sinusoid_dim: int | None = None,
    ):
        super().__init__()
        if any(name in DOWN_BLOCKS and DOWN_BLOCKS[name].ncsnpp for name in plain_names(down_block_types)):
            raise ValueError(
                f"down_block_types={shown(down_block_types)} has Skip blocks, which are for DDPMUNet; use other blocks"
            )
        encoder_config = {key: value for key, value in self.config.items() if key in ENCODER_DEFAULTS}
        # attention in the middle is normalized, as in ADM
        self._build_encoder({**ENCODER_DEFAULTS, **encoder_config, "attn_norm_num_groups": norm_num_groups})
        channels, stride = block_out_channels[-1], 2 ** (len(block_out_channels) - 1)
        height, width = sides(sample_size)
        if height % stride or width % stride:
            raise ValueError(
                f"sample_size={shown(sample_size)} must be a multiple of {stride}: block_out_channels has "
                f"{len(block_out_channels)} levels, each halving the image"
            )
        self.conv_norm_out = ActivatedNorm(norm_num_groups, channels, norm_eps, F.silu)
        if pool == "attention":
            head_dim = channels // num_attention_heads if num_attention_heads else attention_head_dim or channels
            if channels % head_dim:
                raise ValueError(
                    f"attention_head_dim={head_dim} must divide the last of block_out_channels, {channels}"
                )
            positions = height * width // stride**2
            if positions * channels > MAX_PARAMETERS:
                raise ValueError(
                    f"sample_size={shown(sample_size)} gives the pool {positions:,} positions of {channels} channels; take "
                    "pool='average', more levels or smaller images"
                )
            self.head: nn.Module = AttentionPool(positions, channels, head_dim, num_classes)
        else:
            self.head = AveragePool(channels, num_classes)
        self.reset_parameters("torch")

    @property
    @package_only
    def arguments(self) -> dict[str, Any]:
        """All arguments of the constructor with their values."""
        return {
            name: self.config[name] for name in inspect.signature(NoisyClassifier.__init__).parameters if name != "self"
        }

    @property
    def num_classes(self) -> int:
        """The number of classes, labeled 0 to num_classes - 1."""
        return self.config.num_classes

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float | int) -> torch.Tensor:
        """Classifies noisy images.

        Args:
            sample: noisy images x_t, (B, in_channels, H, W), of the config's size.
            timestep: 0-based t as a number, a 0-d tensor or (B,).

        Returns:
            (B, num_classes) logits, of the dtype of the weights.

        Raises:
            ValueError: a wrong shape.
        """
        t = time_tensor(timestep, sample.device)
        self.check_images(sample, t)
        height, width = sides(self.config.sample_size)
        if sample.shape[2:] != (height, width):
            raise ValueError(f"sample is {sample.shape[2]}x{sample.shape[3]}; this classifier takes {height}x{width}")
        return self.head(self.conv_norm_out(self.encode(sample, self.embed(t.reshape(-1)))[0]))

    def gradient(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor | float | int,
        class_labels: torch.Tensor,
        scale: torch.Tensor | float = 1.0,
    ) -> torch.Tensor:
        """The gradient of scale * log p(y | x_t) with respect to x_t.

        Args:
            x_t, t: as in `forward`.
            class_labels: y, int64 (B,).
            scale: a number, or (B, 1, 1, 1).

        Returns:
            (B, C, H, W) float32. The weights get no gradients, and the graph is freed.
        """
        # a caller may be in inference mode, whose tensors have no gradients
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x_t.device.type, enabled=False):
            x = x_t.detach().to(self.dtype, copy=True).requires_grad_()
            t = t.clone() if isinstance(t, torch.Tensor) else t
            log_probabilities = F.log_softmax(self(x, t).float(), dim=-1)
            chosen = log_probabilities.gather(1, class_labels.to(x.device, copy=True)[:, None])
            return torch.autograd.grad(chosen.sum(), x)[0].float() * scale
