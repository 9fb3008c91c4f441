"""The runs behind results/smol/, one command each; finished ones are kept, as in results/run.py.

    python smol/run.py answers      what the policies say (smol/labels.jsonl, smol/unseen.jsonl) and what
                                    prefixes of their held-out answers are worth; the repository has the files
    python smol/run.py values       GVMs with K = 0 and 4, against these values
    python smol/run.py policies     DVPO, PPO and PPO with the true reward at three learning rates, from the
                                    same start
    python smol/run.py others       further methods at one rate; --seeds 1
    python smol/run.py critic       PPO's critic as a value model, beside the GVMs
    python smol/run.py along        how wrong the frozen GVM gets while DVPO's policy moves
    python smol/run.py figure       the README's first picture; true reward against KL

On a GPU many of these small processes share it: --jobs 20.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

from run import Grid, column, of_policies, rows_of, save_table, spread
from plumbing.files import write_picture, write_whole
from smol.defaults import LABELS, MODEL, UNSEEN, VALUES

SEEN_POLICIES, UNSEEN_POLICIES = "smol/policies.json", "smol/unseen_policies.json"
TRUE_REWARD = ["--reward_fn", "smol.sentiment:compound"]
METHODS = {"DVPO": "dvpo", "PPO": "ppo", "PPO, true reward": "ppo"}
RATES = (1e-4, 2e-4, 4e-4)
RATE = 2e-4  # where one has to do


class World(Grid):
    """Runs of `--model smol`, which has no SFT stage: the instruct model is the start and the reference."""

    def __init__(self, out, jobs):
        self.out, self.jobs, self.runs, self.counted = out.resolve(), jobs, [], False
        self.data = ["--model", "smol"], [self.add(self.out / "build", ["-m", "smol.make"])]

    def gvm(self, k, seed, rate=5e-4):
        return self.stage(f"gvm_{k}_{rate:g}_{seed}", "train_gvm", ["--k", k, "--lr", rate, "--seed", seed])

    def script(self, name, script, flags, needs=()):
        return self.add(self.out / name, [script, *flags, "--model", "smol"], [*self.data[1], *needs])

    def policy(self, name, seed, rate, steps=None):
        """A run of one of METHODS."""
        if name == "DVPO":
            gvm = self.gvm(4, 1)
            flags, needs = ["--value_model", gvm.folder], [gvm]
        elif name == "PPO":
            rm = self.rm()
            flags, needs = ["--reward_model", rm.folder, "--critic_every", 15], [rm]
        else:
            flags, needs = TRUE_REWARD, []
        folder = f"{label(name, rate)}_{seed}" + f"_{steps}_steps" * bool(steps)
        return self.stage(folder, f"train_{METHODS[name]}", [
            "--lr", rate, "--seed", seed, *(["--max_steps", steps] if steps else []), *flags], needs)

    def rm(self):
        return self.stage("rm", "train_rm", [])

    def quality(self, gvm, name, values, unseen, needs):
        """evaluate.py gvm against values of continuations.py."""
        return self.script(name, "evaluate.py", [
            "gvm", "--value_model", gvm.folder, "--continuations", *values, "--unseen_data", unseen,
            "--pairs", 20, "--json", self.out / name / "gvm.json"], [gvm, *needs])

    def answers(self, name, policies, file, values, shares, needs=()):
        """label.py, then continuations.py."""
        labels = self.script(f"labels_{name}", "label.py", [
            "--policies", policies, "--shares", *shares, "--out", file], needs)
        return self.script(f"values_{name}", "continuations.py", [
            "--policies", policies, "--data", file, "--out", values], [labels])


def label(name, rate=None):
    """For folders and names of policies."""
    return name.lower().replace(", ", "_").replace(" ", "_") + (f"_{rate:g}" if rate else "")


def answers(grid, seeds):
    """Written into the repository, where label.py and continuations.py find their own and do nothing."""
    sampled(grid)
    grid.execute()


def sampled(grid):
    """The runs whose files values() reads."""
    return [grid.answers("seen", SEEN_POLICIES, LABELS, VALUES["seen"], ["value", "test"]),
            grid.answers("unseen", UNSEEN_POLICIES, UNSEEN, VALUES["unseen"], ["test"])]


def sampled_error(run):
    """{who: {policy: [the numbers of each place]}} of evaluate.py gvm."""
    return json.loads((run.folder / "gvm.json").read_text())["continuations"]


def values(grid, seeds):
    """RMSE of the GVM to the sampled values by place of the answer, seen and unseen policies; what it expects
    of each before a word is said; its ranking."""
    needs, table = sampled(grid), {}
    gvms = {k: [grid.gvm(k, seed) for seed in seeds] for k in (0, 4)}
    quality = {k: [grid.quality(gvm, f"{gvm.folder.name}_quality", VALUES.values(), UNSEEN, needs)
                   for gvm in found] for k, found in gvms.items()}
    grid.execute()
    rmse, first = {}, defaultdict(dict)
    for k, runs in quality.items():
        errors = list(map(sampled_error, runs))
        table[f"K = {k}"] = spread({"held-out pairs ranked right": [
            rows_of(gvm)[-1]["eval/accuracy"] for gvm in gvms[k]]})
        for who in ("seen", "unseen"):
            places = {key: {f"{place['place']:g} read": [e[who]["all"][i][key] for e in errors]
                            for i, place in enumerate(errors[0][who]["all"])} for key in ("rmse", "constant")}
            rmse[f"{who}, K = {k}"], rmse[f"{who}, constant"] = map(spread, places.values())
            for policy in errors[0][who].keys() - {"all"}:
                start = [e[who][policy][0] for e in errors]
                first[f"{policy}, {who}"].update(spread({
                    "sampled": [x["sampled"] for x in start], f"K = {k}": [x["value"] for x in start],
                    f"RMSE, K = {k}": [x["rmse"] for x in start]}))
    save_table("smol/ranking", table, ["held-out pairs ranked right"])
    save_table("smol/values", dict(sorted(rmse.items())), [*places["rmse"]])
    save_table("smol/before", dict(sorted(first.items())), [*next(iter(first.values()))])
    write_whole(ROOT / "results/smol/evaluations.json", json.dumps(
        {f"K = {k}": list(map(sampled_error, runs)) for k, runs in quality.items()}) + "\n")


def policies(grid, seeds, rates):
    """The same prompts, noise, KL target and number of sampled answers for all."""
    compared(grid, {(name, rate, seed): grid.policy(name, seed, rate)
                    for rate in rates for seed in seeds for name in METHODS})


def others(grid, seeds):
    """Further methods, at one rate."""
    gvm, rm, found = grid.gvm(4, 1), grid.rm(), {}
    for seed in seeds:
        found.update({
            ("DVPO, q", RATE, seed): grid.stage(f"dvpo_q_{seed}", "train_dvpo", [
                "--advantage", "q", "--lr", RATE, "--seed", seed, "--value_model", gvm.folder], [gvm]),
            ("GRPO", RATE, seed): grid.stage(f"grpo_{seed}", "train_grpo", [
                "--lr", RATE, "--seed", seed, "--reward_model", rm.folder], [rm]),
            ("ReMax", RATE, seed): grid.stage(f"remax_{seed}", "train_remax", [  # two answers to a prompt
                "--lr", RATE, "--seed", seed, "--reward_model", rm.folder, "--max_steps", 15], [rm]),
            ("DPO", 1e-4, seed): grid.stage(f"dpo_{seed}", "train_dpo", ["--seed", seed])})
    compared(grid, found)


def compared(grid, runs):
    """Evaluate the runs {(method, rate, seed): run}, four answers to each held-out prompt, beside what their
    start says; add them to results/smol/runs.json, and write the table of all that are there."""
    by_seed, final = defaultdict(dict), {}
    for (name, rate, seed), run in runs.items():
        by_seed[rate, seed][name] = run
    for (rate, seed), found in by_seed.items():
        words = [f"start_1={MODEL}", *(f"{label(name)}_1={run.folder}" for name, run in found.items())]
        folders = [grid.out / f"held_out/{'_'.join(map(label, found))}_{rate:g}_{seed}_{draw}"
                   for draw in range(1, 5)]
        final[rate, seed] = [grid.script(folder, "evaluate.py", [
            "policy", "--policies", *words, "--seed", 10 * seed + draw, "--json", folder / "policy.json",
            "--out", folder / "answers.jsonl"], found.values()) for draw, folder in enumerate(folders, 1)]
    grid.execute()
    file = ROOT / "results/smol/runs.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    for (name, rate, seed), run in runs.items():
        rewards, start = rewards_by_group(final[rate, seed]), of_policies(final[rate, seed], "start", 1)
        numbers = {**of_policies(final[rate, seed], label(name), 1), "start": start["true reward"]}
        rows = rows_of(run)
        known[f"{name}, {rate:g}, {seed}"] = {
            **{key: round(float(x), 4) for key, (x,) in numbers.items()},
            "seconds": round(column(rows, "timing/step_total").sum(), 1),
            "peak GB": round(rows[-1]["memory/peak_gb"], 2),
            "gain": np.round(rewards[f"{label(name)}_1"] - rewards["start_1"], 3).tolist(),
            "curve": {key: [row.get(key) and round(row[key], 4) for row in rows] for key in CURVES}}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in known.items())
    write_whole(file, f"{{\n{lines}\n}}\n")
    tables(known)


def tables(known):
    """Table of all runs, the gain of each over its start, things asked about of one weight, and where there
    is PPO at a rate, the others' gain beside its, as it is and at equal KL: it grows about as sqrt(KL)."""
    cells, columns = by_cell(known), ["true reward", "KL", "length", "truncated", "seconds", "peak GB"]
    table = {"start": spread({"true reward": sorted({found["start"] for found in known.values()})})}
    table.update({cell: spread({key: [run[key] for run in found] for key in columns})
                  for cell, found in cells.items()})
    save_table("smol/policies", table, columns)
    for name, found in known.items():
        gain = np.array(found["gain"])
        print(f"{name}: gain {gain.mean():.3f}, {gain.mean() / gain.std(ddof=1) * len(gain) ** 0.5:.1f} "
              f"standard errors over the things asked about")
    for rate in RATES:
        for power, of in ((0, "gain"), (0.5, "gain / sqrt(KL)")):
            found = {name: np.array([np.array(run["gain"]) / run["KL"] ** power
                                     for run in cells[f"{name}, {rate:g}"]]) for name in METHODS}
            for ours, theirs in (("DVPO", "PPO"), ("PPO, true reward", "PPO"), ("DVPO", "PPO, true reward")):
                if len(found[ours]) and len(found[theirs]):
                    ratio(f"{of} of {ours} / {theirs}, {rate:g}", found[ours], found[theirs])


def by_cell(known):
    """{"method, rate": its runs, one per seed}, of the runs {"method, rate, seed": run}."""
    cells = defaultdict(list)
    for name, run in known.items():
        cells[name.rpartition(", ")[0]].append(run)
    return cells


CURVES = ("objective/true_reward", "objective/kl", "completions/mean_length", "gvm/drift",
          "eval/true_reward", "eval/kl")


def rewards_by_group(evaluations):
    """{policy: mean true reward on the held-out prompts about each thing}, the things in one order."""
    found = defaultdict(lambda: defaultdict(list))
    for run in evaluations:
        for line in (run.folder / "answers.jsonl").read_text().splitlines():
            row = json.loads(line)
            found[row["policy"]][row["group"]].append(row["scores"]["truth"])
    return {name: np.array([np.mean(rewards[group]) for group in sorted(rewards)])
            for name, rewards in found.items()}


def ratio(name, ours, theirs, draws=10_000):
    """Ratio of two means, [seeds, things asked about] each, with a 95 % interval: bootstrap over both."""
    rng, found = np.random.default_rng(0), []
    things = ours.shape[1]
    for _ in range(draws):
        picked = rng.integers(things, size=things)
        a, b = (side[rng.integers(len(side), size=len(side))][:, picked].mean() for side in (ours, theirs))
        found.append(a / b)
    low, high = np.percentile(found, [2.5, 97.5])
    print(f"{name}: {ours.mean() / theirs.mean():.2f} ({low:.2f} to {high:.2f})")


def critic(grid, seeds):
    """How well PPO's critic ranks the held-out pairs in the middle and at the end of its run, GVMs beside
    it."""
    models = defaultdict(list)
    for seed in seeds:
        ppo = grid.policy("PPO", seed, RATE)
        for steps in (15, 30):
            models[f"critic, {steps} steps"].append((f"{ppo.folder.name}_{steps}", ppo,
                                                     ppo.folder / f"critic_{steps}"))
        for k in (0, 4):
            gvm = grid.gvm(k, seed)
            models[f"GVM, K = {k}"].append((gvm.folder.name, gvm, gvm.folder))
    ranked = {label: [grid.script(f"ranked_{name}", "evaluate.py", [
        "gvm", "--value_model", folder, "--json", grid.out / f"ranked_{name}/gvm.json"], [run])
        for name, run, folder in found] for label, found in models.items()}
    grid.execute()
    table = {label: spread({"held-out pairs ranked right": [
        json.loads((run.folder / "gvm.json").read_text())["ranking"]["shared_tau"]["mean"]["accuracy"]
        for run in runs]}) for label, runs in ranked.items()}
    save_table("smol/critic", table, ["held-out pairs ranked right"])


def along(grid, seeds):
    """The GVM's error on the policy at its start and after 10 and 30 steps, whose own answers are tau, beside
    the KL and gvm/drift of the five steps up to there (of the start: of the first three)."""
    gvm, runs = grid.gvm(4, 1), []
    start = grid.quality(gvm, f"{gvm.folder.name}_quality", VALUES.values(), UNSEEN, sampled(grid))
    for seed in seeds:
        found = {10: grid.policy("DVPO", seed, RATE, 10), 30: grid.policy("DVPO", seed, RATE)}
        folder = grid.out / f"along_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "policies.json"
        file.write_text(json.dumps([{"name": f"{steps} steps", "model": str(run.folder), "temperature": 0.7}
                                    for steps, run in found.items()]))
        labels, continued = folder / "labels.jsonl", folder / "values.jsonl"
        done = grid.answers(f"along_{seed}", file, labels, continued, ["test"], found.values())
        runs.append((found, grid.quality(gvm, f"along_{seed}_quality", [continued], labels, [done])))
    grid.execute()
    table = defaultdict(lambda: defaultdict(list))
    for seed, (found, quality) in zip(seeds, runs):
        measured = {"start": (sampled_error(start)["seen"]["plain"], rows_of(found[30])[:3])}
        for steps, run in found.items():
            measured[f"{steps} steps"] = sampled_error(quality)["unseen"][f"{steps} steps"], rows_of(run)[-5:]
        for label, (places, rows) in measured.items():
            numbers = {"KL": column(rows, "objective/kl").mean(),
                       "gvm/drift": column(rows, "gvm/drift").mean()}
            for part, some in (("before a word", places[:1]), ("later", places[1:])):
                numbers[f"RMSE, {part}"] = np.mean([place["rmse"] for place in some])
                numbers[f"constant, {part}"] = np.mean([place["constant"] for place in some])
                numbers[f"bias, {part}"] = np.mean([place["value"] - place["sampled"] for place in some])
            print(f"seed {seed}, {label}:", *(f"{name} {number:.3f}" for name, number in numbers.items()))
            for name, number in numbers.items():
                table[label][name].append(number)
    save_table("smol/along", {label: spread(found) for label, found in table.items()}, [*table["start"]])


def figure(grid, seeds):
    """The README's first picture: curves of results/smol/runs.json, and what the GVM says after each token of
    two answers to a held-out question; true reward against KL."""
    from matplotlib.figure import Figure
    gvm = grid.gvm(4, 1)
    shown = {tau: grid.script(f"shown_{tau}", "evaluate.py", [
        "values", "--value_model", gvm.folder, "--tau_policy", tau, "--json",
        grid.out / f"shown_{tau}/values.json"], [gvm]) for tau in ("plain", "gloomy")}
    grid.execute()
    cells = by_cell(json.loads((ROOT / "results/smol/runs.json").read_text()))
    picture = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = picture.subfigures(1, 2, width_ratios=(1, 1.3))
    panels = {"objective/true_reward": "true reward: sentiment of the answers",
              "objective/kl": "KL to the start [nats]"}
    for axis, (key, title) in zip(left.subplots(2, sharex=True), panels.items()):
        for name in METHODS:
            curves = np.array([run["curve"][key] for run in cells[f"{name}, {RATE:g}"]])
            if not len(curves):
                continue
            smooth = np.array([curves[:, max(0, i - 4):i + 1].mean(1) for i in range(curves.shape[1])])
            line, = axis.plot(smooth.mean(1), label=name)
            axis.fill_between(range(len(smooth)), smooth.min(1), smooth.max(1), alpha=0.2, linewidth=0,
                              color=line.get_color())
        axis.set_title(title, fontsize=9)
    axis.set_xlabel("step (mean of the last five; band: all seeds)")
    axis.legend(fontsize=8)
    axis = right.subplots()
    for run, style in zip(shown.values(), ("-", ":")):
        found = json.loads((run.folder / "values.json").read_text())
        for answer, colour, side in zip(found["responses"], ("tab:green", "tab:red"), (1, -1)):
            axis.plot(answer["values"], style, marker="o", markersize=3, color=colour)
            for i, (token, value) in enumerate(zip(["(prompt)", *answer["tokens"]], answer["values"])):
                if style == "-":
                    axis.annotate(token.strip(), (i, value), (0, 6 * side), textcoords="offset points",
                                  rotation=60, fontsize=8, color=colour, ha="center",
                                  va="bottom" if side > 0 else "top")
    axis.set_title(f"{found['question']}\ntau: {found['k']} answers of {' (line), of '.join(shown)} (dots)",
                   fontsize=9)
    axis.set(xlabel="token", ylabel="value after the token", ylim=(-1, 1))
    write_picture(ROOT / "results/smol/first.png", picture)
    frontier(cells)


def frontier(cells):
    """Gain in true reward against KL on the held-out prompts, a point per run."""
    from matplotlib.figure import Figure
    picture = Figure(figsize=(8, 4), layout="constrained")
    axis, colours = picture.subplots(), {}
    for name, runs in cells.items():
        method, _, rate = name.rpartition(", ")
        marker = "v" if float(rate) < RATE else "^" if float(rate) > RATE else "o"
        axis.plot([run["KL"] for run in runs], [np.mean(run["gain"]) for run in runs], marker, label=name,
                  color=colours.setdefault(method, f"C{len(colours)}"))
    axis.set(xlabel="KL to the start [nats]", ylabel="gain in true reward")
    axis.legend(fontsize=8, title="learning rate last", title_fontsize=8, bbox_to_anchor=(1, 1))
    write_picture(ROOT / "results/smol/frontier.png", picture)


if __name__ == "__main__":
    experiments = {f.__name__: f for f in (answers, values, policies, others, critic, along, figure)}
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("experiment", choices=experiments)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, each on one core")
    parser.add_argument("--out", type=Path, default=Path("runs/smol"), help="folder of the runs")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates of `policies`")
    args = parser.parse_args()
    more = [args.rates] if args.experiment == "policies" else []
    experiments[args.experiment](World(args.out, args.jobs), args.seeds, *more)
