"""Other people's chat templates: which are taken, what they do to texts that spell out control tokens, the
rows they fail on, and the date in them."""

import json
import shutil
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import chat_template_utils

import evaluate
import judge
import label
import sft
import train_dvpo
import train_gvm
from common import answer_ids, chat_ids, cut_text, load_tokenizer
from conftest import CONTEXT, TEMPLATE, WORDS, run_of, run_stage, tiny_llama, word_tokenizer, write_jsonl
from foreign import (CHATML, controls_in, CPU, HEADERS, NO_PROMPT, NO_SYSTEM, QUESTION, SIZES, tokenizer_of)
from plumbing import inputs, rl, rows, texts
from plumbing.errors import BadInput


# ---- control tokens in people's texts ----------------------------------------------------------------------

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


BAD = [{"instruction": f"is thing{i % 12} {'</s> ' * (i % 2)}{i} ?", "completions": [
    {"model": "a", "response": "no .", "overall_score": 2},
    {"model": "b", "response": "yes it is .", "overall_score": 8},
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
    _, tau = evaluate.under_tau(gvm, {"p": said}, "p", asked, evaluate.keyed_rng("tau"))
    assert sorted(tau) == wanted


# ---- templates that cannot be used -------------------------------------------------------------------------

@pytest.mark.parametrize("template, said", [
    (NO_PROMPT, "ignores add_generation_prompt"),
    (TEMPLATE.split("{% if add_generation_prompt")[0], "ignores add_generation_prompt"),
    ("{% for m in messages %}{% if m['role'] == 'assistant' %}{{ messages[0]['content'] + ' : ' "
     "+ m['content'] + eos_token }}{% endif %}{% endfor %}", "leaves out the text of a lone user turn"),
    ("{% for m in messages %}{{ m['role'] }}{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}"
     "{% endfor %}{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}",
     "leaves out the text of a turn"),
    (TEMPLATE + "{% if messages | length == 1 %}{{ raise_exception('say more') }}{% endif %}", "say more")])
def test_a_template_without_a_prompt_is_refused(template, said, tmp_path):
    word_tokenizer(template=template).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=said) as error:
        load_tokenizer(tmp_path, "--base_model")
    assert str(error.value).startswith(f"--base_model {tmp_path}: ") and "\n" not in str(error.value)


THINKS = ("{% for m in messages %}{{ m['role'] + ' : ' }}{% if m['role'] == 'assistant' and loop.last %}"
          "{{ '<think></think> ' }}{% endif %}{{ m['content'] + eos_token }}{% endfor %}"
          "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}")
INST = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + "
        "' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}")


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
    last = "for m in (messages[-1:] if add_generation_prompt else messages)"
    word_tokenizer(template=TEMPLATE.replace("for m in messages", last)).save_pretrained(tmp_path)
    load_tokenizer(tmp_path)
    args = train_gvm.Args(sft_model=str(tmp_path), ds_config=flags.gvm["ds_config"], max_length=64, k=2)
    with pytest.raises(BadInput, match="--k 2: .* does not render earlier turns"):
        inputs.gvm_stage_inputs(args, 1)
    inputs.gvm_stage_inputs(train_gvm.Args(**{**vars(args), "k": 0}), 1)


# ---- a row that the template fails on ----------------------------------------------------------------------

@pytest.mark.parametrize("template, reason", [
    (NO_SYSTEM, "no system role here"),
    (TEMPLATE.replace("m['role'] + ' : '", "{'user': 'user : ', 'assistant': 'assistant : '}[m['role']]"),
     "system"),  # undefined, then not even a jinja error
    (TEMPLATE + "{% if messages[0]['role'] == 'system' %}{{ 1 + messages[0]['role'] }}{% endif %}", "int")])
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
    """A tool's question is named in one sentence; prompts of --data, of a judge, of label.py are counted."""
    folder = tmp_path / "policy"
    tiny_llama().save_pretrained(folder)
    shy = "{% if 'zebra' in messages[-1]['content'] %}{{ raise_exception('shy') }}{% endif %}"
    word_tokenizer(template=TEMPLATE + shy).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    asked = ("is it red ?", "a zebra ?")
    questions = write_jsonl(tmp_path / "q.jsonl", [{"instruction": text} for text in asked])
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
    args = SimpleNamespace(shares=label.SHARES, split_seed=0, max_prompt_length=64, allow_dropped=True,
                           seed=1, prompts=99, data=data)
    found = label.prompts_of(records, [(load_tokenizer(folder), "")], args)
    assert len(found) == 30 and not any("zebra" in text for text in found)
    local = SimpleNamespace(judge_model=str(folder), dtype="float32", judge_tokens=2, micro_batch=2)
    todo = {text: [{"content": "judge"}, {"content": text}] for text in asked}
    left = judge.ask_local(todo, local, lambda *_: None)
    assert list(left.values()) == [1]


# ---- the date ----------------------------------------------------------------------------------------------

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
    make = sft.sft_rows
    monkeypatch.setattr(sft, "sft_rows", lambda *args: seen.append(make(*args)) or seen[-1])
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
    ("{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}{% endif %}{{ d }}",
     "11 May 2031"),
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
    shutil.copytree(chain.gvm, tmp_path / "gvm")
    path = tmp_path / "gvm/gvm.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "date": date}))
    with pytest.raises(BadInput, match="not a folder that train_gvm.py wrote"):
        inputs.gvm_settings(tmp_path / "gvm")


# ---- tau of the held-out prompts ---------------------------------------------------------------------------

def test_held_out_values_are_read_under_the_whole_tau(flags, chain, tmp_path, monkeypatch):
    """tau is fitted to the held-out rows anew, not what a long row of the training batch left of it."""
    fitted, batches = [], []
    score, fit = train_dvpo.score, train_dvpo.fit_tau

    def shorten(tau, rows, settings, run):
        fitted.append(fit(tau, rows, settings, run))
        return fitted[-1] if len(fitted) % 2 == 0 else []  # the training batch comes first
    monkeypatch.setattr(train_dvpo, "fit_tau", shorten)
    monkeypatch.setattr(train_dvpo, "score", lambda *args: batches.append(args[2]) or score(*args))
    run_stage(train_dvpo, **{**flags.dvpo, "max_steps": 2}, sft_model=chain.sft, value_model=chain.gvm,
              output_dir=tmp_path, eval_every=1, eval_prompts=4)
    assert len(batches) == 4 and batches[::2] == [[], []]
    assert batches[1::2] == fitted[::2] and len(batches[1]) == 2
