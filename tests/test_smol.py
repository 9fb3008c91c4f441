"""smol/: its files are what the stages read. Its packages are not needed here."""

import dataclasses
import importlib
import json

import pytest

from conftest import ROOT
from plumbing.data import split_of
from plumbing.policies import policies_of
from smol.defaults import DEFAULTS, LABELS, SPLIT_SEED, UNSEEN
from smol.make import CHAT_TEMPLATE, prompts


def test_there_are_prompts_enough_and_each_is_one_of_its_kind():
    rows = prompts()
    texts = [row["instruction"] for row in rows]
    assert len(set(texts)) == len(texts) >= 600 and len({row["group"] for row in rows}) >= 100
    shares = [split_of(text, SPLIT_SEED) for text in texts]
    assert min(map(shares.count, ("value", "rl", "test"))) >= 150


def test_the_policies_are_models_of_this_world_with_system_prompts():
    seen, unseen = (policies_of([str(ROOT / "smol" / name)], [1.0])
                    for name in ("policies.json", "unseen_policies.json"))
    assert len(seen) >= 4 and len(unseen) >= 2 and not seen.keys() & unseen.keys()
    prompts_of = [policy.system for policy in (*seen.values(), *unseen.values())]
    assert len(set(prompts_of)) == len(prompts_of) and prompts_of.count("") == 1
    assert {policy.temperature for policy in (*seen.values(), *unseen.values())} == {
        DEFAULTS["train_dvpo"]["temperature"]}


@pytest.mark.parametrize("script", DEFAULTS)
def test_defaults_are_flags(script):
    flags = {flag.name for flag in dataclasses.fields(importlib.import_module(script).Args)}
    assert DEFAULTS[script].keys() <= flags


def test_the_template_has_the_system_turn_where_there_is_one():
    from transformers.utils.chat_template_utils import render_jinja_template
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    (text,), _ = render_jinja_template([chat], chat_template=CHAT_TEMPLATE, add_generation_prompt=True)
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.skipif(not (ROOT / LABELS).exists(), reason="the answers are not there")
def test_the_answers_are_of_these_policies_to_these_prompts():
    vader = pytest.importorskip("vaderSentiment")
    from smol.sentiment import compound
    known, names = {row["instruction"] for row in prompts()}, set()
    for file in (LABELS, UNSEEN):
        for row in map(json.loads, (ROOT / file).read_text().splitlines()):
            assert row["instruction"] in known
            names.update(row["models"])
            scores = compound([{"response": c["response"]} for c in row["completions"]], None, None)
            assert scores == [c["overall_score"] for c in row["completions"]]
    assert vader and len(names) >= 6
