"""The low-rank format: W = V U, with V [i, r] and U [r, o]: r (i + o) parameters."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from blrlab.factors.spec import Spec

Factors = dict[str, Array]


def shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Return the shape of each factor."""
    return {"V": (spec.in_features, spec.rank), "U": (spec.rank, spec.out_features)}


def fans(spec: Spec) -> dict[str, tuple[int, int]]:
    """Return the fan-in and the fan-out of each factor."""
    return {"V": (spec.in_features, spec.rank), "U": (spec.rank, spec.out_features)}


def init(key: Array, spec: Spec, dtype: jax.typing.DTypeLike) -> Factors:
    """Draw each factor with variance 1 / its fan-in: 1 / i for V, 1 / r for U."""
    v, u = jax.random.split(key)
    size, fan = shapes(spec), fans(spec)
    return {
        "V": jax.random.normal(v, size["V"], dtype) * fan["V"][0] ** -0.5,
        "U": jax.random.normal(u, size["U"], dtype) * fan["U"][0] ** -0.5,
    }


def apply(factors: Factors, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
    """Multiply: x [..., i] -> [..., o]."""
    return (x @ factors["V"]) @ factors["U"]


def to_dense(factors: Factors) -> Float[Array, "i o"]:
    """Multiply the factors out."""
    return factors["V"] @ factors["U"]


def squared_norm(factors: Factors) -> Float[Array, ""]:
    """Return ||V U||_F^2 = tr((V^T V) (U U^T))."""
    V, U = factors["V"], factors["U"]
    return jnp.sum((V.T @ V) * (U @ U.T))


def project(weight: Float[Array, "i o"], spec: Spec, key: Array) -> Factors:
    """Find the nearest factors in the Frobenius norm: the truncated SVD (Eckart and Young, 1936)."""
    V, U = truncate(weight, spec.rank)
    return {"V": V, "U": U}


def truncate(
    weight: Float[Array, "i o"], rank: int, gram: Float[Array, "i i"] | None = None
) -> tuple[Float[Array, "i r"], Float[Array, "r o"]]:
    """Return V [i, r] and U [r, o] of the truncated SVD: the least ||W - V U||, or ||X (W - V U)|| with G = X^T X.

    On an accelerator it is as near to the least as `svd_by_gram` says.

    With G = L L^T it is the SVD of L^T W, multiplied back (SVD-LLM, arXiv 2403.07378; optimal by Eckart and Young).
    The square root of each singular value goes to either side, so that V and U train alike. A rank above min(i, o) is
    filled up with zero columns.
    """
    lower, whitened = _whitened(weight, gram)
    return _shared_out(*svd(whitened), lower, rank)


def sketch(
    weight: Float[Array, "i o"],
    rank: int,
    key: Array,
    gram: Float[Array, "i i"] | None = None,
    extra: int = 16,
    rounds: int = 3,
    coarse: bool = False,
) -> tuple[Float[Array, "i r"], Float[Array, "r o"]]:
    """Return what `truncate` does, nearly: subspace iteration on a random start (Halko et al., arXiv 0909.4061, 4.4).

    Args:
      weight: as for `truncate`.
      rank: r.
      key: the random start.
      gram: as for `truncate`.
      extra: columns that are carried beside the r.
      rounds: of the iteration; each takes two products with the weight.
      coarse: split what is left of the weight, [r + extra, o], as `svd_by_gram` does on every platform.
    """
    lower, whitened = _whitened(weight, gram)
    width = min(rank + extra, *weight.shape)
    basis = jnp.linalg.qr(whitened @ jax.random.normal(key, (weight.shape[1], width), weight.dtype))[0]
    for _ in range(rounds):
        basis = jnp.linalg.qr(whitened @ jnp.linalg.qr(whitened.T @ basis)[0])[0]
    small = basis.T @ whitened
    left, values, right = svd_by_gram(small) if coarse else svd(small)
    return _shared_out(basis @ left, values, right, lower, rank)


def svd(weight: Float[Array, "m n"]) -> tuple[Float[Array, "m k"], Float[Array, "k"], Float[Array, "k n"]]:
    """Return the reduced SVD, k = min(m, n); on an accelerator by eigenvectors (see `svd_by_gram`).

    A GPU takes many times longer for SVDs, of many small blocks above all.
    """
    return jax.lax.platform_dependent(
        weight, cpu=lambda given: tuple(jnp.linalg.svd(given, full_matrices=False)), default=svd_by_gram
    )


@jax.default_matmul_precision("highest")
def svd_by_gram(weight: Float[Array, "m n"]) -> tuple[Float[Array, "m k"], Float[Array, "k"], Float[Array, "k n"]]:
    """Return the reduced SVD by the eigenvectors of the smaller of W W^T and W^T W.

    Singular values below about 3e-4 of the largest (float32) drown in rounding: a truncation then leaves up to 3.5e-4
    of the weight's norm more than it need (so a few hundredths of what it leaves where that is 1e-2, and less above).
    """
    if weight.shape[0] > weight.shape[1]:
        left, values, right = svd_by_gram(weight.T)
        return right.T, values, left.T
    peak = jnp.maximum(jnp.abs(weight).max(), jnp.finfo(weight.dtype).tiny)  # its square may not be a number
    squares, left = jnp.linalg.eigh((weight / peak) @ (weight / peak).T)
    squares, left = squares[::-1], left[:, ::-1]
    floor = jnp.finfo(weight.dtype).eps * squares[0] + jnp.finfo(weight.dtype).tiny
    values = jnp.sqrt(jnp.maximum(squares, floor))
    return left, peak * values, left.T @ (weight / peak) / values[:, None]


def energies(weight: Float[Array, "m n"]) -> Float[Array, "k"]:
    """Return the squares of the singular values, the largest first."""
    return jax.lax.platform_dependent(weight, cpu=_energies, default=_energies_by_gram)


def _energies(weight: Array) -> Array:
    return jnp.square(jnp.linalg.svd(weight, compute_uv=False))


@jax.default_matmul_precision("highest")
def _energies_by_gram(weight: Array) -> Array:
    gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    return jnp.maximum(jnp.linalg.eigvalsh(gram)[::-1], 0)


def _whitened(weight: Array, gram: Array | None) -> tuple[Array | None, Array]:
    """Return L of G = L L^T and L^T W; None and W without G."""
    if gram is None:
        return None, weight
    lower = jnp.linalg.cholesky(gram)
    return lower, lower.T @ weight


def _shared_out(left: Array, values: Array, right: Array, lower: Array | None, rank: int) -> tuple[Array, Array]:
    """Multiply the whitening back, and give the square root of each singular value to either side."""
    if lower is not None:
        left = jax.scipy.linalg.solve_triangular(lower, left, trans="T", lower=True)
    root = jnp.sqrt(values)
    return _fit(left * root[None, :], 1, rank), _fit(root[:, None] * right, 0, rank)


def _fit(array: Array, axis: int, size: int) -> Array:
    """Cut an axis to `size`, or fill it up with zeros."""
    kept = jax.lax.slice_in_dim(array, 0, min(size, array.shape[axis]), axis=axis)
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, size - kept.shape[axis])
    return jnp.pad(kept, padding)
