"""The scripts of training/, run as a user runs them."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

from ddpm_hf.cli import convert, evaluate, main, optimize_chain, push, sample

ROOT = Path(__file__).parents[2]

# commands whose options argparse reads
PARSERS = {
    "sample": sample.make_parser,
    "evaluate": evaluate.make_parser,
    "optimize-chain": optimize_chain.make_parser,
    "convert": convert.make_parser,
    "push": push.make_parser,
}


def script(name, *argv, check=True, launcher=None, **environment):
    """The exit status and the output of training/<name> with these arguments; an error fails the test if `check`.

    It runs in this process, which has imported all that a new one would take seconds for; with a `launcher`, such as
    ["python"], in a process of its own, which reaches no Hub unless its `environment` says so.
    """
    argv = [str(ROOT / "training" / name), *map(str, argv)]
    if launcher:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
        result = subprocess.run([*launcher, *argv], capture_output=True, text=True, cwd=ROOT, env=environment)
    else:
        with mock.patch.object(sys, "argv", argv), mock.patch.dict(os.environ, environment):
            result = _captured(lambda: runpy.run_path(argv[0], run_name="__main__"))
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def command(*argv, check=True):
    """The exit status and the output of `ddpm-hf` with these arguments, run in this process; an error fails if `check`."""
    result = _captured(lambda: main([*map(str, argv)]))
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def _captured(function):
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            function()
        except SystemExit as end:  # as the interpreter takes it
            status = end.code or 0
            if not isinstance(status, int):
                status = print(status, file=sys.stderr) or 1
    return types.SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())
