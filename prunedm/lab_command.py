"""``python -m prunedm lab``: the lab in a browser, on this machine alone or, behind a password, for others."""

from __future__ import annotations

import getpass
import os
import socket
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import psutil
import typer

from . import password
from .terminal import RunsDir

APP = Path(__file__).resolve().parent.parent / "app"
LOGIN_ENV = "PRUNEDM_LOGIN"  # how strangers are told apart by app/shared.py
HOME_NAMES = ("127.0.0.1", "localhost")


class Login(str, Enum):
    """Who lets strangers in: the lab's password, or an OpenID Connect provider named in .streamlit/secrets.toml."""

    password = "password"
    oidc = "oidc"


def lab(
    port: Annotated[int, typer.Option(min=1, max=65535, help="port of the lab")] = 8501,
    runs_dir: RunsDir = Path("runs"),
    share: Annotated[
        bool, typer.Option("--share-on-network", help="let other machines in; needs a password, or --login oidc")
    ] = False,
    host: Annotated[
        list[str] | None, typer.Option(help="a further name by which browsers may call this machine; may be repeated")
    ] = None,
    login: Annotated[Login, typer.Option(help="with --share-on-network: who lets strangers in")] = Login.password,
    set_password: Annotated[
        bool, typer.Option("--set-password", help="read a password from the terminal or standard input, and stop")
    ] = False,
) -> None:
    """Open the lab; it listens on 127.0.0.1 unless --share-on-network is given."""
    if set_password:
        print(f"the password's hash is kept in {password.store(_asked(), runs_dir)}")
        return
    environment = os.environ | {"PRUNEDM_RUNS": str(runs_dir.absolute())}
    environment.pop(LOGIN_ENV, None)
    if share:
        if login is Login.password:
            password.read()
        environment[LOGIN_ENV] = login.value
    elif host or login is not Login.password:
        raise ValueError("--host and --login are read with --share-on-network; add it or leave them out")
    if not (APP / "main.py").is_file():
        raise ValueError(f"{APP} does not hold the lab's pages; run the command in a clone of the project")
    command = serving(port, [*HOME_NAMES, *own_names(), *(host or [])] if share else None)
    # PruneDM and Python alone know where to find the pages; the lab takes this process over, and with it Ctrl-C.
    os.chdir(APP.parent)
    os.execve(sys.executable, command, environment)


def serving(port: int, names: list[str] | None) -> list[str]:
    """The command that serves the lab; ``names``: by which others may call it, None to serve this machine alone."""
    script = APP / ("main.py" if names is None else "shared.py")
    command = [sys.executable, "-m", "streamlit", "run", str(script), "--server.port", str(port)]
    command += ["--server.address", "127.0.0.1" if names is None else "0.0.0.0"]
    if names is not None:  # else Streamlit asks a server outside for this machine's address, to print it
        command += ["--browser.serverAddress", socket.gethostname(), "--browser.serverPort", str(port)]
    for name in dict.fromkeys(names or []):
        command += ["--server.allowedHosts", name]
    return command


def own_names() -> list[str]:
    """The names and IPv4 addresses of this machine, by which a browser elsewhere may call it."""
    addresses = [a.address for found in psutil.net_if_addrs().values() for a in found if a.family == socket.AF_INET]
    return [*dict.fromkeys(name.lower() for name in (socket.gethostname(), *addresses))]


def _asked() -> str:
    """The password, twice from a terminal, else the first line of standard input; never an argument."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    first = getpass.getpass("Password of the shared lab: ")
    if getpass.getpass("Again: ") != first:
        raise password.PasswordError("the two passwords differ; try again")
    return first
