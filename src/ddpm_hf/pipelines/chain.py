"""The scheduler of one sampling call: its timesteps, and checks of its steps and samples."""

import copy
import functools
import inspect
import math
from numbers import Real

import torch
from diffusers.utils import logging

from ddpm_hf.arguments import shown
from ddpm_hf.pipelines.options import SamplingOptions, positive_integer
from ddpm_hf.schedulers.ddpm import LEARNED_VARIANCES

logger = logging.get_logger(__name__)


# Default steps of ODE and SDE solvers: twice what their papers need. With all steps of the process they would visit timesteps
# twice or begin at pure noise, and either gives garbage.
SOLVER_STEPS = 50


def prepared_scheduler(scheduler, options: SamplingOptions):
    """Copies a scheduler and sets its timesteps by `num_inference_steps`, `timesteps` or `sigmas`.

    The pipeline's own scheduler keeps its timesteps, for example those of a likelihood.

    Raises:
        ValueError: more than one of the three is given, or one that this scheduler does not support.
    """
    # deep: multistep solvers keep lists of the outputs of their last steps
    scheduler = copy.deepcopy(scheduler)
    choices = {name: getattr(options, name) for name in ("num_inference_steps", "timesteps", "sigmas")}
    choices = {name: value for name, value in choices.items() if value is not None}
    name, cls = next(iter(choices), "num_inference_steps"), type(scheduler).__name__
    named = isinstance(options.timesteps, str)
    if named and not hasattr(scheduler, "timestep_lists"):
        raise ValueError(f"timesteps={shown(options.timesteps)}: {cls} has no lists of timesteps; leave it out")
    if named and "sigmas" not in choices:
        scheduler.set_timesteps(options.num_inference_steps, timesteps=options.timesteps)
    elif len(choices) > 1:
        raise ValueError(f"{' and '.join(choices)} were given; give one of them")
    elif name not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(f"{name}: {cls} takes none; give num_inference_steps, or use another scheduler")
    elif name != "num_inference_steps":
        # this package's scheduler checks its timesteps itself
        bounded = name == "timesteps" and not hasattr(scheduler, "chain")
        most = scheduler.config.num_train_timesteps - 1 if bounded else math.inf
        scheduler.set_timesteps(**{name: _descending(name, choices[name], most)})
    else:
        n = positive_integer(name, choices[name]) if choices else default_steps(scheduler)
        scheduler.set_timesteps(n)
        # steps are between sigmas if there are any: timesteps are rounded, and may be equal
        places = scheduler.sigmas[:-1] if hasattr(scheduler, "sigmas") else scheduler.timesteps
        if len(places.unique()) < n:
            raise ValueError(f"{cls} visits timesteps twice in {n} steps, and divides by their distance; give fewer")
    if hasattr(scheduler, "set_begin_index"):  # else it would begin at the second of two equal timesteps
        scheduler.set_begin_index(0)
    return scheduler


def default_steps(scheduler) -> int:
    """The default number of steps: all of the process, 50 for solvers, or those a distilled network was trained for."""
    T = scheduler.config.num_train_timesteps
    n = min(SOLVER_STEPS, max(1, T // 2)) if _is_solver(scheduler) else T
    return min(n, scheduler.config.get("original_inference_steps") or n)  # of LCM and TCD


def _is_solver(scheduler):
    """Whether a scheduler solves the ODE or SDE in place of ancestral steps."""
    return not getattr(scheduler, "is_continuous", False) and not hasattr(scheduler, "_get_variance")


def _descending(name, values, most):
    """Converts timesteps or sigmas to a list of numbers that descend within [0, most]."""
    try:
        numbers = torch.as_tensor(values)
        valid = numbers.dim() == 1 and len(numbers) > 0 and bool((numbers.diff() < 0).all() & numbers.isfinite().all())
    except (TypeError, ValueError, RuntimeError):
        valid = False
    if not valid:
        raise ValueError(f"{name}={values!r} must be strictly descending numbers, one at least")
    if numbers[-1] < 0 or numbers[0] > most:
        allowed = "0 or more" if most == math.inf else f"{most} to 0"
        raise ValueError(f"{name}={shown(values)} must be strictly descending numbers, {allowed}")
    return numbers.tolist()


def takes_learned_variance(scheduler) -> bool:
    """Whether the scheduler's steps take the doubled output channels of a learned variance."""
    if hasattr(scheduler, "chain"):  # this package's: it also refuses what it cannot use
        return True
    variance = inspect.signature(getattr(scheduler, "_get_variance", list)).parameters
    return scheduler.config.get("variance_type") in LEARNED_VARIANCES and "predicted_variance" in variance


def check_within_process(timestep, scheduler) -> None:
    """Raises ValueError if a timestep is no number, or beyond the last timestep of the process."""
    most = scheduler.config.num_train_timesteps - 1
    if getattr(scheduler, "is_continuous", False):  # VE's index of discrete levels rises as the noise falls
        most = max(scheduler.sde.conditioning_times(t).item() for t in (0.0, 1.0))
    if not (isinstance(timestep, (Real, torch.Tensor)) and timestep <= most):
        raise ValueError(f"timestep={timestep} is beyond the process; choose one from 0 to {most}")


def first_step(scheduler, timestep) -> int:
    """Returns the index of the chain's first step at or below `timestep`.

    Raises:
        ValueError: `timestep` is below the chain, or the scheduler must begin at its start (PNDM).
    """
    chain, order = scheduler.timesteps, getattr(scheduler, "order", 1)
    if order == 1 and not hasattr(scheduler, "sigmas") and len(chain.unique()) < len(chain):
        raise ValueError(
            f"{type(scheduler).__name__} visits its first timesteps twice and cannot start at another; use a DDIM scheduler"
        )
    sign = -1 if chain[-1] > chain[0] else 1  # VE's index of discrete levels rises
    start = next((i for i in range(0, len(chain), order) if sign * chain[i] <= sign * timestep), None)
    if start is None:
        raise ValueError(f"timestep={timestep} is below the chain, which ends at {chain[-1].item()}")
    return start


def warn_of_late_start(scheduler) -> None:
    """Warns if sampling starts from pure noise at a timestep whose x_t still holds much of the image.

    That is a factor of x_0 above 0.1, and above twice that of the process's last timestep.
    """
    start, alphas_cumprod = float(scheduler.timesteps[0]), getattr(scheduler, "alphas_cumprod", None)
    if alphas_cumprod is None:
        return
    signal, last_signal = (math.sqrt(alphas_cumprod[t]) for t in (min(round(start), len(alphas_cumprod) - 1), -1))
    if signal > max(0.1, 2 * last_signal):
        warn_once(
            f"the chain starts at timestep {start:g} from noise alone, but x_t there still holds {signal:.2f} of the image: "
            "samples lack contrast and variety; choose timestep_spacing='trailing', other timesteps, or a number of steps that "
            "divides num_train_timesteps"
        )


@functools.lru_cache(maxsize=64)
def warn_once(message: str) -> None:
    """Logs a warning once per process."""
    logger.warning(message)


def check_samples(sample: torch.Tensor, scheduler) -> None:
    """Warns once if samples are far outside [-1, 1]; raises ValueError for NaN and infinity. Waits for the device once."""
    bad = len(sample) - sample.isfinite().flatten(1).all(1).sum()
    bad, size = torch.stack((bad.float(), sample.float().square().mean().sqrt())).tolist()
    timesteps = scheduler.timesteps
    chain = f"{type(scheduler).__name__}, {len(timesteps)} timesteps from {float(timesteps[0]):g}"
    if bad:
        raise ValueError(
            f"{bad:.0f} of {len(sample)} samples are not finite ({chain}): the network's weights, half precision or the solver "
            "overflowed; try another number of steps or scheduler, or float32"
        )
    if size > 2:
        warn_once(
            f"samples lie far outside of [-1, 1] ({chain}): a solver that does not clip multiplies errors of the network at "
            "pure noise; start below it (timestep_spacing='leading'), clip (thresholding=True where the scheduler has it), or "
            "use a DDPM or DDIM scheduler"
        )
