"""Settings of tests whose ranks are threads."""

from collections.abc import Iterator

import pytest

from mpilm.engine import hardware


@pytest.fixture(scope="session", autouse=True)
def quick_peak_flops() -> Iterator[None]:
    """Time a small matrix product: the peak is only printed, and each of eight threads would take a tenth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "PROBE_SIZE", 32)
        yield
