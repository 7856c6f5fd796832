"""Images to latents and back by the probability-flow ODE (Score-SDE, section 4.3)."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch

from ddpm_hf.likelihood.bound import check_scheduler
from ddpm_hf.likelihood.solver import (
    OdeOptions,
    Process,
    clipped_score,
    is_centered,
    process_of,
    solve_in_batches,
    solve_ode,
    to_process_range,
)
from ddpm_hf.schedulers.conditioning_times import conditioning_times
from ddpm_hf.schedulers.precision import to_float64


class Encoding(NamedTuple):
    """The result of `encode` or `decode`: samples at the other end of the ODE."""

    sample: torch.Tensor  # (B, C, H, W)
    evaluations: torch.Tensor  # (B,) int64: network evaluations for this image


def encode(
    unet: Callable,
    process: Process,
    x_start: torch.Tensor,
    *,
    num_inference_steps: int | None = None,
    class_labels: torch.Tensor | None = None,
    eps: float | None = None,
    clip_sample: bool | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    batch_size: int | None = None,
    max_evaluations: int = 2000,
    progress_bar: bool = False,
) -> Encoding:
    """Encode images as the latents to which the ODE takes them.

    The latents of an exact network depend on the data's distribution alone, not on the network's architecture.

    Args:
        unet, process, class_labels, eps, clip_sample, rtol, atol, batch_size, max_evaluations, progress_bar: as in
            `ode_log_likelihood`. The network needs no gradients, so an `InferenceUNet` works too.
        x_start: (B, C, H, W) in [-1, 1].
        num_inference_steps: None for the adaptive solver, or the number of DDIM steps (DDIM eq. 13) up the chain of a
            `VariationalDDPMScheduler`, which take fewer network calls but are not inverted exactly by `decode`.

    Returns:
        `Encoding`; `.sample` is x at t = 1, (B, C, H, W), with the standard deviation `prior_std` of the process.

    Raises:
        ValueError, OdeStopped: as `ode_log_likelihood`.
    """
    options = OdeOptions(class_labels, eps, clip_sample, rtol, atol, batch_size, max_evaluations, progress_bar)
    x = to_process_range(process, x_start)
    return _solve_with_options(unet, process, x, num_inference_steps, options, to_latents=True)


def decode(
    unet: Callable,
    process: Process,
    latents: torch.Tensor,
    *,
    num_inference_steps: int | None = None,
    class_labels: torch.Tensor | None = None,
    eps: float | None = None,
    clip_sample: bool | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    batch_size: int | None = None,
    max_evaluations: int = 2000,
    progress_bar: bool = False,
) -> Encoding:
    """Decode latents of `encode`, or noise, to images.

    Args:
        latents: (B, C, H, W), x at t = 1.
        Others: as in `encode`.

    Returns:
        `Encoding`; `.sample` is x at t = eps, (B, C, H, W) in [-1, 1] up to stray values.

    Raises:
        ValueError, OdeStopped: as `ode_log_likelihood`.
    """
    options = OdeOptions(class_labels, eps, clip_sample, rtol, atol, batch_size, max_evaluations, progress_bar)
    result = _solve_with_options(unet, process, latents, num_inference_steps, options, to_latents=False)
    return result if is_centered(process) else result._replace(sample=2 * result.sample - 1)


def interpolate_latents(a: torch.Tensor, b: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """Interpolate on the sphere between latents a and b (DDIM eq. 67).

    Args:
        a, b: (B, C, H, W).
        weights: numbers in [0, 1]; 0 gives a, 1 gives b.

    Returns:
        (B * len(weights), C, H, W): all interpolations of the first pair, then those of the second, and so on.
    """
    x, y = to_float64(a), to_float64(b)
    angle = torch.nn.functional.cosine_similarity(x.flatten(1), y.flatten(1)).clamp(-1, 1).acos()
    weight = torch.tensor(weights, dtype=torch.float64, device=x.device)[None]
    angle = angle[:, None].clamp(min=1e-6)  # almost linear for almost equal latents
    of_x, of_y = torch.sin((1 - weight) * angle) / angle.sin(), torch.sin(weight * angle) / angle.sin()
    mixed = of_x[..., None, None, None] * x[:, None] + of_y[..., None, None, None] * y[:, None]
    return mixed.flatten(0, 1).to(a)


def _solve_with_options(unet, process, x, num_inference_steps, options, *, to_latents):
    """`Encoding` of images x, or, if not to_latents, the images of latents x."""
    if num_inference_steps is None:
        sde, solve = _adaptive_solution(process, options, to_latents)
        description = "encoding" if to_latents else "decoding"
    else:
        sde, solve = _ddim_solution(process, num_inference_steps, options, to_latents)
        description = "DDIM"
    results = list(solve_in_batches(unet, sde, x, solve, options=options, description=description))
    samples = [end.view(batch.shape).to(x) for batch, end, _ in results]
    counts = [torch.full((len(batch),), evaluations) for batch, _, evaluations in results]
    return Encoding(torch.cat(samples), torch.cat(counts))


def _adaptive_solution(process, options, to_latents):
    """The SDE, and the function that `solve_in_batches` calls for each batch."""
    sde = process_of(process)
    eps, limits = options.start_time(sde), options.clip_limits(process)
    begin, end = (eps, 1.0) if to_latents else (1.0, eps)

    @torch.no_grad()
    def solve(batch, network, bar):
        def slope(t, state):
            x_t = state.view(batch.shape)
            output = to_float64(network(x_t.to(batch.device, network.dtype), sde.conditioning_times(t)))
            score, _ = clipped_score(sde, t, x_t, output, limits)
            return sde.reverse_drift(x_t, t, score, probability_flow=True).flatten(1)

        return solve_ode(slope, to_float64(batch.flatten(1)), begin=begin, end=end, options=options, bar=bar)

    return sde, solve


def _ddim_solution(process, num_inference_steps, options, to_latents):
    """As `_adaptive_solution`, in steps of DDIM up or down the chain of a `VariationalDDPMScheduler`."""
    check_scheduler(process)
    if options.eps is not None:
        raise ValueError(f"eps={options.eps} is for the adaptive solver; leave it out with num_inference_steps")
    sde, scheduler = process_of(process), copy.copy(process)
    if options.clip_sample is not None:  # changes the copy's config only
        scheduler.register_to_config(clip_sample=options.clip_sample, thresholding=False)
    scheduler.set_timesteps(num_inference_steps)
    chain = scheduler.chain if to_latents else scheduler.chain[::-1]

    def step(output, t, x_t):
        if to_latents:
            return scheduler.reverse_step(output, t, x_t)
        return scheduler.step(
            output, t, x_t, eta=0.0, variance_noise=torch.zeros_like(x_t)
        )  # "analytic" has noise here, too

    @torch.no_grad()
    def solve(batch, network, bar):
        for t in chain:
            batch = step(network(batch, conditioning_times(scheduler, t)), t, batch).prev_sample
            bar.update()
        return batch, len(chain)

    return sde, solve
