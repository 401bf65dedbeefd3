"""How large an error may be; plain numbers, nothing but Python is needed.

Two errors are judged: the relative Frobenius error, and the largest error over the root mean square of the reference.
A library's product is held to what its arithmetic allows. A kernel of this project is held closer, to the errors that
the library's product makes on the same numbers.
"""

from typing import NamedTuple

FLOAT32_EPSILON = 2.0**-23


class Budget(NamedTuple):
    """The most that each error may be."""

    error: float
    error_max: float


def of_library(epsilon: float, terms: int) -> Budget:
    """Allow two roundings to the dtype, and what a float32 sum of `terms` products loses when its errors are random.

    Args:
      epsilon: of the dtype of operands and result.
      terms: of the longest sum behind one element.

    Of all elements the largest error lies some standard deviations out: eight leave room for any number of them.
    """
    error = 2 * epsilon + terms**0.5 * FLOAT32_EPSILON
    return Budget(error, 8 * error)


def of_kernel(yardstick: tuple[float, float], epsilon: float, peak: float, times: float = 2) -> Budget:
    """Allow `times` the errors of the yardstick plus one epsilon; gradients take three times.

    Args:
      yardstick: relative Frobenius error and largest error over RMS of the library's product.
      epsilon: of the dtype.
      peak: the largest element of the reference over its RMS. Storing that element alone rounds it by up to
        peak * epsilon / 2, which the largest error is allowed where it exceeds epsilon.
      times: the factor.
    """
    return Budget(times * yardstick[0] + epsilon, times * yardstick[1] + epsilon * max(1.0, peak / 2))
