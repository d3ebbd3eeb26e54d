"""The object model: statuses, limits and queues, by the numbers of the acceptance cases."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bitwright.compat.dashinfer import allspark, modelscope
from bitwright.compat.dashinfer.allspark import AsCacheMode, AsStatus, GenerateRequestStatus, TargetDevice
from bitwright.core.errors import ArgumentError, BitwrightError, Notice
from bitwright.core.kv_scheme import parse_kv
from bitwright.models.decoder_torch import TorchDecoder
from bitwright.models.generation import Sampling, generate_tokens
from bitwright.models.loading import load
from bitwright.models.paged_cache import CacheShape, PagedCache
from tests.models.decoder_laws import Piece, random_text, run

OK, PARAM, LIMIT = AsStatus.ALLSPARK_SUCCESS, AsStatus.ALLSPARK_PARAM_ERROR, AsStatus.ALLSPARK_EXCEED_LIMIT_ERROR
INVALID = AsStatus.ALLSPARK_INVALID_CALL_ERROR
PROMPT = "Once upon a time"
GREEDY = {"top_k": 1, "max_length": 24, "early_stopping": False}


class Started:
    """An engine with the embedded model, started, in float32."""

    def __init__(self, **serialize: Any) -> None:
        self.loader = allspark.HuggingFaceModel("demo:", "demo", "float32", in_memory_serialize=True)
        self.engine = allspark.Engine()
        self.loader.load_model().serialize(self.engine, **serialize).free_model()
        builder = self.loader.create_reference_runtime_config_builder("demo", TargetDevice.CPU, [0], max_batch=4)
        self.config = builder.max_length(384).build()
        assert self.engine.install_model(self.config) == OK
        self.loader.free_memory_serialize_file()
        assert self.engine.start_model("demo") == OK

    def ask(self, prompt: str | list[int] = PROMPT, **fields: Any) -> Any:
        start = self.engine.start_request_text if isinstance(prompt, str) else self.engine.start_request_ids
        return start("demo", self.loader, prompt, GREEDY | fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def started() -> Iterator[Started]:
    made = Started()
    yield made
    assert made.engine.release_model("demo") == OK


def refused(call: Any, status: AsStatus, words: str) -> None:
    """The call returns ``status``, and tells why in a notice."""
    with pytest.warns(Notice, match=f"(?s){status.name}.*{words}"):
        answer = call()
    assert (answer[0] if isinstance(answer, tuple) else answer) == status
    assert not isinstance(answer, tuple) or answer[1:] == (None, None)


def read_all(queue: Any) -> tuple[list[int], list[GenerateRequestStatus]]:
    ids: list[int] = []
    statuses = [queue.GenerateStatus()]
    while (elements := queue.Get()) is not None:
        ids += elements.ids_from_generate
        statuses.append(queue.GenerateStatus())
    return ids, [*statuses, queue.GenerateStatus()]


def test_the_life_of_a_request(started: Started) -> None:
    """E32."""
    status, handle, queue = started.ask()
    assert status == OK
    ids, statuses = read_all(queue)
    order = [GenerateRequestStatus(number) for number in range(4)]
    assert statuses == sorted(statuses, key=order.index) and statuses[-1] == order[-1]
    status, other, again = started.ask()
    assert status == OK and started.engine.sync_request("demo", other) == OK
    assert again.GenerateStatus() is GenerateRequestStatus.Generating  # its end is told when all is read
    assert again.Get().ids_from_generate == ids and again.GenerateStatus() is GenerateRequestStatus.GenerateFinished
    began = time.perf_counter()
    assert again.Get() is None and again.GetNoWait() is None and time.perf_counter() - began < 0.1
    model = load("demo:", dtype=torch.float32)
    prompt = started.loader.get_tokenizer().encode(PROMPT)
    expected = generate_tokens(model, prompt, limit=24 - len(prompt), sampling=Sampling())
    assert ids[: len(first := list(expected))] == first
    assert queue.ContextLength() == len(prompt) and queue.GenerateLength() == len(ids) == 24 - len(prompt)
    assert [started.engine.release_request("demo", each) for each in (handle, other)] == [OK, OK]


def test_a_stalled_engine_keeps_nobody_waiting(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    """E32: None after 50 milliseconds."""
    loop = started.engine._models["demo"].engine._loop  # type: ignore[union-attr]
    monkeypatch.setattr(loop, "step", lambda: time.sleep(0.4))
    _, handle, queue = started.ask()
    began = time.perf_counter()
    assert queue.GetWithTimeout(50) is None
    assert 0.05 <= time.perf_counter() - began < 0.2
    assert queue.GenerateStatus() is GenerateRequestStatus.Init
    assert started.engine.release_request("demo", handle) == OK


def test_stopping_and_releasing() -> None:
    """E34."""
    made = Started()
    engine = made.engine
    _, handle, queue = made.ask(max_length=384)
    first = queue.Get().ids_from_generate
    assert first and engine.stop_request("demo", handle) == OK
    ids, statuses = read_all(queue)
    assert statuses[-1] is GenerateRequestStatus.GenerateInterrupted and len(first + ids) < 300
    assert engine.release_request("demo", handle) == OK
    for call in (engine.release_request, engine.stop_request, engine.sync_request):
        refused(lambda call=call: call("demo", handle), PARAM, "no such request")
        refused(lambda call=call: call("other", handle), PARAM, "no model 'other'.*installed: demo")
        refused(lambda call=call: call("demo", "handle"), PARAM, "no such request")
    _, _, queue = made.ask(max_length=384)
    assert queue.Get() is not None and engine.stop_model("demo") == OK
    read_all(queue)
    assert queue.GenerateStatus() is GenerateRequestStatus.GenerateInterrupted
    refused(made.ask, INVALID, "not started")
    refused(lambda: engine.stop_model("demo"), INVALID, "not started")
    assert engine.start_model("demo") == OK
    refused(lambda: engine.start_model("demo"), INVALID, "started already")
    assert made.ask()[0] == OK and engine.release_model("demo") == OK
    for call in (engine.release_model, engine.stop_model, engine.start_model, engine.sync_request):
        refused(lambda call=call: call("demo"), PARAM, "no model 'demo'")
    refused(made.ask, PARAM, "no model 'demo'")


def test_limits(started: Started) -> None:
    """E35."""
    prompt = [5] * 23
    refused(lambda: started.ask(prompt), LIMIT, "prompt has 23 tokens; max_length is 24")
    refused(lambda: started.ask(max_length=385), LIMIT, "max_length is 385.*384")
    refused(lambda: started.ask(""), LIMIT, "empty")
    refused(lambda: started.ask([]), LIMIT, "empty")
    status, _, queue = started.ask(prompt[:22])
    assert status == OK and len(read_all(queue)[0]) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 1.5}, {"top_k": -1}, {"repetition_penalty": 3.0}, {"presence_penalty": 5}, {"frequency_penalty": -3},
        {"temperature": float("nan")}, {"temperature": -1}, {"seed": -1}, {"num_beams": 2}, {"max_length": 0},
        {"stop_words_ids": [[]]}, {"stop_words_ids": 5}, {"do_sample": "yes"}, {"unheard_of": 1}, {"eos_token_id": "a"},
        {"top_logprobs": -1}, {"min_length": 5}, {"response_format": "json"}, {"temperature": 10**400},
        {"top_k": -(10**5000)}, {"stop_words_ids": [[5, 1 << 40]]},
    ],
)  # fmt: skip
def test_wrong_fields(started: Started, fields: dict[str, Any]) -> None:
    """E35."""
    refused(lambda: started.ask(**fields), PARAM, next(iter(fields)))


def test_wrong_fields_of_the_engine_itself(started: Started) -> None:
    refused(lambda: started.ask(logprobs=True, top_logprobs=99), PARAM, "logprobs is 99")
    refused(lambda: started.ask([5000]), PARAM, "token 5000")
    engine, loader = started.engine, started.loader
    refused(lambda: engine.start_request_ids("demo", loader, None, GREEDY), PARAM, "NoneType")  # type: ignore[arg-type]
    refused(lambda: engine.start_request_ids("demo", loader, ["a"], GREEDY), PARAM, "'a'")  # type: ignore[list-item]
    refused(lambda: engine.start_request_text("demo", loader, "\ud800", GREEDY), PARAM, "surrogate")
    refused(lambda: engine.start_request_text("demo", None, "a", GREEDY), PARAM, "NoneType")  # type: ignore[arg-type]
    refused(lambda: started.ask(eos_token_id=9999), PARAM, "stop_ids")
    refused(lambda: started.engine.start_request_ids("demo", started.loader, [5], 3), PARAM, "config is a int")  # type: ignore[arg-type]


def test_choices(started: Started) -> None:
    """E35: temperature 0 is top_k 1. E36: equal seeds give equal tokens."""

    def ids(**fields: Any) -> list[int]:
        status, _, queue = started.ask(**fields)
        assert status == OK
        return read_all(queue)[0]

    greedy = ids()
    assert ids(top_k=0, temperature=0.0) == ids(top_k=0, do_sample=False) == greedy
    assert ids(top_k=0, temperature=1.5, seed=7) == ids(top_k=0, temperature=1.5, seed=7) != greedy
    assert ids(stop_words_ids=[[greedy[4]]]) == greedy[: greedy.index(greedy[4]) + 1]
    assert ids(eos_token_id=greedy[5], early_stopping=True) == greedy[: greedy.index(greedy[5]) + 1]
    words = ids(stop_words_ids=[greedy[6:9]])
    assert words == greedy[: len(words)] and len(words) < 12
    status, _, queue = started.ask(logprobs=True, top_logprobs=2)
    elements = queue.Get()
    assert status == OK and len(elements.token_logprobs_list) == len(elements.ids_from_generate)
    assert elements.log_probs_list[0][0] == (greedy[0], elements.token_logprobs_list[0])
    with pytest.warns(Notice, match="plain text"):
        assert ids(response_format={"type": "json_object"}) == greedy


@pytest.mark.parametrize("mode", list(AsCacheMode))
def test_beginnings_are_reused_in_spans(started: Started, mode: AsCacheMode) -> None:
    """E37: of 300 equal tokens 256 are found in spans of 128; with prefix reuse off, none."""
    loader = allspark.HuggingFaceModel("demo:", "cached", in_memory_serialize=True)
    loader.load_model().serialize(started.engine)
    builder = loader.create_reference_runtime_config_builder("cached", TargetDevice.CPU).kv_cache_mode(mode)
    found = {}
    for name, config in {
        "on": builder.kv_cache_span_size(128).prefill_cache_ttl(60).build(),
        "off": builder.enable_prefix_cache(False).build(),
    }.items():
        assert started.engine.install_model(config) == OK and started.engine.start_model("cached") == OK
        answers = []
        for last in (7, 7, 8):
            prompt = [(3 * n) % 200 + 5 for n in range(300)] + [last]
            _, _, queue = started.engine.start_request_ids("cached", loader, prompt, {"top_k": 1, "max_length": 304})
            elements = queue.Get()
            answers.append((elements.prefix_cache_len, (elements.ids_from_generate + read_all(queue)[0])[:3]))
        found[name] = answers
        assert started.engine.release_model("cached") == OK
    assert [reused for reused, _ in found["on"]] == [0, 256, 256]
    assert [reused for reused, _ in found["off"]] == [0, 0, 0]
    assert [ids for _, ids in found["on"]] == [ids for _, ids in found["off"]] and found["on"][0][1] == found["on"][1][
        1
    ]


@pytest.mark.parametrize(("mode", "bytes_"), [("Default", 262144), ("QuantI8", 139264), ("QuantU4", 73728)])
def test_what_a_span_takes(mode: str, bytes_: int) -> None:
    """E38: the keys, or the values, of 128 tokens, 8 heads of 128, in one layer; as computed, and as allocated."""
    scheme = parse_kv(AsCacheMode[f"AsCache{mode}"].value)
    cache = PagedCache(CacheShape(layers=1, kv_heads=8, head_dim=128, dtype=torch.bfloat16), 4, scheme)
    assert cache.page_bytes(128) == cache.bytes() == 2 * bytes_


def test_prompts_and_answers_run_in_the_same_numbers() -> None:
    """E30: a prompt at once and token by token gives the same logits, bit for bit, in the mode that is told."""
    made = Started(
        enable_quant=True,
        customized_quant_config={
            "quant_method": "instant_quant", "weight_format": "int8", "compute_method": "activate_quant",
        },
    )  # fmt: skip
    assert made.loader.mode == "A8W8"
    model: Any = made.engine._models["demo"].model
    decoder = TorchDecoder(model)
    text = random_text(24, 2048, [0])
    whole = run(decoder, decoder.new_cache(1), [Piece(text, 24)])[0]
    text, cache = random_text(24, 2048, [0]), decoder.new_cache(1)
    single = torch.cat([run(decoder, cache, [Piece(text, 1)])[0] for _ in range(24)])
    assert torch.equal(whole, single)
    assert made.engine.release_model("demo") == OK


def test_wrong_models(tmp_path: Path, started: Started) -> None:
    for name in ("", "a/b", None):
        with pytest.raises(ArgumentError, match="safe_model_name"):
            allspark.HuggingFaceModel("demo:", name)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"(?s)user_set_data_type is 'int8'.*float32"):
        allspark.HuggingFaceModel("demo:", "a", "int8")
    with pytest.raises(BitwrightError, match="BW301"):
        allspark.HuggingFaceModel(tmp_path / "nothing", "a")
    loader = allspark.HuggingFaceModel("demo:", "a", in_memory_serialize=True)
    with pytest.raises(ArgumentError, match=r"load_model\(\) first"):
        loader.serialize(None)
    with pytest.raises(ArgumentError, match="not serialized"):
        _ = loader.mode
    config = loader.create_reference_runtime_config_builder("a", TargetDevice.CPU).build()
    refused(lambda: started.engine.install_model(config), INVALID, "nothing is serialized")
    refused(lambda: started.engine.install_model("a"), PARAM, r"build\(\)")  # type: ignore[arg-type]
    refused(lambda: started.engine.install_model(started.config), INVALID, "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b.max_length(2), "max_length"), (lambda b: b.max_batch(0), "max_batch"),
        (lambda b: b.kv_cache_mode("int8"), "kv_cache_mode"), (lambda b: b.kv_cache_span_size(100), "span_size"),
        (lambda b: b.prefill_cache_ttl(-1), "prefill_cache_ttl"), (lambda b: b.enable_prefix_cache(1), "enable_prefix"),
        (lambda b: b.compute_unit("CPU"), "device"), (lambda b: b.model_name(""), "model_name"),
    ],
)  # fmt: skip
def test_wrong_runtimes(change: Any, words: str) -> None:
    loader = allspark.HuggingFaceModel("demo:", "a")
    with pytest.raises(ArgumentError, match=f"BW201.*{words}"):
        change(loader.create_reference_runtime_config_builder("a", TargetDevice.CPU, [0]))


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    loader, engine = allspark.HuggingFaceModel("demo:", "g", in_memory_serialize=True), allspark.Engine()
    loader.load_model().serialize(engine)
    runtime = loader.create_reference_runtime_config_builder("g", TargetDevice.CUDA, [3]).build()
    assert engine.install_model(runtime) == OK
    refused(lambda: engine.start_model("g"), PARAM, "no CUDA device 3; there are 1")


def test_serialized_to_a_directory(tmp_path: Path) -> None:
    loader = allspark.HuggingFaceModel("demo:", "written", user_set_data_type="float32")
    config = {"quant_method": "instant_quant", "weight_format": "uint4"}
    for skip in (False, True):
        loader.load_model().serialize_to_path(
            None, tmp_path, enable_quant=True, customized_quant_config=config, skip_if_exists=skip
        )
    with pytest.raises(BitwrightError, match="BW203"):
        loader.serialize(None, tmp_path, enable_quant=True, customized_quant_config=config)
    loader.free_memory_serialize_file()
    engine = allspark.Engine()
    runtime = loader.create_reference_runtime_config_builder("w", TargetDevice.CUDA).max_length(600).build()
    assert engine.install_model(runtime) == OK
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert engine.start_model("w") == OK
    told = " ".join(str(warning.message) for warning in caught)
    assert "context of 512" in told and ("no CUDA device" in told or torch.cuda.is_available())
    options = loader.create_reference_generation_config_builder(runtime).update({"max_length": 20, "do_sample": False})
    status, handle, queue = engine.start_request_text("w", loader, PROMPT, options)
    assert status == OK and queue is not None and read_all(queue)[0] and handle is not None
    assert engine.release_model("w") == OK
    with pytest.raises(ArgumentError, match="updated with a set"):
        options.update({"eos_token_id", 151645})  # type: ignore[arg-type]
    assert modelscope.snapshot_download("demo:") == str(loader.directory)
