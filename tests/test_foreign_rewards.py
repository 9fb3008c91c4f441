"""Reward models that are not ours: how they read a conversation, and what is longer than they can read."""

from types import SimpleNamespace

import pytest
import torch

import evaluate
import judge
from common import answer_ids, chat_ids, load_reward_model, load_tokenizer, reward_scores
from conftest import run_of, tiny_llama, word_tokenizer, write_jsonl
from foreign import ANSWERS, CHATML, CPU, HEADERS, NO_PROMPT, QUESTION, reward_model
from plumbing import policies, rl, rows, texts
from plumbing.errors import BadInput


# ---- a reward model that is not ours -----------------------------------------------------------------------

def own_way(folder, chats, cut=False):
    """Scores as its makers compute them: the template over the whole chat, one row alone, the last token."""
    loaded, tokenizer, *_ = load_reward_model(folder, torch.float32)
    found = []
    for chat, answer in chats:
        chat = [*chat, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        text = text[:text.rindex(answer.strip()) + len(answer.strip())] if cut else text
        with torch.no_grad():
            found.append(loaded(input_ids=torch.tensor([tokenizer(
                text, add_special_tokens=False).input_ids])).logits.item())
    return found


FOREIGN = [("qwen", CHATML, {}), ("gpt2", CHATML, {"pad_token": "<eos>"}),
           ("llama", HEADERS, {"pad_token": "<|im_end|>"}), ("qwen", NO_PROMPT, {})]


@pytest.mark.parametrize("family, template, special", FOREIGN)
def test_a_foreign_reward_model_reads_its_own_rendering(family, template, special, tmp_path):
    """What stands behind the end of turn, before the answer, or in place of a prompt belongs to it; pad = EOS
    and pad = end of turn are not mistaken for the end of a row."""
    folder = reward_model(tmp_path, family, template, **special)
    chats = [(QUESTION, answer) for answer in ANSWERS]
    loaded, tokenizer, *_ = load_reward_model(folder, torch.float32)
    got = reward_scores(loaded, tokenizer, chats, CPU, 3)
    assert got == pytest.approx(own_way(folder, chats), abs=1e-4) and max(got) - min(got) > 1e-2


@pytest.mark.parametrize("family, template, special", FOREIGN)
def test_a_cut_answer_is_read_without_what_closes_a_turn(family, template, special, tmp_path):
    folder = reward_model(tmp_path, family, template, **special)
    model = load_reward_model(folder, torch.float32)
    policy = word_tokenizer()
    run = run_of(policy, micro_batch=2)
    answered = [{"prompt": QUESTION, "response": answer, "response_ids": answer_ids(policy, answer)[:-1],
                 "truncated": True} for answer in ANSWERS]
    chats = [(QUESTION, answer) for answer in ANSWERS]
    got = rl.model_scores(model, answered, run)
    assert got == pytest.approx(own_way(folder, chats, cut=True), abs=1e-4)
    whole = [{**row, "truncated": False, "response_ids": row["response_ids"] + [1]} for row in answered]
    got = rl.model_scores(model, whole, run)
    assert got == pytest.approx(own_way(folder, chats), abs=1e-4)


def test_sampled_ids_stay_where_tokenizer_and_rendering_are_the_policys(tmp_path):
    """An answer may be sampled in other pieces than its text is cut into; these are what is scored."""
    model = load_reward_model(reward_model(tmp_path), torch.float32)
    policy = load_tokenizer(tmp_path)
    letters = [policy.convert_tokens_to_ids(c) for c in "yes"]
    assert letters != texts.text_ids(policy, "yes")
    newline = policy("\n", add_special_tokens=False).input_ids
    row = {"prompt": QUESTION, "response": "yes", "truncated": False,
           "response_ids": [*letters, policy.eos_token_id]}
    got = rl.model_scores(model, [row], run_of(policy, micro_batch=1))
    ids = chat_ids(policy, QUESTION) + row["response_ids"] + newline
    with torch.no_grad():
        assert got == pytest.approx([model[0](input_ids=torch.tensor([ids])).logits.item()], abs=1e-5)
    cut = {**row, "truncated": True, "response_ids": letters}
    got = rl.model_scores(model, [cut], run_of(policy, micro_batch=1))
    with torch.no_grad():
        ids = torch.tensor([chat_ids(policy, QUESTION) + letters])
        assert got == pytest.approx([model[0](input_ids=ids).logits.item()], abs=1e-5)


def test_every_user_of_a_foreign_reward_model_reads_it_so(tmp_path, monkeypatch):
    """train_gvm --reward model, evaluate.py, label.py and judge.py rank."""
    folder = reward_model(tmp_path / "rm")
    wanted = own_way(folder, [(QUESTION, answer) for answer in ANSWERS])
    args = SimpleNamespace(reward="model", reward_model=str(folder), micro_batch=2, dtype="float32")
    train = [{"prompt": QUESTION, "text": answer} for answer in ANSWERS]
    scale = rows.reward_map(train, args, torch.float32, CPU)
    scores = [row["reward"] * scale["scale"] + scale["center"] for row in train]
    assert scores == pytest.approx(wanted, abs=1e-4)

    answered = [{"prompt": QUESTION, "response": answer} for answer in ANSWERS]
    assert evaluate.model_scores(folder, answered, args, CPU) == pytest.approx(wanted, abs=1e-4)
    cut = own_way(folder, [(QUESTION, answer) for answer in ANSWERS], cut=True)
    answered = [{**row, "truncated": True} for row in answered]
    assert evaluate.model_scores(folder, answered, args, CPU) == pytest.approx(cut, abs=1e-4)

    kept = SimpleNamespace(rows={}, work=lambda todo, n, do, *_: kept.rows.update(
        (row["key"], row["score"]) for row in do(todo)))
    asked = {i: ("q", "p", answer, i % 2 == 0) for i, answer in enumerate(ANSWERS)}
    policies.score(asked, {"q": {"prompt": QUESTION}}, kept, args, folder, CPU)
    mixed = [pair[i % 2] for i, pair in enumerate(zip(cut, wanted))]
    assert [kept.rows[i] for i in range(5)] == pytest.approx(mixed, abs=1e-4)

    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": QUESTION[0]["content"], "chosen": ANSWERS[0],
                                                    "rejected": answer} for answer in ANSWERS[1:]])
    result = judge.rank_pairs(judge.Args(pairs=pairs, reward_model=str(folder), dtype="float32"), CPU)
    assert result["accuracy"]["reward model: all"]["accuracy"] == sum(wanted[0] > x for x in wanted[1:]) / 4


def test_a_sampled_answer_is_scored_whatever_it_spells_out(tmp_path):
    """A run does not end because its policy writes what its reward model cannot read as text."""
    model = load_reward_model(reward_model(tmp_path, "llama", kind="unigram"), torch.float32)
    policy = word_tokenizer()
    assert texts.readable(texts.text_ids, model[1], "yes <eos> .") is None
    row = {"prompt": QUESTION, "response_ids": [1], "truncated": False}
    said, clean = ({**row, "response": text} for text in ("yes <eos> .", "yes  ."))
    one, other = rl.model_scores(model, [said, clean], run_of(policy, micro_batch=2))
    assert one == pytest.approx(other, abs=1e-5)


# ---- the context of a reward model is counted in its own tokens --------------------------------------------

@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_more_than_a_reward_model_can_read_is_one_sentence(family, tmp_path):
    """Not an IndexError (GPT-2), not a silent number (rotary positions)."""
    folder = reward_model(tmp_path, family, context=64)
    loaded, tokenizer, *_ = load_reward_model(folder, torch.float32)
    reward_scores(loaded, tokenizer, [(QUESTION, "yes .")], CPU, 1)
    with pytest.raises(BadInput, match="--reward_model: .* tokens, more than the 64 of its context"):
        reward_scores(loaded, tokenizer, [(QUESTION, "zebras " * 20)], CPU, 1)


def feedback():
    """UltraFeedback rows of 40 prompts; every second prompt and some answers are long in the reward model's
    tokens, and short in the policy's."""
    unknown = "q" * 90
    return [{"instruction": f"is thing{i % 12} {'red' if i % 2 else unknown} {i} ?", "completions": [
        {"model": "a", "response": "no .", "overall_score": 2},
        {"model": "b", "response": "yes ." if i % 5 else f"yes {unknown} .", "overall_score": 9}]}
        for i in range(40)]


def test_what_the_reward_model_cannot_read_is_counted_before_the_work(tmp_path, capsys):
    """Prompts of train_ppo.py and train_remax.py, trajectories of train_gvm.py --reward model."""
    folder = reward_model(tmp_path / "rm", "gpt2", context=96)
    data = write_jsonl(tmp_path / "data.jsonl", feedback())
    policy = word_tokenizer()
    args = SimpleNamespace(data=data, allow_dropped=True, split_seed=0, max_prompt_length=64, eval_prompts=9,
                           response_length=8, reward_fn="", reward_model=str(folder), model="toy")
    train, test = rows.rl_prompts(policy, args, 1)
    assert "leaves less than --response_length of --reward_model's context" in capsys.readouterr().out
    assert train and not any("qqq" in row["prompt"][0]["content"] for row in train + test)
    args = SimpleNamespace(data=data, allow_dropped=True, split_seed=0, max_length=64, k=0, reward="model",
                           reward_model=str(folder), eval_pairs=9)
    train, _ = rows.trajectories(policy, args)
    assert "more than --reward_model can read" in capsys.readouterr().out
    assert train and not any("qqq" in row["prompt"][0]["content"] + row["text"] for row in train)


def test_evaluate_leaves_out_what_the_reward_model_cannot_read(tmp_path, monkeypatch, capsys):
    """For all policies alike, counted; the others keep their scores."""
    folder = reward_model(tmp_path / "rm", "gpt2", context=96)
    tiny_llama().save_pretrained(tmp_path / "policy")
    word_tokenizer().save_pretrained(tmp_path / "policy")
    data = write_jsonl(tmp_path / "data.jsonl", feedback())
    monkeypatch.chdir(tmp_path)
    args = evaluate.Args(policies=[f"one={tmp_path / 'policy'}"], data=data, reward_model=str(folder),
                         response_length=4, dtype="float32", temperature=0, out="")
    result = evaluate.evaluate_policy(args, CPU)
    out = capsys.readouterr().out
    kept, asked = map(int, out.split("can read all answers to ")[1].split(" prompts")[0].split(" of "))
    assert 0 < kept < asked and result["prompts"] == kept
    assert "reward model" in result["policies"]["one"]["scores"]
