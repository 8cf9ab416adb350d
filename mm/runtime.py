"""Process settings that make training on a CPU faster. Called by the commands that train, before the first tensor."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys


@functools.cache
def fast_bfloat16() -> bool:
    """Whether this CPU has units for bfloat16 products (AVX512-BF16, AMX): about twice as fast as float32 then, and dozens of
    times slower where they are emulated."""
    import torch

    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # PyTorch has no public name for them yet
    return torch.backends.mkldnn.is_available() and any(getattr(torch.cpu, name, bool)() for name in known)


def tune_cpu() -> None:
    """Keep freed memory, and treat denormal numbers as zero.

    By default glibc gives every large tensor back to the kernel and fetches the next one anew, page by page; training spends a
    third of its time there. And optimizer moments that shrink below 1e-38 make each operation on them many times slower.
    """
    import torch

    torch.set_flush_denormal(True)
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        mmap_threshold, trim_threshold = -3, -1
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
    except (OSError, AttributeError):  # another C library: nothing to set
        return


def release_memory() -> None:
    """Give the kernel back what `tune_cpu` keeps. Where results are kept between large tensors, freed room is cut into pieces
    that the next large ones don't fit into: encoding 5,000 clips frame by frame took 22 GB, and so takes one."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)
