"""evaluate.py: statistics by hand-made numbers, values against a loop, every command from its arguments."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import evaluate
from common import DEFAULT_CHAT_TEMPLATE, load_value_base
from plumbing.checks import tokenizer_fingerprint
from plumbing.data import split_of
from plumbing import page as pages
from plumbing.errors import BadInput
from plumbing.table import print_table
from toy import bayes, reference, world

WORDS = "<pad> <unk> <bos> <eos> User: Assistant: System: what is ? yes no it really not".split()
NUMBERS = [f"n{i}" for i in range(200)]
SETTINGS = {"tau_question_tokens": 8, "tau_answer_tokens": 8, "max_length": 40, "context": 128,
            "split_seed": 0, "reward": {"kind": "score", "center": 5.5, "scale": 4.5}}


# ---- a tiny model, data and GVM ----------------------------------------------------------------------------

def word_tokenizer():
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS + NUMBERS)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>",
                                        bos_token="<bos>", eos_token="<eos>",
                                        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE.replace("bos_token }}", "bos_token + ' ' }}").replace(
        "+ eos_token", "+ ' ' + eos_token")
    return tokenizer


def write_model(folder, tokenizer, seed):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=128)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_gvm(folder, base, tokenizer, **settings):
    torch.manual_seed(7)
    model = load_value_base(str(base), torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="TOKEN_CLS", r=2, target_modules=["q_proj"],
                                             modules_to_save=["score"]))
    torch.nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight, std=1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gvm = {**SETTINGS, "base_model": str(base), "chat_template": tokenizer.chat_template,
           "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer), **settings}
    (folder / "gvm.json").write_text(json.dumps(gvm))


@pytest.fixture(scope="module")
def world_dir(tmp_path_factory):
    """Two policies, a GVM that is told the policy (K = 2) and one that is not, named data and plain pairs."""
    path, tokenizer = tmp_path_factory.mktemp("evaluate"), word_tokenizer()
    for name, seed in (("sft", 0), ("other", 1)):
        write_model(path / name, tokenizer, seed)
    write_gvm(path / "gvm2", path / "sft", tokenizer, k=2)
    write_gvm(path / "gvm0", path / "sft", tokenizer, k=0, reward={"kind": "preference"})
    questions = [f"what is {number} ?" for number in NUMBERS]
    both = list(zip(questions, NUMBERS))
    named = [{"instruction": q, "completions": [
        {"model": "good", "response": f"yes {n}", "overall_score": 9},
        {"model": "bad", "response": f"no {n} it is", "overall_score": 2}]} for q, n in both]
    pairs = [{"prompt": q, "chosen": f"yes {n}", "rejected": f"no {n} it is"} for q, n in both]
    for name, rows in (("named", named), ("pairs", pairs)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(command, world_dir, *flags):
    """evaluate.main with the tiny model; returns what --json wrote."""
    out = world_dir / "result.json"
    evaluate.main([command, "--model", "none", "--json", str(out), *map(str, flags)])
    return json.loads(out.read_text())


def on(world_dir, gvm="gvm2", data="named"):
    return ["--value_model", world_dir / gvm, "--data", world_dir / f"{data}.jsonl", "--dtype", "float32"]


def opened(world_dir, micro_batch=3, folder="gvm2"):
    args = evaluate.Args(value_model=str(world_dir / folder), dtype="float32", micro_batch=micro_batch)
    return evaluate.open_gvm(args, torch.device("cpu"))


# ---- statistics --------------------------------------------------------------------------------------------

def test_ties_count_half():
    assert evaluate.hits([1, 0, 3], [0, 1, 3]).tolist() == [1, 0, 0.5]


def test_interval_resamples_groups_not_pairs():
    hit = np.array([1.0] * 50 + [0.0] * 50)
    assert evaluate.accuracy(hit, ["a"] * 50 + ["b"] * 50) == {"accuracy": 0.5, "low": 0.0, "high": 1.0}
    alone = evaluate.accuracy(hit, range(100))
    assert 0.38 < alone["low"] < 0.44 and 0.56 < alone["high"] < 0.62


def test_calibration_bins():
    found = evaluate.calibration([0.3, 0.1, 0.2, 0.4], [1.0, -1.0, 0.0, 0.0], bins=2)
    assert [b["n"] for b in found["bins"]] == [2, 2]
    assert np.allclose([(b["predicted"], b["actual"]) for b in found["bins"]], [(0.15, -0.5), (0.35, 0.5)])
    assert np.isclose(found["rmse"], np.sqrt(np.mean(np.square([-0.7, 1.1, 0.2, 0.4]))))
    assert len(evaluate.calibration([0.0, 1.0], [0.0, 1.0])["bins"]) == 2  # never an empty bin


def test_win_tie_lose_is_antisymmetric():
    a, b = ([{"scores": {"s": s}, "kl": 1.0, "response_ids": [1], "truncated": False} for s in scores]
            for scores in ([1.0, 2.0, 3.0, 3.0], [0.0, 2.0 + 1e-9, 4.0, 1.0]))
    ours, theirs = (evaluate.policy_report(*sides)["against_first"]["s"] for sides in ((a, b), (b, a)))
    assert ours == {"win": 0.5, "tie": 0.25, "lose": 0.25}
    assert (ours["win"], ours["tie"], ours["lose"]) == (theirs["lose"], theirs["tie"], theirs["win"])
    spread = np.std([1, 2, 3, 3], ddof=1)
    assert evaluate.policy_report(a, a)["scores"]["s"] == {"mean": 2.25, "stderr": spread / 2}


# ---- values and tau ----------------------------------------------------------------------------------------

def test_token_values_against_one_row_at_a_time(world_dir):
    gvm = opened(world_dir)
    lengths = ((5, 1), (2, 6), (9, 3), (3, 3))
    jobs = [(list(range(4, 4 + p)), list(range(20, 20 + r)) + [3]) for p, r in lengths]
    for (prompt, response), values in zip(jobs, evaluate.token_values(gvm, jobs)):
        alone = gvm.model(input_ids=torch.tensor([prompt + response])).logits[0, :, 0]
        # slot 0: the last prompt token
        assert np.allclose(values, alone[len(prompt) - 1:].detach(), atol=1e-5)


def test_tau_is_of_other_groups_and_loses_its_first_pair_first(world_dir):
    gvm = opened(world_dir)
    rows = [{"prompt": [{"role": "user", "content": f"what is {n} ?"}], "group": n, "policy": "p",
             "response": f"yes {n}", "response_ids": [10, 3]} for n in ("n0", "n1", "n2")]
    for seed in range(5):
        jobs, tau = evaluate.under_tau(gvm, {"p": rows}, "p", [rows[1]], np.random.default_rng(seed))
        assert sorted(tau) == [("what is n0 ?", "yes n0"), ("what is n2 ?", "yes n2")]
    small = gvm._replace(settings={**gvm.settings, "context": len(jobs[0][0]) + 1})
    shorter, kept = evaluate.under_tau(small, {"p": rows}, "p", [rows[1]], np.random.default_rng(seed))
    ids = evaluate.chat_ids(gvm.tokenizer, rows[1]["prompt"], tau[1:])
    assert kept == tau[1:] and shorter == [(ids, [10, 3])]
    with pytest.raises(BadInput, match="context"):
        tiny = gvm._replace(settings={**gvm.settings, "context": 3})
        evaluate.under_tau(tiny, {"p": rows}, "p", [rows[1]], np.random.default_rng(seed))


def ranked(world_dir, monkeypatch, values_of):
    """rank_pairs with a GVM whose token values are values_of(prompt ids, response ids)."""
    gvm = opened(world_dir)
    monkeypatch.setattr(evaluate, "token_values", lambda gvm, jobs: [values_of(*job) for job in jobs])
    _, pairs, pool, _ = evaluate.read_held_out(world_dir / "named.jsonl", gvm, evaluate.Args())
    return evaluate.rank_pairs(gvm, pairs, pool, seed=0)


def test_statistics_of_a_response(world_dir, monkeypatch):
    """Values 0 .. 100 against ones that are higher below the 50th percentile and lower above it."""
    found = ranked(world_dir, monkeypatch, lambda prompt, response: np.concatenate(
        [[999.0], np.arange(101) * (1.0 if WORDS.index("yes") in response else 0.8) + (
            0.0 if WORDS.index("yes") in response else 9.0)]))["shared_tau"]
    assert {name: a["accuracy"] for name, a in found.items()} == {
        "mean": 1, "P1": 0, "P5": 0, "P10": 0, "P90": 1, "P95": 1, "P99": 1}


def test_recognizing_the_policy_is_worth_nothing_under_one_tau(world_dir, monkeypatch):
    """A model that reads only tau: own taus look perfect, one shared tau shows that it cannot rank."""
    yes = WORDS.index("yes")
    found = ranked(world_dir, monkeypatch,
                   lambda prompt, response: np.full(1 + len(response), float(yes in prompt)))
    assert {a["accuracy"] for a in found["shared_tau"].values()} == {0.5}
    assert {a["accuracy"] for a in found["own_tau"].values()} == {1.0}
    assert found["baselines"]["policy mean"]["accuracy"] == 1.0
    assert [found["baselines"][b]["accuracy"] for b in ("longer answer", "tau only")] == [0.0, 0.0]
    assert found["mean_value"] == {"good": 0.5, "bad": 0.5}


def test_log_probs_against_one_row_at_a_time(world_dir):
    tokenizer = evaluate.load_tokenizer(str(world_dir / "sft"))
    policy = evaluate.load_policy(str(world_dir / "sft"), tokenizer, torch.float32).eval()
    rows = [{"prompt_ids": [2, 7, 8], "response_ids": [10, 30, 3]},
            {"prompt_ids": [2, 7, 8, 40, 9], "response_ids": [3]}]
    args = evaluate.Args(micro_batch=2, temperature=0.7)
    for row, found in zip(rows, evaluate.sequence_logprobs(policy, rows, tokenizer, args, "cpu")):
        ids, start = row["prompt_ids"] + row["response_ids"], len(row["prompt_ids"])
        logp = torch.log_softmax(policy(input_ids=torch.tensor([ids])).logits[0].detach() / 0.7, -1)
        assert np.isclose(found, sum(float(logp[t - 1, ids[t]]) for t in range(start, len(ids))), atol=1e-4)


# ---- the toy's reference -----------------------------------------------------------------------------------

def toy_row(policy, question, response, tau=()):
    prompt = [{"role": "user", "content": question}]
    return {"prompt": prompt, "policy": policy.name, "response": response, "tau": tau}


def test_toy_reference_is_exact_and_bayes_and_knows_where_it_is_decided():
    policy, question = world.TRAINING[3], world.PROMPTS[5]
    response = world.answer_text(question, world.Parsed(0, True, 1))
    tokens, rng = world.response_tokens(response), np.random.default_rng(0)
    tau = world.draw_tau(policy, question, 2, rng)
    found, = reference.values([toy_row(policy, question, response, tau)])
    assert found["exact"] == world.scripted_q(policy, question, tokens)
    assert found["bayes"] == bayes.bayes_q(tau, question, tokens)
    place = tokens.index("is")
    assert found["decided"] == [False] * (place + 2) + [True] * (len(tokens) - place - 1)
    assert abs(found["exact"][place + 2] - found["exact"][place + 1]) > 0.05  # the value jumps there


def test_toy_reference_reads_cut_questions_and_refuses_strangers():
    whole = max(world.PROMPTS, key=lambda prompt: len(prompt.split()))
    cut = " ".join(whole.split()[:-1])
    assert world.fact_of(reference.whole_question(cut)) == world.fact_of(whole)
    with pytest.raises(BadInput, match="tau_question_tokens"):
        reference.whole_question("is")
    with pytest.raises(BadInput, match="not an answer of the toy world"):
        reference.values([toy_row(world.TRAINING[0], world.PROMPTS[0], "hello")])


def test_comparison_with_the_reference(monkeypatch):
    """A GVM that is exact but for 0.5 on one policy's decided tokens: its error, halved in the square."""
    question = world.PROMPTS[0]
    answer = world.answer_text(question, world.Parsed(0, True, 0))
    rows = [{**toy_row(p, question, answer), "group": "g", "response_ids": world.response_tokens(answer)}
            for p, n in zip(world.TRAINING, (4, 2)) for _ in range(n)]  # yet every policy weighs the same

    def off_by_half(gvm, rows, pool, seed):
        known = reference.values([{**row, "tau": []} for row in rows])
        first = world.TRAINING[0].name
        return [np.array(k["exact"]) + 0.5 * np.array(k["decided"]) * (row["policy"] == first)
                for row, k in zip(rows, known)], [[]] * len(rows)

    monkeypatch.setattr(evaluate, "values_under_own_tau", off_by_half)
    gvm = SimpleNamespace(settings={"critic": False})
    found = evaluate.compare_with_reference(gvm, rows, {}, reference.values, evaluate.Args(reference_rows=6))
    assert found["rows"] == 6
    assert found["before"]["gvm_exact"] == 0 and np.isclose(found["decided"]["gvm_exact"], 0.5 / np.sqrt(2))
    assert np.isclose(found["before"]["gvm_bayes"], found["before"]["bayes_exact"])
    assert np.isclose(found["policies"][world.TRAINING[0].name]["decided"]["gvm_exact"], 0.5)


# ---- the page and the terminal -----------------------------------------------------------------------------

NASTY = {"question": "a < b & \"c\" {x}", "k": 0, "tau_policy": None, "responses": [
    {"label": "<b>", "text": "", "tokens": ["<script>", " alert('1')", "\n", "\x1b[31m"],
     "values": [0.0, -1.0, 0.5, 1.0, 0.2], "mean": 0.175, "last": 0.2}]}


def test_page_escapes_every_text_and_shows_every_number():
    page = pages.page(NASTY, -1.0, 1.0)
    assert "<script>" not in page and "&lt;script&gt;" in page and "alert(&#x27;1&#x27;)" in page
    assert "a &lt; b &amp; &quot;c&quot; {x}" in page and "<h2>&lt;b&gt;:" in page
    assert all(f"<small>{value:+.2f}</small>" in page for value in NASTY["responses"][0]["values"])
    assert "viewport" in page and "http" not in page


def test_terminal_text_brings_no_escape_codes_of_the_answer():
    plain = pages.terminal_text(NASTY["responses"][0], -1.0, 1.0, coloured=False)
    assert "<script>[-1.00]" in plain and "\x1b" not in plain
    assert "\x1b[31m" not in pages.terminal_text(NASTY["responses"][0], -1.0, 1.0, coloured=True)


def test_colours_run_from_red_to_green():
    (low, mid, high), same = [pages.colour(v, -1, 1) for v in (-1, 0, 1)], pages.colour(2, 2, 2)
    assert low[0] > low[1] and high[1] > high[0] and same == mid
    assert all(sum(colour) > 450 for colour in (low, mid, high))  # light enough for black letters


def test_a_character_of_several_tokens_appears_once():
    tokens = sorted(ByteLevel.alphabet())
    backend = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = tokenizer("aé b").input_ids
    assert len(ids) == 5 and pages.token_texts(tokenizer, ids) == ["a", "", "é", " ", "b"]


# ---- the commands ------------------------------------------------------------------------------------------

def test_gvm_command(world_dir, capsys):
    found = run("gvm", world_dir, *on(world_dir), "--seed", 3)
    held_out = sum(split_of(f"what is {n} ?", 0) == "test" for n in NUMBERS)
    assert found["ranking"]["pairs"] == held_out == found["ranking"]["groups"]
    assert found["calibration"]["n"] == 2 * held_out and found["left_out"] == {}
    assert found["ranking"]["baselines"]["longer answer"]["accuracy"] == 0
    assert np.isclose(np.average([b["actual"] for b in found["calibration"]["bins"]],
                                 weights=[b["n"] for b in found["calibration"]["bins"]]), 0)  # 9 and 2: +-3.5
    shown = capsys.readouterr().out
    assert "token values: P99" in shown and "baseline: policy mean" in shown and "Calibration" in shown


def test_gvm_without_tau_reads_plain_pairs(world_dir):
    found = run("gvm", world_dir, *on(world_dir, "gvm0", "pairs"))
    assert found["ranking"]["shared_tau"] == found["ranking"]["own_tau"]
    assert set(found["ranking"]["baselines"]) == {"longer answer"}
    assert np.isclose(np.average([b["actual"] for b in found["calibration"]["bins"]],
                                 weights=[b["n"] for b in found["calibration"]["bins"]]), 0)  # +1 and -1
    again = run("gvm", world_dir, *on(world_dir, "gvm0", "named"))
    assert again["ranking"]["baselines"]["policy mean"]["accuracy"] == 1  # names are there, though tau is not


def test_values_command(world_dir):
    found = run("values", world_dir, *on(world_dir), "--html", world_dir / "v.html")
    assert [a["label"] for a in found["responses"]] == ["good (score 9)", "bad (score 2)"]
    assert found["k"] == 2 and all(question != found["question"] for question, _ in found["tau"])
    for answer in found["responses"]:
        assert "".join(answer["tokens"]) == answer["text"] + " <eos>"
        assert len(answer["values"]) == 1 + len(answer["tokens"])
        assert np.isclose(answer["mean"], np.mean(answer["values"][1:]))
    first, second = (answer["values"][0] for answer in found["responses"])
    assert np.isclose(first, second, atol=1e-6)  # nothing said yet, one tau
    assert "bad (score 2)" in (world_dir / "v.html").read_text()
    typed = run("values", world_dir, *on(world_dir), "--question", "what is n1 ?",
                "--responses", "yes n1", "no", "it is n1", "--tau_policy", "bad",
                "--html", world_dir / "v.html")
    assert "what is n1 ?" in (world_dir / "v.html").read_text()  # an earlier page is written over
    assert [a["text"] for a in typed["responses"]] == ["yes n1", "no", "it is n1"]
    assert all(answer.startswith("no") for _, answer in typed["tau"])


def test_policy_command(world_dir):
    (world_dir / "plug.py").write_text("def length(rows, policy, tokenizer):\n"
                                       "    return [len(r['response_ids']) for r in rows]\n")
    policies = [f"a={world_dir / 'sft'}", f"b={world_dir / 'sft'}", f"other={world_dir / 'other'}"]
    flags = [*on(world_dir), "--response_length", 6, "--out", world_dir / "answers.jsonl", "--prompts", 10]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world_dir)
        found = run("policy", world_dir, *flags, "--truth_fn", "plug:length", "--policies", *policies)
    a, b, other = (found["policies"][name] for name in ("a", "b", "other"))
    assert a["kl"]["mean"] == b["kl"]["mean"] == 0 and other["kl"]["mean"] > 0
    assert b["against_first"] == {name: {"win": 0, "tie": 1, "lose": 0} for name in ("truth", "gvm")}
    assert other["scores"]["truth"]["mean"] == other["length"]
    answers = [json.loads(line) for line in (world_dir / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 30
    assert np.isclose(np.mean([x["kl"] for x in answers if x["policy"] == "other"]), other["kl"]["mean"])
    assert all(split_of(x["prompt"][0]["content"], 0) == "test" for x in answers)
    greedy = run("policy", world_dir, *on(world_dir), "--response_length", 3, "--temperature", 0,
                 "--policies", policies[0], "--out", world_dir / "answers.jsonl")
    assert len((world_dir / "answers.jsonl").read_text().splitlines()) < 30  # and earlier answers
    assert greedy["policies"]["a"]["kl"] is None


@pytest.mark.parametrize("command, flag", [("policy", "--out"), ("policy", "--json"), ("values", "--html"),
                                           ("gvm", "--json")])
def test_a_full_disk_takes_nothing_of_what_was_found(command, flag, world_dir, room, tmp_path, capsys):
    """The table, or the coloured text, is printed; of the file there is nothing, and no other is harmed."""
    words = {"policy": ["--policies", f"a={world_dir / 'sft'}", "--response_length", 3, "--prompts", 4],
             "values": [], "gvm": ["--pairs", 4]}[command]
    words = [command, "--model", "none", *on(world_dir), *words, flag, tmp_path / "out"]
    room(100)
    try:
        with pytest.raises(BadInput, match="out: could not be written .*make room there"):
            evaluate.main([str(word) for word in words])
    finally:
        room()
    assert not list(tmp_path.iterdir())
    found = {"policy": "4 held-out prompts", "values": "value after each", "gvm": "Calibration"}[command]
    assert found in capsys.readouterr().out


def metrics_file(path, values, name="gvm/mean"):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"step": i, name: v, "sometimes": v if i % 2 else None}) + "\n"
                            for i, v in enumerate(values)))
    return path


def test_somebody_elses_curves_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "curves.png").write_bytes(b"\x89PNG mine")
    with pytest.raises(BadInput, match="--png curves.png: a file that this command did not write"):
        run("plot", tmp_path, "--runs", f"x={metrics_file(tmp_path / 'm.jsonl', [0, 1])}")
    assert (tmp_path / "curves.png").read_bytes() == b"\x89PNG mine"


def test_plot_command(tmp_path):
    one = metrics_file(tmp_path / "1" / "metrics.jsonl", [0, 1, 2, 3])
    two = metrics_file(tmp_path / "2.jsonl", [2, 3, 4])
    found = run("plot", tmp_path, "--runs", f"x={one.parent}", f"x={two}", f"y={two}",
                "--png", tmp_path / "p.png",
                "--metrics", "gvm/mean", "sometimes")
    x = found["curves"]["gvm/mean"]["x"]
    assert x == {"seeds": 2, "steps": 3, "first": 1.0, "last": 3.0, "highest": 3.0}
    assert found["curves"]["sometimes"]["y"]["steps"] == 1
    picture = (tmp_path / "p.png").read_bytes()
    assert picture[:4] == b"\x89PNG"
    run("plot", tmp_path, "--runs", f"x={one.parent}", "--png", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes() != picture  # an earlier picture is written over
    runs = {"a": {"m": {0: 0.0, 1: 1.0}}, "b": {"m": {1: 3.0, 2: 5.0}}}
    steps, mean, std = evaluate.mean_and_band("m", "x", runs)
    assert steps == [1] and mean.tolist() == [2.0] and std.tolist() == [1.0]


# ---- the tables --------------------------------------------------------------------------------------------

def test_a_table_aligns_its_columns_and_leaves_out_empty_ones(capsys):
    print_table("Title", ["name", "count\n[rows]", "never", "share"],
                [["a", 10, None, 0.5], ["long name", 9, None, None]])
    assert capsys.readouterr().out == """
Title

name        count  share
           [rows]
---------  ------  -----
a              10  0.500
long name       9      -
"""
    print_table("No rows", ["name", "count"], [])
    print_table("No values", ["name", "count"], [["a", None]])
    assert capsys.readouterr().out == ""


def test_gvm_tables(capsys):
    half = dict(zip(("gvm_exact", "gvm_bayes", "bayes_exact"), (0.25, 0.125, 0.5)))
    seen = {"before": half, "decided": {}}
    result = {"k": 4, "left_out": {"prompts without a pair": 3}, "ranking": {
        "pairs": 9, "groups": 5, "shortened_tau": 2, "mean_value": {"good": 0.4, "bad": -0.1},
        "shared_tau": {"mean": {"accuracy": 0.8, "low": 0.75, "high": 0.9}},
        "own_tau": {"mean": {"accuracy": 0.85, "low": 0.8, "high": 0.9}},
        "baselines": {"tau only": {"accuracy": 0.5, "low": 0.25, "high": 1.0}}},
        "calibration": {"rmse": 0.125, "n": 3, "bins": [{"n": 2, "predicted": -0.5, "actual": -0.25},
                                                        {"n": 1, "predicted": 0.5, "actual": 1.0}]},
        "reference": {"seen": {"rows": 7, **seen, "policies": {"A-05": seen}}}}
    evaluate.show_gvm(result)
    assert capsys.readouterr().out == """
Accuracy on 9 held-out pairs in 5 groups; K = 4, tau shortened 2 times; left out: 3 prompts without a pair
mean value of the better answers 0.400, of the worse -0.100

ranked by               one tau for both  each its own tau
                     [%] (95 % interval)               [%]
------------------  --------------------  ----------------
token values: mean   80.0 (75.0 to 90.0)              85.0
baseline: tau only  50.0 (25.0 to 100.0)                 -

Calibration: value of the last token against the reward; RMSE 0.125

bin by value  responses  mean value  mean reward
------------  ---------  ----------  -----------
1                     2      -0.500       -0.250
2                     1       0.500        1.000

RMSE of the values before the token that decides the answer, and from it on
Bayes: the best estimate from tau; seen, unseen: the GVM was trained on the policy, or not

      policy             before    before          before
                       to exact  to Bayes  Bayes to exact
----  ---------------  --------  --------  --------------
seen  all (7 answers)     0.250     0.125           0.500
seen  A-05                0.250     0.125           0.500
"""
    evaluate.show_gvm({**result, "left_out": {}, "calibration": None, "reference": {}})
    shown = capsys.readouterr().out
    assert "left out: nothing" in shown and "Calibration" not in shown and "RMSE" not in shown


def test_policy_table(capsys):
    """The first policy is not compared with itself; without KL (greedy) that column is left out."""
    outcome = {"win": 0.5, "tie": 0.25, "lose": 0.25}
    policy = {"scores": {"truth": {"mean": 0.4, "stderr": 0.01}, "gvm": {"mean": -1.0, "stderr": None}},
              "against_first": {"truth": outcome, "gvm": {"win": 1.0, "tie": 0.0, "lose": 0.0}},
              "kl": {"mean": 0.3, "stderr": 0.05}, "length": 14.12, "truncated": 0.0625}
    result = {"reference": "runs/sft", "first": "sft", "prompts": 8, "temperature": 0.7,
              "policies": {"sft": policy, "dvpo": policy}}
    evaluate.show_policy(result)
    assert capsys.readouterr().out == """
8 held-out prompts, one answer each, temperature 0.7, against sft (runs/sft); mean ± standard error

policy    true reward  GVM value             KL    length  truncated    win / tie / lose     win / tie / lose
                                         [nats]  [tokens]        [%]  [%] by true reward     [%] by GVM value
------  -------------  ---------  -------------  --------  ---------  ------------------  -------------------
sft     0.400 ± 0.010     -1.000  0.300 ± 0.050      14.1        6.2                   -                    -
dvpo    0.400 ± 0.010     -1.000  0.300 ± 0.050      14.1        6.2  50.0 / 25.0 / 25.0  100.0 /  0.0 /  0.0
"""
    evaluate.show_policy({**result, "policies": {"sft": {**policy, "kl": None}}})
    shown = capsys.readouterr().out
    assert "KL" not in shown and "lose" not in shown


def test_plot_table(capsys):
    curve = {"seeds": 2, "steps": 60, "first": 0.125, "last": 0.4375, "highest": 12.5}
    curves = {"objective/kl": {"dvpo": curve}, "loss": {"a": curve}}
    evaluate.show_plot({"args": {"png": ""}, "curves": curves})
    assert capsys.readouterr().out == """
Curves, mean over the seeds of a label; drawn in curves.png

metric        label  seeds  steps  first   last  highest
------------  -----  -----  -----  -----  -----  -------
objective/kl  dvpo       2     60  0.125  0.438   12.500
loss          a          2     60  0.125  0.438   12.500
"""


# ---- what goes wrong ---------------------------------------------------------------------------------------

def test_usage(monkeypatch):
    for argv in ([], ["rank"], ["--help"], ["--local_rank=0"]):
        with pytest.raises(BadInput, match="usage"):
            evaluate.main(argv)
    with pytest.raises(BadInput, match="--prompts is a flag of `evaluate.py policy`, not of gvm"):
        evaluate.main(["gvm", "--prompts", "3"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="one rank"):
        evaluate.main(["--local_rank=1", "plot"])


@pytest.mark.parametrize("command, flags, message", [
    ("gvm", ["--split_seed", "5"], "--split_seed 5"),
    ("gvm", ["--data", "{}/pairs.jsonl"], "--k 0"),
    ("gvm", ["--reference_fn", "toy.reference:nothing"], "--reference_fn"),
    ("gvm", ["--reference_fn", "toy.reference:values"], "not an answer of the toy world"),
    ("gvm", ["--json", "/proc/no/where.json"], "--json"),
    ("values", ["--question", "what is n1 ?"], "--responses"),
    ("values", ["--tau_policy", "nobody"], "--tau_policy nobody"),
    ("policy", ["--policies", "x={}/nowhere"], "--policies"),
    ("policy", ["--policies", "x={}/sft", "x={}/sft"], "--policies: two"),
    ("policy", ["--policies", "{}/sft"], "name=path"),
    ("policy", [], "runs/none"),
    ("policy", ["--policies", "x={}/sft", "--response_length", "1000"], "--response_length"),
    ("policy", ["--policies", "x={}/sft", "--max_prompt_length", "1"], "--max_prompt_length"),
])
def test_bad_input_is_one_sentence(world_dir, command, flags, message):
    with pytest.raises(BadInput, match=message) as error:
        run(command, world_dir, *on(world_dir), *[flag.format(world_dir) for flag in flags])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags, message", [
    ([], "runs/none"),
    (["--runs", "{}/m.jsonl"], "name=path"),
    (["--runs", "x={}/nothing.jsonl"], "nothing.jsonl"),
    (["--runs", "x={}/m.jsonl", "--metrics", "loss"], "--metrics loss.*gvm/mean"),
    (["--runs", "x={}/broken.jsonl"], "broken.jsonl:2: not valid JSON"),
    (["--runs", "x={}/text.jsonl"], "text.jsonl:1: not a row"),
    (["--runs", "x={}/empty.jsonl"], "empty.jsonl is empty"),
    (["--runs", "x={}/other.jsonl"], "--metrics"),
    (["--runs", "x={}/m.jsonl", "x={}/late.jsonl"], "no step with gvm/mean in common"),
])
def test_bad_plot_input_is_one_sentence(tmp_path, flags, message):
    metrics_file(tmp_path / "m.jsonl", [1.0, 2.0])
    metrics_file(tmp_path / "other.jsonl", [1.0], name="loss")
    (tmp_path / "broken.jsonl").write_text('{"step": 0, "gvm/mean": 1}\n{"step": 1, "gvm')
    (tmp_path / "text.jsonl").write_text('{"step": 0, "gvm/mean": "high"}\n')
    (tmp_path / "late.jsonl").write_text('{"step": 9, "gvm/mean": 1}\n')
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(BadInput, match=message) as error:
        run("plot", tmp_path, "--png", tmp_path / "p.png", *[flag.format(tmp_path) for flag in flags])
    assert "\n" not in str(error.value)
