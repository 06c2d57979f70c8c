"""One transfer over two real links at once, and with one of them going down in the middle.

    scripts/two_rails.sh  # as root: two network namespaces, two links limited by tc

A JAX collective goes over the sockets that its backend chose, so two links are driven one layer
higher, where islands are: a transfer server per link, each with its own address, and a pull over
each of its share. Both processes are this program; `--role=serve` offers what `--role=pull` takes.
Times are medians of rounds, the arms in turns. A share that did not arrive in time is pulled again
over the other link, and the whole is compared with what was sent.
"""

import datetime
import pathlib
import statistics
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import cli
from moejax.collectives.rails import PARTS, best_sixteenths
from moejax.core.errors import check
from moejax.costmodel.links import Link

ROLE = flags.DEFINE_enum("role", "pull", ["serve", "pull"], "which end this process is")
FOLDER = flags.DEFINE_string("meeting", "", "where both ends leave their addresses")
ADDRESSES = flags.DEFINE_list("addresses", [], "own IP address on each of the two links")
DOWN = flags.DEFINE_string("down", "", "command that takes the second link down")
MIB = flags.DEFINE_integer("payload_mib", 16, "size of the transfer", lower_bound=1)
ROUNDS = flags.DEFINE_integer("transfers", 5, "transfers per arm", lower_bound=1)
MBIT = flags.DEFINE_float("mbit", 400.0, "rate of each link, for the report", lower_bound=1.0)
ARMS = {"rail 0": (PARTS, 0), "rail 1": (0, PARTS), "both": (PARTS // 2, PARTS // 2)}
LIMIT_S = 8.0


def jobs() -> list[tuple[str, tuple[int, int]]]:
    """Every transfer in its order, with its shares; the last two are the one that breaks."""
    rounds = [arm for _ in range(ROUNDS.value + 1) for arm in ARMS.items()]
    return [*rounds, ("broken", ARMS["both"]), ("rest", (PARTS, 0))]


def payload() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(MIB.value * 2**18).astype(np.float32)


def parts(data: np.ndarray, shares: tuple[int, int]) -> list[np.ndarray]:
    cut = len(data) * shares[0] // PARTS
    return [data[:cut], data[cut:]]


def start_servers() -> list:
    """A transfer server per link."""
    from jax.experimental import transfer

    client = jax.devices()[0].client
    return [
        transfer.start_transfer_server(client, f"{ip}:0", [f"{ip}:0"]) for ip in ADDRESSES.value
    ]


def serve(servers: list) -> None:
    """Offers all shares of all transfers; ends when the other end says so."""
    data, kept = payload(), []
    for number, (name, shares) in enumerate(jobs()):
        whole = parts(data, ARMS["both"])[1] if name == "rest" else data
        for rail, part in enumerate(parts(whole, shares)):
            if len(part):
                kept.append(jnp.asarray(part))
                servers[rail].await_pull(2 * number + rail, [kept[-1]])
    folder = pathlib.Path(FOLDER.value)
    cli.write_text(folder / "addresses", "\n".join(server.address() for server in servers))
    while not (folder / "done").exists():
        time.sleep(0.1)


def pull(links: list, number: int, lengths: list[int]) -> list[np.ndarray | None]:
    """Both shares of a transfer at once; None for one that did not arrive in time."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    limit = datetime.datetime.now() + datetime.timedelta(seconds=LIMIT_S)
    results: list[np.ndarray | None] = [None, None]

    def take(rail: int) -> None:
        spec = jax.ShapeDtypeStruct((lengths[rail],), jnp.float32, sharding=where)
        try:
            (array,) = links[rail].pull(2 * number + rail, [spec], timeout=limit)
            results[rail] = np.asarray(array)
        except jax.errors.JaxRuntimeError as error:
            print(f"rail {rail}: {str(error).splitlines()[0][:100]}", flush=True)

    threads = [
        threading.Thread(target=take, args=(rail,), daemon=True)
        for rail in range(2)
        if lengths[rail]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S + 4)
    return results


def measure(servers: list) -> dict:
    """All transfers; seconds per arm, and what became of the broken one."""
    folder, want = pathlib.Path(FOLDER.value), payload()
    while not (folder / "addresses").exists():
        time.sleep(0.1)
    addresses = (folder / "addresses").read_text().split()
    links = [server.connect(address) for server, address in zip(servers, addresses, strict=True)]
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    figures: dict = {}
    for number, (name, shares) in enumerate(jobs()):
        if name == "rest":
            continue
        lengths = [len(part) for part in parts(want, shares)]
        if name == "broken":
            timer = threading.Timer(0.3 * statistics.median(seconds["both"]), take_down)
            timer.start()
        begin = time.perf_counter()
        got = pull(links, number, lengths)
        took = time.perf_counter() - begin
        if name == "broken":
            lost = [rail for rail in range(2) if got[rail] is None]
            if 1 in lost:
                got[1] = pull(links, number + 1, [lengths[1], 0])[0]
            figures["lost_rails"] = lost
            figures["seconds_with_a_rail_down"] = time.perf_counter() - begin
        else:
            seconds[name].append(took)
        arrived = [part for part in got if part is not None]
        if len(arrived) < sum(length > 0 for length in lengths):
            raise RuntimeError(f"{name}: a share did not arrive over either link")
        if not np.array_equal(np.concatenate(arrived), want):
            raise RuntimeError(f"{name}: what arrived is not what was sent")
    figures["seconds"] = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return figures


def take_down() -> None:
    subprocess.run(DOWN.value.split(), check=True)


def main() -> None:
    cli.check_writable(cli.JSON.value)
    check(FOLDER.value != "", "--meeting is missing")
    check(len(ADDRESSES.value) == 2, f"--addresses wants two, got {ADDRESSES.value}")
    servers = start_servers()
    if ROLE.value == "serve":
        serve(servers)
        return
    figures = measure(servers)
    single = min(figures["seconds"][name] for name in ("rail 0", "rail 1"))
    nbytes = MIB.value * 2**20
    link = Link(alpha_s=0.0, beta_s_per_byte=8e-6 / MBIT.value)
    figures |= {
        "real_speedup_two_rails": single / figures["seconds"]["both"],
        "bytes": nbytes,
        "share_of_line_rate": link.seconds(nbytes) / single,
        "best_sixteenths": best_sixteenths([link, link], nbytes),
        "mbit_per_link": MBIT.value,
    }
    table = Table("arm", "seconds")
    for name, value in figures["seconds"].items():
        table.add_row(name, f"{value:.3f}")
    table.add_row("both, one down on the way", f"{figures['seconds_with_a_rail_down']:.3f}")
    Console().print(table)
    print(f"speed-up {figures['real_speedup_two_rails']:.2f}", flush=True)
    cli.write_report("multirail/two_rails", "time", figures)
    cli.write_text(pathlib.Path(FOLDER.value) / "done", "")


if __name__ == "__main__":
    cli.run(main)
