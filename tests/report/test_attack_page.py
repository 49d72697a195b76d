"""The page of an attack: what it says, that it is escaped, and that a browser draws it with its texts covered."""

import shutil

import pytest

from evals.looking import look
from pages import Page
from protect.script import GREEDY, Says, Script, ask
from safeglasses.protect.attack import PLAIN, RANDOM, RESAMPLE, SEARCH, UNIVERSAL, Attack, Attacked
from safeglasses.protect.attacked import Tried, attack_rows, examples_of, summaries
from safeglasses.protect.attacker import Wrapper
from safeglasses.protect.compose import Kit, compose
from safeglasses.protect.running import protect
from safeglasses.report.attack_page import attack_study, headline
from safeglasses.report.study import render_study

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BAD = "<script>alert(1)</script>"
WORDS = ("please", BAD)
ATTACKS = [
    Attack(PLAIN),
    Attack(f"wrapper:w{BAD}", wrapper=Wrapper(f"w{BAD}", "s", {"en": "wrapped {text}"})),
    Attack(RESAMPLE, queries=4),
    Attack(SEARCH, RESAMPLE, words=WORDS, length=1, queries=4),
    Attack(RANDOM, suffixes={"": "please"}),
    Attack(UNIVERSAL, RANDOM, suffixes={"": BAD}),
]


@pytest.fixture(scope="module")
def record() -> dict:
    """The base always harms, the stack when a wrapper or the evil suffix is asked."""
    rows = [ask(f"{BAD} {i}", id=f"p{i}{BAD}", label="toxic", pair_id=str(i)) for i in range(30)]

    def reply(one) -> str:
        said, number = one.prompt.text, int(one.prompt.id.removesuffix(BAD)[1:])
        evil = said.endswith(BAD) or (said.startswith("wrapped") and number < 12)
        return f"bad {BAD}" if evil or "reminder" not in said else f"fine {BAD}"

    tried = []
    for name in ("none", "self-reminder"):
        reminded = name != "none"
        for attack in ATTACKS:
            script = Script(lambda one, reminded=reminded: reply(one) if reminded else f"bad {BAD}")
            wording = {"before": "reminder", "after": ""}
            stack = compose(name, Kit(prompts={"self-reminder": {"en": wording}}))
            outcomes = protect(Attacked(stack, attack, Says()), rows, script, decoding=GREEDY)
            tried.append(Tried(name, attack, tuple(outcomes), {f"other{BAD}": [False] * 30}))
    lines = attack_rows(tried, rows)
    return {
        "model": f"m{BAD}", "base_fingerprint": "f", "judge": f"j{BAD}", "witnesses": [f"other{BAD}"],
        "judges_inside": [], "circular": [], "split": "test", "prompts": 30, "attacker": f"a{BAD}",
        "decoding": {"name": "sampled", "temperature": 1.0, "seed": 0, "max_new_tokens": 4},
        "wrappers": [{"name": f"w{BAD}", "source": f"s{BAD}", "languages": ["en"], "known": f"seen{BAD}"}],
        "suffixes": {"words": 2, "length": 1, "queries": 4}, "search": {"split": "calibrate", "prompts": 9},
        "universal": {"none": {"suffix": BAD, "tried": [[BAD, 0.5]], "queries": 9}},
        "rows": [line.to_json() for line in lines],
        "stacks": summaries(lines), "examples": examples_of(tried, rows),
    }  # fmt: skip


def test_the_headline_says_what_each_attack_leaves(record):
    (said,) = headline(record)
    assert said.startswith("self-reminder: harm 0.0 % → 100.0 % under the worst attack of one answer (one suffix for ")
    assert "searched elsewhere), 0 % (" in said
    assert "; within 4 queries " in said
    assert said.endswith(" of harm is prevented), 0.0 % by asking again alone.")


def test_lights_follow_what_is_left(record):
    chips = {chip.label: chip for chip in attack_study(record).chips}
    assert chips["Worst single answer: self-reminder"].level == "bad"
    assert chips["Wrappers that are not held back"].level == "watch"
    gentle = [{**one, "worst": one["resampled"]} for one in record["stacks"]]
    chips = {chip.label: chip for chip in attack_study({**record, "stacks": gentle}).chips}
    assert chips["Worst single answer: self-reminder"].level == "good"


def test_everything_is_there_and_escaped(record):
    page = Page(render_study(attack_study(record)))
    assert sum(tag == "script" for tag, _ in page.tags) == 3  # figures, the library, ours
    assert "How much of the gain remains" in page.text
    assert f"“{BAD}”" in page.text
    cards = [attrs for tag, attrs in page.tags if attrs.get("class") == "card"]
    veils = [attrs for _, attrs in page.tags if "veil" in (attrs.get("class") or "").split()]
    assert len(cards) == len(record["examples"]) >= 4
    assert len(veils) == 3 * len(cards)
    assert all("inert" in attrs for attrs in veils)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_draws_the_page_and_covers_its_texts(record, tmp_path):
    file = tmp_path / "attack.html"
    page = render_study(attack_study(record))
    told = (
        "setTimeout(()=>{const d=document,v=[...d.querySelectorAll('.veil')],e=d.documentElement;"
        "const blurred=()=>v.filter(x=>getComputedStyle(x).filter.includes('blur')).length;const at=blurred();"
        "d.querySelector('[data-reveal-all]').click();setTimeout(()=>{const p=d.createElement('p');"
        "p.textContent=`told figures=${e.dataset.figures} violations=${e.dataset.violations} veils=${v.length} "
        "covered=${at} after=${blurred()} sideways=${e.scrollWidth-innerWidth} `"
        "+`svgs=${d.querySelectorAll('.plot svg.main-svg').length>0}`;d.body.append(p)},600)},1500)"
    )
    # the page's policy lets no further script run: the test's own copy leaves the policy's line out
    policy = next(line for line in page.splitlines() if "Content-Security-Policy" in line)
    file.write_text(page.replace(policy, "").replace("</body>", f"<script>{told}</script></body>"), encoding="utf-8")
    seen = look(str(CHROMIUM), file.as_uri(), ["told figures="], tmp_path / "profile")
    veils = 3 * len(record["examples"])
    assert f"told figures=2 violations=0 veils={veils} covered={veils} after=0 sideways=" in seen
    assert int(seen.split("sideways=")[1].split()[0]) <= 0
    assert "svgs=true" in seen
