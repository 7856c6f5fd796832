"""The options of other training scripts, above all diffusers' train_unconditional.py, and our keys in their place.

docs/from-train-unconditional.md has the same table for people.
"""

# their name -> our key
ALIASES = {
    "epochs": "steps", "num_epochs": "steps", "iterations": "steps", "max_train_steps": "steps", "max_steps": "steps",
    "bs": "batch_size", "train_batch_size": "batch_size", "eval_batch_size": "sample_count", "lr": "learning_rate",
    "wd": "weight_decay", "adam_weight_decay": "weight_decay", "adam_beta1": "adam_betas", "adam_beta2": "adam_betas",
    "warmup": "lr_warmup_steps", "lr_scheduler": "lr_schedule", "ema": "ema_decay", "ema_max_decay": "ema_decay",
    "fp16": "mixed_precision", "bf16": "mixed_precision", "precision": "mixed_precision", "grad_clip": "max_grad_norm",
    "workers": "num_workers", "dataloader_num_workers": "num_workers", "dataset": "data", "dataset_name": "data",
    "train_data_dir": "data", "data_dir": "data", "path": "data", "resolution": "image_size", "size": "image_size",
    "center_crop": "crop", "flip": "random_flip", "preserve_input_precision": "scheduler.levels",
    "output": "output_dir", "out": "output_dir", "save_dir": "output_dir", "resume_from_checkpoint": "resume",
    "report_to": "trackers", "logger": "trackers", "log_with": "trackers", "logging_steps": "log_every",
    "checkpointing_steps": "checkpoint_every", "save_every": "checkpoint_every", "save_model_epochs": "checkpoint_every",
    "checkpoints_total_limit": "keep_checkpoints", "save_images_epochs": "sample_every", "num_samples": "sample_count",
    "pretrained": "init_from", "pretrained_model_name_or_path": "init_from", "model_config_name_or_path": "init_from",
    "preset": "config", "hub_model_id": "push_to_hub", "hub_private_repo": "hub_private",
    "ddpm_num_steps": "scheduler.num_train_timesteps", "ddpm_num_inference_steps": "sample_steps",
    "ddpm_beta_schedule": "scheduler.beta_schedule", "prediction_type": "scheduler.prediction_type",
}  # fmt: skip

# their name -> why there is no such key
NOT_NEEDED = {
    "dataset_config_name": "only the default configuration is read; write another with `save_to_disk` and give its folder",
    "cache_dir": "the environment variable HF_HOME sets the cache",
    "overwrite_output_dir": "a folder that holds another run is never overwritten; remove it or give another output_dir",
    "adam_epsilon": "it is 1e-8",
    "use_ema": "averaged weights are always kept; ema_decay sets their decay",
    "ema_inv_gamma": "the decay rises as (1 + step) / (10 + step) to ema_decay",
    "ema_power": "the decay rises as (1 + step) / (10 + step) to ema_decay",
    "enable_xformers_memory_efficient_attention": "PyTorch's scaled_dot_product_attention needs as little memory",
    "logging_dir": "tensorboard's files are in output_dir",
    "hub_token": "run `hf auth login`, or set HF_TOKEN",
    "local_rank": "the launcher sets it",
}
