"""Training of a diffusion model (Ho, Jain, Abbeel 2020, Algorithm 1), in discrete or continuous time."""

from pathlib import Path

import torch

from ddpm_hf.arguments import shown
from ddpm_hf.data.pixels import pixels_to_batch
from ddpm_hf.extras import require_extra
from ddpm_hf.likelihood.ode import dequantized
from ddpm_hf.likelihood.solver import check_network
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.training.averages import Average, evaluating
from ddpm_hf.training.config import ConfigError, TrainConfig, image_size, nearest
from ddpm_hf.training.errors import PIPELINE_ERRORS, as_config_error
from ddpm_hf.training.from_pipeline import check_class_names
from ddpm_hf.training.inputs import check_pixels, held_out_images, some_training_images
from ddpm_hf.training.losses import DiffusionObjective, ScoreObjective, drop_labels
from ddpm_hf.training.low_resolution import conditioned, in_channels, make_pipeline, pipeline_class
from ddpm_hf.training.measurements import held_out_bits_per_dim, held_out_loss
from ddpm_hf.training.messages import warn_on_write_error
from ddpm_hf.training.optimizer import check_schedule
from ddpm_hf.training.processes import make_scheduler
from ddpm_hf.training.publisher import Publisher
from ddpm_hf.training.sample_metrics import SampleMetrics
from ddpm_hf.training.saving import save_pipeline
from ddpm_hf.training.sheets import Sheets
from ddpm_hf.training.task import BatchLoss, Task
from ddpm_hf.training.timesteps import TIMESTEPS, ContinuousTimes
from ddpm_hf.training.trackers import check_trackers


class DiffusionTask(Task):
    """A U-Net that predicts epsilon, x_0 or the score, with a sampler of timesteps and averaged weights."""

    def __init__(self, config: TrainConfig):
        self.config = config
        check_schedule(config)
        with torch.device("cpu"):  # a config is checked with its network, but not its process, on the meta device
            self.scheduler = make_scheduler(config)
            _check_sample_steps(config, self.scheduler)
        check_pixels(config)
        check_trackers(config.trackers)
        require_extra("matplotlib", "train", "plots")
        self.network = DDPMUNet(
            sample_size=image_size(config),
            in_channels=in_channels(config),
            out_channels=config.channels * (2 if self.scheduler.learns_variance else 1),
            **config.unet | with_null_class(config),
        )
        self.network.reset_parameters(config.init)
        if config.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self._make_objective()
        self.t_end = self.objective.end

    def _make_objective(self):
        config = self.config
        if self.scheduler.is_continuous:
            sde = self.scheduler.sde
            check_network(self.network, sde, config.channels)
            with torch.device("cpu"):
                sampling = config.timesteps
                self.timesteps = ContinuousTimes(
                    sde, sampling == "importance", low_discrepancy=sampling == "low_discrepancy"
                )
            self.objective = ScoreObjective(sde, config.weighting or "variance")
        elif config.timesteps in TIMESTEPS:
            self.timesteps = TIMESTEPS[config.timesteps](self.scheduler)
            self.objective = DiffusionObjective(self.scheduler, config.loss, config.vlb_weight, config.weighting)
        else:
            raise ConfigError(f"timesteps={shown(config.timesteps)} is not known{nearest(config.timesteps, TIMESTEPS)}")

    def open_inputs(self, data, accelerator, is_new):
        config, self.data = self.config, data
        if config.init_from and is_new:
            check_class_names(config, data.class_names)
        self.held_out = self.trained_on = None
        if config.eval_every:
            self.held_out = held_out_images(config, data.class_names)
            self.trained_on = some_training_images(config, data)
        self.sample_metrics = None
        if config.eval_metrics:
            self.sample_metrics = SampleMetrics(config, self.network, self.scheduler, accelerator)
        # after the data was opened: no repository is created for data that does not exist
        self.publisher = Publisher(config) if config.push_to_hub and accelerator.is_main_process else None
        if config.init_from and is_new:
            with as_config_error(f"init_from={config.init_from!r}", PIPELINE_ERRORS):
                base = pipeline_class(config).from_pretrained(config.init_from)
                self.network.load_state_dict(base.unet.state_dict())
        return data

    def begin(self, accelerator, dataset, log, interrupts):
        self.accelerator, self.log, self.interrupts = accelerator, log, interrupts
        # the weights are the same in all processes by now
        self.average = Average(self.network.parameters(), decay=self.config.ema_decay, foreach=True)
        options = dict(accelerator=accelerator, log=log, interrupts=interrupts, average=self.average)
        self.sheets = Sheets(self.config, self.network, self.scheduler, dataset, **options)
        if self.sample_metrics:
            self.sample_metrics.open_reference(self.data)
        return {"ema": self.average, "timesteps": self.timesteps}

    def loss(self, network, batch):
        config, levels = self.config, self.scheduler.levels
        x_start = pixels_to_batch(batch["pixels"], levels, config.random_flip)
        if config.dequantize:
            x_start = dequantized(x_start, levels)
        t, weights = self.timesteps.sample(len(x_start), x_start.device)
        labels = batch.get("class_labels")
        if config.label_dropout:
            labels = drop_labels(labels, self.network.null_class, config.label_dropout)
        losses = self.objective(conditioned(config, network, x_start), x_start, labels, t)
        self.timesteps.update(t, losses)
        return BatchLoss(x_start, t, losses, weights)

    def after_step(self):
        self.average.step(self.network.parameters())
        return {"ema_decay": self.average.cur_decay_value}

    def measure(self, step):
        config, rows, best = self.config, [], None
        is_last = step == config.steps
        # a preset's sheet may take longer than a short run of it
        if config.sample_every and (step % config.sample_every == 0 or (is_last and config.preset is None)):
            rows.append(self.sheets.draw(step))
        if config.eval_every and (step % config.eval_every == 0 or is_last):
            self.log.begin_work(step, f"measuring {len(self.held_out[0])} held-out images")
            with evaluating(self.network, self.average):
                row = held_out_bits_per_dim(config, self.interrupts, self.network, self.scheduler, *self.held_out)
                images = self.held_out, self.trained_on
                row |= held_out_loss(config, self.interrupts, self.network, self.objective, *images)
                if self.sample_metrics:
                    self.log.begin_work(step, f"drawing {config.eval_samples:,} samples for fd")
                    row |= self.sample_metrics.measure(self.interrupts)
            rows.append(row)
            best = row[config.best_by]
        for row in rows:  # none of them where a signal came meanwhile: then they are measured again
            self.log.note(step, **row)
        return best

    def time_sample_metrics(self, accelerator):
        if not self.config.eval_metrics:
            return super().time_sample_metrics(accelerator)
        return SampleMetrics(self.config, self.network, self.scheduler, accelerator).time()

    def save_at_checkpoint(self, step, interrupted):
        self.log.plot()
        with warn_on_write_error("the pipeline could not be written"):
            self.save(step)
            if self.publisher and not interrupted:
                self.publisher.push(step)

    def save(self, step):
        facts = dict(class_names=self.data.class_names, split_size=self.data.split_size)
        facts["held_out_images"] = self.held_out and len(self.held_out[0])
        with evaluating(self.network, self.average):
            pipeline = make_pipeline(self.config, self.network, self.scheduler)
            save_pipeline(pipeline, self._folder, config=self.config, step=step, **facts)

    def saved_as(self):
        return str(self._folder)

    def publish(self):
        return self.publisher.finish() if self.publisher else None

    def how_to_publish(self):
        return self.publisher.how_to_publish() if self.publisher else ""

    @property
    def _folder(self):
        return Path(self.config.output_dir, self.config.RESULT)


def with_null_class(config: TrainConfig) -> dict:
    """The keys of a network whose last label means "no class", where label dropout needs one."""
    classes = config.unet.get("num_class_embeds")
    return dict(num_class_embeds=classes + 1, _ddpm_hf={"null_class": classes}) if config.label_dropout else {}


def _check_sample_steps(config, scheduler):
    if config.sample_steps is None and not config.sample_every and not config.eval_metrics:
        return
    try:
        steps = config.sample_steps or scheduler.config.num_train_timesteps
        type(scheduler).from_config(scheduler.config).set_timesteps(steps)
    except ValueError as error:
        raise ConfigError(str(error).replace("num_inference_steps", "sample_steps")) from None
