"""Shapes in signatures: jaxtyping's where it is installed, else names that say the same and check nothing.

So that the kernels run wherever jax does.
"""

from typing import TYPE_CHECKING

from jax import Array

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt32
else:
    try:
        from jaxtyping import Bool, Float, Int, UInt32
    except ImportError:

        class _Unchecked:
            def __class_getitem__(cls, _):
                return Array

        Bool = Float = Int = UInt32 = _Unchecked

__all__ = ["Array", "Bool", "Float", "Int", "UInt32"]
