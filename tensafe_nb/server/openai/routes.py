"""The routes that OpenAI's clients ask: models, completions and chats, whole or streamed as server-sent events.

Nothing else is behind them than `sample`: the same queue, tokens, limits and tenants.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi import Path as InPath
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from tensafe_nb.data.labels import encode_prompt
from tensafe_nb.errors import TGTinkerError, ValidationError
from tensafe_nb.futures import FutureHandle
from tensafe_nb.protocol.operations import Sample
from tensafe_nb.protocol.results import Prompt, SampledPiece, SampleResult
from tensafe_nb.rlvr.tools.formats import format_of
from tensafe_nb.server.answers import OPENAI, OPENAI_ERRORS, Json, error_of, form_of
from tensafe_nb.server.clients import ended
from tensafe_nb.server.openai.forms import AnswerWriter, ChatAnswer, ChatWriter, TextAnswer, TextWriter
from tensafe_nb.server.openai.names import ModelEntry, ModelList, NamedModel, listed, named
from tensafe_nb.server.openai.requests import COMPLETION_TOKENS, ChatRequest, CompletionRequest
from tensafe_nb.server.openai.tokens import TokenTexts
from tensafe_nb.server.operations import tenant_of
from tensafe_nb.server.service import Service

MOST_BYTES = 8 << 20  # of a request
ANSWER_TOKENS = (
    2_048  # at most of an answer whose request names no number, and no more than the model still reads
)
LOOK_UP = 1.0  # s after which it is seen that whoever asked has left, or the server is about to
HEARTBEAT = 10.0  # s between signs of life of a stream whose turn has not come


def openai_routes(service: Service) -> APIRouter:
    """Offer them."""
    routes = APIRouter(prefix=OPENAI, responses=OPENAI_ERRORS)
    streamed = {"text/event-stream": {"schema": {"type": "string"}}}

    @routes.get("/models", response_model=ModelList)
    async def models(request: Request) -> Json:
        """List training clients, which are their latest weights, and checkpoints that have a name."""
        return Json({"object": "list", "data": await listed(tenant_of(service, request))})

    @routes.get("/models/{model:path}", response_model=ModelEntry)
    async def model(request: Request, model: Annotated[str, InPath(max_length=512)]) -> Json:
        """Return one of them."""
        return Json((await named(service, tenant_of(service, request), model)).entry)

    @routes.post("/completions", responses={200: {"model": TextAnswer, "content": streamed}})
    async def completions(request: Request, asked: CompletionRequest) -> Any:
        """Go on from texts, as `data: …` lines where `stream` asks for them."""
        return await answer(service, request, asked)

    @routes.post("/chat/completions", responses={200: {"model": ChatAnswer, "content": streamed}})
    async def chat_completions(request: Request, asked: ChatRequest) -> Any:
        """Answer a chat, as `data: …` lines where `stream` asks for them."""
        return await answer(service, request, asked)

    return routes


async def answer(service: Service, request: Request, asked: ChatRequest | CompletionRequest) -> Any:
    """Answer a request: check it, queue it as a `sample`, and say what came of it.

    Raises:
        ValidationError: What does not fit.
        QueueFullError: Too many operations of this tenant wait.
    """
    tenant = tenant_of(service, request)
    service.refuse_if_draining()
    tenant.check_queue()
    if len(await request.body()) > MOST_BYTES:
        raise TGTinkerError(f"A request to {OPENAI} has at most {MOST_BYTES:,} bytes.", code="too_large")
    model = await named(service, tenant, asked.model)
    tokenizer = await model.tokenizer()
    prompts, ids = await tenant.aside(read, asked, tokenizer)
    wanted = tokens_wanted(asked, ids, model.context)
    # its own seed, so that whoever asks changes nothing of what a training client draws
    seed = secrets.randbits(48) if asked.seed is None else asked.seed
    sampling = asked.sampling(wanted, seed, **asked.likeliest())
    sample = Sample(prompts, sampling, bool(asked.stream))
    service.check_operation(tenant, sample)
    writer = writer_for(asked, tokenizer, ids)
    handle = await model.submit(sample)
    headers = {"x-not-used": ", ".join(asked.unused)} if asked.unused else {}
    if asked.stream:
        told = events(request, handle, model, writer, asked, ids)
        headers |= {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(told, media_type="text/event-stream", headers=headers)
    result = await outcome(request, handle, model)
    return Json(writer.whole(result, usage(ids, result, asked), model.fingerprint(result)), headers=headers)


def read(
    asked: ChatRequest | CompletionRequest, tokenizer: Any
) -> tuple[tuple[Prompt, ...], list[list[int]]]:
    """Return the prompts of a request, and the tokens of each: in the time of whoever asks, before anything waits."""
    prompts = asked.prompts()
    return prompts, [encode_prompt(tokenizer, prompt) for prompt in prompts]


def tokens_wanted(
    asked: ChatRequest | CompletionRequest, prompts: Sequence[Sequence[int]], context: int | None
) -> int:
    """Return how many tokens to draw at most.

    Raises:
        ValidationError: Prompt and answer do not fit what the model reads.
    """
    longest = max(map(len, prompts))
    room = ANSWER_TOKENS if context is None else context - longest
    if isinstance(asked, ChatRequest):
        given = asked.max_completion_tokens or asked.max_tokens
        wanted = given or max(1, min(ANSWER_TOKENS, room))
    else:
        given = asked.max_tokens
        wanted = COMPLETION_TOKENS if given is None else given
    if context is not None and longest + max(1, wanted) > context:
        raise ValidationError(
            f"This model's maximum context length is {context} tokens; the prompt has {longest}, and {wanted} more are "
            f"asked for. Shorten the prompt, or ask for fewer.",
            code="context_length_exceeded",
            details={
                "param": "max_tokens" if given else "messages" if isinstance(asked, ChatRequest) else "prompt"
            },
        )
    return wanted


def writer_for(
    asked: ChatRequest | CompletionRequest, tokenizer: Any, prompts: Sequence[Sequence[int]]
) -> AnswerWriter:
    """Return what writes the answer."""
    if isinstance(asked, CompletionRequest):
        return TextWriter(asked, TokenTexts(tokenizer), prompts)
    tools = format_of(tokenizer.chat_template)[0] if asked.may_call_tools else None
    return ChatWriter(asked, TokenTexts(tokenizer), tools)


def usage(
    prompts: Sequence[Sequence[int]], result: SampleResult, asked: ChatRequest | CompletionRequest
) -> dict[str, int]:
    """Return how many tokens were read and drawn."""
    read = sum(map(len, prompts))
    drawn = 0 if asked.max_tokens == 0 else sum(len(sequence.tokens) for sequence in result.sequences)
    return {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}


async def outcome(request: Request, handle: FutureHandle[SampleResult], model: NamedModel) -> SampleResult:
    """Wait for a result; whoever leaves meanwhile ends the sampling.

    Raises:
        TGTinkerError: What it failed with.
    """
    leaving = asyncio.ensure_future(left(request))
    try:
        while not await ended(handle, LOOK_UP):
            model.refuse_if_over()
            if leaving.done():
                raise ClientDisconnect
        return handle.result()
    finally:
        leaving.cancel()
        cancel(handle)


async def left(request: Request) -> None:
    """Return when whoever asked has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def cancel(handle: FutureHandle[SampleResult]) -> None:
    """End a sampling that nobody waits for any more; does not wait until it has."""
    if not handle.done():
        asyncio.get_running_loop().run_in_executor(None, handle.cancel)


async def events(
    request: Request,
    handle: FutureHandle[SampleResult],
    model: NamedModel,
    writer: AnswerWriter,
    asked: ChatRequest | CompletionRequest,
    prompts: Sequence[Sequence[int]],
) -> AsyncIterator[str]:
    """Tell an answer piece by piece, as server-sent events; whoever leaves ends the sampling."""
    with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    more: dict[str, Any] = {"usage": None} if with_usage else {}
    try:
        for number in range(len(prompts) * asked.samples):
            if (choice := writer.begun(number)) is not None:
                yield message(writer.part(choice, **more))
        async for piece in pieces(handle, model):
            if piece is None:
                yield ": here\n\n"
            elif (choice := writer.told(piece)) is not None:
                yield message(writer.part(choice, **more))
        if with_usage:
            result = handle.result()
            used = usage(prompts, result, asked)
            yield message(writer.part(usage=used, system_fingerprint=model.fingerprint(result)))
        yield "data: [DONE]\n\n"
    except TGTinkerError as error:
        error.request_id = error.request_id or request.state.request_id
        yield message(form_of(f"{OPENAI}/", 500, error_of(error))[1])
    finally:
        cancel(handle)


async def pieces(handle: FutureHandle[SampleResult], model: NamedModel) -> AsyncIterator[SampledPiece | None]:
    """Yield the pieces of a sample as they come, and None as a sign of life while none does."""
    coming = aiter(handle.pieces())
    quiet = 0.0
    next_one = asyncio.ensure_future(anext(coming, None))
    try:
        while True:
            await asyncio.wait({next_one}, timeout=LOOK_UP)
            if not next_one.done():
                model.refuse_if_over()
                quiet += LOOK_UP
                if quiet >= HEARTBEAT:
                    quiet = 0.0
                    yield None
                continue
            piece = next_one.result()
            if piece is None:
                return
            quiet, next_one = 0.0, asyncio.ensure_future(anext(coming, None))
            yield piece
    finally:
        next_one.cancel()


def message(content: dict[str, Any] | BaseModel) -> str:
    """Write a server-sent event."""
    return f"data: {json.dumps(content, allow_nan=False, separators=(',', ':'))}\n\n"
