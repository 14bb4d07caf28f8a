"""The e4m3 format and the released quantisation to it, from their definitions, in float64."""

import math

import numpy as np


def e4m3_values() -> np.ndarray:
    """The non-negative numbers of the format by byte: 4 bits of exponent (bias 7), 3 of mantissa, no infinity."""
    subnormal = [m / 8 * 2.0**-6 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return np.array((subnormal + normal)[:-1])  # the last byte is NaN


VALUES = e4m3_values()


def e4m3_bytes(x: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to the even mantissa, which is the even byte; float64 in."""
    magnitude = np.abs(x)
    above = np.searchsorted(VALUES, magnitude).clip(1, len(VALUES) - 1)
    distance_up, distance_down = VALUES[above] - magnitude, magnitude - VALUES[above - 1]
    even = np.where(above % 2 == 0, above, above - 1)
    nearest = np.where(
        distance_up < distance_down, above, np.where(distance_down < distance_up, above - 1, even)
    )
    return (nearest + np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def scale_of(group: np.ndarray) -> float:
    """``2^⌈log₂(max(|x|, 1e-4) / 448)⌉``; the division as the released code does it, in float32."""
    amax = np.float32(max(np.max(np.abs(group)), np.float32(1e-4)))
    mantissa, exponent = math.frexp(float(amax / np.float32(448)))  # mantissa in [0.5, 1)
    return math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)


def quantised(x: np.ndarray, group_size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and scales."""
    groups = x.astype(np.float64).reshape(*x.shape[:-1], -1, min(group_size, x.shape[-1]))
    scales = np.apply_along_axis(scale_of, -1, groups)
    return e4m3_bytes(groups / scales[..., None]).reshape(x.shape), scales


def dequantised(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The values that bytes and scales stand for."""
    values = np.where(codes >= 128, -1, 1) * VALUES[codes % 128]
    return (values.reshape(*scales.shape, -1) * scales[..., None]).reshape(codes.shape)
