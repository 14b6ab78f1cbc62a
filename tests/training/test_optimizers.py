"""Who is trained by which optimizer at which rate, and how the rate moves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vilau.training.config import OptimizerConfig
from vilau.training.optimizers import build_optimizers, lr_share, set_lr


class Net(nn.Module):
    """A few parameters with telling names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 4)
        self.hidden = nn.Linear(4, 4)
        self.conv = nn.Conv2d(3, 4, 3)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.lm_head = nn.Linear(4, 5)


def settings(optimizers: list[torch.optim.Optimizer], net: nn.Module) -> dict[str, tuple[str, float, float]]:
    """Name of each trained parameter -> (optimizer, peak rate, weight decay)."""
    names = {id(p): name for name, p in net.named_parameters()}
    return {
        names[id(p)]: (type(o).__name__, group["peak_lr"], group["weight_decay"])
        for o in optimizers
        for group in o.param_groups
        for p in group["params"]
    }


def test_adamw_groups() -> None:
    """Frozen parameters are left out, biases are not decayed, the first matching scale applies."""
    net = Net()
    config = OptimizerConfig(lr=0.1, weight_decay=0.3, lr_scales={"^hid": 0.5, "hidden|conv": 0.1})
    found = settings(build_optimizers(net, config), net)
    assert found == {
        "embed_tokens.weight": ("AdamW", 0.1, 0.3),
        "hidden.weight": ("AdamW", 0.05, 0.3),
        "hidden.bias": ("AdamW", 0.05, 0.0),
        "conv.weight": ("AdamW", pytest.approx(0.01), 0.3),
        "conv.bias": ("AdamW", pytest.approx(0.01), 0.0),
        "lm_head.weight": ("AdamW", 0.1, 0.3),
        "lm_head.bias": ("AdamW", 0.1, 0.0),
    }


def test_muon_takes_hidden_matrices_only() -> None:
    """Embeddings, heads, convolutions and biases stay with AdamW; every parameter has exactly one optimizer."""
    net = Net()
    found = settings(build_optimizers(net, OptimizerConfig(name="muon", muon_lr=0.02)), net)
    assert [name for name, (kind, _, _) in found.items() if kind == "Muon"] == ["hidden.weight"]
    assert set(found) == {n for n, p in net.named_parameters() if p.requires_grad}
    assert found["hidden.weight"][1] == 0.02


def test_lr_scales_apply_to_muon_too() -> None:
    """A part that shall learn slower does so whichever optimizer has its weights."""
    net = Net()
    found = settings(build_optimizers(net, OptimizerConfig(name="muon", muon_lr=0.02, lr_scales={"^hid": 0.5})), net)
    assert found["hidden.weight"] == ("Muon", 0.01, 0.01)


def test_tied_parameters_are_trained_once() -> None:
    """A head tied to the embedding is one parameter: twice in an optimizer it would move twice."""
    net = Net()
    net.lm_head.weight = net.embed_tokens.weight
    optimizers = build_optimizers(net, OptimizerConfig())
    parameters = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(parameters) == len(set(parameters))


def test_nothing_to_train_is_an_error() -> None:
    """Freezing everything is a mistake, and said so."""
    with pytest.raises(ValueError, match="every parameter is frozen"):
        build_optimizers(Net().requires_grad_(False), OptimizerConfig())


def test_schedule_written_out() -> None:
    """Linear warm-up to the peak, then a cosine to `final_lr`, step by step."""
    config = OptimizerConfig(warmup_steps=4, final_lr=0.1)
    shares = [lr_share(step, 20, config) for step in range(20)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    for step in range(4, 20):
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 16))
        assert math.isclose(shares[step], expected)
    assert shares[4] == 1.0 and shares[4:] == sorted(shares[4:], reverse=True)
    assert math.isclose(lr_share(20, 20, config), 0.1) and math.isclose(lr_share(99, 20, config), 0.1)


def test_schedule_at_its_edges() -> None:
    """No warm-up, a warm-up longer than the stage, one step: always above zero and at most the peak."""
    for warmup, total in ((0, 5), (10, 3), (3, 3), (0, 1), (1, 1)):
        config = OptimizerConfig(warmup_steps=warmup)
        shares = [lr_share(step, total, config) for step in range(total)]
        assert all(0 < share <= 1 for share in shares)
    assert lr_share(0, 5, OptimizerConfig(warmup_steps=0)) == 1.0


def test_set_lr_keeps_the_ratios() -> None:
    """All groups of all optimizers follow one schedule from their own peaks, also after many changes."""
    net = Net()
    optimizers = build_optimizers(net, OptimizerConfig(name="muon", lr=0.1, muon_lr=0.02, lr_scales={"conv": 0.5}))
    for share in (0.5, 0.001, 0.25):
        set_lr(optimizers, share)
    rates = {group["lr"] for o in optimizers for group in o.param_groups}
    assert rates == {0.1 * 0.25, 0.05 * 0.25, 0.02 * 0.25}
