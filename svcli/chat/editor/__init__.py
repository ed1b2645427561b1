"""The line editor of a conversation, the only place that knows prompt_toolkit; loaded when somebody is to type."""
