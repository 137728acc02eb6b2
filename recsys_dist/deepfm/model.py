"""DeepFM (Guo et al. 2017, https://arxiv.org/abs/1703.04247) in two halves, one for each side, and its parts.

logit = bias + first order + second order + MLP, where the second order of the factorisation machine and
the MLP share the fields' embeddings; `lr`, `fm`, `mf` and `dnn` are this sum without some of its terms.
Everything that depends on one side only is computed once per row of that side, so that scoring U users
against I items costs U + I lookups and first layers.

A value field's embedding is its value times the field's own; a vector field's the sum, over its numbers, of
number times the number's own. Either is one of the F fields.

Legend: N rows, D embedding_dim (0 in `lr`), F fields of a side, V numbers of a side's value and vector
fields, H width of the first hidden layer, A history fields with attention, L greatest length of a history, B
examples, J items drawn for each, or once for all.
"""

import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedTensor

from recsys_dist import config
from recsys_dist.config import in_epoch
from recsys_dist.deepfm.batches import INDEXED, SEQUENCES, Batch, SideBatch, tabled
from recsys_dist.deepfm.layers import (
    Attention,
    BatchNorm,
    Convolution,
    Dropout,
    Encoder,
    PairHead,
    linear,
    recency,
)
from recsys_dist.deepfm.pairs import pair_specs
from recsys_dist.errors import ConfigError
from recsys_dist.schema import UNKNOWN, FeatureSpec, FieldSpec

PAIR_HEAD = "pair_head."
"""What begins with this in a state_dict says what pair fields are worth."""
TABLES = ".embedding_bags."
"""In the name of every table's weights."""
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
    history: Tensor
    """Users: [N, A, L, D] embeddings of the items in the histories with attention. Items: [N, 0]."""
    age: Tensor
    """Users: [N, A, L] how many items of the history came after; below 0 where there is none. Items:
    [N, 0]."""
    query: Tensor
    """Items: [N, D] the embedding that histories with attention are compared with, [N, 0] where there are
    none. Users: [N, 0]."""

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
        self.pair_fields = spec.side("pair")
        self.linear = settings.model != "dnn"
        self.factorised = settings.model in ("fm", "mf", "deepfm")
        self.deep = settings.model in ("dnn", "deepfm")
        self.dim = 0 if settings.model == "lr" else settings.embedding_dim
        dim, widths = self.dim, settings.hidden
        self.user_tables = _tables(tabled(self.user_fields), dim, tables or device)
        self.item_tables = _tables(tabled(self.item_fields), dim, tables or device)
        sequences = tabled(self.user_fields, sequence=True)
        self.user_sequences = _tables(sequences, dim, tables or device) if sequences else None
        self.attended = [field.name for field in sequences if field.pooling == "attention"]
        self.encoders = nn.ModuleDict(
            {
                # As for tables: not the bare name.
                f"of_{field.name}": Encoder(
                    field.last or 1,
                    settings.encoder[field.name],
                    dim,
                    settings.encoder_heads,
                    settings.encoder_dropout,
                    device,
                )
                for field in sequences
                if field.pooling == "encoder"
            }
        )
        self.user_values = _value_weights(self.user_fields, dim, device)
        self.item_values = _value_weights(self.item_fields, dim, device)
        if self.linear:
            self.bias = nn.Parameter(torch.zeros((), device=device))
        # None without an MLP, to which it belongs.
        self.user_convolution = self._convolution(len(self.user_fields), device)
        self.item_convolution = self._convolution(len(self.item_fields), device)
        if self.deep:
            # One Linear over the concatenation of all fields, cut into the columns of either side.
            users, items = len(self.user_fields) * dim, len(self.item_fields) * dim
            if self.user_convolution and self.item_convolution:
                users, items = users + self.user_convolution.width, items + self.item_convolution.width
            self.user_hidden = nn.Linear(users, widths[0], device=device)
            self.item_hidden = nn.Linear(items, widths[0], bias=False, device=device)
            layers: list[nn.Module] = []
            for before, width in zip((0, *widths), widths, strict=False):
                layers += [nn.Linear(before, width, device=device)] if before else []
                layers += [BatchNorm(width, device)] if settings.batch_norm else []
                layers += [nn.ReLU(inplace=True), Dropout(in_epoch(settings.dropout, 0))]
            self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1, device=device))
            if self.attended:
                decays = [settings.attention[name] for name in self.attended]
                self.attention = Attention(decays, dim, widths[0], device)
        if self.pair_fields:
            self.pair_head = PairHead(len(self.pair_fields), settings.pair_hidden, device)
        with torch.device("cpu"):  # the same numbers, whatever the default device is
            self._initialise(seed)

    def _convolution(self, fields: int, device: torch.device | str) -> Convolution | None:
        if not self.settings.convolution:
            return None
        return Convolution(
            fields, self.dim, self.settings.convolution, self.settings.convolution_reach, device
        )

    @property
    def collections(self) -> dict[str, EmbeddingBagCollection]:
        """The modules with the tables."""
        found = {"user_tables": self.user_tables, "item_tables": self.item_tables}
        return found | ({"user_sequences": self.user_sequences} if self.user_sequences is not None else {})

    def table(self, field: str) -> Tensor:
        """[rows, D + PADDING] of a field of an unsharded model: factors, first-order weight, padding."""
        name = f"table_{field}"
        return next(
            of.embedding_bags[name].weight for of in self.collections.values() if name in of.embedding_bags
        )

    def encoder(self, field: str) -> Encoder:
        """The encoder of a history."""
        found = self.encoders[f"of_{field}"]
        assert isinstance(found, Encoder)
        return found

    def user_side(self, batch: SideBatch) -> Side:
        """The user and context fields' part."""
        return self._user_side(batch, *self._look_up(batch))

    def item_side(self, batch: SideBatch) -> Side:
        """The item fields' part."""
        return self._item_side(batch, self.item_tables(batch.indices))

    def _look_up(self, batch: SideBatch) -> tuple[KeyedTensor, KeyedTensor | None]:
        """Of users and context: the pooled fields, and the sequences."""
        sequences = None if self.user_sequences is None else self.user_sequences(batch.sequences)
        return self.user_tables(batch.indices), sequences

    def _user_side(self, batch: SideBatch, pooled: KeyedTensor, sequences: KeyedTensor | None) -> Side:
        columns = self._columns(pooled, batch, self.user_fields, self.user_values)
        ages, histories = [], []
        if sequences is not None:
            assert batch.sequences is not None
            by_name = sequences.to_dict()
            for field in tabled(self.user_fields, sequence=True):
                there = batch.sequences[field.name].lengths().view(len(batch), -1)  # 1 or 0, the ones first
                embeddings = by_name[field.name].view(*there.shape, -1)[..., : self.dim + 1]
                if field.pooling == "encoder":
                    history, starts = embeddings[..., : self.dim], batch.starts.get(field.name)
                    column = self.encoder(field.name)(history, there > 0, starts)
                    columns[field.name] = F.pad(column, (0, 1))  # without a first order
                    continue
                count = there.sum(1, keepdim=True)
                age = count - 1 - torch.arange(there.shape[1], device=there.device)
                with torch.autocast(age.device.type, enabled=False):
                    weights = recency(age, field.decay or 1)
                    columns[field.name] = torch.einsum("nl,nld->nd", weights, embeddings)
                if field.name in self.attended:
                    ages.append(age)
                    histories.append(embeddings[..., : self.dim])
        side = self._side(
            [columns[field.name] for field in self.user_fields],
            self.user_convolution,
            self.user_hidden if self.deep else None,
        )
        if not self.attended:
            return side
        return side._replace(history=torch.stack(histories, 1), age=torch.stack(ages, 1))

    def _item_side(self, batch: SideBatch, pooled: KeyedTensor) -> Side:
        columns = self._columns(pooled, batch, self.item_fields, self.item_values)
        side = self._side(
            [columns[field.name] for field in self.item_fields],
            self.item_convolution,
            self.item_hidden if self.deep else None,
        )
        return side._replace(query=columns["item"][:, : self.dim]) if self.attended else side

    def fm(self, user: Side, item: Side) -> Tensor:
        """Bias, first and second order; leading shapes broadcast (Rendle 2010, lemma 3.1)."""
        first = self.bias + user.first + item.first
        if not self.factorised:
            return first
        with torch.autocast(first.device.type, enabled=False):
            across = torch.einsum("...d,...d->...", user.sum, item.sum)
        return first + user.pair + item.pair + across

    def mlp(self, user: Side, *items: Side, counted: Tensor | None = None) -> Tensor:
        """The deep part; leading shapes broadcast.

        Args:
            user: users.
            items: some sets of items, beside each other in the last dimension: batch normalisation is to see
                all of them at once.
            counted: bool: which rows batch normalisation learns from; None: all.
        """
        x = _beside([self._first_layer(user, item) for item in items], -2)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                x = linear(layer, x)
            else:
                x = layer(x, counted) if isinstance(layer, BatchNorm) else layer(x)
        return x.squeeze(-1).float()

    def _first_layer(self, user: Side, item: Side) -> Tensor:
        """[..., H] before activation."""
        x = user.hidden + item.hidden
        return x + self.attention(user.history, user.age, item.query) if self.attended else x

    def logits(
        self, user: Side, item: Side, counted: Tensor | None = None, pair: Tensor | None = None
    ) -> Tensor:
        """The whole model; leading shapes broadcast: [U, 1] users and [1, I] items make [U, I].

        Args:
            user: users.
            item: items.
            counted: see `mlp`.
            pair: [..., P] the pair fields, of a model that has them.
        """
        if (pair is None) == bool(self.pair_fields):
            raise ValueError(
                f"{len(self.pair_fields)} pair fields, and {'no ' * (pair is None)}values of them"
            )
        logit = self._logits(user, [item], counted)
        return logit if pair is None else self.pair_head(pair, logit)

    def _logits(self, user: Side, items: Sequence[Side], counted: Tensor | None) -> Tensor:
        """Without the pair fields, of some sets of items, beside each other in the last dimension."""
        logit = torch.zeros(())
        if self.deep:
            logit = self.mlp(user, *items, counted=counted)
        if self.linear:
            logit = logit + _beside([self.fm(user, item) for item in items], -1)
        return logit

    @property
    def width(self) -> int:
        """Numbers of the widest array that `logits` makes of a pair."""
        history = sum(field.last or 1 for field in self.user_fields if field.name in self.attended)
        hidden = self.user_hidden.out_features if self.deep else 0
        pair = max(1 + len(self.pair_fields), *self.settings.pair_hidden) if self.pair_fields else 0
        return max(1, hidden, history + 4 * self.dim, pair)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss, summed with the batch's weights, and the logits [B, 1 + J], the example's own first."""
        # All lookups first: torchrec's pipeline reads off here what it may send ahead.
        users, sequences = self._look_up(batch.user)
        return after_lookup(self, batch, users, self.item_tables(batch.item.indices), sequences)

    def begin_epoch(self, epoch: int) -> None:
        """Set what changes from epoch to epoch."""
        for layer in self.layers if self.deep else ():
            if isinstance(layer, nn.Dropout):
                layer.p = in_epoch(self.settings.dropout, epoch)

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

    def _columns(
        self, pooled: KeyedTensor, batch: SideBatch, fields: tuple[FieldSpec, ...], weights: Tensor | None
    ) -> dict[str, Tensor]:
        """[N, D + 1] of each field but the sequences: its embedding and first-order weight."""
        dim = self.dim
        # By name: the order of a KeyedTensor's columns follows the sharding, not the fields.
        by_name, bags = pooled.to_dict(), batch.indices.to_dict()
        columns, start = {}, 0
        for field in fields:
            if field.name in by_name:
                column = by_name[field.name][:, : dim + 1]
                if field.pooling == "mean":
                    column = column / bags[field.name].lengths().clamp(min=1).unsqueeze(1)
                columns[field.name] = column
            elif field.type not in INDEXED:
                assert weights is not None
                stop = start + field.cardinality
                with torch.autocast(weights.device.type, enabled=False):
                    columns[field.name] = batch.values[:, start:stop] @ weights[start:stop]
                start = stop
        return columns

    def _side(self, columns: list[Tensor], convolution: Convolution | None, linear: nn.Linear | None) -> Side:
        dim = self.dim
        embeddings = torch.stack(columns, dim=1)  # [N, F, D + 1]
        factors = embeddings[..., :dim]
        total = factors.sum(1)
        pair = 0.5 * (total.square() - factors.square().sum(1)).sum(-1)
        none = factors.new_empty(len(factors), 0)
        inputs = factors.flatten(1)
        if convolution is not None:
            inputs = torch.cat([inputs, convolution(factors)], dim=1)
        hidden = none if linear is None else linear(inputs)
        return Side(embeddings[..., dim].sum(1), total, pair, hidden, none, none, none)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Set the initial values, which depend on nothing but the seed and the fields."""
        dim, scale = self.dim, self.settings.init_scale
        for collection in self.collections.values():
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
        without_relu = [
            module.projection if isinstance(module, Attention) else module
            for module in self.modules()
            if isinstance(module, nn.Conv2d | Attention)
        ]
        for layer in (*without_relu, *self.encoders.modules()):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                fan_in = layer.weight[0].numel()
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * fan_in**-0.5)
                if layer.bias is not None:
                    layer.bias.zero_()
        if self.pair_fields:
            for layer in (self.pair_head.linear, *self.pair_head.layers):
                if isinstance(layer, nn.Linear):
                    # At first it adds nothing.
                    deviation = (2 / layer.in_features) ** 0.5 * (layer.out_features > 1)
                    layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * deviation)
                    if layer.bias is not None:
                        layer.bias.zero_()


def _beside(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


@torch.fx.wrap
def after_lookup(
    model: DeepFM, batch: Batch, users: KeyedTensor, items: KeyedTensor, sequences: KeyedTensor | None
) -> tuple[Tensor, Tensor]:
    """The rest of the forward pass, into which torch.fx does not look."""
    user = model._user_side(batch.user, users, sequences).leading(-1, 1)
    item, number = model._item_side(batch.item, items), len(batch.user)
    if model.settings.negatives_shared:
        own, drawn = item.rows(0, number), item.rows(number, len(batch.item))
        sets = [own.leading(number, 1), drawn.leading(1, -1)]
    else:
        sets = [item.leading(number, -1)]
    logits = model._logits(user, sets, (batch.weight > 0).unsqueeze(1))
    return (model.loss(logits, batch) * batch.weight).sum(), logits


def used_fields(spec: FeatureSpec, settings: config.DeepFM) -> FeatureSpec:
    """The fields that the model has: all but those that are left out, or user and item in `mf`, and the
    pairs'; and how it pools the histories.

    Raises:
        ConfigError: recency, attention or encoder of a field that is not such a history, sharding of one
            without a table; a field is left out that is not there, or is needed.
    """
    needed = ("user", "item") if settings.model == "mf" else ("item",)
    names = [field.name for field in spec.fields if field.name not in needed]
    strange = [name for name in settings.leave_out if name not in names]
    if strange:
        raise ConfigError(
            f"deepfm.leave_out: {', '.join(strange)} is no field that can be left out; those are "
            f"{', '.join(names)}"
        )
    kept = tuple(field for field in spec.fields if field.name not in settings.leave_out)
    spec = spec.model_copy(update={"fields": kept})
    tables = [field.name for field in spec.fields if field.type in INDEXED]
    strange = [name for name in settings.sharding if name not in tables]
    if strange:
        raise ConfigError(
            f"deepfm.sharding: {', '.join(strange)} has no table; fields with one are {', '.join(tables)}"
        )
    changes: dict[str, dict[str, Any]] = {}
    for kind in SEQUENCES:
        for name, decay in getattr(settings, kind).items():
            changes[name] = {"pooling": kind, "decay": None if kind == "encoder" else decay}
            right = [
                f.name for f in spec.fields if f.kind == "history" and (kind == "recency" or f.of == "item")
            ]
            if name not in right:
                raise ConfigError(
                    f"deepfm.{kind}: {name} is no history{'' if kind == 'recency' else ' of items'}; those "
                    f"are {', '.join(right) or 'none: add a field of kind history'}"
                )
    fields = [field.model_copy(update=changes.get(field.name, {})) for field in spec.fields]
    if settings.model == "mf":
        fields = [field for field in fields if field.name in ("user", "item")]
    if not tabled([field for field in fields if field.side in ("user", "context")]):
        raise ConfigError(
            "deepfm.leave_out: without user no field of users or of the context is left that is an index, or "
            "a mean or sum of some. Keep user, or add a field, such as {name: last, kind: history, of: item, "
            "last: 1}"
        )
    fields += pair_specs(settings)
    return spec.model_copy(update={"fields": tuple(fields)})


def initial_rows(seed: int, table: str, start: int, stop: int, dim: int, scale: float) -> Tensor:
    """Rows `start` to before `stop` of a table's initial values: [stop - start, dim + PADDING] float32.

    Factors and first-order weights are normal with standard deviation `scale`, drawn in blocks of rows, so
    that a row's value does not depend on how the table is cut over workers. The unknown row is zero.
    """
    rows = np.zeros((stop - start, dim + PADDING), dtype=np.float32)

    def draw(block: int) -> None:
        generator = np.random.default_rng([seed, zlib.crc32(table.encode()), block])
        drawn = generator.standard_normal((BLOCK, dim + 1), dtype=np.float32) * np.float32(scale)
        first, last = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
        rows[first - start : last - start, : dim + 1] = drawn[first - block * BLOCK : last - block * BLOCK]

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(draw, range(start // BLOCK, (stop + BLOCK - 1) // BLOCK)))
    if start <= UNKNOWN < stop:
        rows[UNKNOWN - start] = 0
    return torch.from_numpy(rows)


def _tables(fields: Sequence[FieldSpec], dim: int, device: torch.device | str) -> EmbeddingBagCollection:
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
    ]
    return EmbeddingBagCollection(tables=tables, device=torch.device(device))


def _value_weights(
    fields: tuple[FieldSpec, ...], dim: int, device: torch.device | str
) -> nn.Parameter | None:
    """[V, D + 1]: each number's embedding and first-order weight; None where no field has numbers."""
    count = sum(field.cardinality for field in fields if field.type not in INDEXED)
    # Not an empty parameter: it would never get a gradient, for which data parallel workers wait.
    return nn.Parameter(torch.empty(count, dim + 1, device=device)) if count else None
