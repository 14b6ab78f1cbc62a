"""Averaged weights: the formula, who is averaged, and that nothing of the training is touched."""

from __future__ import annotations

import torch
from torch import nn

from vilau.training.weight_average import WeightAverage


def test_average_and_return() -> None:
    """Steps of known decay; inside the context the averages, afterwards the own weights bit for bit."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    module[1].bias.requires_grad_(False)
    average = WeightAverage(module, 0.15)
    start, weight = module[0].weight.detach().clone(), module[0].weight
    expected = start
    for step, decay in enumerate((0.1, 0.15, 0.15)):  # (1 + step) / (10 + step), at most 0.15
        with torch.no_grad():
            weight.add_(step + 1.0)
        average.update(step)
        expected = decay * expected + (1 - decay) * weight.detach()
    own = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module[1].running_mean.fill_(7.0)
    with average.in_place():
        torch.testing.assert_close(module[0].weight.detach(), expected)
        assert not torch.equal(module[0].weight.detach(), own["0.weight"])
        assert float(module[1].running_mean[0]) == 7.0, "buffers are the module's own"
    assert torch.equal(module[0].weight.detach(), own["0.weight"])
    assert set(average.state_dict()) == {"0/weight", "0/bias", "1/weight"}
