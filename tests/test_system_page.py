"""The System page and the glossary."""

import re
import sys
from pathlib import Path

import pytest
from test_app import open_page, said

from app import lab, system_views
from prunedm import environment, glossary
from prunedm.jobs import Jobs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEDM_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(Jobs, "warm_up", lambda self, *first: None)
    yield tmp_path / "runs"
    lab._jobs.clear()
    system_views.look_again()


def looked():
    """The page once the look in the background is over."""
    open_page("system")
    system_views.look().result(120)
    return open_page("system")


def test_the_page_says_what_was_found(runs):
    app = looked()
    text = said(app) + "".join(str(s.value) for s in app.success)
    assert "checks are well" in text or "What to do" in text
    for word in ("Processor", "Memory", "GPU", "Runs", "Cache", "free there", "MIT"):
        assert word in text + str([d.value.to_string() for d in app.dataframe]), word
    table = next(d.value for d in app.dataframe if "what to do" in d.value)
    found = [check.name for check in environment.checks(runs)]
    assert list(table["what"]) == found and "torch" in found
    packages = next(d.value for d in app.dataframe if "package" in d.value)
    assert set(packages["package"]) >= {"torch", "diffusers", "streamlit"} and all(packages["licence"])


def test_the_page_does_not_wait_for_the_look(runs, monkeypatch):
    import threading

    hold = threading.Event()
    monkeypatch.setattr(system_views, "load_engine", lambda: hold.wait(60))
    app = open_page("system")
    try:
        assert "Looking at this machine" in said(app) and "Glossary" in said(app)
    finally:
        hold.set()
    system_views.look().result(60)
    assert "Looking at this machine" not in said(open_page("system"))


def test_a_problem_is_said_with_its_remedy_and_looked_at_again(runs, monkeypatch):
    bad = [environment.Check("disk", False, "0.1 GiB free", "free some space")]
    monkeypatch.setattr(environment, "checks", lambda runs_dir: bad)
    app = looked()
    assert "**disk**: 0.1 GiB free. What to do: free some space" in said(app).replace("\\", "")
    bad[:] = [environment.Check("disk", True, "99 GiB free")]
    next(b for b in app.button if b.label == "Look again").click().run()
    system_views.look().result(60)
    app = open_page("system")
    assert "All 1 checks are well" in str([s.value for s in app.success])


def test_a_look_that_fails_is_said(runs, monkeypatch):
    def fail(runs_dir):
        raise RuntimeError("no such device")

    monkeypatch.setattr(environment, "checks", fail)
    open_page("system")
    assert system_views.look().exception(60)
    assert "could not be looked at: no such device" in said(open_page("system"))


def test_sizes_are_those_of_the_files(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"x" * 1000)
    (tmp_path / "d").write_bytes(b"x" * 24)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b" / "c")
    assert system_views.size_of(tmp_path) - (tmp_path / "link").lstat().st_size == 1024
    found = system_views.folder("Runs", tmp_path / "not" / "yet")
    assert found.size == 0 and found.free > 0


def test_the_glossary_is_searched_on_the_page(runs):
    app = open_page("system")
    box = app.text_input(key="glossary")
    box.set_value("flip budget").run()
    text = said(app)
    assert "**flip budget**" in text and "**Wanda**" not in text
    box.set_value("<b>nothing</b>").run()
    assert "No entry has" in said(app) and "<b>" not in said(app)


def test_terms_are_unique_sorted_and_sourced():
    names = [term.term.casefold() for term in glossary.TERMS]
    assert names == sorted(set(names))
    for term in glossary.TERMS:
        assert term.term and len(term.meaning) > 20 and term.meaning.endswith("."), term.term
        modules = re.findall(r"prunedm/\w+\.py", term.source)
        assert modules or "arXiv" in term.source, term.term
        assert all((ROOT / module).exists() for module in modules), term.term
        papers = set(re.findall(r"arXiv \d{4}\.\d{5}", term.source))
        named = {name for name in glossary.PAPERS if term.source.startswith(f"{name}, ")}
        assert all(glossary.PAPERS[name] in papers for name in named), term.term


@pytest.mark.parametrize(
    "word",
    [
        "pattern", "group", "mask", "logits", "compliance", "position balance", "density", "eligible", "flip",
        "entropy", "stage", "variant", "run", "recipe", "tracker", "residual", "temperature", "noise floor", "FID",
    ],
)  # fmt: skip
def test_the_words_of_the_lab_are_explained(word):
    assert any(term.term.casefold().startswith(word.casefold()) for term in glossary.find(word))


def test_searching_takes_every_word_in_any_case():
    assert glossary.find("") == list(glossary.TERMS)
    assert [t.term for t in glossary.find("SR-STE largest")] == ["SR-STE"]
    assert glossary.find("no-such-word") == []


def test_the_page_alone_does_not_import_torch():
    import subprocess

    code = "import app.system_views, sys; assert not {'torch', 'diffusers', 'pynvml'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
