"""Sample quality in a classifier's feature space. Features are (N, F) float arrays, one row an image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import eigvals
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors


def frechet_distance(first: np.ndarray, second: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two feature sets (Heusel et al. 2017, section 3).

    weights: how much each row of the first counts (None: all alike).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); the trace of the root is the sum of the roots of C1 C2's eigenvalues.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    means = np.average(first, axis=0, weights=weights) - second.mean(0)
    one, two = np.cov(first, rowvar=False, aweights=weights), np.cov(second, rowvar=False)
    root_trace = np.sqrt(eigvals(one @ two).real.clip(min=0)).sum()
    return float(means @ means + np.trace(one) + np.trace(two) - 2 * root_trace)


def covered(support: np.ndarray, queries: np.ndarray, k: int = 3) -> np.ndarray:
    """(Q,) bool: which queries lie within the k-nearest-neighbour manifold of `support`.

    Precision is the mean of covered(real, generated), recall of covered(generated, real), on sets of equal size
    (Kynkäänniemi et al. 2019, equations 1 and 2).
    """
    neighbours = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(support)  # each is its own nearest
    radii = neighbours.kneighbors(support)[0][:, -1]
    chunks = pairwise_distances_chunked(queries, support, reduce_func=lambda part, _start: (part <= radii).any(axis=1))
    return np.concatenate(list(chunks))


def imbalance(predicted: np.ndarray, wanted: np.ndarray, classes: int = 10) -> float:
    """Total variation between two label distributions: 0 is the same balance, 1 nothing in common."""
    shares = [np.bincount(labels, minlength=classes) / len(labels) for labels in (predicted, wanted)]
    return float(abs(shares[0] - shares[1]).sum() / 2)


def bootstrap(
    statistic: Callable[[np.ndarray], float], sample: np.ndarray, repeats: int = 50, strata: np.ndarray | None = None
) -> float:
    """Standard error of `statistic(sample)` by resampling the sample's rows `repeats` times, from a fixed seed.

    strata: (N,), if the number of rows of each of its values was chosen and not chance: a row is then replaced by one
    of its own stratum.
    """
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(sample), (repeats, len(sample)))
    for stratum in () if strata is None else np.unique(strata):
        own = np.flatnonzero(strata == stratum)
        picks[:, own] = rng.choice(own, (repeats, len(own)))
    return float(np.std([statistic(sample[rows]) for rows in picks], ddof=1))
