"""How precisely vectors are stored: float32 rounded to fewer mantissa bits, whose zeros then compress."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from marc_schemas.feature_table import MANTISSA_BITS

EXPONENT = np.uint32(0x7F80_0000)
MAGNITUDE = np.uint32(0x7FFF_FFFF)

Floats = NDArray[np.float32]


def round_mantissas(values: Floats, bits: int) -> Floats:
    """Values of any shape rounded to so many explicit mantissa bits, ties to even; a copy.

    A number is off by half a unit in the last place that is left at most, which is ``2^-(bits + 1)`` of a normal one.
    What would round to infinity becomes the largest number there is at that precision. Signs stay, also of zeros;
    infinities and NaN stay as they are, for the audit to find.

    Args:
        values: float32.
        bits: from 1 to 23, the whole mantissa.

    Raises:
        ValueError: there are no floats of so many bits.
    """
    if not 1 <= bits <= MANTISSA_BITS:
        raise ValueError(f"a float32 has 1 to {MANTISSA_BITS} mantissa bits, not {bits}")
    dropped = MANTISSA_BITS - bits
    pattern = values.view(np.uint32)
    if not dropped:
        return pattern.copy().view(np.float32)
    kept = np.uint32(-(1 << dropped) & 0xFFFF_FFFF)
    # Without its sign a pattern grows with the number: what carries out of the mantissa belongs to the exponent.
    rounded = pattern & MAGNITUDE
    is_odd = (rounded >> np.uint32(dropped)) & np.uint32(1)
    rounded += is_odd + np.uint32((1 << (dropped - 1)) - 1)
    rounded &= kept
    np.minimum(rounded, (EXPONENT - np.uint32(1)) & kept, out=rounded)
    rounded |= pattern & ~MAGNITUDE
    return np.where((pattern & EXPONENT) == EXPONENT, pattern, rounded).view(np.float32)


def rounding_error(bits: int) -> float:
    """What rounding may change a normal number by, relative to it: also the length of a vector."""
    return 0.0 if bits == MANTISSA_BITS else 2.0 ** -(bits + 1)


def round_vectors(rows: pa.Table, bits: int) -> pa.Table:
    """Rows whose column ``vector`` (fixed-size lists of float32, none null) is rounded; the others as they are."""
    if bits == MANTISSA_BITS:
        return rows
    place = rows.schema.get_field_index("vector")
    field = rows.schema.field(place)
    column = rows["vector"].combine_chunks()
    values = round_mantissas(column.flatten().to_numpy(zero_copy_only=False), bits)
    rounded = pa.FixedSizeListArray.from_arrays(pa.array(values), type=field.type)
    return rows.set_column(place, field, rounded)
