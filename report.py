"""One page about a set of runs, in one file that needs no network: read it on a phone, print it, send it.

    python report.py --runs dvpo=runs/toy/dvpo ppo=runs/toy/ppo --tables runs/toy/policy.json
        --values runs/toy/values.json --answers sft=sft.jsonl dvpo=dvpo.jsonl --out report.html

What it shows, as far as it is given:
  curves     of --runs over steps (Figure 3), with a band of one standard deviation over the seeds of a label
  frontier   reward over the KL from the reference, one line for each label: how much reward a method gains
             and how far it moves for that
  tables     what evaluate.py gvm, evaluate.py policy and judge.py wrote with --json; accuracies and win rates
             with their 95 % intervals as bars
  answers    of several policies to the same questions, side by side: files of judge.py generate, one for each
             policy, or what `evaluate.py policy --out` wrote, with its scores
  values     the value of every token of two or more answers (Figure 4), from `evaluate.py values --json`
Every text is escaped, and the page's first lines forbid scripts and requests.
"""

import html
import io
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from plumbing.args import parse_args
from plumbing.data import prompt_text, text_of
from plumbing.errors import BadInput, one_line
from plumbing.files import check_place, read_object, read_rows, write_whole
from plumbing.kept import check_ours
from plumbing.page import limit_of, token_spans
from evaluate import draw_band, named_paths, read_metrics, split_words
from judge import read_answers, read_questions


@dataclass
class Args:
    model: str = "toy"  # names the run folder that the default runs are taken from
    runs: list[str] = field(default_factory=list)  # label=folder of a run; runs of one label are its seeds
    metrics: list[str] = field(default_factory=list)  # curves, default reward, value, KL, length, scores
    reward: str = "objective/true_reward"  # the reward that the frontier shows over objective/kl
    tables: list[str] = field(default_factory=list)  # files of --json of evaluate.py gvm, policy and judge.py
    values: list[str] = field(default_factory=list)  # files of evaluate.py values --json
    answers: list[str] = field(default_factory=list)  # name=file of judge.py generate, or evaluate.py --out
    questions: str = ""  # MT-Bench's question file, where --answers are MT-Bench's
    examples: int = 5  # questions whose answers are shown
    title: str = "Runs"  # headline of the page
    out: str = "report.html"  # the page


STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #111; background: #fff; margin: 0 auto; padding: 1rem;
       max-width: 70rem }
h2 { border-top: 1px solid #ccc; padding-top: .8rem }
figure { display: inline-block; margin: 0 .5rem .5rem 0; width: 26rem; max-width: 100%; vertical-align: top }
figure svg { width: 100%; height: auto }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.side { display: flex; flex-wrap: wrap; gap: .8rem }
.side > div { flex: 1 1 16rem; min-width: 0; background: #f5f5f5; padding: .5rem .7rem; border-radius: .3rem }
h1, h2, h3, p, small, .text, .side span { overflow-wrap: anywhere }
p, .text, .side span { white-space: pre-wrap }
.side span { display: inline-block; margin: .1rem; padding: .1rem; text-align: center; vertical-align: top }
small { display: block; font-size: .68rem; color: #333 }
.bar { display: inline-block; position: relative; width: 9rem; height: .8rem; background: #eee }
.bar i, .bar b { position: absolute; top: 0; bottom: 0; display: block }
.bar i { background: #8ab4e0 } .bar b { width: 2px; background: #123 }
.bar u { position: absolute; left: 50%; top: 0; bottom: 0; border-left: 1px dashed #999 }
@media print { body { max-width: none; font-size: 11pt } figure, .side, tr { break-inside: avoid }
               h2, h3, p { break-after: avoid } figure { width: 46% } .wide { overflow: visible }
               table { font-size: .7rem } th, td { white-space: normal; padding: .1rem .3rem }
               .side > div, .side span, .bar, .bar * { print-color-adjust: exact } }
"""
# No script runs and nothing is fetched, whatever a text holds
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def escape(text):
    return html.escape(text_of(str(text), "", ""))  # half a surrogate pair is no UTF-8


def table(head, rows):
    """rows: lists of cells, already escaped."""
    lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def number(value):
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else escape(value)


# ---- curves and the frontier -------------------------------------------------------------------------------

def figure(draw, title, x, y=""):
    """An SVG for the page, of what draw(axis) draws."""
    import matplotlib
    from matplotlib.figure import Figure
    # the same data give the same page; a label is text, not mathematics
    with matplotlib.rc_context({"svg.hashsalt": title, "font.size": 9, "text.parse_math": False}):
        picture = Figure(figsize=(4.2, 2.8), layout="constrained")
        axis = picture.subplots()
        draw(axis)
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
        axis.legend()
        found = io.StringIO()
        picture.savefig(found, format="svg", metadata={"Date": None})
    svg = found.getvalue()
    # <metadata> names addresses, though nothing asks for them
    before, after = svg[svg.index("<svg"):svg.index("<metadata>")], svg.partition("</metadata>")[2]
    return f"<figure>{before}{after}</figure>"


def curves(runs, metrics):
    def draw(metric):
        def on(axis):
            for label, seeds in runs.items():
                if all(metric in curves for curves in seeds.values()):
                    draw_band(axis, metric, label, seeds)
        return on
    return "\n".join(figure(draw(metric), metric, "step") for metric in metrics)


def frontier(runs, reward):
    """One line for each run, through its steps: x is the KL [nats per response], y the reward. Each point is
    a mean over a tenth of the steps, because one batch is noisy."""
    def draw(axis):
        for n, (label, seeds) in enumerate(runs.items()):
            for i, curves in enumerate(seeds.values()):
                steps = sorted(set(curves.get("objective/kl", {})) & set(curves.get(reward, {})))
                if not steps:
                    continue
                width = max(1, len(steps) // 10)
                x, y = (np.convolve([curves[name][s] for s in steps], np.ones(width) / width, "valid")
                        for name in ("objective/kl", reward))
                axis.plot(x, y, color=f"C{n}", linewidth=1, label=label if i == 0 else None)
                axis.plot(x[-1:], y[-1:], "o", color=f"C{n}")
    return figure(draw, "KL-reward frontier; the dot is the end", "objective/kl [nats per response]", reward)


def last_of(curves, metric):
    steps = curves.get(metric)
    return steps[max(steps)] if steps else None


def runs_section(args):
    if not args.runs and (args.tables or args.answers or args.values):
        return []
    runs, rows = defaultdict(dict), []
    for label, path in named_paths("--runs", args.runs, ("dvpo", "ppo"), "metrics.jsonl", args):
        metrics = Path(path) if path.endswith(".jsonl") else Path(path) / "metrics.jsonl"
        found = runs[label][path] = read_metrics(str(metrics))
        file = metrics.with_name("args.json")
        flags = read_object(file, f"{file}: not the flags of a run", "take it away") if file.exists() else {}
        rows.append([escape(label), escape(path), max(max(steps) for steps in found.values()) + 1,
                     *(escape(flags.get(name, "-")) for name in ("lr", "seed")),
                     *(number(last_of(found, name)) for name in (args.reward, "objective/kl",
                                                                  "timing/step_total"))])
    files = [found for seeds in runs.values() for found in seeds.values()]
    usual = ("objective/true_reward", "objective/scores", "gvm/mean", "objective/kl",
             "completions/mean_length", "policy/clipfrac_avg")
    for metric in args.metrics:
        if not any(metric in found for found in files):
            raise BadInput(f"--metrics {metric}: none of the runs has it; name others.")
    metrics = args.metrics or [name for name in usual if any(name in found for found in files)]
    parts = ["<h2>Runs</h2>", table(["label", "folder", "steps", "lr", "seed", f"last {args.reward}",
                                     "last objective/kl", "seconds a step"], rows),
             "<h2>Curves</h2>", curves(runs, metrics)]
    if any(args.reward in found and "objective/kl" in found for found in files):
        parts += ["<h2>Frontier</h2>", frontier(runs, args.reward)]
    return parts


# ---- tables ------------------------------------------------------------------------------------------------

def interval(low, middle, high):
    """A bar from 0 to 1 with a 95 % interval, for a cell; the dashes are at one half."""
    return (f'<span class="bar"><i style="left:{low:.1%};width:{high - low:.1%}"></i>'
            f'<b style="left:{middle:.1%}"></b><u></u></span>')


def gvm_table(result):
    """Table 4: accuracy by statistic of the token values."""
    rows = []
    for kind in ("shared_tau", "own_tau", "baselines"):
        for name, a in result["ranking"][kind].items():
            rows.append([escape(f"{kind.replace('_', ' ')}: {name}"), number(a["accuracy"]),
                         f"{a['low']:.3f} to {a['high']:.3f}", interval(a["low"], a["accuracy"], a["high"])])
    return table(["ranking of held-out pairs", "accuracy", "95 %", ""], rows)


def policy_table(result):
    rows = []
    for name, report in result["policies"].items():
        for score, value in report["scores"].items():
            against = report["against_first"][score]
            rows.append([escape(f"{name}: {score}"), number(value["mean"]), number(value["stderr"]),
                         *(number(against[outcome]) for outcome in ("win", "tie", "lose")),
                         number((report["kl"] or {}).get("mean")), f"{report['length']:.1f}"])
    return table([f"{result['prompts']} prompts, against {result['first']}", "mean", "error", "win", "tie",
                  "lose", "KL", "tokens"], rows)


def judge_table(result):
    rows = []
    for name, report in result["policies"].items():
        if not report.get("n"):
            rows.append([escape(name), number(report.get("points")), *["-"] * 7])
            continue
        fair = report["length_controlled"]
        rows.append([escape(f"{name} against {report['against']}"), number(report.get("points")),
                     *(number(report[outcome]) for outcome in ("win", "tie", "lose", "win_rate")),
                     f"{report['low']:.3f} to {report['high']:.3f}"
                     + interval(report["low"], report["win_rate"], report["high"]),
                     f"{fair['win_rate']:.3f} ({fair['low']:.3f} to {fair['high']:.3f})",
                     f"{report['characters']['ours']:.0f} / {report['characters']['theirs']:.0f}"])
    note = "; ".join(f"{name} {escape(result[name])}" for name in ("judge", "mode", "requests", "unread",
                                                                   "failed"))
    return table(["judge", "points", "win", "tie", "lose", "win rate", "95 %", "at equal length",
                  "characters"], rows) + f"<p>{note}</p>"


def plain_table(key):
    """A function that makes the table of a result: a row for each entry of result[key], a dict of numbers."""
    def rows_of(result):
        names = list(dict.fromkeys(name for row in result[key].values() for name in row))
        return table(["", *names], [[escape(label), *(number(row.get(name)) for name in names)]
                                    for label, row in result[key].items()])
    return rows_of


TABLES = {"table": plain_table("policies"), "rank": plain_table("accuracy"), "meta": plain_table("agreement"),
          "gvm": gvm_table, "policy": policy_table, "judge": judge_table}


def tables_section(args):
    parts = ["<h2>Tables</h2>"] if args.tables else []
    for path in args.tables:
        result = read_object(path, f"{path}: cannot be read", "name a file that --json wrote")
        command = result.get("command")
        if not isinstance(command, str) or command not in TABLES:
            raise BadInput(f"--tables {path}: not what evaluate.py gvm, evaluate.py policy or judge.py wrote "
                           f"with --json; name such a file.")
        try:
            parts += [f"<h3>{escape(path)}</h3>", TABLES[command](result)]
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise BadInput(f"--tables {path}: incomplete ({one_line(repr(e))}); write it again.") from None
    return parts


# ---- texts -------------------------------------------------------------------------------------------------

def answers_section(args):
    if not args.answers:
        return []
    questions = {q["id"]: q["turns"] for q in read_questions(args.questions)[1]} if args.questions else None
    named = split_words("--answers", [word for word in args.answers if "=" in word])
    found = [(name, read_answers(path, questions)) for name, path in named]
    found += [pair for word in args.answers if "=" not in word for pair in evaluated_answers(word)]
    answers = dict(found)
    if len(answers) < len(found):
        raise BadInput("--answers: two of them have one name; give each its own.")
    shared = [i for i in next(iter(answers.values())) if all(i in found for found in answers.values())]
    if not shared:
        raise BadInput("--answers: the files have no question in common; give answers to the same questions.")
    parts = ["<h2>Answers</h2>"]
    for i in shared[:args.examples]:
        for turn, question in enumerate(next(iter(answers.values()))[i]["turns"]):
            parts += [f"<p><b>{escape(question)}</b></p>", '<div class="side">']
            parts += [f'<div><small>{escape(name + found[i].get("scores", ""))}</small><div class="text">'
                      f'{escape(found[i]["answers"][turn]) or "(empty)"}</div></div>'
                      for name, found in answers.items()]
            parts.append("</div>")
    return parts


def evaluated_answers(path):
    """[(policy, {prompt: an answer as of read_answers, and its scores})] of what evaluate.py policy --out
    wrote."""
    found = defaultdict(dict)
    for where, row in read_rows(path):
        try:
            scores = "".join(f", {name} {float(x):+.2f}" for name, x in row["scores"].items())
            found[row["policy"]][prompt_text(row["prompt"])] = {
                "turns": [row["prompt"][-1]["content"]], "answers": [row["response"]], "scores": scores}
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as e:
            raise BadInput(f"{where}: not a row of evaluate.py policy --out ({one_line(repr(e))}); give one, "
                           f"or name=file of judge.py generate.") from None
    return found.items()


def values_section(args):
    parts = ["<h2>Value of every token</h2><p>The number under a token is the value after it, that on the "
             "question the value before anything is said.</p>"] if args.values else []
    for path in args.values:
        result = read_object(path, f"{path}: cannot be read", "name a file that --json wrote")
        try:
            low, high = (limit_of(result, limit) for limit in (min, max))
            parts += [f"<p><b>{escape(result['question'])}</b> (tau: {escape(result['k'])} answers of "
                      f"{escape(result['tau_policy'])})</p>", '<div class="side">']
            for answer in result["responses"]:
                parts.append(f"<div><small>{escape(answer['label'])}: mean {answer['mean']:+.2f}, last "
                             f"{answer['last']:+.2f}</small>{token_spans(answer, low, high)}</div>")
            parts.append("</div>")
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise BadInput(f"--values {path}: not what evaluate.py values --json wrote "
                           f"({one_line(repr(e))}); name such a file.") from None
    return parts


def main(argv=None):
    args = parse_args(Args, sys.argv[1:] if argv is None else argv)
    check_ours("--out", args.out, rb'<!doctype html>\n<html lang="en"><head>.{,50}Content-Security-Policy')
    check_place(args.out, "--out")
    head = (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(args.title)}</title><style>{STYLE}</style></head>\n"
            f"<body><h1>{escape(args.title)}</h1>")
    parts = [head, *runs_section(args), *tables_section(args), *answers_section(args), *values_section(args)]
    text = "\n".join([*parts, "</body></html>\n"])
    write_whole(args.out, text)
    print(f"{args.out}: {len(text) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
