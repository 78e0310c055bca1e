"""Rendering: turns a row's text or conversation into tokens with the targets marked, by one mechanism for both.

Every row becomes one text, or several where a conversation is taken apart, and the spans of its characters that are
learned. The text is tokenised whole, because inference sees it joined. A token that holds any character of a span is
supervised, so a merge across a boundary masks nothing of the answer. Each example has one BOS, and the end of its text
is supervised. A BOS or an end that the data has already is not added again.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sftlab.data.control import Control
from sftlab.data.encoding import Encoder, Tokens
from sftlab.data.example import Example
from sftlab.data.format import Conversation, Format, Text, reference_of
from sftlab.data.proof import KINDS, Proof, kinds_of
from sftlab.data.spelling import NotWritten
from sftlab.data.template import ChatTemplate, leading_special, special_texts
from sftlab.data.turns import Turns


@dataclass(frozen=True)
class Rendered:
    """A text and its learned (start, stop, weight). `begin` adds the tokenizer's BOS to it, `end` its end of text.

    The text up to `prompt` is what a generation is prompted with. `part` counts the examples of one conversation, from
    1 (0: it is whole); `control` says that the row holds control tokens as text; `kinds` are its kinds of turn.
    """

    source: Text | Conversation
    text: str
    spans: Sequence[tuple[int, int, float]]
    prompt: int
    begin: bool
    end: bool
    references: tuple[str, ...]
    part: int = 0
    control: bool = False
    kinds: frozenset[str] = frozenset()


class Renderer:
    """Turn rows into examples with one tokenizer. Raises: ValueError if it has no end-of-text token or is not fast."""

    def __init__(self, tokenizer: Any, format: Format | None = None, control_tokens: str = "count") -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} has no end-of-text token: a model trained without one never "
                "stops. Set eos_token in its tokenizer_config.json, or name another with model.tokenizer="
            )
        if not tokenizer.is_fast:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no fast version (tokenizer.json)")
        self.tokenizer = tokenizer
        self.eos = int(tokenizer.eos_token_id)
        self.begin = leading_special(tokenizer)
        self.control = Control(tokenizer, control_tokens)
        self.special = frozenset(tokenizer.convert_tokens_to_ids(sorted(special_texts(tokenizer))))
        # The post-processor adds special tokens, which we add ourselves. In byte-level tokenizers it also leaves the
        # space out of a word's offsets, which then do not say where the token begins.
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.post_processor = None
        self.backend.no_padding()
        self.backend.no_truncation()
        self.encoder = Encoder(self.backend)
        self.format = format
        self._proof: Proof | None = None

    @property
    def proof(self) -> Proof:
        """The proof of the chat template, which holds the turns it proves. Raises: ValueError without a template."""
        if self._proof is None:
            template = ChatTemplate(self.tokenizer, self.format.date if self.format else None)
            turns = (self.format.turns, self.format.reasoning) if self.format else ()
            self._proof = Proof(Turns(template, *turns))
        return self._proof

    def render(self, source: Text | Conversation) -> list[Rendered]:
        """Return the texts of one row: one, or one per learned turn of a conversation that is taken apart.

        Raises: NotWritten if the template leaves out a kind of turn that the row has; ValueError if it fails.
        """
        source, control = self.control.checked(source)
        if isinstance(source, Text):
            return [replace(self._plain(source), control=control)]
        source = self._without_ends(source) if control and self.control.mode != "escape" else source
        kinds = kinds_of(source)
        for kind in (k for k in KINDS if k in kinds):
            if trouble := self.proof.check(kind, bool(source.tools)).trouble:
                raise NotWritten.of(trouble)
        return [
            # The template has the BOS (prepare_tokenizer).
            Rendered(
                source,
                w.text,
                w.spans,
                w.prompt,
                begin=False,
                end=w.end,
                references=source.references
                if w.turn == last_spoken(source)
                else reference_of(source.messages[w.turn]),
                part=w.part,
                control=control,
                kinds=kinds,
            )
            for w in self.proof.turns.worded(source)
        ]

    def _plain(self, source: Text) -> Rendered:
        text = source.prompt + source.completion
        bos, ended = self.tokenizer.bos_token, text.rstrip()
        begins = bool(bos) and text.startswith(bos)
        ends = source.completion.rstrip().endswith(self._ends)
        text = ended if ends else text
        spans = [(len(source.prompt), len(text), source.weight)] if source.weight else []
        return Rendered(source, text, spans, len(source.prompt), not begins, not ends, source.references)

    @property
    def _ends(self) -> tuple[str, ...]:
        """The texts of the tokens that end a text or a turn."""
        if not self.tokenizer.chat_template:
            return (self.tokenizer.eos_token,)
        return self.tokenizer.eos_token, *self.proof.turns.template.ends.findall(self.proof.turns.template.end)

    def _without_ends(self, source: Conversation) -> Conversation:
        """Return a conversation without the BOS and ends that stand in its words, because the template adds them."""
        messages = [dict(m) for m in source.messages]
        bos = self.tokenizer.bos_token
        for i, message in enumerate(messages):
            words = message.get("content")
            if not isinstance(words, str):
                continue
            if i == 0 and bos and words.startswith(bos):
                words = words.removeprefix(bos)
            for end in self._ends:
                if words.rstrip().endswith(end):
                    words = words.rstrip().removesuffix(end)
            message["content"] = words
        return replace(source, messages=tuple(messages))

    def examples(self, rendered: Sequence[Rendered], wheres: Sequence[str]) -> list[Example]:
        """Return the examples of these texts; a row without an id is named by its entry in `wheres`."""
        if self.control.mode == "escape":
            return [self._example(r, self._pieces(r.text), w) for r, w in zip(rendered, wheres, strict=True)]
        encoded = self.encoder.encode([r.text for r in rendered])
        return [
            self._example(r, [Piece(0, r.text, encoding, tokens)], w)
            for r, (tokens, encoding), w in zip(rendered, encoded, wheres, strict=True)
        ]

    def _pieces(self, text: str) -> list["Piece"]:
        """Return the pieces of a text; escaped control tokens are pieces of their own, tokenised as letters."""
        pieces: list[Piece] = []
        at = 0
        for match in [*self.control.escaped.finditer(text), None]:
            stop = match.start() if match else len(text)
            if stop > at:
                ((tokens, encoding),) = self.encoder.encode([text[at:stop]])
                pieces.append(Piece(at, text[at:stop], encoding, tokens))
            if match:
                self.backend.encode_special_tokens = True
                letters = self.backend.encode(self.control.plain(match.group()), add_special_tokens=False)
                self.backend.encode_special_tokens = False
                pieces.append(Piece(stop, match.group(), letters, np.array(letters.ids, np.int32)))
                at = match.end()
        return pieces

    def _example(self, rendered: Rendered, pieces: Sequence["Piece"], where: str) -> Example:
        begin = self.begin if rendered.begin else []
        end = [self.eos] if rendered.end else []
        parts = [np.array(begin, np.int32), *(p.ids for p in pieces), np.array(end, np.int32)]
        tokens = np.concatenate(parts) if begin or end or len(pieces) != 1 else pieces[0].ids
        weights = np.zeros(len(tokens), np.float32)
        firsts: dict[int, int] = {}
        for start, stop, weight in rendered.spans:
            firsts[start], last = self._tokens_of(pieces, start, stop)
            weights[len(begin) + firsts[start] : len(begin) + last] = weight
        if rendered.prompt not in firsts:
            firsts[rendered.prompt] = self._tokens_of(pieces, rendered.prompt, len(rendered.text))[0]
        if rendered.end and rendered.spans:
            weights[-1] = rendered.spans[-1][2]
        weights[:1] = 0  # nothing predicts the first token
        source = rendered.source
        supervised = weights > 0
        return Example(
            tokens=tokens,
            supervised=supervised,
            id=(str(source.id) if source.id is not None else where) + (f" turn {rendered.part}" * bool(rendered.part)),
            group=text_hash(source.group if source.group is not None else where),
            num_prompt=len(begin) + firsts[rendered.prompt],
            references=rendered.references,
            weights=weights if any(w != 1 for _, _, w in rendered.spans) else None,
        )

    def _tokens_of(self, pieces: Sequence["Piece"], start: int, stop: int) -> tuple[int, int]:
        """Return (first, last + 1) of the tokens of a text in pieces that hold a character of text[start:stop]."""
        found: list[int] = []
        before = 0
        for piece in pieces:
            count, a, b = len(piece.ids), max(0, start - piece.at), min(len(piece.text), stop - piece.at)
            if a < b and len(pieces) > 1 and self.control.escaped.fullmatch(piece.text):
                found += [before, before + count]
            elif a < b:
                first, last = tokens_of(piece.encoding, a, b, len(piece.text), count)
                first, last = self._without_headers(piece, a, b, first, last)
                found += [before + first, before + last] if first < last else []
            before += count
        return (found[0], found[-1]) if found else (before, before)

    def _without_headers(self, piece: "Piece", start: int, stop: int, first: int, last: int) -> tuple[int, int]:
        """Return (first, last + 1) without a header's token that holds nothing of the span but white space.

        Phi-3's markers swallow the white space beside them, the turn's own included.
        """
        ids, text = piece.ids, piece.text
        while first < last and ids[first] in self.special:
            a, b = piece.encoding.token_to_chars(first)
            if a >= start or text[start:b].strip():
                break
            first += 1
        while first < last and ids[last - 1] in self.special:
            a, b = piece.encoding.token_to_chars(last - 1)
            if b <= stop or text[a:stop].strip():
                break
            last -= 1
        return first, last


@dataclass(frozen=True)
class Piece:
    """A stretch of a text that is tokenised by itself, from character `at`; nearly always the whole text."""

    at: int
    text: str
    encoding: Any
    ids: Tokens


def last_spoken(source: Conversation) -> int:
    """Return the index of the last assistant message."""
    return max(i for i, m in enumerate(source.messages) if m["role"] == "assistant")


def tokens_of(encoding: Any, start: int, stop: int, num_chars: int, num_tokens: int) -> tuple[int, int]:
    """Return (first, last + 1) of the tokens that hold a character of text[start:stop], including merges across it."""
    first = first_token(encoding, start, stop, num_tokens)
    last = first_token(encoding, stop, num_chars, num_tokens)
    if last < num_tokens and encoding.token_to_chars(last)[0] < stop:
        last += 1
    return (min(first, last), last) if first == num_tokens else (first, max(first, last))


def first_token(encoding: Any, start: int, stop: int, num_tokens: int) -> int:
    """Return the first token that holds a character of text[start:stop]; `num_tokens` if none does.

    Characters without a token are skipped, because a normaliser may have dropped them.
    """
    for character in range(start, stop):
        token = encoding.char_to_token(character)
        if token is not None:
            return int(token)
    return num_tokens


def text_hash(text: str) -> int:
    """Return a 63-bit hash of a text, the same in every process."""
    return bytes_hash(text.encode(errors="surrogatepass"))


def bytes_hash(content: bytes) -> int:
    """Return a 63-bit hash of bytes, the same in every process."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) >> 1
