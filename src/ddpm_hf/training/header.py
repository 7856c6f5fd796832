"""What a run prints before anything else: its data, its network, its length and its folder."""

from ddpm_hf.training.config import RunConfig
from ddpm_hf.training.messages import print_above_progress_bar
from ddpm_hf.training.rank import is_main_process


def print_header(config: RunConfig, parameters: int) -> None:
    """Print a line with what is trained, or where values were chosen for the data, a line for each of them.

    Args:
        parameters: of the network.
    """
    if is_main_process():
        lines = _chosen(config, parameters) if config.facts else [_in_one_line(config, parameters)]
        print_above_progress_bar("\n".join(lines))


def _chosen(config, parameters):
    first, *rest = config.facts
    return [
        f"{config.program}: data={config.data!r}: {first}",
        *(f"  {fact}" for fact in (*rest, f"{_millions(parameters)}, output_dir={config.output_dir}")),
        "Each can be given as --key value; --dry_run shows all keys and stops.",
    ]


def _in_one_line(config, parameters):
    size = config.image_size if isinstance(config.image_size, int) else ",".join(map(str, config.image_size))
    planned = config.minutes is not None and not config.planned
    parts = [
        *([f"preset {config.preset}"] if config.preset else []),
        f"data={config.data!r}",
        f"image_size={size}",
        f"channels={config.channels}",
        *([f"{config.classes} classes"] if config.classes and config.label_column else []),
        _millions(parameters),
        f"minutes={config.minutes:g}" if planned else f"steps={config.steps}",
        f"batch_size={config.batch_size}",
        f"output_dir={config.output_dir}",
    ]
    return f"{config.program}: {', '.join(parts)}"


def _millions(parameters):
    return f"{parameters / 1e6:.2f} M parameters"
