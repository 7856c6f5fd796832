"""The commands and options that README.md, docs/ and the scripts themselves name."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from scripts import ROOT, script
from usage import section_keys, usage

from config import ClassifierConfig, TrainConfig, load_config, sections_of

DOCS = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
KINDS = {"train.py": TrainConfig, "train_classifier.py": ClassifierConfig}
# of accelerate launch, torchrun and make
OTHERS = {"--key", "--cpu", "--num_processes", "--nproc_per_node", "--dynamo_backend"}


def commands(text):
    """(script, arguments) of the lines of its blocks that run a script of training/."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines() if not language else ():
            program, _, arguments = line.partition("training/")[2].partition(".py ")
            if arguments:
                yield f"{program}.py", shlex.split(arguments, comments=True)


def options(text):
    return set(re.findall(r"(?<![\w-])--[a-z]\w*(?:\.[a-z]\w*)?", text))


@pytest.mark.parametrize("name", DOCS)
def test_commands_can_be_given_one_after_the_other(name, tmp_path, monkeypatch):
    """Each is understood, and none begins in the folder of another one's run."""
    monkeypatch.chdir(tmp_path)
    runs, helps = {}, {}
    for program, argv in commands((ROOT / name).read_text()):
        if "--help" in argv:
            continue
        if program not in KINDS:
            helps[program] = helps.get(program) or options(script(program, "--help").stdout)
            assert options(" ".join(argv)) <= helps[program], (program, argv)
            continue
        if "--data" in argv and "/" in argv[argv.index("--data") + 1]:
            Path(argv[argv.index("--data") + 1]).mkdir(parents=True, exist_ok=True)
        config, dry_run = load_config(argv, KINDS[program])
        if not dry_run:
            assert runs.setdefault(config.output_dir, config) == config, f"{argv} begins in the folder of another run"


def test_options_exist():
    known = {
        f"--{section}.{key}"
        for kind in KINDS.values()
        for section in sections_of(kind)
        for key in section_keys(kind, section)
    }
    known |= OTHERS | {option for kind in KINDS.values() for option in options(usage(kind))}
    scripts = [*(ROOT / "training").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    known |= {option for path in scripts for option in re.findall(r'add_argument\(\s*"(--\w+)"', path.read_text())}
    for path in [*DOCS, "model_card.md", *(ROOT / "training/configs").rglob("*.yaml")]:
        assert options((ROOT / path).read_text()) <= known, path
    for path in (ROOT / "training").glob("*.py"):
        assert options(ast.get_docstring(ast.parse(path.read_text()))) <= known, path
