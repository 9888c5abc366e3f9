"""Texts by label: the same ones by the command line, the Python API, a batch file, the server, the page and `play`."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import expect, sync_playwright

import textgen
from tests.serving.servers import Running, running
from textgen.cli import main
from textgen.config import SamplingConfig
from textgen.decoding.choose import choose_decoder
from textgen.decoding.generation import generate_stream
from textgen.decoding.samples import Request, Sample
from textgen.decoding.sampling import scale_label
from textgen.model.files import load_model

LABELS = ["negative", "positive"]
GOOD, BAD = {"good", "fine", "great"}, {"bad", "dull", "weak"}
SHORT: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.7}
FLAGS = ["--max_new_tokens", "8", "--temperature", "0.7", "--decoder", "plain"]


@pytest.fixture(scope="module")
def lm(labelled_run: Path) -> textgen.LanguageModel:
    return textgen.load(labelled_run, decoder="plain")


@pytest.fixture(scope="module")
def server(labelled_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("serve") / "log"
    with running(labelled_run, log, "--decoder", "plain") as server:
        yield server


def sample(run: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict[str, Any]]:
    """Return the samples of `textgen sample` as objects."""
    capsys.readouterr()
    main(["sample", str(run), *FLAGS, "--json", *flags])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_texts_have_the_words_of_their_label(lm: textgen.LanguageModel) -> None:
    shares = {}
    for label in LABELS:
        words = " ".join(lm.generate("", n=40, label=label, **SHORT)).split()
        good, bad = (sum(word in own for word in words) for own in (GOOD, BAD))
        shares[label] = good / (good + bad)
    assert shares["negative"] < 0.3
    assert shares["positive"] > 0.5


def test_several_labels_continue_each_prompt_with_each_of_them(
    lm: textgen.LanguageModel, labelled_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["--prompt", "", "--prompt", "great", "--num_samples", "2"]
    rows = sample(labelled_run, capsys, *prompts, "--label", "positive", "negative")
    order = [(row["prompt"], row["label"], row["number"]) for row in rows]
    assert order == [(p, k, n) for p in ("", "great") for k in ("positive", "negative") for n in (0, 1)]
    for prompt in ("", "great"):
        for label in LABELS:
            texts = [row["text"] for row in rows if (row["prompt"], row["label"]) == (prompt, label)]
            assert texts == lm.generate(prompt, n=2, label=label, **SHORT)
    assert [row.get("label") for row in sample(labelled_run, capsys, "--prompt", "")] == [None]
    capsys.readouterr()
    main(["sample", str(labelled_run), *FLAGS, "--prompt", "", "--label", "positive"])
    assert capsys.readouterr().out == rows[0]["text"] + "\n"


def test_lines_of_a_batch_file_have_labels(
    lm: textgen.LanguageModel, labelled_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": "", "label": "negative"}, {"prompt": ""}, {"prompt": "", "label": None}]
    (tmp_path / "prompts").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--batch_file", str(tmp_path / "prompts"), "--out", str(tmp_path / "out")]
    main(["sample", str(labelled_run), *FLAGS, *flags, "--label", "positive"])
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [row["label"] for row in rows] == ["negative", "positive", "positive"]
    assert [row["text"] for row in rows[:1]] == lm.generate("", label="negative", **SHORT)
    assert [row["text"] for row in rows[1:]] == lm.generate("", n=2, label="positive", **SHORT)
    with pytest.raises(SystemExit):
        main(["sample", str(labelled_run), *FLAGS, *flags, "--label", "negative"])
    assert "was started with other settings" in capsys.readouterr().err


def test_the_server_draws_the_texts_of_a_label(lm: textgen.LanguageModel, server: Running) -> None:
    body = {"prompt": ["", "great"], "n": 2, "max_tokens": 8, "temperature": 0.7, "seed": 0}
    for label in LABELS:
        choices = server.complete(**body, label=label)["choices"]
        assert [choice["text"] for choice in choices] == lm.generate(["", "great"], n=2, label=label, seed=0, **SHORT)
    end = [lm._tokenizer.eos_id]  # a client may begin a prompt of ids with the token that a label takes the place of
    by_ids = server.complete(prompt=end, max_tokens=8, temperature=0.7, seed=0, label="positive")
    assert by_ids["choices"][0]["text"] == lm.generate("", label="positive", seed=0, **SHORT)[0]
    assert server.complete(**body, label=None)["choices"][0]["text"] == lm.generate("", seed=0, **SHORT)[0]


def test_the_server_scores_a_prompt_after_a_label(lm: textgen.LanguageModel, server: Running) -> None:
    text = "good hero fine plot"
    for label in LABELS:
        answer = server.complete(prompt=text, max_tokens=0, echo=True, logprobs=1, label=label)
        scored = answer["choices"][0]["logprobs"]["token_logprobs"]
        assert scored[0] is None
        assert scored[1:] == pytest.approx(lm.score(text, label=label, end=False).logprobs[1:], abs=1e-5)


def test_a_kept_state_keeps_its_label(lm: textgen.LanguageModel, server: Running) -> None:
    more = {"max_tokens": 6, "temperature": 0.7}
    first = server.complete(prompt="great", label="negative", seed=0, keep_state=True, **more)["choices"][0]
    again = server.complete(prompt=" ", state_id=first["state_id"], seed=1, label_scale=2, **more)["choices"][0]
    whole = "great" + first["text"] + " "
    settings = {"seed": 1, "label_scale": 2, "max_new_tokens": 6, "temperature": 0.7}
    assert again["text"] == lm.generate(whole, label="negative", **settings)[0]
    body = {"state_id": first["state_id"], "label": "negative"}
    status, _, answer = server.ask("POST", "/v1/completions", body)
    assert (status, json.loads(answer)["error"]["param"]) == (400, "label")


def test_the_server_names_the_labels_that_it_has(server: Running) -> None:
    status, _, body = server.ask("POST", "/v1/completions", {"prompt": "", "label": "mixed"})
    error = json.loads(body)["error"]
    assert (status, error["param"]) == (400, "label")
    assert error["message"] == "`label`: no label 'mixed'; the model has `negative`, `positive`"
    models = json.loads(server.ask("GET", "/v1/models")[2])
    assert models["data"][0]["labels"] == LABELS
    schema = json.loads(server.ask("GET", "/openapi.json")[2])["components"]["schemas"]["CompletionRequest"]
    assert schema["properties"]["label"]["anyOf"][0]["enum"] == LABELS


def test_the_page_has_a_choice(lm: textgen.LanguageModel, server: Running) -> None:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no chromium (apt install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page()
        page.goto(server.url)
        expect(page.get_by_role("combobox", name="label")).to_be_visible(timeout=20_000)
        assert page.locator("#label option").all_text_contents() == ["none", *LABELS]
        page.locator("#prompt").fill("")
        page.locator("#min_p").fill("0")
        page.locator("#max_tokens").fill("8")
        page.locator("#label").select_option("positive")
        page.locator("#generate").click()
        expect(page.locator("#status")).to_have_text("done", timeout=20_000)
        seen = page.locator(".text").first.text_content()
        browser.close()
    assert seen == lm.generate("", label="positive", seed=42, max_new_tokens=8, temperature=0.5)[0]


def test_play_changes_the_label_of_the_whole_text(
    lm: textgen.LanguageModel,
    labelled_run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def play(*lines: str, label: str | None = None) -> str:
        raw = "".join(f"{line}\n" for line in lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        capsys.readouterr()
        main(["play", str(labelled_run), *FLAGS, *([] if label is None else ["--label", label])])
        return capsys.readouterr().out

    good, bad = (lm.generate("great", label=label, **SHORT)[0] for label in ("positive", "negative"))
    assert play("great", label="positive") == f"{good}\n"
    assert play(":label", ":label positive", "great", ":label") == f"label none\n{good}\nlabel positive\n"
    # the line was read without a label; its continuation is taken back, and the line is read again after the label
    plain = lm.generate("great", **SHORT)[0]
    assert play("great", ":undo", ":label negative", "") == f"{plain}\n{bad}\n"


def test_read_and_stream_take_a_label(lm: textgen.LanguageModel) -> None:
    whole = lm.generate("great", label="positive", **SHORT)
    assert "".join(lm.stream("great", label="positive", **SHORT)) == whole[0]
    state = lm.read("great", label="positive")
    assert lm.generate(state=state, **SHORT) == whole
    with pytest.raises(textgen.TextgenError, match="`label` positive comes before the text of `state`"):
        lm.generate(state=state, label="positive", **SHORT)


def test_a_batch_file_of_a_state_is_not_continued_after_one_of_another_label(
    labelled_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = {label: str(tmp_path / label) for label in LABELS}
    for label, state in states.items():
        sample(labelled_run, capsys, "--prompt", "great", "--label", label, "--save_state", state)
    (tmp_path / "prompts").write_text('{"prompt": " hero"}\n')
    batch = ["--batch_file", str(tmp_path / "prompts"), "--out", str(tmp_path / "out")]
    for _ in range(2):
        main(["sample", str(labelled_run), *FLAGS, *batch, "--state", states["positive"]])
    with pytest.raises(SystemExit):
        main(["sample", str(labelled_run), *FLAGS, *batch, "--state", states["negative"]])
    assert "was started with other settings: name another file" in capsys.readouterr().err


# --- label_scale -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.0, 0.8])
@pytest.mark.parametrize("prompt", ["", "great"])
def test_label_scale_multiplies_what_the_label_changes(lm: textgen.LanguageModel, prompt: str, penalty: float) -> None:
    model, tokenizer, scale, ids = lm._decoder.model, lm._tokenizer, 2.5, lm._tokenizer.encode(prompt)
    for label in LABELS:
        drawn: list[int] = []
        while len(drawn) < 6 and tokenizer.eos_id not in drawn:
            rows = torch.tensor([[first, *ids, *drawn] for first in (model.label_id(label), tokenizer.bos_id)])
            with torch.inference_mode():
                logprobs = model(rows, model.zero_state(2))[0][:, -1].log_softmax(-1)
            mixed = logprobs[1] + scale * (logprobs[0] - logprobs[1])
            for token in {*ids, *drawn}:
                mixed[token] *= penalty if mixed[token] < 0 else 1 / penalty
            mixed[tokenizer.unk_id] = -math.inf
            drawn.append(int(mixed.argmax()))
        how = {"label_scale": scale, "repetition_penalty": penalty, "temperature": 0, "max_new_tokens": 6}
        text = lm.generate(prompt, label=label, **how)[0]
        assert text == tokenizer.decode([*ids, *drawn]).removeprefix(prompt)


def test_a_repetition_penalty_sees_logarithms_of_probabilities_beside_a_scale() -> None:
    """It looks at signs, so a constant of a row must not matter to it; without a penalty all stays bit for bit."""
    torch.manual_seed(1)
    logits, unlabelled = torch.randn(2, 4, 50)
    scale, penalty = torch.tensor([[3.0], [3.0], [1.0], [0.0]]), torch.tensor([[1.3], [1.0], [1.3], [0.5]])
    scaled = scale_label(logits, unlabelled, scale, penalty)
    plain = scale_label(logits, unlabelled, scale)
    assert torch.equal(scaled[1:3], plain[1:3])
    again = scale_label(logits + 5, unlabelled - 3, scale, penalty)
    torch.testing.assert_close(again[[0, 3]], scaled[[0, 3]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scaled[[0, 3]].softmax(-1), plain[[0, 3]].softmax(-1))


def test_a_scaled_sample_depends_on_no_other_row_of_its_batch(labelled_run: Path) -> None:
    model, tokenizer = load_model(labelled_run)
    decoder = choose_decoder(model, "int8")
    settings = [{}, {"label_scale": 3.0}, {"label_scale": 1.0}, {"label_scale": 0.5, "repetition_penalty": 1.2}]
    configs = [SamplingConfig(seed=1, max_new_tokens=8, **more) for more in settings]
    requests = [Request("", config, number, label=LABELS[number % 2]) for config in configs for number in range(3)]

    def texts(some: list[Request], **how: int) -> list[str]:
        ended = {i: e.text for i, e in generate_stream(decoder, tokenizer, some, **how) if isinstance(e, Sample)}
        return [ended[i] for i in range(len(some))]

    alone = [texts([request])[0] for request in requests]
    assert texts(requests) == alone
    assert texts(requests, batch_size=5) == alone
    assert alone[:3] == alone[6:9]
    assert alone[:3] != alone[3:6]


def test_all_ways_scale_a_label_alike(
    lm: textgen.LanguageModel, labelled_run: Path, server: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = lm.generate("", n=2, label="positive", label_scale=3, seed=0, **SHORT)
    flags = ["--prompt", "", "--num_samples", "2", "--seed", "0", "--label", "positive", "--label_scale", "3"]
    assert [row["text"] for row in sample(labelled_run, capsys, *flags)] == wanted
    body = {"prompt": "", "n": 2, "max_tokens": 8, "temperature": 0.7, "seed": 0, "label_scale": 3}
    choices = server.complete(**body, label="positive")["choices"]
    assert [choice["text"] for choice in choices] == wanted
    status, _, answer = server.ask("POST", "/v1/completions", body)
    assert (status, json.loads(answer)["error"]["message"]) == (400, "`label_scale` needs a `label`: 3")


def test_a_long_prompt_is_read_without_its_label_in_slots_too(lm: textgen.LanguageModel, server: Running) -> None:
    prompt = "great plot " * 400
    num_tokens = len(lm._tokenizer.encode(prompt))
    assert num_tokens > 512
    before = server.metric("prompt_tokens_read_in_slots_total")
    body = {"prompt": prompt, "n": 2, "max_tokens": 8, "temperature": 0.7, "seed": 0, "cache_salt": "long"}
    choices = server.complete(**body, label="positive", label_scale=3)["choices"]
    assert server.metric("prompt_tokens_read_in_slots_total") - before == 2 * num_tokens
    assert [choice["text"] for choice in choices] == lm.generate(
        prompt, n=2, label="positive", label_scale=3, seed=0, **SHORT
    )


def test_a_scale_without_a_label_is_refused(
    lm: textgen.LanguageModel, labelled_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(textgen.TextgenError, match="`label_scale` 2 needs a `label`"):
        lm.stream("", label_scale=2)
    state = lm.read("great", label="positive")
    assert lm.generate(state=state, label_scale=3, **SHORT) == lm.generate(
        "great", label="positive", label_scale=3, **SHORT
    )
    for flag in ("2", "11"):
        with pytest.raises(SystemExit):
            main(["sample", str(labelled_run), "--prompt", "", "--label_scale", flag])
    said = capsys.readouterr().err
    assert "error: `label_scale` 2 needs a `label`\n" in said
    assert "error: `label_scale` must be at least 0 and at most 10: 11.0\n" in said


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--label", "mixed"], ["--label", "positive", "mixed"]])
def test_an_unknown_label_is_one_line(labelled_run: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sample", str(labelled_run), "--prompt", "", *flags])
    assert ended.value.code == 2
    wanted = "error: `--label`: no label 'mixed'; the model has `negative`, `positive`"
    assert capsys.readouterr().err.splitlines()[-1] == wanted


def test_a_model_without_labels_refuses_one(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["sample", str(tiny_run), "--prompt", ""], ["play", str(tiny_run)]):
        with pytest.raises(SystemExit):
            main([*command, "--label", "positive"])
        assert "label 'positive': the model was trained without labels" in capsys.readouterr().err
    with pytest.raises(textgen.TextgenError, match="label 'positive': the model was trained without labels"):
        textgen.load(tiny_run).generate("", label="positive")
