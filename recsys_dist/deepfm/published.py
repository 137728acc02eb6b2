"""model/ of a deepfm run: the weights as safetensors and a description, nothing pickled. Of a table of users
that is larger than a process wants to hold the rows are read that it asks for.

The format (https://github.com/huggingface/safetensors): the length of what follows in 8 bytes, least first; a
JSON object with type, shape and place of each tensor; the numbers.
"""

import json
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from recsys_dist import config
from recsys_dist.deepfm.model import DeepFM, used_fields
from recsys_dist.errors import DataError
from recsys_dist.schema import FeatureSpec, FieldSpec, VocabularySpec
from recsys_dist.workspace import OpenRun, Run

WEIGHTS = "model/model.safetensors"
GAP = 1 << 16
"""Bytes between two rows that are read in vain rather than begin to read anew."""


def publish(
    run: OpenRun, spec: FeatureSpec, settings: config.DeepFM, read: Callable[[str], Tensor]
) -> dict[str, list[int]]:
    """Write model/ of a deepfm run: the weights as safetensors and a description, nothing pickled. One tensor
    is asked for at a time, so that a driver need not have memory for the whole model.

    Args:
        run: the open run.
        spec: the fields that the model was made for, of `used_fields`.
        settings: its sizes.
        read: a tensor of the unsharded DeepFM's state_dict, float32, by its name.

    Returns:
        the shape of each tensor by name.
    """
    bare = DeepFM(spec, settings, tables="meta").state_dict()
    shapes = {name: list(bare[name].shape) for name in sorted(bare)}
    ends = np.cumsum([4 * math.prod(shape) for shape in shapes.values()]).tolist()
    places = zip(shapes.items(), [0, *ends], ends, strict=False)
    header = json.dumps(
        {
            name: {"dtype": "F32", "shape": of, "data_offsets": [begin, end]}
            for (name, of), begin, end in places
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    run.filesystem.create_dir(f"{run.path}/model", recursive=True)
    with run.filesystem.open_output_stream(f"{run.path}/{WEIGHTS}") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            tensor = read(name).detach().cpu().contiguous()
            if list(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise ValueError(
                    f"{name} is {tensor.dtype} of {list(tensor.shape)}, expected float32, {shape}"
                )
            stream.write(tensor.numpy().reshape(-1).view(np.uint8))
    told = {
        "model": settings.model,
        "settings": settings.model_dump(mode="json"),
        "fields": [field.model_dump(mode="json") for field in spec.fields],
        "vocabularies": {name: found.model_dump(mode="json") for name, found in spec.vocabularies.items()},
        "shapes": shapes,
    }
    run.write_json("model/model.json", told)
    return shapes


class Description(NamedTuple):
    """What model.json says of a published model."""

    uri: str
    """Of its run."""
    settings: config.DeepFM
    fields: tuple[FieldSpec, ...]
    vocabularies: dict[str, VocabularySpec]

    def require_continued(self, spec: FeatureSpec) -> None:
        """Raise a ConfigError where an index of the model may mean something else in `spec`."""
        trained = spec.model_copy(update={"vocabularies": self.vocabularies})
        spec.require_continues(trained, "the features run", f"the model of {self.uri}")


def description(run: Run) -> Description:
    """The description of the published model of a deepfm run.

    Raises:
        DataError: the file is not there, or not such a one.
    """
    try:
        found: dict[str, Any] = run.json("model/model.json")
        return Description(
            run.uri,
            config.DeepFM.model_validate(found["settings"]),
            tuple(FieldSpec.model_validate(field) for field in found["fields"]),
            {name: VocabularySpec.model_validate(of) for name, of in found["vocabularies"].items()},
        )
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{run.uri}/model/model.json cannot be read, or is of another version: {error}. Restore it or "
            f"train again with --force."
        ) from None


class Weights:
    """The numbers of a published model, of which parts can be read.

    Args:
        run: the deepfm run.

    Raises:
        DataError: the file is not there, or not such a one.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        try:
            with run.filesystem.open_input_file(f"{run.path}/{WEIGHTS}") as file:
                size = int.from_bytes(file.read(8), "little")
                if not 0 < size < file.size():
                    raise ValueError(f"its description would have {size} bytes")
                self.tensors: dict[str, dict[str, Any]] = json.loads(file.read(size))
                self.start = 8 + size
                self.tensors.pop("__metadata__", None)
                last = max((of["data_offsets"][1] for of in self.tensors.values()), default=0)
                if self.start + last != file.size():
                    raise ValueError(f"it has {file.size()} bytes, expected {self.start + last}")
                strange = {of["dtype"] for of in self.tensors.values()} - {"F32"}
                if strange:
                    raise ValueError(f"numbers of type {', '.join(strange)}, expected F32")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise self.unfit(error) from None

    def unfit(self, why: object) -> DataError:
        """What to say where the file is not what it should be."""
        return DataError(
            f"{self.run.uri}/model cannot be read: {why}. Restore it or train again with --force."
        )

    def bytes(self, name: str) -> int:
        """Of a tensor."""
        begin, end = self.tensors[name]["data_offsets"]
        return int(end - begin)

    def whole(self, name: str) -> Tensor:
        """A tensor, float32."""
        array = np.empty(self.tensors[name]["shape"], np.float32)
        self._read(((self.tensors[name]["data_offsets"][0], array),))
        return torch.as_tensor(array)

    def rows(self, name: str, rows: np.ndarray) -> Tensor:
        """[M, D] rows of a table [rows, D].

        Args:
            name: of the table.
            rows: [M] their numbers, distinct and ascending.
        """
        width = self.tensors[name]["shape"][1]
        begin = self.tensors[name]["data_offsets"][0]
        array = np.empty((len(rows), width), np.float32)
        far = np.flatnonzero(np.diff(rows) * width * array.itemsize > GAP) + 1
        parts = []
        for some in np.split(np.arange(len(rows)), far):
            if len(some):
                first, last = int(rows[some[0]]), int(rows[some[-1]])
                parts.append(
                    (some, rows[some] - first, np.empty((last - first + 1, width), np.float32), first)
                )
        self._read((begin + first * width * array.itemsize, part) for _, _, part, first in parts)
        for some, wanted, part, _ in parts:
            array[some] = part[wanted]
        return torch.as_tensor(array)

    def _read(self, places: Iterable[tuple[int, np.ndarray]]) -> None:
        """Fill arrays with what begins at a place among the numbers."""
        with self.run.filesystem.open_input_file(f"{self.run.path}/{WEIGHTS}") as file:
            for place, array in places:
                file.seek(self.start + place)
                if array.size and file.readinto(array.reshape(-1).view(np.uint8)) != array.nbytes:
                    raise self.unfit("it ends too early")


class UserRows:
    """The table of a published model's users, which stays in its file.

    Args:
        model: without it.
        weights: of the model.
        name: of the table.
    """

    def __init__(self, model: DeepFM, weights: Weights, name: str) -> None:
        self.model, self.weights, self.name = model, weights, name

    def put(self, users: pa.Table) -> pa.Table:
        """Read the rows of a batch's users into the model; the batch, with users numbered by these rows."""
        distinct, inverse = np.unique(users["user"].to_numpy(), return_inverse=True)
        rows = self.weights.rows(self.name, distinct)
        bag = self.model.user_tables.embedding_bags["table_user"]
        bag.weight = nn.Parameter(rows, requires_grad=False)
        place = users.column_names.index("user")
        return users.set_column(place, "user", pa.array(inverse.astype(np.int32)))


def load(run: Run, spec: FeatureSpec, device: torch.device | str = "cpu") -> DeepFM:
    """The published model of a deepfm run: unsharded, in eval mode.

    Raises:
        DataError: the model was made for other fields than `spec` has, or its files do not fit together.
        ConfigError: an index may mean something else in `spec` than it did in the training.
    """
    return load_parts(run, spec, device)[0]


def load_parts(
    run: Run, spec: FeatureSpec, device: torch.device | str = "cpu", most: int | None = None
) -> tuple[DeepFM, UserRows | None]:
    """As `load`, but with the table of users left in its file where it has more than `most` bytes."""
    made = description(run)
    spec = used_fields(spec, made.settings)
    if made.fields != spec.fields:
        raise DataError(
            f"The model of {run.uri} was trained on the fields {_names(made.fields)}, and the features run "
            f"has {_names(spec.fields)}, or the same ones with other vocabularies. Use the features run "
            f"{run.inputs.get('features')} that its manifest names."
        )
    made.require_continued(spec)
    weights = Weights(run)
    model = DeepFM(spec, made.settings, tables="meta")
    table = "user_tables.embedding_bags.table_user.weight"
    apart = most is not None and table in weights.tensors and weights.bytes(table) > most
    try:
        with torch.device("cpu"):
            state = {name: weights.whole(name) for name in weights.tensors if not (apart and name == table)}
        if apart:
            model.user_tables.embedding_bags["table_user"].weight = nn.Parameter(torch.empty(0, 1))
            state[table] = torch.empty(0, 1)
        model.load_state_dict(state, assign=True)
    except (RuntimeError, ValueError) as error:
        raise weights.unfit(error) from None
    model = model.to(device).eval().requires_grad_(False)
    return model, UserRows(model, weights, table) if apart else None


def _names(fields: tuple[FieldSpec, ...]) -> str:
    return ", ".join(field.name for field in fields)
