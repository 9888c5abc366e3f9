"""`--profile`: a trace of each process whose parts are those of the steps, read by `textgen doctor --profile`."""

from __future__ import annotations

import gzip
import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.forking import run_script, server
from textgen.cli import main
from textgen.config import TrainConfig
from textgen.errors import TextgenError
from textgen.reporting.profile import explain_profile, find_traces, read_profile
from textgen.runs.directory import RunDirectory
from textgen.runs.metrics_file import read_metrics
from textgen.training.profile import Profile, memory_json
from textgen.training.step import Learner

PROFILED = ["--max_steps", "8", "--profile", "3:6", "--save_every", "5", "--log_every", "2"]


def trace_of(path: Path) -> dict[str, Any]:
    trace: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return trace


def lines_of(run: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    main(["doctor", "--profile", str(run)])
    return capsys.readouterr().out.splitlines()


@pytest.fixture(scope="module")
def profiled(tiny_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of two processes whose steps 4 to 6 were profiled, and a file of what was logged."""
    run = tmp_path_factory.mktemp("profiled") / "run"
    ended = server().run(["train_distributed.py", *tiny_flags, *PROFILED, "--run_dir", str(run)], processes=2)
    assert [one.returncode for one in ended] == [0, 0], ended
    (run / "log").write_text(ended[0].stderr)
    return run


def test_each_process_leaves_a_trace_of_the_named_steps(profiled: Path) -> None:
    traces = find_traces(profiled)
    assert [path.name for path in traces] == ["process-0-of-2.json.gz", "process-1-of-2.json.gz"]
    for path in traces:
        trace = trace_of(path)
        assert trace["textgen"] == {"first": 3, "last": 6}
        names = [e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation"]
        assert [names.count(part) for part in ("data", "forward", "backward", "update", "agree")] == [3] * 5
        assert names.count("checkpoint") == 1  # of step 5
        assert path.stat().st_size < 50 << 20


def test_table_is_logged_and_the_report_links_to_the_traces(profiled: Path) -> None:
    log = (profiled / "log").read_text()
    assert re.search(r"^part or operator +ms per step  share\n(.*\n)*backward +[\d.]+ +\d+ %$", log, re.MULTILINE)
    page = (profiled / "report.html").read_text()
    links = re.findall(r'href="([^"]+)"', page)
    assert [profiled / link for link in links] == find_traces(profiled)


def test_parts_of_a_step_add_up_to_it(profiled: Path) -> None:
    profile = read_profile(find_traces(profiled)[0])
    assert (profile.first, profile.count, profile.idle) == (3, 3, None)
    assert sum(profile.parts.values()) == pytest.approx(profile.step)
    assert 0 <= profile.exchange < profile.step


def test_doctor_says_in_five_lines_where_time_goes(profiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(profiled, capsys)
    assert [line.partition(":")[0] for line in lines] == [
        "steps 4 to 6, 2 processes", "parts of a step", "slowest operators", "not computing", "try",
    ]  # fmt: skip


def test_rows_of_several_processes_have_the_share_of_exchanges(profiled: Path) -> None:
    shares = [row["train/exchange_share"] for row in read_metrics(profiled) if "train/loss" in row]
    assert len(shares) == 4
    assert all(0 < share <= 1 for share in shares)


def test_profiled_training_computes_the_same(profiled: Path, tiny_flags: list[str], tmp_path: Path) -> None:
    flags = [flag for flag in PROFILED if flag not in ("--profile", "3:6")]
    argv = ["train_distributed.py", *tiny_flags, *flags, "--run_dir", str(tmp_path / "plain")]
    assert [one.returncode for one in server().run(argv, processes=2)] == [0, 0]
    weights = "checkpoints/step-000008/model.safetensors"
    assert (tmp_path / "plain" / weights).read_bytes() == (profiled / weights).read_bytes()
    assert not (tmp_path / "plain" / "profile").exists()


def test_evaluation_ends_a_profile(tiny_flags: list[str], tmp_path: Path) -> None:
    """The samples of an evaluation would fill the trace. A resumed run that has taken the steps goes on without."""
    flags = [*tiny_flags, "--profile", "2:6", "--evaluate_every", "3", "--run_dir", str(tmp_path)]
    run_script("train_distributed.py", *flags)
    (path,) = find_traces(tmp_path)
    assert trace_of(path)["textgen"] == {"first": 2, "last": 3}
    before = path.stat().st_mtime_ns
    ended = run_script("train_distributed.py", *flags, "--max_steps", "8", "--resume_override", "--profile", "1:3")
    assert "no profile: the steps 1:3 were taken before" in ended.stderr
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("failing", ["add_metadata_json", "stop", "export_chrome_trace"])
def test_profile_that_fails_ends_no_training_and_records_no_more_memory(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The device is a GPU by name alone, so the recorder of its memory is a list here."""

    def fail(*_: object) -> None:
        raise RuntimeError("out of order")

    recorded: list[object] = []
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda enabled="all", **_: recorded.append(enabled)
    )
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: profiler)
    monkeypatch.setattr(profiler, failing, fail)
    learner = SimpleNamespace(
        config=TrainConfig(profile="0:2"), progression=SimpleNamespace(step=0),
        accelerator=SimpleNamespace(
            device=torch.device("cuda"), process_index=0, num_processes=1, is_main_process=True
        ),
    )  # fmt: skip
    profile = Profile(cast(Learner, learner), cast(RunDirectory, SimpleNamespace(path=tmp_path)))
    profile.begin_or_end()
    learner.progression.step = 2
    profile.begin_or_end()
    profile.begin_or_end()  # of the next step: it begins none again
    assert caplog.messages == ["no profile: out of order"]
    assert recorded == ["all", None]
    monkeypatch.undo()
    if failing != "export_chrome_trace":
        profiler.stop()


def test_steps_that_will_not_come_are_refused(tiny_flags: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    (ended,) = server().run(["train_distributed.py", *tiny_flags, "--profile", "4:6", "--run_dir", str(run)])
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == "error: `profile` 4:6 names no step: there are 4"
    assert not run.exists()


@pytest.mark.parametrize("value", ["20", "5:5", "6:5", "0:11", "-1:3", "1:2:3", "a:b", ""])
def test_wrong_steps_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"`profile` must be two steps such as 20:23, at most 10 apart"):
        TrainConfig(profile=value)


# --- made-up traces --------------------------------------------------------------------------------------------------


def event(name: str, cat: str, start: float, end: float, tid: int = 1) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "ts": start, "dur": end - start, "tid": tid, "pid": 1}


def write_trace(folder: Path, events: list[dict[str, Any]], process: str = "0-of-1") -> Path:
    path = folder / f"process-{process}.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events, "textgen": {"first": 0, "last": 2}}).encode()))
    return path


PARTS = [event("data", "user_annotation", 0, 100), event("forward", "user_annotation", 100, 1000)]
PARTS += [event("backward", "user_annotation", 1000, 3000), event("update", "user_annotation", 3000, 4000)]


def test_figures_of_a_trace_are_those_counted_by_hand(tmp_path: Path) -> None:
    events = [
        *PARTS,
        event("aten::linear", "cpu_op", 100, 900),
        event("aten::mm", "cpu_op", 200, 800),  # a part of the operator before
        event("aten::mm", "cpu_op", 1000, 2000),
        event("gloo:all_reduce", "user_annotation", 1500, 2600, tid=2),
        {"ph": "M", "name": "process_name", "pid": 1},
    ]
    profile = read_profile(write_trace(tmp_path, events))
    assert profile.step == pytest.approx(2.0)  # 4,000 us of two steps
    assert profile.parts == pytest.approx({"data": 0.05, "forward": 0.45, "backward": 1.0, "update": 0.5, "other": 0})
    assert profile.operators == pytest.approx({"aten::mm": 0.8, "aten::linear": 0.1})
    assert profile.exchange == pytest.approx(0.3)  # from 2000 to 2600 nothing was computed


def test_kernels_of_a_gpu_are_what_computes(tmp_path: Path) -> None:
    events = [*PARTS, event("aten::mm", "cpu_op", 100, 3900), event("gemm", "kernel", 500, 1500, tid=7)]
    events += [event("ncclDevKernel_AllReduce", "kernel", 1400, 2000, tid=8)]
    profile = read_profile(write_trace(tmp_path, events))
    assert profile.operators == pytest.approx({"gemm": 0.5, "ncclDevKernel_AllReduce": 0.3})
    assert profile.exchange == pytest.approx(0.25)
    assert profile.idle == pytest.approx(1.25)
    lines = explain_profile([profile])
    assert lines[2].startswith("slowest kernels: gemm 25 %")
    assert lines[3] == "not computing: waiting for other processes 12 %; the GPU idle 62 %"
    assert "`--cuda_graph`" in lines[4]


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ([event("data", "user_annotation", 0, 1000)], "`--data.cache_dir`"),
        ([event("gloo:all_reduce", "user_annotation", 1000, 3000, tid=2)], "`--gradient_compression bf16`"),
        ([event("update", "user_annotation", 3000, 6000)], "a larger `--batch_size`"),
        ([event("checkpoint", "user_annotation", 4000, 9000), event("log", "user_annotation", 9000, 9900)], "bf16"),
    ],
)  # fmt: skip
def test_advice_is_of_what_takes_the_time(change: list[dict[str, Any]], advice: str, tmp_path: Path) -> None:
    replaced = {one["name"] for one in change}
    profile = read_profile(write_trace(tmp_path, [one for one in PARTS if one["name"] not in replaced] + change))
    assert advice in explain_profile([profile])[-1]


def test_slow_process_is_named(tmp_path: Path) -> None:
    slow = write_trace(tmp_path, [*PARTS, event("update", "user_annotation", 4000, 6000)], "1-of-2")
    waiting = [event("gloo:all_reduce", "user_annotation", 4000, 6000, tid=2)]
    fast = write_trace(tmp_path, [*PARTS, event("agree", "user_annotation", 4000, 6000), *waiting], "0-of-2")
    lines = explain_profile([read_profile(fast), read_profile(slow)])
    assert lines[0].endswith(f"3.0 ms per step (`{slow}`)")
    assert "`process-1-of-2.json.gz` computes 20 % longer" in lines[-1]


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b"{"), gzip.compress(b"[]"), gzip.compress(b'{"traceEvents": [1], "textgen": {}}'),
     gzip.compress(b"{}")[:-3], gzip.compress(b'{"traceEvents": [], "textgen": {"first": 1, "last": 1}}'),
     gzip.compress(b"[" * 100_000), gzip.compress(b'{"traceEvents": []}' * 9)[:20] + b"0" * 30],
    # gzip writes the time: names made of the bytes would differ between the processes that run tests
    ids=["empty", "no gzip", "no JSON", "list", "event", "cut off", "no events", "deep", "damaged"],
)  # fmt: skip
def test_damaged_trace_is_refused_in_a_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "process-0-of-1.json.gz"
    path.write_bytes(content)
    with pytest.raises(TextgenError, match=r"is not a trace of `--profile`: \w+$"):
        read_profile(path)


def test_doctor_refuses_a_run_without_a_profile(tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    for run, line in ((tiny_run, "has no profile: train with `--profile 20:23`"), (tmp_path / "no", "is not a run")):
        with pytest.raises(SystemExit, match="2"):
            lines_of(run, capsys)
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        assert line in err


@pytest.mark.parametrize("json_first", [False, True])
def test_doctor_has_no_json_of_a_profile(json_first: bool, tiny_run: Path, capsys: Any) -> None:
    flags = ["--profile", str(tiny_run)]
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", *(["--json", *flags] if json_first else [*flags, "--json"])])
    assert capsys.readouterr().err == "error: `--profile RUN` is explained in words: leave out `--json`\n"


def test_doctor_passes_steps_on_as_a_setting_of_a_training(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--profile", "20:99"])
    assert "`profile` must be two steps" in capsys.readouterr().err


def test_memory_of_a_gpu_is_written_as_json() -> None:
    """Of the form that `torch.cuda.memory._snapshot()` has; nothing of it is pickled."""
    block = {"size": 512, "requested_size": 400, "address": 1, "state": "active_allocated", "frames": []}
    trace = {"action": "alloc", "addr": 1, "size": 400, "stream": 0, "time_us": 5}
    snapshot = {"segments": [{"device": 0, "blocks": [block]}], "device_traces": [[trace]], "allocator_settings": {}}
    text = memory_json(snapshot)
    assert json.loads(text) == {"segments": snapshot["segments"], "device_traces": snapshot["device_traces"]}
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(text.encode())
