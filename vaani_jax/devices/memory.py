"""Memory on CPUs: what is freed stays in the process, or leaves it.

XLA on a CPU takes one large buffer for the temporaries of each call and frees it
afterwards. The C library of Linux answers by unmapping it, so that every step touches
fresh pages: the training step of a small model then spends a third of its time in page
faults. Two settings end that. Calls run on the thread that makes them, so that
temporaries always come from the same heap (the C library keeps one per thread); and the
heap never shrinks. The process holds on to its peak of memory in exchange.

Work that passes over a large model once wants the opposite: every freed array back with
the system. There the C library raises, with the first large array that is freed, the
size from which it maps blocks one by one, and keeps what is smaller.
"""

import ctypes
import platform

import jax

# Options of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1


_M_TOP_PAD = -2


_M_MMAP_THRESHOLD = -3


_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Makes repeated calls of compiled functions on a CPU reuse their memory.

    Call it before the first computation. Does nothing on accelerators.

    Returns:
      Whether the allocator took the settings: glibc does, others are left alone.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # CPU backend only
    if jax.default_backend() != "cpu":
        return False
    never = -1
    return _set(
        (_M_MMAP_MAX, 0),  # large blocks come from the heap, too
        (_M_TRIM_THRESHOLD, never),  # and the heap doesn't shrink
        (_M_TOP_PAD, 64 << 20),  # bytes: it grows in few, large pieces
    )


def return_freed_memory() -> bool:
    """Makes freed arrays of a megabyte or more leave the process at once.

    Returns:
      Whether the allocator took the setting: glibc does, others are left alone.
    """
    return _set((_M_MMAP_THRESHOLD, 1 << 20))


def available_memory() -> int | None:
    """Bytes that can be taken without swapping; None where the system doesn't say.

    Of the machine, whose memory a CPU computes in: None with an accelerator, too.
    """
    if jax.default_backend() != "cpu":
        return None
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        return None


def _set(*settings: tuple[int, int]) -> bool:
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, value) == 1 for option, value in settings)
