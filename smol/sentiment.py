"""The true reward of this world: VADER's compound sentiment of the answer, in [-1, 1]. Rules and a lexicon
(Hutto and Gilbert 2014), so it is exact, free and the same everywhere."""

import functools

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyzer = functools.cache(SentimentIntensityAnalyzer)


def compound(rows, policy, tokenizer):
    """One number for the `response` of each row; the form of --reward_fn and --truth_fn."""
    return [analyzer().polarity_scores(row["response"])["compound"] for row in rows]
