"""Trains a DDPM (Ho, Jain, Abbeel 2020, Algorithm 1) and saves it as a pipeline that diffusers opens.

    accelerate launch training/train.py --data path/to/pictures        # the settings follow the pictures
    accelerate launch training/train.py --config digits                # a preset, or a YAML file
    accelerate launch training/train.py --config cifar10 --data path/to/images --image_size 64 --output_dir runs/mine
    python training/train.py --config mnist --steps 100 --dry_run      # shows what it would do

--help lists the keys: each is one of a YAML file too.
"""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel

from ddpm_hf.arguments import shown
from ddpm_hf.data.pixels import pixels_to_batch
from ddpm_hf.data.sources import BUILT_IN, public_name
from ddpm_hf.extras import MissingExtra, require_extra
from ddpm_hf.files.atomic import replacing_folder, write_text
from ddpm_hf.hub.card import write_model_card
from ddpm_hf.hub.records import weights_digest
from ddpm_hf.likelihood.ode import dequantized
from ddpm_hf.likelihood.solver import check_network
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.training.checkpoints import Checkpoints
from ddpm_hf.training.config import ConfigError, TrainConfig, as_yaml, checkpoint_to_resume, image_size, nearest
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
from ddpm_hf.training.environment import MODULES, check_trackers
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
from ddpm_hf.training.interrupts import FiniteSteps, Interrupted, Signals, Stopped, going_on, tell
from ddpm_hf.training.log import Log
from ddpm_hf.training.losses import DiffusionObjective, ScoreObjective, drop_labels
from ddpm_hf.training.measurements import held_out_bits_per_dim, held_out_loss
from ddpm_hf.training.output import OutputFolder
from ddpm_hf.training.publisher import Publisher
from ddpm_hf.training.resolve import check_class_names, resolve
from ddpm_hf.training.sheets import Sheets
from ddpm_hf.training.stages import conditioned, in_channels, pipeline_class, pipeline_of
from ddpm_hf.training.timesteps import TIMESTEPS, ContinuousTimes


def build(config: TrainConfig) -> tuple:
    """The network, the process, the loss and the sampler of timesteps of a config.

    Raises:
        ValueError: a key or value that one of them does not take.
    """
    check_keys(config, "unet", DDPMUNet)
    resolve(config)
    check_schedule(config)
    with torch.device("cpu"):  # where main() checks a config, the network alone is on the meta device
        scheduler = open_scheduler(config)
        steps = config.sample_steps or scheduler.config.num_train_timesteps
        if config.sample_steps is not None or config.sample_every:
            try:
                type(scheduler).from_config(scheduler.config).set_timesteps(steps)
            except ValueError as error:
                raise ConfigError(str(error).replace("num_inference_steps", "sample_steps")) from None
    check_pixels(config)
    check_trackers(config.trackers)
    require_extra("matplotlib", "train", "plots")
    unet = DDPMUNet(
        sample_size=image_size(config),
        in_channels=in_channels(config),
        out_channels=config.channels * (2 if scheduler.learns_variance else 1),
        **config.unet | with_null_class(config),
    )
    unet.reset_parameters(config.init)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if scheduler.is_continuous:
        sde = scheduler.sde
        check_network(unet, sde, config.channels)
        with torch.device("cpu"):
            times = ContinuousTimes(sde, config.timesteps == "importance")
        return unet, scheduler, ScoreObjective(sde, config.weighting or "variance"), times
    if config.timesteps not in TIMESTEPS:
        raise ConfigError(f"timesteps={shown(config.timesteps)} is not known{nearest(config.timesteps, TIMESTEPS)}")
    objective = DiffusionObjective(scheduler, config.loss, config.vlb_weight, config.weighting)
    return unet, scheduler, objective, TIMESTEPS[config.timesteps](scheduler)


def with_null_class(config: TrainConfig) -> dict:
    """The keys of a network that has a label for no class beside those of the config."""
    classes = config.unet.get("num_class_embeds")
    return dict(num_class_embeds=classes + 1, _ddpm_hf={"null_class": classes}) if config.label_dropout else {}


def train(config: TrainConfig) -> Path:
    """Runs the training of `config`; returns the folder of the saved pipeline."""
    resolve(config)
    accelerator = open_accelerator(config)
    with OutputFolder(config, accelerator, "pipeline") as folder:
        return _train(config, accelerator, folder)


def _train(config, accelerator, folder):
    resumed = checkpoint_to_resume(config)
    main, output = accelerator.is_main_process, Path(config.output_dir)
    set_seed(config.seed, device_specific=True)
    images, names = open_images(config)
    if config.init_from and not resumed:
        check_class_names(config, names)
    held_out, seen = (open_some(config, names, given) if config.eval_every else None for given in (None, images))
    publisher = Publisher(config) if config.push_to_hub and main else None  # no repository for data that is not there
    dataset = open_data(config, images, accelerator.process_index, accelerator.num_processes, names)
    loader = open_loader(dataset, config, accelerator)
    unet, scheduler, objective, timesteps = build(config)
    if config.init_from and not resumed:
        with opening(f"init_from={config.init_from!r}"):
            unet.load_state_dict(pipeline_class(config).from_pretrained(config.init_from).unet.state_dict())
    record_data(unet, config, names)
    optimizer, lr_schedule = make_optimizer(config, unet.parameters())
    if channels_last(config, accelerator.device):
        unet.to(memory_format=torch.channels_last)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    # of weights that are the same in all processes by now
    ema = EMAModel(unet.parameters(), decay=config.ema_decay, foreach=True)
    network = accelerator.unwrap_model(unet)
    if compiled(config):
        compile_network(network, config, accelerator.device)

    if main:
        folder.begin()
    if config.trackers:
        open_trackers(config, accelerator)
    log, signals = Log(config, folder, accelerator, objective.end), Signals(accelerator)
    at = Position(images=count_images(dataset))
    finite, average = FiniteSteps(accelerator.device, config.max_steps_skipped), Evaluation(network, ema)
    parts = dict(ema=ema, lr_schedule=lr_schedule, timesteps=timesteps, finite=finite)
    facts = data_facts(config, names)
    checkpoints = Checkpoints(config, accelerator, own=dict(at=at, log=log), facts=facts, **parts)
    if resumed:
        resumed = checkpoints.load(resumed)
        set_learning_rate(config, optimizer, lr_schedule)
        ema.to(accelerator.device)
    log.begin(at.step, resumed)
    sheets = Sheets(config, accelerator, network, scheduler, dataset, log, signals, average, raw=Evaluation(network))

    def measure() -> bool:
        """The sheet and the held-out numbers that are due after this step; whether none before were as good."""
        rows, best = [], False
        if config.sample_every and at.step % config.sample_every == 0:
            rows.append(sheets.draw(at.step))
        if config.eval_every and (at.step % config.eval_every == 0 or at.step == config.steps):
            log.say(f"step {at.step:,}: measuring {len(held_out[0])} held-out images")
            with average:
                measured = held_out_bits_per_dim(config, signals, network, scheduler, *held_out)
                measured |= held_out_loss(config, signals, network, objective, held_out, seen)
            rows.append(measured)
            best = checkpoints.is_best(at.step, measured["bits_per_dim"])
        for row in rows:
            log.note(at.step, **row)
        return best

    with log, signals:
        if not checkpoints.measured:
            measure()
        stream = batches(loader, config, at)
        while at.step < config.steps:
            batch = next(stream)
            with accelerator.accumulate(unet):
                x_start = pixels_to_batch(batch["pixels"], scheduler.levels, config.random_flip)
                if config.dequantize:
                    x_start = dequantized(x_start, scheduler.levels)
                t, weights = timesteps.sample(len(x_start), accelerator.device)
                labels = batch.get("class_labels")
                if config.label_dropout:
                    labels = drop_labels(labels, network.null_class, config.label_dropout)
                losses = objective(conditioned(config, unet, x_start), x_start, labels, t)
                timesteps.update(t, losses)
                accelerator.backward((weights * losses).mean())
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
                    finite.check(norm, optimizer.optimizer, scaled=accelerator.scaler is not None)
                optimizer.step()
                optimizer.zero_grad()
            log.add(x_start, t, losses, weights)
            if not accelerator.sync_gradients:
                continue
            learning_rate = lr_schedule.get_last_lr()[0]
            lr_schedule.step()
            ema.step(unet.parameters())
            at.step += 1
            last, told = at.step == config.steps, dict(learning_rate=learning_rate, ema_decay=ema.cur_decay_value)
            if log.step(at.step, norm, steps_skipped=finite.skipped, **told):
                finite.raise_if_lost(norm, t, losses, at)
            best, checkpoints.measured = False, True
            try:
                best = measure()
            except Interrupted:
                checkpoints.measured = False
            number = signals.stop(at.step) if not last or not checkpoints.measured else None
            due = config.checkpoint_every and (at.step % config.checkpoint_every == 0 or last or best)
            saved = checkpoints.save(at.step) if due or number else False
            if saved and main and (number or not last):
                log.plot()
                with average, going_on("the pipeline could not be written"):
                    save_pipeline(config, at.step, network, scheduler, output / "pipeline", names)
                    if publisher and not number:
                        publisher.push(at.step)
            if number:
                raise Stopped(
                    f"stopped by signal {number} after step {at.step}; the same command goes on from "
                    f"{'there' if saved else 'the last checkpoint'}{publisher.left() if publisher else ''}",
                    status=128 + number,
                )
    if main:
        with average:
            save_pipeline(config, at.step, network, scheduler, output / "pipeline", names)
    accelerator.wait_for_everyone()
    unet = accelerator.free_memory(unet)
    leave()
    if main:
        print(f"saved {output / 'pipeline'}")
    if publisher:
        print(f"published {publisher.finish()}")
    return output / "pipeline"


class Evaluation:
    """Within this context the network is in evaluation mode, with the averaged weights where there is an `ema`.

    It is not compiled there: a sheet's or an evaluation's shapes are seldom seen twice.
    """

    def __init__(self, unet, ema=None):
        self.unet, self.ema = unet, ema

    def __enter__(self):
        if self.ema:
            self.ema.store(self.unet.parameters())
            self.ema.copy_to(self.unet.parameters())
        self.unet.eval()
        self.eager = torch.compiler.set_stance("force_eager")

    def __exit__(self, *exception):
        self.eager.__exit__(*exception)
        if self.ema:
            self.ema.restore(self.unet.parameters())
        self.unet.train()


def save_pipeline(config, step, unet, scheduler, folder, label_names=None):
    """Saves the pipeline of the network after `step` steps; a folder of this name is whole."""
    with replacing_folder(folder) as temporary:
        _write_pipeline(config, step, unet, scheduler, temporary, label_names)


def _write_pipeline(config, step, unet, scheduler, folder, label_names):
    pipeline_of(config, unet, scheduler).save_pretrained(folder)
    told = dataclasses.asdict(config)
    for key in ("output_dir", "resume", "push_to_hub", "hub_private", "license"):
        del told[key]  # of nobody else's concern
    local = os.path.exists(config.data)
    for key in ("data", "eval_data", "init_from"):
        if told[key]:
            told[key] = public_name(told[key])
    told["hub_dataset"] = None if local or config.data in BUILT_IN else config.data
    told["images"], told["label_names"] = config.split_size, label_names
    told["weights"] = weights_digest(folder)
    told["versions"] = {module.__name__: module.__version__ for module in MODULES}
    told["steps"] = step
    write_text(folder / "training.json", json.dumps(told, indent=2) + "\n")
    pictures = {"training.png": "curves.png", "samples.png": f"samples/{step:07d}.png"}  # of these weights
    for name, source in pictures.items():
        if (folder.parent / source).is_file():
            shutil.copy(folder.parent / source, folder / name)
    try:
        write_model_card(folder)
    except ValueError as error:  # a pipeline without a card is worth more than none
        tell(f"the pipeline has no model card: {' '.join(str(error).split())}")


def main(config, dry_run: bool):
    try:
        resolve(config)
        with torch.device("meta"):  # no weights yet, but every check
            unet, *_ = build(config)
    except (ValueError, TypeError, MissingExtra) as error:
        sys.exit(f"train.py: {' '.join(str(error).split())}")
    if dry_run:
        print(as_yaml(config), end="")
        parameters, images = unet.num_parameters(), config.batch_size * config.gradient_accumulation_steps
        print(f"# {parameters:,} parameters, {config.steps:,} steps of {images:,} images a process")
        # float32: weights, gradient, two moments of Adam, average
        print(
            f"# {5 * 4 * parameters / 2**30:.2f} GiB for weights, gradient, optimizer and average; activations on top"
        )
        return
    run("train.py", train, config)
