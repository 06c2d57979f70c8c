"""Islands: jobs that share no fate and average their movement now and then.

DiLoCo's setting (arXiv 2311.08105) without a coordinator, as PCCL's (github.com/PrimeIntellect-ai):
each island is a JAX job of its own, `jax.experimental.transfer` carries arrays between them, and a
folder that all see carries a few lines of text. An island that dies makes one pull of the others
fail, and nothing else.

One round: every island offers its movement (outer - weights) for the next revision. The leader, the
first by name of those at the highest revision that are heard of, pulls what it can get within a
time limit, makes the outer step, and publishes the new revision with its weights; the others pull
these. So all adopt one island's result, to the bit, whatever it could gather; when the leader dies,
the next one leads, from the highest revision that anybody alive has. Should two lead at once, for
not having heard of each other, those on the side of the later name adopt the other's weights. A new
island joins by pulling the latest; where all that are ahead die before they give it, those that are
left go on from what they have.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import time
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import transfer

from moejax.core.errors import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class IslandConfig:
    """Limits of an island.

    Attributes:
        folder: seen by all islands; nothing else must write there.
        name: of this island, different from all others.
        silent_s: an island that wrote nothing for so long is gone; between rounds, `announce`.
        pull_s: what a pull may take; shorter, because an island that pulls writes nothing.
        round_s: what followers wait for the leader's next revision.
    """

    folder: str
    name: str
    silent_s: float = 10.0
    pull_s: float = 5.0
    round_s: float = 30.0

    def __post_init__(self):
        check(self.name.isidentifier(), f"name={self.name!r} must be a word")
        for name in ("silent_s", "pull_s", "round_s"):
            value = getattr(self, name)
            check(value > 0, f"{name}={value} must be positive")
        check(
            self.pull_s < self.silent_s,
            f"pull_s={self.pull_s} must be below silent_s={self.silent_s}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """What an island says of itself in the folder."""

    name: str
    address: str
    life: str  # of its process, so that offers of a dead one are not mistaken for its own
    revision: int
    author: str  # who made this revision
    offers: dict[str, int]  # what, of which revision, to whose life; to the id of its transfer
    failed: list[int]  # offers of others that did not arrive, to be made again
    time: float


class Island:
    """This job's end: `join` once, then `synchronise` every so many inner steps.

    Arrays are single vectors on the first device (`collectives.flat.ravel`).
    """

    def __init__(self, cfg: IslandConfig):
        self.cfg, self._offers = cfg, {}
        self._folder = pathlib.Path(cfg.folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        client = jax.devices()[0].client
        self._server = transfer.start_transfer_server(client, "127.0.0.1:0", ["127.0.0.1:0"])
        self._life = f"{os.getpid()}-{time.time_ns()}"
        self.revision, self.author = -1, ""
        self._links: dict[str, Any] = {}
        self._kept: list[jax.Array] = []
        self._made, self._failed = 0, []

    def join(self, weights: jax.Array) -> jax.Array:
        """The outer weights to start from: the leader's, or `weights` where nobody is ahead."""
        self.announce()
        deadline = time.time() + self.cfg.round_s
        while time.time() < deadline:
            if all(card.revision < 0 for card in self.others()):
                self.revision = 0
                self._publish(weights)
                return weights
            latest = self._adopt(weights)
            if latest is not None:
                return latest
            self._wait()
        raise TimeoutError(f"nobody gave its weights within {self.cfg.round_s} s")

    def synchronise(self, outer: jax.Array, movement: jax.Array, step: Any) -> jax.Array:
        """New outer weights, after one round, the same on all islands that took part.

        Args:
            outer: outer weights of this island's revision.
            movement: outer minus this island's weights.
            step: called by the leader as `step(outer, mean movement, number of islands)`.
        """
        wanted = self.revision + 1
        deadline = time.time() + self.cfg.round_s
        while time.time() < deadline:
            latest = self._adopt(outer)
            if latest is not None:
                return latest
            if not any(self._better(card) for card in self.others()):
                leader = self.leader()
                if leader is None:
                    return self._lead(outer, movement, step, wanted)
                self._offer("movement", wanted, leader, movement)
            self._wait()
        raise TimeoutError(f"no leader made revision {wanted} within {self.cfg.round_s} s")

    def leader(self) -> Card | None:
        """The first by name of those at the highest revision; None where it is this island."""
        others = self.others()
        top = max([self.revision, *(card.revision for card in others)])
        first = next((card for card in others if card.revision == top), None)
        mine = self.revision == top and (first is None or self.cfg.name < first.name)
        return None if mine else first

    def _better(self, card: Card) -> bool:
        """Whether its weights are to be adopted: later ones, or the other side of a split."""
        return (-card.revision, card.author) < (-self.revision, self.author)

    def _lead(self, outer: jax.Array, movement: jax.Array, step: Any, wanted: int) -> jax.Array:
        total, count = movement, 1
        pending = {card.name: card for card in self.others() if card.revision == self.revision}
        deadline = time.time() + self.cfg.round_s / 2
        while pending and time.time() < deadline:
            now = {card.name: card for card in self.others()}
            for name in list(pending):
                if name not in now:
                    del pending[name]
                    continue
                part = self._pull(now[name], "movement", wanted, movement)
                if part is not None:
                    total, count = total + part, count + 1
                    del pending[name]
            self._wait()
        new = step(outer, total / count, count)
        self.revision, self.author = wanted, self.cfg.name
        self._publish(new)
        return new

    def _adopt(self, like: jax.Array) -> jax.Array | None:
        """Weights of an island that is ahead; None when nobody is, or gives them yet."""
        better = [card for card in self.others() if self._better(card)]
        for card in sorted(better, key=lambda card: (-card.revision, card.author, card.name)):
            weights = self._pull(card, "weights", card.revision, like)
            if weights is not None:
                self.revision, self.author = card.revision, card.author
                self._publish(weights)
                return weights
        return None

    def _wait(self) -> None:
        self.announce()
        time.sleep(0.05)

    def _publish(self, weights: jax.Array) -> None:
        """Offers the weights to all that are heard of; late ones get theirs by `announce`."""
        self._kept = [weights]
        self._offers = {}
        self.announce()

    def _offer(self, what: str, revision: int, to: Card, vector: jax.Array) -> None:
        # One offer serves one pull, also one that fails.
        label = f"{what}@{revision}>{to.life}"
        if label not in self._offers or self._offers[label] in to.failed:
            self._made += 1
            uuid = zlib.crc32(f"{self._life}/{label}/{self._made}".encode())
            self._server.await_pull(uuid, [vector])
            self._offers[label] = uuid

    def _pull(self, card: Card, what: str, revision: int, like: jax.Array) -> jax.Array | None:
        """What an island offers to this one; None when it does not, or is gone."""
        uuid = card.offers.get(f"{what}@{revision}>{self._life}")
        if uuid is None or uuid in self._failed:
            return None
        where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        spec = jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=where)
        limit = datetime.datetime.now() + datetime.timedelta(seconds=self.cfg.pull_s)
        try:
            key = card.address + card.life
            if key not in self._links:
                self._links[key] = self._server.connect(card.address)
            (vector,) = self._links[key].pull(uuid, [spec], timeout=limit)
            return jnp.asarray(jax.block_until_ready(vector))
        except jax.errors.JaxRuntimeError:
            self._links.pop(card.address + card.life, None)
            self._failed.append(uuid)
            self.announce()
            return None

    def announce(self) -> None:
        """Writes this island's card, with offers of its weights to all that lack them."""
        for card in self.others():
            behind = (-card.revision, card.author) > (-self.revision, self.author)
            if self._kept and behind:
                self._offer("weights", self.revision, card, self._kept[0])
        card = Card(
            name=self.cfg.name,
            address=self._server.address(),
            life=self._life,
            revision=self.revision,
            author=self.author,
            offers=self._offers,
            failed=self._failed,
            time=time.time(),
        )
        path = self._folder / f"{self.cfg.name}.json"
        temporary = self._folder / f".{self.cfg.name}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(dataclasses.asdict(card)))
        os.replace(temporary, path)

    def others(self) -> list[Card]:
        """Cards of the islands that wrote lately, by name."""
        cards = []
        for path in sorted(self._folder.glob("*.json")):
            card = Card(**json.loads(path.read_text()))
            if card.name != self.cfg.name and time.time() - card.time < self.cfg.silent_s:
                cards.append(card)
        return cards
