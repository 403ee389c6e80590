"""What arrays hold, and that it is finite."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from taught.errors import refuse

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def refuse_nonfinite(example_ids: Sequence[str], values: ArrayLike, what: str, of: str = "") -> None:
    """UserError where a value [P] or a row [P, ...] of some examples is not finite, which names these."""
    rows = zip(example_ids, np.asarray(values, dtype=np.float64), strict=True)
    bad = [example for example, row in rows if not np.isfinite(row).all()]
    rule, fix = f"every {what} is a finite number", "look at these examples' loss in examples.parquet"
    refuse(bad, f"the {what}{of} is not finite for {len(bad)} examples", rule=rule, fix=fix)
