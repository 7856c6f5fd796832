"""Arguments, presets and YAML files -> the config of a run. Imports nothing slow: most mistakes end here, in a moment."""

import dataclasses
import difflib
import os
import re
import types
import typing
from pathlib import Path

from ddpm_hf.arguments import shown
from ddpm_hf.files.paths import normal_name
from ddpm_hf.files.strict_yaml import parse_yaml, read_yaml
from ddpm_hf.training.checks import check, typed, types_of
from ddpm_hf.training.config import ClassifierConfig, ConfigError, RunConfig, TrainConfig, keys_of, nearest, sections_of
from ddpm_hf.training.other_scripts import ALIASES, NOT_NEEDED
from ddpm_hf.training.resume import check_same_run, find_checkpoint, with_plan_of_run, with_values_of_run
from ddpm_hf.training.sections import section_keys
from ddpm_hf.training.usage import usage


def load_config(argv: list[str], kind: type[RunConfig] = TrainConfig, program: str = "") -> tuple[RunConfig, bool]:
    """`--config digits --steps 10 --unet.dropout 0.1` -> the config, and whether `--dry_run` was given.

    `resolve` fills in what the data and a base pipeline decide; where a run is resumed, its checkpoint already has.

    Args:
        program: the command's name in messages and in --help; empty: the name of the entry script.

    Raises:
        ConfigError: an unknown key (with the nearest one), a wrong type, a missing value or file.
        SystemExit: `--help` was given, and is printed.
    """
    if {"-h", "--help"} & set(argv):
        print(usage(kind, program))
        raise SystemExit(0)
    arguments, dry_run = _read_arguments(argv, kind)
    source = arguments.pop("config", None if "data" in arguments else "digits")
    values, explicit, preset = _read_config(source, kind) if source is not None else ({}, set(), None)
    annotations = {field.name: field.type for field in keys_of(kind)}
    for key, text in arguments.items():
        section, _, name = key.partition(".")
        if name:
            keys = values.get(section) or {}
            if not isinstance(keys, dict):
                raise ConfigError(f"{section}={shown(keys)} must hold keys and values")
            values[section] = {**keys, name: _parse(text)}
        else:
            values[key] = _parse(text, types_of(annotations[key]))
        explicit |= {key} if name else _names({key: values[key]}, kind)
    return _make_config(kind, values, explicit, preset, program), dry_run


def config_of(kind: type[RunConfig] = TrainConfig, *, config: str | None = None, **values) -> RunConfig:
    """The config of a run from Python: `config` is a preset or a YAML file, the other keys override its own.

    As on the command line, what neither names is decided by the data: `config_of(data="my_folder", steps=1000)`.

    Raises:
        ConfigError: as `load_config`.
    """
    source = config or (None if "data" in values else "digits")
    base, explicit, preset = _read_config(source, kind) if source is not None else ({}, set(), None)
    return _make_config(kind, _merged(base, values, kind), explicit | _names(values, kind), preset)


def _make_config(kind, values, explicit, preset, program=""):
    """The config with these values, checked, and compared with the run that it resumes, if any."""
    annotations = {field.name: field.type for field in keys_of(kind)}
    for key, value in values.items():
        if key not in annotations:
            raise _unknown(key, kind)
        values[key] = typed(key, value, annotations[key])
    for key in ("data", "eval_data", "init_from", "pipeline", "output_dir"):
        if values.get(key):
            values[key] = normal_name(values[key])
    if preset is None and "output_dir" not in values:
        values["output_dir"] = _output_dir_for(values.get("data", "digits"), kind)
    config = kind(**values, preset=preset, explicit=frozenset(explicit), program=program)
    config = dataclasses.replace(config, resolved=preset is not None and not config.base_pipeline)
    check(config)
    _check_section_keys(config)
    config = with_plan_of_run(config)
    if checkpoint := find_checkpoint(config):
        config = with_values_of_run(config, checkpoint)
    check_same_run(config, checkpoint)
    if checkpoint:
        check(config)
    return config


def _check_section_keys(config):
    """Raise ConfigError for a key that a section does not have with any process; `resolve` checks those of the run's own."""
    for section in sections_of(config):
        known = section_keys(type(config), section)
        of_process = section_keys(type(config), section, getattr(config, "process", "ddpm")) or known
        for key in getattr(config, section):
            if key not in known | {*config.DERIVED}:
                raise ConfigError(f"unknown key {shown(f'{section}.{key}')}{nearest(key, sorted(of_process))}")


def _output_dir_for(data, kind):
    path = Path(os.path.abspath(data))
    name = re.sub(r"[^\w.-]+", "-", path.stem if os.path.isfile(path) else path.name) or "data"
    return f"runs/{name}{'-classifier' if kind is ClassifierConfig else ''}"


def _read_arguments(argv, kind):
    """Return the text of each key, and whether --dry_run was given."""
    annotations = {field.name: field.type for field in keys_of(kind)}
    arguments, words, dry_run = {}, list(argv), False
    while words:
        word = words.pop(0)
        if not re.match(r"--[A-Za-z]", word):
            raise ConfigError(f"cannot read {shown(word)}; arguments are --key value, see --help")
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if key == "dry_run" and not equals:
            dry_run = True
            continue
        section, dot, name = key.partition(".")
        if dot and not name:
            raise ConfigError(
                f"--{key} names no key of {shown(section)}; give one, as in --{sections_of(kind)[0]}.dropout"
            )
        if name and section not in sections_of(kind):
            raise ConfigError(
                f"--{key}: only {' and '.join(sections_of(kind))} have keys of their own{nearest(section, sections_of(kind))}"
            )
        if key != "config" and section not in annotations:
            raise _unknown(key, kind)
        if not equals:
            if words and not re.match(r"--[A-Za-z]", words[0]):
                text = words.pop(0)
            elif annotations.get(key) is bool:
                text = "true"
            else:
                raise ConfigError(f"--{key} has no value")
        if key in ("config", "data") and key in arguments:
            remedy = "name one as `base:` of the other" if key == "config" else "a run has one data set; give one"
            raise ConfigError(f"--{key} {arguments[key]} and --{key} {text} were given; {remedy}")
        arguments[key] = text
    return arguments, dry_run


def _unknown(key, kind):
    """The error for an unknown key, which may be one of a section, or of another training script."""
    if key in NOT_NEEDED:
        return ConfigError(f"unknown key {shown(key)}; leave it out: {NOT_NEEDED[key]}")
    alias = ALIASES.get(key, "")
    if alias.partition(".")[0] in sections_of(kind):
        return ConfigError(f"unknown key {shown(key)}; did you mean {alias!r}?")
    for section in sections_of(kind):
        if key in section_keys(kind, section):
            return ConfigError(f"unknown key {shown(key)}; did you mean '{section}.{key}'?")
    close = nearest(key, (*(field.name for field in keys_of(kind)), "config", "dry_run"))
    return ConfigError(f"unknown key {shown(key)}{close if 'mean' in close else '; --help lists all keys'}")


def _names(values, kind):
    """{"steps": 1, "unet": {"dropout": 0.1}} -> {"steps", "unet.dropout"}."""
    names = set()
    for key, value in values.items():
        is_section = key in sections_of(kind) and isinstance(value, dict)
        names |= {f"{key}.{name}" for name in value} if is_section else {key}
    return names


def _read_config(source, kind, chain_of_bases=()):
    """The values of a preset or file over those of its `base`; the keys that the user's files give; the preset, if any."""
    is_preset = not source.endswith((".yaml", ".yml"))
    path = kind.PRESETS / f"{source}.yaml" if is_preset else Path(os.path.expanduser(source))
    source_text = f"config {shown(source)}" if not chain_of_bases else f"base of {chain_of_bases[-1]}: {shown(source)}"
    if not os.path.isfile(path):
        presets = sorted(preset.stem for preset in kind.PRESETS.glob("*.yaml"))
        if os.path.isdir(source):
            hint = f"is a folder; its pictures are given by --data {source}"
            if (Path(source) / "config.yaml").is_file():
                hint = f"is a folder; give {Path(source) / 'config.yaml'}"
        elif not is_preset:
            hint = "does not exist"
        else:
            close = difflib.get_close_matches(source, presets, n=1)
            hint = "is neither a .yaml file nor a preset; "
            hint += f"did you mean {close[0]!r}? " if close else ""
            hint += f"presets: {', '.join(presets)}"
        raise ConfigError(f"{source_text} {hint}")
    if path.resolve() in (file.resolve() for file in chain_of_bases):
        raise ConfigError(f"{source_text} leads back to itself: {' -> '.join(map(str, (*chain_of_bases, path)))}")
    values = _read_yaml(path)
    base = values.pop("base", None)
    names = set() if is_preset else _names(values, kind)
    if base is None:
        return values, names, source if is_preset else None
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base={shown(base)} must be a preset or a .yaml file")
    if base.endswith((".yaml", ".yml")):
        base = str(path.parent / os.path.expanduser(base))
    inherited, explicit, preset = _read_config(base, kind, (*chain_of_bases, path))
    return _merged(inherited, values, kind), explicit | names, preset


def _merged(inherited, values, kind):
    """The values over those that are inherited; a section is merged key by key."""
    merged = inherited | values
    for section in sections_of(kind):
        if isinstance(values.get(section), dict) and isinstance(inherited.get(section), dict):
            merged[section] = inherited[section] | values[section]
    return merged


def _read_yaml(path):
    try:
        values = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not a YAML file that can be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, one a line")
    return values


def _parse(text, kinds=()):
    """The value of an argument; text stays as it is: YAML would read "no", "2024" or "run #2" as something else."""
    if str in kinds:
        return None if text in ("", "~", "null") and types.NoneType in kinds else text
    try:
        value = parse_yaml(text)
    except ValueError:
        value = text
    is_list = kinds and all(typing.get_origin(kind) is list for kind in kinds)
    if is_list and not isinstance(value, list) or isinstance(value, str) and "," in text:
        entries = [entry.strip() for entry in text.split(",", 1000) if entry.strip()]
        return entries if list[str] in kinds else [_parse(entry) for entry in entries]
    return value
