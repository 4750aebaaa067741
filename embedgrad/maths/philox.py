"""Philox4x32-10, a counter-based random number generator: the reference of `csrc/common/philox.h`.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC '11. A number depends on (seed, stream, step) alone:
each sequence draws from its own stream, and what it draws does not depend on what others do.
"""

from __future__ import annotations

Block = tuple[int, int, int, int]

_MASK = 0xFFFFFFFF


def philox4x32_10(counter: Block, key: tuple[int, int]) -> Block:
    """The block of four random 32-bit words at `counter`, four 32-bit words, under `key`."""
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = right >> 32 ^ c1 ^ key0, right & _MASK, left >> 32 ^ c3 ^ key1, left & _MASK
        key0, key1 = key0 + 0x9E3779B9 & _MASK, key1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3


def random_bits(seed: int, stream: int, step: int) -> int:
    """64 random bits. `seed` and `stream` are taken modulo 2^64, `step` (tokens drawn so far) modulo 2^32."""
    counter = (step & _MASK, 0, stream & _MASK, stream >> 32 & _MASK)
    words = philox4x32_10(counter, (seed & _MASK, seed >> 32 & _MASK))
    return words[0] << 32 | words[1]
