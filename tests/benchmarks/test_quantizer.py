"""The quantizer's benchmark: its ways compute, and the search's memory is that of a tile."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vilau.modeling.quantizer import ResidualQuantizer

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "quantizer.py"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_of_quantizers", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read as Linux tells it")
def test_memory_of_the_search_does_not_grow_with_the_codebook(benchmark: Any) -> None:
    """4096 vectors and 8192 codes: all distances at once take over 134 MB, the tiles of the search a part of it."""
    problem = benchmark.Problem(size=8192, depth=1, vectors=4096, width=16)
    costs = benchmark.measure_quantizer(problem, ("tiled", "expanded"))
    assert costs["expanded"].memory > 134e6
    assert costs["tiled"].memory < costs["expanded"].memory / 4


def test_every_way_runs(benchmark: Any) -> None:
    """All ways of one problem compute the same codes' worth of work without failing; the table names each."""
    quantizer = ResidualQuantizer(64, 8, 2)
    quantizer.initialised.fill_(1)
    works = benchmark._works(quantizer, torch.randn(30, 8))
    assert set(works) == {*benchmark.SEARCHES, *benchmark.STEPS}
    codes = works["tiled"]()
    assert torch.equal(works["expanded"](), codes) and torch.equal(works["cdist"](), codes)
    for way in ("product", "step", "one_hot_step"):
        works[way]()
    cost = benchmark.Cost(1.0, 1.0, 10)
    table = benchmark._table(benchmark.Problem(), dict.fromkeys(works, cost))
    assert all(way in table for way in works)
