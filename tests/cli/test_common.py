"""What the verbs share."""

from __future__ import annotations

import torch

from vilau.cli.common import SMALL_MODEL, use_one_thread_if_small


def test_only_small_models_are_kept_to_one_thread() -> None:
    """Protects speed at both ends: a nano model's threads would wait for each other, a large model needs them all."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        use_one_thread_if_small(SMALL_MODEL)
        assert torch.get_num_threads() == 2
        use_one_thread_if_small(SMALL_MODEL - 1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
