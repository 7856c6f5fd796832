"""The command line: help, mistakes, and the names that a command has."""

import os
import subprocess
import sys
import textwrap

import pytest

from ddpm_hf import __version__
from ddpm_hf.cli import COMMANDS, EXAMPLES, evaluate, main, parser, push, sample
from ddpm_hf.cli.parser import Parser, number
from ddpm_hf.extras import MissingExtra
from ddpm_hf.hub.errors import HubError
from ddpm_hf.likelihood.ode import OdeStopped
from ddpm_hf.training.config import ConfigError
from support.scripts import PARSERS, ROOT, script


def command(*argv, check=True):
    """Runs `python -m ddpm_hf` in a process of its own."""
    words = [sys.executable, "-m", "ddpm_hf", *map(str, argv)]
    result = subprocess.run(words, capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def test_the_help_names_every_command(capsys):
    for argv in ([], ["--help"], ["-h"]):
        main(argv)
        text = capsys.readouterr().out
        assert all(f"  {name} " in text for name in COMMANDS)
        assert all(len(line) <= 120 for line in text.splitlines())
    main(["--version"])
    assert capsys.readouterr().out == f"ddpm-hf {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("program", ["ddpm-hf", "script"])
@pytest.mark.parametrize("columns", [80, 120, 200])
def test_the_help_of_a_command(capsys, monkeypatch, name, program, columns):
    """Its examples come first, with its own name; options are no wider than the terminal, and no line than 120 columns."""
    monkeypatch.setenv("COLUMNS", str(columns))
    file = f"{name.replace('-', '_')}.py"
    words = f"ddpm-hf {name}" if program == "ddpm-hf" else f"python training/{file}"
    with pytest.raises(SystemExit) as end:
        main([name, "--help"], None if program == "ddpm-hf" else file)
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.startswith(f"usage: {words} ")
    assert text.index(f"\n  {words} ") < text.index("\n  --")
    assert max(map(len, text.splitlines())) <= 120
    options = text[text.index("\n  --") :].splitlines()
    assert all(len(line) <= columns for line in options if len(line.split()) > 1)  # a long word stays whole
    assert "docs/" not in text  # which an installed package does not have


def test_every_example_can_be_given(tmp_path, monkeypatch):
    """Those of the help of each command: the options exist and take these values."""
    monkeypatch.chdir(tmp_path)
    for words, _ in EXAMPLES:
        name, *argv = words.split()
        if name in PARSERS:
            PARSERS[name]().parse_args(argv)
    for make_parser in PARSERS.values():
        for words in examples_of(make_parser()):
            make_parser().parse_args(words)


def examples_of(parser):
    lines = [line for line in parser.description.splitlines() if line.startswith("  ") and line[2] != "#"]
    lines = [line.partition("  #")[0].split() for line in lines]
    assert lines and all(line[:2] == parser.command for line in lines)
    return [line[2:] for line in lines]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "ddpm-hf: unknown command 'trian'; did you mean 'train'?"),
        (["--traiin"], "ddpm-hf: unknown command '--traiin'; did you mean 'train'?"),
        (
            ["xyz"],
            "unknown command 'xyz'; commands: train, train-classifier, sample, evaluate, optimize-chain, convert, push",
        ),
        (["train", "--confg", "digits"], "ddpm-hf train: unknown key 'confg'; did you mean 'config'?"),
        (
            ["train-classifier", "--stepz", "3"],
            "ddpm-hf train-classifier: unknown key 'stepz'; did you mean 'steps'?",
        ),
        (["sample", "x", "--cuont", "3"], "ddpm-hf sample: unknown option '--cuont'; did you mean '--count'?"),
        (["evaluate", "--imges=3"], "ddpm-hf evaluate: unknown option '--imges'; did you mean '--images'?"),
        (["evaluate", "x", "--zzz"], "ddpm-hf evaluate: unknown option '--zzz'; see --help"),
        (["sample"], "ddpm-hf sample: the following arguments are required: PIPELINE"),
        (["push", "x"], "ddpm-hf push: the following arguments are required: --repo_id"),
        (
            ["train", "--data", "a", "b"],
            "ddpm-hf train: --data a and --data b were given; a run has one data set; give one",
        ),
        (
            ["train", "a", "--data=b"],
            "ddpm-hf train: --data a and --data b were given; a run has one data set; give one",
        ),
        (
            ["train", "LICENSE"],
            "ddpm-hf train: data='LICENSE': 'LICENSE' is a file; give its folder, '.', or a .parquet",
        ),
        (
            ["train", "digits", "--eval_data", "docs/emoji32.png"],
            "'docs/emoji32.png' is a file; give its folder, 'docs'",
        ),
        (
            ["evaluate", "src", "--data", "docs/emoji32.png"],
            "'docs/emoji32.png' is a file; give its folder, 'docs', or",
        ),
        (["train", "docs", "--unet.dropuot", "0"], "unknown key 'unet.dropuot'; did you mean 'dropout'?"),
        (["train", "docs", "--minutes", "0"], "minutes=0 must be a number in (0, 1000000] or null"),
        (["evaluate", "x", "--dequantization", "no"], "argument --dequantization: invalid choice: 'no'"),
    ],
)
def test_a_mistake_is_one_line_before_anything_slow_is_imported(argv, message):
    code = f"""
        import sys
        from ddpm_hf.cli import main
        try:
            main({argv})
        except SystemExit as error:
            print(error.code if isinstance(error.code, str) else "", file=sys.stderr, end="")
        slow = {{"torch", "numpy", "diffusers", "datasets", "accelerate", "transformers", "PIL"}} & sys.modules.keys()
        assert not slow, slow
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["train", "my_foldr", "--steps", "2"],
            "ddpm-hf train: {} 'my_foldr' here; did you mean 'my_folder'? Looking for",
        ),
        (["evaluate", "my_foldr"], "ddpm-hf evaluate: {} 'my_foldr' here; did you mean 'my_folder'? Looking for"),
        (["sample", "nothing"], "ddpm-hf sample: {} 'nothing' here. Looking for a pipeline of this name on the Hub"),
        (["sample", "a/b/pipeline"], "ddpm-hf sample: {} 'a/b/pipeline' here\n"),
        (
            ["push", "my_foldr", "--repo_id", "a/b"],
            "ddpm-hf push: there is no folder 'my_foldr' here; did you mean 'my_",
        ),
        (["train", "./my_foldr"], "ddpm-hf train: data='./my_foldr' does not exist; did you mean 'my_folder'?\n"),
    ],
)
def test_a_mistyped_folder_is_named_before_the_hub_is_asked(tmp_path, argv, message):
    """And, but for sample, before anything slow is imported: then torch cannot be."""
    (tmp_path / "my_folder").mkdir()
    blocked = "" if argv[0] == "sample" else "torch"
    code = f"import sys; sys.modules[{blocked!r}] = None; from ddpm_hf.cli import main; main({argv})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode != 0 and result.stderr.startswith(message.format("there is no folder or file"))


@pytest.mark.parametrize("cls", [ConfigError, HubError, MissingExtra, OdeStopped])
def test_errors_of_the_package_are_one_line(monkeypatch, cls):
    monkeypatch.setattr(push, "main", lambda argv, program: fail_with(cls("no such\nvalue")))
    with pytest.raises(SystemExit) as end:
        main(["push"])
    assert end.value.code == "ddpm-hf push: no such value"
    with pytest.raises(RecursionError):  # a mistake of the package keeps its traceback
        monkeypatch.setattr(push, "main", lambda argv, program: fail_with(RecursionError()))
        main(["push"])


def fail_with(error):
    raise error


def test_options_may_have_hyphens():
    plain = sample.make_parser().parse_args(["x", "--guidance_scale", "2", "--out", "a-b.png"])
    assert sample.make_parser().parse_args(["x", "--guidance-scale=2", "--out=a-b.png"]) == plain
    assert plain.out == "a-b.png"


@pytest.mark.parametrize("name", PARSERS)
def test_options_are_not_shortened(capsys, name):
    """As in `train`; the message names the whole option."""
    options = [action.option_strings[-1] for action in PARSERS[name]()._actions if action.option_strings]
    # --scheduler.KEY stands for many, and --seed is one beside --seeds
    for option in [option for option in options if "." not in option and option[:-1] not in options]:
        with pytest.raises(SystemExit) as end:
            PARSERS[name]().parse_args(["x", option[:-1], "2"])
        message = capsys.readouterr().err
        assert end.value.code == 2 and f"unknown option {option[:-1]!r}; did you mean '{option[:4]}" in message


def test_choices_are_those_of_the_package():
    from ddpm_hf.data.sources import BUILT_IN
    from ddpm_hf.likelihood.ode import DEQUANTIZATIONS

    assert evaluate.DEQUANTIZATIONS == DEQUANTIZATIONS and {*parser.BUILT_IN} == BUILT_IN.keys()


def test_scripts_keep_their_names_in_messages(tmp_path):
    for name, argv, status, message in (
        ("train.py", ["--stepz", "3"], 1, "train.py: unknown key 'stepz'"),
        ("train_classifier.py", ["--stepz", "3"], 1, "train_classifier.py: unknown key 'stepz'"),
        ("sample.py", ["--cuont", "3"], 2, "sample.py: unknown option '--cuont'"),
        ("evaluate.py", [tmp_path, "--ode"], 1, "evaluate.py: "),
        ("push.py", [tmp_path, "--repo_id", "user/x"], 1, "push.py: "),
    ):
        result = script(name, *argv, check=False)
        assert result.returncode == status and result.stderr.splitlines()[-1].startswith(message), result.stderr


def test_an_error_of_the_users_is_one_line_with_the_name_of_the_command(tmp_path):
    result = command("evaluate", tmp_path, "--ode", check=False)
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith("ddpm-hf evaluate: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("kind", "text"), [(int, "1.5"), (int, "0"), (float, "nan"), (float, "inf"), (float, "x")])
def test_numbers_that_are_refused(capsys, kind, text):
    parser = Parser("ddpm-hf x", "", "", [("a", "b")])
    parser.group("g")("--n", type=number(kind, 1))
    with pytest.raises(SystemExit):
        parser.parse_args(["--n", text])
    assert (
        f"argument --n: {text} must be {'an integer' if kind is int else 'a number'}, 1 or more"
        in capsys.readouterr().err
    )
