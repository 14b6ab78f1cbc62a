"""Weights laid out anew for generation on a CPU: products of few rows with large matrices, near the speed of reading.

Generation multiplies a handful of rows with every matrix of the model. A plain product is then limited by how it walks
through memory, and a copy of the weights in the blocked layout of oneDNN or MKL can be up to twice as fast. The copy
costs as much memory as the weights of the language model and the depth transformer; so it is made by itself only where
that is little, and the model's own modules stay as they are.
"""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vilau.generation.position import Networks, UnifiedModel

KERNELS = ("plain", "mkldnn", "mkl")
AUTO_LIMIT = 2 << 30  # bytes of a copy that is made without being asked for
_WORTH = 32 << 20  # weights below this fit into a processor's caches, where layouts do not matter
_TRIAL = 256 << 20  # bytes of weights that the choice of a kernel is measured on
_MARGIN = 0.95  # a layout must be this much faster than the plain one to be taken


class PackedLinear(nn.Module):
    """A linear layer whose weight also lies in a blocked layout; the plain weight stays the model's own.

    Args:
        linear: the layer it stands for.
        kernel: `mkldnn` takes any number of rows; `mkl` is laid out for one, and other numbers go the plain way.
        rows: the number of rows to lay out for.
    """

    def __init__(self, linear: nn.Linear, kernel: str, rows: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._forward_hooks = linear._forward_hooks
        self.rows = rows
        self.product = _PRODUCTS[kernel]
        self.packed = _PACK[kernel](linear.weight.detach(), rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(self, x)


def _mkldnn_product(layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, layer.packed, layer.bias, "none", [], "")


def _mkl_product(layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    if x.numel() != layer.rows * layer.in_features:
        return F.linear(x, layer.weight, layer.bias)
    return torch.ops.mkl._mkl_linear(x, layer.packed, layer.weight, layer.bias, layer.rows)


_PRODUCTS: dict[str, Callable[[PackedLinear, torch.Tensor], torch.Tensor]] = {
    "mkldnn": _mkldnn_product,
    "mkl": _mkl_product,
}
_PACK: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "mkldnn": lambda weight, rows: torch.ops.mkldnn._reorder_linear_weight(weight, rows),
    "mkl": lambda weight, rows: torch.ops.mkl._mkl_reorder_linear_weight(weight, rows),
}


def replaced(module: nn.Module, change: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Return a module that shares all parameters and hooks with ``module`` but for its linear layers.

    Each layer that is exactly `nn.Linear` becomes what ``change`` makes of it; the given module is not touched.
    """
    if type(module) is nn.Linear:
        return change(module)
    twin = copy.copy(module)
    twin._modules = {
        name: None if child is None else replaced(child, change) for name, child in module._modules.items()
    }
    return twin


def linears(*modules: nn.Module) -> Iterator[nn.Linear]:
    """Yield the layers that `replaced` would change."""
    for module in modules:
        yield from (part for part in module.modules() if type(part) is nn.Linear)


def packed_bytes(model: UnifiedModel) -> int:
    """Memory that a copy of the weights of the language model's body and the depth transformer takes."""
    layers = linears(model.language_model.base_model, model.depth_transformer)
    return sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)


def packable(model: UnifiedModel) -> str | None:
    """Say why a model cannot have its weights laid out anew; ``None`` if it can."""
    layers = list(linears(model.language_model.base_model, model.depth_transformer))
    if not layers:
        return "it has no plain linear layers"
    if any(layer.weight.device.type != "cpu" for layer in layers):
        return "it is not on a CPU"
    if any(layer.weight.dtype != torch.float32 for layer in layers):
        return "its weights are not float32"
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    return None


@dataclass(frozen=True)
class _Kept:
    """A prepared copy and what it was made from."""

    networks: Networks
    kernel: str
    rows: int
    marks: tuple[Any, ...]

    def answers(self, kernel: str | None, rows: int) -> bool:
        """Whether it is what was asked for; `mkldnn` takes any number of rows."""
        return kernel in (None, self.kernel) and (rows == self.rows or kernel == "mkldnn")


_kept: weakref.WeakKeyDictionary[Any, _Kept] = weakref.WeakKeyDictionary()


def prepare(model: UnifiedModel, rows: int, kernel: str | None = None) -> Networks:
    """Return the networks of a model ready for steps of ``rows`` rows, prepared if that is worth it or asked for.

    A prepared copy is kept with the model and made again when weights have changed (`release` lets it go).

    Args:
        rows: of one step: pictures, and as many again with guidance.
        kernel: absent, the fastest in a short trial, if the copy takes at most `AUTO_LIMIT` bytes and the weights do
            not fit into the processor's caches; `plain` for no copy; `mkldnn` or `mkl` whatever it takes.

    Raises:
        ValueError: an unknown kernel, or one that this model cannot have.
    """
    if kernel is not None and kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; it must be one of {', '.join(KERNELS)}")
    plain = Networks.of(model)
    reason = packable(model)
    if kernel in ("mkldnn", "mkl") and reason is not None:
        raise ValueError(f"kernel {kernel!r} cannot be used with this model: {reason}; use kernel 'plain'")
    if kernel == "plain" or reason is not None:
        return plain
    if kernel is None and not _WORTH <= packed_bytes(model) <= AUTO_LIMIT:
        return plain
    marks = weight_marks(model)
    kept = _kept.get(model)
    if kept is not None and kept.marks == marks and kept.answers(kernel, rows):
        return kept.networks
    release(model)
    kernel = kernel or fastest_kernel(model, rows)
    networks = plain
    if kernel != "plain":
        networks = with_linears(plain, lambda linear: PackedLinear(linear, kernel, rows))
    _kept[model] = _Kept(networks, kernel, rows, marks)
    return networks


def release(model: UnifiedModel) -> None:
    """Let go of the prepared copy of a model's weights, if there is one."""
    _kept.pop(model, None)


def kernel_of(networks: Networks) -> str:
    """Return the name of the kernel that prepared networks use."""
    names = {product: name for name, product in _PRODUCTS.items()}
    for part in networks.depth_transformer.modules():
        if isinstance(part, PackedLinear):
            return names[part.product]
    return "plain"


def with_linears(networks: Networks, change: Callable[[nn.Linear], nn.Module]) -> Networks:
    """Return networks whose language model and depth transformer have their linear layers replaced."""
    return replace(
        networks,
        language=replaced(networks.language, change),
        depth_transformer=replaced(networks.depth_transformer, change),
    )


def weight_marks(model: UnifiedModel) -> tuple[Any, ...]:
    """Return where the weights are, how often they were changed and some of their values: equal while they stay."""
    parts = (model.language_model.base_model, model.depth_transformer)
    weights = [p.detach() for part in parts for p in part.parameters() if p.dim() == 2]
    places = tuple((weight.data_ptr(), weight._version) for weight in weights)
    samples = torch.stack([w.view(-1)[:: max(1, w.numel() // 8)][:8].double().sum() for w in weights])
    return places, tuple(samples.tolist())


@torch.no_grad()
def fastest_kernel(model: UnifiedModel, rows: int, repeat: int = 3) -> str:
    """Return the kernel that is fastest for products of ``rows`` rows with a part of this model's own weights."""
    trial: list[nn.Linear] = []
    size = 0
    for layer in linears(model.depth_transformer, model.language_model.base_model):
        if size >= _TRIAL:
            break
        trial.append(layer)
        size += layer.weight.numel() * 4
    given = {layer.in_features: torch.rand(rows, layer.in_features) for layer in trial}
    alternatives: dict[str, Sequence[nn.Module]] = {"plain": trial}
    for kernel in ("mkldnn", "mkl"):
        try:
            alternatives[kernel] = [PackedLinear(layer, kernel, rows) for layer in trial]
        except (RuntimeError, AttributeError, NotImplementedError):  # a torch built without this library
            continue
    best = dict.fromkeys(alternatives, float("inf"))
    for _ in range(repeat):
        for kernel, layers in alternatives.items():
            start = time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
            for module, source in zip(layers, trial, strict=True):
                module(given[source.in_features])
            spent = (time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()) - start
            best[kernel] = min(best[kernel], spent)
    fastest = min(best, key=lambda kernel: best[kernel])
    return fastest if best[fastest] < _MARGIN * best["plain"] else "plain"
