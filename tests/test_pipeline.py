"""Where a model runs when nobody says it."""

from __future__ import annotations

import pytest
import torch

from vilau.pipeline import choose_device


@pytest.mark.parametrize(("local", "expected"), [(None, "cuda"), ("0", "cuda:0"), ("1", "cuda:1"), ("3", "cuda:1")])
def test_processes_of_torchrun_have_gpus_of_their_own(
    local: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two GPUs each process takes the one of its local rank, not all of them the first."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert choose_device("auto") == choose_device(None) == torch.device(expected)
    assert choose_device("cpu") == torch.device("cpu")
