"""In which dtypes weights are imported and exported."""

from typing import Literal

WeightDtype = Literal["bfloat16", "float32", "fp8"]  # fp8: e4m3 with a scale for each block of 128 by 128

FP8 = "float8_e4m3fn"  # its values' dtype
