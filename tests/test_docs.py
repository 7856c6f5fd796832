"""README.md and docs/: their links, paths, options, commands and Python."""

import ast
import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddpm_hf import DDPMUNet, NoisyClassifier, cli
from ddpm_hf.cli.train import with_data_option
from ddpm_hf.evaluation.quality import LEGEND
from ddpm_hf.original.published import PUBLISHED, Published
from ddpm_hf.training.command_line import load_config
from ddpm_hf.training.config import ClassifierConfig, ConfigError, TrainConfig, as_yaml, sections_of
from ddpm_hf.training.sections import section_keys
from ddpm_hf.training.usage import usage
from support.scripts import PARSERS, ROOT

DOCS = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
PAGES = [ROOT / name for name in DOCS]
KINDS = {"train": TrainConfig, "train-classifier": ClassifierConfig}

# how a command of ours begins: the program, or a launcher and the module or a script
LAUNCHERS = r"(?:python|accelerate launch|torchrun) (?:--\w+ (?:\d+ )?)*"
STARTS = re.compile(rf"(?:ddpm-hf |{LAUNCHERS}(?:-m ddpm_hf |training/(?=\w+\.py)))([\w-]+)(?:\.py)?")
# of accelerate launch, torchrun and make
OTHERS = {"--key", "--scheduler.solver_order", "--cpu", "--num_processes", "--nproc_per_node", "--dynamo_backend"}


def fenced(path, language=""):
    """The blocks of a document in a language; those without one hold commands for a terminal."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in blocks if name == language]


def lines(path):
    """The lines for a terminal, without comments; those of a script's docstring too."""
    blocks = [ast.get_docstring(ast.parse(path.read_text()))] if path.suffix == ".py" else fenced(path)
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            if path.suffix != ".py" or STARTS.match(line.strip()):
                yield shlex.join(shlex.split(line, comments=True))


def commands(path):
    """(command, arguments) of the lines that run one of this package's."""
    for line in lines(path):
        if start := STARTS.match(line):
            yield start[1].replace("_", "-"), shlex.split(line[start.end() :])


def options(text):
    return set(re.findall(r"(?<![\w-])--[a-z]\w*(?:\.[a-z]\w*)?", text))


def parse(command, argv):
    """Reads a command as it does itself: the config of a training, else the parser's options."""
    if command in KINDS:
        return load_config(with_data_option(argv, KINDS[command]), KINDS[command])
    return PARSERS[command]().parse_args(argv)


def make_pictures(folder):
    """A data set of two classes."""
    for i, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for j in range(20):
            Image.new("RGB", (8, 8), (80 * i, 10 * j, 100)).save(folder / name / f"{j}.png")


def test_commands_can_be_given_one_after_the_other(tmp_path, monkeypatch):
    """Those of all documents and scripts: each is understood, and none begins in the folder of another one's run."""
    monkeypatch.chdir(tmp_path)
    checked = set()
    for path in [*PAGES, *sorted((ROOT / "training").glob("*.py"))]:
        for command, argv in commands(path):
            checked.add(command)
            if command == "emoji" or "--help" in argv or "--version" in argv:
                continue
            for word in ("--data", "--eval_data"):
                if word in argv and "/" in argv[argv.index(word) + 1]:
                    Path(argv[argv.index(word) + 1]).mkdir(parents=True, exist_ok=True)
            if "--resume" in argv:  # a later checkpoint of a run that an earlier command began
                step = Path(argv[argv.index("--resume") + 1])
                shutil.copytree(step.with_name("0000001"), step, dirs_exist_ok=True)
            if command in KINDS and argv and not argv[0].startswith("-"):
                Path(argv[0]).mkdir(parents=True, exist_ok=True)
            try:
                result = parse(command, argv)
            except ConfigError as error:  # as where the folder holds the run of another command
                pytest.fail(f"{path}: {command} {shlex.join(argv)}: {error}")
            except SystemExit:
                pytest.fail(f"{path}: {command} {shlex.join(argv)}: not understood")
            if (
                command in KINDS and not result[1]
            ):  # its first checkpoint, with which the next one in this folder must agree
                checkpoint = Path(result[0].output_dir, "checkpoints", "0000001")
                checkpoint.mkdir(parents=True, exist_ok=True)
                (checkpoint / "config.yaml").write_text(as_yaml(result[0]))
    assert checked >= set(cli.COMMANDS)


def test_other_commands_exist():
    """Lines that run no command of this package: make, pip, Python scripts."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in PAGES:
        for words in (line.split() for line in lines(path) if line and not STARTS.match(line)):
            if words[0] == "make":
                assert words[1] in targets, (path, words)
            elif words[0] == "python":
                assert (ROOT / words[1]).is_file(), (path, words)
            elif words[:2] == ["pip", "install"]:
                named = re.fullmatch(r"'?(?:ddpm-hf|\.)(?:\[([\w,]+)\])?'?", words[-1])
                assert named and set((named[1] or "train").split(",")) <= extras.keys(), (path, words)
            else:
                assert words[:3] in (["hf", "auth", "login"], ["npm", "pack"], ["git", "clone"]), (path, words)


# a small network with a chain of 100 timesteps, trained for two steps
SMALL = (
    "--scheduler.num_train_timesteps 100 --unet.norm_num_groups 4 --unet.attention_head_dim 8 --unet.layers_per_block 1 "
    "--init paper --steps 2 --batch_size 4 --sample_every 0"
)
RUNS = {
    "digits": f"train --config digits {SMALL} --unet.block_out_channels [8,16]",
    "digits-classes": f"train --config digits-classes {SMALL} --unet.block_out_channels [8,16]",
    "digits-vp": f"train --config digits-vp {SMALL} --unet.block_out_channels [8,16]",
    "mnist-8": f"train --config mnist-8 {SMALL} --unet.block_out_channels [8,16]",
    "mnist-8-32": f"train --config mnist-8-32 {SMALL} --unet.block_out_channels [8,8,16]",
    "pictures": f"train pictures {SMALL} --image_size 8 --unet.block_out_channels [8,16]",  # holds images out
    "my_folder": f"train my_folder {SMALL} --image_size 8 --unet.block_out_channels [8,16]",  # holds images out
    "digits-classifier": "train-classifier --config digits --pipeline runs/digits-classes/pipeline --steps 2 --batch_size 4 "
    "--classifier.block_out_channels [8,16] --classifier.norm_num_groups 4 --classifier.attention_head_dim 8 --eval_every 0",
}


def run(*argv):
    """Runs a command; its failure fails the test."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            cli.main(list(argv))
        except SystemExit as end:
            assert not end.code, (argv, end.code)
    assert out.getvalue(), argv


def run_shortened(command, argv):
    """Runs a command with few images, within the short chain, and without compiling."""
    words = [{"500": "50"}.get(word, word) for word in argv if word != "--optimize"]
    shorter = {"sample": ["--count", "2"], "evaluate": ["--images", "4"]}.get(command, [])
    if "--seeds" in words:
        shorter = ["--seeds", "0-1"]
    if "--metrics" in words:  # Inception's weights are not here, and those of others take long
        names = words[words.index("--metrics") + 1].split(",")
        kinds = [{"fid": "fd", "kid": "kd"}.get(name, name) for name in names if name not in ("sfid", "is")]
        shorter = ["--metrics", ",".join(kinds), "--extractor", "support.features:projected", "--samples", "8"]
    for word in words:
        if word.endswith((".npz", ".parquet")):  # of an earlier test, which `sample` does not replace
            Path(word).unlink(missing_ok=True)
    run(command, *words, *shorter)


@pytest.fixture(scope="module")
def world(tmp_path_factory, hub):
    """A folder with what the documents speak of: pictures, and runs of their commands with small networks, for two steps."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("pictures", "my_folder", "path/to/pictures", "path/to/images"):
        make_pictures(folder / name)
    with contextlib.chdir(folder):
        for argv in RUNS.values():
            run(*shlex.split(argv))
        shutil.copytree("runs/digits/pipeline", "runs/demo/pipeline")
    return folder


@pytest.fixture
def original_checkpoints(world, monkeypatch):
    """Small networks in files with the names of published checkpoints, which are known as such."""
    small = {
        "sample_size": 8,
        "block_out_channels": (32, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 32,
    }
    levels = {"up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attn_norm_num_groups": 32, "out_channels": 6}
    networks = {
        "256x256_diffusion_uncond": DDPMUNet(**small, **levels),
        "256x256_diffusion": DDPMUNet(**small, **levels, num_class_embeds=1000),
        "256x256_classifier": NoisyClassifier(
            num_classes=1000, **small, downsample_type="conv", resnet_time_scale_shift="default"
        ),
    }
    for name, network in networks.items():
        options = PUBLISHED[name].options | {"image_size": 8, "num_head_channels": 32}
        network.save_single_file(world / f"{name}.pt", "guided-diffusion", **options)
        monkeypatch.setitem(PUBLISHED, name, Published("openai", options, {}))


@pytest.mark.parametrize("name", [name for name in DOCS if fenced(ROOT / name, "python")])
@pytest.mark.usefixtures("original_checkpoints")
def test_python_runs(name, world, hub, monkeypatch, tmp_path):
    """The blocks of a document, one after the other, as a reader types them; their output has the lines that it shows."""
    monkeypatch.chdir(world)
    namespace, out = {}, io.StringIO()
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)  # takes minutes, and has tests of its own
    with contextlib.redirect_stdout(out):
        for i, block in enumerate(fenced(ROOT / name, "python")):
            exec(compile(block, f"{name}, Python block {i + 1}", "exec"), namespace)
    if name == "README.md":
        bits, error = map(float, re.match(r"(\S+) ± (\S+) bits/dim\n", out.getvalue()).groups())
        assert bits > 0 and error > 0
    shown = [line for text in fenced(ROOT / name, "text") for line in text.splitlines()]
    without_numbers = [re.sub(r"\d[\d.]*", "N", line) for line in shown]
    for line in out.getvalue().splitlines() if name == "README.md" else ():
        assert re.sub(r"\d[\d.]*", "N", line) in without_numbers


@pytest.mark.parametrize(
    "name", ["README.md", "docs/samplers.md", "docs/evaluation.md", "docs/likelihood.md", "docs/publishing.md"]
)
def test_commands_run(name, world, hub, monkeypatch):
    """Samples, evaluations and pushes of a document, of the small pipelines."""
    monkeypatch.chdir(world)
    for command, argv in commands(ROOT / name):
        if command in PARSERS and Path(argv[0]).is_dir():
            run_shortened(command, argv)


def test_page_of_evaluation_explains_what_is_printed_and_written(world, monkeypatch):
    monkeypatch.chdir(world)
    argv = shlex.split("--metrics fd,prc --extractor support.features:projected --samples 8 --steps 2 --out report")
    run("evaluate", "runs/digits/pipeline", *argv)
    quality = json.loads(Path("report/evaluation.json").read_text())["sample_quality"]
    page = (ROOT / "docs/evaluation.md").read_text()
    keys = re.findall(r"`(\w+)`", page.partition("| key of `sample_quality` |")[2].partition("\n## ")[0])
    assert quality.keys() | quality["metrics"][0].keys() <= set(keys)
    assert "\n".join(LEGEND) in page


def test_animation_of_the_readme(world, tmp_path):
    words = re.search(r"`ddpm-hf (sample \S+ .*--animation) out.webp`", (ROOT / "README.md").read_text())[1].split()
    words = [f"{world}/{word}" if "/" in word else {"50": "3", "20": "10"}.get(word, word) for word in words]
    out = tmp_path / "denoising.webp"
    run(*words, str(out))
    with Image.open(out) as picture, Image.open(ROOT / "docs/denoising.webp") as shown:
        assert picture.n_frames == 3 + 1 and picture.width == shown.width == 10 * (8 * 8 + 4)
        assert shown.n_frames == 50 + 1 and shown.height - picture.height == 2 * (8 * 8 + 4)


SHORT = {"--steps": "2", "--batch_size": "4", "--sample_every": "0", "--eval_every": "0", "--output_dir": "runs/short"}
IN_OTHER_TESTS = {"--mixed_precision", "--compile", "--minutes"}  # a process has one precision; the others take minutes


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DOCS if any(True for _ in commands(ROOT / name))])
def test_all_commands_run(name, world, hub, monkeypatch, tmp_path):
    """Every command of a document, in a copy of the world; trainings of data that is here take two steps."""
    shutil.copytree(world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    for command, argv in commands(ROOT / name):
        if command in PARSERS and "--help" not in argv and Path(argv[0]).is_dir():
            run_shortened(command, argv)
        elif command in KINDS and not {"--help", "--resume", "--dry_run"} & {*argv}:
            for option in SHORT.keys() | IN_OTHER_TESTS:
                if option in argv:
                    del argv[argv.index(option) : argv.index(option) + 2]
            argv += [
                word for pair in SHORT.items() for word in pair if command == "train" or pair[0] != "--sample_every"
            ]
            config, _ = parse(command, argv)
            if config.data in ("digits", "mnist") or Path(config.data).is_dir():
                run(command, *argv)
                shutil.rmtree("runs/short")


def anchors(path):
    """Those of a document's headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*DOCS, "SECURITY.md"])
def test_links_lead_somewhere(name):
    path = ROOT / name
    for link in re.findall(r"\]\(\s*([^)\s]+)\s*\)", path.read_text()):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


@pytest.mark.parametrize("name", DOCS)
def test_files_that_are_named_exist(name):
    text = (ROOT / name).read_text()
    for path in re.findall(r"(?<![\w/])((?:src|tests|benchmarks|examples|docs|training)/[\w./-]*\w\.\w+)", text):
        assert (ROOT / path).exists() or (ROOT / "src/ddpm_hf" / path).exists(), path


def test_architecture_names_rooms_and_files():
    text = (ROOT / "docs/architecture.md").read_text().partition("## The files")[2].partition("\n## ")[0]
    package = ROOT / "src/ddpm_hf"
    packages = {path.parent.name for path in package.glob("*/__init__.py")}
    assert packages == set(re.findall(r"\*\*(\w+)\*\*", text))
    for path in re.findall(r"`(\w+/[\w/]+\.py)`", text):
        assert (package / path).is_file(), path


def test_page_of_options_is_up_to_date():
    page = runpy.run_path(str(ROOT / "docs/make_options.py"))["page"]()
    assert page == (ROOT / "docs/options.md").read_text(), "run: python docs/make_options.py"


def test_options_exist():
    existing = {
        f"--{section}.{key}"
        for kind in KINDS.values()
        for section in sections_of(kind)
        for key in section_keys(kind, section)
    }
    existing |= OTHERS | {option for kind in KINDS.values() for option in options(usage(kind))}
    existing |= {name for make in PARSERS.values() for action in make()._actions for name in action.option_strings}
    scripts = [path for folder in ("training", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    existing |= {option for path in scripts for option in re.findall(r'add_argument\(\s*"(--\w+)"', path.read_text())}
    for name in [*DOCS, "model_card.md", *(ROOT / "training/configs").rglob("*.yaml")]:
        text = (ROOT / name).read_text()
        if name == "docs/from-train-unconditional.md":  # the flags of the other script are the first column
            text = re.sub(r"^\|[^|]*\|", "|", re.sub(r"^```bash.*?^```", "", text, flags=re.S | re.M), flags=re.M)
        assert options(text) <= existing, name
    for path in (ROOT / "training").glob("*.py"):
        assert options(ast.get_docstring(ast.parse(path.read_text()))) <= existing, path


def test_flags_of_the_other_script_are_answered_with_ours():
    """Every flag of the table that is no key here ends the run at once."""
    rows = re.findall(r"^\| (`--.*?) \|", (ROOT / "docs/from-train-unconditional.md").read_text(), re.M)
    flags = [flag for row in rows for flag in re.findall(r"--(\w+)", row)]
    assert len(flags) > 40
    for flag in set(flags) - TrainConfig.__dataclass_fields__.keys():
        with pytest.raises(ConfigError, match=f"unknown key '{flag}'"):
            load_config([f"--{flag}", "1"])
