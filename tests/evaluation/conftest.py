"""A judge of random weights, for tests that need some judge but not a good one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vilau.data.nano.world import World


@pytest.fixture(scope="session")
def world() -> World:
    """The whole nano world in its first style."""
    return World.load()


@pytest.fixture(scope="session")
def random_judge_dir(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a judge that was never trained."""
    import torch
    from safetensors.torch import save_file

    from vilau.evaluation.judge import RECORD, WEIGHTS, JudgeNet

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judge")
    net = JudgeNet(len(world.names), len(world.colours), 8)
    save_file(net.state_dict(), folder / WEIGHTS)
    record = {"objects": world.names, "backgrounds": world.colours, "image_size": 32, "width": 8, "seed": 0}
    (folder / RECORD).write_text(json.dumps(record))
    return folder
