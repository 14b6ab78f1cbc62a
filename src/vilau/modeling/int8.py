"""Linear layers in int8: weights per output channel, activations per row at each call, sums in exact integers.

``y = (x_q @ w_q^T) * s_x * s_w + b`` with ``x_q = round(x / s_x)``, ``w_q = round(w / s_w)``, both in [-127, 127], and
``s = max|.| / 127`` over a row of `x` and over a row of `w`. Rows do not depend on each other, and the sums are
integers: so a row alone and in a batch gives the same bits. (oneDNN's product over rows that are shifted to uint8 takes
the shift's part away in float32: it is exact while sums stay below 2^24.) Rounding costs at most

    |y' - y| <= s_x / 2 * sum_k |s_w w_q[k]|  +  s_w / 2 * sum_k |x[k]|      for each row and output channel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

LARGEST = 127
WIDEST = (2**31 - 1) // LARGEST**2  # inputs of a layer whose sum surely fits into 32 bits
_SMALLEST = 1e-30  # largest weight of a row of zeros
SHIFT = 128
_MUCH = 4  # a product that is so many times slower than another has no kernel of its own
_ZERO = torch.zeros(1, dtype=torch.int32)  # weights are symmetric
JOINT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))
"""Names of layers within one module that are given the same rows."""


@dataclass(frozen=True)
class Int8Weight:
    """A matrix ``(O, I)`` int8 and the scale ``(O,)`` float32 of each of its rows."""

    weight: torch.Tensor
    scale: torch.Tensor


def quantize_weight(weight: torch.Tensor) -> Int8Weight:
    """Return a matrix ``(O, I)`` in int8; a row of zeros stays zero.

    Raises:
        ValueError: it holds NaN or infinity.
    """
    values = weight.detach().float()
    largest = values.abs().amax(1)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("a weight holds NaN or infinity, which int8 cannot; check the checkpoint")
    scale = largest.clamp_min_(_SMALLEST) / LARGEST
    return Int8Weight((values / scale.unsqueeze(1)).round_().to(torch.int8), scale)


def quantize_rows(x: torch.Tensor, shift: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows ``(N, I)`` float32 in int8, or with `shift` 128 added in uint8, and their scales ``(N, 1)``.

    The numbers of a row of zeros have no meaning, but its scale is 0.
    """
    scale = x.abs().amax(1, keepdim=True).mul_(1 / LARGEST)
    rounded = (x / scale).round_()
    return (rounded.add_(shift).to(torch.uint8) if shift else rounded.to(torch.int8)), scale


def _rows(x: torch.Tensor) -> torch.Tensor:
    return (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).float()


def int8_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the exact integer products ``(N, O)`` int32 of ``x`` (N, I) int8 and ``weight`` (O, I) int8.

    On CUDA the library's kernel wants more than 16 rows and sizes that are multiples of 8: rows are filled up with
    zeros, and sizes that do not fit go through float32 products of pieces that stay exact.
    """
    if x.device.type == "cpu" and weight.shape[1] > 1 and sums_hold():  # of a single column it makes nonsense
        return torch._int_mm(x, weight.t())
    if x.device.type == "cuda" and weight.shape[0] % 8 == 0 and weight.shape[1] % 8 == 0:
        missing = max(0, 32 - len(x))
        filled = F.pad(x, (0, 0, 0, missing)) if missing else x
        return torch._int_mm(filled, weight.t())[: len(x)]
    return _exact_product(x, weight)


@torch.compiler.assume_constant_result
def sums_hold() -> bool:
    """Whether `torch._int_mm` is exact on this processor: without VNNI its sums of pairs overflow."""
    return _sums_hold()


@lru_cache(maxsize=1)
def _sums_hold() -> bool:
    with torch.device("cpu"):
        x, weight = torch.full((2, 64), LARGEST, dtype=torch.int8), torch.full((32, 64), -LARGEST, dtype=torch.int8)
    return bool((torch._int_mm(x, weight.t()) == -LARGEST * LARGEST * 64).all())


def _exact_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `int8_product` on any device: a float32 sum of up to 1,024 products of int8 numbers is exact."""
    pairs = zip(x.split(1024, 1), weight.split(1024, 1), strict=True)
    return torch.stack([(a.float() @ b.float().t()).to(torch.int32) for a, b in pairs]).sum(0, dtype=torch.int32)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight ``(O, I)`` int8 in oneDNN's blocked layout, as many bytes again."""
    return torch.ops.onednn.qlinear_prepack(weight.detach(), None)


def packed_product(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return ``(N, O)`` float32, the products of ``x`` (N, I) with a packed weight, times ``scale`` (O,).

    x: int8, or uint8 from which 128 is taken.
    """
    zero = SHIFT if x.dtype == torch.uint8 else 0
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, zero, packed, scale, _ZERO, None, 1.0, 0, torch.float32, "none", [], ""
    )


def packing_works() -> bool:
    """Whether oneDNN's product of uint8 with int8 is there and exact: before VNNI its sums of pairs overflow."""
    return _packing_works()


@lru_cache(maxsize=1)
def _packing_works() -> bool:
    try:
        with torch.device("cpu"):
            return _is_exact(SHIFT, pack(torch.full((32, 64), -LARGEST, dtype=torch.int8)))
    except (RuntimeError, AttributeError, NotImplementedError):  # a torch built without oneDNN
        return False


def _is_exact(shift: int, packed: torch.Tensor) -> bool:
    out = packed_product(_full_rows(2, 64, shift), packed, torch.ones(32))
    return bool((out == -LARGEST * LARGEST * 64).all())


def _full_rows(rows: int, inside: int, shift: int) -> torch.Tensor:
    return torch.full((rows, inside), LARGEST + shift, dtype=torch.uint8 if shift else torch.int8)


@torch.compiler.assume_constant_result
def signed_is_fast(rows: int, out: int, inside: int) -> bool:
    """Whether oneDNN's product of int8 with int8, the one that torch's compiler makes, is as fast as that of uint8.

    With AMX it is for many sizes; elsewhere it is hundreds of times slower. So it is tried out, once for each size.
    """
    return packing_works() and _signed_is_fast(rows, out, inside)


@lru_cache(maxsize=256)
def _signed_is_fast(rows: int, out: int, inside: int) -> bool:
    with torch.device("cpu"):
        if not _is_exact(0, pack(torch.full((32, 64), -LARGEST, dtype=torch.int8))):
            return False
        packed, scale = pack(torch.ones((out, inside), dtype=torch.int8)), torch.ones(out)
        signed, unsigned = (
            min(_seconds(partial(packed_product, _full_rows(rows, inside, shift), packed, scale)) for _ in range(3))
            for shift in (0, SHIFT)
        )
    return signed < _MUCH * unsigned


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass(frozen=True)
class _Whole:
    """The weights of layers as one: ``scale`` (O,), ``bias`` (O,) float32, and the weight in oneDNN's layout."""

    scale: torch.Tensor
    bias: torch.Tensor | None
    packed: torch.Tensor


@dataclass(frozen=True)
class _Ready:
    """What was computed of ``given`` and not asked for yet, by number of layer."""

    given: torch.Tensor
    state: int | torch.Tensor
    outputs: dict[int, torch.Tensor]

    def of(self, x: torch.Tensor, part: int) -> bool:
        """Whether the outcome of ``x`` as it is now lies here for a layer."""
        if self.given is not x or part not in self.outputs:
            return False
        state = self.state
        return torch.equal(state, x) if isinstance(state, torch.Tensor) else state == _state(x)


def _state(x: torch.Tensor) -> int | torch.Tensor:
    """What tells later whether a tensor was changed; a copy where torch does not count changes."""
    if torch.compiler.is_compiling():
        return 0  # the compiler turns changes in place into new tensors
    return x.clone() if x.is_inference() else x._version


class JointProduct:
    """Layers that are given the same rows, as query, key and value are: quantised once and multiplied in one call.

    On a CPU the first of them that is called computes for all; the others take what lies ready if they are given the
    same, unchanged tensor. On other devices, where no copy of the weights is made, each layer computes for itself.
    """

    def __init__(self, layers: Sequence[Int8Linear]) -> None:
        self.layers = tuple(layers)
        self._kept: tuple[list[int], _Whole] | None = None
        self._ready: _Ready | None = None

    def __call__(self, layer: Int8Linear, x: torch.Tensor) -> torch.Tensor:
        """Return what ``layer``, one of these, makes of ``x`` (..., I), ``(..., O)`` float32."""
        if len(self.layers) == 1:
            return self._all(x)[0]
        if x.device.type != "cpu":
            return _product(layer, x)
        ready = self._ready
        if ready is None or not ready.of(x, layer.part):
            ready = self._ready = _Ready(x, _state(x), dict(enumerate(self._all(x))))
        out = ready.outputs.pop(layer.part)
        if not ready.outputs:
            self._ready = None
        return out

    def _all(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return what each of the layers makes of ``x``."""
        if torch.compiler.is_compiling() and x.device.type == "cpu":
            out = _compilable_product(self.layers, x)
        elif (whole := self.whole()) is not None:
            codes, row_scale = quantize_rows(_rows(x), SHIFT)
            out = packed_product(codes, whole.packed, whole.scale)
            out = out.mul_(row_scale) if whole.bias is None else torch.addcmul(whole.bias, out, row_scale)
        else:
            return [_product(layer, x) for layer in self.layers]
        out = out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])
        return (out,) if len(self.layers) == 1 else out.split([layer.out_features for layer in self.layers], -1)

    def whole(self) -> _Whole | None:
        """Return the weights as one in oneDNN's layout, made when they have changed; ``None`` where it is not used."""
        layers = self.layers
        if torch.compiler.is_compiling() or layers[0].scale.device.type != "cpu" or not packing_works():
            return None
        marks = [mark for layer in layers for mark in _marks(layer)]
        if self._kept is None or self._kept[0] != marks:
            packed = pack(_joined([layer.weight for layer in layers]))
            bias = None if layers[0].bias is None else _joined([b.float() for b in _biases(layers)])
            self._kept = marks, _Whole(_joined([layer.scale for layer in layers]), bias, packed)
        return self._kept[1]

    def forget(self) -> None:
        """Let go of the copy of the weights and of what lies ready."""
        self._kept = self._ready = None

    def __getstate__(self) -> dict[str, Any]:
        """The layers alone: the blocked layout can be neither copied nor stored."""
        return {"layers": self.layers, "_kept": None, "_ready": None}


def _marks(layer: Int8Linear) -> list[int]:
    """Where the weight lies, and how often weight, bias and scale were changed: found in no time, as at each call."""
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    scale = layer._buffers["scale"]
    assert weight is not None and scale is not None
    if weight.is_inference():
        return [weight.data_ptr()]
    return [weight.data_ptr(), weight._version, scale._version, 0 if bias is None else bias._version]


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _biases(layers: Sequence[Int8Linear]) -> list[torch.Tensor]:
    return [layer.bias for layer in layers if layer.bias is not None]


def _product(layer: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    codes, row_scale = quantize_rows(_rows(x))
    out = int8_product(codes, layer.weight) * row_scale
    out = out.mul_(layer.scale) if layer.bias is None else torch.addcmul(layer.bias.float(), out, layer.scale)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], layer.out_features)


def _compilable_product(layers: Sequence[Int8Linear], x: torch.Tensor) -> torch.Tensor:
    """As `_product` of all layers on a CPU, where that is fast in the words that the compiler turns into oneDNN's."""
    codes, row_scale = quantize_rows(_rows(x))
    weight = _joined([layer.weight for layer in layers])
    scale = _joined([layer.scale for layer in layers])
    out = int8_product(codes, weight)
    if signed_is_fast(len(codes), *weight.shape):
        out = out.to(torch.float32) * row_scale * scale
    else:
        out = out * (row_scale * scale)
    biases = _biases(layers)
    return out + _joined([bias.float() for bias in biases]) if biases else out


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight; for evaluation only.

    `weight` (O, I) int8, `scale` (O,) float32, `bias` (O,) or ``None`` in the dtype of the model. On a CPU a copy of
    the weight in oneDNN's layout is made at the first use. `joint` multiplies, with
    other layers where `join` said so, as its layer number `part`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if in_features > WIDEST:
            raise ValueError(f"a layer with {in_features} inputs is wider than {WIDEST}, the most that int8 sums hold")
        self.in_features, self.out_features = in_features, out_features
        self.joint, self.part = JointProduct([self]), 0
        weight = torch.zeros((out_features, in_features), dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.ones(out_features, dtype=torch.float32))
        self.bias: nn.Parameter | None
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None
        )

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear) -> Int8Linear:
        """Return a layer in place of a float one; the float weight is not kept."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype)
        quantized = quantize_weight(linear.weight)
        layer.weight = nn.Parameter(quantized.weight, requires_grad=False)
        layer.scale = quantized.scale
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("int8 layers pass no gradients: train the float model and quantise the result")
        if not x.numel():
            return x.new_zeros((*x.shape[:-1], self.out_features))
        return self.joint(self, x).to(x.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Int8Linear:
        self.joint.forget()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Int8Linear:
        """Raise ValueError for training mode."""
        if mode:
            raise ValueError("a quantised model cannot be trained: train the float model and quantise the result")
        return super().train(mode)

    def dequantized(self) -> torch.Tensor:
        """Return the weight ``(O, I)`` float32 that the layer stands for."""
        return self.weight.float() * self.scale.unsqueeze(1)

    def extra_repr(self) -> str:
        """Sizes, as those of `nn.Linear`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def quantizable(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """Yield name and layer of what int8 is for: the language model's body and the depth transformer.

    The vision tower, embeddings, the text head and the projector stay as they are.
    """
    body = model.language_model.base_model
    prefix = next(name for name, part in model.named_modules() if part is body)
    for where, part in ((prefix, body), ("depth_transformer", model.depth_transformer)):
        if part is None:
            continue
        for name, layer in list(part.named_modules()):
            if type(layer) is nn.Linear:
                yield f"{where}.{name}", layer


def replace_linears(model: Any, change: Callable[[nn.Linear], Int8Linear] = Int8Linear.of) -> int:
    """Replace the layers that are `quantizable`, one by one, and return how many; the float weights are let go."""
    names = [name for name, _ in quantizable(model)]
    for name in names:
        model.set_submodule(name, change(model.get_submodule(name)))
    for part in model.modules():
        join(part)
    return len(names)


def join(module: nn.Module) -> None:
    """Let those int8 layers of a module that are given the same rows (`JOINT`) multiply together."""
    for names in JOINT:
        layers = [layer for name in names if isinstance(layer := getattr(module, name, None), Int8Linear)]
        alike = len({(layer.in_features, layer.bias is None) for layer in layers}) == 1
        if len(layers) == len(names) and alike:
            joint = JointProduct(layers)
            for part, layer in enumerate(layers):
                layer.joint, layer.part = joint, part


def is_int8(model: nn.Module) -> bool:
    """Return whether a model has int8 layers."""
    return any(isinstance(part, Int8Linear) for part in model.modules())
