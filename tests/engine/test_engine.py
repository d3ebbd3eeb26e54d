"""The engine as a user meets it: each answer is the one that its request gets alone."""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from bitwright import Engine
from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.engine.handle import Status
from bitwright.kernels import native_library
from bitwright.models.generation import Sampling, generate_tokens
from bitwright.models.limits import end_tokens
from tests.models.architectures import build

PROMPTS = ["Once upon a time", "The sea is", "Tom had a red ball. He", "What is 3 plus 4?"]


@pytest.fixture(scope="module")
def engine(demo: PreTrainedModel) -> Iterator[Engine]:
    with Engine(demo, max_batch=4, cache_tokens=2048) as engine:
        yield engine


def test_greedy_answers_are_those_of_transformers(engine: Engine, demo: PreTrainedModel) -> None:
    answers = engine.generate(PROMPTS, max_tokens=24)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert engine.tokenizer is not None
        tokens = engine.tokenizer.encode(prompt)
        expected = list(generate_tokens(demo, tokens, limit=24, sampling=Sampling()))
        assert list(answer.tokens) == expected
        is_end = expected[-1] in end_tokens(demo)
        assert answer.finish_reason == ("stop" if is_end else "length")
        assert answer.text == engine.tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.prompt_tokens == len(tokens) and answer.seconds >= (answer.time_to_first_token or 9) > 0


def test_the_engine_is_tested_as_it_ships(engine: Engine, tiny: PreTrainedModel) -> None:
    shipped = "torch" if native_library.missing() else "native"
    with Engine(tiny) as other:
        assert engine.decoder == other.decoder == shipped


def test_greedy_answers_do_not_depend_on_company(kernels: str, demo: PreTrainedModel) -> None:
    """On either decoder, and each time again."""
    with Engine(demo, max_batch=4, cache_tokens=2048) as engine:
        alone = [engine.generate(prompt, max_tokens=12).tokens for prompt in PROMPTS]
        for prompts, expected in ((PROMPTS, alone), (PROMPTS[::-1], alone[::-1])):
            assert [answer.tokens for answer in engine.generate(prompts, max_tokens=12)] == expected
        assert engine.decoder == ("native" if kernels == "native" else "torch")


def test_the_same_seed_is_the_same_answer_alone_and_in_company(engine: Engine) -> None:
    """E36."""
    options: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 8, "repetition_penalty": 1.1}
    alone = [engine.generate(prompt, seed=seed, **options) for seed, prompt in enumerate(PROMPTS)]
    handles = [engine.submit(prompt, seed=seed, **options) for seed, prompt in enumerate(PROMPTS)]
    handles += [engine.submit(PROMPTS[0], seed=9, **options) for _ in range(2)]
    together = [handle.result() for handle in handles]
    assert [answer.tokens for answer in together[:4]] == [answer.tokens for answer in alone]
    assert len({answer.tokens for answer in together[4:]}) == 1
    by_chance = [engine.generate(PROMPTS[0], **options) for _ in range(2)]
    assert len({answer.tokens for answer in by_chance}) > 1
    again = engine.generate(PROMPTS[0], seed=by_chance[0].seed, **options)
    assert again.tokens == by_chance[0].tokens


def test_pieces_make_the_text(engine: Engine) -> None:
    whole = engine.generate("Once upon a time", max_tokens=12)
    assert "".join(engine.stream("Once upon a time", max_tokens=12)) == whole.text
    handle, tokens, text = engine.submit("Once upon a time", max_tokens=12), [], ""
    statuses = [handle.status]
    while (delta := handle.next()) is not None:
        tokens += delta.tokens
        text += delta.text
        statuses.append(handle.status)
    assert tuple(tokens) == whole.tokens and text == whole.text == handle.result().text
    order = list(Status)
    assert statuses == sorted(statuses, key=order.index) and handle.status is Status.FINISHED
    assert handle.next() is None and handle.next(timeout=5) is None


def test_stops(engine: Engine) -> None:
    whole = engine.generate("Once upon a time", max_tokens=20)
    stop = whole.text[30:36]
    assert stop.strip()
    stopped = engine.generate("Once upon a time", max_tokens=20, stop=["never there", stop])
    assert stopped.text == whole.text[: whole.text.find(stop)] and stopped.stopped_by == stop
    assert stopped.finish_reason == "stop" and len(stopped.tokens) < 20
    by_token = engine.generate("Once upon a time", max_tokens=20, stop_ids=[whole.tokens[5]])
    assert by_token.tokens == whole.tokens[: whole.tokens.index(whole.tokens[5]) + 1]
    assert by_token.stopped_by == whole.tokens[5] and by_token.finish_reason == "stop"


def test_logprobs(engine: Engine, demo: PreTrainedModel) -> None:
    answer = engine.generate("Once upon a time", max_tokens=5, logprobs=3)
    assert engine.tokenizer is not None and len(answer.logprobs) == 5
    prompt = engine.tokenizer.encode("Once upon a time")
    with torch.no_grad():
        logits = demo(input_ids=torch.tensor([prompt + list(answer.tokens)])).logits[0, len(prompt) - 1 :]
    expected = logits.double().log_softmax(-1)
    for number, found in enumerate(answer.logprobs):
        assert found.token == answer.tokens[number] and len(found.top) == 3
        assert found.logprob == pytest.approx(float(expected[number, found.token]), abs=1e-4)


def test_conversations(engine: Engine) -> None:
    question = "What is 3 plus 4?"
    by_flag = engine.generate([question], chat=True, max_tokens=8)[0]
    by_message = engine.generate([[{"role": "user", "content": question}]], max_tokens=8)[0]
    assert by_flag.tokens == by_message.tokens and by_flag.prompt_tokens > len(engine.tokenizer.encode(question))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("prompt", "fields", "words"),
    [
        ("", {}, "BW201.*prompt is empty"), ([], {}, "BW201.*prompt is empty"), (b"x", {}, "BW201.*bytes"),
        (None, {}, "BW201.*NoneType"), ("a", {"temperature": math.nan}, "BW201.*temperature"),
        ("a", {"top_k": -1}, "BW201.*top_k"), ("a", {"top_p": 1.5}, "BW201.*top_p"),
        ([1, 99999], {}, "BW201.*prompt has the token 99999"), ([1, "a"], {}, "BW201.*token 'a'"),
        ([-1], {}, "BW201.*token -1"), ("a", {"logit_bias": {5000: 1.0}}, "BW201.*logit_bias.*5000"),
        ("a", {"stop_ids": [2048]}, "BW201.*stop_ids.*2048"), ("a", {"max_tokens": 600}, "BW403.*600"),
        ("a", {"options": "x"}, "BW201.*options is 'x'"), ("a", {"options": {"top_k": 1}}, "BW201.*options is {"),
        ([5] * 512, {}, "BW403.*512 tokens"), ([5] * 600, {}, "BW403.*600 tokens"),
        ("x" * 10**6, {}, "BW403.*1000000 characters.*512 tokens"),
        ([{"role": "user", "content": "x" * 10**6}], {}, "BW403.*1000000 characters"),
        ([{"role": "user"}], {}, "BW201.*message has role"), ("\ud800", {}, "BW201.*Unicode"),
        ([10**5000], {}, "BW201.*prompt has the token"), ("a", {"logit_bias": {10**5000: 1}}, "BW201.*logit_bias"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_at_once(
    engine: Engine, prompt: Any, fields: dict[str, Any], words: str
) -> None:
    before = engine.statistics()
    with pytest.raises(BitwrightError, match=f"(?s){words}"):
        engine.submit(prompt, **fields)
    after = engine.statistics()
    assert (after.waiting, after.running, after.prompt_tokens) == (0, 0, before.prompt_tokens)


def test_texts_of_the_longest_tokens_are_encoded(engine: Engine) -> None:
    """What could fit is refused by its tokens alone."""
    assert engine.tokenizer is not None
    longest = max(map(len, engine.tokenizer.get_vocab()))
    with pytest.raises(BitwrightError, match=r"BW403.* tokens and"):
        engine.submit("a" * (longest * 512))


@pytest.mark.parametrize("timeout", ["5", math.nan, -1, math.inf, True])
def test_seconds_to_wait_are_checked(engine: Engine, timeout: Any) -> None:
    handle = engine.submit("a", max_tokens=1)
    with pytest.raises(BitwrightError, match=r"BW201.*timeout"):
        handle.result(timeout)
    assert handle.result(30).finish_reason == "length"


def test_a_request_that_never_fits_the_cache(tiny: PreTrainedModel) -> None:
    with Engine(tiny, cache_tokens=64) as engine:
        with pytest.raises(BitwrightError, match=r"BW403.*whole cache holds 64"):
            engine.submit([1] * 40, max_tokens=26)
        assert len(engine.generate([[1] * 40], max_tokens=25)[0].tokens) == 25
        assert len(engine.generate([[1] * 40])[0].tokens) == 25  # what fits, where nothing else is asked


def test_cancelling(engine: Engine) -> None:
    handle = engine.submit("Once upon a time", max_tokens=400)
    first = handle.next()
    assert first is not None
    handle.cancel()
    answer = handle.result(timeout=20)
    assert answer.finish_reason == "cancelled" and handle.status is Status.CANCELLED
    assert answer.tokens[: len(first.tokens)] == first.tokens and len(answer.tokens) < 400
    handle.cancel()
    stream = engine.stream("Once upon a time", max_tokens=400)
    assert next(stream)
    stream.close()  # type: ignore[attr-defined]
    _wait(lambda: engine.statistics().running == 0)
    assert engine.statistics().cache_used == 0


@pytest.mark.parametrize("leave", ["forget", "close", "asyncio"])
def test_a_stream_that_is_left_before_its_first_piece_is_cancelled(
    tiny: PreTrainedModel, leave: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never_read(engine: Engine) -> None:
        engine.stream_async([1, 2, 3], max_tokens=100, ignore_end=True)
        await asyncio.sleep(0)

    with Engine(tiny, cache_tokens=2048) as engine:
        run = engine._loop._runner.run

        def late(works: Any) -> Any:
            time.sleep(0.02)
            return run(works)

        monkeypatch.setattr(engine._loop._runner, "run", late)
        if leave == "asyncio":
            asyncio.run(never_read(engine))
        else:
            stream = engine.stream([1, 2, 3], max_tokens=100, ignore_end=True)
            if leave == "close":
                stream.close()  # type: ignore[attr-defined]
            else:
                del stream
        _wait(lambda: engine.statistics().running + engine.statistics().waiting == 0)
        assert engine.statistics().cancelled == 1 and engine.statistics().finished == 0


def test_prompts_that_are_never_begun_are_not_counted(tiny: PreTrainedModel) -> None:
    with Engine(tiny, max_batch=1) as engine:
        first = engine.submit([1] * 30, max_tokens=90)
        assert first.next(20) is not None
        second = engine.submit([2] * 40, max_tokens=5)
        second.cancel()
        assert second.result(20).finish_reason == "cancelled" and second.result().tokens == ()
        assert first.result(20) and engine.statistics().prompt_tokens == 30


def _wait(is_so: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_asyncio(engine: Engine) -> None:
    async def ask() -> tuple[list[Any], str, str]:
        answers = await engine.generate_async(PROMPTS, max_tokens=10)
        pieces = [piece async for piece in engine.stream_async(PROMPTS[0], max_tokens=10)]
        handle = engine.submit(PROMPTS[1], max_tokens=400, ignore_end=True)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handle.wait(), 0.05)
        return answers, "".join(pieces), handle.result(20).finish_reason

    answers, streamed, reason = asyncio.run(ask())
    assert [answer.text for answer in answers] == [answer.text for answer in engine.generate(PROMPTS, max_tokens=10)]
    assert streamed == answers[0].text and reason == "cancelled"
    with pytest.raises(ArgumentError, match=r"BW201.*prompts"):
        asyncio.run(engine.generate_async([1, 2]))  # type: ignore[list-item]


def test_one_failing_prompt_cancels_the_rest(engine: Engine) -> None:
    with pytest.raises(BitwrightError, match="BW201"):
        engine.generate(["Once upon a time", ""], max_tokens=400)
    _wait(lambda: engine.statistics().running + engine.statistics().waiting == 0)


def test_interrupting_the_wait_leaves_the_engine_usable(engine: Engine) -> None:
    """As Ctrl-C does: the signal comes while the main thread waits."""
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, max_tokens=450, ignore_end=True)
    _wait(lambda: engine.statistics().running == 0)
    assert len(engine.generate(PROMPTS, max_tokens=3)) == 4


def test_closing(tiny: PreTrainedModel) -> None:
    engine = Engine(tiny)
    handle = engine.submit([1, 2, 3], max_tokens=100)
    first = handle.next()
    engine.close()
    engine.close()
    with pytest.raises(BitwrightError, match=r"BW209.*closed"):
        handle.result(10)
    assert handle.status is Status.FAILED and first is not None
    with pytest.raises(BitwrightError, match="BW209"):
        engine.submit([1])


def test_an_engine_that_nobody_holds_ends(tiny: PreTrainedModel) -> None:
    before = threading.active_count()
    handle = Engine(tiny).submit([1, 2, 3], max_tokens=60)
    assert len(handle.result(20).tokens) == 60  # a request holds its engine
    del handle
    gc.collect()
    _wait(lambda: threading.active_count() <= before)


def _wait_in_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """What every step waits for: an engine that failed at once would take no further request."""
    all_wait, run = threading.Event(), engine._loop._runner.run
    monkeypatch.setattr(engine._loop._runner, "run", lambda works: run(works) if all_wait.wait(60) else None)
    return all_wait


def test_a_failing_step_reaches_everybody(tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny)
    monkeypatch.setattr(engine._loop._runner, "run", lambda works: 1 / 0)
    all_wait = _wait_in_steps(engine, monkeypatch)
    handles = [engine.submit([1, 2, 3], max_tokens=100) for _ in range(3)]
    all_wait.set()
    for handle in handles:
        with pytest.raises(BitwrightError, match=r"(?s)BW505.*ZeroDivisionError") as caught:
            handle.result(10)
        assert isinstance(caught.value.__cause__, BitwrightError)
    with pytest.raises(BitwrightError, match="BW505"):
        engine.submit([1])
    with pytest.raises(BitwrightError, match="BW505"):
        list(handles[0])
    engine.close()


def test_nobody_waits_for_an_engine_with_broken_books(tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny)
    all_wait = _wait_in_steps(engine, monkeypatch)
    monkeypatch.setattr(engine._loop._allocator, "release", lambda pages: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    handles = [engine.submit([1, 2, 3], max_tokens=5) for _ in range(3)]
    all_wait.set()
    for handle in handles:
        with pytest.raises(BitwrightError, match="BW505"):
            handle.result(10)
    engine.close()


def test_numbers_that_are_not_finite_fail_one_request(tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(tiny, cache_tokens=256) as engine:
        expected = engine.generate([[9] * 40], max_tokens=20)[0].tokens
        decoder = engine._loop._runner.decoder
        forward = decoder.forward

        def broken(step: Any, cache: Any) -> Any:
            logits = forward(step, cache)
            if 77 in step.tokens[step.starts[0] : step.starts[1]]:
                for place in (*cache.keys, *cache.values):
                    place[step.pages[0, : -(-int(step.lengths[0]) // 32)].long()] = math.nan
                logits[0] = math.nan
            return logits

        monkeypatch.setattr(decoder, "forward", broken)
        with pytest.raises(BitwrightError, match="BW601"):
            engine.generate([[77] * 70], max_tokens=20)
        answers = engine.generate([[9] * 40, [9] * 41, [7] * 60], max_tokens=20)
        assert answers[0].tokens == expected and engine.statistics().failed == 1
        engine._loop._allocator.check()


def test_what_a_failed_request_computed_is_found_by_nobody(tiny: PreTrainedModel, monkeypatch: Any) -> None:
    """Its pages are cleared, those that were full and sound before it failed as well."""
    with Engine(tiny, cache_tokens=512, step_tokens=32) as engine:
        expected = Engine(tiny, reuse=0)
        decoder = engine._loop._runner.decoder
        forward = decoder.forward

        def broken(step: Any, cache: Any) -> Any:
            logits = forward(step, cache)
            return logits * math.nan if 77 in step.tokens else logits

        monkeypatch.setattr(decoder, "forward", broken)
        with pytest.raises(BitwrightError, match="BW601"):
            engine.generate([[9] * 64 + [77]], max_tokens=4)
        found = engine.generate([[9] * 64 + [7]], max_tokens=12)[0]
        assert found.tokens == expected.generate([[9] * 64 + [7]], max_tokens=12)[0].tokens
        assert found.reused_tokens == 0
        expected.close()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_batch": 0}, "max_batch"), ({"cache_tokens": 31}, "cache_tokens"), ({"reuse": 33}, "reuse"),
        ({"cache_tokens": 64, "cache_memory": 1 << 20}, "both"), ({"cache_memory": 100}, "cache_memory"),
        ({"decoder": "x"}, "decoder"),
        ({"reuse_seconds": -1}, "reuse_seconds"), ({"speculate": -1}, "speculate"), ({"kv_cache": "int3"}, "int3"),
        ({"step_tokens": 0}, "step_tokens"), ({"max_length": 0}, "max_length"), ({"kv_cache": "int2"}, "int2"),
        ({"cache_memory": 1 << 60}, "BW503"), ({"cache_tokens": 1 << 60}, "BW503"),
        ({"max_length": 129}, "max_length.*at most 128"), ({"tokenizer": 5}, "tokenizer is a int"),
        ({"invariant": 5}, "invariant"), ({"cache_tokens": 10**5000}, "cache_tokens"),
    ],
)  # fmt: skip
def test_wrong_engines(tiny: PreTrainedModel, fields: dict[str, Any], words: str) -> None:
    before = threading.active_count()
    with pytest.raises(BitwrightError, match=words if words == "BW503" else f"(?s)BW20.*{words}"):
        Engine(tiny, **fields)
    assert threading.active_count() == before


def test_models_that_no_decoder_runs() -> None:
    with pytest.raises(BitwrightError, match=r"(?s)BW201.*'gpt2'.*bitwright\.generate"):
        Engine(build("gpt2"))
    with pytest.raises(BitwrightError, match=r"BW201.*int"):
        Engine(3)  # type: ignore[arg-type]
