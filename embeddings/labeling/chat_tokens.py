"""How the chat that asks for a label, and its three answers, become a model's tokens.

::

    prefix                     question                                     answer
    system, examples, <user>   Query: ... Product: ... <end> <assistant>    irrelevant <end>
    the same for every pair    differs                                      one of three

The texts of prefix, pair and answer are tokenised apart: chat templates put a line break or a
special token between them, at which a tokenizer splits anyway. Text of a query or a title is never
read as a special token, so that no product can end its turn and speak for the assistant.
"""

import re
from collections.abc import Sequence
from typing import Any

from embeddings.labeling.grades import LABELS, Pairs
from embeddings.labeling.prompts import Prompt
from features.errors import BadInputError

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Label: {{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}{{ message['content'] }}\n"
    "{% else %}{{ message['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Label:{% endif %}"
)
"""For a model without a chat template: paragraphs of text, the last one ending in ``Label:``."""

_QUESTION, _ANSWER = "@@QUESTION@@", "@@ANSWER@@"


class ChatTokens:
    """The tokens of one prompt for one tokenizer.

    Args:
        tokenizer: of transformers.
        prompt: what is asked.
        name: of the model, for messages.

    Attributes:
        prefix: what every chat begins with.
        answers: of each label, what follows a question: its name and the end of the turn, so that
            a name that begins another one is told from it.

    Raises:
        BadInputError: the tokenizer's chat template cannot be used.
    """

    def __init__(self, tokenizer: Any, prompt: Prompt, *, name: str) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._name = name
        chat = prompt.messages("", "")
        chat[-1]["content"] = _QUESTION
        asked = self._render(chat, ask=True)
        head, found, tail = asked.partition(_QUESTION)
        if not found or _QUESTION in tail:
            raise BadInputError(f"{name}: its chat template does not show what a user says")
        answered = self._render([*chat, {"role": "assistant", "content": _ANSWER}], ask=False)
        # Some templates tell an answer of the past from one to be written, by what a model thought.
        if not answered.startswith(asked):
            asked = answered.partition(_ANSWER)[0]
        opening, found, closing = answered.removeprefix(asked).partition(_ANSWER)
        if not found:
            raise BadInputError(f"{name}: its chat template does not show what an assistant says")
        self.prefix = self._encode(head)
        ending = self._ending(closing)
        # With what comes before it, as a tokenizer may join a name with a space.
        rest = [self._encode(tail + opening + label) + ending for label in LABELS]
        shared = next(n for n, tokens in enumerate(zip(*rest, strict=False)) if len({*tokens}) > 1)
        self._lead = rest[0][:shared]
        self.answers = [tokens[shared:] for tokens in rest]

    def questions(self, pairs: Pairs) -> list[list[int]]:
        """Return the tokens of what is asked of each pair."""
        texts = [
            self._prompt.question(query, title).strip()
            for query, title in zip(pairs.queries, pairs.titles, strict=True)
        ]
        if not texts:
            return []
        tokens: list[list[int]] = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            split_special_tokens=True,
            verbose=False,
        )["input_ids"]
        return [question + self._lead for question in tokens]

    def check(self, pairs: Pairs, questions: Sequence[Sequence[int]], limit: int) -> None:
        """Raise `BadInputError` for a pair whose chat has more than ``limit`` tokens."""
        room = limit - len(self.prefix) - max(map(len, self.answers))
        if room <= len(self._lead):
            raise BadInputError(
                f"prompt '{self._prompt.version}': has {limit - room + len(self._lead):,} tokens "
                f"without a pair, and {self._name} reads {limit:,}, by 'max_tokens' or at all"
            )
        for row, question in enumerate(questions):
            if len(question) > room:
                raise BadInputError(
                    f"query {pairs.queries[row][:80]!r} with title {pairs.titles[row][:80]!r}: the "
                    f"prompt has {limit - room + len(question):,} tokens, and {self._name} reads "
                    f"{limit:,}, by 'max_tokens' or at all"
                )

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=False
        )
        return tokens

    def _ending(self, closing: str) -> list[int]:
        """Return how a turn ends: up to a special token, or with all that follows an answer."""
        tokens = self._encode(closing)
        special = {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}
        for position, token in enumerate(tokens):
            if token in special:
                return tokens[: position + 1]
        end = self._tokenizer.eos_token_id
        return tokens or ([] if end is None else [end])

    def _render(self, chat: list[dict[str, str]], *, ask: bool) -> str:
        """Return a chat as text; where a template knows no system, the first user says its part."""
        from jinja2 import TemplateError

        options: dict[str, Any] = {
            "tokenize": False,
            "add_generation_prompt": ask,
            "enable_thinking": False,
        }
        if self._tokenizer.chat_template is None:
            options["chat_template"] = PLAIN_TEMPLATE
        system, user, *rest = chat
        told = f"{system['content']}\n\n{user['content']}"
        try:
            return str(self._tokenizer.apply_chat_template(chat, **options))
        except TemplateError:
            chat = [{"role": "user", "content": told}, *rest]
        try:
            return str(self._tokenizer.apply_chat_template(chat, **options))
        except TemplateError as error:
            reason = re.sub(r"\s+", " ", str(error))
            raise BadInputError(f"{self._name}: its chat template fails: {reason}") from error
