"""The verb `sample` as a user calls it: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args
from unittest.mock import Mock

import pytest

import textgen
from textgen.cli import main
from textgen.commands import model_argument
from textgen.commands.batch_output import open_output
from textgen.decoding import choose
from textgen.errors import TextgenError
from textgen.model.files import CONFIG_NAME, WEIGHTS_NAME
from textgen.runs import lock
from textgen.runs.checkpoint import checkpoints
from textgen.tokenizer import MODEL_NAME

TEXTGEN = [sys.executable, "-m", "textgen"]

# Of the default settings, as textgen 0.1 wrote it beside a file of samples.
DIGEST_OF_0_1 = "2ed7c1989e941fb766f3a7f5b92340cef35a2ad40d00ecaef5ae385f8b99d273"

Capture = pytest.CaptureFixture[str]
Sampler = Callable[..., str]


def set_stdin(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


@pytest.fixture
def sample(tiny_run: Path, capsys: Capture) -> Sampler:
    """Return a function that samples from the tiny run with more flags and returns what went to standard output."""

    def call(*flags: str) -> str:
        capsys.readouterr()
        main(["sample", str(tiny_run), *flags])
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return call


# --- sample ----------------------------------------------------------------------------------------------------------


def test_sample_prints_the_prompt_and_its_continuation_and_nothing_else(sample: Sampler) -> None:
    text = json.loads(sample("--prompt", "The plot was", "--max_new_tokens", "12", "--json"))["text"]
    assert text
    assert sample("--prompt", "The plot was", "--max_new_tokens", "12") == f"The plot was{text}\n"


def test_sample_json_is_one_object_for_each_sample(sample: Sampler) -> None:
    flags = ["--prompt", "I", "--prompt", "Ça va", "--num_samples", "3", "--max_new_tokens", "5", "--json"]
    rows = [json.loads(line) for line in sample(*flags).splitlines()]
    assert [(row["prompt"], row["number"]) for row in rows] == [(p, j) for p in ("I", "Ça va") for j in range(3)]
    assert {frozenset(row) for row in rows} == {frozenset({"prompt", "number", "text", "num_tokens", "finished"})}
    assert all(row["num_tokens"] == 5 or row["finished"] for row in rows)
    assert len({row["text"] for row in rows[:3]}) > 1, "samples of one prompt draw noise of their own"


def test_several_samples_are_printed_in_order_with_a_blank_line_between(sample: Sampler) -> None:
    flags = ["--prompt", "I", "--prompt", "See", "--num_samples", "2", "--max_new_tokens", "8"]
    rows = [json.loads(line) for line in sample(*flags, "--json").splitlines()]
    assert sample(*flags) == "\n\n".join(row["prompt"] + row["text"] for row in rows) + "\n"


def test_temperature_zero_does_not_depend_on_the_seed(sample: Sampler) -> None:
    flags = ["--prompt", "The", "--max_new_tokens", "20", "--temperature"]
    assert sample(*flags, "0", "--seed", "1") == sample(*flags, "0", "--seed", "2")
    assert sample(*flags, "1", "--seed", "1") == sample(*flags, "1", "--seed", "1")
    assert sample(*flags, "1", "--seed", "1") != sample(*flags, "1", "--seed", "2")


def test_top_k_one_is_greedy(sample: Sampler) -> None:
    flags = ["--prompt", "The", "--max_new_tokens", "20"]
    assert sample(*flags, "--top_k", "1") == sample(*flags, "--temperature", "0")
    assert sample(*flags, "--top_p", "1e-9") == sample(*flags, "--temperature", "0")


def test_prompt_comes_from_a_file_or_standard_input_without_its_last_line_break(
    sample: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--max_new_tokens", "6"]
    wanted = sample(*flags, "--prompt", "Très\nbon")
    file = tmp_path / "prompt.txt"
    for raw in ("Très\nbon".encode(), "Très\nbon\n".encode(), "Très\nbon\r\n".encode()):
        file.write_bytes(raw)
        assert sample(*flags, "--prompt_file", str(file)) == wanted
        set_stdin(monkeypatch, raw)
        assert sample(*flags) == wanted
        set_stdin(monkeypatch, raw)
        assert sample(*flags, "--prompt_file", "-") == wanted


def test_empty_closed_or_terminal_input_starts_a_review(sample: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = sample("--max_new_tokens", "6", "--prompt", "")
    set_stdin(monkeypatch, b"")
    assert sample("--max_new_tokens", "6") == wanted
    monkeypatch.setattr(sys, "stdin", None)
    assert sample("--max_new_tokens", "6") == wanted
    leader, terminal = os.openpty()
    with os.fdopen(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert sample("--max_new_tokens", "6") == wanted
    os.close(leader)


def test_text_is_streamed_as_it_is_drawn_and_a_reader_may_leave(tiny_run: Path) -> None:
    # so young a model, asked for the likeliest token, never ends its text: 100 million tokens take hours
    flags = ["--prompt", "The", "--max_new_tokens", "100000000", "--temperature", "0"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [*TEXTGEN, "sample", str(tiny_run), *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered
    ) as process:
        assert process.stdout
        assert process.stderr
        first = os.read(process.stdout.fileno(), 1 << 16)
        assert first.startswith(b"The")
        assert len(first) < 4096, "standard output is buffered: 8 KiB come at once"
        assert process.poll() is None
        process.stdout.close()  # as `head` does
        assert process.wait(60) == 141
        (line,) = process.stderr.read().decode().splitlines()
        assert " decoder on " in line


def objects(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_settings_that_are_lists_are_given_at_once_or_one_by_one(sample: Sampler) -> None:
    flags = ["--prompt", "The", "--max_new_tokens", "60", "--json"]
    text = objects(sample(*flags))[0]["text"]
    one, other = text[10:12], text[5:7]
    wanted = {"text": text[:5], "stop": other}
    for stops in (["--stop", one, other], ["--stop", one, "--stop", other], [f"--stop={one}", f"--stop={other}"]):
        record = objects(sample(*flags, *stops))[0]
        assert {name: record[name] for name in wanted} == wanted
    assert objects(sample(*flags, "--stop", "[e, t]", '["e"]'))[0]["text"] == text, "a stop string is no YAML"
    forced = objects(sample(*flags, "--forced_tokens", "20", "21", "--forced_tokens", "22", "--max_new_tokens", "3"))
    assert forced == objects(
        sample(*flags, "--forced_tokens", "20", "21", "22", "--max_new_tokens", "3", "--seed", "7")
    )
    assert sample(*flags, "--banned_tokens", *map(str, range(20, 340))) != sample(*flags)


def test_biases_are_flags_settings_of_a_line_and_of_python(sample: Sampler, tiny_run: Path, tmp_path: Path) -> None:
    flags = ["--prompt", "a", "--max_new_tokens", "3", "--json"]
    (row,) = objects(sample(*flags, "--logit_bias", " was=-100", "I=60", "--logit_bias", "I=40"))
    assert row["text"] == "III"
    prompts = [{"prompt": "a", "logit_bias": {"I": 100}}, {"prompt": "a"}]
    file, out = write_prompts(tmp_path / "prompts.jsonl", prompts), tmp_path / "out.jsonl"
    sample("--batch_file", str(file), "--out", str(out), "--max_new_tokens", "3")
    biased, plain = objects(out.read_text())
    assert biased["text"] == "III" != plain["text"]
    assert textgen.load(tiny_run).generate("a", max_new_tokens=3, logit_bias={"I": 100.0}) == ["III"]


def test_regexes_choices_and_samplers_are_flags_settings_of_a_line_and_of_python(
    sample: Sampler, tiny_run: Path, tmp_path: Path
) -> None:
    settings: list[tuple[list[str], dict[str, Any]]] = [
        (["--regex", "null|[a-c]{2,3}"], {"regex": "null|[a-c]{2,3}"}),
        (["--choices", " a, was,null", " x"], {"choices": [" a", " was", "null", " x"]}),
        (["--xtc_probability", "0.5", "--dry_multiplier", "2", "--dry_breakers", "a", "."],
         {"xtc_probability": 0.5, "dry_multiplier": 2, "dry_breakers": ["a", "."]}),
    ]  # fmt: skip
    file = write_prompts(tmp_path / "prompts.jsonl", [{"prompt": "a"} | setting for _, setting in settings])
    out = tmp_path / "out.jsonl"
    sample("--batch_file", str(file), "--out", str(out), "--max_new_tokens", "8", "--num_samples", "2")
    rows = objects(out.read_text())
    model = textgen.load(tiny_run)
    for i, (flags, setting) in enumerate(settings):
        common = ["--prompt", "a", "--max_new_tokens", "8", "--num_samples", "2", "--json"]
        assert objects(sample(*common, *flags)) == rows[2 * i : 2 * i + 2]
        assert model.generate("a", n=2, max_new_tokens=8, **setting) == [row["text"] for row in rows[2 * i : 2 * i + 2]]
    assert {(row["reason"], row["finished"]) for row in rows[:2]} == {("end", True)}
    for row in rows[2:4]:
        assert (row["reason"], row["finished"]) == ("choice", False)
        assert row["text"] in row["choices"]
        assert sum(row["choices"].values()) == pytest.approx(1, abs=1e-5)
    assert "reason" not in rows[4]
    (best,) = objects(sample("--prompt", "a", "--json", "--choices", " a, was", "--best_of", "9"))
    assert best["text"] == max(best["choices"], key=best["choices"].get)


def test_logprobs_are_told_in_json(sample: Sampler) -> None:
    flags = ["--prompt", "The", "--max_new_tokens", "8", "--json"]
    (record,) = objects(sample(*flags, "--logprobs", "3"))
    told = record.pop("logprobs")
    mean = record.pop("mean_logprob")
    assert [record] == objects(sample(*flags))
    assert len(told) == record["num_tokens"] + record["finished"]
    assert "".join(one["token"] for one in told) == record["text"]
    assert mean == pytest.approx(sum(one["logprob"] for one in told) / len(told), abs=1e-5)
    for one in told:
        values = [value for _, value in one["top"]]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert one["logprob"] <= values[0]


def test_best_of_keeps_the_samples_of_the_largest_mean_logprob(sample: Sampler) -> None:
    flags = ["--prompt", "The", "--prompt", "I", "--max_new_tokens", "6", "--temperature", "1.5"]
    drawn = objects(sample(*flags, "--num_samples", "9", "--logprobs", "0", "--json"))
    best = objects(sample(*flags, "--best_of", "9", "--num_samples", "2", "--json"))
    wanted = [
        record
        for prompt in ("The", "I")
        for record in sorted(
            (record for record in drawn if record["prompt"] == prompt), key=lambda record: -record["mean_logprob"]
        )[:2]
    ]
    assert [record["number"] for record in wanted] != [0, 1, 0, 1]
    assert best == [{name: value for name, value in record.items() if name != "logprobs"} for record in wanted]
    assert (
        sample(*flags, "--best_of", "9", "--num_samples", "2")
        == "\n\n".join(r["prompt"] + r["text"] for r in best) + "\n"
    )


def test_decoders_are_chosen_by_name_and_say_so(sample: Sampler, caplog: pytest.LogCaptureFixture) -> None:
    flags = ["--prompt", "The", "--max_new_tokens", "40"]
    texts = [sample(*flags, "--decoder", name) for name in ("plain", "float32")]
    assert texts[0] == texts[1]
    assert [record.getMessage().split()[0] for record in caplog.records] == ["plain", "float32"]


def test_the_names_of_decoders_are_those_that_there_are() -> None:
    assert get_args(model_argument.DecoderName) == get_args(choose.DecoderName)


def test_prompts_and_stop_strings_are_treated_as_the_text_that_was_trained_on(
    tiny_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    for name in (CONFIG_NAME, WEIGHTS_NAME, MODEL_NAME):
        shutil.copy(checkpoints(tiny_run)[0][1] / name, tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    config["text"]["normalization"] = "lowercase"
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    main(["sample", str(tmp_path), "--prompt", "THE", "--stop", "E", "O", "--max_new_tokens", "99", "--json"])
    (record,) = objects(capsys.readouterr().out)
    assert record["prompt"] == "the"
    assert record["stop"] in ("e", "o")


@pytest.mark.parametrize("num_samples", ["1", "5"])
def test_an_interrupt_ends_with_what_was_drawn(tiny_run: Path, num_samples: str) -> None:
    flags = ["--prompt", "The", "--temperature", "0", "--num_samples", num_samples, "--decoder", "plain"]
    with subprocess.Popen(
        [*TEXTGEN, "sample", str(tiny_run), *flags, "--max_new_tokens", "100000000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        assert process.stdout
        first = os.read(process.stdout.fileno(), 1 << 16)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().splitlines()[1:] == ["interrupted"]
    out = (first + rest).decode()
    assert out.endswith("\n")
    texts = out.removesuffix("\n").split("\n\n")
    assert len(texts) == int(num_samples)
    assert len(set(texts)) == 1
    assert texts[0].startswith("The")


# --- files of prompts ------------------------------------------------------------------------------------------------

PROMPTS: list[dict[str, Any]] = [
    {"prompt": ["The plot", "I saw", "", "Ça va", "We"][i % 5], "id": i, "max_new_tokens": 1 + i * 7 % 23, "seed": i}
    for i in range(40)
]
PROMPTS[3] |= {"temperature": 0, "stop": ["e"]}
PROMPTS[4] |= {"logprobs": 2, "id": "four"}
del PROMPTS[5]["id"]
PLAIN = ["--decoder", "plain"]  # one that computes the same in batches of any size


def write_prompts(path: Path, prompts: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts), encoding="utf-8")
    return path


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", PROMPTS)


def test_a_file_of_prompts_gives_samples_in_order_each_as_if_alone(
    sample: Sampler, prompts_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    flags = ["--num_samples", "2", *PLAIN]
    assert sample("--batch_file", str(prompts_file), "--out", str(out), "--batch_size", "7", *flags) == ""
    records = objects(out.read_text())
    wanted = []
    for prompt in PROMPTS:
        alone = [
            f"--prompt={prompt['prompt']}",
            f"--seed={prompt['seed']}",
            f"--max_new_tokens={prompt['max_new_tokens']}",
        ]
        alone += [f"--stop={stop}" for stop in prompt.get("stop", [])]
        alone += [f"--{name}={prompt[name]}" for name in ("temperature", "logprobs") if name in prompt]
        id_ = {"id": prompt["id"]} if "id" in prompt else {}
        wanted += [id_ | record for record in objects(sample(*alone, *flags, "--json"))]
    # Probabilities may differ in the last bits, since the batches differ in size.
    number = re.compile(r"-\d+\.\d+")
    seen, alone_seen = json.dumps(records), json.dumps(wanted)
    assert number.sub("", seen) == number.sub("", alone_seen)
    told, told_alone = ([float(its) for its in number.findall(text)] for text in (seen, alone_seen))
    assert told == pytest.approx(told_alone, abs=3e-6)
    assert len(records) == 80


def test_prompts_of_a_file_may_come_through_standard_input(
    sample: Sampler, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample("--batch_file", str(prompts_file), "--out", str(tmp_path / "a"))
    set_stdin(monkeypatch, prompts_file.read_bytes())
    sample("--batch_file", "-", "--out", str(tmp_path / "b"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("flags", [[], ["--num_samples", "3"], ["--best_of", "4", "--num_samples", "3"]])
def test_a_file_of_samples_is_continued_from_wherever_it_ends(
    sample: Sampler, prompts_file: Path, tmp_path: Path, flags: list[str]
) -> None:
    out = tmp_path / "out.jsonl"

    def run() -> bytes:
        sample("--batch_file", str(prompts_file), "--out", str(out), *flags, *PLAIN)
        return out.read_bytes()

    whole = run()
    assert whole.count(b"\n") == 40 * (3 if flags else 1)
    modified = out.stat().st_mtime_ns
    assert run() == whole
    assert out.stat().st_mtime_ns == modified, "there was nothing to do"
    first, second = whole.index(b"\n") + 1, whole.index(b"\n", whole.index(b"\n") + 1) + 1
    anywhere = random.Random(3)
    for end in (0, 1, first - 1, first, first + 1, second, len(whole) - 1, *anywhere.sample(range(len(whole)), 4)):
        out.write_bytes(whole[:end])
        assert run() == whole, end


EQUAL: list[dict[str, Any]] = [
    {"prompt": ["The", "I saw", "The"][i % 3], "id": i, "max_new_tokens": 12, "seed": i // 6} for i in range(12)
]


def test_prompts_given_several_times_get_the_samples_of_num_samples(sample: Sampler) -> None:
    flags = ["--max_new_tokens", "20", "--seed", "3", "--json"]
    got = objects(sample("--prompt", "The", "--prompt", "I", "--prompt", "The", "--prompt", "The", *flags))
    assert [record["number"] for record in got] == [0, 0, 1, 2]
    assert [got[0], *got[2:]] == objects(sample("--prompt", "The", "--num_samples", "3", *flags))
    assert len({record["text"] for record in got}) == 4
    assert got[1:2] == objects(sample("--prompt", "I", *flags))


@pytest.mark.parametrize("flags", [["--num_samples", "2"], ["--best_of", "2", "--num_samples", "1"]])
def test_equal_prompts_of_a_file_are_numbered_over_the_whole_file_also_when_it_goes_on(
    sample: Sampler, tmp_path: Path, flags: list[str]
) -> None:
    file, out = write_prompts(tmp_path / "prompts.jsonl", EQUAL), tmp_path / "out.jsonl"

    def run() -> bytes:
        sample("--batch_file", str(file), "--out", str(out), *flags, *PLAIN)
        return out.read_bytes()

    whole = run()
    lines = whole.splitlines(keepends=True)
    for start, seed in ((0, 0), (len(lines) // 2, 1)):
        half = objects(b"".join(lines[start : start + len(lines) // 2]).decode())
        equal = [record for record in half if record["prompt"] == "The"]
        # best of 2: the better one of the numbers 0 and 1, of 2 and 3, ...
        more = objects(sample("--prompt", "The", "--seed", str(seed), "--max_new_tokens", "12", "--num_samples", "8",
                              "--json", *PLAIN))  # fmt: skip
        assert [record["text"] for record in equal] == [more[record["number"]]["text"] for record in equal]
        assert len({record["number"] for record in equal}) == len(equal)
        assert max(record["number"] for record in equal) >= 6
    for done in (1, 5, len(lines) - 1):
        out.write_bytes(b"".join(lines[:done]))
        assert run() == whole, done


def test_a_file_with_equal_prompts_of_an_earlier_version_is_not_continued(
    sample: Sampler, refuse: Sampler, prompts_file: Path, tmp_path: Path
) -> None:
    equal, out = write_prompts(tmp_path / "equal.jsonl", EQUAL), tmp_path / "out.jsonl"
    beside = tmp_path / "out.jsonl.origin.json"
    sample("--batch_file", str(equal), "--out", str(out))
    origin = json.loads(beside.read_text())
    del origin["numbering"]  # an earlier version drew equal samples for equal prompts, and recorded no numbering
    beside.write_text(json.dumps(origin))
    line = refuse("--batch_file", str(equal), "--out", str(out))
    assert line == f"`{out}` was started with other numbering: name another file"
    out.unlink()
    sample("--batch_file", str(prompts_file), "--out", str(out))
    assert json.loads(beside.read_text())["settings"] == DIGEST_OF_0_1, "settings that came later change no digest"
    assert "numbering" not in json.loads(beside.read_text()), "a file whose prompts all differ goes on as before"


@pytest.mark.slow
def test_nothing_is_lost_or_doubled_by_kills_and_interrupts(tiny_run: Path, tmp_path: Path) -> None:
    prompts = [{"prompt": f"The plot {i}", "max_new_tokens": 20 + i % 7} for i in range(150)]
    file, out = write_prompts(tmp_path / "prompts.jsonl", prompts), tmp_path / "out.jsonl"
    argv = [*TEXTGEN, "sample", str(tiny_run), "--batch_file", str(file), "--batch_size", "3", *PLAIN, "--out"]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*argv, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip

    def lines() -> int:
        return out.read_bytes().count(b"\n") if out.exists() else 0

    for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        before = lines()
        with start() as process:
            while lines() < before + 20 and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        assert process.returncode == code
        assert b"Traceback" not in err
        assert before + 20 <= lines() < 150
    before = lines()
    with start() as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err.decode().splitlines()[1:] == [f"`{out}` holds {before} of 150 samples"]
    main(["sample", str(tiny_run), "--batch_file", str(file), *PLAIN, "--out", str(tmp_path / "whole.jsonl")])
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [record["prompt"] for record in objects(out.read_text())] == [prompt["prompt"] for prompt in prompts]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def refuse(tiny_run: Path, capsys: Capture) -> Sampler:
    """Return a function that samples with flags, expects exit code 2 and returns the line of the error."""

    def call(*flags: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["sample", str(tiny_run), *flags])
        assert ended.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").removesuffix("\n")

    return call


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--stop", ""], "`stop` must be strings that are not empty"),
        (["--banned_tokens", "1", "x"], "`banned_tokens` must be a list of integers: [1, 'x']"),
        (["--forced_tokens", "-3"], "`forced_tokens` must be ids of tokens: (-3,)"),
        (["--banned_tokens", "9999"], "`banned_tokens` must be below the vocabulary's size 340: 9999"),
        (["--banned_tokens", *map(str, range(340))], "`banned_tokens` leaves no token to draw"),
        (["--forced_tokens", "5", "6", "--max_new_tokens", "1"],
         "`forced_tokens` must be at most `max_new_tokens` 1: 2"),
        (["--min_new_tokens", "9", "--max_new_tokens", "8"],
         "`min_new_tokens` must be at least 0 and at most `max_new_tokens` 8: 9"),
        (["--repetition_penalty", "0"], "`repetition_penalty` must be at least 0.01 and at most 100: 0.0"),
        (["--presence_penalty", "1e300"], "`presence_penalty` must be at least -100 and at most 100: 1e+300"),
        (["--logit_bias", "a"], "`logit_bias` must be a token, `=` and a number, such as `17=-100` or `good=2`: a"),
        (["--logit_bias", "a=2", "b=x"],
         "`logit_bias` must be a token, `=` and a number, such as `17=-100` or `good=2`: b=x"),
        (["--logit_bias", "=2"], "`logit_bias` must be a token, `=` and a number, such as `17=-100` or `good=2`: =2"),
        (["--logit_bias", "a=nan"], "`logit_bias` must be at least -100 and at most 100: nan for 'a'"),
        (["--logit_bias", " I=1"], "`logit_bias`: the first token of ' I' is a space alone; leave the space out"),
        (["--logit_bias", "9999=1"], "`logit_bias` must be below the vocabulary's size 340: 9999"),
        (["--regex", "a("], "`regex` cannot be used: unclosed group"),
        (["--regex", ""], "`regex` must be a text of at most 4096 bytes: 0 characters"),
        (["--regex", "(a{1,1000}){1,1000}"],
         "`regex` is too large: 1000000 positions with its repetitions, at most 2000"),
        (["--choices", "a,b,a"], "`choices` must be different texts that are not empty: ['a', 'b', 'a']"),
        (["--choices", "a,"], "`choices` must be different texts that are not empty: ['a', '']"),
        (["--choices", "a", "--top_k", "3"], "`choices` cannot be combined with `top_k`: 3"),
        (["--regex", "a", "--stop", "b"], "`regex` cannot be combined with `stop`: ('b',)"),
        (["--xtc_threshold", "0.2"], "`xtc_threshold` needs `xtc_probability`"),
        (["--no_repeat_ngram", "1025"], "`no_repeat_ngram` must be at most 1024: 1025"),
        (["--batch_size", "0"], "`batch_size` must be at least 1: 0"),
        (["--best_of", "2", "--num_samples", "3"], "`best_of` must be at least `num_samples` 3: 2"),
        (["--logprobs", "2"], "`logprobs` needs `json` or `out`"),
        (["--out", "x"], "`out` needs `batch_file`"),
        (["--batch_file", "x"], "`batch_file` needs `out`"),
        (["--batch_file", "x", "--out", "y"], "`batch_file` cannot be combined with `prompt` or `prompt_file`"),
        (["--prompt", " \n "], "`--prompt` is only spaces; an empty prompt starts a text"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_one_line(refuse: Sampler, flags: list[str], wanted: str) -> None:
    assert refuse("--prompt", "a", *flags) == wanted


@pytest.mark.parametrize("setting", ["temperature", "top_k", "min_new_tokens", "max_new_tokens"])
def test_numbers_beyond_those_of_tensors_are_no_fault(sample: Sampler, setting: str) -> None:
    flags = {"temperature": ["1e300"], "top_k": ["1" + "0" * 30], "max_new_tokens": ["1" + "0" * 30, "--stop=e"]}
    huge = flags.get(setting, ["1" + "0" * 30, "--max_new_tokens", "1" + "0" * 31, "--stop", "e"])
    assert sample("--prompt", "The", "--max_new_tokens=9", f"--{setting}", *huge)


def test_a_decoder_that_cannot_be_is_one_line(refuse: Sampler) -> None:
    assert refuse("--prompt", "a", "--decoder", "fast").startswith("`decoder` must be one of `auto`, `plain`, ")


@pytest.mark.parametrize("command", ["sample", "serve", "measure"])
@pytest.mark.parametrize("flags", [["--decoder", "compiled"], ["--decoder=compiled"]])
def test_the_removed_decoder_is_refused_with_one_line_that_names_auto(
    command: str, flags: list[str], capsys: Capture
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "no_such_run", *flags])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: the decoder `compiled` was removed, as no gain was measured: use `auto`\n"
    )


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (b'{"prompt": "a"', 'is not JSON: {"prompt": "a"'),
        (b"", "is not JSON: "),
        (b"[" * 100_000, "is not JSON: " + "[" * 40),
        (b'["a"]', 'is not an object such as {"prompt": "..."}: ["a"]'),
        (b"{}", "has no `prompt`"),
        (b'{"prompt": 3}', ": `prompt` must be a text: 3"),
        (b'{"prompt": "a", "id": [1]}', ": `id` must be a text or an integer: [1]"),
        (b'{"prompt": "a", "temprature": 1}', ": unknown setting `temprature`; the nearest is `temperature`"),
        (b'{"prompt": "a", "temperature": "1"}', ": `temperature` must be a number: 1"),
        (b'{"prompt": "a", "temperature": NaN}', ": `temperature` must be finite and at least 0: nan"),
        (b'{"prompt": "a", "top_p": 1.5}', ": `top_p` must be above 0 and at most 1: 1.5"),
        (b'{"prompt": "a", "seed": true}', ": `seed` must be an integer: True"),
        (b'{"prompt": "a", "stop": "x"}', ": `stop` must be a list of texts: x"),
        (b'{"prompt": "a", "banned_tokens": [340]}', ": `banned_tokens` must be below the vocabulary's size 340: 340"),
        (b'{"prompt": "  "}', "is only spaces; an empty prompt starts a text"),
        (b'{"prompt": "\\ud800"}', "holds a lone surrogate"),
        (b'{"prompt": "a\xff"}', "is not UTF-8: byte 0xff at position 13"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_before_anything_is_decoded(
    refuse: Sampler, tmp_path: Path, line: bytes, wanted: str
) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    said = refuse("--batch_file", str(file), "--out", str(out))
    assert said == f"`{file}` line 2{'' if wanted.startswith(':') else ' '}{wanted}"
    assert not out.exists()


def test_files_that_cannot_be_are_one_line(refuse: Sampler, prompts_file: Path, tmp_path: Path) -> None:
    empty, out = tmp_path / "empty.jsonl", tmp_path / "out.jsonl"
    empty.touch()
    assert refuse("--batch_file", str(empty), "--out", str(out)) == f"`{empty}` holds no prompts"
    line = refuse("--batch_file", "nope.jsonl", "--out", str(out))
    assert line == "`nope.jsonl` cannot be read: No such file or directory"
    batch = ["--batch_file", str(prompts_file), "--out"]
    assert refuse(*batch, str(tmp_path)) == f"`{tmp_path}` is not a file"
    missing = tmp_path / "none" / "out.jsonl"
    assert refuse(*batch, str(missing)) == f"`{missing}` cannot be written: No such file or directory"
    assert refuse(*batch, "/dev/full") == "`/dev/full` is not a file"


def test_a_full_disk_is_one_line(refuse: Sampler, prompts_file: Path, small_disk: Callable[[str], Path]) -> None:
    out = small_disk("8k") / "out.jsonl"
    line = refuse("--batch_file", str(prompts_file), "--out", str(out), "--num_samples", "50")
    assert line == f"`{out}` cannot be written: No space left on device"


def test_disk_without_locks_gets_samples_of_one_process_at_a_time(
    sample: Sampler, refuse: Sampler, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    out = tmp_path / "out.jsonl"
    batch = ["--batch_file", str(prompts_file), "--out", str(out)]
    other = lock.FileLock(out)
    assert other.try_acquire()
    line = refuse(*batch)
    assert line.startswith(f"`{out}` is being written by process {os.getpid()} on ")
    assert out.read_bytes() == b""
    other.release()
    sample(*batch)
    assert not (tmp_path / "out.jsonl.lease").exists()
    with open_output(tmp_path / "more", {}) as (append, _):
        append(b"1\n")
        thief = lock.FileLock(tmp_path / "more")
        while not thief.try_acquire(silent=next((tmp_path / "more.lease").iterdir()).name):
            pass  # it has beaten in between
        with pytest.raises(TextgenError, match=r"`.*more` was taken over by process"):
            append(b"2\n")
    thief.release()
    assert (tmp_path / "more").read_bytes() == b"1\n"


def test_samples_of_other_prompts_settings_or_weights_are_not_continued(
    sample: Sampler, refuse: Sampler, prompts_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    batch = ["--batch_file", str(prompts_file), "--out", str(out)]
    sample(*batch)
    before = out.read_bytes()
    assert refuse(*batch, "--top_k", "5") == f"`{out}` was started with other settings: name another file"
    write_prompts(prompts_file, PROMPTS[:-1])
    assert refuse(*batch) == f"`{out}` was started with other prompts: name another file"
    write_prompts(prompts_file, PROMPTS)
    beside = tmp_path / "out.jsonl.origin.json"
    origin = beside.read_text()
    beside.write_text(origin.replace('"weights": "', '"weights": "0'))
    assert refuse(*batch) == f"`{out}` was started with other weights: name another file"
    beside.write_text("null")
    assert refuse(*batch) == f"`{out}` was started with other prompts and settings and weights: name another file"
    beside.unlink()
    wanted = f"`{out}` is not empty and has no readable `{beside.name}` beside it: name another file"
    assert refuse(*batch) == wanted
    beside.write_text(origin)
    with out.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert refuse(*batch) == f"`{out}` is being written by another process"
    assert out.read_bytes() == before
    sample(*batch)
