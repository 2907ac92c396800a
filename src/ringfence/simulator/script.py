"""Scripts and scenarios: what the simulated model says. PURE.

A script is a list of steps, one an assistant turn. Which step is next follows from the
conversation alone (how many assistant turns there are since the prompt), so the server keeps no
state across resumes, retries and parallel sessions; only how often a fault was given is counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from ringfence.errors import CallerError

_T = TypeVar("_T")
_FENCE = re.compile(r"```ringfence-script[ \t]*\n(.*?)\n[ \t]*```", re.DOTALL)
_HEADER = re.compile(r"[A-Za-z0-9-]{1,64}: ?[\x20-\x7e]*\Z")
_REMINDER = re.compile(r"<system-reminder>.*?</system-reminder>", re.DOTALL)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ToolCall(_Strict):
    """One tool_use block."""

    tool: str = Field(description="Name of the tool.")
    input: dict[str, Any] = Field(default_factory=dict, description="Its input.")


class Step(_Strict):
    """One assistant turn; `error` is answered before it, or before the turn that follows."""

    text: str | None = Field(default=None, description="A text block.")
    thinking: str | None = Field(default=None, description="A thinking block, before the text.")
    tool: str | None = Field(default=None, description="A tool call, after the text.")
    input: dict[str, Any] = Field(default_factory=dict, description="The input of `tool`.")
    tools: list[ToolCall] = Field(default_factory=list, description="Parallel tool calls.")
    delay: float = Field(default=0, ge=0, le=3600, description="Seconds before the first byte.")
    event_delay: float = Field(
        default=0, ge=0, le=60, description="Seconds before every event of a stream."
    )
    pings: int = Field(default=0, ge=0, le=1000, description="Ping events before the content.")
    error: int | None = Field(
        default=None, ge=400, le=599, description="HTTP status instead of an answer: 429, 529, …"
    )
    error_type: str | None = Field(
        default=None, description="Type in the error's body; by default the status's own."
    )
    retry_after: float | None = Field(
        default=None, ge=0, description="Seconds, in the retry-after header of an `error`."
    )
    drop_after: int | None = Field(
        default=None, ge=0, description="Break the connection off after so many events."
    )
    error_event: str | None = Field(
        default=None, description="Error type, sent as an event where the stream would end."
    )
    times: int | None = Field(
        default=None,
        ge=1,
        description="How often a session gets the fault for the same request; once for `error`, "
        "always for `drop_after` and `error_event`.",
    )
    headers: dict[str, str] = Field(
        default_factory=dict, description="Headers of the answer, over the usual ones."
    )
    stop_reason: str | None = Field(
        default=None, description="By default tool_use with a tool call, else end_turn."
    )
    input_tokens: int | None = Field(default=None, ge=0, description="Usage to report.")
    output_tokens: int | None = Field(default=None, ge=0, description="Usage to report.")
    cache_creation_input_tokens: int = Field(default=0, ge=0, description="Usage to report.")
    cache_read_input_tokens: int = Field(default=0, ge=0, description="Usage to report.")
    result_contains: str | None = Field(
        default=None,
        description="A branch: goes on with `then` when a tool result of the turn before holds "
        "this text, with `otherwise` when none does.",
    )
    then: list[Step] = Field(default_factory=list, description="Steps of a branch.")
    otherwise: list[Step] = Field(default_factory=list, description="Steps of a branch.")

    @field_validator("headers")
    @classmethod
    def _headers(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not _HEADER.match(f"{name}: {text}"):
                raise ValueError(f"{name!r} is no header that can be sent")
        return {name.lower(): text for name, text in value.items()}

    @model_validator(mode="after")
    def _says_something(self) -> Step:
        if self.input and self.tool is None:
            raise ValueError("`input` belongs to a `tool`")
        if (self.then or self.otherwise) and self.result_contains is None:
            raise ValueError("`then` and `otherwise` belong to `result_contains`")
        if not self.answers and self.error is None and self.result_contains is None:
            raise ValueError("a step has text, thinking, a tool, a fault or a branch")
        return self

    @property
    def answers(self) -> bool:
        """Whether it is a turn, and not only an `error` before one."""
        said = (self.text, self.thinking, self.tool, self.drop_after, self.error_event)
        return bool(self.tools) or any(value is not None for value in said)

    @property
    def calls(self) -> list[ToolCall]:
        """All tool calls of the turn."""
        own = [ToolCall(tool=self.tool, input=self.input)] if self.tool else []
        return own + self.tools

    def without_faults(self) -> Step:
        """The same turn, played to its end."""
        return self.model_copy(update={"drop_after": None, "error_event": None})


class Scene(_Strict):
    """Steps for prompts that match a regular expression."""

    match: str = Field(default="", description="Python regular expression, searched in a prompt.")
    steps: list[Step] = Field(description="What is played.")

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value


class Limits(_Strict):
    """Limits that the simulated provider enforces; what is over gets a 429 with retry-after."""

    requests: int | None = Field(default=None, ge=1, description="In a window.")
    input_tokens: int | None = Field(default=None, ge=1, description="In a window.")
    output_tokens: int | None = Field(default=None, ge=1, description="In a window.")
    window_seconds: float = Field(
        default=60, gt=0, le=3600, description="Shorter than the API's, for a test that ends."
    )


class Scenario(_Strict):
    """What a simulator plays: the first scene that matches the prompt, else `default`."""

    scenes: list[Scene] = Field(default_factory=list, description="Tried in order.")
    default: list[Step] = Field(
        default_factory=lambda: [Step(text="OK.")], description="For all other prompts."
    )
    limits: Limits | None = Field(default=None, description="None: as much as anybody asks for.")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What is due now: every fault as often as it says, then the step."""

    faults: tuple[Step, ...] = ()
    step: Step


def parse_scenario(text: str, name: str = "scenario") -> Scenario:
    """A scenario file. Raises CallerError `scenario-invalid`, with `name` and the line."""
    return _parse(TypeAdapter(Scenario), text, name)


def parse_steps(text: str, name: str = "script") -> list[Step]:
    """A script inside a prompt. Raises CallerError `scenario-invalid`, with the line."""
    return _parse(TypeAdapter(list[Step]), text, name)


def _parse(shape: TypeAdapter[_T], text: str, name: str) -> _T:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_twice(root, name)
        value = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise CallerError("scenario-invalid", f"{name}:{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise CallerError("scenario-invalid", f"{name}: not YAML: {words}") from None
    try:
        return shape.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        line = _line(root, first["loc"])
        raise CallerError(
            "scenario-invalid",
            f"{name}:{line}: {where}{': ' if where else ''}{_words(first)}",
            hint="docs/reference/scenario.md lists the keys; `ringfence simulator schema` prints "
            "them as JSON Schema",
        ) from None


def _words(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return "no such key"
    return str(problem["msg"]).removeprefix("Value error, ")


def _refuse_twice(node: yaml.Node | None, name: str) -> None:
    """YAML takes the last of two equal keys; whoever wrote the first would wonder."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise CallerError(
                    "scenario-invalid", f"{name}:{line}: {key.value!r} stands there twice"
                )
            seen.add(key.value)
            _refuse_twice(value, name)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twice(item, name)


def _line(node: yaml.Node | None, place: Sequence[int | str]) -> int:
    """The line (from 1) of the deepest part of a place that the document has."""
    line = node.start_mark.line if node is not None else 0
    for part in place:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == part), None)
            if found is None:
                break
            line, node = found[0].start_mark.line, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line
        else:
            break
    return line + 1


def next_turn(scenario: Scenario, messages: Sequence[dict[str, Any]]) -> Turn:
    """What a conversation asks for now. Raises CallerError for a malformed script in it."""
    prompt, since = last_prompt(messages)
    turns = _tool_results(since)
    faults: list[Step] = []
    answered = 0
    for step in _flatten(_steps(scenario, prompt), turns):
        if step.error is not None:
            faults.append(step)
        if not step.answers:
            continue
        if answered == len(turns):
            return Turn(faults=tuple(faults), step=step)
        # a fault is given before the turn that follows it, and at no other
        faults.clear()
        answered += 1
    text = "Done." if answered else "OK."
    return Turn(faults=tuple(faults) if answered == len(turns) else (), step=Step(text=text))


def _flatten(steps: Sequence[Step], turns: Sequence[str], at: int = 0) -> list[Step]:
    """Branches taken, decided on what the tools of the turn before them said."""
    flat: list[Step] = []
    for step in steps:
        if step.result_contains is None:
            flat.append(step)
            continue
        turn = at + sum(inner.answers for inner in flat)
        said = turns[turn - 1] if 0 < turn <= len(turns) else ""
        branch = step.then if step.result_contains in said else step.otherwise
        flat += _flatten(branch, turns, turn)
    return flat


def _tool_results(since: Sequence[dict[str, Any]]) -> list[str]:
    """For every assistant turn, all that its tools answered; they answer in any order."""
    turns: list[str] = []
    for message in since:
        if message.get("role") == "assistant":
            turns.append("")
        elif turns:
            turns[-1] += "".join(f"{text}\n" for text in results(message))
    return turns


def _steps(scenario: Scenario, prompt: str) -> list[Step]:
    script = _FENCE.search(prompt)
    if script is not None:
        return parse_steps(script[1])
    for scene in scenario.scenes:
        if re.search(scene.match, prompt):
            return scene.steps
    return scenario.default


def last_prompt(messages: Sequence[dict[str, Any]]) -> tuple[str, Sequence[dict[str, Any]]]:
    """The last words of a person, and the messages after them.

    Without the reminders that claude puts before and after them, so that `^` in a scene's
    expression is where the person began.
    """
    for index in range(len(messages) - 1, -1, -1):
        message = messages[index]
        if message.get("role") != "user":
            continue
        text = _REMINDER.sub("", "\n".join(texts(message))).strip()
        if text and not list(results(message)):
            return text, messages[index + 1 :]
    return "", messages


def texts(message: dict[str, Any]) -> Iterator[str]:
    """Text blocks, or the text that a message is."""
    content = message.get("content")
    if isinstance(content, str):
        yield content
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict) and block.get("type") == "text":
            yield str(block.get("text", ""))


def results(message: dict[str, Any]) -> Iterator[str]:
    """What tools answered."""
    content = message.get("content")
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict) and block.get("type") == "tool_result":
            inner = block.get("content")
            if isinstance(inner, str):
                yield inner
            else:
                yield "\n".join(texts({"content": inner}))


def outline(body: dict[str, Any]) -> list[Any]:
    """What two runs of one script have in common, whatever their clocks and tools say.

    Model, whether it streams, the person's words and the assistant's turns; not the system's
    words, reminders, ids, budgets, and what tools answered (dates, sizes, temporary names).
    """
    shape: list[Any] = [body.get("model"), body.get("stream") is True]
    for message in body.get("messages") or ():
        if not isinstance(message, dict) or message.get("role") not in {"user", "assistant"}:
            continue
        said = [_REMINDER.sub("", text).strip() for text in texts(message)]
        content = message.get("content")
        blocks = [b for b in content if isinstance(b, dict)] if isinstance(content, list) else []
        calls = [[b.get("name"), b.get("input")] for b in blocks if b.get("type") == "tool_use"]
        answered = sum(b.get("type") == "tool_result" for b in blocks)
        shape.append([message["role"], [text for text in said if text], calls, answered])
    return shape
