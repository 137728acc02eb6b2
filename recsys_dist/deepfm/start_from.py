"""Starting from an earlier run's model: a trained FM, or last night's with vocabularies that have grown.

What means the same in both is taken over; all else stays as the seed says. A table's rows bring what their
optimizer has added up, or its first steps would throw them far from where they are; the dense part's
optimizer starts anew.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow.fs
import safetensors
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from recsys_dist import config
from recsys_dist.deepfm.batches import INDEXED
from recsys_dist.deepfm.checkpoint import read_into
from recsys_dist.deepfm.model import PAIR_HEAD, TABLES
from recsys_dist.deepfm.pairs import pair_specs
from recsys_dist.deepfm.published import WEIGHTS, Weights, description
from recsys_dist.deepfm.sharding import held_parts
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.schema import FeatureSpec, FieldSpec
from recsys_dist.workspace import Run, Workspace

CHECKPOINT = "checkpoint"


def earlier_run(workspace: Workspace, settings: config.DeepFM, spec: FeatureSpec) -> Run | None:
    """The run that `start_from` names; None where it is not set, or `latest` and there is none yet.

    Raises:
        ConfigError: there is no such run, its embeddings have another width, its indices may mean something
            else in `spec`, or it has not learned what these pair fields are worth.
        DataError: its description is missing or damaged.
    """
    if settings.start_from is None:
        return None
    runs = workspace.runs("deepfm")
    if settings.start_from == "latest":
        runs = runs[-1:]
    else:
        known = [run.run_id for run in runs]
        runs = [run for run in runs if run.run_id == settings.start_from]
        if not runs:
            raise ConfigError(
                f"deepfm.start_from={settings.start_from}: no finished deepfm run under "
                f"{workspace.uri}/deepfm has this id. There are: {', '.join(known) or 'none'}"
            )
    if not runs:
        return None
    made = description(runs[0])
    width, own = (0 if s.model == "lr" else s.embedding_dim for s in (made.settings, settings))
    if width != own:
        raise ConfigError(
            f"deepfm.start_from={settings.start_from}: the {made.settings.model} of {runs[0].uri} has "
            f"embeddings of {width} factors, and this {settings.model} has {own}. Set "
            f"deepfm.embedding_dim={width}, or leave start_from out."
        )
    before, kind = made.settings.table_optimizer, settings.table_optimizer
    if kind not in (before, "sgd"):
        raise ConfigError(
            f"deepfm.start_from={settings.start_from}: the tables of {runs[0].uri} were moved by {before}, "
            f"and {kind} cannot go on with what that has added up. Set deepfm.table_optimizer={before}, or "
            f"leave start_from out."
        )
    made.require_continued(spec)
    theirs = tuple(field for field in made.fields if field.side == "pair")
    if settings.pair and (theirs, made.settings.pair_hidden) != (pair_specs(settings), settings.pair_hidden):
        raise ConfigError(
            f"deepfm.start_from={settings.start_from}: the model of {runs[0].uri} has not learned what the "
            f"fields of deepfm.pair are worth, but {', '.join(f.name for f in theirs) or 'no pair fields'}. "
            f"Beside embeddings that know the late events it cannot be learned: leave start_from out once."
        )
    return runs[0]


def require_unseen(before: Run, features: Run) -> None:
    """Raise a ConfigError where the model of a run has learned events that are to measure another one.

    Args:
        before: of `earlier_run`.
        features: of the model that is to start from it.
    """
    made = before.manifest["config"]
    if made["deepfm"]["fit_on"] != "train":
        raise ConfigError(
            f"deepfm.start_from: {before.uri} was fitted on train and valid, and what it has learned of "
            f"valid would make the figures look better than they are, by which training stops. Start from a "
            f"model of deepfm.fit_on=train, or leave start_from out."
        )
    split, own = made["split"], features.manifest["config"]["split"]
    earlier_dates = [dates or ["", ""] for dates in (split["dates"], own["dates"])]
    if split | {"dates": None} != own | {"dates": None} or earlier_dates[0] > earlier_dates[1]:
        raise ConfigError(
            f"deepfm.start_from: {before.uri} was fitted where the log was split by {_told(split)}, and now "
            f"it is by {_told(own)}: it may have learned what is valid or test now. Leave start_from out "
            f"once."
        )


def _told(split: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={of}" for key, of in split.items() if of is not None)


def earlier_head(run: Run) -> dict[str, torch.Tensor]:
    """What a run's model says that its pair fields are worth, by name in its state_dict."""
    weights = Weights(run)
    return {name: weights.whole(name) for name in weights.tensors if name.startswith(PAIR_HEAD)}


@torch.no_grad()
def take_over(
    state: dict[str, Any], spec: FeatureSpec, run: Run, fused: Mapping[str, Mapping[str, Any]] | None = None
) -> list[str]:
    """Copy into a model's state_dict what `run` has of the same name and meaning; of a table that of its
    field, however that is pooled.

    Args:
        state: of a DeepFM, sharded or not; a sharded table's rows are read for the own shards only.
        spec: the model's fields.
        run: of `earlier_run`.
        fused: the state of the tables' optimizer, which takes over that of the old rows.

    Returns:
        The names of what was taken over, of a table its old rows.
    """
    fields = {field.name: field for field in description(run).fields}
    # Tensors over all fields of a side mean the same only where the fields do.
    own, others = ([field for field in of if field.side != "pair"] for of in (spec.fields, fields.values()))
    same_fields = [field.name for field in own] == [field.name for field in others]
    taken, tables = [], {}
    with _local(run) as folder, safetensors.safe_open(f"{folder}/{WEIGHTS}", "pt") as weights:
        # Which collection has a table depends on how its field is pooled.
        known = {_part(name) if TABLES in name else name: name for name in set(weights.keys())}
        for name in sorted(state):
            found = known.get(_part(name) if TABLES in name else name)
            if found is None:
                continue
            mine, theirs = state[name], weights.get_slice(found)
            shape = tuple(theirs.get_shape())
            if TABLES in name:
                field = _part(name).removeprefix("table_")
                if not _means_the_same(spec.field(field), fields[field]):
                    continue
                _copy_rows(theirs, shape[0], mine)
                tables[name] = found
            elif name.endswith("_values"):
                side = ("user", "context") if name.startswith("user") else ("item",)
                before, after = ([field for field in of if field.side in side] for of in (others, own))
                if not _copy_numbers(theirs[...], before, mine, after):
                    continue
            elif same_fields and tuple(mine.shape) == shape:
                mine.copy_(theirs[...] if shape else weights.get_tensor(found))
            else:
                continue
            taken.append(name)
        _one_constant(state, taken, known, weights)
        wanted = {tables[name]: fused[name] for name in tables if fused and fused.get(name)}
        for name, tensors in _optimizer_state(f"{folder}/{CHECKPOINT}", wanted).items():
            for key, found_state in tensors.items():
                _copy_rows(found_state, len(found_state), wanted[name][key])
    return taken


def _one_constant(
    state: dict[str, Any], taken: Sequence[str], known: Mapping[str, str], weights: Any
) -> None:
    """A model with a first order has its constant in `bias`, one without in its last layer's: what has been
    taken over of one kind into the other must not count twice, or not at all.
    """
    layers = [name for name in taken if name.startswith("layers.") and name.endswith(".bias")]
    if not layers or ("bias" in known) == ("bias" in state):
        return
    if "bias" in state:
        state["bias"].zero_()
    else:
        last = max(layers, key=lambda name: int(name.split(".")[1]))
        state[last].add_(weights.get_tensor("bias"))


def summary(taken: Sequence[str], state: Mapping[str, Any], run: Run) -> str:
    """Which tensors of a model begin with another's values, and which as the seed says, in a line; new rows
    of a table, and new fields' numbers, always do.

    Args:
        taken: of `take_over`.
        state: likewise.
        run: likewise.
    """
    anew = dict.fromkeys(_part(name) for name in state if name not in taken)
    rest = f"; as the seed says begin {', '.join(anew)}" if anew else ""
    return f"takes over {len(taken)} of {len(state)} tensors of {run.uri}{rest}"


def _part(name: str) -> str:
    """The table, or the part of the model, that a tensor of a state_dict is of."""
    return name.split(".")[-2 if TABLES in name else 0]


def _copy_numbers(
    theirs: torch.Tensor, before: Sequence[FieldSpec], mine: torch.Tensor, after: Sequence[FieldSpec]
) -> bool:
    """Copy what value and vector fields of a side have in common; is there any?"""
    places, start = {}, 0
    for field in before:
        if field.type not in INDEXED:
            places[field.name] = field, start
            start += field.cardinality
    start, some = 0, False
    for field in after:
        if field.type in INDEXED:
            continue
        if field.name in places and _means_the_same(field, places[field.name][0]):
            known, place = places[field.name]
            mine[start : start + known.cardinality].copy_(theirs[place : place + known.cardinality])
            some = True
        start += field.cardinality
    return some


def _copy_rows(theirs: Any, rows: int, mine: Any) -> None:
    """Copy the first `rows` rows, of them what is held here."""
    for (own, *others), part in held_parts(mine):
        stop = min(own.stop, rows)
        if own.start < stop:
            part[: stop - own.start].copy_(theirs[(slice(own.start, stop), *others)])


def _optimizer_state(
    checkpoint: str, wanted: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, torch.Tensor]]:
    """Of a run's checkpoint the named tensors of the tables' optimizer, whole."""
    if not wanted:
        return {}
    known = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensors in wanted.items():
        for key in tensors:
            found = known.get(f"fused.state.{name}.{key}")
            if not isinstance(found, TensorStorageMetadata):
                raise DataError(
                    f"{checkpoint} has nothing of what the tables' optimizer has added up ({name}). Restore "
                    f"it, or leave deepfm.start_from out."
                )
            state.setdefault(name, {})[key] = torch.empty(found.size)
    read_into({"fused": {"state": state}}, checkpoint)
    return state


def _means_the_same(own: FieldSpec, theirs: FieldSpec) -> bool:
    """Is an index, or a number, of `theirs` the same thing in `own`? A vocabulary may have grown, and what is
    fitted each night may be another; nothing else may.
    """
    kinds = [
        (f.kind, f.type, f.vocab, f.hashed, f.part, f.wave, f.log, f.indicator_of) for f in (own, theirs)
    ]
    made = [(f.of, *(() if f.kind == "history" else (f.when, f.days))) for f in (own, theirs)]
    grown = own.vocab is not None and own.cardinality > theirs.cardinality
    return kinds[0] == kinds[1] and made[0] == made[1] and (grown or own.cardinality == theirs.cardinality)


@contextmanager
def _local(run: Run) -> Iterator[str]:
    """The run's folder on this machine, of whose files parts can be read."""
    if isinstance(run.filesystem, pyarrow.fs.LocalFileSystem):
        yield run.path
        return
    with tempfile.TemporaryDirectory(prefix="start-from-") as folder:
        for name in (WEIGHTS.split("/")[0], CHECKPOINT):
            pyarrow.fs.copy_files(f"{run.path}/{name}", f"{folder}/{name}", source_filesystem=run.filesystem)
        yield folder
