"""Measurements of held-out images during a run: bits/dim, and the loss."""

import math

import torch

from ddpm_hf.likelihood.bound import bits_per_dim, standard_error
from ddpm_hf.likelihood.estimate import estimate_bits_per_dim, with_sampling_error
from ddpm_hf.likelihood.ode import OdeStopped, ode_bits_per_dim
from ddpm_hf.schedulers.precision import finest_dtype
from ddpm_hf.training.losses import ContinuousBoundObjective
from ddpm_hf.training.messages import print_above_progress_bar

ROUNDS = 8  # timesteps for each image of `held_out_loss`


ODE_TOLERANCE = 1e-3  # of held-out bits/dim in continuous time


def held_out_bits_per_dim(config, interrupts, unet, scheduler, objective, x_start, labels) -> dict[str, float]:
    """The mean bits/dim of held-out images, with two standard errors: of the estimate, and over images.

    It takes `eval_evaluations` network calls per image, or evaluates all terms of a shorter chain. A process in continuous
    time is measured by its ODE, the objective "vlb_continuous" by its own bound. Each process computes a share of the images.
    NaN if it cannot be computed.

    Raises:
        Interrupted: in all processes, if a signal came meanwhile.
    """
    accelerator = interrupts.accelerator
    process, rank = type(scheduler).from_config(scheduler.config), accelerator.process_index
    share = slice(rank, None, accelerator.num_processes)
    part = x_start[share].to(accelerator.device)

    def compute():
        if not len(part):
            return None
        options = dict(
            class_labels=None if labels is None else labels[share].to(accelerator.device),
            generator=torch.Generator(accelerator.device).manual_seed(config.seed + rank),
            batch_size=config.batch_size,
        )
        if process.is_continuous:
            result, error = _by_ode(config, unet, process, part, options), math.nan  # one probe has no error
        elif isinstance(objective, ContinuousBoundObjective):
            losses = _in_continuous_time(config, unet, objective, part, **options)
            # differences of neighboring times: their spread over the whole process is no error
            result, error = losses.mean(0), (losses.diff(dim=0).square().mean() / (2 * losses.numel())).sqrt().item()
        elif config.eval_evaluations < len(process.chain):
            estimate = estimate_bits_per_dim(unet, process, part, num_evaluations=config.eval_evaluations, **options)
            result, error = estimate.total, estimate.sampling_error
        else:
            result, error = bits_per_dim(unet, process, part, **options).total, 0.0
        return result.cpu().double(), error * len(part)

    shares = interrupts.run(unet, compute)
    results = [(torch.tensor([math.nan]), math.nan)] if shares is None else [result for result in shares if result]
    total = torch.cat([values for values, _ in results])
    sampling_error = math.hypot(*(error for _, error in results)) / len(total)
    return {
        "bits_per_dim": total.mean().item(),
        "bits_per_dim_sampling_error": sampling_error,
        "bits_per_dim_standard_error": with_sampling_error(standard_error(total), sampling_error),
    }


def _by_ode(config, unet, process, x_start, options):
    """Return bits/dim (B,) by the ODE, or NaN if its solver stopped."""
    try:
        return ode_bits_per_dim(unet, process, x_start, rtol=ODE_TOLERANCE, atol=ODE_TOLERANCE, **options).total
    except OdeStopped as error:
        print_above_progress_bar(f"{config.program}: held-out bits/dim is left out: {error}")
        return torch.full((len(x_start),), math.nan)


@torch.no_grad()
def _in_continuous_time(config, unet, objective, x_start, *, class_labels, generator, batch_size):
    """The bound at `eval_evaluations` times for each image, spread evenly over the process: (times, B) bits/dim."""
    rows, rounds, device = [], config.eval_evaluations, x_start.device
    for i in range(rounds):
        row = []
        for index in torch.arange(len(x_start), device=device).split(batch_size):
            u = torch.rand(len(index), generator=generator, device=device, dtype=finest_dtype(device))
            labels = None if class_labels is None else class_labels[index]
            noise = torch.randn(x_start[index].shape, generator=generator, device=device)
            row.append(objective(unet, x_start[index], labels, (i + u) / rounds * (objective.end - 1), noise))
        rows.append(torch.cat(row))
    return torch.stack(rows)


def held_out_loss(config, interrupts, unet, objective, held_out, trained_on) -> dict[str, float]:
    """The training loss on held-out images and on as many that were trained on, with the same timesteps and noise.

    The network overfits if the second falls and the first does not. Each image is evaluated at `ROUNDS` timesteps, which
    together cover the chain evenly. NaN if the losses cannot be computed.

    Args:
        held_out, trained_on: x_start (N, C, H, W), and labels (N,) or None.

    Raises:
        Interrupted: a signal came meanwhile. In all processes.
    """
    accelerator = interrupts.accelerator
    count, chain, device = min(len(held_out[0]), len(trained_on[0])), objective.times, accelerator.device
    indices = torch.arange(accelerator.process_index, count, accelerator.num_processes)

    def compute():
        losses = torch.zeros(2, len(indices), device=device)
        for i, part in enumerate(indices.split(config.batch_size) if len(indices) else ()):
            rows = slice(i * config.batch_size, i * config.batch_size + len(part))
            for i_round in range(ROUNDS):
                # of count * ROUNDS places each has its own noise, whichever process computes it
                places = i_round * count + part
                seeds = (config.seed * count * ROUNDS + place for place in places.tolist())
                noise = [
                    torch.randn(held_out[0].shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds
                ]
                t = chain[places * len(chain) // (count * ROUNDS)]
                fixed = dict(t=t, noise=torch.stack(noise).to(device))
                for row, (x_start, labels) in enumerate((held_out, trained_on)):
                    labels = None if labels is None else labels[part].to(device)
                    with torch.no_grad():
                        losses[row, rows] += objective(unet, x_start[part].to(device), labels, **fixed)
        return losses.cpu().double() / ROUNDS

    shares = interrupts.run(unet, compute)
    of_held_out, of_trained_on = torch.full((2, 1), math.nan) if shares is None else torch.cat(shares, dim=1)
    return {
        "loss_held_out": of_held_out.mean().item(),
        "loss_train": of_trained_on.mean().item(),
        "loss_gap_standard_error": standard_error(of_held_out - of_trained_on),
    }
