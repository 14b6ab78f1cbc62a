"""A whole position as one compiled function (CPU) or one captured graph (CUDA), over the eager step's state."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch

from vilau.generation.position import Language, Networks, SlotLanguage, UnifiedModel, VisualState, VisualStep
from vilau.generation.prepared import prepare, weight_marks

_SHAPES = 64  # compiled codes that are kept; torch's own limit is 8, beyond which it runs uncompiled


class CompiledStep(VisualStep):
    """A `VisualStep` through torch.compile, with the weights laid out anew by the compiler (a copy of them).

    The first position of a new number of rows, or of prompts and pictures that need a larger cache (in four sizes per
    octave), is compiled for a minute or so; its code is kept by torch, for the last so many shapes. Draws agree with
    the eager step up to rounding. `backend` is torch.compile's.
    """

    static = True

    def __init__(self, networks: Networks, backend: str = "inductor") -> None:
        super().__init__(networks)
        self._compiled = torch.compile(super().__call__, dynamic=False, backend=backend)

    def __call__(self, state: VisualState, language: Language, guided: bool = True) -> torch.Tensor:
        """As `VisualStep`, and always with all rows, so that one compilation serves every position."""
        with torch._inductor.config.patch(freezing=True), torch._dynamo.config.patch(recompile_limit=_SHAPES):
            return self._compiled(state, language)


class CapturedStep(VisualStep):
    """A `VisualStep` recorded once per batch as a CUDA graph and replayed: no launch of small kernels is waited for."""

    static = True

    def __init__(self, networks: Networks) -> None:
        super().__init__(networks)
        self._recorded: tuple[VisualState, torch.cuda.CUDAGraph] | None = None

    def __call__(self, state: VisualState, language: Language, guided: bool = True) -> torch.Tensor:
        """As `VisualStep`, and always with all rows."""
        if self._recorded is None or self._recorded[0] is not state:
            assert isinstance(language, SlotLanguage)
            self._recorded = state, self._record(state, language)
        self._recorded[1].replay()
        return state.codes

    def _record(self, state: VisualState, language: SlotLanguage) -> torch.cuda.CUDAGraph:
        """Run once for the libraries' own preparations, put the state back, and record."""
        changing = (state.position, state.codes, language.cache.lengths)
        before = [tensor.clone() for tensor in changing]

        def put_back() -> None:
            for tensor, value in zip(changing, before, strict=True):
                tensor.copy_(value)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            super().__call__(state, language)
            put_back()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            super().__call__(state, language)
        put_back()
        return graph


_kept: weakref.WeakKeyDictionary[Any, tuple[tuple[Any, ...], VisualStep]] = weakref.WeakKeyDictionary()


def visual_step(model: UnifiedModel, rows: int, kernel: str | None = None, compile: bool = False) -> VisualStep:
    """Return the step that makes pictures with a model.

    Args:
        rows: of one position: pictures, and as many again with guidance.
        kernel: how weights lie in memory on a CPU, see `prepare`; a compiled step lays them out by itself.
        compile: the whole position compiled or captured. The code is kept with the model while its weights are the
            same.
    """
    if not compile:
        return VisualStep(prepare(model, rows, kernel))
    marks = weight_marks(model)
    kept = _kept.get(model)
    if kept is None or kept[0] != marks:
        networks = Networks.of(model)
        kept = _kept[model] = marks, compiled_step(networks, model.projector.fc1.weight.device)
    return kept[1]


def compiled_step(networks: Networks, device: torch.device) -> VisualStep:
    """Return the fastest whole-position step of a device; the eager one, with a warning, where there is no compiler."""
    if device.type == "cuda":
        return CapturedStep(networks)
    reason = missing_compiler()
    if reason is not None:
        warnings.warn(f"generation is not compiled: {reason}", stacklevel=2)
        return VisualStep(networks)
    return CompiledStep(networks)


def missing_compiler() -> str | None:
    """Say why torch.compile cannot work on this machine's CPU; ``None`` if a C++ compiler is found."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        compiler: Any = get_cpp_compiler()
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None if compiler else "no C++ compiler was found"
