"""Networks in the files of other code bases. No part of a published pipeline.py."""

import os
from pathlib import Path

import torch

from ddpm_hf.arguments import check_argument, shown
from ddpm_hf.command_help import did_you_mean
from ddpm_hf.files.saved_config import saved_class
from ddpm_hf.original.checkpoint import Original, open_original
from ddpm_hf.original.options import Options
from ddpm_hf.original.writing import FORMATS, original_tensors, write_original

# arguments of a network that change neither its tensors nor its outputs in evaluation mode
WITHOUT_EFFECT = ("sample_size", "dropout", "scheduler")

# options of the process, which a written file does not hold
NOT_WRITTEN = ("image_size", "small_size", "noise_schedule", "diffusion_steps", "rescale_timesteps", "var_type")


class SingleFileModel:
    """Base class of networks that open and write the checkpoints of OpenAI's, Ho et al.'s and Song et al.'s code."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike,
        like: str | None = None,
        weights: str = "ema",
        torch_dtype: torch.dtype | None = None,
        **options: object,
    ):
        """Opens the network in a checkpoint file of another code base.

        Args:
            pretrained_model_link_or_path: a file of guided-diffusion, improved-diffusion, pytorch_diffusion, ddim or
                score_sde_pytorch, or its address on the Hub; or the variables of diffusion (TensorFlow) as an .npz or a
                folder of .npy.
            like: the published checkpoint whose configuration it has, such as "256x256_diffusion_uncond". None: the names of
                the file and its folders decide; a file without a known name needs options.
            weights: "ema" for averaged weights if the file has them, "raw" for the others.
            torch_dtype: of the weights; None for that of the file.
            options: what the file does not say, by the names of the original flags: num_heads, image_size, ... They override
                those of `like`. An error lists those that are missing; `ddpm-hf convert --help` explains them.

        Returns:
            The network in evaluation mode, on the CPU.

        Raises:
            ValueError: the file is of another kind, damaged, or would run code; the network is not supported, not that of
                `like`, or of another class; an option is missing, unknown, or contradicts the tensors. One line.
            OSError: the file is missing or cannot be read.
        """
        original = open_original(pretrained_model_link_or_path, like, weights, **options)
        return cls.from_original(original, torch_dtype)

    @classmethod
    def from_original(cls, original: Original, torch_dtype: torch.dtype | None = None):
        """Builds the network of an opened checkpoint, around the tensors of its file. Raises ValueError."""
        name = original.description.network
        if name != saved_class(cls).__name__:
            raise ValueError(f"{original.path} holds a {name}; open it with {name}.from_single_file")
        try:
            with torch.device("meta"):
                network = cls(**original.description.config)
        except ValueError as error:
            raise ValueError(f"{original.path}: {error}") from None
        shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
        network.load_state_dict(original.state_dict(shapes), assign=True)
        network.register_to_config(_ddpm_hf={**network.own_settings(), "original": original.options})
        if torch_dtype is not None:
            torch.nn.Module.to(network, torch_dtype)  # type: ignore[call-overload]  # diffusers' own method warns
        return network.eval()

    def save_single_file(self, path: str | os.PathLike, format: str, **options: object) -> None:
        """Writes the weights as a checkpoint of another code base. Opened from there, they get their original bytes again.

        Args:
            path: the file, which is replaced if it exists. It ends as that code's files do, such as .pt; an error lists
                the endings.
            format: "guided-diffusion", "improved-diffusion", "pytorch_diffusion", "ddim", "diffusion" (an .npz of
                TensorFlow's variables) or "score_sde_pytorch".
            options: as for `from_single_file`. A network that was opened from a file needs none.

        Raises:
            ValueError: an unknown format or ending; a setting of the network that the format lacks; missing options.
            OSError: the folder is missing or not writable.
        """
        path = Path(path)
        if format not in FORMATS:
            raise ValueError(
                f"format={shown(format)} is not known"
                f"{did_you_mean(format, list(FORMATS)) or '; choose one of ' + ', '.join(FORMATS)}"
            )
        if path.suffix not in FORMATS[format].suffixes:
            raise ValueError(f"{path} must end in {' or '.join(FORMATS[format].suffixes)} for {format}")
        if exponents := self.arguments.get("fourier_features"):
            raise ValueError(f"{format} has no network with fourier_features={shown(exponents)}; there it is None")
        known = {**check_argument("original", self.own_settings().get("original", {}), dict)}
        sigmas = check_argument("original.sigmas", known.pop("sigmas", None), list[float] | None)
        checked = Options(known | options)
        tensors = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        theirs = original_tensors(format, self.arguments, checked, tensors, sigmas)
        self._check_described_by(theirs, format, checked)
        write_original(path, format, theirs)

    def _check_described_by(self, theirs, format, options):
        """Raises ValueError if the tensors and options, opened again, would give another network."""
        description = FORMATS[format].code.describe(theirs, options)
        options.missing = [name for name in options.missing if name not in NOT_WRITTEN]
        options.check_complete(f"{format}: the network")
        with torch.device("meta"):
            twin = type(self)(**description.config)
        for key, value in self.arguments.items():
            if key not in WITHOUT_EFFECT and _as_list(value) != _as_list(twin.arguments[key]):
                raise ValueError(
                    f"{format} has no network with {key}={shown(value)}; there it is {shown(twin.arguments[key])}"
                )


def _as_list(value):
    return list(value) if isinstance(value, tuple) else value
