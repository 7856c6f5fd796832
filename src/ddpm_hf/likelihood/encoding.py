"""Images to latents and back by the probability-flow ODE (Score-SDE, section 4.3)."""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from ddpm_hf.likelihood.bound import check_scheduler
from ddpm_hf.likelihood.ode import (
    clip_limits_of,
    clipped_score,
    is_centered,
    process_of,
    solve_in_batches,
    solve_ode,
    start_time,
    to_process_range,
)
from ddpm_hf.schedulers.precision import to_float64


class Encoding(NamedTuple):
    """Images at the other end of the ODE."""

    sample: torch.Tensor  # (B, C, H, W)
    evaluations: torch.Tensor  # (B,) int64: of the network for this image


def encode(
    unet: Callable,
    process,
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
    """Images to the latents that the ODE takes them to: unique to the data's distribution, not to the network.

    Args:
        unet, process, class_labels, eps, clip_sample, rtol, atol, batch_size, max_evaluations, progress_bar: as in
            `ode_log_likelihood`; the network needs no gradients, so an `InferenceUNet` works too.
        x_start: (B, C, H, W).
        num_inference_steps: None for the adaptive solver; a number for as many steps of DDIM (eq. 13 there) up the chain of a
            `VariationalDDPMScheduler`: fewer calls, and `decode` does not come back exactly.

    Returns:
        `Encoding` with `.sample` (B, C, H, W), x at t = 1: of standard deviation `prior_std` of the process.

    Raises:
        As `ode_log_likelihood`.
    """
    how = unet, process, class_labels, eps, clip_sample, rtol, atol, batch_size, max_evaluations, progress_bar
    return _carry(to_process_range(process, x_start), True, num_inference_steps, *how)


def decode(
    unet: Callable,
    process,
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
    """Latents of `encode`, or noise, to images; arguments as there. `.sample` is x at t = eps, [-1, 1] but for stray values."""
    how = unet, process, class_labels, eps, clip_sample, rtol, atol, batch_size, max_evaluations, progress_bar
    found = _carry(latents, False, num_inference_steps, *how)
    return found if is_centered(process) else found._replace(sample=2 * found.sample - 1)


def interpolate_latents(a: torch.Tensor, b: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """On the sphere from latents a to b, each (B, C, H, W) (DDIM eq. 67): (B * len(weights), C, H, W), of each pair in turn."""
    x, y = to_float64(a), to_float64(b)
    angle = torch.nn.functional.cosine_similarity(x.flatten(1), y.flatten(1)).clamp(-1, 1).acos()
    weight = torch.tensor(weights, dtype=torch.float64, device=x.device)[None]
    angle = angle[:, None].clamp(min=1e-6)  # nearly equal ones are mixed linearly
    of_x, of_y = torch.sin((1 - weight) * angle) / angle.sin(), torch.sin(weight * angle) / angle.sin()
    mixed = of_x[..., None, None, None] * x[:, None] + of_y[..., None, None, None] * y[:, None]
    return mixed.flatten(0, 1).to(a)


def _carry(
    x, up, steps, unet, process, class_labels, eps, clip_sample, rtol, atol, batch_size, max_evaluations, progress_bar
):
    if steps is not None:
        check_scheduler(process)
        if eps is not None:
            raise ValueError(f"eps={eps} is of the adaptive solver; leave it out with num_inference_steps")
        name, sde, scheduler = "DDIM", process_of(process), copy.copy(process)
        if clip_sample is not None:
            scheduler.register_to_config(clip_sample=clip_sample, thresholding=False)  # of the copy
        scheduler.set_timesteps(steps)
        chain = scheduler.chain if up else scheduler.chain[::-1]
        step = scheduler.reverse_step if up else partial(scheduler.step, eta=0.0)

        @torch.no_grad()
        def solve(part, network, bar):
            for t in chain:
                part = step(network(part, t), t, part).prev_sample
                bar.update()
            return part, len(chain)
    else:
        sde = process_of(process)
        eps, limits = start_time(sde, eps), clip_limits_of(process, clip_sample)
        name, ends = ("encoding", (eps, 1.0)) if up else ("decoding", (1.0, eps))

        @torch.no_grad()
        def solve(part, network, bar):
            def slope(t, state):
                x_t = state.view(part.shape)
                output = to_float64(network(x_t.to(part.device, network.dtype), sde.conditioning_times(t)))
                score, _ = clipped_score(sde, t, x_t, output, limits)
                return sde.reverse_drift(x_t, t, score, probability_flow=True).flatten(1)

            return solve_ode(slope, to_float64(part.flatten(1)), None, *ends, rtol, atol, max_evaluations, bar)

    found = list(solve_in_batches(unet, sde, x, class_labels, batch_size, name, progress_bar, solve))
    parts = [end.view(part.shape).to(x) for part, end, _ in found]
    counts = [torch.full((len(part),), evaluations) for part, _, evaluations in found]
    return Encoding(torch.cat(parts), torch.cat(counts))
