"""YAML for configs, without the features that a config does not need.

Anchors and aliases (481 bytes of them can stand for 2 GB), tags, duplicate keys, keys that are not text, deep nesting and large
files are errors, so that no file means something else than it seems to, or takes minutes and gigabytes. Dates are text, and so
is every number that JSON would not read as one, except inf and nan.
"""

import os
import re

from ddpm_hf.extras import require_extra

require_extra("yaml", "train", "training runs")

import yaml  # noqa: E402

MAX_CHARACTERS = 2**18


MAX_VALUES = 12_000  # enough for the betas of 10,000 timesteps; read in a second


MAX_DEPTH = 16


TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"


INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)$")


# also 2e-4, which is text in YAML 1.1; 010 is ten
NUMBER = re.compile(r"([-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.?(inf|Inf|INF)|\.?(nan|NaN|NAN))$")


def read_yaml(path: str | os.PathLike):
    """Return the value of a YAML file.

    Raises:
        ValueError: it is not UTF-8, not YAML, or uses one of the above; in one line.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        text = file.read(MAX_CHARACTERS + 1)
    return parse_yaml(text.decode("utf-8"))


def parse_yaml(text: str):
    """Return the value of YAML text; raise ValueError as `read_yaml`."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it is larger than {MAX_CHARACTERS // 1024} KiB")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).replace('in "<unicode string>", ', "").split())) from None


def dump_yaml(value) -> str:
    """Return YAML that `parse_yaml` reads as the same value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    # YAML 1.1 without its numbers and dates
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = values = 0

    def fetch_flow_collection_start(self, token):
        if self.flow_level == MAX_DEPTH:
            raise yaml.YAMLError(TOO_DEEP)
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent, index):
        event = self.peek_event()
        if event.anchor is not None:
            self._refuse("anchors and aliases are not supported", event)
        if getattr(event, "tag", None) is not None:
            self._refuse("tags are not supported", event)
        if self.depth == MAX_DEPTH:
            self._refuse(TOO_DEEP, event)
        if self.values == MAX_VALUES:
            self._refuse(f"more than {MAX_VALUES} values", event)
        self.depth, self.values = self.depth + 1, self.values + 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        keys = set()
        for key, _ in node.value:
            if key.tag != self.DEFAULT_SCALAR_TAG:
                self._refuse("a key must be text", key)
            if key.value in keys:
                self._refuse(f"the key {key.value[:60]!r} is there twice", key)
            keys.add(key.value)
        return super().construct_mapping(node, deep)

    def _refuse(self, problem, node):
        raise yaml.YAMLError(f"{problem}, line {node.start_mark.line + 1}")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


for _class in _Loader, _Dumper:
    _class.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))
    _class.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789iInN"))
