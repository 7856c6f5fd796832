"""Compare the bound with the exact likelihood of Gaussian pixels, for which the optimal denoiser is known.

    python benchmarks/gaussian.py

Writes benchmarks/results/gaussian.json and .md, for several T. "learned" is the exact variance of p(x_{t-1} | x_t).
With it the reverse process is exact, and the bound equals the entropy for every T. The fixed variances are those of
section 3.2 of the paper.
"""

import json
import math
from pathlib import Path

import torch

from ddpm_hf import VariationalDDPMScheduler, bits_per_dim
from ddpm_hf.files.atomic import write_text
from ddpm_hf.likelihood.bound import standard_error

MEAN, STD, LEVELS = 0.1, 0.15, 2**16 + 1
STEPS = (10, 100, 1000, 4000)
VARIANCES = ("learned", "fixed_small", "fixed_large")


def optimal_network(scheduler, learns_variance):
    """Return a network that predicts E[epsilon | x_t] of pixels N(MEAN, STD^2), and the exact log variance if it learns one."""
    alpha_bar = scheduler.alphas_cumprod
    alpha_bar_previous = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
    gain = alpha_bar.sqrt() * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar)
    # precisions add: that of x_{t-1}, and that of x_t given x_{t-1}
    precision = 1 / (alpha_bar_previous * STD**2 + 1 - alpha_bar_previous) + alpha_bar / (
        alpha_bar_previous - alpha_bar
    )

    def unet(x, t, class_labels=None, return_dict=True):
        t = torch.as_tensor(t).view(-1, 1, 1, 1)
        sqrt_alpha_bar = alpha_bar[t].sqrt()
        x_start = MEAN + gain[t] * (x - sqrt_alpha_bar * MEAN)
        epsilon = (x - sqrt_alpha_bar * x_start) / (1 - alpha_bar[t]).sqrt()
        return (torch.cat((epsilon, -precision[t].log().expand_as(x)), dim=1) if learns_variance else epsilon,)

    return unet


def main():
    generator = torch.Generator().manual_seed(0)
    x_start = MEAN + STD * torch.randn(64, 3, 8, 8, generator=generator, dtype=torch.float64)
    half = (LEVELS - 1) / 2
    x_start = (x_start * half).round() / half
    z = (x_start - MEAN) / STD
    # exact: minus the logarithm of the density times the width of a grey level
    nats = 0.5 * z**2 + 0.5 * math.log(2 * math.pi * STD**2) + math.log(half)
    exact_bits = nats.flatten(1).mean(1) / math.log(2)
    rows = []
    for T in STEPS:
        for variance_type in VARIANCES:
            scheduler = VariationalDDPMScheduler(
                T,
                beta_schedule="linear_scaled_by_T" if T > 20 else "cosine",
                variance_type=variance_type,
                levels=LEVELS,
            )
            unet = optimal_network(scheduler, variance_type == "learned")
            bound = bits_per_dim(
                unet, scheduler, x_start, clip_sample=False, generator=generator, batch_size=1024, progress_bar=True
            )
            gap = bound.total - exact_bits
            rows.append(
                {
                    "T": T,
                    "schedule": scheduler.config.beta_schedule,
                    "variance": variance_type,
                    "bound": bound.mean,
                    "true": exact_bits.mean().item(),
                    "gap": gap.mean().item(),
                    "standard_error_of_gap": standard_error(gap),
                    "prior": bound.prior.mean().item(),
                }
            )
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        lines.append("| " + " | ".join(f"{v:.5f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    table = "\n".join(lines) + "\n"
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    write_text(results / "gaussian.json", json.dumps(rows, indent=2) + "\n")
    write_text(results / "gaussian.md", table)
    print(table)


if __name__ == "__main__":
    main()
