"""YAML of configs: what it reads, and what it refuses within a moment."""

import math
import time

import pytest

from ddpm_hf.files.strict_yaml import dump_yaml, parse_yaml, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e3", 1000.0),  # a string in YAML 1.1
        ("2E-4", 2e-4),
        ("-.5", -0.5),
        ("1000", 1000),
        ("010", 10.0),  # 8 in YAML 1.1
        ("1:30", "1:30"),  # 90 in YAML 1.1
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("2024-01-01", "2024-01-01"),
        ("2024-13-45", "2024-13-45"),
        (".inf", math.inf),
        ("-inf", -math.inf),
        ("no", False),
        ("~", None),
        ("'1e3'", "1e3"),
        ("[1, [2.5, x]]", [1, [2.5, "x"]]),
        ("{a: {b: null}}", {"a": {"b": None}}),
    ],
)
def test_values(text, value):
    parsed = parse_yaml(text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "anchors and aliases are not supported, line 1"),
        ("&a [*a]", "anchors and aliases are not supported, line 1"),
        ("a: !!python/object:os.system x", "tags are not supported, line 1"),
        ("a: !!bool x", "tags are not supported"),
        ("a: 1\nb: 2\na: 3", "the key 'a' is there twice, line 3"),
        ("a: {b: 1, b: 2}", "the key 'b' is there twice, line 1"),
        ("1: 2", "a key must be text, line 1"),
        ("? [1]\n: 2", "a key must be text"),
        ("[" * 100_000, "nested deeper than 16 levels"),
        ("{a: " * 50_000, "nested deeper than 16 levels"),
        ("- " * 100_000, "nested deeper than 16 levels"),
        ("? " * 100_000, "nested deeper than 16 levels"),
        ("[" + "0, " * 80_000 + "]", "more than 12000 values"),
        ("x" * 300_000, "larger than 256 KiB"),
        ("a: " + "1" * 5000, "4300 digits"),
        ("a:\t- b\n\tc", "cannot start any token"),
        ("a: \0", "special characters are not allowed"),
        ("a: [1", "expected ',' or ']'"),
        ("--- 1\n--- 2", "expected a single document"),
    ],
    ids=lambda text: text[:12],
)
def test_refused(text, message, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    start = time.process_time()
    for read in (lambda: parse_yaml(text), lambda: read_yaml(tmp_path / "a.yaml")):
        with pytest.raises(ValueError) as error:
            read()
        assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300
    assert time.process_time() - start < 4


def test_what_is_written_is_read_again(tmp_path):
    texts = (
        "1e3",
        "010",
        "1:30",
        "no",
        "",
        "~",
        "2024-01-01",
        "0x10",
        "1_000",
        "=",
        "<<",
        "a: b #c",
        "\udcff",
        "inf",
        "nan",
    )
    numbers = 1e-5, 1e22, 5, -0.0, 5e-324, math.inf, True, None
    shared = [1, 2]
    value = {"texts": list(texts), "numbers": list(numbers), "twice": [shared, shared], "in": {"b": 1, "a": 2}}
    text = dump_yaml(value)
    assert parse_yaml(text) == value and list(parse_yaml(text)) == list(value) and "&" not in text
    (tmp_path / "a.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match="codec can't decode"):
        read_yaml(tmp_path / "a.yaml")
