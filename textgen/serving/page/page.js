// Streams one text for each temperature from the completions API, and shows the alternatives of each token. The text goes
// on from an alternative that the reader chooses. Text enters the page as textContent only, never as HTML.

const $ = (id) => document.getElementById(id);
const NUM_ALTERNATIVES = 5;
const BYTE = /^\\x[0-9a-f]{2}$/; // a token that is a part of a character, which no request can send as text
const texts = []; // in the order of the page
const active = new Map(); // the AbortController of each text, and of the scores of the prompt, in progress
let stopped = false; // by the reader
let pinned = null; // the token whose alternatives are a menu

// One temperature: its slider, its text, and the stream that fills it.
class Text {
  constructor(temperature) {
    this.section = $("text").content.cloneNode(true).querySelector("section");
    this.slider = this.section.querySelector(".temperature");
    this.slider.value = temperature;
    this.output = this.section.querySelector(".text");
    this.section.querySelector(".copy").onclick = (event) => this.copy(event.target);
    this.section.querySelector(".less").onclick = () => this.remove();
    this.clear("");
    $("texts").append(this.section);
    show(this.slider);
    texts.push(this);
  }

  remove() {
    active.get(this)?.abort();
    texts.splice(texts.indexOf(this), 1);
    this.section.remove();
    document.querySelectorAll(".less").forEach((button) => (button.disabled = texts.length === 1));
  }

  clear(prompt) {
    this.characters = [...prompt]; // an array: offsets count code points, JavaScript's strings 16-bit units
    this.base = this.characters.length; // characters before those of the stream
    this.tokens = [];
    hideAlternatives();
    this.head = document.createElement("span"); // the prompt, until its tokens are known
    this.head.className = "prompt";
    this.head.textContent = prompt;
    this.output.replaceChildren(this.head);
  }

  // Return the tokens of `logprobs` as elements; offsets are counted from `base`.
  makeTokens(logprobs, base, className) {
    return logprobs.tokens.map((name, i) => {
      const span = document.createElement("span");
      span.className = className;
      span.tabIndex = -1; // one tab stop; arrow keys move between tokens
      const token = {
        span, name, offset: base + logprobs.text_offset[i], logprob: logprobs.token_logprobs[i],
        top: logprobs.top_logprobs[i] ?? {}, rank: logprobs.token_ranks?.[i],
      };
      span.onmouseenter = span.onfocus = () => pinned || showAlternatives(token);
      span.onmouseleave = span.onblur = () => pinned || hideAlternatives();
      span.onclick = () => pinAlternatives(this, token);
      return token;
    });
  }

  // Show the characters of tokens from number `first` on. A token ends where the next one begins.
  fill(first) {
    for (let i = first; i < this.tokens.length; i++) {
      const end = this.tokens[i + 1]?.offset ?? this.characters.length;
      this.tokens[i].span.textContent = this.characters.slice(this.tokens[i].offset, end).join("");
    }
  }

  // Replace the prompt by its tokens, in the normalized text that the model reads.
  showPrompt({ text, logprobs }) {
    const given = [...text], longer = given.length - [...this.head.textContent].length;
    this.characters.splice(0, given.length - longer, ...given);
    this.base += longer;
    this.tokens.forEach((token) => (token.offset += longer));
    const tokens = this.makeTokens(logprobs, 0, "token prompt").slice(1); // without </s>, which has no characters
    this.head.replaceWith(...tokens.map(({ span }) => span));
    this.tokens.unshift(...tokens);
    this.fill(0);
  }

  // Add the text and tokens of an event. The last token of the previous event may grow, and a token that holds only a
  // part of a character is empty.
  add({ text, logprobs }) {
    const first = Math.max(this.tokens.length - 1, 0);
    this.characters.push(...text);
    const tokens = this.makeTokens(logprobs, this.base, "token");
    this.output.append(...tokens.map(({ span }) => span));
    this.tokens.push(...tokens);
    this.fill(first);
    if (!this.output.querySelector("[tabindex='0']") && tokens.length) setTabStop(tokens[0].span);
  }

  // Go on from another token at the place of `token`; what follows it is removed.
  replace(token, name) {
    active.get(this)?.abort();
    const place = this.tokens.indexOf(token);
    this.tokens.splice(place).forEach(({ span }) => span.remove());
    this.characters.length = token.offset;
    const logprobs = {
      tokens: [name], text_offset: [token.offset], token_logprobs: [token.top[name]], top_logprobs: [token.top],
    };
    const [chosen] = this.makeTokens(logprobs, 0, "token chosen");
    this.characters.push(...name);
    this.tokens.push(chosen);
    this.output.append(chosen.span);
    this.fill(Math.max(place - 1, 0));
    setTabStop(chosen.span);
    chosen.span.focus();
    if (name !== "") start(this, (signal) => this.generate({ ...sharedBody(), prompt: this.characters.join("") }, signal));
    else report("done"); // the end of the text
  }

  async copy(button) {
    try {
      await navigator.clipboard.writeText(this.characters.join(""));
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(this.output); // browsers allow no clipboard without TLS, except on localhost
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }

  // Stream a completion of `body.prompt`, which the text shows, until its end or until `signal` aborts it.
  async generate(body, signal) {
    this.base = this.characters.length;
    const response = await request("v1/completions", {
      method: "POST", signal, body: JSON.stringify({ ...body, temperature: Number(this.slider.value) }),
    });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ; ) { // a chunk may end within an event: `rest` is its beginning
      const { value, done } = await reader.read();
      if (done) throw new Error("the response ended early");
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.slice("data: ".length);
        if (data === "[DONE]") return;
        const { error, choices } = JSON.parse(data);
        if (error) throw new Error(error.message);
        choices.forEach((choice) => this.add(choice));
      }
    }
  }
}

// Return the response of a request that succeeds. If it fails, throw an Error with the message for the reader.
async function request(path, options = {}) {
  const headers = { "content-type": "application/json" };
  if ($("token").value) headers.authorization = `Bearer ${$("token").value}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("the server cannot be reached");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    $("token_label").hidden = false;
    $("token").focus();
  }
  const failure = await response.json().catch(() => null);
  throw new Error(failure?.error?.message ?? `the server responded with status ${response.status}`);
}

// Return the settings that all texts share, as the body of a request.
function sharedBody() {
  const body = {
    prompt: $("prompt").value, stream: true, logprobs: NUM_ALTERNATIVES, seed: $("seed").valueAsNumber,
  };
  for (const name of ["top_k", "top_p", "min_p", "max_tokens"])
    if ($(name).value !== $(name).dataset.off) body[name] = Number($(name).value);
  if ($("label").value) body.label = $("label").value;
  return body;
}

// Show the model's name, its limit of tokens, and its labels if it has some.
async function describeModel() {
  const { data: [model] } = await (await request("v1/models")).json();
  $("model").textContent = model.id;
  $("max_tokens").max = model.max_tokens;
  show($("max_tokens"));
  $("label").append(...model.labels.map((label) => new Option(label, label)));
  $("label_label").hidden = model.labels.length === 0;
}

// Run a request for a text, or for the scores of the prompt; an earlier one for the same is aborted.
async function start(key, run) {
  active.get(key)?.abort();
  const own = new AbortController();
  if (!active.size) {
    fail(null);
    stopped = false;
  }
  active.set(key, own);
  report("generating");
  try {
    await run(own.signal);
  } catch (error) {
    if (error.name !== "AbortError") fail(error.message);
  }
  if (active.get(key) !== own) return; // another one has started meanwhile
  active.delete(key);
  if (!active.size) report(stopped ? "stopped" : "done");
}

// Show the state of the requests.
function report(state) {
  $("stop").disabled = !active.size;
  $("status").textContent = active.size ? "generating" : $("error").hidden ? state : "";
}

// Stop all requests.
function stop() {
  stopped = true;
  active.forEach((controller) => controller.abort());
}

// Generate all texts.
function generate() {
  stop();
  active.clear();
  if (!$("model").textContent) describeModel().catch(() => {}); // a token was missing before
  const body = sharedBody();
  texts.forEach((text) => {
    text.clear(body.prompt);
    start(text, (signal) => text.generate(body, signal));
  });
  if (body.prompt) start("prompt", (signal) => scorePrompt(body, signal));
}

// Show the tokens of the prompt in all texts.
async function scorePrompt({ prompt, label }, signal) {
  const heads = texts.map(({ head }) => head);
  // </s> before the first token of the prompt gives it a probability too.
  const body = { prompt: `</s>${prompt}`, label, echo: true, max_tokens: 0, logprobs: NUM_ALTERNATIVES };
  const response = await request("v1/completions", { method: "POST", signal, body: JSON.stringify(body) });
  const { choices: [choice] } = await response.json();
  texts.filter(({ head }) => heads.includes(head)).forEach((text) => text.showPrompt(choice));
}

// Show an error; null hides it.
function fail(message) {
  $("error").hidden = message === null;
  $("error").textContent = message ?? "";
}

// Show the probabilities of a token and of its alternatives, the most likely first, below the token or above it; as a
// menu if `choose` is given.
function showAlternatives({ span, name, logprob, top, rank }, choose) {
  // The drawn token is an entry of `top` beyond the most likely ones if it is none of them.
  const sorted = Object.entries(top).sort((a, b) => b[1] - a[1]);
  const place = sorted.findIndex(([other]) => other === name);
  rank ??= place < NUM_ALTERNATIVES ? place + 1 : `above ${NUM_ALTERNATIVES}`;
  const head = makeRow("div", name, logprob);
  const note = document.createElement("small");
  note.textContent = `rank ${rank}`;
  head.firstChild.after(note);
  const rows = sorted.slice(0, NUM_ALTERNATIVES).map(([other, value]) => {
    const row = makeRow(choose ? "button" : "div", other, value);
    const bar = document.createElement("i");
    bar.style.width = `${100 * Math.exp(value)}%`;
    row.append(bar);
    if (choose) {
      row.role = "menuitem";
      row.disabled = BYTE.test(other);
      row.onclick = () => choose(other);
    }
    return row;
  });
  const box = $("alternatives");
  box.replaceChildren(head, ...rows);
  box.role = choose ? "menu" : "tooltip";
  box.hidden = false;
  const at = span.getBoundingClientRect();
  box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - box.offsetWidth - 8)) + scrollX}px`;
  const below = at.bottom + box.offsetHeight + 8 < innerHeight;
  box.style.top = `${(below ? at.bottom + 4 : at.top - box.offsetHeight - 4) + scrollY}px`;
}

function makeRow(kind, token, logprob) {
  const row = document.createElement(kind);
  const name = document.createElement("span");
  name.textContent = token === "" ? "(end)" : JSON.stringify(token);
  const probability = document.createElement("span");
  probability.textContent = `${(100 * Math.exp(logprob)).toPrecision(3)} %`;
  row.append(name, probability);
  return row;
}

// Open the alternatives of a token as a menu.
function pinAlternatives(text, token) {
  pinned = token;
  setTabStop(token.span);
  showAlternatives(token, (name) => {
    hideAlternatives();
    text.replace(token, name);
  });
  $("alternatives").querySelector("button:enabled")?.focus();
}

function hideAlternatives() {
  pinned = null;
  $("alternatives").hidden = true;
}

// Let the Tab key reach this token of its text, and no other one.
function setTabStop(span) {
  const names = { role: "button", "aria-haspopup": "menu", "aria-describedby": "alternatives" };
  for (const other of span.parentNode.querySelectorAll("[tabindex='0']")) {
    other.tabIndex = -1;
    Object.keys(names).forEach((name) => other.removeAttribute(name));
  }
  span.tabIndex = 0;
  Object.entries(names).forEach(([name, value]) => span.setAttribute(name, value));
}

// Show the value of a slider beside its name.
function show(slider) {
  const off = slider.value === slider.dataset.off;
  slider.closest("label").querySelector("output").textContent = off ? "off" : slider.value;
}

document.addEventListener("input", ({ target }) => target.type === "range" && show(target));
document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  const steps = { ArrowLeft: "previousElementSibling", ArrowRight: "nextElementSibling" };
  const rows = { ArrowUp: "previousElementSibling", ArrowDown: "nextElementSibling" };
  if (key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  else if (pinned && (key === "Escape" || key === "Tab")) {
    const { span } = pinned;
    hideAlternatives();
    span.focus();
    event.preventDefault();
  } else if (key === "Escape") stop();
  else if (target.role === "menuitem" && rows[key]) {
    const next = step(target, rows[key], (row) => row.disabled);
    if (next?.role === "menuitem") next.focus();
    event.preventDefault();
  } else if (target.classList.contains("token") && (key === "Enter" || key === " ")) {
    target.click();
    event.preventDefault();
  } else if (target.classList.contains("token") && steps[key]) {
    const next = step(target, steps[key], (token) => token.textContent === ""); // it holds a part of a character
    if (next?.classList.contains("token")) {
      setTabStop(next);
      next.focus();
    }
    event.preventDefault();
  }
});

// Return the next element in a direction that is not to be skipped; null at the end.
function step(element, direction, skip) {
  do element = element[direction];
  while (element && skip(element));
  return element;
}

$("alternatives").addEventListener("focusout", ({ relatedTarget }) => {
  if (pinned && !$("alternatives").contains(relatedTarget)) hideAlternatives();
});
$("form").onsubmit = (event) => {
  event.preventDefault();
  generate();
};
$("stop").onclick = stop;
$("again").onclick = () => {
  $("seed").value = Math.floor(Math.random() * 2 ** 31);
  $("form").requestSubmit();
};
$("more").onclick = () => {
  new Text(Math.min(2, Number(texts.at(-1).slider.value) + 0.3));
  document.querySelectorAll(".less").forEach((button) => (button.disabled = false));
};

document.querySelectorAll("fieldset input[type=range]").forEach(show);
[0.5, 0.8, 1.1].forEach((temperature) => new Text(temperature));
describeModel().catch((error) => fail(error.message));
