"""Where a text ends: the tokens that end it, and how many there is room for."""

from __future__ import annotations

from bitwright.core.errors import BitwrightError

__all__ = ["DEFAULT_MAX_TOKENS", "end_tokens", "room"]

DEFAULT_MAX_TOKENS = 128


def end_tokens(model: object) -> set[int]:
    """The tokens that end a text, from the model's generation settings and its configuration.

    Raises:
        BitwrightError: BW307 if what is there is no token.
    """
    found: set[int] = set()
    for settings in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ends = getattr(settings, "eos_token_id", None)
        for end in ends if isinstance(ends, list | tuple) else () if ends is None else (ends,):
            if type(end) is not int:
                what = f"eos_token_id is {end!r}, which is no token"
                raise BitwrightError("BW307", what, suggestion="restore config.json and generation_config.json")
            found.add(end)
    return found


def room(prompt: int, max_tokens: int | None, context: int | None) -> int:
    """How many tokens may be generated after so many of the prompt; ``context`` is ``None`` where it is not known.

    Raises:
        BitwrightError: BW403 if they do not fit the context.
    """
    wanted = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
    if context is None:
        return wanted
    left = context - prompt
    if left < (1 if max_tokens is None else wanted):
        raise BitwrightError(
            "BW403",
            f"the prompt has {prompt} tokens and {wanted} are to be generated; the context holds {context}",
            why="text is never cut off silently",
            suggestion=f"max_tokens of at most {left}" if left > 0 else "shorten the prompt",
        )
    return min(wanted, left)
