"""Bad input: one line that says what, where, seen and wanted, exit code 2, and nothing left behind."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from textgen.cli import main, train_main
from textgen.commands import parsing
from textgen.runs.directory import RunDirectory, read_status
from textgen.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
TRAIN = [sys.executable, str(ROOT / "train_distributed.py")]
TEXTGEN = [sys.executable, "-m", "textgen"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]

Capture = pytest.CaptureFixture[str]
Refuse = Callable[..., str]


@pytest.fixture
def refuse_training(tiny_flags: list[str], tmp_path: Path, capsys: Capture) -> Refuse:
    """Return a function that trains with more flags and returns the one line with which that is refused.

    It has its own cache and run directory, and sees to it that neither holds anything afterwards.
    """

    def call(*flags: str) -> str:
        run_dir, cache = tmp_path / "run", tmp_path / "cache"
        line = refusal(
            lambda: train_main([*tiny_flags, "--run_dir", str(run_dir), "--data.cache_dir", str(cache), *flags]), capsys
        )
        assert not run_dir.exists()
        assert {path.name for path in cache.rglob("*")} <= {"prepare.lock"}
        return line

    return call


def refusal(action: Callable[[], None], capsys: Capture) -> str:
    """Return the one line with which an action is refused, without its `error: `."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as refused:
        action()
    out, err = capsys.readouterr()
    assert (refused.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").removesuffix("\n")


def run_refused(argv: list[str | bytes]) -> tuple[str, int]:
    """Run a process that must end with exit code 2; return its one error line, and its peak memory in bytes."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(argv, stdout=out, stderr=err, stdin=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        assert out.read() == b""
        lines = err.read().decode().splitlines()
    assert process.returncode == 2, lines
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert not any("Traceback" in line or "Warning" in line for line in lines)
    return lines[-1].removeprefix("error: "), usage.ru_maxrss * 1024


def changed_checkpoint(run: Path, directory: Path) -> Path:
    """Return a copy of a run's checkpoint, to be damaged."""
    return shutil.copytree(next((run / "checkpoints").iterdir()), directory / "step-000004")


def model_alone(run: Path, directory: Path) -> Path:
    """Return a copy of the model of a run's checkpoint, as it would be published, to be damaged."""
    copy = changed_checkpoint(run, directory)
    for name in ("manifest.json", "trainer.json", "optimizer.safetensors", "lanes.safetensors"):
        (copy / name).unlink()
    return copy


# --- settings --------------------------------------------------------------------------------------------------------


def test_unknown_flag_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    line, _ = run_refused([*TRAIN, "--run_dir", str(tmp_path / "run"), "--lerning_rate", "0.1"])
    assert line == "unknown setting `lerning_rate`; the nearest is `learning_rate`"
    assert not (tmp_path / "run").exists()


def test_unknown_flag_of_a_group_is_refused_with_the_full_name(refuse_training: Refuse, capsys: Capture) -> None:
    assert refuse_training("--vocab_size", "300").endswith("the nearest is `tokenizer.vocab_size`")
    assert refuse_training("--model.hidden-size=3").endswith("the nearest is `model.hidden_size`")
    line = refusal(lambda: main(["sample", "runs/x", "--temprature", "1"]), capsys)
    assert line == "unknown setting `temprature`; the nearest is `temperature`"
    line = refusal(lambda: main(["evaluate", "runs/x", "--dta=x"]), capsys)
    assert line == "unknown setting `dta`; the nearest is `data`"


def test_unknown_key_of_a_file_is_refused_with_the_nearest_name(refuse_training: Refuse, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model:\n  num_layer: 2\n")
    assert refuse_training("--config", str(file)) == (
        f"unknown setting `model.num_layer` in `{file}`; the nearest is `model.num_layers`"
    )
    file.write_text("mixed_precision: no\n")
    assert refuse_training("--config", str(file)).endswith(
        ": False (YAML reads a bare `no` as false: put it in quotes)"
    )
    assert refuse_training("--config", "nope.yaml") == "`nope.yaml` cannot be read: No such file or directory"
    presets = "`default`, `large`, `original-char`, `quick`"
    assert refuse_training("--config", "quik").endswith(f"No such file or directory; the presets are {presets}")
    file.write_bytes(b"run_dir: \xff\n")
    assert refuse_training("--config", str(file)) == f"`{file}` is not UTF-8: byte 0xff at position 9"


def test_presets_are_named_only_where_there_is_no_file(
    refuse_training: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=denied))
    assert refuse_training("--config", "mine") == "`mine` cannot be read: Permission denied"


def test_an_advice_on_memory_is_about_tensors(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own memory mostly holds texts."""
    monkeypatch.setattr("textgen.commands.tokenize.tokenize_command", Mock(side_effect=MemoryError()))
    assert refusal(lambda: main(["tokenize", str(tmp_path)]), capsys) == "not enough memory: MemoryError"


def test_flag_without_a_value_and_stray_words_are_refused(refuse_training: Refuse, capsys: Capture) -> None:
    line = "`--batch_size` wants a value; one that begins with a dash is written `--batch_size=-...`"
    assert refuse_training("--batch_size") == line
    line = "`--stop` wants a value; one that begins with a dash is written `--stop=-...`"
    assert refusal(lambda: main(["sample", "runs/x", "--stop"]), capsys) == line
    assert refuse_training("--model", "3") == "`model` must be a YAML file of settings: 3"
    assert refuse_training("--seed", "1", "2") == "unexpected argument `2`"
    assert refusal(lambda: main(["sample"]), capsys) == "an argument is missing: `checkpoint`"
    wanted = refusal(lambda: main([]), capsys)
    assert wanted.startswith("`textgen` wants one of `train`, `prepare`, `tune`, `submit`, `doctor`, ")
    assert refusal(lambda: main(["sampel"]), capsys) == f"{wanted}: sampel"


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--learning_rate", "nan"], "`learning_rate` must be a number: nan"),
        (["--learning_rate", "-0.1"], "`learning_rate` must be a finite number above 0: -0.1"),
        (["--batch_size", "0"], "`batch_size` must be a finite number above 0: 0"),
        (["--model.dropout", "-0.5"], "`model.dropout` must be at least 0 and below 1: -0.5"),
        (["--gradient_accumulation_steps", "3"], "batch_size 8 is not divisible by 3 gradient_accumulation_steps"),
    ],
)
def test_number_that_cannot_be_is_refused(flags: list[str], wanted: str, refuse_training: Refuse) -> None:
    assert refuse_training(*flags) == wanted


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--temperature", "-1"], "`temperature` must be finite and at least 0: -1.0"),
        (["--temperature", ".nan"], "`temperature` must be finite and at least 0: nan"),
        (["--temperature", "null"], "`temperature` must be a number: None"),
        (["--top_k", "0"], "`top_k` must be at least 1: 0"),
        (["--top_p", "1.5"], "`top_p` must be above 0 and at most 1: 1.5"),
        (["--max_new_tokens", "0"], "`max_new_tokens` must be at least 1: 0"),
        (["--num_samples", "-2"], "`num_samples` must be at least 1: -2"),
        (["--seed", "x"], "`seed` must be an integer: x"),
    ],
)
def test_number_that_cannot_be_sampled_with_is_refused(flags: list[str], wanted: str, capsys: Capture) -> None:
    assert refusal(lambda: main(["sample", "runs/x", "--prompt", "a", *flags]), capsys) == wanted


def test_number_that_cannot_be_scored_with_is_refused(capsys: Capture) -> None:
    assert refusal(lambda: main(["evaluate", "runs/x", "--limit", "0"]), capsys) == "`limit` must be at least 1: 0"
    line = refusal(lambda: main(["evaluate", "runs/x", "--batch_size", "1.5"]), capsys)
    assert line == "`batch_size` must be an integer: 1.5"


# --- data ------------------------------------------------------------------------------------------------------------


def test_missing_file_is_refused(tiny_flags: list[str], tmp_path: Path) -> None:
    file, run_dir = tmp_path / "nope.jsonl", tmp_path / "run"
    line, _ = run_refused([*TRAIN, *tiny_flags, "--data.files", str(file), "--run_dir", str(run_dir)])
    assert line == f"`{file}` does not exist"
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "`FILE` is empty"),
        (b'{"id": 1, "review": "good"}\n', "`FILE` line 1 has no column `text`; it has `id`, `review`"),
        (b'{"text": "good"}\n{"text": "b\xffd"}\n', "`FILE` line 2 is not UTF-8: byte 0xff"),
        (b'{"text": "good"}\n{"text": "b\\ud800d"}\n', "`FILE` line 2: `text` holds a lone surrogate"),
        (b'{"text": "good"}\n{"text": 3}\n', "`FILE` line 2: `text` is not a string: 3"),
        (b'{"text": "good"\n', "`FILE` line 1 is not valid JSON: "),
    ],
    ids=["empty file", "missing column", "not UTF-8", "lone surrogate", "no string", "no JSON"],
)
def test_bad_file_is_refused_by_name(
    content: bytes, wanted: str, refuse_training: Refuse, tiny_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "reviews.jsonl"
    file.write_bytes(content)
    wanted = wanted.replace("FILE", str(file))
    assert refuse_training("--data.files", str(file)).startswith(wanted)
    assert refusal(lambda: main(["evaluate", str(tiny_run), "--data", str(file)]), capsys).startswith(wanted)


def test_file_of_empty_reviews_is_refused(
    refuse_training: Refuse, tiny_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "reviews.jsonl"
    file.write_text('{"text": ""}\n{"text": " \\n"}\n')
    line = refuse_training("--data.files", str(file))
    assert "no documents to train on; 2 read" in line
    assert line.endswith("dropped empty 2")
    line = refusal(lambda: main(["evaluate", str(tiny_run), "--data", str(file)]), capsys)
    assert line == f"no documents in `{file}`"


def test_line_of_100_mb_is_refused_in_bounded_memory(tiny_flags: list[str], tmp_path: Path) -> None:
    _, without = run_refused([*TRAIN, *tiny_flags, "--data.files", "nope.jsonl", "--run_dir", str(tmp_path / "run")])
    file = tmp_path / "long.jsonl"
    with file.open("wb") as written:
        written.write(b'{"text": "')
        for _ in range(100):
            written.write(b"good movie" * 100_000)
        written.write(b'"}\n')
    flags = [*tiny_flags, "--data.files", str(file), "--run_dir", str(tmp_path / "run")]
    line, peak = run_refused([*TRAIN, *flags])
    assert line == f"`{file}` line 1 is longer than the limit of a row, 32 MiB; a longer text can be a .txt file"
    assert peak - without < 80e6
    assert not (tmp_path / "run").exists()


def test_too_few_tokens_are_refused_with_sizes_that_fit(
    refuse_training: Refuse, tiny_flags: list[str], tmp_path: Path, capsys: Capture
) -> None:
    flags = [*tiny_flags, "--run_dir", str(tmp_path / "run"), "--batch_size", "100000"]
    line = refusal(lambda: train_main(flags), capsys)
    assert " tokens are too few for batch_size 100000 x seq_len 16: batch_size " in line
    fitting = line.split(": batch_size ")[1].removesuffix(" would fit")
    assert not (tmp_path / "run").exists()
    train_main([*flags, "--batch_size", fitting, "--dry_run"])
    line = refusal(lambda: train_main([*flags, "--batch_size", str(int(fitting) + 1)]), capsys)
    assert line.endswith(f": batch_size {fitting} would fit")


def test_a_dry_run_refuses_the_folder_that_its_training_would(
    tiny_flags: list[str], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "config.yaml").write_text("mine: true\n")
    flags = [*tiny_flags, "--run_dir", str(tmp_path)]
    dry = refusal(lambda: train_main([*flags, "--dry_run"]), capsys)
    assert dry == refusal(lambda: train_main(flags), capsys)
    assert dry == f"`{tmp_path}` holds `config.yaml` and is not a run: name another `--run_dir`"


def test_model_that_memory_cannot_hold_is_refused(tiny_flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    for size in ("10000000", "10000000000"):  # 1.6 petabytes, and more than torch can count
        flags = [*tiny_flags, "--run_dir", str(tmp_path / "run"), "--model.hidden_size", size]
        line = refusal(lambda: train_main(flags), capsys)  # noqa: B023
        assert line.startswith("not enough memory; a smaller model, `batch_size` or `seq_len` needs less: ")
    assert not (tmp_path / "run").exists()


def test_vocabulary_larger_than_the_text_allows_is_refused_with_the_largest(refuse_training: Refuse) -> None:
    line = refuse_training("--tokenizer.vocab_size", "50000")
    assert line.startswith("vocab_size 50000 is too large for this text: at most ")
    assert line.endswith(" fit (setting `tokenizer.vocab_size`)")


def test_lone_surrogate_in_a_prompt_is_refused(tiny_run: Path, tmp_path: Path, capsys: Capture) -> None:
    line, _ = run_refused([*TEXTGEN, "sample", str(tiny_run), "--prompt", b"a\xffb"])
    assert line == "`--prompt` is not UTF-8: byte 0xff at position 1"
    surrogate = "\ud800".encode("utf-8", "surrogatepass")
    line, _ = run_refused([*TEXTGEN, "sample", str(tiny_run), "--prompt", b"a" + surrogate])
    assert line == "`--prompt` is not UTF-8: byte 0xed at position 1"
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"a\xff")
    line = refusal(lambda: main(["sample", str(tiny_run), "--prompt_file", str(file)]), capsys)
    assert line == f"`{file}` is not UTF-8: byte 0xff at position 1"
    line = refusal(lambda: main(["sample", str(tiny_run), "--prompt_file", "nope.txt"]), capsys)
    assert line == "`nope.txt` cannot be read: No such file or directory"


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["sample", "evaluate"])
def test_what_is_no_checkpoint_is_refused(verb: str, tmp_path: Path, tiny_run: Path, capsys: Capture) -> None:
    prompt = ["--prompt", "a"] if verb == "sample" else []
    line = refusal(lambda: main([verb, str(tmp_path), *prompt]), capsys)
    assert line == f"`{tmp_path}` has no `config.json`: not a checkpoint directory"

    damaged = changed_checkpoint(tiny_run, tmp_path / "a")
    file = damaged / "model.safetensors"
    weights = file.read_bytes()
    for content in (weights[:-100], b"", b"\xff" * 1000):
        file.write_bytes(content)
        line = refusal(lambda: main([verb, str(damaged), *prompt]), capsys)
        assert line == f"`{file}` has {len(content)} bytes, wanted {len(weights)}"
    file.write_bytes(weights[:-100] + b"\0" * 100)
    assert refusal(lambda: main([verb, str(damaged), *prompt]), capsys).startswith(f"`{file}` is damaged: sha256 ")


@pytest.mark.parametrize("verb", ["sample", "evaluate"])
def test_what_is_no_model_is_refused(verb: str, tmp_path: Path, tiny_run: Path, capsys: Capture) -> None:
    """Of a model alone no manifest tells what it was."""
    prompt = ["--prompt", "a"] if verb == "sample" else []
    damaged = model_alone(tiny_run, tmp_path / "a")
    weights = (damaged / "model.safetensors").read_bytes()
    for content in (weights[:-100], b"", b"\xff" * 1000):
        (damaged / "model.safetensors").write_bytes(content)
        line = refusal(lambda: main([verb, str(damaged), *prompt]), capsys)
        assert line.startswith(f"`{damaged / 'model.safetensors'}` ")

    other = model_alone(tiny_run, tmp_path / "b")
    (other / "tokenizer.model").write_bytes(train_tokenizer(["a b c"], vocab_size=300, model_type="char"))
    line = refusal(lambda: main([verb, str(other), *prompt]), capsys)
    assert line.startswith(f"`{other}/tokenizer.model` ")
    assert "the model beside it" in line

    (other / "tokenizer.model").unlink()
    assert refusal(lambda: main([verb, str(other), *prompt]), capsys) == f"`{other}` has no `tokenizer.model`"


def test_resume_from_a_path_that_is_not_there_is_refused(
    tiny_flags: list[str], tmp_path: Path, capsys: Capture
) -> None:
    nowhere, run_dir = tmp_path / "step-000009", tmp_path / "run"
    line = refusal(lambda: train_main([*tiny_flags, "--run_dir", str(run_dir), "--resume", str(nowhere)]), capsys)
    assert line == f"`{nowhere}` is neither a checkpoint nor a run with one"
    assert not run_dir.exists()


@pytest.fixture
def copied_run(tiny_run: Path, tmp_path: Path) -> Iterator[Path]:
    """Yield a copy of the tiny run; afterwards it must hold what the test left in it, byte for byte."""
    copy = shutil.copytree(tiny_run, tmp_path / "copy")
    yield copy
    names = {path.relative_to(tiny_run) for path in tiny_run.rglob("*")}
    assert {path.relative_to(copy) for path in copy.rglob("*")} == names
    for name in ("config.yaml", "metrics.jsonl", "samples.md"):
        assert (copy / name).read_bytes() == (tiny_run / name).read_bytes()


def test_resume_with_damaged_weights_is_refused(tiny_flags: list[str], copied_run: Path, capsys: Capture) -> None:
    damaged = copied_run / "checkpoints" / "step-000004" / "model.safetensors"
    weights = damaged.read_bytes()
    damaged.write_bytes(weights[:-100])
    flags = [*tiny_flags, "--run_dir", str(copied_run), "--max_steps", "6"]
    line = refusal(lambda: train_main(flags), capsys)
    wrong = f"`{damaged}` has {len(weights) - 100} bytes, wanted {len(weights)}"
    assert line == (
        f"no checkpoint of `{copied_run}` is valid: {wrong}; "
        "remove them to start from step 0, or name another `--run_dir`"
    )
    line = refusal(lambda: train_main([*flags, "--resume", str(damaged.parent)]), capsys)
    assert line == wrong


def test_resume_with_another_tokenizer_is_refused(tiny_flags: list[str], copied_run: Path, capsys: Capture) -> None:
    flags = [*tiny_flags, "--run_dir", str(copied_run), "--tokenizer.vocab_size", "330"]
    line = refusal(lambda: train_main(flags), capsys)
    assert f"`{copied_run / 'checkpoints' / 'step-000004'}` was made with " in line
    assert line.endswith(
        "`--resume_override` resumes regardless, another `--run_dir` starts a new run, with `--init_from "
        f"{copied_run / 'checkpoints' / 'step-000004'}` from its weights"
    )


def test_resume_with_another_tokenizer_names_the_tokenizer(
    tiny_flags: list[str], copied_run: Path, capsys: Capture
) -> None:
    flags = [*tiny_flags, "--run_dir", str(copied_run), "--tokenizer.vocab_size", "330"]
    line = refusal(lambda: train_main(flags), capsys)
    assert "tokenizer" in line.replace(str(copied_run), "")
    assert "330" in line


def test_resume_with_another_model_is_refused_with_both_values(
    tiny_flags: list[str], copied_run: Path, capsys: Capture
) -> None:
    flags = [*tiny_flags, "--run_dir", str(copied_run), "--learning_rate", "0.5"]
    line = refusal(lambda: train_main(flags), capsys)
    assert line.startswith("`learning_rate` is 0.5, ")
    assert " was made with 0.001: " in line


def test_word_tokenizer_has_no_bits_per_byte(tiny_flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    run_dir = tmp_path / "run"
    train_main([*tiny_flags, "--run_dir", str(run_dir), "--tokenizer.model_type", "word"])
    line = refusal(lambda: main(["evaluate", str(run_dir), "--json"]), capsys)
    assert line == f"`{run_dir}` has a word tokenizer, which loses text: it has no bits per byte"


def test_training_with_a_word_tokenizer_tells_no_bits_per_byte(
    tiny_flags: list[str], tmp_path: Path, capsys: Capture
) -> None:
    train_main([*tiny_flags, "--run_dir", str(tmp_path / "run"), "--tokenizer.model_type", "word"])
    assert "bits per byte" not in capsys.readouterr().out
    assert "bits_per_byte" not in (tmp_path / "run" / "metrics.jsonl").read_text()


# --- disk ------------------------------------------------------------------------------------------------------------


def test_disk_too_small_for_the_checkpoints_is_refused_with_free_and_needed_space(
    small_disk: Callable[[str], Path], tiny_flags: list[str], capsys: Capture
) -> None:
    run_dir = small_disk("200k") / "run"
    line = refusal(lambda: train_main([*tiny_flags, "--run_dir", str(run_dir)]), capsys)
    assert line == (
        f"`{run_dir}` has 0.2 MB of free space, the run needs 0.3: 1 checkpoint of 0.3 MB at a time, see `--keep_last`"
    )
    assert not run_dir.exists()


def test_full_disk_while_a_checkpoint_is_saved_leaves_no_part_of_it(
    small_disk: Callable[[str], Path], tiny_flags: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another job has filled it since the start: the check there is told of space that is not."""
    monkeypatch.setattr(RunDirectory, "require_space", lambda *_, **__: None)
    run_dir = small_disk("200k") / "run"
    line = refusal(lambda: train_main([*tiny_flags, "--run_dir", str(run_dir), "--save_every", "1"]), capsys)
    assert line == f"No space left on device: `{run_dir / 'checkpoints' / 'step-000001'}`"
    assert list((run_dir / "checkpoints").iterdir()) == []
    assert read_status(run_dir)["state"] == "failed"


def test_full_disk_while_text_is_encoded_leaves_no_part_of_a_store(
    small_disk: Callable[[str], Path], refuse_training: Refuse
) -> None:
    cache = small_disk("24k") / "cache"
    assert refuse_training("--data.cache_dir", str(cache)).startswith("No space left on device")
    assert [path.name for path in cache.iterdir()] == ["prepare.lock"]


def test_a_file_system_without_new_files_is_refused(tiny_flags: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        train_main([*tiny_flags, "--run_dir", "/proc/run"])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: No such file or directory: `/proc/run`"


def test_a_current_folder_that_was_deleted_is_refused(tmp_path: Path) -> None:
    program = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); os.rmdir(os.getcwd()); "
    program += "from textgen.cli import main; main(['sample', 'runs/a'])"
    (tmp_path / "gone").mkdir()
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "gone", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: the current folder was deleted: change to another one\n")


def test_an_error_with_the_name_of_a_file_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["verify", str(tmp_path / "a\nb\rc")])
    (line,) = capsys.readouterr().err.splitlines()
    assert "a\\nb\\rc" in line


def test_run_directory_that_cannot_be_made_is_refused(tiny_flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").touch()
    line = refusal(lambda: train_main([*tiny_flags, "--run_dir", str(tmp_path / "file" / "run")]), capsys)
    assert line == f"Not a directory: `{tmp_path / 'file' / 'run'}`"


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--batch_size", "7"], "batch_size 7 is not divisible by 2 processes x 1 gradient_accumulation_steps"),
        (["--data.files", "nope.jsonl"], "`nope.jsonl` does not exist"),
    ],
    ids=["before the processes meet", "after"],
)
def test_error_of_two_processes_is_printed_once(
    flags: list[str], wanted: str, tiny_flags: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    argv = [*LAUNCH, str(ROOT / "train_distributed.py"), *tiny_flags, "--run_dir", str(run_dir), *flags]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    # the launcher has an exit code of its own, and adds its own traceback
    assert ended.returncode != 0
    assert [line for line in ended.stderr.splitlines() if wanted in line] == [f"error: {wanted}"]
    assert ended.stderr.count("\nerror: ") == ended.stderr.count("Traceback") == 1
    assert "(exitcode: 2) local_rank: 0" in ended.stderr
    assert not run_dir.exists()


def test_error_that_only_a_later_process_meets_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, refuse_training: Refuse
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(parsing, "PEER_WAIT_SECONDS", 0)
    assert refuse_training("--batch_size", "0").startswith("process 1: `batch_size` must be")
