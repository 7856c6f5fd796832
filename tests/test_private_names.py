"""Names with a leading underscore stay where they are defined; those of other libraries in the modules that gather them."""

import ast

import pytest

from support.scripts import ROOT

SOURCES = sorted(path for folder in ("src/ddpm_hf", "training", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
GATHERING = {"accelerate_internals.py", "diffusers_internals.py", "hub_internals.py", "torch_internals.py"}

# (file, name): why it stands there
ALLOWED = {
    ("chain.py", "_get_variance"): "published, and listed in diffusers_internals.PRIVATE_NAMES",
    ("generation.py", "_interrupt"): "documented by diffusers: how a callback ends sampling",
    ("sample_metrics.py", "_interrupt"): "the same",
    ("encoding.py", "_replace"): "documented: a method of named tuples",
}


def is_private(name):
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


def private_names(tree):
    """The private names that a module imports, or reads from objects other than self and cls, without defining them."""
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            inherited = ast.unparse(node.value) in ("self", "cls", "super()")
            names = [] if inherited or node.attr in defined else [node.attr]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            names = [node.args[1].value] if isinstance(node.args[1], ast.Constant) else []
        else:
            continue
        yield from filter(is_private, names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_private_names_are_used_where_they_are_defined(path):
    used = set(private_names(ast.parse(path.read_text()))) if path.name not in GATHERING else set()
    assert {name for name in used if (path.name, name) not in ALLOWED} == set()


def test_what_counts_as_private():
    code = "from a import _b\nself._c\nd._e\nd.__f__\ngetattr(d, '_g')\nsuper()._h()\ndef _i(): d._i"
    assert set(private_names(ast.parse(code))) == {"_b", "_e", "_g"}
