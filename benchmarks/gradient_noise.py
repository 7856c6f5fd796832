"""Measure the gradient noise of the objectives (IDDPM, figure 4), and how much importance sampling of t reduces it.

    python benchmarks/objectives.py digits --only hybrid-linear
    python benchmarks/gradient_noise.py runs/objectives/digits/hybrid-linear/pipeline --data digits

Computes the gradients of `--batches` batches for each loss, for one network with learned variance. The noise scale is S
/ |G|^2 (McCandlish et al. 2018), where S is the trace of the covariance of one image's gradient and G is the mean
gradient. At this batch size, in images, noise and signal are equally large. Uniform and importance-sampled vlb have the
same G, so the ratio of their S is the factor by which uniform sampling needs larger batches. Errors are jackknife
errors over batches. Adds its results to benchmarks/results/gradient_noise.json.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ddpm_hf import DDPMImagePipeline, DiffusionObjective
from ddpm_hf.evaluation.images import load_tensor
from ddpm_hf.files.atomic import write_text
from ddpm_hf.training.timesteps import LossSecondMomentTimesteps, UniformTimesteps

ROOT = Path(__file__).parents[1]

OBJECTIVES = {
    "hybrid": ("hybrid", UniformTimesteps),
    "vlb": ("vlb", UniformTimesteps),
    "vlb-importance": ("vlb", LossSecondMomentTimesteps),
}


def gradient_products(unet, objective, timesteps, x_start, batches, batch_size, description):
    """Return the inner products of the batches' gradients, a float64 tensor (batches, batches)."""
    gradients = torch.empty(batches, sum(p.numel() for p in unet.parameters()))
    for row in tqdm(gradients, desc=description):
        images = x_start[torch.randint(len(x_start), (batch_size,))]
        t, weights = timesteps.sample(batch_size)
        unet.zero_grad()
        (weights * objective(unet, images, t=t)).mean().backward()
        torch.cat([p.grad.flatten() for p in unet.parameters()], out=row)
    return (gradients @ gradients.T).double()


def fill_history(unet, objective, timesteps, x_start):
    """Record ten losses for each timestep, which importance sampling needs before it can start."""
    with torch.no_grad():
        for t in torch.tensor(objective.scheduler.chain).repeat(10).split(256):
            images = x_start[torch.randint(len(x_start), (len(t),))]
            timesteps.update(t, objective(unet, images, t=t))


def noise_and_signal(products, batch_size):
    """Return unbiased estimates of S and |G|^2."""
    count = len(products)
    same_batch = products.diagonal().mean()
    different_batches = (products.sum() - products.diagonal().sum()) / (count * (count - 1))
    return batch_size * (same_batch - different_batches), different_batches


def noise_scale(products, batch_size):
    covariance_trace, squared_mean = noise_and_signal(products, batch_size)
    return covariance_trace / squared_mean


def trace_ratio(uniform, importance, batch_size):
    return noise_and_signal(uniform, batch_size)[0] / noise_and_signal(importance, batch_size)[0]


def with_error(statistic, *products, batch_size):
    """Return a statistic of gradient products and its jackknife standard error."""
    count = len(products[0])
    rows = torch.arange(count)
    kept_rows = [rows[rows != row] for row in rows]
    leave_one_out = torch.stack([statistic(*(p[kept][:, kept] for p in products), batch_size) for kept in kept_rows])
    error = ((count - 1) * leave_one_out.var(correction=0)).sqrt()
    return {"value": statistic(*products, batch_size).item(), "error": error.item()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pipelines", nargs="+")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--batches", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=64)
    arguments = parser.parse_args()
    batch_size, path = arguments.batch_size, Path(__file__).parent / "results" / "gradient_noise.json"
    for folder in arguments.pipelines:
        torch.manual_seed(0)
        pipeline = DDPMImagePipeline.from_pretrained(folder)
        unet, scheduler = pipeline.unet, pipeline.scheduler
        x_start, _ = load_tensor(arguments.data, "train", unet, scheduler.levels, with_labels=False)
        products = {}
        for name, (loss, sampler) in OBJECTIVES.items():
            objective, timesteps = DiffusionObjective(scheduler, loss), sampler(scheduler)
            if sampler is LossSecondMomentTimesteps:
                fill_history(unet, objective, timesteps, x_start)
            products[name] = gradient_products(unet, objective, timesteps, x_start, arguments.batches, batch_size, name)
        results = {"images": arguments.batches * batch_size}
        for name, product in products.items():
            results[name] = {"noise_scale": with_error(noise_scale, product, batch_size=batch_size)}
            results[name]["covariance_trace"] = noise_and_signal(product, batch_size)[0].item()
        pair = products["vlb"], products["vlb-importance"]
        results["uniform_over_importance_trace"] = with_error(trace_ratio, *pair, batch_size=batch_size)
        report = json.loads(path.read_text()) if path.is_file() else {}
        report["/".join(Path(folder).parts[-3:-1])] = results
        write_text(path, json.dumps(report, indent=2) + "\n")
        print(folder, json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
