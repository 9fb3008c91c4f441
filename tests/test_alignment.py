"""Which number is read at which token. Log-probs and values of padded batches against models that see one
unpadded prefix at a time; what is sampled, stopped, masked and rendered; where tau goes.

Every row here is awkward: pad is the EOS token, prompts and answers have unequal lengths, one prompt contains
EOS, one answer is truncated, one is nothing but EOS.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, GenerationConfig, PreTrainedTokenizerFast

import sft
import train_dvpo
import train_gvm
from common import (answer_ids, chat_ids, collate, generate, keyed_rng, load_policy, load_reward_model,
                    load_tokenizer, load_value_base, reward_scores, value_head)
from conftest import run_of, run_stage, TEMPLATE, word_tokenizer, WORDS
from plumbing.lean import LogProbs
from plumbing.rl import load_value_fn

EOS, CPU = 1, torch.device("cpu")
PROMPTS = [[0, 3, 6, 9, 15, 7], [0, 20, 6], [0, 3, 6, 21, EOS, 4, 6, 8, 9], [5, 30, 29, 28]]
RESPONSES = [[10, 9, 27, EOS], [11, 12, 13, 14, 15, 16], [EOS], [13, 10, 13, 10, EOS]]
ENDS = [(i, t) for i, response in enumerate(RESPONSES) for t in range(len(response))]
CHAT = [{"role": "user", "content": "is thing1 red ?"}]


def padded():
    return collate(PROMPTS, RESPONSES, EOS)


def logprobs(policy, batch, temperature=1.0):
    """(log-probs, entropy) as train_dvpo.py reads them."""
    return train_dvpo.response_logprobs(LogProbs(policy), batch,
                                        run_of(temperature=temperature, response_length=12))


@pytest.fixture(params=["llama", "gpt2"])
def folder(request, models_folder):
    """A model with rotary and one with absolute positions."""
    return models_folder / request.param


@pytest.fixture
def policy(folder):
    return load_policy(folder, load_tokenizer(folder), torch.float32).eval()


@pytest.fixture
def gvm(folder):
    """A value model whose head is large enough for one token's value to differ from the next one's."""
    model = load_value_base(folder, torch.float32).eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(value_head(model).weight)
    return model


@pytest.fixture
def dvpo_values(monkeypatch):
    """train_dvpo.gvm_values without tau, of prompts that are token ids already."""
    monkeypatch.setattr(train_dvpo, "chat_ids", lambda tokenizer, ids, tau: ids)

    def values(gvm, prompts, responses):
        rows = [{"prompt": prompt, "response_ids": response} for prompt, response in zip(prompts, responses)]
        return train_dvpo.gvm_values(gvm, rows, [], run_of(word_tokenizer(pad_token="</s>"), micro_batch=8))
    return values


@torch.no_grad()
def at_the_end(model, ids):
    """What a model says at the last token of a text that it reads alone, without
    padding, masks or positions."""
    return model(input_ids=torch.tensor([ids])).logits[0, -1]


def slow_logprobs(model, temperature=1.0):
    """log pi(y_t | x, y_<t), one prefix at a time. [B][T]"""
    return [[torch.log_softmax(at_the_end(model, prompt + response[:t]) / temperature, -1)[y].item()
             for t, y in enumerate(response)] for prompt, response in zip(PROMPTS, RESPONSES)]


def slow_values(model, prompts=PROMPTS, responses=RESPONSES):
    """V(s_1) after the prompt, then Q(s_t, a_t) after each token, one prefix at a time. [B][1 + T]"""
    return [[at_the_end(model, prompt + response[:t]).item() for t in range(len(response) + 1)]
            for prompt, response in zip(prompts, responses)]


def assert_rows(got, wanted):
    for row, numbers in zip(got.tolist(), wanted, strict=True):
        assert row[:len(numbers)] == pytest.approx(numbers, abs=2e-5)


# ---- log-probs and values ----

@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_state_before_the_token(policy, temperature):
    """response_logprobs equals the loop over prefixes at the sampler's temperature; one column off it would
    not."""
    got, entropy = logprobs(policy, padded(), temperature)
    wanted = slow_logprobs(policy, temperature)
    assert_rows(got, wanted)
    first = torch.log_softmax(at_the_end(policy, PROMPTS[0]) / temperature, -1)
    assert entropy[0, 0].item() == pytest.approx(-(first.exp() * first).sum().item(), abs=1e-4)
    late = [got[i, t + 1].item() - wanted[i][t] for i, t in ENDS if t + 1 < len(RESPONSES[i])]
    assert max(map(abs, late)) > 0.1


def test_sft_trains_the_same_logprobs(policy, folder):
    """sft's loss is minus the sum of the looped log-probs: every response token with
    its EOS, and nothing else."""
    loss, count = sft.batch_loss(policy, list(zip(PROMPTS, RESPONSES)), load_tokenizer(folder), CPU)
    assert loss.item() == pytest.approx(-sum(map(sum, slow_logprobs(policy))), abs=1e-3)
    assert count == len(ENDS)


def test_values_are_read_after_the_token(gvm, folder, dvpo_values):
    """Both stages read Q_t = Q(s_t, a_t) at the token a_t and Q_0 = V(s_1) at the last prompt token."""
    wanted = slow_values(gvm)
    got = dvpo_values(gvm, PROMPTS, RESPONSES)
    assert_rows(got, wanted)
    assert all(not row[len(numbers):].any() for row, numbers in zip(got, wanted))  # nothing behind the end
    rows = list(zip(PROMPTS, RESPONSES, range(len(PROMPTS))))
    assert_rows(train_gvm.values(gvm, rows, run_of(load_tokenizer(folder)))[0], wanted)


def test_values_one_token_early_or_late_would_be_seen(gvm, dvpo_values):
    """The tests above can fail: shifted by one column the values differ from the looped ones
    in every row that has two."""
    got, wanted = dvpo_values(gvm, PROMPTS, RESPONSES), slow_values(gvm)
    for i, numbers in enumerate(wanted):
        early = [abs(a - b) for a, b in zip(got[i, :len(numbers) - 1].tolist(), numbers[1:])]
        late = [abs(a - b) for a, b in zip(got[i, 1:len(numbers)].tolist(), numbers)]
        assert max(early) > 0.05 and max(late) > 0.05


def test_rows_beside_a_row_and_padding_change_nothing(policy, gvm, dvpo_values):
    """A row has the same log-probs and values alone, in a batch, and in a batch that is far too wide."""
    wide = [*PROMPTS, [0] * 20], [*RESPONSES, [9] * 12]
    logp, _ = logprobs(policy, collate(*wide, EOS))
    q = dvpo_values(gvm, *wide)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        alone, n = collate([prompt], [response], EOS), len(response)
        assert torch.allclose(logprobs(policy, alone)[0][0], logp[i, :n], atol=1e-5)
        assert torch.allclose(dvpo_values(gvm, [prompt], [response])[0], q[i, :1 + n], atol=1e-5)


def test_models_for_reading_have_no_dropout(policy, gvm):
    """In train mode too two passes agree exactly: otherwise ratio 1 and KL 0 would
    not hold at the first step."""
    for model in (policy.train(), gvm.train()):
        ids = torch.tensor([PROMPTS[2]])
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_first_eos_is_trained_and_nothing_after_it():
    """The mask comes from lengths: EOS as padding is out, EOS as an action or
    inside a prompt is what it is."""
    batch = padded()
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        assert batch.mask[i].tolist() == [t < len(response) for t in range(6)]
        assert batch.ids[i, batch.P:][batch.mask[i]].tolist() == response
        assert batch.ids[i][batch.attention[i].bool()].tolist() == prompt + response
        assert batch.positions[i][batch.attention[i].bool()].tolist() == list(range(len(prompt + response)))
    assert batch.ids[0, -1] == EOS and not batch.mask[0, -1]


def test_reward_model_scores_are_read_at_the_answers_last_token(models_folder, tmp_path):
    """Pad is EOS here too: the score of a padded batch equals that of stock
    transformers on each chat alone."""
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_pretrained(models_folder / "llama", num_labels=1).eval()
    model.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(models_folder / "llama")
    tokenizer.save_pretrained(tmp_path)
    texts = ["yes", "no it is not red .", "it is"]
    wanted = [model(input_ids=torch.tensor([chat_ids(tokenizer, CHAT)
                                            + answer_ids(tokenizer, text)])).logits.item()
              for text in texts]
    loaded, tokenizer, _, _ = load_reward_model(tmp_path, torch.float32)
    got = reward_scores(loaded, tokenizer, [(CHAT, text) for text in texts], CPU, micro_batch=2)
    assert got == pytest.approx(wanted, abs=1e-5) and max(wanted) - min(wanted) > 0.01


# ---- generation ----

def sample(model, folder, prompts=PROMPTS, seeds=range(4), length=6, temperature=1.0):
    return generate(model, prompts, list(seeds), length, temperature, load_tokenizer(folder), CPU)


def frequencies(model, folder, temperature, n=4000):
    answers = sample(model, folder, [PROMPTS[0]] * n, range(n), 1, temperature)
    return torch.bincount(torch.tensor(answers)[:, 0], minlength=len(WORDS)) / n


def distance(p, q):
    """Total variation: the largest difference in probability that any set of tokens gets."""
    return 0.5 * (p - q).abs().sum().item()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_softmax_of_logits_over_temperature(policy, folder, temperature):
    """4000 seeds, one token: the frequencies are the model's probabilities at this
    temperature and at no other."""
    got = frequencies(policy, folder, temperature)
    logits = at_the_end(policy, PROMPTS[0])
    assert distance(got, torch.softmax(logits / temperature, -1)) < 0.05
    assert distance(got, torch.softmax(logits / (1.5 - temperature), -1)) > 0.1


def test_the_checkpoints_own_sampling_settings_are_not_used(folder, policy, tmp_path):
    """A saved generation_config that would make every sample greedy, short and odd
    leaves sampling at T = 1 alone."""
    policy.generation_config = GenerationConfig(do_sample=True, top_k=1, temperature=0.1,
                                                repetition_penalty=5.0, suppress_tokens=[9, 10],
                                                eos_token_id=EOS, pad_token_id=EOS)
    policy.save_pretrained(tmp_path)
    load_tokenizer(folder).save_pretrained(tmp_path)
    model = load_policy(tmp_path, load_tokenizer(tmp_path), torch.float32)
    wanted = torch.softmax(at_the_end(policy, PROMPTS[0]), -1)
    assert distance(frequencies(model, tmp_path, 1.0), wanted) < 0.05


def test_temperature_0_is_greedy(policy, folder):
    """The argmax of each prefix read alone, up to EOS."""
    for prompt, answer in zip(PROMPTS, sample(policy, folder, temperature=0.0)):
        wanted = []
        while len(wanted) < 6 and EOS not in wanted:
            wanted.append(at_the_end(policy, prompt + wanted).argmax().item())
        assert answer == wanted


def test_a_rows_sample_does_not_depend_on_the_rows_beside_it(policy, folder):
    """The noise is the row's own: alone, in a batch and in reverse order it says the same;
    another seed another thing."""
    together = sample(policy, folder)
    assert [sample(policy, folder, [prompt], [seed])[0] for seed, prompt in enumerate(PROMPTS)] == together
    assert sample(policy, folder, PROMPTS[::-1], [3, 2, 1, 0])[::-1] == together
    assert sample(policy, folder, seeds=range(9, 13)) != together


def test_answers_are_cut_behind_the_first_eos(policy, folder):
    """EOS is kept and ends the answer; an answer without one has exactly the length limit."""
    answers = sample(policy, folder, PROMPTS * 25, range(100), 8)
    ended = [answer for answer in answers if EOS in answer]
    assert 0 < len(ended) < 100
    assert all(answer.index(EOS) == len(answer) - 1 for answer in ended)
    assert all(len(answer) == 8 for answer in answers if EOS not in answer)


def test_generation_leaves_the_models_mode_as_it_was(policy, folder):
    """A model in training is in training again afterwards."""
    assert sample(policy.train(), folder) and policy.training
    assert sample(policy.eval(), folder) and not policy.training


def test_sampled_ids_are_scored_as_they_are(policy, folder, monkeypatch):
    """Rollout to scoring keeps ids: the text, which loses special tokens, is never tokenized again."""
    tokenizer = load_tokenizer(folder)
    run = run_of(tokenizer, response_length=8, temperature=1.0, micro_batch=3, static_cache=False,
                 value_fn="toy_truth:constant")
    prompts = [{"prompt": CHAT, "group": "g", "prompt_ids": ids} for ids in PROMPTS * 5]
    rows = train_dvpo.rollout(policy, prompts, range(20), run)
    assert [row["response_ids"] for row in rows] == sample(policy, folder, PROMPTS * 5, range(20), 8)
    assert [row["truncated"] for row in rows] == [EOS not in row["response_ids"] for row in rows]
    assert any(tokenizer(row["response"], add_special_tokens=False).input_ids != row["response_ids"][:-1]
               for row in rows)
    monkeypatch.setattr("toy_truth.constant", lambda rows, policy, tokenizer:
                        [[0.5] * (1 + len(row["response_ids"])) for row in rows])
    lm = LogProbs(policy)
    batch, _, old, ref, values = train_dvpo.score(train_dvpo.Models(lm, lm, load_value_fn(policy, run)), rows,
                                                  [], run)
    for i, row in enumerate(rows):
        n = len(row["response_ids"])
        assert batch.ids[i, batch.P:][batch.mask[i]].tolist() == row["response_ids"]
        assert values[i].tolist() == [0.5] * (1 + n) + [0.0] * (batch.mask.shape[1] - n)
    assert torch.equal(old, ref) and old.shape == batch.mask.shape


def test_a_missing_eos_costs_once_and_at_the_last_token(flags, chain, tmp_path, monkeypatch):
    """--missing_eos_penalty: a truncated answer keeps its tokens and pays at its last one, a
    complete one pays nothing."""
    seen = []
    original = train_dvpo.advantages
    monkeypatch.setattr(train_dvpo, "advantages", lambda *args: seen.append(args) or original(*args))
    run_stage(train_dvpo, **{**flags.dvpo, "max_steps": 1, "rollout_batch": 32}, sft_model=chain.sft,
              value_model=chain.gvm, output_dir=tmp_path, kl_coef=0.0, missing_eos_penalty=0.5)
    _, values, penalty, mask, _ = seen[0]
    cost, last = penalty.sum(1), penalty.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
    assert torch.equal(cost, last) and set(cost.tolist()) == {0.0, 0.5}
    assert (cost[mask.sum(1) < 6] == 0).all() and (cost[mask.sum(1) == 6] == 0.5).any()


# ---- text to ids ----

@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("{{ bos_token }}", ""), None])
def test_there_is_one_bos_if_the_template_writes_it(template, tmp_path):
    """The template is the only one to write BOS, whatever the tokenizer itself likes to add."""
    tokenizer = word_tokenizer(template=template)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>",
                                                                    special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("red").input_ids[0] == 0  # it would add one
    ids = chat_ids(tokenizer, CHAT) + answer_ids(tokenizer, "yes .")
    assert ids.count(0) == (1 if template is None or "bos" in template else 0)
    assert ids.count(EOS) == 1 and ids[-1] == EOS


def test_prompt_and_answer_do_not_merge_at_their_boundary(tmp_path):
    """":" + "A" is one token of this vocabulary; the answer still starts with a token of
    its own, as when generated."""
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", "Q", "A", ":", ":A", "\n"])}
    bpe = Tokenizer(models.BPE(vocab, [(":", "A")], unk_token="<unk>"))
    template = ("{% for m in messages %}{{ m['content'] }}:"
                "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}")
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                            chat_template=template).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("Q:A").input_ids == [3, 6]
    prompt = [{"role": "user", "content": "Q"}]
    assert chat_ids(tokenizer, prompt) == [3, 5] and answer_ids(tokenizer, "A") == [4, EOS]


@pytest.mark.parametrize("behind, eos", [("<turn_end>\n", "<turn_end>"), ("</s>", "</s>"), (" .\n", "</s>")])
def test_eos_is_the_special_token_behind_an_assistant_turn(behind, eos, tmp_path):
    """A chat model may end turns with a token that is not its tokenizer's EOS (Gemma); a
    plain word is never taken."""
    words = [*WORDS, "<turn_end>"]
    template = ("{% for m in messages %}{{ m['role'] + ' : ' + m['content'] }}" + behind + "{% endfor %}"
                "{% if add_generation_prompt %}assistant :{% endif %}")
    word_tokenizer(words, template, additional_special_tokens=["<turn_end>"]).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token == eos and answer_ids(tokenizer, "yes")[-1] == words.index(eos)
    assert tokenizer.pad_token_id is not None


# ---- tau ----

TAU = [("is thing2 blue ?", "no ."), ("is thing3 green ?", "yes it is .")]
SETTINGS = {"tau_question_tokens": 8, "tau_answer_tokens": 8, "context": 128}


def test_tau_is_earlier_turns_of_the_same_chat(models_folder):
    """Behind the system turn, before the question: user q1, assistant a1, user q2, assistant a2, user x."""
    tokenizer = load_tokenizer(models_folder / "llama")
    system = {"role": "system", "content": "yes"}
    text = tokenizer.decode(chat_ids(tokenizer, [system, *CHAT], TAU))
    assert text == ("<s> system : yes user : is thing2 blue ? assistant : no . </s> user : is thing3 green ? "
                    "assistant : yes it is . </s> user : is thing1 red ? assistant :")
    assert chat_ids(tokenizer, CHAT, []) == chat_ids(tokenizer, CHAT)


def test_values_under_tau_are_read_on_the_response_only(gvm, folder):
    """tau changes the values and not where they stand: V(s_1), then one per response token, as
    the loop over prefixes says."""
    tokenizer = load_tokenizer(folder)
    rows = [{"prompt": CHAT, "response_ids": response} for response in RESPONSES]
    run = run_of(tokenizer, micro_batch=3)
    got = train_dvpo.gvm_values(gvm, rows, TAU, run)
    wanted = slow_values(gvm, [chat_ids(tokenizer, CHAT, TAU)] * len(rows))
    assert_rows(got, wanted)
    assert all(not row[len(slow):].any() for row, slow in zip(got, wanted))
    other = train_dvpo.gvm_values(gvm, rows, [], run)
    assert got[1].tolist() != pytest.approx(other[1].tolist(), abs=0.05)


def offline_rows():
    return [{"prompt": [{"role": "user", "content": f"is thing{i % 6} red ?"}],
             "text": "yes ." if policy else "no .", "policy": policy, "group": i % 6,
             "prompt_ids": [0], "response_ids": [10, EOS]}
            for i in range(12) for policy in (0, 1)]


def test_tau_in_training_shows_the_same_policy_on_other_prompts(models_folder):
    """K answers of the row's own policy, none of its own group; fewer where there are fewer."""
    rows = offline_rows()
    tokenizer = load_tokenizer(models_folder / "llama")
    source, seen = train_gvm.TauSource(rows, tokenizer, 128, SETTINGS), set()
    for step in range(30):
        for row in rows[:4]:
            tau = source.draw(row["policy"], {row["group"]}, keyed_rng("tau", step), 3)
            assert len(tau) == 3 and {answer for _, answer in tau} == {row["text"]}
            assert row["prompt"][0]["content"] not in {question for question, _ in tau}
            seen.update(question for question, _ in tau)
    assert len(seen) == 6
    two = source.draw(1, {0, 1, 2, 5}, keyed_rng("tau"), 8)  # rows that share tau: it is about none of them
    assert {question for question, _ in two} == {"is thing3 red ?", "is thing4 red ?"}
    assert source.draw(0, {0}, keyed_rng("tau"), 0) == []
    few = train_gvm.TauSource(rows[:2], tokenizer, 128, SETTINGS)
    assert few.draw(0, {0}, keyed_rng("tau"), 3) == []


def test_tau_grows_from_nothing_to_k():
    """No pairs in the first half of the warm-up, on average as much more at each step of its second half, k
    from there on; without a warm-up k at once."""
    args = SimpleNamespace(k=3, tau_warmup=0.6)
    pairs = [train_gvm.tau_pairs(step, 100, args) for step in range(100)]
    assert pairs[:30] == pytest.approx([0] * 30, abs=1e-6) and pairs[60:] == [3] * 40
    assert np.diff(pairs[29:60]) == pytest.approx([0.1] * 30, abs=1e-6)
    assert train_gvm.tau_pairs(0, 10, SimpleNamespace(k=2, tau_warmup=0.0)) == 2


def test_while_tau_grows_some_policies_have_a_pair_more(models_folder):
    """A mean of 1.25 pairs is 1 or 2, of its policy alone; 2 is 2, and 0 none."""
    tokenizer = load_tokenizer(models_folder / "llama")
    rows = [{**row, "reward": 0.0} for row in offline_rows()]
    source = train_gvm.TauSource(rows, tokenizer, 128, SETTINGS)
    args = SimpleNamespace(reward="score", k=3, batch_size=4, batch_policies=2, seed=1)
    run, found = SimpleNamespace(args=args, rank=0, world=1), {1.25: [], 2.0: [], 0.0: []}
    straight = source.draw
    for k, drawn in found.items():
        source.draw = lambda *asked, drawn=drawn: drawn.append(asked[-1]) or straight(*asked)
        for step in range(100):
            train_gvm.batch_of_step(rows, source, step, k, run)
    assert set(found[1.25]) == {1, 2} and np.mean(found[1.25]) == pytest.approx(1.25, abs=0.1)
    assert set(found[2.0]) == {2} and set(found[0.0]) == {0}


def test_both_answers_of_a_pair_are_ranked_under_one_tau(models_folder, monkeypatch):
    """tau is of the policy of the good answer and of that of the bad one in turn; a value
    that only knows tau ranks by chance."""
    tokenizer, asked = load_tokenizer(models_folder / "llama"), []
    rows = [{**row, "prompt_ids": chat_ids(tokenizer, row["prompt"])} for row in offline_rows()]
    pairs = list(zip(rows[1::2], rows[::2]))  # policy 1 is the good one

    def values(engine, rows, run):
        assert [key for *_, key in rows[::2]] == [key for *_, key in rows[1::2]]  # read once for both
        asked.extend(tokenizer.decode(prompt) for prompt, *_ in rows)
        yes = torch.tensor([[float(text.count("yes"))] for text in asked[-len(rows):]])
        return yes.expand(-1, 3), torch.ones(len(rows), 2)
    monkeypatch.setattr(train_gvm, "values", values)
    engine = SimpleNamespace(eval=lambda: None, train=lambda: None)
    source = train_gvm.TauSource(rows, tokenizer, 128, SETTINGS)
    run = run_of(tokenizer, k=2, split_seed=0, micro_batch=2)
    result = train_gvm.held_out_ranking(engine, pairs, source, run)
    assert result["eval/accuracy"] == 0.5 and asked[::2] == asked[1::2] and len(asked) == 4 * len(pairs)
    assert [text.count("yes .") for text in asked[::2]] == [2, 0] * len(pairs)


def test_tau_in_rl_prefers_prompts_outside_the_batch():
    """Insiders are used only where outsiders do not suffice, and the draw depends on its key alone."""
    previous = [{"group": i} for i in range(6)]
    for step in range(20):
        drawn = [row["group"] for row in train_dvpo.draw_tau(previous, {0, 1, 2, 3}, 3,
                                                             keyed_rng("tau", step))]
        assert set(drawn[:2]) == {4, 5} and drawn[2] < 4
        assert drawn == [row["group"] for row in train_dvpo.draw_tau(previous, {0, 1, 2, 3}, 3,
                                                                     keyed_rng("tau", step))]
    assert train_dvpo.draw_tau(previous, set(), 0, keyed_rng("tau")) == []


def test_what_exceeds_the_context_loses_the_first_pair_of_tau(models_folder):
    """The prompt and the answer are never cut; both stages leave out whole pairs, the first one first, and
    rows that share a tau lose the same ones."""
    tokenizer = load_tokenizer(models_folder / "llama")
    row = {"prompt": CHAT, "response_ids": RESPONSES[0]}
    answered = [{"prompt": [{"role": "user", "content": q}], "response": a} for q, a in TAU]
    short = {"prompt": CHAT, "response_ids": RESPONSES[2]}
    both, last, none = (len(chat_ids(tokenizer, CHAT, tau)) + 4 for tau in (TAU, TAU[1:], []))
    for context, left in ((both, TAU), (both - 1, TAU[1:]), (last, TAU[1:]), (last - 1, []), (none, [])):
        source = train_gvm.TauSource([], tokenizer, context, SETTINGS)
        ids, key = chat_ids(tokenizer, CHAT, left), 0
        assert source.behind(TAU, [row, short]) == [(ids, row["response_ids"], key),
                                                    (ids, short["response_ids"], key)]
        assert source.shortened == 2 * (left != TAU)
        assert train_dvpo.fit_tau(answered, [short, row], {**SETTINGS, "context": context},
                                  run_of(tokenizer)) == left


def test_tau_follows_the_policy(flags, chain, tmp_path, monkeypatch):
    """Each step's tau is drawn from the rollouts of the step before, one draw for all rows."""
    rollouts, scored = [], []
    rollout, score = train_dvpo.rollout, train_dvpo.score
    monkeypatch.setattr(train_dvpo, "rollout", lambda *args: rollouts.append(rollout(*args)) or rollouts[-1])
    monkeypatch.setattr(train_dvpo, "score", lambda *args: scored.append(args[2]) or score(*args))
    run_stage(train_dvpo, **flags.dvpo, sft_model=chain.sft, value_model=chain.gvm, output_dir=tmp_path,
              eval_every=0)
    first, extra, second, third = rollouts
    assert len(extra) == 2  # step 0 has no step before: K extra prompts
    for tau, before in zip(scored, (extra, first, second)):
        pairs = {(row["prompt"][-1]["content"], row["response"]) for row in before}
        assert len(tau) == 2 and set(tau) <= pairs
