"""Run a stack of defences for one of Inspect's samples, on whatever model it asks."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio.to_thread
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    Content,
    ContentImage,
    ContentText,
    GenerateConfig,
    Model,
    ModelOutput,
    get_model,
)
from inspect_ai.solver import TaskState

from safeglasses.data.pictures import Picture
from safeglasses.data.records import Text, Turn
from safeglasses.errors import SafeglassesError
from safeglasses.evals.samples import message_of
from safeglasses.evals.solvers import DRAW
from safeglasses.evals.uris import picture_of
from safeglasses.protect.compose import Kit, compose, read_kit
from safeglasses.protect.running import judged
from safeglasses.protect.stack import Protection
from safeglasses.protect.steps import Ask, Check, Failure, Log, Prompt, Reply, Request, Said, priced

TRACE = "safeglasses:protection"
"""Where a sample's store holds the stack, its events and its cost."""


def stack_for(defence: str, recipe: str | None, judge: str | None, on_failure: str | None) -> Protection:
    """Build a stack that any server can have.

    Raises:
        SafeglassesError: as `read_kit` and `compose`; parts that need a local model.
    """
    kit = Kit() if recipe is None else read_kit(Path(recipe))
    changes: dict[str, Any] = {} if judge is None else {"judge": judge}
    changes |= {} if on_failure is None else {"on_failure": on_failure}
    stack = compose(defence, replace(kit, **changes))
    stack.refuse_local()
    return stack


async def answered(stack: Protection, state: TaskState) -> TaskState:
    """Run a stack for one sample: all that it asks at a time is asked at once."""
    model, log = get_model(), Log()
    steps = priced(stack.steps(_prompt(state), log), log)
    replies: Sequence[Reply] | None = None
    while True:
        try:
            requests = next(steps) if replies is None else steps.send(replies)
        except StopIteration as done:
            text: str = done.value
            break
        replies = await _served(requests, model, f"{state.sample_id}/{state.epoch}")
    state.messages.append(ChatMessageAssistant(content=text, model=str(model), source="generate"))
    state.output = ModelOutput.from_content(str(model), text)
    events = [event.to_json() for event in log.events]
    state.store.set(TRACE, {"defence": stack.name, "events": events, "cost": log.cost.to_json()})
    return state


async def _served(requests: Sequence[Request], model: Model, draw: str) -> list[Reply]:
    found: dict[int, Reply] = {}

    async def one(index: int, request: Request) -> None:
        if isinstance(request, Ask):
            found[index] = await _said(request, model, draw)
        else:
            found[index] = (await anyio.to_thread.run_sync(_judged, request))[0]

    async with anyio.create_task_group() as group:
        for index, request in enumerate(requests):
            group.start_soon(one, index, request)
    return [found[index] for index in range(len(requests))]


def _judged(check: Check) -> list[Reply]:
    return judged([check])


async def _said(one: Ask, model: Model, draw: str) -> Reply:
    messages = [_message(turn) for turn in one.prompt.turns]
    messages[-1].metadata = {DRAW: f"{draw}{one.prompt.draw}"}
    settings = GenerateConfig(temperature=one.prompt.temperature, max_tokens=one.max_new_tokens)
    try:
        output = await model.generate(messages, config=settings)
    except SafeglassesError as error:  # of our own provider; what servers raise is Inspect's to retry and to report
        return Failure(f"{error.what}: {error.given}")
    usage, stop = output.usage, output.stop_reason
    if output.error:
        return Failure(output.error)
    tokens, read = (usage.output_tokens, usage.input_tokens) if usage else (0, 0)
    return Said(output.completion.strip(), tokens, read, output.time or 0.0, cut=stop == "model_length")


def _prompt(state: TaskState) -> Prompt:
    turns = tuple(Turn(m.role, tuple(_part(p) for p in _listed(m))) for m in state.messages)
    language = state.metadata.get("language") if state.metadata else None
    asked = "\n".join(part.text for part in turns[-1].content if isinstance(part, Text))
    return Prompt(f"{state.sample_id}", turns, asked, language)


def _listed(message: ChatMessage) -> list[Content]:
    return [ContentText(text=message.content)] if isinstance(message.content, str) else list(message.content)


def _part(part: Content) -> Text | Picture:
    if isinstance(part, ContentText):
        return Text(part.text)
    if isinstance(part, ContentImage):
        return picture_of(part.image)
    raise SafeglassesError("content that stacks of defences do not take", given=part.type, expected="text and pictures")


def _message(turn: Turn) -> ChatMessage:
    if turn.role == "system":  # some servers take no list here
        return ChatMessageSystem(content="".join(part.text for part in turn.content if isinstance(part, Text)))
    return message_of(turn)
