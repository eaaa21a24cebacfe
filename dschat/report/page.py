"""The report as one HTML file that opens without a network: style, script and data are in it, and every text that a
model or a user wrote is escaped."""

import html
from collections.abc import Sequence
from pathlib import Path

from dschat.report.browser import MAX_PROMPTS, as_script, browser_data
from dschat.report.findings import Finding
from dschat.report.metrics import write_whole
from dschat.report.page_charts import (
    calibration,
    distributions,
    frontier,
    preflight_charts,
    stage_curves,
    titles,
)
from dschat.report.preflight_text import preflight_table
from dschat.report.run_files import Run
from dschat.report.story import (
    POLICY_HEADER,
    STAGE_HEADER,
    comparison_rows,
    findings,
    policy_rows,
    stage_rows,
)
from dschat.report.svg import table_html

HERE = Path(__file__).parent
SIGN = {"good": "✓", "warn": "!", "bad": "✗"}
# Nothing is fetched, whatever a model wrote: a browser enforces it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_page(path: Path, runs: Sequence[Run]) -> None:
    """The report on one run, or on several beside each other."""
    write_whole(path, page(runs))


def page(runs: Sequence[Run]) -> str:
    name = " · ".join(run.name for run in runs)
    sections = [_overview(runs)]
    sections += [(f"stage-{stage}", titles(stage), stage_curves(runs, stage)) for stage in ("ppo", "dpo")]
    sections.insert(1, ("frontier", "Reward against KL", frontier(runs)))
    for run in runs:
        suffix = f": {run.name}" if len(runs) > 1 else ""
        sections.append(("distributions", f"Before and after{suffix}", distributions(run)))
    data = browser_data(runs)
    if data["prompts"]:
        sections.append(("answers", "The answers", _browser(data)))
    for run in runs:
        suffix = f": {run.name}" if len(runs) > 1 else ""
        sections.append(("calibration", f"The reward model{suffix}", calibration(run)))
        sections.append(("preflight", f"Before PPO{suffix}", _preflight(run)))
    sections += [(f"stage-{stage}", titles(stage), stage_curves(runs, stage)) for stage in ("reward", "sft")]
    sections.append(("provenance", "What was run", _provenance(runs)))
    shown = [(anchor, title, body) for anchor, title, body in sections if body]
    links = "".join(f"<a href='#{anchor}'>{_text(title)}</a>" for anchor, title, _ in shown)
    bodies = "".join(
        f"<section id='{anchor}'><h2>{_text(title)}</h2>{body}</section>" for anchor, title, body in shown
    )
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>RLHF report: {_text(name)}</title><style>{style}</style></head>\n<body>"
        f"<header><h1>{_text(name)}</h1><nav aria-label='sections'>{links}</nav></header>\n<main>{bodies}</main>\n"
        f"<script type='application/json' id='data'>{as_script(data)}</script>"
        f"<script>{script}</script></body></html>\n"
    )


def _overview(runs: Sequence[Run]) -> tuple[str, str, str]:
    if len(runs) > 1:
        parts = [table_html(*comparison_rows(runs)), _different_flags(runs)]
        for run in runs:
            parts.append(f"<h3>{_text(run.name)}</h3>{_findings(findings(run))}")
        return "story", "Side by side", "".join(parts)
    run = runs[0]
    parts = [_findings(findings(run)), table_html(STAGE_HEADER, stage_rows(run))]
    if run.answers:
        parts.append("<h3>Answers to held-out prompts</h3>" + table_html(POLICY_HEADER, policy_rows(run)))
        note = (
            "Better: the share of the same prompts on which the answer scores above that of the policy before "
            "training, by the judge where there is one, else by the training reward; ties count half. At equal "
            "length: the same if both answers were equally long, by a logistic regression on the difference."
        )
        parts.append(f"<p class='quiet'>{note}</p>")
    if run.left_out:
        older = ", ".join(map(str, run.left_out))
        parts.append(f"<p class='quiet'>Older stages in the same folder, not shown: {_text(older)}</p>")
    return "story", "The run", "".join(parts)


def _findings(found: Sequence[Finding]) -> str:
    items = "".join(
        f"<li class='{f.level}'><b aria-hidden='true'>{SIGN[f.level]}</b><span>{_text(f.text)}</span></li>"
        for f in found
    )
    return f"<ul class='findings'>{items}</ul>" if items else ""


def _different_flags(runs: Sequence[Run]) -> str:
    """The flags in which the last stages of the runs differ."""
    configs = [list(run.stages.values())[-1].record.get("config", {}) for run in runs]
    names = sorted({name for config in configs for name in config} - {"output_dir"})
    rows = []
    for name in names:
        values = [str(config.get(name, "")) for config in configs]
        if len(set(values)) > 1:
            rows.append([f"--{name}", *values])
    if not rows:
        return ""
    header = ["flag", *(run.name for run in runs)]
    return f"<details><summary>flags that differ</summary>{table_html(header, rows)}</details>"


def _preflight(run: Run) -> str:
    if not run.preflight:
        return ""
    verdict, reason = run.preflight["verdict"], run.preflight["reason"]
    level = {"GO": "good", "WARN": "warn", "STOP": "bad"}[verdict]
    line = _findings([Finding(level, "preflight", f"{verdict}: {reason}")])
    return line + table_html(*preflight_table(run.preflight)) + preflight_charts(run.preflight)


def _browser(data: dict) -> str:
    """The frame of the browser of answers; page.js fills it."""
    names = data["policies"]
    options = "".join(f"<option value='{i}'>{_text(name)}</option>" for i, name in enumerate(names))
    shown = f"{len(data['prompts'])} of {data['num_prompts']} prompts"
    shown += f" (the first {MAX_PROMPTS})" if data["num_prompts"] > MAX_PROMPTS else ""
    return f"""<p class='quiet'>{shown}. Keys: <kbd>j</kbd> and <kbd>k</kbd> go to the next and the one before,
<kbd>/</kbd> searches, <kbd>s</kbd> changes the order, <kbd>c</kbd> the colours.</p>
<form id='controls' onsubmit='return false'>
<label>from <select id='before'>{options}</select></label>
<label>to <select id='after'>{options}</select></label>
<label>order <select id='order'><option value='gain'>largest gain first</option>
<option value='loss'>largest loss first</option><option value='data'>as in the data</option></select></label>
<label>show <select id='filter'><option value='all'>all</option><option value='better'>gained</option>
<option value='worse'>lost</option><option value='same'>same</option><option value='endless'>cut off</option></select>
</label><label>by <select id='by'></select></label>
<label>colour <select id='colour'></select></label>
<label class='search'>search <input id='search' type='search' placeholder='words of a prompt or an answer'></label>
</form><p id='count' role='status'></p><p id='scale' class='quiet'></p><div id='list'></div>
<button id='more' type='button'>more</button><noscript><p>The answers need JavaScript; they lie in samples.jsonl too.
</p></noscript>"""


def _provenance(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        for key, stage in run.stages.items():
            record = stage.record
            rows = [["output", str(stage.path)], ["seed", str(record.get("seed", ""))]]
            rows += [[name, version] for name, version in record.get("versions", {}).items()]
            if "peak_rss_gb" in record:
                rows.append(["peak memory of one process", f"{record['peak_rss_gb']:.2f} GB"])
            rows += [[f"--{name}", str(value)] for name, value in record.get("config", {}).items()]
            title = f"{run.name}: {titles(key)}" if len(runs) > 1 else titles(key)
            parts.append(f"<details><summary>{_text(title)}</summary>{table_html(('what', 'value'), rows)}</details>")
    return "".join(parts)


def _text(text: str) -> str:
    return html.escape(text)
