"""Chat templates: from messages to token ids, with the places that the methods read.

Everything is found in the rendered text through the tokenizer's offsets, never by counting tokens
of a part encoded alone: a tokenizer may merge across the border of two parts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from taught.data.documents import encode_document
from taught.errors import UserError, refuse

if TYPE_CHECKING:
    from taught.core.example import Example
    from taught.data.examples import Record

# A text that no message holds and no template changes: where it stands in a rendering is where the
# template puts a message.
_MARK = "\ue000taught\ue001"
# Some templates write today's date into the system turn, so that a run repeated tomorrow would read other tokens. This
# is the date that those of Llama 3.1 and later fall back to.
DATE = "2024-07-26"
# Put before a template that asks for the day by ``strftime_now``: it is answered from the day's parts (transformers
# hands templates plain values only, and its own function reads the clock).
_TOLD = (
    "{%- macro strftime_now(format) -%}{%- set told = namespace(text=format) -%}"
    "{%- for code, part in taught_day.items() -%}{%- set told.text = told.text | replace(code, part) -%}{%- endfor -%}"
    "{{- told.text -}}{%- endmacro -%}"
)
_CODES = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAbBcdDeFGhHIjklmMnpPrRsStTuUVwWxXyYzZ"]
# What a tokenizer and its template make of these is part of a run's identity.
_PROBE = ("It's 9 o'clock — naïve, isn't it?\n\n 1+1 =  2\t", "Yes.", "So? 🔒")
# Keys under which a message holds what its author thought before the content.
_THOUGHTS = ("reasoning_content", "thinking")

Message = Mapping[str, Any]


class _CannotRender(UserError):
    """The template raised an error."""


@dataclass(frozen=True)
class EncodedPrompt:
    """An evaluation prompt as tokens, ready for the first token of an answer.

    Attributes
    ----------
    id : the prompt's id
    input_ids : the rendering, with the generation prompt and what the template writes between that and an answer
    user_span : token range (start, end) of the last user message's content; empty for a text by itself
    end_of_turn : index of the token that ends the last user turn; the last token of the content where the template
        marks the end of a turn by no special token
    suffixes : tokens of what is scored behind the prompt
    left_out : texts that are not scored, since what another one says contains them
    """

    id: str
    input_ids: tuple[int, ...]
    user_span: tuple[int, int]
    end_of_turn: int
    suffixes: tuple[tuple[int, ...], ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncodedExample:
    """A training example, or a window of a document, as tokens.

    Attributes
    ----------
    id : the example's id; of a window the document's id, "#" and its number from 0
    input_ids : the template's rendering of the conversation up to and with the end-of-turn token of the response, cut
        at the token limit; or the tokens of the window
    scored : places in ``input_ids`` of the tokens that the loss is on: of each answer that counts, its content and its
        end-of-turn token
    truncated : whether the limit cut off a part of a response
    document, text : of a window: the document's id, and the text of the tokens that the loss is on
    rejected : of a preference: the conversation with the rejected answer
    reference : of a preference: log-probabilities of both answers under the reference, where the data give them
    """

    id: str
    input_ids: tuple[int, ...]
    scored: tuple[int, ...]
    truncated: bool = False
    document: str = ""
    text: str = ""
    rejected: EncodedExample | None = None
    reference: tuple[float, float] | None = None

    @property
    def n_scored(self) -> int:
        """Number of tokens that the loss is on."""
        return len(self.scored) + (0 if self.rejected is None else len(self.rejected.scored))

    @property
    def empty(self) -> bool:
        """Whether the limit has left no token of an answer."""
        return not self.scored or (self.rejected is not None and not self.rejected.scored)

    def example(self) -> Example:
        """The example with its loss: the mean over the tokens that count; of a preference without its link."""
        from taught.core.example import conversation, preference

        if self.rejected is None:
            return conversation(self.id, self.input_ids, self.scored)
        return preference(self.id, self.input_ids, self.scored, self.rejected.input_ids, self.rejected.scored)


@dataclass(frozen=True)
class _Tokens:
    """Token ids of a text and the characters that each token covers."""

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


class ChatFormat:
    """A tokenizer with its chat template.

    Parameters
    ----------
    tokenizer : a fast tokenizer of ``transformers``
    template : Jinja text; None: the tokenizer's own
    date : the day, YYYY-MM-DD, that the template is told when it asks for today's
    context : the model's longest input in tokens; None: what the tokenizer says, if it says anything

    Raises
    ------
    UserError
        There is no template, or the tokenizer gives no offsets or draws at random.
    """

    def __init__(
        self, tokenizer: Any, template: str | None = None, context: int | None = None, date: str = DATE
    ) -> None:
        if template is None and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "the tokenizer has no chat template",
                value=getattr(tokenizer, "name_or_path", None) or None,
                rule="prompts and examples are rendered as the model was trained to read them",
                fix="pass the model's template: --set model.chat_template=FILE",
            )
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                "the tokenizer gives no character offsets",
                value=type(tokenizer).__name__,
                rule="read-out tokens and response tokens are found by offsets",
                fix="use the fast version of the tokenizer (tokenizer.json)",
            )
        if dropout := getattr(tokenizer.backend_tokenizer.model, "dropout", None):
            raise UserError(
                "the tokenizer draws its tokens at random",
                value=f"dropout: {dropout}",
                rule="a result depends on nothing but what is recorded",
                fix='set "dropout" to null in tokenizer.json',
            )
        self.tokenizer = tokenizer
        self.template = template
        day = datetime.fromisoformat(date)
        self._date = day.strftime("%d %b %Y")
        self._day = {code: day.strftime(code) for code in _CODES}
        stated = getattr(tokenizer, "model_max_length", None)
        # Tokenizers that state no length say 10^30.
        self.context = context or (stated if stated and stated < 10**9 else None)
        added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = frozenset(tokenizer.all_special_ids) | added
        self._special_texts = tuple(tokenizer.convert_ids_to_tokens(sorted(self._special)))
        # Text that the vocabulary lacks becomes the unknown token, which ends no turn.
        self._marks = self._special - ({tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id})

    def digest(self) -> str:
        """Hex digest of the tokens of some conversations: what text becomes here.

        Raises
        ------
        UserError
            The template renders one conversation differently from time to time.
        """
        asked, answered, again = _PROBE
        said = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        system = [{"role": "system", "content": answered}]
        conversations = [said[:1], [*said, {"role": "user", "content": again}], [*system, *said[:1]], said]
        rendered: list[list[str | None]] = [[], []]
        for texts in rendered:
            for messages in conversations:
                texts.append(None)
                with suppress(_CannotRender):  # a template may refuse a system turn
                    texts[-1] = self._render(messages, "a conversation", answer=messages[-1]["role"] == "user")
        if rendered[0] != rendered[1]:
            raise UserError(
                "the chat template renders the same conversation differently each time",
                rule="a result depends on nothing but what is recorded",
                fix="--set model.chat_template=FILE, with a template that draws nothing at random",
            )
        tokens = [None if text is None else self._tokens(text).ids for text in rendered[0]]
        plain = list(self.tokenizer(asked, verbose=False)["input_ids"])
        return hashlib.sha256(json.dumps([tokens, plain]).encode()).hexdigest()

    def encode_prompt(self, content: str | Sequence[Mapping[str, str]], id: str = "prompt") -> EncodedPrompt:
        """Encode an evaluation prompt with the generation prompt behind it.

        Parameters
        ----------
        content : the user's message, or messages that end in one
        id : the prompt's id, for messages of errors

        Raises
        ------
        UserError
            The prompt is empty, longer than the model's context, or changed by the template; the template leaves
            out a turn, or what one holds.
        """
        messages = _messages(content)
        text = self._render(messages, id, answer=True)
        self._refuse_unseen(messages, text, id, answer=True)
        tokens = self._tokens(text)
        self._check_length(tokens.ids, id)
        start, end = self._content(messages, len(messages) - 1, text, id, answer=True)
        span = self._covering(tokens, start, end, id)
        return EncodedPrompt(id, tokens.ids, span, self._end_of_turn(tokens, end, span[1] - 1))

    def encode_answers(
        self, content: str | Sequence[Mapping[str, str]], answers: Sequence[str], id: str = "prompt"
    ) -> EncodedPrompt:
        """Encode an evaluation prompt with the beginnings of answers that are scored behind it.

        The tokens of an answer are those that the rendered conversation has behind the prompt, up to
        the end of the text: not those of the text alone, which may begin otherwise. What the template
        writes between the generation prompt and an answer, such as a line break or an empty block of
        thoughts, belongs to the prompt. White space that the tokenizer joins to one of the answers
        belongs to all of them.

        Parameters
        ----------
        content : the user's message, or messages that end in one
        answers : texts that the assistant's answer begins with
        id : the prompt's id, for messages of errors

        Raises
        ------
        UserError
            As in :meth:`encode_prompt`, of the prompt or an answer; the tokenizer merges the end of
            the prompt with an answer; the template writes something else before each answer.
        """
        prompt = self.encode_prompt(content, id)
        before = _messages(content)
        prompt_text = self._render(before, id, answer=True)
        found = [self._answered(before, prompt_text, answer, id) for answer in answers]
        if not found:
            return prompt
        start = min(first for _, _, first, _ in found)
        heads = {whole.ids[:start] for _, whole, _, _ in found}
        written = [text[whole.offsets[start][0] : content] for text, whole, _, content in found]
        if len(heads) > 1 or any(map(str.strip, written)):
            raise UserError(
                f"the template writes something else before each answer to {id}",
                value=[text[:content][-40:] for text, _, _, content in found],
                rule="all answers of a prompt follow the same tokens",
                fix="--set model.chat_template=FILE, with a template that adds nothing to an answer",
            )
        return replace(prompt, input_ids=heads.pop(), suffixes=tuple(whole.ids[start:] for _, whole, _, _ in found))

    def _answered(
        self, before: Sequence[Mapping[str, str]], prompt_text: str, answer: str, id: str
    ) -> tuple[str, _Tokens, int, int]:
        """The conversation up to the end of an answer, its tokens, and where in both the answer begins."""
        turns = [*before, {"role": "assistant", "content": answer}]
        text = self._render(turns, id, answer=False)
        start, end = self._content(turns, len(turns) - 1, text, id)
        whole = self._tokens(text[:end])
        self._check_length(whole.ids, id)
        prompt = self._tokens(prompt_text if not text[len(prompt_text) : start].strip() else "")
        _check_border(prompt_text, prompt, text, whole, id)
        first, _ = self._covering(whole, start, end, id)
        if first < len(prompt.ids) or text[whole.offsets[first][0] : start].strip():
            raise _merge_error(text, len(prompt_text), id)
        return text, whole, first, start

    def encode_text(self, text: str, id: str = "prompt") -> EncodedPrompt:
        """Encode a text by itself, without a template, as in pretraining.

        All its tokens are scored but the first: the one that begins every text (BOS) where the tokenizer adds it.
        """
        ids = tuple(self.tokenizer(text, verbose=False)["input_ids"])
        self._check_length(ids, id)
        return EncodedPrompt(id, ids[:1], (0, 0), 0, (ids[1:],))

    def encode_example(self, example: Record, max_tokens: int = 512) -> EncodedExample:
        """Encode a conversation; the loss is on its response, and on the other answers that count.

        An answer's tokens begin with the first one of its content (of its reasoning, where it holds some): what the
        template writes between the generation prompt and the answer, such as an empty block of thoughts, leads to the
        answer and is not scored. They end with the token that ends the turn.

        Parameters
        ----------
        example : the example, of kind "pair" or "preference": then each answer is encoded so, in its own conversation
        max_tokens : longest input; what is beyond it is cut off (see ``truncated``)

        Raises
        ------
        UserError
            The template's rendering of the conversation does not begin with the tokens of what
            stands before an answer and its generation prompt; the template leaves out tools, calls
            of tools or reasoning; the prompt is longer than the model's context; both answers of a
            preference are the same tokens.
        """
        if example.kind == "preference":
            chosen = self.encode_example(replace(example, kind="pair"), max_tokens)
            other = replace(example, response=example.rejected, rejected="", kind="pair")
            rejected = self.encode_example(other, max_tokens)
            cut = chosen.truncated or rejected.truncated
            if not cut and chosen.input_ids == rejected.input_ids:
                raise UserError(
                    f"the chosen and the rejected answer of {example.id} are the same tokens",
                    value=[example.response, example.rejected],
                    rule="the chat template may take off the white space around an answer",
                    fix="remove the row",
                )
            return replace(chosen, truncated=cut, rejected=rejected, reference=example.reference)
        turns = example.turns
        text = self._render(turns, example.id, answer=False, tools=example.tools)
        self._refuse_unseen(turns, text, example.id, tools=example.tools)
        whole = self._tokens(text)
        answers = [self._answer(turns, place, text, whole, example) for place in (*example.counted, len(turns) - 1)]
        self._check_length(whole.ids[: answers[0].start], example.id)
        end = answers[-1].stop
        ids = whole.ids[: min(end, min(max_tokens, self.context or max_tokens))]
        scored = tuple(place for answer in answers for place in answer if place < len(ids))
        return EncodedExample(example.id, ids, scored, truncated=end > len(ids))

    def encode_each(self, examples: Iterable[Record], max_tokens: int = 512) -> list[EncodedExample]:
        """Encode examples, truncated ones flagged and a document as its windows."""
        limit = min(max_tokens, self.context or max_tokens)
        encoded: list[EncodedExample] = []
        for example in examples:
            if example.kind == "document":
                encoded += encode_document(self.tokenizer, example, limit)
            else:
                encoded.append(self.encode_example(example, max_tokens))
        return encoded

    def encode_examples(
        self, examples: Iterable[Record], max_tokens: int = 512, drop_truncated: bool = False
    ) -> tuple[list[EncodedExample], list[str]]:
        """Encode examples; none is shortened or left out unless that was asked for.

        Parameters
        ----------
        examples : the examples; a document becomes windows of its tokens
            (:func:`taught.data.documents.encode_document`), none of them truncated
        max_tokens : longest input
        drop_truncated : leave out truncated examples and name them

        Returns
        -------
        encoded
            In the order of ``examples``.
        dropped
            Ids of the examples that were left out.

        Raises
        ------
        UserError
            An example is truncated and is not to be left out; a document has no tokens to score.
        """
        encoded = self.encode_each(examples, max_tokens)
        cut = [example for example in encoded if example.truncated]
        dropped = [example.id for example in cut]
        if not drop_truncated:
            what = f"{len(cut)} examples are longer than {max_tokens} tokens"
            if empty := [example.id for example in cut if example.empty]:
                what += f"; nothing of the response is left in {len(empty)} of them"
            fix = "raise examples.max_tokens, or pass --set examples.drop_truncated=true"
            refuse(dropped, what, rule="no response is cut off silently", fix=fix)
        gone = set(dropped)
        return [example for example in encoded if example.id not in gone], dropped

    def _answer(self, turns: Sequence[Message], place: int, text: str, whole: _Tokens, example: Record) -> range:
        """Places of the tokens of one answer, the end of its turn included."""
        prompt_text = self._render(turns[:place], example.id, answer=True, tools=example.tools)
        prompt = self._tokens(prompt_text)
        _check_border(prompt_text, prompt, text, whole, example.id)
        start, end = self._content(turns, place, text, example.id, tools=example.tools)
        for thoughts in _THOUGHTS:
            if turns[place].get(thoughts):
                start = min(start, self._content(turns, place, text, example.id, thoughts, tools=example.tools)[0])
        first, behind = self._covering(whole, start, end, example.id)
        if first < len(prompt.ids):
            raise _merge_error(text, len(prompt_text), example.id)
        until = len(text)
        if place < len(turns) - 1:
            so_far = self._render(turns[: place + 1], example.id, answer=False, tools=example.tools)
            until = len(so_far) if text.startswith(so_far) else until
        last = self._end_of_turn(whole, end, behind - 1)
        return range(first, (last if whole.offsets[last][0] < until else behind - 1) + 1)

    def _refuse_unseen(
        self, turns: Sequence[Message], text: str, id: str, *, answer: bool = False, tools: Sequence[Any] = ()
    ) -> None:
        """Stop where the template leaves out a turn, or what a turn or the tools hold."""
        without: list[tuple[str, Sequence[Message], Sequence[Any]]] = []
        if tools:
            without.append(("tools", turns, ()))
        for place, turn in enumerate(turns):
            around = turns[:place], turns[place + 1 :]
            if place < len(turns) - 1 and turn["content"].strip():  # the last turn is looked for by its characters
                other = {**turn, "content": _MARK}
                without.append((f"{turn['role']} message", [*around[0], other, *around[1]], tools))
            for key in ("tool_calls", *_THOUGHTS, *(() if turn["role"] == "tool" else ("name",))):
                if turn.get(key):
                    bare = {name: value for name, value in turn.items() if name != key}
                    without.append((key, [*around[0], bare, *around[1]], tools))
        for key, others, described in without:
            with suppress(_CannotRender):
                if self._render(others, id, answer=answer, tools=described) == text:
                    raise UserError(
                        f"the chat template leaves out the {key} of {id}",
                        rule="nothing that the data hold is ignored silently",
                        fix=f"remove the {key} from the data, or set model.chat_template to one that renders it",
                    )
        for turn in turns[:-1]:  # such as thoughts inside an earlier answer
            if turn["role"] != "tool" and turn["content"].strip() not in text:
                raise UserError(
                    f"the chat template leaves out a part of the {turn['role']} message of {id}, or changes it",
                    value=turn["content"],
                    rule="nothing that the data hold is ignored silently",
                    fix="write the message as the template renders it, or set model.chat_template to another one",
                )

    def _render(self, messages: Sequence[Message], id: str, answer: bool, tools: Sequence[Any] = ()) -> str:
        """Return the template's text; ``answer`` adds the generation prompt."""
        for message in messages:  # a special token inside one would end its turn and begin another
            held = " ".join(str(value) for key, value in message.items() if key != "role")
            if found := [text for text in self._special_texts if text in held]:
                raise UserError(
                    f"the {message['role']} message of {id} contains a special token",
                    value=" ".join(found),
                    rule="the text of a message cannot end its turn or begin another",
                    fix="remove the token from the text",
                )
        try:
            template = self.tokenizer.get_chat_template(self.template, list(tools) or None)
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=_TOLD + template if "strftime_now" in template else template,
                tokenize=False,
                add_generation_prompt=answer,
                date_string=self._date,
                taught_day=self._day,
                tools=list(tools) or None,
            )
        except Exception as error:  # Jinja's errors, and whatever a template raises itself
            raise _CannotRender(
                f"the chat template cannot render {id}",
                value=f"{type(error).__name__}: {error}",
                fix="check the roles of the messages, or use another template: --set model.chat_template=FILE",
            ) from error
        return str(text)

    def _tokens(self, text: str) -> _Tokens:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return _Tokens(tuple(encoded["input_ids"]), tuple(tuple(example) for example in encoded["offset_mapping"]))

    def _check_length(self, ids: Sequence[int], id: str) -> None:
        if self.context is not None and len(ids) > self.context:
            raise UserError(
                f"the prompt of {id} is longer than the model's context",
                value=f"{len(ids)} tokens",
                rule=f"at most {self.context} tokens",
                fix="shorten or remove it",
            )

    def _content(
        self,
        turns: Sequence[Message],
        place: int,
        text: str,
        id: str,
        key: str = "content",
        *,
        answer: bool = False,
        tools: Sequence[Any] = (),
    ) -> tuple[int, int]:
        """Return the characters of what one turn holds under a key, in the rendering ``text`` of all turns."""
        others = [*turns[:place], {**turns[place], key: _MARK}, *turns[place + 1 :]]
        before, _, after = self._render(others, id, answer, tools).partition(_MARK)
        start, end, content = len(before), len(text) - len(after), turns[place][key]
        same = text.startswith(before) and text.endswith(after)
        if not content.strip() or not same or text[start:end].strip() != content.strip():
            what = "last message" if place == len(turns) - 1 else f"message {place + 1}"
            raise UserError(
                f"the {what} of {id} is not in the template's rendering as it is",
                value=content,
                rule="a message is rendered unchanged, apart from white space around it",
                fix="fill an empty message, or use another template: --set model.chat_template=FILE",
            )
        return start, end

    def _end_of_turn(self, tokens: _Tokens, content_end: int, otherwise: int) -> int:
        """Index of the first special token behind a content, ``otherwise`` if there is none.

        It may cover white space at the end of the content (an added token with ``lstrip``).
        """
        spans = enumerate(zip(tokens.ids, tokens.offsets, strict=True))
        behind = (place for place, (token, (_, stop)) in spans if token in self._marks and stop > content_end)
        return next(behind, otherwise)

    def _covering(self, tokens: _Tokens, start: int, end: int, id: str) -> tuple[int, int]:
        """Return the range of tokens that share a character with [start, end), special ones left out."""
        spans = enumerate(zip(tokens.ids, tokens.offsets, strict=True))
        inside = [place for place, (token, (a, b)) in spans if a < end and b > start and token not in self._marks]
        if not inside:
            raise UserError(
                f"a message of {id} has no tokens",
                rule="the tokenizer keeps something of every message",
                fix="remove it: the tokenizer drops each of its characters",
            )
        return inside[0], inside[-1] + 1


def _messages(content: str | Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    return [{"role": "user", "content": content}] if isinstance(content, str) else list(content)


def _check_border(prompt_text: str, prompt: _Tokens, text: str, whole: _Tokens, id: str) -> None:
    """Stop unless prompt tokens + response tokens are the tokens of the whole conversation."""
    if not text.startswith(prompt_text):
        raise UserError(
            f"the template renders the prompt of {id} otherwise once it is answered",
            value=text[len(prompt_text) // 2 :],
            rule="the conversation begins with the prompt and its generation prompt",
            fix="--set model.chat_template=FILE, with a template that adds nothing else to a generation prompt",
        )
    if whole.ids[: len(prompt.ids)] != prompt.ids:
        raise _merge_error(text, len(prompt_text), id)


def _merge_error(text: str, border: int, id: str) -> UserError:
    return UserError(
        f"the tokenizer merges the end of the prompt of {id} with its response",
        value=text[max(border - 10, 0) : border + 10],
        rule="the first response token starts where the generation prompt ends",
        fix="remove white space at the beginning of the response"
        if text[border : border + 1].isspace()
        else "--set model.chat_template=FILE, with a template whose generation prompt ends with a special token, "
        "or without white space",
    )
