"""A conversation as messages: every assistant turn is supervised unless it has "loss": false.

A turn may also have "loss": true (of any role) and "loss_scale": 0.5, the weight of its tokens in `sft` and
similar objectives.
"""

from luthier.methods.formats._base import COMPLETIONS, Format, conversation, messages, tools
from luthier.registry import row_format


@row_format(
    provides=[COMPLETIONS],
    use_when="rows are chats as `messages` with roles, in OpenAI's layout; tools may be among them.",
)
class Messages(Format):
    """{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], "tools":
    [...]}.

    `chat_template_kwargs` is passed to the chat template.
    """

    reading = "conversations in `messages`; the assistant's turns are learned"
    columns = ("messages",)
    # false: user, system and tool turns are supervised too, except those with "loss": false
    assistant_only_loss: bool = True

    optional = "tools"

    def read(self, raw):
        prompt, rest = conversation(
            messages(raw.get("messages"), "messages"), "messages", self.assistant_only_loss
        )
        return {"prompt": prompt, "completions": [rest], "tools": tools(raw)}
