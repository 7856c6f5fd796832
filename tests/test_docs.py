"""The commands and options that README.md, docs/ and the scripts themselves name."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from ddpm_hf.training.config import ClassifierConfig, ConfigError, TrainConfig, as_yaml, load_config, sections_of
from ddpm_hf.training.usage import section_keys, usage
from support.scripts import ROOT, script

DOCS = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
KINDS = {"train.py": TrainConfig, "train_classifier.py": ClassifierConfig}
STARTS = {"python", "accelerate", "torchrun"}
# of accelerate launch, torchrun and make
OTHERS = {"--key", "--cpu", "--num_processes", "--nproc_per_node", "--dynamo_backend"}


def commands(path):
    """(script, arguments) of the lines that run a script of training/, of a document or of a docstring."""
    text = path.read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    if path.suffix == ".py":
        blocks = [("", ast.get_docstring(ast.parse(text)))]
    for language, block in blocks:
        for line in block.replace("\\\n", " ").splitlines() if not language else ():
            program, _, arguments = line.partition(" training/")[2].partition(".py ")
            if arguments and line.split()[0] in STARTS:
                yield f"{program}.py", shlex.split(arguments, comments=True)


def options(text):
    return set(re.findall(r"(?<![\w-])--[a-z]\w*(?:\.[a-z]\w*)?", text))


def test_commands_can_be_given_one_after_the_other(tmp_path, monkeypatch):
    """Those of all documents and scripts: each is understood, and none begins in the folder of another one's run."""
    monkeypatch.chdir(tmp_path)
    helps = {}
    for path in [*(ROOT / name for name in DOCS), *sorted((ROOT / "training").glob("*.py"))]:
        for program, argv in commands(path):
            if "--help" in argv:
                continue
            if program not in KINDS:
                helps[program] = helps.get(program) or options(script(program, "--help").stdout)
                assert options(" ".join(argv)) <= helps[program], (path, program, argv)
                continue
            for word in ("--data", "--resume"):
                if word in argv and "/" in argv[argv.index(word) + 1]:
                    Path(argv[argv.index(word) + 1]).mkdir(parents=True, exist_ok=True)
            try:
                config, dry_run = load_config(argv, KINDS[program])
            except ConfigError as error:  # as where the folder holds the run of another command
                pytest.fail(f"{path}: {program} {shlex.join(argv)}: {error}")
            if not dry_run:  # its first checkpoint, with which the next command in this folder has to agree
                checkpoint = Path(config.output_dir, "checkpoints", "0000001")
                checkpoint.mkdir(parents=True, exist_ok=True)
                (checkpoint / "config.yaml").write_text(as_yaml(config))


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


def test_options_exist():
    known = {
        f"--{section}.{key}"
        for kind in KINDS.values()
        for section in sections_of(kind)
        for key in section_keys(kind, section)
    }
    known |= OTHERS | {option for kind in KINDS.values() for option in options(usage(kind))}
    scripts = [path for folder in ("src", "training", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    known |= {option for path in scripts for option in re.findall(r'add(?:_argument)?\(\s*"(--\w+)"', path.read_text())}
    for path in [*DOCS, "model_card.md", *(ROOT / "training/configs").rglob("*.yaml")]:
        assert options((ROOT / path).read_text()) <= known, path
    for path in (ROOT / "training").glob("*.py"):
        assert options(ast.get_docstring(ast.parse(path.read_text()))) <= known, path
