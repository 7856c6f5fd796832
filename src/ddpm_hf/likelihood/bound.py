"""Likelihoods in bits per dimension, by the variational bound of Ho, Jain, Abbeel 2020 (eq. 5)."""

import math
from collections.abc import Callable
from numbers import Integral
from typing import NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from ddpm_hf.models.evaluation_mode import evaluation_mode
from ddpm_hf.schedulers.ddpm import VariationalDDPMScheduler
from ddpm_hf.schedulers.precision import to_float64


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
    def kl(self) -> torch.Tensor:
        """(B,), L_1 + ... + L_{T-1}."""
        return self.terms[:, 1:].sum(1)

    @property
    def decoder(self) -> torch.Tensor:
        """(B,), L_0."""
        return self.terms[:, 0]

    @property
    def mean(self) -> float:
        """The mean of `total` over the images, bits per dimension."""
        return to_float64(self.total).mean().item()

    @property
    def standard_error(self) -> float:
        """The standard error of `mean` over the images; NaN for a single one."""
        return standard_error(self.total)


def standard_error(values: torch.Tensor) -> float:
    """The standard error of the mean of values (B,); NaN for a single one."""
    return to_float64(values).std().item() / len(values) ** 0.5 if len(values) > 1 else math.nan


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
    levels: int | None = None,
    noise_fn: Callable[[int, torch.Size], torch.Tensor] | None = None,
    progress_bar: bool = False,
) -> BitsPerDim:
    """Every term of the variational bound for every image, one noise draw for each term.

    A chain need not begin at t = 0: where the noise of its first step is far finer than a grey level, as in schedules made for
    256 levels on data of 17, a network pays there in KL for what the decoder of a later step gives for nothing. The bound of
    `scheduler.set_timesteps(timesteps=range(T - 1, t0 - 1, -1))` is as much a bound; choose t0 on the training data.

    Args:
        unet: a diffusers model, or anything called as `unet(x_t, t, class_labels=..., return_dict=False)` that returns a
            tuple with the output first; t is an int, or int64 (rows,) where a call holds several timesteps. Its dropout is
            off while this runs. In half precision, or under autocast, the terms are still computed in float32.
        scheduler: its chain is used: all T steps unless `set_timesteps` was called; our pipeline's calls leave it alone.
        x_start: images (B, C, H, W) on the grid of `levels` grey levels in [-1, 1], float32 or float64.
        class_labels: (B,), for a class-conditional network.
        generator: for the noise, which is drawn step by step: how many steps a call holds does not change it.
        clip_sample: clip the predicted x_0, as the papers do when they evaluate.
        batch_size: rows (images times timesteps) a network call, which bound the memory: fewer images than that share the
            call with their next timesteps. None for all images at one timestep.
        levels: grey levels of the data; None for those of the scheduler.
        noise_fn: `noise_fn(t, shape)` gives the noise of step t in place of `generator`.
        progress_bar: show one, in a terminal or a notebook.

    Returns:
        `BitsPerDim` on the device of x_start.

    Raises:
        ValueError: another scheduler; no image; x_start beyond [-1, 1] or off the grid; labels of another number; a network
            of other channels than the process needs; a term or an output that is not finite, named by its image and t.
    """
    evaluate = BoundEvaluator(unet, scheduler, x_start, class_labels, clip_sample, levels, batch_size)
    b = min(batch_size or len(x_start), len(x_start))
    chain, count = scheduler.chain, max(1, (batch_size or b) // b)
    # the decoder's step alone, the others several a call
    calls = [chain[:1], *(chain[i : i + count] for i in range(1, len(chain), count))]
    rows = []
    with (
        evaluate,
        tqdm(total=len(x_start) * len(chain), desc="bits/dim", disable=not progress_bar or None) as bar,
    ):
        for start in range(0, len(x_start), b):
            images = torch.arange(start, min(start + b, len(x_start)), device=x_start.device)
            shape, columns = (len(images), *x_start.shape[1:]), []
            for ts in calls:
                noise = torch.cat(
                    [noise_fn(t, torch.Size(shape)) if noise_fn else evaluate.noise(shape, generator) for t in ts]
                ).to(x_start.device)
                t = ts[0] if len(ts) == 1 else torch.tensor(ts).repeat_interleave(len(images))
                columns += evaluate.at_noise(images.repeat(len(ts)), t, noise).split(len(images), dim=1)
                bar.update(len(images) * len(ts))
            rows.append(torch.stack(columns, dim=-1))
    return _bound(scheduler, x_start, rows)


@torch.no_grad()
def progressive_coding(
    unet: Callable,
    scheduler: VariationalDDPMScheduler,
    x_start: torch.Tensor,
    *,
    class_labels: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    clip_sample: bool = True,
    batch_size: int | None = None,
    levels: int | None = None,
    progress_bar: bool = False,
) -> BitsPerDim:
    """The code lengths of sending each image progressively: Algorithms 3 and 4 of the paper, simulated.

    The sender draws x_T from q(x_T | x_0), then each x_{t-1} from q(x_{t-1} | x_t, x_0): one trajectory an image, where
    `bits_per_dim` draws every x_t anew. The expected code length of a step is its term of the bound; nothing is encoded.

    Args:
        unet, scheduler, x_start, class_labels, generator, clip_sample, levels, progress_bar: as in `bits_per_dim`.
        batch_size: images a network call; None for all.

    Returns:
        `BitsPerDim`; `x_start_mse` is what the receiver of x_t has.

    Raises:
        ValueError: as `bits_per_dim`.
    """
    evaluate = BoundEvaluator(unet, scheduler, x_start, class_labels, clip_sample, levels, batch_size)
    rows = []
    with (
        evaluate,
        tqdm(total=len(x_start) * len(scheduler.chain), desc="coding", disable=not progress_bar or None) as bar,
    ):
        for index in torch.arange(len(x_start), device=x_start.device).split(batch_size or len(x_start)):
            x_0, columns = x_start[index], []
            x_t = scheduler.q_sample(x_0, scheduler.chain[-1], evaluate.noise(x_0.shape, generator))
            for t in reversed(scheduler.chain):
                noise = scheduler.epsilon_from_x_start(x_0, x_t, t)
                columns.append(evaluate(index, t, x_t, noise))
                q = scheduler.q_posterior(x_0, x_t, t)
                x_t = q.mean + q.variance.sqrt() * evaluate.noise(x_0.shape, generator)
                bar.update(len(index))
            rows.append(torch.stack(columns[::-1], dim=-1))
    return _bound(scheduler, x_start, rows)


def _bound(scheduler, x_start, rows):
    terms, x_start_mse, epsilon_mse = torch.cat(rows, dim=1)
    prior = scheduler.prior_bits_per_dim(x_start)
    return BitsPerDim(terms.sum(1) + prior, prior, terms, x_start_mse, epsilon_mse)


def rate_distortion(result: BitsPerDim) -> tuple[torch.Tensor, torch.Tensor]:
    """Rate against distortion while an image is received (Ho, Jain, Abbeel 2020, section 4.3, figure 5 and table 4).

    Args:
        result: of `progressive_coding`, or of `bits_per_dim`, which has the same expectation.

    Returns:
        Two float64 tensors (T + 1,), means over the images, in the order of receiving: the rate in bits per dimension spent
        so far, and the root of the mean squared error of the predicted x_0 on the scale 0 .. 255. The last entry is the
        whole image, without error. On the device of the result, or for Apple's GPUs on the CPU.
    """
    terms, mse = to_float64(result.terms).mean(0), to_float64(result.x_start_mse).mean(0)
    # with x_t received, all terms of later t are paid
    rate = torch.cat((to_float64(result.prior).mean()[None], terms.flip(0))).cumsum(0)
    return rate, torch.cat((mse.flip(0).sqrt() * 127.5, mse.new_zeros(1)))


class BoundEvaluator:
    """Terms of the bound for rows of (image, t, noise), with the network in evaluation mode while it is entered."""

    def __init__(self, unet, scheduler, x_start, class_labels, clip_sample, levels, batch_size):
        check_scheduler(scheduler)
        self.unet, self.scheduler, self.x_start = unet, scheduler, x_start
        self.class_labels = None if class_labels is None else torch.as_tensor(class_labels, device=x_start.device)
        self.clip_sample, self.levels = clip_sample, scheduler.levels if levels is None else levels
        self.dtype = getattr(unet, "dtype", x_start.dtype)
        self.first, self.pending = scheduler.chain[0], []
        if not isinstance(self.levels, Integral) or self.levels < 2:
            raise ValueError(f"levels={self.levels!r}: give the number of grey levels of the data, 2 or more")
        check_images(x_start, self.levels)
        if batch_size is not None and not (isinstance(batch_size, Integral) and batch_size >= 1):
            raise ValueError(f"batch_size={batch_size} must be an integer, 1 or more")
        if class_labels is not None and len(class_labels) != len(x_start):
            raise ValueError(f"class_labels has {len(class_labels)} entries for {len(x_start)} images; give one each")
        _check_channels(unet, scheduler, x_start.shape[1])

    def __enter__(self):
        self.mode = evaluation_mode(self.unet)
        self.mode.__enter__()
        return self

    def __exit__(self, error, *_):
        self.mode.__exit__(None, None, None)
        if error is None:
            self.check_terms()

    def noise(self, shape, generator):
        return randn_tensor(shape, generator=generator, device=self.x_start.device, dtype=self.x_start.dtype)

    def at_noise(self, index, t, noise):
        return self(index, t, self.scheduler.q_sample(self.x_start[index], t, noise), noise)

    def __call__(self, index, t, x_t, noise):
        """(3, rows): the term, the squared error of x_0 and that of epsilon; t is an int, or one for each row."""
        scheduler, x_start = self.scheduler, self.x_start[index]
        labels = None if self.class_labels is None else self.class_labels[index]
        t = t if isinstance(t, int) else t.to(x_t.device)
        output = self.unet(x_t.to(self.dtype), t, class_labels=labels, return_dict=False)[0]
        if output.shape[0] != len(x_t) or output.shape[2:] != x_t.shape[2:]:
            raise ValueError(
                f"the network made {tuple(output.shape)} of {tuple(x_t.shape)}; the output must have the input's batch size, "
                "height and width"
            )
        p = scheduler.p_mean_variance(output, x_t, t, self.clip_sample)
        if isinstance(t, int) and t == self.first:
            term = scheduler.decoder_bits_per_dim(p, x_start, self.levels)
        else:
            term = scheduler.kl_bits_per_dim(p, x_start, x_t, t)
        term = term.masked_fill(~output.isfinite().flatten(1).all(1), torch.nan)  # clipping would hide an infinite one
        epsilon = scheduler.epsilon_from_x_start(p.pred_original_sample, x_t, t)
        errors = (p.pred_original_sample - x_start, epsilon - noise)
        self.pending.append((term, index, t))
        if term.device.type == "cpu" or len(self.pending) == 50:  # looking waits for an accelerator
            self.check_terms()
        return torch.stack((term, *(error.square().flatten(1).mean(1) for error in errors)))

    def check_terms(self):
        pending, self.pending = self.pending, []
        if not pending or torch.stack([term.isfinite().all() for term, *_ in pending]).all():
            return
        for term, index, t in pending:
            for row in (~term.isfinite()).nonzero().flatten().tolist():
                at = t if isinstance(t, int) else t[row].item()
                raise ValueError(f"the bound's term of image {index[row].item()} at t={at} is {term[row].item()}")


def check_scheduler(scheduler) -> None:
    """Raises ValueError for a scheduler that has no bound."""
    if not hasattr(scheduler, "chain"):
        raise ValueError(
            f"scheduler is a {type(scheduler).__name__}; the bound is of a VariationalDDPMScheduler, "
            "which VariationalDDPMScheduler.from_config(scheduler.config) makes"
        )


def check_images(x_start: torch.Tensor, levels: int) -> None:
    """Raises ValueError for images that are not (B, C, H, W), float32 or float64, on a grid of `levels` levels in [-1, 1]."""
    if x_start.dim() != 4 or len(x_start) == 0:
        raise ValueError(f"x_start has shape {tuple(x_start.shape)}; give (B, C, H, W) with one image at least")
    if x_start.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x_start is {x_start.dtype}; give float32 or float64, which hold every grey level")
    if not x_start.abs().max() <= 1 + 1e-5:  # NaN too
        raise ValueError(f"x_start reaches {x_start.abs().max().item():.4g}; images must be in [-1, 1]")
    grey = (to_float64(x_start) + 1) * ((levels - 1) / 2)
    off = (grey - grey.round()).abs().max().item()
    if off > max(0.01, levels * 2e-7):
        raise ValueError(
            f"x_start is up to {off:.2g} of a grey level off the grid of levels={levels}; give the data's own levels, "
            "unscaled and without dithering"
        )


def _check_channels(unet, scheduler, channels):
    config = getattr(unet, "config", None)
    outputs = channels * (2 if scheduler.learns_variance else 1)
    for name, needed in (("in_channels", channels), ("out_channels", outputs)):
        has = getattr(config, name, needed)
        if has != needed:
            raise ValueError(
                f"the network has {name}={has}; images of {channels} channels and variance_type="
                f"{scheduler.variance_type!r} need {needed}"
            )
