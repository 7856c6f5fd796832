"""What a checkpoint does not say about its network and process: options with the names of the original flags."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ddpm_hf.arguments import check_argument, shown
from ddpm_hf.command_help import did_you_mean


class Option(NamedTuple):
    """An option: its type, its allowed values, and one line of help."""

    kind: Any
    allowed: str | tuple | None
    help: str


def _flag(help):
    return Option(bool, None, f"{help}: True or False")


SIDE, CHANNELS, LEVEL = "[1, 65536]", "[-1, 65536]", "[0.000001, 1000000]"

TIMESTEPS = Option(int, "[1, 100000]", "number of timesteps T (Ho et al.: 1000)")
ALL, OPENAI = "all code bases", "guided-diffusion, improved-diffusion"
HO, SONG = "pytorch_diffusion, ddim, diffusion", "score_sde_pytorch"

# code bases -> their options, by the names of their flags; in parentheses what happens without the option
OPTIONS_OF = {
    ALL: {
        "image_size": Option(int, SIDE, "height and width of the images, in pixels"),
        "dropout": Option(float, "[0, 1)", "dropout rate; only fine-tuning uses it (0)"),
    },
    OPENAI: {
        "small_size": Option(int, SIDE, "upsampler: height and width of the low-resolution images"),
        "num_res_blocks": Option(
            int, "[1, 64]", "classifier: residual blocks of a level, if several numbers fit the file"
        ),
        "num_heads": Option(int, "[1, 1024]", "heads of every attention, whatever its channels"),
        "num_head_channels": Option(int, CHANNELS, "channels of each attention head, in place of num_heads"),
        "num_heads_upsample": Option(int, "[-1, 1024]", "heads on the way up (num_heads)"),
        "use_new_attention_order": _flag(
            "whether tensors hold q of all heads, then k, then v (new), not q, k, v by head"
        ),
        "noise_schedule": Option(str, ("linear", "cosine"), "schedule of the betas: linear or cosine"),
        "diffusion_steps": TIMESTEPS,
        "rescale_timesteps": _flag("whether the network is given t * 1000 / T in place of t"),
    },
    HO: {
        "var_type": Option(
            str,
            ("fixedlarge", "fixedsmall"),
            "variance of a reverse step: fixedlarge (beta_t) or fixedsmall (posterior)",
        ),
        "diffusion_steps": TIMESTEPS,
    },
    SONG: {
        "model": Option(str, ("ddpm", "ncsnpp"), "kind of network: ddpm or ncsnpp"),
        "sde": Option(str, ("vpsde", "subvpsde", "vesde"), "process: vpsde, subvpsde or vesde"),
        "continuous": _flag("whether it was trained in continuous time"),
        "fir": _flag("whether residual blocks resample by a FIR filter"),
        "skip_rescale": _flag("whether residual sums are divided by sqrt(2)"),
        "scale_by_sigma": _flag("whether the output is divided by the noise level (True for vesde)"),
        "centered": _flag("whether images are in [-1, 1], not in [0, 1] (False for vesde)"),
        "beta_min": Option(float, "(0, 150]", "VP, sub-VP: beta at t = 0 (0.1)"),
        "beta_max": Option(float, "(0, 300]", "VP, sub-VP: beta at t = 1 (20)"),
        "sigma_min": Option(float, LEVEL, "VE: lowest noise level (that of the file)"),
        "sigma_max": Option(float, LEVEL, "VE: highest noise level (that of the file)"),
        "num_scales": Option(int, "[2, 100000]", "number of noise levels N (that of the file)"),
        "snr": Option(float, "(0, 100]", "VE: signal-to-noise ratio of a corrector step (0.16)"),
    },
}
OPTIONS = {name: option for options in OPTIONS_OF.values() for name, option in options.items()}


class Options(dict):
    """Checked options by name. `missing` lists those that were required and not given.

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
        """The value of an option. If it is missing, any allowed value, so that `check_complete` can list all at once."""
        if name in self:
            return self[name]
        self.report_missing(name)
        kind, allowed, _ = OPTIONS[name]
        return allowed[0] if isinstance(allowed, tuple) else kind(1)

    def report_missing(self, name: str) -> None:
        """Adds an option to `missing`."""
        if name not in self.missing:
            self.missing.append(name)

    def check_complete(self, subject: str, published: Iterable[str] = ()) -> None:
        """Raises ValueError, one line with all missing options, if any is missing.

        Args:
            subject: the beginning of the message.
            published: names that `like` may have instead.
        """
        if self.missing:
            names = ", ".join(published)
            instead = f", or as `like` a published checkpoint of the same configuration: {names}" if names else ""
            raise ValueError(f"{subject} does not say {', '.join(self.missing)}; give these options{instead}")
