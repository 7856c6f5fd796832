"""Escapes text from others for Markdown files, so that it stays text."""

import json
import math
import re


def printable(text: str) -> str:
    """Text on one line; characters that do not print, such as line ends and changes of direction, become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def code(text: str) -> str:
    """Text as a code span of Markdown."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.strip("`") != text or text.strip() != text else ""
    return f"{fence}{space}{text}{space}{fence}"


def title(text: str) -> str:
    """Text for a heading: plain names as they are; in other text each sign of Markdown and HTML is escaped."""
    text = printable(text)
    return text if re.fullmatch(r"[\w./ -]+", text) else re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def fenced_json(values: dict) -> str:
    """JSON for a fenced block; nothing in it can be taken for the end of the block."""
    return json.dumps(values, indent=2).replace("`", "\\u0060").replace("<", "\\u003c").replace(">", "\\u003e")


def listed_names(names: list[str] | None) -> str:
    """The first 20 class names as code spans in a cell of a table; "" if they are not known."""
    listed = ", ".join(code(name[:100]) for name in (names or [])[:20] if name)
    return listed.replace("|", "\\|") + (", ..." if len(names or []) > 20 else "")


def with_error(value: float, error: float | None, sign: str = "±") -> str:
    """A number with two digits of its standard error; with four decimals where the error is not known."""
    if error is None or not error > 0:
        return f"{value:.4f}"
    digits = max(0, min(8, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} {sign} {error:.{digits}f}"
