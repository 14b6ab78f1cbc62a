"""Products of few rows with a matrix, by kernel: why int8 uses the one that it uses, and why there is no int4.

    python benchmarks/int8_kernels.py [--sizes 768x768,3072x768,16384x768] [--rows 2,8]

Of each size as many matrices as make up 200 MB of int8 are taken in turn, so that none lies in a processor's cache.
Microseconds are the best of five rounds of the processor time of one thread; the work on activations (their scales and
rounding) is not in them but where it says so. Kernels that this torch or processor lacks are left out.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin would be counted as work

import torch
from torch.nn import functional as F

from vilau.evaluation.machine import machine_name
from vilau.modeling.int8 import SHIFT, pack, packed_product, quantize_rows

BYTES = 200e6
ROUNDS = 5
GROUP = 32  # weights that share a scale in int4

Product = Callable[[], object]


def float32(weight: torch.Tensor, x: torch.Tensor) -> Product:
    """`F.linear` in float32."""
    full = weight.float()
    return lambda: F.linear(x, full)


def onednn(weight: torch.Tensor, x: torch.Tensor) -> Product:
    """The kernel in use: oneDNN over a packed copy."""
    packed, scale, (codes, _) = pack(weight), torch.ones(len(weight)), quantize_rows(x, SHIFT)
    return lambda: packed_product(codes, packed, scale)


def onednn_with_rows(weight: torch.Tensor, x: torch.Tensor) -> Product:
    """The kernel in use with scales and rounding of the rows."""
    packed, scale = pack(weight), torch.ones(len(weight))
    return lambda: packed_product(quantize_rows(x, SHIFT)[0], packed, scale)


def int_mm(weight: torch.Tensor, x: torch.Tensor) -> Product:
    """`torch._int_mm`."""
    codes = quantize_rows(x)[0]
    return lambda: torch._int_mm(codes, weight.t())


def fbgemm_dynamic(weight: torch.Tensor, x: torch.Tensor) -> Product:
    """`quantized::linear_dynamic`: one scale for all rows, its own work on them included."""
    scales, zeros = torch.full((len(weight),), 0.01), torch.zeros(len(weight), dtype=torch.int64)
    quantized = torch._make_per_channel_quantized_tensor(weight, scales, zeros, 0)
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    return lambda: torch.ops.quantized.linear_dynamic(x, packed)


def float_rows(weight: torch.Tensor, x: torch.Tensor) -> Product:
    """`_weight_int8pack_mm`: int8 weights, bfloat16 activations."""
    scale, half = torch.ones(len(weight), dtype=torch.bfloat16), x.bfloat16()
    return lambda: torch._weight_int8pack_mm(half, weight, scale)


def int4(weight: torch.Tensor, x: torch.Tensor) -> Product:
    """`_weight_int4pack_mm_for_cpu`: int4 weights, bfloat16 activations."""
    packed = torch._convert_weight_to_int4pack_for_cpu((weight.int() + 128) // 16, 1)
    scales = torch.ones(weight.shape[1] // GROUP, len(weight), 2, dtype=torch.bfloat16)
    half = x.bfloat16()
    return lambda: torch._weight_int4pack_mm_for_cpu(half, packed, GROUP, scales)


KERNELS = (float32, onednn, onednn_with_rows, int_mm, fbgemm_dynamic, float_rows, int4)


def microseconds(make: Callable[[torch.Tensor, torch.Tensor], Product], out: int, inside: int, rows: int) -> float:
    """Return the time of one product, the least of some rounds over all matrices."""
    count = max(2, int(BYTES / (out * inside)))
    x = torch.randn(rows, inside)
    products = [make(torch.randint(-127, 128, (out, inside), dtype=torch.int8), x) for _ in range(min(count, 200))]
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        for product in products:
            product()
        best = min(best, time.process_time() - start)
    return best / len(products) * 1e6


@torch.no_grad()
def main() -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="768x768,3072x768,16384x768", help="outputs x inputs")
    parser.add_argument("--rows", default="2,8")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*deprecated.*")  # fbgemm's, which is here to be compared with
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes.split(",")]
    columns = [(*size, rows) for size in sizes for rows in map(int, options.rows.split(","))]
    print(f"{machine_name(torch.device('cpu'))}, one thread, torch {torch.__version__}, microseconds a product\n")
    print("| kernel | " + " | ".join(f"{out} x {inside}, {rows} rows" for out, inside, rows in columns) + " |")
    print("| --- |" + " --- |" * len(columns))
    for make in KERNELS:
        name = (make.__doc__ or "").rstrip(".")
        try:
            times = [microseconds(make, *column) for column in columns]
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            print(f"| {name} | not here: {str(error).splitlines()[0][:80]} |" + " |" * (len(columns) - 1))
            continue
        print(f"| {name} | " + " | ".join(f"{value:.0f}" for value in times) + " |", flush=True)


if __name__ == "__main__":
    main()
