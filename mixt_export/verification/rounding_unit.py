"""How coarse a dtype is."""

from __future__ import annotations

#: Half the distance from 1 to the next number: the largest relative error of one rounding.
UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
#: The largest absolute error of one rounding where numbers are too small to be normal.
TINY = {"float32": 2.0**-150, "float16": 2.0**-25, "bfloat16": 2.0**-134}
