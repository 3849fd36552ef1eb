# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Sums over the paths of the dependency graph of time series, without ever holding the graph.

Series `i` points at series `j` if their correlation is at least `beta` and the slope of `j` regressed on `i` at least
`gamma`. With `s` the root of a series' summed squared deviations, slope = correlation * s_j / s_i. Two facts follow:

- For `gamma > 1` each edge leads to a series of larger `s`, so there are no cycles, and in order of decreasing `s` the
  equation for the influence `I_i = sum_j slope_ij * I_j` (1 for a leaf) is triangular.
- `u_i = s_i * I_i` obeys `u_i = sum_j correlation_ij * u_j`, whose coefficients lie between 0 and 1, and `u_i >= s_i`.

The triangular system is solved block by block. Its solution grows exponentially along chains, beyond float64; a value
is therefore kept as `mantissa * 2^(BAND_BITS * band)` and one matrix product treats each band as a column of its own,
which is exact and costs nothing as long as there is one band. This file knows nothing of ranks, modules or
orthogonality.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


ROWS = 512  # a block's solution grows by 2^ROWS at most
COLUMNS = 4096
BAND_BITS = 480  # BAND_BITS + ROWS + log2(number of series) must stay below 1023
ELEMENTS = 2**22  # of one block over a batch of graphs: 32 MiB


@dataclass(frozen=True)
class SeriesBatch:
    """Series of G independent graphs with n nodes each, those of one graph in order of decreasing deviation.

    Args:
        unit (`Tensor`): Shape (G, n, T), float64, deviations from the mean divided by their norm; zero where a series
            is constant or only padding.
        log_deviation (`Tensor`): Shape (G, n), float64, log2 of the norms, not increasing along a graph. Constant
            series and padding come last and carry the value of the last true one.
        correlation_threshold (`float`): `beta`.
        slope_threshold (`float`): `gamma`.
        guard (`float`): Added to the denominators of correlation and slope; it can remove edges, never add any.
    """

    unit: Tensor
    log_deviation: Tensor
    correlation_threshold: float
    slope_threshold: float
    guard: float = 0.0

    def correlated(self, rows: slice, columns: slice, check_slope: bool = True) -> Tensor:
        """Returns the coefficients of `u` (G, rows, columns), zero where there is no edge."""
        corr = self.unit[:, rows] @ self.unit[:, columns].mT
        if not check_slope and not self.guard:
            below = math.nextafter(self.correlation_threshold, -math.inf)
            return torch.nn.functional.threshold_(corr, below, 0.0)
        tail, head = self.log_deviation[:, rows, None], self.log_deviation[:, None, columns]
        coefficient = corr
        if self.guard:
            coefficient = corr / (1 + self.guard * torch.exp2(-2 * tail))
            corr = corr / (1 + self.guard * torch.exp2(-tail - head))
        ratio = torch.exp2(head - tail)
        edge = (corr >= self.correlation_threshold) & (coefficient * ratio >= self.slope_threshold)
        return torch.where(edge, coefficient, 0.0)


def path_sums(batch: SeriesBatch) -> tuple[Tensor, Tensor]:
    """Solves for the influence of every series; needs a slope threshold above 1.

    Returns:
        `tuple[Tensor, Tensor]`: log2 of the influence (float64), where a leaf counts as 1, and whether a node is a
            leaf; both of shape (G, n).
    """
    graphs, n, _ = batch.unit.shape
    device = batch.unit.device
    relative = batch.log_deviation - batch.log_deviation[:, -1:]  # u is counted in units of the smallest deviation
    plain, reach, bands = _plan(relative, batch.slope_threshold, batch.correlation_threshold)
    band_index = torch.arange(bands, device=device)
    # u, one column a band; the last column counts edges.
    known = torch.zeros(graphs, n, bands + 1, dtype=torch.float64, device=device)
    known[..., bands] = 1.0
    mantissa, band = _split(torch.exp2(relative % BAND_BITS), (relative / BAND_BITS).floor().long())
    log_u = relative.clone()
    is_leaf = torch.ones_like(relative, dtype=torch.bool)
    for block, start in enumerate(range(0, n, ROWS)):
        rows = slice(start, min(start + ROWS, n))
        total = known.new_zeros(graphs, rows.stop - start, bands + 1)
        for columns, check_slope in _column_slices(plain[block], min(reach[block], start)):
            total.baddbmm_(batch.correlated(rows, columns, check_slope), known[:, columns])
        inner = None
        if reach[block] > start:
            inner = batch.correlated(rows, rows).tril_(-1)
            total[..., bands] += inner.sum(-1)
        leaf = total[..., bands] == 0
        own = torch.where(band_index == band[:, rows, None], mantissa[:, rows, None], 0.0)
        solution = torch.where(leaf[..., None], own, total[..., :bands])
        if inner is not None:
            # (I - inner) u = known part; the unit diagonal is implied
            solution = torch.linalg.solve_triangular(inner.neg_(), solution, upper=False, unitriangular=True)
        value, top = _gather_bands(solution)
        known[:, rows, :bands] = torch.where(band_index == top[..., None], value[..., None], 0.0)
        log_u[:, rows] = value.log2() + top * BAND_BITS
        is_leaf[:, rows] = leaf
    return torch.where(is_leaf, 0.0, log_u - relative), is_leaf


def _plan(relative: Tensor, gamma: float, beta: float) -> tuple[list[int], list[int], int]:
    """Plans the blocks, so that most pairs cost little or nothing and the host waits once.

    Returns:
        `tuple[list[int], list[int], int]`: For each block of rows, how many leading columns need only the test of the
            correlation, and how many can be reached at all; the number of bands that the largest value can need.
    """
    n = relative.shape[1]
    firsts = torch.arange(0, n, ROWS, device=relative.device)
    lasts = (firsts + ROWS - 1).clamp_(max=n - 1)
    ascending = -relative
    slack = 1e-9  # a correlation can exceed 1 by rounding
    implied = math.log2(gamma / beta) + slack if beta > 0 else math.inf
    plain = torch.searchsorted(ascending, ascending[:, firsts] - implied, right=True).amin(0)
    reach = torch.searchsorted(ascending, ascending[:, lasts] - math.log2(gamma) + slack, right=True).amax(0)
    # A path visits each interval [gamma^k, gamma^(k+1)) once at most, so u grows at most by the product of (1 + size
    # of interval), which is largest for equal sizes.
    widest = relative[:, 0].amax()
    levels = (widest / math.log2(gamma)).floor().add(2).clamp(max=n)  # one more than there are, for rounding
    bits = widest + levels * torch.log2(1 + n / levels)
    plan = torch.cat([plain.double(), reach.double(), bits[None]]).tolist()
    blocks = len(firsts)
    plain_list, reach_list = ([int(x) for x in part] for part in (plan[:blocks], plan[blocks:-1]))
    return plain_list, reach_list, int(plan[-1] // BAND_BITS) + 1


def _column_slices(plain: int, stop: int) -> list[tuple[slice, bool]]:
    slices = []
    for first, last, check_slope in ((0, min(plain, stop), False), (min(plain, stop), stop, True)):
        for start in range(first, last, COLUMNS):
            slices.append((slice(start, min(start + COLUMNS, last)), check_slope))
    return slices


def _split(mantissa: Tensor, band: Tensor) -> tuple[Tensor, Tensor]:
    """Moves whole bands from mantissa to band, so that the mantissa is below 2^BAND_BITS."""
    carry = (mantissa.log2() / BAND_BITS).floor().clamp_(min=0)
    return mantissa * torch.exp2(-carry * BAND_BITS), band + carry.long()


def _gather_bands(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Adds up values given as one column a band (..., bands) into mantissa and band."""
    index = torch.arange(columns.shape[-1], device=columns.device)
    top = torch.where(columns > 0, index, 0).amax(-1)
    scale = torch.exp2((index - top[..., None]).clamp(max=0) * float(BAND_BITS))
    return _split((columns * scale).sum(-1), top)


# ---- slope_threshold <= 1: cycles are possible, and the graph is a sparse one on the host ----


def successors_of(batch: SeriesBatch) -> list[list[dict[int, float]]]:
    """Returns the edges of each graph: for each node a dict from successors, ascending, to slopes. No self-loops."""
    graphs, n, _ = batch.unit.shape
    successors: list[list[dict[int, float]]] = [[{} for _ in range(n)] for _ in range(graphs)]
    for start in range(0, n, ROWS):
        rows = slice(start, min(start + ROWS, n))
        for columns, _ in _column_slices(0, n):
            coefficient = batch.correlated(rows, columns)
            graph, tail, head = coefficient.nonzero(as_tuple=True)
            slopes = coefficient[graph, tail, head] * torch.exp2(
                batch.log_deviation[graph, columns.start + head] - batch.log_deviation[graph, start + tail]
            )
            edges = (graph.tolist(), (start + tail).tolist(), (columns.start + head).tolist(), slopes.tolist())
            for g, i, j, slope in zip(*edges, strict=True):
                if i != j:
                    successors[g][i][j] = slope
    return successors


def break_cycles(successors: list[dict[int, float]]) -> list[int]:
    """Removes the weakest edge of one cycle after the other, in place, until there are none (the paper's Algorithm 1).

    Which edges go depends on the order in which cycles are met. It is that of a depth-first search from node 0
    upwards, started afresh after each removal, as in the released code; here the search steps back only to the removed
    edge, as everything before it would be the same again. Of equally weak edges the first one goes, counted along the
    cycle from the node where it closes.

    Returns:
        `list[int]`: All nodes, each after all of its successors.
    """
    finished: list[int] = []
    done = [False] * len(successors)
    for root in range(len(successors)):
        if done[root]:
            continue
        path, depth = [root], {root: 0}
        pending = [iter(tuple(successors[root]))]
        marks = [len(finished)]  # length of `finished` when the node was met
        while path:
            head = next(pending[-1], None)
            if head is None:
                node = path.pop()
                pending.pop()
                marks.pop()
                del depth[node]
                done[node] = True
                finished.append(node)
            elif head in depth:
                cycle = [*path[depth[head] :], head]
                weakest = min(range(len(cycle) - 1), key=lambda k: successors[cycle[k]][cycle[k + 1]])
                del successors[cycle[weakest]][cycle[weakest + 1]]
                back = depth[cycle[weakest]] + 1
                if back < len(path):  # what was met beyond the removed edge has not been met now
                    for node in finished[marks[back] :]:
                        done[node] = False
                    for node in path[back:]:
                        del depth[node]
                    del finished[marks[back] :], path[back:], pending[back:], marks[back:]
            elif not done[head]:
                depth[head] = len(path)
                path.append(head)
                pending.append(iter(tuple(successors[head])))
                marks.append(len(finished))
    return finished


def acyclic_path_sums(successors: list[dict[int, float]], order: list[int]) -> list[float]:
    """Returns log2 of each node's influence, 0.0 for a leaf; `order` has every node after its successors."""
    log_influence = [0.0] * len(successors)
    for node in order:
        if successors[node]:
            terms = [math.log2(slope) + log_influence[head] for head, slope in successors[node].items()]
            largest = max(terms)
            log_influence[node] = largest + math.log2(math.fsum(2.0 ** (term - largest) for term in terms))
    return log_influence
