"""The U-Net of denoising diffusion models.

The network of Ho, Jain, Abbeel 2020 (appendix B: "the paper") with the switches that Improved DDPM (Nichol & Dhariwal
2021), ADM (Dhariwal & Nichol 2021) and Score-SDE (Song et al. 2020) added. Config keys, state-dict keys and outputs are
those of diffusers' `UNet2DModel`, so that either class opens the other's checkpoints.
"""

import inspect
import math
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel, UNet2DOutput
from torch import nn

from ddpm_hf.arguments import checked_arguments
from ddpm_hf.files.saved_config import SavedConfig, package_only
from ddpm_hf.models.blocks import ACTIVATIONS, EmbeddingMLP, ResidualBlock, SelfAttention, append_fourier_features
from ddpm_hf.models.factory import BlockFactory
from ddpm_hf.models.metadata import NetworkMetadata, own_settings_of
from ddpm_hf.models.ncsnpp import SkipUpLevel
from ddpm_hf.models.network_config import (
    NETWORK_RANGES,
    OWN_DEFAULTS,
    OWN_PREFIX,
    block_types_down,
    block_types_up,
    check_config,
    has_ncsnpp_levels_only,
)
from ddpm_hf.models.weights import CheckedModel


class Encoder(NetworkMetadata, SavedConfig, CheckedModel):
    """Embeddings, the way down and the middle: what `DDPMUNet` has in common with classifiers of noisy images."""

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm"]
    _no_split_modules = ["ResidualBlock", "SelfAttention"]
    _repeated_blocks = ["ResidualBlock"]

    def _build_encoder(self, config):
        """Makes the modules by the keys of `DDPMUNet`; returns their factory and the channels of the skip connections."""
        check_config(config, type(self).__name__)
        factory, channels = BlockFactory(config), tuple(config["block_out_channels"])

        # time and class embeddings, summed
        self.time_proj, time_dim = factory.time_projection()
        self.time_embedding = EmbeddingMLP(time_dim, factory.emb_dim)
        self.act = ACTIVATIONS[factory.act_fn]
        self.class_embedding = factory.class_embedding(time_dim)

        # down
        self.fourier_features = tuple(config["fourier_features"] or ())
        planes = config["in_channels"] * (1 + 2 * len(self.fourier_features))
        self.conv_in = nn.Conv2d(planes, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        skip_channels, c_in, image_channels = [channels[0]], channels[0], config["in_channels"]
        for i, (block_type, c) in enumerate(zip(block_types_down(config), channels)):
            is_last = i == len(channels) - 1
            self.down_blocks.append(factory.down_level(block_type, c_in, c, image_channels, is_last))
            skip_channels += [c] * (config["layers_per_block"] + (not is_last))
            c_in = image_channels = c

        self.mid_block = factory.mid_level()
        return factory, skip_channels

    def reset_parameters(self, scheme: str = "paper") -> None:
        """Draws new weights in place. The config does not record the scheme: a loaded checkpoint keeps its own weights.

        Args:
            scheme: "paper": Glorot-uniform weights, zero biases, and zeros in the last convolution of each residual block,
                in attention's output projection and in the output layers, as in the paper's code (there 1e-10 in place of
                0), so that the network begins as the zero function. "torch": the default of each torch layer, as
                diffusers' class.

        Raises:
            ValueError: unknown scheme.
        """
        if scheme not in ("paper", "torch"):
            raise ValueError(f"scheme={scheme!r} is not known; choose 'paper' or 'torch'")
        zero = {getattr(self, "conv_out", None)}
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                zero.add(module.conv2)
            elif isinstance(module, SelfAttention):
                zero.add(module.to_out[0])
            elif isinstance(module, SkipUpLevel):
                zero.add(module.skip_conv)
        for module in self.modules():
            if scheme == "torch" or isinstance(module, (nn.GroupNorm, nn.Embedding)):
                if hasattr(module, "reset_parameters") and module is not self:
                    module.reset_parameters()
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # all have one
                nn.init.zeros_(module.weight) if module in zero else nn.init.xavier_uniform_(module.weight)

    def embed(self, t: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """The activated time and class embedding: (B, embedding width), or (1, ...) for one t (1,) without labels."""
        emb = self.time_embedding(self.time_proj(t))
        if self.class_embedding is not None:
            classes = class_labels.to(t.device)
            if self.config.class_embed_type == "timestep":
                classes = self.time_proj(classes)
            emb = emb + self.class_embedding(classes).to(emb.dtype)
        return self.act(emb)  # once here, not in each residual block

    def encode(
        self, sample: torch.Tensor, emb: torch.Tensor, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(B, in_channels, H, W) and `embed`'s output -> the output of the middle, and the skip connections, finest first.

        dtype: that of the weights; None for that of the sample.
        """
        x = 2 * sample - 1 if self.config.get("center_input_sample") else sample
        image = x.to(dtype or x.dtype)
        if self.fourier_features:
            x = self.conv_in(append_fourier_features(x, self.fourier_features, image.dtype))
        else:
            x = self.conv_in(image)
        skips = [x]
        for block in self.down_blocks:
            x, image = block(x, emb, skips, image)
        if self.mid_block is not None:
            x = self.mid_block(x, emb)
        return x, skips

    def check_images(self, sample: torch.Tensor, t: torch.Tensor) -> None:
        """Raises ValueError for images of a wrong shape, and for times that are not one for all or one for each."""
        config = self.config
        stride = 2 ** (len(config.block_out_channels) - 1)
        if sample.dim() != 4 or sample.shape[1] != config.in_channels:
            shape = tuple(sample.shape)
            raise ValueError(
                f"sample has shape {shape}; this network takes (batch, {config.in_channels}, height, width)"
            )
        if sample.shape[2] % stride or sample.shape[3] % stride:
            height, width = sample.shape[2:]
            raise ValueError(
                f"sample is {height}x{width}; height and width must be multiples of {stride} (pad or resize)"
            )
        if t.dim() > 1 or (t.dim() == 1 and t.shape[0] not in (1, sample.shape[0])):
            raise ValueError(
                f"timestep has shape {tuple(t.shape)}; give a number or one for each of {sample.shape[0]} images"
            )
        if config.get("time_embedding_type") == "learned":
            _check_range("timestep", t, config.num_train_timesteps)


class _StandsForUNet2DModel(type(ModelMixin)):
    """The type of a class that compares equal to diffusers' `UNet2DModel`: `from_pipe` compares the classes of components."""

    def __eq__(cls, other):
        return cls is other or other is UNet2DModel

    __hash__ = type.__hash__


class DDPMUNet(Encoder, metaclass=_StandsForUNet2DModel):
    """A U-Net that predicts, from a noisy image and its timestep, what the scheduler's `prediction_type` says.

    It has the config keys and defaults of diffusers' `UNet2DModel`, opens its checkpoints and returns the same outputs. It is
    saved under the name of that class, so that a published folder opens without this package. If it `has_own_settings`, it is
    saved under its own name, with its source beside it.

    Block types, and the same with Up for Down:
        DownBlock2D, AttnDownBlock2D: the paper's levels, without and with attention.
        ResnetDownsampleBlock2D: a level that resamples within a residual block (ADM).
        SkipDownBlock2D, AttnSkipDownBlock2D: the levels of NCSN++ (Score-SDE, appendix H). Beside them the image goes down,
            and the output up, as pyramids of 3 channels. Their number of groups does not depend on `norm_num_groups`, which
            is for the other levels, the middle and the output.
    `mid_block_type` is UNetMidBlock2D or None; `network_config.CHOICES` has the values of the other choices.
    `attention_head_dim=None` means one head over all channels, as in the paper. The weights of a new network are drawn as
    in the paper's code, see `reset_parameters`.

    An argument that `UNet2DModel` does not have:
        fourier_features: exponents n; the first convolution also gets sin(2^n pi x) and cos(2^n pi x) of each input channel x
            (VDM: Kingma et al. 2021), which show the position of x within a grey level: (7, 8) for 256 levels, (3, 4) for
            17. x in half precision lacks these bits: use autocast rather than weights in half precision.
    Further arguments, for the authors' checkpoints:
        num_attention_heads: number of heads of every attention, in place of `attention_head_dim` (IDDPM, ADM).
        up_attention_heads: another number on the way up (`num_heads_upsample` of IDDPM and ADM).
        sinusoid_dim: number of sines and cosines of the time; None for block_out_channels[0], which ADM for 512 pixels does
            not have. `time_embedding_dim` is four times as many by default.
        sigma_table: (sigma_min, sigma_max, count): the output is divided by the noise level with the index t, in geometric
            steps from sigma_max at 0 to sigma_min at count - 1 (Score-SDE, VE in discrete time).
    For levels other than Skip (Score-SDE, code of DDPM++ and NCSN++):
        up_attention: "last" for one attention in a level on the way up, after its last residual block; "every" for one
            after each block.
        block_scale_factor: outputs of residual blocks and of attention are divided by it; in the middle by
            `mid_block_scale_factor`.
        resample_shortcut: residual blocks that resample have a 1x1 convolution as shortcut.
        fir_resampling: these blocks resample by a FIR filter, not by mean and nearest neighbor.
        input_pyramid: "residual": the image is halved by strided convolutions and added to each level on the way down.
        norm_num_groups: None for min(C // 4, 32) groups in each norm of C channels.
    `config` holds these values under "_ddpm_hf"; `arguments` has all. UNet2DModel refuses such a network.

    Limits keep a downloaded config from asking for all memory: sides and channels of at most 65,536, 16 levels of 64 blocks,
    and 20 billion parameters by an upper bound that is two to four times their number.

    Raises:
        ValueError: the config is not supported; one line that names the key, the value and what is supported.
    """

    stock_class = "UNet2DModel"
    source_name = "ddpm_unet"
    stands_for = ("UNet2DModel",)

    @checked_arguments(**NETWORK_RANGES)
    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int | None = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        num_attention_heads: int | None = None,
        up_attention_heads: int | None = None,
        sinusoid_dim: int | None = None,
        up_attention: str = "every",
        block_scale_factor: float = 1,
        resample_shortcut: bool = False,
        fir_resampling: bool = False,
        input_pyramid: str | None = None,
        sigma_table: tuple[float, float, int] | None = None,
        fourier_features: tuple[int, ...] | None = None,
    ):
        super().__init__()
        self.sample_size, self.sigma_table = sample_size, sigma_table
        config = dict(self.config)
        factory, skip_channels = self._build_encoder(config)
        channels = tuple(block_out_channels)

        # up: each residual block takes one skip connection, last in first out
        self.up_blocks = nn.ModuleList()
        c_in = channels[-1]
        for i, (block_type, c) in enumerate(zip(block_types_up(config), reversed(channels))):
            skips, is_last = [skip_channels.pop() for _ in range(layers_per_block + 1)], i == len(channels) - 1
            self.up_blocks.append(factory.up_level(block_type, c_in, c, skips, is_last))
            c_in = c

        self.conv_norm_out = factory.output_norm()
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)
        self.reset_parameters()
        self._make_config_stock(config)

    def _make_config_stock(self, config):
        """Moves own settings from the config to "_ddpm_hf", and has UNet2DModel refuse the block types if there are any."""
        own = {key: value for key, default in OWN_DEFAULTS.items() if (value := config.pop(key)) != default}
        settings = self.own_settings()
        if known := sorted(OWN_DEFAULTS.keys() & settings.keys()):
            raise ValueError(f"_ddpm_hf holds {', '.join(known)}; give them as arguments, or use DDPMUNet.from_config")
        if own:
            config["_ddpm_hf"] = settings | own
        groups_per_norm = config["norm_num_groups"] is None and not has_ncsnpp_levels_only(config)
        prefix = OWN_PREFIX if own or groups_per_norm else ""
        for key in ("down_block_types", "up_block_types"):
            names = config[key]
            config[key] = type(names)(prefix + name.removeprefix(OWN_PREFIX) for name in names)
        if "_use_default_values" in config:
            config["_use_default_values"] = [key for key in config["_use_default_values"] if key in config]
        self._internal_dict = FrozenDict(config)

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        """diffusers' hook in `from_config`: the constructor gets the own settings that `config` keeps under "_ddpm_hf"."""
        settings = own_settings_of(config_dict)
        own = {key: settings[key] for key in OWN_DEFAULTS if key in settings}
        arguments, unused, hidden = super().extract_init_dict({**own, **config_dict}, **kwargs)
        if own:
            del hidden["_ddpm_hf"]
            arguments["_ddpm_hf"] = {key: value for key, value in settings.items() if key not in own}
        return arguments, unused, hidden

    @property
    def has_own_settings(self) -> bool:
        """Whether UNet2DModel cannot compute this network, because of arguments that it does not have."""
        return self.config.down_block_types[0].startswith(OWN_PREFIX)

    @property
    @package_only
    def arguments(self) -> dict[str, Any]:
        """All arguments of the constructor with their values, as `config` holds them or `config["_ddpm_hf"]`."""
        settings, values = self.own_settings(), {**self.config}
        values |= {key: settings.get(key, default) for key, default in OWN_DEFAULTS.items()}
        for key in ("down_block_types", "up_block_types"):
            values[key] = type(values[key])(name.removeprefix(OWN_PREFIX) for name in values[key])
        names = list(inspect.signature(DDPMUNet.__init__).parameters)[1:]
        return {name: values[name] for name in names}

    @property
    def is_stock(self) -> bool:
        """Whether diffusers' `UNet2DModel` gives the same outputs."""
        return not self.has_own_settings

    @property
    def null_class(self) -> int | None:
        """The label that means "no class" in a network trained with label dropout (Ho & Salimans 2021); None without one.

        It is the last label of the table, and stands under "_ddpm_hf" in the config:
        DDPMUNet(..., num_class_embeds=11, _ddpm_hf={"null_class": 10}).

        Raises:
            ValueError: it is not the last label.
        """
        null, classes = self.own_settings().get("null_class"), self.config.num_class_embeds
        if null is not None and (self.config.class_embed_type is not None or null != (classes or 0) - 1):
            raise ValueError(f"null_class={null} must be the last of the network's classes, num_class_embeds={classes}")
        return null

    @property
    def num_classes(self) -> int | None:
        """The number of classes, labeled 0 to num_classes - 1, without `null_class`; None without a table of classes."""
        classes = self.config.num_class_embeds if self.config.class_embed_type is None else None
        return classes if classes is None or self.null_class is None else classes - 1

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Denoises images: returns what the network predicts for noisy images and their timesteps.

        Args:
            sample: noisy images (B, in_channels, H, W), floating point; H and W divisible by 2**(levels - 1).
            timestep: 0-based timestep t as a number, a 0-d tensor or a (B,) tensor (the paper's t is one more); with
                fourier embedding the noise level instead, above 0.
            class_labels: with num_class_embeds, int64 (B,) in [0, num_class_embeds); with class_embed_type "timestep",
                numbers (B,); with "identity", embeddings (B, time embedding width); None for an unconditional network.
                Ranges are checked for labels and learned timesteps on the CPU only: on an accelerator the check would
                wait for the device.
            return_dict: False for a tuple.

        Returns:
            `UNet2DOutput` with `.sample` (B, out_channels, H, W), of the dtype of the weights.

        Raises:
            ValueError: a wrong shape, missing, superfluous or out-of-range labels; before anything is computed.
        """
        t = time_tensor(timestep, sample.device)
        self.check_inputs(sample, t, class_labels)
        emb = self.embed(t.reshape(-1), class_labels)
        x = self.divide_by_noise_level(self.denoise(sample, emb), t)
        return UNet2DOutput(sample=x) if return_dict else (x,)

    def denoise(self, sample: torch.Tensor, emb: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The network after its embedding: arguments as `encode` -> (B, out_channels, H, W)."""
        x, skips = self.encode(sample, emb, dtype)
        image = None
        for block in self.up_blocks:
            x, image = block(x, emb, skips, image)
        x = self.conv_out(self.conv_norm_out(x))
        return x if image is None else x + image

    def divide_by_noise_level(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """`denoise`'s output as `forward` returns it. With fourier embedding t, (), (1,) or (B,), is the noise level sigma,
        and the output is sigma times the score. With `sigma_table` sigma is entry t of the table.
        """
        if self.sigma_table is not None:
            sigma_min, sigma_max, count = self.sigma_table
            start, end = math.log(sigma_max), math.log(sigma_min)
            t = t.to(torch.float32 if t.device.type == "mps" else torch.float64)  # MPS has no float64
            t = torch.exp(start + t * ((end - start) / (count - 1)))
        elif self.config.time_embedding_type != "fourier":
            return x
        return (x / t.reshape(-1, 1, 1, 1)).to(x.dtype)

    def check_inputs(self, sample: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None) -> None:
        """Raises ValueError as `forward`; t is `time_tensor`'s."""
        self.check_images(sample, t)
        config = self.config
        if self.sigma_table is not None:
            _check_range("timestep", t.long(), int(self.sigma_table[2]))
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError("class_labels were given, but this network has no class embedding; leave them out")
            return
        if class_labels is None:
            raise ValueError("class_labels are missing; this network is class-conditional and needs one for each image")
        kind = config.class_embed_type
        width = (self.time_embedding.linear_2.out_features,) if kind == "identity" else ()
        shape = (sample.shape[0], *width)
        if tuple(class_labels.shape) != shape:
            raise ValueError(
                f"class_labels has shape {tuple(class_labels.shape)} for a batch of {sample.shape[0]} images; give {shape}"
            )
        if kind is None:
            _check_range("class_labels", class_labels, config.num_class_embeds)
        elif kind == "timestep" and config.time_embedding_type == "learned":
            _check_range("class_labels", class_labels, config.num_train_timesteps)


def time_tensor(timestep: torch.Tensor | float | int, device: torch.device) -> torch.Tensor:
    """A timestep, or one for each image, as a tensor on `device`: () or (B,).

    A number on the host is written to the device by a kernel, because the host would wait for a copy at every sampling step.
    In a compiled graph it is copied: reading its value would break the graph.
    """
    t = torch.as_tensor(timestep)
    if device.type == "mps" and t.dtype == torch.float64:  # MPS has no float64
        t = t.float()
    if t.dim() == 0 and t.device.type == "cpu" != device.type and not torch.compiler.is_compiling():
        return torch.full((), t.item(), dtype=t.dtype, device=device)
    return t.to(device)


def _check_range(name, values, end):
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return  # reading the values would wait for the device, or break the graph
    if values.is_floating_point():
        raise ValueError(f"{name} has dtype {values.dtype}; it indexes a table and must be of an integer dtype")
    low, high = values.min().item(), values.max().item()
    if low < 0 or high >= end:
        raise ValueError(f"{name} has the value {low if low < 0 else high}; the range is 0 to {end - 1}")
