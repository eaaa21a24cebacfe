"""The report: what it says of a run, that it is one file which fetches nothing, and what a browser makes of it."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

from dschat.errors import UserError
from dschat.report import __main__ as program
from dschat.report.browser import as_script, browser_data
from dschat.report.findings import policy_findings, training_findings
from dschat.report.guide import METRICS, guide_table
from dschat.report.page import page
from dschat.report.run_files import load_run
from dschat.report.story import compare, findings, stage_rows
from dschat.report.svg import Series, chart, histogram, table_html, ticks
from tests.conftest import ROOT
from tests.report_parts import EVIL, evaluation, write_lines, write_run

import pytest


class Outline(HTMLParser):
    """Which elements a page has, the text of its JSON script, and which attributes name something to fetch."""

    def __init__(self):
        super().__init__()
        self.tags, self.fetched, self.data, self._in = [], [], "", ""
        self.figures: list[set[str]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._in = dict(attrs).get("id", "") if tag == "script" else ""
        self.fetched += [value for name, value in attrs if name in ("src", "href", "action") and value[0] != "#"]
        if tag == "figure":
            self.figures.append(set())
        elif self.figures:
            self.figures[-1] |= {tag, *dict(attrs).get("class", "").split()}

    def handle_data(self, data):
        if self._in == "data":
            self.data += data


def outline(text: str) -> Outline:
    parser = Outline()
    parser.feed(text)
    return parser


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "mine")


def test_a_page_is_one_file_and_text_of_models_stays_text(run_dir):
    text = page([load_run(run_dir)])
    found = outline(text)
    assert found.fetched == [] and "link" not in found.tags and "img" not in found.tags and "b" not in found.tags[:9]
    assert found.tags.count("script") == 2 and text.count("</script>") == 2
    assert "@import" not in text and "url(" not in text
    data = json.loads(found.data)
    after = data["policies"].index("PPO")
    assert data["prompts"][0]["answers"][after]["text"] == EVIL and data["prompts"][0]["prompt"] == "question 0 <i>?"
    assert data["policies"] == ["SFT", "best of 4", "PPO"] and data["by"] == "judge"
    assert data["prompts"][1]["answers"][after]["kl"] == [0.5, -0.25, 0.0]


def test_every_chart_has_labelled_axes_with_units_and_a_table(run_dir):
    text = page([load_run(run_dir)])
    found = outline(text)
    assert len(found.figures) >= 12
    for figure in found.figures:
        assert {"svg", "label", "details", "table", "td"} <= figure
    labels = set(re.findall(r'class="label"[^>]*>([^<]+)<', text))
    assert {"nats a sequence", "rollout", "tokens", "√KL to the reference (√nats a sequence)"} <= labels


def test_what_the_page_says_of_the_run(run_dir):
    run = load_run(run_dir)
    rows = {row[0]: row for row in stage_rows(run)}
    assert rows["SFT"][2:5] == ["toy (3,600 rows)", "20", "88 s"] and rows["SFT"][5] == "perplexity 1.50"
    assert rows["PPO"][4] == "2.0 h" and rows["PPO"][5] == "reward +0.80, KL 3.0 nats a sequence"
    won, controlled, by = compare(run.answers["PPO"], run.answers["SFT"])
    mine, theirs = ([row["judge"] for row in run.answers[name].values()] for name in ("PPO", "SFT"))
    assert won["value"] == pytest.approx(sum(a > b for a, b in zip(mine, theirs, strict=True)) / 12, abs=1e-4)
    assert by == "the independent judge"
    assert controlled is not None and controlled[0] == pytest.approx(won["value"], abs=0.08)  # lengths did not change
    levels = [finding.level for finding in findings(run)]
    assert levels == ["good", "good"] and "It helped" in findings(run)[0].text


def test_the_size_of_a_report_of_a_thousand_steps_and_five_hundred_samples(tmp_path):
    run = load_run(write_run(tmp_path, num_steps=1000, num_prompts=500))
    text = page([run])
    assert len(text.encode()) < 5e6
    assert len(browser_data([run])["prompts"]) == 500


def test_the_command_on_one_run_and_on_two(run_dir, tmp_path, capsys, monkeypatch):
    one, two = tmp_path / "a", write_run(tmp_path / "b", gain=-0.5)
    shutil.copytree(run_dir, one)
    program.main([str(one)])
    assert (one / "report.html").stat().st_size > 10_000 and (one / "report.png").stat().st_size > 3_000
    program.main([str(one), str(two), "--output", str(tmp_path / "both.html")])
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "Side by side" in text and "a: PPO" in text and "b: PPO" in text and "It got worse" in text
    assert (tmp_path / "both.png").is_file()
    assert capsys.readouterr().out.splitlines()[-1] == f"written to {tmp_path}/both.html, {tmp_path}/both.png"
    # A report in a stage's folder is no change of the stage's output.
    from dschat.report.stage_record import Hashes

    stage, hashes = one / "step3-models/toy", Hashes(leave_out=tmp_path / "none")
    before = hashes.of(stage)
    program.main([str(stage)])
    assert (stage / "report.html").is_file() and hashes.of(stage) == before


def test_a_run_that_is_still_going_and_one_that_is_damaged(tmp_path):
    with pytest.raises(UserError, match="no metrics.jsonl in it"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="is no directory"):
        load_run(tmp_path / "nowhere")
    lines = tmp_path / "metrics.jsonl"
    write_lines(lines, [evaluation(0, 0.0), evaluation(5, 0.5)])
    with open(lines, "a", encoding="utf-8") as file:
        file.write('{"step": 6, "sta')  # the line that is being written
    run = load_run(tmp_path)
    assert [line["step"] for line in run.stages["ppo"].lines] == [0, 5]
    assert "not finished" in page([run])
    lines.write_text('{"step": 1, "stage": "ppo"}\nnonsense\n{"step": 2, "stage": "ppo"}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is damaged"):
        load_run(tmp_path)


def test_of_several_runs_of_a_stage_the_newest_counts_and_the_others_are_named(run_dir, tmp_path):
    import os

    shutil.copytree(run_dir, tmp_path / "run")
    older = tmp_path / "run/actor-models/older"
    shutil.copytree(tmp_path / "run/actor-models/toy", older)
    os.utime(older / "metrics.jsonl", (1, 1))
    run = load_run(tmp_path / "run")
    assert run.stages["sft"].path.name == "toy" and run.left_out == [older]
    assert "actor-models/older" in page([run])


def test_answers_of_prompt_eval_are_joined_by_prompt(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    rows = [{"model": "base", "decoding": "sample", "prompt": f"question {i} <i>?", "response": "x", "num_tokens": 1,
             "finished": True, "score": None, "judge": 0.0} for i in range(12)]  # fmt: skip
    write_lines(tmp_path / "run/answers/answers.jsonl", rows)
    run = load_run(tmp_path / "run")
    assert list(run.answers) == ["base", "SFT", "best of 4", "PPO"]
    assert all(answer is not None for answer in browser_data([run])["prompts"][0]["answers"])


def test_a_restored_checkpoint_is_what_the_run_came_to(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    samples = tmp_path / "run/step3-models/toy/samples.jsonl"
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    rows += [row | {"kind": "restored", "response": "as it was"} for row in rows[-12:]]
    write_lines(samples, rows)
    run = load_run(tmp_path / "run")
    assert {row["response"] for row in run.answers["PPO"].values()} == {"as it was"}
    assert EVIL in {row["response"] for row in run.answers["PPO, over-optimised"].values()}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"eval/finished_fraction": 0.3}, "endless"),
        ({"eval/finished_fraction": 0.8}, "endless"),
        ({"eval/kl_per_seq": 15.0, "eval/response_length": 10.0}, "kl"),
        ({"eval/distinct_2": 0.05}, "collapse"),
        ({"eval/repetition": 0.6}, "repetition"),
        ({}, None),
    ],
)
def test_what_a_sick_policy_has_is_named_with_its_mend(change, kind):
    found = policy_findings(evaluation(0, 0.0), evaluation(9, 0.9) | change)
    assert [finding.kind for finding in found] == ([kind] if kind else [])
    assert all("raise --" in finding.text for finding in found)


def test_what_the_course_of_training_says():
    def lines(name: str, values: list[float]) -> list[dict]:
        return [{"step": i, name: value} for i, value in enumerate(values)]

    assert [f.kind for f in training_findings(lines("objective/entropy_per_token", [1.0] * 5 + [0.1] * 5))] == [
        "entropy"
    ]
    assert [f.kind for f in training_findings(lines("policy/clip_fraction", [0.5] * 10))] == ["clip"]
    assert [f.kind for f in training_findings(lines("critic/explained_variance", [-0.5] * 10))] == ["critic"]
    assert training_findings(lines("objective/entropy_per_token", [1.0] * 5 + [0.5] * 5)) == []


def test_a_script_element_cannot_be_left():
    data = {"text": "</script><!--<script>\u2028&"}
    text = as_script(data)
    assert json.loads(text) == data and not set("<>&\u2028") & set(text)


def test_ticks_are_round_and_inside():
    assert ticks(0, 10) == pytest.approx([0, 2, 4, 6, 8, 10])
    assert ticks(-0.31, 0.29) == pytest.approx([-0.2, 0.0, 0.2])
    for low, high in ((0.001, 0.0013), (1e6, 3e7), (-5, -4.99)):
        found = ticks(low, high)
        room = 1e-9 * abs(high)
        assert 3 <= len(found) <= 7 and low - room <= found[0] and found[-1] <= high + room


def test_places_on_the_drawing_are_linear_in_the_values():
    """Of points (0, 0), (5, 1), (10, 2) the middle one lies in the middle of the others."""
    text = chart("t", "x", "y", [Series("a", [0, 5, 10], [0, 1, 2], "dots")])
    points = [tuple(map(float, pair)) for pair in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', text)]
    assert len(points) == 3
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert x0 < x2 and y0 > y2  # up on the screen is smaller


def test_a_chart_without_numbers_is_no_chart_and_gaps_are_left_out():
    assert chart("t", "x", "y", [Series("a", [1, 2], [math.nan, math.nan])]) == ""
    assert histogram("t", "x", [("a", [])]) == ""
    assert "nan" not in chart("t", "x", "y", [Series("a", [1, 2, 3], [1.0, math.nan, 2.0], "dots")])
    assert "&lt;b&gt;" in table_html(["<b>"], [["1"]])


def test_a_histogram_holds_every_value_once():
    values = [0, 1, 1, 2, 2, 2, 9]
    text = histogram("t", "tokens", [("a", values), ("b", [5.0])])
    cells = re.findall(r"<td>([^<]*)</td>", text)
    shares = [float(cell) for cell in cells[1::3]]
    assert sum(shares) == pytest.approx(1, abs=1e-3) and shares[:3] == pytest.approx([1 / 7, 2 / 7, 3 / 7], abs=1e-3)


def test_the_guide_is_complete_and_the_page_has_it():
    text = (ROOT / "docs/reading-a-run.md").read_text(encoding="utf-8")
    for stage in METRICS:
        assert f"<!-- guide: {stage} -->\n\n{guide_table(stage)}\n\n<!-- end -->" in text
    for stage in METRICS.values():
        for name, metric in stage.items():
            assert metric.title and metric.definition and metric.healthy and metric.mend, name


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    if CHROMIUM is None:
        pytest.skip("needs a browser: chromium")
    quiet = ["gpu", "quic", "background-networking", "component-update", "sync"]
    args = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with playwright.sync_playwright() as session:
        opened = session.chromium.launch(executable_path=CHROMIUM, args=args)
        yield opened
        opened.close()


def test_a_browser_clicks_through_the_answers(browser, tmp_path):
    """One visit: what is shown, sorted, filtered, coloured; by keyboard; narrow and dark; no text runs."""
    path = tmp_path / "report.html"
    path.write_text(page([load_run(write_run(tmp_path / "mine", num_prompts=60))]), encoding="utf-8")
    visit = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
    problems: list[str] = []
    visit.on("pageerror", lambda error: problems.append(str(error)))
    visit.on("console", lambda message: problems.append(message.text))
    visit.on("request", lambda request: problems.append(request.url) if request.url[:4] == "http" else None)
    visit.goto(path.as_uri())
    assert visit.locator("article").count() == 40 and visit.evaluate("document.documentElement.scrollWidth") <= 390
    assert visit.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"

    def gains() -> list[float]:
        return [float(text) for text in visit.locator("article .up, article .down").all_text_contents()]

    assert gains() == sorted(gains(), reverse=True) and gains()[0] > 0
    visit.select_option("#order", "loss")
    assert gains() == sorted(gains())
    visit.select_option("#filter", "worse")
    assert gains() and max(gains()) <= 0 and min(gains()) < 0
    visit.select_option("#filter", "all")
    visit.click("#more")
    assert visit.locator("article").count() == 60 and visit.locator("#more").is_hidden()
    visit.fill("#search", "question 1 onerror")
    assert visit.locator("article").count() == 0
    visit.fill("#search", "question onerror")
    assert visit.locator("article").count() == 1 and EVIL in visit.locator("article").inner_text()
    visit.fill("#search", "")
    visit.select_option("#order", "data")
    visit.select_option("#colour", "kl")
    assert visit.locator("article h4").first.inner_text() == "question 0 <i>?"
    painted = visit.locator(".tokens span[style]")
    assert painted.count() == 2 + 1 and painted.first.get_attribute("title") == "KL (nats) 0.500"
    visit.evaluate("document.activeElement.blur()")
    visit.keyboard.press("j")
    visit.keyboard.press("j")
    assert visit.evaluate("document.activeElement === document.querySelectorAll('article')[1]")
    visit.keyboard.press("s")
    assert visit.input_value("#order") == "gain" and gains()[0] > 0
    visit.keyboard.press("/")
    assert visit.evaluate("document.activeElement.id") == "search"
    assert visit.title() == "RLHF report: mine" and problems == []
    visit.close()
