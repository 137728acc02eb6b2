"""Lists of which there are many are measured by Spark: what it is given, and what it has found.

Legend: U users, I items (index 0 is unknown).
"""

import json
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from recsys_dist.config import Config
from recsys_dist.errors import RetryableError
from recsys_dist.evaluation.measured import Catalogue, Measured
from recsys_dist.job import require_java, run_module
from recsys_dist.recall.content import WHOLE
from recsys_dist.workspace import OpenRun

FOLDER = "spark"
"""Of the run, while it is made."""


def measured_by_spark(
    config: Config,
    run: OpenRun,
    models: Sequence[str],
    users: pa.Table,
    catalogue: Catalogue,
    rows: int,
) -> Iterator[tuple[str, Measured]]:
    """Measure the run's lists/ and relevant/, and yield one model after the other.

    Args:
        config: the lengths, and how Spark is started.
        run: has both tables.
        models: names in lists/.
        users: of `held_out`.
        catalogue: of the same features run.
        rows: of lists/.

    Raises:
        ConfigError: Spark would not start, because of Java.
        RetryableError: Spark failed.
    """
    require_java()
    run.write_table(f"{FOLDER}/items", _items(catalogue))
    if catalogue.vectors:
        item_N, value_N, weight_N = (of.numpy() for of in catalogue.vectors.entries())
        run.write_table(f"{FOLDER}/vectors", pa.table({"item": item_N, "value": value_N, "weight": weight_N}))
    task = {
        "config": config.model_dump(mode="json"),
        "lists": f"{run.uri}/lists",
        "relevant": f"{run.uri}/relevant",
        "folder": f"{run.uri}/{FOLDER}",
        "models": list(models),
        "rows": rows,
        "whole": WHOLE if catalogue.vectors else None,
    }
    code = run_spark(json.dumps(task))
    if code:
        raise RetryableError(
            f"Spark ended with exit code {code} while it measured {rows:,} places of lists; what it said is "
            f"above. Give it more memory (spark.submit), or measure without it: evaluation.spark_rows above "
            f"{rows}."
        )
    for model in models:
        yield model, _read(run, model, users, catalogue, config.evaluation.k)
    run.remove(FOLDER)


def run_spark(task: str) -> int:
    """Measure what `by_spark.Task` says, in a process of its own; its exit code."""
    return run_module("recsys_dist.evaluation.by_spark", task).returncode


def _items(catalogue: Catalogue) -> pa.Table:
    width = len(catalogue.counts_I)
    return pa.table(
        {
            "item": np.arange(1, width, dtype=np.int32),
            "train": catalogue.counts_I[1:],
            "place": catalogue.places_I[1:],
            "head": catalogue.segments["head"][1:],
        }
    )


def _read(
    run: OpenRun, model: str, users: pa.Table, catalogue: Catalogue, lengths: Sequence[int]
) -> Measured:
    """What Spark has found about one model."""
    values = _table(run, "users", model).sort_by("user")
    rows = np.argsort(users["user"].to_numpy())
    parts: dict[str, dict[str, np.ndarray]] = {name: {} for name in ("", *catalogue.segments)}
    for name in values.drop_columns(["user", "model"]).column_names:
        segment, _, metric = name.rpartition(":")
        parts[segment][metric] = of_U = np.empty(len(users))
        of_U[rows] = values[name].to_numpy()
    found = _table(run, "listed", model)
    listed = {k: np.zeros(len(catalogue.counts_I), np.int64) for k in lengths}
    for k, of_I in listed.items():
        of_I[found["item"].to_numpy()] = found[f"listed@{k}"].to_numpy()
    return Measured(parts.pop(""), parts, listed)


def _table(run: OpenRun, name: str, model: str) -> pa.Table:
    folder = f"{run.path}/{FOLDER}/{name}"
    dataset = pa.dataset.dataset(folder, filesystem=run.filesystem, format="parquet", partitioning="hive")
    return dataset.to_table(filter=pc.field("model") == model)
