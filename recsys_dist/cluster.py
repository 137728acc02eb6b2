"""Ray: the cluster that this process belongs to, or a local one of its own."""

import contextlib
import os
from collections.abc import Iterator

import ray

from recsys_dist.errors import RetryableError


@contextlib.contextmanager
def local_or_cluster(workers: int) -> Iterator[None]:
    """Connect to the cluster named by RAY_ADDRESS (as in a submitted job), else start Ray on this machine.

    Args:
        workers: processes of one CPU each that will be asked for at the same time. A machine with fewer
            cores runs them all the same; a cluster must have the CPUs.

    Raises:
        RetryableError: the cluster cannot be reached, or is smaller than that.
    """
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(log_to_driver=False, logging_level="WARNING")
        else:
            ray.init(
                address="local",
                num_cpus=max(workers, os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=256 << 20,
                log_to_driver=False,
                logging_level="WARNING",
            )
    except ConnectionError as error:
        raise RetryableError(f"RAY_ADDRESS={address} cannot be reached: {error}") from None
    try:
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if cpus < workers:
            raise RetryableError(
                f"The Ray cluster at {address} has {cpus} CPUs and {workers} workers need one each. Add "
                f"nodes, or ask for fewer: --set deepfm.num_workers={max(cpus, 1)}"
            )
        yield
    finally:
        ray.shutdown()
