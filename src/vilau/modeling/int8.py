"""Linear layers in int8: weights per output channel, activations per row at each call, sums in exact integers.

``y = (x_q @ w_q^T) * s_x * s_w + b`` with ``x_q = round(x / s_x)``, ``w_q = round(w / s_w)``, both in [-127, 127], and
``s = max|.| / 127`` over a row of `x` and over a row of `w`. Rows do not depend on each other, and the sums are
integers: so a row alone and in a batch gives the same bits. Rounding costs at most

    |y' - y| <= s_x / 2 * sum_k |s_w w_q[k]|  +  s_w / 2 * sum_k |x[k]|      for each row and output channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

LARGEST = 127
WIDEST = (2**31 - 1) // LARGEST**2  # inputs of a layer whose sum surely fits into 32 bits
_SMALLEST = 1e-30  # scale of a row of zeros
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


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows ``(N, I)`` float32 in int8, and their scales ``(N, 1)``."""
    largest = torch.maximum(x.amax(1, keepdim=True), x.amin(1, keepdim=True).neg_()).clamp_min_(_SMALLEST)
    shifted = (x * (LARGEST / largest)).add_(_MAGIC)
    return shifted.view(torch.int32).to(torch.int8), largest / LARGEST


def int8_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the exact integer products ``(N, O)`` int32 of ``x`` (N, I) int8 and ``weight`` (O, I) int8.

    On CUDA the library's kernel wants more than 16 rows and sizes that are multiples of 8: rows are filled up with
    zeros, and sizes that do not fit go through float32 products of pieces that stay exact.
    """
    if x.device.type == "cpu":
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


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight; for evaluation only.

    `weight` (O, I) int8, `scale` (O,) float32, `bias` (O,) or ``None`` in the dtype of the model.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if in_features > WIDEST:
            raise ValueError(f"a layer with {in_features} inputs is wider than {WIDEST}, the most that int8 sums hold")
        self.in_features, self.out_features = in_features, out_features
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
        rows = x.reshape(-1, self.in_features).float()
        if not len(rows):
            return x.new_zeros((*x.shape[:-1], self.out_features))
        codes, row_scale = quantize_rows(rows)
        out = int8_product(codes, self.weight) * row_scale
        out = out.mul_(self.scale) if self.bias is None else torch.addcmul(self.bias.float(), out, self.scale)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

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
    return len(names)


def is_int8(model: nn.Module) -> bool:
    """Return whether a model has int8 layers."""
    return any(isinstance(part, Int8Linear) for part in model.modules())
