"""Bits/dim of images under a trained model, as numbers, lines of text, a table of all terms and a plot."""

import dataclasses
import math
import os
from typing import Any

import torch

from ddpm_hf.evaluation.sheets import save_figure
from ddpm_hf.extras import require_extra
from ddpm_hf.likelihood.bound import BitsPerDim, bits_per_dim, rate_distortion, standard_error
from ddpm_hf.likelihood.estimate import BitsPerDimEstimate, estimate_bits_per_dim


@dataclasses.dataclass(frozen=True)
class LikelihoodReport:
    """Bits/dim of N images, with what is printed and saved."""

    result: Any  # BitsPerDim, BitsPerDimEstimate or OdeBitsPerDim
    values: dict  # for evaluation.json: means over the images, standard errors and settings
    method: str  # one line for people
    lines: list[str]  # a table for people

    @property
    def mean(self) -> float:
        """Bits/dim, the mean over the images."""
        return self.values["total"]

    @property
    def standard_error(self) -> float:
        """The standard error of `mean` over images, NaN for a single one."""
        return self.result.standard_error

    def __str__(self):
        return "\n".join([f"bits/dim, {self.method}:", *self.lines])


def measure_bound(
    unet, scheduler, x_start: torch.Tensor, *, num_evaluations: int | None = None, **kwargs
) -> LikelihoodReport:
    """Measure the variational bound of Ho et al. 2020 on the scheduler's chain.

    Args:
        x_start: images (N, C, H, W) in [-1, 1].
        num_evaluations: network evaluations per image for an estimate; None computes every term.
        kwargs: class_labels, generator, batch_size, levels and progress_bar, as in `bits_per_dim`.
    """
    result: BitsPerDim | BitsPerDimEstimate
    if num_evaluations is None:
        result = bits_per_dim(unet, scheduler, x_start, **kwargs)
    else:
        result = estimate_bits_per_dim(unet, scheduler, x_start, num_evaluations=num_evaluations, **kwargs)
    terms = {"total": result.total, "prior": result.prior, "kl": result.kl, "decoder": result.decoder}
    errors = {name: standard_error(term) for name, term in terms.items()} | {"total": result.standard_error}
    sampling_error = result.sampling_error if isinstance(result, BitsPerDimEstimate) else None
    values = {
        **{name: term.cpu().double().mean().item() for name, term in terms.items()},
        "standard_errors": None if math.isnan(errors["total"]) else errors,
        "steps": len(scheduler.chain),
        "first_timestep": scheduler.chain[0],
        "evaluations_per_image": num_evaluations or len(scheduler.chain),
        "sampling_error": sampling_error,
    }
    meanings = {"total": "upper bound on the NLL", "prior": "L_T", "kl": "L_1 .. L_T-1", "decoder": "L_0"}
    lines = [f"  {name:8} {values[name]:.4f} +- {errors[name]:.4f}   {meaning}" for name, meaning in meanings.items()]
    lines.append(
        "  (+- is the standard error over images; where parts vary in opposite directions, the total varies less)"
    )
    if sampling_error is not None:
        lines.append(
            f"  estimated from {num_evaluations} evaluations an image in place of {values['steps']}: "
            f"+- {sampling_error:.4f} by that alone, which the error of the total contains"
        )
    return LikelihoodReport(result, values, f"{values['steps']} terms from t={values['first_timestep']} up", lines)


def measure_ode(
    unet,
    scheduler,
    x_start: torch.Tensor,
    *,
    dequantization: str | None = None,
    tolerance: float = 1e-5,
    probes: int = 1,
    **kwargs,
) -> LikelihoodReport:
    """Measure bits/dim by the probability-flow ODE (Song et al. 2020, section 4.3).

    Args:
        x_start: images (N, C, H, W) in [-1, 1].
        dequantization: "decoder" or "uniform"; None means uniform in continuous time, decoder for a chain.
        tolerance: absolute and relative tolerance of the solver.
        probes: random probes per image for the trace of the Jacobian.
        kwargs: class_labels, generator, batch_size, levels and progress_bar, as in `ode_bits_per_dim`.
    """
    require_extra("torchdiffeq", "ode", "likelihoods by the ODE")
    from ddpm_hf.likelihood.ode import ode_bits_per_dim

    dequantization = dequantization or ("uniform" if scheduler.is_continuous else "decoder")
    kwargs |= dict(rtol=tolerance, atol=tolerance, probes=probes, dequantization=dequantization)
    result = ode_bits_per_dim(unet, scheduler, x_start, **kwargs)
    probe_error = result.probe_error.square().sum().sqrt().item() / len(x_start)
    values = {
        "total": result.mean,
        "dequantization": dequantization,
        "tolerance": tolerance,
        "probes": probes,
        "sampling_error": None if math.isnan(probe_error) else probe_error,
        "evaluations_per_image": result.evaluations.double().mean().item(),
    }
    total = f"{result.mean:.4f} +- {result.standard_error:.4f}"
    calls = f"{values['evaluations_per_image']:.0f} network calls an image, tolerance {tolerance:g}"
    lines = [
        f"  total    {total}   with {dequantization} dequantization",
        "  (+- is the standard error over images, dequantization and probes together)",
        f"  {calls}" + ("" if math.isnan(probe_error) else f"; +- {probe_error:.4f} by the probes alone"),
    ]
    return LikelihoodReport(result, values, "by the probability-flow ODE", lines)


def set_chain(scheduler, steps: int | None = None, first: int = 0, timesteps: str | None = None) -> None:
    """Set the chain to `steps` timesteps (None means all) and remove those below `first`.

    Args:
        timesteps: the name of a list of the scheduler with so many steps.

    Raises:
        ValueError: no timestep is left; the scheduler has no such list.
    """
    if steps is not None or timesteps is not None:
        scheduler.set_timesteps(steps, timesteps=timesteps)
    if first > 0:
        kept = [t for t in reversed(scheduler.chain) if t >= first]
        if not kept:
            raise ValueError(f"--first {first} leaves no timestep of a chain that ends at {scheduler.chain[-1]}")
        scheduler.set_timesteps(timesteps=kept)


def histogram_bits_per_dim(train: torch.Tensor, test: torch.Tensor, levels: int) -> torch.Tensor:
    """Bits/dim of a model that draws each pixel independently from its histogram over `train` (add-one smoothed).

    A model that has learned how pixels depend on each other has fewer bits/dim.

    Args:
        train, test: grey levels 0 .. levels - 1, (N, C, H, W) each, integers.

    Returns:
        Bits/dim of each test image, (N,) float64.
    """
    counts = torch.ones(levels, *train.shape[1:], dtype=torch.float64)
    counts.scatter_add_(0, train.long(), torch.ones(train.shape, dtype=torch.float64))
    log_probabilities = torch.log2(counts / counts.sum(0))
    return -log_probabilities.gather(0, test.long()).flatten(1).mean(1)


def terms_table(result: BitsPerDim, chain: list[int]) -> str:
    """Return CSV text with a row per timestep: term in bits/dim, standard error, mean squared errors of x_0 and epsilon."""
    lines = ["t,bits_per_dim,standard_error,x_start_mse,epsilon_mse"]
    for column, t in enumerate(chain):
        term, *errors = (tensor[:, column] for tensor in (result.terms, result.x_start_mse, result.epsilon_mse))
        means = [error.cpu().double().mean().item() for error in errors]
        numbers = [term.cpu().double().mean().item(), standard_error(term), *means]
        lines.append(",".join([str(t), *(f"{number:.8g}" for number in numbers)]))
    return "\n".join([*lines, ""])


def plot_terms(result: BitsPerDim, chain: list[int], path: str | os.PathLike) -> None:
    """Plot every term over t, and rate against distortion (figure 5 of Ho et al. 2020), as a PNG file."""
    require_extra("matplotlib", "eval", "plots")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (terms_axes, rate_axes) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    terms = result.terms.mean(0).cpu()
    terms_axes.loglog([t + 1 for t in chain], terms)
    terms_axes.set_ylim(
        bottom=max(terms.min().item(), 1e-7 * terms.max().item())
    )  # a decoder of 1e-18 flattens the rest
    terms_axes.set(xlabel="t + 1 (the paper's t)", ylabel="term of the bound, bits/dim")
    rate, distortion = rate_distortion(result)
    rate_axes.plot(rate.cpu(), distortion.cpu())
    rate_axes.set(xlabel="rate, bits/dim", ylabel="distortion, RMSE of the predicted x_0 on 0..255", ylim=(0, None))
    for axes in (terms_axes, rate_axes):
        axes.grid(alpha=0.3)
    save_figure(figure, path)
    plt.close(figure)
