"""Ratings drawn from a latent-factor model, for use without data."""

from __future__ import annotations

import numpy as np

from mlframework.tasks.few_shot import check_at_least
from mlframework.tasks.ratings.source import Ratings, RatingSource, Value

__all__ = ["LatentFactors"]

#: Standard deviations of a user's and an item's offset, and of the noise of a single rating, in stars.
USER, ITEM, NOISE = 0.5, 0.5, 0.7


class LatentFactors(RatingSource):
    """Draws ratings `3.5 + b_u + b_i + <p_u, q_i> + noise`, rounded to 1, ..., 5 stars.

    An item has one or two genres; its factors `q_i` are the mean of its genres' factors and a part of its own. A user
    has an age group, whose factors are a part of `p_u`. So attributes tell something of a rating, and a user's own
    ratings tell more. Items differ in popularity, and users in their number of ratings.

    Args:
        users, items: how many.
        factors: the size of `p_u` and `q_i`.
        genres: how many.
        seed: of the draws.

    >>> ratings = LatentFactors(users=3, items=40, seed=0).read()
    >>> len({user for user, _, _ in ratings.triples}), sorted({rating for _, _, rating in ratings.triples})
    (3, [1.0, 2.0, 3.0, 4.0, 5.0])
    """

    def __init__(
        self, *, users: int = 600, items: int = 300, factors: int = 4, genres: int = 12, seed: int = 0
    ) -> None:
        check_at_least(1, users=users, factors=factors, genres=genres)
        check_at_least(30, items=items)
        self.users, self.items, self.factors, self.genres, self.seed = users, items, factors, genres, seed

    def read(self) -> Ratings:
        rng = np.random.default_rng(self.seed)
        scale = self.factors**-0.25  # <p, q> has variance 1
        of_genre, of_group = (rng.normal(size=(n, self.factors)) * scale for n in (self.genres, 5))
        genres = [
            rng.choice(self.genres, size=min(self.genres, 1 + int(rng.integers(2))), replace=False)
            for _ in range(self.items)
        ]
        groups = rng.integers(5, size=self.users)
        q = np.stack([of_genre[found].mean(0) for found in genres]) + 0.5 * scale * rng.normal(
            size=(self.items, self.factors)
        )
        p = 0.5 * of_group[groups] + 0.8 * scale * rng.normal(size=(self.users, self.factors))
        offsets = rng.normal(size=self.users)[:, None] * USER + rng.normal(size=self.items) * ITEM
        stars = 3.5 + offsets + p @ q.T + NOISE * rng.normal(size=(self.users, self.items))
        stars = np.clip(np.round(stars), 1, 5)
        popularity = 1 / np.arange(1, self.items + 1) ** 0.7
        counts = rng.integers(13, 1 + min(60, self.items // 2), size=self.users)
        triples = []
        for user, count in enumerate(counts):
            rated = rng.choice(self.items, size=count, replace=False, p=popularity / popularity.sum())
            triples += [(f"u{user}", f"i{item}", float(stars[user, item])) for item in rated]
        users: dict[str, dict[str, Value]] = {f"u{user}": {"age_group": f"group {g}"} for user, g in enumerate(groups)}
        items: dict[str, dict[str, Value]] = {
            f"i{item}": {"genres": tuple(f"genre {g}" for g in sorted(found))} for item, found in enumerate(genres)
        }
        return Ratings(triples, users, items)
