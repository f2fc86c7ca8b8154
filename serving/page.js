// The form: reads a request from it, has it ranked and explained.

import { Problem, ask, integer } from "./page_service.js";
import {
  chosen,
  count,
  element,
  find,
  learnTitles,
  say,
  showAll,
  showAnswer,
  showCandidates,
  showNothing,
  showReasons,
} from "./page_view.js";

let inputs = null; // features that the ranker reads, once they are known
let examples = [];
let current = null; // the chosen example's request
let asking = null; // aborts the request under way
const features = new Map(); // product id as text -> its features, by name

const key = () => find("key").value.trim();
const words = (id) => find(id).value.split(/[\s,;]+/).filter(Boolean);

// ---- examples

async function loadExamples() {
  const found = await ask("v1/examples", { key: key() });
  inputs = found.inputs;
  examples = found.examples;
  for (const { request, titles } of examples.toReversed()) {
    learnTitles(request.candidates.product_id, titles);
    learnFeatures(request.candidates);
  }
  const queries = new Set(examples.map(({ request }) => request.query));
  find("queries").replaceChildren(...[...queries].map((value) => element("option", { value })));
  const options = examples.map(({ name, request }, value) => {
    const number = count(request.candidates.product_id.length, "candidate");
    return element("option", { value }, `${name}: ${request.query || "(empty)"}, ${number}`);
  });
  find("example").replaceChildren(element("option", { value: "" }, "None"), ...options);
  find("example-row").hidden = examples.length === 0;
  showContext({});
  const untouched = !find("query").value && !find("candidates").value;
  if (examples.length && untouched) useExample(0);
  else noteCandidates();
}

function learnFeatures({ product_id: ids, features: columns }) {
  ids.forEach((id, place) => {
    const named = Object.entries(columns ?? {}).map(([name, values]) => [name, values?.[place]]);
    features.set(String(id), Object.fromEntries(named));
  });
}

function useExample(place) {
  const request = (current = examples[place].request);
  find("example").value = place;
  find("query").value = request.query;
  find("user").value = request.user_id ?? "";
  const ages = request.history_age_days;
  const bought = (request.history ?? []).map((id, i) => (ages ? `${id}:${ages[i]}` : `${id}`));
  find("history").value = bought.join(" ");
  find("candidates").value = request.candidates.product_id.join(" ");
  learnFeatures(request.candidates);
  showContext(request.features ?? {});
  noteCandidates();
}

function useQuery(query) {
  if (current?.query === query) return;
  const place = examples.findIndex(({ request }) => request.query === query);
  if (place < 0) return;
  const user = find("user").value;
  const isTyped = user !== String(current?.user_id ?? "");
  useExample(place);
  if (isTyped) find("user").value = user;
}

function showContext(values) {
  const fields = inputs.request.map(({ name, type }) => {
    const field = element("input", { value: values[name] ?? "", placeholder: "missing" });
    field.autocomplete = "off";
    field.dataset.feature = name;
    field.dataset.type = type;
    return element("label", {}, name.replaceAll("_", " "), field);
  });
  find("features").replaceChildren(...fields);
  find("context").hidden = fields.length === 0;
}

function noteCandidates() {
  const ids = words("candidates");
  const unknown = inputs?.candidate.length ? ids.filter((id) => !features.has(id)).length : 0;
  const rest = unknown ? `, ${unknown} of them without known features` : "";
  find("candidates-hint").textContent = `${count(ids.length, "product id")}${rest}.`;
}

// ---- from the form to a request

function readRequest() {
  const request = { query: find("query").value };
  const user = find("user").value.trim();
  if (user) request.user_id = readInteger(user, "user", "User id");
  if (chosen("source") === "listed") Object.assign(request, readHistory());
  else if (!user) throw new Problem("Type the user id whose purchases are to be looked up.", "user");
  request.features = readContext();
  const ids = words("candidates").map((id) => readInteger(id, "candidates", "Candidates"));
  const columns = inputs.candidate.map(({ name }) => [
    name,
    ids.map((id) => features.get(String(id))?.[name] ?? null),
  ]);
  request.candidates = { product_id: ids, features: Object.fromEntries(columns) };
  return request;
}

function readHistory() {
  const parts = words("history").map((text) => text.match(/^([^:]*)(?::(.*))?$/).slice(1));
  const read = (text) => readInteger(text, "history", "Purchase history");
  const aged = parts.filter(([, days]) => days !== undefined).length;
  if (aged && aged < parts.length) {
    throw new Problem("Purchase history: give days for all purchases or for none.", "history");
  }
  const history = parts.map(([id]) => read(id));
  return aged ? { history, history_age_days: parts.map(([, days]) => read(days)) } : { history };
}

function readContext() {
  const read = [...find("features").querySelectorAll("input")].map(({ value, dataset }) => {
    const text = value.trim();
    if (text === "") return [dataset.feature, null];
    if (dataset.type === "string") return [dataset.feature, text];
    const number = dataset.type === "int64" ? integer(text) : Number(text);
    // What is no number goes to the service as it stands, which says what it expects.
    return [dataset.feature, number === null || Number.isNaN(number) ? text : number];
  });
  return Object.fromEntries(read);
}

function readInteger(text, field, name) {
  const value = integer(text);
  if (value === null) throw new Problem(`${name}: “${text}” is not a whole number.`, field);
  return value;
}

// ---- ranking

async function rank() {
  asking?.abort();
  const { signal } = (asking = new AbortController());
  clearProblem();
  try {
    if (!inputs) await loadExamples();
    const request = readRequest();
    say("Ranking …");
    const started = performance.now();
    const answer = await ask("v1/rank", { body: request, key: key(), signal });
    showAnswer(request, answer, performance.now() - started);
    showReasons(await reasons(request, signal));
  } catch (error) {
    if (error.name !== "AbortError") showProblem(error);
  }
}

async function reasons(request, signal) {
  try {
    return await ask("v1/explain", { body: request, key: key(), signal });
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    return { problem: error.message }; // the ranking stays
  }
}

function clearProblem() {
  find("problem").hidden = true;
  for (const field of document.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
  }
}

function showProblem(error) {
  const isOurs = !(error instanceof Problem);
  if (isOurs) console.error(error);
  showNothing();
  say("");
  find("problem").textContent = isOurs ? "This page met a problem of its own." : error.message;
  find("problem").hidden = false;
  if (error.field === "key") find("key-row").hidden = false;
  if (error.field) {
    find(error.field).setAttribute("aria-invalid", "true");
    find(error.field).focus();
  }
  find("problem").scrollIntoView({ block: "nearest" });
}

// ---- events

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  rank();
});
find("example").addEventListener("change", ({ target }) => {
  if (target.value !== "") useExample(Number(target.value));
});
find("query").addEventListener("change", ({ target }) => useQuery(target.value));
find("candidates").addEventListener("input", noteCandidates);
find("more").addEventListener("click", showAll);
for (const choice of document.querySelectorAll("input[name=measure]")) {
  choice.addEventListener("change", showCandidates);
}
for (const choice of document.querySelectorAll("input[name=source]")) {
  choice.addEventListener("change", () => {
    find("history-row").hidden = chosen("source") === "store";
  });
}
loadExamples().catch(showProblem);
