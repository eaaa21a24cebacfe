"use strict";
// The browser of answers. Text of models is only ever set as textContent.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  if (!at("list")) return;
  const PAGE = 40, SIGNED = {kl: "KL (nats)", value: "value", advantage: "advantage"};
  let shown = PAGE, rows = [], current = -1;

  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const option = (select, value, text) => {
    const node = make("option", "", text);
    node.value = value;
    select.append(node);
  };
  const has = (key) => data.prompts.some((p) => p.answers.some((a) => a && a[key] !== null && a[key] !== undefined));
  if (has("judge")) option(at("by"), "judge", "judge");
  if (has("score")) option(at("by"), "score", "reward");
  if (has("length")) option(at("by"), "length", "length");
  option(at("colour"), "", "none");
  for (const [key, text] of Object.entries(SIGNED)) if (has(key)) option(at("colour"), key, text);

  const place = (name, otherwise) => Math.max(data.policies.indexOf(name), 0) || otherwise;
  at("before").value = String(place("SFT", 0));
  const last = data.policies.length - 1;
  at("after").value = String(place("PPO", place("DPO", last)));

  const scales = {};
  for (const key of Object.keys(SIGNED)) {
    let most = 0;
    for (const p of data.prompts) for (const a of p.answers) for (const x of (a && a[key]) || []) {
      if (x !== null) most = Math.max(most, Math.abs(x));
    }
    scales[key] = most || 1;
  }

  const number = (x) => (x > 0 ? "+" : "") + x.toFixed(2);
  const gainOf = (p) => {
    const a = p.answers[+at("before").value], b = p.answers[+at("after").value], key = at("by").value;
    if (!a || !b || a[key] === null || b[key] === null || a[key] === undefined || b[key] === undefined) return null;
    return b[key] - a[key];
  };

  const answerNode = (answer, index, gain) => {
    const chosen = index === +at("before").value || index === +at("after").value;
    const node = make("div", chosen ? "answer chosen" : "answer");
    node.append(make("strong", "", data.policies[index]));
    const facts = [];
    if (typeof answer.judge === "number") facts.push("judge " + number(answer.judge));
    if (typeof answer.score === "number") facts.push("reward " + number(answer.score));
    if (typeof answer.length === "number") facts.push(answer.length + " tokens");
    if (answer.finished === false) facts.push("cut off");
    const line = make("p", "facts", facts.join(", "));
    if (index === +at("after").value && gain !== null && gain !== 0) {
      line.append(make("span", gain > 0 ? "up" : "down", "  " + number(gain)));
    }
    node.append(line);
    const key = at("colour").value, text = make("p", "tokens");
    if (key && answer.tokens && answer[key]) {
      answer.tokens.forEach((token, i) => {
        const span = make("span", "", token), x = answer[key][i];
        if (x !== null && x !== undefined) {
          const strength = (0.75 * Math.sqrt(Math.abs(x) / scales[key])).toFixed(3);
          span.style.background = x > 0 ? `rgba(0,150,90,${strength})` : `rgba(215,60,40,${strength})`;
          span.title = SIGNED[key] + " " + x.toFixed(3);
        }
        text.append(span);
      });
    } else {
      text.textContent = answer.text;
    }
    node.append(text);
    return node;
  };

  const promptNode = (row) => {
    const node = make("article");
    node.tabIndex = 0;
    node.append(make("h4", "", row.prompt.prompt));
    const answers = make("div", "answers");
    row.prompt.answers.forEach((answer, i) => { if (answer) answers.append(answerNode(answer, i, row.gain)); });
    node.append(answers);
    return node;
  };

  const matches = (row) => {
    const words = at("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = [row.prompt.prompt, ...row.prompt.answers.map((a) => (a ? a.text : ""))].join("\n").toLowerCase();
    if (!words.every((word) => text.includes(word))) return false;
    const filter = at("filter").value, after = row.prompt.answers[+at("after").value];
    if (filter === "endless") return Boolean(after) && after.finished === false;
    if (filter === "all") return true;
    if (row.gain === null) return false;
    return filter === "better" ? row.gain > 0 : filter === "worse" ? row.gain < 0 : row.gain === 0;
  };

  const draw = () => {
    rows = data.prompts.map((prompt, i) => ({prompt, i, gain: gainOf(prompt)})).filter(matches);
    const sign = {gain: -1, loss: 1}[at("order").value];
    if (sign) rows.sort((a, b) => (a.gain === null) - (b.gain === null) || sign * (a.gain - b.gain) || a.i - b.i);
    const list = at("list");
    list.replaceChildren(...rows.slice(0, shown).map(promptNode));
    const up = rows.filter((r) => r.gain > 0).length, down = rows.filter((r) => r.gain < 0).length;
    at("count").textContent = `${rows.length} prompts: ${up} gained, ${down} lost, by ${at("by").selectedOptions[0]
      ? at("by").selectedOptions[0].textContent : "nothing"}`;
    const key = at("colour").value;
    at("scale").textContent = key ? `Green is above 0, red below; the fullest colour is ±${scales[key].toFixed(2)}, `
      + `${SIGNED[key]}. Only some answers were kept token by token; point at a token for its number.` : "";
    at("more").hidden = rows.length <= shown;
    current = -1;
  };

  const go = (by) => {
    const all = at("list").children;
    if (by > 0 && current === all.length - 1 && rows.length > shown) {
      const was = current;
      shown += PAGE;
      draw();
      current = was;
    }
    current = Math.min(Math.max(current + by, 0), at("list").children.length - 1);
    if (current >= 0) at("list").children[current].focus();
  };
  const cycle = (select) => {
    select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
    redraw();
  };
  const redraw = () => { shown = PAGE; draw(); };
  for (const id of ["before", "after", "order", "filter", "by", "colour"]) at(id).addEventListener("change", redraw);
  at("search").addEventListener("input", redraw);
  at("more").addEventListener("click", () => { shown += PAGE; draw(); });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const actions = {j: () => go(1), k: () => go(-1), "/": () => at("search").focus(), s: () => cycle(at("order")),
      c: () => cycle(at("colour"))};
    if (actions[event.key]) {
      event.preventDefault();
      actions[event.key]();
    }
  });
  draw();
})();
