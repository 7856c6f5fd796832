"""Every argument and every result of a public name has a type hint."""

import importlib
import inspect

import pytest

import ddpm_hf


def public_functions():
    """(name, function) for the functions, methods and properties that the public packages export."""
    for module in (ddpm_hf, *(importlib.import_module(f"ddpm_hf.{name}") for name in ("data", "training"))):
        for name in module.__all__:
            value = getattr(module, name)
            if not inspect.isclass(value):
                yield name, value
                continue
            for attribute, member in vars(value).items():
                member = getattr(member, "fget", None) or getattr(member, "__func__", member)
                of_package = inspect.isfunction(member) and member.__module__.startswith("ddpm_hf.")
                if of_package and (not attribute.startswith("_") or attribute in ("__init__", "__call__")):
                    yield f"{name}.{attribute}", member


@pytest.mark.parametrize("function", [pytest.param(value, id=name) for name, value in public_functions()])
def test_public_functions_have_type_hints(function):
    signature = inspect.signature(function)
    arguments = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.annotation is parameter.empty
        and name not in ("self", "cls")
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    assert not arguments
    assert function.__name__ == "__init__" or signature.return_annotation is not signature.empty
