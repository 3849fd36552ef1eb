# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""
Metrics of generated text as `evaluate.Metric` classes: nothing is fetched from the Hub, so they work offline.

`Rouge` gives the figures of `evaluate.load("rouge")`, computed by rouge-score as there.

```python
>>> from metrics import Rouge

>>> Rouge().compute(predictions=["the cat sat"], references=["the cat sat down"])["rougeL"]
0.8571428571428571
```
"""

import re
from collections.abc import Callable
from itertools import pairwise

from common.metrics import OfflineMetric
from datasets import Features, Sequence, Value
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import BootstrapAggregator


class Rouge(OfflineMetric):
    """
    F-measures of common words (rouge1), of common pairs of words (rouge2), and of the longest common subsequence of words
    in the whole text (rougeL) and line by line (rougeLsum). An example may have several references: the best counts.

    As on the Hub the mean over the examples is the median of bootstrap samples: `Rouge(seed=0)` repeats exactly.
    """

    dtype = "string"
    url = "https://github.com/google-research/google-research/tree/master/rouge"
    kinds = ("rouge1", "rouge2", "rougeL", "rougeLsum")

    def _features(self) -> list[Features]:
        text = Value(self.dtype)
        return [
            Features({"predictions": text, "references": Sequence(text)}),
            Features({"predictions": text, "references": text}),
        ]

    def _compute(
        self,
        predictions: list[str],
        references: list[str] | list[list[str]],
        rouge_types: list[str] | None = None,
        use_aggregator: bool = True,
        use_stemmer: bool = False,
    ) -> dict[str, float] | dict[str, list[float]]:
        kinds = list(rouge_types or self.kinds)
        scorer = RougeScorer(kinds, use_stemmer=use_stemmer)
        score = scorer.score if isinstance(references[0], str) else scorer.score_multi
        scores = [score(reference, text) for reference, text in zip(references, predictions, strict=True)]
        if not use_aggregator:
            return {kind: [one[kind].fmeasure for one in scores] for kind in kinds}
        aggregator = BootstrapAggregator()
        for one in scores:
            aggregator.add_scores(one)
        return {kind: float(interval.mid.fmeasure) for kind, interval in aggregator.aggregate().items()}


class ExactMatch(OfflineMetric):
    """Share of the predictions that equal their reference, character by character."""

    dtype, url = "string", "https://huggingface.co/spaces/evaluate-metric/exact_match"

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        same = sum(text == reference for text, reference in zip(predictions, references, strict=True))
        return {"exact_match": same / len(references)}


class PhonemeErrorRate(OfflineMetric):
    """
    Phonemes to insert, delete or replace in all predictions until they equal their references, over the number of phonemes
    in the references. A phoneme is one character; marks of stress and length count as phonemes.
    """

    dtype, url = "string", "https://huggingface.co/spaces/evaluate-metric/cer"

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        edits = sum(edit_distance(text, reference) for text, reference in zip(predictions, references, strict=True))
        return {"phoneme_error_rate": edits / sum(map(len, references))}


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance: insertions, deletions and replacements that turn one text into the other."""
    row = list(range(len(second) + 1))  # distances of the empty text to every beginning of the second
    for i, a in enumerate(first, start=1):
        following = [i]
        for (diagonal, above), b in zip(pairwise(row), second, strict=True):
            following.append(min(diagonal + (a != b), above + 1, following[-1] + 1))
        row = following
    return row[-1]


METRICS: dict[str, type[OfflineMetric]] = {
    "rouge": Rouge,
    "exact_match": ExactMatch,
    "phoneme_error_rate": PhonemeErrorRate,
}


def sentences_on_lines(text: str) -> str:
    """One sentence a line, as rougeLsum wants them; a sentence ends at a stop that white space follows."""
    return "\n".join(filter(None, (line.strip() for line in re.split(r"(?<=[.!?])\s+|\n+", text))))


def text_metric(names: list[str]) -> Callable[[list[str], list[str]], dict[str, float]]:
    """A function of predictions and references that computes these metrics; for ROUGE by lines and stems."""
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise ValueError(f"metrics: {unknown or 'none'} should be one or more of {', '.join(METRICS)}.")
    metrics = {name: METRICS[name](seed=0) for name in names}

    def compute(predictions: list[str], references: list[str]) -> dict[str, float]:
        found = {}
        for name, metric in metrics.items():
            texts, options = {"predictions": predictions, "references": references}, {}
            if name == "rouge":
                texts = {key: [sentences_on_lines(text) for text in column] for key, column in texts.items()}
                options = {"use_stemmer": True}
            found |= metric.compute(**texts, **options)
        return found

    return compute
