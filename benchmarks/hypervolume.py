"""Fronts of two figures that should both be small: what area points dominate, and which few hold most of it."""

from collections.abc import Sequence

from safeglasses.measure.front import dominated

Place = tuple[float, float]


def hypervolume(points: Sequence[Place], reference: Place) -> float:
    """Share of the rectangle from the origin to the reference that some point dominates, 0 to 1.

    Points beyond the reference count nothing. The staircase is walked from the smallest first coordinate on.
    Source: Zitzler & Thiele 1998, "Multiobjective optimization using evolutionary algorithms".
    """
    area, low = 0.0, reference[1]
    inside = sorted(p for p in points if p[0] < reference[0] and p[1] < reference[1])
    for index, (x, y) in enumerate(inside):
        low = min(low, y)
        end = inside[index + 1][0] if index + 1 < len(inside) else reference[0]
        area += (end - x) * (reference[1] - low)
    return area / (reference[0] * reference[1])


def most(points: Sequence[Place], reference: Place, k: int) -> list[int]:
    """At most `k` undominated points, each added because it adds most area; ties go to the earlier one.

    Greedy, which holds at least 1 − 1/e of the most that `k` points can: the area is submodular.
    """
    left = [i for i, lost in enumerate(dominated(points)) if not lost]
    kept: list[int] = []
    while left and len(kept) < k:
        best = max(left, key=lambda i: hypervolume([points[j] for j in (*kept, i)], reference))
        kept.append(best)
        left.remove(best)
    return kept
