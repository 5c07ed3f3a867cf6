"""ShareGPT conversations: from/value turns by human, gpt, system, function_call, observation or tool."""

from luthier.methods.formats._base import COMPLETIONS, Format, conversation, messages, tools, with_system
from luthier.registry import row_format


@row_format(
    provides=[COMPLETIONS],
    use_when="rows are chats as `conversations` with from and value.",
)
class ShareGPT(Format):
    """{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}], "system",
    "tools"}.

    A function_call becomes an assistant turn with tool calls; an observation a tool turn.
    """

    reading = "conversations in `conversations`; the assistant's turns are learned"
    columns = ("conversations",)
    # false: user, system and tool turns are supervised too, except those with "loss": false
    assistant_only_loss: bool = True

    optional = "tools system"

    def read(self, raw):
        turns = with_system(messages(raw.get("conversations"), "conversations"), raw)
        prompt, rest = conversation(turns, "conversations", self.assistant_only_loss)
        return {"prompt": prompt, "completions": [rest], "tools": tools(raw)}
