// Asking the service: JSON whose integers keep all 64 bits, and what went wrong in words.

function readJson(text) {
  return JSON.parse(text, (_, value, source) => {
    const isLong = typeof value === "number" && !Number.isSafeInteger(value);
    return isLong && /^-?\d+$/.test(source?.source ?? "") ? BigInt(source.source) : value;
  });
}

function writeJson(value) {
  return JSON.stringify(value, (_, item) => {
    if (typeof item !== "bigint") return item;
    return JSON.rawJSON ? JSON.rawJSON(String(item)) : Number(item);
  });
}

// The whole number that a text is, or null.
export function integer(text) {
  if (!/^-?\d+$/.test(text)) return null;
  return Number.isSafeInteger(Number(text)) ? Number(text) : BigInt(text);
}

// What a person can mend: a message, and the field it is about.
export class Problem extends Error {
  constructor(message, field = null) {
    super(message);
    this.field = field;
  }
}

// Returns the service's answer: to a GET, or to a POST where there is a body.
export async function ask(path, { body, key, signal } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let answer, text;
  try {
    const method = body ? "POST" : "GET";
    answer = await fetch(path, { method, headers, signal, body: body && writeJson(body) });
    text = await answer.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The service cannot be reached. Is it running?");
  }
  let found = null;
  try {
    found = readJson(text);
  } catch {
    if (answer.ok) throw new Problem("The service's answer could not be read.");
  }
  if (answer.ok) return found;
  throw refusal(answer, found?.error?.message, key);
}

function refusal(answer, message, key) {
  if (answer.status === 401) {
    return new Problem(key ? "The API key is not the right one." : "Type the API key first.", "key");
  }
  const seconds = answer.headers.get("Retry-After");
  const again = seconds ? ` Try again in ${seconds} s.` : "";
  return new Problem((message || `The service answered ${answer.status}.`) + again);
}
