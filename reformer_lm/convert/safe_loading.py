"""Reading files of weights and options from strangers: tensors and JSON only, nothing that could run code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from reformer_lm.errors import InputError

# Under which key training scripts keep the state dict, beside what else they save (Lightning has the first).
_STATE_KEYS = ("state_dict", "model_state_dict", "model")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: invalid UTF-8 at byte {error.start}; restore the file") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: invalid JSON at line {error.lineno} column {error.colno}: {error.msg}; restore the file"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: this is no JSON object of options")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a state dict from a file, onto the CPU.

    Args:
        path: .safetensors, its index of several such files (.index.json), or a file of torch.save.

    Returns:
        The tensors by name.

    Raises:
        InputError: the file cannot be read, is no such file, or holds more than tensors: a pickle can run code when it
            is loaded, so anything else in it is refused, not looked at.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if not path.is_file():
        raise InputError(f"{path}: there is no such file of weights")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: no readable safetensors file ({error}); copy it again") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(_refusal(path, str(error))) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: no readable file of torch.save ({first}); copy it again") from None
    return _state_dict(content, path)


def _refusal(path: Path, reason: str) -> str:
    """What to say of a pickle that torch refuses."""
    # torch names the class or function that it was asked for: "... GLOBAL posix.system was not an allowed global ...".
    words = reason.replace("`", " ").split()
    if "GLOBAL" in words and words.index("GLOBAL") + 1 < len(words):
        wanted = f"it asks for {words[words.index('GLOBAL') + 1]}"
    elif "Unsupported operand" in reason:
        wanted = "it has pickle instructions that no file of tensors has"
    elif "global" in reason.lower() or "class" in reason.lower():
        wanted = "it asks for Python classes or functions"
    else:
        return f"{path}: no readable file of torch.save; give a .safetensors file or a saved state dict"
    return (
        f"{path}: this holds more than tensors ({wanted}); loading it could run code, so it is refused: where it comes "
        "from, save model.state_dict() alone"
    )


def _read_shards(path: Path) -> dict[str, Tensor]:
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise InputError(f"{path}: this index names no files (weight_map); copy the folder again")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(names.values())):
        if Path(file).name != file:
            raise InputError(f"{path}: the index names a file outside of its folder ({file}); it is refused")
        tensors |= read_tensors(path.parent / file)
    lost = sorted(set(names) - set(tensors))
    if lost:
        raise InputError(f"{path}: {lost[0]} and {len(lost) - 1} more are in none of the files; copy the folder again")
    return tensors


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for key in _STATE_KEYS:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: this is no state dict, but a {type(content).__name__}; save model.state_dict()")
    wrong = [str(name) for name, value in content.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if wrong or not content:
        what = f"its entry {wrong[0]!r} is no tensor" if wrong else "it is empty"
        raise InputError(f"{path}: this is no state dict: {what}; save model.state_dict()")
    return dict(content)
