# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Low rank under a weight for every entry, min over rank k of sum_ij O_ij (W_ij - X_ij)^2: EM, Nesterov, Anderson.

Knows matrices only. The problem has no closed form and is NP-hard in general; all three iterate

    X <- LR_k(fill(X)),    fill(X) = O * W + (1 - O) * X,    0 <= O <= 1

where LR_k truncates the SVD: unweighted entries are filled in from the last guess (EM; Srebro and Jaakkola, Weighted
Low-Rank Approximations, ICML 2003). As O <= 1, the objective never rises. Nesterov extrapolates before it fills in,
Anderson mixes the last fillings so that their residuals cancel (https://huggingface.co/papers/2109.11057, algorithm 3).

Differences from the released code of weighted low-rank BERT compression:
- the start is the better of SVD and FWSVD (there: SVD, from which 30 iterations can end above FWSVD where the weights
  are heavy-tailed);
- the best iterate is returned, and iterations end early when the objective rests (there: the last of 30);
- Nesterov starts anew when the objective rises;
- Anderson regularizes relative to the trace and accepts a mixture only if it lowers the objective, otherwise it takes
  the EM step and forgets its history (there: no regularization, a singular system for uniform weights).
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .metric import Metric, make_metric, split
from .svd import Factors, product, thin_svd


RELATIVE_TOLERANCE = 1e-8
"""Change of the objective, relative to itself, below which iterations stop."""

_MEMORY = 10  # fillings that Anderson mixes
_REGULARIZATION = 1e-8  # of Anderson's system, relative to its trace


class Iterate(NamedTuple):
    """A guess of rank k, and its objective."""

    factors: Factors
    dense: Tensor  # (out, in)
    loss: float


class Problem:
    """A weight, how much each entry matters, and the rank of the guesses.

    Args:
        weight (`Tensor`): Shape (out, in), float32 or float64.
        importance (`Tensor`): Shape (out, in), entries in [0, 1].
        rank (`int`): At most min(out, in).
    """

    def __init__(self, weight: Tensor, importance: Tensor, rank: int):
        self.weight = weight
        self.importance = importance
        self.rank = rank

    def iterate(self, factors: Factors) -> Iterate:
        dense = product(*factors)
        squares = (self.weight - dense).square_().mul_(self.importance)
        return Iterate(factors, dense, float(squares.sum(dtype=torch.float64)))

    def fill(self, guess: Tensor) -> Tensor:
        return torch.lerp(guess, self.weight, self.importance)

    def truncate(self, matrix: Tensor) -> Iterate:
        left, values, right = thin_svd(matrix)
        return self.iterate(Factors(left[:, : self.rank] * values[: self.rank], right[: self.rank]))

    def start(self) -> Iterate:
        """The better of SVD and FWSVD."""
        guesses = []
        for metric in (Metric(), make_metric("fisher", self.importance, 0.5, torch.finfo(self.weight.dtype).eps)):
            up, down, _ = split(self.weight, metric, self.rank)
            guesses.append(self.iterate(Factors(up, down)))
        return min(guesses, key=lambda guess: guess.loss)


class EMStep:
    """Fills in from the guess, truncates."""

    def __init__(self, problem: Problem, start: Iterate):
        self.problem = problem

    def __call__(self, guess: Iterate) -> Iterate:
        return self.problem.truncate(self.problem.fill(guess.dense))


class NesterovStep:
    """Fills in from an extrapolation along the last step, longer the more steps have gone well."""

    def __init__(self, problem: Problem, start: Iterate):
        self.problem = problem
        self.previous = start.dense
        self.count = 1

    def __call__(self, guess: Iterate) -> Iterate:
        ahead = torch.lerp(self.previous, guess.dense, 1 + (self.count - 1) / (self.count + 2))
        following = self.problem.truncate(self.problem.fill(ahead))
        if following.loss > guess.loss and self.count > 1:
            self.count = 1  # start anew from the guess: the plain step cannot rise
            following = self.problem.truncate(self.problem.fill(guess.dense))
        self.previous = guess.dense
        self.count += 1
        return following


class AndersonStep:
    """Fills in, then mixes the last fillings so that the mixture of their residuals is smallest.

    A filling's residual is its difference from the mixture that the guess was truncated from. The mixture a solves
    (R R^T + g I) a ~ 1, sum a = 1, with the residuals in the rows of R.
    """

    def __init__(self, problem: Problem, start: Iterate):
        self.problem = problem
        self.mixture = start.dense
        self.fillings: deque[Tensor] = deque(maxlen=_MEMORY)
        self.residuals: deque[Tensor] = deque(maxlen=_MEMORY)

    def __call__(self, guess: Iterate) -> Iterate:
        filling = self.problem.fill(guess.dense)
        self.fillings.append(filling)
        self.residuals.append((filling - self.mixture).flatten())
        if len(self.fillings) > 1:
            shares = self._shares().to(filling.dtype)
            self.mixture = torch.einsum("m,mij->ij", shares, torch.stack(tuple(self.fillings)))
            following = self.problem.truncate(self.mixture)
            if following.loss < guess.loss:
                return following
            self.fillings.clear()
            self.residuals.clear()
        self.mixture = filling
        return self.problem.truncate(filling)

    def _shares(self) -> Tensor:
        residuals = torch.stack(tuple(self.residuals))  # (m, out * in)
        gram = (residuals @ residuals.mT).double()  # (m, m)
        trace = gram.trace()
        if not bool(trace > 0):  # at a fixed point of the filling
            return torch.full_like(gram[0], 1 / len(gram))
        gram.diagonal().add_(_REGULARIZATION * trace)
        shares = torch.linalg.solve(gram, torch.ones_like(gram[0]))
        return shares / shares.sum()


_STEPS: dict[str, Callable[[Problem, Iterate], Callable[[Iterate], Iterate]]] = {
    "em": EMStep,
    "nesterov": NesterovStep,
    "anderson": AndersonStep,
}


def minimise(weight: Tensor, importance: Tensor, rank: int, method: str, max_iterations: int) -> Factors:
    """Factors of low rank under a weight for every entry.

    Args:
        weight (`Tensor`): Shape (out, in), float32 or float64, entries of size 1.
        importance (`Tensor`): Shape (out, in), the same dtype, entries in [0, 1].
        rank (`int`): At most min(out, in).
        method (`str`): `"em"`, `"nesterov"` or `"anderson"`.
        max_iterations (`int`): Of one truncated SVD each, two where a step is taken back.

    Returns:
        `Factors`: The best of all iterates, the start among them, hence never worse than SVD and FWSVD.
    """
    problem = Problem(weight, importance, rank)
    best = guess = problem.start()
    if rank == min(weight.shape):  # exact already
        return best.factors
    step = _STEPS[method](problem, guess)
    for _ in range(max_iterations):
        following = step(guess)
        best = min(best, following, key=lambda iterate: iterate.loss)
        if abs(guess.loss - following.loss) <= RELATIVE_TOLERANCE * guess.loss:
            break
        guess = following
    return best.factors
