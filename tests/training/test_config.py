import dataclasses
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ddpm_hf import DDPMUNet, NoisyClassifier, VariationalDDPMScheduler
from ddpm_hf.training.checks import check
from ddpm_hf.training.command_line import load_config
from ddpm_hf.training.config import PRESETS, ClassifierConfig, ConfigError, TrainConfig, as_yaml, keys_of, values_of
from ddpm_hf.training.diffusion import DiffusionTask
from ddpm_hf.training.other_scripts import NOT_NEEDED
from ddpm_hf.training.resume import checkpoint_to_resume
from support.scripts import ROOT, script

TRAIN = ROOT / "training/train.py"


def load(*argv):
    return load_config(["--output_dir", "/tmp/there/is/no/such/folder", *argv])[0]


def assert_holds_what_the_file_says(config, path, but):
    """All values of a preset are those of its file, and the others are defaults."""
    defaults, file = values_of(type(config)()), yaml.safe_load(path.read_text())
    assert file["output_dir"].startswith("runs/") and file["steps"] >= 1000
    for key, value in values_of(config).items():
        if key not in {"output_dir", *but}:
            assert value == file.get(key, defaults[key]), key


# in the comment of a preset -> how the config has it
CLAIMS = {
    r"([\d.]+) (?:M|million) parameters": lambda config, value: (
        parameters(config) == pytest.approx(float(value) * 1e6, rel=0.5 / float(value))
    ),
    r"batch (\d+)(?! in all|\d)": lambda config, value: config.batch_size == int(value),
    r"(?:Adam|learning rate) ([\de-]+)": lambda config, value: config.learning_rate == float(value),
    r"EMA (0\.\d+)": lambda config, value: config.ema_decay == float(value),
    r"dropout (0\.\d+|0)": lambda config, value: config.unet["dropout"] == float(value),
    r"no (dropout)": lambda config, value: not config.unet.get("dropout"),
    r"(\d+)k steps": lambda config, value: config.steps == 1000 * int(value),
    r"([\d.]+)(?: million|M) steps": lambda config, value: config.steps == round(1e6 * float(value)),
    r"attention at (\d+)x\d+[ ,]": lambda config, value: attention_sides(config)[:1] == [int(value)],
    r"(clipping at 1)": lambda config, value: config.max_grad_norm == 1,
    r"(no\s+clipping)": lambda config, value: config.max_grad_norm == float("inf"),
    r"[^o] (flips)": lambda config, value: config.random_flip,
    r"no (flips)": lambda config, value: not config.random_flip,
    r"(learned variance)": lambda config, value: config.scheduler["variance_type"] == "learned_range",
    r"([\d,]+) steps\s+of the cosine schedule": lambda config, value: (
        (config.scheduler["beta_schedule"], config.scheduler["num_train_timesteps"])
        == ("cosine", int(value.replace(",", "")))
    ),
}


def parameters(config):
    with torch.device("meta"):
        return DiffusionTask(config).network.num_parameters()


def attention_sides(config):
    """Sides of the images on which the network has attention on the way down, the largest first."""
    return [config.image_size // 2**i for i, name in enumerate(config.unet["down_block_types"]) if "Attn" in name]


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_presets_name_their_source_and_load(preset, tmp_path):
    """Each holds its file's values, and the numbers that its comment names."""
    path = PRESETS / f"{preset}.yaml"
    data = ["--data", str(tmp_path)] if preset.endswith(("256", "imagenet64", "imagenet128")) else []
    config = load("--config", preset, *data)
    assert_holds_what_the_file_says(config, path, but={"data"} if data else ())
    lines = path.read_text().splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    assert lines[0].startswith("#")
    count = 0
    for pattern, is_so in CLAIMS.items():
        for value in re.findall(pattern, comment):
            count += 1
            assert is_so(config, value), (pattern, value)
    assert count >= 4 or not re.search(r"[A-Z]\w+ et al\.|& Dhariwal|Ho, Jain", comment)  # of a paper's settings


def test_command_line_beats_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "data: digits\nsteps: 7\nlearning_rate: 2e-4\nunet:\n  block_out_channels: [8, 16]\n  dropout: 0.2\n"
    )
    config = load(
        "--config", str(path), "--steps=9", "--unet.dropout", "0.5", "--image_size", "[8, 16]", "--random-flip", "true"
    )
    assert (config.steps, config.learning_rate, config.random_flip, config.image_size) == (9, 2e-4, True, [8, 16])
    assert config.unet == {"block_out_channels": [8, 16], "dropout": 0.5}
    assert load("--output_dir", "~/there/is/none").output_dir == str(Path.home() / "there/is/none")
    loaded = load("--mixed_precision", "no", "--data", "2024", "--background", "#00ff00", "--license", "null")
    assert (loaded.mixed_precision, loaded.data, loaded.background, loaded.license) == ("no", "2024", "#00ff00", None)
    assert load("--output_dir", "runs: 3/a #2").output_dir == "runs: 3/a #2"
    assert load("--unet.norm_eps", "1e-5").unet["norm_eps"] == 1e-5
    assert load("--ema_decay", "0").ema_decay == 0.0 and load("--sample_steps", "null").sample_steps is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stepz", "3"], "'stepz'; did you mean 'steps'"),
        (["--steps", "x"], r"steps='x' must be an integer in \[1, 1000000000000\]"),
        (["--steps", "1.5"], "steps=1.5"),
        (["--split", "train+" * 90], "split='train.*' must be text of at most 500 characters"),
        (["--steps", "true"], "steps=True"),
        (["--steps", "0"], r"steps=0 must be an integer in \[1,"),
        (["--steps"], "--steps has no value"),
        (["steps", "3"], "cannot read 'steps'"),
        (["--learning_rate", "-1"], r"learning_rate=-1 must be a number in \(0, 1e38\]"),
        (["--image_size", "9"], "image_size=9 must be a multiple of 2"),
        (["--image_size", "[8, 8, 8]"], "image_size"),
        (["--net.dropout", "1"], "--net.dropout"),
        (["--unet.", "1"], "--unet. names no key of 'unet'; give one, as in --unet.dropout"),
        (["--scheduler.=1"], "--scheduler. names no key"),
        (["--unet.in_channels", "3"], "unet.in_channels follows"),
        (["--data", "./no/such/folder"], "data='./no/such/folder' does not exist"),
        (["--data", "nothing.parquet"], "does not exist"),
        (["--config", "nope"], "presets: adm-imagenet128, adm-imagenet256"),
        (["--mixed_precision", "fp8"], "mixed_precision='fp8'"),
        (["--label_column", "label"], "go together"),
        (["--adam_betas", "[0.9]"], "adam_betas"),
        (["--adam_betas", "[0.9, 1.0]"], "adam_betas"),
        (["--learning_rate", "inf"], "learning_rate=inf"),
        (["--weight_decay", "-0.1"], "weight_decay=-0.1"),
        (["--adam_betas", "[0.9, x]"], r"adam_betas=\[0.9, 'x'\] must be a list of numbers in \[0, 1\)"),
        (["--channels", "2"], "channels=2"),
        (["--ema_decay", "1"], "ema_decay"),
        (["--num_workers", "100000"], "num_workers=100000 is more than 16 for each of"),
        (["--seed", "-1"], "seed=-1"),
        (["--seed", "2024-13-45"], "seed='2024-13-45' must be an integer"),
        (["--output_dir", ""], "output_dir is empty"),
        (["--resume", "0000004"], "resume='0000004' is neither auto, never nor a folder"),
        (["--unet.block_out_channels", "32"], "unet.block_out_channels=32 must be a list"),
        (["--dry_run=false"], "'dry_run'"),
        (
            ["--config", "digits", "--config", "my.yaml"],
            "--config digits and --config my.yaml were given; name one as `base:`",
        ),
    ],
)
def test_mistakes_are_reported_in_one_line(argv, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(*argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("lr", "learning_rate"), ("bs", "batch_size"), ("epochs", "steps"), ("output", "output_dir"), ("dataset", "data"),
        ("resolution", "image_size"), ("wd", "weight_decay"), ("warmup", "lr_warmup_steps"), ("mgn", "max_grad_norm"),
        ("max_train_steps", "steps"), ("report_to", "trackers"), ("dropout", "unet.dropout"), ("workers", "num_workers"),
        ("beta_schedule", "scheduler.beta_schedule"), ("learning-rates", "learning_rate"), ("confg", "config"),
        ("dryrun", "dry_run"),
    ],
)  # fmt: skip
def test_other_names_of_keys(word, key):
    with pytest.raises(ConfigError, match=f"unknown key '.*'; did you mean '{key}'"):
        load(f"--{word}", "1")


def test_every_option_of_train_unconditional_is_answered():
    """By the key that the page from-train-unconditional.md names, or by why none is needed."""
    page = (ROOT / "docs/from-train-unconditional.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in page.splitlines() if line.startswith("| `--")]
    options = {option: here for old, here, _ in rows for option in re.findall(r"`--(\w+)`", old)}
    assert len(options) == 45 and {option for option in options if options[option] == "none"} == NOT_NEEDED.keys()
    keys = {field.name for field in keys_of(TrainConfig)}
    for option, here in options.items():
        if here == "none":
            answer = f"unknown key '{option}'; leave it out: {NOT_NEEDED[option]}"
        elif (key := re.match(r"`--([\w.]+)", here)[1]) == option:
            assert key in keys
            continue
        else:
            answer = f"unknown key '{option}'; did you mean '{key}'?"
        for argv in ([f"--{option}"], [f"--{option}", "1"], [f"--{option}=1", "--steps", "3"]):
            with pytest.raises(ConfigError) as caught:
                load(*argv)
            assert str(caught.value) == answer


def test_ways_to_write_values():
    config = load("--streaming", "--steps", "5", "--trackers", "tensorboard", "--max_grad_norm=.inf", "--random_flip")
    assert (config.streaming, config.random_flip, config.trackers, config.steps) == (True, True, ["tensorboard"], 5)
    assert config.max_grad_norm == float("inf")
    config = load(
        "--trackers=tensorboard,wandb", "--adam_betas", "0.8, 0.9", "--image_size", "8,16", "--compile", "false"
    )
    assert (config.trackers, config.adam_betas, config.compile) == (["tensorboard", "wandb"], [0.8, 0.9], False)
    assert config.image_size == [8, 16] and load("--trackers", "[]").trackers == load("--trackers", "").trackers == []
    config = load(
        "--unet.block_out_channels", "8,16", "--unet.down_block_types", "DownBlock2D, DownBlock2D", "--compile"
    )
    assert config.unet["block_out_channels"] == [8, 16] and config.unet["down_block_types"] == ["DownBlock2D"] * 2
    assert config.compile and load("--scheduler.beta_start=-0.5").scheduler["beta_start"] == -0.5
    with pytest.raises(ConfigError, match="weight_decay=-1 must be a number in"):
        load("--weight_decay", "-1")


@pytest.mark.parametrize(("kind", "program"), [(TrainConfig, "train.py"), (ClassifierConfig, "train_classifier.py")])
def test_help(kind, program, capsys):
    """Each key with its default, those of the sections, and the presets; without the slow imports."""
    with pytest.raises(SystemExit) as end:
        load_config(["--steps", "x", "--help"], kind)
    output = capsys.readouterr().out
    assert end.value.code == 0 and f"usage: python training/{program}" in output
    for field in keys_of(kind):
        assert f"\n  --{field.name} " in output
    assert "--log_every INT                 steps between rows of metrics.jsonl (20)" in output
    assert "--weight_decay NUMBER" in output and f"({'0.0' if kind is TrainConfig else '0.05'})" in output
    cls = DDPMUNet if kind is TrainConfig else NoisyClassifier
    for key, parameter in inspect.signature(cls).parameters.items():
        default = "required"
        if parameter.default is not inspect.Parameter.empty:
            default = json.dumps(parameter.default, separators=(",", ":")).replace('"', "")
        assert key in kind.DERIVED or re.search(rf"[ ]{key}={re.escape(default)}\s", output), key
    for path in kind.PRESETS.glob("*.yaml"):
        assert re.search(rf"^  {path.stem} +\S", output, re.MULTILINE)
    code = "import sys; sys.argv = ['x', '-h']; from ddpm_hf.training import command_line\n"
    code += "try: command_line.load_config(['-h'])\nexcept SystemExit: "
    code += "print('torch' in sys.modules, 'diffusers' in sys.modules)"
    probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert probe.stdout.endswith("False False\n"), probe.stderr


def test_base(tmp_path):
    """A file says what differs from a preset, or from another file beside it."""
    (tmp_path / "a.yaml").write_text("base: mnist\nsteps: 7\nunet:\n  dropout: 0.2\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.yaml").write_text("base: ../a.yaml\nsteps: 9\nscheduler: {levels: 4}\n")
    config = load("--config", str(tmp_path / "sub/b.yaml"))
    mnist = load("--config", "mnist")
    assert (config.steps, config.preset, config.batch_size) == (9, "mnist", mnist.batch_size)
    assert config.unet == {**mnist.unet, "dropout": 0.2} and config.scheduler == {**mnist.scheduler, "levels": 4}
    assert config.explicit == {"steps", "unet.dropout", "scheduler.levels", "output_dir"}
    (tmp_path / "a.yaml").write_text("base: sub/b.yaml\n")
    for text, message in (
        ("base: sub/b.yaml", "leads back to itself: .*a.yaml -> .*b.yaml -> .*a.yaml"),
        ("base: mnits", "base of .*a.yaml: 'mnits' is neither a .yaml file nor a preset; did you mean 'mnist'"),
        ("base: none.yaml", "none.yaml' does not exist"),
        ("base: [mnist]", r"base=\['mnist'\] must be a preset or a .yaml file"),
    ):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message) as caught:
            load("--config", str(tmp_path / "a.yaml"))
        assert "\n" not in str(caught.value)


def test_what_is_no_config(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("steps: 1")
    for source, message in (
        ("cifar", "did you mean 'cifar10'"),
        (str(tmp_path), f"is a folder; its pictures are given by --data {tmp_path}"),
        (str(tmp_path / "run"), "is a folder; give .*run/config.yaml"),
        (str(tmp_path / "none.yaml"), "none.yaml' does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            load("--config", source)


def test_a_folder_with_another_run_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("steps: 1")
    load("--output_dir", str(tmp_path))  # stopped before its first checkpoint
    (tmp_path / "config.yaml").write_text(as_yaml(load("--output_dir", str(tmp_path))))
    load("--output_dir", str(tmp_path), "--seed", "7")  # nothing would be lost
    (tmp_path / "metrics.jsonl").write_text('{"step": 20}\n')
    config = load("--output_dir", str(tmp_path), "--log_every", "7")
    assert checkpoint_to_resume(config) is None
    message = f"^seed=7, but {tmp_path} was trained with 0; give that, or another output_dir$"
    with pytest.raises(ConfigError, match=message):
        load("--output_dir", str(tmp_path), "--seed", "7")
    load("--output_dir", str(tmp_path), "--data", "digits")  # what the data decides is compared once it is known
    with pytest.raises(ConfigError, match=message):
        checkpoint_to_resume(dataclasses.replace(config, seed=7))
    with pytest.raises(ConfigError, match="holds something already"):
        load("--output_dir", str(tmp_path), "--resume", "never")
    (tmp_path / "pipeline").mkdir()
    with pytest.raises(ConfigError, match="holds something already"):
        load("--output_dir", str(tmp_path))


def test_a_config_that_could_not_be_read_again(monkeypatch):
    """As one with the betas of a pipeline, whose file may be larger than a config's."""
    monkeypatch.setattr("ddpm_hf.files.strict_yaml.MAX_VALUES", 1200)
    scheduler = {"trained_betas": [0.01] * 1001}
    check(TrainConfig(scheduler=scheduler, unet={"block_out_channels": [8, 16]}))
    message = "^scheduler.trained_betas has 1,190 values, with which config.yaml could not be read again: more than 1200 values"
    with pytest.raises(ConfigError, match=message):
        check(TrainConfig(scheduler={"trained_betas": [0.01] * 1190}))


def test_files_of_the_users_own_are_no_run(tmp_path):
    output = ["--output_dir", str(tmp_path)]
    for files in (
        {"config.yaml": "my: precious"},
        {"config.yaml": "my: precious", "environment.json": "{}"},
        {"config.yaml": "a: [", "environment.json": "{}"},
        {"environment.json": '{"mine": 1}'},
        {"environment.json": "{}", "metrics.jsonl": ""},
    ):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match="^output_dir=.* holds something already; choose another$"):
            load(*output)
        for name in files:
            (tmp_path / name).unlink()


def test_the_checkpoint_to_resume(tmp_path):
    run, new = tmp_path / "run", str(tmp_path / "new")
    text = as_yaml(load("--output_dir", str(run)))
    for name in ("0000900", "12000000", ".0001000", "notes"):
        folder = run / "checkpoints" / name
        folder.mkdir(parents=True)
        (run / "config.yaml").write_text(text)
        (folder / "config.yaml").write_text(text)
        if name == "0000900":  # of this run, and none is newer
            assert checkpoint_to_resume(load("--output_dir", str(run))) == folder
    steps, older = ("--steps", "13000000", "--lr_schedule", "constant"), run / "checkpoints/0000900"
    text = text.replace("lr_schedule: cosine", "lr_schedule: constant")
    for folder in (run, run / "checkpoints/12000000", older):
        (folder / "config.yaml").write_text(text)
    config = load("--output_dir", str(run), *steps, "--sample_every", "7")
    assert checkpoint_to_resume(config) == run / "checkpoints/12000000"

    # from another run's checkpoint, and on from its own when it is killed
    config = load("--output_dir", new, "--resume", str(older), *steps)
    assert checkpoint_to_resume(config) == older
    newest = tmp_path / "new/checkpoints/0001000"
    newest.mkdir(parents=True)
    for folder in (tmp_path / "new", newest):
        (folder / "config.yaml").write_text(as_yaml(config))
    assert checkpoint_to_resume(config) == newest

    for argv, message in (
        (
            ["--resume", str(older)],
            "holds something already: newer checkpoints than resume=.*; to resume from an older one give",
        ),
        (["--resume", str(run / "checkpoints/none")], "resume=.*none' is neither auto, never nor"),
        (["--resume", "always"], "resume='always' is neither"),
        (["--resume", "never"], "holds something already"),
        (["--seed", "3"], r"seed=3, but .*12000000 was trained with 0; give that"),
        (
            ["--unet.dropout", "0.2"],
            "^unet.dropout=0.2, but .* was trained with its default; .* --init_from .*run/pipeline",
        ),
        (["--steps", "7"], "steps=7, but .*12000000 is already further"),
        (["--lr_schedule", "cosine"], "steps=13000000, but .*12000000 was trained with|lr_schedule='cosine', but"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            load("--output_dir", str(run), *steps, *argv)
        assert "\n" not in str(caught.value)
    for broken in ("", "- 1", "a: [", "a: \0"):
        (run / "checkpoints/12000000/config.yaml").write_text(broken)
        assert checkpoint_to_resume(load("--output_dir", str(run), *steps)).name == "12000000"  # by the one before it
        with pytest.raises(ConfigError, match="seed=3, but"):
            load("--output_dir", str(run), *steps, "--seed", "3")
    for path in run.rglob("config.yaml"):
        path.write_text("")
    with pytest.raises(
        ConfigError, match="12000000/config.yaml cannot be read; put it back, or take another output_dir"
    ):
        load("--output_dir", str(run), *steps)


def test_what_may_change_when_a_run_is_resumed(tmp_path):
    """With a constant schedule steps and learning rate, and all that is not of the training."""
    checkpoint = tmp_path / "run/checkpoints/0000004"
    checkpoint.mkdir(parents=True)
    constant = ["--lr_schedule", "constant_with_warmup", "--output_dir", str(tmp_path / "run")]
    text, other = as_yaml(load(*constant[:2])), as_yaml(load())
    for folder in (tmp_path / "run", checkpoint):
        (folder / "config.yaml").write_text(text)
    config = load(*constant, "--steps", "9", "--learning_rate", "0.5", "--tracker_run", "second")
    assert checkpoint_to_resume(config) == checkpoint and config.learning_rate == 0.5
    argv = ["--unet.dropout", "0.5", "--scheduler.beta_schedule", "linear", "--unet.block_out_channels", "8,16"]
    with pytest.raises(ConfigError) as caught:
        load(*constant, *argv)
    message = str(caught.value)  # the keys that differ alone, with both values
    assert (
        message.startswith("scheduler.beta_schedule='linear', but ")
        and "was trained with 'cosine' (2 more: " in message
    )
    assert "unet.dropout=0.5, but it had its default" in message and "[8, 16], but it had [32, 64]" in message
    assert "norm_num_groups" not in message and f"--init_from {tmp_path}/run/pipeline --output_dir" in message
    for folder in (tmp_path / "run", checkpoint):
        (folder / "config.yaml").write_text(other)
    with pytest.raises(ConfigError, match="learning_rate=0.5, but .* was trained with 0.001; .* --init_from"):
        load("--output_dir", str(tmp_path / "run"), "--learning_rate", "0.5")


def test_a_checkpoint_is_compared_with_its_own_config(tmp_path, monkeypatch):
    """By a relative path too, and whatever lies in the folders above it."""
    copied = tmp_path / "other/copies/0000004"
    copied.mkdir(parents=True)
    text = as_yaml(load())
    (copied / "config.yaml").write_text(text)
    (tmp_path / "other/config.yaml").write_text(text.replace("seed: 0", "seed: 3"))
    monkeypatch.chdir(copied.parent)
    for path in ("./0000004", str(copied)):
        assert checkpoint_to_resume(load("--resume", path)) == Path(path)
        with pytest.raises(ConfigError, match="seed=3, but .*0000004 was trained with 0"):
            load("--resume", path, "--seed", "3")


def test_the_config_of_the_checkpoint_before(tmp_path):
    """Where the newest one's cannot be read; also where its step has more digits."""
    run = tmp_path / "run"
    for step in ("9999000", "10000000"):
        (run / "checkpoints" / step).mkdir(parents=True)
    steps = ("--steps", "10000001")
    (run / "config.yaml").write_text(as_yaml(load("--seed", "1", *steps)))
    (run / "checkpoints/9999000/config.yaml").write_text(as_yaml(load("--seed", "2", *steps)))
    with pytest.raises(ConfigError, match="seed=0, but .*10000000 was trained with 2"):
        load("--output_dir", str(run), *steps)


def test_a_folder_that_may_not_be_written_to(folder_of_a_stranger):
    folder_of_a_stranger.chmod(0o500)
    for name in ("run", "new/run"):
        with pytest.raises(ConfigError, match=f"output_dir=.*{name}': {folder_of_a_stranger} is not writable"):
            load("--output_dir", str(folder_of_a_stranger / name))
    folder_of_a_stranger.chmod(0o700)


def test_bad_yaml(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("steps: [1")
    with pytest.raises(ConfigError, match="not a YAML file that can be read"):
        load("--config", str(path))
    path.write_text("mixed_precision: no")  # which YAML takes for false
    with pytest.raises(ConfigError, match="mixed_precision=False is not known; choose one of no, bf16, fp16"):
        load("--config", str(path))


def test_a_mistake_ends_the_script_before_torch_is_imported():
    code = f"""
import runpy, sys
sys.argv = ["train.py", "--stepz", "3"]
try:
    runpy.run_path({str(TRAIN)!r}, run_name="__main__")
except SystemExit as error:
    print(error, "torch" in sys.modules)
"""
    probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert probe.stdout == "train.py: unknown key 'stepz'; did you mean 'steps'? False\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--unet.dropuot", "1"], "unknown key 'unet.dropuot'; did you mean 'dropout'?"),
        (["--scheduler.beta_schedule", "liner"], "beta_schedule='liner' is not known"),
        (["--unet.norm_num_groups", "7"], "norm_num_groups=7 must divide"),
        (["--scheduler.variance_type", "lerned"], "variance_type='lerned' is not known; did you mean 'learned'?"),
        (
            ["--scheduler.num_train_timesteps", "10"],
            "sample_steps=100 must be an integer, 1 to 10, the steps of the process",
        ),
        (["--lr_schedule", "cosin"], "lr_schedule='cosin' is not known; did you mean 'cosine'?"),
    ],
)
def test_mistakes_in_the_parts(argv, message):
    result = script("train.py", *argv, "--output_dir", "/tmp/there/is/no/such/folder", check=False)
    assert result.returncode == 1 and result.stderr.strip().splitlines()[-1].startswith("train.py: ")
    assert message in result.stderr and "Traceback" not in result.stderr


def test_runs_of_before_a_key_was_there(tmp_path):
    """They had its default. The workers of a stream are part of its order."""
    run = tmp_path / "run"
    values = yaml.safe_load(as_yaml(load("--output_dir", str(run))))
    (run / "checkpoints/0000002").mkdir(parents=True)
    assert "preset" not in values
    old = {key: value for key, value in values.items() if key not in ("streaming", "shuffle_buffer")}
    for path in (run, run / "checkpoints/0000002"):
        (path / "config.yaml").write_text(yaml.safe_dump(old))
    config = load("--output_dir", str(run), "--num_workers", "2")
    assert config.preset == "digits" and checkpoint_to_resume(config).name == "0000002"
    assert checkpoint_to_resume(load("--output_dir", str(run), "--trackers", "[tensorboard]", "--eval_every", "5"))
    with pytest.raises(ConfigError, match="streaming=True, but .* was trained with False"):
        load("--output_dir", str(run), "--streaming", "true")
    (run / "checkpoints/0000002/config.yaml").write_text(yaml.safe_dump({**old, "streaming": True}))
    with pytest.raises(ConfigError, match="num_workers=2, but .* was trained with 0"):
        load("--output_dir", str(run), "--streaming", "true", "--num_workers", "2")
    assert (
        load("--config", str(run / "config.yaml"), "--resume", "never", "--output_dir", str(tmp_path / "b")).preset
        is None
    )
    with pytest.raises(ConfigError, match="unknown key 'preset'"):
        load("--preset", "mnist")


def test_dry_run_shows_the_resolved_config():
    result = script("train.py", "--dry_run", "--steps", "5", "--output_dir", "/tmp/there/is/no/such/folder")
    assert yaml.safe_load(result.stdout)["steps"] == 5 and "parameters, 5 steps of 64 images" in result.stdout
    assert " GiB for weights, gradient, optimizer and average" in result.stdout
    assert not Path("/tmp/there/is/no/such/folder").exists()


@pytest.mark.parametrize("preset", sorted(path.stem for path in ClassifierConfig.PRESETS.glob("*.yaml")))
def test_presets_of_classifiers(preset):
    """Each holds its file's values, and its process is that of the diffusion preset of its name."""
    config, _ = load_config(["--config", preset, "--output_dir", "/tmp/there/is/no/such/folder"], ClassifierConfig)
    assert_holds_what_the_file_says(config, ClassifierConfig.PRESETS / f"{preset}.yaml", but=())
    assert config.classes == 10 and config.preset == preset
    diffusion = load("--config", preset)
    betas, guided = (VariationalDDPMScheduler(**run_config.scheduler).betas for run_config in (config, diffusion))
    assert torch.equal(betas, guided)
    for key in ("data", "image_size", "channels"):
        assert getattr(config, key) == getattr(diffusion, key), key


@pytest.mark.parametrize(
    "preset, millions",
    [("adm-imagenet64", 296), ("adm-imagenet128", 422), ("adm-imagenet256", 554), ("adm-imagenet64-256", 312)],
)
def test_the_parameters_of_adm(preset, millions, tmp_path):
    """As the paper states them, and without allocating them."""
    config = load("--config", preset, "--data", str(tmp_path))
    with torch.device("meta"):
        unet = DiffusionTask(config).network
    assert round(unet.num_parameters() / 1e6) == millions and unet.device.type == "meta"
    sides = [config.image_size // 2**i for i, name in enumerate(config.unet["down_block_types"]) if "Attn" in name]
    heads = 4 if preset in ("adm-imagenet128", "adm-imagenet64-256") else config.unet["block_out_channels"][-1] // 64
    assert sides == [32, 16, 8] and unet.mid_block.attentions[0].heads == heads
