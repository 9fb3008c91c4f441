"""A --truth_fn for tests: every answer is worth the same."""


def constant(rows, policy, tokenizer):
    return [1.0] * len(rows)
