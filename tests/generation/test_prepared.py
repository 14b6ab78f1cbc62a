"""Weights laid out anew: same numbers, the model untouched, made again when weights change, never doubled silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from vilau.generation import prepared
from vilau.generation.position import Networks, VisualStep
from vilau.generation.prepared import PackedLinear, kernel_of, linears, packable, packed_bytes, prepare, release
from vilau.generation.visual import generate_codes, run_codes

PACKED = [kernel for kernel in prepared.KERNELS if kernel != "plain"]


@pytest.fixture
def model(make_model: Callable[..., Any]) -> Any:
    """A very small model of its own, because some tests change weights."""
    return make_model(seed=5)


@pytest.mark.parametrize("kernel", PACKED)
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_equal(kernel: str, bias: bool) -> None:
    """Any number of rows, with and without a bias, as the plain layer to rounding."""
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias=bias)
    packed = PackedLinear(linear, kernel, 4)
    with torch.no_grad():
        for shape in ((4, 48), (1, 48), (9, 48), (2, 2, 48), (4, 1, 48)):
            x = torch.randn(shape)
            torch.testing.assert_close(packed(x), linear(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", PACKED)
def test_prepared_codes_equal_plain_ones(model: Any, kernel: str) -> None:
    """The same pictures for the same seed whatever the layout; the model keeps its own modules and weights."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([[1, 3, 11, 12, 36], [1, 5, 6, 4, 36]])
    mask = torch.ones_like(ids)
    request = model.visual_request(model.embed(ids), mask, False, unconditional_ids=torch.tensor([[1, 36]]), seed=4)
    plain = run_codes(VisualStep(Networks.of(model)), request)
    networks = prepare(model, 4, kernel)
    assert kernel_of(networks) == kernel and kernel_of(Networks.of(model)) == "plain"
    assert torch.equal(run_codes(VisualStep(networks), request), plain)
    assert all(type(layer) is nn.Linear for layer in linears(model))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hooks_still_fire(model: Any) -> None:
    """A hook on a layer of the model is called by the prepared copy too."""
    seen: list[int] = []
    hook = model.depth_transformer.head.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    layer = model.language_model.model.layers[0].register_forward_hook(lambda *rest: seen.append(-1))
    networks = prepare(model, 2, "mkldnn")
    networks.depth_transformer.step(torch.randn(2, model.config.hidden_size), 0, model.depth_transformer.new_cache(2))
    networks.language(inputs_embeds=torch.randn(1, 3, model.config.hidden_size))
    hook.remove()
    layer.remove()
    assert seen == [2, -1]


@pytest.mark.parametrize("change", ["in place", "data", "replaced"])
def test_changed_weights_are_noticed(model: Any, change: str) -> None:
    """A copy is used again while weights stay, and made anew after training or loading changed them."""
    first = prepare(model, 2, "mkldnn")
    assert prepare(model, 2, "mkldnn") is first
    weight = model.depth_transformer.head.weight
    with torch.no_grad():
        if change == "in place":
            weight.mul_(2)
        elif change == "data":
            weight.data.mul_(2)
        else:
            model.depth_transformer.head.weight = nn.Parameter(weight * 2)
    second = prepare(model, 2, "mkldnn")
    assert second is not first
    x = torch.randn(2, model.config.depth_config.hidden_size)
    torch.testing.assert_close(second.depth_transformer.head(x), model.depth_transformer.head(x))


def test_kernels_have_names_and_limits(model: Any) -> None:
    """Unknown kernels and models that cannot have one are refused with the remedy; plain is always there."""
    with pytest.raises(ValueError, match="kernel is 'fast'; it must be one of plain, mkldnn, mkl"):
        prepare(model, 2, "fast")
    half = model.bfloat16()
    assert packable(half) == "its weights are not float32"
    with pytest.raises(ValueError, match="not float32; use kernel 'plain'"):
        prepare(half, 2, "mkl")
    assert kernel_of(prepare(half, 2)) == "plain"


def test_no_copy_where_it_is_not_worth_it_or_too_large(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself nothing is copied for a small model, nor for one whose copy would take more than the limit."""
    monkeypatch.setattr(prepared, "fastest_kernel", lambda model, rows: "mkldnn")
    size = packed_bytes(model)
    assert size == sum(layer.weight.numel() * 4 for layer in linears(model.language_model.model)) + sum(
        layer.weight.numel() * 4 for layer in linears(model.depth_transformer)
    )
    assert kernel_of(prepare(model, 2)) == "plain"
    monkeypatch.setattr(prepared, "_WORTH", size)
    assert kernel_of(prepare(model, 2)) == "mkldnn"
    monkeypatch.setattr(prepared, "AUTO_LIMIT", size - 1)
    monkeypatch.setattr(prepared, "_WORTH", 0)
    assert kernel_of(prepare(model, 2)) == "plain"


def test_the_trial_names_a_kernel(model: Any) -> None:
    """The trial runs on the model's own weights and returns one of the kernels."""
    assert prepared.fastest_kernel(model, 2, repeat=1) in prepared.KERNELS


def test_released_and_collected(make_model: Callable[..., Any]) -> None:
    """`release` lets a copy go, and a model that is dropped takes its copy along."""
    import gc

    kept = len(prepared._kept)
    model = make_model(seed=6)
    prepare(model, 2, "mkldnn")
    assert len(prepared._kept) == kept + 1
    release(model)
    assert len(prepared._kept) == kept
    prepare(model, 2, "mkldnn")
    del model
    gc.collect()
    assert len(prepared._kept) == kept


def test_generate_codes_runs_plain(model: Any) -> None:
    """The reference loop never uses a copy, even if one is there."""
    prepare(model, 1, "mkldnn")
    embeds = model.embed(torch.tensor([[1, 3, 36]]))
    options = model.visual_defaults().__class__(guidance_scale=1.0, temperature=0)
    out = generate_codes(model, embeds, torch.ones(1, 3).long(), 2, options, torch.tensor([0]))
    assert out.shape == (1, 2, 3)
