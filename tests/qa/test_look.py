"""look.py: what is shown is what training compares, in the terminal and, in a real browser, on the page."""

import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, arguments_of, run, write_jsonl

import common
import look
from plumbing.data import load_problems
from plumbing.models import load_model, load_tokens


@pytest.mark.parametrize("ends", ["apart", "as_one"])
def test_the_numbers_are_those_of_training(ends, world):
    """Entropies, KLs and pushes by the whole models' logits; the mean of the KLs is the loss; minus the sum of the
    log-ratios is the sampled reverse KL of these very tokens."""
    problems = load_problems(world["eval_data"])[0]
    args = look.Args(student=world["student"], teacher=world["teacher"])
    tokens = load_tokens(args, [("data", problems, 6)])
    student, teacher = (load_model(world[role], "fp32") for role in ("student", "teacher"))
    rollouts = common.sample(student, [p.prompt for p in problems], tokens.end_ids, 6, seed=4)
    assert rollouts.ended.any()
    said = look.inspect(student, teacher, rollouts, tokens.end_ids, ends, tokens.vocab_size, top=400)
    for ids, mask, found in zip(rollouts.ids, rollouts.mask, said, strict=True):
        q, p = (model(ids[None]).logits[0, :-1][mask[1:]] for model in (student, teacher))
        ids = ids[mask]
        if ends == "as_one":
            q, p = (common.merge_ends(x, tokens.end_ids) for x in (q, p))
            rest = [i for i in range(tokens.vocab_size) if i not in tokens.end_ids]
            ids = torch.tensor([rest.index(i) if i in rest else len(rest) for i in ids.tolist()])
        log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
        forward, reverse = common.forward_kl(q, p), common.reverse_kl(q, p)
        push = -log_q.exp() * (log_q - log_p - reverse[:, None])
        for t, token in enumerate(found):
            numbers = [common.entropy(p)[t], common.entropy(q)[t], forward[t], reverse[t], (log_p - log_q)[t, ids[t]]]
            keys = ("entropy_p", "entropy_q", "forward", "reverse", "ratio")
            assert [token[key] for key in keys] == pytest.approx([x.item() for x in numbers], rel=1e-3, abs=1e-4)
            rows = {row[0]: row[1:] for row in token["top"]}
            assert len(rows) == q.shape[-1] and (look.ANY_END in rows) == (ends == "as_one")
            columns = (log_p.exp(), log_q.exp(), (log_p.exp() - log_q.exp()), push)
            expected = [x[t, ids[t]].item() for x in columns]
            assert rows[token["id"]] == pytest.approx(expected, rel=1e-3, abs=1e-5)
            assert token["slips"] == pytest.approx(
                log_q.exp()[t][log_p.exp()[t] < 0.01].sum().item(), rel=1e-3, abs=1e-5
            )
            assert sum(row[2] for row in rows.values()) == pytest.approx(sum(row[3] for row in rows.values()), abs=1e-3)
    options = dict(end_ids=tokens.end_ids, ends=ends, vocab_size=tokens.vocab_size)
    for key, kl in (("forward", common.forward_kl), ("reverse", common.reverse_kl)):
        loss, _ = common.distillation_loss(kl, student, teacher, rollouts, rollouts.mask.float(), **options)
        assert loss.item() == pytest.approx(sum(t[key] for row in said for t in row), rel=1e-3)


def test_only_the_top_tokens_of_each_prefix_are_kept(world):
    student, teacher = (load_model(world[role], "fp32") for role in ("student", "teacher"))
    rollouts = common.sample(student, [[1, 2, 3]], (), 6)
    for token in look.inspect(student, teacher, rollouts, (), top=3)[0]:
        assert 3 <= len(token["top"]) <= 6 and token["top"] == sorted(token["top"], key=lambda row: -max(row[1:3]))


def test_what_is_repeated_is_folded_in_the_terminal_and_nothing_is_wider_than_a_hundred_columns():
    assert look.repeats([9, 1, 2, 1, 2, 1, 2, 1, 2, 1, 7, 7, 7, 7, 7]) == [(1, 2, 4), (10, 1, 5)]
    assert look.repeats([1, 2, 3] * 3) == [] and look.repeats([5] * 4) == [(0, 1, 4)]
    assert [*map(look.colour, (4.0, 0.0, -9.0))] == [look.BLUE, (255,) * 3, look.ORANGE]
    assert look.visible("\x1b[0m\ta\n") == "·[0m·a↵", "nothing reaches the terminal as a command"
    words, plain = {1: "a\n", 2: "word", 3: "####"}, lambda text: re.sub("\033\\[[\\d;]*m", "", text)
    tokens = [dict(id=i, ratio=x) for i, x in [(1, -1.24), (3, 0.0), (2, -4.0)] + [(3, -3.0), (2, -1.0)] * 9]
    assert plain(look.in_terminal(tokens, words)) == "a↵[-1.2]\n####word[-4.0] × 10, -4.0 nats on average "
    lines = plain(look.in_terminal([dict(id=2, ratio=0.6), dict(id=3, ratio=0.6)] * 3 * 9, words, width=40)).split("\n")
    assert max(map(len, lines)) <= 40


@pytest.mark.parametrize("prefixes, sign", [("student", "-"), ("teacher", "+")])
def test_two_checkpoints_stand_side_by_side(prefixes, sign, world, tmp_path, monkeypatch, capsys):
    both = f"{world['student']},{world['teacher']}"
    arguments = arguments_of("look", world, prefixes=prefixes, eval_problems=2) | dict(student=both)
    page = tmp_path / "new" / "page.html"
    run("look", **arguments, page=page)
    said = capsys.readouterr().out
    assert said.startswith("blue: the teacher says it more often; orange: less often")
    assert len(re.findall(r"\d+ tokens, Σ [+-]\d+\.\d nats", said)) == 4
    lines = [line for line in re.sub("\033\\[[\\d;]*m", "", said).splitlines() if str(tmp_path.parent) not in line]
    assert max(len(line) for line in lines if "/" not in line) <= 100
    assert re.findall(r"Σ ([+-])(?!0\.0)", said) == [sign] * 2, "either model prefers what it has said"
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"))[1])
    assert [view["problem"] for view in data["views"]] == [0, 0, 1, 1] and data["students"] == both.split(",")
    assert all(str(t["id"]) in data["words"] for view in data["views"] for t in view["tokens"])
    if prefixes == "teacher":
        ids = [[t["id"] for t in view["tokens"]] for view in data["views"]]
        assert ids[::2] == ids[1::2], "the same responses, scored by either student"
    assert len(re.findall(r"forward KL [\d.]+ and reverse KL [\d.]+ nats a token; [\d.]+% of its prob", said)) == 2
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"question": "Why?"}])
    run("look", **arguments | dict(eval_data=asked), page=page)
    assert re.search(r"Why\?   \((cut|finished), ", capsys.readouterr().out), "no verdict"
    with pytest.raises(SystemExit, match="cannot write --page"):
        run("look", **arguments, page=tmp_path)
    monkeypatch.setattr(look, "is_main", lambda: False)
    run("look", **arguments, page=tmp_path / "b.html")
    assert not (tmp_path / "b.html").exists(), "of several processes one shows it"


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, from the system's packages."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if not driver or not chromium:
        pytest.skip("no Chromium and chromedriver here: the page is not tested in a browser")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1500,1200"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as chrome:
        yield chrome


def test_the_page_in_a_browser(browser, tmp_path, capsys):
    """The toy: no error in the console; a token's panel has Python's numbers; keys, folds, and dark mode work."""
    page, toy = tmp_path / "look.html", f"{ROOT}/toy"
    run(
        "look",
        student=f"{toy}/base_student,{toy}/student",
        teacher=f"{toy}/teacher",
        eval_data=f"{toy}/eval.jsonl",
        page=page,
    )
    text = page.read_text(encoding="utf-8")
    assert len(text) < 2_000_000 and not re.search(r"""(src|href)=["']?http|@import|url\(""", text), "no network"
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    view = data["views"][0]
    view["tokens"] += [dict(view["tokens"][-1], ratio=-2.0)] * 9  # a loop
    view["repeats"] = look.repeats([t["id"] for t in view["tokens"]])
    look.write_page(page, data)
    browser.get(f"file://{page}")
    find = lambda css: browser.find_elements("css selector", css)
    key = lambda name: browser.switch_to.active_element.send_keys(name)
    from selenium.webdriver.common.keys import Keys

    articles = find("article")
    assert len(articles) == 8 and len(find(".strip svg")) == 8
    browser.find_element("css selector", "body").send_keys(Keys.ARROW_RIGHT)
    key(Keys.ARROW_RIGHT)
    t, panel = view["tokens"][1], browser.find_element("id", "panel").text
    numbers = (
        f"teacher {t['entropy_p']:.2f}, student {t['entropy_q']:.2f} nats. KL: forward {t['forward']:.2f}, reverse"
    )
    assert numbers in panel and f"p = {t['p']:.3f}" in panel and f"{abs(t['ratio']):.2f} nats" in panel
    for row, (i, p, q, *pushes) in zip(find("#panel tr")[1:], t["top"]):
        cells = [cell.text for cell in row.find_elements("css selector", "td")]
        assert cells[0] == data["words"][str(i)].replace("\n", "↵").replace(" ", "␣")
        assert [float(x) for x in cells[2:4]] == pytest.approx([p, q], abs=6e-4)
        pushed = [0.0 if x.startswith("·") else float(x[2:].replace("−", "-")) for x in cells[4:]]
        assert pushed == pytest.approx(pushes, abs=6e-3)
    assert len(find("rect.now")) == 1, "the strip shows where one is"
    hidden = find(".t.away")
    assert len(hidden) == 9 and not any(box.is_displayed() for box in hidden), "the loop is folded"
    for _ in range(len(articles[0].find_elements("css selector", ".t")) - 9 - 1):
        key(Keys.ARROW_RIGHT)
    assert "fold" in browser.switch_to.active_element.get_attribute("class")
    key(Keys.ENTER)
    assert not find(".t.away")
    key(Keys.ARROW_UP)
    key(Keys.ARROW_DOWN)
    assert len(articles[1].find_elements("css selector", ".t.now")) == 1
    key(Keys.ARROW_UP)
    assert len(articles[0].find_elements("css selector", ".t.now")) == 1
    key(Keys.ESCAPE)
    assert browser.find_element("id", "panel").text == ""
    light = browser.find_element("css selector", "body").value_of_css_property("background-color")
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    assert browser.find_element("css selector", "body").value_of_css_property("background-color") != light
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
