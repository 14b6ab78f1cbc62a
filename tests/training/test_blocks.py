"""Blocks that are recomputed in the backward pass keep less and give the same gradients."""

from __future__ import annotations

import torch
from torch import nn

from vilau.training.blocks import find_blocks, recompute_in_backward


class Net(nn.Module):
    """Nested module lists, frozen layers, a list of bare convolutions, dropout."""

    def __init__(self) -> None:
        super().__init__()
        layer = lambda: nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 8))  # noqa: E731
        self.layers = nn.ModuleList(layer() for _ in range(3))
        self.stages = nn.ModuleList(nn.ModuleDict({"blocks": nn.ModuleList(layer() for _ in range(2))}) for _ in "ab")
        self.frozen = nn.ModuleList(layer().requires_grad_(False) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv1d(1, 1, 1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            x = x + block(x)
        return x


def step(net: Net) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of one step, and the bytes that were kept for the backward pass."""
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(2)
    net.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net(torch.randn(32, 8)).square().sum()
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}, kept


def test_outermost_members_with_parts_and_something_to_learn() -> None:
    """Layers and stages are blocks; blocks inside stages, frozen layers and bare convolutions are not."""
    net = Net()
    assert find_blocks(net) == [*net.layers, *net.stages]


def test_recomputed_blocks_keep_less_and_give_the_same_gradients() -> None:
    """Bit for bit, dropout included; names of weights stay; sampling in evaluation mode is untouched."""
    net = Net()
    names = list(net.state_dict())
    expected, before = step(net)
    recompute_in_backward(find_blocks(net))
    found, after = step(net)
    assert list(net.state_dict()) == names
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert after < before / 4
    net.eval()
    with torch.no_grad():
        assert net(torch.ones(1, 8)).shape == (1, 8)
