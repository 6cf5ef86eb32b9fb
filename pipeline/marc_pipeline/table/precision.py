"""Rounding of stored float32 vectors to fewer mantissa bits. The column type itself is in the table's schema."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from marc_schemas.feature_table import MANTISSA_BITS

EXPONENT = np.uint32(0x7F80_0000)
MAGNITUDE = np.uint32(0x7FFF_FFFF)

Floats = NDArray[np.float32]


def round_mantissas(values: Floats, bits: int) -> Floats:
    """Return a copy of ``values``, rounded to ``bits`` explicit mantissa bits, ties to even.

    The error is at most half a unit in the last place, which is ``2^-(bits + 1)`` relative to a normal number. A value
    that would round to infinity becomes the largest number at that precision. Signs stay, also of zeros. Infinities
    and NaN are unchanged, so that the audit finds them.

    Args:
        values: float32 of any shape.
        bits: 1 to 23; 23 is the whole mantissa.

    Raises:
        ValueError: ``bits`` is out of range.
    """
    if not 1 <= bits <= MANTISSA_BITS:
        raise ValueError(f"a float32 has 1 to {MANTISSA_BITS} mantissa bits, not {bits}")
    dropped = MANTISSA_BITS - bits
    pattern = values.view(np.uint32)
    if not dropped:
        return pattern.copy().view(np.float32)
    kept = np.uint32(-(1 << dropped) & 0xFFFF_FFFF)
    # Bit patterns without the sign sort like the numbers, so a carry out of the mantissa correctly raises the exponent.
    rounded = pattern & MAGNITUDE
    is_odd = (rounded >> np.uint32(dropped)) & np.uint32(1)
    rounded += is_odd + np.uint32((1 << (dropped - 1)) - 1)
    rounded &= kept
    np.minimum(rounded, (EXPONENT - np.uint32(1)) & kept, out=rounded)
    rounded |= pattern & ~MAGNITUDE
    return np.where((pattern & EXPONENT) == EXPONENT, pattern, rounded).view(np.float32)


def rounding_error(bits: int) -> float:
    """Return the largest relative error of rounding a normal number; it also bounds the error of a vector's length."""
    return 0.0 if bits == MANTISSA_BITS else 2.0 ** -(bits + 1)


def round_vectors(rows: pa.Table, bits: int) -> pa.Table:
    """Return rows with the column ``vector`` (fixed-size lists of float32, no nulls) rounded to ``bits``."""
    if bits == MANTISSA_BITS:
        return rows
    field = rows.schema.field("vector")
    values = round_mantissas(rows["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False), bits)
    rounded = pa.FixedSizeListArray.from_arrays(pa.array(values), type=field.type)
    return rows.set_column(rows.schema.get_field_index("vector"), field, rounded)
