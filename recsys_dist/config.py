"""What was asked: frozen, typed settings, read from conf/default.yaml, a conf file and --set overrides."""

import datetime as dt
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow.fs
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from recsys_dist.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = (PACKAGE.parent / "pyproject.toml").is_file()
# conf/ and jobs/ stand beside the package in a checkout, inside it in an installed wheel.
REPOSITORY = PACKAGE.parent if CHECKOUT else PACKAGE
DEFAULT_CONF = REPOSITORY / "conf" / "default.yaml"


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # an id or a column name of digits needs no quotes in YAML
    )


class Storage(Section):
    """Where runs and the published table live."""

    root: str = "runs"
    """URI or path of the root. A relative path is relative to the repository."""

    pin: dict[Literal["features", "als", "deepfm", "evaluation", "score"], str] = {}
    """Stage to run id: use this run in place of the latest one."""


class Source(Section):
    """One raw input: files of one format, and which of their columns mean what."""

    path: str
    """File, folder or glob. A relative path is relative to the repository."""

    format: Literal["csv", "tsv", "jsonl", "parquet"] = "csv"
    """csv and tsv have a header line; jsonl has one JSON object a line."""

    columns: dict[str, str]
    """Role to column name: `user`, `item`, `timestamp`, `value` for events, `item` and `title` for
    items, `user` for users. Fields name further columns themselves."""

    delimiter: str | None = Field(None, min_length=1)
    """csv and tsv only; default: comma and tab."""

    quote: str | None = Field(None, max_length=1)
    """csv and tsv only: the quote character; default: the double quote for csv, none for tsv."""

    timestamp_format: str = "seconds"
    """`seconds` or `milliseconds` since 1970, `iso` (2024-05-01T12:30:00Z; without a zone: UTC), or a
    Spark datetime pattern such as `dd/MM/yyyy HH:mm:ss` (UTC)."""


ROLES = {
    "events": ({"user", "item", "timestamp"}, {"value"}),
    "items": ({"item"}, {"title"}),
    "users": ({"user"}, set[str]()),
}


class Data(Section):
    """The raw logs."""

    events: Source | None = None
    """The interaction log, a row an event."""

    items: Source | None = None
    """Optional: a row an item."""

    users: Source | None = None
    """Optional: a row a user."""

    sample_users: float = Field(1.0, gt=0, le=1)
    """Share of the users to keep, chosen by a hash of the raw id: 0.1 tries everything on a tenth."""

    max_bad_rows: float = Field(0.01, ge=0, le=1)
    """featurize fails when more than this share of a source's rows is set aside."""

    @model_validator(mode="after")
    def _roles(self) -> "Data":
        wrong = []
        for name, (needed, optional) in ROLES.items():
            source = getattr(self, name)
            if source is None:
                continue
            wrong += [f"{name}.columns has no {role!r}" for role in sorted(needed - set(source.columns))]
            for role in sorted(set(source.columns) - needed - optional):
                wrong.append(f"{name}.columns.{role}: unknown role{nearest(role, needed | optional)}")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


class Label(Section):
    """Which events count as positive."""

    kind: Literal["implicit"] = "implicit"
    """`implicit`: positives from the log, negatives sampled by the trainer."""

    positive_when: str | None = None
    """Spark SQL condition on `value`, `user`, `item` and `timestamp`; default: every event is positive."""


class Split(Section):
    """How the log is cut into train, valid and test."""

    kind: Literal["per_user_time"] = "per_user_time"
    """`per_user_time`: event p of a user's n (from 0, in time order, ties by item id) goes by (p + 0.5)/n."""

    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of train, valid and test."""

    @model_validator(mode="after")
    def _fractions(self) -> "Split":
        if min(self.fractions) <= 0 or abs(sum(self.fractions) - 1) > 1e-9:
            raise ValueError(f"fractions must be positive and add up to 1, found {list(self.fractions)}")
        return self


Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Categorical(Section):
    """A column of ids or words, one or several a row."""

    kind: Literal["categorical"]
    name: Name
    side: Literal["user", "item", "context"]
    """The source it comes from: users, items, or the event itself."""
    column: str
    """Column of the source."""
    delimiter: str | None = None
    """Splits the column into several values."""
    pooling: Literal["mean", "sum"] = "mean"
    """How the embeddings of several values become one."""


class Time(Section):
    """A part of the event's time, in UTC."""

    kind: Literal["time"]
    name: Name
    side: Literal["context"] = "context"
    part: Literal["hour", "weekday"]
    """hour: 0 to 23; weekday: 0 (Monday) to 6."""


class History(Section):
    """The user's last items strictly before the event."""

    kind: Literal["history"]
    name: Name
    side: Literal["user"] = "user"
    of: Literal["item"] = "item"
    """What is remembered of an event."""
    when: Literal["positive", "any"] = "positive"
    """Which events enter."""
    last: int = Field(20, ge=1, le=1000)
    """Number of events."""
    pooling: Literal["mean", "sum"] = "mean"
    """How the embeddings of several values become one."""


class Count(Section):
    """The number of the user's events strictly before the event: log(1 + n), standardised on train."""

    kind: Literal["count"]
    name: Name
    side: Literal["user"] = "user"
    when: Literal["positive", "any"] = "any"
    """Which events are counted."""


AnyField = Annotated[Categorical | Time | History | Count, Field(discriminator="kind")]


class Als(Section):
    """Spark MLlib's ALS. Its names are MLlib's (spelled with underscores)."""

    implicit: bool = True
    """Implicit feedback (Hu, Koren, Volinsky 2008) on positives, or explicit values of all events."""
    rank: int = Field(64, ge=1)
    """Number of factors."""
    reg: float = Field(0.1, ge=0)
    """Regularisation; MLlib multiplies it by the number of the row's events (ALS-WR)."""
    alpha: float = Field(1.0, gt=0)
    """Confidence of an implicit event: 1 + alpha."""
    iterations: int = Field(15, ge=1)
    """Alternating sweeps."""


class DeepFM(Section):
    """The ranking model and its training."""

    embedding_dim: int = Field(16, ge=4, multiple_of=4)
    """Factors of a field; a multiple of 4, which the fused kernels need."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = Field((256, 128), min_length=1)
    """Widths of the MLP's layers."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """After every hidden layer."""
    batch_size: int = Field(4096, ge=1)
    """Positive examples a step, over all workers together."""
    negatives: int = Field(16, ge=1)
    """Items drawn for each positive."""
    negatives_power: float = Field(0.0, ge=0, le=1)
    """Items are drawn with probability proportional to (1 + train positives)^power; 0 is uniform."""
    objective: Literal["logistic", "softmax"] = "softmax"
    """`logistic`: each positive and each drawn item on its own; `softmax`: the positive against the drawn
    items, corrected for how often each is drawn (logQ)."""
    epochs: int = Field(20, ge=1)
    """At most so many passes over the positives."""
    patience: int = Field(3, ge=1)
    """Stop after so many evaluations without a better validation NDCG@10."""
    valid_users: int = Field(2000, ge=1)
    """Size of the fixed sample of users that validation ranks all items for."""
    learning_rate: float = Field(1e-3, gt=0)
    """Adam's, for the dense part."""
    embedding_learning_rate: float = Field(0.05, gt=0)
    """Row-wise Adagrad's, for the tables."""
    init_scale: float = Field(0.01, gt=0)
    """Standard deviation of the initial embeddings."""
    weight_decay: float = Field(0.0, ge=0)
    """L2 of the dense part (AdamW)."""
    row_wise_from: int = Field(1000, ge=2)
    """Tables of at least so many rows are split over the workers by rows; smaller ones live whole on one."""
    num_workers: int = Field(2, ge=1)
    """Ray Train workers: processes on CPU, one a GPU where there are GPUs."""
    checkpoint_every_steps: int = Field(200, ge=1)
    """A failed worker costs at most so many steps."""
    max_failures: int = Field(3, ge=0)
    """How often the training is restarted from its last checkpoint."""


class Score(Section):
    """The published lists."""

    k: int = Field(10, ge=1)
    """Length of a list."""
    date: dt.date | None = None
    """The day the lists are for: all events before it are known. Default: the day after the last event."""
    filter_seen: Literal["all", "positives", "none"] = "all"
    """Which of the user's items are left out."""
    candidates: Annotated[
        dict[Literal["als", "fm", "popularity"], Annotated[int, Field(ge=1)]], Field(min_length=1)
    ] = {"als": 200, "fm": 200, "popularity": 50}
    """Recall source to the number of items it proposes a user. A conf file's own mapping replaces this."""
    partition_users: int = Field(2000, ge=1)
    """Users a task scores at a time."""


class Evaluation(Section):
    """How models are compared."""

    k: tuple[Annotated[int, Field(ge=1)], ...] = (10, 20)
    """List lengths."""
    bootstrap: int = Field(1000, ge=100)
    """Resamplings of the users for the 95% intervals."""
    metric: str = "ndcg@10"
    """The metric that decides whether a model may be published."""
    must_beat: Literal["popularity", "als"] | None = "popularity"
    """The two-stage lists are published only when they are better than this model on that metric; null:
    always."""

    @model_validator(mode="after")
    def _metric(self) -> "Evaluation":
        name, _, k = self.metric.rpartition("@")
        if not name or k not in {str(length) for length in self.k}:
            lengths = ", ".join(f"{name or 'ndcg'}@{length}" for length in self.k)
            raise ValueError(f"metric {self.metric!r} is not computed: k={list(self.k)} allows {lengths}")
        return self


class Spark(Section):
    """How nightly starts the Spark stages."""

    submit: tuple[str, ...] = ("--master", "local[*]", "--driver-memory", "2g")
    """Arguments of spark-submit."""
    conf: dict[str, str] = {}
    """Spark properties, set by the jobs themselves."""


class Config(Section):
    """All settings of all stages."""

    seed: int = Field(42, ge=0)
    """Seed of everything that draws numbers."""
    storage: Storage = Storage()
    data: Data = Data()
    label: Label = Label()
    split: Split = Split()
    fields: tuple[AnyField, ...] = ()
    """The model's fields besides the ids of user and item, which are always there."""
    als: Als = Als()
    deepfm: DeepFM = DeepFM()
    score: Score = Score()
    evaluation: Evaluation = Evaluation()
    spark: Spark = Spark()

    @model_validator(mode="after")
    def _names(self) -> "Config":
        taken = ["user", "item", "timestamp", "value", "label", "user_id", "item_id", "title", "count"]
        taken += ["seen", "liked", "split", "as_of"]
        names = [*taken, *(field.name for field in self.fields)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"fields: names used twice or reserved: {', '.join(twice)}")
        return self

    def section(self, path: str) -> Any:
        """The resolved value at a dotted path, as JSON types."""
        value: Any = self.model_dump(mode="json")
        for key in path.split("."):
            value = value[key]
        return value


def load(conf: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read the configuration: default.yaml, then `conf`, then `overrides`, later ones winning.

    Mappings are merged, lists and `score.candidates` replaced.

    Args:
        conf: path or URI of a YAML file; a relative path is looked up from the working directory, then
            from the repository. None: the defaults alone.
        overrides: `section.key=value`, the value in YAML.

    Raises:
        ConfigError: names every wrong key or value at once, with the nearest valid key.
    """
    settings = _read(DEFAULT_CONF)
    where = str(DEFAULT_CONF)
    if conf is not None and Path(str(conf)).resolve() != DEFAULT_CONF:
        where = str(conf)
        settings = _merge(settings, _read(conf))
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {override}: expected section.key=value, for example deepfm.epochs=5")
        try:
            # A lone | is YAML for an empty block of text, and here a separator.
            value = text if text in ("|", ">") else yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}: the value is not YAML: {error}") from None
        nested: Any = value
        for key in reversed(path.split(".")):
            nested = {key: nested}
        settings = _merge(settings, nested)
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        lines = [_describe(dict(found)) for found in error.errors()]
        also = f" with {' '.join('--set ' + o for o in overrides)}" if overrides else ""
        raise ConfigError(f"{len(lines)} wrong in {where}{also}:\n  " + "\n  ".join(lines)) from None


def absolute(path: str) -> str:
    """A URI as it is; a path made absolute: from the repository, or the working directory for a wheel."""
    if "://" in path or path.startswith("file:"):
        return path
    return str(((REPOSITORY if CHECKOUT else Path.cwd()) / Path(path).expanduser()).absolute())


def nearest(word: str, words: typing.Iterable[str]) -> str:
    """`; nearest valid key: ...`, or the list of keys where none is near."""
    words = sorted(words)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; nearest valid key: {close[0]}" if close else f"; valid keys: {', '.join(words)}"


def _read(conf: str | Path) -> dict[str, Any]:
    text = str(conf)
    try:
        if "://" in text:
            system, path = pyarrow.fs.FileSystem.from_uri(text)
            with system.open_input_stream(path) as stream:
                raw = stream.read().decode()
        else:
            candidates = [Path(text), REPOSITORY / text]
            raw = next((path for path in candidates if path.exists()), candidates[0]).read_text()
    except (OSError, UnicodeDecodeError, pyarrow.ArrowInvalid) as error:
        raise ConfigError(f"The conf file {text} cannot be read: {error}. Give an existing --conf.") from None
    try:
        settings = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text} is not YAML: {error}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{text} holds a {type(settings).__name__}, expected sections such as `data:`")
    return settings


def _merge(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        # Merged candidates could not be switched off.
        merged = {k: v if k == "candidates" else _merge(base.get(k), v) for k, v in over.items()}
        return {**base, **merged}
    return over


def _describe(error: dict[str, Any]) -> str:
    location = [part for part in error["loc"] if part not in ("[key]",)]
    path = ".".join(str(part) for part in location) or "conf"
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key{nearest(str(location[-1]), _keys(location[:-1]))}"
    found = "" if error["type"] in ("missing", "value_error") else f", found {error['input']!r}"
    return f"{path}: {error['msg'].removeprefix('Value error, ')}{found}"


def _keys(location: Sequence[Any]) -> set[str]:
    """The valid keys of the model at a place in the configuration."""
    models: list[Any] = [Config]
    for part in location:
        if isinstance(part, int) or any(part == _tag(model) for model in models):
            models = [model for model in models if isinstance(part, int) or part == _tag(model)]
            continue
        models = [
            inner
            for model in models
            if part in model.model_fields
            for inner in _models(model.model_fields[part].annotation)
        ]
    return {key for model in models for key in model.model_fields}


def _tag(model: type[BaseModel]) -> Any:
    kind = model.model_fields.get("kind")
    options = typing.get_args(kind.annotation) if kind else ()
    return options[0] if len(options) == 1 else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for inner in typing.get_args(annotation) for model in _models(inner)]
