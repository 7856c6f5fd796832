"""The U-Net of denoising diffusion models, in one self-contained file.

The network of Ho, Jain, Abbeel 2020 (appendix B: "the paper") with the switches that Improved DDPM (Nichol & Dhariwal
2021), ADM (Dhariwal & Nichol 2021) and Score-SDE (Song et al. 2020) added. Config keys, state-dict keys and outputs are
those of diffusers' `UNet2DModel`, so that either class opens the other's checkpoints.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel, UNet2DOutput
from torch import nn

from ddpm_hf.arguments import checked_arguments, shown
from ddpm_hf.files.label_names import check_label_names
from ddpm_hf.files.saved_config import SavedConfig
from ddpm_hf.models.blocks import (
    ACTIVATIONS,
    FIR,
    ActivatedNorm,
    DownLevel,
    Downsample,
    EmbeddingMLP,
    FourierEmbedding,
    MidLevel,
    ResidualBlock,
    SelfAttention,
    SinusoidalEmbedding,
    UpLevel,
    Upsample,
)
from ddpm_hf.models.ncsnpp import SkipDownLevel, SkipUpLevel
from ddpm_hf.models.weights import CheckedModel

# block name -> has attention
DOWN_BLOCKS = {
    "DownBlock2D": False,
    "AttnDownBlock2D": True,
    "ResnetDownsampleBlock2D": False,
    "SkipDownBlock2D": False,
    "AttnSkipDownBlock2D": True,
}


UP_BLOCKS = {
    "UpBlock2D": False,
    "AttnUpBlock2D": True,
    "ResnetUpsampleBlock2D": False,
    "SkipUpBlock2D": False,
    "AttnSkipUpBlock2D": True,
}


CHOICES = {
    "time_embedding_type": ("positional", "fourier", "learned"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
    "act_fn": tuple(ACTIVATIONS),
}


PREPROCESSING = ("background", "crop", "image_column", "label_column")


# What the arguments of `DDPMUNet` and `NoisyClassifier` may be: beyond these ranges a config is a mistake, or hostile.
CHANNELS = "[1, 65536]"


NETWORK_RANGES = CHOICES | {
    "act_fn": None,  # of any case, as in diffusers: see _check_config
    "sample_size": "[1, 65536]",
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "time_embedding_dim": CHANNELS,
    "freq_shift": "[0, 65536]",
    "block_out_channels": CHANNELS,
    "layers_per_block": "[1, 64]",
    "mid_block_scale_factor": "[0.001, 1000]",
    "downsample_padding": "[0, 1]",
    "dropout": "[0, 1)",
    "attention_head_dim": CHANNELS,
    "norm_num_groups": CHANNELS,
    "attn_norm_num_groups": CHANNELS,
    "norm_eps": "(0, 1]",
    "num_class_embeds": "[1, 100000000]",
    "num_train_timesteps": "[1, 100000]",
}


MOST_LEVELS = 16


MOST_PARAMETERS = 2 * 10**10  # by an upper bound, see _most_parameters


class Encoder(SavedConfig, CheckedModel):
    """Embeddings, the way down and the middle: what `DDPMUNet` has in common with classifiers of noisy images."""

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm"]
    _no_split_modules = ["ResidualBlock", "SelfAttention"]
    _repeated_blocks = ["ResidualBlock"]

    def _build_encoder(self, config):
        """Makes the modules by the keys of `DDPMUNet`.

        Returns:
            resnet(c_in, c_out, ...) and attention(c, ...), which make blocks, of NCSN++ where `ncsnpp` is true, and the
            channels of the skip connections.
        """
        self._check_config(config)
        channels, down_types = tuple(config["block_out_channels"]), _names(config["down_block_types"])
        norm, embedding = config["norm_num_groups"], config["time_embedding_type"]
        layers, padding = config["layers_per_block"], config["downsample_padding"]
        emb_dim = config["time_embedding_dim"] or channels[0] * 4
        shared = dict(
            eps=config["norm_eps"],
            act_fn=config["act_fn"].lower(),
            dropout=config["dropout"],
            scale_shift=config["resnet_time_scale_shift"] == "scale_shift",
        )

        def own_groups(c, groups=None):
            groups = groups or min(c // 4, 32)
            if groups < 1 or c % groups:
                raise ValueError(
                    f"block_out_channels={shown(channels)} gives a Skip block {c} channels, which its {groups} groups do not "
                    "divide; take multiples of 32"
                )
            return groups

        # of NCSN++: the groups are its own whatever norm_num_groups says, and all outputs are scaled
        def resnet(c_in, c_out, ncsnpp=False, output_scale=1, resample=None, groups=None):
            own = ncsnpp or norm is None
            return ResidualBlock(
                c_in,
                c_out,
                emb_dim,
                groups=(own_groups(c_in, groups), own_groups(c_out)) if own else (norm, norm),
                output_scale=2**0.5 if ncsnpp else output_scale,
                resample=resample,
                **shared,
            )

        def attention(c, ncsnpp=False, output_scale=1, groups=norm):
            if ncsnpp:
                output_scale, groups = 2**0.5, own_groups(c, 32)
            head_dim = config["attention_head_dim"] or c
            return SelfAttention(c, head_dim, groups=groups, eps=config["norm_eps"], output_scale=output_scale)

        # time and class embeddings, summed
        time_dim = channels[0]
        if embedding == "positional":
            self.time_proj = SinusoidalEmbedding(time_dim, config["flip_sin_to_cos"], config["freq_shift"])
        elif embedding == "fourier":
            self.time_proj = FourierEmbedding(time_dim)
            time_dim = 2 * time_dim
        else:
            self.time_proj = nn.Embedding(config["num_train_timesteps"], time_dim)
        self.time_embedding = EmbeddingMLP(time_dim, emb_dim)
        self.act = ACTIVATIONS[shared["act_fn"]]
        if config["class_embed_type"] == "timestep":
            self.class_embedding = EmbeddingMLP(time_dim, emb_dim)
        elif config["class_embed_type"] == "identity":
            self.class_embedding = nn.Identity()
        else:
            classes = config["num_class_embeds"]
            self.class_embedding = nn.Embedding(classes, emb_dim) if classes is not None else None

        # down
        self.conv_in = nn.Conv2d(config["in_channels"], channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        skip_channels = [channels[0]]
        c_in = channels[0]
        for i, (name, c) in enumerate(zip(down_types, channels)):
            ncsnpp, down = "Skip" in name, None
            resnets = [resnet(c_in if j == 0 else c, c, ncsnpp) for j in range(layers)]
            attentions = [attention(c, ncsnpp) for _ in resnets] if DOWN_BLOCKS[name] else []
            if i < len(channels) - 1:
                if ncsnpp:
                    down = resnet(c, c, ncsnpp, resample=FIR(up=False))
                else:
                    by_resnet = _by_resnet(name, DOWN_BLOCKS, config["downsample_type"])
                    down = resnet(c, c, resample="down") if by_resnet else Downsample(c, padding)
            self.down_blocks.append((SkipDownLevel if ncsnpp else DownLevel)(resnets, attentions, down))
            skip_channels += [c] * (layers + (down is not None))
            c_in = c

        # middle
        self.mid_block = None
        if config["mid_block_type"] is not None:
            groups = norm or min(c_in // 4, 32)
            groups = config["attn_norm_num_groups"] or (None if shared["scale_shift"] else groups)
            scale = config["mid_block_scale_factor"]
            self.mid_block = MidLevel(
                [resnet(c_in, c_in, output_scale=scale) for _ in range(2)],
                [attention(c_in, output_scale=scale, groups=groups)] if config["add_attention"] else [],
            )
        return resnet, attention, skip_channels

    def _check_config(self, config):
        channels = tuple(config["block_out_channels"])
        down_types, up_types = (_names(config.get(f"{way}_block_types", ())) for way in ("down", "up"))
        if config["act_fn"].lower() not in ACTIVATIONS:
            raise ValueError(f"act_fn={shown(config['act_fn'])} is not known; choose one of {', '.join(ACTIVATIONS)}")
        if not 1 <= len(channels) <= MOST_LEVELS:
            raise ValueError(f"block_out_channels has {len(channels)} entries; 1 to {MOST_LEVELS} levels can be")
        for key, names, known in (
            ("down_block_types", down_types, DOWN_BLOCKS),
            ("up_block_types", up_types, UP_BLOCKS),
        ):
            if len(names) != len(channels) and key in config:
                raise ValueError(
                    f"{key} has {len(names)} entries and block_out_channels {len(channels)}; one a level each"
                )
            for name in names:
                if name not in known:
                    raise ValueError(
                        f"{key} names {shown(name)}, not supported by {type(self).__name__}; supported: {', '.join(known)}"
                    )
        parameters = _most_parameters(config)
        if parameters > MOST_PARAMETERS:
            raise ValueError(
                f"block_out_channels={shown(channels)}, layers_per_block={config['layers_per_block']}, time_embedding_dim="
                f"{config['time_embedding_dim']} and num_class_embeds={config['num_class_embeds']} make up to {parameters:.1e} "
                f"parameters; {MOST_PARAMETERS:.0e} is the limit"
            )
        if config["time_embedding_type"] == "learned" and config["num_train_timesteps"] is None:
            raise ValueError(
                "time_embedding_type='learned' needs num_train_timesteps (the size of its table), got None"
            )
        if config["time_embedding_type"] == "positional" and channels[0] // 2 <= config["freq_shift"]:
            raise ValueError(
                f"freq_shift={config['freq_shift']} must be below block_out_channels[0] // 2 = {channels[0] // 2}"
            )
        for key, names, where, side in (
            ("down_block_types", down_types[:-1], "first", "in_channels"),
            ("up_block_types", up_types, "last", "out_channels"),
        ):
            ncsnpp = ["Skip" in name for name in names]
            if ncsnpp != sorted(ncsnpp, reverse=where == "first"):
                raise ValueError(
                    f"{key}={shown(config[key])} must have its Skip blocks {where}: others do not resample the image that "
                    "they hand on"
                )
            if any(ncsnpp[: len(channels) - 1]) and config[side] != 3:
                raise ValueError(
                    f"{side}={config[side]} must be 3 with the Skip blocks of {key}; set 3 or take other blocks"
                )
        groups, head_dim = config["norm_num_groups"], config["attention_head_dim"]
        normed = channels
        if all("Skip" in name for name in (*down_types, *up_types)):  # which have groups of their own
            normed = channels[:1] + channels[-1:] if config["mid_block_type"] is not None else channels[:1]
            normed = () if groups is None else normed
        for c in normed:
            if groups is None or c % groups:
                raise ValueError(f"norm_num_groups={groups} must divide each of {normed} of block_out_channels")
        mid_groups = config["attn_norm_num_groups"]
        if mid_groups is not None and channels[-1] % mid_groups:
            raise ValueError(
                f"attn_norm_num_groups={mid_groups} must divide the last of block_out_channels, {channels[-1]}"
            )
        attends = [c for c, name in zip(channels, down_types) if DOWN_BLOCKS[name]]
        attends += [c for c, name in zip(reversed(channels), up_types) if UP_BLOCKS[name]]
        if config["mid_block_type"] is not None and config["add_attention"]:
            attends.append(channels[-1])
        if head_dim is not None and any(head_dim > c for c in attends):
            raise ValueError(
                f"attention_head_dim={head_dim} must be 1 to {min(attends)}, the channels where attention is"
            )

    def reset_parameters(self, scheme: str = "paper") -> None:
        """Draws new weights, in place. It changes no config: loading a checkpoint gives what the checkpoint holds.

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
                nn.init.zeros_(module.bias)
                nn.init.zeros_(module.weight) if module in zero else nn.init.xavier_uniform_(module.weight)

    def embed(self, t: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """The activated time and class embedding: (B, embedding width), or (1, ...) for one t (1,) without labels."""
        emb = self.time_embedding(self.time_proj(t))
        if self.class_embedding is not None:
            labels = class_labels.to(t.device)
            if self.config.class_embed_type == "timestep":
                labels = self.time_proj(labels)
            emb = emb + self.class_embedding(labels).to(emb.dtype)
        return self.act(emb)  # once here, not in each residual block

    def encode(self, sample: torch.Tensor, emb: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(B, in_channels, H, W) and `embed`'s output -> the middle's output and the skip connections on the way."""
        x = 2 * sample - 1 if self.config.get("center_input_sample") else sample
        image, x = x, self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, image = block(x, emb, skips, image)
        if self.mid_block is not None:
            x = self.mid_block(x, emb)
        return x, skips

    @property
    def class_names(self) -> list[str] | None:
        """Names of the labels 0, 1, ..., each another one; None where they are not known. They can be set, and are saved.

        They stand under "_ddpm_hf" in the config. Where there are fewer of them than `num_classes`, the last labels have none.

        Raises:
            ValueError: not a list of different texts, or more than there are classes.
        """
        names = self._own_settings().get("class_names")
        return None if names is None else self._checked_names(names)

    @class_names.setter
    def class_names(self, names: list[str] | None) -> None:
        self._set_own(class_names=None if names is None else check_label_names(self._checked_names(names)))

    def _checked_names(self, names):
        texts = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        if not texts or not names or len(set(names)) < len(names):
            raise ValueError(f"class_names={shown(names)} must be a list of different texts, one for each label")
        if len(names) > (self.num_classes or 0):
            raise ValueError(
                f"class_names={shown(names)} has {len(names)} names, but this network has "
                f"{self.num_classes or 'no'} classes; give one for each label"
            )
        return list(names)

    @property
    def preprocessing(self) -> dict[str, str]:
        """Of the data that the network was trained on; what is not known is left out. It can be set, and is saved.

        Keys: "background" and "crop" as in `ddpm_hf.data.image_to_pixels`; "image_column" and "label_column", names of the
        data set's columns. They stand under "_ddpm_hf" in the config.

        Raises:
            ValueError: not texts by these keys.
        """
        return self._checked_preprocessing(self._own_settings().get("preprocessing") or {})

    @preprocessing.setter
    def preprocessing(self, values: dict[str, str] | None) -> None:
        self._set_own(preprocessing=self._checked_preprocessing(values or {}) or None)

    def _checked_preprocessing(self, values):
        if not isinstance(values, dict) or not all(
            name in PREPROCESSING and isinstance(value, str) for name, value in values.items()
        ):
            raise ValueError(f"preprocessing={shown(values)} must have texts by the keys {', '.join(PREPROCESSING)}")
        return dict(values)

    def _own_settings(self):
        """What the config holds beside diffusers' keys, which ignores a key that begins with an underscore."""
        own = self.config.get("_ddpm_hf") or {}
        if not isinstance(own, dict):
            raise ValueError(f"_ddpm_hf={shown(own)} in the network's config must hold keys and values")
        return own

    def _set_own(self, **settings):
        own = {**self._own_settings(), **settings}
        self.register_to_config(_ddpm_hf={key: value for key, value in own.items() if value is not None})

    def _check_image(self, sample, t):
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
    """Of a class that is equal to diffusers' `UNet2DModel` where pipelines compare the classes of components (`from_pipe`)."""

    def __eq__(cls, other):
        return cls is other or other is UNet2DModel

    __hash__ = type.__hash__


class DDPMUNet(Encoder, metaclass=_StandsForUNet2DModel):
    """A U-Net that predicts, from a noisy image and its timestep, what the scheduler's `prediction_type` says.

    Takes the configuration of diffusers' `UNet2DModel` (same keys and defaults) and its checkpoints, and returns the same
    outputs. It is saved under that class's name, so that every published folder opens without this package.

    Supported: DownBlock2D, AttnDownBlock2D, ResnetDownsampleBlock2D (which resamples within a residual block, as ADM), the same
    with Up, UNetMidBlock2D or None; the values of the other choices are in `CHOICES`. `attention_head_dim=None` means one
    head over all channels, as in the paper.

    Also SkipDownBlock2D, AttnSkipDownBlock2D and the same with Up: the levels of NCSN++ (Score-SDE, appendix H). Beside them
    the image goes down, and the output up, as pyramids of 3 channels. Their groups are their own: `norm_num_groups` is that of
    the other blocks, the middle and the output, and may be None where there are no other blocks.

    The weights of a new network are drawn as in the paper's code, see `reset_parameters`.

    Limits, so that a config from elsewhere cannot ask for all memory: sides and channels of at most 65,536, 16 levels of 64
    blocks, 20 billion parameters by an upper bound that is two to three times their number.

    Raises:
        ValueError: for a config that is not supported; one line that names the key, the value and what is.
    """

    stock_class = "UNet2DModel"
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
    ):
        super().__init__()
        self.sample_size = sample_size
        resnet, attention, skip_channels = self._build_encoder(dict(self.config))
        channels = tuple(block_out_channels)
        c_in = channels[-1]

        # up: each residual block takes one skip connection, last in first out
        self.up_blocks = nn.ModuleList()
        for i, (name, c) in enumerate(zip(_names(up_block_types), reversed(channels))):
            ncsnpp, up, resnets = "Skip" in name, None, []
            for _ in range(layers_per_block + 1):
                c_skip = skip_channels.pop()
                # not a quarter of the sum: those are the groups that checkpoints were trained with
                groups = min(c_in + c_skip // 4, 32) if name == "AttnSkipUpBlock2D" else None
                resnets.append(resnet(c_in + c_skip, c, ncsnpp, groups=groups))
                c_in = c
            attentions = [attention(c, ncsnpp) for _ in resnets[: 1 if ncsnpp else None]] if UP_BLOCKS[name] else []
            if i < len(channels) - 1:
                if ncsnpp:
                    up = resnet(c, c, ncsnpp, resample=FIR(up=True))
                else:
                    by_resnet = _by_resnet(name, UP_BLOCKS, upsample_type)
                    up = resnet(c, c, resample="up") if by_resnet else Upsample(c)
            self.up_blocks.append((SkipUpLevel if ncsnpp else UpLevel)(resnets, attentions, up))

        # out; the activation here is SiLU whatever `act_fn` says, as in diffusers
        groups = norm_num_groups or min(channels[0] // 4, 32)
        self.conv_norm_out = ActivatedNorm(groups, channels[0], norm_eps, F.silu)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)
        self.reset_parameters()

    @property
    def null_class(self) -> int | None:
        """The label for no class of a network trained with label dropout (Ho & Salimans 2021), the last of its table; or None.

        It stands under "_ddpm_hf" in the config: DDPMUNet(..., num_class_embeds=11, _ddpm_hf={"null_class": 10}).

        Raises:
            ValueError: it is not the last.
        """
        null, classes = self._own_settings().get("null_class"), self.config.num_class_embeds
        if null is not None and (self.config.class_embed_type is not None or null != (classes or 0) - 1):
            raise ValueError(f"null_class={null} must be the last of the network's classes, num_class_embeds={classes}")
        return null

    @property
    def num_classes(self) -> int | None:
        """Of the labels 0 .. num_classes - 1, the one for no class left out; None without a table of classes."""
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
        self._check_input(sample, t, class_labels)
        x = self.unscaled(self.denoise(sample, self.embed(t.reshape(-1), class_labels)), t)
        return UNet2DOutput(sample=x) if return_dict else (x,)

    def denoise(self, sample: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """The network after its embedding: (B, in_channels, H, W) and `embed`'s output -> (B, out_channels, H, W)."""
        x, skips = self.encode(sample, emb)
        image = None
        for block in self.up_blocks:
            x, image = block(x, emb, skips, image)
        x = self.conv_out(self.conv_norm_out(x))
        return x if image is None else x + image

    def unscaled(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """`denoise`'s output, divided by the noise level t (), (1,) or (B,) where that is what the network is told."""
        if self.config.time_embedding_type != "fourier":
            return x
        return (x / t.reshape(-1, 1, 1, 1)).to(x.dtype)  # the network predicts sigma * score

    def _check_input(self, sample, t, class_labels):
        self._check_image(sample, t)
        config = self.config
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError("class_labels were given, but this network has no class embedding; leave them out")
            return
        if class_labels is None:
            raise ValueError("class_labels are missing; this network is class-conditional and needs one for each image")
        shape, kind = (sample.shape[0],), config.class_embed_type
        if kind == "identity":
            shape = (sample.shape[0], self.time_embedding.linear_2.out_features)
        if tuple(class_labels.shape) != shape:
            raise ValueError(
                f"class_labels has shape {tuple(class_labels.shape)} for a batch of {sample.shape[0]} images; give {shape}"
            )
        if kind is None:
            _check_range("class_labels", class_labels, config.num_class_embeds)
        elif kind == "timestep" and config.time_embedding_type == "learned":
            _check_range("class_labels", class_labels, config.num_train_timesteps)


def time_tensor(timestep: torch.Tensor | float | int, device: torch.device) -> torch.Tensor:
    """What a network is given as its time, as a tensor on `device`, () or (B,).

    One number that the host knows is written there by a kernel: the host would wait for a copy, once a sampling step. Not in a
    compiled graph, which reading the number would break.
    """
    t = torch.as_tensor(timestep)
    if device.type == "mps" and t.dtype == torch.float64:  # which it has not
        t = t.float()
    if t.dim() == 0 and t.device.type == "cpu" != device.type and not torch.compiler.is_compiling():
        return torch.full((), t.item(), dtype=t.dtype, device=device)
    return t.to(device)


def _names(block_types):
    return [name.removeprefix("UNetRes") for name in block_types]  # the prefix of 2022 configs


def _most_parameters(config):
    """An upper bound of the number of parameters: a network of this config has a quarter to a half as many."""
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    widest, embedding = max(channels), config["time_embedding_dim"] or 4 * channels[0]
    # a level's blocks on both ways, those that resample, and the middle's; an input beside its skip connection is the widest
    blocks = sum((2 * layers + 3) * c * (20 * widest + 13 * c + 2 * embedding) for c in (*channels, channels[-1]))
    tables = (config["num_class_embeds"] or 0) * embedding + (config["num_train_timesteps"] or 0) * channels[0]
    ends = 9 * channels[0] * (config["in_channels"] + config["out_channels"]) + 6 * embedding * (
        channels[0] + embedding
    )
    return blocks + tables + ends


def _by_resnet(name, attends, resample_type):
    """Whether a level resamples within a residual block; plain levels only by their name, as in diffusers."""
    return name.startswith("Resnet") or (attends[name] and resample_type == "resnet")


def _check_range(name, values, end):
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return  # reading the values would wait for the device, or break the graph
    if values.is_floating_point():
        raise ValueError(f"{name} has dtype {values.dtype}; it indexes a table and must be of an integer dtype")
    low, high = values.min().item(), values.max().item()
    if low < 0 or high >= end:
        raise ValueError(f"{name} has the value {low if low < 0 else high}; the range is 0 to {end - 1}")
