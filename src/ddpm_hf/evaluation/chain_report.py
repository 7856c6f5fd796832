"""Chains of a network compared by their bound: even lists of timesteps beside the optimal one, for each variance."""

import dataclasses
import os

import numpy as np

from ddpm_hf.evaluation.sheets import save_figure
from ddpm_hf.extras import require_extra
from ddpm_hf.likelihood.chains import DenoisingErrors, OptimalTimesteps, optimal_chains
from ddpm_hf.schedulers.ddpm import FIXED_VARIANCES, VariationalDDPMScheduler

SPACINGS = ("uniform", "quadratic", "cosine")


@dataclasses.dataclass(frozen=True)
class ChainReport:
    """Bits/dim of chains by variance type, spacing and number of steps.

    Attributes:
        rows: dictionaries with variance_type, spacing, steps, bits_per_dim, standard_error.
        optimal: variance type -> the optimal chains.
        errors: the table from which all numbers follow.
    """

    rows: list[dict]
    optimal: dict[str, list[OptimalTimesteps]]
    errors: DenoisingErrors

    @property
    def best_variance_type(self) -> str:
        """The variance type whose optimal chains have the lowest bound, on the mean over the numbers of steps."""
        return min(self.optimal, key=lambda name: np.mean([choice.bits_per_dim for choice in self.optimal[name]]))

    def lines(self) -> list[str]:
        """A table for people: a row for each variance and spacing, a column for each number of steps."""
        steps = sorted({row["steps"] for row in self.rows})
        lines = [f"  {'bits/dim':31}" + "".join(f"{f'{n} steps':>19}" for n in steps)]
        texts: dict[tuple, dict[int, str]] = {}
        for row in self.rows:
            cells = texts.setdefault((row["variance_type"], row["spacing"]), {})
            cells[row["steps"]] = f"{row['bits_per_dim']:.4f} +- {row['standard_error']:.4f}"
        for names, cells in texts.items():
            lines.append(f"  {', '.join(names):31}" + "".join(f"{cells.get(n, ''):>19}" for n in steps))
        return lines

    def scheduler(self, variance_type: str | None = None) -> VariationalDDPMScheduler:
        """The process's scheduler with the optimal lists, as "optimal", and the variance type (None for the best)."""
        variance_type = variance_type or self.best_variance_type
        keys = {"x_start_mse": self.errors.x_start_mse().value.tolist()} if variance_type == "analytic" else {}
        lists = {str(len(choice.timesteps)): choice.timesteps[::-1] for choice in self.optimal[variance_type]}
        config = self.errors.scheduler.config
        return VariationalDDPMScheduler.from_config(
            config, variance_type=variance_type, timestep_lists={"optimal": lists}, **keys
        )


def spaced_timesteps(T: int, steps: int, spacing: str) -> list[int]:
    """Returns at most `steps` ascending timesteps from 0 to T - 1 by a rule that knows no network.

    Args:
        spacing: "uniform", "quadratic" (even in the square root of t, DDIM appendix D.2) or "cosine" (even in the cosine's
            angle, dense at both ends).
    """
    u = np.linspace(0, 1, steps) if steps > 1 else np.ones(1)
    places = {"uniform": u, "quadratic": u**2, "cosine": (1 - np.cos(np.pi * u)) / 2}[spacing]
    return np.unique((places * (T - 1)).round().astype(int)).tolist()


def compare_chains(errors: DenoisingErrors, steps: list[int]) -> ChainReport:
    """Measures chains of each number of steps: each of `SPACINGS` and the optimal list, with each variance type.

    Raises:
        ValueError: a number of steps is out of range.
    """
    T, own = len(errors.alphas_cumprod), errors.scheduler.variance_type
    kinds = ["fixed_small", "fixed_large"] if own in FIXED_VARIANCES else [own] if own == "learned_range" else []
    rows, optimal = [], {}
    for variance_type in (*kinds, "analytic"):
        optimal[variance_type] = optimal_chains(errors, steps, variance_type)
        for n, choice in zip(steps, optimal[variance_type]):
            chains = {spacing: spaced_timesteps(T, n, spacing) for spacing in SPACINGS}
            for spacing, chain in chains.items():
                if len(chain) == n:  # a dense rule may repeat timesteps
                    bits = errors.bits_per_dim(chain, variance_type)
                    rows.append(_row(variance_type, spacing, n, float(bits.value), float(bits.standard_error)))
            rows.append(_row(variance_type, "optimal", n, choice.bits_per_dim, choice.standard_error))
    rows.sort(
        key=lambda row: ([*kinds, "analytic"].index(row["variance_type"]), [*SPACINGS, "optimal"].index(row["spacing"]))
    )
    return ChainReport(rows, optimal, errors)


def _row(variance_type, spacing, steps, bits, error):
    return dict(variance_type=variance_type, spacing=spacing, steps=steps, bits_per_dim=bits, standard_error=error)


def plot_chains(report: ChainReport, path: str | os.PathLike) -> None:
    """Plots bits/dim over the number of steps, a panel for each variance type, as a PNG file."""
    require_extra("matplotlib", "eval", "plots")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = list(report.optimal)
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(4.5 * len(kinds), 4), layout="constrained", sharey=True, squeeze=False
    )
    for kind, panel in zip(kinds, axes[0]):
        for spacing in (*SPACINGS, "optimal"):
            rows = [row for row in report.rows if (row["variance_type"], row["spacing"]) == (kind, spacing)]
            steps, bits, bars = ([row[key] for row in rows] for key in ("steps", "bits_per_dim", "standard_error"))
            style = {"color": "black", "linewidth": 2} if spacing == "optimal" else {"alpha": 0.8}
            panel.errorbar(steps, bits, bars, marker="o", markersize=4, label=spacing, **style)
        panel.set(title=kind, xlabel="steps", xscale="log", yscale="log")
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("bits/dim (upper bound)")
    axes[0][-1].legend()
    save_figure(figure, path)
    plt.close(figure)
