"""The models of a night, loaded from their runs and put together as Scorers."""

from dataclasses import dataclass

from recsys_dist import config
from recsys_dist.deepfm.items import Items
from recsys_dist.deepfm.model import load
from recsys_dist.scoring.scorers import FM, Exhaustive, Factors, Popularity, Ranker, Scorer, TwoStage
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

    def all(self) -> dict[str, Scorer]:
        """Every model by the name it has in metrics.json."""
        return {
            "popularity": self.sources["popularity"],
            "als": self.sources["als"],
            "fm": self.sources["fm"],
            "deepfm": Exhaustive(self.ranker),
            "two_stage": self.two_stage,
        }


def load_models(inputs: dict[str, Run], score: config.Score) -> Models:
    """Load the models of these runs (features, als, deepfm)."""
    features = inputs["features"]
    spec = features.spec()
    items = Items(features, spec)
    ranker = Ranker(load(inputs["deepfm"], spec), items)
    sources: dict[str, Scorer] = {
        "als": Factors(spec, inputs["als"].table("user_factors"), inputs["als"].table("item_factors")),
        "fm": FM(ranker),
        "popularity": Popularity(items),
    }
    chosen: dict[str, tuple[Scorer, int]] = {
        name: (sources[name], quota) for name, quota in score.candidates.items()
    }
    return Models(items, ranker, sources, TwoStage(chosen, ranker))
