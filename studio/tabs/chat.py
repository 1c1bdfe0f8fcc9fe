"""Chat: the same message and seed to two, three or four panes, side by side."""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import gradio as gr

from core import LoRAError, settings
from studio import ballots, chat_page, conversation, data, links, theme
from studio.answers import Answer
from studio.conversation import Conversation, Reply, unstopped
from studio.forms import info
from studio.panes import Pane
from studio.runs import Run
from studio.sampling import ChatSettings
from studio.state import Studio
from studio.tables import list_starters
from studio.tabs import panes, prompt_list, shifts
from studio.tabs.panes import LETTERS, NUM_INPUTS

SHOW_SECONDS = 0.1
"""Time between two pictures of growing answers."""

HIDDEN = "Hidden until you vote."
NOTHING = "No adapter on this model yet. Train one, and here it answers beside its base model, word by word."


@dataclass
class Live:
    """What a page may change while its panes answer.

    Attributes:
        strengths: Of each pane, from the next token on.
        is_stopped: Whether the answers end where they are.
    """

    strengths: list[float] = field(default_factory=lambda: [1.0] * len(LETTERS))
    is_stopped: bool = False


def engine_line(answer: Answer | None, words: str = "", kinds: list[str] | None = None) -> str:
    """Returns HTML of what a pane's engine says of itself; a doubt first."""
    if answer is None:
        return _line(words)
    speed = f"{answer.tokens_per_second:.1f} tokens/s" if answer.tokens_per_second else "…"
    lines = [
        answer.engine,
        f"{speed} · first token {answer.first_token_seconds:.2f} s · {len(answer.token_ids)} tokens",
        f"first logits {answer.fingerprint}",
    ]
    doubt = ""
    if answer.same_as:
        others = " and ".join(f"{LETTERS[i]} ({kinds[i]})" if kinds else LETTERS[i] for i in answer.same_as)
        doubt = theme.said(
            f"Same first logits as {others}, from which it should differ: its ΔW does nothing here, or it does not run "
            "what it says. A comparison of the two shows nothing.",
            "warn",
        )
    return doubt + _line("\n".join(lines))


def examples_for(run: Run | None) -> list[str]:
    """Returns prompts to try with a run: those of its starter set, if it was trained on one."""
    starters = {s.source: s for s in list_starters()}
    found = starters.get(run.spec.data.source) if run else None
    return [str(e) for e in found.examples] if found else []


def build(studio: Studio, run_id: Any, seen: Any) -> None:
    """Draws the tab for the run that `run_id` holds, at the event `seen` anew."""
    past, live, order = gr.State(Conversation()), gr.State(Live()), gr.State([])
    told: dict[str, Any] = {s.name: {"label": s.label, "info": info(s.help, s.why)} for s in settings(ChatSettings)}
    with gr.Row(equal_height=False):
        with gr.Column(scale=7, min_width=320):
            message = gr.Textbox(label="Message", lines=2, max_lines=6, elem_id="message", autofocus=False)
            examples = gr.Dropdown([], label="Examples that the adapter has not seen", value=None, elem_id="examples")
            with gr.Row(elem_classes=["tight"]):
                send = gr.Button("Send to all", variant="primary", size="md", elem_id="send")
                stop = gr.Button("Stop", size="md", elem_id="chat-stop")
                again = gr.Button("Regenerate", size="md", elem_id="regenerate")
                edit = gr.Button("Edit last message", size="md", elem_id="edit-last")
                fresh = gr.Button("New conversation", size="md", elem_id="new-talk")
        with gr.Column(scale=4, min_width=320):
            with gr.Row():
                num = gr.Radio([2, 3, 4], value=3, label="Panes", elem_id="num-panes", min_width=200)
                with gr.Column(min_width=180):
                    blind = gr.Checkbox(label="Blind test: shuffled, without names", elem_id="blind")
                    colour = gr.Checkbox(True, label="Colour where it changed its mind", elem_id="colour")
            with gr.Accordion("Sampling and system prompt", open=False):
                with gr.Row():
                    heat = gr.Slider(0, 2, value=0, step=0.05, **told["temperature"])
                    top_p = gr.Slider(0.05, 1, value=0.95, step=0.05, **told["top_p"])
                with gr.Row():
                    longest = gr.Slider(8, 512, value=96, step=8, **told["max_new_tokens"])
                    seed = gr.Number(value=0, precision=0, **told["seed"])
                system = gr.Textbox(
                    label="System prompt",
                    info="Empty: what the chat template puts there itself. Holds for a new conversation.",
                    lines=2,
                    max_lines=6,
                    elem_id="system",
                )
    notes = gr.HTML(elem_id="chat-notes")
    with gr.Row(visible=False, elem_id="ballot", elem_classes=["tight"]) as ballot:
        buttons = [gr.Button(f"Answer {n} is best", size="md", elem_id=f"vote-{n}") for n in range(1, 5)]
        buttons.append(gr.Button("Tie", size="md", elem_id="vote-tie"))
    with gr.Row(equal_height=False, elem_id="panes"):  # their answers begin at one height
        forms = [panes.draw(place) for place in range(len(LETTERS))]
    gr.HTML(chat_page.legend())
    with gr.Row(elem_classes=["tight"]):
        as_json = gr.Button("Transcript as JSON", size="sm", elem_id="as-json")
        as_text = gr.Button("Transcript as Markdown", size="sm", elem_id="as-markdown")
    with gr.Accordion("Votes of this run's blind tests", open=False):
        tally = gr.HTML(elem_id="tally")
    file = gr.Textbox(visible="hidden", elem_id="chat-file", elem_classes="unseen")
    inputs = [widget for form in forms for widget in form.inputs]
    shifts.build(studio, run_id, num, inputs)
    prompt_list.build(studio, run_id, num, [heat, top_p, longest, seed], inputs, file)
    heads, talks, engines = ([getattr(f, name) for f in forms] for name in ("head", "talk", "engine"))
    picture = [*heads, *talks, *engines]
    cleared = [past, ballot, *picture]
    shown_of = gr.State("")  # the run that all this was filled for

    def offer(run: str | None, before: str | None, *values: Any) -> list[Any]:
        """Offers the runs that there are; for another run than `before`, all begins anew."""
        is_new = run != before
        there = studio.runs.get(run) if run else None
        found = examples_for(there)
        first = found[0] if found else None
        runs = panes.choices(studio, there) if there else []
        ids = [run_id for _, run_id in runs]
        default = run if run in ids else None
        updates: list[Any] = []
        for place in range(len(LETTERS)):
            mine = dict(zip(panes.FIELDS, values[place * NUM_INPUTS + 1 :], strict=False))
            kept = {n: mine[n] if not is_new and mine[n] in ids else default for n in ("adapter", "plus")}
            updates += [gr.Dropdown(choices=runs, value=kept[name]) for name in kept]
            updates.append(gr.skip() if kept["adapter"] == mine["adapter"] else panes.steps(studio, kept["adapter"]))
        message_now = (first or gr.skip()) if is_new else gr.skip()
        shown = gr.Dropdown(choices=found, value=first, visible=bool(found)) if is_new else gr.skip()
        had_any = any(values[1::NUM_INPUTS]) and not is_new
        note = gr.skip() if runs and had_any else "" if runs else theme.said(NOTHING) + links.ways(train="Train one")
        # The base and what was trained, where that can be neither merged nor cut.
        number = 2 if is_new and there and there.spec.method.method != "lora" else gr.skip()
        begun = begin_anew(number, *values) if is_new else [gr.skip()] * len(cleared)
        return [run, note, shown, message_now, _tally(studio, there), number, *updates, *begun]

    def answer(
        run: str, before: Conversation, text: str, now: Live, is_blind: bool, is_coloured: bool, *values: Any
    ) -> Iterator[list[Any]]:
        number, words, warmth, p, length, first_seed, *pane_values = values
        there = _run(studio, run)
        asked, kinds = _parse(number, pane_values)
        if not before.turns:
            before = replace(before, system=words or "")
        tokenizer = studio.tokenizer(there.spec.model)
        prompts = [
            data.prompt_ids(before.messages(there, text, place), tokenizer, there.spec.data.template)
            for place in range(len(asked))
        ]
        settings = ChatSettings(int(length), float(warmth), float(p), int(first_seed or 0))
        places = random.SystemRandom().sample(range(len(asked)), len(asked)) if is_blind else list(range(len(asked)))
        now.strengths, now.is_stopped = [pane.strength for pane in asked], False
        screen = _Screen(before, text, asked, kinds, places, is_blind)
        same: list[Any] = [gr.skip()] * 5
        yield [*same, *screen.draw([], [], "Loading the model …")]
        engine = studio.engine(there)
        warning = unstopped(there, tokenizer, engine.end_token_ids)
        answers: list[Answer] = []
        shown_at = 0.0
        for answers in engine.answer_all(asked, prompts, settings, lambda: now.strengths):
            if now.is_stopped:
                break
            if time.monotonic() - shown_at > SHOW_SECONDS:
                shown_at = time.monotonic()
                texts = [chat_page.said(tokenizer.decode(a.token_ids)) for a in answers]
                yield [*same, *screen.draw(texts, answers)]
        replies = tuple(
            Reply(
                replace(pane, strength=now.strengths[place]) if pane.adapter and not pane.merged else pane,
                str(tokenizer.decode(one.token_ids)),
                tuple(prompts[place]),
                one.token_ids,
                one.engine,
                one.fingerprint,
                one.first_token_seconds,
                one.tokens_per_second,
            )
            for place, (pane, one) in enumerate(zip(asked, answers, strict=True))
        )
        texts = [chat_page.said(reply.text) for reply in replies]
        after = [
            before.with_turn(text, replies),
            places if is_blind else [],
            gr.Row(visible=is_blind),
            "",
            theme.said(warning, "warn") if warning else "",
        ]
        yield [*after, *screen.draw(texts, answers)]
        if is_coloured and not is_blind:
            for place, reply in enumerate(replies):
                if reply.pane.adapter and reply.token_ids:
                    texts[place] = shifts.of_reply(engine, reply, tokenizer)
                    yield [*after, *screen.draw(texts, answers)]

    def vote(place: int | None) -> Any:
        def cast(run: str, now: Conversation, places: list[int]) -> list[Any]:
            there, turn = _run(studio, run), now.turns[-1]
            best = None if place is None else places[place]
            ballots.cast(there.folder, turn.asked, [r.pane for r in turn.replies], [r.text for r in turn.replies], best)
            heads = []
            for n, i in enumerate(places, start=1):
                pane, note = turn.replies[i].pane, "voted best" if i == best else ""
                kind = "" if pane.adapter else "base"
                heads.append(chat_page.head(f"Answer {n}", f"{LETTERS[i]}: {pane.title(run)}", note, kind))
            lines = [_line(f"{turn.replies[i].engine}\nfirst logits {turn.replies[i].fingerprint}") for i in places]
            rest: list[Any] = [gr.skip()] * (len(LETTERS) - len(places))
            return [[], gr.Row(visible=False), _tally(studio, there), *heads, *rest, *lines, *rest]

        return studio.guard(cast)

    def redrawn(now: Conversation, *values: Any) -> list[Any]:
        number, *pane_values = values
        kinds = [str(pane_values[place * NUM_INPUTS]) for place in range(len(LETTERS))]
        return [
            *(chat_page.head(LETTERS[i], k, kind="" if panes.KINDS[k] else "base") for i, k in enumerate(kinds)),
            *(chat_page.talk(now.turns, place) for place in range(len(LETTERS))),
            *([_line("")] * len(LETTERS)),
        ]

    def take_back(now: Conversation, *values: Any) -> list[Any]:
        before = now.without_last()
        return [before, now.turns[-1].asked, gr.Row(visible=False), *redrawn(before, *values)]

    def ask_again(now: Conversation, number: Any) -> list[Any]:
        return [now.without_last(), now.turns[-1].asked, int(number or 0) + 1]

    def begin_anew(*values: Any) -> list[Any]:
        return [Conversation(), gr.Row(visible=False), *redrawn(Conversation(), *values)]

    def count(number: Any, is_blind: bool) -> list[Any]:
        columns = [gr.Column(visible=place < int(number)) for place in range(len(LETTERS))]
        groups = [gr.Group(visible=not is_blind)] * len(LETTERS)
        return [*columns, *groups, *(gr.Button(visible=n < int(number)) for n in range(len(LETTERS)))]

    def transcript(kind: str) -> Any:
        def write(run: str, now: Conversation) -> str:
            there = _run(studio, run)
            if not now.turns:
                raise LoRAError("There is nothing to save yet; send a message first.")
            as_json = kind == "json"
            text = json.dumps(now.record(there), indent=2, ensure_ascii=False) if as_json else now.markdown(there)
            conversation.keep(there, text, kind)
            mime = "application/json" if as_json else "text/markdown"
            return chat_page.file(f"{there.id}-transcript.{kind}", mime, text)

        return studio.guard(write)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    adapters = [form.fields[name] for form in forms for name in ("adapter", "plus", "step")]
    drawn = [shown_of, notes, examples, message, tally, num, *adapters, *cleared]
    last: dict[str, Any] = {"trigger_mode": "always_last", "concurrency_limit": None}
    gr.on(seen, studio.guard(offer), [run_id, shown_of, *inputs], drawn, **last, **quiet)
    examples.input(lambda e: e, examples, message, queue=False, **quiet)
    gr.on(
        [num.change, blind.change],
        studio.guard(count),
        [num, blind],
        [f.column for f in forms] + [f.settings for f in forms] + buttons[:-1],
        queue=False,
        **quiet,
    )
    for place, form in enumerate(forms):
        form.kind.input(
            lambda kind, p=place: panes.shown(kind, p),
            form.kind,
            [form.head, *form.fields.values()],
            queue=False,
            **quiet,
        )
        form.fields["adapter"].input(
            studio.guard(lambda run: panes.steps(studio, run)),
            form.fields["adapter"],
            form.fields["step"],
            queue=False,
            **quiet,
        )
        form.fields["strength"].input(
            lambda now, value, p=place: _move(now, p, value),
            [live, form.fields["strength"]],
            None,
            queue=False,
            trigger_mode="always_last",
            **quiet,
        )
    asked = [run_id, past, message, live, blind, colour, num, system, heat, top_p, longest, seed, *inputs]
    outputs = [past, order, ballot, message, notes, *picture]
    ask = studio.guard(answer)
    going: dict[str, Any] = {"concurrency_limit": 1, **quiet}
    gr.on([send.click, message.submit], ask, asked, outputs, **going)
    anew = again.click(studio.guard(ask_again), [past, seed], [past, message, seed], queue=False, **quiet)
    anew.success(ask, asked, outputs, **going)
    stop.click(studio.guard(_halt), live, None, queue=False, **quiet)
    edit.click(studio.guard(take_back), [past, num, *inputs], [past, message, ballot, *picture], queue=False, **quiet)
    fresh.click(studio.guard(begin_anew), [num, *inputs], cleared, queue=False, **quiet)
    for place, button in enumerate(buttons):
        button.click(
            vote(place if place < len(LETTERS) else None),
            [run_id, past, order],
            [order, ballot, tally, *heads, *engines],
            queue=False,
            **quiet,
        )
    for kind, button in (("json", as_json), ("md", as_text)):
        saved = button.click(transcript(kind), [run_id, past], file, queue=False, **quiet)
        saved.success(None, file, None, js=chat_page.DOWNLOAD, api_visibility="private")


@dataclass(frozen=True)
class _Screen:
    """What stands where while one message is answered: column → pane by `places`."""

    before: Conversation
    text: str
    asked: list[Pane]
    kinds: list[str]
    places: list[int]
    is_blind: bool

    def draw(self, texts: list[str], answers: list[Answer], words: str = "") -> list[Any]:
        heads: list[Any] = []
        talks: list[Any] = []
        lines: list[Any] = []
        for column, place in enumerate(self.places):
            text = texts[place] if texts else ""
            if self.is_blind:  # what came before would tell which is which
                heads.append(chat_page.head(f"Answer {column + 1}", "?", HIDDEN, "hidden"))
                talks.append(chat_page.talk((), place, self.text, text))
                lines.append(_line(words or HIDDEN))
                continue
            kind = self.kinds[place]
            title, note = panes.title(self.asked[place], kind)
            heads.append(chat_page.head(LETTERS[place], title, note, "" if panes.KINDS[kind] else "base"))
            talks.append(chat_page.talk(self.before.turns, place, self.text, text))
            lines.append(engine_line(answers[place] if answers else None, words, self.kinds))
        rest: list[Any] = [gr.skip()] * (len(LETTERS) - len(self.places))
        return [*heads, *rest, *talks, *rest, *lines, *rest]


def _run(studio: Studio, run: str | None) -> Run:
    if not run:
        raise LoRAError("`run` (=nothing) must be one with an adapter; train one first, or open one in Runs.")
    return studio.runs.get(run)


def _parse(number: Any, values: list[Any]) -> tuple[list[Pane], list[str]]:
    """Returns the panes that are asked, and what kind each is."""
    parts = [values[place * NUM_INPUTS : (place + 1) * NUM_INPUTS] for place in range(int(number))]
    return [panes.parse(part) for part in parts], [str(part[0]) for part in parts]


def _move(now: Live, place: int, value: Any) -> None:
    if place < len(now.strengths):
        now.strengths[place] = min(max(float(value), -1.0), 2.0)


def _halt(now: Live) -> None:
    now.is_stopped = True  # the answers end after the token at hand, and are kept


def _tally(studio: Studio, run: Run | None) -> str:
    if run is None:
        return ""
    found, num_bad = ballots.votes(run.folder)
    return chat_page.tally(ballots.tally(found), lambda pane: pane.title(run.id), num_bad)


def _line(words: str) -> str:
    return f'<div class="engine-line">{escape(words)}</div>'
