"""The regimes of memory in which a benchmark times and measures peaks."""

from __future__ import annotations

# Names of the regimes of memory; WARM's environment keeps freed memory in the process, so that after the first calls no
# contender pays for the first touch of a page.
WARM, DEFAULT, CACHING = "warm", "default", "caching"
ALLOCATOR_ENVIRONMENT = {
    WARM: {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "100000000000",
        "MALLOC_TOP_PAD_": "268435456",
    },
    DEFAULT: {},
    CACHING: {},
}
ALLOCATOR_MEANING = {
    WARM: "malloc keeps freed memory (" + " ".join(f"{k}={v}" for k, v in ALLOCATOR_ENVIRONMENT[WARM].items()) + ")",
    DEFAULT: "malloc untouched: large tensors come from the system anew, and their first touch is paid for",
    CACHING: "torch's caching CUDA allocator",
}
# While memory is measured, a freed block goes back to the system at once and cannot hide the next one's growth.
PEAK_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
