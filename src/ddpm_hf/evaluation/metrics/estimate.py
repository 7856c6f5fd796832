"""A measured number and its error."""

from typing import NamedTuple


class Estimate(NamedTuple):
    """A number computed from finitely many images.

    Attributes:
        value: the number.
        standard_error: its standard deviation over fresh sets of images, as estimated from this set; NaN if it is not known.
    """

    value: float
    standard_error: float
