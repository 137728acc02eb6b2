"""DeepFM (Guo et al. 2017, https://arxiv.org/abs/1703.04247) in two halves, one for each side, and its parts.

logit = bias + first order + second order + MLP, where the second order of the factorisation machine and
the MLP share the fields' embeddings; `lr`, `fm`, `mf` and `dnn` are this sum without some of its terms.
Everything that depends on one side only is computed once per row of that side, so that scoring U users
against I items costs U + I lookups and first layers.

A value field's embedding is its value times the field's own; a vector field's the sum, over its numbers, of
number times the number's own. Either is one of the F fields.

Legend: N rows, D embedding_dim (0 in `lr`), F fields of a side, V numbers of a side's value and vector
fields, H width of the first hidden layer, B examples, J items drawn for each.
"""

import io
import itertools
import zlib
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedTensor

from recsys_dist import config
from recsys_dist.deepfm.batches import INDEXED, Batch, SideBatch
from recsys_dist.errors import DataError
from recsys_dist.schema import UNKNOWN, FeatureSpec, FieldSpec, VocabularySpec
from recsys_dist.workspace import OpenRun, Run

PADDING = 4
"""Columns of a table beyond the factors: the first-order weight and three unused ones, since fused
tables need a multiple of 4."""

BLOCK = 1024
"""Rows of a table that are drawn from one random stream."""


class Side(NamedTuple):
    """All that the logit needs to know of a row of one side; leading dimensions broadcast."""

    first: Tensor
    """[N] first order: the sum of the fields' weights."""
    sum: Tensor
    """[N, D] sum of the fields' embeddings."""
    pair: Tensor
    """[N] second order within the side: (|sum|^2 - sum of squares) / 2."""
    hidden: Tensor
    """[N, H] the side's share of the first hidden layer, before activation; H is 0 without an MLP."""

    def leading(self, *shape: int) -> "Side":
        """The same rows under another leading shape: `leading(-1, 1)` makes [N, 1], [N, 1, D], ..."""
        return Side(*(part.unflatten(0, shape) for part in self))

    def rows(self, start: int, stop: int) -> "Side":
        """The rows from `start` to before `stop`."""
        return Side(*(part[start:stop] for part in self))

    def take(self, rows: Tensor) -> "Side":
        """The rows at these positions [...], which become the leading shape."""
        return Side(*(part[rows] for part in self))


class DeepFM(nn.Module):
    """The model over the fields of a FeatureSpec.

    Args:
        spec: the fields, of `used_fields`.
        settings: sizes, dropout and objective.
        device: of the dense part, and of the tables where `tables` says nothing else.
        tables: device of the tables; `meta` for a model that is going to be sharded.
        seed: of the initial values.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        settings: config.DeepFM,
        device: torch.device | str = "cpu",
        tables: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.spec = spec
        self.user_fields = spec.side("user", "context")
        self.item_fields = spec.side("item")
        self.linear = settings.model != "dnn"
        self.factorised = settings.model in ("fm", "mf", "deepfm")
        self.deep = settings.model in ("dnn", "deepfm")
        self.dim = 0 if settings.model == "lr" else settings.embedding_dim
        dim, widths = self.dim, settings.hidden
        self.user_tables = _tables(self.user_fields, dim, tables or device)
        self.item_tables = _tables(self.item_fields, dim, tables or device)
        self.user_values = _value_weights(self.user_fields, dim, device)
        self.item_values = _value_weights(self.item_fields, dim, device)
        if self.linear:
            self.bias = nn.Parameter(torch.zeros((), device=device))
        if self.deep:
            # One Linear over the concatenation of all fields, cut into the columns of either side.
            self.user_hidden = nn.Linear(len(self.user_fields) * dim, widths[0], device=device)
            self.item_hidden = nn.Linear(len(self.item_fields) * dim, widths[0], bias=False, device=device)
            layers: list[nn.Module] = [nn.ReLU(), nn.Dropout(settings.dropout)]
            for inputs, outputs in itertools.pairwise(widths):
                layers += [nn.Linear(inputs, outputs, device=device), nn.ReLU(), nn.Dropout(settings.dropout)]
            self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1, device=device))
        self._initialise(seed)

    def user_side(self, batch: SideBatch) -> Side:
        """The user and context fields' part."""
        return self._side(
            self.user_tables(batch.indices),
            batch,
            self.user_fields,
            self.user_values,
            self.user_hidden if self.deep else None,
        )

    def item_side(self, batch: SideBatch) -> Side:
        """The item fields' part."""
        return self._side(
            self.item_tables(batch.indices),
            batch,
            self.item_fields,
            self.item_values,
            self.item_hidden if self.deep else None,
        )

    def fm(self, user: Side, item: Side) -> Tensor:
        """Bias, first and second order; leading shapes broadcast (Rendle 2010, lemma 3.1)."""
        first = self.bias + user.first + item.first
        if not self.factorised:
            return first
        across = torch.einsum("...d,...d->...", user.sum, item.sum)
        return first + user.pair + item.pair + across

    def mlp(self, user: Side, item: Side) -> Tensor:
        """The deep part; leading shapes broadcast."""
        return self.layers(user.hidden + item.hidden).squeeze(-1)

    def logits(self, user: Side, item: Side) -> Tensor:
        """The whole model; leading shapes broadcast: [U, 1] users and [1, I] items make [U, I]."""
        if not self.deep:
            return self.fm(user, item)
        return self.fm(user, item) + self.mlp(user, item) if self.linear else self.mlp(user, item)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss, summed with the batch's weights, and the logits [B, 1 + J], the example's own first."""
        user = self.user_side(batch.user).leading(-1, 1)
        item = self.item_side(batch.item).leading(len(batch.user), -1)
        logits = self.logits(user, item)
        return (self.loss(logits, batch) * batch.weight).sum(), logits

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss [B] of each example with its drawn items.

        logistic: the mean binary cross entropy of the example's label and of the drawn items, whose label is
        0; each label is moved towards 1/2 by `label_smoothing`.
        softmax: the cross entropy of the positive among all items, whose normaliser is estimated from the
        drawn ones: exp(s_positive) + mean over them of exp(s) / probability (Bengio and Senécal 2003).
        bpr: the mean of -log sigmoid(s_positive - s_drawn) (Rendle et al. 2009).
        squared: (s - value)^2.

        Args:
            logits: [B, 1 + J], the example's own first.
            batch: labels and the drawn items' probabilities.
        """
        objective, own = self.settings.objective, logits[:, 0]
        if objective == "squared":
            return (own - batch.label).square()
        if objective == "bpr":
            return -F.logsigmoid(own.unsqueeze(1) - logits[:, 1:]).mean(1)
        if objective == "logistic":
            target = F.pad(batch.label.unsqueeze(1), (0, logits.shape[1] - 1))
            target = target + self.settings.label_smoothing * (0.5 - target)
            return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
        drawn = logits[:, 1:] - batch.log_probability - float(np.log(batch.log_probability.shape[1]))
        return torch.cat([logits[:, :1], drawn], dim=1).logsumexp(1) - own

    @torch.no_grad()
    def start_at(self, prediction: float) -> None:
        """Let the constant term predict what is true on average, or it would take thousands of steps."""
        constant = self.bias if self.linear else self.layers[-1].bias
        assert isinstance(constant, Tensor)
        constant.fill_(prediction)

    def _side(
        self,
        pooled: KeyedTensor,
        batch: SideBatch,
        fields: tuple[FieldSpec, ...],
        weights: Tensor | None,
        linear: nn.Linear | None,
    ) -> Side:
        dim = self.dim
        # By name: the order of a KeyedTensor's columns follows the sharding, not the fields.
        by_name, bags = pooled.to_dict(), batch.indices.to_dict()
        columns, start = [], 0
        for field in fields:
            if field.type in INDEXED:
                column = by_name[field.name][:, : dim + 1]
                if field.pooling == "mean":
                    column = column / bags[field.name].lengths().clamp(min=1).unsqueeze(1)
                columns.append(column)
                continue
            assert weights is not None
            stop = start + field.cardinality
            columns.append(batch.values[:, start:stop] @ weights[start:stop])
            start = stop
        embeddings = torch.stack(columns, dim=1)  # [N, F, D + 1]
        factors = embeddings[..., :dim]
        total = factors.sum(1)
        pair = 0.5 * (total.square() - factors.square().sum(1)).sum(-1)
        hidden = factors.new_empty(len(factors), 0) if linear is None else linear(factors.flatten(1))
        return Side(embeddings[..., dim].sum(1), total, pair, hidden)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Set the initial values, which depend on nothing but the seed and the fields."""
        dim, scale = self.dim, self.settings.init_scale
        for collection in (self.user_tables, self.item_tables):
            for table in collection.embedding_bag_configs():
                weight = collection.embedding_bags[table.name].weight
                if not weight.is_meta:
                    weight.copy_(initial_rows(seed, table.name, 0, table.num_embeddings, dim, scale))
        generator = torch.Generator().manual_seed(seed)
        if self.deep:
            fan_in = self.user_hidden.in_features + self.item_hidden.in_features
            for layer in [self.user_hidden, self.item_hidden, *self.layers]:
                if isinstance(layer, nn.Linear):
                    first = layer in (self.user_hidden, self.item_hidden)
                    # He et al. 2015, for ReLU
                    deviation = (2 / (fan_in if first else layer.in_features)) ** 0.5
                    layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * deviation)
                    if layer.bias is not None:
                        layer.bias.zero_()
        for values in (self.user_values, self.item_values):
            if values is not None:
                values.copy_(torch.randn(values.shape, generator=generator) * scale)


def used_fields(spec: FeatureSpec, settings: config.DeepFM) -> FeatureSpec:
    """The spec with the fields that the model has: all, or user and item in `mf`."""
    if settings.model != "mf":
        return spec
    return spec.model_copy(update={"fields": tuple(f for f in spec.fields if f.name in ("user", "item"))})


def initial_rows(seed: int, table: str, start: int, stop: int, dim: int, scale: float) -> Tensor:
    """Rows `start` to before `stop` of a table's initial values: [stop - start, dim + PADDING] float32.

    Factors and first-order weights are normal with standard deviation `scale`, drawn in blocks of rows, so
    that a row's value does not depend on how the table is cut over workers. The unknown row is zero.
    """
    rows = np.zeros((stop - start, dim + PADDING), dtype=np.float32)
    for block in range(start // BLOCK, (stop + BLOCK - 1) // BLOCK):
        generator = np.random.default_rng([seed, zlib.crc32(table.encode()), block])
        drawn = generator.standard_normal((BLOCK, dim + 1), dtype=np.float32) * np.float32(scale)
        first, last = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
        rows[first - start : last - start, : dim + 1] = drawn[first - block * BLOCK : last - block * BLOCK]
    if start <= UNKNOWN < stop:
        rows[UNKNOWN - start] = 0
    return torch.from_numpy(rows)


def publish(run: OpenRun, spec: FeatureSpec, settings: config.DeepFM, state: dict[str, Tensor]) -> None:
    """Write model/ of a deepfm run: the weights as safetensors and a description, nothing pickled.

    Args:
        run: the open run.
        spec: the fields that the model was made for, of `used_fields`.
        settings: its sizes.
        state: the unsharded DeepFM's state_dict.
    """
    run.filesystem.create_dir(f"{run.path}/model", recursive=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with run.filesystem.open_output_stream(f"{run.path}/model/model.safetensors") as stream:
        stream.write(safetensors.torch.save(tensors))
    told = {
        "model": settings.model,
        "settings": settings.model_dump(mode="json"),
        "fields": [field.model_dump(mode="json") for field in spec.fields],
        "vocabularies": {name: found.model_dump(mode="json") for name, found in spec.vocabularies.items()},
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }
    run.write_json("model/model.json", told)


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
    """The description of the published model of a deepfm run."""
    found: dict[str, Any] = run.json("model/model.json")
    return Description(
        run.uri,
        config.DeepFM.model_validate(found["settings"]),
        tuple(FieldSpec.model_validate(field) for field in found["fields"]),
        {name: VocabularySpec.model_validate(of) for name, of in found["vocabularies"].items()},
    )


def load(run: Run, spec: FeatureSpec, device: torch.device | str = "cpu") -> DeepFM:
    """The published model of a deepfm run: unsharded, in eval mode.

    Raises:
        DataError: the model was made for other fields than `spec` has, or its files do not fit together.
        ConfigError: an index may mean something else in `spec` than it did in the training.
    """
    made = description(run)
    spec = used_fields(spec, made.settings)
    if made.fields != spec.fields:
        raise DataError(
            f"The model of {run.uri} was trained on the fields {_names(made.fields)}, and the features run "
            f"has {_names(spec.fields)}, or the same ones with other vocabularies. Use the features run "
            f"{run.inputs.get('features')} that its manifest names."
        )
    made.require_continued(spec)
    with run.filesystem.open_input_stream(f"{run.path}/model/model.safetensors") as stream:
        content = io.BytesIO(stream.read())
    try:
        state = safetensors.torch.load(content.getvalue())
        model = DeepFM(spec, made.settings, tables="meta")
        model.load_state_dict(state, assign=True)
    except (safetensors.SafetensorError, RuntimeError, ValueError) as error:
        raise DataError(
            f"{run.uri}/model cannot be read: {error}. Restore it or train again with --force."
        ) from None
    return model.to(device).eval().requires_grad_(False)


def _tables(fields: tuple[FieldSpec, ...], dim: int, device: torch.device | str) -> EmbeddingBagCollection:
    tables = [
        EmbeddingBagConfig(
            # Not the bare name: `type` or `half` would clash with a method of torch.nn.Module.
            name=f"table_{field.name}",
            embedding_dim=dim + PADDING,
            num_embeddings=field.cardinality,
            feature_names=[field.name],
            # Means are divided in DeepFM: in a sharded collection with a mean over a table that is cut by
            # rows, torchrec divides the fields of whole tables as well, sums too.
            pooling=PoolingType.SUM,
        )
        for field in fields
        if field.type in INDEXED
    ]
    return EmbeddingBagCollection(tables=tables, device=torch.device(device))


def _value_weights(
    fields: tuple[FieldSpec, ...], dim: int, device: torch.device | str
) -> nn.Parameter | None:
    """[V, D + 1]: each number's embedding and first-order weight; None where no field has numbers."""
    count = sum(field.cardinality for field in fields if field.type not in INDEXED)
    # Not an empty parameter: it would never get a gradient, for which data parallel workers wait.
    return nn.Parameter(torch.empty(count, dim + 1, device=device)) if count else None


def _names(fields: tuple[FieldSpec, ...]) -> str:
    return ", ".join(field.name for field in fields)
