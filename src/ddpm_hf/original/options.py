"""What a checkpoint does not say of its network and process: options with the names of the original code's flags."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ddpm_hf.arguments import check_argument, shown
from ddpm_hf.command_help import did_you_mean


class Option(NamedTuple):
    """An option: its type, its allowed values, and one line of help."""

    kind: Any
    allowed: str | tuple | None
    help: str


OPENAI = "guided-diffusion"
HO = "pytorch_diffusion"
SONG = "score_sde_pytorch"


OPTIONS = {
    "image_size": Option(int, "[1, 65536]", "side of the images in pixels"),
    "dropout": Option(float, "[0, 1)", "dropout, for fine-tuning (0)"),
    # OpenAI's flags
    "small_size": Option(int, "[1, 65536]", "upsampler: side of the low-resolution images"),
    "num_heads": Option(int, "[1, 1024]", "number of heads of every attention"),
    "num_head_channels": Option(int, "[-1, 65536]", "channels of each head, in place of num_heads"),
    "num_heads_upsample": Option(int, "[-1, 1024]", "number of heads on the way up (num_heads)"),
    "use_new_attention_order": Option(bool, None, "order of the tensors of q, k and v: True or False"),
    "noise_schedule": Option(str, ("linear", "cosine"), "linear or cosine"),
    "diffusion_steps": Option(int, "[1, 100000]", "number of timesteps T"),
    "rescale_timesteps": Option(bool, None, "whether the network is told t * 1000 / T: True or False"),
    # of Ho et al.
    "var_type": Option(str, ("fixedlarge", "fixedsmall"), "fixedlarge or fixedsmall: variance of the reverse process"),
    # of Song et al.
    "model": Option(str, ("ddpm", "ncsnpp"), "ddpm or ncsnpp, whose narrow levels have fewer groups"),
    "sde": Option(str, ("vpsde", "subvpsde", "vesde"), "vpsde, subvpsde or vesde"),
    "continuous": Option(bool, None, "whether the network was trained in continuous time: True or False"),
    "fir": Option(bool, None, "whether residual blocks resample by the FIR filter: True or False"),
    "skip_rescale": Option(bool, None, "whether residual sums are divided by sqrt(2): True or False"),
    "scale_by_sigma": Option(bool, None, "whether the output is divided by the noise level: True or False"),
    "centered": Option(bool, None, "whether images are in [-1, 1] and not in [0, 1]: True or False"),
    "beta_min": Option(float, "(0, 150]", "beta at t = 0 (0.1)"),
    "beta_max": Option(float, "(0, 300]", "beta at t = 1 (20)"),
    "sigma_min": Option(float, "[0.000001, 1000000]", "lowest noise level (that of the checkpoint)"),
    "sigma_max": Option(float, "[0.000001, 1000000]", "highest noise level (that of the checkpoint)"),
    "num_scales": Option(int, "[2, 100000]", "number of noise levels (that of the checkpoint)"),
    "snr": Option(float, "(0, 100]", "signal-to-noise ratio of the corrector of VE (0.16)"),
}


class Options(dict):
    """Checked options by name, which remembers what was asked for in vain.

    Raises:
        ValueError: an unknown name, or a value that is not allowed.
    """

    def __init__(self, options: Mapping[str, Any]):
        for name in options:
            if name not in OPTIONS:
                hint = did_you_mean(name, list(OPTIONS)) or f"; options: {', '.join(OPTIONS)}"
                raise ValueError(f"unknown option {shown(name)}{hint}")
        super().__init__(
            {
                name: check_argument(name, value, *OPTIONS[name][:2])
                for name, value in options.items()
                if value is not None
            }
        )
        self.missing: list[str] = []

    def required(self, name: str) -> Any:
        """The value of an option; a harmless one if it is missing, which `missing` then names."""
        if name in self:
            return self[name]
        self.ask(name)
        kind, allowed, _ = OPTIONS[name]
        return allowed[0] if isinstance(allowed, tuple) else kind(1)

    def ask(self, name: str) -> None:
        """Notes that an option is missing."""
        if name not in self.missing:
            self.missing.append(name)

    def check_complete(self, subject: str, published: Iterable[str]) -> None:
        """Raises ValueError, one line with all missing options, if any is missing."""
        if self.missing:
            raise ValueError(
                f"{subject} does not say {', '.join(self.missing)}; give them as options, or the published checkpoint of the "
                f"same configuration as like, one of {', '.join(published)}"
            )
