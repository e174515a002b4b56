"""Processes on several machines, which are network namespaces here: they find each other, whatever their names mean."""

import json
import os
import shutil
import socket
import subprocess
import time

import pytest
from helpers import LATENT, finish, only_run, start

from common import network
from common.error_codes import RANK_FAILED

# /etc/hosts of machine 1 or 2, as Debian installs it
HOSTS = "127.0.0.1 localhost\n127.0.1.1 machine{own}\n10.83.0.{other} machine{other}\n"
PORT = 29571


def ip(*words) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True)


@pytest.fixture
def machines():
    """machines(hidden) -> the commands under which a process runs on machine 1 or 2, 10.83.0.1 or .2.

    hidden: a folder that only the first one has.
    """
    if not (shutil.which("ip") and shutil.which("unshare") and os.geteuid() == 0):
        pytest.skip("network namespaces need root, and Linux's ip and unshare")
    names = [f"ddpm-{os.getpid()}-{own}" for own in (1, 2)]
    folders = [f"/etc/netns/{name}" for name in names]

    def machines(hidden: str = "") -> list[list[str]]:
        for own, folder in enumerate(folders, 1):
            os.makedirs(folder, exist_ok=True)
            with open(f"{folder}/hosts", "w") as file:  # which ip netns exec shows as /etc/hosts
                file.write(HOSTS.format(own=own, other=3 - own))
        hide = ["", f"mount -t tmpfs none {hidden} && " if hidden else ""]
        inside = [f'{hide[own]}hostname machine{own + 1} && exec "$@"' for own in (0, 1)]
        return [
            ["ip", "netns", "exec", name, "unshare", "-um", "bash", "-c", line, "-"]
            for name, line in zip(names, inside, strict=True)
        ]

    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "wire1", "netns", names[0], "type", "veth", "peer", "name", "wire2", "netns", names[1])
            for own, name in enumerate(names, 1):
                ip("-n", name, "addr", "add", f"10.83.0.{own}/24", "dev", f"wire{own}")
                ip("-n", name, "link", "set", f"wire{own}", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        machines.names = names
        machines.cut = lambda: ip("-n", names[1], "link", "set", "wire2", "down")
        yield machines
    finally:
        for name, folder in zip(names, folders, strict=True):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)


def launch(on: list[list[str]], *flags, second: dict | None = None, **env) -> list[subprocess.Popen]:
    """The latent trainer, a process on each machine. second: more of the second one's environment."""
    meet = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "machine1"}
    meet |= {"MASTER_PORT": str(PORT), "DDPM_RANK_PATIENCE": "40", **env}
    return [
        start(
            LATENT,
            "train.py",
            *flags,
            "--device",
            "cpu",
            under=under,
            env={"RANK": str(rank), **meet, **((second or {}) if rank else {})},
        )
        for rank, under in enumerate(on)
    ]


def test_processes_of_two_machines_find_each_other(machines, tiny_latent, tmp_path):
    """gloo takes the interface of the machine's name: loopback, where the other cannot reach it.

    Nor do they need to share a disk: only the first one has the autoencoder and the output folder.
    """
    hidden = os.path.commonpath([tmp_path, tiny_latent[tiny_latent.index("--ae-ckpt") + 1]])
    processes = launch(machines(hidden), *tiny_latent, "--epochs", 1, "--outdir", tmp_path)
    results = [finish(process) for process in processes]
    assert [result.code for result in results] == [0, 0], results
    (begun,) = json.loads((only_run(tmp_path) / "config.json").read_text())["starts"]
    assert begun["processes"] == 2


def test_a_machine_that_is_cut_off_is_not_waited_for_for_ever(machines, tiny_latent, tmp_path):
    """No connection is closed: nothing at all is heard of it any more.

    That somebody told it of its interface keeps the other from nothing.
    """
    long = ("--epochs", 9999, "--keep-ckpts", 1, "--outdir", tmp_path)
    how = {"DDPM_RANK_PATIENCE": "5", "second": {"GLOO_SOCKET_IFNAME": "wire2"}}
    processes = launch(machines(), *tiny_latent, *long, **how)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoints/*/checkpoint_epoch_*.pt")):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), [finish(process) for process in processes]
        time.sleep(0.05)
    machines.cut()
    results = [finish(process) for process in processes]
    for result in results:
        assert (result.code, len(result.errors)) == (RANK_FAILED, 1), results
        assert "one does not answer (5 s are waited)" in result.errors[0]


@pytest.mark.parametrize(
    ("ways", "told", "wanted"),
    [
        ({"master": "10.0.0.5"}, {}, "wire"),
        ({"master": "127.0.0.1", "10.0.0.7": "10.0.0.5"}, {1: "127.0.0.1", 2: "10.0.0.7"}, "wire"),
        ({"10.0.0.7": "10.0.0.5"}, {1: "", 2: "10.0.0.7"}, "wire"),  # the master's name leads nowhere
        ({"master": "127.0.0.1"}, {1: "127.0.0.1", 2: "127.0.0.1"}, None),  # they all are on one machine
        ({"master": "10.0.0.99"}, {}, None),  # no interface has it
    ],
)
def test_the_interface_is_that_of_the_way_to_the_others(ways, told, wanted, monkeypatch):
    class Store(dict):
        set, get = dict.__setitem__, lambda self, key: self[key].encode()

    store = Store({f"address of {rank}": address for rank, address in told.items()})
    monkeypatch.setattr(network, "_address_towards", lambda host: ways.get(host, ""))
    monkeypatch.setattr(network, "_interface_of", {"10.0.0.5": "wire"}.get)
    assert network.interface_to_others(store, 0, 3, "master") == wanted
    assert store["address of 0"] == ways.get("master", "")


def test_an_interface_is_found_by_any_of_its_addresses(machines):
    ip("-n", machines.names[0], "addr", "add", "10.84.0.1/24", "dev", "wire1", "label", "wire1:too")
    code = "from common import network; print(*map(network._interface_of, ['10.83.0.1', '10.84.0.1', '10.85.0.1']))"
    result = finish(start(".", "-c", code, under=machines()[0]))
    assert result.text == "wire1 wire1 None\n"


@pytest.mark.skipif(not os.path.exists("/sys/class/net/lo"), reason="needs Linux's loopback")
def test_an_interface_is_found_by_its_address():
    with socket.create_server(("127.0.0.1", 0)):
        assert network._address_towards("127.0.0.1") == "127.0.0.1"
    assert network._interface_of("127.0.0.1") == "lo"
    assert network._interface_of("192.0.2.1") is None
    assert network._address_towards("no-such-host.invalid") == ""
