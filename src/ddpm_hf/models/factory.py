"""Builds the levels and embeddings of a network by its config."""

import torch.nn.functional as F
from torch import nn

from ddpm_hf.arguments import shown
from ddpm_hf.models.blocks import (
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
from ddpm_hf.models.network_config import BlockType

NCSNPP_SCALE = 2**0.5  # outputs of residual blocks and of attention are divided by it


class BlockFactory:
    """Makes the parts of one network: each method draws weights for a new one.

    config: all keys of `DDPMUNet`, as `check_config` lets them through.
    """

    def __init__(self, config: dict):
        self.config = config
        self.channels = tuple(config["block_out_channels"])
        self.act_fn = config["act_fn"].lower()
        self.scale_shift = config["resnet_time_scale_shift"] == "scale_shift"
        self.fir = config["fir_resampling"]
        self.time_dim = config["sinusoid_dim"] or self.channels[0]
        self.emb_dim = config["time_embedding_dim"] or 4 * self.time_dim

    def time_projection(self) -> tuple[nn.Module, int]:
        """The features of a time, and how many there are."""
        config, dim = self.config, self.time_dim
        if config["time_embedding_type"] == "positional":
            return SinusoidalEmbedding(dim, config["flip_sin_to_cos"], config["freq_shift"]), dim
        if config["time_embedding_type"] == "fourier":
            return FourierEmbedding(dim), 2 * dim
        return nn.Embedding(config["num_train_timesteps"], dim), dim

    def class_embedding(self, time_dim: int) -> nn.Module | None:
        """Class labels -> (B, embedding width); None for an unconditional network. time_dim: features of a time."""
        kind, classes = self.config["class_embed_type"], self.config["num_class_embeds"]
        if kind == "timestep":
            return EmbeddingMLP(time_dim, self.emb_dim)
        if kind == "identity":
            return nn.Identity()
        return None if classes is None else nn.Embedding(classes, self.emb_dim)

    def down_level(self, block_type: BlockType, c_in: int, c: int, image_channels: int, is_last: bool) -> DownLevel:
        """A level of the way down, from `c_in` channels to `c`; the last one does not halve the image.

        image_channels: of the input pyramid, see `DownLevel`.
        """
        ncsnpp, down = block_type.ncsnpp, None
        resnets = [
            self._resnet(c_in if i == 0 else c, c, ncsnpp=ncsnpp) for i in range(self.config["layers_per_block"])
        ]
        attentions = [self._attention(c, ncsnpp) for _ in resnets] if block_type.attention else []
        if not is_last:
            if ncsnpp:
                down = self._resnet(c, c, ncsnpp=True, resample=FIR())
            elif self._resamples_by_resnet(block_type, "downsample_type"):
                down = self._resnet(c, c, resample=FIR() if self.fir else "down")
            else:
                down = Downsample(c, c, self.config["downsample_padding"])
        if ncsnpp:
            return SkipDownLevel(resnets, attentions, down)
        pyramid_conv = None
        if self.config["input_pyramid"] is not None and not is_last:
            fir = FIR(stride=1, padding=2) if self.fir else None
            pyramid_conv = Downsample(image_channels, c, 0, fir)
        return DownLevel(resnets, attentions, down, pyramid_conv, self.config["block_scale_factor"])

    def mid_level(self) -> MidLevel | None:
        """The middle, at the coarsest resolution; None where the config has none."""
        if self.config["mid_block_type"] is None:
            return None
        c, scale = self.channels[-1], self.config["mid_block_scale_factor"]
        # with scale and shift, attention is not normalized unless the config asks for it, as in diffusers
        default = None if self.scale_shift else self._groups(c)
        groups = self.config["attn_norm_num_groups"] or default
        resnets = [self._resnet(c, c, output_scale=scale) for _ in range(2)]
        heads = self.config["num_attention_heads"]
        attentions = [self._self_attention(c, groups, scale, heads)] if self.config["add_attention"] else []
        return MidLevel(resnets, attentions)

    def up_level(self, block_type: BlockType, c_in: int, c: int, skip_channels: list[int], is_last: bool) -> UpLevel:
        """A level of the way up, from `c_in` channels to `c`; the last one does not double the image.

        skip_channels: of the skip connections, of which each residual block takes one.
        """
        ncsnpp, up, resnets = block_type.ncsnpp, None, []
        for c_skip in skip_channels:
            # not a quarter of the sum: those are the groups that checkpoints were trained with
            groups = min(c_in + c_skip // 4, 32) if ncsnpp and block_type.attention else None
            resnets.append(self._resnet(c_in + c_skip, c, ncsnpp=ncsnpp, in_groups=groups))
            c_in = c
        attended = resnets[:1] if ncsnpp or self.config["up_attention"] == "last" else resnets
        heads = self.config["up_attention_heads"]
        attentions = [self._attention(c, ncsnpp, heads) for _ in attended] if block_type.attention else []
        if not is_last:
            if ncsnpp:
                up = self._resnet(c, c, ncsnpp=True, resample=FIR(up=True))
            elif self._resamples_by_resnet(block_type, "upsample_type"):
                up = self._resnet(c, c, resample=FIR(up=True) if self.fir else "up")
            else:
                up = Upsample(c)
        return (SkipUpLevel if ncsnpp else UpLevel)(resnets, attentions, up)

    def output_norm(self) -> ActivatedNorm:
        """The normalization before the output; its activation is SiLU whatever `act_fn` says, as in diffusers."""
        c = self.channels[0]
        return ActivatedNorm(self._groups(c), c, self.config["norm_eps"], F.silu)

    def _groups(self, c):
        return self.config["norm_num_groups"] or self._ncsnpp_groups(c)

    def _ncsnpp_groups(self, c, groups=None):
        groups = groups or min(c // 4, 32)
        if groups < 1 or c % groups:
            raise ValueError(
                f"block_out_channels={shown(self.channels)} gives a block {c} channels, which its {groups} groups do "
                "not divide; use multiples of 32"
            )
        return groups

    def _resnet(self, c_in, c_out, *, ncsnpp=False, output_scale=None, resample=None, in_groups=None):
        groups = (self.config["norm_num_groups"],) * 2
        if ncsnpp or groups[0] is None:  # NCSN++ has groups of its own whatever norm_num_groups says
            groups = self._ncsnpp_groups(c_in, in_groups), self._ncsnpp_groups(c_out)
        return ResidualBlock(
            c_in,
            c_out,
            self.emb_dim,
            groups=groups,
            eps=self.config["norm_eps"],
            act_fn=self.act_fn,
            dropout=self.config["dropout"],
            scale_shift=self.scale_shift,
            output_scale=NCSNPP_SCALE if ncsnpp else output_scale or self.config["block_scale_factor"],
            resample=resample,
            shortcut=resample is not None and (ncsnpp or self.config["resample_shortcut"]),
        )

    def _attention(self, c, ncsnpp, heads=None):
        heads = heads or self.config["num_attention_heads"]
        if ncsnpp:
            return self._self_attention(c, self._ncsnpp_groups(c, 32), NCSNPP_SCALE, heads)
        return self._self_attention(c, self._groups(c), self.config["block_scale_factor"], heads)

    def _self_attention(self, c, groups, output_scale, heads):
        head_dim = c // heads if heads else self.config["attention_head_dim"] or c
        return SelfAttention(c, head_dim, groups=groups, eps=self.config["norm_eps"], output_scale=output_scale)

    def _resamples_by_resnet(self, block_type, key):
        # plain levels only by their name, as in diffusers
        return block_type.resnet_resampling or (block_type.attention and self.config[key] == "resnet")
