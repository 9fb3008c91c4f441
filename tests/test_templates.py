"""Other people's chat templates and tokenizers: what text becomes, where answers end, how a reward model that
is not ours reads them. Every model, template and tokenizer is made here."""

import json
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (ByT5Tokenizer, GPT2Config, GPT2ForSequenceClassification, LlamaConfig,
                          LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast,
                          Qwen2Config, Qwen2ForSequenceClassification)
from transformers.utils import chat_template_utils

import evaluate
import judge
import label
import sft
import train_dvpo
import train_gvm
from common import (answer_ids, chat_ids, cut_text, generate, load_policy, load_reward_model, load_tokenizer,
                    reward_scores)
from conftest import CONTEXT, TEMPLATE, WORDS, run_of, run_stage, tiny_llama, word_tokenizer, write_jsonl
from plumbing import inputs, rl, rows, texts
from plumbing.errors import BadInput

CPU = torch.device("cpu")
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
HEADERS = ("{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim "
           "+ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}"
           "{% endif %}")
NO_PROMPT = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + ': ' + m['content'] + '<|im_end|> .' }}"
             "{% endfor %}")  # reads whole chats, renders no prompt
NO_SYSTEM = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
             + TEMPLATE)
SPECIAL = ["<s>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>"]
SPOKEN = ["is it on the sea coast ?", "yes it is on the sea coast .", "user assistant system",
          "< s > < eos > < unk > < | im _ start | > < | im _ end | >"] * 3
QUESTION = [{"role": "user", "content": "is it on the sea ?"}]
ANSWERS = ["yes .", "it is on the sea coast .", "no", "is it ?", "yes it is on the coast"]


def tokenizer_of(kind, template=CHATML, **more):
    """A tokenizer of each kind that there is, made of a few sentences."""
    if kind == "bytes":  # written in Python, not in Rust
        tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=SPECIAL[3:])
        tokenizer.chat_template = template
        return tokenizer
    if kind == "words":
        words = [*SPECIAL, *dict.fromkeys(" ".join(SPOKEN).split())]
        made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        model, cut, decoder, trainer = {
            "bpe": (models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(),
                    trainers.BpeTrainer(special_tokens=SPECIAL, vocab_size=330, show_progress=False,
                                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())),
            "unigram": (models.Unigram(), pre_tokenizers.Metaspace(), decoders.Metaspace(),
                        trainers.UnigramTrainer(special_tokens=SPECIAL, vocab_size=80, unk_token="<unk>",
                                                show_progress=False)),
            "pieces": (models.WordPiece(unk_token="<unk>"), pre_tokenizers.BertPreTokenizer(),
                       decoders.WordPiece(), trainers.WordPieceTrainer(
                           special_tokens=SPECIAL, vocab_size=200, show_progress=False))}[kind]
        made = Tokenizer(model)
        made.pre_tokenizer, made.decoder = cut, decoder
        if kind == "pieces":
            made.normalizer = normalizers.BertNormalizer()
        made.train_from_iterator(SPOKEN, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **{
        "bos_token": "<s>", "eos_token": "<eos>", "unk_token": "<unk>",
        "additional_special_tokens": SPECIAL[3:], **more})


def controls_in(tokenizer, ids):
    return [i for i in ids if i in texts.control_tokens(tokenizer)]


# ---- a reward model that is not ours ------------------------------------------------------------------------

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, initializer_range=0.3, num_labels=1)


def reward_model(folder, family="qwen", template=CHATML, context=512, kind="bpe", **special):
    """A folder with a random sequence classifier and its own tokenizer."""
    torch.manual_seed(1)
    tokenizer = tokenizer_of(kind, template, **special)
    n = len(tokenizer) + 8  # the family's tokenizer may add some of its own
    if family == "gpt2":
        model = GPT2ForSequenceClassification(GPT2Config(
            vocab_size=n, n_embd=32, n_layer=2, n_head=4, n_positions=context, initializer_range=0.3,
            num_labels=1, bos_token_id=0, eos_token_id=1))
    else:
        config, cls = {"qwen": (Qwen2Config, Qwen2ForSequenceClassification),
                       "llama": (LlamaConfig, LlamaForSequenceClassification)}[family]
        model = cls(config(vocab_size=n, max_position_embeddings=context, bos_token_id=0, eos_token_id=1,
                           pad_token_id=None, **SIZES))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
    assert [row["reward"] * scale["scale"] + scale["center"] for row in train] == pytest.approx(wanted, abs=1e-4)

    answered = [{"prompt": QUESTION, "response": answer} for answer in ANSWERS]
    assert evaluate.model_scores(folder, answered, args, CPU) == pytest.approx(wanted, abs=1e-4)
    cut = own_way(folder, [(QUESTION, answer) for answer in ANSWERS], cut=True)
    answered = [{**row, "truncated": True} for row in answered]
    assert evaluate.model_scores(folder, answered, args, CPU) == pytest.approx(cut, abs=1e-4)

    kept = SimpleNamespace(rows={}, work=lambda todo, n, do, *_: kept.rows.update(
        (row["key"], row["score"]) for row in do(todo)))
    asked = {i: ("q", "p", answer, i % 2 == 0) for i, answer in enumerate(ANSWERS)}
    label.score(asked, {"q": {"prompt": QUESTION}}, kept, args, folder, CPU)
    mixed = [pair[i % 2] for i, pair in enumerate(zip(cut, wanted))]
    assert [kept.rows[i] for i in range(5)] == pytest.approx(mixed, abs=1e-4)

    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": QUESTION[0]["content"], "chosen": ANSWERS[0],
                                                    "rejected": answer} for answer in ANSWERS[1:]])
    result = judge.rank_pairs(judge.Args(pairs=pairs, reward_model=str(folder), dtype="float32"), CPU)
    assert result["accuracy"]["reward model: all"]["accuracy"] == sum(wanted[0] > x for x in wanted[1:]) / 4


# ---- the context of a reward model is counted in its own tokens ---------------------------------------------

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


# ---- the ends of answers ------------------------------------------------------------------------------------

NO_END = ("{{ bos_token }}{% for m in messages %}{{ ' <turn> ' + m['role'] + ' : ' + m['content'] }}{% endfor %}"
          "{% if add_generation_prompt %}{{ ' <turn> assistant :' }}{% endif %}")
TURN = [*WORDS, "<turn>"]


def policy_folder(folder, ends, template=NO_END, config_only=False):
    """A random Llama whose files list several ends; where=config: in config.json alone, as older ones do."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(TURN), max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=ends,
        **{k: v for k, v in SIZES.items() if k != "num_labels"}))
    model.save_pretrained(folder)
    word_tokenizer(TURN, template, additional_special_tokens=["<turn>"]).save_pretrained(folder)
    if config_only:
        (folder / "generation_config.json").unlink()
    return folder


def stock_greedy(folder, prompt, ends, length=24):
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False, eos_token_id=ends,
                             pad_token_id=1)
    return out[0, len(prompt):].tolist()


@pytest.fixture
def early_end(tmp_path):
    """(prompt, an id that greedy decoding says after a few tokens, what stock generate says until then)"""
    folder = policy_folder(tmp_path / "probe", 1)
    prompt = chat_ids(load_tokenizer(folder), QUESTION)
    said = stock_greedy(folder, prompt, 1)
    end = next(token for i, token in enumerate(said) if 2 <= i < 20 and token not in said[:i])
    return prompt, end, stock_greedy(folder, prompt, [1, end])


@pytest.mark.parametrize("config_only", [False, True])
def test_any_end_of_the_models_list_ends_an_answer(config_only, early_end, tmp_path):
    """The GLM kind: the tokenizer's EOS, which the template never writes, and another one in the list."""
    prompt, end, wanted = early_end
    folder = policy_folder(tmp_path / "policy", [1, end], config_only=config_only)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_id == 1 and texts.end_ids(tokenizer) == [1, end]
    policy = load_policy(folder, tokenizer, torch.float32).eval()
    assert generate(policy, [prompt], [1], 24, 0, tokenizer, CPU) == [wanted] and len(wanted) < 24
    run = run_of(tokenizer, response_length=24, temperature=0, static_cache=False)
    row, = train_dvpo.rollout(policy, [{"prompt_ids": prompt}], [1], run)
    assert row["response_ids"] == wanted and not row["truncated"]
    assert row["response"] == tokenizer.decode(wanted[:-1], skip_special_tokens=True)
    args = SimpleNamespace(dtype="float32", response_length=24, temperature=0, micro_batch=2, seed=1)
    row, = evaluate.answers_of(folder, [{"prompt_ids": prompt, "prompt": QUESTION}], None, tokenizer, args, CPU)
    assert row["response_ids"] == wanted and not row["truncated"]
    policy.save_pretrained(tmp_path / "export")  # and stays in what is saved
    saved = json.loads((tmp_path / "export/generation_config.json").read_text())
    assert saved["eos_token_id"] == [1, end]


def test_label_and_judge_stop_at_any_end(early_end, tmp_path):
    prompt, end, wanted = early_end
    folder = policy_folder(tmp_path / "policy", [1, end])
    tokenizer = load_tokenizer(folder)
    kept = SimpleNamespace(rows={})
    kept.work = lambda todo, n, do, *_: kept.rows.update((row["key"], row) for row in do(todo))
    args = SimpleNamespace(dtype="float32", response_length=24, micro_batch=2, seed=1)
    label.sample(str(folder), {"p@0": (str(folder), 0, ["q"])}, {"q": {"prompt": QUESTION}}, kept, args, CPU)
    row, = kept.rows.values()
    text = tokenizer.decode(wanted[:-1], skip_special_tokens=True).strip()
    assert row["text"] == text and not row["truncated"]
    policy = load_policy(folder, tokenizer, torch.float32).eval()
    args = SimpleNamespace(response_length=24, seed=1, micro_batch=2)
    question = {"id": 1, "turns": [QUESTION[0]["content"]]}
    (answers, lengths, _), = judge.answers_of(policy, tokenizer, [question], 0, CONTEXT, args, CPU)
    assert answers == [text] and lengths == [len(texts.text_ids(tokenizer, text))]


@pytest.mark.parametrize("eos, ends, template, wanted", [
    ("</s>", [1, len(TURN) - 1], NO_END, ["</s>", "<turn>"]),           # the tokenizer's, the model knows it
    ("<unk>", [len(TURN) - 1], NO_END, ["<turn>"]),                     # the model's, it does not
    ("</s>", [1, len(TURN) - 1], NO_END.replace("m['content'] }}", "m['content'] + ' <turn>' }}"),
     ["<turn>", "</s>"]),                                               # the template's (Gemma)
    ("</s>", 1, TEMPLATE, ["</s>"]), ("</s>", [1, 10**6], TEMPLATE, ["</s>"])])
def test_one_end_is_trained_and_all_of_them_stop(eos, ends, template, wanted, tmp_path):
    policy_folder(tmp_path, ends)
    word_tokenizer(TURN, template, eos_token=eos, additional_special_tokens=["<turn>", "</s>"]
                   ).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.convert_ids_to_tokens(texts.end_ids(tokenizer)) == wanted
    assert answer_ids(tokenizer, "yes .")[-1] == tokenizer.convert_tokens_to_ids(wanted[0])


def test_our_reward_model_reads_its_own_end_whatever_the_answer_ended_with(tmp_path):
    """It was trained on one end alone."""
    policy_folder(tmp_path, [1, len(TURN) - 1])
    tokenizer, seen = load_tokenizer(tmp_path), []
    row = {"prompt": QUESTION, "response": "yes .", "truncated": False,
           "response_ids": answer_ids(tokenizer, "yes .")[:-1] + [len(TURN) - 1]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "reward_scores", lambda model, own, chats, *_: seen.extend(chats) or [0.0])
        rl.model_scores((None, tokenizer, 0.0, 1.0), [row], run_of(tokenizer, micro_batch=1))
    assert seen[0][1] == answer_ids(tokenizer, "yes .")


# ---- control tokens in people's texts -----------------------------------------------------------------------

KINDS = ["bpe", "pieces", "bytes", "unigram", "words"]
CANNOT = {"unigram", "words"}  # the token is a piece of their own vocabulary


@pytest.mark.parametrize("kind", KINDS)
def test_a_control_token_that_is_spelt_out_is_text(kind, tmp_path):
    """In an answer, a question, a system turn, and in tau; where a tokenizer cannot, the text is refused."""
    tokenizer_of(kind).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for token in texts.control_tokens(tokenizer).values():
        spelt = f"it is {token} on the sea"
        clean = [{"role": "system", "content": "it"}, {"role": "user", "content": "is it"}]
        chat = [{"role": "system", "content": spelt}, {"role": "user", "content": spelt}]
        tau = [(spelt, spelt)]
        if kind in CANNOT:
            for refused in (lambda: answer_ids(tokenizer, spelt), lambda: cut_text(tokenizer, spelt, 2),
                            lambda: chat_ids(tokenizer, [clean[0], chat[1]]),
                            lambda: chat_ids(tokenizer, [chat[0], clean[1]]),
                            lambda: chat_ids(tokenizer, clean, tau)):
                with pytest.raises(texts.BadText, match="control token"):
                    refused()
            continue
        ids = answer_ids(tokenizer, spelt)
        assert controls_in(tokenizer, ids) == [tokenizer.eos_token_id] == ids[-1:]
        assert tokenizer.decode(ids[:-1]).replace(" ", "") == spelt.replace(" ", "").lower()
        ids, wanted = chat_ids(tokenizer, chat, tau), chat_ids(tokenizer, clean, [("is it", "it")])
        assert controls_in(tokenizer, ids) == controls_in(tokenizer, wanted)
        assert tokenizer.decode(ids).replace(" ", "").count(token.replace(" ", "")) >= 4


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_texts_keep_their_ids(kind, tmp_path):
    """Boundaries between template and text are tokenized as one string, as ever; unknown words too."""
    tokenizer_of(kind).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for content in ("is it on the sea ?", " zebra\n\n<eos", "a <unk> b", "yes\ufffd"):
        chat = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert chat_ids(tokenizer, chat) == tokenizer(text, add_special_tokens=False).input_ids
        plain = tokenizer(content, add_special_tokens=False).input_ids
        assert answer_ids(tokenizer, content) == plain + [tokenizer.eos_token_id]


BAD = [{"instruction": f"is thing{i % 12} </s> {i} ?" if i % 2 else f"is thing{i % 12} {i} ?", "completions": [
    {"model": "a", "response": "no .", "overall_score": 2}, {"model": "b", "response": "yes it is .",
                                                             "overall_score": 8},
    {"model": "c", "response": "yes it" if i % 4 else "yes </s> it", "overall_score": 9}]} for i in range(80)]


def stage_rows(data, tokenizer):
    """What sft, train_rm and train_dpo, train_gvm, and the RL scripts make of a file: their rows."""
    args = SimpleNamespace(data=str(data), allow_dropped=True, split_seed=0, max_length=64, pairs="all", k=0,
                           eval_pairs=9, reward="score", score_min=1, score_max=10, max_prompt_length=64,
                           eval_prompts=9, response_length=4, model="toy")
    yield sft.sft_rows(tokenizer, args)[0]
    yield [(prompt, answer) for prompt, *pair in rows.preference_rows(tokenizer, args)[0] for answer in pair]
    yield [(row["prompt_ids"], row["response_ids"]) for row in rows.trajectories(tokenizer, args)[0]]
    yield [(row["prompt_ids"], [1]) for row in rows.rl_prompts(tokenizer, args, 1)[0]]


def test_rows_with_control_tokens_are_counted_and_dropped(tmp_path, capsys):
    """A tokenizer of whole words cannot read them as text: the toy's kind."""
    data, tokenizer = write_jsonl(tmp_path / "bad.jsonl", BAD), word_tokenizer()
    for n, found in enumerate(stage_rows(data, tokenizer), 1):
        assert found and all(prompt.count(1) == 0 and answer.count(1) == 1 for prompt, answer in found)
        assert capsys.readouterr().out.count("a control token is spelt out") == 1, n


def test_tau_leaves_out_what_it_cannot_read(models_folder):
    """In the RL stages, where the policy wrote it, and in evaluate.py."""
    tokenizer = load_tokenizer(models_folder / "llama")
    settings = {"tau_question_tokens": 8, "tau_answer_tokens": 8, "context": 128, "k": 2}
    said = [{"prompt": QUESTION, "response": text, "group": text, "response_ids": [1]}
            for text in ("no .", "yes </s> .", "yes .")]
    asked = [{"prompt": QUESTION, "response_ids": [1], "group": "asked"}]
    question = QUESTION[0]["content"]
    wanted = [(question, "no ."), (question, "yes .")]
    assert rl.fit_tau(said, asked, settings, run_of(tokenizer)) == wanted
    gvm = SimpleNamespace(tokenizer=tokenizer, settings=settings)
    _, tau = evaluate.under_tau(gvm, {"p": said}, "p", asked, evaluate.keyed_rng(0))
    assert sorted(tau) == wanted


# ---- decoding -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["words", "pieces", "unigram"])
def test_decoding_does_not_tidy_spaces(kind, tmp_path):
    """Of no tokenizer, in none of its two ways: transformers' own, and that of WordPiece."""
    tokenizer_of(kind, clean_up_tokenization_spaces=True).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer("yes it is on the sea coast . is it ?", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "yes it is on the sea coast . is it ?"
    assert texts.answer_text(tokenizer, [*ids, tokenizer.eos_token_id]) == tokenizer.decode(ids)
    assert cut_text(tokenizer, "the sea coast . is it ?", 4).endswith("coast ." if kind != "unigram" else "")


# ---- templates that cannot be used --------------------------------------------------------------------------

@pytest.mark.parametrize("template, said", [
    (NO_PROMPT, "ignores add_generation_prompt"),
    (TEMPLATE.split("{% if add_generation_prompt")[0], "ignores add_generation_prompt"),
    ("{% for m in messages %}{% if m['role'] == 'assistant' %}{{ messages[0]['content'] + ' : ' + m['content'] "
     "+ eos_token }}{% endif %}{% endfor %}", "leaves out the text of a lone user turn"),
    ("{% for m in messages %}{{ m['role'] }}{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}"
     "{% endfor %}{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}", "leaves out the text of a turn"),
    (TEMPLATE + "{% if messages | length == 1 %}{{ raise_exception('say more') }}{% endif %}", "say more")])
def test_a_template_without_a_prompt_is_refused(template, said, tmp_path):
    word_tokenizer(template=template).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=said) as error:
        load_tokenizer(tmp_path, "--base_model")
    assert str(error.value).startswith(f"--base_model {tmp_path}: ") and "\n" not in str(error.value)


THINKS = ("{% for m in messages %}{{ m['role'] + ' : ' }}{% if m['role'] == 'assistant' and loop.last %}"
          "{{ '<think></think> ' }}{% endif %}{{ m['content'] + eos_token }}{% endfor %}"
          "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}")
INST = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]'"
        " }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}")


@pytest.mark.parametrize("template", [THINKS, INST, CHATML, HEADERS, None, TEMPLATE,
                                      THINKS.replace("'assistant : '", "'assistant : <think>'")])
def test_templates_of_the_known_families_are_taken(template, tmp_path):
    """Qwen 3, Llama 2 (no add_generation_prompt, and none is needed), ChatML, Llama 3, DeepSeek-R1."""
    tokenizer_of("bpe", template).save_pretrained(tmp_path)
    ids = chat_ids(load_tokenizer(tmp_path), QUESTION)
    assert "is it on the sea ?" in load_tokenizer(tmp_path).decode(ids)


def test_tau_needs_a_template_with_earlier_turns(tmp_path, flags):
    """Of several turns it shows the last one: K would be read as 0 without a word."""
    tiny_llama().save_pretrained(tmp_path)
    template = TEMPLATE.replace("for m in messages", "for m in messages[-2:] if not loop.first or m['role'] != "
                                "'assistant'")
    word_tokenizer(template=template.replace("messages[-2:]", "(messages[-1:] if add_generation_prompt else "
                                             "messages)").split(" if not loop")[0]
                   + template.split("'assistant'", 1)[1]).save_pretrained(tmp_path)
    load_tokenizer(tmp_path)
    args = train_gvm.Args(sft_model=str(tmp_path), ds_config=flags.gvm["ds_config"], max_length=64, k=2)
    with pytest.raises(BadInput, match="--k 2: .* does not render earlier turns"):
        inputs.gvm_stage_inputs(args, 1)
    inputs.gvm_stage_inputs(train_gvm.Args(**{**vars(args), "k": 0}), 1)


# ---- a row that the template fails on -----------------------------------------------------------------------

@pytest.mark.parametrize("template, reason", [
    (NO_SYSTEM, "no system role here"),
    (TEMPLATE.replace("m['role'] + ' : '", "{'user': 'user : ', 'assistant': 'assistant : '}[m['role']]"),
     "system"),  # undefined, then not even a jinja error
    (TEMPLATE + "{% if messages[0]['content'] == 'yes' %}{{ 1 + messages[0]['content'] }}{% endif %}", "int")])
def test_a_row_that_the_template_fails_on_is_counted_and_dropped(template, reason, tmp_path, capsys):
    word_tokenizer(template=template).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    system, plain = [{"role": "system", "content": "yes"}], []
    data = write_jsonl(tmp_path / "data.jsonl", [{
        **{name: [*(plain if i % 3 else system), {"role": "user", "content": f"is thing{i % 12} {i} ?"},
                  {"role": "assistant", "content": text}] for name, text in (("chosen", "yes ."),
                                                                             ("rejected", "no ."))},
        "score_chosen": 9, "score_rejected": 2} for i in range(80)])
    for found in stage_rows(data, tokenizer):
        assert found
        out = capsys.readouterr().out
        assert out.count("the chat template fails on it") == 1 and reason in out


def test_a_question_that_the_template_fails_on(tmp_path, capsys, monkeypatch):
    """A tool's question is named in one sentence; prompts of --data, of a judge or of label.py are counted."""
    folder = tmp_path / "policy"
    tiny_llama().save_pretrained(folder)
    word_tokenizer(template=TEMPLATE + "{% if 'zebra' in messages[-1]['content'] %}{{ raise_exception('shy') }}"
                   "{% endif %}").save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    questions = write_jsonl(tmp_path / "q.jsonl", [{"instruction": "is it red ?"}, {"instruction": "a zebra ?"}])
    words = dict(policy=str(folder), response_length=2, dtype="float32", out=str(tmp_path / "out.json"))
    with pytest.raises(BadInput, match="'a zebra .*shy"):
        judge.generate_answers(judge.Args(questions=questions, **words), CPU)
    data = write_jsonl(tmp_path / "d.jsonl", [{"instruction": f"is it {'zebra' if i % 2 else 'red'} {i} ?",
                                               "output": "yes ."} for i in range(60)])
    for path in tmp_path.glob("out*"):
        path.unlink()
    judge.generate_answers(judge.Args(data=data, **words), CPU)
    assert "prompts cannot become token ids: left out" in capsys.readouterr().out
    assert not any("zebra" in line for line in (tmp_path / "out.json").read_text().splitlines())
    args = evaluate.Args(policies=[f"one={folder}"], data=data, response_length=2, dtype="float32", prompts=4)
    assert evaluate.evaluate_policy(args, CPU)["prompts"] > 0
    assert "cannot become token ids" in capsys.readouterr().out
    records = label.read_data(data, needs="prompts")
    args = SimpleNamespace(shares=label.SHARES, split_seed=0, max_prompt_length=64, allow_dropped=True, seed=1,
                           prompts=99, data=data)
    found = label.prompts_of(records, [load_tokenizer(folder)], args)
    assert len(found) == 30 and not any("zebra" in text for text in found)
    local = SimpleNamespace(judge_model=str(folder), dtype="float32", judge_tokens=2, micro_batch=2)
    left = judge.ask_local({i: [{"content": text}, {"content": "?"}] for i, text in enumerate(("a zebra", "it"))},
                           local, lambda *_: None)
    assert list(left.values()) == [1]


# ---- the date -----------------------------------------------------------------------------------------------

DATED = "{{ 'today ' + strftime_now('%d') + ' ' }}" + TEMPLATE
DAYS = [str(day) for day in range(10, 29)]


@pytest.fixture
def clock(monkeypatch):
    """Days that pass: clock(day) sets what a template and we are told."""
    def at(day):
        class Day(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2031, 5, day, 12)
        monkeypatch.setattr(chat_template_utils, "datetime", Day)
        monkeypatch.setattr(texts, "datetime", Day, raising=False)
    yield at
    getattr(texts, "RUN", {}).clear()


def dated_model(folder, template=DATED):
    tokenizer = word_tokenizer([*WORDS, "today", *DAYS], template)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=1,
        **{k: v for k, v in SIZES.items() if k != "num_labels"})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_run_goes_on_the_next_day(flags, data, tmp_path, clock, monkeypatch):
    """With the date of its start in its prompts; a new run has its own."""
    words = {**flags.sft, "model": dated_model(tmp_path / "model"), "output_dir": tmp_path / "sft",
             "save_every": 1, "max_steps": 3}
    seen = []
    monkeypatch.setattr(sft, "sft_rows", lambda *args, make=sft.sft_rows: seen.append(make(*args)) or seen[-1])
    with monkeypatch.context() as patch:
        patch.setattr(sft, "save_model", lambda *args, **more: 1 / 0)
        clock(11)
        with pytest.raises(ZeroDivisionError):
            run_stage(sft, **words)
    clock(12)
    run_stage(sft, **words, resume=True)
    run_stage(sft, **{**words, "output_dir": tmp_path / "other"})
    day = [len(WORDS) + 1 + DAYS.index(d) for d in ("11", "11", "12")]
    assert [train[0][0][1] for train, _ in seen] == day
    assert json.loads((tmp_path / "sft/args.json").read_text())["date"].startswith("2031-05-11")


def test_policy_and_gvm_see_one_date(flags, tmp_path, clock):
    """That of the GVM's training, days later, in DVPO and in evaluate.py."""
    model = dated_model(tmp_path / "model")
    clock(11)
    run_stage(train_gvm, **{**flags.gvm, "max_steps": 1}, sft_model=model, output_dir=tmp_path / "gvm")
    clock(15)
    texts.RUN.clear()
    tokenizer, eleven = load_tokenizer(model), len(WORDS) + 1 + DAYS.index("11")
    args = SimpleNamespace(value_fn="", value_model=str(tmp_path / "gvm"), model="toy", max_prompt_length=64,
                           response_length=8)
    inputs.gvm_inputs(args, str(model), tokenizer)
    assert chat_ids(tokenizer, QUESTION)[1] == eleven
    args = SimpleNamespace(model="toy", value_model=str(tmp_path / "gvm"), split_seed=0, dtype="float32",
                           micro_batch=2)
    assert chat_ids(evaluate.open_gvm(args, CPU).tokenizer, QUESTION)[1] == eleven
    assert chat_ids(load_tokenizer(model), QUESTION)[1] == len(WORDS) + 1 + DAYS.index("15")


@pytest.mark.parametrize("template, wanted", [
    ("{% macro day() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ day() }}", "2031-05-11"),
    ("{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}{% endif %}{{ d }}", "11 May 2031"),
    ("{{ strftime_now('%A, %-d %B, 100%%') }}", "Sunday, 11 May, 100%")])
def test_every_way_of_asking_for_the_date_is_frozen(template, wanted, clock):
    """gpt-oss and Mistral, Llama 3, Granite."""
    clock(11)
    texts.RUN["date"] = "2031-05-11T12:00:00"
    clock(12)
    tokenizer = word_tokenizer(template=template + TEMPLATE)
    assert texts.render(tokenizer, QUESTION, True).startswith(wanted)


@pytest.mark.parametrize("date", ["someday", 5])
def test_a_date_that_is_none_is_one_sentence(date, flags, chain, tmp_path):
    import shutil
    shutil.copytree(chain.gvm, tmp_path / "gvm")
    path = tmp_path / "gvm/gvm.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "date": date}))
    with pytest.raises(BadInput, match="not a folder that train_gvm.py wrote"):
        inputs.gvm_settings(tmp_path / "gvm")


# ---- tau of the held-out prompts ----------------------------------------------------------------------------

def test_held_out_values_are_read_under_the_whole_tau(chain, models_folder, monkeypatch):
    """Not under one that was shortened for a long row of the training batch."""
    tokenizer = load_tokenizer(models_folder / "llama")
    tau = [{"prompt": QUESTION, "response": text} for text in ("no .", "yes .")]
    row = {"prompt": QUESTION, "prompt_ids": chat_ids(tokenizer, QUESTION), "response": "yes .",
           "response_ids": answer_ids(tokenizer, "yes ."), "group": "g", "truncated": False}
    pairs = [(QUESTION[0]["content"], text) for text in ("no .", "yes .")]
    context = len(chat_ids(tokenizer, QUESTION, pairs)) + 4
    settings = {"tau_question_tokens": 8, "tau_answer_tokens": 8, "context": context}
    run, seen = run_of(tokenizer, seed=1), []
    long = {**row, "response_ids": [5] * 12 + [1]}
    assert len(rl.fit_tau(tau, [long], settings, run)) < 2
    monkeypatch.setattr(train_dvpo, "rollout", lambda *args: [row])
    monkeypatch.setattr(train_dvpo, "held_out_metrics", lambda *args, **more: {})
    scored = SimpleNamespace(batch=None, logp=0, ref_logp=0)
    monkeypatch.setattr(train_dvpo, "score", lambda models, rows, tau, run: seen.append(tau) or scored)
    monkeypatch.setattr(train_dvpo, "last_values", lambda scored: torch.zeros(1))
    train_dvpo.held_out(SimpleNamespace(policy=None), None, [row], tau, settings, run)
    assert seen == [pairs]
