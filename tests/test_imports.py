"""Imports go one way: pages -> app -> prunedm, and inside prunedm from the top of the list down."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = [  # a module may import those above it only
    "untrusted", "strict_yaml", "stage_recipes", "recipe", "failure", "seeds", "giveway", "records", "parallel",
    "sharding", "interrupts", "owner", "bundled", "files", "jsonl", "redact", "logs", "password", "state_file",
    "run_results", "store",
    "shared_run", "artifacts", "system", "glossary", "cache", "devices", "comparison", "shelf", "progress", "snapshots",
    "pictures",
    "pattern", "layer_order", "steps", "palettes",
    "charts", "model_charts", "packed", "model_check", "pruned_unet", "unet", "sources", "data", "ledger", "diffusion",
    "masks", "masked_unet", "maskfile", "training",
    "channel_groups", "channel_scores", "memory", "latency", "uniform", "sizing", "structured",
    "importance", "mask_methods", "reinforce", "learn", "diagnostics", "allocate",
    "onnx_graph", "semi_structured", "verify", "subject", "sizes", "extractors", "metrics", "faithfulness", "samples",
    "quality", "environment", "provenance", "support", "evaluate",
    "figures", "report", "report_html", "report_sections", "report_costs", "report_runs", "report_again", "report_page",
    "model_card", "inputs", "forecast", "imports", "import_zip", "import_hub", "mask_stage", "outline", "upkeep",
    "plan_model", "calibration", "plan", "stage_training", "stages", "pipeline", "pretrain", "jobs",
    "cluster_link", "cluster_task", "cluster", "executors",
    "onnx_int8", "onnx_export", "export", "seed_sheets", "judge_entries", "judging",
    "sweep_ranges", "sweep_spec", "sweep_trials", "sweep_sampler", "sweep", "sweep_watch", "sweep_worker",
    "terminal", "mask_commands", "pretrain_command", "export_commands", "judge_commands", "control_commands",
    "shelf_commands", "plan_command", "sweep_commands", "lab_command", "__main__",
]  # fmt: skip


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "prunedm" if node.level else node.module or ""
            base += f".{node.module}" if node.level and node.module else ""
            names |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return names


def test_every_module_has_its_place():
    assert sorted(ORDER) == sorted(p.stem for p in (ROOT / "prunedm").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_those_above_it(module):
    allowed = set(ORDER[: ORDER.index(module)]) | {"__version__"}
    found = {n.split(".")[1] for n in imported(ROOT / "prunedm" / f"{module}.py") if n.startswith("prunedm.")}
    assert found <= allowed, f"{module} imports {sorted(found - allowed)}"


@pytest.mark.parametrize("module", [module for module in ORDER if module != "__main__"])
def test_a_module_finds_what_it_imports(module):
    """Also one that no other module of the engine imports, but a command when it is called."""
    importlib.import_module(f"prunedm.{module}")


def test_the_engine_does_not_know_the_app_and_the_app_not_the_pages():
    for path in (ROOT / "prunedm").glob("*.py"):
        assert not {n for n in imported(path) if n.split(".")[0] in ("streamlit", "app", "pages", "plotly")}, path
    for path in (ROOT / "app").glob("*.py"):
        assert not {n for n in imported(path) if n.split(".")[0] == "pages"}, path
    for path in (ROOT / "pages").glob("*.py"):
        assert not {n for n in imported(path) if n.split(".")[0] in ("pages", "torch")}, path


@pytest.mark.parametrize("code", ["import prunedm.__main__", "import prunedm.jobs, prunedm.report, prunedm.snapshots"])
def test_help_and_the_first_page_do_not_wait_for_torch(code):
    check = f"{code}, sys; assert not {{'torch', 'diffusers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)
