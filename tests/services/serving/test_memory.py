"""Memory by bytes: what is leased stays, one load serves all, waiting ends, nothing leaks."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable

import pytest

from services.errors import Unavailable
from services.serving.memory import LoadFailed, Memory, Wanted, memory_of
from tests.support.blocks import Block, Device, Recorder


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def use(memory: Memory, wanted: Wanted[Block]) -> Block:
    async with memory.hold(wanted) as block:
        assert not block.is_closed
        return block


class Lease:
    """A lease that lasts until ``end`` is set."""

    def __init__(self, memory: Memory, wanted: Wanted[Block]) -> None:
        self.end = asyncio.Event()
        self.begun = False
        self.task = asyncio.ensure_future(self._run(memory, wanted))

    async def _run(self, memory: Memory, wanted: Wanted[Block]) -> Block:
        async with memory.hold(wanted) as block:
            self.begun = True
            await self.end.wait()
            assert not block.is_closed, "evicted under a lease"
        return block

    async def finish(self) -> Block:
        self.end.set()
        return await self.task


async def begun(memory: Memory, wanted: Wanted[Block]) -> Lease:
    lease = Lease(memory, wanted)
    await until(lambda: lease.begun or lease.task.done())
    assert not lease.task.done()
    return lease


def unused(memory: Memory) -> None:
    """Nobody holds, waits or loads."""
    assert not [entry for entry in memory._entries.values() if entry.uses]
    assert not memory._waiting
    assert not memory._sizing


def test_thousands_of_leases_of_five_models_with_room_for_two():
    device, recorder, chance = Device(), Recorder(), random.Random(0)
    sizes = {f"m{i}": 40 + 5 * i for i in range(5)}

    async def client(memory: Memory, number: int) -> None:
        for _ in range(60):
            key = f"m{chance.randrange(5)}"
            async with memory.hold(device.wanted(key, sizes[key])) as block:
                for _ in range(chance.randrange(3)):
                    await asyncio.sleep(0)
                    assert block.key == key
                    assert not block.is_closed, "evicted under a lease"
                    assert device.num_bytes <= 100
                    assert memory.num_bytes <= 100

    async def main() -> None:
        memory = Memory(100, recorder, patience_s=0.001)
        await asyncio.gather(*(client(memory, number) for number in range(50)))
        unused(memory)
        await memory.close()

    asyncio.run(main())
    assert device.most_bytes <= 100
    assert device.num_bytes == 0, "all is closed in the end"
    assert set(device.loads) == set(sizes)
    assert recorder.loads == device.loads.total() == device.closes.total() == recorder.evictions
    assert 5 <= recorder.loads < 3000
    assert max(recorder.held) <= 100
    assert recorder.held[-1] == 0


def test_leases_that_are_cancelled_at_any_moment_leak_nothing():
    device, chance = Device(load_s=0.0005), random.Random(1)
    bases = [device.wanted(f"base{i}", 30) for i in range(3)]
    wanted = [*bases, *(device.wanted(f"{base.key}-{i}", 10, base) for base in bases for i in range(3))]

    async def client(memory: Memory) -> None:
        for _ in range(20):
            task = asyncio.ensure_future(use(memory, chance.choice(wanted)))
            await asyncio.sleep(chance.random() * 0.004)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() or not task.exception()

    async def main() -> None:
        memory = Memory(80, patience_s=0.001)
        await asyncio.gather(*(client(memory) for _ in range(30)))
        await until(lambda: all(entry.loading.done() for entry in memory._entries.values()))
        await until(lambda: not memory._sizing)
        unused(memory)
        for each in wanted:  # all of them can still be had
            await asyncio.wait_for(use(memory, each), 30)
        await memory.close()
        assert not memory.keys

    asyncio.run(main())
    assert device.most_bytes <= 80
    assert device.num_bytes == 0


def test_one_load_serves_all_who_ask_meanwhile():
    device = Device()
    device.gates["m"] = threading.Event()

    async def main() -> None:
        memory = Memory(100)
        users = [asyncio.ensure_future(use(memory, device.wanted("m", 10))) for _ in range(50)]
        await asyncio.sleep(0.05)
        device.gates["m"].set()
        assert len({id(block) for block in await asyncio.gather(*users)}) == 1
        assert await use(memory, device.wanted("m", 10)) is users[0].result()
        await memory.close()

    asyncio.run(main())
    assert device.loads == device.sizings == {"m": 1}


def test_a_failed_load_fails_all_who_wait_with_one_error_and_the_next_one_tries_again():
    device = Device(load_s=0.02)
    device.errors["m"] = OSError("damaged")

    async def main() -> None:
        memory = Memory(100, retry_s=0.0)
        wanted = device.wanted("m", 10)
        failures = await asyncio.gather(*(use(memory, wanted) for _ in range(20)), return_exceptions=True)
        assert all(isinstance(each, LoadFailed) and each.error is device.errors["m"] for each in failures)
        assert (device.attempts["m"], memory.num_bytes, memory.keys) == (1, 0, [])
        assert device.errors.pop("m").__traceback__ is None, "frames keep what was loaded so far"
        assert await use(memory, wanted)
        unused(memory)
        await memory.close()

    asyncio.run(main())


def test_what_is_damaged_is_not_read_again_for_a_while():
    device = Device()
    device.errors["m"] = OSError("damaged")

    async def main() -> None:
        memory = Memory(100, retry_s=0.3)
        wanted = device.wanted("m", 10)
        for _ in range(100):
            with pytest.raises(LoadFailed, match="damaged"):
                await use(memory, wanted)
        assert (device.attempts["m"], device.sizings["m"]) == (1, 1)
        assert await use(memory, device.wanted("other", 10)), "the others go on"
        assert await use(memory, device.wanted("m of other files", 10))
        await asyncio.sleep(0.3)
        device.errors.clear()
        assert await use(memory, wanted)
        await memory.close()

    asyncio.run(main())


def test_a_storage_that_did_not_answer_is_asked_again_at_once():
    device = Device()
    device.errors["m"] = Unavailable("no answer")

    async def main() -> None:
        memory = Memory(100, retry_s=60)
        with pytest.raises(LoadFailed, match="no answer"):
            await use(memory, device.wanted("m", 10))
        device.errors.clear()
        assert await use(memory, device.wanted("m", 10))
        await memory.close()

    asyncio.run(main())


def test_the_least_recently_used_goes_first_and_a_lease_stays():
    device = Device()

    async def main() -> None:
        memory = Memory(30)
        held = await begun(memory, device.wanted("held", 10))
        for key in ("a", "b", "a", "c"):
            await use(memory, device.wanted(key, 10))
        assert memory.keys == ["held", "a", "c"]
        await held.finish()
        await use(memory, device.wanted("d", 10))
        assert memory.keys == ["c", "held", "d"]
        await memory.close()

    asyncio.run(main())


def test_a_load_waits_until_what_is_leased_is_freed():
    device = Device()

    async def main() -> None:
        memory = Memory(30)
        held = [await begun(memory, device.wanted(key, 10)) for key in ("a", "b", "c")]
        waiting = asyncio.ensure_future(use(memory, device.wanted("large", 20)))
        await asyncio.sleep(0.02)
        await held[0].finish()
        await asyncio.sleep(0.02)
        assert not waiting.done()
        assert "large" not in device.loads
        await held[1].finish()
        assert (await waiting).num_bytes == 20
        assert memory.keys == ["c", "large"]
        await held[2].finish()
        await memory.close()

    asyncio.run(main())
    assert device.most_bytes == 30


def test_what_can_never_fit_is_refused_with_the_sizes_and_nothing_makes_room():
    device = Device()

    async def main() -> None:
        memory = Memory(30)
        await use(memory, device.wanted("small", 10))
        base = device.wanted("base", 25)
        message = "there is no room: 25 bytes of the model [+] 6 bytes of the adapter are more than the 30"
        with pytest.raises(Unavailable, match=message) as refused:
            await use(memory, device.wanted("lora", 6, base))
        assert refused.value.code == "out_of_memory"
        assert memory.keys == ["small"]
        assert await use(memory, base)
        await memory.close()

    asyncio.run(main())


def test_who_waits_for_room_is_passed_for_a_while_and_then_gets_its_turn():
    device = Device()

    async def main() -> None:
        memory = Memory(10, patience_s=0.1)
        hot = device.wanted("hot", 10)
        first = await begun(memory, hot)
        cold = asyncio.ensure_future(use(memory, device.wanted("cold", 10)))
        await asyncio.sleep(0.02)
        passing = await begun(memory, hot)  # it is in memory, and the other one is patient
        await first.finish()
        await asyncio.sleep(0.12)
        late = Lease(memory, hot)
        await asyncio.sleep(0.02)
        assert not late.begun
        await passing.finish()
        assert (await cold).key == "cold"
        await late.finish()
        assert device.loads == {"hot": 2, "cold": 1}
        await memory.close()

    asyncio.run(main())


def test_a_cancelled_lease_in_front_lets_those_behind_it_go():
    device = Device()

    async def main() -> None:
        memory = Memory(20)
        held = await begun(memory, device.wanted("held", 15))
        large = asyncio.ensure_future(use(memory, device.wanted("large", 20)))
        await asyncio.sleep(0.02)
        small = asyncio.ensure_future(use(memory, device.wanted("small", 5)))
        await asyncio.sleep(0.02)
        assert not small.done(), "the order is that of arrival"
        large.cancel()
        assert (await asyncio.wait_for(small, 30)).key == "small"
        await held.finish()
        unused(memory)
        await memory.close()

    asyncio.run(main())
    assert "large" not in device.loads


def test_a_load_goes_on_when_all_who_wait_for_it_leave():
    device = Device()
    device.gates["m"] = threading.Event()

    async def main() -> None:
        memory = Memory(20)
        task = asyncio.ensure_future(use(memory, device.wanted("m", 20)))
        await until(lambda: "m" in memory.keys)
        task.cancel()
        await asyncio.wait([task])
        other = asyncio.ensure_future(use(memory, device.wanted("other", 10)))
        await asyncio.sleep(0.02)
        assert memory.keys == ["m"], "what is being loaded is not evicted"
        device.gates["m"].set()
        assert await other
        unused(memory)
        await memory.close()

    asyncio.run(main())
    assert device.loads == {"m": 1, "other": 1}
    assert device.most_bytes == 20


def test_a_base_stays_while_an_adapter_is_leased_and_outlives_its_last_one():
    device = Device()

    async def main() -> None:
        memory = Memory(50)
        base = device.wanted("base", 30)
        lora = await begun(memory, device.wanted("lora", 10, base))
        await use(memory, device.wanted("a", 10))
        waiting = asyncio.ensure_future(use(memory, device.wanted("b", 30)))
        await asyncio.sleep(0.02)
        assert not waiting.done(), "the base of a leased adapter is in use"
        waiting.cancel()
        await lora.finish()
        await use(memory, device.wanted("c", 10))  # a goes; it was used before the adapter
        await use(memory, device.wanted("d", 10))  # the adapter goes
        assert memory.keys == ["base", "c", "d"]
        await use(memory, device.wanted("other lora", 10, base))
        assert device.loads["base"] == 1, "the base is used again"
        await use(memory, device.wanted("large", 50))
        assert memory.keys == ["large"]
        await memory.close()

    asyncio.run(main())
    assert device.most_bytes == 50


def test_adapters_of_two_bases_never_wait_for_one_another_in_a_circle():
    device = Device(load_s=0.005)

    async def main() -> None:
        memory = Memory(65)
        bases = [device.wanted(f"base{i}", 30) for i in range(2)]
        loras = [device.wanted(f"lora{i}", 10, base) for i, base in enumerate(bases)]
        users = [use(memory, loras[i % 2]) for i in range(20)]
        async with asyncio.timeout(30):
            await asyncio.gather(*users)
        unused(memory)
        await memory.close()

    asyncio.run(main())
    assert device.most_bytes <= 65


def test_a_failed_base_fails_its_adapters_and_leaves_no_bytes():
    device = Device(load_s=0.01)
    device.errors["base"] = OSError("damaged")

    async def main() -> None:
        memory = Memory(100, retry_s=60)
        base = device.wanted("base", 30)
        loras = [device.wanted(f"lora{i}", 10, base) for i in range(3)]
        found = await asyncio.gather(*(use(memory, each) for each in loras), return_exceptions=True)
        assert all(isinstance(each, LoadFailed) and each.error is device.errors["base"] for each in found)
        assert memory.num_bytes == 0
        unused(memory)
        with pytest.raises(LoadFailed):
            await use(memory, device.wanted("another", 10, base))
        await memory.close()

    asyncio.run(main())
    assert not device.loads


def test_a_size_that_was_estimated_too_small_is_corrected_without_going_over_the_limit():
    device, recorder = Device(), Recorder()

    async def main() -> None:
        memory = Memory(40, recorder)
        await use(memory, device.wanted("idle", 20))
        await use(memory, device.wanted("m", 30, estimate=10))
        assert memory.keys == ["m"]
        assert memory.num_bytes == 30
        held = await begun(memory, device.wanted("held", 10))
        larger = asyncio.ensure_future(use(memory, device.wanted("larger", 35, estimate=25)))
        await until(lambda: device.closes["larger"] == 1)
        await asyncio.sleep(0.02)
        assert not larger.done(), "it waits for the room that it needs"
        await held.finish()
        assert (await larger).num_bytes == memory.num_bytes == 35
        with pytest.raises(Unavailable, match="41 bytes of the model are more than the 40 of max_bytes"):
            await use(memory, device.wanted("too large", 41, estimate=10))
        unused(memory)
        await memory.close()

    asyncio.run(main())
    assert device.loads == {"idle": 1, "m": 1, "held": 1, "larger": 2, "too large": 1}
    assert max(recorder.held) <= 40


def test_an_estimate_that_was_too_large_gives_its_room_back():
    device = Device()

    async def main() -> None:
        memory = Memory(40)
        small = await begun(memory, device.wanted("small", 10, estimate=40))
        assert memory.num_bytes == 10
        assert await use(memory, device.wanted("other", 30))
        await small.finish()
        await memory.close()

    asyncio.run(main())


def test_an_error_of_closing_is_logged_and_frees_the_room(caplog):
    class Stubborn(Block):
        def close(self) -> None:
            raise RuntimeError("busy")

    device = Device()
    stubborn: Wanted[Block] = Wanted("s", "model", lambda: 30, lambda _: Stubborn(device, "s", 30, None))

    async def main() -> None:
        memory = Memory(40)
        await use(memory, stubborn)
        assert await use(memory, device.wanted("other", 30))
        await memory.close()

    asyncio.run(main())
    assert "s cannot be closed" in caplog.text


def test_the_memory_of_this_machine_is_a_plausible_number():
    assert 1 << 28 < memory_of("cpu") < 1 << 46
