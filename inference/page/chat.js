// The chat page: one conversation, one or two models. What models say is only ever put in as text, never as markup.

const $ = (id) => document.getElementById(id);
const SAMPLING = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const PLACES = ["left", "right"];
const KEPT = "dschat-conversation";

let info = { models: [], sampling: {}, system: "", reward: false };
let turns = []; // {message, id, names, blind, vote, answers: [{text, done, error}]}
let editing = null; // the number of the turn whose message is being edited
let running = null; // AbortController of the answers that come

// --- the server

function token() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem("dschat-token", given);
    history.replaceState(null, "", location.pathname);
  }
  return sessionStorage.getItem("dschat-token");
}

async function ask(path, body, signal) {
  const headers = token() ? { Authorization: `Bearer ${token()}` } : {};
  const options = { headers, signal };
  if (body) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  const answer = await fetch(path, options);
  if (answer.status === 401 && !signal?.aborted) {
    await askForToken();
    return ask(path, body, signal);
  }
  if (!answer.ok) {
    const found = await answer.json().catch(() => null);
    throw new Error(found?.error?.message ?? `the server answered ${answer.status}`);
  }
  return answer;
}

function askForToken() {
  return new Promise((resolve) => {
    const dialog = $("ask-token");
    dialog.onclose = () => {
      sessionStorage.setItem("dschat-token", $("token").value.trim());
      resolve();
    };
    if (!dialog.open) dialog.showModal();
  });
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part.replace(/^data: /, ""));
  }
}

// --- the conversation

const keptSide = (turn) => (turn.vote === "right" ? 1 : 0);

function messagesBefore(number) {
  const system = $("system").value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns.slice(0, number)) {
    const text = turn.answers[keptSide(turn)]?.text;
    if (!text) continue;
    messages.push({ role: "user", content: turn.message }, { role: "assistant", content: text });
  }
  return messages;
}

function settings() {
  const found = {};
  for (const name of SAMPLING) if ($(name).value !== "") found[name] = Number($(name).value);
  return found;
}

function chosenModels() {
  return [$("left").value, $("right").value].filter((name) => name);
}

async function send(message, number) {
  turns = turns.slice(0, number);
  const names = chosenModels();
  const blind = $("blind").checked && names.length === 2;
  const turn = { message, id: null, names: blind ? null : names, blind, vote: null, answers: names.map(() => ({ text: "" })) };
  turns.push(turn);
  editing = null;
  const view = showAll();
  say("");
  running = new AbortController();
  busy(true);
  try {
    const messages = [...messagesBefore(number), { role: "user", content: message }];
    const body = { models: names, blind, messages, ...settings() };
    const answer = await ask("/api/compare", body, running.signal);
    for await (const found of events(answer)) take(turn, found, view);
  } catch (error) {
    if (error.name === "AbortError") say("stopped");
    else turn.error = error.message;
  }
  running = null;
  busy(false);
  for (const one of turn.answers) {
    one.done ??= { stopped: true };
    delete one.painting;
  }
  keep();
  showAll();
}

function take(turn, found, view) {
  if (found.error) throw new Error(found.error);
  if (found.id) {
    turn.id = found.id;
    turn.names = found.models ?? turn.names;
    if (found.num_dropped) say(`oldest turns left out because the context is full: ${found.num_dropped}`);
  } else if (found.text !== undefined) {
    turn.answers[found.side].text += found.text;
    paint(view.querySelectorAll(".text")[found.side], turn.answers[found.side]);
  } else if (found.done) {
    turn.answers[found.side].done = found.done;
    view.querySelectorAll(".answer")[found.side].classList.remove("running");
  } else if (found.end) turn.whole = true;
}

async function vote(turn, choice) {
  try {
    const found = await (await ask("/api/vote", { id: turn.id, vote: choice })).json();
    turn.vote = choice;
    turn.names = found.models;
    turn.answers.forEach((one, side) => (one.done.score = found.scores[side]));
    say(`stored: ${found.stored} votes in ${info.votes}`);
  } catch (error) {
    say(error.message);
  }
  keep();
  showAll();
}

function keep() {
  const chosen = { left: $("left").value, right: $("right").value, blind: $("blind").checked, system: $("system").value };
  for (const name of SAMPLING) chosen[name] = $(name).value;
  try {
    localStorage.setItem(KEPT, JSON.stringify({ models: info.models, turns, chosen }));
  } catch {
    say("this browser keeps nothing: the conversation ends with the page");
  }
}

function recall() {
  let kept = null;
  try {
    kept = JSON.parse(localStorage.getItem(KEPT));
  } catch {
    return;
  }
  if (!kept || JSON.stringify(kept.models) !== JSON.stringify(info.models)) return;
  turns = kept.turns;
  for (const [name, value] of Object.entries(kept.chosen)) {
    if (name === "blind") $(name).checked = value;
    else $(name).value = value;
  }
}

// --- what is seen

function make(tag, options = {}, ...children) {
  const { on, ...rest } = options;
  const element = Object.assign(document.createElement(tag), rest);
  if (on) element.addEventListener("click", on);
  element.append(...children);
  return element;
}

const say = (text) => ($("status").textContent = text);

function follow() {
  const main = $("turns");
  if (main.scrollHeight - main.scrollTop - main.clientHeight < 160) main.scrollTop = main.scrollHeight;
}

// Once a frame at most, however fast the tokens come.
function paint(place, one) {
  if (one.painting) return;
  one.painting = requestAnimationFrame(() => {
    delete one.painting;
    if (place.isConnected) place.append(one.text.slice(place.textContent.length));
    follow();
  });
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  for (const button of document.querySelectorAll(".quiet")) button.disabled = yes;
}

function showAll() {
  $("turns").replaceChildren(...turns.map(showTurn));
  $("turns").scrollTop = $("turns").scrollHeight;
  return $("turns").lastElementChild;
}

function showTurn(turn, number) {
  const edit = make("button", { className: "small quiet", textContent: "Edit", title: "change this message and go on from here", on: () => startEditing(number) });
  const mine = make("div", { className: "mine" }, edit, make("p", { textContent: turn.message }));
  const answers = make("div", { className: "answers" }, ...turn.answers.map((one, side) => showAnswer(turn, one, side)));
  const parts = [mine, answers];
  if (turn.error) parts.push(make("p", { className: "error", textContent: turn.error }));
  const row = make("div", { className: "votes" });
  if (turn.whole && turn.answers.length === 2) {
    if (turn.vote) row.append(make("span", { textContent: turn.vote === "tie" ? "Voted: a tie" : `Voted: ${turn.vote} is better` }));
    else {
      const labels = { left: "Left is better", tie: "A tie", right: "Right is better" };
      for (const [choice, label] of Object.entries(labels))
        row.append(make("button", { className: "quiet", textContent: label, on: () => vote(turn, choice) }));
    }
  }
  if (number === turns.length - 1 && turn.answers.every((one) => one.done))
    row.append(make("button", { className: "quiet", textContent: "Again", title: "another answer", on: () => send(turn.message, number) }));
  return make("section", { className: "turn" }, ...parts, row);
}

function showAnswer(turn, one, side) {
  const name = turn.names?.[side] ?? `hidden until the vote (${PLACES[side]})`;
  const foot = make("div", { className: "foot" });
  if (one.done) {
    if (one.done.score != null) foot.append(make("span", { className: "score", textContent: `reward ${signed(one.done.score)}` }));
    if (one.done.num_tokens) foot.append(`${one.done.num_tokens} tokens`);
    if (one.done.stopped) foot.append("stopped");
    else if (!one.done.finished) foot.append("cut off; Settings allow longer answers");
    foot.append(make("button", { className: "small", textContent: "Copy", on: (event) => copy(one.text, event.target) }));
    if (turn.whole && turn.id && turn.names)
      foot.append(make("button", { className: "small", textContent: "Token by token", on: () => numbers(turn, side, card) }));
  }
  const best = turn.vote && turn.vote !== "tie" && turn.vote === PLACES[side];
  const card = make(
    "article",
    { className: `answer${one.done ? "" : " running"}${best ? " best" : ""}` },
    make("div", { className: "name", textContent: name }),
    make("div", { className: "text", textContent: one.text }),
    foot,
  );
  return card;
}

const signed = (number) => (number < 0 ? "−" : "+") + Math.abs(number).toFixed(2);

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy"); // without https the clipboard above does not exist
    area.remove();
  }
  button.textContent = "Copied";
}

async function numbers(turn, side, card) {
  const old = card.querySelector(".numbers");
  if (old) return old.remove();
  try {
    const found = await (await ask("/api/tokens", { id: turn.id, side })).json();
    card.append(showNumbers(found));
  } catch (error) {
    say(error.message);
  }
}

function showNumbers(found) {
  const kinds = { logprobs: "log-probability (nats)" };
  if (found.kl) kinds.kl = `KL to ${found.other} (nats)`;
  if (found.values) kinds.values = "reward up to this token";
  const select = make("select", { ariaLabel: "what to show" });
  for (const [kind, label] of Object.entries(kinds)) select.append(make("option", { value: kind, textContent: label }));
  const place = make("div", { className: "tokens" });
  const show = () => {
    const values = found[select.value];
    const largest = Math.max(...values.map(Math.abs), 1e-9);
    place.replaceChildren(
      ...found.texts.map((text, number) => {
        const value = values[number];
        const all = Object.keys(kinds).map((kind) => `${kinds[kind]}: ${found[kind][number].toFixed(3)}`);
        const span = make("span", { className: "token", textContent: text, title: all.join("\n") });
        span.style.setProperty("--share", Math.abs(value) / largest);
        span.style.setProperty("--tone", select.value === "values" && value > 0 ? "var(--good)" : "var(--bad)");
        return span;
      }),
    );
    const total = values.reduce((sum, value) => sum + value, 0);
    if (select.value !== "values") place.append(`  (sum ${total.toFixed(2)})`);
  };
  select.addEventListener("change", show);
  show();
  return make("div", { className: "numbers" }, select, place);
}

function startEditing(number) {
  editing = number;
  $("message").value = turns[number].message;
  $("message").focus();
  say("sending goes on from that message; what came after it is dropped");
}

function newChat() {
  running?.abort();
  turns = [];
  editing = null;
  say("");
  keep();
  showAll();
}

// --- the beginning

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const message = $("message").value.trim();
    if (!message || running) return;
    $("message").value = "";
    send(message, editing ?? turns.length);
  });
  $("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("composer").requestSubmit();
    } else if (event.key === "Escape") running?.abort();
  });
  $("message").addEventListener("input", (event) => {
    event.target.style.height = "auto";
    event.target.style.height = `${event.target.scrollHeight + 2}px`;
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("new").addEventListener("click", newChat);
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("settings-button").addEventListener("click", (event) => {
    $("settings").hidden = !$("settings").hidden;
    event.target.setAttribute("aria-expanded", String(!$("settings").hidden));
  });
  for (const id of ["left", "right", "blind", "system", ...SAMPLING]) $(id).addEventListener("change", keep);
}

async function start() {
  listen();
  info = await (await ask("/api/info")).json();
  for (const name of info.models) $("left").append(make("option", { value: name, textContent: name }));
  $("right").append(make("option", { value: "", textContent: "nobody" }));
  for (const name of info.models) $("right").append(make("option", { value: name, textContent: name }));
  if (info.models.length > 1) $("right").value = info.models[1];
  $("temperature").value = info.sampling.temperature;
  $("top_p").value = info.sampling.top_p;
  $("top_k").value = info.sampling.top_k;
  $("max_tokens").value = info.sampling.max_new_tokens;
  $("system").value = info.system;
  recall();
  showAll();
  document.body.dataset.ready = "yes";
}

start().catch((error) => say(error.message));
