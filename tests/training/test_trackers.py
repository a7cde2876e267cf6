"""Trackers by name: what TensorBoard's files hold, what accelerate's trackers are told, and what goes wrong."""

from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from reformer_lm.errors import InputError
from reformer_lm.training.arguments import parse_arguments
from reformer_lm.training.metrics import Entry
from reformer_lm.training.trackers import TensorBoard, available_trackers, open_trackers

SETTINGS = {"model/hidden_size": 16, "lr": 0.5, "raw": True, "stride": None, "lr_schedule": "cosine"}


class Notebook(GeneralTracker):
    """Writes down what it is told."""

    name = "notebook"
    requires_logging_directory = True
    pages: dict[str, Any] = {}
    fails_at = ""

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        Notebook.pages = {"project": run_name, "folder": logging_dir, "lines": [], "finished": False}

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        if self.fails_at == "start":
            raise RuntimeError("no\naccount")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.pages["settings"] = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if self.fails_at == "log":
            raise ConnectionError("gone")
        self.pages["lines"].append((step, values))

    def finish(self) -> None:
        self.pages["finished"] = True


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> type[Notebook]:
    PartialState(cpu=True)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    monkeypatch.setattr(Notebook, "fails_at", "")
    return Notebook


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    return events


def test_histograms_have_a_bar_for_each_size(tmp_path: Path) -> None:
    sizes = {0: 5, 1: 3, 4: 2}
    board = TensorBoard(str(tmp_path), SETTINGS, 0)
    board.write(Entry(3, buckets={"buckets/layer_0": sizes, "buckets/layer_1": {5000: 1, 7: 4}}))
    board.close()
    events = events_of(tmp_path)
    (event,) = events.Histograms("buckets/layer_0")
    value = event.histogram_value
    assert event.step == 3
    assert (value.num, value.sum, value.sum_squares, value.min, value.max) == (10, 11, 35, 0, 4)
    bars = dict(zip(value.bucket_limit, value.bucket, strict=True))
    assert {limit: count for limit, count in bars.items() if count} == {0.5: 5, 1.5: 3, 4.5: 2}
    (event,) = events.Histograms("buckets/layer_1")
    assert sum(event.histogram_value.bucket) == 5
    assert len(event.histogram_value.bucket) <= 512
    assert event.histogram_value.sum == 5028


def test_hyperparameters_are_with_the_curves(tmp_path: Path) -> None:
    board = TensorBoard(str(tmp_path), SETTINGS, 0)
    board.write(Entry(1, {"train/loss": 2.0}))
    board.close()
    assert len(list(tmp_path.iterdir())) == 1
    events = events_of(tmp_path)
    metadata = events.SummaryMetadata("_hparams_/session_start_info")
    start = HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info
    found = {name: value.WhichOneof("kind") for name, value in start.hparams.items()}
    assert found == {
        "model/hidden_size": "number_value",
        "lr": "number_value",
        # torch takes True for the number 1.
        "raw": "number_value",
        "lr_schedule": "string_value",
    }
    assert start.hparams["lr"].number_value == 0.5


def test_a_new_run_in_the_same_folder_hides_the_old_curves(tmp_path: Path) -> None:
    for loss in (9.0, 1.0):
        board = TensorBoard(str(tmp_path), {}, 0)
        board.write(Entry(0, {"validation/loss": loss}))
        board.write(Entry(1, {"train/loss": loss}))
        board.close()
    events = events_of(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0)]
    assert [(event.step, event.value) for event in events.Scalars("validation/loss")] == [(0, 1.0)]


def test_accelerates_trackers_are_told_finite_numbers(notebook: type[Notebook], tmp_path: Path) -> None:
    assert "notebook" in available_trackers()
    (sink,) = open_trackers(("tensorboard", "notebook", "notebook"), str(tmp_path), SETTINGS, pytest.fail)
    sink.write(Entry(1, {"a": 1.0, "b": float("inf")}, {"sample": "春"}, {"buckets/layer_0": {1: 1}}))
    sink.write(Entry(2, texts={"sample": "春"}))
    sink.close()
    assert notebook.pages == {
        "project": "reformer_lm",
        "folder": str(tmp_path),
        "lines": [(1, {"a": 1.0})],
        "finished": True,
        "settings": SETTINGS,
    }


def test_a_tracker_that_fails_later_does_not_end_the_run(notebook: type[Notebook], tmp_path: Path) -> None:
    notes: list[str] = []
    (sink,) = open_trackers(("notebook",), str(tmp_path), {}, notes.append)
    notebook.fails_at = "log"
    for step in (1, 2):
        sink.write(Entry(step, {"a": 1.0}))
    sink.close()
    assert notes == ["notebook failed and is told nothing more (gone)"]


def test_a_tracker_that_cannot_start_is_an_error_of_one_line(notebook: type[Notebook], tmp_path: Path) -> None:
    notebook.fails_at = "start"
    with pytest.raises(InputError, match=r"^--report_to notebook: it does not start \(no account\); set it up"):
        open_trackers(("notebook",), str(tmp_path), {}, pytest.fail)


@pytest.mark.parametrize(
    ("names", "fragment"),
    [
        (["tensorbord"], "--report_to is tensorbord; 'tensorbord' is no known tracker; give some of tensorboard"),
        (["tensorboard", "notebook"], "'notebook' is not installed here; give some of tensorboard"),
        (["none", "tensorboard"], "--report_to is none tensorboard; 'none' stands alone"),
    ],
)
def test_unusable_names_are_refused_with_those_that_can_be_used(
    names: list[str], fragment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    # Of a known name whose package is missing, whatever is installed.
    monkeypatch.setattr("reformer_lm.training.trackers.available_trackers", lambda: ["tensorboard"])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    with pytest.raises(InputError) as caught:
        parse_arguments(["--report_to", *names])
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_may_come_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for written, read in (('["tensorboard"]', ("tensorboard",)), ('"none"', ("none",))):
        Path("c.json").write_text(f'{{"training": {{"report_to": {written}}}}}')
        assert parse_arguments(["--model_config", "c.json"]).arguments.report_to == read
    for wrong, fragment in (("[1]", "it must be a string or a list of strings"), ("[]", "give some of tensorboard")):
        Path("c.json").write_text(f'{{"training": {{"report_to": {wrong}}}}}')
        with pytest.raises(InputError, match=fragment):
            parse_arguments(["--model_config", "c.json"])
    assert parse_arguments(["--report_to", "none"]).arguments.report_to == ("none",)
