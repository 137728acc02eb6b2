"""Starting from an earlier run's model: a trained FM, or last night's with vocabularies that have grown.

What means the same in both is taken over; all else stays as the seed says. A table's rows bring what their
optimizer has added up, or its first steps would throw them far from where they are; the dense part's
optimizer starts anew.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyarrow.fs
import safetensors
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from recsys_dist import config
from recsys_dist.deepfm.checkpoint import read_into
from recsys_dist.errors import ConfigError
from recsys_dist.schema import FeatureSpec, FieldSpec, VocabularySpec
from recsys_dist.workspace import Run, Workspace

WEIGHTS, CHECKPOINT = "model/model.safetensors", "checkpoint"


def earlier_run(workspace: Workspace, settings: config.DeepFM, spec: FeatureSpec) -> Run | None:
    """The run that `start_from` names; None where it is not set, or `latest` and there is none yet.

    Raises:
        ConfigError: there is no such run, its embeddings have another width, or its indices may mean
            something else in `spec`.
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
    description = runs[0].json("model/model.json")
    theirs = config.DeepFM.model_validate(description["settings"])
    width, own = (0 if s.model == "lr" else s.embedding_dim for s in (theirs, settings))
    if width != own:
        raise ConfigError(
            f"deepfm.start_from={settings.start_from}: the {theirs.model} of {runs[0].uri} has embeddings of "
            f"{width} factors, and this {settings.model} has {own}. Set deepfm.embedding_dim={width}, or "
            f"leave start_from out."
        )
    trained = {
        name: VocabularySpec.model_validate(found) for name, found in description["vocabularies"].items()
    }
    spec.require_continues(
        spec.model_copy(update={"vocabularies": trained}), "the features run", f"the model of {runs[0].uri}"
    )
    return runs[0]


@torch.no_grad()
def take_over(
    state: dict[str, Any], spec: FeatureSpec, run: Run, fused: Mapping[str, Mapping[str, Any]] | None = None
) -> list[str]:
    """Copy into a model's state_dict what `run` has of the same name and meaning.

    Args:
        state: of a DeepFM, sharded or not; a sharded table's rows are read for the own shards only.
        spec: the model's fields.
        run: of `earlier_run`.
        fused: the state of the tables' optimizer, which takes over that of the old rows.

    Returns:
        The names of what was taken over, of a table its old rows.
    """
    fields = {
        field.name: field
        for field in (FieldSpec.model_validate(found) for found in run.json("model/model.json")["fields"])
    }
    # Tensors over all fields of a side mean the same only where the fields do.
    same = [(f.name, f.type, f.cardinality) for f in spec.fields if f.type not in ("index", "indices")] == [
        (f.name, f.type, f.cardinality) for f in fields.values() if f.type not in ("index", "indices")
    ]
    order = [field.name for field in spec.fields] == list(fields)
    taken = []
    with _local(run) as folder, safetensors.safe_open(f"{folder}/{WEIGHTS}", "pt") as weights:
        for name in sorted(set(state) & set(weights.keys())):
            mine, theirs = state[name], weights.get_slice(name)
            shape = tuple(theirs.get_shape())
            if ".embedding_bags." in name:
                field = name.split(".")[-2].removeprefix("table_")
                if not _means_the_same(spec.field(field), fields[field]):
                    continue
                _copy_rows(theirs, shape[0], mine)
            elif tuple(mine.shape) == shape and (same if name.endswith("_values") else order):
                mine.copy_(theirs[...] if shape else weights.get_tensor(name))
            else:
                continue
            taken.append(name)
        wanted = {name: fused[name] for name in taken if fused and name in fused}
        for name, tensors in _optimizer_state(f"{folder}/{CHECKPOINT}", wanted).items():
            for key, found in tensors.items():
                _copy_rows(found, len(found), wanted[name][key])
    return taken


def _copy_rows(theirs: Any, rows: int, mine: Any) -> None:
    """Copy the first `rows` rows, of them those that are held here."""
    for start, part in _parts(mine):
        stop = min(start + len(part), rows)
        if start < stop:
            part[: stop - start].copy_(theirs[start:stop])


def _optimizer_state(
    checkpoint: str, wanted: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, torch.Tensor]]:
    """Of a run's checkpoint the named tensors of the tables' optimizer: a number a row, so they are small."""
    if not wanted:
        return {}
    known = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensors in wanted.items():
        for key in tensors:
            found = known[f"fused.state.{name}.{key}"]
            assert isinstance(found, TensorStorageMetadata)
            state.setdefault(name, {})[key] = torch.empty(found.size)
    read_into({"fused": {"state": state}}, checkpoint)
    return state


def _means_the_same(own: FieldSpec, theirs: FieldSpec) -> bool:
    """Is an index of `theirs` the same thing in `own`? A vocabulary may have grown; nothing else may."""
    grown = own.vocab is not None and own.cardinality > theirs.cardinality
    return own.vocab == theirs.vocab and (grown or own.cardinality == theirs.cardinality)


def _parts(tensor: Any) -> Iterator[tuple[int, torch.Tensor]]:
    """The rows of a table that are held here: the first one's number, and the rows."""
    if not isinstance(tensor, ShardedTensor):
        yield 0, tensor
        return
    for shard in tensor.local_shards():
        yield shard.metadata.shard_offsets[0], shard.tensor


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
