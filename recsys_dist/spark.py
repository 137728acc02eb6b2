"""Spark on one machine: where it is, how it starts, and the archive of classes that makes it start sooner.

    python -m recsys_dist.spark        makes the archive, once an environment; `make setup` does

A third of the start of a small night's Spark is Java loading and checking some 20,000 classes, anew for every
stage. Java reads them far faster from an archive, which it ignores where Java or Spark are not those it was
made with. It allows no folder with files on the class path, where Spark puts SPARK_CONF_DIR: so that names a
folder that does not exist, and the logging's configuration is given in an option.
"""

import datetime as dt
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from recsys_dist.config import DEFAULT_CONF, REPOSITORY, Config, load
from recsys_dist.errors import ConfigError
from recsys_dist.job import require_java

ARCHIVE = Path(sys.prefix) / "share" / "recsys_dist" / "spark.jsa"
"""Belongs to the environment that Spark is installed in."""
READ = f"-XX:SharedArchiveFile={ARCHIVE}"
"""Java's option."""
LOGGING = DEFAULT_CONF.parent / "spark" / "log4j2.properties"
"""Says only what went wrong."""
NOWHERE = LOGGING.parent / "none"
"""SPARK_CONF_DIR, which is not there."""
JAVA_OPTIONS = "spark.driver.defaultJavaOptions"
"""The property that leaves the user's own alone."""
EVENTS = 600
"""Of the log that is read to see which classes that takes."""


def spark_home() -> Path:
    """The Spark named by SPARK_HOME, as on a cluster, else the one inside the pyspark package."""
    home = os.environ.get("SPARK_HOME")
    if home:
        return Path(home)
    pyspark = importlib.util.find_spec("pyspark")
    if pyspark is None or pyspark.origin is None:
        raise ConfigError("pyspark is not installed and SPARK_HOME is not set: `make setup` installs it")
    return Path(pyspark.origin).parent


def is_own() -> bool:
    """Is Spark the one inside the pyspark package, with no configuration of the user's?"""
    return "SPARK_HOME" not in os.environ and os.environ.get("SPARK_CONF_DIR") in (None, str(NOWHERE))


def spark_environment() -> dict[str, str]:
    """What spark-submit needs to know of this installation; the user's own environment goes before it."""
    environment = {"SPARK_HOME": str(spark_home())}
    environment |= dict.fromkeys(("PYSPARK_PYTHON", "PYSPARK_DRIVER_PYTHON"), sys.executable)
    return environment | (own_environment() if is_own() else {})


def own_environment() -> dict[str, str]:
    """What the Spark inside the pyspark package needs."""
    return {"SPARK_CONF_DIR": str(NOWHERE), "SPARK_LOCAL_IP": "127.0.0.1"}


def java_options(archive: str = READ) -> str:
    """Java's options for the Spark inside the pyspark package. An archive that does not fit is ignored."""
    return f"-Dlog4j2.configurationFile={LOGGING.as_uri()} {archive} -Xlog:cds=off,cds+dynamic=off"


def arguments(config: Config, archive: str = READ) -> list[str]:
    """Arguments of spark-submit: those of the configuration after what this installation needs.

    Args:
        config: its section `spark` is used.
        archive: Java's option about the archive.
    """
    own = ["--conf", f"{JAVA_OPTIONS}={java_options(archive)}"] if is_own() else []
    return [*own, *config.spark.arguments]


def submit(script: Path, words: Sequence[str], config: Config, archive: str = READ) -> list[str]:
    """The command line that starts a Python file by spark-submit, with these words behind it."""
    return [str(spark_home() / "bin" / "spark-submit"), *arguments(config, archive), str(script), *words]


def make_archive() -> None:
    """Run the first stage on a small log, and keep the classes that it took."""
    require_java()
    with tempfile.TemporaryDirectory(prefix="recsys_dist-") as name:
        folder, new = Path(name), Path(name) / "spark.jsa"
        begin = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
        rows = [
            f"{n % 40},{n * 7 % 50},{(begin + dt.timedelta(hours=n)).isoformat()},{n % 5 + 1}"
            for n in range(EVENTS)
        ]
        (folder / "events.csv").write_text("\n".join(["user,item,at,value", *rows]))
        items = [f"{n},{n % 7}|{n % 3},{n / 7}" for n in range(50)]
        (folder / "items.csv").write_text("\n".join(["item,tags,price", *items]))
        columns = {"user": "user", "item": "item", "timestamp": "at", "value": "value"}
        events = {"path": str(folder / "events.csv"), "format": "csv", "columns": columns}
        table = {"path": str(folder / "items.csv"), "format": "csv", "columns": {"item": "item"}}
        fields = [
            {"name": "tags", "kind": "categorical", "side": "item", "column": "tags", "delimiter": "|"},
            {"name": "price", "kind": "numeric", "side": "item", "column": "price", "impute": "median"},
            {"name": "recent", "kind": "history", "of": "item", "last": 5},
            {"name": "mean", "kind": "aggregate", "measure": "mean_value"},
            {"name": "sold", "kind": "aggregate", "side": "item", "measure": "count", "days": 30},
            {"name": "hour", "kind": "time", "part": "hour"},
        ]
        settings = {
            "storage": {"root": str(folder / "runs")},
            "data": {"events": events | {"timestamp_format": "iso"}, "items": table},
            "label": {"positive_when": "value >= 3"},
            "fields": fields,
            # Less is compiled: it is run once.
            "spark": {"submit": ["--driver-java-options", "-XX:TieredStopAtLevel=1 -XX:+UseParallelGC"]},
        }
        (folder / "conf.yaml").write_text(json.dumps(settings))  # JSON is YAML
        config = load(str(folder / "conf.yaml"), [])
        words = ["--conf", str(folder / "conf.yaml")]
        line = submit(REPOSITORY / "jobs" / "featurize.py", words, config, f"-XX:ArchiveClassesAtExit={new}")
        environment = spark_environment() | os.environ
        done = subprocess.run(line, check=False, env=environment, capture_output=True, text=True)
        if done.returncode or not new.exists():
            raise ConfigError(f"Spark did not run:\n{done.stdout}{done.stderr}")
        ARCHIVE.parent.mkdir(parents=True, exist_ok=True)
        beside = ARCHIVE.with_suffix(f".{os.getpid()}")
        beside.write_bytes(new.read_bytes())
        beside.replace(ARCHIVE)


if __name__ == "__main__":
    start = time.perf_counter()
    make_archive()
    print(f"setup: {ARCHIVE} made in {time.perf_counter() - start:.0f} s")
