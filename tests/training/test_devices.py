import pytest
import torch

from reformer_lm.errors import InputError
from reformer_lm.training.devices import choose_device, create_accelerator, describe_device


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, "cuda:0"),
        ("cpu", "cpu"),
        ("cuda", "cuda:0"),
        ("cuda:1", "cuda:1"),
        ("1", "cuda:1"),
        ("1,0", "cuda:1"),
        ("0, 1, 2, 3", "cuda:0"),
    ],
)
def test_names_of_devices(name: str | None, expected: str) -> None:
    assert str(choose_device(name)) == expected


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["gpu", "cuda:2", "5", "mps", "", ",", "cuda:x", "0,x", "-1"])
def test_wrong_names_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(InputError, match="--device is") as error:
        choose_device(name)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu() -> None:
    assert str(choose_device(None)) == "cpu"
    with pytest.raises(InputError, match=r"no CUDA device is here.*--device cpu"):
        choose_device("0")


def test_precision_can_change_between_runs_of_one_process() -> None:
    cpu = torch.device("cpu")
    assert create_accelerator(cpu).mixed_precision == "no"
    accelerator = create_accelerator(cpu, bf16=True)
    assert (accelerator.mixed_precision, accelerator.device) == ("bf16", cpu)
    assert create_accelerator(cpu).mixed_precision == "no"
    assert describe_device(cpu).startswith("cpu")


def test_half_precision_needs_cuda() -> None:
    with pytest.raises(InputError, match=r"--fp16 needs a CUDA device.*--bf16"):
        create_accelerator(torch.device("cpu"), fp16=True)


def test_several_processes_need_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="not MASTER_ADDR; start with torchrun"):
        create_accelerator(torch.device("cpu"))
