"""Linear layers in int8: weights per output channel, activations per row at each call, sums in exact integers.

``y = (x_q @ w_q^T) * s_x * s_w + b`` with ``x_q = round(x / s_x)``, ``w_q = round(w / s_w)``, both in [-127, 127], and
``s = max|.| / 127`` over a row of `x` and over a row of `w`. Rows do not depend on each other, and the sums are
integers: so a row alone and in a batch gives the same bits. Rounding costs at most

    |y' - y| <= s_x / 2 * sum_k |s_w w_q[k]|  +  s_w / 2 * sum_k |x[k]|      for each row and output channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

LARGEST = 127
WIDEST = (2**31 - 1) // LARGEST**2  # inputs of a layer whose sum surely fits into 32 bits
_SMALLEST = 1e-30  # largest weight of a row of zeros
_ZERO = torch.zeros(1, dtype=torch.int32)  # weights are symmetric
_MAGIC = 1.5 * 2**23  # added to a small float32, its last byte is the rounded number in two's complement


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
    shifted = (x / scale).add_(_MAGIC + shift).view(torch.int32)
    return shifted.to(torch.uint8 if shift else torch.int8), scale


class RowMemory:
    """The last rows that were quantised: query, key and value, or gate and up, take the same ones.

    One for a model, on a CPU; what was changed since is quantised again.
    """

    def __init__(self) -> None:
        self._last: tuple[torch.Tensor, int, int, tuple[torch.Tensor, torch.Tensor]] | None = None

    def quantize(self, x: torch.Tensor, shift: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """As `quantize_rows` of ``x`` (..., I) as rows."""
        if x.device.type != "cpu" or torch.compiler.is_compiling() or x.is_inference():
            return quantize_rows(_rows(x), shift)
        last = self._last
        if last is not None and last[0] is x and last[1:3] == (x._version, shift):
            return last[3]
        made = quantize_rows(_rows(x), shift)
        self._last = x, x._version, shift, made
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> RowMemory:
        return memo.setdefault(id(self), RowMemory())


def _rows(x: torch.Tensor) -> torch.Tensor:
    return (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).float()


def int8_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the exact integer products ``(N, O)`` int32 of ``x`` (N, I) int8 and ``weight`` (O, I) int8.

    On CUDA the library's kernel wants more than 16 rows and sizes that are multiples of 8: rows are filled up with
    zeros, and sizes that do not fit go through float32 products of pieces that stay exact.
    """
    if x.device.type == "cpu" and weight.shape[1] > 1:  # of a single column it makes nonsense
        return torch._int_mm(x, weight.t())
    if x.device.type == "cuda" and weight.shape[0] % 8 == 0 and weight.shape[1] % 8 == 0:
        missing = max(0, 32 - len(x))
        filled = F.pad(x, (0, 0, 0, missing)) if missing else x
        return torch._int_mm(filled, weight.t())[: len(x)]
    return _exact_product(x, weight)


def _exact_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `int8_product` on any device: a float32 sum of up to 1,024 products of int8 numbers is exact."""
    pairs = zip(x.split(1024, 1), weight.split(1024, 1), strict=True)
    return torch.stack([(a.float() @ b.float().t()).to(torch.int32) for a, b in pairs]).sum(0, dtype=torch.int32)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight ``(O, I)`` int8 in oneDNN's blocked layout, as many bytes again."""
    return torch.ops.onednn.qlinear_prepack(weight.detach(), None)


def packed_product(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return ``(N, O)`` float32, the products of ``x`` (N, I) uint8 less 128 with a packed weight, times ``scale``."""
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 128, packed, scale, _ZERO, None, 1.0, 0, torch.float32, "none", [], ""
    )


@lru_cache(maxsize=1)
def packing_works() -> bool:
    """Whether oneDNN's product is there and exact: on processors without VNNI its sums of pairs overflow."""
    x = torch.full((2, 64), 255, dtype=torch.uint8)
    weight = torch.full((32, 64), -LARGEST, dtype=torch.int8)
    try:
        out = packed_product(x, pack(weight), torch.ones(32))
    except (RuntimeError, AttributeError, NotImplementedError):  # a torch built without oneDNN
        return False
    return bool((out == -LARGEST * LARGEST * 64).all())


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight; for evaluation only.

    `weight` (O, I) int8, `scale` (O,) float32, `bias` (O,) or ``None`` in the dtype of the model. On a CPU a copy of
    the weight in oneDNN's layout is made at the first use.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if in_features > WIDEST:
            raise ValueError(f"a layer with {in_features} inputs is wider than {WIDEST}, the most that int8 sums hold")
        self.in_features, self.out_features = in_features, out_features
        self.memory = RowMemory()
        self._packed: tuple[tuple[int, int], torch.Tensor] | None = None
        weight = torch.zeros((out_features, in_features), dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.ones(out_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

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
        packed = self.packed()
        codes, row_scale = self.memory.quantize(x, 0 if packed is None else 128)
        if packed is None:
            out, factor = int8_product(codes, self.weight) * row_scale, self.scale
        else:
            out, factor = packed_product(codes, packed, self.scale), row_scale
        out = out.mul_(factor) if self.bias is None else torch.addcmul(self.bias.float(), out, factor)
        out = out.to(x.dtype)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], self.out_features)

    def packed(self) -> torch.Tensor | None:
        """Return the weight in oneDNN's layout, or ``None`` where the plain one is used."""
        weight, kept = self.weight, self._packed
        if weight.device.type != "cpu" or torch.compiler.is_compiling() or not packing_works():
            return None
        marks = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if kept is None or kept[0] != marks:
            self._packed = kept = marks, pack(weight)
        return kept[1]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Int8Linear:
        self._packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}  # the blocked layout can be neither copied nor stored

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
    memory = RowMemory()
    for name in names:
        layer = change(model.get_submodule(name))
        layer.memory = memory
        model.set_submodule(name, layer)
    return len(names)


def is_int8(model: nn.Module) -> bool:
    """Return whether a model has int8 layers."""
    return any(isinstance(part, Int8Linear) for part in model.modules())
