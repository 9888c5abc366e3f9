"""Calls of clients that people use, each against a running server: `python calls.py URL [CLIENT[:CALL]...]`.

Runs in the clients' own environment (make_environment.sh), so it knows nothing of textgen. Prints a JSON line for each
call: client, version, call, and what came back or the error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

PROMPT = "The plot was"
TASKS = Path(__file__).parent / "tasks"


def openai_calls(url: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the calls of OpenAI's own client."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    model = next(iter(client.models.list())).id

    def complete(**settings: object) -> object:
        return client.completions.create(model=model, max_tokens=8, seed=1, **settings)  # type: ignore[call-overload]

    def stream() -> str:
        return "".join(event.choices[0].text for event in complete(prompt=PROMPT, stream=True))  # type: ignore

    yield "complete", lambda: complete(prompt=PROMPT).choices[0].text  # type: ignore
    yield "stream", stream
    yield "score", lambda: complete(prompt=PROMPT, echo=True, logprobs=3).choices[0].logprobs.token_logprobs  # type: ignore
    yield "ids", lambda: complete(prompt=[[5, 6, 7], [8]]).choices[1].text  # type: ignore
    yield "best_of", lambda: complete(prompt=PROMPT, best_of=3, n=2).choices[1].text  # type: ignore
    yield "models", lambda: [entry.id for entry in client.models.list()]


def langchain_calls(url: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the calls of LangChain's `OpenAI`."""
    from langchain_openai import OpenAI

    llm = OpenAI(base_url=f"{url}/v1", api_key="none", model=served(url), max_tokens=8, max_retries=0)  # type: ignore
    yield "complete", lambda: llm.invoke(PROMPT)
    yield "stream", lambda: "".join(llm.stream(PROMPT))
    yield "batch", lambda: llm.batch([PROMPT, "A film"])
    best = OpenAI(base_url=f"{url}/v1", api_key="none", model=served(url), max_tokens=8, n=2, best_of=3)  # type: ignore
    yield "best_of", lambda: [choice.text for choice in best.generate([PROMPT]).generations[0]]


def litellm_calls(url: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the calls of litellm's provider for completions."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch prices
    import litellm

    def complete(**settings: object) -> object:
        name = f"text-completion-openai/{served(url)}"
        return litellm.text_completion(
            model=name, api_base=f"{url}/v1", api_key="none", max_tokens=8, **{"prompt": PROMPT, **settings}
        )

    yield "complete", lambda: complete().choices[0].text  # type: ignore
    yield "stream", lambda: "".join(event.choices[0].text or "" for event in complete(stream=True))  # type: ignore
    yield "score", lambda: complete(echo=True, logprobs=3).choices[0].logprobs.token_logprobs  # type: ignore
    yield "ids", lambda: complete(prompt=[[5, 6, 7]]).choices[0].text  # type: ignore
    yield "best_of", lambda: [choice.text for choice in complete(best_of=3, n=2).choices]  # type: ignore
    yield "batch", lambda: [choice.text for choice in complete(prompt=[PROMPT, "A film"]).choices]  # type: ignore


def llm_calls(url: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the calls of the command `llm`."""
    folder = Path(tempfile.mkdtemp())
    entry = {"model_id": "own", "model_name": served(url), "api_base": f"{url}/v1", "completion": True}
    (folder / "extra-openai-models.yaml").write_text(json.dumps([entry]))  # JSON is YAML

    def run(*flags: str) -> str:
        command = [str(Path(sys.executable).with_name("llm")), "-m", "own", "-o", "max_tokens", "8", *flags, PROMPT]
        environment = os.environ | {"LLM_USER_PATH": str(folder), "OPENAI_API_KEY": "none"}
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        if ended.returncode:
            raise RuntimeError(ended.stderr.strip().splitlines()[-1])
        return ended.stdout

    yield "complete", lambda: run("--no-stream")
    yield "stream", lambda: run()
    yield "score", lambda: run("--no-stream", "-o", "logprobs", "3")


def lm_eval_calls(url: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield lm-evaluation-harness' ways to call a server, on the tasks beside this file."""

    def run(tasks: str, arguments: str = "", *flags: str) -> dict[str, object]:
        with tempfile.TemporaryDirectory() as folder:
            command = [str(Path(sys.executable).with_name("lm_eval")), "run", "--model", "local-completions"]
            command += ["--model_args", f"model={served(url)},base_url={url}/v1/completions{arguments}"]
            command += ["--include_path", ".", "--tasks", tasks, "--output_path", folder, "--log_samples", *flags]
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": folder}
            environment.pop("PYTHONPATH", None)
            ended = subprocess.run(command, cwd=TASKS, capture_output=True, text=True, env=environment, timeout=200)
            if ended.returncode:
                raise RuntimeError(ended.stderr.strip().splitlines()[-1])
            results: dict[str, dict[str, object]] = json.loads(next(Path(folder).rglob("results_*.json")).read_text())[
                "results"
            ]
            figures: dict[str, object] = {
                f"{task}/{name.partition(',')[0]}": value
                for task, row in results.items()
                for name, value in row.items()
                if name.endswith(",none") and "stderr" not in name
            }
            for path in Path(folder).rglob("samples_textgen_prompts_*.jsonl"):
                figures["texts"] = [json.loads(line)["resps"][0][0] for line in path.read_text().splitlines()]
        return figures

    every = "textgen_texts,textgen_documents,textgen_choices,textgen_prompts"
    yield "every task", lambda: run(every)
    yield "as texts", lambda: run(every, ",tokenized_requests=False")
    yield "in batches", lambda: run(every, ",num_concurrent=4", "--batch_size", "4")
    yield "no tokenizer", lambda: run("textgen_prompts", ",tokenizer_backend=None")


def served(url: str) -> str:
    """Return the name of the server's model."""
    from urllib.request import urlopen

    with urlopen(f"{url}/v1/models") as answer:
        name: str = json.load(answer)["data"][0]["id"]
    return name


CLIENTS = {
    "openai": openai_calls,
    "langchain-openai": langchain_calls,
    "litellm": litellm_calls,
    "llm": llm_calls,
    "lm-eval": lm_eval_calls,
}


def main(url: str, *chosen: str) -> None:
    """Make the calls of all clients, or some: `lm-eval` or `lm-eval:as texts`."""
    for client, calls in CLIENTS.items():
        if chosen and not any(name.partition(":")[0] == client for name in chosen):
            continue
        for call, action in calls(url):
            if chosen and not {client, f"{client}:{call}"} & {*chosen}:
                continue
            try:
                outcome: dict[str, object] = {"result": action()}
            except Exception as error:
                outcome = {"error": f"{type(error).__name__}: {error}"[:300]}
            print(json.dumps({"client": client, "version": version(client), "call": call, **outcome}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
