"""The text of the source, not what it does: sizes, which script shares what with which, who imports whom. For
maintainers (`make check`); a change of one's own may break all of this."""

import ast
import inspect
import itertools
import re
import subprocess

import pytest

import train_dpo
import train_dvpo
import train_grpo
import train_gvm
import train_ppo
import train_remax
import train_rm
from conftest import ROOT

LISTED = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"], cwd=ROOT,
                        check=True, text=True, capture_output=True).stdout.splitlines()
FILES = [ROOT / name for name in LISTED if (ROOT / name).exists()]  # one may be deleted and not committed
SCRIPTS = [path for path in FILES if path.parent == ROOT]


def name_of(path):
    return str(path.relative_to(ROOT))


# ---- sizes ----

LINES = {"common.py": 440, "train_dvpo.py": 420, "train_ppo.py": 460, "train_remax.py": 380,
         "train_grpo.py": 380, "train_gvm.py": 350}
OLDER = {"judge.py", "evaluate.py", "results/run.py", "tests/test_alignment.py", "tests/test_data.py",
         "tests/test_errors.py", "tests/test_evaluate.py", "tests/test_judge.py", "tests/test_label.py",
         "tests/test_ppo.py", "tests/test_resume.py"}  # than the limit of 400 for all others


def test_no_file_is_longer_than_it_may_be():
    lines = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert LINES.keys() | OLDER <= lines.keys()
    assert not {name: n for name, n in lines.items() if name not in OLDER and n > LINES.get(name, 400)}


def test_no_line_is_longer_than_110():
    assert not [f"{name_of(path)}:{number}" for path in FILES
                for number, line in enumerate(path.read_text().splitlines(), start=1) if len(line) > 110]


@pytest.mark.parametrize("one, other, lines", [("train_ppo.py", "train_dvpo.py", 320),
                                               ("train_remax.py", "train_grpo.py", 150)])
def test_siblings_differ_in_few_lines(one, other, lines):
    """What `diff` shows is what a reader compares."""
    shown = subprocess.run(["diff", one, other], cwd=ROOT, text=True, capture_output=True).stdout
    assert 0 < sum(line[0] in "<>" for line in shown.splitlines()) <= lines


# ---- imports ----

def imported(node):
    """Modules that a node of the syntax tree imports. A string may name one, too: as module:function."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    named = isinstance(node, ast.Constant) and re.fullmatch(r"([\w.]+)[.:]\w+", str(node.value))
    return [named[1]] if named else []


def test_nothing_depends_on_the_toy():
    """Only the toy itself, the tests, the measurements and the benchmarks import it."""
    free = ("toy", "tests", "results", "benchmarks")
    found = [f"{name_of(path)}:{node.lineno}" for path in FILES if name_of(path).split("/")[0] not in free
             for node in ast.walk(ast.parse(path.read_text())) for name in imported(node)
             if name.split(".")[0] == "toy"]
    assert not found


def test_what_is_imported_from_a_file_of_ours_is_there():
    """Also in the scripts that no test runs, as those which need TRL."""
    trees = [(path, ast.parse(path.read_text())) for path in FILES]
    ours = {path.stem for path in FILES} | {name_of(path).split("/")[0] for path in FILES}
    there = {(path.stem, getattr(node, "name", getattr(node, "id", None)))
             for path, tree in trees for node in ast.walk(tree)}
    wrong = [f"{name_of(path)}:{node.lineno}: {alias.name}" for path, tree in trees for node in ast.walk(tree)
             if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ours
             for alias in node.names
             if alias.name not in ours and (node.module.split(".")[-1], alias.name) not in there]
    assert not wrong


# ---- what siblings share ----

@pytest.mark.parametrize("one, other, names", [
    (train_ppo, train_dvpo, ("gae", "policy_loss", "next_kl_coef", "response_logprobs", "row_seed", "rollout",
                             "self_check", "warn", "rl_prompts", "rl_inputs")),
    (train_ppo, train_remax, ("token_rewards", "next_kl_coef", "response_logprobs", "row_seed", "rollout",
                              "load_reward", "rl_prompts", "rl_inputs")),
    (train_ppo, train_grpo, ("policy_loss",)),
    (train_remax, train_grpo, ("token_rewards", "next_kl_coef", "response_logprobs", "rollout",
                               "load_models")),
    (train_rm, train_dpo, ("wins", "learning_rate", "preference_rows")),
    (train_rm, train_gvm, ("learning_rate",))])
def test_what_siblings_share_is_the_same_text(one, other, names):
    """The diff of the siblings is the lesson, so what is not the lesson is equal to the letter."""
    for name in names:
        assert inspect.getsource(getattr(one, name)) == inspect.getsource(getattr(other, name)), name


def test_the_flags_of_siblings_differ_in_the_method_alone():
    flags = {module: set(module.Args.__dataclass_fields__)
             for module in (train_ppo, train_remax, train_grpo, train_rm, train_dpo)}
    assert flags[train_remax] < flags[train_ppo]
    assert flags[train_ppo] - flags[train_remax] == {
        "critic_model", "critic_lr", "critic_warmup", "critic_every", "share_base", "gae_lam", "cliprange",
        "cliprange_value", "ppo_epochs", "early_stop_kl"}
    assert flags[train_grpo] - flags[train_remax] == {"group_size", "std_norm", "loss_mean", "ppo_epochs",
                                                      "cliprange"}
    assert flags[train_remax] < flags[train_grpo]
    assert flags[train_dpo] - flags[train_rm] == {"beta", "label_smoothing"}
    assert flags[train_rm] - flags[train_dpo] == {"lora_dropout"}


SHARED = {  # part of a script that may have six or more equal lines in a row in another one: why
    "docstring": "the files that a run reads and writes",
    "imports": "a script is read on its own",
    "Args": "a script's flags are its documentation",
    "comments": "the table of what is read in which column, and headings",
    "gae": "an equation of both methods",
    "policy_loss": "an equation of both methods",
    "token_rewards": "an equation of both methods",
    "next_kl_coef": "an equation of all three methods",
    "learning_rate": "an equation of several stages",
    "wins": "how both are measured",
    "response_logprobs": "which columns are read is the method",
    "rollout": "the first of the steps that a reader follows",
    "score": "the second of these steps; what is scored differs",
    "update": "the fourth of these steps; the losses differ",
    "held_out": "what is sampled is the same, what is measured differs",
    "Models": "what load_models returns",
    "load_model": "what is trained, and of which weights",
    "load_models": "what is trained, and of which weights",
    "main": "the loop, which is to be read from top to bottom",
    "entry": "the lines below main"}


def parts(path):
    """[(line, number, part of the script that it is in)] of its lines that are not blank."""
    text, names = path.read_text(), {}
    for node in ast.parse(text).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        kinds = {ast.Import: "imports", ast.ImportFrom: "imports", ast.Expr: "docstring", ast.If: "entry"}
        name = kinds.get(type(node)) or getattr(node, "name", ast.unparse(node).split()[0])
        names.update(dict.fromkeys(range(first, node.end_lineno + 1), name))
    return [(line, number, names.get(number, "comments"))
            for number, line in enumerate(text.splitlines(), start=1) if line.strip()]


def test_what_two_scripts_have_in_common_is_meant_to_be():
    """Six equal lines in a row, blank ones not counted, lie in the parts that SHARED names. Elsewhere they
    belong into common.py or plumbing/."""
    found = {}
    for one, other in itertools.combinations(SCRIPTS, 2):
        rows, others = parts(one), parts(other)
        windows = {tuple(line for line, *_ in others[j:j + 6]) for j in range(len(others) - 5)}
        for i in range(len(rows) - 5):
            if tuple(line for line, *_ in rows[i:i + 6]) in windows:
                for _, number, name in rows[i:i + 6]:
                    found.setdefault(name, set()).add(f"{one.name}:{number} as in {other.name}")
    assert not {name: sorted(places) for name, places in found.items() if name not in SHARED}
