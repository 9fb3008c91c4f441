"""The runs behind results/smol/, one command each; finished ones are kept, as in results/run.py.

    python smol/run.py answers      what the policies say (smol/labels.jsonl, smol/unseen.jsonl) and what
                                    prefixes of their held-out answers are worth; the repository has the files
    python smol/run.py values       the GVM with K = 0 and with K = 4, against these values
    python smol/run.py policies     DVPO, PPO and PPO with the true reward, from the same SFT policy
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

from run import Grid, of_policies, save_table, spread
from smol.defaults import LABELS, MODEL, UNSEEN, VALUES

SEEN_POLICIES, UNSEEN_POLICIES = "smol/policies.json", "smol/unseen_policies.json"


class World(Grid):
    """Runs of `--model smol`, which has no SFT stage: the instruct model is the start and the reference."""

    def __init__(self, out, jobs):
        self.out, self.jobs, self.runs, self.counted = out.resolve(), jobs, [], False
        self.data = ["--model", "smol"], [self.add(self.out / "build", ["-m", "smol.make"])]

    def gvm(self, k, seed):
        return self.stage(f"gvm_{k}_{seed}", "train_gvm", ["--k", k, "--seed", seed])

    def script(self, name, script, flags, needs=()):
        return self.add(self.out / name, [script, *flags, "--model", "smol"], [*self.data[1], *needs])


def answers(grid, seeds):
    """Written into the repository, where label.py and continuations.py find their own and do nothing."""
    sampled(grid)
    grid.execute()


def sampled(grid):
    """The runs whose files values() reads."""
    found = []
    for name, policies, file, shares in (("seen", SEEN_POLICIES, LABELS, ["value", "test"]),
                                         ("unseen", UNSEEN_POLICIES, UNSEEN, ["test"])):
        labels = grid.script(f"labels_{name}", "label.py", [
            "--policies", policies, "--shares", *shares, "--out", file])
        found.append(grid.script(f"values_{name}", "continuations.py", [
            "--policies", policies, "--data", file, "--out", VALUES[name]], [labels]))
    return found


def values(grid, seeds):
    """RMSE of the GVM to the sampled values by place of the answer, seen and unseen policies; its ranking."""
    found, columns, needs = {}, [], sampled(grid)
    runs = {k: [grid.gvm(k, seed) for seed in seeds] for k in (0, 4)}

    def evaluated(gvm):
        folder = gvm.folder.with_name(f"{gvm.folder.name}_quality")
        return grid.script(folder.name, "evaluate.py", [
            "gvm", "--value_model", gvm.folder, "--continuations", *VALUES.values(), "--unseen_data", UNSEEN,
            "--json", folder / "gvm.json"], [gvm, *needs])
    quality = {k: list(map(evaluated, gvms)) for k, gvms in runs.items()}
    grid.execute()
    for k, runs in quality.items():
        each = [json.loads((run.folder / "gvm.json").read_text()) for run in runs]
        numbers = {"pairs ranked right": [e["ranking"]["shared_tau"]["mean"]["accuracy"] for e in each]}
        for who in ("seen", "unseen"):
            for i, name in itertools.product(range(4), ("rmse", "constant")):
                numbers[f"{who}, place {i}, {name}"] = [e["continuations"][who]["all"][i][name] for e in each]
        found[f"K = {k}"] = {**spread(numbers), "evaluations": [e["continuations"] for e in each]}
        columns = list(numbers)
    save_table("smol/values", found, columns)


METHODS = {"dvpo": "DVPO", "ppo": "PPO", "ppo_true": "PPO, true reward"}


def policies(grid, seeds):
    """The same prompts, noise, KL target and number of sampled answers for all."""
    rm, gvm, runs = grid.stage("rm", "train_rm", []), grid.gvm(4, 1), {name: [] for name in METHODS}
    for seed in seeds:
        for name, flags, needs in (("dvpo", ["--value_model", gvm.folder], [gvm]),
                                   ("ppo", ["--reward_model", rm.folder], [rm]),
                                   ("ppo_true", ["--reward_fn", "smol.sentiment:compound"], [])):
            runs[name].append(grid.stage(f"{name}_{seed}", f"train_{name.partition('_')[0]}",
                                         ["--seed", seed, *flags], needs))
    grid.execute()
    words = [f"start_1={MODEL}", *(f"{name}_{i + 1}={run.folder}" for name, found in runs.items()
                                   for i, run in enumerate(found))]
    final = [grid.script(f"held_out_{draw}", "evaluate.py", [
        "policy", "--policies", *words, "--seed", draw, "--json", grid.out / f"held_out_{draw}/policy.json"],
        [run for found in runs.values() for run in found]) for draw in range(1, 5)]
    grid.execute()
    table = {"start": spread(of_policies(final, "start", 1))}
    for name, found in runs.items():
        table[METHODS[name]] = spread(of_policies(final, name, len(found)))
    save_table("smol/policies", table, ["true reward", "KL", "length"])
    gain = {name: np.array(table[name]["true reward"]["each"]) - table["start"]["true reward"]["mean"]
            for name in ("DVPO", "PPO")}
    print("gain of DVPO / of PPO, seed by seed:", (gain["DVPO"] / gain["PPO"]).round(2).tolist())


if __name__ == "__main__":
    experiments = {f.__name__: f for f in (answers, values, policies)}
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("experiment", choices=experiments)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, each on one core")
    parser.add_argument("--out", type=Path, default=Path("runs/smol"), help="folder of the runs")
    args = parser.parse_args()
    experiments[args.experiment](World(args.out, args.jobs), args.seeds)
