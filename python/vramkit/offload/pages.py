"""Which pages of a private mapping of a file were written, or only read: asked of Linux.

Autograd's version counters do not see what is written through `parameter.data` (so PEFT merges its
adapters), through numpy or through a pointer. The system does: a page of a private mapping that was
written is no longer the file's. Asking costs some ten microseconds a block (`PAGEMAP_SCAN`, Linux
6.7), on older systems some two for each MiB (/proc/self/pagemap).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import weakref
from typing import NamedTuple

PAGE = os.sysconf("SC_PAGESIZE")

# <linux/fs.h>: _IOWR('f', 16, struct pm_scan_arg), of twelve 64-bit words.
_SCAN = 0xC0606610
_FILE, _PRESENT, _SWAPPED = 1 << 2, 1 << 3, 1 << 4
# /proc/pid/pagemap, Documentation/admin-guide/mm/pagemap.rst.
_ENTRY = 8
_ENTRY_FILE, _ENTRY_SWAPPED, _ENTRY_PRESENT = 1 << 61, 1 << 62, 1 << 63
_DONTNEED = 4  # <sys/mman.h>


class Found(NamedTuple):
    """What is true of some page of a range: it was written; it is in this process's memory."""

    written: bool
    present: bool


class Pages:
    """Looks at ranges of this process's private mappings. OSError where the system cannot say."""

    def __init__(self) -> None:
        pagemap = open("/proc/self/pagemap", "rb", buffering=0)  # noqa: SIM115
        self._map = pagemap.fileno()
        self._close = weakref.finalize(self, pagemap.close)
        self._region = (ctypes.c_uint64 * 3)()
        self._system = ctypes.CDLL(None, use_errno=True)
        self._scans = True
        self.look(ctypes.addressof(self._region), 1)

    def look(self, address: int, nbytes: int) -> Found:
        """What is true of the pages of a range."""
        first = address // PAGE * PAGE
        end = -(-(address + nbytes) // PAGE) * PAGE
        if self._scans:
            try:
                if not self._any(first, end, 0, 0):
                    return Found(False, False)
                return Found(self._any(first, end, _FILE, _FILE), True)
            except OSError as error:
                if error.errno not in (errno.ENOTTY, errno.EINVAL):
                    raise
                self._scans = False  # an older system: the same facts, page by page
        return self._read(first, end)

    def _any(self, first: int, end: int, inverted: int, mask: int) -> bool:
        """Whether any page is there and has (or has not, where inverted) the category."""
        there, where = _PRESENT | _SWAPPED, ctypes.addressof(self._region)
        words = (96, 0, first, end, 0, where, 1, 1, inverted, mask, there, there)
        return fcntl.ioctl(self._map, _SCAN, bytearray(struct.pack("12Q", *words))) > 0

    def _read(self, first: int, end: int) -> Found:
        import numpy as np

        wanted = (end - first) // PAGE * _ENTRY
        raw = os.pread(self._map, wanted, first // PAGE * _ENTRY)
        if len(raw) != wanted:
            raise OSError(errno.EIO, "/proc/self/pagemap says nothing of a mapping's pages")
        entries = np.frombuffer(raw, dtype=np.uint64)
        there = entries[(entries & np.uint64(_ENTRY_PRESENT | _ENTRY_SWAPPED)) != 0]
        written = (there & np.uint64(_ENTRY_FILE)) == 0
        return Found(bool(written.any()), bool(there.size))

    def drop(self, address: int, nbytes: int) -> None:
        """Let go of a range's pages. They are read again at need: only for ones not written."""
        first = address // PAGE * PAGE
        end = -(-(address + nbytes) // PAGE) * PAGE
        done = self._system.madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(end - first), ctypes.c_int(_DONTNEED)
        )
        if done != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
