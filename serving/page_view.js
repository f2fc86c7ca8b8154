// What is shown of an answer: the history, the ranked candidates and their reasons.
// Every text from outside goes through textContent, so none of it is ever markup.

const AT_FIRST = 25; // candidates shown before "Show all"
const REASONS_AT_FIRST = 8;
const LEAST = 0.005; // reasons below this are not drawn

const titles = new Map(); // product id as text -> title
let shown = null; // { request, answer, explanation, all }

// ---- small things that the form uses too

export const find = (id) => document.getElementById(id);
export const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;
export const count = (number, noun) =>
  `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
const plain = (name) => name.replaceAll("_", " ");
const signed = (amount) => `${amount > 0 ? "+" : "−"}${Math.abs(amount).toFixed(2)}`;
const nameOf = (id) => titles.get(String(id)) ?? `product ${id}`;

export function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function say(text) {
  find("status").textContent = text;
}

// ---- what the form tells

export function learnTitles(ids, names) {
  ids.forEach((id, place) => {
    if (names?.[place]) titles.set(String(id), names[place]);
  });
}

// Shows an answer; its reasons are still to come.
export function showAnswer(request, answer, milliseconds) {
  shown = { request, answer, explanation: null, all: false };
  const number = answer.order.length;
  const bucket = answer.bucket ? `, bucket ${answer.bucket}` : "";
  const by = `model ${answer.model.slice(0, 12)}${bucket}`;
  const took = `${milliseconds < 10 ? milliseconds.toFixed(1) : Math.round(milliseconds)} ms`;
  if (number === 0) say(`No candidates, so nothing to rank: give product ids. Answered by ${by}.`);
  else say(`${count(number, "candidate")} in ${took} there and back, by ${by}.`);
  find("result").hidden = false;
  showHistory();
  showCandidates();
  find("status").scrollIntoView({ block: "nearest" });
}

// Shows the reasons of the answer on the page, or the problem with them.
export function showReasons(explanation) {
  const replaced = explanation.model && explanation.model !== shown.answer.model;
  shown.explanation = replaced
    ? { problem: "the ranker was replaced meanwhile; rank again." }
    : explanation;
  showHistory();
  showCandidates();
}

export function showNothing() {
  shown = null;
  find("result").hidden = true;
}

export function showAll() {
  shown.all = true;
  showCandidates();
}

// ---- the history

function showHistory() {
  const { request, explanation } = shown;
  const listed = request.history !== undefined;
  const found = explanation?.history;
  const ids = listed ? request.history : (found?.product_ids ?? []);
  const ages = (listed ? request.history_age_days : found?.age_days) ?? [];
  find("bought-title").textContent = historyTitle(listed, ids.length);
  find("bought-list").replaceChildren(
    ...ids.map((id, place) => element("li", {}, nameOf(id) + ageText(ages[place]))),
  );
  find("bought").classList.toggle("empty", ids.length === 0);
}

function historyTitle(listed, number) {
  const { request, explanation } = shown;
  if (listed) return number ? `History: ${count(number, "purchase")}, as listed` : "No history";
  if (explanation?.problem) return "History: not known here";
  if (!explanation) return "History: being looked up …";
  if (explanation.history.age_days === null) return "No history: this service looks none up";
  if (number) return `History: ${count(number, "purchase")} of user ${request.user_id}`;
  return `No purchases of user ${request.user_id} are known in the days that count`;
}

function ageText(days) {
  if (days === undefined || days === null) return "";
  return days === 0 ? ", in the last 24 hours" : `, ${count(days, "day")} ago`;
}

// ---- the candidates

export function showCandidates() {
  if (!shown) return;
  const { answer, explanation, all } = shown;
  const list = find("ranked");
  const open = [...list.querySelectorAll("li > details[open]")].map(({ dataset }) => dataset.place);
  const focused = document.activeElement?.closest?.("li > details")?.dataset.place;
  const order = all ? answer.order : answer.order.slice(0, AT_FIRST);
  const largest = Math.max(Number.MIN_VALUE, ...order.map((i) => answer.probabilities[i]));
  const items = order.map((place, rank) => {
    const item = candidateItem(place, rank + 1, answer.probabilities[place] / largest);
    item.firstChild.open = explanation ? open.includes(String(place)) : rank === 0;
    return item;
  });
  list.replaceChildren(...items);
  list.querySelector(`details[data-place="${focused}"] > summary`)?.focus();
  find("more").hidden = order.length === answer.order.length;
  find("more").textContent = `Show all ${answer.order.length}`;
  find("head").hidden = find("reading").hidden = order.length === 0;
  find("reading").textContent = readingText();
}

function readingText() {
  if (shown.explanation?.problem) return `No reasons: ${shown.explanation.problem}`;
  const among = chosen("measure") === "over_mean";
  const than = among ? ", compared with the mean of the candidates" : "";
  return (
    "Open a candidate for its reasons: what each piece of information adds to the log odds of a " +
    `click (right) or takes from them (left)${than}. They do not sum to the score.`
  );
}

function candidateItem(place, rank, size) {
  const id = shown.request.candidates.product_id[place];
  const probability = shown.answer.probabilities[place];
  const reasons = reasonsOf(place);
  const bar = element("span", { ariaHidden: "true" });
  bar.style.setProperty("--size", `${100 * size}%`);
  const summary = element(
    "summary",
    {},
    element("span", { className: "rank" }, `${rank}`),
    element("span", { className: "title" }, nameOf(id)),
    element("span", { className: "why soft" }, whyText(id, reasons)),
    element("span", { className: "share" }, percent(probability), bar),
    element("span", { className: "mark", ariaHidden: "true" }),
  );
  const details = element("details", {}, summary, reasonList(reasons));
  details.dataset.place = place;
  const item = element("li", {}, details);
  item.dataset.product = id;
  item.dataset.probability = probability;
  return item;
}

function percent(share) {
  const digits = { minimumSignificantDigits: 3, maximumSignificantDigits: 3 };
  return share.toLocaleString("en", { style: "percent", ...digits });
}

// ---- the reasons

// Returns the reasons of a candidate, largest first; null while or where there are none.
function reasonsOf(place) {
  const found = shown.explanation;
  if (!found || found.problem) return null;
  const amounts = found[chosen("measure")][place];
  return found.groups
    .map((name, g) => ({ name, value: found.values[place][g], amount: amounts[g] }))
    .sort((a, b) => Math.abs(b.amount) - Math.abs(a.amount));
}

function whyText(id, reasons) {
  const told = (reasons ?? []).slice(0, 2).filter(({ amount }) => Math.abs(amount) >= LEAST);
  const parts = told.map(({ name, amount }) => `${amount > 0 ? "+" : "−"} ${plain(name)}`);
  if (titles.has(String(id))) parts.unshift(`product ${id}`);
  return parts.join(" · ");
}

function reasonList(reasons) {
  const box = element("div", { className: "reasons" });
  if (reasons === null) {
    const text = shown.explanation ? "No reasons are known." : "Reasons are being worked out …";
    box.append(element("p", { className: "soft" }, text));
    return box;
  }
  const told = reasons.filter(({ amount }) => Math.abs(amount) >= LEAST);
  const most = told.length ? Math.abs(told[0].amount) : 1;
  const items = told.map((reason) => reasonItem(reason, most));
  box.append(element("ul", {}, ...items.slice(0, REASONS_AT_FIRST)));
  const smaller = items.slice(REASONS_AT_FIRST);
  if (smaller.length) {
    const summary = element("summary", {}, `${smaller.length} smaller`);
    box.append(element("details", { className: "smaller" }, summary, element("ul", {}, ...smaller)));
  }
  if (told.length < reasons.length) {
    const names = reasons.slice(told.length).map(({ name }) => plain(name));
    const lead = told.length ? "Next to nothing" : "Nothing counts here";
    box.append(element("p", { className: "soft" }, `${lead}: ${names.join(", ")}`));
  }
  return box;
}

function reasonItem({ name, value, amount }, most) {
  const bar = element("span", { className: "bar", ariaHidden: "true" });
  bar.style.setProperty("--size", `${(50 * Math.abs(amount)) / most}%`);
  return element(
    "li",
    { className: amount > 0 ? "for" : "against" },
    element("span", { className: "name" }, describe(name, value)),
    bar,
    element("span", { className: "amount" }, signed(amount)),
  );
}

function describe(name, value) {
  if (name === "purchase history") return `${name}: ${count(value, "purchase")}`;
  if (name.endsWith(" embedding")) return name;
  if (value === null || value === undefined) return `${plain(name)}: missing`;
  const isFraction = typeof value === "number" && !Number.isInteger(value);
  return `${plain(name)}: ${isFraction ? Number(value.toPrecision(4)) : value}`;
}
