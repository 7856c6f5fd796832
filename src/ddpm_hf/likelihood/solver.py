"""The probability-flow ODE of a process (Score-SDE, section 4.3) and its solution, one batch of images after another.

dx/dt = f(t) x - g(t)^2 / 2 score(x, t) takes data at t = eps to noise at t = 1 without randomness. Times are as in
`schedulers.sde`. torchdiffeq solves it by Dormand-Prince steps, whose size follows the image of a batch with the largest error.

If a process clips the predicted x_0, its ODE uses the score of the clipped x_0. That flow too is invertible and has a
likelihood: the clipped score is continuous, and its Jacobian exists everywhere but where the clipping sets in.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import cast

import torch
from tqdm.auto import tqdm

from ddpm_hf.errors import UserError
from ddpm_hf.extras import require_extra
from ddpm_hf.likelihood.bound import check_scheduler
from ddpm_hf.models.evaluation_mode import evaluation_mode
from ddpm_hf.schedulers.conditioning_times import rescales_timesteps
from ddpm_hf.schedulers.ddpm import VariationalDDPMScheduler
from ddpm_hf.schedulers.precision import finest_dtype
from ddpm_hf.schedulers.prediction import SDE_PREDICTIONS
from ddpm_hf.schedulers.sde import SDE, ChainSDE
from ddpm_hf.schedulers.sde_samplers import SDEScheduler, clip_limits


class OdeStopped(UserError, RuntimeError):
    """The solver stopped before the end: too many evaluations, or a state that is not finite."""


@dataclass(frozen=True)
class OdeOptions:
    """The arguments that `ode_log_likelihood`, `encode` and `decode` share; `ode_log_likelihood` documents them."""

    class_labels: torch.Tensor | None = None
    eps: float | None = None
    clip_sample: bool | None = None
    rtol: float = 1e-5
    atol: float = 1e-5
    batch_size: int | None = None
    max_evaluations: int = 2000
    progress_bar: bool = False

    def __post_init__(self):
        for name in ("rtol", "atol"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0: the tolerance of a solver's step")
        if self.batch_size is not None and not (isinstance(self.batch_size, Integral) and self.batch_size >= 1):
            raise ValueError(f"batch_size={self.batch_size!r} must be an integer, 1 or more")

    def start_time(self, sde: SDE) -> float:
        """The time at which the ODE begins. Raises ValueError for an eps that the process cannot begin at."""
        eps = sde.t_min if self.eps is None else self.eps
        smallest = sde.t_min if isinstance(sde, ChainSDE) else 0.0
        if not (0 < eps < 1 and eps >= smallest):
            of_chain = f", and in a chain at least 1 / T = {smallest:g}" if smallest else ""
            raise ValueError(f"eps={eps} must be above 0 and below 1{of_chain}: the time at which x is taken for data")
        return eps

    def clip_limits(self, process: "Process") -> tuple[float, float] | None:
        """The range to which the predicted x_0 is clipped, or None."""
        config = getattr(process, "config", {})
        clip_sample = config.get("clip_sample", False) if self.clip_sample is None else self.clip_sample
        return clip_limits(config) if clip_sample else None


# processes

Process = SDE | SDEScheduler | VariationalDDPMScheduler


def process_of(process: Process) -> SDE:
    """The SDE of an `SDE`, of one of its schedulers, or of a `VariationalDDPMScheduler`: `ChainSDE` through all T timesteps.

    Raises:
        ValueError: another scheduler, prediction_type="previous", zero terminal SNR, or discrete noise levels.
    """
    if hasattr(process, "alphas_cumprod"):
        check_scheduler(process)
        if process.prediction_type not in SDE_PREDICTIONS:
            raise ValueError(
                f"prediction_type={process.prediction_type!r} is defined for one step of a chain, not in continuous time; the "
                "ODE takes 'epsilon', 'sample' and 'v_prediction'"
            )
        rescale_timesteps = rescales_timesteps(cast(VariationalDDPMScheduler, process).config)
        return ChainSDE(process.alphas_cumprod, process.prediction_type, rescale_timesteps)
    sde = cast(SDEScheduler, process).sde if getattr(process, "is_continuous", False) else process
    if not hasattr(sde, "score_weights"):
        raise ValueError(
            f"process is of {type(process)}; give VPSDE, SubVPSDE, VESDE, one of their schedulers, or a "
            "VariationalDDPMScheduler"
        )
    if sde.has_levels:
        raise ValueError(
            "conditioning='level_index': the network knows discrete noise levels only, but the ODE needs those between them; "
            "give a network and a process with conditioning='sigma'"
        )
    return sde


def is_centered(process: Process) -> bool:
    """Whether the images of a process are in [-1, 1], and not in [0, 1] as in NCSN."""
    return getattr(process, "config", {}).get("centered", True)


def to_process_range(process: Process, x: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1], rescaled to the range of a process."""
    return x if is_centered(process) else x / 2 + 0.5


def clipped_score(
    sde: SDE, t: torch.Tensor, x_t: torch.Tensor, output: torch.Tensor, limits: tuple[float, float] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The score (B, C, H, W) of the predicted x_0 clipped to `limits`, and a mask: 1 where it was not clipped, 0 elsewhere."""
    score = sde.score(output, x_t, t)
    if limits is None:
        return score, torch.ones_like(score)
    scale, variance = sde.scale(t), sde.std(t) ** 2
    x_start = (x_t + variance * score) / scale  # Tweedie's formula
    clipped = x_start.clamp(*limits) + 0 * x_start  # clamp alone would hide infinite values
    inside = clipped == x_start
    return torch.where(inside, score, (scale * clipped - x_t) / variance), inside.to(score.dtype)


def check_network(unet: Callable, sde: SDE, channels: int) -> None:
    """Raise ValueError for a network that does not take the conditioning times of a process or images of `channels` channels.

    What a network's config does not say is not checked.
    """
    config = getattr(unet, "config", None)
    embedding = getattr(config, "time_embedding_type", None)
    needed = sde.time_embedding_type
    if embedding is not None and embedding != needed:
        raise ValueError(
            f"{type(sde).__name__} needs a network with time_embedding_type={needed!r}, this one has {embedding!r}; choose "
            "another process or network"
        )
    steps = getattr(config, "num_train_timesteps", None)
    if steps is not None and embedding == "positional" and steps != sde.N:
        raise ValueError(
            f"the network was made for T={steps}, the process has N={sde.N}; give a process of {steps} steps"
        )
    in_channels = getattr(config, "in_channels", channels)
    if in_channels != channels:
        raise ValueError(f"the network has in_channels={in_channels}; the images have {channels} channels")


# solving


class _Network:
    """A network for the images of one batch: (x_t, conditioning time) -> output (B, C, H, W), without a learned variance."""

    def __init__(self, unet, class_labels, x):
        self.unet, self.class_labels, self.channels = unet, class_labels, x.shape[1]
        self.dtype = getattr(unet, "dtype", finest_dtype(x.device))

    def __call__(self, x_t, time):
        time = time.float() if isinstance(time, torch.Tensor) else time
        output = self.unet(x_t.to(self.dtype), time, class_labels=self.class_labels, return_dict=False)[0]
        return output[:, : self.channels]


def solve_in_batches(
    unet: Callable, sde: SDE, x: torch.Tensor, solve: Callable, *, options: OdeOptions, description: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Solve for each batch of images x (B, C, H, W), with the network in evaluation mode.

    Args:
        solve: `solve(batch, network, bar)` returns the end state and the number of evaluations; `network(x_t, time)` has the
            batch's class labels, `bar` is a progress bar that counts network calls.
        description: of the progress bar.

    Yields:
        The batch, its end state and its number of evaluations.

    Raises:
        ValueError: images, labels or a network that cannot be used.
    """
    labels = options.class_labels
    if x.dim() != 4 or len(x) == 0 or not x.is_floating_point():
        raise ValueError(
            f"images have shape {tuple(x.shape)}, {x.dtype}; give floats (B, C, H, W) with at least one image"
        )
    if not x.isfinite().all():
        raise ValueError("images have values that are not finite")
    if labels is not None and len(labels) != len(x):
        raise ValueError(f"class_labels has {len(labels)} entries for {len(x)} images; give one for each image")
    check_network(unet, sde, x.shape[1])
    size = options.batch_size or len(x)
    batches = [None] * len(x) if labels is None else torch.as_tensor(labels, device=x.device).split(size)
    with evaluation_mode(unet), tqdm(desc=description, unit=" calls", disable=not options.progress_bar or None) as bar:
        for batch, batch_labels in zip(x.split(size), batches):
            end, evaluations = solve(batch, _Network(unet, batch_labels, x), bar)
            yield batch, end, evaluations


def solve_ode(
    slope: Callable,
    state: torch.Tensor,
    *,
    begin: float,
    end: float,
    options: OdeOptions,
    bar: tqdm,
    dimensions: int | None = None,
) -> tuple[torch.Tensor, int]:
    """Integrate d state / dt = slope(t, state) from t = begin to end.

    Args:
        state: (B, n) float64, one row for each image.
        bar: a progress bar, which counts the evaluations of slope.
        dimensions: if given, the first `dimensions` columns and the rest have an error norm each; the larger one counts.

    Returns:
        The state (B, n) at `end`, and the number of evaluations of slope.

    Raises:
        OdeStopped: too many evaluations, a state that is not finite, or a step that became too small.
    """
    require_extra("torchdiffeq", "ode", "likelihoods and encodings by the ODE")
    from torchdiffeq import odeint

    count, reached = 0, begin

    def counted(t, state):
        nonlocal count, reached
        reached = t.item()
        if not state.isfinite().all():
            image = int((~state.isfinite()).any(1).nonzero()[0])
            raise OdeStopped(f"the ODE has a state that is not finite at t={reached:.4g}, image {image} of the batch")
        if count >= options.max_evaluations:
            raise OdeStopped(
                f"the ODE from t={begin:g} to {end:g} has reached t={reached:.4g} after max_evaluations="
                f"{options.max_evaluations}; allow more evaluations, or larger rtol and atol"
            )
        count += 1
        bar.update()
        bar.set_postfix_str(f"t={reached:.3g}", refresh=False)
        return slope(t, state)

    def norm(error):  # of the image with the largest error
        blocks = [error] if dimensions is None else [error[:, :dimensions], error[:, dimensions:]]
        return torch.stack([block.square().mean(1).sqrt() for block in blocks]).max()

    times = torch.tensor([begin, end], dtype=torch.float64, device=state.device)
    try:
        # the last step ends exactly at `end`, not beyond it
        solver_options = {"norm": norm, "step_t": times[1:]}
        tolerances = dict(rtol=options.rtol, atol=options.atol)
        states = odeint(counted, state, times, **tolerances, method="dopri5", options=solver_options)
    except AssertionError as error:
        raise OdeStopped(f"the ODE stopped at t={reached:.4g} after {count} evaluations: {error}") from None
    return states[-1], count
