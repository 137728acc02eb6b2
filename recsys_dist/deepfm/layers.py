"""Layers of DeepFM that torch does not have, or not for every device.

Legend: N rows, F fields, P pair fields, D factors, H width of a layer, A history fields with attention, L
their length, S sequences, M the greatest length of one; `...` are leading dimensions, which broadcast.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """[..., H] what the layer makes of x.

    On a processor, where no gradient is asked for, by oneDNN, which adds the bias to what is still in the
    cache: torch's own way writes it into every row of the result first, and reads it again.
    """
    derived = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
    there = torch.backends.mkldnn.is_available() and x.device.type == "cpu" and x.dtype == torch.float32
    if derived or not there:
        plain: Tensor = layer(x)
        return plain
    # What torch.compile makes of a linear layer; there is no public name for it. Its own ReLU makes 0 of NaN.
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
    return found


class Dropout(nn.Dropout):
    """torch's, with 16 random bits a number in training on a processor, so that p counts in steps of
    1 / 65,536. torch draws one number after the other there, which takes longer than all other layers of a
    small MLP together: of 206,000 rows of widths 64 and 32, forward and back, 0.67 s, and so 0.27 s.
    """

    STEPS = 1 << 16

    def forward(self, x: Tensor) -> Tensor:
        """Set a share p of the numbers to 0, and multiply the others by 1 / (1 - p)."""
        kept = round((1 - self.p) * self.STEPS)
        if not self.training or x.device.type != "cpu" or kept in (0, self.STEPS):
            return super().forward(x)
        size = torch.int64.itemsize // torch.int16.itemsize
        drawn = torch.empty(-(-x.numel() // size), dtype=torch.int64)
        drawn.random_(torch.iinfo(torch.int64).min, None)  # of all there are
        bits = drawn.view(torch.int16)[: x.numel()].view(x.shape)
        # A product, in which NaN stays.
        return x * (bits < kept - self.STEPS // 2).to(x.dtype).mul_(self.STEPS / kept)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) over the rows of all workers.

    torch's SyncBatchNorm is for CUDA alone, and would count rows that only fill a batch.

    Args:
        width: H.
        device: of the parameters.
        momentum: weight of the newest batch in the running mean and variance.
        eps: added to the variance.
    """

    def __init__(
        self, width: int, device: torch.device | str | None = None, momentum: float = 0.1, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(width, device=device))
        self.bias = nn.Parameter(torch.zeros(width, device=device))
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mean", torch.zeros(width, device=device))
        self.register_buffer("variance", torch.ones(width, device=device))

    def forward(self, x: Tensor, counted: Tensor | None = None) -> Tensor:
        """Normalise [..., H]; collective while training.

        Args:
            x: the rows.
            counted: [...] bool: which rows make the mean and variance; None: all.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            mean, variance = self._statistics(x, counted) if self.training else (self.mean, self.variance)
            return (x - mean) * (self.weight * torch.rsqrt(variance + self.eps)) + self.bias

    def _statistics(self, x: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        ones = x.new_ones(x.shape[:-1]) if counted is None else counted.to(x.dtype).expand(x.shape[:-1])
        # About the running mean, which all workers have: squares far from 0 would lose the variance.
        pivot = self.mean.clone()
        rows, weights = x.flatten(0, -2) - pivot, ones.flatten()
        sums = torch.cat([weights.sum().unsqueeze(0), weights @ rows, weights @ rows.square()])
        if dist.is_initialized() and dist.get_world_size() > 1:
            assert dist.group.WORLD
            sums = collectives.all_reduce(sums, "sum", dist.group.WORLD)
        count, total, squares = sums.split([1, x.shape[-1], x.shape[-1]])
        moved = self.momentum * (count > 0)
        count = count.clamp(min=1)
        shift = total / count
        variance = (squares / count - shift.square()).clamp(min=0)
        mean = pivot + shift
        with torch.no_grad():
            self.mean.lerp_(mean, moved)
            self.variance.lerp_(variance * count / (count - 1).clamp(min=1), moved)
        return mean, variance


class Convolution(nn.Module):
    """Convolutions along the fields, each with pooling to half of them, as in CCPM (Liu et al. 2015) and
    FGCNN (Liu et al. 2019): patterns of fields that stand beside each other, for the MLP.

    Args:
        fields: F.
        dim: D.
        channels: of each convolution.
        reach: fields that a kernel sees; odd.
        device: of the parameters.
    """

    def __init__(
        self,
        fields: int,
        dim: int,
        channels: Sequence[int],
        reach: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for after in channels:
            layers += [
                nn.Conv2d(before, after, (reach, 1), padding="same", device=device),
                nn.Tanh(),
                nn.MaxPool2d((2, 1), ceil_mode=True),
            ]
            before, fields = after, -(-fields // 2)
        self.layers = nn.Sequential(*layers)
        self.width = before * fields * dim
        """Numbers a row."""

    def forward(self, embeddings: Tensor) -> Tensor:
        """[N, width] of the embeddings [N, F, D]."""
        return self.layers(embeddings.unsqueeze(1)).flatten(1)


class Attention(nn.Module):
    """What the items of a history have to do with the candidate item: scaled dot products, as in DIN (Zhou et
    al. 2018) with the softmax of Vaswani et al. 2017, less the older an item is by a learned rate; a part of
    the attention goes to nothing, so that a history may be of no matter. Adds to the MLP's first layer.

    Args:
        decays: of each history the items after which, at first, one counts 1/e.
        dim: D.
        width: H.
        device: of the parameters.
    """

    def __init__(
        self, decays: Sequence[float], dim: int, width: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.rate = nn.Parameter(1 / torch.tensor(decays, device=device).unsqueeze(1))
        self.projection = nn.Linear(2 * len(decays) * dim, width, bias=False, device=device)

    def forward(self, history: Tensor, age: Tensor, query: Tensor) -> Tensor:
        """[..., H] of each pair.

        Args:
            history: [..., A, L, D] embeddings.
            age: [..., A, L] float32: how many items came after; below 0 where there is no item.
            query: [..., D] the candidate's embedding.
        """
        scores = torch.einsum("...d,...ald->...al", query, history) * query.shape[-1] ** -0.5
        scores = (scores - age * self.rate).masked_fill(age < 0, -torch.inf)
        weights = F.pad(scores, (0, 1)).softmax(-1)[..., :-1]
        pooled = torch.einsum("...al,...ald->...ad", weights, history)
        pairs = torch.cat([pooled, pooled * query.unsqueeze(-2)], dim=-1)
        return self.projection(pairs.flatten(-2))


class Block(nn.Module):
    """A transformer's block (Vaswani et al. 2017) over the latest items before each, and itself:
    normalisation comes first (Xiong et al. 2020), and attention goes by content and by how many items lie in
    between (Shaw et al. 2018; here, as in T5, a number a head and distance).

    Args:
        reach: items that each attends to at most.
        dim: D.
        heads: of the attention; a divisor of D.
        dropout: share of either part's result that is left out.
        device: of the parameters.
    """

    def __init__(
        self, reach: int, dim: int, heads: int, dropout: float, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.distance = nn.Parameter(torch.zeros(heads, reach, device=device))
        self.attention_norm = nn.LayerNorm(dim, device=device)
        self.attention = nn.Linear(dim, 3 * dim, device=device)
        self.attended = nn.Linear(dim, dim, device=device)
        self.forward_norm = nn.LayerNorm(dim, device=device)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 2 * dim, device=device), nn.GELU(), nn.Linear(2 * dim, dim, device=device)
        )
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, follows: Tensor) -> Tensor:
        """[W, M, D] of sequences cut into windows of M places, which is the reach: what a window's places
        attend to lies in it and in the one before.

        Args:
            x: [W, M, D].
            follows: [W] bool: does the window go on where the one before ends?
        """
        reach = x.shape[1]
        places = torch.arange(2 * reach, device=x.device)
        apart = places[reach:].unsqueeze(1) - places
        bias = self.distance[:, apart.clamp(0, reach - 1)]
        bias = bias.masked_fill((apart < 0) | (apart >= reach), -torch.inf)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.attention(self.attention_norm(x)).chunk(3, -1)
        )
        key, value = (torch.cat([part.roll(1, 0), part], 2) for part in (key, value))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + bias
        elsewhere = ~follows.unsqueeze(1) & (places < reach)
        scores = scores.masked_fill(elsewhere[:, None, None], -torch.inf)
        found = scores.softmax(-1).to(value.dtype) @ value
        x = x + self.dropout(self.attended(found.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.feed_forward(self.forward_norm(x)))


class Encoder(nn.Module):
    """What a transformer makes of a history in the place of its last item, as SASRec (Kang and McAuley 2018).

    Its blocks together look back on no more items than the history has. So a user's events one after the
    other, whose histories overlap, are one sequence, which is encoded once, and each event reads off what
    the same blocks would make of its own history.

    Args:
        last: L.
        blocks: one upon the other.
        dim: D.
        heads: of each block's attention; a divisor of D.
        dropout: share of the inputs and of every part's result that is left out.
        device: of the parameters.
    """

    def __init__(
        self,
        last: int,
        blocks: int,
        dim: int,
        heads: int,
        dropout: float,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.reach = 1 + (last - 1) // blocks
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(self.reach, dim, heads, dropout, device) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim, device=device)
        self.output = nn.Linear(dim, dim, device=device)

    def forward(self, history: Tensor, there: Tensor, starts: Tensor | None = None) -> Tensor:
        """[N, D], 0 of an empty history.

        Args:
            history: [N, L, D] embeddings.
            there: [N, L] bool: is there an item?
            starts: [N] bool: whose row has all of its history; the others have what comes after that of the
                row before. None: all.
        """
        new = there.sum(1)
        if not len(new):
            return history[:, 0]
        if starts is None:
            starts = torch.ones_like(new, dtype=torch.bool)
        until = new.cumsum(0)
        begins = (until - new)[starts]
        sequence = starts.cumsum(0) - 1
        length = torch.diff(begins, append=until[-1:])
        # Each sequence in windows of its own.
        windows = (length + self.reach - 1) // self.reach
        first = windows.cumsum(0) - windows
        own = torch.arange(len(begins), device=new.device).repeat_interleave(length)
        items = history[there]
        place = torch.arange(len(items), device=new.device) + (first * self.reach - begins)[own]
        number = max(1, int(windows.sum()))
        x = items.new_zeros(number * self.reach, items.shape[1]).index_put((place,), items)
        follows = torch.ones(number, dtype=torch.bool, device=new.device)
        follows[first[windows > 0]] = False
        x = self.dropout(x).unflatten(0, (number, self.reach))
        for block in self.blocks:
            x = block(x, follows)
        x = self.output(self.norm(x)).flatten(0, 1).float()
        seen = until - begins[sequence]
        at = (first[sequence] * self.reach + seen - 1).clamp(0, len(x) - 1)
        return x[at] * (seen > 0).unsqueeze(1)

    def shares(self, history: Tensor, there: Tensor) -> Tensor:
        """[N, L, D]: what the result would lose if the history had gone without the item.

        Args:
            history: as in forward.
            there: likewise.
        """
        whole, shares = self(history, there), []
        for place in range(history.shape[1]):
            without = there.clone()
            without[:, place] = False
            shares.append(whole - self(history, without))
        return torch.stack(shares, 1)


class PairHead(nn.Module):
    """What pair fields make of a logit: logit + w . x + MLP(x), where x are the fields and the logit itself,
    standardised; so it may also take from what the logit says.

    Args:
        fields: P.
        hidden: widths of the MLP's layers.
        device: of the parameters.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, fields: int, hidden: Sequence[int], device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(fields + 1, device=device))
        self.register_buffer("deviation", torch.ones(fields + 1, device=device))
        self.linear = nn.Linear(fields + 1, 1, bias=False, device=device)
        layers: list[nn.Module] = []
        for before, width in zip((fields + 1, *hidden), hidden, strict=False):
            layers += [nn.Linear(before, width, device=device), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[-1], 1, device=device))

    def forward(self, pair: Tensor, logit: Tensor) -> Tensor:
        """[...] float32.

        Args:
            pair: [..., P] the fields.
            logit: [...].
        """
        with torch.autocast(pair.device.type, enabled=False):
            logit = logit.float()
            x = (torch.cat([pair, logit.unsqueeze(-1)], dim=-1) - self.mean) / self.deviation
            return logit + (self.linear(x) + self.layers(x)).squeeze(-1)


def recency(age: Tensor, decay: float) -> Tensor:
    """Weights [..., L], of sum 1, that fall with the age: exp(-age / decay); 0 where there is no item.

    Args:
        age: [..., L] as in Attention.
        decay: items after which one counts 1/e.
    """
    weights = torch.exp(-age / decay).masked_fill(age < 0, 0)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1)
