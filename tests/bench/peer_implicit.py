"""implicit's top-K with what is seen left out: run with the Python of .venv/peers.

    .venv/peers/bin/python -P tests/bench/peer_implicit.py FOLDER K THREADS

FOLDER has users.npy, items.npy [., rank] and seen.npy [users, seen]. Prints JSON: the seconds it took.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from implicit.cpu.als import AlternatingLeastSquares
from scipy.sparse import csr_matrix


def main(folder: Path, k: int, threads: int) -> float:
    """The seconds of one run over all users."""
    users, items, seen = (np.load(folder / f"{name}.npy") for name in ("users", "items", "seen"))
    rows = np.repeat(np.arange(len(users)), seen.shape[1])
    liked = csr_matrix((np.ones(seen.size, np.float32), (rows, seen.ravel())), (len(users), len(items)))
    model = AlternatingLeastSquares(num_threads=threads)
    model.user_factors, model.item_factors = users, items
    begin = time.perf_counter()
    model.recommend(np.arange(len(users)), liked, N=k, filter_already_liked_items=True)
    return time.perf_counter() - begin


if __name__ == "__main__":
    print(json.dumps({"seconds": main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))}))
