"""The training loop: one for every loss."""

from pathlib import Path

import torch
from accelerate.utils import set_seed

from ddpm_hf.training.batches import Position, batches, open_loader
from ddpm_hf.training.checkpoints import Checkpoints
from ddpm_hf.training.classifier import ClassifierTask
from ddpm_hf.training.command_line import config_of
from ddpm_hf.training.config import ClassifierConfig, RunConfig, TrainConfig
from ddpm_hf.training.devices import compile_network, is_compiled, leave, open_accelerator
from ddpm_hf.training.diffusion import DiffusionTask
from ddpm_hf.training.finite_steps import FiniteSteps
from ddpm_hf.training.header import print_header
from ddpm_hf.training.inputs import count_images, open_data, open_images, record_data
from ddpm_hf.training.interrupts import Interrupted, Interrupts, Stopped, name_of
from ddpm_hf.training.log import Log
from ddpm_hf.training.messages import print_above_progress_bar
from ddpm_hf.training.optimizer import prepare, set_learning_rates
from ddpm_hf.training.output import OutputFolder
from ddpm_hf.training.plan import with_plan
from ddpm_hf.training.resolve import resolve, show_settings_of_run
from ddpm_hf.training.resume import already_complete, checkpoint_to_resume
from ddpm_hf.training.task import BatchLoss, Task, train_on_batch
from ddpm_hf.training.trackers import open_trackers

TASKS: dict[type[RunConfig], type[Task]] = {TrainConfig: DiffusionTask, ClassifierConfig: ClassifierTask}


def train(config: RunConfig | str | None = None, /, **keys) -> Path:
    """Train a network and return the folder in which it is saved, `<output_dir>/pipeline` or `<output_dir>/classifier`.

        train(data="my_folder")                  # all other settings are chosen from the images
        train("digits", steps=100)               # a preset or a YAML file, and keys that override it
        train(TrainConfig(...))                  # every setting is explicit

    A run that was interrupted resumes from its newest checkpoint.

    Args:
        config: a config, or the name of a preset or YAML file.
        keys: fields of `TrainConfig`.

    Raises:
        ConfigError: a key or value is invalid, or the data cannot be read; one line.
        Stopped: a signal ended the run, or its gradients were not finite for many steps.
    """
    if not isinstance(config, RunConfig):
        config = config_of(TrainConfig, config=config, **keys)
    elif keys:
        raise TypeError(f"give a config or keys, not both: {', '.join(keys)}")
    config = resolve(config)
    with torch.device("meta"):
        print_header(config, TASKS[type(config)](config).network.num_parameters())
    show_settings_of_run(config)
    accelerator = open_accelerator(config)
    config = with_plan(config, accelerator, TASKS[type(config)])
    with OutputFolder(config, accelerator) as folder:
        run = Run(config, accelerator, folder)
        run.train()
        run.finish()
    return Path(config.output_dir, config.RESULT)


class Run:
    """A training run, from its first step or a checkpoint to its last step."""

    def __init__(self, config: RunConfig, accelerator, folder: OutputFolder):
        self.config, self.accelerator = config, accelerator
        device, checkpoint = accelerator.device, checkpoint_to_resume(config)
        set_seed(config.seed, device_specific=True)
        self.task = task = TASKS[type(config)](config)
        data = task.open_inputs(open_images(config), accelerator, is_new=checkpoint is None)
        dataset = open_data(config, data, accelerator.process_index, accelerator.num_processes)
        record_data(task.network, config, data.class_names)
        self.loader = open_loader(dataset, config, accelerator)
        self.network, self.optimizer, self.lr_schedule = prepare(task, accelerator)

        self.log = Log(config, folder, accelerator, task.t_end, task.LOG_COLUMNS)
        self.interrupts = Interrupts(accelerator)
        self.position = Position(images=count_images(dataset))
        self.finite = FiniteSteps(device, config.max_steps_skipped)
        shared = task.begin(accelerator, dataset, self.log, self.interrupts)
        if is_compiled(config):
            compile_network(task.network, config, device)
        if accelerator.is_main_process:
            folder.begin()
        if config.trackers:
            open_trackers(config, accelerator)
        shared |= dict(lr_schedule=self.lr_schedule, finite=self.finite)
        per_process = dict(at=self.position, log=self.log)
        self.checkpoints = Checkpoints(config, accelerator, per_process=per_process, facts=data.facts(config), **shared)
        if checkpoint:
            checkpoint = self.checkpoints.load(checkpoint)
            set_learning_rates(config, self.optimizer, self.lr_schedule)
        is_complete = self.position.step == config.steps and self.checkpoints.measured
        self.log.begin(self.position.step, checkpoint, is_complete)
        if is_complete and accelerator.is_main_process:
            print_above_progress_bar(f"{config.output_dir} is {already_complete(config)}")

    def train(self) -> None:
        """Train by Algorithm 1 of Ho et al. 2020, with the loss of the task."""
        config, accelerator, network, optimizer = self.config, self.accelerator, self.network, self.optimizer
        with self.log, self.interrupts:
            if not self.checkpoints.measured:
                self.measure()
            stream = batches(self.loader, config, self.position)
            while self.position.step < config.steps:
                batch = next(stream)
                loss, norm = train_on_batch(self.task, network, optimizer, accelerator, batch, self.finite)
                self.log.add(loss.x_start, loss.t, loss.losses, loss.weights, *loss.log_columns)
                if norm is not None:
                    self.after_step(loss, norm)

    def after_step(self, loss: BatchLoss, norm: torch.Tensor) -> None:
        """Average, log, measure and save after an optimizer step.

        Raises:
            Stopped: a signal ends the run, or too many gradients in a row were not finite.
        """
        values = {"learning_rate": self.optimizer.param_groups[0]["lr"]}
        self.lr_schedule.step()
        values |= self.task.after_step()
        self.position.step += 1
        if self.log.step(self.position.step, norm, steps_skipped=self.finite.skipped, **values):
            self.finite.raise_if_lost(norm, loss.t, loss.losses, self.position)
        is_best, self.checkpoints.measured = False, True
        try:
            is_best = self.measure()
        except Interrupted:
            self.checkpoints.measured = False
        self.save(is_best)

    def measure(self) -> bool:
        """Take the measurements that are due; return whether they are the best so far."""
        value = self.task.measure(self.position.step)
        return value is not None and self.checkpoints.is_best(self.position.step, value)

    def save(self, is_best: bool) -> None:
        """Write the checkpoint that is due after this step; raise Stopped where a signal ends the run."""
        config, step = self.config, self.position.step
        is_last = step == config.steps
        signal = self.interrupts.stop(step) if not is_last or not self.checkpoints.measured else None
        is_due = config.checkpoint_every and (step % config.checkpoint_every == 0 or is_last or is_best)
        saved = self.checkpoints.save(step) if is_due or signal else False
        if saved and self.accelerator.is_main_process and (signal or not is_last):
            self.task.save_at_checkpoint(step, interrupted=bool(signal))
        if signal:
            raise Stopped(
                f"stopped by {name_of(signal)} after step {step}; the same command resumes from "
                f"{'there' if saved else 'the last checkpoint'}{self.task.how_to_publish()}",
                status=128 + signal,
            )

    def finish(self) -> None:
        """Save and publish what was trained, and end the group of processes."""
        is_main = self.accelerator.is_main_process
        if is_main:
            self.task.save(self.position.step)
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory(self.network)
        self.network = None
        leave()
        if is_main:
            print(f"saved {self.task.saved_as()}")
        if address := self.task.publish():
            print(f"published {address}")
