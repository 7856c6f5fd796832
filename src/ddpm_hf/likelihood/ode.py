"""Likelihoods by the probability-flow ODE (Score-SDE, section 4.3), without the KL terms of the variational bound.

They are exact for continuous data. For images of grey levels the bits/dim are an upper bound, see `ode_bits_per_dim`.
`likelihood.solver` describes the ODE.
"""

import dataclasses
import math
from collections.abc import Callable
from numbers import Integral
from typing import NamedTuple, cast

import torch

from ddpm_hf.likelihood.bound import check_images, standard_error
from ddpm_hf.likelihood.solver import (
    OdeOptions,
    OdeStopped,
    Process,
    clipped_score,
    is_centered,
    process_of,
    solve_in_batches,
    solve_ode,
    to_process_range,
)
from ddpm_hf.models.evaluation_mode import evaluation_mode
from ddpm_hf.schedulers.conditioning_times import conditioning_times
from ddpm_hf.schedulers.ddpm import VariationalDDPMScheduler
from ddpm_hf.schedulers.precision import finest_dtype, to_float64
from ddpm_hf.schedulers.sde import SDE

__all__ = ["OdeBitsPerDim", "OdeLikelihood", "OdeStopped", "dequantized", "ode_bits_per_dim", "ode_log_likelihood"]


TRACES = ("rademacher", "gaussian", "exact")


DEQUANTIZATIONS = ("uniform", "decoder")


class OdeLikelihood(NamedTuple):
    """Log-likelihood log p(x) of each of B images by the ODE."""

    log_likelihood: torch.Tensor  # (B,) float64, nats, summed over the dimensions
    probe_error: (
        torch.Tensor
    )  # (B,) float64, nats: standard error by the probes; 0 for the exact trace, NaN for one probe
    latents: torch.Tensor  # (B, C, H, W), x at t = 1
    evaluations: torch.Tensor  # (B,) int64: network evaluations for this image


class OdeBitsPerDim(NamedTuple):
    """Bits per dimension of each of B images by the ODE, for one draw of the dequantization."""

    total: torch.Tensor  # (B,) float64
    probe_error: torch.Tensor  # (B,), as in `OdeLikelihood`, in bits per dimension
    latents: torch.Tensor  # (B, C, H, W)
    evaluations: torch.Tensor  # (B,) int64

    @property
    def mean(self) -> float:
        """The mean of `total` over the images."""
        return self.total.mean().item()

    @property
    def standard_error(self) -> float:
        """The standard error of `mean` over images, dequantization and probes together; NaN for a single image."""
        return standard_error(self.total)


def ode_log_likelihood(
    unet: Callable,
    process: Process,
    x: torch.Tensor,
    *,
    class_labels: torch.Tensor | None = None,
    eps: float | None = None,
    clip_sample: bool | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    trace: str = "rademacher",
    probes: int = 1,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    max_evaluations: int = 2000,
    progress_bar: bool = False,
) -> OdeLikelihood:
    """Log-density of continuous x, by the instantaneous change of variables (Score-SDE eq. 39).

    Args:
        unet: a network, or any function called as `unet(x_t, time, class_labels=..., return_dict=False)` that is
            differentiable with respect to x_t, which an `InferenceUNet` is not. Dropout is off during the call.
        process: an `SDE`, one of its schedulers, or a `VariationalDDPMScheduler` (see `ChainSDE`).
        x: (B, C, H, W), taken as x at t = eps; in [0, 1] if the process is a `VESDEScheduler` with centered=False.
        class_labels: (B,), for a class-conditional network.
        eps: the time at which the ODE begins; None for 1e-5, or 1 / T for a chain.
        clip_sample: whether the predicted x_0 is clipped to +-`clip_sample_range` (1 if the config has none); None for the
            config's value. The ODE does not use `thresholding`.
        rtol, atol: tolerances of a solver step for each image, for the root mean square over its dimensions and for its
            log-likelihood in nats per dimension.
        trace: how the trace of the score's Jacobian is computed: by Hutchinson's estimator with "rademacher" (random signs,
            less variance) or "gaussian" probes, or "exact", with one backward pass per dimension, for small images.
        probes: number of probes for each image.
        generator: generator of the probes.
        batch_size: images per network call; None for all.
        max_evaluations: the most network evaluations for a batch.
        progress_bar: whether to show a progress bar in a terminal or a notebook.

    Returns:
        `OdeLikelihood` on the device of x; on Apple's GPUs the float64 tensors are on the CPU.

    Raises:
        ValueError: an argument that cannot be used, a process that the network was not made for, or a network without
            gradients.
        OdeStopped: too many evaluations, or a state that is not finite; the message has the time that was reached.
    """
    options = OdeOptions(class_labels, eps, clip_sample, rtol, atol, batch_size, max_evaluations, progress_bar)
    sde = process_of(process)
    begin, limits = options.start_time(sde), options.clip_limits(process)
    if trace not in TRACES:
        raise ValueError(f"trace={trace!r} is not known; choose one of {', '.join(TRACES)}")
    if not (isinstance(probes, Integral) and probes >= 1):
        raise ValueError(f"probes={probes!r} must be an integer, 1 or more")
    dimensions, columns = x[0].numel(), 1 if trace == "exact" else probes

    def solve(batch, network, bar):
        state = to_float64(batch.flatten(1))
        # on the device of the state: on Apple's GPUs, which have no float64, that is the CPU
        probe_vectors = None if trace == "exact" else _draw_probes(state.view(batch.shape), trace, probes, generator)
        slope = _LikelihoodOde(network, sde, limits, batch, probe_vectors)
        state = torch.cat((state, state.new_zeros(len(batch), columns)), dim=1)
        return solve_ode(slope, state, begin=begin, end=1.0, options=options, bar=bar, dimensions=dimensions)

    results = []
    batches = solve_in_batches(unet, sde, x, solve, options=options, description="likelihood")
    for batch, end, evaluations in batches:
        latents, change = end[:, :dimensions].view(batch.shape), end[:, dimensions:] * dimensions
        log_likelihood = sde.prior_log_prob(latents) + change.mean(1)
        error = change.std(1) / columns**0.5 if columns > 1 else torch.full_like(log_likelihood, math.nan)
        error = torch.zeros_like(error) if trace == "exact" else error
        results.append((log_likelihood, error, latents.to(x), torch.full((len(batch),), evaluations)))
    return OdeLikelihood(*(torch.cat(values) for values in zip(*results)))


def _draw_probes(images, trace, probes, generator):
    """Probe vectors of Hutchinson's estimator for images (B, C, H, W): (probes, B, C, H, W)."""
    device = torch.device("cpu") if generator is None else generator.device
    shape, source = (probes, *images.shape), dict(generator=generator, device=device)
    if trace == "gaussian":
        return to_float64(torch.randn(shape, dtype=finest_dtype(device), **source)).to(images.device)
    return torch.randint(0, 2, shape, **source).to(images.device) * 2.0 - 1


@dataclasses.dataclass
class _LikelihoodOde:
    """The ODE of a batch and of its log-density together (Score-SDE, section D.2): d state / dt, called as (t, state).

    A state is (B, D + K): x_t, then the change of log p per dimension, once for each of K probes or once for the exact trace.

    Attributes:
        batch: the images, of whose shape and device the network's input is.
        probe_vectors: (K, B, C, H, W); None for the exact trace.
    """

    network: Callable
    sde: SDE
    limits: tuple[float, float] | None
    batch: torch.Tensor
    probe_vectors: torch.Tensor | None

    def __call__(self, t, state):
        sde, dimensions = self.sde, self.batch[0].numel()
        x_t = state[:, :dimensions].view(self.batch.shape)
        with torch.enable_grad():
            x_in = x_t.detach().to(self.batch.device, self.network.dtype).requires_grad_()
            output = to_float64(self.network(x_in, sde.conditioning_times(t)))
            if not output.requires_grad:
                raise ValueError(
                    "the network gives no gradients, which the likelihood needs; give the DDPMUNet instead"
                )
            score, inside = clipped_score(sde, t, x_t, output.detach(), self.limits)
            output = output * inside
            if self.probe_vectors is None:
                traces = _exact_trace(output, x_in)[None]
            else:
                traces = torch.stack([_quadratic_form(output, x_in, probe) for probe in self.probe_vectors])
        of_x_t, of_output = sde.score_weights(t)
        unclipped = inside.flatten(1).double().mean(1, keepdim=True)  # share of the dimensions
        # traces per dimension: of the score's Jacobian, then of the drift's, by which the log-density changes
        score_trace = unclipped * of_x_t + of_output * traces.T / dimensions - (1 - unclipped) / sde.std(t) ** 2
        f, half_g2 = sde.drift_coefficient(t), 0.5 * sde.diffusion(t) ** 2
        drift, drift_trace = f * x_t - half_g2 * score, f - half_g2 * score_trace
        return torch.cat((drift.flatten(1), drift_trace.expand(-1, state.shape[1] - dimensions)), dim=1)


def ode_bits_per_dim(
    unet: Callable,
    process: Process,
    x_start: torch.Tensor,
    *,
    levels: int | None = None,
    dequantization: str | None = None,
    generator: torch.Generator | None = None,
    eps: float | None = None,
    clip_sample: bool | None = None,
    **options,
) -> OdeBitsPerDim:
    """Bits per dimension of images on a grid of grey levels, by the ODE: an upper bound.

    "uniform" dequantization adds noise of one level's width, x = x_0 + u with u in +-1 / (levels - 1). Then
    -log2 p(x) / D - log2(2 / (levels - 1)) is an upper bound on the bits of the grey levels (Theis et al. 2016). It is for
    networks trained on images with such noise.

    "decoder" dequantization codes the images as the bound of Ho, Jain, Abbeel 2020 does, but with the density of the ODE in
    place of L_T and the KL terms:

        -log P(x_0) <= E[-log p(x_t) + log q(x_t | x_0) - log p(x_0 | x_t)],

    where t is the chain's first step and p(x_0 | x_t) its decoder L_0. It is for networks trained on images without noise.

    Args:
        unet, process, eps: as in `ode_log_likelihood`. "decoder" needs a `VariationalDDPMScheduler`, and no eps.
        x_start: (B, C, H, W) on the grid of `levels` grey levels in [-1, 1], float32 or float64.
        levels: number of grey levels of the data; None for that of the scheduler, or 256.
        dequantization: "uniform" or "decoder"; None for "decoder" if the process is a `VariationalDDPMScheduler`.
        generator: generator of the dequantization and of the probes.
        clip_sample: as in `ode_log_likelihood`, but always False with "uniform", whose images exceed [-1, 1].
        options: further arguments of `ode_log_likelihood`.

    Raises:
        ValueError: as `ode_log_likelihood`; images off the grid; clip_sample=True with "uniform".
        OdeStopped: as `ode_log_likelihood`.
    """
    chain = cast(VariationalDDPMScheduler, process) if hasattr(process, "decoder_bits_per_dim") else None
    levels = getattr(process, "levels", 256) if levels is None else levels
    dequantization = dequantization or ("uniform" if chain is None else "decoder")
    if dequantization not in DEQUANTIZATIONS:
        raise ValueError(f"dequantization={dequantization!r} is not known; choose one of {', '.join(DEQUANTIZATIONS)}")
    if dequantization == "decoder" and chain is None:
        raise ValueError("dequantization='decoder' needs the L_0 of a VariationalDDPMScheduler; choose 'uniform'")
    if dequantization == "decoder" and eps is not None:
        raise ValueError(
            f"eps={eps}: with dequantization='decoder' the ODE begins at the chain's first step; leave eps out"
        )
    if dequantization == "uniform" and clip_sample:
        raise ValueError("clip_sample=True cuts off what dequantization='uniform' adds at the ends; leave it out")
    check_images(x_start, levels)
    device, dimensions = "cpu" if generator is None else generator.device, x_start[0].numel()
    if dequantization == "uniform":
        x = to_process_range(process, dequantized(x_start, levels, generator))
        result = ode_log_likelihood(unet, process, x, eps=eps, clip_sample=False, generator=generator, **options)
        width = 2 / (levels - 1) if is_centered(process) else 1 / (levels - 1)
        nats = -result.log_likelihood - dimensions * math.log(width)
    else:
        assert chain is not None
        first = chain.chain[0]
        noise = torch.randn(x_start.shape, generator=generator, device=device, dtype=x_start.dtype).to(x_start.device)
        x = chain.q_sample(x_start, first, noise)
        begin = (first + 1) / chain.config.num_train_timesteps
        options |= dict(eps=begin, clip_sample=clip_sample, generator=generator)
        result = ode_log_likelihood(unet, process, x, **options)
        std = math.sqrt(1 - chain.alphas_cumprod[first].item())
        log_q = -0.5 * (to_float64(noise) ** 2).flatten(1).sum(1) - dimensions * math.log(math.sqrt(2 * math.pi) * std)
        c_noise = conditioning_times(chain, first)
        decoder = torch.cat(
            [
                chain.decoder_bits_per_dim(chain.p_mean_variance(output, x_batch, first, True), start, levels)
                for output, x_batch, start in _outputs(unet, x, x_start, c_noise, options)
            ]
        )
        nats = -result.log_likelihood + log_q + to_float64(decoder) * dimensions * math.log(2)
    scale = dimensions * math.log(2)
    return OdeBitsPerDim(nats / scale, result.probe_error / scale, result.latents, result.evaluations)


def dequantized(x_start: torch.Tensor, levels: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Add uniform noise of one level's width to images (B, C, H, W) on a grid of `levels` grey levels in [-1, 1]."""
    device = x_start.device if generator is None else generator.device
    u = torch.rand(x_start.shape, generator=generator, device=device, dtype=x_start.dtype).to(x_start.device)
    return x_start + (2 * u - 1) / (levels - 1)


@torch.no_grad()
def _outputs(unet, x, x_start, c_noise, options):
    """Yield (output, x, x_start) of each batch at a conditioning time, the output with its learned variance if there is one."""
    size, labels = options.get("batch_size") or len(x), options.get("class_labels")
    label_batches = [None] * len(x) if labels is None else torch.as_tensor(labels, device=x.device).split(size)
    with evaluation_mode(unet):
        for x_batch, start, batch_labels in zip(x.split(size), x_start.split(size), label_batches):
            x_in = x_batch.to(getattr(unet, "dtype", x_batch.dtype))
            yield unet(x_in, c_noise, class_labels=batch_labels, return_dict=False)[0], x_batch, start


def _quadratic_form(output, x, e):
    """e^T J e of each image, (B,), where J is the Jacobian of output with respect to x, and e is (B, C, H, W)."""
    (product,) = torch.autograd.grad((output * e).sum(), x, retain_graph=True)
    return (product.to(e.device) * e).flatten(1).sum(1).double()


def _exact_trace(output, x):
    """The trace of each image's Jacobian (B,)."""
    directions = torch.eye(x[0].numel(), dtype=output.dtype, device=output.device).view(-1, 1, *x.shape[1:])
    return sum(_quadratic_form(output, x, e) for e in directions)
