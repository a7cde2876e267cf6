"""Read the JSON file that ``--model_config`` names, and build the model's configuration from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reformer_lm.errors import InputError


@dataclass(frozen=True)
class ConfigFile:
    """A configuration file's two parts.

    Attributes:
        path: As the user gave it.
        model: Keys of `ReformerLMConfig`.
        training: Names of training options.
    """

    path: str
    model: Mapping[str, Any]
    training: Mapping[str, Any]


def read_config(path: str | Path) -> ConfigFile:
    """Read ``{"model": {...}, "training": {...}}``, or a flat object, which is the model part alone.

    Raises:
        InputError: If the file is missing, no UTF-8, no valid JSON (line and column) or of another shape.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such configuration file; configs/ has some (--model_config)") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: invalid UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a JSON file (--model_config)") from None
    try:
        content = json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: invalid JSON at line {error.lineno} column {error.colno}: {error.msg}") from None
    except InputError:
        raise
    except ValueError as error:
        # A number of thousands of digits.
        raise InputError(f"{path}: invalid JSON: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise InputError(f"{path}: the JSON is nested too deeply; it must be an object of settings") from None
    if not isinstance(content, dict):
        raise InputError(f'{path}: must be a JSON object such as {{"model": {{...}}, "training": {{...}}}}')
    if not {"model", "training"} & content.keys():
        return ConfigFile(str(path), content, {})
    for key, part in content.items():
        if key not in ("model", "training"):
            raise InputError(f'{path}: unknown key {key!r} beside "model" and "training"; move it into one of them')
        if not isinstance(part, dict):
            raise InputError(f"{path}: the value of {key!r} must be an object of settings")
    return ConfigFile(str(path), content.get("model", {}), content.get("training", {}))


def _unique(path: str | Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that stands twice, of which JSON would silently take the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path}: the key {twice!r} stands twice; remove one")
    return content
