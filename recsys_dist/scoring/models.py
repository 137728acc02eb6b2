"""The models of a night, loaded from their runs and put together as Scorers."""

from dataclasses import dataclass

import torch

from recsys_dist import config
from recsys_dist.config import LINEAR
from recsys_dist.deepfm.items import Items
from recsys_dist.deepfm.pairs import Pairs
from recsys_dist.deepfm.published import load_parts
from recsys_dist.errors import ConfigError
from recsys_dist.recall.factors import FactorTables
from recsys_dist.scoring.reasons import Standing
from recsys_dist.scoring.scorers import (
    FM,
    Content,
    Exhaustive,
    Factors,
    Linear,
    Neighbors,
    NextItems,
    Popularity,
    Ranker,
    Recent,
    Scorer,
    Source,
    TwoStage,
)
from recsys_dist.workspace import Run


@dataclass(frozen=True)
class Models:
    """Everything that lists are made with."""

    items: Items
    """Of the features run."""
    ranker: Ranker
    sources: dict[str, Scorer]
    """Recall sources by the names used in score.candidates."""
    two_stage: TwoStage
    published: TwoStage
    """What makes the published lists: `two_stage`, or (score.mode=exhaustive) one whose only source is the
    model itself."""
    standing: Standing
    """Of an item for which no history speaks."""

    def all(self) -> dict[str, Scorer]:
        """Every model by the name it has in metrics.json."""
        return {
            "popularity": self.sources["popularity"],
            "recent": self.sources["recent"],
            "als": self.sources["als"],
            "next_items": self.sources["next_items"],
            "neighbors": self.sources["neighbors"],
            **{name: self.sources[name] for name in (*LINEAR, "content", "fm") if name in self.sources},
            "deepfm": Exhaustive(self.ranker),
            "two_stage": self.two_stage,
        }


def load_ranker(
    inputs: dict[str, Run], items: Items, most: int | None = None, factors: FactorTables | None = None
) -> Ranker:
    """Load the model of these runs (features, deepfm; recall and als, where its pair fields are of them) on
    torch's default device.

    Args:
        inputs: by stage.
        items: of the features run.
        most: tables of users of more bytes are not held, but read for the users of a batch.
        factors: of the als run, where they are there already.
    """
    model, rows = load_parts(inputs["deepfm"], items.spec, torch.get_default_device(), most)
    pairs = Pairs(model.pair_fields, items, inputs, factors=factors, most=most) if model.pair_fields else None
    own = items if model.spec.fields == items.spec.fields else Items(inputs["features"], model.spec)
    return Ranker(model, own, pairs, rows)


def load_models(inputs: dict[str, Run], score: config.Score) -> Models:
    """Load the models of these runs (features, als, recall, deepfm), on torch's default device.

    Raises:
        ConfigError: a source is asked for that the model does not have, or all items to be ranked by pair
            fields.
    """
    features = inputs["features"]
    spec = features.spec()
    items = Items(features, spec)
    most = score.users_megabytes << 20
    factors = FactorTables.read(spec, inputs["als"], most=most)
    ranker = load_ranker(inputs, items, most, factors)
    model = ranker.model
    recent = Recent(spec, inputs["recall"])
    sources: dict[str, Scorer] = {
        "als": Factors(factors),
        "next_items": NextItems(spec, inputs["recall"]),
        "neighbors": Neighbors(spec, inputs["recall"]),
        "popularity": Popularity(items),
        "recent": recent,
    }
    fitted = inputs["recall"].manifest["config"]["recall"]["linear"]
    sources |= {name: Linear(spec, inputs["recall"], name) for name in fitted}
    if spec.attributes(None, "recall.content"):
        sources["content"] = Content(items, inputs["recall"])
    if model.linear:
        sources["fm"] = FM(ranker)
    why: dict[str, str] = {
        "fm": f"the model of {inputs['deepfm'].uri} is a {model.settings.model}",
        "content": f"{features.uri} has no categorical field of side item",
        **dict.fromkeys(LINEAR, f"it is not in recall.linear of {inputs['recall'].uri}"),
    }
    missing = [f"{name}, since {why[name]}" for name in score.candidates if name not in sources]
    if missing:
        raise ConfigError(
            f"score.candidates: there is no {', and no '.join(missing)}; sources are {', '.join(sources)}"
        )
    chosen: dict[str, Source] = {
        name: Source(sources[name], of.quota, of.weight) for name, of in score.candidates.items()
    }
    two_stage = published = TwoStage(chosen, ranker, score.most)
    if score.mode == "exhaustive":
        if model.pair_fields:
            raise ConfigError(
                f"score.mode=exhaustive is for models without pair fields, and {inputs['deepfm'].uri} was "
                f"trained with deepfm.pair: {', '.join(field.name for field in model.pair_fields)}. Train "
                f"without, or set score.mode to two_stage."
            )
        published = TwoStage({"deepfm": Source(Exhaustive(ranker), max(score.k, two_stage.width))}, ranker)
    return Models(items, ranker, sources, two_stage, published, Standing(items, recent))
