"""Statistics of scores [S, E]: seeds in rows, start states in columns.

All seeds of a grid cell are rolled out from the same start states, so the interval of a
mean resamples rows and columns jointly (a crossed bootstrap): resampled apart, a start
state that is hard for every seed would count as S independent episodes. With three
seeds such an interval is still a little too narrow.
"""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000


def draws(scores: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means of `RESAMPLES` crossed resamples of scores [S, E]."""
    generator = np.random.default_rng(seed)
    seeds, episodes = scores.shape
    rows = generator.integers(seeds, size=(RESAMPLES, seeds, 1))
    columns = generator.integers(episodes, size=(RESAMPLES, 1, episodes))
    return scores[rows, columns].mean((1, 2))


def interval(scores: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of scores [S, E]."""
    return _ends(draws(scores))


def interval_of_mean(groups: Sequence[np.ndarray]) -> tuple[float, float]:
    """95 % interval of the mean over tasks that share no seeds and no start states."""
    return _ends(np.mean([draws(group, i) for i, group in enumerate(groups)], axis=0))


def interquartile_mean(scores: np.ndarray) -> float:
    """Mean of the middle half of all scores (Agarwal et al. 2021)."""
    ordered = np.sort(scores, axis=None)
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def describe(scores: np.ndarray) -> dict[str, float]:
    """Mean with its interval, and interquartile mean."""
    low, high = interval(scores)
    iqm = interquartile_mean(scores)
    return {"mean": float(scores.mean()), "low": low, "high": high, "iqm": iqm}


def _ends(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
