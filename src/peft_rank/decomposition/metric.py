# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The metrics || R (W - W') C ||_F of the decompositions with a closed form, made of calibration statistics.

Knows neither models nor how the statistics were collected. With W of shape (out, in), as `nn.Linear` stores it:

| method | R, a diagonal | C |
|---|---|---|
| svd | - | - |
| activation | - | diagonal: (mean absolute input)^alpha, ASVD, https://huggingface.co/papers/2312.05821 |
| fisher | - | diagonal: (Fisher averaged over out)^alpha, FWSVD, https://huggingface.co/papers/2207.00112 |
| importance | - | the same of E[(w dL/dw)^2], IWSVD in Adaptive Rank Selections, NAACL 2024, appendix D |
| fisher_two_sided | (Fisher averaged over in)^alpha | as fisher |
| whitening | - | any C with C C^T = input Gram matrix: the output error; SVD-LLM, https://huggingface.co/papers/2403.07378 |

FWSVD and ARS write Y = X W: their rows are the columns here.

With R W C = U S V^T the best W' of rank k in this metric is R^-1 U_k U_k^T R W. Written like this C is never inverted,
so that dead inputs and Gram matrices from fewer tokens than features need no special care. A damping at the level of
rounding, relative to the mean (diagonals) or to each feature (Gram), makes R invertible, and spends ranks that the
metric has no opinion about on what is left of the weight. The two-sided form extrapolates rows and columns of no
importance from the others, and is unbounded there; the others never exceed the weight.

Gram matrices are decomposed in float64: a few channels of transformers are a thousand times larger than the others,
squared a million times, and float32 would lose the others beside them. Where float32 is enough, U and S come from the
smaller of W G W^T and C^T W^T W C, which spares the SVD: their float64 digits, halved by the square root, are those of
float32. C is a Cholesky factor, which costs a fraction of an eigendecomposition and keeps the digits of small features
beside large ones; a Gram matrix that is singular, or rounded to be, has none and gets its eigenvectors instead.

Differences from the released code: damping is relative and out of place (there: 1e-6 or 1e-5 added whatever the units,
in place in ARS, so that statistics drift from call to call; none in older FWSVD, which then gives NaN); Gram matrices
may be singular (there: a Cholesky factorization fails); Fisher is averaged rather than summed over rows, which leaves the
factors as they are and makes the losses of modules of different height comparable; the bias stays with the caller.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .svd import check_finite, orthonormal, product, singular_values, symmetric_eigen, thin_svd, working_copy


STATISTIC: dict[str, str | None] = {
    "svd": None,
    "activation": "input_scale",
    "fisher": "weight_importance",
    "fisher_two_sided": "weight_importance",
    "importance": "weight_importance",
    "whitening": "input_gram",
    "em": "weight_importance",
    "nesterov": "weight_importance",
    "anderson": "weight_importance",
}
"""The statistic that each method weighs by, by its name in `decompose`."""

ITERATIVE = ("em", "nesterov", "anderson")
"""Methods that weigh every entry by itself, and hence have no closed form."""

_DEAD = 1e-4  # energy, relative to the mean, that damping gives to a feature that never fires


@dataclass(frozen=True)
class Metric:
    """unit * || rows * (W - W') @ columns ||_F; None stands for the identity."""

    rows: Tensor | None = None  # (out, 1), the diagonal of R
    columns: Tensor | None = None  # (in,), the diagonal of C
    gram: Tensor | None = None  # (in, in), float64, C C^T where C is no diagonal
    floor: float = 0.0  # least eigenvalue of the Gram matrix: rounding in the sum over tokens can leave negative ones
    unit: float = 1.0  # the size of the statistics, kept apart so that small ones do not underflow

    def apply(self, weight: Tensor) -> Tensor:
        """R W C, or another matrix of the same left vectors and singular values."""
        weight = weight if self.rows is None else self.rows * weight
        if self.gram is not None:
            return product(weight, self._root().to(weight.dtype))
        return weight if self.columns is None else weight * self.columns

    def left_vectors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The leading `rank` of U (out, rank), rank <= k = min(out, in), and all of S (k,) of R W C."""
        if self.gram is None or weight.dtype == torch.float64:
            left, values, _ = thin_svd(self.apply(weight))
            return left[:, :rank], values
        if weight.shape[0] <= weight.shape[1]:
            values, vectors = self._output_eigen(weight)
            left = vectors[:, -rank:].flip(1)
        else:
            scaled = self.apply(weight.double())  # (out, in)
            values, vectors = symmetric_eigen(scaled.mT @ scaled)
            # what U S is, but orthonormal also where S is rounding
            left = orthonormal(scaled @ vectors[:, -rank:].flip(1))
        return left.to(weight.dtype), values.flip(0).clamp(min=0).sqrt().to(weight.dtype)

    def values(self, weight: Tensor) -> Tensor:
        """S (k,) of R W C, float64."""
        if self.gram is None or weight.dtype == torch.float64:
            return singular_values(self.apply(weight)).double()
        if weight.shape[0] <= weight.shape[1]:
            values, _ = self._output_eigen(weight)
        else:
            scaled = self.apply(weight.double())
            values, _ = symmetric_eigen(scaled.mT @ scaled)
        return values.flip(0).clamp(min=0).sqrt()

    def _root(self) -> Tensor:
        """Some C (in, in), float64, with C C^T = gram."""
        root, failed = torch.linalg.cholesky_ex(self.gram)
        if not int(failed):
            return root
        values, vectors = symmetric_eigen(self.gram)
        return vectors * values.clamp(min=self.floor).sqrt()

    def _output_eigen(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors, in float64, of the Gram matrix of the outputs (out, out)."""
        weight = weight.double()
        return symmetric_eigen(weight @ self.gram @ weight.mT)


def check_method(method: str) -> None:
    """Refuses what is not a method.

    Raises:
        ValueError: If the name is unknown.
    """
    if method not in STATISTIC:
        raise ValueError(f"`method` must be one of {', '.join(STATISTIC)}, got {method!r}.")


def check_alpha(alpha: float) -> None:
    """Refuses negative and non-finite powers.

    Raises:
        ValueError: If it is one.
    """
    if not isinstance(alpha, (int, float)) or not 0 <= alpha < float("inf"):
        raise ValueError(
            f"`alpha` must be at least 0 and finite, got {alpha!r}. 0 ignores the statistic, 0.5 is the usual."
        )


def working_statistic(
    method: str,
    weight: Tensor,
    input_scale: Tensor | None,
    input_gram: Tensor | None,
    weight_importance: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor | None:
    """The statistic that the method needs, checked, as a working copy.

    Raises:
        ValueError: If it is missing, of the wrong shape, not finite or negative where it cannot be.
    """
    name = STATISTIC[method]
    if name is None:
        return None
    out_features, in_features = weight.shape
    given, shape = {
        "input_scale": (input_scale, (in_features,)),
        "input_gram": (input_gram, (in_features, in_features)),
        "weight_importance": (weight_importance, (out_features, in_features)),
    }[name]
    if given is None:
        raise ValueError(
            f"`{name}` of shape {shape} is needed by method {method!r}, got None. Collect it with "
            "`peft_rank.calibrate(model, batches, config=config)`."
        )
    if given.shape != shape:
        raise ValueError(
            f"`{name}` must be of shape {shape} for a weight of shape {tuple(weight.shape)} (out, in), got "
            f"{tuple(given.shape)}. A Conv1D stores (in, out): transpose its weight and importance."
        )
    statistic = working_copy(given, weight, torch.float64 if name == "input_gram" else dtype)
    check_finite(name, statistic, "calibrate again without float16 and without NaN in the batches.")
    lowest = statistic.diagonal() if name == "input_gram" else statistic
    if bool((lowest < 0).any()):
        raise ValueError(
            f"`{name}` must not be negative{' on its diagonal' if name == 'input_gram' else ''}, got "
            f"{float(lowest.amin()):.3g}: it is a mean of {'magnitudes' if name == 'input_scale' else 'squares'}."
        )
    return statistic


def _spread(statistic: Tensor, alpha: float, damping: float) -> Tensor:
    """Diagonal of a metric: values in [0, 1] to the power alpha, with the damping added to its squares."""
    scale = statistic**alpha
    if not damping:
        return scale
    squares = scale.square()
    return (squares + damping * squares.mean()).sqrt()


def _damped_gram(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """A Gram matrix with entries of size 1, symmetric to the last digit and damped, and its least eigenvalue.

    The damping is relative to each feature, as the rounding of a sum over tokens is: relative to the mean it would
    outweigh the small features beside a large one. A feature that is dead counts as a small one.
    """
    skew = float((gram - gram.mT).abs().amax())
    if skew > 1e-2:
        raise ValueError(
            f"`input_gram` must be symmetric, got entries that differ by {skew:.2g} of the largest from their mirror "
            "image: pass the sum of x x^T over the tokens."
        )
    gram = (gram + gram.mT) / 2
    least = _DEAD * float(gram.diagonal().mean())
    damping *= len(gram) ** 0.5
    gram.diagonal().add_(damping * gram.diagonal().clamp(min=least))
    return gram, damping * least


def make_metric(method: str, statistic: Tensor | None, alpha: float, damping: float = 0.0) -> Metric:
    """The metric of a method.

    Args:
        method (`str`): One of the closed forms.
        statistic (`Tensor`, *optional*): What `working_statistic` returns.
        alpha (`float`): Power of the statistic; no part in whitening.
        damping (`float`, *optional*, defaults to 0.0): Relative; the rounding of the working dtype for factors, none
            for losses.

    Returns:
        `Metric`: With unit 0 if the statistic is zero altogether: then every approximation is without loss, and plain
        SVD as good as any.
    """
    if statistic is None:
        return Metric()
    peak = float(statistic.abs().amax())
    if peak == 0:
        return Metric(unit=0.0)
    statistic = statistic / peak
    if method == "whitening":
        gram, floor = _damped_gram(statistic, damping)
        return Metric(gram=gram, floor=floor, unit=peak**0.5)
    if method == "activation":
        return Metric(columns=_spread(statistic, alpha, damping), unit=peak**alpha)
    columns = _spread(statistic.mean(dim=0), alpha, damping)
    if method != "fisher_two_sided":
        return Metric(columns=columns, unit=peak**alpha)
    rows = _spread(statistic.mean(dim=1), alpha, damping).unsqueeze(1)
    # means of rows times means of columns are the statistic times its mean where it has rank one
    return Metric(rows, columns, unit=(peak / float(statistic.mean())) ** alpha)


def split(weight: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best factors in a metric: `up` (out, rank), `down` (rank, in), and all singular values (k,) without unit."""
    left, values = metric.left_vectors(weight, rank)
    if metric.rows is None:
        return left, product(left.mT, weight), values
    return left / metric.rows, product(left.mT, metric.rows * weight), values
