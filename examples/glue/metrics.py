# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""
The official metrics of the GLUE tasks as `evaluate.Metric` classes, computed by scikit-learn and scipy.

They give the figures of `evaluate.load("glue", task)` but are plain classes: nothing is fetched from the Hub, so they
work offline.

```python
>>> from metrics import glue_metric

>>> glue_metric("mrpc").compute(predictions=[0, 1, 1], references=[0, 1, 0])
{'accuracy': 0.6666666666666666, 'f1': 0.6666666666666666}
```
"""

from collections.abc import Callable

import evaluate
from common.metrics import OfflineMetric
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


class _PairMetric(OfflineMetric):
    """A metric `function(references, predictions)` of two equally long lists of numbers."""

    key: str  # the name that the figure has in the official results
    function: Callable[[list, list], float]

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        return {self.key: float(self.function(references, predictions))}


class Accuracy(_PairMetric):
    """Share of the examples that got the right class."""

    key, dtype, function = "accuracy", "int64", staticmethod(accuracy_score)
    url = "https://scikit-learn.org/stable/modules/generated/sklearn.metrics.accuracy_score.html"


class F1(_PairMetric):
    """Harmonic mean of precision and recall of class 1."""

    key, dtype, function = "f1", "int64", staticmethod(f1_score)
    url = "https://scikit-learn.org/stable/modules/generated/sklearn.metrics.f1_score.html"


class MatthewsCorrelation(_PairMetric):
    """Correlation of predicted and true classes, 0 for a constant prediction."""

    key, dtype, function = "matthews_correlation", "int64", staticmethod(matthews_corrcoef)
    url = "https://scikit-learn.org/stable/modules/generated/sklearn.metrics.matthews_corrcoef.html"


class PearsonCorrelation(_PairMetric):
    """Linear correlation of predicted and true scores, not a number for a constant prediction."""

    key, dtype, function = "pearson", "float64", staticmethod(lambda y, x: pearsonr(y, x)[0])
    url = "https://docs.scipy.org/doc/scipy/reference/generated/scipy.stats.pearsonr.html"


class SpearmanCorrelation(_PairMetric):
    """Correlation of the ranks of predicted and true scores, not a number for a constant prediction."""

    key, dtype, function = "spearmanr", "float64", staticmethod(lambda y, x: spearmanr(y, x)[0])
    url = "https://docs.scipy.org/doc/scipy/reference/generated/scipy.stats.spearmanr.html"


GLUE_METRICS: dict[str, tuple[type[_PairMetric], ...]] = {
    "cola": (MatthewsCorrelation,),
    "sst2": (Accuracy,),
    "mrpc": (Accuracy, F1),
    "stsb": (PearsonCorrelation, SpearmanCorrelation),
    "qqp": (Accuracy, F1),
    "mnli": (Accuracy,),
    "qnli": (Accuracy,),
    "rte": (Accuracy,),
}


def glue_metric(task_name: str | None, is_regression: bool = False) -> evaluate.CombinedEvaluations:
    """The metrics of a GLUE task; for other tasks (`None`) the correlations of a regression, or accuracy."""
    default = GLUE_METRICS["stsb"] if is_regression else (Accuracy,)
    return evaluate.combine([metric() for metric in GLUE_METRICS.get(task_name, default)])
