"""Fixtures that several folders share."""

import os

import pytest

import recsys_dist.cluster  # noqa: F401  (sets what torch reads when a test imports it)
from recsys_dist.spark import JAVA_OPTIONS, java_options, own_environment


@pytest.fixture(scope="session")
def spark():
    """One Spark session for all tests that call Spark code in this process."""
    from pyspark.sql import SparkSession

    os.environ.update(own_environment())
    builder = SparkSession.builder.master("local[2]")
    for key, value in {
        JAVA_OPTIONS: java_options(),
        # All tests' queries stay compiled: of its own one tier has room for 48 MB.
        "spark.driver.extraJavaOptions": (
            "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -XX:ReservedCodeCacheSize=240m"
        ),
        "spark.driver.memory": "1g",
        # Of the default 100 compiled queries one test's would be gone when the next one asks for the same.
        "spark.sql.codegen.cache.maxEntries": "1000",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
    }.items():
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    yield session
    session.stop()
