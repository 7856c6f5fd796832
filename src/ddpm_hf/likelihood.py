"""Likelihoods in bits per dimension, by the variational bound of Ho, Jain, Abbeel 2020 (eq. 5)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from .scheduler import VariationalDDPMScheduler


class BitsPerDim(NamedTuple):
    """The bound of each of B images, in bits per dimension, term by term over the T steps of the chain.

    Columns ascend in t: column 0 of `terms` is the decoder L_0, column i the KL term of the chain's step i.
    """

    total: torch.Tensor  # (B,), prior + sum of terms: an upper bound on the negative log-likelihood
    prior: torch.Tensor  # (B,), L_T
    terms: torch.Tensor  # (B, T)
    x_start_mse: torch.Tensor  # (B, T), of the predicted x_0, on the scale [-1, 1]
    epsilon_mse: torch.Tensor  # (B, T), of the noise that follows from the predicted x_0

    @property
    def mean(self) -> float:
        """The mean of `total` over the images, bits per dimension."""
        return self.total.double().mean().item()

    @property
    def standard_error(self) -> float:
        """The standard error of `mean` over the images; NaN for a single one."""
        if len(self.total) < 2:
            return math.nan
        return self.total.double().std().item() / len(self.total) ** 0.5


@torch.no_grad()
def bits_per_dim(
    unet: Callable,
    scheduler: VariationalDDPMScheduler,
    x_start: torch.Tensor,
    *,
    class_labels: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    clip_sample: bool = True,
    batch_size: int | None = None,
    noise_fn: Callable[[int, torch.Size], torch.Tensor] | None = None,
    progress_bar: bool = False,
) -> BitsPerDim:
    """Every term of the variational bound for every image, one noise draw for each term.

    Args:
        unet: a diffusers model, or anything called as `unet(x_t, t, class_labels=..., return_dict=False)` that returns a
            tuple with the output first. Its dropout is off while this runs.
        scheduler: its chain is used: all T steps unless `set_timesteps` was called.
        x_start: images (B, C, H, W) on the grid of `scheduler.levels` grey levels in [-1, 1], float32 or float64.
        class_labels: (B,), for a class-conditional network.
        generator: for the noise.
        clip_sample: clip the predicted x_0, as the papers do when they evaluate.
        batch_size: images a network call; None for all at once.
        noise_fn: `noise_fn(t, shape)` gives the noise of step t in place of `generator`.
        progress_bar: show one.

    Returns:
        `BitsPerDim` on the device of x_start.

    Raises:
        ValueError: no image; x_start beyond [-1, 1]; labels of another number.
    """
    if x_start.dim() != 4 or len(x_start) == 0:
        raise ValueError(f"x_start has shape {tuple(x_start.shape)}; give (B, C, H, W) with one image at least")
    if not x_start.abs().max() <= 1 + 1e-5:  # NaN too
        raise ValueError(f"x_start reaches {x_start.abs().max().item():.4g}; images must be in [-1, 1]")
    if class_labels is not None and len(class_labels) != len(x_start):
        raise ValueError(f"class_labels has {len(class_labels)} entries for {len(x_start)} images; give one each")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more")
    modes = {module: module.training for module in unet.modules()} if isinstance(unet, torch.nn.Module) else {}
    if modes:
        unet.eval()
    dtype = getattr(unet, "dtype", x_start.dtype)
    batches = x_start.split(batch_size or len(x_start))
    labels = [None] * len(batches) if class_labels is None else class_labels.split(batch_size or len(x_start))
    columns = []
    try:
        with tqdm(total=len(batches) * len(scheduler.chain), desc="bits/dim", disable=not progress_bar) as bar:
            for batch, label in zip(batches, labels):
                for t in scheduler.chain:
                    if noise_fn is not None:
                        noise = noise_fn(t, batch.shape)
                    else:
                        noise = torch.randn(batch.shape, generator=generator, device=batch.device, dtype=batch.dtype)
                    x_t = scheduler.q_sample(batch, t, noise)
                    output = unet(x_t.to(dtype), t, class_labels=label, return_dict=False)[0]
                    term = scheduler.vlb_term(output, batch, x_t, t, clip_sample)
                    pred = scheduler.p_mean_variance(output, x_t, t, clip_sample).pred_original_sample
                    epsilon = scheduler.epsilon_from_x_start(pred, x_t, t)
                    mses = ((y**2).flatten(1).mean(1) for y in (pred - batch, epsilon - noise))
                    columns.append(torch.stack((term, *mses)))
                    bar.update()
    finally:
        for module, mode in modes.items():
            module.training = mode
    # (batches * T) x (3, b) -> three of (B, T)
    T = len(scheduler.chain)
    rows = [torch.stack(columns[i : i + T], dim=-1) for i in range(0, len(columns), T)]
    terms, x_start_mse, epsilon_mse = torch.cat(rows, dim=1)
    prior = scheduler.prior_bits_per_dim(x_start)
    return BitsPerDim(terms.sum(1) + prior, prior, terms, x_start_mse, epsilon_mse)
