// Streams one text for each temperature from the completions API, and shows the alternatives of each token.
// Generated text enters the page as textContent only, never as HTML.

const $ = (id) => document.getElementById(id);
const NUM_ALTERNATIVES = 5;
const texts = []; // in the order of the page
let running = null; // the AbortController of the requests in progress

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
    this.abort?.abort();
    texts.splice(texts.indexOf(this), 1);
    this.section.remove();
    document.querySelectorAll(".less").forEach((button) => (button.disabled = texts.length === 1));
  }

  clear(prompt) {
    this.prompt = prompt;
    this.characters = []; // an array: offsets count code points, JavaScript's strings 16-bit units
    this.tokens = [];
    $("alternatives").hidden = true;
    const span = document.createElement("span");
    span.className = "prompt";
    span.textContent = prompt;
    this.output.replaceChildren(span);
  }

  // Add the text and tokens of an event. A token ends where the next one begins, so the last token of the previous
  // event may grow, and a token that holds only a part of a character is empty.
  add({ text, logprobs }) {
    const first = Math.max(this.tokens.length - 1, 0);
    this.characters.push(...text);
    logprobs.tokens.forEach((token, i) => {
      const span = document.createElement("span");
      span.className = "token";
      span.tabIndex = this.tokens.length ? -1 : 0; // one tab stop; arrow keys move between tokens
      const logprob = logprobs.token_logprobs[i], top = logprobs.top_logprobs[i];
      span.onmouseenter = span.onfocus = () => showAlternatives(span, token, logprob, top);
      span.onmouseleave = span.onblur = () => ($("alternatives").hidden = true);
      span.onclick = () => span.focus(); // for a tap
      this.tokens.push({ span, offset: logprobs.text_offset[i] });
      this.output.append(span);
    });
    for (let i = first; i < this.tokens.length; i++) {
      const end = this.tokens[i + 1]?.offset ?? this.characters.length;
      this.tokens[i].span.textContent = this.characters.slice(this.tokens[i].offset, end).join("");
    }
  }

  async copy(button) {
    try {
      await navigator.clipboard.writeText(this.prompt + this.characters.join(""));
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(this.output); // browsers allow no clipboard without TLS, except on localhost
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }

  // Stream a completion into this text, until its end or until `signal` aborts it.
  async generate(body, signal) {
    this.clear(body.prompt);
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

// Generate all texts; a generation in progress is aborted.
async function generate() {
  running?.abort();
  const own = (running = new AbortController());
  fail(null);
  $("stop").disabled = false;
  $("status").textContent = "generating";
  if (!$("model").textContent) await describeModel().catch(() => {}); // a token was missing before
  const ended = await Promise.allSettled(texts.map((text) => {
    text.abort = new AbortController();
    return text.generate(sharedBody(), AbortSignal.any([own.signal, text.abort.signal]));
  }));
  if (running !== own) return; // another generation has started meanwhile
  running = null;
  $("stop").disabled = true;
  const failed = ended.find(({ reason }) => reason && reason.name !== "AbortError");
  $("status").textContent = failed ? "" : own.signal.aborted ? "stopped" : "done";
  if (failed) fail(failed.reason.message);
}

// Show an error; null hides it.
function fail(message) {
  $("error").hidden = message === null;
  $("error").textContent = message ?? "";
}

// Show the probabilities of a token and of its alternatives, the most likely first, below the token or above it.
function showAlternatives(span, token, logprob, top) {
  const percent = (value) => `${(100 * Math.exp(value)).toPrecision(3)} %`;
  // The drawn token is an entry of `top` beyond the most likely ones if it is none of them.
  const alternatives = Object.entries(top).sort((a, b) => b[1] - a[1]).slice(0, NUM_ALTERNATIVES);
  const rows = [[token, logprob], ...alternatives].map(([text, value], i) => {
    const row = document.createElement("div");
    const name = document.createElement("span");
    name.textContent = text === "" ? "(end)" : JSON.stringify(text);
    const probability = document.createElement("span");
    probability.textContent = percent(value);
    row.append(name, probability);
    if (i) { // no bar for the token itself, which is the heading
      const bar = document.createElement("i");
      bar.style.width = `${100 * Math.exp(value)}%`;
      row.append(bar);
    }
    return row;
  });
  const box = $("alternatives");
  box.replaceChildren(...rows);
  box.hidden = false;
  const at = span.getBoundingClientRect();
  box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - box.offsetWidth - 8)) + scrollX}px`;
  const below = at.bottom + box.offsetHeight + 8 < innerHeight;
  box.style.top = `${(below ? at.bottom + 4 : at.top - box.offsetHeight - 4) + scrollY}px`;
}

// Show the value of a slider beside its name.
function show(slider) {
  const off = slider.value === slider.dataset.off;
  slider.closest("label").querySelector("output").textContent = off ? "off" : slider.value;
}

document.addEventListener("input", ({ target }) => target.type === "range" && show(target));
document.addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: "previousElementSibling", ArrowRight: "nextElementSibling" };
  if (event.key === "Escape") running?.abort();
  else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  else if (event.target.className === "token" && steps[event.key]) {
    let next = event.target[steps[event.key]];
    while (next && next.textContent === "") next = next[steps[event.key]]; // it holds a part of a character
    if (next?.className === "token") {
      event.target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    }
    event.preventDefault();
  }
});
$("form").onsubmit = (event) => {
  event.preventDefault();
  generate();
};
$("stop").onclick = () => running?.abort();
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
