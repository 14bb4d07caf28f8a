"""``python -m dsjax.data.prepare`` as a user runs it: real processes, killed ones, bad input, and clusters."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from dsjax.data.prepared_set import open_set
from dsjax.data.tokenizer import CONTROL_TOKENS

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[3]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}


def sentences(number: int, count: int) -> str:
    """Prose of its own for every number."""
    rng = random.Random(number)
    words = [
        f"{chr(97 + rng.randrange(26))}{chr(97 + rng.randrange(26))}or{rng.randrange(99)}" for _ in range(400)
    ]
    words += ["and", "the", "of", "to", "with", "that"] * 20
    return "".join(" ".join(rng.choices(words, k=12)).capitalize() + ".\n" for _ in range(count))


def near_duplicates() -> list[str]:
    """Of the first thirty lines of web.jsonl."""
    return [sentences(100 + number, 40).replace("and", "or", 3) for number in range(30)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Five megabytes of text, JSON lines and parquet, some of it twice: several tasks."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (folder / f"{number}.txt").write_text(sentences(number, 600))
    lines = [json.dumps({"text": sentences(100 + number, 40)}) for number in range(200)]
    (folder / "web.jsonl").write_text("\n".join([*lines, *lines[:50]]))
    (folder / "more.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[50:80]).encode()))
    table = pyarrow.table(
        {"text": near_duplicates() + [sentences(1000 + number, 40) for number in range(100)]}
    )
    parquet.write_table(table, folder / "books.parquet", row_group_size=40)
    return folder


def command(corpus: Path, output: Path, *flags: str) -> list[str]:
    inputs = [f"{corpus}/*.txt", f"{corpus}/web.jsonl", f"{corpus}/more.jsonl.gz", f"{corpus}/*.parquet"]
    program = [sys.executable, "-m", "dsjax.data.prepare", "--input", *inputs, f"--output={output}"]
    return [*program, "--train-tokenizer", "--vocab-size=600", "--heldout-fraction=0.1", *flags]


def finish(arguments: list[str], status: int = 0, **environment: str) -> str:
    done = subprocess.run(
        arguments, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "set"
    text = finish(command(corpus, folder, "--workers=1"))
    for doing in ("reading and filtering", "looking for duplicates", "tokenising"):
        assert f"{doing}: " in text
    assert "rejected: 80 exact duplicate, 30 near-duplicate" in text
    assert f"--config.data.sets={folder}" in text
    return folder


def test_any_number_of_workers_writes_the_same_bytes(corpus, undisturbed, tmp_path):
    finish(command(corpus, tmp_path / "set", "--workers=4"))
    assert hashes(tmp_path / "set") == hashes(undisturbed)
    assert len(list(undisturbed.glob("train-*.array_record"))) == 4
    assert not (tmp_path / "set" / "work").exists()


def test_the_counts_of_the_manifest_are_those_of_the_texts(undisturbed):
    made = open_set(undisturbed)
    counts = made.manifest["counts"]
    assert counts["read"]["documents"] == 40 + 250 + 30 + 130
    assert counts["filtered"] == counts["read"]
    assert counts["without_exact_duplicates"]["documents"] == 40 + 200 + 130
    assert counts["without_near_duplicates"]["documents"] == 40 + 200 + 100
    # Files are read in the order of their names: what nearly repeats web.jsonl stands in books.parquet, before it.
    texts = near_duplicates() + [sentences(n, 600) for n in range(40)]
    texts += [sentences(n, 40) for n in (*range(130, 300), *range(1000, 1100))]
    assert counts["without_near_duplicates"]["bytes"] == sum(map(len, texts))
    found = []
    for documents in (made.train, made.heldout):
        for number, length in enumerate(documents.lengths.tolist()):
            found.append(made.tokenizer.decode(documents.text(number, 0, length)))
    assert sorted(found) == sorted(texts)


def at_work(corpus: Path, folder: Path, moment: str) -> subprocess.Popen[str]:
    """A command with two workers in a session of its own, when it has just written the file ``moment``."""
    process = subprocess.Popen(
        command(corpus, folder, "--workers=2"),
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        # Where the tests run in the background of a shell, signals of its terminal are ignored, and so by every child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (folder / moment).exists():
        assert process.poll() is None
        time.sleep(0.002)
    return process


@pytest.mark.parametrize("moment", ["work/clean-00002.json", "work/tokens-00001.json"])
def test_a_killed_command_goes_on_and_writes_the_same_bytes(corpus, undisturbed, tmp_path, moment):
    folder = tmp_path / "set"
    process = at_work(corpus, folder, moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while workers_of(process.pid):  # they are in its session, and end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not (folder / "manifest.json").exists()
    done = {path: path.stat().st_mtime_ns for path in folder.glob("work/clean-*.npz")}
    done |= {path: path.stat().st_mtime_ns for path in folder.glob("train-*")}
    finished = {path.name for path in folder.glob("work/*.json")}
    assert finished
    text = finish(command(corpus, folder, "--workers=3"))
    assert hashes(folder) == hashes(undisturbed)
    for path, stamp in done.items():
        number = path.name.split("-")[1][:5]
        if path.exists() and f"tokens-{number}.json" in finished:
            assert path.stat().st_mtime_ns == stamp
    assert ("reading and filtering: " in text) == moment.startswith("work/clean")
    assert "tokenising: " in text


def workers_of(session: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_an_interrupted_command_says_how_to_go_on_and_leaves_no_process(corpus, undisturbed, tmp_path):
    folder = tmp_path / "set"
    process = at_work(corpus, folder, "work/clean-00001.json")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "stopped: run the same command again to go on\n"
    ends = (
        time.monotonic() + 5
    )  # Python's own tracker of shared memory ends when it sees that the rest is gone
    while workers_of(process.pid) and time.monotonic() < ends:
        time.sleep(0.05)
    assert workers_of(process.pid) == []
    finish(command(corpus, folder))
    assert hashes(folder) == hashes(undisturbed)


def test_a_killed_worker_is_one_sentence(corpus, undisturbed, tmp_path):
    folder = tmp_path / "set"
    process = at_work(corpus, folder, "work/clean-00000.json")
    os.kill(max(workers_of(process.pid)), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.startswith("a worker process was killed")
    assert said.count("\n") == 1
    finish(command(corpus, folder))
    assert hashes(folder) == hashes(undisturbed)


def test_the_second_time_nothing_is_done_and_other_settings_are_refused(corpus, undisturbed):
    before = hashes(undisturbed)
    said = finish(command(corpus, undisturbed))
    assert "was prepared before: delete it to prepare it again" in said
    assert "for training" in said
    said = finish(command(corpus, undisturbed, "--seed=1"), status=1)
    assert said.startswith("--seed=1, and ")
    assert "was prepared with 0" in said
    assert hashes(undisturbed) == before


# Kilobytes of the largest process; of this command alone, as it is the only child of its parent.
_PEAK = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, flush=True)
sys.exit(status)
"""


def test_bad_input_is_counted_and_named_and_the_rest_prepared(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    good = [sentences(number, 60) for number in range(30)]
    spelt = "".join(f"{name} is number {n}, and text.\n" for n, name in enumerate(CONTROL_TOKENS))
    (folder / "spelt.txt").write_text(sentences(77, 30) + spelt)
    lines = [json.dumps({"text": text}).encode() for text in good]
    lines += [
        b'{"title": "no text"}',
        b'{"text": 5}',
        b"{broken",
        b'{"text": "\xff"}',
        b"[1]",
        b'{"text": "\\ud800"}',
    ]
    with (folder / "web.jsonl").open("wb") as file:
        file.write(b"\n".join(lines) + b"\n")
        file.seek(1 << 30, os.SEEK_CUR)  # a line of a gigabyte, which takes no room on the disk
        file.write(b"\n" + json.dumps({"text": sentences(99, 60)}).encode() + b"\n")
    with (folder / "long.txt").open("wb") as file:
        file.write(sentences(98, 60).encode())
        file.truncate(1 << 30)
    (folder / "latin.txt").write_bytes("schön ".encode("latin-1") * 100)
    (folder / "empty.txt").touch()
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    (folder / "broken.txt.gz").write_bytes(gzip.compress(sentences(97, 60).encode())[:-20])
    (folder / "short.txt").write_text("Too short.")
    parquet.write_table(pyarrow.table({"words": ["no field of that name"]}), folder / "other.parquet")
    os.mkfifo(folder / "pipe.txt")
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    flags = ["--train-tokenizer", "--vocab-size=600", "--workers=2", "--max-document-bytes=1000000"]
    program = [
        sys.executable,
        "-m",
        "dsjax.data.prepare",
        "--input",
        str(folder),
        f"--output={tmp_path}/out",
        *flags,
    ]
    *_, peak = finish([sys.executable, "-c", _PEAK, *program]).split()
    assert int(peak) < 600_000
    made = open_set(tmp_path / "out")
    assert {reason: count for reason, count in made.manifest["rejected"].items() if count} == {
        "no text in field 'text'": 4,
        "not JSON": 1,
        "not UTF-8": 3,
        "too long": 2,
        "empty": 1,
        "damaged": 2,
        "gopher_short_doc": 1,
        "unreadable": 2,
    }
    names = {json.loads(line)["name"] for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()}
    files = {Path(name).name.split(":")[0] for name in names}
    assert files == {path.name for path in folder.iterdir()} - {"spelt.txt"}
    # After the gigabyte, spelt, long, short, empty.
    assert made.manifest["counts"]["read"]["documents"] == len(good) + 5
    for documents in (made.train, made.heldout):
        for number, length in enumerate(documents.lengths.tolist()):
            assert made.tokenizer.control_ids.isdisjoint(documents.text(number, 0, length).tolist())
    texts = [
        made.tokenizer.decode(made.train.text(number, 0, length))
        for number, length in enumerate(made.train.lengths.tolist())
    ]
    assert any(text.endswith(spelt) for text in texts)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input=nothing*"], "--input: 'nothing*' matches no file"),
        (["--tokenizer=no.json", "--input=README.md"], "--tokenizer='no.json' cannot be read"),
        (
            ["--train-tokenizer", "--vocab-size=100", "--input=README.md"],
            "--vocab-size=100 does not hold 256 bytes",
        ),
        (["--train-tokenizer"], "--train-tokenizer needs --vocab-size"),
        ([], "one of --tokenizer=FILE and --train-tokenizer is needed"),
        (["--tokenizer=a", "--train-tokenizer", "--vocab-size=600"], "one of --tokenizer=FILE and"),
        (["--heldout-fraction=0.9"], "'0.9' must lie between 0 and 0.5"),
        (["--workers=0"], "'0' is not a positive number"),
        (["--seed=-1"], "'-1' is not a number from 0 to"),
        (["--vocab-size=1000000000"], "'1000000000' is more than 4000000"),
        (["--max-document-bytes=100000000000000"], "'100000000000000' is not a number from 0 to"),
        (["--engine=slurm", "--tokenizer=a"], "--engine=slurm needs --slurm-partition"),
    ],
)
def test_wrong_flags_are_one_sentence(tmp_path, flags, message):
    if "--input=nothing*" in flags:
        flags = [*flags, "--train-tokenizer", "--vocab-size=600"]
    program = [sys.executable, "-m", "dsjax.data.prepare", f"--output={tmp_path}/out", *flags]
    done = subprocess.run(
        program, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode in (1, 2)
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- clusters


def test_ray_writes_the_same_bytes(corpus, undisturbed, tmp_path):
    finish(command(corpus, tmp_path / "set", "--engine=ray", "--ray-address=local"))
    assert hashes(tmp_path / "set") == hashes(undisturbed)


_SBATCH = """#!/bin/bash
# Stands for Slurm: does the tasks of an array at once, one after another.
script="${@: -1}"
echo "$@" >> "$CALLS"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
export SLURM_NODELIST=localhost RUN_OFFSET=0
for task in $(seq 0 "${last:-0}"); do
    SLURM_ARRAY_TASK_ID=$task bash "$script" >> "$CALLS.log" 2>&1 || exit 1
done
echo "Submitted batch job $(wc -l < "$CALLS")"
"""
_SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done
exec "$@"
"""


def test_slurm_jobs_follow_each_other_and_write_the_same_bytes(corpus, undisturbed, tmp_path):
    """datatrove's scripts and steps are real; sbatch is a stand-in, for there is no Slurm on a machine of CI."""
    tools = {"sbatch": _SBATCH, "srun": _SRUN, "scontrol": "#!/bin/bash\necho localhost\n"}
    for name, script in tools.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    flags = ("--engine=slurm", "--slurm-partition=cpu", "--slurm-memory-gb=8")
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    said = finish(command(corpus, tmp_path / "set", *flags), **paths)
    assert (
        "submitted as Slurm jobs 1, 3, 5, 7, 9: when all are done," in said
    )  # the others collect statistics
    assert hashes(tmp_path / "set") == hashes(undisturbed)
    depends = [
        line for line in (tmp_path / "calls").read_text().splitlines() if "--dependency=afterok" in line
    ]
    assert len(depends) == 4
    script = (tmp_path / "set.slurm/tokenise/launch_script.slurm").read_text()
    assert "#SBATCH --partition=cpu" in script
    assert "#SBATCH --mem-per-cpu=8G" in script


def test_jobs_are_not_submitted_twice(corpus, tmp_path):
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho Submitted batch job 7\n")  # and does nothing yet
    (tmp_path / "sbatch").chmod(0o755)
    program = command(corpus, tmp_path / "set", "--engine=slurm", "--slurm-partition=cpu")
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert "submitted as Slurm jobs 7, 7, 7, 7, 7" in finish(program, PATH=path)
    said = finish(program, status=1, PATH=path)
    assert "is being prepared by the Slurm jobs in" in said


def test_a_failing_sbatch_is_one_sentence(corpus, tmp_path):
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho no such partition >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    flags = ("--engine=slurm", "--slurm-partition=cpu")
    said = finish(
        command(corpus, tmp_path / "set", *flags), status=1, PATH=f"{tmp_path}:{os.environ['PATH']}"
    )
    assert "no such partition" in said
    assert said.splitlines()[-1].startswith("--engine=slurm: sbatch ")
    assert "Traceback" not in said


def test_the_text_of_a_set_trains_the_same_tokenizer_again(undisturbed, corpus, tmp_path):
    """What was trained can be given: ids, text and shards are then the same."""
    flags = [f"--tokenizer={undisturbed}/tokenizer.json", "--heldout-fraction=0.1"]
    program = [
        flag for flag in command(corpus, tmp_path / "set") if "tokenizer" not in flag and "vocab" not in flag
    ]
    finish([*program, *flags])
    one, two = open_set(undisturbed), open_set(tmp_path / "set")
    assert one.manifest["fingerprint"] == two.manifest["fingerprint"]
    assert np.array_equal(one.train.lengths, two.train.lengths)
