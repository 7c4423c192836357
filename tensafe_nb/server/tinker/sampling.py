"""A sample of the protocol as an operation of ours, and its result as the protocol tells it."""

from typing import Any

import numpy as np

from tensafe_nb.config import SamplingConfig
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.operations import Sample
from tensafe_nb.protocol.results import SampledSequence, SampleResult, TopLogprobs
from tensafe_nb.server.tinker.messages import MESSAGES
from tensafe_nb.server.tinker.requests import SampleRequest

USUAL_TOKENS = 1_024  # of a completion, where neither the request nor the model's context bounds it


def sample_of(asked: SampleRequest, context: int | None) -> Sample:
    """Return the operation that a request asks for.

    Args:
        asked: The request.
        context: How many tokens the model reads.

    Raises:
        ValidationError: Something in it is not offered, or does not fit.
    """
    for name in ("target_prompt_logprobs", "prompt_alt_tokens_k"):
        if getattr(asked, name):
            raise ValidationError(f"sample(): this server has no {name}; topk_prompt_logprobs it has.")
    if any(chunk.type != "encoded_text" for chunk in asked.prompt.chunks):
        raise ValidationError("A prompt is text here: this server takes neither images nor sound.")
    prompt = [token for chunk in asked.prompt.chunks for token in chunk.tokens]
    if not prompt:
        raise ValidationError("sample(): the prompt is empty.")
    params, stop = asked.sampling_params, asked.sampling_params.stop
    most = params.max_tokens
    if most is None:
        most = USUAL_TOKENS if context is None else max(1, context - len(prompt))
    ends = (stop,) if isinstance(stop, str) else stop or ()
    sampling = SamplingConfig(
        max_new_tokens=most,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(0, params.top_k),
        num_samples=asked.num_samples,
        stop=tuple(end for end in ends if isinstance(end, str)),
        stop_tokens=tuple(end for end in ends if isinstance(end, int)),
        seed=params.seed,
        ignore_end=stop == (),  # an empty list turns off every end
        top_logprobs=asked.topk_sample_logprobs,
        prompt_logprobs=bool(asked.prompt_logprobs),
        top_prompt_logprobs=asked.topk_prompt_logprobs,
    )
    return Sample((prompt,), sampling)


def response_of(result: SampleResult, asked: SampleRequest) -> bytes:
    """Return the SampleResponse of a result; log-probabilities are those at temperature 1, as in training."""
    response = MESSAGES["SampleResponse"](sequences=[told(sequence) for sequence in result.sequences])
    if result.prompt_logprobs:
        own = [float("nan") if value is None else value for value in result.prompt_logprobs[0]]
        last = asked.prompt_logprobs_last_n
        if last is not None:
            own = [value if at >= len(own) - last else float("nan") for at, value in enumerate(own)]
        response.prompt_logprobs = np.array(own, "<f4").tobytes()
    if result.top_prompt_logprobs:
        response.topk_prompt_logprobs.CopyFrom(likeliest(result.top_prompt_logprobs[0]))
    return bytes(response.SerializeToString())


def told(sequence: SampledSequence) -> Any:
    """Return a SampledSequence of ours as one of the protocol's."""
    message = MESSAGES["SampledSequence"](
        stop_reason=0 if sequence.finish_reason in ("stop", "stop_string") else 1,
        tokens=np.array(sequence.tokens, "<i4").tobytes(),
        logprobs=np.array(sequence.raw_logprobs, "<f4").tobytes(),
    )
    if sequence.top_logprobs:
        message.topk_sampled_logprobs.CopyFrom(likeliest(sequence.top_logprobs))
    return message


def likeliest(places: tuple[TopLogprobs, ...]) -> Any:
    """Return the likeliest tokens of each place; where there are none, token 0 with a NaN."""
    k = max(map(len, places))
    tokens, values = np.zeros((len(places), k), "<i4"), np.full((len(places), k), np.nan, "<f4")
    for row, place in enumerate(places):
        for column, (token, logprob) in enumerate(place):
            tokens[row, column], values[row, column] = token, logprob
    return MESSAGES["TopkLogprobs"](
        token_ids=tokens.tobytes(), logprobs=values.tobytes(), k=k, length=len(places)
    )
