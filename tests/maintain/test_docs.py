"""The pages cannot rot: their commands parse, the files, functions and flags that they name exist, every
metric that is logged has its row. For maintainers (`make check`)."""

import argparse
import dataclasses
import importlib
import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.launcher import runner

import train_dpo
import train_grpo
import train_remax
from conftest import ROOT, run_stage
from plumbing.args import RunArgs, command_args, parse_args

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results/README.md",
         ROOT / "results/smol/README.md", *ROOT.glob("CONTRIBUTING.md")]
TEXTS = {path: path.read_text() for path in PAGES}
ALL = "\n".join(TEXTS.values())
SOURCES = {path: path.read_text() for path in ROOT.rglob("*.py")
           if not {".venv", "runs", "build"} & set(path.relative_to(ROOT).parts)}
SCRIPTS = ("sft", "train_rm", "train_gvm", "train_dvpo", "train_ppo", "train_remax", "train_grpo",
           "train_dpo", "label", "continuations")
COMMAND = re.compile(r"^(?:\$ )?(?:\w+=\S+ )*((?:python3?|deepspeed|make) .*)")
OWN = re.compile(r"my|script\.py|pytest|pip|ruff")  # a reader's own, any of the scripts, or no script of ours
of_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code_lines(text):
    """Lines of the code blocks of a page, indented or fenced; one that ends in a backslash goes on."""
    fenced = False
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def commands(text):
    """Commands of the code blocks, as words without their comment."""
    found = map(COMMAND.match, code_lines(text))
    return [shlex.split(match[1], comments=True) for match in found if match]


def script_of(words):
    """(path of the script that a python or deepspeed command starts, its words); not one of ours: None."""
    if words[0] == "deepspeed":
        args = runner.parse_args(words[1:])
        name, rest = args.user_script, args.user_args
    elif words[1] == "-m":
        name, rest = words[2].replace(".", "/") + ".py", words[3:]
    else:
        name, rest = words[1], words[2:]
    return (None if OWN.match(name) else ROOT / name), rest


class Parsed(Exception):
    """A script's own parser has taken the command line."""


def parse(path, words, monkeypatch):
    """The words through the parser of a script, with everything that it refuses; nothing is run."""
    if path.parent == ROOT:
        module = importlib.import_module(path.stem)
        if hasattr(module, "COMMANDS"):
            return command_args(module.Args, module.COMMANDS, words, outputs=())
        return parse_args(module.Args, words)
    original = argparse.ArgumentParser.parse_args

    def stopping(self, *args):
        original(self, *args)
        raise Parsed
    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", stopping)
        patch.setattr(sys, "argv", [str(path), *words])
        patch.syspath_prepend(str(path.parent))
        runpy.run_path(str(path), run_name="__main__")


def test_the_readme_fits_one_sitting():
    assert len(TEXTS[ROOT / "README.md"].splitlines()) <= 200


@of_pages
def test_commands_exist_and_their_flags_parse(page, monkeypatch, capsys):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for words in commands(TEXTS[page]):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, words
            continue
        path, rest = script_of(words)
        if path:
            assert path.exists(), words
            try:
                parse(path, rest, monkeypatch)
            except SystemExit as end:
                raise AssertionError(f"{' '.join(words)}: {end} {capsys.readouterr().err[-300:]}") from None


def test_every_script_has_a_command():
    found = [words for text in TEXTS.values() for words in commands(text)]
    made = {word for words in found if words[0] == "make" for word in words[1:]}
    started = [script_of(words)[0] for words in found if words[0] != "make"]
    assert {"demo", "test"} <= made
    assert {*SCRIPTS, "evaluate", "judge", "report"} <= {path.stem for path in started if path}


@of_pages
def test_commands_within_the_text_exist(page):
    """`script.py command --flag ..` in backticks: the script, its command and its flags are there."""
    for said in re.findall(r"`((?:(?:python|deepspeed) )?[\w/]+\.py(?: [^`]*)?)`", TEXTS[page]):
        name, *rest = said.removeprefix("python ").removeprefix("deepspeed ").split()
        if name == said:
            continue  # a file, not a command: the next test but one
        path = ROOT / name
        if OWN.match(name):
            continue
        assert path.exists(), said
        known = set(re.findall(r"^    (\w+): |\"--(\w+)\"", path.read_text(), re.M))
        known = {name for pair in known for name in pair} | set(RunArgs.__dataclass_fields__)
        assert set(re.findall(r"--(\w+)", said)) <= known, said
        if path.parent == ROOT and hasattr(module := importlib.import_module(path.stem), "COMMANDS"):
            assert rest[0] in module.COMMANDS, said
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([\w-]+)`", TEXTS[page])) <= targets


@of_pages
def test_flags_named_in_the_text_exist(page):
    """Every `--flag` belongs to some script or to the launcher."""
    known = {"num_gpus", "help"} | set(RunArgs.__dataclass_fields__)
    for path, source in SOURCES.items():
        known |= set(re.findall(r"\"--(\w+)\"", source))
        if path.parent == ROOT:
            known |= set(re.findall(r"^    (\w+): ", source, re.M))
    quoted = " ".join(re.findall(r"`[^`\n]*`", TEXTS[page]))
    assert set(re.findall(r"--(\w+)", quoted)) <= known


@of_pages
def test_every_file_named_exists(page):
    """In backticks: part of the tree, or something that a script writes and therefore has in quotes."""
    written = "\n".join(SOURCES.values()) + (ROOT / "Makefile").read_text()
    for name in set(re.findall(r"`([\w./-]+\.(?:py|json|jsonl|txt|md|patch|png|html|toml))`", TEXTS[page])):
        if name.startswith("runs/") or OWN.match(name):
            continue  # made by the commands or by the reader
        places = [ROOT, page.parent, ROOT / "ds_configs", ROOT / "results/ablations"]
        quoted = re.search(rf"[\"'/]{re.escape(Path(name).name)}\b", written) and not name.endswith(".py")
        assert quoted or any((place / name).exists() for place in places), name


@of_pages
def test_every_relative_link_points_at_a_file(page):
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", TEXTS[page])
    for target in {one or other for one, other in targets}:
        place, _, heading = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        there = (page.parent / place) if place else page
        assert there.exists() and ROOT in [*there.resolve().parents, there.resolve()], target
        if heading:  # as GitHub makes them: lower case, blanks to hyphens, without punctuation
            titles = re.findall(r"^#+ (.+)$", there.read_text(), re.M)
            made = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in made, target


def test_every_function_named_exists():
    """`module.function` and `module:function`, of the scripts, common.py and the packages."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES}
    found = re.findall(r"`([a-z_]+(?:\.[a-z_]+)*?)[.:](\w+)(?:\([^`]*\))?`", ALL)
    assert len(found) >= 10
    for module, attribute in found:
        top = module.split(".")[0]
        ours = top in modules or (ROOT / top).is_dir()
        if OWN.match(top) or not ours and importlib.util.find_spec(top):
            continue  # the reader's own, or another library's
        if attribute in ("jsonl", "npz", "sh"):
            continue  # a file
        assert module in modules, f"{module}.{attribute}"
        assert (attribute == "py" or f"{module}.{attribute}" in modules
                or hasattr(importlib.import_module(module), attribute)), (module, attribute)


def test_the_sizes_of_the_diffs_are_what_is_said():
    """`diff a.py b.py` ... (N lines go, M come)"""
    said = re.findall(r"`diff (\w+\.py) (\w+\.py)`(?:(?!`diff ).)*?\((\d+) lines go, (\d+) come\)", ALL,
                      re.S)
    for one, other, go, come in said:
        shown = subprocess.run(["diff", one, other], cwd=ROOT, capture_output=True, text=True).stdout
        gone, came = (sum(line[0] == mark for line in shown.splitlines()) for mark in "<>")
        assert (gone, came) == (int(go), int(come)), (one, other)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_explained(script):
    """No flag that nothing reads, none without help, at most 47."""
    module = importlib.import_module(script)
    flags = dataclasses.fields(module.Args)
    assert len(flags) <= 47
    # read in the script itself, in common.py or in plumbing/, which get the whole of args
    readers = {ROOT / f"{script}.py", ROOT / "common.py", *(ROOT / "plumbing").glob("*.py")}
    text = "\n".join(SOURCES[path] for path in readers)
    explained = "".join(inspect.getsource(cls) for cls in module.Args.__mro__[:-1])
    for flag in flags:
        read = re.search(rf"args\.{flag.name}\b|\[\"{flag.name}\"\]|getattr\(args, \"{flag.name}\"", text)
        assert read or flag.name == "local_rank", flag.name
        assert re.search(rf"^    {flag.name}: .*  # \S", explained, re.M), f"{flag.name} has no help"


def test_every_logged_metric_is_in_the_table(chain, baseline, flags, tmp_path):
    """Keys of the metrics.jsonl files of every stage, each with a row in docs/metrics.md."""
    run_stage(train_remax, **flags.remax, sft_model=chain.sft, reward_model=baseline.rm,
              output_dir=tmp_path / "remax")
    run_stage(train_grpo, **flags.grpo, sft_model=chain.sft, reward_model=baseline.rm,
              output_dir=tmp_path / "grpo")
    run_stage(train_dpo, **flags.dpo, sft_model=chain.sft, output_dir=tmp_path / "dpo")
    rows = re.findall(r"^\|([^|]*)\|", (ROOT / "docs/metrics.md").read_text(), re.M)
    table = {name for row in rows for name in re.findall(r"`([\w/]+)`", row)}
    for folder in (chain.sft, chain.gvm, chain.dvpo, baseline.rm, baseline.ppo, tmp_path / "remax",
                   tmp_path / "grpo", tmp_path / "dpo"):
        for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
            assert set(json.loads(line)) <= table, set(json.loads(line)) - table
