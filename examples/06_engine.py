"""Many requests at once: answers, a stream, a request that is called off, and what the engine did."""

from __future__ import annotations

import bitwright

with bitwright.Engine("demo:", kv_cache="int8") as engine:
    for answer in engine.generate(["Once upon a time", "The sea is", "Tom had a red ball."], max_tokens=12):
        print(f"{answer.text!r} ({answer.finish_reason}, {len(answer.tokens)} tokens)")

    for piece in engine.stream("What is 3 plus 4?", chat=True, max_tokens=16, temperature=0.7, seed=1):
        print(piece, end="", flush=True)
    print()

    request = engine.submit("Once upon a time", max_tokens=400)
    request.next()  # wait for the first tokens
    request.cancel()
    print(request.result().finish_reason)

    statistics = engine.statistics()
    print(f"{statistics.generated_tokens} tokens in {statistics.steps} steps by the {statistics.decoder} decoder")
