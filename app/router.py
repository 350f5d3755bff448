"""Router of the lab: what main.py and shared.py serve."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import streamlit as st  # noqa: E402

from app import lab, live_plot, login, parts  # noqa: E402
from prunedm import logs  # noqa: E402

PAGES = {
    "Lab": [
        st.Page(ROOT / "pages" / "home.py", title="Home", url_path="home", default=True),
        st.Page(ROOT / "pages" / "launch.py", title="Launch", url_path="launch"),
        st.Page(ROOT / "pages" / "sweep.py", title="Sweep", url_path="sweep"),
        st.Page(ROOT / "pages" / "monitor.py", title="Monitor", url_path="monitor"),
    ],
    "Results": [
        st.Page(ROOT / "pages" / "runs.py", title="Runs", url_path="runs"),
        st.Page(ROOT / "pages" / "compare.py", title="Compare", url_path="compare"),
        st.Page(ROOT / "pages" / "models.py", title="Models", url_path="models"),
        st.Page(ROOT / "pages" / "system.py", title="System", url_path="system"),
    ],
}
SIDEBAR = 220  # pixels: tables and charts need the rest

logs.keep_server_log(lab.runs_dir())
LOGO = str(ROOT / "assets" / "logo.png")
# Before the navigation: a sidebar that is there already keeps its width.
st.set_page_config(page_title="PruneDM Lab", page_icon=LOGO, layout="wide", initial_sidebar_state=SIDEBAR)
login.guard()
page = st.navigation(PAGES)
st.set_page_config(page_title=f"{page.title} · PruneDM Lab")
st.logo(LOGO, size="large")
parts.page_style()
page.run()
live_plot.prepare()
