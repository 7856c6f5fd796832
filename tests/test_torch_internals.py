"""Fails, and says what to mend, when a new version of torch changes what ddpm_hf/torch_internals.py relies on."""

import contextlib

import pytest
import torch

from ddpm_hf.torch_internals import has_hooks, is_functorch_active, packing_weights, without_compiler


@contextlib.contextmanager
def checking(name):
    try:
        yield
    except Exception as error:
        pytest.fail(f"torch {torch.__version__} has changed {name}; mend ddpm_hf/torch_internals.py: {error!r}")


def test_functorch_says_that_it_is_active():
    recorded = []

    def square(x):
        recorded.append(is_functorch_active())
        return x**2

    with checking("torch._C._are_functorch_transforms_active"):
        square(torch.ones(()))
        torch.func.grad(square)(torch.ones(()))
        torch.func.vmap(square)(torch.ones(2))
        assert recorded == [False, True, True]


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_seen(register):
    with checking("Module._forward_hooks or _forward_pre_hooks"):
        module = torch.nn.Linear(2, 2)
        assert not has_hooks(module)
        handle = getattr(module, register)(lambda *_: None)
        assert has_hooks(module)
        handle.remove()
        assert not has_hooks(module)


def test_a_compiled_module_gives_the_original():
    with checking("OptimizedModule._orig_mod"):
        module = torch.nn.Linear(2, 2)
        assert without_compiler(torch.compile(module)) is module and without_compiler(module) is module


def test_the_compiler_packs_weights():
    with checking("torch._inductor.config.freezing"), torch.no_grad():
        from torch._dynamo.utils import is_parameter_freezing

        for enabled in (True, False):
            with packing_weights(enabled):
                assert is_parameter_freezing() == enabled
        assert not is_parameter_freezing()
