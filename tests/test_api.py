"""What `import textgen` offers: the losses and texts of the command line, in a process that stays as it was."""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

import textgen
from tests.forking import run_script, server
from tests.serving.servers import running
from textgen.commands.parsing import parse_train_config
from textgen.runs.metrics_file import is_machine_metric

ROOT = Path(__file__).parents[1]
PROMPT = "The plot was"
STATES: list[dict[str, Any]] = [PartialState._shared_state, AcceleratorState._shared_state, GradientState._shared_state]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute as the scripts of the tests do, so that losses are equal bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def documents(reviews_file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in reviews_file.read_text().splitlines()]


@pytest.fixture
def settings(tiny_flags: list[str], tmp_path: Path) -> dict[str, Any]:
    """Return the settings of `tiny_run` as keywords, without their text."""
    config = parse_train_config([*tiny_flags, "--run_dir", str(tmp_path / "run")])
    names = ("batch_size", "seq_len", "max_steps", "mixed_precision", "run_dir", "model", "tokenizer")
    return {name: getattr(config, name) for name in names} | {
        "tracking": False,
        "data.cache_dir": config.data.cache_dir,
    }


def losses(run: textgen.Run | Path) -> list[dict[str, float]]:
    """Return the rows of a run without what depends on the clock."""
    rows = textgen.Run(run).metrics
    return [{name: value for name, value in row.items() if not is_machine_metric(name)} for row in rows]


# --- the package -----------------------------------------------------------------------------------------------------


def test_public_names() -> None:
    assert textgen.__all__ == [
        "Classification", "DataConfig", "LanguageModel", "ModelConfig", "ReadState", "Run", "Sample", "SamplingConfig",
        "TextScore", "TextgenError", "TokenLogprobs", "TokenizerConfig", "TrackingConfig", "TrainConfig", "__version__",
        "load", "train",
    ]  # fmt: skip
    assert all(getattr(textgen, name) for name in textgen.__all__)
    assert set(textgen.__all__) <= set(dir(textgen))
    with pytest.raises(AttributeError, match="has no attribute `trian`"):
        textgen.trian  # type: ignore[attr-defined] # noqa: B018


def test_import_brings_nothing_but_itself() -> None:
    program = (
        "import sys; before = set(sys.modules); import textgen; own = set(sys.modules) - before;"
        "textgen.SamplingConfig; textgen.TextgenError;"
        "print(sorted(own), sorted({'torch', 'numpy', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "['textgen'] []\n"


def test_a_program_that_uses_all_of_it_is_typed(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("""
from typing import Any

import textgen
from textgen import SamplingConfig, TextgenError, TrainConfig

dotted: dict[str, Any] = {"model.num_layers": 1}


def on_row(row: dict[str, float]) -> None:
    print(row["step"])


try:
    run: textgen.Run = textgen.train("quick", files=["reviews/"], run_dir="a", max_minutes=2, tracking=False)
    run = textgen.train(TrainConfig(run_dir="b"), texts=["a", "b"], on_row=on_row, model={"dropout": 0.1}, **dotted)
except TextgenError as error:
    print(error)
losses: list[float] = [row["train/loss"] for row in run.metrics]
state: str = run.status["state"]
print(run.best.name if run.best else None, textgen.__version__.upper())
lm: textgen.LanguageModel = textgen.load(run, best=True)
texts: list[str] = lm.generate("i love", n=3, temperature=0.8)
samples: list[textgen.Sample] = lm.generate(["i love", ""], details=True, config=SamplingConfig(logprobs=2))
read: textgen.ReadState = lm.read("a long prologue")
read.save("prologue.safetensors")
read = lm.load_state("prologue.safetensors")
by_label: list[str] = lm.generate("i love", label="positive")
one: textgen.Classification = lm.classify("i love it")
several: list[textgen.Classification] = lm.classify(["i love it", "no"], priors={label: 1 for label in lm.labels})
print(one.label, one.probability, one.margin, several[0].bits["positive"], lm.score("a", label="positive").nats)
for piece in lm.stream("i love", state=read):
    print(piece.upper())
score: textgen.TextScore = lm.score("i love this movie")
bits: float = score.bits_per_byte
""")
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import textgen\n\ntextgen.load('a').generate(3)\ntextgen.trian()\n")
    # What is beneath the API is not followed, as it takes a minute.
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nstrict = true\nmypy_path = {ROOT}\ncache_dir = {tmp_path}\nignore_missing_imports = true\n"
        "follow_imports = skip\n[mypy-textgen,textgen.api,textgen.config,textgen.errors,textgen.decoding.*]\n"
        "follow_imports = silent\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "mypy.ini")]
    done = subprocess.run([*command, str(tmp_path / "program.py")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    done = subprocess.run([*command, str(wrong)], cwd=tmp_path, capture_output=True, text=True)
    assert "[call-overload]" in done.stdout
    assert 'Module has no attribute "trian"' in done.stdout


def test_init_from_is_a_setting(tiny_run: Path, documents: list[str], settings: dict[str, Any], tmp_path: Path) -> None:
    """The shape of a preset and of a TrainConfig is the base's; a setting that differs is refused."""
    own = {name: value for name, value in settings.items() if name not in ("model", "tokenizer", "run_dir")}
    own |= {"init_from": tiny_run, "texts": documents[:100], "sample_prompts": ()}
    run = textgen.train("quick", **own, max_minutes=None, run_dir=tmp_path / "preset")
    config = textgen.TrainConfig(model=textgen.ModelConfig(num_layers=3), seed=1)
    other = textgen.train(config, **own, run_dir=tmp_path / "config")
    for one in (run, other):
        assert one.metrics[0]["step"] == 0
        assert one.settings["model.hidden_size"] == 32
        assert one.settings["model.num_layers"] == 2
    assert textgen.train("quick", **own, max_minutes=None, run_dir=tmp_path / "preset").status["state"] == "finished"
    with pytest.raises(textgen.TextgenError, match=r"`model\.num_layers` 3 differs from 2"):
        textgen.train("quick", **own, model={"num_layers": 3}, run_dir=tmp_path / "refused")


# --- using a model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm(tiny_run: Path) -> textgen.LanguageModel:
    return textgen.load(tiny_run)


def test_texts_are_those_of_command_line_and_server(tiny_run: Path, tmp_path: Path) -> None:
    lm = textgen.load(tiny_run, decoder="int8")  # that of the tests' server
    texts = lm.generate(PROMPT, n=2, seed=5, temperature=0.8, max_new_tokens=40)
    flags = ["--seed", "5", "--temperature", "0.8", "--max_new_tokens", "40", "--decoder", "int8"]
    said = run_script("-m", "textgen", "sample", str(tiny_run), "--prompt", PROMPT, "--num_samples", "2", *flags)
    assert said.stdout == "\n".join(f"{PROMPT}{text}\n" for text in texts)
    with running(tiny_run, tmp_path / "server") as serving:
        choices = serving.complete(prompt=PROMPT, seed=5, temperature=0.8, max_tokens=40, n=2)["choices"]
    assert [choice["text"] for choice in choices] == texts
    assert "".join(lm.stream(PROMPT, seed=5, temperature=0.8, max_new_tokens=40)) == texts[0]


def test_samples_are_in_the_order_of_their_prompts(lm: textgen.LanguageModel) -> None:
    prompts = [PROMPT, "", "My wife"]
    samples = lm.generate(prompts, n=2, details=True, max_new_tokens=20, config=textgen.SamplingConfig(logprobs=1))
    assert [(sample.prompt, sample.number) for sample in samples] == [(p, j) for p in prompts for j in range(2)]
    assert lm.generate(prompts, n=2, max_new_tokens=20) == [sample.text for sample in samples]
    assert all(sample.logprobs is not None for sample in samples)
    assert lm.generate([PROMPT, PROMPT], max_new_tokens=20) == lm.generate(PROMPT, n=2, max_new_tokens=20)


@pytest.mark.parametrize("decoder", ["plain", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("repeated", [1, 20, 400])
def test_what_follows_a_state_is_what_follows_its_text(tiny_run: Path, decoder: str, repeated: int) -> None:
    """Short enough for decoder steps, one window of the model, several windows."""
    lm, first, second = textgen.load(tiny_run, decoder=decoder), "My wife rented it" + " and I" * repeated, " was weak"
    state = lm.read(first)
    assert (state.num_read > 0) == (repeated == 400)
    penalties = {"repetition_penalty": 1.4, "no_repeat_ngram": 2, "max_new_tokens": 30, "n": 2}
    wanted = lm.generate(first + second, **penalties)
    assert lm.generate(second, state=state, **penalties) == wanted
    assert lm.generate(state=lm.read(second, state=state), **penalties) == wanted
    del penalties["n"]
    assert "".join(lm.stream(second, state=state, **penalties)) == wanted[0]
    scored, whole = lm.score(second, state=state), lm.score(first + second)
    assert scored.logprobs == whole.logprobs[-len(scored.logprobs) :]


@pytest.mark.parametrize("normalization", ["none", "lowercase"])
@pytest.mark.parametrize("first", ["My wife rented it", "Nobody warned me: ΟΔΥΣΣΕΥΣ! It was " * 60])
def test_a_text_may_be_cut_anywhere(lm: textgen.LanguageModel, first: str, normalization: str) -> None:
    """Inside a token and, with `lowercase`, after a letter whose lower case depends on the next one."""
    lm = copy.copy(lm)
    lm._normalization = normalization
    whole = first + " and ΟΔΥΣΣΕΥΣ wa"
    exact: dict[str, Any] = {"max_new_tokens": 20, "details": True, "logprobs": 0}
    wanted = lm.generate(whole, **exact)
    for cut in range(len(first) - 1, len(whole)):
        state = lm.read(whole[:cut])
        assert lm.generate(whole[cut:], state=state, **exact) == wanted
        assert (state.num_read > 0) == (len(first) > 100)
    assert lm.read(whole[-1:], state=lm.read(whole[:-1])) == lm.read(whole)


def test_a_score_is_that_of_evaluate(lm: textgen.LanguageModel, tiny_run: Path, tmp_path: Path) -> None:
    text = "The hero was honest. " * 60  # longer than a window
    (tmp_path / "one.txt").write_text(text)
    flags = ["--data", str(tmp_path / "one.txt"), "--json"]
    figures = json.loads(run_script("-m", "textgen", "evaluate", str(tiny_run), *flags).stdout)
    score = lm.score(text)
    assert score.bits_per_byte == pytest.approx(figures["bits_per_byte"], rel=1e-6)
    assert len(score.logprobs) == len(score.tokens) == len(score.ids) == figures["tokens"]
    assert "".join(score.tokens) == text
    part = lm.score(text, end=False)
    assert part.logprobs == score.logprobs[:-1]
    assert part.nats == pytest.approx(score.nats + score.logprobs[-1])


def test_log_probabilities_of_a_score_are_those_of_samples(tiny_run: Path) -> None:
    lm = textgen.load(tiny_run, decoder="plain")
    (sample,) = lm.generate(PROMPT, details=True, logprobs=0, max_new_tokens=40, seed=3)
    assert sample.logprobs is not None
    score = lm.score(sample.text, state=lm.read(PROMPT), end=sample.finished)
    if score.tokens == tuple(token.token for token in sample.logprobs):  # drawn as the tokenizer would cut it
        drawn = [token.logprob for token in sample.logprobs]
        assert score.logprobs == pytest.approx(drawn, abs=1e-4)
    assert "".join(score.tokens) == sample.text


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"temprature": 1}, "unknown setting `temprature`; the nearest is `temperature`"),
        ({"temperature": "hot"}, "`temperature` must be a number: hot"),
        ({"temperature": -1.0}, "`temperature` must be finite and at least 0: -1.0"),
        ({"stop": "."}, "`stop` must be a list of texts: ."),
        ({"n": 0}, "`n` must be an integer of at least 1: 0"),
        ({"prompt": 3}, "`prompt` must be a text or a list of texts: 3"),
        ({"prompt": ["a", None]}, "`prompt` must be a text: None"),
        ({"prompt": "\n"}, "`prompt` is only spaces; an empty prompt starts a text"),
        ({"prompt": "a\ud800"}, "`prompt` holds a lone surrogate, which is not valid text"),
        ({"state": "The plot"}, "`state` must be a result of `read`: The plot"),
        ({"banned_tokens": [10**6]}, "`banned_tokens` must be below the vocabulary's size 340: 1000000"),
        ({"config": {"top_k": 3}}, "`config` must be a SamplingConfig: {'top_k': 3}"),
    ],
)
def test_a_wrong_request_is_refused_in_a_line(lm: textgen.LanguageModel, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(textgen.TextgenError) as refused:
        lm.generate(**asked)
    assert str(refused.value) == message
    if "n" not in asked and not isinstance(asked.get("prompt", ""), list | int):
        with pytest.raises(textgen.TextgenError) as refused:
            lm.stream(**asked)  # at once, not at the first piece
        assert str(refused.value) == message


def test_numbers_of_numpy_are_numbers(lm: textgen.LanguageModel) -> None:
    few = {"n": np.int64(1), "max_new_tokens": np.int32(20)}
    (text,) = lm.generate(np.array([PROMPT]), temperature=np.float64(0.5), seed=np.int64(7), **few)
    assert [text] == lm.generate(PROMPT, temperature=0.5, seed=7, max_new_tokens=20)


def test_a_state_of_another_model_is_refused(lm: textgen.LanguageModel, tiny_run: Path) -> None:
    state = textgen.load(tiny_run, decoder="plain").read(PROMPT)
    for use in (
        lm.generate,
        lm.stream,
        lambda state: lm.read("a", state=state),
        lambda state: lm.score("a", state=state),
    ):
        with pytest.raises(textgen.TextgenError, match="`state` is of another model: call"):
            use(state=state)


def test_nothing_to_open_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(textgen.TextgenError, match=r"has no `config.json`: not a checkpoint directory"):
        textgen.load(tmp_path)
    with pytest.raises(textgen.TextgenError, match="`name` must be a run, a checkpoint or a published model: None"):
        textgen.load(None)
    with pytest.raises(textgen.TextgenError, match="does not exist"):
        textgen.Run(tmp_path / "nothing")
    with pytest.raises(textgen.TextgenError, match="`decoder` must be one of"):
        textgen.load(tiny_run, decoder="quick")


# --- training --------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_command_line(
    settings: dict[str, Any], documents: list[str], reviews_file: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """From files, texts and a dataset, one after the other in this process, with another precision between them."""
    import datasets

    rows: list[dict[str, float]] = []
    of_files = textgen.train(files=reviews_file, on_row=rows.append, **settings)
    assert rows == of_files.metrics
    low = textgen.train(texts=documents, **settings | {"run_dir": tmp_path / "low", "mixed_precision": "bf16"})
    of_texts = textgen.train(texts=documents, **settings | {"run_dir": tmp_path / "texts"})
    dataset = datasets.Dataset.from_dict({"review": documents})
    other = {"run_dir": tmp_path / "dataset", "data": {"text_column": "review"}}
    of_dataset = textgen.train(dataset=dataset, **settings | other)
    sources = [json.loads((run.path / "data.json").read_text())["source"] for run in (of_files, of_texts, of_dataset)]
    assert sources[1:] == ["memory"] * 2 != sources[:1]  # of one token store
    wanted = losses(tiny_run)
    assert losses(of_files) == losses(of_texts) == losses(of_dataset) == wanted
    assert losses(low) != wanted
    assert losses(low)[-1]["valid/loss"] == pytest.approx(wanted[-1]["valid/loss"], rel=1e-2)


def test_texts_of_memory_are_named_and_found_again(
    settings: dict[str, Any], documents: list[str], tmp_path: Path
) -> None:
    settings |= {"data.cache_dir": str(tmp_path / "cache")}
    half = textgen.train(texts=documents, **settings | {"max_steps": 2})
    with pytest.raises(textgen.TextgenError, match="`training text` is"):
        textgen.train(texts=documents[:-50], **settings)
    run = textgen.train(texts=tuple(documents), **settings)  # goes on
    assert run.status["step"] == 4
    assert json.loads((run.path / "data.json").read_text())["source"] == "memory"
    assert run.best is not None
    assert json.loads((run.best / "trainer.json").read_text())["config"]["data"]["source"] == "memory"
    assert half.settings["data.source"] == "memory"
    figures = json.loads(run_script("-m", "textgen", "evaluate", str(run.path), "--json").stdout)
    assert figures["bits_per_byte"] == pytest.approx(run.metrics[-1]["valid/bits_per_byte"], rel=1e-4)
    run_script("-m", "textgen", "publish", str(run.path), "--to", str(tmp_path / "published"))
    assert "Trained on texts of a Python program." in (tmp_path / "published" / "README.md").read_text()
    shutil.rmtree(tmp_path / "cache")
    said = run_script("-m", "textgen", "evaluate", str(run.path), expect=2).stderr
    assert re.search(
        r"^error: the texts were given in Python, and their encoding `\S+` is gone: `textgen.train` with", said
    )
    textgen.train(texts=documents, **settings)  # makes it again
    run_script("-m", "textgen", "evaluate", str(run.path), "--json")


def test_splits_of_texts_are_kept(settings: dict[str, Any], documents: list[str]) -> None:
    run = textgen.train(texts={"train": documents[:250], "validation": documents[250:270]}, **settings)
    sizes = json.loads((run.path / "data.json").read_text())["splits"]
    assert (sizes["train"]["documents"], sizes["validation"]["documents"]) == (250, 20)


def process() -> dict[str, Any]:
    """Return what a training could change in this process."""
    import matplotlib

    return {
        "environment": dict(os.environ),
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "signals": [signal.getsignal(number) for number in range(1, 32)],
        "log": [(log.handlers[:], log.level) for log in (logging.getLogger(), logging.getLogger("textgen"))],
        "accelerate": [dict(state) for state in STATES],
        "matplotlib": dict(matplotlib.rcParams),
    }


@pytest.mark.parametrize("progress", [False, True])
def test_the_process_is_as_before_and_nothing_is_printed(
    settings: dict[str, Any],
    documents: list[str],
    progress: bool,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")  # a training removes it
    kept = [dict(state) for state in STATES]
    try:
        for state in STATES:
            state.clear()
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")  # the user's
        before = process()
        run = textgen.train(texts=documents, progress=progress, seed=7, **settings)
        textgen.load(run).generate("It", max_new_tokens=3)
        after = process()
        assert [name for name in before if before[name] != after[name]] == []
        assert accelerator.mixed_precision == "bf16"
    finally:
        for state, values in zip(STATES, kept, strict=True):
            state.clear()
            state.update(values)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("step 4: valid loss" in err) if progress else (err == "")


def test_the_log_goes_where_the_program_sends_it(
    settings: dict[str, Any], documents: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        textgen.train(texts=documents, **settings)
    assert any(message.startswith("step 4: valid loss") for message in caplog.messages)
    assert any("config from Python" in message for message in caplog.messages)


def test_an_interrupted_training_is_saved_returned_and_goes_on(
    settings: dict[str, Any], documents: list[str], tiny_run: Path
) -> None:
    handler = signal.getsignal(signal.SIGINT)  # the background job of a shell ignores it
    run = textgen.train(texts=documents, on_row=lambda _: signal.raise_signal(signal.SIGINT), log_every=2, **settings)
    assert (run.status["state"], run.status["step"], run.status["reason"]) == ("preempted", 3, "SIGINT")
    assert signal.getsignal(signal.SIGINT) is handler
    run = textgen.train(texts=documents, **settings)
    assert run.status["state"] == "finished"
    weights = [sorted(Path(path).glob("checkpoints/*/model.safetensors"))[-1].read_bytes() for path in (run, tiny_run)]
    assert weights[0] == weights[1]


def test_a_second_interrupt_gives_up(
    settings: dict[str, Any], documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("textgen.distributed.signals.SAME_KEYPRESS_SECONDS", 0.0)

    def twice(_: dict[str, float]) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        textgen.train(texts=documents, on_row=twice, **settings)
    assert textgen.Run(settings["run_dir"]).newest is None


def test_an_interrupt_before_the_first_step_is_raised(
    settings: dict[str, Any], documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("textgen.training.loop.build", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        textgen.train(texts=documents, **settings)


def test_another_signal_saves_and_takes_its_effect(settings: dict[str, Any], documents: list[str]) -> None:
    taken: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: taken.append(number))
    try:
        run = textgen.train(texts=documents, on_row=lambda _: signal.raise_signal(signal.SIGTERM), **settings)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert taken == [signal.SIGTERM]
    assert run.newest is not None


def test_ctrl_c_in_a_script_saves_and_the_script_goes_on(
    settings: dict[str, Any], reviews_file: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    settings |= {"max_steps": 100_000, "max_epochs": 100_000, "log_every": 1, "model": {"hidden_size": 32}}
    settings["tokenizer"] = {"vocab_size": 340}
    script.write_text(f"""
import json, signal, textgen
before = signal.getsignal(signal.SIGINT)
run = textgen.train(files={str(reviews_file)!r}, on_row=lambda row: print("row", flush=True), **{settings!r})
print(json.dumps([run.status["state"], run.newest.name, run.status["step"], signal.getsignal(signal.SIGINT) is before]))
""")
    process = server().start([str(script)], output=tmp_path / "out", error=tmp_path / "err")
    try:
        last = time.monotonic() + 60
        while "row" not in ((tmp_path / "out").read_text() if (tmp_path / "out").exists() else ""):
            assert process.poll() is None, (tmp_path / "err").read_text()
            assert time.monotonic() < last
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, (tmp_path / "err").read_text()
    finally:
        process.kill()
    state, newest, step, restored = json.loads((tmp_path / "out").read_text().splitlines()[-1])
    assert (state, newest, restored) == ("preempted", f"step-{step:06d}", True)
    assert (tmp_path / "err").read_text() == ""


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_a_lack_of_memory_keeps_its_class(
    error: Exception, settings: dict[str, Any], documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that try again with a smaller batch know it by that."""
    monkeypatch.setattr("textgen.training.loop.train_step", Mock(side_effect=error))
    with pytest.raises(type(error)) as raised:
        textgen.train(texts=documents, **settings)
    assert raised.value is error


def test_an_exception_of_on_row_ends_the_training(settings: dict[str, Any], documents: list[str]) -> None:
    def fail(_: dict[str, float]) -> None:
        raise ZeroDivisionError("a plot")

    with pytest.raises(ZeroDivisionError, match="a plot"):
        textgen.train(texts=documents, on_row=fail, **settings)
    assert textgen.Run(settings["run_dir"]).status["reason"] == "ZeroDivisionError: a plot"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"config": "quik", "texts": ["a"]}, "`quik` cannot be read: No such file or directory"),
        ({"config": 3}, "`config` must be a preset, a YAML file or a TrainConfig: 3"),
        ({"texts": ["a"], "files": "b"}, "`files`, `texts`: give one of them"),
        ({"texts": ["a"], "data": {"dataset": "b"}}, "`texts`, `data.dataset`: give one of them"),
        ({"texts": "a"}, "`texts` must be a list of texts, not str"),
        ({"texts": {"train": {"a"}}}, "`texts` must be a list of texts, not set"),
        ({"texts": pandas.DataFrame({"text": ["a"]})}, "`texts` must be a list of texts, not DataFrame"),
        ({"texts": ["a"], "on_row": 3}, "`on_row` must be a function of a row: 3"),
        ({"texts": ["a"], "run_dir": __file__, "tokenizer.vocab_size": 260}, "`run_dir` must be a folder, not a file"),
        ({"texts": ["a", 5]}, "`texts` of train row 2: `text` is not a string: 5"),
        ({"texts": {"training": ["a"]}}, "`texts` has a split `training`; textgen's splits are"),
        ({"texts": {"test": ["a"]}}, "memory has no split `train`; it has `test`"),
        ({"texts": []}, "memory: no documents to train on; 0 read"),
        ({"dataset": "stanfordnlp/imdb"}, "`dataset` must be a datasets.Dataset, not str; a name on the hub is"),
        ({"files": []}, "`data.source` is files but `data.files` is empty"),
        ({"files": "nowhere"}, "`nowhere` does not exist"),
        ({"learning_rat": 1}, "unknown setting `learning_rat`; the nearest is `learning_rate`"),
        ({"hidden_size": 1}, "unknown setting `hidden_size`; the nearest is `model.hidden_size`"),
        ({"model": {"hiden_size": 1}}, "unknown setting `model.hiden_size`; the nearest is `model.hidden_size`"),
        ({"model.hidden_size": "big"}, "`model.hidden_size` must be an integer: big"),
        ({"model": 3}, "unknown setting `model`"),
        ({"batch_size": 0}, "`batch_size` must be a finite number above 0: 0"),
        ({"tracking": "no"}, "`tracking` must be false or settings of tracking: no"),
        ({"model": {"dropout": 0.1}, "model.dropout": 0.2}, "`model.dropout` is given twice"),
        ({"tracking.mode": "online"}, "`tracking.mode` is given twice"),
        ({"config": ""}, "`` cannot be read"),
        ({"config": textgen.TrainConfig(dry_run=True)}, "`dry_run` prints the cost of a training: use the command"),
        ({"config": textgen.TrainConfig(), "tokenizer.path": "nowhere", "texts": ["a"]}, "nowhere"),
        ({"data.source": "memory"}, "`source` memory: the texts were given to `textgen.train` in Python"),
    ],
)  # fmt: skip
def test_a_wrong_training_is_refused_in_a_line(asked: dict[str, Any], message: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(textgen.TextgenError, match=re.escape(message)) as refused:
        textgen.train(**{"run_dir": run_dir, "data.cache_dir": tmp_path / "cache", "tracking": False, **asked})
    assert "\n" not in str(refused.value)
    assert not run_dir.exists()


@pytest.mark.parametrize(
    "world",
    [
        {"WORLD_SIZE": "2", "RANK": "0"},
        {
            "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "a",
            "SLURM_STEP_TASKS_PER_NODE": "2",
        },
    ],
)  # fmt: skip
def test_one_of_several_processes_is_refused(world: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(textgen.TextgenError, match="trains in one process, and a launcher started 2: launch"):
        textgen.train(texts=["a"])


def test_settings_of_file_config_and_keywords(settings: dict[str, Any], documents: list[str], tmp_path: Path) -> None:
    """Keywords override the file, groups and dotted names are one; numbers that YAML reads as text are numbers."""
    (tmp_path / "tiny.yaml").write_text("learning_rate: 2e-3\nmodel: {hidden_size: 24, num_layers: 1}\nmax_steps: 1\n")
    del settings["model"], settings["max_steps"]
    changed: dict[str, Any] = {"model": {"embedding_dim": 16}, "model.hidden_size": np.int64(32)}
    run = textgen.train(tmp_path / "tiny.yaml", texts=documents, **settings, **changed)
    seen = run.settings
    assert [seen[f"model.{name}"] for name in ("embedding_dim", "hidden_size", "num_layers")] == [16, 32, 1]
    assert (seen["learning_rate"], seen["max_steps"], seen["tracking.mode"]) == (0.002, 1, "disabled")


def test_a_run_shows_itself(tiny_run: Path, tmp_path: Path) -> None:
    run = textgen.Run(tiny_run)
    assert repr(run) == f"<textgen.Run {str(tiny_run)!r}: finished, step 4 of 4>"
    shown = run._repr_html_()
    assert f"{run.metrics[-1]['valid/bits_per_byte']:.4f}</td>" in shown
    assert "finished, at step 4 of 4" in shown
    assert 'src="data:image/png;base64,iVBOR' in shown
    assert run.newest == run.best == tiny_run / "checkpoints" / "step-000004"
    table = run.metrics.to_pandas()
    assert list(table["step"]) == [row["step"] for row in run.metrics]
    (tmp_path / "<i>").mkdir()
    (tmp_path / "<i>" / "status.json").write_text("{")
    damaged = textgen.Run(tmp_path / "<i>")
    assert (damaged.metrics, damaged.status, damaged.newest, damaged.best) == ([], {}, None, None)
    assert "&lt;i&gt;" in damaged._repr_html_()
    with pytest.raises(textgen.TextgenError, match=r"has no readable `config.yaml`"):
        damaged.settings  # noqa: B018
