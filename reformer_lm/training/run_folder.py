"""What a run's folder says about the run: with what settings, by which command, on what and with what it was made.

    run_config.json   model and training settings; --model_config takes it back
    run.json          for each start (a resumed run has several): command, versions, commit, hardware, data
    metrics.jsonl     what was measured
    report.html       all of it for a person to read

The first two are written here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from reformer_lm.config import ReformerLMConfig
from reformer_lm.training.arguments import COMMAND_LINE_ONLY, RunRequest
from reformer_lm.training.metrics import replace_file
from reformer_lm.training.model_configs import model_keys
from reformer_lm.version import __version__

CONFIG_NAME = "run_config.json"
RECORD_NAME = "run.json"
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "safetensors", "numpy", "tensorboard")
# To name them is to ask for them: shards that were made of another corpus or with another min_length are refused then.
# So who did not name them must not find them named.
_MEANT_ONLY_IF_NAMED = ("raw_data_path", "min_length")
# Of a saved model's config.json: who wrote it, and what the tokenizer decides.
_NO_SETTINGS = {
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "model_type",
    "_name_or_path",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}


def resolved_settings(request: RunRequest, config: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """All settings of a run, as a configuration file that gives the same run.

    Options that were not given and have no fixed default are null: they are decided again, in the same way.

    Args:
        request: The run's options.
        config: The run's model.
    """
    own, _ = model_keys()
    ours = isinstance(config, ReformerLMConfig)
    default = type(config)().to_dict()
    left_out = _NO_SETTINGS if ours else _NO_SETTINGS - {"model_type"}
    model = {
        key: value
        for key, value in config.to_dict().items()
        if (ours and key in own) or (key not in left_out and (value != default.get(key) or key == "model_type"))
    }
    named = request.given | (request.config_file.training.keys() if request.config_file else set())
    training = {
        key: value
        for key, value in dataclasses.asdict(request.arguments).items()
        if key not in COMMAND_LINE_ONLY and (key in named or key not in _MEANT_ONLY_IF_NAMED)
    }
    return {"model": model, "training": training}


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings as the text of a configuration file."""
    return json.dumps(settings, ensure_ascii=False, indent=2) + "\n"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run.

    Attributes:
        path: The folder.
        settings: From `resolved_settings`.
        start: What `describe_start` said of this start.
        is_resumed: Whether the run goes on from what is in the folder.
    """

    path: Path
    settings: Mapping[str, Mapping[str, Any]]
    start: Mapping[str, Any]
    is_resumed: bool = False

    def write(self) -> None:
        """Write settings and record; a resumed run's record also keeps the earlier starts.

        Raises:
            OSError: The files cannot be written.
        """
        earlier = self.starts() if self.is_resumed else []
        replace_file(self.path / CONFIG_NAME, settings_text(self.settings))
        record = {"starts": [*earlier, dict(self.start)]}
        replace_file(self.path / RECORD_NAME, json.dumps(record, ensure_ascii=False, indent=2) + "\n")

    def starts(self) -> list[dict[str, Any]]:
        """The starts that the folder's record tells of, oldest first; none if there is no record or it is damaged."""
        try:
            record = json.loads((self.path / RECORD_NAME).read_bytes())
            return [dict(start) for start in record["starts"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def hyperparameters(self) -> dict[str, bool | int | float | str | None]:
        """The settings in one level, as trackers want them; lists become text."""
        flat = {**{f"model/{key}": value for key, value in self.settings["model"].items()}, **self.settings["training"]}
        return {
            key: value if value is None or isinstance(value, bool | int | float | str) else _listed(value)
            for key, value in flat.items()
        }


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def describe_start(given: Sequence[str], device: torch.device, step: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """When, where, with what and by which command a run was started.

    Args:
        given: The command line without the program's name.
        device: Of the run.
        step: Steps done so far.
        facts: What else there is to say, of data and model.
    """
    return {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "step": step,
        "program": sys.argv[0],
        "arguments": list(given),
        "folder": str(Path.cwd()),
        "commit": commit_of_the_code(),
        "versions": versions(),
        "hardware": hardware(device),
        **facts,
    }


def versions() -> dict[str, str]:
    """Of Python, this package and what computes."""
    found = {"python": platform.python_version(), "reformer_lm": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, memory and graphics cards."""
    found: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    # Not every system tells.
    with contextlib.suppress(AttributeError, ValueError, OSError):
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found["gpu"] = card.name
        found["gpu_memory_gib"] = round(card.total_memory / 2**30, 1)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit_of_the_code() -> dict[str, Any] | None:
    """The commit that this package's files are of; None where git does not have them."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(here.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Installed into an environment inside some other project's checkout, the files are not of that project's commit.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    head = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no")
    return None if head is None else {"hash": head, "has_changes": bool(changes)}
