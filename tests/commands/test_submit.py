"""`textgen submit` as far as it goes without Slurm; tests/slurm/test_scripts.py has the rest."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from textgen.cli import main
from textgen.commands.submit import minutes, read_sweep
from textgen.distributed import launch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def slurm_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a launch/slurm of no site, in whose checkout the test stands."""
    folder = tmp_path / "launch" / "slurm"
    shutil.copytree(ROOT / "launch", folder.parent, ignore=shutil.ignore_patterns("site.sh"))
    monkeypatch.setattr("textgen.commands.submit.HOME", tmp_path)
    monkeypatch.setattr("textgen.commands.submit.SLURM", folder)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("SBATCH_", "TEXTGEN_"))]:
        monkeypatch.delenv(name)
    return folder


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a program in the place of sbatch, which says job 42, and return where it notes what it was told."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "sbatch"
    program.write_text(f'#!/bin/sh\nls -d runs/slurm && printf "%s\\n" "$@" "$(env)" > {tmp_path}/told && echo 42\n')
    program.write_text(program.read_text().replace("ls -d runs/slurm", "[ -d runs/slurm ]"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "told"


def submit(command: str) -> None:
    main(["submit", *shlex.split(command)])


def refused(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the line that refuses a command."""
    with pytest.raises(SystemExit) as end:
        submit(command)
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err.removeprefix("error: ").rstrip("\n")


# --- the command -----------------------------------------------------------------------------------------------------


def test_dry_run_prints_the_command_and_leaves_nothing(
    sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(tmp_path.iterdir())
    submit('--nodes 2 --gpus_per_node 8 --time 4:00:00 --preset large --dry_run -- --sample_prompts "it\'s" --seed 3')
    assert capsys.readouterr().out == (
        "mkdir -p runs/slurm\n"
        f"TEXTGEN_HOME={tmp_path} sbatch --parsable --job-name=large --nodes=2 --gpus-per-node=8 --cpus-per-task=32 "
        "--time=4:00:00 --output=runs/slurm/large-%j.out launch/slurm/train.sbatch "
        "--config launch/presets/large.yaml --sample_prompts 'it'\"'\"'s' --seed 3\n"
    )
    assert set(tmp_path.iterdir()) == before


def test_what_is_printed_is_what_is_run(sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit("--name 'a.b-1' --sbatch=--qos=x --sbatch '--comment=a b' -- --sample_prompts '' 'c  d'")
    printed = shlex.split(capsys.readouterr().err.splitlines()[1])
    assert printed[1] == "sbatch"
    told = sbatch.read_text().splitlines()
    assert told[: len(printed) - 2] == printed[2:]
    assert {"--qos=x", "--comment=a b", "--job-name=a.b-1"} <= set(printed)
    assert printed[-3:] == ["--sample_prompts", "", "c  d"]
    assert printed[0] in told


def test_only_the_number_of_the_job_goes_to_standard_output(sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit("")
    said = capsys.readouterr()
    assert said.out == "42\n"
    for line in ("runs/textgen-42", "tail -F runs/slurm/textgen-42.out", "scancel --signal=USR1 --batch 42"):
        assert line in said.err


def test_going_on_is_the_same_command_with_the_directory_of_the_run(
    sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit("--preset large --nodes 2 -- --seed 3")
    again = "textgen submit --preset large --nodes 2 -- --seed 3 --run_dir runs/large-42"
    assert f"continue {again} " in capsys.readouterr().err
    submit(again.removeprefix("textgen submit "))
    assert f"continue {again} " in capsys.readouterr().err
    assert "--run_dir\nruns/large-42\n" in sbatch.read_text()


def test_folder_for_the_logs_is_made_since_slurm_makes_none(sbatch: Path) -> None:
    submit("")  # the sbatch of this test wants it
    assert sbatch.exists()


def test_folder_of_another_kind_is_refused_before_the_job_waits(
    tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").touch()
    assert refused("-- --run_dir mine", capsys) == (
        "`mine` holds `model.safetensors` and is not a run: name another `--run_dir`"
    )
    assert not sbatch.exists()


def test_paths_are_whole_where_the_checkout_is_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    submit("--preset quick --dry_run")
    words = shlex.split(capsys.readouterr().out)
    assert str(tmp_path / "launch/slurm/train.sbatch") in words
    assert str(tmp_path / "launch/presets/quick.yaml") in words


def test_site_says_account_and_processes(slurm_folder: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (slurm_folder / "site.sh").write_text(
        "echo welcome; export SBATCH_ACCOUNT='my project' TEXTGEN_PROCESSES_PER_NODE=6 A=$'b\\nc'\n"
    )
    assert refused("--gpus_per_node 0", capsys) == (
        "batch_size 128 is not divisible by 6 processes x 1 gradient_accumulation_steps"
    )
    submit("--gpus_per_node 0 -- --batch_size 12")
    told = sbatch.read_text()
    assert "\nSBATCH_ACCOUNT=my project\n" in told
    assert "--cpus-per-task=24\n" in told
    assert "--gpus" not in told
    said = capsys.readouterr()
    assert said.out == "42\n"
    assert said.err.startswith("mkdir -p runs/slurm\nsource launch/slurm/site.sh\nTEXTGEN_HOME=")


# --- what is refused -------------------------------------------------------------------------------------------------


def test_global_batch_is_refused_in_the_words_of_the_trainer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused("--nodes 3 --gpus_per_node 2 -- --batch_size 64 --gradient_accumulation_steps 2", capsys)
    for name, value in {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "6", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(launch.TextgenError) as error:
        launch.start("no", batch_size=64, gradient_accumulation_steps=2)
    assert said == str(error.value)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("-- --batch_sise 3", "unknown setting `batch_sise`; the nearest is `batch_size`"),
        ("-- --learning_rate fast", "`learning_rate` must be a number: fast"),
        ("--seed 3", "`--seed` is a flag of the training: write it after ` -- `"),
        ("--model.dropout=0.5", "`--model.dropout=0.5` is a flag of the training: write it after ` -- `"),
        ("--node 2", "unknown setting `node`; the nearest is `nodes`"),
        ("--nodes 0", "`nodes` must be at least 1: 0"),
        ("--gpus_per_node -1", "`gpus_per_node` must be at least 0: -1"),
        ("--time soon", "`time` must be 90 (minutes), 4:00:00 or the like, above 3 minutes: soon"),
        ("--time 3", "`time` must be 90 (minutes), 4:00:00 or the like, above 3 minutes: 3"),
        (
            "--preset larg",
            "unknown setting `larg` for `--preset`, which has default, large, original-char, quick; the nearest is "
            "`large`",
        ),
        ("--name a/b", "`name` must be the name of a folder, of letters, digits and `._-`: a/b"),
        ("--sbatch qos=x", "`sbatch` must be an option such as `--qos=x`: qos=x"),
        ("--array 1-3", "`array` needs a `--sweep`: 1-3"),
        ("--sweep gone.txt", "`gone.txt` cannot be read: No such file or directory"),
        ("--sweep empty.txt", "`empty.txt` has no line of flags"),
        ("--sweep three.txt --array 2,4", "`three.txt` has no training 4: it has 3"),
        ("--sweep three.txt --array 0", "`three.txt` has no training 0: it has 3"),
        ("--sweep three.txt --array 1;2", "`array` must be numbers and ranges such as 1,4-6 or 1-9%2: 1;2"),
        (
            "--sweep three.txt -- --run_dir x",
            "`run_dir` cannot be set in a sweep, whose trainings get a folder each: x",
        ),
        ("--sweep open.txt", "`open.txt` line 2 has a quote that is not closed: --seed '4"),
        ("--sweep wrong.txt", "`seed` must be an integer: four"),
        ("-- --init_from gone", "`gone` has no `config.json`: not a checkpoint directory"),
        ("--sweep three.txt --gpus_per_node 5", "batch_size 128 is not divisible by 5 processes x 1 "),
    ],
)
def test_what_would_fail_later_is_refused_now(
    command: str, said: str, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("three.txt").write_text("--seed 1\n--seed 2\n--seed 3\n")
    Path("empty.txt").write_text("# nothing yet\n\n")
    Path("open.txt").write_text("--seed 3\n--seed '4\n")
    Path("wrong.txt").write_text("--seed 3\n--seed four\n")
    assert refused(command.replace(";", "';'"), capsys).startswith(said)
    assert not sbatch.exists()
    assert not Path("runs").exists()


def test_machine_without_sbatch_is_told_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(Path.cwd()))
    with pytest.raises(SystemExit) as end:
        submit("")
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith("error: there is no `sbatch` here: submit on a machine of the cluster\n")


def test_last_line_of_a_sbatch_that_refuses_is_told(sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = Path("bin/sbatch")
    program.write_text(
        "#!/bin/sh\necho 'sbatch: error: first' >&2; echo 'sbatch: error: invalid account' >&2; exit 1\n"
    )
    with pytest.raises(SystemExit) as end:
        submit("")
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (2, "")
    assert said.err.endswith("error: sbatch refuses the job: invalid account\n")


def test_site_that_fails_is_named(slurm_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (slurm_folder / "site.sh").write_text("echo 'no module slurm' >&2\nfalse\n")
    assert refused("--dry_run", capsys) == f"`{slurm_folder / 'site.sh'}` fails: no module slurm"


def test_checking_takes_no_torch() -> None:
    script = "import sys; from textgen.cli import main; main(['submit', '--dry_run']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("90", 90), ("5:30", 5.5), ("4:00:00", 240), ("1-12", 2160), ("1-0:30", 1470), ("2-1:01:30", 2941.5),
        ("", None), ("4h", None), ("1-", None), ("-1", None), ("1:2:3:4", None), ("1.5", None), ("9\n", None),
    ],
)  # fmt: skip
def test_limits_of_time_are_read_as_slurm_reads_them(limit: str, expected: float | None) -> None:
    assert minutes(limit) == expected


# --- sweeps ----------------------------------------------------------------------------------------------------------

SWEEP = """\
# learning rates
--learning_rate 0.1   # high

   --learning_rate 0.2 --sample_prompts "it's  so" 'say "hi"' a\\ b '' '#1' $HOME `id` $(id) * ~ ;
\t
--run_name-like é
"""


def test_lines_of_a_sweep_are_quoted_as_in_a_shell_and_nothing_is_expanded() -> None:
    Path("flags.txt").write_text(SWEEP)
    assert read_sweep("flags.txt") == [
        ["--learning_rate", "0.1"],
        [
            "--learning_rate", "0.2", "--sample_prompts", "it's  so", 'say "hi"', "a b", "", "#1", "$HOME", "`id`",
            "$(id)", "*", "~", ";",
        ],
        ["--run_name-like", "é"],
    ]  # fmt: skip


def test_job_gets_the_flags_of_all_then_those_of_its_line() -> None:
    Path("flags.txt").write_text(SWEEP)
    argv = [sys.executable, "-m", "textgen.commands.submit", "2", "flags.txt", "--sample_prompts", "a\nb", ""]
    done = subprocess.run(argv, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert done.stdout.split("\0") == ["--sample_prompts", "a\nb", "", *read_sweep("flags.txt")[1], ""]


def test_sweep_is_an_array_over_its_lines(sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("flags.txt").write_text("--seed 1\n\n# no\n--seed 2\n--seed 3\n")
    submit("--sweep flags.txt --preset quick -- --max_steps 5")
    told = sbatch.read_text().splitlines()
    assert "--array=1-3" in told
    assert "--output=runs/slurm/quick-%A_%a.out" in told
    at = told.index("launch/slurm/sweep.sbatch")
    assert told[at + 1 : at + 6] == ["flags.txt", "--config", "launch/presets/quick.yaml", "--max_steps", "5"]
    assert "runs/quick-42/*" in capsys.readouterr().err
    submit("--sweep flags.txt --array 2-3%1")
    assert "--array=2-3%1" in sbatch.read_text().splitlines()
