"""One prompt of the toy world through one step of DVPO, phase by phase; docs/walkthrough.md explains each.

    python -m toy.walkthrough    after `make demo`; it takes the flags of train_dvpo.py

Runs the functions of train_dvpo.py as `make demo` does, up to step STEP, and prints what becomes of the
shortest well-formed wrong answer of that step. Draws docs/walkthrough.png (another folder: --output_dir).
"""

import textwrap

import torch
from matplotlib.figure import Figure

from common import Run, chat_ids, epoch_rows, keyed_rng, row_seed
from plumbing.args import parse_args
from plumbing.files import write_picture
from plumbing.inputs import gvm_inputs, rl_inputs
from plumbing.ranks import init_distributed, seed_everything
from plumbing.rl import fit_tau
from plumbing.rows import rl_prompts
from toy import exact, world
from train_dvpo import Args, advantages, draw_tau, load_models, next_kl_coef, rollout, score, update

STEP = 4  # late enough that the policy is no longer the reference, early enough that it is often wrong


def table(title, lines):
    """lines: {name: cells}, one for each of its lines"""
    print(f"\n{title}")
    for name, cells in lines.items():
        print(f"{name:<18}" + "".join(f" {round(x, 3) + 0.0:>7.3f}" if isinstance(x, float) else f" {x:>7}"
                                      for x in cells))


def main(args):
    # The loop of train_dvpo.main from step 0 to STEP, without its log and checkpoints
    rank, ranks, device = init_distributed()
    seed_everything(args.seed)
    sft, tokenizer, config = rl_inputs(args, ranks)
    gvm_folder, settings = gvm_inputs(args, sft, tokenizer)
    train, _ = rl_prompts(tokenizer, args, ranks)
    run = Run(args, tokenizer, device, rank, ranks)
    models = load_models(sft, sft, gvm_folder, settings, config, run)
    roll_out = lambda picks, places: rollout(models.policy, [train[i] for i in picks],
                                             [row_seed(args.seed, place) for place in places], run)
    next_beta, B, k = args.kl_coef, args.rollout_batch, settings["k"]
    for step in range(STEP + 1):
        beta, picks = next_beta, epoch_rows(len(train), step * B, B, args.seed)
        rows = roll_out(picks, range(step * B, step * B + B))
        groups = {train[i]["group"] for i in picks}
        if step == 0:
            extra = sorted(keyed_rng("first tau", args.seed).permutation(len(train))[:4 * k + B],
                           key=lambda i: train[i]["group"] in groups)[:k]
            previous = roll_out(extra, range(-1, -1 - k, -1))
        tau = fit_tau(draw_tau(previous, groups, k, keyed_rng("tau", args.seed, step)), rows, settings, run)
        batch, _, logp, ref_logp, values = scored = score(models, rows, tau, run)
        kl = (logp - ref_logp) * batch.mask
        penalty = beta * kl  # and nothing else: on the toy a missing EOS costs nothing
        (gae, mu, sigma), (eq2, mu2, sigma2) = (
            advantages(kind, values, penalty, batch.mask, args.gae_lam) for kind in ("gae", "q"))
        advantage = gae if args.advantage == "gae" else eq2
        truth = exact.values(rows, models.policy, tokenizer)  # of the policy that sampled
        stats, first_ratio = update(models, scored, advantage, step, run)
        next_beta = next_kl_coef(beta, kl.sum().item() / B, args.kl_target, args.kl_horizon, B)
        previous = rows
    after = score(models, rows, tau, run).logp

    # Row i is followed: n tokens, of which y_t, the one behind "is", decides
    words = [[tokenizer.decode([token]) for token in row["response_ids"]] for row in rows]
    parsed = [world.parse(exact.question_of(row), " ".join(answer[:-1])) for row, answer in zip(rows, words)]
    i = min(range(B), key=lambda i: (parsed[i] is None, parsed[i] and parsed[i].right, len(words[i])))
    row, m, n = rows[i], len(rows[i]["prompt_ids"]), len(words[i])
    P, T, t, q = batch.P, batch.ids.shape[1], words[i].index("is") + 2, values[i, :n + 1].tolist()
    ids = batch.ids[i, P - 1:P + n + 1].tolist()
    of = lambda x: ["", *x[i, :n].tolist()]  # its part of a tensor [B, R], for a table
    print(f"step {STEP}, row {i} of {B}: {exact.question_of(row)!r} -> {row['response']!r}")
    table(f"1. rollout: P = {P}, {P - m} of them padding; R = {T - P}; T = {T}", {
        "t": range(n + 1), "token": map(tokenizer.decode, ids), "id": ids,
        "column": range(P - 1, min(P + n + 1, T)), "mask": ["", *batch.mask[i, :n + 1].int().tolist()],
        "log pi read at": ["", *range(P - 1, P + n - 1)], "Q_t read at": range(P - 1, P + n),
        "pi(a_t|s_t)": of(logp.exp())})

    text = chat_ids(tokenizer, row["prompt"], tau)
    other = [(x, world.answer_text(x, p._replace(right=not p.right)) if (p := world.parse(x, y)) else y)
             for x, y in tau]
    turned, empty = (models.value([row], pairs)[0].tolist() for pairs in (other, []))
    versions = {"this tau": q, "verdicts turned": turned, "no tau": empty, "exact": truth[i]}
    table(f"2. tau: {len(tau)} answers of step {STEP - 1} in front of the prompt, {len(text) - m} tokens\n"
          + textwrap.fill(tokenizer.decode(text), 108), {
              "": ["V(s_1)", f"Q_{t - 1}", f"Q_{t}", f"Q_{n}", "jump"],
              **{name: [v[0], v[t - 1], v[t], v[n], v[t] - v[t - 1]] for name, v in versions.items()}})

    jump = values[:, 1:] - values[:, :-1]
    table(f"3. token values: y_{t} = {words[i][t - 1]!r} decides", {
        "token": ["", *words[i]], "Q_t, GVM": q, "Q_t, exact": truth[i], "Q_t - Q_(t-1)": of(jump)})
    table(f"4. KL and penalty: beta = {beta:.4f}", {
        "log pi": of(logp), "log pi_ref": of(ref_logp), "KL_t": of(kl), "beta KL_t": of(penalty)})
    table(f"5. advantage: lambda = {args.gae_lam}; over {int(batch.mask.sum())} tokens mu = {mu:.4f} and "
          f"sigma = {sigma:.4f} of gae, {mu2:.4f} and {sigma2:.4f} of q", {
              "delta_t": of(jump - penalty), "gae, raw": of(gae * sigma + mu), "gae, normalized": of(gae),
              "q, raw": of(eq2 * sigma2 + mu2), "q, normalized": of(eq2)})
    ratio, free = (after - logp).exp(), 1 - logp.exp()
    table(f"6. update: {stats['policy/updates']} optimizer steps; largest |ratio - 1| before them "
          f"{first_ratio:.0e}; clipped {stats['policy/clipfrac_avg']:.1%}", {
              "A_t (1 - pi)": of(advantage * free), "log pi before": of(logp), "log pi after": of(after),
              "ratio": of(ratio)})

    place = torch.full(kl.shape, torch.nan)  # of each token, counted from the one that decides
    for j in filter(lambda j: parsed[j], range(B)):
        place[j, :len(words[j])] = torch.arange(len(words[j])) - words[j].index("is") - 1.0
    table("7. all well-formed answers of the batch, means of absolute numbers", {
        "": ["tokens", "jump", "gae", "q", "1 - pi", "ratio-1"], **{
            name: [int(at.sum()), *(x[at].abs().mean().item() for x in (jump, gae, eq2, free, ratio - 1))]
            for name, at in (("before it", place < 0), ("it decides", place == 0), ("after it", place > 0))}})
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, v in versions.items():
        left.plot(v, "s--" if name == "exact" else "o-", label=name, markersize=4)
    for side, name, x in (-0.3, "gae", gae), (0, "gae x (1 - pi)", gae * free), (0.3, "q", eq2):
        right.bar([t + side for t in range(1, n + 1)], x[i, :n].tolist(), 0.3, label=name)
    for axis, title in ((left, "token values [reward]"), (right, "advantage, normalized")):
        axis.set_xticks(range(n + 1), ["V(s_1)", *words[i]], rotation=45)
        axis.set_title(title)
        axis.margins(y=0.3)
        axis.legend(fontsize=8)
    write_picture(f"{args.output_dir or 'docs'}/walkthrough.png", figure)


if __name__ == "__main__":
    main(parse_args(Args))
    torch.distributed.destroy_process_group()
