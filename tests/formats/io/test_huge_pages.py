"""Memory for decoded weights: as numpy's, and in large pages where the system has them."""

import gc
import resource
from pathlib import Path

import numpy as np
import pytest

from compressor.formats.io.huge_pages import allocate

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
MB = 1 << 20


def has_large_pages() -> bool:
    """Returns whether the system gives pages of 2 MB to who asks for them."""
    size = LARGE_PAGES / "hpage_pmd_size"
    return size.exists() and int(size.read_text()) == 2 * MB and "[never]" not in (LARGE_PAGES / "enabled").read_text()


@pytest.mark.parametrize("size", [0, 32, 2 * MB - 32, 2 * MB, 2 * MB + 32, 5 * MB])
@pytest.mark.parametrize("dtype", ["u1", "<u2", "<f4", "c16", "V32"])
def test_is_an_array_of_that_length_and_dtype_that_can_be_written(size: int, dtype: str) -> None:
    array = allocate(size // np.dtype(dtype).itemsize, dtype)
    assert array.nbytes == size
    assert array.dtype == dtype
    assert array.flags.writeable
    if size >= 2 * MB and has_large_pages():
        assert array.ctypes.data % (2 * MB) == 0
    array.view(np.uint8).fill(7)
    assert (array.view(np.uint8) == 7).all()


def test_more_than_there_is_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        allocate(1 << 60, np.uint8)


@pytest.mark.skipif(not has_large_pages(), reason="the system has no large pages")
def test_large_arrays_take_few_page_faults() -> None:
    def faults(size: int) -> int:
        array = allocate(size, np.uint8)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        array.fill(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    small = resource.getpagesize()
    assert min(faults(3 * MB) for _ in range(5)) < 1.2 * MB / small  # one large page, small ones for the rest
    assert min(faults(8 * MB) for _ in range(5)) < 0.2 * MB / small


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell")
def test_is_given_back_with_the_array() -> None:
    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    gc.collect()
    before = mapped()
    array = allocate(64 * MB, np.uint8)
    held = mapped() - before
    del array
    assert held > 60 * MB
    assert mapped() - before < 4 * MB
