"""The compiled position against the eager one, and what happens without a compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vilau.generation import compiled
from vilau.generation.compiled import CompiledStep, compiled_step, missing_compiler, visual_step
from vilau.generation.position import Networks, VisualStep
from vilau.generation.visual import run_codes
from vilau.modeling import int8 as int8_layers

EMPTY = torch.tensor([[1, 3, 36]])


def request_of(model: Any, rows: int = 1, **changes: Any) -> Any:
    """Guided pictures of prompts of different lengths."""
    ids = torch.tensor([[1, 3, 11, 12, 36], [0, 0, 7, 8, 36]])[:rows]
    return model.visual_request(model.embed(ids), (ids != 0).long(), True, 6, unconditional_ids=EMPTY, **changes)


class StaticStep(VisualStep):
    """The eager step over the shapes of the compiled one."""

    static = True


@pytest.mark.parametrize("changes", [{}, {"guidance_interval": (0.25, 0.75)}, {"guidance_scale": [1.0, 3.0]}])
def test_static_shapes_change_nothing(make_model: Callable[..., Any], changes: dict[str, Any]) -> None:
    """Attending to the whole masked cache and running all rows gives the codes of the growing one."""
    model = make_model()
    request = request_of(model, 2, seed=3, **changes)
    networks = Networks.of(model)
    assert torch.equal(run_codes(StaticStep(networks), request), run_codes(VisualStep(networks), request))


def small(make_model: Callable[..., Any]) -> Any:
    """The very small model with one layer in each transformer."""
    return make_model(text={"num_hidden_layers": 1}, depths={"num_hidden_layers": 1})


@pytest.mark.parametrize(("int8", "fast"), [(False, False), (True, True), (True, False)])
def test_a_position_is_one_graph(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, int8: bool, fast: bool
) -> None:
    """The whole position is traced once, without a break, and never again for later positions; codes are equal.

    fast: whether the processor has the integer product that the compiler can make, for which code is written otherwise.
    """
    monkeypatch.setattr(int8_layers, "_signed_is_fast", lambda *_: fast)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = small(make_model)
    if int8:
        model.quantize("int8")
        monkeypatch.setattr(int8_layers, "_signed_is_fast", lambda *_: True)
    request = request_of(model, 2, seed=9, guidance_scale=2.0)
    step = CompiledStep(Networks.of(model), backend="eager")
    assert torch.equal(run_codes(step, request), run_codes(VisualStep(Networks.of(model)), request))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_prompts_of_many_lengths_share_their_code(make_model: Callable[..., Any]) -> None:
    """Compiling takes a minute, so a new length of prompt does not cost one, and many shapes do not end compilation."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = small(make_model)
    step = CompiledStep(Networks.of(model), backend="eager")
    for length in range(3, 19):
        ids = torch.arange(3, 3 + length).remainder(30).add(3).unsqueeze(0)
        request = model.visual_request(model.embed(ids), torch.ones_like(ids), True, 6, unconditional_ids=EMPTY)
        assert torch.equal(run_codes(step, request), run_codes(VisualStep(Networks.of(model)), request))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for rows in range(1, 10):
        ids = torch.full((rows, 3), 5)
        run_codes(step, model.visual_request(model.embed(ids), torch.ones_like(ids), True, 6, unconditional_ids=EMPTY))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 8


@pytest.mark.long
@pytest.mark.skipif(missing_compiler() is not None, reason=f"no compiler: {missing_compiler()}")
@pytest.mark.parametrize("int8", [False, True])
def test_compiled_equals_eager(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, int8: bool) -> None:
    """One compiled function per position draws what the eager step draws; its code is kept with the model."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = small(make_model)
    if int8:
        model.quantize("int8")
        monkeypatch.setattr(int8_layers, "_signed_is_fast", lambda *_: True)
    request = request_of(model, 2, seed=9, guidance_scale=2.0)
    eager = run_codes(VisualStep(Networks.of(model)), request)
    step = visual_step(model, 4, compile=True)
    assert isinstance(step, CompiledStep)
    assert torch.equal(run_codes(step, request), eager)
    depth = model.config.vision_config.depth  # joined: 4 of 7 products of a layer, 4 of 6 of a block; 2 around them
    products = torch._dynamo.utils.counters["inductor"]["qlinear_weight_prepack_matcher_count"]
    assert products == (4 + depth * (4 + 2) if int8 and int8_layers.packing_works() else 0)
    assert visual_step(model, 4, compile=True) is step
    with torch.no_grad():
        model.depth_transformer.head.weight.mul_(2)
    assert visual_step(model, 4, compile=True) is not step


def test_without_a_compiler(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning says why, and the eager step works."""
    monkeypatch.setattr(compiled, "missing_compiler", lambda: "no C++ compiler was found")
    model = make_model()
    with pytest.warns(UserWarning, match="generation is not compiled: no C\\+\\+ compiler was found"):
        step = compiled_step(Networks.of(model), torch.device("cpu"))
    assert type(step) is VisualStep
    request = request_of(model)
    assert run_codes(step, request).shape == (1, 24, 3)


def test_a_missing_compiler_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that is not there: the reason is one line."""
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    reason = missing_compiler()
    assert reason is not None and "\n" not in reason
