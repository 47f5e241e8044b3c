"""Members that lie, and strangers: what they can do is bounded, and they are counted."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable

import pytest
import torch

from averaging import allreduce_round
from averaging.allreduce import PROTOCOL, GroupLimits, GroupResult
from averaging.allreduce_assembly import Link
from averaging.allreduce_ledger import Ledger
from averaging.allreduce_messages import Ballot, Hello, Mean, Want
from averaging.allreduce_transfer import Transfer
from protocol.errors import TransportError
from protocol.ids import PeerId
from protocol.memory import LinkSpec, MemoryNetwork, MemoryTransport
from protocol.virtual_time import run_virtual
from protocol.wire import Message, read_message, write_message
from tests.averaging.group_members import NUMEL, Members, decoded, encoded_update, open_members
from tests.averaging.swarm import RUN, identities

LIAR = 3
IDS = sorted(identity.peer_id for identity in identities(4))


class LyingTransfer(Transfer):
    """Everybody runs it, and the liar is honest up to one lie."""

    lie = ""

    def _tells(self, *lies: str) -> bool:
        return self.lie in lies and self._context.identity.peer_id == IDS[LIAR]

    def _own_bytes(self, index: int) -> list[memoryview]:
        if not self._tells("nan", "huge") or index == self._own:
            return super()._own_bytes(index)
        part = self.parts[index]
        values = torch.full((part.stop - part.start,), float("nan") if self.lie == "nan" else -1e6)
        return [encoded_update(values, self._context.codec).delta]

    async def _tell_mean(self) -> None:
        await super()._tell_mean()
        if not self._tells("two stories", "wrong bytes", "poisoned mean", "replay"):
            return
        for peer, link in self._assembly.links.items():  # what was said has not been written yet
            mean, payload = link._outbox.get_nowait(), link._outbox.get_nowait()
            assert isinstance(mean, Mean)
            assert isinstance(payload, memoryview)
            link.say(*self._forged(mean, payload, peer))

    def _forged(self, mean: Mean, payload: memoryview, to: PeerId) -> tuple[Message, memoryview]:
        if self.lie == "two stories" and to != IDS[0]:
            return mean, payload
        numel = self.parts[self._own].stop - self.parts[self._own].start
        scale = 1e9 if self.lie == "poisoned mean" else 1e-3
        other = encoded_update(torch.full((numel,), scale), self._context.codec).delta
        if self.lie == "wrong bytes":
            return mean, other
        round = self._update.round - (self.lie == "replay")
        ledger = Ledger(self._context.identity, run=RUN, round=round, roster=self._roster)
        return ledger.sign(hashlib.sha256(other).digest(), list(mean.shares)), other

    def _give(self, link: Link, want: Want) -> None:
        if self._tells("bad gift"):
            link.say(*(memoryview(bytes(self._part_bytes(index))) for index in want.parts))
        elif self._tells("greedy"):
            super()._give(link, Want(parts=[0, 0]))
        else:
            super()._give(link, want)


@pytest.fixture
def with_lie(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[list[GroupResult], Members]]:
    """Play one round of four with a lie; links may be broken."""

    def play(lie: str, broken: tuple[int, int] | None = None) -> tuple[list[GroupResult], Members]:
        monkeypatch.setattr(LyingTransfer, "lie", lie)
        monkeypatch.setattr(allreduce_round, "Transfer", LyingTransfer)

        async def main() -> tuple[list[GroupResult], Members]:
            network = MemoryNetwork(link=LinkSpec(latency_s=0.01))
            async with open_members(4, network=network) as members:
                if broken is not None:
                    network.set_link(IDS[broken[0]], IDS[broken[1]], LinkSpec(latency_s=0.01, loss=1.0))
                return await members.reduce_each(deadline_s=20.0), members

        return run_virtual(main())

    return play


Play = Callable[..., tuple[list[GroupResult], Members]]
HONEST = range(3)


def check_honest(results: list[GroupResult], members: Members, *, dropped: set[int]) -> torch.Tensor:
    """The honest ones agree on all parts but the dropped ones, and blame the liar alone; returns their mean."""
    edges = [NUMEL // 256 * index // 4 * 256 for index in range(4)]
    means = [decoded(results[index].mean, members.codec) for index in HONEST]
    for index in HONEST:
        starts = {start for start, _ in results[index].own_parts}
        assert len(starts) == len(dropped)
        assert all(min(abs(start - edges[part]) for start in starts) <= 256 for part in dropped)
        violations = members.averagers[index].violations
        assert set(violations) == {IDS[LIAR]}
        for start, stop in results[index].own_parts:
            assert torch.equal(means[index][start:stop], members.sent(index)[start:stop])
            means[index][start:stop] = 0.0
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2])
    return means[0]


def test_an_owner_who_tells_two_stories_is_convicted_by_all(with_lie: Play) -> None:
    results, members = with_lie("two stories")
    check_honest(results, members, dropped={LIAR})
    for index in HONEST:
        assert set(results[index].own_parts.values()) == {"its owner told two stories"}


@pytest.mark.parametrize("lie", ["wrong bytes", "poisoned mean", "replay"])
def test_a_bad_mean_costs_its_own_part(with_lie: Play, lie: str) -> None:
    results, members = with_lie(lie)
    check_honest(results, members, dropped={LIAR})


def test_values_that_are_not_finite_are_left_out_and_named(with_lie: Play) -> None:
    results, members = with_lie("nan")
    mean = check_honest(results, members, dropped=set())
    assert torch.isfinite(mean).all()
    honest = sum((members.sent(index) for index in HONEST), torch.zeros(NUMEL)) / 3
    part = slice(0, NUMEL // 4 // 256 * 256)
    assert torch.allclose(mean[part], honest[part], atol=1e-3)
    for index in HONEST:
        assert results[index].missing == {IDS[LIAR]: "its values are not finite"}


def test_a_huge_delta_moves_the_mean_by_no_more_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LyingTransfer, "lie", "huge")
    monkeypatch.setattr(allreduce_round, "Transfer", LyingTransfer)

    async def main() -> None:
        async with open_members(4) as members:
            results = await members.reduce_each()
            assert len({bytes(result.mean or b"") for result in results}) == 1
            mean = decoded(results[0].mean, members.codec)
            part = slice(0, NUMEL // 4 // 256 * 256)
            honest = sum((members.sent(index) for index in HONEST), torch.zeros(NUMEL)) / 4
            largest = max(float(members.sent(index)[part].norm()) for index in HONEST)
            assert float((mean - honest)[part].norm()) <= 1.02 * GroupLimits().clip_factor * largest / 4

    run_virtual(main())


@pytest.mark.parametrize("lie", ["bad gift", "greedy"])
def test_a_bad_gift_is_not_taken(with_lie: Play, lie: str) -> None:
    """0 and 1 do not reach each other and ask the liar for each other's parts."""
    results, members = with_lie(lie, (0, 1))
    assert results[2].outcome == "averaged"
    for index, lost in ((0, 1), (1, 0)):
        [(start, stop)] = results[index].own_parts
        mean = decoded(results[index].mean, members.codec)
        assert torch.equal(mean[start:stop], members.sent(index)[start:stop])
        assert results[lost].outcome == "partial"
    blamed = [members.averagers[index].violations[IDS[LIAR]] for index in (0, 1)]
    assert all(blamed) if lie == "bad gift" else not any(blamed)


# ---- strangers ----


def hello(**changes: object) -> Hello:
    fields: dict[str, object] = {"run": RUN, "round": 5, "tokens": 1, "num_bytes": 20_898, "norm": 1.0}
    return Hello.model_validate(fields | changes)


@pytest.mark.parametrize(
    ("message", "refusal"),
    [(hello(run="00" * 32), "wrong-run"), (hello(round=4), "passed"), (hello(), "unknown"), (hello(round=6), None)],
)
def test_a_stranger_is_told_or_waits(message: Hello, refusal: str | None) -> None:
    async def main() -> None:
        async with open_members(4, num_silent=1) as members:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(members.reduce(index, candidates=[0, 1, 2])) for index in range(3)]
                await asyncio.sleep(0.03)
                async with await members.transports[LIAR].open(members.ids[1], PROTOCOL) as stream:
                    await write_message(stream, message)
                    if refusal is not None:
                        assert (await read_message(stream, Hello)).refusal == refusal
                    else:
                        with pytest.raises(TimeoutError):
                            async with asyncio.timeout(5.0):
                                await read_message(stream, Hello)
            assert {task.result().outcome for task in tasks} == {"averaged"}
            assert not any(averager.violations for averager in members.averagers)

    run_virtual(main())


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc0", b"\x00\x00\x00\x02\x81\xa1"])
def test_rubbish_is_a_violation_and_disturbs_nobody(data: bytes) -> None:
    async def main() -> None:
        async with open_members(3, num_silent=1) as members:
            async with await members.transports[2].open(members.ids[0], PROTOCOL) as stream:
                await stream.write(data)
                with pytest.raises(TransportError):
                    await stream.read_exactly(1)
            assert members.averagers[0].violations == {members.ids[2]: 1}
            assert {result.outcome for result in await members.reduce_each()} == {"averaged"}

    run_virtual(main())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (hello(num_bytes=1), None),
        (hello(), Ballot(number=2, members=list(IDS))),
        (hello(), Ballot(number=0, members=list(IDS[:3]))),
        (hello(), Want(parts=[])),
    ],
)
def test_a_candidate_that_breaks_a_rule_is_counted_and_left_out(first: Hello, second: Message | None) -> None:
    async def main() -> None:
        async with open_members(4, num_silent=1) as members:
            liar: MemoryTransport = members.transports[LIAR]

            async def serve(stream: object) -> None:
                await read_message(stream, Hello)  # type: ignore[arg-type]
                await write_message(stream, first)  # type: ignore[arg-type]
                if second is not None:
                    await write_message(stream, second)  # type: ignore[arg-type]
                await asyncio.sleep(100.0)

            liar.handle(PROTOCOL, serve)
            results = await members.reduce_each()
            for result, averager in zip(results, members.averagers, strict=True):
                assert result.outcome != "alone"
                assert len(result.own_parts) <= (second is not None), "a part only if it was in the group once"
                assert set(result.peers) | {averager._context.identity.peer_id} == set(IDS[:3])
                assert averager.violations == {IDS[LIAR]: 1}
                assert IDS[LIAR] in result.missing

    run_virtual(main())


def test_held_strangers_give_way_to_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("averaging.allreduce._MAX_HELD", 2)

    async def main() -> None:
        async with open_members(5, num_silent=3) as members:
            await members.reduce(1, candidates=[4], deadline_s=1.0)  # from now on 4 is known

            async with asyncio.TaskGroup() as group:
                calls = []
                for index in (2, 3, 0, 4):
                    calls.append(group.create_task(refusal_of(members, index)))
                    await asyncio.sleep(0.1)
            assert [task.result() for task in calls] == ["full", None, "full", None]

    run_virtual(main())


async def refusal_of(members: Members, caller: int) -> str | None:
    """What peer 1 says to a call for a round that is not due; None if it lets it wait."""
    async with await members.transports[caller].open(members.ids[1], PROTOCOL) as stream:
        await write_message(stream, hello(round=9))
        try:
            async with asyncio.timeout(5.0):
                return (await read_message(stream, Hello)).refusal
        except TimeoutError:
            return None
