"""Dialogs that one instruction holds for, while they are answered turn by turn."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.policy.candidates import Asked, shown_prompt
from llama_jax.data.record_kinds import Conversation, Messages, Prompted
from llama_jax.errors import refusals_of
from llama_jax.rl.context_distillation import with_preprompt
from llama_jax.rl.ghost_attention import Constraint, Instruction, dialogs_of, instruction_of, learnt
from llama_jax.rl.rejection import Candidate, Keep, select
from llama_jax.tokenizer.chat_format import ChatFormat, Message


@dataclasses.dataclass
class Held:
    """A dialog, and how far it has come.

    Attributes:
      index: its number among all.
      instruction: that holds for it.
      said: what comes before each of its answers, behind the answer before.
      fields: the record of each, for what judges answers.
      place: the file and record of the first.
      messages: all up to the last answer, without the instruction.
      is_over: an answer had no words.
    """

    index: int
    instruction: Instruction
    said: Sequence[Messages]
    fields: Sequence[Mapping[str, Any]]
    place: str
    messages: Messages = ()
    is_over: bool = False

    def ask(self, turn: int, turns: int, chat_format: ChatFormat, *, everywhere: bool) -> Asked:
        """What the next answer is drawn to, and judged behind.

        Args:
          turn: from 0.
          turns: the most of any dialog.
          chat_format: spells it.
          everywhere: the instruction stands before every message by the user, else before the first alone.

        Raises:
          InputError: names the record that cannot be asked.
        """
        plain = (*self.messages, *self.said[turn])
        with refusals_of(self.place):
            shown = with_preprompt(plain, self.instruction.text, everywhere=everywhere)
            ids = chat_format.encode_prompt(shown)
        record = {
            **self.fields[turn], 'prompt': shown_prompt(shown), 'instruction': self.instruction.text,
            'constraints': [dict(one.fields) for one in self.instruction.constraints],
        }  # fmt: skip
        return Asked(self.index * turns + turn, record, plain, ids)

    def take(self, asked: Asked, candidates: Sequence[Candidate]) -> Candidate | None:
        """The best answer, with which the dialog goes on; None where none has words."""
        best = [candidates[place] for (place,) in select(candidates, Keep())]
        self.is_over = not best
        if self.is_over:
            return None
        self.messages = (*asked.messages, Message('assistant', best[0].completion))
        return best[0]

    def line(self, asked: Asked, best: Candidate, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """What is written of an answer."""
        users = sum(message.role == 'user' for message in asked.messages)
        return {
            'index': asked.index, 'messages': learnt(asked.messages, self.instruction.text, best.completion),
            'turn': users, 'score': best.score, 'stopped': best.stopped, 'instruction': self.instruction.text,
            'constraints': [one.text for one in self.instruction.constraints],
            'candidates': [dataclasses.asdict(one) for one in candidates],
        }  # fmt: skip


def held_prompts(
    prompts: Sequence[Prompted], turns: int, constraints: Sequence[Constraint], most: int, seed: int
) -> list[Held]:
    """As many dialogs as prompts, each of which stands once at every turn."""
    return [
        Held(
            index, instruction_of(constraints, most, seed, index), [prompts[place].messages for place in places],
            [prompts[place].fields for place in places], prompts[places[0]].place,
        )
        for index, places in enumerate(dialogs_of(len(prompts), turns, seed))
    ]  # fmt: skip


def held_dialogs(
    dialogs: Sequence[Conversation], constraints: Sequence[Constraint], most: int, seed: int
) -> list[Held]:
    """Conversations without their last answer; those before stay as they are."""
    return [
        Held(index, instruction_of(constraints, most, seed, index), [one.messages[:-1]], [{}], one.place)
        for index, one in enumerate(dialogs)
    ]
