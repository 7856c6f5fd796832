"""Trains a classifier of noisy images for classifier guidance (Dhariwal & Nichol 2021, section 4: "ADM") and saves it.

    accelerate launch training/train_classifier.py --config digits --pipeline runs/digits-classes/pipeline
    python training/train_classifier.py --config mnist --steps 100 --dry_run

With --pipeline it is trained on that pipeline's process, and saved with it as <output_dir>/pipeline too. --help lists the keys:
each is one of a YAML file too.
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed

from ddpm_hf.data.pixels import pixels_to_batch
from ddpm_hf.extras import MissingExtra, require_extra
from ddpm_hf.files.atomic import replacing_folder
from ddpm_hf.hub.card import write_model_card
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.pipelines.ddpm import DDPMImagePipeline
from ddpm_hf.training.checkpoints import Checkpoints
from ddpm_hf.training.config import ClassifierConfig, as_yaml, checkpoint_to_resume, image_size
from ddpm_hf.training.devices import (
    channels_last,
    check_keys,
    check_schedule,
    compile_network,
    compiled,
    leave,
    make_optimizer,
    open_accelerator,
    open_scheduler,
    open_trackers,
    opening,
    run,
    set_learning_rate,
)
from ddpm_hf.training.environment import check_trackers
from ddpm_hf.training.inputs import (
    Position,
    batches,
    check_pixels,
    count_images,
    data_facts,
    open_data,
    open_images,
    open_loader,
    open_some,
    record_data,
)
from ddpm_hf.training.interrupts import FiniteSteps, Interrupted, Signals, Stopped
from ddpm_hf.training.log import Log
from ddpm_hf.training.measurements import ROUNDS
from ddpm_hf.training.output import OutputFolder
from ddpm_hf.training.resolve import guided_class_names, resolve
from ddpm_hf.training.timesteps import UniformTimesteps


def build(config: ClassifierConfig) -> tuple:
    """The classifier and the process of a config.

    Raises:
        ValueError: a key or value that one of them does not take.
    """
    check_keys(config, "classifier", NoisyClassifier)
    resolve(config)
    check_schedule(config)
    check_trackers(config.trackers)
    require_extra("matplotlib", "train", "plots")
    scheduler = open_scheduler(config)
    check_pixels(config)
    classifier = NoisyClassifier(
        sample_size=image_size(config),
        in_channels=config.channels,
        scheduler=json.loads(scheduler.to_json_string()),
        **config.classifier,
    )
    classifier.class_names = guided_class_names(config) if config.pipeline else None
    if config.gradient_checkpointing:
        classifier.enable_gradient_checkpointing()
    return classifier, scheduler


def train(config: ClassifierConfig) -> Path:
    """Runs the training of `config`; returns the folder of the saved classifier."""
    resolve(config)
    accelerator = open_accelerator(config)
    with OutputFolder(config, accelerator, "classifier") as folder:
        return _train(config, accelerator, folder)


def _train(config, accelerator, folder):
    main, output = accelerator.is_main_process, Path(config.output_dir)
    set_seed(config.seed, device_specific=True)
    network, scheduler = build(config)
    resumed = checkpoint_to_resume(config)
    base = open_base(config) if config.pipeline and main else None
    images, names = open_images(config)
    names = network.class_names or names  # a label means what it means to the pipeline
    dataset = open_data(config, images, accelerator.process_index, accelerator.num_processes, names)
    held_out = open_some(config, names) if config.eval_every else None
    record_data(network, config, names)
    loader, timesteps = open_loader(dataset, config, accelerator), UniformTimesteps(scheduler)
    optimizer, lr_schedule = make_optimizer(config, network.parameters())
    if channels_last(config, accelerator.device):
        network.to(memory_format=torch.channels_last)
    classifier, optimizer = accelerator.prepare(network, optimizer)
    network = accelerator.unwrap_model(classifier)
    if compiled(config):
        compile_network(network, config, accelerator.device)

    if main:
        folder.begin()
    if config.trackers:
        open_trackers(config, accelerator)
    log = Log(config, folder, accelerator, len(scheduler.alphas_cumprod), also=("accuracy",))
    at, signals = Position(images=count_images(dataset)), Signals(accelerator)
    finite = FiniteSteps(accelerator.device, config.max_steps_skipped)
    facts = data_facts(config, names)
    checkpoints = Checkpoints(
        config, accelerator, own=dict(at=at, log=log), facts=facts, lr_schedule=lr_schedule, finite=finite
    )
    if resumed:
        resumed = checkpoints.load(resumed)
        set_learning_rate(config, optimizer, lr_schedule)
    log.begin(at.step, resumed)

    def measure() -> bool:
        """The held-out numbers that are due after this step; whether none before were as good."""
        if not config.eval_every or (at.step % config.eval_every and at.step != config.steps):
            return False
        log.say(f"step {at.step:,}: measuring {len(held_out[0])} held-out images")
        measured = of_held_out(config, signals, network, scheduler, *held_out)
        log.note(at.step, **measured)
        return checkpoints.is_best(at.step, measured["loss_held_out"])

    with log, signals:
        if not checkpoints.measured:
            measure()
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
            last = at.step == config.steps
            if log.step(at.step, norm, steps_skipped=finite.skipped, learning_rate=learning_rate):
                finite.raise_if_lost(norm, t, losses, at)
            best, checkpoints.measured = False, True
            try:
                best = measure()
            except Interrupted:
                checkpoints.measured = False
            number = signals.stop(at.step) if not last or not checkpoints.measured else None
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
def of_held_out(config, signals, network, scheduler, x_start, labels) -> dict[str, float]:
    """Loss, accuracy, and that by quarter of t, of held-out images: each at `ROUNDS` timesteps, evenly over the process.

    The noise is the same every time. Not a number where they cannot be computed.

    Raises:
        Interrupted: a signal came meanwhile. In all processes.
    """
    T, count, device = len(scheduler.alphas_cumprod), len(x_start), signals.accelerator.device
    t = torch.arange(count * ROUNDS) * T // (count * ROUNDS)

    def compute():
        generator, losses, right = torch.Generator().manual_seed(config.seed), [], []
        for part in torch.arange(count * ROUNDS).split(config.batch_size):
            x, y, at = x_start[part % count].to(device), labels[part % count].to(device), t[part].to(device)
            noise = torch.randn(x.shape, generator=generator).to(device)
            logits = network(scheduler.q_sample(x, at, noise), at).float()
            losses.append(F.cross_entropy(logits, y, reduction="none").cpu())
            right.append((logits.argmax(1) == y).float().cpu())
        return torch.cat(losses), torch.cat(right)

    network.eval()
    try:
        shares = signals.measure(network, compute)
    finally:
        network.train()
    losses, right = torch.full((2, count * ROUNDS), math.nan) if shares is None else shares[0]
    quarter = t * 4 // T
    by_quarter = {f"accuracy_held_out_t_quarter_{i + 1}": right[quarter == i].mean().item() for i in range(4)}
    return {"loss_held_out": losses.mean().item(), "accuracy_held_out": right.mean().item(), **by_quarter}


def open_base(config: ClassifierConfig) -> DDPMImagePipeline:
    """The pipeline that is to be guided, before anything is trained for it. Raises ConfigError."""
    with opening(f"pipeline={config.pipeline!r}"):
        return DDPMImagePipeline.from_pretrained(config.pipeline)


def save(network: NoisyClassifier, base: DDPMImagePipeline | None, output: Path) -> None:
    """The classifier as <output>/classifier, and with the pipeline that it was trained for as <output>/pipeline."""

    with replacing_folder(output / "classifier") as folder:
        network.save_pretrained(folder)
    if base:
        with replacing_folder(output / "pipeline") as folder:
            DDPMImagePipeline(base.unet, base.scheduler, network).save_pretrained(folder)
            write_model_card(folder)


def main(config, dry_run: bool):
    try:
        resolve(config)
        with torch.device("meta"):  # no weights yet, but every check
            classifier, _ = build(config)
    except (ValueError, TypeError, MissingExtra) as error:
        sys.exit(f"train_classifier.py: {' '.join(str(error).split())}")
    if dry_run:
        print(as_yaml(config), end="")
        images = config.batch_size * config.gradient_accumulation_steps
        print(f"# {classifier.num_parameters():,} parameters, {config.steps:,} steps of {images:,} images a process")
        return
    run("train_classifier.py", train, config)
