"""Runs: immutable folders `<root>/<stage>/<run_id>/`, each finished by its manifest.json.

A folder without a manifest does not exist for any reader, so a stage that dies leaves nothing behind that
could be taken for finished. Nothing is ever written into a committed run.
"""

import contextlib
import datetime as dt
import functools
import hashlib
import json
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet as pq

from recsys_dist import __version__
from recsys_dist.config import PACKAGE, REPOSITORY, Config, absolute
from recsys_dist.errors import ConfigError, DataError, RetryableError
from recsys_dist.schema import FeatureSpec, read_spec

MANIFEST = "manifest.json"
RUN_ID = "%Y%m%dT%H%M%S.%f"
"""How a run id begins: when the run was started, so that ids sort by it."""
TRAINING, LOCK = "training", "driver.lock"
"""Beside a run's files until it is committed: OpenRun.training, and the lock of the process that makes it."""


@dataclass(frozen=True)
class Stage:
    """What a stage depends on: with the same of all three, its run need not be made again."""

    job: str
    """The file in jobs/ that makes its runs."""
    reads: tuple[str, ...]
    """Stages whose runs it reads, in the order of the pipeline."""
    sections: tuple[str, ...]
    """Parts of the configuration that its result depends on."""
    pairs_read: tuple[str, ...] = ()
    """Stages that it reads as well where the model has pair fields (deepfm.pair)."""
    factors_read: tuple[str, ...] = ()
    """And where some of these are of measure als."""
    runtime_only: tuple[str, ...] = ()
    """Keys of its sections that decide how a run is made, not what it holds, but for rounding and dropout."""


_HOW_TRAINED = tuple(
    f"deepfm.{key}"
    for key in (
        *("num_workers", "sharding", "resize_seconds", "max_failures", "cache_megabytes"),
        *("checkpoint_every_steps", "checkpoint_every_minutes", "checkpoints_kept"),
    )
)

STAGES = {
    "features": Stage("featurize.py", (), ("seed", "data", "label", "split", "fields", "score.date")),
    "als": Stage(
        "train_als.py",
        ("features",),
        ("seed", "als", "score.filter_seen", "recall.events", "recall.late"),
    ),
    "recall": Stage("recall.py", ("features",), ("seed", "recall")),
    "deepfm": Stage(
        "train_deepfm.py",
        ("features",),
        ("seed", "deepfm", "score.filter_seen"),
        pairs_read=("recall",),
        factors_read=("als",),
        runtime_only=_HOW_TRAINED,
    ),
    "evaluation": Stage(
        "evaluate.py",
        ("features", "als", "recall", "deepfm"),
        ("seed", "evaluation", "score.mode", "score.candidates", "score.most", "score.filter_seen"),
    ),
    "score": Stage("score.py", ("features", "als", "recall", "deepfm", "evaluation"), ("seed", "score")),
}

EXPERIMENTS = {
    "tune": Stage(
        "tune.py",
        ("features",),
        (
            *("seed", "deepfm", "score.filter_seen"),
            *("tune.space", "tune.trials", "tune.grace_epochs", "tune.reduction_factor"),
        ),
        runtime_only=_HOW_TRAINED,
    )
}
"""No part of a night. Their runs live under `tune.root`, and none is read by a later stage."""


@dataclass(frozen=True)
class Run:
    """A committed run: read only."""

    filesystem: pyarrow.fs.FileSystem
    path: str
    """Path within the filesystem."""
    uri: str
    """The same place for Spark and for people."""
    manifest: dict[str, Any]

    @property
    def run_id(self) -> str:
        """Sorts by the time the run was started."""
        return str(self.manifest["run_id"])

    @property
    def inputs(self) -> dict[str, str]:
        """Stage to run id of everything it was made from."""
        return dict(self.manifest["inputs"])

    def dataset(self, name: str) -> pyarrow.dataset.Dataset:
        """One of the run's tables, such as `items` or `examples`, with its partition columns."""
        return pa.dataset.dataset(
            f"{self.path}/{name}",
            filesystem=self.filesystem,
            format="parquet",
            partitioning="hive",
            exclude_invalid_files=False,
        )

    def table(self, name: str, **scan: Any) -> pa.Table:
        """The rows of one of the run's tables; `scan` goes to pyarrow's Dataset.to_table."""
        return self.dataset(name).to_table(**scan)

    def json(self, name: str) -> Any:
        """A JSON file of the run."""
        with self.filesystem.open_input_stream(f"{self.path}/{name}") as stream:
            return json.loads(stream.read())

    def spec(self) -> FeatureSpec:
        """The FeatureSpec of a features run."""
        return read_spec(self.filesystem, self.path)

    def require_intact(self, *folders: str) -> None:
        """Raise a DataError where a file of these folders is not the one that was committed.

        Args:
            folders: such as `model`, of whose files the manifest has the sha256.
        """
        for entry in self.manifest["files"]:
            if entry["path"].split("/")[0] not in folders:
                continue
            path = f"{self.path}/{entry['path']}"
            info = self.filesystem.get_file_info(path)
            if not info.is_file:
                wrong = "it is missing"
            elif info.size != entry["bytes"]:
                wrong = f"it has {info.size} bytes, expected {entry['bytes']}"
            elif _sha256(self.filesystem, path) != entry["sha256"]:
                wrong = "its sha256 is not that of its manifest"
            else:
                continue
            raise DataError(
                f"{self.uri}/{entry['path']} is not what was committed: {wrong}. Restore it, or make the run "
                f"again: jobs/{STAGES[self.manifest['stage']].job} --force."
            )


@dataclass(frozen=True)
class OpenRun:
    """A run that is being made. It becomes visible by `commit`, and only by it."""

    workspace: "Workspace"
    stage: str
    run_id: str
    inputs: dict[str, Run]
    key: dict[str, Any]
    started: dt.datetime

    @property
    def filesystem(self) -> pyarrow.fs.FileSystem:
        """Where the run lives."""
        return self.workspace.filesystem

    @property
    def path(self) -> str:
        """Path within the filesystem."""
        return f"{self.workspace.path}/{self.stage}/{self.run_id}"

    @property
    def uri(self) -> str:
        """The same place for Spark and for people."""
        return f"{self.workspace.uri}/{self.stage}/{self.run_id}"

    @property
    def training(self) -> Path:
        """Folder of what the same command goes on from until the run is committed, such as checkpoints; all
        workers must see it."""
        return here(self) / TRAINING

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, whole or not at all."""
        self.write_text(name, json.dumps(value, indent=1) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, whole or not at all."""
        _write(self.filesystem, f"{self.path}/{name}", text)

    def write_table(self, name: str, table: pa.Table, part: int = 0) -> None:
        """Write part of one of the run's tables, whole or not at all."""
        folder, file = f"{self.path}/{name}", f"part-{part:05d}.parquet"
        self.filesystem.create_dir(folder, recursive=True)
        # Readers of the folder pass over it. The name is nobody else's: a worker that was given up may still
        # be writing the same part.
        unfinished = f"{folder}/.{file}.{secrets.token_hex(4)}.tmp"
        pq.write_table(table, unfinished, filesystem=self.filesystem)
        self.filesystem.move(unfinished, f"{folder}/{file}")

    def remove(self, name: str) -> None:
        """Remove a file or folder of the run, if it is there: what was needed only while the run was made."""
        found = self.filesystem.get_file_info(f"{self.path}/{name}")
        if found.is_file:
            self.filesystem.delete_file(found.path)
        elif found.type != pyarrow.fs.FileType.NotFound:
            self.filesystem.delete_dir(found.path)

    def commit(self, config: Config, figures: dict[str, Any]) -> Run:
        """Write the manifest, the run's last file: from now on readers see the run.

        Args:
            config: stored resolved, for whoever asks later how the run was made.
            figures: the stage's numbers, JSON types.
        """
        files, schemas = self._files()
        manifest = {
            "stage": self.stage,
            "run_id": self.run_id,
            "inputs": {name: run.run_id for name, run in self.inputs.items()},
            "key": self.key,
            "config": config.model_dump(mode="json"),
            "code": code_version(),
            "started": self.started.isoformat(timespec="milliseconds"),
            "ended": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
            "figures": figures,
            "schema": schemas,
            "files": files,
        }
        self.write_json(MANIFEST, manifest)
        return Run(self.filesystem, self.path, self.uri, json.loads(json.dumps(manifest)))

    def _files(self) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]]]:
        files, schemas = [], {}
        found = self.filesystem.get_file_info(pyarrow.fs.FileSelector(self.path, recursive=True))
        for info in sorted(found, key=lambda info: info.path):
            if not info.is_file:
                continue
            name = info.path[len(self.path) + 1 :]
            if name.split("/")[0] in (TRAINING, LOCK):
                continue
            entry: dict[str, Any] = {"path": name, "bytes": info.size}
            if name.endswith(".parquet"):
                with self.filesystem.open_input_file(info.path) as file:
                    parquet = pq.ParquetFile(file)
                    entry["rows"] = parquet.metadata.num_rows
                    schemas[name.split("/")[0] if "vocab/" not in name else "/".join(name.split("/")[:2])] = {
                        column.name: str(column.type) for column in parquet.schema_arrow
                    }
            if name.startswith(("model/", "checkpoint/")):
                entry["sha256"] = _sha256(self.filesystem, info.path)
            files.append(entry)
        return files, schemas


def here(run: Run | OpenRun) -> Path:
    """A run's folder; where its root is not local, one on this machine's disk that belongs to the run."""
    if isinstance(run.filesystem, pyarrow.fs.LocalFileSystem):
        return Path(run.path)
    return Path(tempfile.gettempdir()) / f"recsys_dist-{run.run_id}"


def tidy(run: Run) -> None:
    """Remove what was needed only until this run was committed, also where a kill left it behind."""
    folder = here(run)
    shutil.rmtree(folder / TRAINING, ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / LOCK).unlink()
        if str(folder) != run.path:
            folder.rmdir()


class Workspace:
    """The root folder with the runs of all stages.

    Args:
        config: names the root.
        setting: by this key; `tune.root` is the experiments'.
    """

    def __init__(
        self, config: Config, setting: Literal["storage.root", "tune.root"] = "storage.root"
    ) -> None:
        self.setting, root = setting, config.storage.root
        if setting == "tune.root":
            root = config.tune.root or f"{root.rstrip('/')}-experiments"
        if absolute(root) != root and not root.startswith("~") and _uploaded_by_ray(PACKAGE):
            raise ConfigError(
                f"{setting} is the relative path {root!r}, and this code runs from a folder that Ray "
                f"uploaded ({PACKAGE.parent}): whatever is written there is lost with the job. Give an "
                f"absolute path or a URI that all nodes share: --set {setting}=/shared/recsys"
            )
        self.uri = absolute(root).rstrip("/")
        self.pins: dict[str, str] = dict(config.storage.pin.items())
        self.pairs = bool(config.deepfm.pair)
        self.factors = any(pair.measure == "als" for pair in config.deepfm.pair)
        try:
            self.filesystem, self.path = pyarrow.fs.FileSystem.from_uri(self.uri)
        except (OSError, pa.ArrowInvalid) as error:
            raise ConfigError(f"{setting}={root!r} cannot be opened: {error}") from None
        if isinstance(self.filesystem, pyarrow.fs.LocalFileSystem):
            self.uri = self.path = self.path.rstrip("/")  # Spark and pyarrow decode file:// differently
            if self.filesystem.get_file_info(self.path).is_file:
                raise ConfigError(f"{setting}={root!r} is a file, expected a folder")

    def runs(self, stage: str) -> list[Run]:
        """The committed runs of a stage, oldest first."""
        runs = []
        for folder, is_committed in self._folders(stage).items():
            if is_committed:
                with self.filesystem.open_input_stream(f"{folder}/{MANIFEST}") as stream:
                    manifest = json.loads(stream.read())
                uri = f"{self.uri}/{stage}/{manifest['run_id']}"
                runs.append(Run(self.filesystem, folder, uri, manifest))
        return runs

    def _folders(self, stage: str) -> dict[str, bool]:
        """The folders of a stage's runs, oldest first: is each committed?"""
        selector = pyarrow.fs.FileSelector(f"{self.path}/{stage}", allow_not_found=True)
        folders = sorted(info.path for info in self.filesystem.get_file_info(selector) if not info.is_file)
        manifests = self.filesystem.get_file_info([f"{folder}/{MANIFEST}" for folder in folders])
        return {folder: info.is_file for folder, info in zip(folders, manifests, strict=True)}

    def inputs(self, stage: str) -> dict[str, Run]:
        """The runs that a new run of `stage` reads: pinned or latest, all made from the same runs upstream.

        Raises:
            DataError: there is none; names the pin, or the job to run first.
        """
        chosen: dict[str, Run] = {}
        wanting = (STAGES | EXPERIMENTS)[stage]
        reads = (*wanting.reads, *(wanting.pairs_read if self.pairs else ()))
        reads += wanting.factors_read if self.factors else ()
        for name in reads:
            self.pinned(name)
        for name in reversed(reads):
            known = {up: run_id for run in chosen.values() for up, run_id in run.inputs.items()}
            known |= {other: run.run_id for other, run in chosen.items()}
            known |= {pin: known.get(pin, run_id) for pin, run_id in self.pins.items()}
            wanted = self.pins.get(name, known.get(name))
            runs = self.runs(name)
            fitting = [
                run
                for run in runs
                if known.get(name, run.run_id) == run.run_id == (wanted or run.run_id)
                and all(known.get(up, run_id) == run_id for up, run_id in run.inputs.items())
            ]
            if not fitting:
                which = f" {wanted}" if wanted else ""
                others = [f"{up} {run_id}" for up, run_id in known.items() if up in STAGES[name].reads]
                made = f" made from {' and '.join(others)}" if runs and others else ""
                raise DataError(
                    f"{stage} needs a finished {name} run{which}{made} under {self.uri}/{name}, and there is "
                    f"none. Run jobs/{STAGES[name].job} first, with the same --conf."
                )
            chosen[name] = fitting[-1]
        return {name: chosen[name] for name in reads}

    def pinned(self, stage: str) -> str | None:
        """The run id that the configuration pins a stage to.

        Raises:
            DataError: there is no such run.
        """
        pin = self.pins.get(stage)
        ids = [run.run_id for run in self.runs(stage)] if pin else []
        if pin and pin not in ids:
            there = f"the latest is {ids[-1]}" if ids else "there is none at all"
            raise DataError(
                f"storage.pin.{stage}={pin} names no finished run under {self.uri}/{stage}: {there}. Give "
                f"the id of a run, which is its folder's name, or leave the pin out."
            )
        return pin

    def key(self, stage: str, config: Config, inputs: dict[str, Run]) -> dict[str, Any]:
        """All that a run's content depends on. Two runs with equal keys are interchangeable."""
        made = (STAGES | EXPERIMENTS)[stage]
        settings = {path: config.section(path) for path in made.sections}
        for path in made.runtime_only:
            section, _, name = path.rpartition(".")
            del settings[section][name]
        return {
            "inputs": {name: run.run_id for name, run in inputs.items()} if inputs else _raw_files(config),
            "config": settings,
            "code": code_version(),
        }

    def find(self, stage: str, key: dict[str, Any]) -> Run | None:
        """The newest committed run with this key."""
        key = json.loads(json.dumps(key))
        return next((run for run in reversed(self.runs(stage)) if run.manifest["key"] == key), None)

    def unfinished(self, stage: str, inputs: dict[str, Run]) -> Iterator[tuple[OpenRun, str | None]]:
        """The runs that were begun and not committed, of any key, newest first; and of those that are older
        than a committed one, which the next stage would read, its run id. Of experiments none is.

        Args:
            stage: whose runs they are.
            inputs: what a run of the right key would go on with.
        """
        later = None
        for folder, is_committed in reversed(self._folders(stage).items()):
            run_id = folder.rpartition("/")[2]
            if is_committed:
                later = later or (None if stage in EXPERIMENTS else run_id)
            elif key := self._json(f"{folder}/key.json"):
                started = dt.datetime.strptime(run_id.rpartition("-")[0], RUN_ID).replace(tzinfo=dt.UTC)
                yield OpenRun(self, stage, run_id, inputs, key, started), later

    def read_json(self, name: str) -> Any:
        """A JSON file in the root folder; None where there is none."""
        return self._json(f"{self.path}/{name}")

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file into the root folder, whole or not at all."""
        _write(self.filesystem, f"{self.path}/{name}", json.dumps(value))

    def _json(self, path: str) -> Any:
        """What a JSON file says; None where there is none."""
        if not self.filesystem.get_file_info(path).is_file:
            return None
        with self.filesystem.open_input_stream(path) as stream:
            return json.loads(stream.read())

    def new(self, stage: str, key: dict[str, Any], inputs: dict[str, Run]) -> OpenRun:
        """Start a run in a fresh folder.

        Raises:
            RetryableError: the root cannot be written.
        """
        started = dt.datetime.now(dt.UTC)
        run_id = f"{started.strftime(RUN_ID)}-{secrets.token_hex(3)}"
        run = OpenRun(self, stage, run_id, inputs, key, started)
        try:
            self.filesystem.create_dir(run.path, recursive=True)
            _write(self.filesystem, f"{run.path}/key.json", json.dumps(key, indent=1))
        except OSError as error:
            raise RetryableError(
                f"{self.setting}={self.uri} cannot be written: {error}. Free or unlock it, or give another: "
                f"--set {self.setting}=PATH"
            ) from None
        return run


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what two keys of a stage's runs do not have in common, such as `deepfm.epochs`."""

    def leaves(value: Any, name: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {name: value}
        found: dict[str, Any] = {} if value else {name: value}
        for key, inner in value.items():
            found |= leaves(inner, f"{name}.{key}" if name else key)
        return found

    first, second = (leaves(json.loads(json.dumps(key))) for key in (one, other))
    names = [name for name in first | second if first.get(name) != second.get(name)]
    return [name.removeprefix("config.") for name in names]


@functools.cache
def code_version() -> str:
    """The package's version and a hash of its source, so that changed code makes new runs."""
    digest = hashlib.sha256()
    for folder in (PACKAGE, REPOSITORY / "jobs"):
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def raw_files(path: str) -> list[pyarrow.fs.FileInfo]:
    """The files of a raw input in the order of their paths. See `raw_input`."""
    return raw_input(path)[1]


def raw_input(path: str) -> tuple[pyarrow.fs.FileSystem, list[pyarrow.fs.FileInfo]]:
    """Where a raw input lives, and its files in the order of their paths.

    Args:
        path: a file, a folder with all below it, or a glob: `*` and `?` within a name, `[ab]`, `{a,b}`, and
            `**` across folders; of a folder that matches all files are taken. A path that exists as written
            is no glob. Files and folders whose names begin with a dot or an underscore are left out, as
            Spark does, unless the path names them.

    Raises:
        ConfigError: no filesystem is known for the path, or it is no valid glob.
    """
    full = absolute(path)
    glob = re.search(r"[*?\[{]", full)
    folder = full[: glob.start() if glob else len(full)].rpartition("/")[0] or "/"
    try:
        filesystem, inner = pyarrow.fs.FileSystem.from_uri(folder)
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"The input {path} cannot be opened: {error}") from None
    named = inner.rstrip("/") + full[len(folder.rstrip("/")) :]
    info = filesystem.get_file_info(named)
    if info.is_file:
        return filesystem, [info]
    literal = not glob or info.type == pyarrow.fs.FileType.Directory
    top = named.rstrip("/") if literal else inner.rstrip("/")
    found = filesystem.get_file_info(
        pyarrow.fs.FileSelector(top or "/", recursive=True, allow_not_found=True)
    )
    try:
        matches = None if literal else re.compile(f"{_expression(named.rstrip('/'))}(?:/.*)?", re.DOTALL)
    except re.error as error:
        raise ConfigError(f"The input {path} exists neither as written nor is it a glob: {error}") from None
    files = [
        info
        for info in found
        if info.is_file
        and not any(map(_is_hidden, info.path[len(top) :].split("/")))
        and (matches is None or matches.fullmatch(info.path))
    ]
    return filesystem, sorted(files, key=lambda info: info.path)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def _expression(glob: str) -> str:
    """The regular expression that matches what a glob does."""
    simple = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    if glob.count("{") == glob.count("}"):
        simple |= {"{": "(?:", "}": ")"}
    expression, depth = "", 0
    for token in re.findall(r"\*\*/|\*\*|\[!?[^]/]+\]|.", glob, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token, 0)
        if len(token) > 2 and token[0] == "[":
            expression += token.replace("\\", "\\\\").replace("[!", "[^", 1)
        else:
            expression += "|" if token == "," and depth else simple.get(token, re.escape(token))
    return expression


def _raw_files(config: Config) -> dict[str, list[int]]:
    """Path to bytes and time of change of every raw file: what a features run depends on."""
    sources = [source for source in (config.data.events, config.data.items, config.data.users) if source]
    paths = [source.path for source in sources] + ([config.data.forget] if config.data.forget else [])
    return {info.path: [info.size, info.mtime_ns or 0] for path in paths for info in raw_files(path)}


def _sha256(filesystem: pyarrow.fs.FileSystem, path: str) -> str:
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _write(filesystem: pyarrow.fs.FileSystem, path: str, text: str) -> None:
    with filesystem.open_output_stream(f"{path}.tmp") as stream:
        stream.write(text.encode())
    filesystem.move(f"{path}.tmp", path)


def _uploaded_by_ray(path: Path) -> bool:
    return {"runtime_resources", "working_dir_files"} <= set(path.parts)
