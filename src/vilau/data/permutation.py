"""A keyed permutation of any number of items that stores nothing: the order of an epoch, one sample at a time.

A Feistel network over the smallest power of two that holds all numbers, walked until the result is within range; so
``permute`` needs constant memory and, on average, fewer than two passes (Black and Rogaway, "Ciphers with arbitrary
finite domains", 2002).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

_ROUNDS = 6
_MASK = (1 << 64) - 1


def hash64(*words: object) -> int:
    """Return 64 bits that depend on all words: the same on every machine and in every process."""
    text = "\x1f".join(map(str, words)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def unit(*words: object) -> float:
    """Return a number in [0, 1) that depends on all words."""
    return (hash64(*words) >> 11) / (1 << 53)


def permute(number: int, size: int, *key: object) -> int:
    """Return where a permutation of ``0 ... size - 1`` chosen by ``key`` takes ``number``.

    Raises:
        ValueError: the number is not below the size.
    """
    if not 0 <= number < size:
        raise ValueError(f"number {number} is not among the {size} that are permuted")
    bits = max(2, (size - 1).bit_length())
    keys = _round_keys(key)
    while True:  # numbers within the power of two but out of range are walked through
        number = _encipher(number, bits, keys)
        if number < size:
            return number


def _encipher(number: int, bits: int, keys: tuple[int, ...]) -> int:
    low = bits // 2
    high = bits - low
    for key in keys:  # each round moves the low part up, mixed into the high part; so the two widths change places
        left, right = number >> low, number & ((1 << low) - 1)
        left ^= _mix(right ^ key) & ((1 << high) - 1)
        number = (right << high) | left
        low, high = high, low
    return number


def _mix(value: int) -> int:
    """Return 64 well-mixed bits of a number of up to 64 bits (the finaliser of splitmix64)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


@lru_cache(maxsize=256)
def _round_keys(key: tuple[object, ...]) -> tuple[int, ...]:
    return tuple(hash64(*key, round) for round in range(_ROUNDS))
