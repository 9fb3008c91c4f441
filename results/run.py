"""The runs behind the tables of the README and of results/README.md, on the toy world, one command each.

    python results/run.py compare          the six methods, 5 seeds (what `make compare` does)
    python results/run.py pipeline         what all stages cost until a true reward is reached
    python results/run.py baseline         PPO with room, against exact advantages
    python results/run.py advantage        (a) --advantage x where the values come from, and PPO
    python results/run.py lam              (b) lambda of TD(lambda)
    python results/run.py conditioning     (c) K, pairs of tau
    python results/run.py normalization    (d) scope of Eq. 2, KL inside or outside of it
    python results/run.py drift            (e) the frozen GVM's error on the policy as it moves
    python results/run.py frontier         (f) true reward against KL
    python results/run.py lr               the learning rates that `compare` uses were chosen by this
    python results/run.py beta             and DPO's beta by this
    python results/run.py instruction      the Instruction setting: label.py, then GVM and DVPO
    python results/run.py refresh          a GVM that learns from the policy's own answers, in rounds
    python results/run.py critic           PPO's critic as a value model, beside the GVM

Every run is a command line of the project's own scripts, printed before it starts; --jobs of them run at a
time, each on one core. A finished run is kept (its folder has `done`), so that an interrupted grid continues.
A table is written to results/<name>.json and printed. Variants that are not in the scripts are patches under
results/ablations/, applied to a copy. Delete --out after a change of the code: only commands are compared.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from plumbing.files import write_picture, write_whole
from steps import tokens_of

TAIL, KL_TAIL = 5, 20  # final reward: mean of the last 5 steps; KL and length: of the last 20


# ---- running -----------------------------------------------------------------------------------------------

@dataclass
class Run:
    folder: Path
    command: list
    needs: list = field(default_factory=list)
    cwd: Path = ROOT

    def done(self):
        marker = self.folder / "done"
        return marker.exists() and marker.read_text() == self.text()

    def line(self):
        return " ".join(map(str, self.command))

    def text(self):
        """What this run was made by, the runs it needs included: when one of them changes, so does this."""
        return "\n".join([*(run.text() for run in self.needs), self.line()])


class Grid:
    """Collects runs, then executes them: `jobs` at a time, each after the runs it needs."""

    def __init__(self, out, jobs):
        self.out, self.jobs, self.runs = out.resolve(), jobs, []
        self.counted = False  # whether the tokens of what is added are counted
        self.toy = self.out / "toy/build"
        toy = self.add(self.out / "toy", ["-m", "toy.make", "--out", self.toy])
        self.data = ["--data", self.toy / "preferences.jsonl"], [toy]

    def add(self, folder, command, needs=(), cwd=ROOT):
        run = Run(folder, command, list(needs), cwd)
        known = next((r for r in self.runs if r.folder == folder), None)
        if known is None:
            self.runs.append(run)
        return known or run

    def stage(self, name, script, flags, needs=(), cwd=ROOT):
        data, made = self.data
        count = [ROOT / "benchmarks/steps.py", self.out / name / "counts.jsonl", "-", "-"]
        return self.add(self.out / name, [*count * self.counted, f"{script}.py", "--output_dir",
                                          self.out / name, *data, *flags], [*made, *needs], cwd)

    def sft(self, seed):
        toy = self.data[1]
        return self.add(self.out / f"sft_{seed}", [
            "sft.py", "--output_dir", self.out / f"sft_{seed}", "--base_model", self.toy / "model",
            "--data", self.toy / "sft.jsonl", "--seed", seed], toy)

    def gvm(self, seed, *flags):
        sft = self.sft(seed)
        name = "_".join(["gvm", str(seed), *(str(f).strip("-") for f in flags)])
        return self.stage(name, "train_gvm", ["--sft_model", sft.folder, "--seed", seed, *flags], [sft])

    def rm(self, seed):
        sft = self.sft(seed)
        return self.stage(f"rm_{seed}", "train_rm", ["--sft_model", sft.folder, "--seed", seed], [sft])

    def before(self, script, seed, steps, *flags):
        """A GVM or a reward model of SFT model 1 that is trained for so many steps."""
        sft = self.sft(1)
        name = "_".join(str(part).strip("-") for part in (script, *flags, steps, seed))
        return self.stage(f"pipeline/{name}", script, [
            "--sft_model", sft.folder, "--seed", seed, "--max_steps", steps, "--eval_every", 0, *flags],
            [sft])

    def dvpo(self, name, seed, base, *flags, values=None, patch=None):
        """values: the run of a GVM, or "exact"; base: seed of the SFT model; patch: file in ablations/."""
        sft = self.sft(base)
        plug = (["--value_fn", "toy.exact:values"] if values == "exact"
                else ["--value_model", values.folder])
        return self.stage(f"{name}/{seed}", "train_dvpo",
                          ["--sft_model", sft.folder, *plug, "--seed", seed, "--eval_every", 0, *flags],
                          [sft, *([] if values == "exact" else [values])],
                          self.patched(patch) if patch else ROOT)

    def ppo(self, name, seed, base, *flags, script="train_ppo"):
        """Also of ReMax, which asks the same of a run."""
        sft, rm = self.sft(base), None if "--reward_fn" in flags else self.rm(base)
        model = ["--reward_model", rm.folder] if rm else []
        return self.stage(f"{name}/{seed}", script,
                          ["--sft_model", sft.folder, *model, "--seed", seed, "--eval_every", 0, *flags],
                          [sft, *([rm] if rm else [])])

    def dpo(self, name, seed, base, *flags):
        sft = self.sft(base)
        return self.stage(f"{name}/{seed}", "train_dpo",
                          ["--sft_model", sft.folder, "--seed", seed, "--eval_every", 0, *flags], [sft])

    def held_out(self, name, policies, draws=4):
        """evaluate.py policy on them, as JSON, once for each draw of answers to the held-out prompts.
        policies: {name: run}, the reference first"""
        words = [f"{label}={run.folder}" for label, run in policies.items()]
        folders = {draw: self.out / f"{name}_{draw}" for draw in range(1, draws + 1)}
        return [self.add(folder, ["evaluate.py", "policy", *self.data[0], "--policies", *words, "--seed",
                                  draw, "--json", folder / "policy.json"], list(policies.values()))
                for draw, folder in folders.items()]

    def quality(self, gvm, model=None):
        """evaluate.py gvm on it, or on a model that this run kept, as JSON."""
        model = model or gvm.folder
        folder = model.with_name(model.name + "_quality")
        return self.add(folder, ["evaluate.py", "gvm", "--value_model", model, "--pairs", 100,
                                 *self.data[0], "--unseen_data", self.toy / "unseen.jsonl",
                                 "--json", folder / "gvm.json"], [gvm])

    def patched(self, name):
        """A copy of the scripts with results/ablations/<name>.patch applied."""
        copy = self.out / "patched" / name
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir(parents=True)
        for path in ROOT.glob("*.py"):
            shutil.copy(path, copy)
        skip = shutil.ignore_patterns("build", "__pycache__")
        for folder in ("plumbing", "toy", "ds_configs"):
            shutil.copytree(ROOT / folder, copy / folder, ignore=skip)
        patch = ROOT / "results/ablations" / f"{name}.patch"
        subprocess.run(["git", "apply", str(patch)], cwd=copy, check=True,
                       env={**os.environ, "GIT_CEILING_DIRECTORIES": str(copy.parent)})
        return copy

    def execute(self):
        waiting, running = [run for run in self.runs if not run.done()], []
        print(f"{len(self.runs)} runs, {len(waiting)} of them to do, {self.jobs} at a time", flush=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        while waiting or running:
            for run in [r for r in waiting if all(n.done() for n in r.needs)][:self.jobs - len(running)]:
                waiting.remove(run)
                run.folder.mkdir(parents=True, exist_ok=True)
                print(f"python {run.line()}", flush=True)
                log = open(run.folder / "log.txt", "w")
                running.append((run, subprocess.Popen([sys.executable, *map(str, run.command)], cwd=run.cwd,
                                                      env=env, stdout=log, stderr=subprocess.STDOUT)))
            time.sleep(0.2)
            for run, process in [pair for pair in running if pair[1].poll() is not None]:
                running.remove((run, process))
                if process.returncode:
                    for _, other in running:
                        other.terminate()
                    sys.exit(f"{run.folder / 'log.txt'}: failed:\n"
                             + "\n".join((run.folder / "log.txt").read_text().splitlines()[-15:]))
                (run.folder / "done").write_text(run.text())


# ---- reading -----------------------------------------------------------------------------------------------

def rows_of(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def column(rows, name):
    return np.array([row[name] for row in rows], dtype=float)


def converged(reward):
    """First step at which the mean of the last 5 true rewards has reached 95 % of the run's own gain; nan if
    there was none."""
    smooth = np.array([reward[max(0, i - TAIL + 1):i + 1].mean() for i in range(len(reward))])
    gain = smooth[-1] - reward[0]
    return int(np.argmax(smooth >= reward[0] + 0.95 * gain)) + 1 if gain > 0 else float("nan")


def cost(run):
    """Seconds of all steps without the truth plug, which no real run has, and tokens that were generated."""
    rows = rows_of(run)
    if "timing/generation" not in rows[0]:
        return {"seconds": column(rows, "timing/step_total").sum() + rows[0].get("timing/reference", 0.0),
                "tokens": 0}
    answers = np.diff([0, *column(rows, "episode")])
    tokens = [row["completions/mean_length"] + row.get("completions/greedy_length", 0.0) for row in rows]
    return {"seconds": sum(column(rows, f"timing/{name}").sum() for name in ("generation", "score", "train")),
            "tokens": (answers * tokens).sum()}


def of_policies(evaluations, name, count):
    """On the held-out prompts, of the policies name_1 .. name_count: mean true reward, KL, length and share
    cut over the draws of answers."""
    each = [[json.loads((run.folder / "policy.json").read_text())["policies"][f"{name}_{i + 1}"]
             for run in evaluations] for i in range(count)]
    return {"true reward": [np.mean([e["scores"]["truth"]["mean"] for e in draws]) for draws in each],
            "KL": [np.mean([e["kl"]["mean"] for e in draws]) for draws in each],
            "length": [np.mean([e["length"] for e in draws]) for draws in each],
            "truncated": [np.mean([e["truncated"] for e in draws]) for draws in each]}


def of_one_run(run):
    """The numbers of one policy-optimization run. Seconds are medians; the truth plug, which no real run has,
    is not in them."""
    rows = rows_of(run)
    reward = column(rows, "objective/true_reward")
    phases = {name: column(rows, f"timing/{name}")[2:] for name in ("generation", "score", "train")}
    seconds = {f"s_{name}": np.median(x) for name, x in {**phases, "step": sum(phases.values())}.items()}
    return {"start": reward[0], "reward": reward[-TAIL:].mean(), "gain": reward[-TAIL:].mean() - reward[0],
            "highest": max(reward[max(0, i - TAIL + 1):i + 1].mean() for i in range(TAIL - 1, len(reward))),
            "kl": column(rows, "objective/kl")[-KL_TAIL:].mean(),
            "length": column(rows, "completions/mean_length")[-KL_TAIL:].mean(),
            "length_start": rows[0]["completions/mean_length"], "converged": converged(reward),
            "peak_gb": rows[-1]["memory/peak_gb"], **seconds}


def over_seeds(runs):
    """{number: {mean, std, each}} over the runs of one setting."""
    each = [of_one_run(run) for run in runs]
    return spread({name: [e[name] for e in each] for name in each[0]})


def spread(numbers):
    """{name: one number per seed} -> {name: {mean, std (n - 1), each}}."""
    return {name: {"mean": float(np.mean(v)), "std": float(np.std(v, ddof=1)) if len(v) > 1 else None,
                   "each": [round(float(x), 4) for x in v]} for name, v in numbers.items()}


def save_table(name, settings, columns, decimals=3):
    """settings: {label: over_seeds}. Prints a markdown table and writes results/<name>.json."""
    digits = lambda x: f"{x:.0f}" if abs(x) > 1000 else f"{x:.{decimals}f}"
    text = lambda x: " ± ".join(digits(x[k]) for k in ("mean", "std") if x and x[k] is not None) or "-"
    print(f"\n| {name} | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for label, numbers in settings.items():
        print(f"| {label} | " + " | ".join(text(numbers.get(c)) for c in columns) + " |")
    write_whole(ROOT / "results" / f"{name}.json", json.dumps(settings, indent=1) + "\n")


# ---- the comparison ----------------------------------------------------------------------------------------

# The best of five for each, on a seed that is not used again, see lr(); DPO's beta, see beta()
CHOSEN = {"DPO": ["--lr", 1e-4, "--beta", 2.0], "ReMax": ["--lr", 2e-4], "GRPO": ["--lr", 2e-4],
          "PPO": ["--lr", 1e-4], "DVPO": ["--lr", 2e-4]}
STEPS = 80  # rollout batches; ReMax has half as many, of two answers to a prompt each
KL = ["--kl_target", 0.4, "--kl_horizon", 500]


def method(grid, name, folder, seed, flags):
    """A run of one of the methods from SFT model 1; those that sample take the same number of answers."""
    if name == "DPO":
        return grid.dpo(folder, seed, 1, *flags)
    if name in ("PPO", "ReMax", "GRPO"):
        steps = STEPS // 2 if name == "ReMax" else STEPS
        return grid.ppo(folder, seed, 1, "--max_steps", steps, *KL, *flags, script=f"train_{name.lower()}")
    return grid.dvpo(folder, seed, 1, "--max_steps", STEPS, *KL, *flags, values=grid.gvm(1))


def compare(grid, seeds):
    """All methods from one SFT policy, seeds of prompts and sampling. DPO and the reward model see every pair
    of unequal scores among the answers whose scores the GVM sees; of DVPO there is a second row, whose GVM
    sees one preference pair of each four answers."""
    started = time.time()
    models = {"reward model": grid.rm(1), "GVM": grid.gvm(1),
              "GVM of pairs": grid.gvm(1, "--reward", "preference")}
    grid.execute()  # first, so that what is timed below runs beside nothing else than its like
    runs = {name: [] for name in (*CHOSEN, "DPO, beta 3", "ReMax, twice the tokens", "DVPO, GVM of pairs")}
    for seed in seeds:
        for name, flags in CHOSEN.items():
            runs[name].append(method(grid, name, f"compare/{name.lower()}", seed, flags))
        runs["DPO, beta 3"].append(method(grid, "DPO", "compare/dpo_3", seed, [
            *CHOSEN["DPO"], "--beta", 3.0]))
        runs["ReMax, twice the tokens"].append(method(grid, "ReMax", "compare/remax_twice", seed, [
            *CHOSEN["ReMax"], "--max_steps", STEPS]))
        runs["DVPO, GVM of pairs"].append(grid.dvpo("compare/dvpo_pairs", seed, 1, "--max_steps", STEPS, *KL,
                                                     *CHOSEN["DVPO"], values=models["GVM of pairs"]))
    grid.execute()
    tag = lambda name: name.lower().replace(",", "").replace(" ", "_")
    final = grid.held_out("compare/held_out", {"sft_1": grid.sft(1), **{
        f"{tag(name)}_{i + 1}": run for name, found in runs.items() for i, run in enumerate(found)}})
    grid.execute()

    methods = {"SFT": spread(of_policies(final, "sft", 1))}
    for name, found in runs.items():
        methods[name] = spread({**of_policies(final, tag(name), len(found)),
                                **{key: [cost(run)[key] for run in found] for key in ("tokens", "seconds")}})
    save_table("methods", methods, ["true reward", "KL", "length", "tokens", "seconds"])
    print("\nbefore that, seconds of training: " + ", ".join(f"{name} {cost(run)['seconds']:.0f}"
                                                             for name, run in models.items()))
    online = {name: over_seeds(found) for name, found in runs.items() if not name.startswith("DPO")}
    save_table("compare", online, ["start", "reward", "gain", "kl", "length", "converged", "s_generation",
                                   "s_score", "s_train", "s_step", "peak_gb"])
    d, p = online["DVPO"], online["PPO"]
    ratio = lambda a, b, name: a[name]["mean"] / b[name]["mean"]
    print(f"\nsteps to 95 % of the own gain, DVPO / PPO: {ratio(d, p, 'converged'):.2f} "
          f"(paper 0.65 to 0.75)\nseconds a step, PPO / DVPO: "
          f"{ratio(p, d, 's_step'):.2f} (paper 1.46 to 1.77)\n"
          f"{time.time() - started:.0f} s in all")
    curves = {name: runs[name] for name in online if name != "ReMax"}  # of 80 steps each
    figure(curves, ROOT / "results/compare.png")
    lines = []
    for name in online:
        for seed, run in zip(seeds, runs[name]):
            for row in rows_of(run):
                kept = {k: row[k] for k in ("step", "objective/true_reward", "objective/kl",
                                            "completions/mean_length", "timing/step_total")}
                lines.append(json.dumps({"method": name, "seed": seed, **kept, "value": value(row)}) + "\n")
    write_whole(ROOT / "results/compare.jsonl", "".join(lines))


REACHED = 0.43  # true reward on held-out prompts that a pipeline has to reach
BEFORE = {"DVPO": ("train_gvm", (300, 375, 450, 700), ["--tau_warmup", 0.8]),  # see results/README.md
          "DVPO, GVM of pairs": ("train_gvm", (450, 700), ["--reward", "preference"]),
          "PPO": ("train_rm", (300, 375, 450, 600), [])}


def pipeline(grid, seeds):
    """What it costs to get there from one SFT policy: the training before, at several lengths, and the steps
    of the policy, which is measured on the held-out prompts every five steps. Seeds are of all stages.
    Seconds are those of the steps themselves, and tokens those of their forward passes: a token that is
    trained counts three times, for its backward pass."""
    grid.counted, pairs = True, {}
    for seed in seeds:  # the methods in turn, so that each runs beside the others
        for i in range(max(len(steps) for _, steps, _ in BEFORE.values())):
            for name, (script, steps, flags) in BEFORE.items():
                if i < len(steps):
                    first = grid.before(script, seed, steps[i], *flags)
                    policy = policy_behind(grid, name, first, seed)
                    pairs.setdefault((name, steps[i]), []).append((first, policy))
    grid.execute()
    found = {f"{name}, {steps} steps": {"method": name, **cost_to_reach(runs)}
             for (name, steps), runs in pairs.items()}
    best = {}
    for label, numbers in found.items():
        for unit in ("seconds", "tokens"):
            if numbers["reached"] and numbers[unit] < best.get((numbers["method"], unit), (np.inf,))[0]:
                best[numbers["method"], unit] = numbers[unit], label
    columns = ["reached", "highest", "seconds before", "seconds", "tokens before", "tokens"]
    print(f"\n| to {REACHED} | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for label, numbers in found.items():
        cells = ["-" if numbers[c] is None else f"{numbers[c]:.4g}" for c in columns]
        print(f"| {label} | " + " | ".join(cells) + " |")
    for (name, unit), (least, label) in best.items():
        print(f"least {unit} of {name}: {least:.4g}, {least / best['PPO', unit][0]:.2f} of PPO's ({label})")
    write_whole(ROOT / "results/pipeline.json", json.dumps(found, indent=1) + "\n")


def policy_behind(grid, name, first, seed):
    method, model = name.partition(",")[0], "--reward_model" if name == "PPO" else "--value_model"
    return grid.stage(f"{first.folder.relative_to(grid.out)}_policy", f"train_{method.lower()}",
                      ["--sft_model", grid.sft(1).folder, model, first.folder, "--seed", seed, "--max_steps",
                       STEPS, "--eval_every", 5, *KL, *CHOSEN[method]], [grid.sft(1), first])


def cost_to_reach(runs):
    """runs: (the training before, the policy's) of each seed. The first evaluation at which the mean true
    reward over the seeds is REACHED, as a step of the policy, and mean cost until then; else None."""
    curves = [{i: row["eval/true_reward"] for i, row in enumerate(rows_of(policy))
               if "eval/true_reward" in row} for _, policy in runs]
    mean = {step: np.mean([curve[step] for curve in curves]) for step in curves[0]}
    there = next((step + 1 for step, reward in mean.items() if reward >= REACHED), None)
    n = there or len(rows_of(runs[0][1]))

    def costs(run, steps=None):
        """(seconds, thousand tokens) of a run's first steps."""
        rows, tokens = rows_of(run)[:steps], tokens_of(run.folder / "counts.jsonl")
        phases = [name for name in ("generation", "score", "train") if f"timing/{name}" in rows[0]]
        return np.array([sum(column(rows, f"timing/{name}").sum() for name in phases or ["step_total"]),
                         (tokens["read"] + 3 * tokens["trained"])[:steps].sum() / 1000])
    first = np.mean([costs(before) for before, _ in runs], 0)
    then = np.mean([costs(policy, n) for _, policy in runs], 0)
    return {"reached": there, "highest": max(mean.values()), "seconds before": first[0],
            "seconds": first[0] + then[0], "tokens before": first[1], "tokens": first[1] + then[1],
            "held out": {step + 1: round(reward, 4) for step, reward in mean.items()}}


def value(row):
    """What stands for the value of an answer: of the GVM, the critic, or the greedy answer."""
    return row.get("gvm/mean", row.get("critic/mean", row.get("objective/baseline")))


def figure(runs, path):
    """Figure 3 of the paper: reward and value over steps, mean and one standard deviation over seeds."""
    from matplotlib.figure import Figure
    panels = {"true reward": lambda row: row["objective/true_reward"],
              "value: GVM, critic; ReMax: baseline": value,
              "KL to the reference [nats]": lambda row: row["objective/kl"],
              "answer length [tokens]": lambda row: row["completions/mean_length"]}
    picture = Figure(figsize=(9, 6), layout="constrained")
    for axis, (title, read) in zip(picture.subplots(2, 2).flat, panels.items()):
        for name, found in runs.items():
            curves = np.array([[read(row) for row in rows_of(run)] for run in found], dtype=float)
            mean, std = curves.mean(0), curves.std(0)
            # GRPO has no values; its colour is its own all the same
            line, = axis.plot(mean, label=None if np.isnan(mean).all() else name)
            axis.fill_between(range(len(mean)), mean - std, mean + std, color=line.get_color(), alpha=0.2,
                              linewidth=0)
        axis.set(title=title, xlabel="step")
        axis.legend()
    write_picture(path, picture)


def chosen_on_seed_11(grid, name, runs):
    """{label: run} -> a table of what they reach on the held-out prompts."""
    tags = {label: f"{label.lower().replace(' ', '_')}_1" for label in runs}
    final = grid.held_out(f"{name}/held_out", {"sft_1": grid.sft(1), **{tags[label]: run
                                                                        for label, run in runs.items()}})
    grid.execute()
    save_table(name, {label: spread(of_policies(final, tags[label][:-2], 1)) for label in runs},
               ["true reward", "KL", "length"])


def lr(grid, seeds):
    """The same budget for every method: five learning rates of the policy, a seed that is not used again."""
    runs = {}
    for rate in (5e-5, 1e-4, 2e-4, 4e-4, 8e-4):
        for name in CHOSEN:
            # True rewards, which are measured at the end, would take half of the time
            more = CHOSEN["DPO"][2:] if name == "DPO" else ["--truth_fn", ""]
            runs[f"{name} {rate:g}"] = method(grid, name, f"lr/{name.lower()}_{rate:g}", 11,
                                              ["--lr", rate, *more])
    chosen_on_seed_11(grid, "lr", dict(sorted(runs.items())))


def beta(grid, seeds):
    """DPO has no controller: its beta decides how far it goes from the reference. Two that bracket the
    KL target of the others are taken; then lr() chooses the learning rate."""
    chosen_on_seed_11(grid, "beta", {
        f"DPO, beta {x:g}": grid.dpo(f"beta/{x:g}", 11, 1, "--lr", 2e-4, "--beta", x)
        for x in (0.1, 0.3, 1.0, 2.0, 3.0)})


# ---- the open questions ------------------------------------------------------------------------------------

def base(seed):
    """SFT models and GVMs come in three seeds; a fourth and fifth seed of RL reuse the first and second."""
    return (seed - 1) % 3 + 1


def advantage(grid, seeds):
    runs = {}
    for seed in seeds:
        for source in ("exact", "GVM"):
            for kind in ("q", "gae", "released"):
                values = "exact" if source == "exact" else grid.gvm(base(seed))
                runs.setdefault(f"{source} {kind}", []).append(grid.dvpo(
                    f"advantage/{source}_{kind}", seed, base(seed), "--advantage", kind, values=values,
                    patch=kind if kind == "released" else None))
        runs.setdefault("PPO", []).append(grid.ppo("advantage/PPO", seed, base(seed)))
    grid.execute()
    table = {name: over_seeds(found) for name, found in runs.items()}
    save_table("advantage", table, ["start", "reward", "gain", "kl", "length_start", "length"])
    print_shares(table, "exact gae")


def print_shares(table, exact):
    """Which part of the gain with exact advantages each setting has, seed by seed."""
    for name in table:
        share = [a / b for a, b in zip(table[name]["gain"]["each"], table[exact]["gain"]["each"])]
        print(f"{name}: gain / gain of {exact}, seed by seed:", " ".join(f"{x:.2f}" for x in share))


def baseline(grid, seeds):
    """PPO against exact advantages with 150 steps and more room for KL: is it a baseline worth beating? With
    the world's own reward in place of the reward model, too, which tells what the algorithm can do."""
    flags = ["--max_steps", 150, "--kl_target", 0.6]
    runs = {"exact gae": [], "PPO, exact reward": [], "PPO": [], "PPO, beta 0.15 at first": []}
    for seed in seeds:
        runs["exact gae"].append(grid.dvpo("baseline/exact", seed, base(seed), "--advantage", "gae", *flags,
                                           values="exact"))
        runs["PPO, exact reward"].append(grid.ppo("baseline/ppo_exact", seed, base(seed), *flags,
                                                  "--reward_fn", "toy.exact:sampled_reward"))
        runs["PPO"].append(grid.ppo("baseline/ppo", seed, base(seed), *flags))
        runs["PPO, beta 0.15 at first"].append(grid.ppo("baseline/ppo_0.15", seed, base(seed), *flags,
                                                        "--kl_coef", 0.15))
    grid.execute()
    table = {name: over_seeds(found) for name, found in runs.items()}
    save_table("baseline", table, ["start", "reward", "highest", "gain", "kl", "length"])
    print_shares(table, "exact gae")


def quality_table(grid, name, settings):
    """settings: {label: GVM runs}; RMSE to exact and Bayes, before and from the deciding token."""
    quality = {label: [grid.quality(gvm) for gvm in gvms] for label, gvms in settings.items()}
    grid.execute()
    table, columns = {}, []
    for label, runs in quality.items():
        each = [json.loads((run.folder / "gvm.json").read_text()) for run in runs]
        numbers = {"shared tau accuracy": [e["ranking"]["shared_tau"]["mean"]["accuracy"] for e in each]}
        for who in ("seen", "unseen"):
            for when, against in (("before", "gvm_bayes"), ("before", "gvm_exact"), ("before", "bayes_exact"),
                                  ("decided", "gvm_exact")):
                numbers[f"{who}, {when}, {against}"] = [e["reference"][who][when][against] for e in each]
        table[label] = spread(numbers)
        columns = list(numbers)
    save_table(name, table, columns)


def lam(grid, seeds):
    """K = 0: what lambda does has nothing to do with tau, and it is five times as fast."""
    quality_table(grid, "lam", {f"lambda {x}": [grid.gvm(s, "--k", 0, *(["--lam", x] if x != 0.95 else []))
                                                for s in seeds[:3]] for x in (0, 0.5, 0.8, 0.95, 1)})


def conditioning(grid, seeds):
    quality_table(grid, "conditioning", {f"K = {k}": [grid.gvm(s, "--k", k) if k != 4 else grid.gvm(s)
                                                      for s in seeds[:3]] for k in (0, 1, 2, 4, 6)})


def normalization(grid, seeds):
    """Of the paper's advantage, --advantage q."""
    settings = {"batch, KL inside (the script)": ([], None), "per sequence, KL inside": ([], "norm_sequence"),
                "batch and prompt, KL inside": ([], "norm_prompt"),
                "batch, KL outside, beta 0.2": ([], "kl_outside"),
                "batch, KL outside, beta 1": (["--kl_coef", 1.0], "kl_outside")}
    runs = {}
    for seed in seeds[:3]:
        for label, (flags, patch) in settings.items():
            folder = f"normalization/{patch}{''.join(map(str, flags))}" if patch else "advantage/GVM_q"
            runs.setdefault(label, []).append(grid.dvpo(folder, seed, base(seed), *flags, "--advantage", "q",
                                                        values=grid.gvm(base(seed)), patch=patch))
    grid.execute()
    save_table("normalization", {name: over_seeds(found) for name, found in runs.items()},
               ["start", "reward", "highest", "kl", "length"])


def drift(grid, seeds):
    """Error of the frozen GVM on the current policy's answers: first 5 and last 5 steps, and gvm/drift."""
    runs = {}
    for seed in seeds[:3]:
        for label, patch in (("tau follows the policy", "drift"), ("tau stays at step 0", "drift_tau_fixed")):
            runs.setdefault(label, []).append(grid.dvpo(patch, seed, base(seed), values=grid.gvm(base(seed)),
                                                        patch=patch))
    grid.execute()
    table, columns = {}, []
    for label, found in runs.items():
        numbers = {"reward": [of_one_run(run)["reward"] for run in found]}
        for name in ("drift/rmse_before", "drift/bias_before", "drift/rmse_after", "drift/bias_after",
                     "gvm/drift"):
            for part, steps in (("first", slice(0, TAIL)), ("last", slice(-TAIL, None))):
                numbers[f"{name}, {part} 5"] = [column(rows_of(run), name)[steps].mean() for run in found]
        table[label] = spread(numbers)
        columns = list(numbers)
    save_table("drift", table, columns)


def frontier(grid, seeds):
    """A fixed beta per run (--kl_target 0), from strict to none at all."""
    runs = {}
    for seed in seeds[:3]:
        for beta in (0.5, 0.1, 0.0):
            flags = ["--kl_coef", beta, "--kl_target", 0]
            for kind in ("q", "gae"):
                runs.setdefault(f"DVPO {kind}, beta {beta}", []).append(
                    grid.dvpo(f"frontier/{kind}_{beta}", seed, base(seed), "--advantage", kind, *flags,
                              values=grid.gvm(base(seed))))
            runs.setdefault(f"PPO, beta {beta}", []).append(
                grid.ppo(f"frontier/ppo_{beta}", seed, base(seed), *flags))
    grid.execute()
    table = dict(sorted((name, over_seeds(found)) for name, found in runs.items()))
    save_table("frontier", table, ["reward", "highest", "kl", "length"])


def instruction(grid, seeds):
    """No SFT stage and no scores of the world: the start is a stronger policy (SFT and 20 steps of PPO), the
    answers are its own and its SFT model's at six temperatures, the scores the reward model's."""
    runs = {"start": [], "DVPO": []}
    for seed in seeds[:3]:
        sft, rm = grid.sft(seed), grid.rm(seed)
        start = grid.ppo("instruction/start", seed, seed, "--max_steps", 20)
        folder = grid.out / f"instruction/labels/{seed}"
        file = folder / "labels.jsonl"
        labels = grid.add(folder, [
            "label.py", *grid.data[0], "--out", file, "--seed", seed, "--reward_model", rm.folder,
            "--policies", f"start={start.folder}", f"sft={sft.folder}", "--per_prompt", 0,
            "--temperatures", 0.5, 0.7, 0.85, 1.0, 1.15, 1.3], [start, sft, rm])
        data = ["--data", file, "--sft_model", start.folder]
        folder = grid.out / f"instruction/gvm/{seed}"
        gvm = grid.add(folder, ["train_gvm.py", *data, "--output_dir", folder, "--seed", seed], [labels])
        folder = grid.out / f"instruction/dvpo/{seed}"
        runs["DVPO"].append(grid.add(folder, [
            "train_dvpo.py", *data, "--output_dir", folder, "--value_model", gvm.folder, "--seed", seed,
            "--eval_every", 0, *CHOSEN["DVPO"], *KL], [gvm]))
        runs["start"].append(start)
    grid.execute()
    final = grid.held_out("instruction/held_out", {f"{name}_{i + 1}".lower(): run
                                                   for name, found in runs.items()
                                                   for i, run in enumerate(found)})
    grid.execute()
    table = {name: of_policies(final, name.lower(), len(found)) for name, found in runs.items()}
    for numbers in table.values():
        del numbers["KL"]  # to the first seed's start, of the others
    table["DVPO"]["KL to its start"] = [of_one_run(run)["kl"] for run in runs["DVPO"]]
    save_table("instruction", {name: spread(numbers) for name, numbers in table.items()},
               ["true reward", "length", "KL to its start"])


GO_ON = ["--reward", "score", "--tau_warmup", 0, "--lr", 1e-3, "--max_steps", 100, "--eval_every", 0]
LEG = 40  # steps of the policy in a round
OWN = [0.9, 0.95, 1.0, 1.05, 1.1]  # temperatures of the answers that are labelled, one to a prompt each
OWN_ANSWERS = 153 * len(OWN)  # to the prompts of the value share


def refresh(grid, seeds):
    """What refresh.sh does, two rounds. The frozen GVM's policy takes as many more steps as the others have
    answers labelled. Labels are the world's, or the reward model's, on the scale that it has on the answers
    of the data."""
    arms = {"frozen": None, "world's labels": ["--reward_fn", "toy.exact:score"], "reward model's labels": []}
    legs, scales, drifting = {}, {}, grid.patched("drift")
    for seed in seeds[:3]:
        folder, rm = grid.out / f"refresh/scale_{seed}", grid.rm(base(seed))
        scales[seed] = grid.add(folder, [
            "label.py", *grid.data[0], "--answers", grid.toy / "preferences.jsonl", "--shares", "value",
            "--reward_model", rm.folder, "--out", folder / "labels.jsonl"], [rm])
    grid.execute()
    for seed in seeds[:3]:
        sft, rm, gvm = (make(base(seed)) for make in (grid.sft, grid.rm, grid.gvm))
        said = (scales[seed].folder / "log.txt").read_text()
        scale = re.search(r"\((--score_range) (\S+) (\S+)\)", said)
        start = grid.dvpo("refresh/start", seed, base(seed), values=gvm, patch="drift")
        for arm, scorer in arms.items():
            tag, policy, values = arm.partition("'")[0].replace(" ", "_"), start, gvm
            legs.setdefault(f"{arm}, 0", []).append(start)
            for part in (1, 2):
                folder = grid.out / f"refresh/{tag}_{part}"
                if scorer is not None:
                    file = folder / f"labels_{seed}/labels.jsonl"
                    labels = grid.add(file.parent, [
                        "label.py", *grid.data[0], "--shares", "value", "--policies",
                        f"round_{part - 1}={policy.folder}", "--temperatures", *OWN, "--per_prompt", 0,
                        "--seed", seed, "--out", file,
                        *(scorer or ["--reward_model", rm.folder, *scale.groups()])], [policy, rm])
                    values = grid.add(folder / f"gvm_{seed}", [
                        "train_gvm.py", "--data", file, "--sft_model", sft.folder, "--value_model",
                        values.folder, "--output_dir", folder / f"gvm_{seed}", "--seed", seed, *GO_ON],
                        [labels])
                steps = LEG + (OWN_ANSWERS // 32 if scorer is None else 0)
                policy = grid.stage(f"refresh/{tag}_{part}/{seed}", "train_dvpo", [
                    "--sft_model", policy.folder, "--reference_model", sft.folder, "--value_model",
                    values.folder, "--seed", seed + 100 * part, "--eval_every", 0, "--max_steps", steps],
                    [policy, values], drifting)
                legs.setdefault(f"{arm}, {part}", []).append(policy)
    grid.execute()
    tags = {label: re.sub(r"\W+", "_", label) for label in legs}
    final = grid.held_out("refresh/held_out", {"sft_1": grid.sft(1), **{
        f"{tags[label]}_{i}": run for label, runs in legs.items() for i, run in enumerate(runs, 1)}})
    grid.execute()
    table, columns = {}, []
    for label, runs in legs.items():
        numbers = {"true reward": of_policies(final, tags[label], len(runs))["true reward"],
                   "KL": [of_one_run(run)["kl"] for run in runs]}
        for name in ("drift/bias_before", "drift/rmse_before", "drift/bias_after", "drift/rmse_after"):
            for part, steps in (("first", slice(0, TAIL)), ("last", slice(-TAIL, None))):
                numbers[f"{name}, {part} 5"] = [column(rows_of(run), name)[steps].mean() for run in runs]
        table[label], columns = spread(numbers), list(numbers)
    save_table("refresh", table, columns)


def critic(grid, seeds):
    """PPO keeps its critic every ten steps. How well each ranks held-out pairs, and how far its values are
    from the exact ones of the policy at that time, on the rollouts of these ten steps; GVMs beside it, whose
    error is that of drift(), on DVPO's policy. A critic learns the reward model's scores less the KL penalty
    that is to come; with the world's reward in their place only the penalty is between it and the truth."""
    every, ranked, errors, drifting = 10, {}, {}, grid.patched("drift_critic")
    for seed in seeds[:3]:
        rm, sft = grid.rm(base(seed)), grid.sft(base(seed))
        for name, reward in (("critic", ["--reward_model", rm.folder]), ("critic of the world's reward", [
                "--reward_fn", "toy.exact:sampled_reward", "--critic_model", rm.folder])):
            tag = "critic_world" if "world" in name else "critic"
            ppo = grid.stage(f"{tag}/{seed}", "train_ppo", [
                "--sft_model", sft.folder, *reward, "--seed", seed, "--eval_every", 0, "--critic_every",
                every], [sft, rm], drifting)
            for steps in range(every, 61, every):
                kept = grid.quality(ppo, ppo.folder / f"critic_{steps}")
                ranked.setdefault(f"{name}, {steps} steps", []).append(kept)
                errors.setdefault(f"{name}, {steps} steps", []).append((ppo, slice(steps - every, steps)))
        dvpo = grid.dvpo("drift", seed, base(seed), values=grid.gvm(base(seed)), patch="drift")
        ranked.setdefault("GVM, K = 4", []).append(grid.quality(grid.gvm(base(seed))))
        for name, steps in (("first", slice(0, every)), ("last", slice(-every, None))):
            errors.setdefault(f"GVM, K = 4, {name} steps", []).append((dvpo, steps))
        ranked.setdefault("GVM, K = 0", []).append(grid.quality(grid.gvm(base(seed), "--k", 0)))
    grid.execute()
    table, columns = {}, ["pairs ranked right", "drift/rmse_before", "drift/bias_before", "drift/rmse_after",
                          "drift/bias_after"]
    for label in [*ranked, *errors]:
        numbers = table.setdefault(label, {})
        if label in ranked:
            numbers[columns[0]] = [json.loads((run.folder / "gvm.json").read_text())["ranking"]["shared_tau"]
                                   ["mean"]["accuracy"] for run in ranked[label]]
        for name in columns[1:] if label in errors else ():
            numbers[name] = [column(rows_of(run), name)[steps].mean() for run, steps in errors[label]]
    save_table("critic", {label: spread(numbers) for label, numbers in table.items()}, columns)


if __name__ == "__main__":
    experiments = {f.__name__: f for f in (compare, pipeline, lr, beta, instruction, refresh, critic,
                                           baseline, advantage, lam, conditioning, normalization, drift,
                                           frontier)}
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("experiment", choices=experiments)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, each on one core")
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help="folder of the runs")
    args = parser.parse_args()
    experiments[args.experiment](Grid(args.out, args.jobs), args.seeds)
