"""The commands: arguments are read and checked before anything slow is imported."""

import sys

from ddpm_hf.training.config import ClassifierConfig, ConfigError, TrainConfig, load_config


def train(argv: list[str]) -> None:
    """train.py: trains a network of a diffusion process."""
    _train(argv, TrainConfig)


def train_classifier(argv: list[str]) -> None:
    """train_classifier.py: trains a classifier of noisy images."""
    _train(argv, ClassifierConfig)


def _train(argv, kind):
    try:
        config, dry_run = load_config(argv, kind)
    except ConfigError as error:
        sys.exit(f"{kind.PROGRAM}: {error}")
    if kind is ClassifierConfig:
        from ddpm_hf.training.classifier import main
    else:
        from ddpm_hf.training.diffusion import main
    main(config, dry_run)


def sample(argv: list[str]) -> None:
    """sample.py: a sheet of samples."""
    from ddpm_hf.evaluation.sample import main

    _run("sample.py", main, argv)


def evaluate(argv: list[str]) -> None:
    """evaluate.py: bits/dim."""
    from ddpm_hf.evaluation.evaluate import main

    _run("evaluate.py", main, argv)


def push(argv: list[str]) -> None:
    """push.py: publishes a pipeline."""
    from ddpm_hf.hub.push import main

    _run("push.py", main, argv)


def _run(program, main, argv):
    import tarfile

    from ddpm_hf.hub.upload import HubError
    from ddpm_hf.likelihood.ode import OdeStopped

    try:
        main(argv)
    except (ValueError, OSError, ImportError, OdeStopped, HubError, tarfile.TarError) as error:
        sys.exit(f"{program}: {' '.join(str(error).split())}")
