"""The files for accelerate and DeepSpeed: read as their programs read them. None of them is run here."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from reformer_lm.pretrained import ReformerLMPreTrainedModel

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "kind"), [("eight_gpus", DistributedType.MULTI_GPU), ("fsdp2", DistributedType.FSDP)])
def test_accelerate_reads_its_files(name: str, kind: DistributedType) -> None:
    config = ClusterConfig.from_yaml_file(ROOT / "configs" / "accelerate" / f"{name}.yaml")
    assert config.distributed_type == kind
    assert (config.num_processes, config.mixed_precision) == (8, "bf16")


def test_fsdp2_is_asked_for_what_accelerate_has() -> None:
    options = ClusterConfig.from_yaml_file(ROOT / "configs" / "accelerate" / "fsdp2.yaml").fsdp_config
    known = {
        *inspect.signature(FullyShardedDataParallelPlugin).parameters,
        "transformer_layer_cls_to_wrap",
        "offload_params",
    }
    assert {name.removeprefix("fsdp_") for name in options} - {"version"} <= known
    assert options["fsdp_version"] == 2
    assert options["fsdp_transformer_layer_cls_to_wrap"] in ReformerLMPreTrainedModel._no_split_modules
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy=options["fsdp_auto_wrap_policy"].lower(),
        transformer_cls_names_to_wrap=[options["fsdp_transformer_layer_cls_to_wrap"]],
        reshard_after_forward=options["fsdp_reshard_after_forward"],
        state_dict_type=options["fsdp_state_dict_type"],
    )
    assert plugin.reshard_after_forward is True


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_files_are_for_their_stage(stage: int) -> None:
    options = json.loads((ROOT / "configs" / "deepspeed" / f"zero{stage}.json").read_text(encoding="utf-8"))
    assert options["zero_optimization"]["stage"] == stage
    # Each option of the third stage alone is named for it.
    named = [key for key in options["zero_optimization"] if key.startswith("stage3_")]
    assert bool(named) == (stage == 3)
    # Trainer fills these in from its own arguments, so that they cannot contradict them.
    assert all(options[key] == "auto" for key in options if key.startswith(("train_", "gradient_")))
