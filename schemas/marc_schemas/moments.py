"""Moments: sums from which the mean and the variance of a set of vectors are computed."""

from collections.abc import Sequence

from marc_schemas.files import Contract


class Moments(Contract):
    """Sums over a set of vectors. Moments of disjoint sets can be added.

    Attributes:
        rows: number of vectors.
        vector_sum: sum of the vectors, length d.
        square_sum: sum of the squared norms.
    """

    rows: int
    vector_sum: tuple[float, ...]
    square_sum: float

    @classmethod
    def of(cls, rows: int, mean: Sequence[float], variance: float) -> "Moments":
        """Return the moments of ``rows`` vectors with this mean (length d) and this trace of the covariance."""
        square = variance + sum(x * x for x in mean)
        return cls(rows=rows, vector_sum=tuple(rows * x for x in mean), square_sum=rows * square)

    def __add__(self, other: "Moments") -> "Moments":
        """Return the moments of the union of two disjoint sets."""
        return self._combined(other, 1)

    def __sub__(self, other: "Moments") -> "Moments":
        """Return the moments of the set without a subset."""
        return self._combined(other, -1)

    def _combined(self, other: "Moments", sign: int) -> "Moments":
        pairs = zip(self.vector_sum, other.vector_sum, strict=True)
        return Moments(
            rows=self.rows + sign * other.rows,
            vector_sum=tuple(mine + sign * theirs for mine, theirs in pairs),
            square_sum=self.square_sum + sign * other.square_sum,
        )

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean vector, length d; zeros for an empty set."""
        return tuple(x / max(1, self.rows) for x in self.vector_sum)

    @property
    def variance(self) -> float:
        """Trace of the covariance."""
        return max(0.0, self.square_sum / max(1, self.rows) - sum(x * x for x in self.mean))
