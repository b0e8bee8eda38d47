"""To be imported before torch: settings of the C library and of oneDNN that a user should not have
to know of. Processes that are started by this one have them too: spawned ones import the main
script again, which imports this, and forked ones inherit them. What the user has set wins.

* glibc gives freed blocks above 32 MiB back to the system and has them faulted in again, page by
  page, at every training step (millions of faults for a PyramidNet-200). Here it keeps them.
* oneDNN keeps 1,024 kernels. A PyramidNet, whose convolutions all differ, needs more, and would
  compile them anew at every step.

docs/performance.md has the measurements.
"""

from __future__ import annotations

import ctypes
import os

# Parameters of glibc's mallopt (malloc.h), each with the names by which a user sets it: in the
# environment, and in GLIBC_TUNABLES.
_KEEP_MEMORY = {
    -4: (0, "MALLOC_MMAP_MAX_", "glibc.malloc.mmap_max"),  # M_MMAP_MAX: all from the heap,
    -1: (2**31 - 1, "MALLOC_TRIM_THRESHOLD_", "glibc.malloc.trim_threshold"),  # never trimmed,
    -2: (256 * 2**20, "MALLOC_TOP_PAD_", "glibc.malloc.top_pad"),  # which grows in large steps
}
KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def keep_memory() -> None:
    """Have the C library keep freed memory for this process; does nothing where it is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    for parameter, (value, variable, tunable) in _KEEP_MEMORY.items():
        if variable not in os.environ and tunable not in tunables:
            mallopt(parameter, value)


keep_memory()
os.environ.setdefault(KERNELS, "16384")
