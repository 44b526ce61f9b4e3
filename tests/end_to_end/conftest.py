"""What the end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray that outlives its drivers, as on a cluster: the later runs join it and start faster."""
    import ray

    context = ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=80 * 2**20,
    )
    yield str(context.address_info["gcs_address"])
    ray.shutdown()
