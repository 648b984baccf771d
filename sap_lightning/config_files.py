"""Config files: what a person may write into one, and what a parser is shown of it."""

from __future__ import annotations

import locale
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile

from sap_lightning.errors import InputError, first_line, short
from sap_lightning.io.rules import errors_in
from sap_lightning.option_errors import group_error, option_error, types_of
from sap_lightning.options import first_input_error


class ConfigFile(ActionConfigFile):
    """A config file, or the text of one, which is named before what is wrong in it."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        file = os.path.expanduser(values)
        with errors_in(values):
            text = text_of(file)
            config = config_in(text)
            _require_groups(config, parser, types_of(parser))
            given, shown = file, self.shown(config, parser)
            if shown != config:
                given = yaml.safe_dump(shown)
            elif not _is_read_alike(text):
                given = text
            try:
                super().__call__(parser, cfg, given, option_string)
            except UnicodeError:
                raise InputError("holds letters that the locale has none for; set PYTHONUTF8=1") from None
            except TypeError as error:
                if not os.path.isfile(file):
                    raise
                said = str(error).removeprefix(f'Parser key "{self.dest}": ')
                raise first_input_error(error) or option_error(said, parser) from None

    def shown(self, config: dict[str, Any], parser: Any) -> dict[str, Any]:
        """What of it is for this parser."""
        return config


def _is_read_alike(text: str) -> bool:
    """Whether jsonargparse, which reads files by the locale, reads what is written in UTF-8."""
    return text.isascii() or locale.getpreferredencoding(False).lower() in ("utf-8", "utf8")


def text_of(file: str) -> str:
    """What stands in a config file, which may be given as its text.

    Raises:
        InputError: when it is no text in UTF-8.
    """
    file = os.path.expanduser(file)
    try:
        return Path(file).read_text(encoding="utf-8") if os.path.isfile(file) else file
    except UnicodeDecodeError as error:
        raise InputError(f"is no text in UTF-8 ({first_line(error)}); save it in UTF-8") from error
    except (OSError, ValueError):  # which the parser will say
        return file


def config_in(text: str) -> dict[str, Any]:
    """The settings by group that a config file's text holds; none where it is but a name of a file that is not there.

    Raises:
        InputError: when it is no YAML, or holds something else, or a key twice.
    """
    try:
        config = yaml.load(text, _Loader)  # a SafeLoader
    except InputError:
        raise
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        said = " ".join(str(error).replace('in "<unicode string>", ', "in ").split())
        raise InputError(f"is no YAML: {said}") from error
    if config == text:
        return {}
    if config is None:
        raise InputError("is empty; give settings by group, such as model: {rank: 8}")
    if not isinstance(config, dict):
        raise InputError(f"holds {short(config)}, expected settings by group, such as model: {{rank: 8}}")
    return config


class _Loader(yaml.SafeLoader):
    """Of two values under one key YAML's own would take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        seen = set()
        for key in keys:
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise InputError(f"{short(key.value)} stands twice, again in line {line}; leave one of them out")
            seen.add((key.tag, key.value))
        return node


def _require_groups(config: Mapping[Any, Any], parser: Any, options: Iterable[str], within: str = "") -> None:
    """Raises InputError for a group that holds no settings."""
    for key, value in config.items():
        name = f"{within}{key}"
        if name in options or not any(option.startswith(f"{name}.") for option in options):
            continue
        if isinstance(value, Mapping):
            _require_groups(value, parser, options, f"{name}.")
        elif not isinstance(value, str):  # which would name a file
            raise group_error(name, parser, value)
