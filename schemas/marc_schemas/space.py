"""The shape of a space of vectors: how many directions it uses, and how much its vectors point the same way."""

from marc_schemas.files import Contract


class SpaceShape(Contract):
    """Figures about vectors [n, d] at unit length.

    Attributes:
        effective_rank: exp of the entropy (nats) of the normalised eigenvalues of the covariance, from 1 to d; 0 if
            all vectors are equal. Roy and Vetterli 2007, The effective rank (EUSIPCO).
        first_share: share of the variance along the first principal direction, from 1/d to 1; 0 if all vectors are
            equal.
        mean_cosine: mean cosine of two different random vectors.
    """

    effective_rank: float
    first_share: float
    mean_cosine: float

    def described(self, dim: int) -> str:
        """Return the figures as one short line; ``dim`` is d."""
        return (
            f"effective rank {self.effective_rank:.1f} of {dim}, first component {100 * self.first_share:.1f} %, "
            f"mean cosine {self.mean_cosine:.3f}"
        )
