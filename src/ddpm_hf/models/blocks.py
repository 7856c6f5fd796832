"""The blocks of the U-Net: embeddings, residual blocks, attention, and the levels made of them."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ddpm_hf.torch_internals import is_functorch_active

ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "mish": F.mish, "gelu": F.gelu, "relu": F.relu}


def append_fourier_features(x: torch.Tensor, exponents: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Appends the finest bits of images: sines, then cosines, of 2^n pi x for each exponent n.

    VDM: Kingma et al. 2021, appendix C. The waves are computed in float32 at least, because the angles have no precision in
    bfloat16, and without rounding of 2^n x.

    Args:
        x: images (B, C, H, W).
        dtype: of the result, (B, C (1 + 2 exponents), H, W).
    """
    fine = x.to(torch.promote_types(x.dtype, torch.float32))
    angles = torch.cat([fine * 2.0**n % 2 for n in exponents], dim=1) * math.pi
    return torch.cat((fine, angles.sin(), angles.cos()), dim=1).to(dtype)


class SinusoidalEmbedding(nn.Module):
    """t -> sines and cosines at geometrically spaced frequencies (Vaswani et al. 2017; the paper, appendix B)."""

    def __init__(self, dim, flip_sin_to_cos, freq_shift):
        super().__init__()
        self.dim, self.flip_sin_to_cos, self.freq_shift = dim, flip_sin_to_cos, freq_shift

    def forward(self, t):
        half = self.dim // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device)
        if self.freq_shift == 1:  # rounded as in the code of Ho et al. and Song et al.
            exponents = exponents * (-math.log(10000) / (half - 1))
        else:  # as in OpenAI's code and diffusers
            exponents = -math.log(10000) * exponents / (half - self.freq_shift)
        angles = t[:, None].float() * torch.exp(exponents)
        features = (angles.cos(), angles.sin()) if self.flip_sin_to_cos else (angles.sin(), angles.cos())
        return F.pad(torch.cat(features, dim=-1), (0, self.dim % 2))


class FourierEmbedding(nn.Module):
    """Noise level -> sines and cosines of log(level) at fixed random frequencies (Score-SDE, appendix C.2)."""

    def __init__(self, dim, scale=16.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim) * scale, requires_grad=False)

    def forward(self, t):
        angles = torch.log(t)[:, None] * self.weight * 2 * math.pi
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class EmbeddingMLP(nn.Module):
    """Two linear layers that turn the features of a time, or of a class label, into an embedding."""

    def __init__(self, in_dim, dim):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class Downsample(nn.Module):
    """Halves H and W by a strided 3x3 convolution; padding 0 pads right and bottom only, as in the paper's code.

    fir: a `FIR` that smooths and pads before the convolution, in place of the padding.
    """

    def __init__(self, in_channels, channels, padding, fir=None):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride=2, padding=padding)
        self.pad, self.fir = (0, 1, 0, 1) if padding == 0 else None, fir

    def forward(self, x, emb):
        if self.fir is not None:
            return self.conv(self.fir(x))
        return self.conv(x if self.pad is None else F.pad(x, self.pad))


class Upsample(nn.Module):
    """Doubles H and W: nearest neighbor, then a 3x3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, emb):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class FIR(nn.Module):
    """Halves or doubles H and W, smoothed by the kernel (1, 3, 3, 1) along each, as StyleGAN2 (Score-SDE, appendix H.1).

    stride 1 with padding 2 only smooths, and adds a row and a column.
    """

    def __init__(self, up=False, stride=2, padding=1):
        super().__init__()
        self.up, self.stride, self.padding = up, stride, padding
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        if taps.is_meta:  # the values are needed even on the meta device, because no checkpoint holds them
            taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device="cpu")
        taps = taps / (4 if up else 8)
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, x):
        x = x.contiguous() if self.training else x  # as in diffusers; why: see ResidualBlock.forward
        conv, channels = F.conv_transpose2d if self.up else F.conv2d, x.shape[1]
        kernel = self.kernel.expand(channels, -1, -1, -1)
        return conv(x, kernel, stride=self.stride, padding=self.padding, groups=channels)


class Dropout(nn.Dropout):
    """`nn.Dropout` with the same random numbers, whose mask takes one byte per element on the CPU too, not four."""

    def forward(self, x):
        return torch.native_dropout(x, self.p, True)[0] if self.training and self.p > 0 else x


class _NormSiLU(torch.autograd.Function):
    """silu(group_norm(x)) that saves only x for the backward pass, which normalizes it again."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        ctx.save_for_backward(x, weight, bias)
        y = F.group_norm(x, groups, weight, bias, eps)
        ctx.settings = groups, eps, y.dtype  # the dtype that autocast chose
        return F.silu(y, inplace=True)

    @staticmethod
    def backward(ctx, grad):
        groups, eps, dtype = ctx.settings
        if torch.is_grad_enabled():  # create_graph=True: the gradient will itself be differentiated
            inputs = [v for v, needed in zip(ctx.saved_tensors, ctx.needs_input_grad) if needed]
            x, weight, bias = ctx.saved_tensors
            y = F.silu(F.group_norm(x.to(dtype), groups, weight, bias, eps))
            gradients = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
            return *(next(gradients) if needed else None for needed in ctx.needs_input_grad[:3]), None, None
        x, weight, bias = (v.detach().requires_grad_() for v in ctx.saved_tensors)
        with torch.enable_grad():
            y = F.group_norm(x.to(dtype), groups, weight, bias, eps)
        grad = torch.ops.aten.silu_backward(grad, y.detach())
        return *torch.autograd.grad(y, (x, weight, bias), grad), None, None


class ActivatedNorm(nn.GroupNorm):
    """Group normalization followed by an activation."""

    def __init__(self, groups, channels, eps, act):
        super().__init__(groups, channels, eps)
        self.act = act

    def forward(self, x):
        # a compiler chooses itself what to keep; torch.func needs torch's own functions
        is_eager = not torch.compiler.is_compiling() and not is_functorch_active()
        if self.training and self.act is F.silu and is_eager:
            return _NormSiLU.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return self.act(super().forward(x))


class ResidualBlock(nn.Module):
    """norm, act, conv, + time, norm, act, dropout, conv, + input.

    Args:
        groups: the numbers of groups of the two norms.
        scale_shift: whether the time embedding scales and shifts the second norm's output (ADM), or is added before that norm.
        output_scale: the output is divided by it.
        resample: how both branches are resampled: "down" (2x2 mean) or "up" (nearest neighbor) as in ADM, or a `FIR` as in
            NCSN++; None for not at all.
        shortcut: whether the shortcut is a 1x1 convolution even if the channels stay.

    `forward` takes the embedding already activated: (B, emb_dim).
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        emb_dim,
        *,
        groups,
        eps,
        act_fn,
        dropout,
        scale_shift,
        output_scale,
        resample=None,
        shortcut=False,
    ):
        super().__init__()
        self.scale_shift, self.output_scale, self.resample = scale_shift, output_scale, resample
        self.act = ACTIVATIONS[act_fn]
        self.norm1 = ActivatedNorm(groups[0], in_channels, eps, self.act)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb_dim, out_channels * (2 if scale_shift else 1))
        if scale_shift:
            self.norm2 = nn.GroupNorm(groups[1], out_channels, eps)
        else:
            self.norm2 = ActivatedNorm(groups[1], out_channels, eps, self.act)
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        shortcut = shortcut or in_channels != out_channels
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if shortcut else None

    def forward(self, x, emb):
        h = self.norm1(x)
        if self.resample == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif self.resample == "up":
            x, h = (F.interpolate(y, scale_factor=2.0, mode="nearest") for y in (x, h))
        elif self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv1(h)
        emb = self.time_emb_proj(emb)[:, :, None, None]
        if self.scale_shift:  # adaptive group norm, ADM section 3
            scale, shift = emb.chunk(2, dim=1)
            h = self.act(self.norm2(h) * (1 + scale) + shift)
        else:
            h = self.norm2(h + emb)
        h = self.conv2(self.dropout(h))
        if self.conv_shortcut is not None:
            # contiguous in training, as in diffusers: the layout decides which elements dropout zeroes
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        h = x + h
        return h if self.output_scale == 1 else h / self.output_scale


class SelfAttention(nn.Module):
    """Multi-head self-attention over the H*W positions, with a residual connection."""

    # has diffusers' loader rename the keys of 2022 checkpoints (query -> to_q, proj_attn -> to_out.0, ...)
    _from_deprecated_attn_block = True

    def __init__(self, channels, head_dim, *, groups, eps, output_scale):
        super().__init__()
        self.heads, self.output_scale = channels // head_dim, output_scale
        inner = self.heads * head_dim
        self.group_norm = nn.GroupNorm(groups, channels, eps) if groups is not None else None
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])  # a list, for the state-dict key

    def forward(self, x):
        b, c, height, width = x.shape
        h = (x if self.group_norm is None else self.group_norm(x)).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = (to(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = self.to_out[0](h).transpose(1, 2).reshape(b, c, height, width) + x
        return h if self.output_scale == 1 else h / self.output_scale


class _SameDropoutTwice:
    """A module whose second call, by gradient checkpointing, draws the same dropout masks as its first call.

    torch 2.13 restores the random state for the second call on other devices, but not on Apple's GPUs (MPS).
    """

    def __init__(self, module):
        self.module, self.first_state, self.was_called = module, torch.mps.get_rng_state(), False

    def __call__(self, *args):
        if not self.was_called:
            self.was_called = True
            return self.module(*args)
        state = torch.mps.get_rng_state()
        torch.mps.set_rng_state(self.first_state)
        try:
            return self.module(*args)
        finally:
            torch.mps.set_rng_state(state)


class Level(nn.Module):
    """A resolution level of the U-Net: residual blocks; with n attentions, each of the last n blocks is followed by one."""

    gradient_checkpointing = False

    def __init__(self, resnets, attentions):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def checkpointed(self, module, *args):
        """module(*args), which is computed again in the backward pass if `gradient_checkpointing`."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return module(*args)
        if args[0].device.type == "mps" and self.training:
            module = _SameDropoutTwice(module)
        return self._gradient_checkpointing_func(module, *args)

    def layer(self, i, x, emb):
        """Residual block `i` and the attention after it, if any."""
        x = self.checkpointed(self.resnets[i], x, emb)
        j = i + len(self.attentions) - len(self.resnets)
        return self.checkpointed(self.attentions[j], x) if j >= 0 else x


class DownLevel(Level):
    """A level of the way down: appends its outputs to `skips`.

    With `pyramid_conv`, which halves it, `image` is added to the output, and the sum over `pyramid_scale` is the next level's
    image ("input residual" of Score-SDE); without, `image` is returned as it is.
    """

    def __init__(self, resnets, attentions, downsampler, pyramid_conv=None, pyramid_scale=1):
        super().__init__(resnets, attentions)
        self.downsamplers = nn.ModuleList([downsampler] if downsampler else [])
        self.pyramid_conv, self.pyramid_scale = pyramid_conv, pyramid_scale

    def forward(self, x, emb, skips, image):
        for i in range(len(self.resnets)):
            x = self.layer(i, x, emb)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x, emb)
            if self.pyramid_conv is not None:
                x = x + self.pyramid_conv(image, emb)
                image = x = x if self.pyramid_scale == 1 else x / self.pyramid_scale
            skips.append(x)
        return x, image


class MidLevel(Level):
    """The middle: a residual block, attention if there is one, and a residual block."""

    def forward(self, x, emb):
        x = self.checkpointed(self.resnets[0], x, emb)
        for attention in self.attentions:
            x = self.checkpointed(attention, x)
        return self.checkpointed(self.resnets[1], x, emb)


class UpLevel(Level):
    """A level of the way up: each residual block takes the last of `skips`. `image` is returned as it is."""

    def __init__(self, resnets, attentions, upsampler):
        super().__init__(resnets, attentions)
        self.upsamplers = nn.ModuleList([upsampler] if upsampler else [])

    def forward(self, x, emb, skips, image):
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat((x, skips.pop()), dim=1), emb)
        for upsample in self.upsamplers:
            x = upsample(x, emb)
        return x, image
