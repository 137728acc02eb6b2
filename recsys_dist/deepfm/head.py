"""What pair fields are worth beside a model's logit, learned on lists: of users as of a moment, by tables and
a model that know of nothing later, with what these users then had. The moment is when their late events
begin, or, where the model is fitted on train and valid in the end, the valid part.

A list holds what the pair fields put first, the user's later events, and a sample of all other items, which
count for those that are not there; in a small catalogue it holds all. The loss is the cross entropy of each
later event among all items.

Legend: U users, I items (index 0 is unknown), C entries of a list, P pair fields.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn

from recsys_dist.config import SINCE, Config
from recsys_dist.deepfm.checkpoint import load_weights
from recsys_dist.deepfm.held_out import HeldOut
from recsys_dist.deepfm.items import Items
from recsys_dist.deepfm.late import Early, late_users
from recsys_dist.deepfm.layers import PairHead
from recsys_dist.deepfm.model import PAIR_HEAD, DeepFM, used_fields
from recsys_dist.deepfm.not_finite import diverged
from recsys_dist.deepfm.pairs import Pairs
from recsys_dist.deepfm.validation import CHUNK, Ranking, users_of_part
from recsys_dist.errors import DataError
from recsys_dist.workspace import STAGES, Run

ENTRIES = 1024
"""C."""
MOST_USERS = 20_000
"""An MLP of a few thousand weights learns no more from more lists."""
NUMBERS = 1 << 28
"""Of all lists, at most: 1 GiB."""
SOON = 4.0
"""A late event that so many others of its user came before counts 1/e: there are more of them than a list is
made for."""
LATER_EVENTS = 64
"""Of a user that are learned from: the next late one would count less than 1e-6."""

EPOCHS = 16
LISTS = 32
"""Lists a step."""
STANDARDISED = 2000
"""Lists of which mean and deviation of the inputs are taken."""
LEARNING_RATE = 3e-3
HELD_OUT = 0.1
"""Share of the lists that decides which epoch's weights are kept."""


class Lists(NamedTuple):
    """Lists with later events."""

    inputs: Tensor
    """[U, C, P + 1] float32: the pair fields and the logit."""
    stands_for: Tensor
    """[U, C] float32: log of how many items an entry stands for; -inf for none."""
    weight: Tensor
    """[U, C] float32: of the later events, 0 of other entries; of each user with sum 1, or 0 where he has
    none that may be listed."""


def most_users(fields: int, n_items: int) -> int:
    """How many users lists are made of, at most."""
    return max(1, min(MOST_USERS, NUMBERS // (min(ENTRIES, n_items) * (fields + 1))))


@torch.no_grad()
def lists(model: DeepFM, pairs: Pairs, users: HeldOut, soon: float, seed: int) -> Lists:
    """The lists of users.

    Args:
        model: without pair fields, fitted on nothing later than the users' states; in eval mode.
        pairs: by tables that know as little.
        users: and their later events.
        soon: an event that so many others of its user came before counts 1/e.
        seed: of the sample.
    """
    device = next(model.parameters()).device
    number, size = len(users), len(users.items) + 1
    entries = min(ENTRIES, size)
    fields = len(pairs.fields)
    made = Lists(
        torch.zeros(number, entries, fields + 1),
        torch.full((number, entries), -torch.inf),
        torch.zeros(number, entries),
    )
    generator = torch.Generator().manual_seed(seed)
    proposing = [
        column
        for column, field in enumerate(pairs.fields)
        if field.of not in (*SINCE, "share") and not field.rank
    ]
    at_once = max(1, CHUNK // max(size * (fields + 1), entries * model.width))
    everything = torch.arange(size)
    for first, last in users.groups:
        catalogue = model.item_side(users.items.at(everything, users.days[first : first + 1]).to(device))
        for start in range(first, last, at_once):
            stop = min(start + at_once, last)
            pair = pairs.of_all(users.state.slice(start, stop - start))
            allowed = users.allowed(start, stop)
            weight = _later_events(users, start, stop, allowed, soon)
            items, stands_for = _entries(pair[..., proposing], allowed, weight > 0, generator)
            rows = torch.arange(start, stop)
            user = model.user_side(users.user.take(rows).to(device)).leading(-1, 1)
            logit = model.logits(user, catalogue.take(items.to(device)))
            made.inputs[rows, :, :fields] = pair.gather(1, items.unsqueeze(-1).expand(-1, -1, fields))
            made.inputs[rows, :, fields] = logit.float().cpu()
            made.stands_for[rows] = stands_for
            made.weight[rows] = weight.gather(1, items)
    return made


def _later_events(users: HeldOut, start: int, stop: int, allowed: Tensor, soon: float) -> Tensor:
    """[U, I] what each item counts that a user had later, of each user with sum 1."""
    rows, items, place = users.relevant(start, stop)
    few = place < min(LATER_EVENTS, max(1, ENTRIES // 4))
    rows, items, place = rows[few], items[few], place[few]
    weight = torch.zeros(allowed.shape)
    weight.index_put_((rows, items), torch.exp(-place / soon).float(), accumulate=True)
    weight *= allowed
    return weight / weight.sum(1, keepdim=True).clamp(min=1e-30)


def _entries(
    proposals: Tensor, allowed: Tensor, own: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """[U, C] the items of the lists, and [U, C] log of how many items each stands for, -inf for none.

    Args:
        proposals: [U, I, S] what some fields say of the items: half of a list's entries are of the greatest.
        allowed: [U, I] bool.
        own: [U, I] bool: which are there anyhow.
        generator: of the sample.
    """
    number, size, sources = proposals.shape
    entries = min(ENTRIES, size)
    certain = own.clone()
    if sources:
        each = min(max(1, entries // 2 // sources), size)
        best = proposals.masked_fill(~allowed.unsqueeze(-1), -torch.inf).topk(each, dim=1).indices
        certain.scatter_(1, best.flatten(1), True)
    certain &= allowed
    # The certain ones first, then others in an order of chance.
    keys = torch.rand(number, size, generator=generator).masked_fill_(certain, 2.0)
    found = keys.masked_fill_(~allowed, -1.0).topk(entries)
    others = (allowed & ~certain).sum(1, keepdim=True)
    drawn = ((found.values >= 0) & (found.values < 2)).sum(1, keepdim=True)
    each_stands_for = (others / drawn.clamp(min=1)).log()
    stands_for = torch.where(found.values == 2, 0.0, each_stands_for)
    return found.indices, stands_for.masked_fill(found.values < 0, -torch.inf)


class Fitted(NamedTuple):
    """A head and how it came about."""

    head: PairHead
    epoch: int
    """Whose weights these are, from 1; 0: those it began with, which add nothing."""
    loss: float | None
    """Of the lists held out, in that epoch; None where there are none."""
    before: float | None
    """Of them with the logit alone."""


def fit(made: Lists, head: PairHead, seed: int) -> Fitted:
    """Fit a head to lists by Adam, its rate falling to 0 along a cosine; the epoch is kept in which the lists
    held out have the least loss. Where none is held out, of fewer than ten, the last one.

    Args:
        made: the lists.
        head: its initial weights.
        seed: of which lists are held out, and of the order of the others.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out, learned = _held_out(len(made.weight), generator)
    some = learned[:STANDARDISED]
    inputs = made.inputs[some][made.stands_for[some] > -torch.inf]
    head.mean.copy_(inputs.mean(0))
    # What says the same of everything says nothing, and its deviation is what rounding left of it.
    deviation = inputs.std(0, correction=0)
    head.deviation.copy_(torch.where(deviation > 1e-6 * inputs.abs().amax(0), deviation, 1.0))
    optimizer = torch.optim.Adam(head.parameters(), LEARNING_RATE)
    steps = EPOCHS * -(-len(learned) // LISTS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    before = best = _loss_of(made, held_out, head)
    epoch, state = 0, _copy(head)
    for number in range(1, EPOCHS + 1):
        for rows in learned[torch.randperm(len(learned), generator=generator)].split(LISTS):
            optimizer.zero_grad()
            _loss(made, rows, head).backward()
            optimizer.step()
            schedule.step()
        loss = _loss_of(made, held_out, head)
        if loss is None or best is None or loss < best:
            epoch, best, state = number, loss, _copy(head)
    head.load_state_dict(state)
    return Fitted(head, epoch, best, before)


def _held_out(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which of so many lists are held out, and the others."""
    order, few = torch.randperm(number, generator=generator), int(HELD_OUT * number)
    return order[:few], order[few:]


def _loss(made: Lists, rows: Tensor, head: nn.Module) -> Tensor:
    """The mean of some lists' losses: the cross entropy, weighted, of the later events among all items."""
    inputs, weight = made.inputs[rows], made.weight[rows]
    score = head(inputs[..., :-1], inputs[..., -1])
    among = (score + made.stands_for[rows]).logsumexp(1, keepdim=True)
    return (weight * (among - score)).sum(1).mean()


@torch.no_grad()
def _loss_of(made: Lists, rows: Tensor, head: nn.Module) -> float | None:
    if not len(rows):
        return None
    return sum(float(_loss(made, some, head)) * len(some) for some in rows.split(LISTS)) / len(rows)


def _copy(head: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in head.state_dict().items()}


def learn(
    config: Config, inputs: Mapping[str, Run], early: Path | None, whole: Path, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Learn the head of the pair fields, and measure it on valid: with lists of the late events on the sample
    of users that a training is measured with, with lists of valid on the users held out.

    Args:
        config: with the pair fields.
        inputs: by stage: features, and the runs with the tables, of `require_earlier`.
        early: the checkpoint of a model without pair fields, fitted on the early events of train; None: the
            lists are of valid.
        whole: of one that is fitted on all of train.
        device: where logits are computed.

    Returns:
        The head's part of a model's state_dict; and what is told of it.

    Raises:
        DataError: there are no later events, or a number of a table is not finite.
        ConfigError: a logit is not finite.
    """
    features, recall = inputs["features"], inputs["recall"]
    before_late = Early(features, recall) if early else None
    settings = config.deepfm
    spec = used_fields(features.spec(), settings)
    fields = spec.side("pair")
    bare = config.with_deepfm({"pair": ()}).deepfm
    model = DeepFM(used_fields(features.spec(), bare), bare)
    load_weights(early or whole, model.state_dict())
    model = model.to(device).eval()
    items = Items(features, spec)
    # Pair fields read what they read also where the model leaves it out, as when lists are scored.
    every = Items(features, features.spec())
    most = most_users(len(fields), len(items))
    held = config.score.users_megabytes << 20
    known = Pairs(fields, every, inputs, "train", most=held)
    if before_late:
        users = late_users(items, features, recall, before_late, config, most)
        made = lists(model, Pairs(fields, every, inputs, "early", most=held), users, SOON, config.seed)
    else:
        users = users_of_part(features, items, config, "valid", most)
        made = lists(model, known, users, np.inf, config.seed)
    wrong = ~made.inputs.isfinite().all((0, 1))
    for field in (field for field, of in zip(fields, wrong, strict=False) if of):
        stage = "als" if field.of == "als" else "recall"
        raise DataError(
            f"{inputs[stage].uri}: the pair field {field.name} has numbers that are not finite. Run "
            f"jobs/{STAGES[stage].job} --force."
        )
    if wrong[-1]:
        raise diverged(f"{(early or whole).name} has logits that are not finite", model)
    only = None
    if not early:
        held_out, learned = _held_out(len(users), torch.Generator().manual_seed(config.seed))
        rows = held_out if len(held_out) else learned
        only = users.state["user"].combine_chunks().take(pa.array(rows.numpy()))
    with torch.random.fork_rng(devices=[]):
        model = DeepFM(spec, settings, seed=config.seed)
    state = model.state_dict()
    load_weights(whole, {name: tensor for name, tensor in state.items() if not name.startswith(PAIR_HEAD)})
    valid = Ranking(features, items, config, paired=known, only=only)
    with _alone(device):
        without = valid.ndcg(model.to(device), device)  # at first the head adds nothing
        found = fit(made, model.pair_head.to("cpu"), config.seed)
        measured = valid.ndcg(model.to(device), device)
    told = {
        valid.metric: measured,
        "without": without,
        "measured_on": len(valid),
        "lists": len(users),
        "of": "late" if early else "valid",
        "epoch": found.epoch,
        "loss": found.loss,
        "loss_without": found.before,
    }
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(PAIR_HEAD)}, told


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """A process group of this process."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
