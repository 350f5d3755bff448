"""The lab for this machine: ``streamlit run app/main.py``."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import streamlit as st  # noqa: E402

from app import live  # noqa: E402

app = st.App(str(ROOT / "app" / "router.py"), routes=live.ROUTES)
