"""int8 layers: their stated bound, rows that do not depend on each other, and what they refuse."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vilau.modeling import int8
from vilau.modeling.int8 import (
    WIDEST,
    Int8Linear,
    _exact_product,
    int8_product,
    is_int8,
    join,
    pack,
    packed_product,
    packing_works,
    quantizable,
    quantize_rows,
    quantize_weight,
    replace_linears,
)


def bound(linear: nn.Linear, layer: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    """The bound that the module states, ``(N, O)`` float64, and a little for float32 rounding."""
    row = x.double().abs().amax(1, keepdim=True) / 127
    weights = layer.dequantized().double().abs().sum(1)
    exact = row / 2 * weights + layer.scale.double() / 2 * x.double().abs().sum(1, keepdim=True)
    return exact * (1 + 1e-4) + 1e-5 * (x.double().abs() @ linear.weight.double().abs().t())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 24),
    st.booleans(),
    st.integers(-4, 4),
    st.integers(0, 1 << 30),
)
def test_a_layer_stays_within_its_stated_bound(
    rows: int, inside: int, outside: int, bias: bool, power: int, seed: int
) -> None:
    """The bound in the module's docstring is a promise for any weight and input, outliers included."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inside, outside, bias)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(outside, inside, generator=generator) * 10.0**power)
        linear.weight[0] *= 100
    x = torch.randn(rows, inside, generator=generator) ** 3
    layer = Int8Linear.of(linear)
    with torch.no_grad():
        true = nn.functional.linear(x.double(), linear.weight.double(), None if not bias else linear.bias.double())
        error = (layer(x).double() - true).abs()
    assert bool((error <= bound(linear, layer, x) + 1e-6 * true.abs()).all())


def test_the_bound_is_not_met_by_a_wrong_scale() -> None:
    """The test above can fail: a scale that is 2 % off breaks the bound."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    layer, x = Int8Linear.of(linear), torch.randn(8, 64)
    allowed = bound(linear, layer, x)
    layer.scale *= 1.2
    with torch.no_grad():
        assert bool(((layer(x) - linear(x)).abs() > allowed).any())


def test_rows_alone_and_in_any_batch_are_equal_bit_for_bit() -> None:
    """A picture must not depend on its company: per-tensor scales of activations, as in torch's own, would."""
    torch.manual_seed(0)
    layer = Int8Linear.of(nn.Linear(48, 40))
    x = torch.randn(33, 48)
    x[5] *= 1000
    whole = layer(x)
    for rows in (1, 2, 7):
        parts = torch.cat([layer(part) for part in x.split(rows)])
        assert torch.equal(parts, whole)
    assert torch.equal(layer(x.view(3, 11, 48)), whole.view(3, 11, 40))


@pytest.mark.parametrize("sizes", list(itertools.product((1, 2, 17), (1, 8, 1030, 2500), (1, 16))))
def test_every_way_to_the_integer_product_is_exact(sizes: tuple[int, int, int]) -> None:
    """Devices take different ways: each is the integer product, at the largest numbers too."""
    rows, inside, outside = sizes
    generator = torch.Generator().manual_seed(inside)
    x = torch.randint(-127, 128, (rows, inside), generator=generator, dtype=torch.int8)
    weight = torch.randint(-127, 128, (outside, inside), generator=generator, dtype=torch.int8)
    x[0], weight[0] = 127, -127
    true = x.long() @ weight.long().t()
    for product in (int8_product, _exact_product):
        out = product(x, weight)
        assert out.dtype == torch.int32
        assert torch.equal(out.long(), true)
    if packing_works():  # exact up to 2^24, then up to what float32 rounds of the sum with the shift
        out = packed_product((x.short() + 128).to(torch.uint8), pack(weight), torch.ones(outside))
        torch.testing.assert_close(out, true.float(), rtol=0, atol=inside * 255 * 127 * 2**-24)
        assert inside > 512 or torch.equal(out, true.float())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("sizes", [(1, 768, 768), (8, 768, 2048), (40, 64, 16), (3, 13, 7)])
def test_a_gpu_gives_the_same_integers(sizes: tuple[int, int, int]) -> None:
    """The GPU's kernel takes padded rows; sizes that it refuses go another way."""
    rows, inside, outside = sizes
    x = torch.randint(-127, 128, (rows, inside), dtype=torch.int8)
    weight = torch.randint(-127, 128, (outside, inside), dtype=torch.int8)
    assert torch.equal(int8_product(x.cuda(), weight.cuda()).cpu(), int8_product(x, weight))


def test_rounding_is_to_the_nearest_and_symmetric() -> None:
    """Rows use all of [-127, 127], zero stays zero, and rows of zeros neither divide by zero nor gain a scale."""
    x = torch.tensor([[1.0, -1.0, 0.0, 0.496], [0.0, 0.0, 0.0, 0.0], [-254.0, 3.0, 2.9, 1.0]])
    codes, scale = quantize_rows(x)
    shifted, same = quantize_rows(x, 128)
    assert shifted.dtype == torch.uint8 and torch.equal(scale, same)
    assert (shifted[[0, 2]].int() - 128).tolist() == codes[[0, 2]].tolist()
    assert codes[[0, 2]].tolist() == [[127, -127, 0, 63], [-127, 2, 1, 0]]
    torch.testing.assert_close(scale[:, 0], torch.tensor([1 / 127, 0.0, 2.0]))
    layer = Int8Linear.of(nn.Linear(4, 3))
    for rows in (torch.zeros(2, 4), x):
        out = layer(rows)
        assert bool(torch.isfinite(out).all())
        assert torch.equal(out[1], layer.bias)
    assert quantize_weight(torch.zeros(2, 3)).weight.abs().sum() == 0


@pytest.mark.skipif(not packing_works(), reason="oneDNN's integer product is not exact on this processor")
def test_the_kernels_agree_and_follow_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed copy is a layout, not other numbers; a changed weight is packed anew; a layer can be copied."""
    torch.manual_seed(0)
    layer, x = Int8Linear.of(nn.Linear(40, 24)), torch.randn(3, 40)
    packed = layer(x)
    with monkeypatch.context() as patch:
        patch.setattr(int8, "_packing_works", lambda: False)
        torch.testing.assert_close(copy.deepcopy(layer)(x), packed, rtol=1e-5, atol=1e-6)
    assert torch.equal(copy.deepcopy(layer)(x), packed)
    layer.weight.neg_()
    torch.testing.assert_close(layer(x) - layer.bias, -(packed - layer.bias), rtol=1e-5, atol=1e-6)


class Projections(nn.Module):
    """Three layers that are given the same rows, of unlike sizes as with grouped queries, joined or not."""

    def __init__(self, joined: bool, bias: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, size in (("q_proj", 24), ("k_proj", 8), ("v_proj", 16)):
            linear = nn.Linear(40, size, bias)
            with torch.no_grad():
                for parameter in linear.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
            setattr(self, name, Int8Linear.of(linear))
        if joined:
            join(self)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("bias", [False, True])
def test_joined_layers_give_what_they_give_alone(bias: bool, mode) -> None:
    """Query, key and value share one product: the same bits for the same rows, in any order of calls."""
    alone, joined = Projections(False, bias), Projections(True, bias)
    assert joined.q_proj.joint is joined.v_proj.joint is not alone.q_proj.joint
    with mode():
        for shape in ((3, 40), (2, 1, 40), (2, 5, 40)):
            x = torch.randn(shape)
            for got, expected in zip(joined(x), alone(x), strict=True):
                assert torch.equal(got, expected)
        assert torch.equal(joined.v_proj(x), alone.v_proj(x))  # never asked for all of them, never in this order
        assert torch.equal(joined.v_proj(x), alone.v_proj(x))
        x2 = torch.randn(2, 5, 40)
        assert torch.equal(joined.q_proj(x2), alone.q_proj(x2))
        x2[0] = -x2[0]  # changed in place: what lay ready is of no use
        assert torch.equal(joined.k_proj(x2), alone.k_proj(x2))
        assert torch.equal(joined.q_proj(x), alone.q_proj(x))


@pytest.mark.parametrize("what", ["weight", "scale", "bias"])
def test_joined_layers_follow_their_weights(what: str) -> None:
    """The copy that multiplies is made anew when any layer of it changes, and by a copy of the module."""
    joined, x = Projections(True, True), torch.randn(2, 40)
    before = joined(x)
    twin = copy.deepcopy(joined)
    with torch.no_grad():
        getattr(joined.k_proj, what).neg_()
        after = joined(x)
    assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2])
    assert not torch.allclose(after[1], before[1])
    assert all(torch.equal(a, b) for a, b in zip(twin(x), before, strict=True))
    assert twin.q_proj.joint is twin.k_proj.joint is not joined.k_proj.joint


def test_a_layer_keeps_dtype_and_empty_shapes() -> None:
    """bfloat16 models get bfloat16 back, and no rows give no rows."""
    layer = Int8Linear.of(nn.Linear(8, 8).to(torch.bfloat16))
    assert layer(torch.randn(2, 3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.scale.dtype == torch.float32
    assert layer(torch.zeros(0, 3, 8)).shape == (0, 3, 8)


def test_what_int8_cannot_do_is_said() -> None:
    """Each refusal names what to do instead."""
    layer = Int8Linear.of(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="train the float model"):
        layer(torch.randn(1, 8, requires_grad=True))
    with pytest.raises(ValueError, match="cannot be trained"):
        layer.train()
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_weight(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match=str(WIDEST)), torch.device("meta"):
        Int8Linear(WIDEST + 1, 1, False)


def test_only_body_and_depth_transformer_are_quantised(make_model) -> None:
    """Tower, embeddings, projector and text head keep their weights bit for bit."""
    model, twin = make_model(), make_model()
    names = [name for name, _ in quantizable(model)]
    assert replace_linears(model) == len(names) == 2 * 7 + 2 * 6 + 3
    assert is_int8(model) and not is_int8(twin)
    new, old = model.state_dict(), twin.state_dict()
    changed = {name for name in old if new[name].dtype != old[name].dtype or not torch.equal(new[name], old[name])}
    assert changed == {f"{name}.weight" for name in names}
    assert all(name.startswith(("language_model.model.layers.", "depth_transformer.")) for name in changed)
