"""What a value should have said, for `evaluate.py gvm --reference_fn toy.reference:values`.

Only answers of the scripted policies are valued: those of the data files, seen (TRAINING) or not (UNSEEN).
"""
from functools import cache

from plumbing.errors import BadInput
from toy.bayes import bayes_q, undecided
from toy.world import FACT_OF, PROMPTS, TRAINING, UNSEEN, parse, response_tokens, scripted_q

POLICIES = {policy.name: policy for policy in (*TRAINING, *UNSEEN)}


@cache
def whole_question(text):
    """A prompt that begins with this text: questions of tau may have been cut to their token budget.

    Any such prompt will do while all of them ask the same fact, because an answer depends on the fact alone.
    """
    found = [prompt for prompt in PROMPTS if prompt.startswith(text)]
    if len({FACT_OF[prompt] for prompt in found}) != 1:
        raise BadInput(f"toy.reference: tau's question {text!r} does not tell which fact it asks; train the "
                       "value model with a larger --tau_question_tokens.")
    return found[0]


def reference(row):
    """The reference values of one row; see `values`."""
    question, policy = row["prompt"][-1]["content"], POLICIES.get(row["policy"])
    if policy is None or question not in FACT_OF or parse(question, row["response"]) is None:
        raise BadInput(f"toy.reference: not an answer of the toy world: policy {row['policy']!r}, question "
                       f"{question!r}, answer {row['response']!r}.")
    tokens = response_tokens(row["response"])
    tau = [(whole_question(asked), answer) for asked, answer in row["tau"]]
    return {"exact": scripted_q(policy, question, tokens),
            "bayes": bayes_q(tau, question, tokens),
            "decided": [t > len(undecided(tokens)) for t in range(len(tokens) + 1)]}


def values(rows):
    """Exact and Bayes values along each row's answer, and from where on it is decided whether it is right.

    rows     dicts with prompt (messages), policy (name), tau ((question, answer) text pairs), response (text)
    returns  a dict per row of three lists of T + 1 entries, entry 0 before anything is said, entry t after
             token t: exact and bayes (floats, units of r), decided (bools, from the token after "is" on)
    """
    return [reference(row) for row in rows]
