// All that is generated reaches the page as textContent, never as HTML.

const $ = (id) => document.getElementById(id);
const ALTERNATIVES = 5;
const texts = []; // one for each temperature
let running = null; // aborts the requests under way

class Text {
  constructor(temperature) {
    this.section = $("text").content.cloneNode(true).querySelector("section");
    this.slider = this.section.querySelector(".temperature");
    this.slider.value = temperature;
    this.place = this.section.querySelector(".text");
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
    this.characters = []; // offsets count characters, JavaScript's strings 16-bit units
    this.tokens = [];
    $("told").hidden = true;
    const shown = document.createElement("span");
    shown.className = "prompt";
    shown.textContent = prompt;
    this.place.replaceChildren(shown);
  }

  add({ text, logprobs }) {
    const first = Math.max(this.tokens.length - 1, 0); // whose text may have grown
    this.characters.push(...text);
    logprobs.tokens.forEach((token, i) => {
      const span = document.createElement("span");
      span.className = "token";
      span.tabIndex = this.tokens.length ? -1 : 0; // arrow keys go from one to the next
      const told = { token, logprob: logprobs.token_logprobs[i], top: logprobs.top_logprobs[i] };
      span.onmouseenter = span.onfocus = () => tell(span, told);
      span.onmouseleave = span.onblur = () => ($("told").hidden = true);
      span.onclick = () => span.focus(); // a tap
      this.tokens.push({ span, offset: logprobs.text_offset[i] });
      this.place.append(span);
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
      getSelection().selectAllChildren(this.place); // where a browser has no clipboard for pages without TLS
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }

  async generate(body, signal) {
    this.clear(body.prompt);
    const answer = await ask("v1/completions", {
      method: "POST", signal, body: JSON.stringify({ ...body, temperature: Number(this.slider.value) }),
    });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ; ) {
      const { value, done } = await reader.read();
      if (done) throw new Error("the answer ended early");
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

async function ask(path, request = {}) {
  const headers = { "content-type": "application/json" };
  if ($("token").value) headers.authorization = `Bearer ${$("token").value}`;
  let answer;
  try {
    answer = await fetch(path, { ...request, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("the server cannot be reached");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) {
    $("token_label").hidden = false;
    $("token").focus();
  }
  const told = await answer.json().catch(() => null);
  throw new Error(told?.error?.message ?? `the server answered ${answer.status}`);
}

function body() {
  const asked = {
    prompt: $("prompt").value, stream: true, logprobs: ALTERNATIVES, seed: $("seed").valueAsNumber,
  };
  for (const name of ["top_k", "top_p", "min_p", "max_tokens"])
    if ($(name).value !== $(name).dataset.off) asked[name] = Number($(name).value);
  return asked;
}

async function generate() {
  running?.abort();
  const own = (running = new AbortController());
  fail(null);
  $("stop").disabled = false;
  $("status").textContent = "generating";
  const ended = await Promise.allSettled(texts.map((text) => {
    text.abort = new AbortController();
    return text.generate(body(), AbortSignal.any([own.signal, text.abort.signal]));
  }));
  if (running !== own) return; // begun anew meanwhile
  running = null;
  $("stop").disabled = true;
  const wrong = ended.find(({ reason }) => reason && reason.name !== "AbortError");
  $("status").textContent = wrong ? "" : own.signal.aborted ? "stopped" : "done";
  if (wrong) fail(wrong.reason.message);
}

function fail(message) {
  $("error").hidden = message === null;
  $("error").textContent = message ?? "";
}

function tell(span, { token, logprob, top }) {
  const percent = (value) => `${(100 * Math.exp(value)).toPrecision(3)} %`;
  const likeliest = Object.entries(top).sort((a, b) => b[1] - a[1]);
  const rows = [[token, logprob], ...likeliest].map(([text, value], i) => {
    const row = document.createElement("div");
    const name = document.createElement("span");
    name.textContent = text === "" ? "(end)" : JSON.stringify(text);
    const share = document.createElement("span");
    share.textContent = percent(value);
    row.append(name, share);
    if (i) {
      const bar = document.createElement("i");
      bar.style.width = `${100 * Math.exp(value)}%`;
      row.append(bar);
    }
    return row;
  });
  const box = $("told");
  box.replaceChildren(...rows);
  box.hidden = false;
  const at = span.getBoundingClientRect();
  box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - box.offsetWidth - 8)) + scrollX}px`;
  const below = at.bottom + box.offsetHeight + 8 < innerHeight;
  box.style.top = `${(below ? at.bottom + 4 : at.top - box.offsetHeight - 4) + scrollY}px`;
}

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
    while (next && next.textContent === "") next = next[steps[event.key]]; // part of a character
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
ask("v1/models").then((answer) => answer.json()).then(({ data: [model] }) => {
  $("model").textContent = model.id;
  $("max_tokens").max = model.max_tokens;
  show($("max_tokens"));
}).catch((error) => fail(error.message));
