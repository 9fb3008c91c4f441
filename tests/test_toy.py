"""The toy world against independent definitions: enumeration, brute force and sampling."""

import contextlib
import io
import json
from collections import Counter

import numpy as np
import pytest
import torch

from toy import exact, make, world
from toy.defaults import DEFAULTS, SPLIT_SEED
from toy.world import EOS, MALFORMED, POLITE, PROMPTS, STYLES, TRAINING, UNSEEN

SOME_PROMPTS = PROMPTS[::37]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A whole build, which takes the place of an earlier one."""
    out = tmp_path_factory.mktemp("toy") / "build"
    out.mkdir()
    (out / "preferences.jsonl").write_text("an earlier build")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        make.main(out, seed=0)
    assert f"split seed {SPLIT_SEED}" in printed.getvalue()
    assert [path.name for path in out.parent.iterdir()] == ["build"]
    return out


@pytest.fixture(scope="module")
def tokenizer(build):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(build / "model")


@pytest.fixture(scope="module")
def policy(tokenizer):
    """A tiny model, trained just long enough that a good part of its mass is well-formed answers."""
    model = make.make_model(tokenizer, seed=1)
    optimizer, rng = torch.optim.Adam(model.parameters(), lr=5e-3), np.random.default_rng(0)
    for _ in range(60):
        rows = [row_of(tokenizer, prompt, ids_of(tokenizer, str(rng.choice(world.answers(prompt)))))
                for prompt in SOME_PROMPTS]
        texts = [torch.tensor(row["prompt_ids"] + row["response_ids"]) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)                  # padded by 0, <pad>
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def row_of(tokenizer, prompt, response_ids):
    """What a roll-out hands to a plug."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return {"prompt": messages, "prompt_ids": ids_of(tokenizer, text, eos=False),
            "response": tokenizer.decode(response_ids, skip_special_tokens=True),
            "response_ids": list(response_ids)}


def ids_of(tokenizer, answer, eos=True):
    return tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * eos


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the world ----

def test_counts():
    assert len(world.FACTS) == 32 and sum(fact.true for fact in world.FACTS) == 16
    assert len(set(PROMPTS)) == 384 and set(Counter(world.FACT_OF.values()).values()) == {12}
    assert len(TRAINING) == 8 and len(UNSEEN) == 3 and len({p.name for p in TRAINING + UNSEEN}) == 11
    assert 60 <= len(world.vocabulary()) <= 75 and len(set(world.vocabulary())) == len(world.vocabulary())
    assert sorted(len(opener.split()) for opener in world.OPENERS)[::5] == [1, 4]
    assert [len(closing.split()) for closing in world.CLOSINGS] == [0, 4, 9]
    lengths = {len(world.response_tokens(answer)) for prompt in PROMPTS for answer in world.answers(prompt)}
    assert (min(lengths), max(lengths)) == (7, 22)
    assert all(len(set(world.answers(prompt))) == 36 for prompt in PROMPTS)


def test_styles_are_distributions_without_zeros():
    for style in STYLES.values():
        for probabilities in style:
            assert sum(probabilities) == pytest.approx(1.0, abs=1e-12) and min(probabilities) > 0


def test_right_means_what_the_core_says():
    prompt = "is oskan on the sea coast ?"
    assert world.fact_of(prompt) == ("oskan", "coastal", False)
    assert world.parse(prompt, "well , oskan is not on the sea coast .") == (4, True, 0)
    assert world.parse(prompt, "well , oskan is on the sea coast . i am sure .") == (4, False, 1)
    assert world.true_reward(prompt, "well , oskan is not on the sea coast .") == pytest.approx(2.5 / 4.5)
    assert world.true_reward(prompt, "well asked , oskan is on the sea coast .") == pytest.approx(-3 / 4.5)
    for malformed in ("", "well", "oskan is not on the sea coast .", "well , belan is not on the sea coast .",
                      "well , oskan is not on the sea coast . well", "well , oskan is not an island ."):
        assert world.parse(prompt, malformed) is None and world.true_reward(prompt, malformed) == -1.0
    with pytest.raises(ValueError, match="not a prompt"):
        world.fact_of("is atlantis an island ?")


def test_scores_need_no_clipping_and_noise_has_mean_zero():
    rng = np.random.default_rng(0)
    for prompt in SOME_PROMPTS:
        for answer in world.answers(prompt):
            scores = {world.score(prompt, answer, rng) for _ in range(30)}
            truth = world.true_score(prompt, answer)
            assert scores == {truth - 1, truth, truth + 1} and 1 <= min(scores) and max(scores) <= 10
        assert world.score(prompt, "well", rng) == 1.0


# ---- scripted policies ----

def enumerate_policy(policy, prompt):
    """Independent definition: {tokens: (probability, reward)} of the 36 answers, from the description."""
    style, table = STYLES[policy.style], {}
    for answer in world.answers(prompt):
        opener, right, closing = world.parse(prompt, answer)
        p = style.openers[opener] * (policy.skill if right else 1 - policy.skill) * style.closings[closing]
        table[(*answer.split(), EOS)] = p, (2 + 6 * right + 0.5 * POLITE[opener] - 5.5) / 4.5
    return table


def conditional_mean(table, prefix):
    """Mean reward of the answers that start with the prefix, and their probability."""
    hits = [(p, r) for tokens, (p, r) in table.items() if tokens[:len(prefix)] == prefix]
    mass = sum(p for p, _ in hits)
    return (sum(p * r for p, r in hits) / mass if hits else -1.0), mass


@pytest.mark.parametrize("policy", TRAINING + UNSEEN, ids=lambda policy: policy.name)
def test_scripted_q_is_the_mean_over_the_answers_that_share_the_prefix(policy):
    for prompt in SOME_PROMPTS[:4]:
        table = enumerate_policy(policy, prompt)
        assert sum(p for p, _ in table.values()) == pytest.approx(1)
        for tokens in table:
            values = world.scripted_q(policy, prompt, tokens)
            assert len(values) == len(tokens) + 1
            for t, value in enumerate(values):
                mean, mass = conditional_mean(table, tokens[:t])
                assert value == pytest.approx(mean, abs=1e-12)
                assert world.prefix_probability(policy, prompt, tokens[:t]) == pytest.approx(mass, abs=1e-12)


def test_scripted_q_outside_the_answers():
    prompt = "is arvo an island ?"
    tokens = "well , arvo is certainly an island .".split()
    values = world.scripted_q(TRAINING[0], prompt, tokens)
    assert values[4] > -1 and values[5:] == [MALFORMED] * 4
    complete = world.response_tokens("well , arvo is an island .")
    assert world.scripted_q(TRAINING[0], prompt, [*complete, EOS])[-1] == MALFORMED
    assert world.scripted_q(TRAINING[0], prompt, ["arvo"])[-1] == MALFORMED


def test_samples_have_the_stated_distribution():
    prompt, policy, rng = PROMPTS[5], TRAINING[1], np.random.default_rng(0)
    counts = Counter(world.sample_answer(policy, prompt, rng) for _ in range(10000))
    for tokens, (p, _) in enumerate_policy(policy, prompt).items():
        assert counts[" ".join(tokens[:-1])] / 10000 == pytest.approx(p, abs=5 * (p / 10000) ** 0.5)


# ---- tokenizer and chat template ----

def test_words_are_tokens_and_texts_survive(tokenizer):
    assert tokenizer.get_vocab() == {word: i for i, word in enumerate(world.vocabulary())}
    for text in [*PROMPTS, *world.answers(PROMPTS[7])]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text.split()) and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer("zebra", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]
    assert "token_type_ids" not in tokenizer("well")


def test_a_chat_is_the_concatenation_of_its_parts(tokenizer):
    question, answer, follow_up = PROMPTS[3], world.answers(PROMPTS[3])[0], PROMPTS[50]
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer},
            {"role": "user", "content": follow_up}]

    def render(messages, **options):
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    turn = [tokenizer.convert_tokens_to_ids("<turn>")]
    first = [tokenizer.bos_token_id] + turn + ids_of(tokenizer, question, eos=False) + turn
    second = ids_of(tokenizer, answer)
    third = turn + ids_of(tokenizer, follow_up, eos=False) + turn
    assert render(chat[:1], add_generation_prompt=True) == render(chat[:1]) == first
    assert render(chat[:2]) == first + second
    assert render(chat, add_generation_prompt=True) == first + second + third
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.decode(render(chat)) == text


# ---- exact values of a neural policy ----

def answer_probability(policy, tokenizer, prompt_ids, answer, given=0):
    """P(answer and EOS | its first tokens, as many as given) by one forward, without padding or sharing."""
    ids = ids_of(tokenizer, answer)
    with torch.no_grad():
        logprobs = policy(input_ids=torch.tensor([prompt_ids + ids])).logits[0].double().log_softmax(-1)
    steps = range(given, len(ids))
    return float(sum(logprobs[len(prompt_ids) + t - 1, ids[t]] for t in steps).exp()) if steps else 1.0


def brute_force(policy, tokenizer, row, prefix):
    """E[r | prefix] as a loop over the answers that start with the prefix."""
    prompt = row["prompt"][-1]["content"]
    value = mass = 0.0
    for answer in world.answers(prompt):
        if ids_of(tokenizer, answer)[:len(prefix)] == prefix:
            p = answer_probability(policy, tokenizer, row["prompt_ids"], answer, given=len(prefix))
            mass, value = mass + p, value + p * world.true_reward(prompt, answer)
    return value + (1 - mass) * MALFORMED


def test_values_are_the_enumeration(tokenizer, policy):
    rng = np.random.default_rng(0)
    rows = [row_of(tokenizer, prompt, ids_of(tokenizer, str(rng.choice(world.answers(prompt)))))
            for prompt in SOME_PROMPTS[:3]]
    found = exact.values(rows, policy, tokenizer), exact.true_reward(rows, policy, tokenizer)
    for row, values, reward in zip(rows, *found):
        expected = [brute_force(policy, tokenizer, row, row["response_ids"][:t]) for t in range(len(values))]
        assert len(values) == len(row["response_ids"]) + 1
        assert values == pytest.approx(expected, abs=1e-5)
        assert reward == pytest.approx(values[0], abs=1e-12)
        after_eos = world.true_reward(row["prompt"][-1]["content"], row["response"])
        assert values[-1] == pytest.approx(after_eos, abs=1e-12)


def test_values_are_a_martingale(tokenizer, policy):
    """Q(prefix) = sum_v P(v | prefix) Q(prefix + v) over the whole vocabulary."""
    prompt = SOME_PROMPTS[1]
    answer = ids_of(tokenizer, world.answers(prompt)[13])
    for t in (0, 1, 2, 5, len(answer) - 1):
        rows = [row_of(tokenizer, prompt, answer[:t] + [v]) for v in range(len(tokenizer))]
        values = exact.values(rows, policy, tokenizer)
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([rows[0]["prompt_ids"] + answer[:t]])).logits[0, -1]
        assert {v[t] for v in values} == {values[0][t]}
        mean = logits.softmax(-1).numpy() @ [v[-1] for v in values]
        assert mean == pytest.approx(values[0][t], abs=1e-5)


def test_malformed_and_truncated_responses(tokenizer, policy):
    prompt = SOME_PROMPTS[2]
    answer = ids_of(tokenizer, world.answers(prompt)[1])
    cut, wrong, late, hidden = answer[:-1], [answer[0], answer[0]], answer + [answer[0]] * 8, [4] + answer
    rows = [row_of(tokenizer, prompt, ids) for ids in (answer, cut, wrong, late, hidden, [])]
    values = exact.values(rows, policy, tokenizer)
    assert values[1] == values[0][:-1] and -1 < values[1][-1] < values[0][-1]
    assert values[2] == [*values[0][:2], MALFORMED]
    assert values[3] == values[0] + [MALFORMED] * 8
    assert values[4] == [values[0][0]] + [MALFORMED] * len(hidden)
    assert values[5] == values[0][:1]
    right = world.true_reward(prompt, world.answers(prompt)[1])
    assert rows[4]["response"] == rows[0]["response"]            # the text alone would hide the special token
    assert exact.sampled_reward(rows, None, tokenizer) == [right] + [MALFORMED] * 5


def test_batch_mates_and_order_change_nothing(tokenizer, policy, monkeypatch):
    rows = [row_of(tokenizer, prompt, ids_of(tokenizer, world.answers(prompt)[i]))
            for i, prompt in enumerate(SOME_PROMPTS)]
    together = exact.values(rows + rows[:2], policy, tokenizer)
    monkeypatch.setattr(exact, "CHUNK", 7)
    for row, values in zip(rows + rows[:2], together):
        assert exact.values([row], policy, tokenizer)[0] == pytest.approx(values, abs=1e-5)


def test_summary_is_the_sum_over_the_answers(tokenizer, policy):
    prompt = SOME_PROMPTS[3]
    row = row_of(tokenizer, prompt, [])
    found = exact.summary([row], policy, tokenizer)[0]
    probability = {answer: answer_probability(policy, tokenizer, row["prompt_ids"], answer)
                   for answer in world.answers(prompt)}
    mass = sum(probability.values())
    right = sum(p for answer, p in probability.items() if world.parse(prompt, answer).right)
    length = sum(p * len(world.response_tokens(answer)) for answer, p in probability.items()) / mass
    assert 0.01 < found["right"] < found["well_formed"] < 0.99
    assert found["well_formed"] == pytest.approx(mass, rel=1e-4)
    assert found["right"] == pytest.approx(right, rel=1e-4)
    assert found["length"] == pytest.approx(length, rel=1e-4)
    assert found["reward"] == pytest.approx(exact.true_reward([row], policy, tokenizer)[0], abs=1e-12)
    assert sum(found[f"closing_{c}"] for c in range(3)) == pytest.approx(1)


# ---- the files ----

def test_model_folder_loads_with_stock_classes(build, tokenizer):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(build / "model")
    assert model.config.vocab_size == len(tokenizer) and model.config.max_position_embeddings == 512
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize("name, policies, rows, width",
                         [("preferences", TRAINING, 384 * 12, 4), ("unseen", UNSEEN, 384 * 2, 3)])
def test_preference_files(build, name, policies, rows, width):
    found = read_jsonl(build / f"{name}.jsonl")
    assert len(found) == rows and {row["instruction"] for row in found} == set(PROMPTS)
    names = {policy.name for policy in policies}
    for row in found:
        assert set(row) == {"source", "instruction", "models", "completions", "group"}
        assert row["group"] == world.group_of(row["instruction"])
        assert [completion["model"] for completion in row["completions"]] == row["models"]
        assert len(set(row["models"])) == width and set(row["models"]) <= names
        for completion in row["completions"]:
            truth = world.true_score(row["instruction"], completion["response"])
            assert completion["overall_score"] - truth in (-1, 0, 1)
            assert 1 <= completion["overall_score"] <= 10
    skill = {policy.name: policy.skill for policy in policies}
    for policy in policies:
        right = [world.parse(row["instruction"], completion["response"]).right for row in found
                 for completion in row["completions"] if completion["model"] == policy.name]
        assert np.mean(right) == pytest.approx(skill[policy.name], abs=0.06)
    assert (build / f"{name}.jsonl").stat().st_size < 5e6


def test_sft_file_and_split(build):
    from plumbing.data import split_of
    assert make.choose_split_seed() == SPLIT_SEED == DEFAULTS["sft"]["split_seed"]
    rows = read_jsonl(build / "sft.jsonl")
    assert {row["instruction"] for row in rows} == {p for p in PROMPTS if split_of(p, SPLIT_SEED) == "sft"}
    for row in rows:
        assert set(row) == {"instruction", "output", "group"}
        assert row["group"] == world.group_of(row["instruction"])
    parsed = [world.parse(row["instruction"], row["output"]) for row in rows]
    assert np.mean([y.right for y in parsed]) == pytest.approx(0.7, abs=0.05)
    assert np.mean([POLITE[y.opener] for y in parsed]) == pytest.approx(0.5, abs=0.06)


def test_the_same_seed_writes_the_same_rows_and_a_foreign_folder_is_left_alone(tmp_path):
    first, second = (make.preference_rows(UNSEEN, 1, np.random.default_rng([0, 1])) for _ in range(2))
    assert first == second
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(SystemExit, match="not a toy build"):
        make.main(tmp_path, seed=0)
    assert (tmp_path / "keep.txt").read_text() == "mine"
