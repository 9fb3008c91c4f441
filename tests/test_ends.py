"""Where answers end in other people's models, and that their text is what was sampled."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import evaluate
import judge
import label
import train_dvpo
from common import answer_ids, chat_ids, cut_text, generate, load_policy, load_tokenizer
from conftest import CONTEXT, TEMPLATE, WORDS, run_of, word_tokenizer
from foreign import CPU, QUESTION, SIZES, tokenizer_of
from plumbing import rl, texts
from plumbing.policies import Policy


# ---- the ends of answers -----------------------------------------------------------------------------------

NO_END = ("{{ bos_token }}{% for m in messages %}{{ ' <turn> ' + m['role'] + ' : ' + m['content'] }}"
          "{% endfor %}{% if add_generation_prompt %}{{ ' <turn> assistant :' }}{% endif %}")
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
        out = model.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False,
                             eos_token_id=ends, pad_token_id=1)
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
    asked = [{"prompt_ids": prompt, "prompt": QUESTION}]
    row, = evaluate.answers_of(folder, asked, None, tokenizer, args, CPU)
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
    policies = {"p@0": Policy(str(folder), "", 0)}
    label.sample(str(folder), policies, {"p@0": ["q"]}, {"q": {"prompt": QUESTION}}, kept, args, CPU)
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


# ---- decoding ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["words", "pieces", "unigram"])
def test_decoding_does_not_tidy_spaces(kind, tmp_path):
    """Of no tokenizer, in none of its two ways: transformers' own, and that of WordPiece."""
    tokenizer_of(kind, clean_up_tokenization_spaces=True).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer("yes it is on the sea coast . is it ?", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "yes it is on the sea coast . is it ?"
    assert texts.answer_text(tokenizer, [*ids, tokenizer.eos_token_id]) == tokenizer.decode(ids)
    assert cut_text(tokenizer, "the sea coast . is it ?", 4).endswith("coast ." if kind != "unigram" else "")
