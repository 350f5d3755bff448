"""No call of the tree can unpickle or run what a file holds, and no secret of the environment reaches a run's files."""

import ast
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from prunedm import pipeline, report_page, store

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    path for folder in ("prunedm", "app", "pages", "assets", "benchmarks") for path in (ROOT / folder).rglob("*.py")
]
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# A call by the end of its name, and the argument without which it could unpickle or run what it reads.
NEEDED = {
    "torch.load": "weights_only=True", "load_state_dict_from_url": "weights_only=True",
    "np.load": "allow_pickle=False", "numpy.load": "allow_pickle=False",
    "from_pretrained": "use_safetensors=True", "load_dataset": "trust_remote_code=False",
}  # fmt: skip
OWN = {"from_pretrained": "prunedm/pruned_unet.py", "load_dataset": "prunedm/data.py"}  # functions of ours of that name
NEVER = re.compile(  # a method named eval is another thing
    r"(eval|exec)|(.*\.)?(pickle\.loads?|read_pickle|unsafe_load|full_load|hub\.load|jit\.load|os\.system|os\.popen)"
)
REFUSED = {"shell=True", "trust_remote_code=True", "unsafe_allow_html=True", "unsafe_allow_javascript=True"}


def faults(text: str, path: str = "x.py") -> list[str]:
    """Calls and imports of a module's text that could run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"import {name}" for name in names if name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.Call) and (why := _fault(node, path)):
            found.append(why)
    return found


def _fault(call: ast.Call, path: str) -> str | None:
    name = ast.unparse(call.func)
    arguments = {ast.unparse(keyword) for keyword in call.keywords if keyword.arg}
    if NEVER.fullmatch(name):
        return f"{name} is never called"
    if refused := arguments & REFUSED:
        return f"{name} with {refused.pop()}"
    for end, needed in NEEDED.items():
        if (name == end or name.endswith(f".{end}")) and OWN.get(end) != path and needed not in arguments:
            return f"{name} without {needed}"
    return None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_ever_unpickled_or_run(path):
    assert faults(path.read_text(), path.relative_to(ROOT).as_posix()) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from joblib import load", "torch.load(x)", "torch.load(x, weights_only=False)", "np.load(x)",
        "np.load(x, allow_pickle=True)", "UNet2DModel.from_pretrained(x)", "yaml.unsafe_load(x)", "a.torch.hub.load(x)",
        "torch.hub.load_state_dict_from_url(x)", "pd.read_pickle(x)", "subprocess.run(x, shell=True)", "eval(x)",
        "datasets.load_dataset(x)", "st.markdown(x, unsafe_allow_html=True)", "os.system(x)",
    ],
)  # fmt: skip
def test_the_check_finds_what_it_looks_for(text):
    assert faults(text)


def test_a_run_leaves_no_secret_and_no_name_of_its_user_behind(micro, tmp_path, monkeypatch):
    """In no byte: log, records, report, text of PNG files, model cards, weights."""
    planted = {
        "HF_TOKEN": "hf_PLANTEDplantedPLANTED",
        "AWS_SECRET_ACCESS_KEY": "planted/key",
        "MY_PASSWORD": "planted word",
    }
    for name, value in (planted | {"PRUNEDM_PASSWORD_FILE": "planted-file"}).items():
        monkeypatch.setenv(name, value)
    run = store.create(tmp_path, micro())
    assert pipeline.execute(run) == "done", run.log_path.read_text()
    report_page.write(run)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {
        ".png",
        ".html",
        ".json",
        ".jsonl",
        ".yaml",
        ".txt",
        ".safetensors",
        ".npz",
    }
    for path in files:
        text = path.read_bytes().decode("latin-1")
        if path.suffix == ".png":
            with Image.open(path) as picture:
                text += str(picture.text)  # type: ignore[attr-defined]
        assert "lanted" not in text and "PLANTED" not in text, path.relative_to(tmp_path)
    assert os.environ["HF_TOKEN"] == planted["HF_TOKEN"], "they were there all the time"
