"""The tables of the pages against the files in results/ that they were written from, and the experiments that
results/README.md names. For maintainers (`make check`)."""

import json
import re
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "results"))
import run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results/README.md"]
PAGE = (ROOT / "results/README.md").read_text()
EXPERIMENTS = {"compare", "lr", "beta", "instruction", "baseline", "advantage", "lam", "conditioning",
               "normalization", "drift", "frontier", "pipeline", "refresh", "critic"}


def settings_of(names):
    """{setting: {what was measured: (mean, standard deviation or None)}} of some files in results/."""
    found = {}
    for name in set(names) - {"pipeline"}:  # which has means alone
        for label, numbers in json.loads((ROOT / f"results/{name}.json").read_text()).items():
            found[f"{name}: {label}"] = {key: (x["mean"], x["std"]) for key, x in numbers.items()}
    return found


EVERYTHING = settings_of(sorted(path.stem for path in (ROOT / "results").glob("*.json")))


def written(number, like):
    """A number with as many decimals as the text `like` has; minus nothing is nothing."""
    text = f"{number:.{len(like.partition('.')[2])}f}"
    return text.lstrip("-") if float(text) == 0 else text


def has(numbers, mean, std):
    """Whether a setting has this mean ± standard deviation; tokens are written in thousands, too."""
    return any(s is not None and (written(m / unit, mean), written(s / unit, std)) == (mean, std)
               for m, s in numbers.values() for unit in (1, 1000))


def rows_of(text):
    """The table rows of a page that have a mean ± standard deviation: (row, [(mean, std) as written])."""
    for line in text.splitlines():
        pairs = re.findall(r"(-?\d+(?:\.\d+)?) ± (\d+(?:\.\d+)?)", line)
        if line.startswith("|") and pairs:
            yield line, pairs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_row_of_a_table_is_one_setting_of_one_file(page):
    wrong = [(line, [f"{mean} ± {std}" for mean, std in pairs
                     if not any(has(numbers, mean, std) for numbers in EVERYTHING.values())])
             for line, pairs in rows_of(page.read_text())
             if not any(all(has(numbers, *pair) for pair in pairs) for numbers in EVERYTHING.values())]
    assert not wrong


def test_the_tables_of_an_experiment_are_of_its_files():
    """A section of results/README.md names its command; its rows are in what that command writes."""
    checked = 0
    for section in re.split(r"^## ", PAGE, flags=re.M)[1:]:
        names = re.findall(r"python results/run\.py (\w+)", section)
        settings = settings_of(names + ["methods"] * ("compare" in names))
        for line, pairs in rows_of(section):
            assert any(all(has(numbers, *pair) for pair in pairs) for numbers in settings.values()), line
            checked += 1
    assert checked > 50


def test_the_tables_of_the_real_model_are_those_of_their_files():
    """Above each stands the file that it is printed from."""
    checked, settings = 0, {}
    for line in (ROOT / "results/smol/README.md").read_text().splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if line.startswith("| smol/"):
            columns, settings = cells, json.loads((ROOT / f"results/{name}.json").read_text())
        elif line.startswith("| "):
            for column, cell in zip(columns, cells, strict=True):
                mean, _, std = cell.partition(" ± ")
                found = settings[name].get(column)
                assert cell == "-" if found is None else (
                    mean == written(found["mean"], mean)
                    and (std == written(found["std"], std) if std else found["std"] is None)), (line, column)
                checked += 1
    assert checked > 20


def test_the_single_runs_are_those_of_their_files():
    """true reward (KL) of one run each, the learning rates and DPO's betas."""
    said = re.findall(r"(?<!\d)(-?\d\.\d{3}) \((\d+\.\d\d)\)", PAGE)
    known = [(x["true reward"][0], x["KL"][0]) for x in settings_of(["lr", "beta"]).values()]
    assert len(said) == 30
    for reward, kl in said:
        assert any((written(a, reward), written(b, kl)) == (reward, kl) for a, b in known), (reward, kl)


def test_the_costs_of_all_stages_are_those_of_their_file():
    """Every number of every row, and no row is left out."""
    known, seen = json.loads((ROOT / "results/pipeline.json").read_text()), set()
    names = {"GVM": "DVPO", "GVM of pairs": "DVPO, GVM of pairs", "reward model": "PPO"}
    for line in PAGE.splitlines():
        row = re.match(r"\| ([\w ]+?) (\d+) steps, \w+ \| (.*) \|$", line)
        if row:
            numbers = known[f"{names[row[1]]}, {row[2]} steps"]
            reached, highest, before, seconds, tokens_before, tokens = (
                re.sub(r"[*,]| steps", "", cell).strip() for cell in row[3].split("|"))
            assert (reached, seconds, tokens) == ("-",) * 3 if numbers["reached"] is None else (
                int(reached) == numbers["reached"] and written(numbers["seconds"], seconds) == seconds
                and written(numbers["tokens"], tokens) == tokens), line
            for key, text in {"highest": highest, "seconds before": before,
                              "tokens before": tokens_before}.items():
                assert written(numbers[key], text) == text, line
            seen.add((row[1], row[2]))
    assert len(seen) == len(known)


def test_the_results_page_names_commands_that_exist():
    """Each `python results/run.py X` is an experiment, each has its section and, once measured, its file."""
    named = set(re.findall(r"python results/run\.py (\w+)", PAGE))
    assert named == EXPERIMENTS
    assert all(callable(getattr(run, name)) for name in named)
    for name in named - {"compare"}:
        assert (ROOT / f"results/{name}.json").exists() or "Not measured yet" in PAGE
    assert "{{" not in PAGE
