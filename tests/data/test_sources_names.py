"""Names that are known before the slow imports."""

from ddpm_hf.data.sources import BUILT_IN, LEVELS
from ddpm_hf.files.paths import BUILT_IN_DATA


def test_built_in_data_sets_have_the_same_names_everywhere():
    assert BUILT_IN_DATA == (*BUILT_IN,) == (*LEVELS,)
