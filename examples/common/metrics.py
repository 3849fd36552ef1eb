# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The base of the examples' metrics: `evaluate.Metric` classes for which nothing is fetched from the Hub."""

import evaluate
from datasets import Features, Value


class OfflineMetric(evaluate.Metric):
    """A metric of predictions and references, lists of equal length with one value for each example."""

    dtype: str  # of predictions and references
    url: str

    def __init__(self, **kwargs):
        # Predictions stay in memory: no cache file to lock or to leave behind.
        super().__init__(keep_in_memory=True, **kwargs)

    def _features(self) -> Features | list[Features]:
        return Features({"predictions": Value(self.dtype), "references": Value(self.dtype)})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions and references: lists of equal length, one value for each example",
            features=self._features(),
            reference_urls=[self.url],
        )
