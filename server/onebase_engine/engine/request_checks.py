"""What the engine itself checks of a request: a value that would fail a step takes its neighbours along.

The api checks the same and more, with the user's own field names; here are the last lines of defence.
"""

from __future__ import annotations

import math

from onebase_engine.engine import messages as protocol
from onebase_engine.engine.row import AdapterMix
from onebase_engine.engine.scheduler import NeverFitsError

MAX_WEIGHT = 1e9
"""Of one adapter in a row's sum; far beyond it fp32, in which weights are applied, has no number."""

MAX_SCORE_BYTES = protocol.MAX_MESSAGE_BYTES * 3 // 4
"""Of one row's prompt logprobs on the socket, which travel in one message."""
SCORED_TOKEN_BYTES = 32
ALTERNATIVE_BYTES = 15
"""The most that a scored token takes in msgpack, and each alternative next to it."""


def check_tokens(request: protocol.Submit, vocabulary: int) -> None:
    """Raise NeverFitsError for a token id that the base does not have; on CUDA it would end the process."""
    sampling = request.sampling
    groups = {
        "prompt": request.prompt,
        "logit_bias": sampling.logit_bias,
        "stop_token_ids": sampling.stop_token_ids,
    }
    for param, tokens in groups.items():
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise NeverFitsError(
                    "token_out_of_range",
                    param,
                    f"{param}: token id {token} is not in the vocabulary (0 to {vocabulary - 1})",
                )


def check_weights(mix: AdapterMix) -> None:
    """Raise NeverFitsError for an adapter weight that fp32 cannot hold."""
    for _, weight in mix.terms:
        if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
            raise NeverFitsError(
                "weight_out_of_range", "adapter", f"adapter weight {weight} is not within ±{MAX_WEIGHT:g}"
            )


def check_scores(request: protocol.Submit) -> None:
    """Raise NeverFitsError for prompt logprobs that no message to the api could hold."""
    top = request.sampling.prompt_logprobs
    if top is None:
        return
    most = MAX_SCORE_BYTES // (SCORED_TOKEN_BYTES + ALTERNATIVE_BYTES * top)
    if len(request.prompt) > most:
        raise NeverFitsError(
            "prompt_logprobs_too_large",
            "logprobs",
            f"echo with logprobs {top} holds at most {most} prompt tokens, this prompt has "
            f"{len(request.prompt)}; lower logprobs or shorten the prompt",
        )
