"""A small closed world in which the value of every token is known exactly.

A prompt asks one of 32 facts (16 places x {island, coastal}, half of them true) in one of 12 phrasings. An
answer is made of four parts, which gives 6 x 2 x 3 = 36 answers per prompt, 7 to 22 tokens long with the EOS:

    opener    1 to 4 words, some polite
    core      "arvo is an island ." or "arvo is not an island ."; the token after "is" decides
    closing   0, 4 or 9 words
    EOS

Everything else is malformed. The score (1 to 10) is 2, plus 6 if right, plus 0.5 for a polite opener, plus
annotator noise in {-1, 0, 1}; a malformed answer scores 1. So a score never has to be clipped. The closing
does not change the score: if closings drift while a policy is trained, the training is biased.

A scripted policy draws opener, right or wrong, and closing independently. Its value is therefore a closed
formula,

    Q(prefix) = a + b P(right | prefix) + c P(polite | prefix)     in units of reward, r = (score - 5.5) / 4.5

Texts are words separated by single spaces; one word is one token. A prompt is identified by its text.
"""
from collections import namedtuple
from functools import cache, lru_cache
from itertools import product


EOS = "<eos>"
SPECIALS = ("<pad>", "<unk>", "<bos>", EOS, "<turn>")
PLACES = ("arvo", "belan", "corin", "duska", "eldra", "fenn", "garo", "hesta",
          "ilmar", "jorun", "kessa", "lorn", "mirel", "nadir", "oskan", "perla")
PREDICATES = {"island": "an island", "coastal": "on the sea coast"}
# Every combination of the two predicates holds for four places: neither the predicate nor the answer to the
# other question gives an answer away.
TRUE = {"island": frozenset(PLACES[0:8]), "coastal": frozenset(PLACES[4:12])}
PHRASINGS = (
    "is {place} {predicate} ?",
    "is it true that {place} is {predicate} ?",
    "tell me : is {place} {predicate} ?",
    "please tell me if {place} is {predicate} .",
    "do you think that {place} is {predicate} ?",
    "do you know if {place} is {predicate} or not ?",
    "i think that {place} is {predicate} . is it true ?",
    "would you say that {place} is {predicate} ?",
    "can you tell me if {place} is {predicate} ?",
    "{place} : is it {predicate} or not ?",
    "{place} is {predicate} . true or not ?",
    "i ask you : is it true or not that {place} is {predicate} ?",
)
# Three openers share their first word and one is the beginning of another: a partial opener is a real state.
OPENERS = ("good question :", "thanks for asking ,", "well asked ,", "well", "well ,", "listen :")
POLITE = (True, True, True, False, False, False)
CLOSINGS = ("", "i am sure .", "ask me if you like to know more .")

Fact = namedtuple("Fact", "place predicate true")
Parsed = namedtuple("Parsed", "opener right closing")           # index, bool, index
Style = namedtuple("Style", "openers closings")                 # probabilities, as OPENERS and CLOSINGS
Policy = namedtuple("Policy", "name skill style")               # skill = P(right), style = key of STYLES
Allowed = namedtuple("Allowed", "openers rights closings")      # what a prefix still leaves open

# The styles overlap: one answer only hints at its style, and the style hardly tells the skill.
STYLES = {
    "A": Style(openers=(0.25, 0.25, 0.20, 0.10, 0.10, 0.10), closings=(0.15, 0.35, 0.50)),
    "B": Style(openers=(0.10, 0.10, 0.10, 0.25, 0.20, 0.25), closings=(0.50, 0.35, 0.15)),
}
TRAINING = tuple(Policy(f"{style}-{round(100 * skill):02d}", skill, style) for style, skill in (
    ("A", 0.05), ("A", 0.35), ("A", 0.65), ("A", 0.95), ("B", 0.15), ("B", 0.45), ("B", 0.75), ("B", 0.90)))
UNSEEN = (Policy("A-25", 0.25, "A"), Policy("B-55", 0.55, "B"), Policy("A-85", 0.85, "A"))
SFT = (Policy("sft-A", 0.70, "A"), Policy("sft-B", 0.70, "B"))

BASE_SCORE, RIGHT_SCORE, POLITE_SCORE, MALFORMED_SCORE = 2.0, 6.0, 0.5, 1.0


def to_reward(score):
    """Scores 1..10 to rewards in [-1, 1]: r = (score - 5.5) / 4.5."""
    return (score - 5.5) / 4.5


MALFORMED = to_reward(MALFORMED_SCORE)


# ---- facts, prompts, answers ----

FACTS = tuple(Fact(place, predicate, place in TRUE[predicate])
              for place, predicate in product(PLACES, PREDICATES))
FACT_OF = {phrasing.format(place=fact.place, predicate=PREDICATES[fact.predicate]): fact
           for fact in FACTS for phrasing in PHRASINGS}         # prompt text -> Fact, 384 entries
PROMPTS = tuple(FACT_OF)


def fact_of(prompt):
    """The fact that a prompt asks."""
    if prompt not in FACT_OF:
        raise ValueError(f"not a prompt of the toy world: {prompt!r}")
    return FACT_OF[prompt]


def group_of(prompt):
    """Name of the fact, such as "arvo/island". Prompts of one group ask the same thing in other words."""
    fact = fact_of(prompt)
    return f"{fact.place}/{fact.predicate}"


def core_text(prompt, right):
    """The sentence that answers the prompt, rightly or wrongly."""
    fact = fact_of(prompt)
    negation = "" if fact.true == right else "not "
    return f"{fact.place} is {negation}{PREDICATES[fact.predicate]} ."


def answer_text(prompt, parsed):
    """The answer made of these three parts, without EOS."""
    parts = (OPENERS[parsed.opener], core_text(prompt, parsed.right), CLOSINGS[parsed.closing])
    return " ".join(part for part in parts if part)


@cache
def answer_table(prompt):
    """The well-formed answers of a prompt: {text without EOS: Parsed}, 36 entries in a fixed order."""
    parts = product(range(len(OPENERS)), (True, False), range(len(CLOSINGS)))
    return {answer_text(prompt, Parsed(*part)): Parsed(*part) for part in parts}


def answers(prompt):
    """The 36 well-formed answers of a prompt, texts without EOS."""
    return list(answer_table(prompt))


def parse(prompt, response):
    """Parsed(opener, right, closing) of a response without EOS, or None when it is malformed."""
    return answer_table(prompt).get(" ".join(response.split()))


def vocabulary():
    """All tokens: the five specials first, then the words of the world in alphabetical order."""
    texts = list(PROMPTS) + [text for prompt in PROMPTS for text in answers(prompt)]
    return list(SPECIALS) + sorted({word for text in texts for word in text.split()})


# ---- scores ----

def true_score(prompt, response):
    """Noise-free score of a response, 1..10."""
    parsed = parse(prompt, response)
    if parsed is None:
        return MALFORMED_SCORE
    return BASE_SCORE + RIGHT_SCORE * parsed.right + POLITE_SCORE * POLITE[parsed.opener]


def score(prompt, response, rng):
    """What an annotator says, 1..10: the true score plus noise in {-1, 0, 1}; always 1 when malformed."""
    if parse(prompt, response) is None:
        return MALFORMED_SCORE
    return true_score(prompt, response) + int(rng.integers(-1, 2))


def true_reward(prompt, response):
    """Noise-free reward r(x, y) of a response without EOS, in [-1, 2/3]."""
    return to_reward(true_score(prompt, response))


# ---- scripted policies ----

def sample_answer(policy, prompt, rng):
    """One answer of a scripted policy, a text without EOS. rng: numpy Generator."""
    style = STYLES[policy.style]
    opener = int(rng.choice(len(OPENERS), p=style.openers))
    right = bool(rng.random() < policy.skill)
    closing = int(rng.choice(len(CLOSINGS), p=style.closings))
    return answer_text(prompt, Parsed(opener, right, closing))


@lru_cache(maxsize=1 << 16)
def allowed(prompt, prefix):
    """Which openers, verdicts and closings are compatible with the first tokens of a response.

    The place never occurs in an opener, so it separates the opener from the rest.
    prefix:  tuple of tokens, EOS included where there is one
    returns  Allowed of three tuples, each complete until its part has begun; None when malformed
    """
    place = fact_of(prompt).place
    cut = prefix.index(place) if place in prefix else len(prefix)
    said, rest = prefix[:cut], prefix[cut:]
    openers = tuple(i for i, opener in enumerate(OPENERS)
                    if (said == tuple(opener.split()) if rest else said == tuple(opener.split())[:cut]))
    tails = []
    for right, closing in product((True, False), range(len(CLOSINGS))):
        tail = (*core_text(prompt, right).split(), *CLOSINGS[closing].split(), EOS)
        if tail[:len(rest)] == rest:
            tails.append((right, closing))
    if not openers or not tails:
        return None
    rights, closings = zip(*tails)
    return Allowed(openers, tuple(sorted(set(rights))), tuple(sorted(set(closings))))


def prefixes(response_tokens):
    """The T + 1 prefixes of a response of T tokens, shortest first, as tuples."""
    return [tuple(response_tokens[:t]) for t in range(len(response_tokens) + 1)]


def prefix_probability(policy, prompt, prefix):
    """Probability that the policy's answer starts with the prefix (a tuple of tokens); 0 when malformed."""
    left = allowed(prompt, prefix)
    if left is None:
        return 0.0
    style = STYLES[policy.style]
    opener = sum(style.openers[i] for i in left.openers)
    verdict = sum(policy.skill if right else 1 - policy.skill for right in left.rights)
    return opener * verdict * sum(style.closings[i] for i in left.closings)


def prefix_value(policy, prompt, prefix):
    """Q(prefix) = a + b P(right | prefix) + c P(polite | prefix); MALFORMED outside the 36 answers."""
    left = allowed(prompt, prefix)
    if left is None:
        return MALFORMED
    openers = STYLES[policy.style].openers
    polite = sum(openers[i] for i in left.openers if POLITE[i]) / sum(openers[i] for i in left.openers)
    right = policy.skill if len(left.rights) == 2 else float(left.rights[0])
    return to_reward(BASE_SCORE + RIGHT_SCORE * right + POLITE_SCORE * polite)


def scripted_q(policy, prompt, response_tokens):
    """Exact values of a scripted policy along a response.

    response_tokens:  T tokens, the final EOS included
    returns           T + 1 floats in units of r: entry 0 is V(s_1), entry t is Q after token t
    """
    return [prefix_value(policy, prompt, prefix) for prefix in prefixes(response_tokens)]


def draw_tau(policy, prompt, k, rng):
    """k (question, answer) text pairs of one policy, about k different facts other than the prompt's."""
    others = [fact for fact in FACTS if fact != fact_of(prompt)]
    facts = [others[i] for i in rng.choice(len(others), size=k, replace=False)]
    questions = [str(rng.choice(PHRASINGS)).format(place=fact.place, predicate=PREDICATES[fact.predicate])
                 for fact in facts]
    return [(question, sample_answer(policy, question, rng)) for question in questions]


def response_tokens(answer):
    """The tokens of an answer text, EOS appended."""
    return [*answer.split(), EOS]
