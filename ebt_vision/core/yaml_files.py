"""YAML for settings: 1e-3 is a number; 1:30, 010, no and on are not converted as in YAML 1.1; a repeated key is an error."""

import re
from typing import Any

import yaml


class DuplicateKeyError(yaml.YAMLError):
    """A mapping has the same key twice."""


class _SettingsLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers and the booleans of YAML 1.2's core schema."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                line = key_node.start_mark.line + 1
                if key_node.value in seen:
                    raise DuplicateKeyError(
                        f"key {key_node.value!r} is in line {seen[key_node.value]} and again in line {line}; keep one of them"
                    )
                seen[key_node.value] = line
        return super().construct_mapping(node, deep)


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


_INT, _FLOAT, _BOOL = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:bool"
_SettingsLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT, _BOOL)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_SettingsLoader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_SettingsLoader.add_implicit_resolver(_INT, re.compile(r"[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_SettingsLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"""(?: [-+]? (?: \.[0-9]+ | [0-9][0-9_]*\.[0-9]* | [0-9][0-9_]*(?=[eE]) ) (?: [eE][-+]?[0-9]+ )?
        | [-+]? \.(?: inf | Inf | INF ) | \.(?: nan | NaN | NAN ) )$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)
_SettingsLoader.add_constructor(_INT, _decimal)


def load_yaml(text: str) -> Any:
    """Parse a YAML text. Raises yaml.YAMLError for invalid YAML and for a repeated key."""
    return yaml.load(text, Loader=_SettingsLoader)
