"""The best that any value model can do here: the Bayes estimate of Q given tau and the prefix.

A value model that has seen the eight training policies, and is shown K answers of one policy (tau) and a
prefix, can do no better than the posterior mean under a uniform prior over the policies,

    Q_bayes(tau, prefix) = sum_k w_k Q_k(prefix),        w_k ~ P_k(tau) P_k(prefix)

so the distance of a trained value model to the exact Q splits into what nobody can know (Bayes to exact) and
what the model failed to learn (model to Bayes).
"""
import numpy as np

from toy.world import (MALFORMED, PROMPTS, TRAINING, draw_tau, parse, prefix_probability, prefix_value,
                       prefixes, sample_answer, score, scripted_q, response_tokens)


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


def bayes_rmse(k, rng, rows=2000, writers=TRAINING, style_known=False):
    """RMSE of the Bayes estimate to the exact Q over all prefixes before the decision, in units of r.

    Each row has a tau of k pairs. Rows take turns through `writers`. The prior is always uniform over the
    training policies, or over those of the writer's own style where the style is known.
    """
    errors = []
    for row in range(rows):
        policy = writers[row % len(writers)]
        prior = [p for p in TRAINING if p.style == policy.style] if style_known else TRAINING
        prompt = str(rng.choice(PROMPTS))
        tokens = undecided(response_tokens(sample_answer(policy, prompt, rng)))
        estimate = bayes_q(draw_tau(policy, prompt, k, rng), prompt, tokens, prior)
        errors.extend(np.subtract(estimate, scripted_q(policy, prompt, tokens)))
    return float(np.sqrt(np.mean(np.square(errors))))


def tau_ranking_accuracy(k, rng, pairs=2000):
    """How often the better-scored of two answers is found without reading them, from each writer's tau alone.

    Two training policies answer one prompt; the one with the higher V(s_1) given its tau is called the
    better. Equal scores are not counted, equal estimates count one half. This is what recognizing the policy
    is worth in a ranking where each answer comes with its own tau, and it is worth nothing where all rows
    share one policy.
    """
    hits = []
    while len(hits) < pairs:
        prompt = str(rng.choice(PROMPTS))
        writers = [TRAINING[i] for i in rng.choice(len(TRAINING), size=2, replace=False)]
        scores = [score(prompt, sample_answer(policy, prompt, rng), rng) for policy in writers]
        values = [bayes_q(draw_tau(policy, prompt, k, rng), prompt, [])[0] for policy in writers]
        if scores[0] != scores[1]:
            hits.append(0.5 + 0.5 * np.sign(values[0] - values[1]) * np.sign(scores[0] - scores[1]))
    return float(np.mean(hits))


def leak_checks(rng, rows=2000):
    """What could be learned without reading an answer's verdict.

    style_ratio:        Bayes RMSE at K = 0 given the style over the one without it; below 0.97 the style
                        would give the skill away
    tau_accuracy_{K}:   ranking accuracy from tau alone, 0.5 at K = 0
    """
    seed = int(rng.integers(1 << 31))                            # both RMSEs on the same rows
    unknown = bayes_rmse(0, np.random.default_rng(seed), rows)
    known = bayes_rmse(0, np.random.default_rng(seed), rows, style_known=True)
    accuracy = {f"tau_accuracy_{k}": tau_ranking_accuracy(k, rng, rows) for k in (0, 2, 4)}
    return {"style_ratio": known / unknown, **accuracy}
