"""The direction of imports: who may know whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "reformer_lm"

# Each room may import the rooms named here (and itself); those of OPEN are open to all.
OPEN = {"errors", "version"}
ALLOWED = {
    "ops": set(),
    "config": {"ops", "config_checks"},
    "config_checks": set(),
    "cache": {"ops", "config"},
    "layers": {"ops", "config", "cache"},
    "pretrained": {"config", "layers"},
    "backbone": {"config", "cache", "layers", "pretrained"},
    "heads": {"ops", "config", "layers", "pretrained", "backbone"},
    "model": {"config", "cache", "pretrained", "backbone", "heads"},
    "encoder_decoder": {"config", "cache", "backbone", "model"},
    "wrapper": {"model"},
    # convert compares the angles of positions.
    "convert": {"config", "layers", "model", "text", "command_line"},
    "command_line": set(),
    "pages": set(),
    "text": {"corpus", "command_line"},  # builds vocabularies from corpora
    "corpus": {"text"},
    # scoring sees to it that the linear layers are given few shapes.
    "scoring": {"layers", "model", "text"},
    "generation": {"text", "cache"},
    # training compiles the feed-forward blocks one by one.
    "training": {
        "config",
        "layers",
        "heads",
        "model",
        "encoder_decoder",
        "text",
        "corpus",
        "generation",
        "pages",
        "command_line",
    },
    "prediction": {
        "config",
        "heads",
        "model",
        "encoder_decoder",
        "text",
        "corpus",
        "generation",
        "scoring",
        "pages",
        "command_line",
    },
    "__init__": {"backbone", "cache", "config", "encoder_decoder", "heads", "layers", "model", "wrapper"},
}  # fmt: skip
# transformers is for the model's shell, tokenizers and the jobs; accelerate for training only.
ALLOWED_PACKAGES = {
    "transformers": {
        "config",
        "cache",
        "pretrained",
        "backbone",
        "heads",
        "model",
        "encoder_decoder",
        "wrapper",
        "text",
        "corpus",
        "generation",
        "scoring",
        "training",
        "prediction",
        "convert",
    },  # fmt: skip
    "accelerate": {"training"},
}
SCRIPTS = {"train_reformer", "predict", "tests"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def modules() -> list[Path]:
    found = sorted(PACKAGE.rglob("*.py"))
    assert len(found) > 20
    return found


def test_every_room_is_listed() -> None:
    assert {room_of(path) for path in modules()} - OPEN == set(ALLOWED)


def test_imports_go_in_one_direction() -> None:
    wrong = []
    for path in modules():
        room = room_of(path)
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "reformer_lm":
                # `import reformer_lm` alone registers the model with transformers' Auto classes.
                free = len(parts) == 1 or parts[1] in OPEN | {room}
                allowed = free or parts[1] in ALLOWED.get(room, set())
            else:
                allowed = parts[0] not in SCRIPTS and room in ALLOWED_PACKAGES.get(parts[0], {room})
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_room_without_a_name_of_its_own() -> None:
    assert not [path for path in modules() if path.stem in {"utils", "util", "common", "helpers", "helper", "misc"}]


def test_no_file_has_outgrown_its_room() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in [*modules(), ROOT / "train_reformer.py", ROOT / "predict.py"]
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long, long
