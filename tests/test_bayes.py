"""The Bayes estimate of the toy world, which bounds every value model: against its definition, and what tau
and style are worth in it."""

import numpy as np
import pytest

from test_toy import conditional_mean, enumerate_policy
from toy import bayes, world
from toy.world import EOS, MALFORMED, PROMPTS, TRAINING


def test_bayes_without_tau_is_its_definition():
    prompt = PROMPTS[100]
    tokens = world.response_tokens(world.answers(prompt)[20])
    tables = [enumerate_policy(policy, prompt) for policy in TRAINING]
    for t, value in enumerate(bayes.bayes_q([], prompt, tokens)):
        means, masses = zip(*(conditional_mean(table, tuple(tokens[:t])) for table in tables))
        assert value == pytest.approx(np.average(means, weights=masses), abs=1e-12)
    assert bayes.bayes_q([], prompt, ["island"])[-1] == MALFORMED


def test_bayes_weighs_tau_by_its_likelihood():
    prompt, question = PROMPTS[0], PROMPTS[200]
    tau = [(question, world.answers(question)[7]), (question, "it is")]        # the malformed one is skipped
    tokens = tuple(world.answers(question)[7].split()) + (EOS,)
    weights = [enumerate_policy(policy, question)[tokens][0] for policy in TRAINING]
    means = [conditional_mean(enumerate_policy(policy, prompt), ())[0] for policy in TRAINING]
    assert bayes.bayes_q(tau, prompt, [])[0] == pytest.approx(np.average(means, weights=weights), abs=1e-12)


@pytest.mark.parametrize("policy", TRAINING, ids=lambda policy: policy.name)
def test_bayes_with_a_long_tau_finds_the_policy(policy):
    rng = np.random.default_rng(3)
    prompt = PROMPTS[17]
    tau = sum((world.draw_tau(policy, prompt, 31, rng) for _ in range(20)), [])
    assert all(world.group_of(question) != world.group_of(prompt) for question, _ in tau)
    tokens = world.response_tokens(world.sample_answer(policy, prompt, rng))
    exact_q = world.scripted_q(policy, prompt, tokens)
    assert bayes.bayes_q(tau, prompt, tokens) == pytest.approx(exact_q, abs=0.02)


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
        tokens = bayes.undecided(world.response_tokens(world.sample_answer(policy, prompt, rng)))
        estimate = bayes.bayes_q(world.draw_tau(policy, prompt, k, rng), prompt, tokens, prior)
        errors.extend(np.subtract(estimate, world.scripted_q(policy, prompt, tokens)))
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
        scores = [world.score(prompt, world.sample_answer(policy, prompt, rng), rng) for policy in writers]
        values = [bayes.bayes_q(world.draw_tau(policy, prompt, k, rng), prompt, [])[0] for policy in writers]
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


def test_the_style_does_not_give_the_skill_away():
    checks = leak_checks(np.random.default_rng(0), rows=400)
    assert checks["style_ratio"] >= 0.97
    assert checks["tau_accuracy_0"] == 0.5
    assert 0.55 < checks["tau_accuracy_2"] < 0.75 and 0.55 < checks["tau_accuracy_4"] < 0.75


def test_tau_is_worth_something():
    rmse = [bayes_rmse(k, np.random.default_rng(1), rows=600) for k in (0, 2, 4)]
    assert rmse == pytest.approx([0.42, 0.28, 0.22], abs=0.03)
