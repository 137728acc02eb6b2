"""Two click logs as features runs, and a features run as FuxiCTR reads it.

MovieLens 1M: a rating of 4 or 5 is a click, one of 1 or 2 is none, 3s are left out; split at random 8:1:1.
Generated: 26 fields of equally many values, drawn by Zipf's law; a click depends on nothing.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from recsys_dist import datasets
from recsys_dist.config import REPOSITORY, load
from recsys_dist.schema import FeatureSpec, FieldSpec
from recsys_dist.workspace import Run, Workspace

FIELDS, EXAMPLES = 26, 1 << 18
TABS = pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False)


def movielens(folder: Path) -> Path:
    """Write the log with its labels and parts, and the users with the first three digits of their zip codes.

    Returns:
        the conf file that reads them, with storage below `folder`.
    """
    datasets.fetch("movielens_1m", REPOSITORY / "data")
    source = REPOSITORY / "data" / "movielens_1m"
    as_text = pyarrow.csv.ConvertOptions(column_types={"zip_code:token": pa.string()})
    events = pyarrow.csv.read_csv(source / "ml-1m.inter", parse_options=TABS)
    events = events.filter(pc.field("rating:float") != 3)
    parts = np.array(["train", "valid", "test"])
    drawn = np.random.default_rng(1).choice(parts, len(events), p=[0.8, 0.1, 0.1])
    label = pc.greater(events["rating:float"], 3).cast(pa.int8())
    events = events.drop_columns("rating:float").append_column("label", label)
    events = events.append_column("split", pa.array(drawn))
    pq.write_table(events, folder / "events.parquet")
    users = pyarrow.csv.read_csv(source / "ml-1m.user", parse_options=TABS, convert_options=as_text)
    prefix = pc.utf8_slice_codeunits(users["zip_code:token"], 0, 3)
    pq.write_table(users.append_column("zip", prefix), folder / "users.parquet")
    conf = {
        "storage": {"root": str(folder / "runs")},
        "data": {
            "events": _source(folder / "events.parquet", "user item timestamp label split"),
            "items": _source(source / "ml-1m.item", "item"),
            "users": _source(folder / "users.parquet", "user"),
        },
        "label": {"kind": "column"},
        "split": {"kind": "column"},
        "fields": [
            *(
                {"name": name, "kind": "categorical", "side": "user", "column": name}
                for name in ("gender", "age", "occupation", "zip")
            ),
            {"name": "genres", "kind": "categorical", "side": "item", "column": "genre", "delimiter": " "},
        ],
        "spark": {"submit": ["--master", "local[*]", "--driver-memory", "4g"]},
    }
    (folder / "conf.yaml").write_text(json.dumps(conf))
    return folder / "conf.yaml"


def _source(path: Path, roles: str) -> dict[str, object]:
    columns = {role: f"{role}_id" if role in ("user", "item") else role for role in roles.split()}
    return {"path": str(path), "format": "tsv" if path.suffix == ".item" else "parquet", "columns": columns}


def generated(folder: Path, rows: int, examples: int = EXAMPLES, valid: int = 0) -> Run:
    """A features run of so many examples, whose fields have `rows` embeddings in total; the first `valid` of
    the examples are also the valid part.
    """
    config = load(None, [f"storage.root={folder}"])
    each = rows // FIELDS
    generator = np.random.default_rng(3)
    # floor(n^u) is k with probability log(1 + 1/k) / log(n), about 1/k.
    values = np.floor(each ** generator.random((FIELDS, examples), np.float32)).astype(np.int32)
    others = [f"c{number}" for number in range(FIELDS - 2)]
    fields = (
        *(
            FieldSpec(name=name, kind="id", side=name, type="index", cardinality=each, vocab=name)
            for name in ("user", "item")
        ),
        *(
            FieldSpec(name=name, kind="categorical", side="context", type="index", cardinality=each)
            for name in others
        ),
    )
    spec = FeatureSpec(
        fields=fields,
        n_users=each - 1,
        n_items=each - 1,
        rows={"train": examples, "valid": valid, "test": 0},
        positives={"train": 0, "valid": 0, "test": 0},
        date="2024-01-02",
        hour=0,
    )
    run = Workspace(config).new("features", {"generated": rows}, {})
    columns = dict(zip(["user", "item", *others], values, strict=True))
    columns |= {"timestamp": np.zeros(examples, np.int64), "value": np.ones(examples, np.float32)}
    columns |= {"label": generator.integers(0, 2, examples).astype(np.float32)}
    schema = spec.examples_schema()
    table = pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
    run.write_table("examples/split=train", table)
    if valid:
        run.write_table("examples/split=valid", table.slice(0, valid))
    number = np.arange(1, each)
    text, never = pa.array(number).cast(pa.string()), pa.nulls(each - 1, pa.timestamp("us", tz="UTC"))
    items = [number, text, text, np.ones(each - 1), np.ones(each - 1, bool), never, never]
    schema = spec.items_schema()
    found = [
        pa.array(column, field.type) if isinstance(column, np.ndarray) else column
        for column, field in zip(items, schema, strict=True)
    ]
    run.write_table("items", pa.table(found, schema=schema))
    run.write_json("features.json", spec.model_dump(mode="json"))
    return run.commit(config, {})


def for_fuxictr(run: Run, folder: Path) -> None:
    """Write a features run's examples, joined with its items, as FuxiCTR's preprocessing would leave them.

    `feature_map.json`, and each part as an npz and as a Parquet file: the loaders for either differ.
    """
    spec = run.spec()
    items = run.table("items").sort_by("item")
    folder.mkdir()
    examples = run.table("examples")
    features: dict[str, dict[str, object]] = {}
    for split in [name for name, rows in spec.rows.items() if rows]:
        part = examples.filter(pc.field("split") == split)
        columns: dict[str, np.ndarray] = {}
        for field in spec.fields:
            column = part[field.name] if field.name in part.column_names else None
            if column is None:
                column = items[field.name].take(pc.subtract(part["item"], 1))
            about: dict[str, object] = {"source": "", "vocab_size": field.cardinality, "padding_idx": 0}
            if field.type == "index":
                columns[field.name] = pc.fill_null(column, 0).to_numpy().astype(np.int64)
                about["type"] = "categorical"
            else:
                lengths = pc.fill_null(pc.list_value_length(items[field.name]), 0)
                width = pc.max(lengths).as_py()
                padded = np.zeros((len(part), width), np.int64)
                counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
                padded[np.arange(width) < counts[:, None]] = pc.list_flatten(column).to_numpy()
                columns[field.name] = padded
                about |= {"type": "sequence", "max_len": width}
                about |= {"feature_encoder": "layers.MaskedAveragePooling()"}
            features[field.name] = about
        columns["label"] = part["label"].to_numpy().astype(np.float32)
        np.savez(folder / f"{split}.npz", **columns)
        arrow = {
            name: pa.array(column) if column.ndim == 1 else pa.array(list(column))
            for name, column in columns.items()
        }
        pq.write_table(pa.table(arrow), folder / f"{split}.parquet")
    told = {
        "dataset_id": folder.name,
        "num_fields": len(features),
        "total_features": sum(field.cardinality for field in spec.fields),
        "input_length": 0,
        "labels": ["label"],
        "features": [{name: about} for name, about in features.items()],
    }
    (folder / "feature_map.json").write_text(json.dumps(told))
