"""The files of a score run's lists, one a partition."""

import json
from typing import Any

import pyarrow.fs
import pyarrow.parquet as pq

from recsys_dist.workspace import OpenRun

LISTS = "lists"
"""The run's folder with the partitions' files, each with the partition's figures in its schema's metadata."""
FIGURES = b"figures"


def finished(run: OpenRun) -> dict[int, dict[str, Any]]:
    """The partitions of a run that are written: number to figures."""
    selector = pyarrow.fs.FileSelector(f"{run.path}/{LISTS}", allow_not_found=True)
    files = [info.path for info in run.filesystem.get_file_info(selector) if info.extension == "parquet"]
    numbers = [int(path.rpartition("part-")[2].removesuffix(".parquet")) for path in sorted(files)]
    return {number: figures for number in numbers if (figures := figures_of(run, number)) is not None}


def figures_of(run: OpenRun, part: int) -> dict[str, Any] | None:
    """A partition's figures, as its file has them; None where it is not written."""
    path = f"{run.path}/{LISTS}/part-{part:05d}.parquet"
    if not run.filesystem.get_file_info(path).is_file:
        return None
    return dict(json.loads(pq.read_schema(path, filesystem=run.filesystem).metadata[FIGURES]))


def remove_unfinished(run: OpenRun) -> None:
    """Remove what workers were writing when they died."""
    selector = pyarrow.fs.FileSelector(f"{run.path}/{LISTS}", allow_not_found=True)
    for info in run.filesystem.get_file_info(selector):
        if info.extension == "tmp":
            run.remove(f"{LISTS}/{info.base_name}")
