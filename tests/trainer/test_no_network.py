"""No network unless it is asked for: commands in a process in which no address is looked up and no connection made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from trainer_tools import TINY

# Python itself tells of every connection that its code asks for, however it does
WITHOUT_NETWORK = """
import sys

def refuse(event, arguments):
    local = event in ("socket.connect", "socket.bind") and not isinstance(arguments[1], tuple)
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind") and not local:
        print("NETWORK", event, arguments, file=sys.stderr, flush=True)
        raise OSError("no network")

sys.addaudithook(refuse)
"""
COMMANDS = """
import tde_kernels
from tde_trainer.app import app

for command in {commands!r}:
    try:
        app(command)
    except SystemExit as ended:
        print("ENDED", command[0], ended.code)
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_NETWORK + code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_the_demo_and_what_follows_it_ask_for_no_network(tmp_path: Path) -> None:
    images = ["data.name=list_lt", "data.root=nowhere"]
    commands = [
        ["info"],
        ["recipes"],
        ["train", "digits_lt", *TINY, "train.epochs=1", "methods=[linear,deconfound]", "seeds=[0]", "out=run"],
        ["eval", "run"],
        ["fit-direction", "run/linear/seed0"],
        ["report", "run"],
        ["train", "digits_lt", "model.name=timm:resnet10t", *images],
        ["train", "cifar10_lt"],
        ["train", "places_lt"],
        ["train", "lvis_v1"],
    ]
    asked = COMMANDS.format(commands=[["train", "cifar10_lt", "data.download=true"]])
    done = run(f"{COMMANDS.format(commands=commands)}\nprint('ASKED', file=sys.stderr, flush=True)\n{asked}", tmp_path)
    ended = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("ENDED")]
    codes = [[command[0], "0" if place < 6 else "2"] for place, command in enumerate(commands)]
    assert ended == [*codes, ["train", "2"]], done.stderr
    before, _, after = done.stderr.partition("ASKED")
    assert "NETWORK" not in before and "NETWORK socket.getaddrinfo" in after


@pytest.mark.parametrize(
    "code",
    [
        "import urllib.request; urllib.request.urlopen('http://localhost:1')",
        "import socket; socket.create_connection(('127.0.0.1', 1))",
    ],
)
def test_it_would_be_seen(code: str, tmp_path: Path) -> None:
    assert "NETWORK socket." in run(code, tmp_path).stderr
