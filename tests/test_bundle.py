"""The support bundle: what a helper needs, and nothing private in any byte of it."""

import getpass
import io
import json
import platform
import socket
import zipfile
from pathlib import Path

import fake_runs
import pytest
from apptest import open_page, shown

from app import system_views
from prunedm import environment, logs, redact, store, support
from prunedm.__main__ import main
from prunedm.jobs import Jobs
from prunedm.shelf import Notes

HOME, USER, HOST, TOKEN = "/home/quentin-z", "quentin-z", "box-seventeen", "hf_PLANTEDplantedPLANTEDplanted"
SECRETS = {"HF_TOKEN": TOKEN, "MY_PASSWORD": "planted pass word", "PRUNEDM_PASSWORD": "planted-lab-word"}
NEVER = (
    HOME,
    USER,
    HOST,
    TOKEN,
    "planted pass word",
    "planted-lab-word",
    "grandmother",
    "a private note",
    str(redact.LAB),
)


@pytest.fixture
def someone(monkeypatch):
    """A user on a machine, with secrets."""
    for name, value in {"HOME": HOME, "USER": USER, "LOGNAME": USER, **SECRETS}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: f"{HOST}.example.org")
    monkeypatch.setattr(platform, "node", lambda: HOST)
    monkeypatch.setattr(getpass, "getuser", lambda: USER)


@pytest.fixture
def runs_dir(someone, tmp_path):
    """Runs with private things wherever a bundle looks."""
    runs_dir = tmp_path / "runs"
    source = f"{HOME}/photos of grandmother/x"
    run = fake_runs.fake(runs_dir, f"of-{USER}", "failed", notes=Notes(("tag",), "a private note"))
    text = (run.folder / "recipe.yaml").read_text().replace("source: bundled", f"source: {HOME}/model of {USER}")
    (run.folder / "recipe.yaml").write_text(text)
    state = run.state()
    state.error = f"{source} is gone from {HOST}"
    run.write_state(state)
    run.log(f"opening {HOME}/set as {USER}@{HOST}.example.org with {TOKEN} and {SECRETS['MY_PASSWORD']}")
    run.log("image skipped: grandmother.png: broken")
    run.event("started", host=HOST, token="planted-lab-word", path=f"{HOME}/a")
    (run.folder / "samples").mkdir()
    (run.folder / "samples" / "mask-0000001.png").write_bytes(b"PLANTED SAMPLE")
    (runs_dir / logs.SERVER).parent.mkdir()
    logs.append(runs_dir / logs.SERVER, f"{USER} opened {HOME}/lab with {TOKEN}")
    return runs_dir


def opened(content: bytes) -> dict[str, str]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_no_byte_of_it_is_private(runs_dir):
    content = support.build(runs_dir)
    whole = content.decode("latin-1") + "".join(f"{name}\n{text}" for name, text in opened(content).items())
    whole = whole.lower()
    for word in (*NEVER, str(runs_dir), str(Path(redact.sys.prefix)), "PLANTED SAMPLE"):
        assert word.lower() not in whole, word


def test_it_holds_what_a_helper_needs(runs_dir):
    found = opened(support.build(runs_dir))
    (place,) = {name.rpartition("/")[0] for name in found if name.startswith("runs/")}
    about = json.loads(found["environment.json"])
    assert about["versions"]["torch"] == environment.versions()["torch"] and about["machine"]["processor"]
    assert {check["name"] for check in about["checks"]} >= {"torch", "disk", "runs folder"}
    assert about["settings"]["PRUNEDM_PASSWORD"] == "<secret>"
    assert "streamlit==" in found["packages.txt"] and "[server]" in found["lab-config.toml"]
    assert "<user> opened ~/lab with <secret>" in found["server-log.txt"]
    assert (
        "finetune_steps: 200" in found[f"{place}/recipe.yaml"] and "~/model of <user>" in found[f"{place}/recipe.yaml"]
    )
    state = json.loads(found[f"{place}/state.json"])
    assert state["status"] == "failed" and state["error"].endswith("is gone from <host>") and "host" not in state
    assert "image skipped: <name>" in found[f"{place}/log.txt"]
    lines = [json.loads(line) for line in found[f"{place}/metrics.jsonl"].splitlines()]
    assert len(lines) == support.LINES and lines[-1] == store.all_runs(runs_dir)[0].metrics()[-1]
    assert json.loads(found[f"{place}/files.json"])["samples/mask-0000001.png"] == 14
    told = found["README.txt"]
    assert all(name in told for name in found if name != "README.txt") and "No images, samples, weights" in told


def test_a_log_that_moved_on_is_read_across_its_files(runs_dir, monkeypatch):
    monkeypatch.setattr(logs, "LIMIT", 1000)
    run = store.all_runs(runs_dir)[0]
    for number in range(60):
        run.log(f"line {number}")
    (text,) = [text for name, text in opened(support.build(runs_dir)).items() if name.endswith("/log.txt")]
    assert "line 59" in text and "line 10\n" in text and "line 10\n" not in run.log_path.read_text()


def test_it_stays_small_however_long_the_run(runs_dir):
    run = store.all_runs(runs_dir)[0]
    run.append("metrics.jsonl", ({"stage": "mask", "step": i, "loss": i * 0.37} for i in range(100_000)))
    for _ in range(30):
        run.log("y" * 60_000)
    found = opened(support.build(runs_dir))
    assert sum(map(len, found.values())) < 2_000_000
    assert all(len(text) <= support.FILE_TAIL for text in found.values())


@pytest.mark.parametrize("name", ["recipe.yaml", "state.json", "metrics.jsonl", "log.txt"])
@pytest.mark.parametrize("damage", [b"", b"\xff\x00{[", b"[1, 2", b"[1]\n", b"null\n"])
def test_a_damaged_run_is_bundled_with_what_can_be_read(runs_dir, name, damage):
    run = store.all_runs(runs_dir)[0]
    (run.folder / name).write_bytes(damage)
    found = opened(support.build(runs_dir, [run.id]))
    assert "packages.txt" in found and sum(key.startswith("runs/") for key in found) >= 4


def test_what_a_link_leads_to_is_not_read(runs_dir, tmp_path):
    (tmp_path / "outside").write_text("stolen words")
    run = store.all_runs(runs_dir)[0]
    (run.folder / "log.txt").unlink()
    (run.folder / "log.txt").symlink_to(tmp_path / "outside")
    found = opened(support.build(runs_dir))
    (problem,) = [text for name, text in found.items() if name.startswith("runs/")]
    assert "is a link" in problem and "stolen" not in "".join(found.values())


def test_the_command_writes_a_new_file_and_lists_it(runs_dir, tmp_path, capsys, monkeypatch):
    run, out = store.all_runs(runs_dir)[0], tmp_path / "support.zip"
    given = ["doctor", "--bundle", run.id, "--runs-dir", str(runs_dir), "--out", str(out)]
    assert main(given) == 0
    said = capsys.readouterr().out
    names = opened(out.read_bytes())
    assert all(name in said for name in names) and "README.txt" in names
    before = out.read_bytes()
    assert main(given) == 2 and out.read_bytes() == before
    error = capsys.readouterr().err
    assert "is there already" in error and "--out" in error and error.count("\n") == 1
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--bundle", "--runs-dir", str(runs_dir), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert Path(told["bundle"]).exists() and "environment.json" in told["contents"]


@pytest.mark.parametrize(
    "words, error",
    [
        (["--bundle", "no-such-run"], "no run 'no-such-run'"),
        (["--bundle", "../outside"], "is not an id"),
        (["some-run"], "add --bundle"),
        (["--out", "a.zip"], "add --bundle"),
    ],
)
def test_bad_words_are_one_line_and_leave_no_file(runs_dir, tmp_path, monkeypatch, capsys, words, error):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", *words, "--runs-dir", str(runs_dir)]) == 2
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1 and not list(tmp_path.glob("*.zip"))


def test_the_system_page_offers_it(runs_dir, monkeypatch):
    monkeypatch.setenv("PRUNEDM_RUNS", str(runs_dir))
    monkeypatch.setattr(Jobs, "warm_up", lambda self, *first: None)
    app = open_page("system")
    (button,) = [b for b in app.get("download_button") if "bundle" in b.proto.label]
    assert button.proto.deferred_file_id, "it is made when it is asked for"
    assert "No images, samples or weights" in shown(app)
    assert "environment.json" in opened(system_views.support_bundle())
