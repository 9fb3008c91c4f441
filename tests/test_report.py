"""report.py: everything it is given is on the page, nothing on it runs or is fetched."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

import report
from conftest import write_jsonl
from plumbing.errors import BadInput

EVIL = ("<script>document.title = 'owned'; alert(1)</script>"
        "<img src=http://example.com/x.png onerror=alert(2)>")


def metrics_file(folder, rise):
    folder.mkdir(parents=True)
    rows = [{"step": i, "objective/true_reward": rise * i, "objective/kl": 0.1 * i, "gvm/mean": 0.0,
             "timing/step_total": 2.0} for i in range(20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "args.json").write_text(json.dumps({"lr": 0.125, "seed": 7}))
    return str(folder)


@pytest.fixture
def given(tmp_path):
    """The flags of a report on two methods, one with two seeds, with evil in every text."""
    runs = [f"dvpo={metrics_file(tmp_path / 'a', 0.02)}", f"dvpo={metrics_file(tmp_path / 'b', 0.03)}",
            f"<b>={metrics_file(tmp_path / 'c', 0.01)}"]
    outcome = {"win": 0.25, "tie": 0.5, "lose": 0.25}
    won = {"n": 8, **outcome, "win_rate": 0.625, "low": 0.5, "high": 0.75, "against": EVIL, "points": 3.5,
           "length_controlled": {"win_rate": 0.575, "low": 0.4, "high": 0.7},
           "characters": {"ours": 120.0, "theirs": 80.0}}
    judged = {"command": "judge", "judge": EVIL, "mode": "pair", "requests": 9, "unread": 1, "failed": 0,
              "policies": {"dvpo": won, "none": {"n": 0}}}
    policy = {"command": "policy", "prompts": 8, "first": "sft", "policies": {"sft": {
        "scores": {EVIL: {"mean": 0.4375, "stderr": 0.01}}, "against_first": {EVIL: outcome}, "kl": None,
        "length": 14.0}}}
    gvm = {"command": "gvm", "ranking": {kind: {"mean": {"accuracy": 0.8125, "low": 0.75, "high": 0.875}}
                                         for kind in ("shared_tau", "own_tau", "baselines")}}
    values = {"question": EVIL, "k": 4, "tau_policy": EVIL, "responses": [
        {"label": EVIL, "tokens": [EVIL, "b"], "values": [0.0, 0.5, -0.5], "mean": 0.0, "last": -0.5}] * 2}
    for name, content in (("judged", judged), ("policy", policy), ("gvm", gvm), ("values", values)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    for name in ("x", "y"):
        (tmp_path / f"{name}-answers.json").write_text(json.dumps(
            [{"instruction": f"question {i}", "output": f"{name} says {EVIL}", "generator": name}
             for i in range(3)]))
    return ["--runs", *runs, "--tables", *(str(tmp_path / f"{n}.json") for n in ("judged", "policy", "gvm")),
            "--values", str(tmp_path / "values.json"), "--examples", "2", "--answers",
            *(f"{n}={tmp_path / n}-answers.json" for n in ("x", "y")), "--title", f"Our {EVIL}",
            "--out", str(tmp_path / "page.html")]


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes


def test_everything_is_there_and_nothing_runs_or_is_fetched(given, tmp_path):
    report.main(given)
    text = (tmp_path / "page.html").read_text()
    page = Tags(text)
    assert not {"script", "img", "iframe", "link", "object"} & set(page.tags) and page.tags.count("svg") == 4
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "action")]
    assert all(value.startswith("#") for name, value in page.attributes if name in ("href", "xlink:href"))
    assert not re.search(r"url\((?!#)|@import", text) and "default-src 'none'" in text
    for shown in ("0.125", "0.625", "0.500 to 0.750", "0.575 (0.400 to 0.700)", "120 / 80", "0.438", "0.812",
                  "question 0", "question 1", "x says", "y says", "-0.50", "objective/kl", "&lt;script&gt;"):
        assert shown in text, shown
    assert "question 2" not in text  # --examples 2
    report.main(given)
    assert (tmp_path / "page.html").read_text() == text


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the system's chromium")
@pytest.mark.parametrize("width", [500, 1200])  # 500: the narrowest that it makes
def test_in_a_real_browser(given, tmp_path, width):
    """The title is text, the console is silent, nothing is asked for, no part is wider than a phone."""
    report.main(given)
    # scrollWidth is written where --dump-dom shows it; only this copy of the page may run a script
    page = (tmp_path / "page.html").read_text()
    probe = page.replace(report.POLICY, "default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-t'")
    probe = probe.replace("</body>", "<script nonce=t>document.body.dataset.width = "
                                     "document.documentElement.scrollWidth</script></body>")
    (tmp_path / "probe.html").write_text(probe)
    chromium = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    for name in ("page", "probe"):
        done = subprocess.run([*chromium, "--virtual-time-budget=2000", "--dump-dom",
                               f"file://{tmp_path}/{name}.html"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr[-2000:]
        assert "example.com" not in done.stderr
        assert re.search("<title>Our &lt;script&gt;", done.stdout) and "<svg" in done.stdout
    found = int(re.search(r'data-width="(\d+)"', done.stdout)[1])
    assert found <= width


def evaluated(*names):
    """Rows as evaluate.py policy --out writes them."""
    return [{"policy": name, "prompt": [{"role": "user", "content": f"question {i}"}],
             "response": f"{name} {i}", "scores": {"truth": 0.25 * i}} for name in names for i in range(3)]


def test_answers_of_an_evaluation_have_their_scores(tmp_path):
    file = write_jsonl(tmp_path / "answers.jsonl", evaluated("start", EVIL))
    report.main(["--answers", str(file), "--examples", "2", "--out", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    for i, score in enumerate(("+0.00", "+0.25")):
        assert f"<b>question {i}</b>" in text
        assert f'<small>start, truth {score}</small><div class="text">start {i}</div>' in text
    assert "question 2" not in text and EVIL not in text and f"{html.escape(EVIL)}, truth" in text


@pytest.mark.parametrize("flags, part", [
    (["--tables", "missing.json"], "missing.json: cannot be read"),
    (["--tables", "args.json"], "--tables args.json: not what"),
    (["--tables", "half.json"], "--tables half.json: incomplete"),
    (["--values", "args.json"], "--values args.json: not what"),
    (["--answers", "x=nothing.json"], "nothing.json: no such file"),
    (["--answers", "nothing.jsonl"], "nothing.jsonl: no such file"),
    (["--answers", "half.jsonl"], "half.jsonl:1: not a row of evaluate.py policy --out"),
    (["--answers", "twice.jsonl", "twice.jsonl"], "two of them have one name"),
    (["--runs", "a=nothing"], "nothing/metrics.jsonl"),
    (["--out", "/proc/none/page.html"], "--out /proc/none/page.html: cannot write"),
])
def test_bad_input_is_one_sentence(flags, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = metrics_file(tmp_path / "run", 0.01)
    (tmp_path / "args.json").write_text("{}")
    (tmp_path / "half.json").write_text('{"command": "gvm"}')
    (tmp_path / "half.jsonl").write_text('{"policy": "x"}')
    write_jsonl(tmp_path / "twice.jsonl", evaluated("x"))
    with pytest.raises(BadInput, match=re.escape(part)) as end:
        report.main([*(["--runs", f"a={runs}"] if "--runs" not in flags else []), *flags])
    assert "\n" not in str(end.value)
