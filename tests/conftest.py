"""Fixtures that several folders share."""

import os

import pytest

from recsys_dist.config import DEFAULT_CONF


@pytest.fixture(scope="session")
def spark():
    """One Spark session for all tests that call Spark code in this process."""
    from pyspark.sql import SparkSession

    os.environ["SPARK_CONF_DIR"] = str(DEFAULT_CONF.parent / "spark")
    os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
    builder = SparkSession.builder.master("local[2]")
    for key, value in {
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        "spark.driver.memory": "1g",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
    }.items():
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    yield session
    session.stop()
