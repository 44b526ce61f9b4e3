"""Plain data as YAML: what is a number in it, to those who write it and to those who read it. No torch."""

from __future__ import annotations

import re
from typing import Any

import yaml

# Of YAML 1.2's floats those that have an exponent: YAML 1.1, which PyYAML reads, wants a point and the
# exponent's sign in them, and takes 2e8 and 1e-4 for texts.
_EXPONENTS = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")


class Loader(yaml.SafeLoader):
    """PyYAML's, to which 2e8 is a number."""


class Dumper(yaml.SafeDumper):
    """PyYAML's, which quotes the text 2e8."""


for _each in (Loader, Dumper):
    _each.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENTS, list("-+.0123456789"))


def to_yaml(data: Any) -> str:
    """Plain data as YAML, keys in their order, that `Loader` reads back as it is."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True)
