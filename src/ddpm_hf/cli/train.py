"""`ddpm-hf train` and `ddpm-hf train-classifier`: data -> a trained model."""

import sys

from ddpm_hf.extras import MissingExtra, require_extra
from ddpm_hf.training.command_line import load_config
from ddpm_hf.training.config import ClassifierConfig, ConfigError, TrainConfig


def main(command: str, argv: list[str], program: str) -> None:
    kind = TrainConfig if command == "train" else ClassifierConfig
    try:
        config, dry_run = load_config(with_data_option(argv, kind), kind, program)
        for module in ("datasets", "matplotlib", "psutil"):
            require_extra(module, "train", "training runs")
    except (ConfigError, MissingExtra) as error:
        sys.exit(f"{program}: {error}")
    from ddpm_hf.training.launch import main as train

    train(config, dry_run)


def with_data_option(argv: list[str], kind: type[TrainConfig] | type[ClassifierConfig]) -> list[str]:
    """The arguments with --data before a first word that is the data: `my_folder --steps 10`."""
    return ["--data", *argv] if argv and not argv[0].startswith("-") else argv
