"""The network for sampling: some matrix products are combined in advance, and the compiler optimizes the rest."""

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils import logging
from torch import nn

from ddpm_hf.fast.allocator import keep_freed_memory
from ddpm_hf.fast.winograd import use_direct_convolution, use_winograd
from ddpm_hf.files.diffusers_internals import is_offloaded
from ddpm_hf.models.blocks import ResidualBlock, SelfAttention, Upsample
from ddpm_hf.models.unet import DDPMUNet, time_tensor
from ddpm_hf.torch_internals import has_hooks, packing_weights, without_compiler

logger = logging.get_logger(__name__)


COMPILING = threading.Lock()  # the compiler's settings are global to the process


# Where the classes of a network's modules are defined; others, such as adapters, would be lost.
KNOWN_MODULES = ("ddpm_hf.models.", "ddpm_hf.fast.", "torch.nn.modules.")


TIMESTEPS_AT_ONCE = 64  # the time projections of so many timesteps are one matrix product


class InferenceUNet(nn.Module):
    """A `DDPMUNet` for sampling and likelihoods: the same outputs, within rounding, in less time. No gradients.

    It is called like the network, also by several threads at once, and holds a copy of its weights in the fastest form:
    - the time projections of all residual blocks are one matrix product, for 64 timesteps at once (`at_timesteps`);
    - q, k and v are one matrix product;
    - on the CPU, upsampling and the 3x3 convolution after it are one transposed 4x4 convolution with 4/9 of the products;
    - on the CPU in float32, 3x3 convolutions of at least 256 channels use Winograd's algorithm; their weights take four times
      the memory;
    - on the CPU, freed memory stays with the process for the next call (`keep_freed_memory`);
    - weights and activations are in channels-last layout on the CPU, and in half precision on every device;
    - the rest is compiled. In half precision on the CPU the compiler also packs the weights into its code, in the layout that
      oneDNN reads; a network that `updated` made because weights had changed is not packed.

    Args:
        unet: the network; it is not changed. If its weights change later, call `updated`.
        dtype: of weights and activations, whatever autocast says; None for that of the network. With torch.bfloat16 outputs
            differ from float32 as under autocast. Samples keep their own dtype; timesteps are embedded in the network's.
        compile: whether to use torch.compile, at the first call of each shape of sample (a minute for a large network; its
            cache makes it seconds in the next process). Without a working compiler a warning is logged, and the network
            runs uncompiled.
        pack: whether the compiler may pack weights, see above; False if they will change.

    Attributes:
        report: one line that lists the optimizations.

    Raises:
        ValueError: not a `DDPMUNet`, or one with adapters, hooks or offloading, which would be ignored.
    """

    projection_weight: torch.Tensor
    projection_bias: torch.Tensor

    def __init__(self, unet: DDPMUNet, dtype: torch.dtype | None = None, compile: bool = True, pack: bool = True):
        super().__init__()
        unet = without_compiler(unet)
        _check_plain(unet)
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device
        self.settings: dict[str, Any] = {"dtype": dtype, "compile": compile}
        # in a tuple the network is no submodule, which would be moved and saved with this module
        self.source, self.fingerprint = (unet,), _fingerprint(unet)
        self.compute_dtype = dtype or unet.dtype
        net = copy.deepcopy(unet).requires_grad_(False).eval()
        use_direct_convolution(net)  # compiled training uses Winograd's
        on_cpu, half = self.device.type == "cpu", self.compute_dtype.itemsize == 2

        blocks = [module for module in net.modules() if isinstance(module, ResidualBlock)]
        self.register_buffer("projection_weight", torch.cat([block.time_emb_proj.weight for block in blocks]))
        self.register_buffer("projection_bias", torch.cat([block.time_emb_proj.bias for block in blocks]))
        end = 0
        for block in blocks:
            start, end = end, end + block.time_emb_proj.out_features
            block.time_emb_proj = _ProjectionColumns(start, end)
        optimizations = [f"{len(blocks)} time projections in one product for {TIMESTEPS_AT_ONCE} steps"]
        attentions = _replace(net, SelfAttention, FusedAttention)
        optimizations += [f"q, k, v in one product in {attentions} attention blocks"] if attentions else []
        folded = _replace(net, Upsample, FoldedUpsample) if on_cpu else 0
        optimizations += [f"upsampling folded into {folded} convolutions"] if folded else []
        wide = use_winograd(net, min_channels=256, frozen=True) if on_cpu and not half else 0
        optimizations += [f"{wide} convolutions by Winograd's tiles"] if wide else []
        self.layout = torch.channels_last if on_cpu or half else torch.contiguous_format
        optimizations += ["channels last"] if self.layout is torch.channels_last else []
        for name, module in net.named_children():
            if name not in (
                "time_proj",
                "time_embedding",
                "class_embedding",
            ):  # timesteps are embedded in the network's dtype
                module.to(dtype=self.compute_dtype, memory_format=self.layout)
        self.net = net
        optimizations += ["freed memory kept"] if on_cpu and keep_freed_memory() else []

        self.compiled: Callable | None = None
        self.paths: dict[tuple, Callable] = {}  # shapes -> the function that takes samples of this shape
        self.packs = pack and compile and on_cpu and half
        if compile:
            options: dict[str, Any] = {"cpp_wrapper": on_cpu}
            isolation: dict[str, Any] = {}
            if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # torch 2.13 and later
                # self.net never changes, so its modules need no guards; isolated, because without guards the graph of
                # another network would be taken for this one's
                options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
                isolation = {"isolate_recompiles": True}
            self.compiled = torch.compile(self._denoise, dynamic=False, fullgraph=True, options=options, **isolation)
            packed = ", weights packed," if self.packs else ""
            optimizations.append(f"compiled{packed} at the first call of each shape")
        dtype_name = str(self.compute_dtype).removeprefix("torch.")
        self.report = f"network for inference in {dtype_name}: {'; '.join(optimizations)}"

    def is_current(self, unet: nn.Module) -> bool:
        """Whether this module was made from `unet` with its present weights. It reads all weights: call it once per sampling.

        Raises:
            ValueError: adapters, hooks or offloading have been added to the network.
        """
        unet = without_compiler(unet)
        _check_plain(unet)
        return unet is self.source[0] and _fingerprint(unet) == self.fingerprint

    def updated(self, unet: DDPMUNet) -> "InferenceUNet":
        """Returns a network for inference with the present weights of `unet`.

        If only the weights have changed, it is this module, and they are copied in place. It is a new module if `unet` has
        another config, dtype or device, or if the compiler has packed the weights into its code.

        Raises:
            ValueError: as the constructor.
        """
        if self.is_current(unet):
            return self
        unet = without_compiler(unet)
        same_architecture = _architecture(unet) == _architecture(self.source[0])
        same_architecture &= (unet.dtype, unet.device) == (self.dtype, self.device)
        in_place = same_architecture and not self.packs
        compile = self.settings["compile"] and not in_place
        fresh = InferenceUNet(unet, self.settings["dtype"], compile, pack=not same_architecture)
        if not in_place:
            return fresh
        with torch.no_grad():
            for weight, new in zip((*self.parameters(), *self.buffers()), (*fresh.parameters(), *fresh.buffers())):
                weight.copy_(new)
        self.source, self.fingerprint = fresh.source, fresh.fingerprint
        return self

    def at_timesteps(self, timesteps: torch.Tensor | list) -> Callable:
        """Returns the network as a function for one caller, who will call it at these timesteps in this order.

        A timestep is one number for all images. The time projections of 64 timesteps are computed at once.
        """
        return functools.partial(self._call, _ProjectionCache(self, timesteps))

    @torch.no_grad()
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Denoises images: arguments and errors as `DDPMUNet.forward`.

        Returns:
            `UNet2DOutput` with `.sample` (B, out_channels, H, W), of the dtype of `sample`, contiguous.
        """
        return self._call(_ProjectionCache(self, ()), sample, timestep, class_labels, return_dict)

    @torch.no_grad()
    def _call(self, projections_at, sample, timestep, class_labels=None, return_dict=True):
        unet, t = self.source[0], time_tensor(timestep, sample.device)
        unet.check_inputs(sample, t, class_labels)
        if isinstance(timestep, torch.Tensor) and timestep.dim() == 0 and timestep.device.type == "cpu":
            timestep = timestep.item()
        if class_labels is None and not isinstance(timestep, torch.Tensor):
            projections = projections_at(timestep)
        else:
            projections = self.project(t.reshape(-1), class_labels)
        with torch.autocast(sample.device.type, enabled=False):
            x = unet.divide_by_noise_level(self._run(sample, projections), t)
        return UNet2DOutput(sample=x) if return_dict else (x,)

    def project(self, t: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """Returns the time projections of all residual blocks side by side, (B, columns), at timesteps t (B,)."""
        with torch.autocast(self.device.type, enabled=False):
            emb = self.net.embed(t, class_labels)
            return F.linear(emb, self.projection_weight, self.projection_bias).to(self.compute_dtype)

    def _run(self, sample, projections):
        if self.compiled is None:
            return self._denoise(sample, projections)
        shape = (sample.shape, sample.dtype, projections.shape)
        if shape not in self.paths:
            with COMPILING:
                if shape not in self.paths:
                    self.paths[shape] = self._path(sample, projections)
        return self.paths[shape](sample, projections)

    def _path(self, sample, projections):
        """Returns the function for samples of this shape: compiled, by a first call; uncompiled if compiling fails."""
        try:
            with packing_weights(self.packs):
                self.compiled(sample, projections)
            return self.compiled
        except (
            Exception
        ) as error:  # compilers raise many classes; an error of the arguments is raised again, uncompiled
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning(f"samples of shape {tuple(sample.shape)} go through the network uncompiled: {reason}")
            return self._denoise

    def train(self, mode: bool = True) -> "InferenceUNet":
        """Does nothing: this network stays in evaluation mode."""
        return super().train(False)

    def _denoise(self, sample, projections):
        x = self.net.denoise(sample.contiguous(memory_format=self.layout), projections, self.compute_dtype)
        return x.to(sample.dtype, memory_format=torch.contiguous_format)


class _ProjectionCache:
    """Returns the time projections of a timestep, for one caller; those of the next 64 timesteps are computed at once."""

    def __init__(self, network, timesteps):
        self.network, self.timesteps, self.rows = network, torch.as_tensor(timesteps).tolist(), {}

    def __call__(self, t):
        if t not in self.rows:
            start = self.timesteps.index(t) if t in self.timesteps else None
            ts = [t] if start is None else self.timesteps[start : start + TIMESTEPS_AT_ONCE]
            rows = self.network.project(torch.tensor(ts, device=self.network.device), None)
            self.rows = dict(zip(ts, rows.split(1)))
        return self.rows[t]


class _ProjectionColumns(nn.Module):
    """Takes the columns of one residual block from the time projections of all, in place of its `time_emb_proj`."""

    def __init__(self, start, end):
        super().__init__()
        self.start, self.end = start, end

    def forward(self, projections):
        return projections[:, self.start : self.end]


class FusedAttention(nn.Module):
    """`SelfAttention` with one matrix product for q, k and v."""

    def __init__(self, attention):
        super().__init__()
        self.heads, self.output_scale = attention.heads, attention.output_scale
        self.group_norm, self.to_out = attention.group_norm, attention.to_out
        projections = (attention.to_q, attention.to_k, attention.to_v)
        self.weight = nn.Parameter(torch.cat([linear.weight for linear in projections]), requires_grad=False)
        self.bias = nn.Parameter(torch.cat([linear.bias for linear in projections]), requires_grad=False)

    def forward(self, x):
        b, c, height, width = x.shape
        h = (x if self.group_norm is None else self.group_norm(x)).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = F.linear(h, self.weight, self.bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = self.to_out[0](h).transpose(1, 2).reshape(b, c, height, width) + x
        return h if self.output_scale == 1 else h / self.output_scale


class FoldedUpsample(nn.Module):
    """`Upsample`, nearest neighbor and a 3x3 convolution, as one transposed 4x4 convolution of stride 2.

    The nine products for an output pixel take only four different input pixels, so weights of the same pixel are added.
    """

    def __init__(self, upsample):
        super().__init__()
        weight = (
            upsample.conv.weight.double().flip(2, 3).transpose(0, 1)
        )  # (in, out, 3, 3), as transposed convolutions have it
        folded = sum(F.pad(weight, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1))
        self.weight = nn.Parameter(folded.to(upsample.conv.weight.dtype), requires_grad=False)
        self.bias, self.original = upsample.conv.bias, upsample

    def forward(self, x, emb):
        if x.shape[0] * x.shape[2] * x.shape[3] < 32:  # the original is faster for so few pixels
            return self.original(x, emb)
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)


def _replace(net, old, new):
    """Replaces every module of class `old` by new(module); returns their number."""
    places = [
        (parent, name) for parent in net.modules() for name, module in parent.named_children() if type(module) is old
    ]
    for parent, name in places:
        setattr(parent, name, new(getattr(parent, name)))
    return len(places)


def _check_plain(unet):
    if not isinstance(unet, DDPMUNet):
        raise ValueError(f"unet is a {type(unet).__name__}; this is for DDPMUNet, which opens UNet2DModel checkpoints")
    for name, module in unet.named_modules():
        if module is not unet and not type(module).__module__.startswith(KNOWN_MODULES):
            raise ValueError(
                f"{name} is a {type(module).__name__}: merge or unload adapters before the network is optimized"
            )
        if is_offloaded(module) or has_hooks(module):
            raise ValueError(f"{name or 'unet'} has hooks or is offloaded; remove them before the network is optimized")


def _architecture(unet):
    """Returns a value that is equal for networks whose weights have the same names and shapes."""
    return type(unet), unet.arguments


@torch.no_grad()
def _fingerprint(unet):
    """Returns norm and sum of each parameter; EMA and fused optimizers change weights without raising `Tensor._version`."""
    parameters = list(unet.parameters())
    numbers = [number.float() for p in parameters for number in (torch.linalg.vector_norm(p), p.sum())]
    return unet.dtype, unet.device, torch.stack(numbers).nan_to_num().tolist()  # NaN is not equal to itself
