"""Guided logits: the formula, its fixed points, and which half is which."""

from __future__ import annotations

import pytest
import torch

from vilau.generation.guidance import guided_logits


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, 30.0])
def test_formula(scale: float) -> None:
    """`uncond + s * (cond - uncond)`, conditional rows first."""
    conditional = torch.tensor([[1.0, -2.0, 0.5], [0.0, 4.0, 1.0]])
    unconditional = torch.tensor([[0.0, 1.0, 0.5], [3.0, -1.0, 2.0]])
    out = guided_logits(torch.cat([conditional, unconditional]), scale)
    torch.testing.assert_close(out, unconditional + scale * (conditional - unconditional))


def test_ends() -> None:
    """Scale 1 is the conditional logits exactly, scale 0 the unconditional ones."""
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(guided_logits(logits, 1.0), logits[:3])
    assert torch.equal(guided_logits(logits, 0.0), logits[3:])
