"""Trains a classifier of noisy images for classifier guidance (Dhariwal & Nichol 2021, section 4: "ADM") and saves it.

    accelerate launch training/train_classifier.py --config digits --pipeline runs/digits/pipeline
    python training/train_classifier.py --config digits --steps 100 --dry_run

With --pipeline it is trained on that pipeline's process, and saved with it as <output_dir>/pipeline too. A preset is a name in
training/configs/classifier or the path of a YAML file; every key of ClassifierConfig in training/config.py can be given as
--key value.
"""

import dataclasses
import inspect
import json
import sys
from pathlib import Path

from config import ClassifierConfig, ConfigError, as_yaml, check, checkpoint_to_resume, image_size, load_config

if __name__ == "__main__":  # before the slow imports: a mistyped key shall not wait for them
    try:
        CONFIG, DRY_RUN = load_config(sys.argv[1:], ClassifierConfig)
    except ConfigError as error:
        sys.exit(f"train_classifier.py: {error}")

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from checkpoints import Checkpoints, put
from inputs import Position, batches, check_pixels, open_data, open_images, open_loader, open_some
from launch import (
    channels_last,
    check_keys,
    check_schedule,
    compile_network,
    compiled,
    leave,
    make_optimizer,
    open_accelerator,
    open_output,
    open_scheduler,
    opening,
    run,
)
from sheets import check_matplotlib
from stops import FiniteSteps, Signals, Stopped
from watch import ROUNDS, Log, check_trackers

from ddpm_hf import DDPMImagePipeline, DDPMUNet, NoisyClassifier, VariationalDDPMScheduler
from ddpm_hf.data import pixels_to_batch
from ddpm_hf.hub import write_model_card
from ddpm_hf.objectives import UniformTimesteps


def build(config: ClassifierConfig) -> tuple:
    """The classifier and the process of a config.

    Raises:
        ValueError: a key or value that one of them does not take.
    """
    if config.pipeline:
        fit_to_pipeline(config)
    check_keys(config, "classifier", NoisyClassifier)
    check_schedule(config)
    check_trackers(config.trackers)
    check_matplotlib("train")
    scheduler = open_scheduler(config)
    check_pixels(config)
    classifier = NoisyClassifier(
        sample_size=image_size(config),
        in_channels=config.channels,
        scheduler=json.loads(scheduler.to_json_string()),
        **config.classifier,
    )
    if config.gradient_checkpointing:
        classifier.enable_gradient_checkpointing()
    return classifier, scheduler


def fit_to_pipeline(config: ClassifierConfig) -> None:
    """Gives the config the process, the size and the channels of its pipeline, where they are saved.

    Raises:
        ConfigError: there is none, or its network has other classes.
    """
    with opening(f"pipeline={config.pipeline!r}"), torch.device("meta"):
        saved = VariationalDDPMScheduler.load_config(config.pipeline, subfolder="scheduler")
        if str(saved.get("_class_name")).endswith("SDEScheduler"):
            raise ValueError(f"its {saved['_class_name']} is in continuous time; classifiers are of discrete timesteps")
        process = VariationalDDPMScheduler.from_config(saved)
        unet = DDPMUNet.from_config(DDPMUNet.load_config(config.pipeline, subfolder="unet"))
    known = inspect.signature(VariationalDDPMScheduler).parameters
    told = {**process.config, **process.config.get("_ddpm_hf", {})}
    config.scheduler = {key: value for key, value in told.items() if key in known and value is not None}
    if unet.config.sample_size is not None:
        config.image_size = unet.config.sample_size
    config.channels = unet.config.in_channels
    check(config)
    if unet.num_classes not in (None, config.classes):
        raise ConfigError(
            f"classifier.num_classes={config.classes}, but the network of {config.pipeline!r} has {unet.num_classes} classes"
        )


def train(config: ClassifierConfig) -> Path:
    """Runs the training of `config`; returns the folder of the saved classifier."""
    accelerator = open_accelerator(config)
    main, output = accelerator.is_main_process, Path(config.output_dir)
    set_seed(config.seed, device_specific=True)
    network, scheduler = build(config)
    resumed = checkpoint_to_resume(config, fitted=True)
    base = open_base(config) if config.pipeline and main else None
    images, names = open_images(config)
    held_out = open_some(config, names) if config.eval_every else None
    dataset = open_data(config, images, accelerator.process_index, accelerator.num_processes)
    loader, timesteps = open_loader(dataset, config, accelerator), UniformTimesteps(scheduler)
    optimizer, lr_schedule = make_optimizer(config, network.parameters())
    if channels_last(config, accelerator.device):
        network.to(memory_format=torch.channels_last)
    classifier, optimizer = accelerator.prepare(network, optimizer)
    network = accelerator.unwrap_model(classifier)
    if compiled(config):
        compile_network(network, config, accelerator.device)

    if main:
        open_output(config, accelerator, "classifier")
    if config.trackers:
        accelerator.init_trackers("ddpm-hf", {key: str(value) for key, value in dataclasses.asdict(config).items()})
    log, at = Log(config, output, accelerator, len(scheduler.alphas_cumprod), also=("accuracy",)), Position()
    finite = FiniteSteps(accelerator.device, config.max_steps_skipped)
    checkpoints = Checkpoints(config, accelerator, own=dict(at=at, log=log), lr_schedule=lr_schedule, finite=finite)
    if resumed:
        checkpoints.load(resumed)
    log.begin(at.step)
    with log, Signals(accelerator) as signals:
        stream = batches(loader, config, at)
        while at.step < config.steps:
            batch = next(stream)
            with accelerator.accumulate(classifier):
                labels = batch["class_labels"]
                x_start = pixels_to_batch(batch["pixels"], scheduler.levels, config.random_flip)
                x_start = random_crop(x_start, config.random_crop)
                t, weights = timesteps.sample(len(x_start), accelerator.device)
                logits = classifier(scheduler.q_sample(x_start, t, torch.randn_like(x_start)), t).float()
                losses = F.cross_entropy(logits, labels, reduction="none")
                accelerator.backward(losses.mean())
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(classifier.parameters(), config.max_grad_norm)
                    finite.check(norm, optimizer.optimizer, scaled=accelerator.scaler is not None)
                optimizer.step()
                optimizer.zero_grad()
            log.add(x_start, t, losses, weights, logits.argmax(1) == labels)
            if not accelerator.sync_gradients:
                continue
            learning_rate = lr_schedule.get_last_lr()[0]
            lr_schedule.step()
            at.step += 1
            last, best = at.step == config.steps, False
            if log.step(at.step, norm, steps_skipped=finite.skipped, learning_rate=learning_rate):
                finite.raise_if_lost(norm, t, losses, at)
            if config.eval_every and (at.step % config.eval_every == 0 or last):
                measured = of_held_out(config, network, scheduler, *held_out, accelerator.device)
                log.note(at.step, **measured)
                best = checkpoints.is_best(at.step, measured["loss_held_out"])
            number = None if last else signals.stop(at.step)
            due = config.checkpoint_every and (at.step % config.checkpoint_every == 0 or last or best)
            saved = checkpoints.save(at.step) if due or number else False
            if number:
                raise Stopped(
                    f"stopped by signal {number} after step {at.step}; the same command goes on from "
                    f"{'there' if saved else 'the last checkpoint'}",
                    status=128 + number,
                )
    if main:
        save(network.eval(), base, output)
    accelerator.wait_for_everyone()
    classifier = accelerator.free_memory(classifier)
    leave()
    if main:
        print(f"saved {output / 'classifier'}" + (f" and {output / 'pipeline'}" if config.pipeline else ""))
    return output / "classifier"


def random_crop(x_start: torch.Tensor, smallest: float) -> torch.Tensor:
    """Of each image (B, C, H, W) a part, at random, of `smallest` to all of its sides, scaled to the whole (bilinear)."""
    if smallest == 1:
        return x_start
    side = smallest + (1 - smallest) * torch.rand(len(x_start), 1, device=x_start.device)
    offset = (2 * torch.rand(len(x_start), 2, device=x_start.device) - 1) * (1 - side)
    zero = torch.zeros_like(side)
    theta = torch.stack((side, zero, offset[:, :1], zero, side, offset[:, 1:]), dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x_start.shape), align_corners=False)
    return F.grid_sample(x_start, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def of_held_out(config, network, scheduler, x_start, labels, device) -> dict[str, float]:
    """Loss, accuracy, and that by quarter of t, of held-out images: each at `ROUNDS` timesteps, evenly over the process.

    The noise is the same every time.
    """
    network.eval()
    generator, T, count = torch.Generator().manual_seed(config.seed), len(scheduler.alphas_cumprod), len(x_start)
    t = torch.arange(count * ROUNDS) * T // (count * ROUNDS)
    losses, right = [], []
    for part in torch.arange(count * ROUNDS).split(config.batch_size):
        x, y, at = x_start[part % count].to(device), labels[part % count].to(device), t[part].to(device)
        noise = torch.randn(x.shape, generator=generator).to(device)
        logits = network(scheduler.q_sample(x, at, noise), at).float()
        losses.append(F.cross_entropy(logits, y, reduction="none").cpu())
        right.append((logits.argmax(1) == y).float().cpu())
    network.train()
    right, quarter = torch.cat(right), t * 4 // T
    told = {f"accuracy_held_out_t_quarter_{i + 1}": right[quarter == i].mean().item() for i in range(4)}
    return {"loss_held_out": torch.cat(losses).mean().item(), "accuracy_held_out": right.mean().item(), **told}


def open_base(config: ClassifierConfig) -> DDPMImagePipeline:
    """The pipeline that is to be guided, before anything is trained for it. Raises ConfigError."""
    with opening(f"pipeline={config.pipeline!r}"):
        return DDPMImagePipeline.from_pretrained(config.pipeline)


def save(network: NoisyClassifier, base: DDPMImagePipeline | None, output: Path) -> None:
    """The classifier as <output>/classifier, and with the pipeline that it was trained for as <output>/pipeline."""

    def write_pipeline(folder):
        DDPMImagePipeline(base.unet, base.scheduler, network).save_pretrained(folder)
        write_model_card(folder)

    put(output / "classifier", network.save_pretrained)
    if base:
        put(output / "pipeline", write_pipeline)


def main():
    try:
        with torch.device("meta"):  # no weights yet, but every check
            classifier, _ = build(CONFIG)
    except (ValueError, TypeError) as error:
        sys.exit(f"train_classifier.py: {' '.join(str(error).split())}")
    if DRY_RUN:
        print(as_yaml(CONFIG), end="")
        images = CONFIG.batch_size * CONFIG.gradient_accumulation_steps
        print(f"# {classifier.num_parameters():,} parameters, {CONFIG.steps:,} steps of {images:,} images a process")
        return
    run("train_classifier.py", train, CONFIG)


if __name__ == "__main__":
    main()
