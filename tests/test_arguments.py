"""Types and ranges of arguments."""

import math

import numpy as np
import pytest

from ddpm_hf.arguments import check_argument, checked_arguments, shown

VALUES = [
    # annotation, allowed, value, what it becomes
    (int, "[1, 10]", 10, 10),
    (int, None, np.int64(3), 3),
    (int, None, 1e3, 1000),
    (int | None, "[1, 10]", None, None),
    (float, "(0, 1]", 1, 1),
    (float, None, np.float32(0.5), 0.5),
    (float, "(0, inf]", math.inf, math.inf),
    (bool, None, np.bool_(True), True),
    (str, ("a", "b"), "b", "b"),
    (dict | None, None, {"a": 1}, {"a": 1}),
    (tuple[int, ...], "[1, 10]", [1, 2.0], [1, 2]),
    (int | tuple[int, int] | None, "[1, 10]", (3, 4), (3, 4)),
    (list[float] | np.ndarray | None, "(0, 1)", np.array([0.5, 0.25]), [0.5, 0.25]),
]
WRONG = [
    (int, "[1, 10]", True, "x=True must be an integer in [1, 10]"),
    (int, "[1, 10]", 11, "x=11 must be an integer in [1, 10]"),
    (int, None, 2.5, "x=2.5 must be an integer"),
    (int, None, math.nan, "x=nan must be an integer"),
    (int, None, "1", "x='1' must be an integer"),
    (int, "[1, 10]", 10**5000, "x=an integer of thousands of digits must be an integer in [1, 10]"),
    (float, None, math.nan, "x=nan must be a number"),
    (float, None, -math.inf, "x=-inf must be a number"),
    (float, None, 10**400, f"x=1{27 * '0'}...{29 * '0'} must be a number"),
    (float | None, "(0, 1)", 1.0, "x=1.0 must be a number in (0, 1) or None"),
    (float, "[0, 1)", [0.5], "x=[0.5] must be a number in [0, 1)"),
    (bool, None, "never", "x='never' must be True or False"),
    (bool, None, 1, "x=1 must be True or False"),
    (str, None, None, "x=None must be a string"),
    (str | None, ("a", None), "c", "x='c' is not known; choose one of a, None"),
    (str, ("a", "b"), ["a"], "x=['a'] is not known; choose one of a, b"),
    (dict, None, [1], "x=[1] must be a dictionary"),
    (tuple[int, ...], "[1, 10]", [1, 11], "x=[1, 11] must be a list of integers in [1, 10]"),
    (tuple[int, ...], "[1, 10]", "12", "x='12' must be a list of integers in [1, 10]"),
    (tuple[int, ...], "[1, 10]", [[1]], "x=[[1]] must be a list of integers in [1, 10]"),
    (
        int | tuple[int, int] | None,
        "[1, 10]",
        [1, 2, 3],
        "x=[1, 2, 3] must be an integer or a list of 2 integers in [1, 10] or None",
    ),
    (list[float] | np.ndarray, None, [0.5, math.nan], "x=[0.5, nan] must be a list of numbers"),
    (list[float] | np.ndarray, None, np.array(["a"]), "x=array(['a'], dtype='<U1') must be a list of numbers"),
]


@pytest.mark.parametrize(("annotation", "allowed", "value", "expected"), VALUES)
def test_values_become_those_of_their_annotation(annotation, allowed, value, expected):
    actual = check_argument("x", value, annotation, allowed)
    assert actual == expected and type(actual) is type(expected)


@pytest.mark.parametrize(("annotation", "allowed", "value", "message"), WRONG, ids=[case[-1][:30] for case in WRONG])
def test_other_values_are_refused_in_one_line(annotation, allowed, value, message):
    with pytest.raises(ValueError) as error:
        check_argument("x", value, annotation, allowed)
    assert str(error.value) == message


def test_values_are_shown_short_and_on_one_line():
    assert shown("a" * 1000) == f"'{'a' * 27}...{'a' * 28}'" and shown(["a", None, 1.5]) == "['a', None, 1.5]"
    for value in ("a\nb", np.zeros((9, 9)), [[[[[[1]]]]]] * 50, {str(i): i for i in range(99)}, 7**999, 10**9999):
        assert len(shown(value)) <= 60 and "\n" not in shown(value)
    deep = []
    for _ in range(100000):
        deep = [deep]
    assert shown(deep) == "[[[[[[[...]]]]]]]"


def test_a_checked_constructor():
    class Thing:
        @checked_arguments(size="[1, 4]", kind=("a", "b"))
        def __init__(self, size: int, kind: str = "a", other: object = None):
            self.arguments = size, kind, other

    assert Thing(np.int64(2)).arguments == (2, "a", None) and Thing(kind="b", size=2.0, other=3).arguments == (
        2,
        "b",
        3,
    )
    for arguments, message in (
        (dict(size=5), "size=5 must be an integer in [1, 4]"),
        (dict(size=1, kind="c"), "kind='c' is not known; choose one of a, b"),
        ({}, "size is missing"),
    ):
        with pytest.raises(ValueError) as error:
            Thing(**arguments)
        assert str(error.value) == message
    for arguments in ((1, "a", 2, 3), (1, "a", 2)):
        with pytest.raises(TypeError, match="positional|multiple values"):
            Thing(*arguments, **({"kind": "b"} if len(arguments) == 3 else {}))
    with pytest.raises(ValueError, match="^unet.size=0 must be"):
        Thing.__init__.check({"size": 0}, "unet.")
