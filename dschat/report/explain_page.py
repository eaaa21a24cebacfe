"""Answers of one PPO step, token by token: a page to read and a CSV file per answer.

The page is one file without scripts: nothing is fetched, and what a model wrote is text, never markup.
"""

import csv
import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dschat.errors import UserError
from dschat.report.explain_text import Group, column_groups


@dataclass(frozen=True)
class Answer:
    """One answer. ``rows`` are its tokens: column name -> number or text, numbers only for what is learned from."""

    prompt: str
    response: str
    finished: bool  # False: cut off at the length limit
    rows: list[dict[str, Any]]
    notes: dict[str, float]  # score, clipped_score, final_score; mean and std of a whitening or a group


def visible(text: str) -> str:
    """Text whose white space and control characters can be seen: a space as ␣, the others as escapes, \\ doubled."""
    shown = {" ": "␣", "\\": "\\\\"}
    return "".join(shown.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text)


def write_explanation(output_dir: str, answers: list[Answer], settings: Mapping[str, Any]) -> None:
    """``explain/response_000.csv``, … and ``explain/index.html``; CSV files of an earlier run go.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(output_dir) / "explain"
    groups = column_groups(settings)
    columns = [column for group in groups for column in group.columns]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("response_*.csv"):
            old.unlink()
        for number, answer in enumerate(answers):
            with open(folder / f"response_{number:03d}.csv", "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(columns)
                writer.writerows([_exact(row.get(column, "")) for column in columns] for row in answer.rows)
        (folder / "index.html").write_text(page(answers, groups, settings), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); make room there or correct --output_dir"
        ) from None


def page(answers: list[Answer], groups: list[Group], settings: Mapping[str, Any]) -> str:
    """The answers as one HTML document; every text from outside is escaped."""
    largest = max((abs(row.get("advantage", 0.0)) for answer in answers for row in answer.rows), default=0.0) or 1.0
    body = "\n".join(_answer(number, answer, groups, largest) for number, answer in enumerate(answers))
    flags = ", ".join(f"{name} {value}" for name, value in settings.items())
    notes = (
        "What PPO computes was computed again in plain Python floats (64 bits) and agreed within float32. Given are "
        "the scores, the critic's values and, of before the update, log-probabilities (sampler and trainer agreed, "
        f"the reference was asked again), entropies{' and exact KL' * (settings['kl_kind'] == 'full')}. Sums over the "
        f"vocabulary were checked for the first {settings['num_summed']} actions of an answer."
    )
    if settings["estimator"] != "gae":
        notes += f" No columns of values, deltas, returns and value losses: {settings['estimator']} has no critic."
    if not settings["whiten_rewards"]:
        notes += " No column reward_raw: rewards are not whitened."
    if not settings["whiten_advantages"]:
        notes += " Advantages are not whitened: advantage is advantage_raw."
    if not settings["kl_loss"]:
        notes += " No column kl_loss: the KL is in the rewards, not in the loss."
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>PPO token by token</title><style>{STYLE}</style></head><body>\n<h1>PPO token by token</h1>\n"
        f"<p>{_text(notes)}</p>\n<p class='quiet'>{_text(flags)}</p>\n{body}\n</body></html>\n"
    )


def _answer(number: int, answer: Answer, groups: list[Group], largest: float) -> str:
    learned = [row for row in answer.rows if row["is_action"]]
    facts = {
        "score": answer.notes["score"],
        "after clipping": answer.notes["clipped_score"],
        "after the rule for cut-off answers": answer.notes["final_score"],
        "sum of KL shares": math.fsum(row["kl_share"] for row in learned),
        "sum of rewards": math.fsum(row["reward"] for row in learned),
        "tokens": len(answer.rows),
        "of these learned from": len(learned),
    }
    items = "".join(f"<li>{name}: <b>{_short(value)}</b></li>" for name, value in facts.items())
    state = "finished" if answer.finished else "cut off at the length limit"
    if not learned:
        state += "; nothing of it is learned from (no score, or all of it left out)"
    numbers = {name: _operand(x) for name, x in (answer.notes | (learned[-1] if learned else {})).items()}
    steps = "".join(_step(group, numbers if learned else {}) for group in groups)
    spans = "".join(f"<th colspan='{len(group.columns)}'>{_text(group.title)}</th>" for group in groups)
    names = "".join(f"<th>{column}</th>" for group in groups for column in group.columns)
    rows = "\n".join(_row(row, groups, largest) for row in answer.rows)
    return (
        f"<section><h2>Answer {number}</h2>\n<h3>Prompt</h3><pre>{_text(answer.prompt)}</pre>\n"
        f"<h3>Answer ({state})</h3><pre>{_text(answer.response)}</pre>\n<ul>{items}</ul>\n"
        f"<details{' open' * (number == 0)}><summary>How to read the columns, with the last action as the example"
        f"</summary><dl>{steps}</dl></details>\n<div class='wide'><table><thead><tr>{spans}</tr><tr>{names}</tr>"
        f"</thead><tbody>\n{rows}\n</tbody></table></div></section>"
    )


def _step(group: Group, numbers: Mapping[str, str]) -> str:
    example = f"<br>Here: <code>{_text(group.example.format_map(numbers))}</code>" if group.example and numbers else ""
    return (
        f"<dt>{_text(group.title)} <span class='quiet'>{', '.join(group.columns)}</span></dt>"
        f"<dd>{_text(group.text)}<br><code>{_text(group.formula)}</code> "
        f"<span class='quiet'>{_text(group.source)}</span>{example}</dd>"
    )


def _row(row: Mapping[str, Any], groups: list[Group], largest: float) -> str:
    cells = []
    for column in (column for group in groups for column in group.columns):
        style = ""
        if column == "token" and row["is_action"]:
            colour = "0,150,80" if row["advantage"] > 0 else "215,60,40"
            style = f" class='token' style='background:rgba({colour},{0.6 * abs(row['advantage']) / largest:.2f})'"
        cells.append(f"<td{style}>{_text(_short(row.get(column, '')))}</td>")
    return f"<tr{'' if row['is_action'] else ' class=out'}>{''.join(cells)}</tr>"


def _text(text: str) -> str:
    return html.escape(text)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _operand(value: Any) -> str:
    """In a formula: a negative number in brackets."""
    return f"({_short(value)})" if isinstance(value, float) and value < 0 else _short(value)


def _exact(value: Any) -> Any:
    """Nine digits tell any two numbers of float32 apart."""
    return f"{value:.9g}" if isinstance(value, float) else value


STYLE = """
:root{color-scheme:light dark;--ink:#1c1f23;--page:#fff;--quiet:#6a737d;--line:#d6dae0;--box:#f4f5f7}
@media(prefers-color-scheme:dark){:root{--ink:#e3e6ea;--page:#16191d;--quiet:#8d96a0;--line:#373d45;--box:#20252b}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:2rem auto;max-width:80rem;
padding:0 1rem}h1{font-size:1.6rem}h2{border-top:1px solid var(--line);padding-top:1.5rem;font-size:1.25rem}
h3{font-size:1rem;margin:.8rem 0 .2rem}pre{background:var(--box);padding:.6rem;white-space:pre-wrap;
overflow-wrap:anywhere;margin:0}code{background:var(--box);padding:.1rem .3rem}.quiet{color:var(--quiet);
font-size:.85em;font-weight:normal}ul{columns:3 16rem;padding-left:1.2rem}dt{font-weight:600;
margin-top:.6rem}dd{margin-left:1.2rem}
summary{cursor:pointer}.wide{overflow-x:auto;margin-top:1rem}table{border-collapse:collapse;font-size:.85rem;
font-variant-numeric:tabular-nums;white-space:nowrap}th,td{padding:.15rem .5rem;text-align:right;border-bottom:1px
solid var(--line)}thead tr:first-child th{text-align:left;border-left:1px solid var(--line)}td:nth-child(3){
font-family:ui-monospace,monospace;text-align:left}tr.out td{color:var(--quiet);font-style:italic}
"""
