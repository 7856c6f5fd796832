"""What is measured of held-out images during a run: bits/dim and the loss."""

import math

import torch

from ddpm_hf.likelihood.bound import bits_per_dim, standard_error
from ddpm_hf.likelihood.estimate import estimate_bits_per_dim
from ddpm_hf.likelihood.ode import OdeStopped, ode_bits_per_dim
from ddpm_hf.training.interrupts import tell

ROUNDS = 8  # timesteps for each image of `held_out_loss`


ODE_TOLERANCE = 1e-3  # of held-out bits/dim in continuous time


def held_out_bits_per_dim(config, signals, unet, scheduler, x_start, labels) -> dict[str, float]:
    """bits/dim of held-out images (the mean over them), with its errors: of the estimate, and over images.

    From `eval_evaluations` network calls an image, each process's share of the images computed there; all terms of a chain
    that is no longer. In continuous time by the ODE. Not a number where it cannot be computed.

    Raises:
        Interrupted: a signal came meanwhile. In all processes.
    """
    accelerator = signals.accelerator
    process, rank = type(scheduler).from_config(scheduler.config), accelerator.process_index
    mine = slice(rank, None, accelerator.num_processes)
    part = x_start[mine].to(accelerator.device)

    def compute():
        if not len(part):
            return None
        how = dict(
            class_labels=None if labels is None else labels[mine].to(accelerator.device),
            generator=torch.Generator(accelerator.device).manual_seed(config.seed + rank),
            batch_size=config.batch_size,
        )
        if process.is_continuous:
            result, error = _by_ode(unet, process, part, how), math.nan  # of one probe nobody knows
        elif config.eval_evaluations < len(process.chain):
            estimate = estimate_bits_per_dim(unet, process, part, num_evaluations=config.eval_evaluations, **how)
            result, error = estimate.total, estimate.sampling_error
        else:
            result, error = bits_per_dim(unet, process, part, **how).total, 0.0
        return result.cpu().double(), error * len(part)

    shares = signals.measure(unet, compute)
    found = [(torch.tensor([math.nan]), math.nan)] if shares is None else [share for share in shares if share]
    total = torch.cat([values for values, _ in found])
    return {
        "bits_per_dim": total.mean().item(),
        "bits_per_dim_sampling_error": math.hypot(*(error for _, error in found)) / len(total),
        "bits_per_dim_standard_error": standard_error(total),
    }


def _by_ode(unet, process, x_start, how):
    """(B,) bits/dim."""
    try:
        return ode_bits_per_dim(unet, process, x_start, rtol=ODE_TOLERANCE, atol=ODE_TOLERANCE, **how).total
    except OdeStopped as error:
        tell(f"train.py: held-out bits/dim is left out: {error}")
        return torch.full((len(x_start),), math.nan)


def held_out_loss(config, signals, unet, objective, held_out, seen) -> dict[str, float]:
    """The training's loss of held-out images and of as many that were trained on, each with the same timesteps and noise.

    Where the first stays and the second falls, the network learns its images by heart. `held_out`, `seen`: x_start (N, C, H, W)
    and labels (N,) or None. Each image stands at `ROUNDS` timesteps; those of all are spread evenly over the chain.
    Not a number where the losses cannot be computed.

    Raises:
        Interrupted: a signal came meanwhile. In all processes.
    """
    accelerator = signals.accelerator
    count, chain, device = min(len(held_out[0]), len(seen[0])), objective.times, accelerator.device
    mine = torch.arange(accelerator.process_index, count, accelerator.num_processes)

    def compute():
        losses = torch.zeros(2, len(mine), device=device)
        for i, part in enumerate(mine.split(config.batch_size) if len(mine) else ()):
            rows = slice(i * config.batch_size, i * config.batch_size + len(part))
            for each in range(ROUNDS):
                places = each * count + part  # of count * ROUNDS; noise of its own for each, whichever process has it
                seeds = (config.seed * count * ROUNDS + place for place in places.tolist())
                noise = [
                    torch.randn(held_out[0].shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds
                ]
                t = chain[places * len(chain) // (count * ROUNDS)]
                given = dict(t=t, noise=torch.stack(noise).to(device))
                for row, (x_start, labels) in enumerate((held_out, seen)):
                    labels = None if labels is None else labels[part].to(device)
                    with torch.no_grad():
                        losses[row, rows] += objective(unet, x_start[part].to(device), labels, **given)
        return losses.cpu().double() / ROUNDS

    shares = signals.measure(unet, compute)
    of_held_out, of_seen = torch.full((2, 1), math.nan) if shares is None else torch.cat(shares, dim=1)
    return {
        "loss_held_out": of_held_out.mean().item(),
        "loss_train": of_seen.mean().item(),
        "loss_gap_standard_error": standard_error(of_held_out - of_seen),
    }
