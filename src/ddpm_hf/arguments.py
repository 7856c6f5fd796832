"""Checks the types and ranges of a constructor's arguments before anything is built. Imports only Python's standard library.

The type of an argument is its annotation; further limits are arguments of a decorator:

    @checked_arguments(dropout="[0, 1)", pool=("attention", "average"))
    def __init__(self, dropout: float = 0.0, pool: str = "attention"):
"""

import functools
import inspect
import math
import reprlib
import types
import typing
from collections.abc import Callable
from numbers import Integral, Real

SHORT = reprlib.Repr()


SHORT.maxlist = SHORT.maxtuple = SHORT.maxdict = 16


SHORT.maxstring = SHORT.maxlong = SHORT.maxother = 60


# type -> its name in a message for one value, and for the entries of a list
TYPE_NAMES = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    bool: ("True or False", "truth values"),
    str: ("a string", "strings"),
    dict: ("a dictionary", "dictionaries"),
}


def shown(value) -> str:
    """A value as error messages show it: its repr on one line, shortened to 60 characters."""
    try:
        text = " ".join(SHORT.repr(value).split())
    except ValueError:
        return "an integer of thousands of digits"  # Python refuses to print it
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(names) -> str:
    """Names as error messages list them: the first 16 on one line, with unprintable characters escaped."""
    names = list(map(str, names))
    texts = [name if name.isprintable() and len(name) <= 60 else shown(name) for name in names[:16]]
    return ", ".join(texts) + (", ..." if len(names) > 16 else "")


def sides(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image size that a config may give as one number."""
    return (size, size) if isinstance(size, int) else tuple(size)  # type: ignore[return-value]


def check_argument(name: str, value, annotation, allowed: str | tuple | None = None):
    """Returns the value in the type of its annotation; numpy's numbers and arrays become Python's.

    An integer is a number, a float without a fraction is an integer, and a truth value is neither. A list, as in JSON, is
    allowed for a tuple.

    Args:
        name: of the argument, for the message.
        annotation: made of int, float, bool, str, dict, None, list[...], tuple[...] and unions of them.
        allowed: for numbers, also those in a list, the interval that they must lie in, such as "(0, 1]"; without one they
            must be finite. For strings the choices.

    Raises:
        ValueError: a value of another type, or one that is not allowed; one line with name, value and what is allowed.
    """
    try:
        result = _reader(annotation)(value)
        if isinstance(allowed, tuple):
            fits = result in allowed
        else:
            fits = _within(result, *_bounds(allowed or "(-inf, inf)"))
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(f"{name}={shown(value)} {_described(annotation, allowed)}")
    return result


def checked_arguments(**allowed: str | tuple | None) -> Callable:
    """Decorates a constructor: checks every argument whose annotation it can read by `check_argument`.

    `allowed` may name more arguments than the constructor has. Arguments with other annotations, and those that begin with an
    underscore, are not checked. The constructor gets an attribute `check`: check(arguments, prefix="") returns a dictionary
    of arguments with checked values; the prefix precedes the names in messages.

    Raises:
        ValueError: as `check_argument`; an argument without a default is missing.
    """

    def decorate(init):
        parameters = dict(list(inspect.signature(init).parameters.items())[1:])  # without self
        kinds = {name: entry.annotation for name, entry in parameters.items() if _readable(entry.annotation)}
        required = [name for name in kinds if parameters[name].default is inspect.Parameter.empty]

        def check(arguments, prefix=""):
            return {
                name: check_argument(prefix + name, value, kinds[name], allowed.get(name)) if name in kinds else value
                for name, value in arguments.items()
            }

        @functools.wraps(init)
        def checking(self, *args, **kwargs):
            by_position = check(dict(zip(parameters, args)))
            kwargs = check(kwargs)
            for name in required:
                if name not in by_position and name not in kwargs:
                    raise ValueError(f"{name} is missing")
            return init(self, *by_position.values(), *args[len(by_position) :], **kwargs)

        checking.check = check
        return checking

    return decorate


def _options(annotation):
    """The types that an annotation allows, without array types: arrays are read as lists."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return tuple(option for option in options if not hasattr(option, "tolist"))


def _readable(annotation):
    for option in _options(annotation):
        entries = typing.get_args(option)
        if not all(entry in TYPE_NAMES or entry in (types.NoneType, ...) for entry in entries or (option,)):
            return False
    return True


@functools.cache
def _reader(annotation):
    """A function that converts a value to the annotation's type, or raises TypeError."""
    options = _options(annotation)
    if len(options) > 1:
        readers = [_reader(option) for option in options]

        def read(value):
            for reader in readers:
                try:
                    return reader(value)
                except TypeError:
                    pass
            raise TypeError

    elif typing.get_origin(annotation) in (list, tuple):
        entries = typing.get_args(annotation)
        entry = _reader(entries[0])
        length = len(entries) if typing.get_origin(annotation) is tuple and ... not in entries else None

        def read(value):
            if type(value) not in (list, tuple):
                value = _of_python(value)
            if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
                raise TypeError
            if _all_of(value, entries[0]):
                return value
            return (tuple if isinstance(value, tuple) else list)(map(entry, value))

    elif annotation in (int, float):

        def read(value):
            if type(value) is annotation:
                return value
            value = _of_python(value)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError
            try:
                exact = float(value)
            except OverflowError:
                if annotation is float:
                    raise TypeError from None
            if annotation is float:
                return value if isinstance(value, int) else exact
            if isinstance(value, Integral) or exact.is_integer():
                return int(value)
            raise TypeError

    else:
        kind = types.NoneType if annotation is None else annotation

        def read(value):
            if isinstance(value, kind):
                return value
            value = _of_python(value)
            if not isinstance(value, kind):
                raise TypeError
            return value

    return read


def _all_of(values, kind):
    return set(map(type, values)) == {kind}


def _of_python(value):
    """Scalars and arrays of numpy, and tensors, as numbers and lists of Python."""
    return value.tolist() if hasattr(value, "tolist") else value


@functools.cache
def _bounds(interval):
    """(lowest, highest, whether the first is allowed, whether the second is) of "(0, 1]"."""
    low, high = interval[1:-1].split(",")
    return float(low), float(high), interval[0] == "[", interval[-1] == "]"


def _within(value, low, high, with_low, with_high):
    if isinstance(value, (list, tuple)):
        if _all_of(value, float):  # perhaps thousands of betas: without NaN it is enough to check the ends
            value = (math.nan,) if math.isnan(sum(value)) else (min(value), max(value))
        return all(_within(entry, low, high, with_low, with_high) for entry in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True
    return (low < value or (with_low and low == value)) and (value < high or (with_high and value == high))


def _described(annotation, allowed):
    if isinstance(allowed, tuple):
        return f"is not known; choose one of {', '.join(map(str, allowed))}"
    options, texts = _options(annotation), []
    for option in options:
        entries = typing.get_args(option)
        if entries:
            count = f"{len(entries)} " if typing.get_origin(option) is tuple and ... not in entries else ""
            texts.append(f"a list of {count}{TYPE_NAMES[entries[0]][1]}")
        elif option in TYPE_NAMES:
            texts.append(TYPE_NAMES[option][0])
    text = "must be " + " or ".join(texts) + (f" in {allowed}" if allowed else "")
    return f"{text} or None" if types.NoneType in options else text
