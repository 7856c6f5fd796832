"""Trains a DDPM (Ho, Jain, Abbeel 2020, Algorithm 1) and saves it as a pipeline that diffusers opens.

    accelerate launch training/train.py --config digits
    accelerate launch training/train.py --config cifar10 --data my_images/ --image_size 64 --output_dir runs/mine
    python training/train.py --config mnist --steps 100 --dry_run      # shows what it would do

A preset is a name in training/configs or the path of a YAML file; every key of training/config.py can be given as
--key value, those of the network and the scheduler as --unet.key value and --scheduler.key value.
"""

import dataclasses
import inspect
import json
import math
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from config import ConfigError, TrainConfig, as_yaml, checkpoint_to_resume, image_size, load_config, nearest

if __name__ == "__main__":  # before the slow imports: a mistyped key shall not wait for them
    try:
        CONFIG, DRY_RUN = load_config(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"train.py: {error}")

import accelerate
import diffusers
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, set_seed
from checkpoints import Checkpoints
from datasets.distributed import split_dataset_by_node
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from huggingface_hub import get_token
from PIL import Image, ImageOps
from safetensors import SafetensorError
from stops import FiniteSteps, Signals, Stopped, going_on, ignore_interrupts
from tqdm.auto import tqdm

import ddpm_hf
from ddpm_hf import DDPMImagePipeline, DDPMUNet, DiffusionObjective, VariationalDDPMScheduler
from ddpm_hf.data import (
    BUILT_IN,
    check_levels,
    collate,
    image_to_pixels,
    label_names,
    load_images,
    pixels_to_batch,
    training_set,
)
from ddpm_hf.hub import write_model_card, write_whole
from ddpm_hf.objectives import TIMESTEPS
from ddpm_hf.push import HubError, push_folder, weights_digest
from ddpm_hf.scheduler import VARIANCE_TYPES


def build(config: TrainConfig) -> tuple:
    """The network, the process, the loss and the sampler of timesteps of a config.

    Raises:
        ValueError: a key or value that one of them does not take.
    """
    for part, cls in (("unet", DDPMUNet), ("scheduler", VariationalDDPMScheduler)):
        known = inspect.signature(cls).parameters
        for key in getattr(config, part):
            if key not in known:
                raise ConfigError(f"unknown key '{part}.{key}'{nearest(key, known)}")
    schedules = [name.value for name in SchedulerType if name.value != "piecewise_constant"]  # it needs rules
    if config.lr_schedule not in schedules:
        raise ConfigError(f"lr_schedule={config.lr_schedule!r} is not known{nearest(config.lr_schedule, schedules)}")
    variance_type = config.scheduler.get("variance_type", "fixed_small")
    if variance_type not in VARIANCE_TYPES:  # the scheduler itself only warns, as diffusers' does
        raise ConfigError(
            f"scheduler.variance_type={variance_type!r} is not known{nearest(variance_type, VARIANCE_TYPES)}"
        )
    scheduler = VariationalDDPMScheduler(**config.scheduler)
    if config.sample_steps is not None:
        VariationalDDPMScheduler.from_config(scheduler.config).set_timesteps(config.sample_steps)
    learned = scheduler.variance_type.startswith("learned")
    unet = DDPMUNet(
        sample_size=image_size(config),
        in_channels=config.channels,
        out_channels=config.channels * (2 if learned else 1),
        **config.unet,
    )
    unet.reset_parameters(config.init)
    if config.timesteps not in TIMESTEPS:
        raise ConfigError(f"timesteps={config.timesteps!r} is not known{nearest(config.timesteps, TIMESTEPS)}")
    objective = DiffusionObjective(scheduler, config.loss, config.vlb_weight, config.weighting)
    return unet, scheduler, objective, TIMESTEPS[config.timesteps](scheduler)


def open_data(config: TrainConfig, process: int = 0, processes: int = 1) -> tuple:
    """The training set, its first image read, and the names of its labels or None; of a stream, shuffled, this process's part.

    Raises:
        ConfigError: data that cannot be opened or does not fit the config.
    """
    levels = config.scheduler.get("levels", 256)
    try:
        check_levels(config.data, levels)
        to_pixels = image_to_pixels(image_size(config), config.channels, levels, config.background, config.crop)
        images = load_images(config.data, config.split, config.streaming)
        columns = config.image_column, config.label_column, config.unet.get("num_class_embeds")
        names = label_names(images, *columns[1:])
        if config.streaming:
            if next(iter(training_set(images, to_pixels, *columns)), None) is None:
                raise ValueError("there are no images in it")
            images = images.shuffle(seed=config.seed, buffer_size=config.shuffle_buffer)
            images = split_dataset_by_node(images, process, processes)
        dataset = training_set(
            images, to_pixels, *columns, max_broken=config.max_broken, memory=int(config.memory_gb * 2**30)
        )
        if not config.streaming and len(dataset) < config.batch_size:
            raise ValueError(
                f"batch_size={config.batch_size} is more than the {len(dataset)} images of {config.data!r}"
            )
    except (ValueError, OSError) as error:
        raise ConfigError(f"data={config.data!r}: {' '.join(str(error).split())}") from error
    return dataset, names


def open_loader(dataset, config: TrainConfig, accelerator: Accelerator) -> torch.utils.data.DataLoader:
    """Batches of this process's images on its device; their order is a function of the seed and the epoch alone.

    That of a stream is one of the processes and workers too.
    """
    loader = torch.utils.data.DataLoader(
        dataset,
        config.batch_size,
        shuffle=None if config.streaming else True,
        drop_last=True,
        num_workers=config.num_workers,
        collate_fn=collate,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # reading ahead shall not draw from the generator of noise and timesteps
    )
    if config.streaming:  # divided already; a process whose part is shorter begins its next epoch earlier
        return prepare_data_loader(loader, accelerator.device, 1, 0, put_on_device=True, dispatch_batches=False)
    return accelerator.prepare(loader)


def batches(loader, config, at):
    """Batches without end, from the place `at` on, which moves with them.

    Raises:
        ConfigError: an image or label that cannot be read, or epochs without a batch.
    """
    empty = 0  # the parts of a stream are others in each epoch
    while empty < 10:
        loader.set_epoch(at.epoch)
        epoch = iter(skip_first_batches(loader, at.batch))
        while (batch := _next(epoch, config)) is not None:
            at.batch += 1
            yield batch
        empty = 0 if at.batch else empty + 1
        at.epoch, at.batch = at.epoch + 1, 0
    raise ConfigError(
        f"batch_size={config.batch_size} is more than the images of {config.data!r} to a process, or, of a stream, to "
        f"each of its num_workers={config.num_workers}"
    )


def _next(epoch, config):
    try:
        return next(epoch, None)
    except Exception as error:  # of a worker it holds the whole traceback, and ends with what happened
        raise ConfigError(f"data={config.data!r}: {str(error).strip().splitlines()[-1]}") from error


def train(config: TrainConfig) -> Path:
    """Runs the training of `config`; returns the folder of the saved pipeline."""
    resumed = checkpoint_to_resume(config)
    if config.push_to_hub and not get_token():
        raise ConfigError(f"push_to_hub={config.push_to_hub!r}: there is no token; run `hf auth login` or set HF_TOKEN")
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # where this is not said, several processes on the CPU do not find each other
        # a step is of so many batches, also where an epoch ends between them
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        mixed_precision=config.mixed_precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
    )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise ConfigError(
            f"{started} processes were started, accelerate found {accelerator.num_processes}; see the README"
        )
    use_all_cores(accelerator)
    set_seed(config.seed, device_specific=True)
    dataset, names = open_data(config, accelerator.process_index, accelerator.num_processes)
    loader = open_loader(dataset, config, accelerator)
    unet, scheduler, objective, timesteps = build(config)
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        config.learning_rate,
        betas=tuple(config.adam_betas),
        weight_decay=config.weight_decay,
        fused=True,
    )
    lr_schedule = get_scheduler(
        config.lr_schedule, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.steps
    )
    ema = EMAModel(unet.parameters(), decay=config.ema_decay, foreach=True)
    ema.to(accelerator.device)
    unet, optimizer = accelerator.prepare(unet, optimizer)

    output = Path(config.output_dir)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / "config.yaml", as_yaml(config))
        (output / "samples").mkdir(exist_ok=True)
    log, at = Log(config, output, accelerator), Position()
    finite = FiniteSteps(accelerator.device, config.max_steps_skipped)
    parts = dict(ema=ema, lr_schedule=lr_schedule, timesteps=timesteps, log=log, finite=finite)
    checkpoints = Checkpoints(config, accelerator, at, **parts)
    if resumed:
        checkpoints.load(resumed)
        ema.to(accelerator.device)
    log.begin(at.step)
    with log, Signals(accelerator) as signals:
        stream = batches(loader, config, at)
        while at.step < config.steps:
            batch = next(stream)
            with accelerator.accumulate(unet):
                x_start = pixels_to_batch(batch["pixels"], scheduler.levels, config.random_flip)
                t, weights = timesteps.sample(len(x_start), accelerator.device)
                losses = objective(unet, x_start, batch.get("class_labels"), t)
                timesteps.update(t, losses)
                loss = (weights * losses).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
                    finite.check(norm, optimizer.optimizer, scaled=accelerator.scaler is not None)
                optimizer.step()
                optimizer.zero_grad()
            log.add(loss)
            if not accelerator.sync_gradients:
                continue
            lr_schedule.step()
            ema.step(unet.parameters())
            at.step += 1
            if log.step(at.step, lr_schedule.get_last_lr()[0], norm, finite):
                finite.raise_if_lost(norm, t, losses, at)
            if accelerator.is_main_process and config.sample_every and at.step % config.sample_every == 0:
                with EMAWeights(ema, unet), going_on("a sheet of samples"):
                    path = output / "samples" / f"{at.step:07d}.png"
                    save_samples(config, accelerator.unwrap_model(unet), scheduler, path)
            signal = signals.stop(at.step) if at.step < config.steps else None
            due = config.checkpoint_every and (at.step % config.checkpoint_every == 0 or at.step == config.steps)
            saved = checkpoints.save(at.step) if due or signal else False
            if signal:
                raise Stopped(
                    f"stopped by signal {signal} after step {at.step}; the same command goes on from "
                    f"{'there' if saved else 'the last checkpoint'}",
                    status=128 + signal,
                )
    if accelerator.is_main_process:
        ema.copy_to(unet.parameters())
        save_pipeline(config, accelerator.unwrap_model(unet).eval(), scheduler, output / "pipeline", names)
    accelerator.end_training()
    return output / "pipeline"


def use_all_cores(accelerator):
    """On the CPU, gives each process its share of the cores: launchers set one thread where nothing is said."""
    if accelerator.device.type == "cpu" and torch.get_num_threads() == 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // accelerator.num_processes))


@dataclasses.dataclass
class Position:
    """How far a process is: optimizer steps in all, and batches of the present epoch."""

    step: int = 0
    epoch: int = 0
    batch: int = 0

    state_dict = dataclasses.asdict

    def load_state_dict(self, state):
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]


class EMAWeights:
    """Within this context the network has the averaged weights, and is in evaluation mode."""

    def __init__(self, ema, unet):
        self.ema, self.unet = ema, unet

    def __enter__(self):
        self.ema.store(self.unet.parameters())
        self.ema.copy_to(self.unet.parameters())
        self.unet.eval()

    def __exit__(self, *exception):
        self.ema.restore(self.unet.parameters())
        self.unet.train()


class Log:
    """The progress bar, log.jsonl and loss.png; the loss is read from the device every `log_every` steps only."""

    def __init__(self, config, output, accelerator):
        self.config, self.output, self.main = config, output, accelerator.is_main_process
        self.device = accelerator.device
        self.images = config.batch_size * accelerator.num_processes
        self.bar = tqdm(total=config.steps, desc="train", disable=not self.main)
        self.losses, self.rows, self.seen, self.start = [], [], 0, time.perf_counter()

    def state_dict(self):
        return {"losses": torch.stack(self.losses) if self.losses else torch.zeros(0), "rows": self.rows}

    def load_state_dict(self, state):
        self.losses, self.rows = list(state["losses"].to(self.device)), state["rows"]

    def begin(self, step):
        """What was logged after `step` by a run that was stopped is forgotten."""
        if self.main:
            self.bar.update(step)
            write_whole(self.output / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, loss):
        if self.main:
            self.losses.append(loss.detach())
        self.seen += self.images

    def step(self, step, learning_rate, norm, finite):
        """After each optimizer step; whether it was one of those that are logged."""
        self.bar.update()
        if step % self.config.log_every and step != self.config.steps:
            return False
        if self.main:
            losses, seconds = torch.stack(self.losses), time.perf_counter() - self.start
            row = {
                "step": step,
                "loss": losses[losses.isfinite()].mean().item(),
                "gradient_norm": norm.item(),
                "steps_skipped": int(finite.skipped),
                "learning_rate": learning_rate,
                "images_per_second": self.seen / seconds,
            }
            row = {key: value if math.isfinite(value) else None for key, value in row.items()}  # JSON has no others
            self.rows.append(row)
            with going_on("log.jsonl"), open(self.output / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            shown = {"loss": f"{losses.mean():.4f}", "images_per_s": f"{row['images_per_second']:.0f}"}
            self.bar.set_postfix(shown | ({"skipped": row["steps_skipped"]} if row["steps_skipped"] else {}))
        self.losses, self.seen, self.start = [], 0, time.perf_counter()
        return True

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()
        if self.main and self.rows:
            with going_on("loss.png"):
                plot_loss(self.rows, self.output / "loss.png")


def plot_loss(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([row["step"] for row in rows], [math.nan if row["loss"] is None else row["loss"] for row in rows])
    axes.set(xlabel="optimizer step", ylabel="training loss", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_samples(config, unet, scheduler, path):
    """A sheet of samples from the same noise every time."""
    process = VariationalDDPMScheduler.from_config(scheduler.config)  # sampling shall not move the training's chain
    pipeline = DDPMImagePipeline(unet, process)
    pipeline.set_progress_bar_config(desc="samples", leave=False)
    generator = torch.Generator(unet.device).manual_seed(config.seed)
    images = pipeline(
        config.sample_count,
        generator=generator,
        num_inference_steps=config.sample_steps,
        class_labels=cycled_labels(unet, config.sample_count),
    ).images
    save_sheet(images, path)


def cycled_labels(unet, count):
    """Labels 0, 1, 2, ... in turn for a class-conditional network; None for another."""
    classes = unet.config.num_class_embeds
    return None if classes is None else torch.arange(count) % classes


def save_sheet(images, path, columns=None):
    """PIL images as one sheet with grey gaps, square if columns is None; small ones enlarged so that pixels can be seen."""
    scale = max(1, 64 // max(images[0].size))
    images = [ImageOps.expand(ImageOps.scale(image, scale, Image.Resampling.NEAREST), 2, "grey") for image in images]
    columns = columns or math.ceil(len(images) ** 0.5)
    rows = math.ceil(len(images) / columns)
    images += [Image.new(images[0].mode, images[0].size)] * (rows * columns - len(images))
    path = Path(path)
    temporary = path.with_name(f".{path.name}")
    make_image_grid(images, rows, columns).save(temporary, format="PNG")
    os.replace(temporary, path)


def save_pipeline(config, unet, scheduler, folder, label_names=None):
    """Written under another name and renamed: a folder of this name is whole."""
    temporary = folder.with_name(f".{folder.name}")
    DDPMImagePipeline(unet, scheduler).save_pretrained(temporary)
    told = dataclasses.asdict(config)
    for key in ("output_dir", "resume", "push_to_hub", "hub_private", "license"):
        del told[key]  # of nobody else's concern
    local = os.path.exists(config.data)
    told["data"] = Path(config.data).name if local else config.data
    told["hub_dataset"] = None if local or config.data in BUILT_IN else config.data
    told["label_names"] = label_names
    told["weights"] = weights_digest(temporary)
    told["versions"] = {module.__name__: module.__version__ for module in (ddpm_hf, torch, diffusers, accelerate)}
    (temporary / "training.json").write_text(json.dumps(told, indent=2) + "\n")
    pictures = {"training.png": "loss.png", "samples.png": f"samples/{config.steps:07d}.png"}  # of these weights
    for name, source in pictures.items():
        if (folder.parent / source).is_file():
            shutil.copy(folder.parent / source, temporary / name)
    write_model_card(temporary)
    if folder.exists():  # of fewer steps
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def main():
    try:
        with torch.device("meta"):  # no weights yet, but every check
            unet, *_ = build(CONFIG)
    except (ValueError, TypeError) as error:
        sys.exit(f"train.py: {error}")
    if DRY_RUN:
        print(as_yaml(CONFIG), end="")
        print(f"# {unet.num_parameters():,} parameters")
        return
    try:
        folder = train(CONFIG)
    except Stopped as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(error.status)
    except (
        ConfigError,
        OSError,
        SafetensorError,
    ) as error:  # a full disk, which safetensors has an error of its own for
        sys.exit(f"train.py: {' '.join(str(error).split())}")
    print(f"saved {folder}")
    if CONFIG.push_to_hub and int(os.environ.get("RANK", 0)) == 0:
        try:
            info = push_folder(folder, CONFIG.push_to_hub, license=CONFIG.license, private=CONFIG.hub_private or None)
        except (HubError, ValueError) as error:
            again = ["python", "training/push.py", str(folder), "--repo_id", CONFIG.push_to_hub]
            again += ["--private"] * CONFIG.hub_private + (["--license", CONFIG.license] if CONFIG.license else [])
            sys.exit(f"train.py: {error}; to try again: {shlex.join(again)}")
        print(f"published {info.commit_url}")


if __name__ == "__main__":
    main()
