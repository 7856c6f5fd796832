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
import os
import shlex
import shutil
import sys
import tarfile
from pathlib import Path

from config import (
    DERIVED,
    ConfigError,
    TrainConfig,
    as_yaml,
    check,
    checkpoint_to_resume,
    image_size,
    load_config,
    nearest,
)

if __name__ == "__main__":  # before the slow imports: a mistyped key shall not wait for them
    try:
        CONFIG, DRY_RUN = load_config(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"train.py: {error}")

import datasets
import torch
from accelerate import Accelerator, PartialState
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, set_seed
from checkpoints import Checkpoints
from datasets.distributed import split_dataset_by_node
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import get_token
from safetensors import SafetensorError
from stops import FiniteSteps, Signals, Stopped, going_on, ignore_interrupts
from watch import MODULES, Log, as_sheet, check_trackers, environment, held_out_bits_per_dim, samples, save_picture

from ddpm_hf import DDPMImagePipeline, DDPMUNet, DiffusionObjective, VariationalDDPMScheduler
from ddpm_hf.data import (
    BUILT_IN,
    check_levels,
    collate,
    image_column,
    image_to_pixels,
    label_names,
    load_images,
    pixels_to_batch,
    pixels_to_tensor,
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
    if config.init_from and not checkpoint_to_resume(config):
        config.unet = network_of(config)
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
    check_trackers(config.trackers)
    learned = scheduler.variance_type.startswith("learned")
    unet = DDPMUNet(
        sample_size=image_size(config),
        in_channels=config.channels,
        out_channels=config.channels * (2 if learned else 1),
        **config.unet,
    )
    unet.reset_parameters(config.init)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.timesteps not in TIMESTEPS:
        raise ConfigError(f"timesteps={config.timesteps!r} is not known{nearest(config.timesteps, TIMESTEPS)}")
    objective = DiffusionObjective(scheduler, config.loss, config.vlb_weight, config.weighting)
    return unet, scheduler, objective, TIMESTEPS[config.timesteps](scheduler)


def network_of(config: TrainConfig) -> dict:
    """The keys of `unet` by which the network of `init_from` is made.

    Raises:
        ConfigError: there is none, or its channels, classes or levels of resolution are not those of the config.
    """
    try:
        found = DDPMUNet.load_config(config.init_from, subfolder="unet")
    except OSError as error:
        raise ConfigError(f"init_from={config.init_from!r}: {' '.join(str(error).split())}") from error
    learned = config.scheduler.get("variance_type", "fixed_small").startswith("learned")
    for key, expected in (("in_channels", config.channels), ("out_channels", config.channels * (1 + learned))):
        if found.get(key) != expected:
            raise ConfigError(
                f"init_from={config.init_from!r}: its network has {key} {found.get(key)}, channels={config.channels} and the "
                f"variance type ask for {expected}"
            )
    unet = {key: found[key] for key in inspect.signature(DDPMUNet).parameters if key in found}
    unet = {key: value for key, value in unet.items() if key not in DERIVED["unet"]}
    check(dataclasses.replace(config, init_from=None, unet=unet))
    return unet


def levels_of(config: TrainConfig) -> int:
    """Grey levels of the data."""
    return config.scheduler.get("levels", 256)


def pixels_by(config: TrainConfig):
    """The function from a PIL image to its pixels, for training and held-out data alike."""
    return image_to_pixels(image_size(config), config.channels, levels_of(config), config.background, config.crop)


def open_data(config: TrainConfig, process: int = 0, processes: int = 1) -> tuple:
    """The training set, its first image read, and the names of its labels or None; of a stream, shuffled, this process's part.

    Raises:
        ConfigError: data that cannot be opened or does not fit the config.
    """
    try:
        check_levels(config.data, levels_of(config))
        to_pixels = pixels_by(config)
        images = load_images(config.data, config.split, config.streaming)
        columns = config.image_column, config.label_column, config.unet.get("num_class_embeds")
        names = label_names(images, *columns[1:])
        if config.streaming:
            probe = training_set(images, to_pixels, *columns, max_broken=config.max_broken)
            if next(iter(probe), None) is None:
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
    except (ValueError, OSError, tarfile.TarError) as error:
        raise ConfigError(f"data={config.data!r}: {' '.join(str(error).split())}") from error
    return dataset, names


def open_held_out(config: TrainConfig, names: list[str] | None) -> tuple:
    """x_start (eval_images, C, H, W) and labels or None, of which bits/dim are measured.

    Raises:
        ConfigError: as `open_data`.
    """
    source = config.eval_data or config.data
    try:
        to_pixels = pixels_by(config)
        images = load_images(source, config.eval_split, config.streaming)
        column = image_column(images, config.image_column)
        images = images.cast_column(column, datasets.Image(decode=False))
        if config.streaming:  # some of all that there are: data is often sorted
            images = images.shuffle(seed=0, buffer_size=config.shuffle_buffer).take(config.eval_images)
            images = datasets.Dataset.from_list(list(images), images.features)
        else:
            images = images.shuffle(seed=0).select(range(min(config.eval_images, len(images))))
        columns = config.image_column, config.label_column, config.unet.get("num_class_embeds"), names
        tensors = training_set(images, to_pixels, *columns, config.max_broken, memory=2**40).tensors
    except (ValueError, OSError, tarfile.TarError) as error:
        raise ConfigError(
            f"eval_data={source!r}, eval_split={config.eval_split!r}: {' '.join(str(error).split())}"
        ) from error
    return pixels_to_tensor(tensors["pixels"], levels_of(config)), tensors.get("class_labels")


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
        told = str(error).strip() or type(error).__name__
        raise ConfigError(f"data={config.data!r}: {told.splitlines()[-1]}") from error


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
        log_with=config.trackers or None,
        project_dir=config.output_dir,
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
    held_out = open_held_out(config, names) if config.eval_every else None
    loader = open_loader(dataset, config, accelerator)
    unet, scheduler, objective, timesteps = build(config)
    if config.init_from and not resumed:
        try:
            unet.load_state_dict(DDPMImagePipeline.from_pretrained(config.init_from).unet.state_dict())
        except (ValueError, OSError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"init_from={config.init_from!r}: {' '.join(str(error).split())}") from error
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
        write_whole(output / "environment.json", json.dumps(environment(accelerator), indent=2) + "\n")
        (output / "samples").mkdir(exist_ok=True)
    if config.trackers:
        accelerator.init_trackers("ddpm-hf", {key: str(value) for key, value in dataclasses.asdict(config).items()})
    log, at = Log(config, output, accelerator, scheduler.config.num_train_timesteps), Position()
    finite, average = FiniteSteps(accelerator.device, config.max_steps_skipped), EMAWeights(ema, unet)
    parts = dict(ema=ema, lr_schedule=lr_schedule, timesteps=timesteps, finite=finite)
    checkpoints = Checkpoints(config, accelerator, own=dict(at=at, log=log), **parts)
    if resumed:
        checkpoints.load(resumed)
        ema.to(accelerator.device)
    log.begin(at.step)
    network = accelerator.unwrap_model(unet)
    with log, Signals(accelerator) as signals:
        stream = batches(loader, config, at)
        while at.step < config.steps:
            batch = next(stream)
            with accelerator.accumulate(unet):
                x_start = pixels_to_batch(batch["pixels"], scheduler.levels, config.random_flip)
                t, weights = timesteps.sample(len(x_start), accelerator.device)
                losses = objective(unet, x_start, batch.get("class_labels"), t)
                timesteps.update(t, losses)
                accelerator.backward((weights * losses).mean())
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
                    finite.check(norm, optimizer.optimizer, scaled=accelerator.scaler is not None)
                optimizer.step()
                optimizer.zero_grad()
            log.add(t, losses, weights)
            if not accelerator.sync_gradients:
                continue
            learning_rate = lr_schedule.get_last_lr()[0]
            lr_schedule.step()
            ema.step(unet.parameters())
            at.step += 1
            last, told = at.step == config.steps, dict(learning_rate=learning_rate, ema_decay=ema.cur_decay_value)
            if log.step(at.step, norm, steps_skipped=finite.skipped, **told):
                finite.raise_if_lost(norm, t, losses, at)
            if config.sample_every and at.step % config.sample_every == 0:
                with average:
                    images = samples(config, accelerator, network, scheduler)
                if images:
                    classes = network.config.num_class_embeds
                    sheet = as_sheet(images, columns=classes if classes and classes <= len(images) else None)
                    with going_on("a sheet of samples"):
                        save_picture(sheet, output / "samples" / f"{at.step:07d}.png")
                    log.show(at.step, "samples", sheet)
            best = False
            if config.eval_every and (at.step % config.eval_every == 0 or last):
                with average:
                    measured = held_out_bits_per_dim(config, accelerator, network, scheduler, *held_out)
                log.note(at.step, **measured)
                best = checkpoints.is_best(at.step, measured["bits_per_dim"])
            signal = None if last else signals.stop(at.step)
            due = config.checkpoint_every and (at.step % config.checkpoint_every == 0 or last or best)
            saved = checkpoints.save(at.step) if due or signal else False
            if saved and not last and accelerator.is_main_process:
                log.plot()
                with average, going_on("the pipeline"):
                    save_pipeline(config, at.step, network, scheduler, output / "pipeline", names)
            if signal:
                raise Stopped(
                    f"stopped by signal {signal} after step {at.step}; the same command goes on from "
                    f"{'there' if saved else 'the last checkpoint'}",
                    status=128 + signal,
                )
    if accelerator.is_main_process:
        with average:
            save_pipeline(config, at.step, network, scheduler, output / "pipeline", names)
    accelerator.wait_for_everyone()  # torch can hang where the last thing that processes exchanged is no barrier
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


def save_pipeline(config, step, unet, scheduler, folder, label_names=None):
    """The network after `step` steps, written under another name and renamed: a folder of this name is whole."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    DDPMImagePipeline(unet, scheduler).save_pretrained(temporary)
    told = dataclasses.asdict(config)
    for key in ("output_dir", "resume", "push_to_hub", "hub_private", "license"):
        del told[key]  # of nobody else's concern
    local = os.path.exists(config.data)
    for key in ("data", "eval_data", "init_from"):
        if told[key] and os.path.exists(told[key]):
            told[key] = Path(told[key]).name
    told["hub_dataset"] = None if local or config.data in BUILT_IN else config.data
    told["label_names"] = label_names
    told["weights"] = weights_digest(temporary)
    told["versions"] = {module.__name__: module.__version__ for module in MODULES}
    told["steps"] = step
    (temporary / "training.json").write_text(json.dumps(told, indent=2) + "\n")
    pictures = {"training.png": "curves.png", "samples.png": f"samples/{step:07d}.png"}  # of these weights
    for name, source in pictures.items():
        if (folder.parent / source).is_file():
            shutil.copy(folder.parent / source, temporary / name)
    write_model_card(temporary)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():  # of fewer steps
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def main():
    try:
        with torch.device("meta"):  # no weights yet, but every check
            unet, *_ = build(CONFIG)
    except (ValueError, TypeError) as error:
        sys.exit(f"train.py: {error}")
    if DRY_RUN:
        print(as_yaml(CONFIG), end="")
        parameters, images = unet.num_parameters(), CONFIG.batch_size * CONFIG.gradient_accumulation_steps
        print(f"# {parameters:,} parameters, {CONFIG.steps:,} steps of {images:,} images a process")
        # float32: weights, gradient, two moments of Adam, average
        print(
            f"# {5 * 4 * parameters / 2**30:.2f} GiB for weights, gradient, optimizer and average; activations on top"
        )
        return
    try:
        folder = train(CONFIG)
    except Stopped as error:
        PartialState().wait_for_everyone()  # as at the end of train
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(error.status)
    except (ConfigError, OSError, SafetensorError) as error:  # safetensors has its own for a full disk
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
