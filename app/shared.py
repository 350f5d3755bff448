"""The lab for other machines: what `python -m prunedm lab --share-on-network` serves, behind a login."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import streamlit as st  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.middleware.trustedhost import TrustedHostMiddleware  # noqa: E402

from app import live, login  # noqa: E402
from prunedm import password  # noqa: E402
from prunedm.lab_command import LOGIN_ENV, Login  # noqa: E402


def barriers() -> list[Middleware]:
    """What stands before the lab; SystemExit in one line where it would be open to all."""
    hosts = st.get_option("server.allowedHosts")
    if not hosts or "*" in hosts:
        sys.exit("error: server.allowedHosts does not say by which names this machine is called; use `prunedm lab`")
    found = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)]
    kind = os.environ.get(LOGIN_ENV)
    if kind == Login.oidc.value:
        if not login.is_oidc_configured():
            sys.exit(
                "error: --login oidc needs [auth] and [prunedm] allowed in .streamlit/secrets.toml; see the README"
            )
    elif kind == Login.password.value:
        try:
            known = password.read()
        except password.PasswordError as error:
            sys.exit(f"error: {error}")
        found.append(Middleware(login.Gate, known=known, secure=bool(st.get_option("server.sslCertFile"))))
    else:
        sys.exit(f"error: ${LOGIN_ENV} is neither password nor oidc; use `python -m prunedm lab --share-on-network`")
    return found


app = st.App(str(ROOT / "app" / "router.py"), routes=live.ROUTES, middleware=barriers())
