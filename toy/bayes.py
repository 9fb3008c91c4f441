"""The best that any value model can do here: the Bayes estimate of Q given tau and the prefix.

A value model that has seen the eight training policies, and is shown K answers of one policy (tau) and a
prefix, can do no better than the posterior mean under a uniform prior over the policies,

    Q_bayes(tau, prefix) = sum_k w_k Q_k(prefix),        w_k ~ P_k(tau) P_k(prefix)

so the distance of a trained value model to the exact Q splits into what nobody can know (Bayes to exact) and
what the model failed to learn (model to Bayes).
"""
import numpy as np

from toy.world import MALFORMED, TRAINING, parse, prefix_probability, prefix_value, prefixes, response_tokens


def tau_weights(tau, policies=TRAINING):
    """P_k(tau) of each policy over that of the likeliest: [len(policies)]. Malformed answers are skipped."""
    logs = np.zeros(len(policies))                               # in logs, because a long tau would underflow
    for question, answer in tau:
        if parse(question, answer) is not None:
            whole = tuple(response_tokens(answer))
            logs += np.log([prefix_probability(policy, question, whole) for policy in policies])
    return np.exp(logs - logs.max())


def posterior_mean(weights, prompt, response, policies):
    """Mean of Q_k over the policies at every prefix of a response, weighted by weights [N] times P_k(prefix).

    response:  T tokens;  returns T + 1 floats, MALFORMED where no policy can have written the prefix
    """
    means = []
    for prefix in prefixes(response):
        joint = weights * [prefix_probability(policy, prompt, prefix) for policy in policies]        # [N]
        values = [prefix_value(policy, prompt, prefix) for policy in policies]                       # [N]
        means.append(float(joint @ values / joint.sum()) if joint.sum() > 0 else MALFORMED)
    return means


def bayes_q(tau, prompt, response_tokens, policies=TRAINING):
    """Bayes estimate of the values along a response, given tau.

    tau:              list of (question, answer) text pairs written by one policy, answers without EOS
    response_tokens:  T tokens, the final EOS included
    returns           T + 1 floats in units of r: entry 0 is V(s_1), entry t is Q after token t
    """
    return posterior_mean(tau_weights(tau, policies), prompt, response_tokens, policies)


def undecided(tokens):
    """The beginning of a response before the token that decides: up to and including the first "is"."""
    return tokens[:tokens.index("is") + 1]
