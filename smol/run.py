"""The runs behind results/smol/, one command each; finished ones are kept, as in results/run.py.

    python smol/run.py answers      what the policies say (smol/labels.jsonl, smol/unseen.jsonl) and what
                                    prefixes of their held-out answers are worth; the repository has the files
    python smol/run.py values       GVMs with K = 0, 2 and 4, against these values
    python smol/run.py policies     DVPO, PPO and PPO with the true reward at three learning rates, the others
                                    at one, from the same start
    python smol/run.py along        how wrong the frozen GVM gets while DVPO's policy moves

On a GPU many of these small processes share it: --jobs 20.
"""

import argparse
import itertools
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

from run import Grid, column, of_policies, rows_of, save_table, spread
from plumbing.files import write_whole
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
            flags, needs = ["--reward_model", rm.folder], [rm]
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
            "--json", self.out / name / "gvm.json"], [gvm, *needs])

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
    """RMSE of the GVM to the sampled values by place of the answer, seen and unseen policies; its ranking."""
    needs, found = sampled(grid), {}
    settings = list(itertools.product((0, 2, 4), (2e-4, 5e-4)))
    quality = {(k, rate): [grid.quality(gvm, f"{gvm.folder.name}_quality", VALUES.values(), UNSEEN, needs)
                           for gvm in (grid.gvm(k, seed, rate) for seed in seeds[:2])]
               for k, rate in settings}
    grid.execute()
    for (k, rate), runs in quality.items():
        ranking = [json.loads((run.folder / "gvm.json").read_text())["ranking"] for run in runs]
        errors = list(map(sampled_error, runs))
        numbers = {"pairs ranked right": [r["shared_tau"]["mean"]["accuracy"] for r in ranking]}
        for who in ("seen", "unseen"):
            numbers[who] = [np.mean([place["rmse"] for place in e[who]["all"]]) for e in errors]
            for i, name in itertools.product(range(4), ("rmse", "constant")):
                numbers[f"{who}, place {i}, {name}"] = [e[who]["all"][i][name] for e in errors]
        found[f"K = {k}, {rate:g}"] = {**spread(numbers), "evaluations": errors}
    save_table("smol/values", found, list(numbers))


def policies(grid, seeds):
    """The same prompts, noise, KL target and number of sampled answers for all."""
    cells = {(name, rate): [grid.policy(name, seed, rate) for seed in seeds]
             for rate in sorted(RATES, key=lambda rate: rate != RATE) for name in METHODS}
    gvm, rm = grid.gvm(4, 1), grid.rm()
    cells.update({
        ("DVPO, q", RATE): [grid.stage("dvpo_q", "train_dvpo", [
            "--advantage", "q", "--lr", RATE, "--value_model", gvm.folder], [gvm])],
        ("GRPO", RATE): [grid.stage("grpo", "train_grpo", ["--lr", RATE, "--reward_model", rm.folder], [rm])],
        ("ReMax", RATE): [grid.stage("remax", "train_remax", [  # two answers to a prompt
            "--lr", RATE, "--reward_model", rm.folder, "--max_steps", 20], [rm])],
        ("DPO", 1e-4): [grid.stage("dpo", "train_dpo", [])]})
    final = {}  # a process for each method and draw, as one policy is loaded after the other
    for method in (*METHODS, "others"):
        runs = {f"{label(*cell)}_{i}": run for cell, found in cells.items() for i, run in enumerate(found, 1)
                if cell[0] == method or method == "others" and cell[0] not in METHODS}
        words = [f"start_1={MODEL}", *(f"{name}={run.folder}" for name, run in runs.items())]
        folders = [grid.out / f"held_out/{label(method)}_{draw}" for draw in range(1, 5)]
        final[method] = [grid.script(folder, "evaluate.py", [
            "policy", "--policies", *words, "--seed", draw, "--json", folder / "policy.json",
            "--out", folder / "answers.jsonl"], runs.values()) for draw, folder in enumerate(folders, 1)]
    grid.execute()
    table = {"start": spread(of_policies(final["DVPO"], "start", 1))}
    for (name, rate), runs in cells.items():
        table[f"{name}, {rate:g}"] = spread(of_policies(final.get(name, final["others"]), label(name, rate),
                                                        len(runs)))
    save_table("smol/policies", table, ["true reward", "KL", "length", "truncated"])
    lines = [json.dumps({"run": f"{name}, {rate:g}", "seed": seed, **{key: row.get(key) for key in CURVES}})
             for (name, rate), runs in cells.items() if name != "DPO"
             for seed, run in zip(seeds, runs) for row in rows_of(run)]
    write_whole(ROOT / "results/smol/curves.jsonl", "\n".join(lines) + "\n")
    best = {name: max(RATES, key=lambda rate: table[f"{name}, {rate:g}"]["true reward"]["mean"])
            for name in METHODS}
    print("best rates:", best)
    gains = {name: gain_by_group(final[name], label(name, rate)) for name, rate in best.items()}
    for name, gain in gains.items():
        error = gain.std(1, ddof=1) / gain.shape[1] ** 0.5
        print(f"{name}: gain of each seed {gain.mean(1).round(3)}, in standard errors "
              f"{(gain.mean(1) / error).round(1)}")
    ratio(gains["DVPO"], gains["PPO"])


CURVES = ("step", "objective/true_reward", "objective/kl", "completions/mean_length", "gvm/drift",
          "eval/true_reward", "eval/kl")


def gain_by_group(evaluations, wanted):
    """True reward of the policies wanted_1, wanted_2 .. above that of the start, [policies, things asked
    about]."""
    found = defaultdict(list)
    for run in evaluations:
        for line in (run.folder / "answers.jsonl").read_text().splitlines():
            row = json.loads(line)
            found[row["policy"], row["group"]].append(row["scores"]["truth"])
    groups = sorted({group for _, group in found})
    names = sorted({name for name, _ in found if name.rpartition("_")[0] == wanted})
    return np.array([[np.mean(found[name, group]) - np.mean(found["start_1", group]) for group in groups]
                     for name in names])


def ratio(ours, theirs, draws=10_000):
    """Gain / gain with a 95 % interval: bootstrap over seeds and over the things asked about."""
    rng = np.random.default_rng(0)
    seeds, groups = ours.shape
    found = []
    for _ in range(draws):
        things = rng.integers(groups, size=groups)
        a, b = (side[rng.integers(seeds, size=seeds)][:, things].mean() for side in (ours, theirs))
        found.append(a / b)
    low, high = np.percentile(found, [2.5, 97.5])
    print(f"gain of DVPO / of PPO: {ours.mean() / theirs.mean():.2f} ({low:.2f} to {high:.2f})")


def along(grid, seeds):
    """The GVM's error on the policy after 10, 20 and 40 steps, whose own answers are tau, beside the KL and
    gvm/drift of the last five steps."""
    gvm, runs = grid.gvm(4, 1), []
    for seed in seeds:
        found = {steps: grid.policy("DVPO", seed, RATE, steps) for steps in (10, 20)}
        found[40] = grid.policy("DVPO", seed, RATE)
        folder = grid.out / f"along_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "policies.json"
        file.write_text(json.dumps([{"name": f"{steps} steps", "model": str(run.folder), "temperature": 0.7}
                                    for steps, run in found.items()]))
        labels, sampled = folder / "labels.jsonl", folder / "values.jsonl"
        done = grid.answers(f"along_{seed}", file, labels, sampled, ["test"], found.values())
        runs.append((found, grid.quality(gvm, f"along_{seed}_quality", [sampled], labels, [done])))
    grid.execute()
    table = {}
    for (found, quality), steps in itertools.product(runs, (10, 20, 40)):
        places = sampled_error(quality)["unseen"][f"{steps} steps"]
        last = rows_of(found[steps])[-5:]
        numbers = {"KL": column(last, "objective/kl").mean(), "gvm/drift": column(last, "gvm/drift").mean(),
                   "RMSE": np.mean([place["rmse"] for place in places]),
                   "value": np.mean([place["value"] for place in places]),
                   "sampled": np.mean([place["sampled"] for place in places])}
        for name, number in numbers.items():
            table.setdefault(f"{steps} steps", {}).setdefault(name, []).append(number)
    save_table("smol/along", {label: spread(numbers) for label, numbers in table.items()}, list(numbers))


if __name__ == "__main__":
    experiments = {f.__name__: f for f in (answers, values, policies, along)}
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("experiment", choices=experiments)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, each on one core")
    parser.add_argument("--out", type=Path, default=Path("runs/smol"), help="folder of the runs")
    args = parser.parse_args()
    experiments[args.experiment](World(args.out, args.jobs), args.seeds)
