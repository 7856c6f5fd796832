"""The bound where the likelihood is known: for Gaussian pixels and their optimal denoiser, compared with the entropy.

    python benchmarks/gaussian.py

Writes benchmarks/results/gaussian.json and .md, for several T. "learned" is the exact variance of p(x_{t-1} | x_t): the reverse
process is then exact, and the bound equals the entropy for every T. The fixed variances are those of the paper, section 3.2.
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


def optimal_network(scheduler, learned):
    """E[epsilon | x_t] of pixels N(MEAN, STD^2), and the log variance of x_{t-1} given x_t."""
    alpha_bar = scheduler.alphas_cumprod
    before = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
    gain = alpha_bar.sqrt() * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar)
    # precisions add: of x_{t-1} on its own, and of x_t given it
    precision = 1 / (before * STD**2 + 1 - before) + alpha_bar / (before - alpha_bar)

    def unet(x, t, class_labels=None, return_dict=True):
        t = torch.as_tensor(t).view(-1, 1, 1, 1)
        root = alpha_bar[t].sqrt()
        x_start = MEAN + gain[t] * (x - root * MEAN)
        epsilon = (x - root * x_start) / (1 - alpha_bar[t]).sqrt()
        return (torch.cat((epsilon, -precision[t].log().expand_as(x)), dim=1) if learned else epsilon,)

    return unet


def main():
    generator = torch.Generator().manual_seed(0)
    x_start = MEAN + STD * torch.randn(64, 3, 8, 8, generator=generator, dtype=torch.float64)
    half = (LEVELS - 1) / 2
    x_start = (x_start * half).round() / half
    z = (x_start - MEAN) / STD
    # of these images: the density's negative logarithm times the width of a grey level
    nats = 0.5 * z**2 + 0.5 * math.log(2 * math.pi * STD**2) + math.log(half)
    truth = nats.flatten(1).mean(1) / math.log(2)
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
            found = bits_per_dim(
                unet, scheduler, x_start, clip_sample=False, generator=generator, batch_size=1024, progress_bar=True
            )
            gap = found.total - truth
            rows.append(
                {
                    "T": T,
                    "schedule": scheduler.config.beta_schedule,
                    "variance": variance_type,
                    "bound": found.mean,
                    "true": truth.mean().item(),
                    "gap": gap.mean().item(),
                    "standard_error_of_gap": standard_error(gap),
                    "prior": found.prior.mean().item(),
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
