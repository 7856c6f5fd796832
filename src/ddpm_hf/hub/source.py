"""Writes the source that is published beside weights: one readable file with a pipeline and its parts, without the package.

It is made from the sources of this package by their syntax trees: the classes that are saved, and every top-level definition
that they use, unchanged. Features such as uploading or compiling are not published: the classes of `stand_ins.py` replace the
package's classes of the same names.
"""

import ast
import functools
import os
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ddpm_hf.files.atomic import write_text
from ddpm_hf.files.saved_config import saved_class
from ddpm_hf.version import __version__

PACKAGE = Path(__file__).parents[1]
STAND_INS = "ddpm_hf.hub.stand_ins"


# a tuple of classes; a published file lists only the classes that it contains
REGISTRY = ("ddpm_hf.schedulers", "SCHEDULERS")


# the decorator that is left out of a published file, and the decorator of methods that are left out
DROPPED_DECORATOR, PACKAGE_ONLY = "checked_arguments", "package_only"


# replaces such a method
BROUGHT_BY_PACKAGE = "brought_by_package"


# stand-in -> the class that makes it unnecessary
STAND_INS_WITHOUT = {"classifier_gradient": "NoisyClassifier"}


HEADER = (
    "Published beside the weights by ddpm-hf {version}, for use without that package: it needs torch, diffusers and numpy. Its "
    "parts are taken as they are from the package's {files}.",
    "With the package (`pip install ddpm-hf`) this file is not executed: `from ddpm_hf import {name}`, then "
    "`{name}.from_pretrained(...)`, which also checks the files, measures likelihoods, and publishes.",
)


class Definition(NamedTuple):
    """A top-level name of the package."""

    module: str  # "ddpm_hf.models.unet"
    name: str


def write_source(folder: str | os.PathLike, name: str, classes: Iterable[type]) -> None:
    """Writes `published_source` of these classes as <folder>/<name>.py."""
    os.makedirs(folder, exist_ok=True)
    write_text(os.path.join(folder, f"{name}.py"), published_source(classes))


def published_source(classes: Iterable[type]) -> str:
    """Returns one file with the package's classes that `classes` are saved as, and all definitions that these use.

    Raises:
        ValueError: two definitions of one name, or a top-level statement that cannot be moved to another file.
    """
    saved = [saved_class(cls) for cls in classes]
    return _published_source(tuple(dict.fromkeys(Definition(cls.__module__, cls.__name__) for cls in saved)))


@functools.lru_cache(maxsize=16)
def _published_source(roots):
    return _File(roots).text()


class _Module:
    """A file of the package: its top-level statements by the names that they define, and its imports."""

    def __init__(self, name):
        path = PACKAGE.joinpath(*name.split(".")[1:])
        self.path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        source = self.path.read_text(encoding="utf-8")
        self.lines, self.body = source.split("\n"), ast.parse(source).body
        self.statements = {}  # name -> indices of the statements that define it
        self.internal_imports, self.external_imports = {}, {}  # local name -> what it is imported from
        for index, node in enumerate(self.body):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self._add_import(node)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self.statements.setdefault(node.name, []).append(index)
            elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
                for name in names:
                    self.statements.setdefault(name, []).append(index)
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):  # a docstring
                raise ValueError(f"{self.path}, line {node.lineno}: this statement cannot be published; define a name")

    def _add_import(self, node):
        for alias in node.names:
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module and module.partition(".")[0] == "ddpm_hf":
                if alias.asname:
                    raise ValueError(f"{self.path}, line {node.lineno}: an import of this package under another name")
                self.internal_imports[alias.name] = Definition(module, alias.name)
            else:
                self.external_imports[alias.asname or alias.name.partition(".")[0]] = (module, alias.name, alias.asname)

    def mentions(self, name):
        """All names that the definition of `name` mentions."""
        names, pending = set(), [self.body[index] for index in self.statements[name]]
        while pending:
            node = pending.pop()
            if isinstance(node, ast.Name):
                names.add(node.id)
            for child in ast.iter_child_nodes(node):
                if _is_package_only(child):
                    names.add(BROUGHT_BY_PACKAGE)
                elif not _is_left_out(child):
                    pending.append(child)
        return names

    def text(self, index):
        """Returns the text of a statement with its decorators and comments, without what `_is_left_out`."""
        node = self.body[index]
        lines = dict(enumerate(self.lines[: node.end_lineno]))
        for inner in ast.walk(node):
            if _is_package_only(inner):
                first = self._first_line(inner)
                for line in range(first + 1, inner.end_lineno):
                    del lines[line]
                lines[first] = f'    {inner.name} = {BROUGHT_BY_PACKAGE}("{inner.name}")'
                if inner.name[0] == "_" or len(inner.decorator_list) > 1:  # nobody calls it
                    del lines[first]
                    lines.pop(inner.end_lineno, None)  # the empty line
            elif _is_left_out(inner):
                for line in range(inner.lineno - 1, inner.end_lineno):
                    lines.pop(line, None)
        return "\n".join(lines[line] for line in sorted(lines) if line >= self._first_line(node))

    def _first_line(self, node):
        """Returns the first line of a definition with its decorators and comments, counted from 0."""
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))]) - 1
        while first > 0 and self.lines[first - 1].lstrip().startswith("#"):
            first -= 1
        return first


def _decorators(node):
    """The names of a definition's decorators."""
    functions = (getattr(decorator, "func", decorator) for decorator in getattr(node, "decorator_list", ()))
    return {function.id for function in functions if isinstance(function, ast.Name)}


def _is_package_only(node):
    return PACKAGE_ONLY in _decorators(node)


def _is_left_out(node):
    """Whether a node is left out of a published file: a package-only method, or a decorator that checks arguments."""
    is_dropped = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == DROPPED_DECORATOR
    return _is_package_only(node) or is_dropped


@functools.cache
def _module(name):
    return _Module(name)


class _File:
    """A published file, as the set of its definitions."""

    def __init__(self, roots):
        self.roots = roots
        names = {root.name for root in roots}
        stand_ins = _module(STAND_INS).statements
        self.stand_ins = {name for name in stand_ins if STAND_INS_WITHOUT.get(name) not in names}
        self.used, pending = set(), [self.resolved(root) for root in roots]
        while pending:
            definition = pending.pop()
            if definition not in self.used:
                self.used.add(definition)
                pending += () if definition == REGISTRY else self.uses(definition)
        self.check_names()

    def resolved(self, definition):
        """Returns where a name is defined, through imports; its stand-in if it has one."""
        if definition.name in self.stand_ins:
            return Definition(STAND_INS, definition.name)
        module = _module(definition.module)
        return (
            definition
            if definition.name in module.statements
            else self.resolved(module.internal_imports[definition.name])
        )

    def uses(self, definition):
        """Yields the definitions of this package that a definition mentions."""
        module = _module(definition.module)
        for name in sorted(module.mentions(definition.name)):
            if name in module.statements:
                yield Definition(definition.module, name)
            elif name in module.internal_imports:
                yield self.resolved(module.internal_imports[name])
            elif name in self.stand_ins:
                yield Definition(STAND_INS, name)

    def check_names(self):
        """Raises ValueError unless each name has one meaning; identical statements may occur twice."""
        meanings = {}
        for definition in sorted(self.used):
            module = _module(definition.module)
            text = "\n".join(module.text(index) for index in module.statements[definition.name])
            meanings.setdefault(definition.name, {})[text] = definition.module
        for definition in self.used:
            for name in _module(definition.module).external_imports.keys() & meanings.keys():
                meanings[name]["an import"] = definition.module
        for name, modules in meanings.items():
            if len(modules) > 1:
                raise ValueError(
                    f"{name} means different things in {' and '.join(modules.values())}, which are published in one file; "
                    "rename it"
                )

    def text(self):
        texts, files = [], []
        for name in self.modules():
            module = _module(name)
            files.append(module.path.relative_to(PACKAGE).as_posix())
            names = [definition.name for definition in self.used if definition.module == name]
            for index in sorted({index for definition_name in names for index in module.statements[definition_name]}):
                text = self.registry() if (name, *names) == REGISTRY else module.text(index)
                texts += [text] if text not in texts else []
        values = {"name": self.roots[0].name, "version": __version__, "files": ", ".join(files)}
        header = [f"{self.roots[0].name} and what it needs, in one file.", ""]
        for paragraph in HEADER:
            header += textwrap.wrap(paragraph.format(**values), 120, break_on_hyphens=False)
        header = '"""' + "\n".join(header) + '\n"""'
        return "\n\n\n".join((f"{header}\n\n{self.imports()}", *texts)) + "\n"

    def registry(self):
        """The tuple of classes, with those that are in the file."""
        module = _module(REGISTRY[0])
        classes = module.body[module.statements[REGISTRY[1]][0]].value.elts
        names = [node.id for node in classes if self.resolved(module.internal_imports[node.id]) in self.used]
        return f"{REGISTRY[1]} = ({', '.join(names)}{',' if len(names) == 1 else ''})"

    def modules(self):
        """The modules of the definitions, each behind those that it imports from."""
        names, ordered, visited = {definition.module for definition in self.used}, [], set()

        def add(name):
            if name not in visited:
                visited.add(name)
                for definition in _module(name).internal_imports.values():
                    add(self.resolved(definition).module)
                ordered.append(name)

        for name in sorted(names):
            add(name)
        return [name for name in ordered if name in names]

    def imports(self):
        """The imports of other packages that the definitions need, the standard library's first."""
        needed = set()
        for definition in self.used - {REGISTRY}:
            module = _module(definition.module)
            needed |= {
                module.external_imports[name]
                for name in module.mentions(definition.name) & module.external_imports.keys()
            }
        lines = sorted(
            f"import {name}{f' as {alias}' if alias else ''}" for module, name, alias in needed if not module
        )
        for module in sorted({module for module, *_ in needed if module}):
            names = sorted(
                f"{name} as {alias}" if alias else name for origin, name, alias in needed if origin == module
            )
            line = f"from {module} import {', '.join(names)}"
            lines.append(line if len(line) <= 120 else f"from {module} import (\n    " + ",\n    ".join(names) + ",\n)")
        standard = [line for line in lines if line.split()[1].partition(".")[0] in sys.stdlib_module_names]
        return "\n".join(standard) + "\n\n" + "\n".join(line for line in lines if line not in standard)
