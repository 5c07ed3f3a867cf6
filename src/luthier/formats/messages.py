"""A conversation as messages: every assistant turn is learned unless it says "loss": false."""

from luthier.formats._format import Format, first_reply, messages, tools
from luthier.method import row_format


@row_format(gives="completions")
class Messages(Format):
    """{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], "tools": [...]}.

    `chat_template_kwargs` is handed to the chat template.
    """

    columns = ("messages",)
    optional = "tools"

    def read(self, raw):
        prompt, rest = first_reply(messages(raw.get("messages"), "messages"), "messages")
        return {"prompt": prompt, "completions": [rest], "tools": tools(raw)}
