"""A conversation that keeps its cache: each turn computes only the tokens that the turns before did not."""

from .cache import KVCache
from .generation import Generation, generate


class ChatSession:
    """Messages, and the sequence that holds their keys and values.

    Args:
        model, tokenizer: the tokenizer must have a chat template.
        system: content of a first system message.
        **options: of `llmcoopt.generate`.
    """

    def __init__(self, model, tokenizer, system: str | None = None, **options):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.messages = [{"role": "system", "content": system}] if system is not None else []
        self._sequence = KVCache(model, "auto", max_tokens=model.config.max_positions).sequence()
        self._answer: Generation | None = None

    def ask(self, question: str) -> Generation:
        """Adds a user message and returns the running answer. The answer becomes a message when the next question is asked; an answer that was
        stopped early counts as far as it went."""
        self._keep_answer()
        messages = [*self.messages, {"role": "user", "content": question}]
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        same = self._sequence.keep(ids)
        self._answer = generate(
            self.model, ids[same:], tokenizer=self.tokenizer, sequence=self._sequence, **{"continues": False, **self.options}
        )
        self.messages = messages
        return self._answer

    def _keep_answer(self):
        if self._answer is not None:
            self._answer.close()
            self.messages.append({"role": "assistant", "content": self._answer.text})
            self._answer = None
