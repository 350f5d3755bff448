"""Logs: bounded, read across their files, and the server's without what is private."""

import logging
import re
import threading

import pytest
from apptest import ROOT, open_page, wait_for
from streamlit.testing.v1 import AppTest

from app import lab
from prunedm import logs, recipe, store
from prunedm.jobs import Jobs
from prunedm.redact import LAB, Redactor


@pytest.fixture
def run(tmp_path):
    return store.create(tmp_path, recipe.build({"name": "logged"}))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(logs, "LIMIT", 2000)


@pytest.fixture
def server_log(tmp_path, monkeypatch):
    """A process whose log is kept in a new folder; as it was before, afterwards."""
    before = threading.excepthook, list(logging.root.handlers)
    logs.keep_server_log(tmp_path)
    yield lambda: logs.tail(tmp_path / logs.SERVER, 10**6)
    threading.excepthook = before[0]
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    for logger in loggers:
        logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, logs.ServerLog)]
    logs.LOGGER.propagate = True


def test_a_run_may_log_for_ever(run, small):
    for number in range(1000):
        run.log(f"line {number}")
    found = sorted(path.name for path in run.folder.glob("log*"))
    assert found == ["log.txt", "log.txt.1", "log.txt.2", "log.txt.3"]
    assert all((run.folder / name).stat().st_size <= 2000 for name in found)
    run.log("x" * 10**6)
    assert run.log_path.stat().st_size < logs.LONGEST + 100


def test_a_log_is_read_across_its_files(run, small):
    for number in range(200):
        run.log(f"line {number}")
    assert (run.folder / "log.txt.1").exists() and run.log_path.stat().st_size < 2000
    numbers = [int(n) for n in re.findall(r"line (\d+)\n", logs.tail(run.log_path, 5000))]
    assert numbers == list(range(numbers[0], 200)) and 150 < len(numbers) < 200
    assert logs.tail(run.log_path, 5000).startswith("20"), "from the start of a line"
    assert len(logs.tail(run.log_path, 10**6).splitlines()) == 200
    assert logs.tail(run.folder / "none.txt", 100) == ""


def test_the_monitor_shows_the_log_across_its_files(runs, small):
    found = store.create(runs, recipe.build({"name": "logged"}))
    for number in range(100):
        found.log(f"line {number}")
    found.end(found.state(), "failed", "no reason")
    app = open_page("monitor")
    shown = next(code.value for code in app.code if "line 99" in code.value)
    assert "line 5\n" in shown and "line 5\n" not in found.log_path.read_text()


def test_many_threads_lose_no_line(run, small):
    def write(name):
        for number in range(25):
            run.log(f"{name}-{number}")

    threads = [threading.Thread(target=write, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(re.findall(r"\d+-\d+\n", logs.tail(run.log_path, 10**6)))) == 200


def test_a_name_that_is_no_text_can_be_logged(run):
    run.log("image skipped: \udcff.png")
    assert r"\udcff.png" in run.log_path.read_text()


def test_a_log_that_cannot_be_written_is_told(run):
    run.log_path.mkdir()
    with pytest.raises(OSError):
        run.log("lost")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_ends_a_thread_is_in_the_server_log(server_log):
    def fail():
        raise RuntimeError("the thread's own reason")

    thread = threading.Thread(target=fail, name="prunedm-somebody")
    thread.start()
    thread.join()
    found = server_log()
    assert "thread prunedm-somebody ended" in found and "RuntimeError: the thread's own reason" in found
    assert "<lab>/tests/test_logs.py" in found and str(LAB) not in found


def test_what_a_job_cannot_record_is_in_the_server_log(server_log, tmp_path, micro, monkeypatch):
    from prunedm import pipeline

    def fail(run):
        raise OSError("the folder is gone")

    monkeypatch.setattr(pipeline, "execute", fail)
    Jobs(tmp_path).submit(micro())
    wait_for(lambda: "the folder is gone" in server_log())
    assert "could not be worked on" in server_log() and "OSError: the folder is gone" in server_log()


def test_what_a_page_fails_of_is_in_the_server_log(runs, server_log, monkeypatch, tmp_path):
    from streamlit import config

    config.set_option("logger.enableRich", False)  # as app/.streamlit/config.toml says, which AppTest does not read
    monkeypatch.setattr(lab, "cards", lambda: 1 / 0)
    app = AppTest.from_file(str(ROOT / "app" / "router.py"), default_timeout=60).run()
    app.switch_page("../pages/monitor.py").run()
    assert app.exception and "ZeroDivisionError" in server_log() and "<lab>/pages/monitor.py" in server_log()


def test_warnings_of_libraries_are_kept_and_their_chatter_is_not(server_log):
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("some.library").warning("watch %s", "out")
    logs.LOGGER.info("a run began")
    assert "WARNING some.library" in server_log() and "watch out" in server_log() and "a run began" in server_log()
    assert "chatter" not in server_log()


def test_the_server_log_moves_with_the_runs_folder_and_writes_each_entry_once(server_log, tmp_path):
    logs.keep_server_log(tmp_path)
    logs.keep_server_log(tmp_path / "other")
    (tmp_path / "other").mkdir()
    logs.LOGGER.warning("once")
    assert (tmp_path / "other" / logs.SERVER).read_text().count("once") == 1 and server_log() == ""
    assert store.all_runs(tmp_path / "other") == [], "its folder is no run"


@pytest.fixture
def someone(monkeypatch):
    """A user, a machine and secrets."""
    planted = {"HOME": "/home/anna-q", "USER": "anna-q", "LOGNAME": "anna-q", "HF_TOKEN": "abc123secret"}
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("socket.gethostname", lambda: "box-seven.example.org")
    return Redactor({"<runs>": LAB / "runs"})


@pytest.mark.parametrize(
    "given, told",
    [
        (f"{LAB}/runs/a/log.txt: gone", "<runs>/a/log.txt: gone"),
        (f'File "{LAB}/app/lab.py", line 3', 'File "<lab>/app/lab.py", line 3'),
        ("/home/anna-q/my photos/x.png", "~/x.png"),
        ("see /home/bert/pictures/x.png now", "see <home>/x.png now"),
        ("/data/patients of smith/1.png: broken", "<path>/1.png: broken"),
        ("from (/data/a/b, /data/a/c)", "from (<path>/b, <path>/c)"),
        ("Anna-Q on box-seven", "<user> on <host>"),
        ("box-seven.example.org", "<host>"),
        ("token abc123secret given", "token <secret> given"),
        ('{"api_key": "k v", "lr": 2e-4}', '{"api_key": <secret>, "lr": 2e-4}'),
        ("cookieSecret = 'zzz'", "cookieSecret = <secret>"),
        ("HF: hf_ABCDEFGHIJKLMNOPQRSTUV", "HF: <secret>"),
        ("https://me:pw@hub.example/a/b", "https://<secret>@hub.example/a/b"),
        ("write to a.b@c.example", "write to <e-mail>"),
        ("4.2 steps/s of mask/recover at http://127.0.0.1:8501/monitor", None),
        ("tokens were 12 and lr: 1e-4, mask.n=2, 2:4", None),
    ],
)
def test_what_is_private_is_taken_out_and_the_rest_stays(someone, given, told):
    assert someone.text(given) == (given if told is None else told)


def test_values_are_taken_out_of_json(someone):
    given = {"data": {"source": "/data/Anna Smith/set 2"}, "lr": 1e-4, "n": [1, None, True], "password": "x"}
    told = {"data": {"source": "<path>/set 2"}, "lr": 1e-4, "n": [1, None, True], "password": "<secret>"}
    assert someone.value(given) == told
