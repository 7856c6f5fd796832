"""Likelihoods in bits per dimension, by the variational bound of Ho, Jain, Abbeel 2020 (eq. 5)."""

import math
from collections.abc import Callable
from numbers import Integral
from typing import NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from ddpm_hf.models.evaluation_mode import evaluation_mode
from ddpm_hf.schedulers.conditioning_times import conditioning_times
from ddpm_hf.schedulers.ddpm import VariationalDDPMScheduler
from ddpm_hf.schedulers.precision import to_float64


class BitsPerDim(NamedTuple):
    """The variational bound of each of B images in bits per dimension, with its terms over the T steps of the chain.

    Columns ascend in t: column 0 of `terms` is the decoder L_0, column i the KL term of the chain's step i.
    """

    total: torch.Tensor  # (B,), prior + sum of terms: an upper bound on the negative log-likelihood
    prior: torch.Tensor  # (B,), L_T
    terms: torch.Tensor  # (B, T)
    x_start_mse: torch.Tensor  # (B, T), mean squared error of the predicted x_0, on the scale [-1, 1]
    epsilon_mse: torch.Tensor  # (B, T), mean squared error of the noise computed from the predicted x_0

    @property
    def kl(self) -> torch.Tensor:
        """The sum of the KL terms L_1 to L_{T-1}, (B,)."""
        return self.terms[:, 1:].sum(1)

    @property
    def decoder(self) -> torch.Tensor:
        """The decoder term L_0, (B,)."""
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
    """Compute every term of the variational bound for every image, with one draw of the noise for each term.

    A chain need not begin at t = 0. If the noise of its first step is much finer than a grey level, as with a schedule made
    for 256 grey levels on data with 17, the KL terms of the first steps cost bits that the decoder of a later step saves.
    After `scheduler.set_timesteps(timesteps=range(T - 1, t0 - 1, -1))` the result is a bound too. Choose t0 on training data.

    Args:
        unet: a diffusers model, or any function called as `unet(x_t, t, class_labels=..., return_dict=False)` that returns a
            tuple with the output first. t is an int, or int64 (rows,) if a call holds several timesteps; floats with
            rescale_timesteps. Dropout is off during the call. With half precision or autocast, the terms are still computed in
            float32.
        scheduler: its chain is used: all T steps unless `set_timesteps` was called. `DDPMImagePipeline` does not change it.
        x_start: images (B, C, H, W) on the grid of `levels` grey levels in [-1, 1], float32 or float64.
        class_labels: (B,), for a class-conditional network.
        generator: generator of the noise. The noise does not depend on the number of steps in a network call.
        clip_sample: whether to clip the predicted x_0, as the papers do in evaluation.
        batch_size: rows (images times timesteps) per network call, which limits the memory. If there are fewer images, a call
            holds several timesteps. None for all images at one timestep.
        levels: number of grey levels of the data; None for that of the scheduler.
        noise_fn: `noise_fn(t, shape)` returns the noise of step t, instead of `generator`.
        progress_bar: whether to show a progress bar in a terminal or a notebook.

    Returns:
        `BitsPerDim` on the device of x_start.

    Raises:
        ValueError: the scheduler has no bound; x_start has no image, exceeds [-1, 1] or is off the grid; there is not one
            label per image; the network's channels do not fit; a term or an output is not finite (the message has the image
            and t).
    """
    evaluate = BoundEvaluator(
        unet,
        scheduler,
        x_start,
        class_labels=class_labels,
        clip_sample=clip_sample,
        levels=levels,
        batch_size=batch_size,
    )
    b = min(batch_size or len(x_start), len(x_start))
    chain, count = scheduler.chain, max(1, (batch_size or b) // b)
    # the decoder's step has a network call of its own
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
    """Simulate sending each image progressively (the paper's Algorithms 3 and 4) and return the code lengths.

    The sender draws x_T from q(x_T | x_0), then each x_{t-1} from q(x_{t-1} | x_t, x_0): one trajectory per image, whereas
    `bits_per_dim` draws every x_t independently. The expected code length of a step is its term of the bound. Nothing is
    encoded.

    Args:
        unet, scheduler, x_start, class_labels, generator, clip_sample, levels, progress_bar: as in `bits_per_dim`.
        batch_size: images per network call; None for all.

    Returns:
        `BitsPerDim`; `x_start_mse` is the error of the receiver who has x_t.

    Raises:
        ValueError: as `bits_per_dim`.
    """
    evaluate = BoundEvaluator(
        unet,
        scheduler,
        x_start,
        class_labels=class_labels,
        clip_sample=clip_sample,
        levels=levels,
        batch_size=batch_size,
    )
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
    """Rate and distortion while an image is received (Ho, Jain, Abbeel 2020, section 4.3, figure 5 and table 4).

    Args:
        result: result of `progressive_coding`, or of `bits_per_dim`, which has the same expectation.

    Returns:
        Two float64 tensors (T + 1,), means over the images, in the order of receiving: the rate, in bits per dimension
        received so far, and the distortion, the root mean squared error of the predicted x_0 on the scale 0 to 255. The last
        entry is the complete image, without error. On the device of the result, or the CPU for Apple's GPUs.
    """
    terms, mse = to_float64(result.terms).mean(0), to_float64(result.x_start_mse).mean(0)
    # the receiver of x_t has paid the terms of all later t
    rate = torch.cat((to_float64(result.prior).mean()[None], terms.flip(0))).cumsum(0)
    return rate, torch.cat((mse.flip(0).sqrt() * 127.5, mse.new_zeros(1)))


class BoundEvaluator:
    """Computes terms of the bound for rows of (image, t, noise); as a context, it keeps the network in evaluation mode.

    Arguments and errors are those of `bits_per_dim`.
    """

    def __init__(
        self,
        unet: Callable,
        scheduler: VariationalDDPMScheduler,
        x_start: torch.Tensor,
        *,
        class_labels: torch.Tensor | None,
        clip_sample: bool,
        levels: int | None,
        batch_size: int | None,
    ):
        check_scheduler(scheduler)
        self.unet, self.scheduler, self.x_start = unet, scheduler, x_start
        self.class_labels = None if class_labels is None else torch.as_tensor(class_labels, device=x_start.device)
        self.clip_sample, self.levels = clip_sample, scheduler.levels if levels is None else levels
        self.dtype = getattr(unet, "dtype", x_start.dtype)
        self.first = scheduler.chain[0]
        self.pending: list[tuple] = []  # terms that have not been checked
        if not isinstance(self.levels, Integral) or self.levels < 2:
            raise ValueError(f"levels={self.levels!r} must be 2 or more: the number of grey levels of the data")
        check_images(x_start, self.levels)
        if batch_size is not None and not (isinstance(batch_size, Integral) and batch_size >= 1):
            raise ValueError(f"batch_size={batch_size} must be an integer, 1 or more")
        if class_labels is not None and len(class_labels) != len(x_start):
            raise ValueError(
                f"class_labels has {len(class_labels)} entries for {len(x_start)} images; give one for each image"
            )
        _check_channels(unet, scheduler, x_start.shape[1])

    def __enter__(self):
        self.mode = evaluation_mode(self.unet)
        self.mode.__enter__()
        return self

    def __exit__(self, error, *_):
        self.mode.__exit__(None, None, None)
        if error is None:
            self.check_terms()

    def noise(self, shape: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
        """Standard normal noise, of the dtype and on the device of the images."""
        return randn_tensor(shape, generator=generator, device=self.x_start.device, dtype=self.x_start.dtype)

    def at_noise(self, index: torch.Tensor, t: int | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """As a call, with x_t drawn from q(x_t | x_0) by this noise."""
        return self(index, t, self.scheduler.q_sample(self.x_start[index], t, noise), noise)

    def __call__(
        self, index: torch.Tensor, t: int | torch.Tensor, x_t: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """The terms, the mean squared errors of x_0 and those of epsilon: (3, rows).

        Args:
            index: int64 (rows,), which image each row is of.
            t: timestep, an int or int64 (rows,). The decoder's step must be an int.
            x_t, noise: (rows, C, H, W).
        """
        scheduler, x_start = self.scheduler, self.x_start[index]
        t = t if isinstance(t, int) else t.to(x_t.device)
        output = self.network_output(index, t, x_t)
        p = scheduler.p_mean_variance(output, x_t, t, self.clip_sample)
        if isinstance(t, int) and t == self.first:
            term = scheduler.decoder_bits_per_dim(p, x_start, self.levels)
        else:
            term = scheduler.kl_bits_per_dim(p, x_start, x_t, t)
        term = term.masked_fill(~output.isfinite().flatten(1).all(1), torch.nan)  # clipping would hide infinite outputs
        predicted = p.pred_original_sample
        assert predicted is not None
        errors = (predicted - x_start, scheduler.epsilon_from_x_start(predicted, x_t, t) - noise)
        self.pending.append((term, index, t))
        if term.device.type == "cpu" or len(self.pending) == 50:  # the check waits for an accelerator
            self.check_terms()
        return torch.stack((term, *(error.square().flatten(1).mean(1) for error in errors)))

    def network_output(self, index: torch.Tensor, t: int | torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        """The network's output (rows, channels, H, W) at x_t of the images `index` (rows,); t as in a call, beside x_t.

        Raises:
            ValueError: an output of another batch size, height or width.
        """
        labels = None if self.class_labels is None else self.class_labels[index]
        c_noise = conditioning_times(self.scheduler, t)
        output = self.unet(x_t.to(self.dtype), c_noise, class_labels=labels, return_dict=False)[0]
        if output.shape[0] != len(x_t) or output.shape[2:] != x_t.shape[2:]:
            raise ValueError(
                f"the network made {tuple(output.shape)} of {tuple(x_t.shape)}; the output must have the input's batch size, "
                "height and width"
            )
        return output

    def check_terms(self) -> None:
        """Raise ValueError if a term since the last check is not finite."""
        pending, self.pending = self.pending, []
        if not pending or torch.stack([term.isfinite().all() for term, *_ in pending]).all():
            return
        for term, index, t in pending:
            for row in (~term.isfinite()).nonzero().flatten().tolist():
                timestep = t if isinstance(t, int) else t[row].item()
                raise ValueError(f"the bound's term of image {index[row].item()} at t={timestep} is {term[row].item()}")


def check_scheduler(scheduler) -> None:
    """Raise ValueError for a scheduler that has no bound."""
    if not hasattr(scheduler, "chain"):
        raise ValueError(
            f"scheduler is a {type(scheduler).__name__}, which has no bound; give "
            "VariationalDDPMScheduler.from_config(scheduler.config)"
        )


def check_images(x_start: torch.Tensor, levels: int) -> None:
    """Raise ValueError for images that are not (B, C, H, W), float32 or float64, on a grid of grey levels in [-1, 1]."""
    if x_start.dim() != 4 or len(x_start) == 0:
        raise ValueError(f"x_start has shape {tuple(x_start.shape)}; give (B, C, H, W) with at least one image")
    if x_start.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x_start is {x_start.dtype}; give float32 or float64, which hold every grey level")
    if not x_start.abs().max() <= 1 + 1e-5:  # NaN too
        raise ValueError(f"x_start reaches {x_start.abs().max().item():.4g}; images must be in [-1, 1]")
    grey = (to_float64(x_start) + 1) * ((levels - 1) / 2)
    distance = (grey - grey.round()).abs().max().item()
    if distance > max(0.01, levels * 2e-7):
        raise ValueError(
            f"x_start is up to {distance:.2g} of a grey level off the grid of levels={levels}; set levels to that of the data, "
            "and do not resize or dither the images"
        )


def _check_channels(unet, scheduler, channels):
    config = getattr(unet, "config", None)
    outputs = channels * (2 if scheduler.learns_variance else 1)
    if scheduler.variance_type == "analytic" and getattr(config, "out_channels", None) == 2 * channels:
        outputs *= 2  # it replaces a learned variance
    for name, needed in (("in_channels", channels), ("out_channels", outputs)):
        actual = getattr(config, name, needed)
        if actual != needed:
            raise ValueError(
                f"the network has {name}={actual}; images of {channels} channels and variance_type="
                f"{scheduler.variance_type!r} need {needed}"
            )
