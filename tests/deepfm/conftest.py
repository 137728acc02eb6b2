"""What several files of this folder begin with."""

import pytest

from tests.models import PAIR, random_recall
from tests.synthetic import synthetic_config, synthetic_features


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """A configuration with pair fields, a features run, and a recall run with random tables."""
    config = synthetic_config(tmp_path_factory.mktemp("root"), pair=PAIR)
    features = synthetic_features(config)
    return config, features, random_recall(config, features)
