"""Compare the quality of digits from our training and from the same training with diffusers' classes in a plain loop.

    python benchmarks/digits.py train-diffusers runs/digits-diffusers    # UNet2DModel and DDPMScheduler, the digits preset
    python benchmarks/digits.py judge runs/demo/pipeline                 # 500 samples to an SVM; bits/dim of the test split

The judge is scikit-learn's SVC (gamma 0.001, probabilities), fitted to the training split of the real digits. A sample passes
if its highest probability is above the 5 % quantile of that of the real test digits.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from sklearn.svm import SVC
from tqdm.auto import tqdm

from ddpm_hf import DDPMImagePipeline, bits_per_dim
from ddpm_hf.data.pixels import pixels_to_tensor, tensor_to_pixels
from ddpm_hf.data.sources import load_images
from ddpm_hf.evaluation.likelihood_report import histogram_bits_per_dim
from ddpm_hf.training.command_line import load_config

ROOT = Path(__file__).parents[1]

LEVELS = 17


def pixels(split, data="digits"):
    """Return the grey levels (N, H, W) and the labels of a split."""
    data = load_images(data, split)
    return np.stack([np.asarray(image) for image in data["image"]]), np.array(data["label"])


def train_diffusers(folder, seed):
    """Train with the data and settings of the digits preset, but with the classes of diffusers and a plain loop."""
    config, _ = load_config(["--config", "digits", "--output_dir", folder])
    torch.manual_seed(seed)
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **config.unet)
    process = {**config.scheduler, "timestep_spacing": "leading"}
    process.pop("levels")
    process["beta_schedule"] = {"cosine": "squaredcos_cap_v2"}.get(process["beta_schedule"], process["beta_schedule"])
    scheduler = DDPMScheduler(**process)
    optimizer = torch.optim.AdamW(
        unet.parameters(), config.learning_rate, betas=tuple(config.adam_betas), weight_decay=config.weight_decay
    )
    lr_schedule = get_scheduler(
        config.lr_schedule, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.steps
    )
    ema = EMAModel(unet.parameters(), decay=config.ema_decay)
    images = torch.from_numpy(pixels("train")[0])[:, None].float() / 8 - 1
    order = torch.randperm(0)
    start = time.perf_counter()
    for _ in tqdm(range(config.steps), desc="train"):
        if len(order) < config.batch_size:
            order = torch.randperm(len(images))
        batch, order = images[order[: config.batch_size]], order[config.batch_size :]
        noise = torch.randn_like(batch)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(batch),))
        loss = torch.nn.functional.mse_loss(unet(scheduler.add_noise(batch, noise, t), t).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
        optimizer.step()
        lr_schedule.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
    print(f"{config.steps} steps in {time.perf_counter() - start:.0f} s")
    ema.copy_to(unet.parameters())
    DDPMPipeline(unet, scheduler).save_pretrained(folder)


def judge_pipeline(folder, samples, seed, stock, variance_types):
    """Print the share of samples that the judge accepts, and the bits/dim of the test split."""
    train, train_labels = pixels("train")
    test, _ = pixels("test")
    svm = SVC(gamma=0.001, probability=True, random_state=0).fit(train.reshape(-1, 64), train_labels)
    threshold = np.quantile(svm.predict_proba(test.reshape(-1, 64)).max(1), 0.05)

    pipeline_class = DDPMPipeline if stock else DDPMImagePipeline
    generator = torch.Generator().manual_seed(seed)
    arrays = pipeline_class.from_pretrained(folder)(
        samples, generator=generator, num_inference_steps=1000, output_type="np"
    ).images
    sample_pixels = tensor_to_pixels(torch.from_numpy(arrays) * 2 - 1, LEVELS).numpy().reshape(-1, 64)
    probabilities = svm.predict_proba(sample_pixels)
    report = {
        "folder": str(folder),
        "sampled_by": pipeline_class.__name__,
        "samples": samples,
        "share_above_5_percent_quantile": float((probabilities.max(1) > threshold).mean()),
        "quantile": float(threshold),
        "classes": np.bincount(probabilities.argmax(1), minlength=10).tolist(),
    }

    pipeline = DDPMImagePipeline.from_pretrained(folder)
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, levels=LEVELS)
    x_start = pixels_to_tensor(torch.from_numpy(test)[:, None], LEVELS)
    for variance_type in variance_types:
        process = type(scheduler).from_config(scheduler.config, variance_type=variance_type)
        result = bits_per_dim(
            pipeline.unet, process, x_start, generator=torch.Generator().manual_seed(seed), progress_bar=True
        )
        report[f"bits_per_dim_{variance_type}"] = result.mean
        report[f"standard_error_{variance_type}"] = result.standard_error
        report[f"decoder_{variance_type}"] = result.terms[:, 0].mean().item()
    splits = (torch.from_numpy(images)[:, None] for images in (train, test))
    report["per_pixel_histogram"] = histogram_bits_per_dim(*splits, LEVELS).mean().item()
    print(json.dumps(report, indent=2))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=["train-diffusers", "judge"])
    parser.add_argument("folder")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--variance_types",
        nargs="*",
        default=["fixed_large", "fixed_small"],
        help="judge: variance types for the bound",
    )
    parser.add_argument("--stock", action="store_true", help="judge: draw the samples with diffusers' DDPMPipeline")
    arguments = parser.parse_args()
    if arguments.task == "judge":
        judge_pipeline(arguments.folder, arguments.samples, arguments.seed, arguments.stock, arguments.variance_types)
    else:
        train_diffusers(arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
