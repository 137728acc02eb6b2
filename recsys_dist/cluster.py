"""Ray: the cluster that this process belongs to, or a local one of its own, and neither of them chatty."""

import contextlib
import os
import socket
from collections.abc import Iterator

# Read when Ray is imported and by its processes: no report of use, no prefix or colour before a line.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_COLOR_PREFIX", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# The end of a training, or a worker's death, is seen after so many seconds; by default after 2.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
# A local Ray would start a process a CPU in advance, and none is of use: ours have a runtime_env.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# Read when torch is imported. A thread that waits for others of its process gives its core away after some
# 10 us. By default it keeps it for milliseconds: with two trainings on as many cores as each has threads, a
# matrix product took 6 times as long as alone; so it takes twice as long, and alone what it took before.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import ray
from ray.exceptions import RayError

from recsys_dist.config import PACKAGE
from recsys_dist.errors import ConfigError, RetryableError

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
"""Of the workers' C library: memory that a step gave back is kept for the next one. By default every tensor
of some MiB is new memory, whose pages the system fills with zeros first: a third of a step's time."""
OBJECT_STORE_BYTES = 100_000_000
"""Of a local Ray: nothing big passes through it."""


@contextlib.contextmanager
def local_or_cluster(
    workers: int = 1, key: str = "deepfm.num_workers", least: int | None = None
) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS (a submitted job has it), else start Ray on this machine.

    Args:
        workers: processes of one CPU each that will be asked for at the same time. This machine runs them
            however few cores it has; a cluster must have the CPUs.
        key: the setting that decides their number, for the error.
        least: of them, where a cluster may have fewer CPUs.

    Raises:
        RetryableError: the cluster cannot be reached, or a local Ray not started.
        ConfigError: the cluster has fewer CPUs.
    """
    # The workers import this very package, wherever the driver found it.
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    options = {"log_to_driver": False, "logging_level": "ERROR"}
    native = {name: os.environ.get(name, value) for name, value in MALLOC.items()}
    native["GOMP_SPINCOUNT"] = os.environ["GOMP_SPINCOUNT"]
    options |= {"runtime_env": {"env_vars": {"PYTHONPATH": path, **native}}}
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        options |= {"address": "local", "num_cpus": max(workers, os.cpu_count() or 1)}
        options |= {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    try:
        if address:
            _probe(address)
        ray.init(**options)
    except (OSError, RuntimeError, RayError) as error:
        where = f"The Ray cluster at RAY_ADDRESS={address}" if address else "A local Ray"
        raise RetryableError(f"{where} cannot be used: {error}") from error
    try:
        found = int(ray.cluster_resources().get("CPU", 0))
        needed = least or workers
        if found < needed:
            raise ConfigError(
                f"{key} asks for {needed} workers{' or more' * (needed < workers)}, each with a CPU, and the "
                f"Ray cluster at {address} has {found}. Add nodes, or give --set {key}={max(found, 1)}."
            )
        yield
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Raise an OSError at once where nothing listens; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "//" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
